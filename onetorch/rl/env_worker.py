"""A group of Gymnasium environments in one process: used directly, and by `envs` as a worker process of its own.

Torch is not imported here, so that a worker starts at once. A worker is this file run as a script: it reads requests from its standard input and answers
on its standard output, fixed-size binary messages both ways. Where it is at stands at any moment in a page of memory that it shares with its parent, so that
an environment that hangs or takes the process with it can be named. When its parent dies, however it dies, the worker is ended by the system.
"""

import faulthandler
import json
import mmap
import os
import select
import signal
import struct
import sys
import threading
import traceback
from array import array
from typing import Any, BinaryIO

import gymnasium
import numpy as np
from gymnasium import spaces

STEP, REPLAY = b"S", b"R"
OK = struct.pack("<q", 0)  # at the head of an answer; else the length of what went wrong, in JSON
MAKING, RESETTING, STEPPING, REPLAYING = range(4)  # what an environment is at
PAGE = 4096  # bytes of the shared page; a traceback of last resort is written behind it
TRACE_SIGNAL = signal.SIGUSR2  # asks a worker that hangs where it does


class Fault(Exception):  # noqa: N818 (what it is)
    """What an environment did wrong, as in "number 3 {what} at step 7: {detail}", and the traceback where there is one.

    `at`: which environment, what it was at, and the steps it had replayed; known to whoever catches it.
    """

    def __init__(self, what: str, detail: str = "", trace: str = "") -> None:
        super().__init__(f"{what}: {detail}")
        self.what, self.detail, self.trace = what, detail, trace
        self.at = (0, MAKING, 0)


def fault(error: BaseException) -> Fault:
    """What was raised, as a Fault."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, Fault):
        return Fault(error.what, error.detail, error.trace or trace)
    return Fault(f"raised {type(error).__name__}", " ".join(str(error).split()), trace)


class Observation:
    """How an observation of `space` becomes a row of a batch, of `shape` and `dtype`.

    Boxes are flattened; Discrete, MultiDiscrete and MultiBinary become zeros and ones; Dict and Tuple are all of their parts one after the other, in their
    order: a row (D,) float32. Pictures are Boxes of uint8 with two axes (H, W) or more, of at least 8 pixels each way; they become (C, H, W), several of one
    size one after the other. Where there is nothing else a row is the picture (C, H, W) uint8, as it is; else its numbers end the row (D,).

    Raises TypeError for other spaces.
    """

    def __init__(self, space: spaces.Space) -> None:
        self.vectors: list[tuple[tuple[Any, ...], spaces.Space, slice]] = []
        self.pictures: list[tuple[tuple[Any, ...], Any, int]] = []
        leaves, size, channels, sides = list(_leaves(space, ())), 0, 0, None
        for path, leaf in leaves:
            picture = _picture(leaf)
            if picture and sides in (None, picture[1:]):
                self.pictures.append((path, leaf, channels))
                channels, sides = channels + picture[0], picture[1:]
            else:
                width = spaces.utils.flatdim(leaf)
                self.vectors.append((path, leaf, slice(size, size + width)))
                size += width
        self.image = (channels, *sides) if sides else None
        self.size = size
        self.mixed = bool(self.image and self.vectors)
        pixels = int(np.prod(self.image)) if self.image else 0
        self.shape: tuple[int, ...] = self.image if self.image and not self.vectors else (size + pixels,)
        self.dtype = np.dtype(np.float32 if self.vectors else np.uint8)

    def write(self, value: Any, row: np.ndarray) -> None:
        """Put `value` into `row`; Fault where it is not of the space's shape and kind."""
        for path, space, part in self.vectors:
            leaf = _follow(value, path)
            if isinstance(space, spaces.Box):
                row[part] = _checked(leaf, space, path).reshape(-1)
            elif not space.contains(leaf):
                raise Fault(f"gave the observation {_name(path)}{leaf!r}", f"expected one of {space}")
            else:
                row[part] = spaces.utils.flatten(space, leaf)
        if self.image:
            pixels = row if not self.mixed else np.empty(self.image, np.uint8)
            for path, space, channel in self.pictures:
                picture = _channels_first(_checked(_follow(value, path), space, path))
                pixels[channel : channel + len(picture)] = picture
            if self.mixed:
                row[self.size :] = pixels.reshape(-1)


def _leaves(space: spaces.Space, path: tuple[Any, ...]) -> Any:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        for key, part in space.items() if isinstance(space, spaces.Dict) else enumerate(space):
            yield from _leaves(part, (*path, key))
    elif isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        yield path, space
    else:
        raise TypeError(f"observation space {space}; supported: Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these")


def _picture(space: spaces.Space) -> tuple[int, int, int] | None:
    """(C, H, W) where `space` is a picture."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or not 2 <= len(space.shape) <= 4:
        return None
    shape = _channels_first(np.broadcast_to(np.uint8(0), space.shape)).shape
    return shape if min(shape[1:]) >= 8 else None


def _channels_first(picture: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, C), (C, H, W), or a stack of k (k, H, W[, C]) as (C, H, W): the channels are the shortest axis, the last of equals."""
    if picture.ndim == 2:
        return picture[None]
    if picture.ndim == 4:
        return np.concatenate([_channels_first(frame) for frame in picture])
    return picture.transpose(2, 0, 1) if picture.shape[2] <= min(picture.shape) else picture


def _follow(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _name(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path) + " " if path else ""


def _checked(value: Any, space: spaces.Box, path: tuple[Any, ...]) -> np.ndarray:
    """`value` as an array, if it has the shape of `space` and numbers that its dtype can hold (float64 for float32 is as usual as harmless)."""
    array = np.asarray(value)
    if array.shape != space.shape:
        raise Fault(f"gave an observation {_name(path)}of shape {array.shape}", f"expected {space.shape}")
    if array.dtype != space.dtype and not np.can_cast(array.dtype, space.dtype, "same_kind"):
        raise Fault(f"gave an observation {_name(path)}of dtype {array.dtype}", f"expected {space.dtype}")
    return array


class EnvGroup:
    """`count` environments of one kind. Observations go out as rows (see Observation); actions come in as the environment's own dtype and shape. An action is
    held for `action_repeat` steps, or until the episode ends, and its reward is their sum.

    `at` holds three integers: the environment that is at work, what it is at, and the steps that it has replayed.
    """

    def __init__(self, spec: str | gymnasium.envs.registration.EnvSpec, count: int, at: Any = None, action_repeat: int = 1) -> None:
        self.at = array("q", (0, 0, 0)) if at is None else at
        self.envs: list[gymnasium.Env] = []
        self.action_repeat = action_repeat
        for i in range(count):
            self.at[0], self.at[1] = i, MAKING
            self.envs.append(gymnasium.make(spec, disable_env_checker=True))
        space: Any = self.envs[0].action_space
        self.act_shape, self.act_dtype = space.shape, space.dtype
        self.observation = Observation(self.envs[0].observation_space)

    def _reset(self, index: int, seed: int, row: np.ndarray) -> None:
        self.at[0], self.at[1] = index, RESETTING
        answer: Any = self.envs[index].reset(seed=seed)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise Fault(f"gave {type(answer).__name__} from reset", "expected a tuple (observation, info)")
        self.observation.write(answer[0], row)

    def _step(self, index: int, act: Any, row: np.ndarray) -> tuple[Any, Any, Any]:
        reward, terminated, truncated = self._step_once(index, act, row)
        for _ in range(1, self.action_repeat):
            if terminated or truncated:
                break
            more, terminated, truncated = self._step_once(index, act, row)
            reward += more
        return reward, terminated, truncated

    def _step_once(self, index: int, act: Any, row: np.ndarray) -> tuple[Any, Any, Any]:
        answer: Any = self.envs[index].step(act)
        if not isinstance(answer, tuple) or len(answer) != 5:
            what = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
            raise Fault(f"gave {what} from step", "expected a tuple (observation, reward, terminated, truncated, info)")
        obs, reward, terminated, truncated, _ = answer
        self.observation.write(obs, row)
        if not isinstance(reward, float | int) and (np.ndim(reward) != 0 or not np.can_cast(np.asarray(reward).dtype, np.float64, "same_kind")):
            raise Fault(f"gave the reward {' '.join(repr(reward).split())}", "expected a number")
        for name, end in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(end, bool | np.bool_) and (np.ndim(end) != 0 or np.asarray(end).dtype.kind not in "bi"):
                raise Fault(f"gave the {name} {' '.join(repr(end).split())}", "expected True or False")
        return reward, terminated, truncated

    def replay(self, index: int, seed: int, actions: np.ndarray) -> np.ndarray:
        """Environment `index` from a reset with `seed` through `actions` (k, …): the observation reached, a row."""
        row = np.empty(self.observation.shape, self.observation.dtype)
        self._reset(index, seed, row)
        for k, act in enumerate(actions):
            self.at[1], self.at[2] = REPLAYING, k
            self._step(index, act, row)
        return row

    def step(self, actions: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, ...]:
        """One step of each; one that ended begins anew with its entry of `seeds` (n,). Returns reward (n,) float64, next_obs (n, …) before and
        obs (n, …) after such resets, terminated (n,) and truncated (n,) bool."""
        n = len(self.envs)
        next_obs = np.empty((n, *self.observation.shape), self.observation.dtype)
        reward, ended = np.empty(n), np.empty((2, n), bool)
        self.at[1] = STEPPING
        for i, act in enumerate(actions):
            self.at[0] = i
            reward[i], ended[0, i], ended[1, i] = self._step(i, act, next_obs[i])
        obs = next_obs
        done = ended[0] | ended[1]
        if done.any():
            obs = next_obs.copy()
            for i in done.nonzero()[0]:
                self._reset(int(i), int(seeds[i]), obs[i])
        return reward, next_obs, obs, ended[0], ended[1]

    def close(self) -> None:
        for env in self.envs:
            env.close()


class Ended(Exception):  # noqa: N818 (what happened)
    """There are no more requests. Not EOFError, which an environment may raise too."""


def read(stream: BinaryIO, count: int) -> bytes:
    """Exactly `count` bytes; Ended where the stream ends before."""
    data = stream.read(count)
    if len(data) < count:
        raise Ended
    return data


def serve(requests: BinaryIO, answers: BinaryIO, at: Any) -> None:
    size = requests.read(8)
    if not size:
        return  # the parent is gone already
    setup = json.loads(read(requests, struct.unpack("<q", size)[0]))
    sys.path[:] = setup["path"]
    group: EnvGroup | None = None
    while True:
        try:
            if group is None:
                group = EnvGroup(gymnasium.envs.registration.EnvSpec.from_json(setup["spec"]), setup["count"], at, setup["action_repeat"])
                act_bytes = group.act_dtype.itemsize * int(np.prod(group.act_shape))
                parts: tuple[np.ndarray, ...] = ()
            else:
                n = len(group.envs)
                if read(requests, 1) == STEP:
                    actions = np.frombuffer(read(requests, n * act_bytes), group.act_dtype).reshape(n, *group.act_shape)
                    parts = group.step(actions, np.frombuffer(read(requests, 8 * n), np.int64))
                else:
                    index, seed, steps = struct.unpack("<qqq", read(requests, 24))
                    actions = np.frombuffer(read(requests, steps * act_bytes), group.act_dtype).reshape(steps, *group.act_shape)
                    parts = (group.replay(index, seed, actions),)
            answers.write(b"".join((OK, *(part.tobytes() for part in parts))))
        except Ended:
            if group is not None:
                group.close()
            return
        except BaseException as error:  # what an environment raises is raised again in the parent, which is told here
            wrong = fault(error)
            text = json.dumps((wrong.what, wrong.detail, wrong.trace)).encode()
            answers.write(struct.pack("<q", len(text)) + text)
        answers.flush()


def end_with_parent(life: int) -> None:
    """End this process, whatever it does, when the other end of the pipe `life` is closed, as the system does for a parent that died."""
    if sys.platform == "linux":
        import fcntl

        # The signal that nobody handles ends the process even where an environment is caught in a loop of C.
        fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([life], [], [], 0)[0]:
            os._exit(1)
    else:
        threading.Thread(target=lambda: os._exit(len(os.read(life, 1)) + 1), daemon=True).start()


def main(life: int, notes: int) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # the parent decides when to stop, and its end is ours
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent(life)
    os.lseek(notes, PAGE, os.SEEK_SET)
    faulthandler.enable(notes)
    faulthandler.register(TRACE_SIGNAL, notes, all_threads=False)
    # What an environment prints must not stand among the answers, nor may it read the requests.
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as answers, open(os.devnull, "rb") as nothing:
        os.dup2(2, 1)
        os.dup2(nothing.fileno(), 0)
        try:
            serve(requests, answers, memoryview(mmap.mmap(notes, PAGE)).cast("q"))
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
