"""Where a group of environments runs: in this process (`Here`), or in one of its own (`Worker`), which may do what it likes without taking others with it."""

import contextlib
import json
import math
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO, cast

import gymnasium
import numpy as np

from onetorch.rl import env_worker
from onetorch.rl.env_worker import MAKING, Fault
from onetorch.runs.errors import Stopped

START_TIMEOUT = 60.0  # seconds that the making of an environment, which imports packages, may take at least
CLOSE_SECONDS = 5.0  # that the environments of a worker have to close themselves
LOOK_SECONDS = 0.2  # between two looks at workers that do not answer


class Hung(BaseException):
    """Raised where an environment stands still; no Exception, lest it catch it."""


_watching: list["Here"] = []  # whose environment is at work now


def _take_clock() -> bool:
    """Whether the alarm clock is ours, or is now because nobody else had it."""
    handler = signal.getsignal(signal.SIGALRM)
    if handler is signal.SIG_DFL:
        signal.signal(signal.SIGALRM, _ring)
        return True
    return handler is _ring


def _ring(number: int, frame: types.FrameType | None) -> None:
    for group in _watching:
        group.ring()


class Here:
    """The environments `part` in this process. One that hangs is interrupted by the alarm clock, where this is the main thread and nobody else uses it."""

    def __init__(self, spec: gymnasium.envs.registration.EnvSpec, part: slice, timeout: float, action_repeat: int = 1) -> None:
        self.first, self.timeout = part.start, timeout
        self.at = array("q", (0, 0, 0))
        self.make = lambda: env_worker.EnvGroup(spec, part.stop - part.start, self.at, action_repeat)
        self.group: env_worker.EnvGroup | None = None
        self.seen: tuple[int, ...] | None = None  # where it was when last looked at
        self.work: Callable[[], tuple[np.ndarray, ...]] = tuple  # for whoever asks for the answer

    def send_step(self, actions: np.ndarray, seeds: np.ndarray) -> None:
        assert self.group is not None
        self.work = partial(self._watched, self.group.step, actions, seeds)

    def send_replay(self, index: int, seed: int, actions: np.ndarray) -> None:
        if self.group is None:
            self.group = self._watched(self.make)
        self.work = partial(lambda group: (self._watched(group.replay, index, seed, actions),), self.group)

    def _watched(self, work: Callable[..., Any], *args: Any) -> Any:
        clock = math.isfinite(self.timeout) and threading.current_thread() is threading.main_thread() and _take_clock()
        if clock:
            self.seen, self.quarters, _watching[:] = None, 0, (self,)
            signal.setitimer(signal.ITIMER_REAL, self.timeout / 4, self.timeout / 4)
        try:
            return work(*args)
        except Stopped:
            raise  # a signal came to the run: not the environment's
        except (Exception, SystemExit, Hung) as error:
            fault = Fault(f"hung for {self.timeout:g} s", "", env_worker.fault(error).trace) if isinstance(error, Hung) else env_worker.fault(error)
            fault.at = (self.first + self.at[0], self.at[1], self.at[2])
            raise fault from None
        finally:
            if clock:
                signal.setitimer(signal.ITIMER_REAL, 0)
                _watching.clear()

    def ring(self) -> None:
        """A quarter of the timeout has passed. Raises Hung after four at the same place."""
        self.seen, before = tuple(self.at), self.seen
        self.quarters = self.quarters + 1 if self.seen == before else 1
        if self.quarters >= 4:
            raise Hung

    def hang_up(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def close(self) -> None:
        if self.group is not None:
            self.group.close()


class Worker:
    """The environments `part` in a process of their own, which ends with `close`, or with this process, however that dies."""

    def __init__(
        self, spec: gymnasium.envs.registration.EnvSpec, part: slice, observation: env_worker.Observation, timeout: float, action_repeat: int = 1
    ) -> None:
        self.first, self.timeout, n = part.start, timeout, part.stop - part.start
        row = (observation.shape, observation.dtype)
        rows, flags = ((n, *row[0]), row[1]), ((n,), np.dtype(bool))
        self.step_form, self.replay_form = (((n,), np.dtype(float)), rows, rows, flags, flags), (row,)
        life, keep = os.pipe()
        notes = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the worker)
        notes.truncate(env_worker.PAGE)
        # -P: the directory of the script, which is inside this package, must not become an import path. A session of its own: what the environments start
        # can be ended with them.
        command = [sys.executable, "-P", env_worker.__file__, str(life), str(notes.fileno())]
        fds = (life, notes.fileno())
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, pass_fds=fds, start_new_session=True)
        os.close(life)
        self.seen: tuple[int, ...] | None = None  # where it was when last looked at
        self._end = weakref.finalize(self, self._finish, self.process, keep, notes)
        self.at, self.notes = memoryview(mmap.mmap(notes.fileno(), env_worker.PAGE)).cast("q"), notes.fileno()
        self.fd = cast(BinaryIO, self.process.stdout).fileno()
        setup = json.dumps({"path": sys.path, "spec": spec.to_json(), "count": n, "action_repeat": action_repeat}).encode()
        self._send((), struct.pack("<q", len(setup)), setup)
        self.started = False

    def _send(self, form: tuple[tuple[tuple[int, ...], np.dtype], ...], *parts: bytes) -> None:
        """Send a request whose answer is arrays of these shapes and dtypes."""
        self.form, self.got = form, bytearray()
        self.need = 8 + sum(math.prod(shape) * dtype.itemsize for shape, dtype in form)
        self.since, self.seen = time.monotonic(), None
        data = memoryview(b"".join(parts))
        with contextlib.suppress(BrokenPipeError):  # it has died: whoever waits for the answer says how
            while data:
                data = data[cast(BinaryIO, self.process.stdin).write(data) :]

    def send_replay(self, index: int, seed: int, actions: np.ndarray) -> None:
        if not self.started:  # waited for only when first needed, so that all workers start side by side
            receive([self])
            self.started = True
        self._send(self.replay_form, env_worker.REPLAY, struct.pack("<qqq", index, seed, len(actions)), actions.tobytes())

    def send_step(self, actions: np.ndarray, seeds: np.ndarray) -> None:
        self._send(self.step_form, env_worker.STEP, actions.tobytes(), seeds.tobytes())

    def read(self) -> tuple[np.ndarray, ...] | None:
        """Read what is there: the answer once it is complete. Fault if it is one, or if the worker has died."""
        chunk = os.read(self.fd, self.need - len(self.got))
        if not chunk:
            raise self._died()
        self.got += chunk
        if len(self.got) < 8:
            return None
        length = int.from_bytes(self.got[:8], "little")
        if length:
            self.need = 8 + length
        if len(self.got) < self.need:
            return None
        if length:
            raise Fault(*json.loads(self.got[8:]))
        arrays, offset = [], 8
        for shape, dtype in self.form:
            count = math.prod(shape)
            arrays.append(np.frombuffer(self.got, dtype, count, offset).reshape(shape))
            offset += count * dtype.itemsize
        return tuple(arrays)

    def look(self) -> None:
        """Fault if the worker has died, or has stood still for longer than it may."""
        if self.process.poll() is not None:
            raise self._died()
        now, at = time.monotonic(), tuple(self.at[:3])
        if at != self.seen:
            # It may be asked long after it was sent its work: what it did before the first look is not known.
            self.since, self.seen = now if self.seen else max(self.since, now - LOOK_SECONDS), at
        limit = max(self.timeout, START_TIMEOUT) if self.at[1] == MAKING else self.timeout
        if now - self.since > limit:
            os.kill(self.process.pid, env_worker.TRACE_SIGNAL)
            for _ in range(30):  # the handler answers at once, if the process runs at all
                time.sleep(0.01)
                if self._trace():
                    break
            raise Fault(f"hung for {limit:g} s", "", self._trace())

    def _died(self) -> Fault:
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return Fault("closed its connection", "something closed the files of its process", self._trace())
        if code >= 0:
            return Fault(f"ended its process with exit code {code}", "", self._trace())
        detail = "was there memory enough?" if code == -signal.SIGKILL else ""
        return Fault(f"lost its process to {signal.Signals(-code).name}", detail, self._trace())

    def _trace(self) -> str:
        return os.pread(self.notes, 1 << 16, env_worker.PAGE).decode(errors="replace")

    def hang_up(self) -> None:
        cast(BinaryIO, self.process.stdin).close()

    def kill(self) -> None:
        if self._end.alive:
            _kill_session(self.process.pid)
            self._end()

    def close(self) -> None:
        self._end()

    @staticmethod
    def _finish(process: "subprocess.Popen[bytes]", keep: int, notes: BinaryIO) -> None:
        cast(BinaryIO, process.stdin).close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CLOSE_SECONDS)
        _kill_session(process.pid)
        process.wait()
        cast(BinaryIO, process.stdout).close()
        os.close(keep)
        notes.close()


def _kill_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(leader, signal.SIGKILL)


def receive(groups: Sequence[Here | Worker]) -> list[tuple[np.ndarray, ...]]:
    """What each group answers to what it was sent last. Fault as soon as one fails, whichever it is."""
    answers: dict[Here | Worker, tuple[np.ndarray, ...]] = {g: g.work() for g in groups if isinstance(g, Here)}
    waiting = {g.fd: g for g in groups if isinstance(g, Worker)}
    if not waiting:
        return list(answers.values())
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting:
        ready = poll.poll(1000 * LOOK_SECONDS)
        for worker in [waiting[fd] for fd, _ in ready] or list(waiting.values()):
            answer = None
            try:
                if ready:
                    answer = worker.read()
                else:
                    worker.look()
            except Fault as fault:
                fault.at = (worker.first + worker.at[0], worker.at[1], worker.at[2])
                raise
            if answer is not None:
                answers[worker] = answer
                poll.unregister(worker.fd)
                del waiting[worker.fd]
    return [answers[g] for g in groups]
