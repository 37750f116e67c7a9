"""A group of Gymnasium environments in one process: used directly, and by `envs` as a worker process of its own.

Torch is not imported here, so that a worker starts at once. A worker is this file run as a script: it reads requests from its standard input and answers
on its standard output, fixed-size binary messages both ways. When its parent dies, however it dies, the input ends and the worker exits.
"""

import json
import os
import signal
import struct
import sys
from typing import Any, BinaryIO

import gymnasium
import numpy as np

STEP, REPLAY = b"S", b"R"
OK, FAILED = b"\0", b"\1"


class EnvGroup:
    """`count` environments of one kind. Observations come flattened, float32 (D,); actions go in as the environment's own dtype and shape."""

    def __init__(self, spec: str | gymnasium.envs.registration.EnvSpec, count: int) -> None:
        self.envs = [gymnasium.make(spec, disable_env_checker=True) for _ in range(count)]
        space: Any = self.envs[0].action_space
        self.act_shape, self.act_dtype = space.shape, space.dtype
        self.obs_dim = int(np.prod(self.envs[0].observation_space.shape or ()))

    def replay(self, index: int, seed: int, actions: np.ndarray) -> np.ndarray:
        """Environment `index` from a reset with `seed` through `actions` (k, …): the observation reached (D,)."""
        obs, _ = self.envs[index].reset(seed=seed)
        for act in actions:
            obs, *_ = self.envs[index].step(act)
        return np.array(obs, np.float32).reshape(-1)

    def step(self, actions: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, ...]:
        """One step of each; one that ended begins anew with its entry of `seeds` (n,). Returns next_obs (n, D) before and obs (n, D) after such resets,
        reward (n,) float64, terminated (n,) and truncated (n,) bool."""
        n = len(self.envs)
        next_obs, reward, ended = np.empty((n, self.obs_dim), np.float32), np.empty(n), np.empty((2, n), bool)
        for i, (env, act) in enumerate(zip(self.envs, actions, strict=True)):
            out, reward[i], ended[0, i], ended[1, i], _ = env.step(act)
            next_obs[i] = np.asarray(out).reshape(-1)
        obs = next_obs
        done = ended[0] | ended[1]
        if done.any():
            obs = next_obs.copy()
            for i in done.nonzero()[0]:
                obs[i] = np.asarray(self.envs[i].reset(seed=int(seeds[i]))[0]).reshape(-1)
        return next_obs, obs, reward, ended[0], ended[1]

    def close(self) -> None:
        for env in self.envs:
            env.close()


def read(stream: BinaryIO, count: int) -> bytes:
    """Exactly `count` bytes; EOFError where the stream ends before."""
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    size = requests.read(8)
    if not size:
        return  # the parent is gone already
    setup = json.loads(read(requests, struct.unpack("<q", size)[0]))
    sys.path[:] = setup["path"]
    group: EnvGroup | None = None
    while True:
        try:
            if group is None:
                group = EnvGroup(gymnasium.envs.registration.EnvSpec.from_json(setup["spec"]), setup["count"])
                act_bytes = group.act_dtype.itemsize * int(np.prod(group.act_shape))
                answer = b""
            else:
                n = len(group.envs)
                if read(requests, 1) == STEP:
                    actions = np.frombuffer(read(requests, n * act_bytes), group.act_dtype).reshape(n, *group.act_shape)
                    answer = b"".join(part.tobytes() for part in group.step(actions, np.frombuffer(read(requests, 8 * n), np.int64)))
                else:
                    index, seed, steps = struct.unpack("<qqq", read(requests, 24))
                    actions = np.frombuffer(read(requests, steps * act_bytes), group.act_dtype).reshape(steps, *group.act_shape)
                    answer = group.replay(index, seed, actions).tobytes()
            answers.write(OK + answer)
        except EOFError:
            return
        except Exception as error:  # what an environment raises is raised again in the parent, which is told here
            text = f"{type(error).__name__}: {error}".encode()
            answers.write(FAILED + struct.pack("<q", len(text)) + text)
        answers.flush()


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # these reach a whole process group; the parent decides when to stop, and its end is ours
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what an environment prints must not stand among the answers
        try:
            serve(sys.stdin.buffer, answers)
        except BrokenPipeError:
            os._exit(0)
