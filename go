#!/bin/sh
''':'
# To the shell these lines find a Python that is new enough, .venv's own first (it starts sooner than a version manager's python3); to Python they are a string.
for python in "$(dirname "$0")/.venv/bin/python" python3 python3.13 python3.12 python3.11; do
    "$python" -S -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec "$python" -SE "$0" "$@"
done
echo "go: error: onetorch needs Python 3.11 or newer and the PATH has none: install one and run ./go again" >&2
exit 2
'''
# The way in: makes .venv beside this file on the first call, then runs what is asked for.
#
#     ./go train ppo           any onetorch command (none: its help)
#     ./go test [ARGUMENTS]    the tests and doctests, with pytest's arguments
#     ./go lint                ruff and mypy
#     ./go lock [ARGUMENTS]    writes requirements.lock anew, with uv's arguments (--upgrade, --upgrade-package NAME)
#
# It installs what requirements.lock pins and this project, with uv where that is on the PATH, else with venv and pip, under the user's own settings of either.
# Only torch is looked at twice: on Linux its plain wheel brings gigabytes of CUDA libraries, which a machine without an NVIDIA GPU has no use for.
#
# .venv/go.stamp says what .venv was made from and makes the next call quick; .venv/go.log is what the installers said.
import os
import re
import shutil
import subprocess
import sys
import time

if sys.version_info < (3, 11):  # noqa: UP036  reached by `python go`, as on Windows
    sys.stderr.write("go: error: onetorch needs Python 3.11 or newer, and this is " + sys.version.split()[0] + " (" + sys.executable + ")\n")
    sys.exit(2)

ROOT = os.path.dirname(os.path.realpath(__file__))
VENV = os.path.join(ROOT, ".venv")
WINDOWS = os.name == "nt"
BIN = os.path.join(VENV, "Scripts" if WINDOWS else "bin")
PYTHON = os.path.join(BIN, "python.exe" if WINDOWS else "python")
ONETORCH = os.path.join(BIN, "onetorch.exe" if WINDOWS else "onetorch")
PINS = os.path.join(ROOT, "requirements.lock")
PROJECT = os.path.join(ROOT, "pyproject.toml")
STAMP, LOG, GUARD = (os.path.join(VENV, name) for name in ("go.stamp", "go.log", "go.guard"))
UNFINISHED = "unfinished"  # the stamp while .venv is being made: found at the start of a call, it says that an earlier one was killed
EXTRAS = ("media", "rl", "data", "dev")  # what the lock pins beside the core
UV = "uv==0.13.9"  # fetched only where pip by itself would bring the wrong build of torch
OLDEST_DRIVER = 580  # of NVIDIA's, for CUDA 13, which the plain wheel of torch 2.13 is built with
OFFLINE = re.compile(
    r"connection broken|Failed to establish|dns error|name resolution|error sending request|Network is unreachable|Connection refused|ProxyError|[Tt]imed? ?out"
)


class Failed(Exception):  # noqa: N818
    """What the user is told, in one line."""


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["lock"]:
        return lock(arguments[1:])
    if not ready():
        set_up()
    if arguments[:1] in (["test"], ["lint"]):
        os.chdir(ROOT)
        if arguments[0] == "test":
            return become([PYTHON, "-m", "pytest", *arguments[1:]])
        return max([subprocess.call([PYTHON, "-m", *tool]) for tool in (["ruff", "check"], ["mypy"])])
    return become([*([ONETORCH] if WINDOWS else [PYTHON, ONETORCH]), *(arguments or ["--help"])])


def become(command: list[str]) -> int:
    """Runs the command in place of this process; on Windows, which has no such thing, waits for it."""
    return subprocess.call(command) if WINDOWS else os.execv(command[0], command)


# ---------------------------------------------------------------------------------------------------------------------------------- the environment


def ready() -> bool:
    """Whether .venv is there, whole, and made from the files as they now stand."""
    try:
        return read(STAMP) == stamp() and all(os.path.exists(path) for path in (PYTHON, ONETORCH, os.path.join(site_packages(), "torch")))
    except OSError:
        return False


def stamp() -> str:
    return "\n".join([ROOT, os.path.realpath(PYTHON), read(PINS), read(PROJECT)])


def site_packages() -> str:
    if WINDOWS:
        return os.path.join(VENV, "Lib", "site-packages")
    lib = os.path.join(VENV, "lib")
    return os.path.join(lib, next((name for name in os.listdir(lib) if name.startswith("python")), ""), "site-packages")


def set_up() -> None:
    """Makes .venv or brings it up to date. One process at a time; one that waited for another finds the work done."""
    os.makedirs(VENV, exist_ok=True)
    with open(GUARD, "w") as guard:  # the installers inherit it: one that outlives a killed ./go still keeps others out
        take(guard.fileno())
        if ready():
            return
        found = read(STAMP) if os.path.exists(STAMP) else ""
        keep = usable(found)
        write(STAMP, UNFINISHED)
        if not keep:
            clear()
        write(LOG, "")
        try:
            install(guard.fileno(), make=not keep)
        except Failed:
            if keep:  # an installer that gives up leaves the environment as it was
                write(STAMP, found)
            raise
        write(STAMP, stamp())


def usable(found: str) -> bool:
    """Whether to install into the .venv that is there; otherwise it is emptied and made anew."""
    check = [PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    runs = os.path.exists(PYTHON) and subprocess.call(check, stderr=subprocess.DEVNULL) == 0
    if found:
        return runs and found != UNFINISHED and found.split("\n")[:2] == stamp().split("\n")[:2]
    if runs or set(os.listdir(VENV)) <= {"go.guard", "go.log"} or os.path.exists(os.path.join(VENV, "pyvenv.cfg")):
        return runs  # someone's own environment serves; a broken one is no loss
    raise Failed(f"{VENV} is there and is no virtual environment: move it away and run ./go again")


def clear() -> None:
    for entry in list(os.scandir(VENV)):
        if entry.path in (STAMP, GUARD):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def take(guard: int) -> None:
    """Locks the file, waiting for whoever has it."""
    if sys.platform == "win32":
        import msvcrt

        def attempt(wait: bool) -> None:
            msvcrt.locking(guard, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        def attempt(wait: bool) -> None:
            fcntl.flock(guard, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)

    try:
        attempt(wait=False)
    except OSError:
        say(f"another ./go is making {VENV}; waiting for it")
        attempt(wait=True)


# ------------------------------------------------------------------------------------------------------------------------------------ the installers


def install(guard: int, make: bool) -> None:
    """Python, then torch if its build has to be chosen, then all pins, then the project itself, editable."""
    base = sys._base_executable  # type: ignore[attr-defined]  # the interpreter outside any virtual environment
    uv = shutil.which("uv")
    say(f"making {VENV} with {'uv' if uv else 'pip'} from Python {sys.version.split()[0]}: once, a minute or two" if make else f"bringing {VENV} up to date")

    def call(what: str, *command: str) -> None:
        run_logged(what, list(command), guard)

    if uv:
        if make:
            call("the virtual environment", uv, "venv", "--allow-existing", "--python", base, VENV)
        pip = [uv, "pip", "install", "--python", PYTHON]
    else:
        if make or installed("pip") is None:
            call("the virtual environment", base, "-m", "venv", VENV)
        pip = [PYTHON, "-m", "pip", "install", "--no-compile"]  # compiling all of torch takes longer than fetching it; see the last step

    torch = pinned("torch")
    if installed("torch") != torch:
        backend = torch_backend(*(resolve_with_uv(uv, torch) if uv else resolve_with_pip(torch)), sys.platform, nvidia_driver())
        if backend:
            if not uv:
                call(f"{UV}, which knows where the {backend} build of torch is", *pip, UV)
            chooser = [uv or os.path.join(BIN, "uv.exe" if WINDOWS else "uv"), "pip", "install", "--python", PYTHON, "--torch-backend", backend]
            call(f"the {backend} build of torch", *chooser, f"torch=={torch}", "--constraint", PINS)
    call("the dependencies", *pip, "--requirement", PINS)
    call("onetorch", *pip, "--no-deps", "--no-build-isolation", "--editable", ROOT)
    call("the first import", PYTHON, "-c", "import torch, gymnasium, onetorch.cli")  # shows that it works, and compiles what a start needs


def torch_backend(version: str, cuda: bool, platform: str, driver: int | None) -> str | None:
    """uv's --torch-backend for this machine, or None where what the installer would fetch by itself is right.

    version: what it would fetch, such as "2.13.0" or "2.13.0+cpu"; cuda: whether that brings CUDA; driver: NVIDIA's major version, None without a GPU.
    """
    if "+" in version:  # the user's settings lead to one build: theirs to say
        return None
    if driver is None:
        return "cpu" if cuda else None
    if cuda:
        return None if driver >= OLDEST_DRIVER else "auto"
    return "auto" if platform == "win32" else None


def resolve_with_uv(uv: str, version: str) -> tuple[str, bool]:
    """The version of torch that uv would install, and whether CUDA's libraries come with it."""
    command = [uv, "pip", "compile", "-", "--python", PYTHON, "--quiet", "--no-header", "--no-annotate"]
    found = ask("the choice of torch's build", command, f"torch=={version}\n")
    names = dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", found, re.MULTILINE))
    return names.get("torch", version), any(name.startswith("nvidia-") for name in names)


def resolve_with_pip(version: str) -> tuple[str, bool]:
    """The same for pip. Its dry run would not do: before 25.3 that downloads what it would install."""
    found = ask("the choice of torch's build", [PYTHON, "-m", "pip", "index", "versions", "torch"])
    versions = re.findall(r"[^\s,]+", found.partition("Available versions:")[2].partition("\n")[0])
    best = next((each for each in versions if each.split("+")[0] == version), version)  # best first: 2.13.0+cpu before 2.13.0
    return best, sys.platform == "linux"


def nvidia_driver() -> int | None:
    """The major version of NVIDIA's driver if a GPU of theirs is within reach, else None."""
    smi = shutil.which("nvidia-smi")
    if smi:
        answer = subprocess.run([smi, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
        return int(answer.stdout.split(".")[0]) if answer.returncode == 0 and answer.stdout[:1].isdigit() else None
    if os.path.exists("/dev/nvidiactl") and os.path.exists("/proc/driver/nvidia/version"):
        found = re.search(r"Kernel Module.*?\s(\d+)\.\d", read("/proc/driver/nvidia/version"))
        return int(found[1]) if found else OLDEST_DRIVER
    return None


def pinned(name: str) -> str:
    return re.findall(rf"^{name}==([^\s;]+)", read(PINS), re.MULTILINE)[0]


def installed(name: str) -> str | None:
    """The version of a package in .venv, without its build (2.13.0 for 2.13.0+cpu), or None."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    answer = subprocess.run([PYTHON, "-c", code, name], capture_output=True, text=True)
    return answer.stdout.strip().split("+")[0] if answer.returncode == 0 else None


def lock(arguments: list[str]) -> int:
    """Writes requirements.lock: pins for every platform and Python from 3.11 on, without torch's build and the CUDA libraries that some of its builds bring."""
    uv = shutil.which("uv")
    if not uv:
        raise Failed("writing the lock needs uv: install it and run ./go lock again")
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    command = [uv, "pip", "compile", PROJECT, *extras, "--universal", "--python-version", "3.11", "--fork-strategy", "fewest", "--no-header", "--no-annotate"]
    found = subprocess.run([*command, "--quiet", "--output-file", PINS, *arguments], cwd=ROOT)
    if found.returncode:
        return found.returncode
    pins = [re.sub(r"\+\w+", "", line) for line in read(PINS).splitlines() if not re.match(r"#|nvidia-|cuda-|triton=", line)]
    write(PINS, "\n".join(["# Written by ./go lock from pyproject.toml: change that, then run it again.", *pins, ""]))
    return 0


# ------------------------------------------------------------------------------------------------------------------------------------- commands, words


def run_logged(what: str, command: list[str], guard: int) -> None:
    """Runs an installer, its words in the log, a clock on the terminal. Raises Failed."""
    inherit = {} if WINDOWS else {"pass_fds": (guard,)}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # in .venv it would only cost seconds at every start
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **inherit)  # type: ignore[call-overload]
    start, clock = time.monotonic(), sys.stderr.isatty()
    while True:
        try:
            process.wait(0.2 if clock else None)
            break
        except subprocess.TimeoutExpired:
            sys.stderr.write(f"\r  {what}, {time.monotonic() - start:.0f} s ")
            sys.stderr.flush()
    if clock:
        sys.stderr.write("\r\033[K")
    if process.returncode:
        raise Failed(explain(what, read(LOG)[begin:]))


def ask(what: str, command: list[str], given: str = "") -> str:
    """What a command prints. Raises Failed."""
    answer = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True)
    if answer.returncode:
        raise Failed(explain(what, answer.stdout + answer.stderr))
    return answer.stdout


def explain(what: str, said: str) -> str:
    """One line out of an installer's many: what failed, why, what to do."""
    if "No space left" in said:
        return f"no space left on the device for {what}: make room and run ./go again"
    if "ensurepip" in said:
        return "this Python cannot make a virtual environment: install its venv package (Debian, Ubuntu: apt install python3-venv) or uv, and run ./go again"
    if OFFLINE.search(said):
        where = "connect this machine, or name a mirror or a folder of wheels in pip's or uv's settings"
        return f"no answer from the package index for {what}: {where}, and run ./go again"
    causes = [line.strip() for line in said.splitlines() if re.match(r"\s*(error|ERROR|Error|×|Because|cause)", line)]
    return f"installing {what} failed: {' '.join(causes[:1] or said.split(chr(10))[-2:-1])} (all of it in {LOG})"


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path: str, text: str) -> None:
    """Puts the file there whole or not at all."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


def say(line: str) -> None:
    sys.stderr.write(f"go: {line}\n")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (Failed, OSError) as error:
        say(f"error: {error}")
        sys.exit(3)
    except KeyboardInterrupt:
        say("stopped: run it again to go on")
        sys.exit(130)
