"""Where the trials of a sweep are born: one process that has torch and the algorithm imported and forks a child for each trial.

Importing torch and building the first optimizer take two seconds; a fork takes ten milliseconds. The child is a process of its own, with its own signals,
threads and output, so whatever kills it kills nothing else. What makes the fork safe: the nursery imports and does no more, so no pool of threads and no
GPU is in use when a child comes off. Where importing the algorithm alone wakes the GPU, a forked child could not use it and starts a fresh interpreter.

No process outlives the sweep, however it dies. The nursery reads its orders from a socket; when the other end is gone it kills its children and leaves. A
child asks the kernel (prctl, Linux) to be killed when the nursery dies, and leads a process group, which is killed when the child ends: what it started goes
with it. The nursery stands in a session of its own, so that Ctrl-C reaches the sweep alone, which then tells each trial once.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import fcntl
import gc
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from onetorch.runs import algorithm, folder, provenance
from onetorch.runs.config import from_json
from onetorch.runs.errors import OneTorchError, RunError, Stopped, UsageError

BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from onetorch.runs import nursery; nursery.{}"
PATIENCE = 20.0  # seconds that a trial waits for a dying process to give its folder free
PR_SET_PDEATHSIG = 1

Git = tuple[dict[str, Any] | None, str]  # what `provenance.git` returns


@dataclasses.dataclass(frozen=True)
class Code:
    """The algorithm that all trials run."""

    recipe: str
    module: str | None  # of onetorch's own; else `file`
    file: str  # path of the algorithm's file as the user gave it
    copy: str | None  # the sweep's copy of a user's file: what the trials keep, and what is loaded where `file` is not there or was changed since

    def read(self) -> algorithm.Algorithm:
        """The algorithm's file, not yet imported."""
        if self.module:
            return algorithm.read(self.module.rpartition(".")[2])
        assert self.copy
        same = Path(self.file).is_file() and Path(self.file).read_bytes() == Path(self.copy).read_bytes()
        return algorithm.read(Path(self.file if same else self.copy))


@dataclasses.dataclass(frozen=True)
class Order:
    """One trial to run: a folder (absolute), which may hold the trial's beginning, the config as JSON, and what it may use."""

    id: str
    folder: str
    config: dict[str, Any]
    command: list[str]
    fixed: dict[str, str]  # of the speed plan
    threads: int
    cores: list[int] | None = None  # that the trial is bound to
    gpu: str | None = None  # CUDA_VISIBLE_DEVICES
    checkpoint_seconds: float | None = None


class Nursery:
    """The sweep's end: starts the nursery, gives orders, hears who ended. Imports no torch.

    Raises RunError when the algorithm does not import, and when the nursery dies before it could be used.
    """

    def __init__(self, code: Code, log: Path) -> None:
        self.code, self.log = code, log
        self.running: set[str] = set()
        self.process: subprocess.Popen[bytes] | None = None

    def _open(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, open(self.log, "ab") as log:
            words = [sys.executable, "-c", BOOT.format("serve(int(sys.argv[2]))"), json.dumps(sys.path), str(theirs.fileno())]
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(theirs.fileno(),), start_new_session=True
            )  # fmt: skip
        self.link, self.heard = ours, b""
        self._send(dataclasses.asdict(self.code))
        while (answer := self._hear(None)) is not None and not answer:
            pass
        if answer is None:
            code = self._bury()
            raise RunError(f"the process that starts the trials died with code {code} while it imported {self.code.file}; see {self.log}")
        if "error" in answer[0]:
            self._bury()
            raise (UsageError if answer[0]["usage"] else RunError)(answer[0]["error"])

    def _bury(self) -> int:
        assert self.process
        self.link.close()
        code = self.process.wait()
        self.process = None
        return code

    def _send(self, data: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: the next look says so
            self.link.sendall(json.dumps(data).encode() + b"\n")

    def _hear(self, timeout: float | None) -> list[dict[str, Any]] | None:
        """The messages that have come, after waiting for one; None when there is nobody to send any more."""
        if not select.select([self.link], [], [], timeout)[0]:
            return []
        try:
            chunk = self.link.recv(1 << 16)
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            return None
        *lines, self.heard = (self.heard + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def start(self, order: Order, slot: int) -> None:
        """Run one trial; `wait` tells when it has ended."""
        if self.process is None:
            self._open()
        self.running.add(order.id)
        self._send({"order": dataclasses.asdict(order)})

    def tell(self, number: int) -> None:
        """Send a signal to every trial that runs."""
        if self.process:
            self._send({"signal": number})

    def wait(self, timeout: float) -> list[tuple[str, int]]:
        """(id, exit code or minus the signal that killed it) of trials that ended, as soon as there is one."""
        if self.process is None:
            return []
        answers = self._hear(timeout)
        if answers is None:
            # The nursery was killed, and its children with it: the next order starts another.
            self._bury()
            lost, self.running = self.running, set()
            return [(id, -signal.SIGKILL) for id in sorted(lost)]
        ended = [(a["id"], a["code"]) for a in answers]
        self.running -= {id for id, _ in ended}
        return ended

    def idle(self, slot: int) -> None:
        """Nothing waits for `slot` any more."""

    def close(self) -> None:
        """Kill what still runs and the nursery itself."""
        if self.process:
            self._bury()


# -- the other end -----------------------------------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """The nursery's life: import, then fork a child for each order until the socket's other end is gone."""
    with socket.socket(fileno=descriptor) as link, link.makefile("rb") as lines:
        code = Code(**json.loads(lines.readline()))
        # For the seconds in which nobody here listens: a sweep that dies meanwhile means SIGIO, and that means the end.
        fcntl.fcntl(link, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(link, fcntl.F_GETFL)
        fcntl.fcntl(link, fcntl.F_SETFL, flags | os.O_ASYNC)
        if select.select([link], [], [], 0)[0]:
            return  # it died already
        try:
            source = code.read()
            module = _prepare(source)
            git = provenance.git(source.path)  # of what was imported just now, for all trials
            fcntl.fcntl(link, fcntl.F_SETFL, flags)
        except Exception as error:
            if not isinstance(error, OneTorchError):
                traceback.print_exception(error)
            answer = {"error": " ".join(str(error).split()) or type(error).__name__, "usage": isinstance(error, UsageError)}
            link.sendall(json.dumps(answer).encode() + b"\n")
            return
        with contextlib.suppress(BrokenPipeError):  # the sweep was killed meanwhile
            link.sendall(b"{}\n")
            _serve(link, code, source, module, git)


def _prepare(source: algorithm.Algorithm) -> Any:
    module = source.load()  # first: a file that does not import is told at once
    import torch

    import onetorch.runs.run  # noqa: F401 (what every trial needs)

    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # the first optimizer of a process imports half of torch once more
    provenance.versions()  # remembered
    gc.collect()
    gc.freeze()  # the children share what is there; a collection that touched it would copy it page by page
    return module


def _serve(link: socket.socket, code: Code, source: algorithm.Algorithm, module: Any, git: Git) -> None:
    ends, bell = socket.socketpair()
    ends.setblocking(False)
    bell.setblocking(False)
    signal.set_wakeup_fd(bell.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the select below by the bell
    children: dict[int, str] = {}
    buffer = b""
    while True:
        ready, _, _ = select.select([link, ends], [], [])
        if ends in ready:
            ends.recv(4096)
            for pid, status in _ended():
                _signal_group(pid, signal.SIGKILL)  # what the trial started goes with it
                with contextlib.suppress(BrokenPipeError):  # the sweep is gone: the next turn sees it
                    link.sendall(json.dumps({"id": children.pop(pid), "code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
        if link in ready:
            try:
                chunk = link.recv(1 << 16)
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                for pid in children:
                    _signal_group(pid, signal.SIGKILL)
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                data = json.loads(line)
                if "signal" in data:
                    for pid in children:
                        if data["signal"] == signal.SIGKILL:
                            _signal_group(pid, signal.SIGKILL)
                        else:
                            os.kill(pid, data["signal"])  # to the trial, which has to say to its own processes what it wants of them
                    continue
                order = Order(**data["order"])
                sys.stdout.flush()
                sys.stderr.flush()
                parent = os.getpid()
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for end in (link, ends, bell):
                        end.close()
                    _child(code, order, source, module, git, parent)
                with contextlib.suppress(PermissionError, ProcessLookupError):  # both sides do it, so that it is done before either goes on
                    os.setpgid(pid, pid)
                children[pid] = order.id


def _ended() -> list[tuple[int, int]]:
    found = []
    with contextlib.suppress(ChildProcessError):
        while (entry := os.waitpid(-1, os.WNOHANG))[0]:
            found.append(entry)
    return found


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it (macOS: only a zombie)
        os.killpg(leader, number)


def _child(code: Code, order: Order, source: algorithm.Algorithm, module: Any, git: Git, parent: int) -> NoReturn:
    """The first steps of a trial's process. It leaves by `os._exit`: the nursery's own exit is not for it to do."""
    exit_code = 70
    try:
        os.setpgid(0, 0)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(exit_code)  # it died before the kernel knew
        Path(order.folder).mkdir(parents=True, exist_ok=True)
        output = os.open(Path(order.folder) / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        if order.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = order.gpu
        import torch

        if torch.cuda._is_in_bad_fork():
            data = (sys.path, dataclasses.asdict(code), dataclasses.asdict(order))
            os.execv(sys.executable, [sys.executable, "-c", BOOT.format("alone(*sys.argv[2:])"), *map(json.dumps, data)])
        exit_code = trial(code, order, source, module, git)
        atexit._run_exitfuncs()
    except KeyboardInterrupt:
        exit_code = 130  # told to stop before it had begun
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def alone(code: str, order: str) -> None:
    """A trial in an interpreter of its own."""
    made = Code(**json.loads(code))
    source = made.read()
    sys.exit(trial(made, Order(**json.loads(order)), source, source.load(), provenance.git(source.path)))


def trial(code: Code, order: Order, source: algorithm.Algorithm, module: Any, git: Git) -> int:
    """Train and evaluate in this process, going on with what the folder holds; returns the exit code that `onetorch train` has."""
    import numpy as np
    import torch

    from onetorch.runs.run import CHECKPOINT_SECONDS, Run

    # All children come off the same state. An algorithm seeds what it uses; what it forgot differs from trial to trial and repeats with the trial.
    random.seed(order.id)
    np.random.seed(int(order.id, 16) % 2**32)
    path = Path(order.folder)
    deadline = time.monotonic() + PATIENCE
    while folder.owner(path) and time.monotonic() < deadline:
        time.sleep(0.02)  # a process of a killed sweep that is still dying
    begun = folder.holds_run(path)
    try:
        recorded = folder.read_json(path / "run.json").get("plan") if begun else None
        wanted = recorded.get("threads", 1) if isinstance(recorded, dict) else 1  # a trial keeps its plan, and may have had more cores before
        if order.cores and hasattr(os, "sched_setaffinity") and wanted <= len(order.cores):
            os.sched_setaffinity(0, order.cores)  # so that all it uses sees its share of the machine: torch, the plan, environments
        torch.set_num_threads(order.threads)
        run = Run(
            path,
            from_json(order.config, module.Config),
            recipe=code.recipe,
            algorithm=code.module,
            source=source.path,
            command=order.command,
            fixed=order.fixed,
            threads=order.threads,
            git=git,
            resume=begun,
            checkpoint_seconds=CHECKPOINT_SECONDS if order.checkpoint_seconds is None else order.checkpoint_seconds,
        )
        if code.copy:
            shutil.copyfile(code.copy, path / "source.py")  # `source.path` may have been edited since it was imported
        with run:
            model = module.train(run.config, run)
            run.finish()
            run.result(**module.evaluate(model, run.config, media=run.media))
    except Stopped as stop:
        sys.stderr.write(f"stopped: {stop}\n")
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except OneTorchError as error:
        sys.stderr.write(f"onetorch: {' '.join(str(error).split())}\n")
        return error.exit_code
    except BaseException as error:
        traceback.print_exception(error)
        return 3
    return 0
