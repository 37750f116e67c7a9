"""./go: which torch it asks for, and that .venv is made once, repaired when broken, and never by two at a time.

The lock is checked against pyproject.toml. The installer is a stand-in that makes a tiny .venv; the real ones are what `./go test` itself went through.
"""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load_go():
    loader = importlib.machinery.SourceFileLoader("go", str(ROOT / "go"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("go", loader))
    loader.exec_module(module)
    return module


go = load_go()


# ------------------------------------------------------------------------------------------------------------------------------------- which torch


@pytest.mark.parametrize(
    ("version", "cuda", "platform", "driver", "backend"),
    [
        ("2.13.0", True, "linux", None, "cpu"),  # the case it is all about: no GPU, the plain wheel brings CUDA
        ("2.13.0", True, "linux", 580, None),
        ("2.13.0", True, "linux", 595, None),
        ("2.13.0", True, "linux", 570, "auto"),  # a driver too old for the plain wheel: uv picks the CUDA that it can do
        ("2.13.0+cpu", False, "linux", None, None),  # the user's settings lead to a certain build
        ("2.13.0+cpu", False, "linux", 580, None),
        ("2.13.0+cu126", True, "linux", None, None),  # as on the login node of a cluster
        ("2.13.0", False, "linux", None, None),  # a mirror whose plain wheel is for the CPU
        ("2.13.0", False, "linux", 580, None),
        ("2.13.0", False, "darwin", None, None),
        ("2.13.0", False, "win32", None, None),
        ("2.13.0", False, "win32", 580, "auto"),  # the plain wheel for Windows has no CUDA
    ],
)
def test_torch_backend(version, cuda, platform, driver, backend):
    assert go.torch_backend(version, cuda, platform, driver) == backend


@pytest.mark.parametrize(
    ("versions", "best"),
    [
        ("2.15.0, 2.13.0+cpu, 2.13.0, 2.12.1", "2.13.0+cpu"),
        ("2.15.0, 2.13.0, 2.12.1", "2.13.0"),
        ("2.15.0, 2.13.0.post1, 2.12.1", "2.13.0"),  # not there: pip's own error will say so
    ],
)
def test_what_pip_would_fetch(monkeypatch, versions, best):
    monkeypatch.setattr(go, "ask", lambda what, command: f"torch (2.15.0)\nAvailable versions: {versions}\n  INSTALLED: none\n")
    assert go.resolve_with_pip("2.13.0") == (best, sys.platform == "linux")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("WARNING: Retrying after connection broken by 'X'\nERROR: No matching distribution found for x\n", "no answer from the package index"),
        ("error: Request failed\n  cause: dns error\n", "no answer from the package index"),
        ("OSError: [Errno 28] No space left on device\n", "make room"),
        ("The virtual environment was not created successfully because ensurepip is not available.\n", "apt install python3-venv"),
        ("Collecting x\nERROR: No matching distribution found for x==9\n", "ERROR: No matching distribution found for x==9"),
        ("", "installing x failed"),
    ],
)
def test_an_installer_s_words_become_one_line(said, expected):
    line = go.explain("x", said)
    assert expected in line
    assert "\n" not in line


# ---------------------------------------------------------------------------------------------------------------------------------------- the lock


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.]+)( ; .+)?", line) for line in lines]
    assert all(matches), "each line of the lock is name==version, perhaps with a marker: no build, no hash, no place"
    names = [match[1] for match in matches]
    assert len(set(names)) == len(names)
    return {match[1]: match[2] for match in matches}


def requirements() -> list[tuple[str, str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [each for extra in go.EXTRAS for each in project["project"]["optional-dependencies"][extra]]
    return [(normal(match[1]), match[2]) for match in (re.fullmatch(r"([\w.-]+)(?:\[.+\])?([<>=!~].*)?", each) for each in wanted)]


def satisfies(version: str, ranges: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(ranges or "").contains(version)


@pytest.mark.parametrize(("name", "ranges"), requirements())
def test_the_lock_pins_what_the_project_asks_for(name, ranges):
    assert satisfies(pins()[name], ranges)


def test_the_lock_check_sees_a_pin_out_of_range():
    assert not satisfies("2.10.0", ">=2.11")


def test_the_lock_holds_nothing_that_only_cuda_needs():
    assert [name for name in pins() if name.startswith(("nvidia", "cuda", "triton"))] == []


def test_what_is_installed_here_is_complete():
    """Every requirement of a pinned package that applies here is pinned too."""
    import importlib.metadata as metadata

    from packaging.requirements import Requirement

    locked = pins()
    here = {normal(package.name): package for package in metadata.distributions()}
    for name in locked:
        if name not in here or here[name].version.split("+")[0] != locked[name]:
            continue  # a pin for another platform, or an environment of the user's own
        for need in map(Requirement, here[name].requires or []):
            applies = need.marker is None or need.marker.evaluate({"extra": ""})
            if applies and not normal(need.name).startswith(("nvidia-", "cuda-", "triton")):
                assert normal(need.name) in locked, f"{name} needs {need}"


# ------------------------------------------------------------------------------------------------------------------- .venv, with a stand-in installer

STAND_IN = """#!{python}
import os, sys, time
from pathlib import Path

here = Path(__file__).parent
words = sys.argv[1:]
with open(here / "calls", "a") as calls:
    calls.write(" ".join(words) + "\\n")
venv = Path({venv!r})
site = venv / "lib" / "python{version}" / "site-packages"
if words[0] == "venv":
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    site.mkdir(parents=True)  # fails where one is left from before
    (venv / "pyvenv.cfg").write_text("home = {home}\\ninclude-system-site-packages = false\\n")
    (venv / "bin" / "python").symlink_to({base!r})
elif words[:2] == ["pip", "compile"]:
    print((here / "resolution").read_text())
elif "--requirement" in words:
    if (here / "fail").exists():
        sys.exit("error: dns error")
    while (here / "hang").exists():
        time.sleep(0.05)
    for package in ("torch", "safetensors", "gymnasium", "onetorch"):
        (site / package).mkdir(exist_ok=True)
        (site / package / "__init__.py").touch()
    (site / "safetensors" / "torch.py").touch()
    (site / "onetorch" / "cli.py").touch()
elif "--editable" in words:
    (venv / "bin" / "onetorch").write_text("import sys; print('onetorch', *sys.argv[1:])")
"""


@pytest.fixture
def place(tmp_path):
    """A copy of the project's way in, in a folder with a space in its name; its folder bin is all of the PATH, with a stand-in for uv and no GPU."""
    if os.name == "nt":
        pytest.skip("the stand-in is a script")
    root = tmp_path / "a b"
    (root / "bin").mkdir(parents=True)
    for name in ("go", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    base = os.path.realpath(sys._base_executable)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    (root / "bin" / "uv").write_text(STAND_IN.format(python=base, venv=str(root / ".venv"), version=version, home=os.path.dirname(base), base=base))
    (root / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (root / "bin" / "resolution").write_text("torch==2.13.0+cpu\n")
    for name in ("uv", "nvidia-smi"):
        (root / "bin" / name).chmod(0o755)
    for name in ("sh", "dirname"):
        (root / "bin" / name).symlink_to(shutil.which(name))
    (root / "bin" / "python3").symlink_to(base)
    return root


def call(place: Path, *words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([place / "go", *words], capture_output=True, text=True, env={"PATH": str(place / "bin")}, cwd="/", timeout=60, **options)


def start(place: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen([place / "go", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PATH": str(place / "bin")}, cwd="/")


def calls(place: Path) -> list[str]:
    path = place / "bin" / "calls"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_call(place: Path, word: str) -> None:
    deadline = time.monotonic() + 30
    while not any(word in line for line in calls(place)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_first_call_makes_it_second_does_not(place):
    first = call(place, "train", "ppo", "--name", "with space")
    assert (first.returncode, first.stdout) == (0, "onetorch train ppo --name with space\n")
    assert [line.split()[:2] for line in calls(place)] == [["venv", "--allow-existing"], ["pip", "compile"], ["pip", "install"], ["pip", "install"]]
    second = call(place)
    assert (second.returncode, second.stdout, second.stderr) == (0, "onetorch --help\n", "")
    assert len(calls(place)) == 4


def test_without_a_gpu_the_cpu_build_is_asked_for(place):
    (place / "bin" / "resolution").write_text("nvidia-cublas==13.1.1.3\ntorch==2.13.0\ntriton==3.7.1 ; sys_platform == 'linux'\n")
    assert call(place).returncode == 0
    assert [line.partition("--torch-backend ")[2].split()[:2] for line in calls(place) if "--torch-backend" in line] == [["cpu", "torch==" + pins()["torch"]]]


@pytest.mark.parametrize(("driver", "backends"), [("580.65.06", []), ("535.183.01", ["auto"])])
def test_with_a_gpu_the_cuda_build_comes(place, driver, backends):
    (place / "bin" / "resolution").write_text("nvidia-cublas==13.1.1.3\ntorch==2.13.0\n")
    (place / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\necho {driver}\necho {driver}\n")
    assert call(place).returncode == 0
    assert [line.partition("--torch-backend ")[2].split()[0] for line in calls(place) if "--torch-backend" in line] == backends


def test_no_network_is_one_line_and_harms_nothing(place):
    (place / "bin" / "fail").touch()
    failed = call(place)
    assert failed.returncode == 3
    assert failed.stdout == ""
    assert re.fullmatch(r"go: making .+\ngo: error: no answer from the package index .+ run \./go again\n", failed.stderr)
    (place / "bin" / "fail").unlink()
    assert call(place).returncode == 0
    (place / ".venv" / "mine").touch()
    with open(place / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    (place / "bin" / "fail").touch()
    assert call(place).returncode == 3
    (place / "bin" / "fail").unlink()
    assert call(place).returncode == 0
    assert (place / ".venv" / "mine").exists()  # brought up to date, not made anew


def break_python(place):
    (place / ".venv" / "bin" / "python").unlink()
    (place / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")


def break_libraries(place):
    shutil.rmtree(place / ".venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / "torch")


def break_command(place):
    (place / ".venv" / "bin" / "onetorch").unlink()


def break_stamp(place):
    (place / ".venv" / "go.stamp").write_text("unfinished")


def break_place(place):
    text = (place / ".venv" / "go.stamp").read_text()
    (place / ".venv" / "go.stamp").write_text(text.replace(str(place), "/somewhere/else", 1))


@pytest.mark.parametrize("damage", [break_python, break_libraries, break_command, break_stamp, break_place])
def test_a_broken_environment_is_repaired(place, damage):
    call(place)
    damage(place)
    again = call(place, "list")
    assert (again.returncode, again.stdout) == (0, "onetorch list\n")
    before = len(calls(place))
    call(place)
    assert len(calls(place)) == before


def test_killed_in_the_middle_is_made_anew(place):
    (place / "bin" / "hang").touch()
    process = start(place)
    wait_for_call(place, "--requirement")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (place / "bin" / "hang").unlink()
    again = call(place)
    assert again.returncode == 0
    assert [line.split()[0] for line in calls(place)].count("venv") == 2


def test_two_at_once_install_once(place):
    (place / "bin" / "hang").touch()
    one = start(place, "one")
    wait_for_call(place, "--requirement")
    two = start(place, "two")
    assert "waiting" in two.stderr.readline()
    (place / "bin" / "hang").unlink()
    assert one.communicate(timeout=60)[0] == "onetorch one\n"
    assert two.communicate(timeout=60)[0] == "onetorch two\n"
    assert len(calls(place)) == 4


def test_interrupted(place):
    (place / "bin" / "hang").touch()
    process = start(place)
    wait_for_call(place, "--requirement")
    process.send_signal(signal.SIGINT)
    (place / "bin" / "hang").unlink()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.endswith("go: stopped: run it again to go on\n")
    assert "Traceback" not in said
    assert call(place).returncode == 0


def test_a_folder_that_is_not_ours_is_left_alone(place):
    (place / ".venv").mkdir()
    (place / ".venv" / "notes").write_text("precious")
    refused = call(place)
    assert refused.returncode == 3
    assert "move it away" in refused.stderr
    assert (place / ".venv" / "notes").read_text() == "precious"


def test_no_python_that_is_new_enough(place):
    (place / "bin" / "python3").unlink()
    (place / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    (place / "bin" / "python3").chmod(0o755)
    refused = call(place)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "3.11" in refused.stderr
