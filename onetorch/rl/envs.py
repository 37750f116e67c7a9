"""Batched environments: N copies of one task, stepped together, tensors (N, …) in and out.

    envs = make("CartPole-v1", num_envs=64, seed=0)
    next_obs, reward, terminated, truncated = envs.step(act)     # what the step led to; then act on envs.obs

`next_obs` is always the observation that the step truly reached. An environment that ended begins anew by itself: `envs.obs`, what to act on next, then
already holds the first observation of its next episode. A time limit is `truncated`, never `terminated`.

Three backends of one interface, interchangeable and each resumable bit for bit:

- **native**: CartPole-v1 written for all environments at once, the same numbers as Gymnasium's;
- **sync**: any Gymnasium environment, one after the other in this process;
- **processes**: the same, shared out over one worker process per core.

Every episode is reset with an explicit seed that follows from (seed, environment, episode). So the state of a deterministic environment is that seed and
the actions since: loading resets, replays them, and checks that the observation reached is the saved one bit for bit. No object is ever pickled.
"""

import contextlib
import difflib
import json
import math
import os
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, Protocol, cast

import gymnasium
import numpy as np
import torch
from torch import Tensor

from onetorch.rl import env_worker
from onetorch.runs.errors import RunError, UsageError

# what `step` returns: next_obs (N, D) float32, reward (N,) float32, terminated (N,) bool, truncated (N,) bool
Step = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Spaces:
    """What a task takes and gives: observations (D,) float32 and actions, either one of A (Discrete) or (A,) float32 in [-1, 1] (Box)."""

    obs_dim: int  # D
    act_dim: int  # A
    discrete: bool


class Envs(Protocol):
    spaces: Spaces
    num_envs: int
    obs: Tensor  # (N, D) float32: what to act on now
    episodes: "Episodes"

    def step(self, act: Tensor) -> Step:
        """act (N,) int64 for Discrete; (N, A) float for Box, where [-1, 1] is mapped onto the environment's bounds and what lies beyond is clipped."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Episodes:
    """Undiscounted returns and lengths of episodes as the environment pays them, before any normalisation."""

    def __init__(self, num_envs: int, window: int = 100) -> None:
        self.running, self.length = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.recent: list[float] = []  # the last `window` returns, oldest first
        self.window, self.finished = window, 0

    def add(self, reward: np.ndarray, done: np.ndarray | None) -> None:
        """One step of all environments; `done` may be None where none ended."""
        self.running += reward
        self.length += 1
        if done is not None:
            self.recent = (self.recent + self.running[done].tolist())[-self.window :]
            self.finished += int(done.sum())
            self.running[done] = 0
            self.length[done] = 0

    def mean_return(self) -> float | None:
        """Mean over the last `window` finished episodes; None before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running.copy(), "length": self.length.copy(), "recent": list(self.recent), "finished": self.finished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running, self.length = np.array(state["running"]), np.array(state["length"])
        self.recent, self.finished = list(state["recent"]), int(state["finished"])


class CartPole:
    """CartPole-v1 for N environments at once: Barto, Sutton, Anderson 1983, with the constants and the 500-step limit of Gymnasium.

    The state is float64 and each operation is done in Gymnasium's order, so that every observation has Gymnasium's bits.
    """

    GRAVITY, TOTAL_MASS, POLE_MASS, LENGTH, FORCE, TAU = 9.8, 1.1, 0.1, 0.5, 10.0, 0.02  # SI units; LENGTH is half the pole's
    X_LIMIT, THETA_LIMIT, MAX_STEPS = 2.4, 12 * 2 * math.pi / 360, 500

    def __init__(self, num_envs: int, seed: int) -> None:
        self.spaces, self.num_envs = Spaces(obs_dim=4, act_dim=2, discrete=True), num_envs
        self.rng = np.random.default_rng(seed)
        self.state = self.rng.uniform(-0.05, 0.05, (4, num_envs))  # x, x_dot, theta, theta_dot
        self.obs = self._observe()
        self.episodes = Episodes(num_envs)

    def _observe(self) -> Tensor:
        return torch.from_numpy(self.state.T.astype(np.float32, order="C"))

    def step(self, act: Tensor) -> Step:
        x, x_dot, theta, theta_dot = self.state
        force = np.where(act.numpy() == 1, self.FORCE, -self.FORCE)
        cos, sin = np.cos(theta), np.sin(theta)
        pole = self.POLE_MASS * self.LENGTH
        temp = (force + pole * np.square(theta_dot) * sin) / self.TOTAL_MASS
        theta_acc = (self.GRAVITY * sin - cos * temp) / (self.LENGTH * (4.0 / 3.0 - self.POLE_MASS * np.square(cos) / self.TOTAL_MASS))
        x_acc = temp - pole * theta_acc * cos / self.TOTAL_MASS
        self.state = np.stack((x + self.TAU * x_dot, x_dot + self.TAU * x_acc, theta + self.TAU * theta_dot, theta_dot + self.TAU * theta_acc))
        terminated = (np.abs(self.state[0]) > self.X_LIMIT) | (np.abs(self.state[2]) > self.THETA_LIMIT)
        truncated = self.episodes.length >= self.MAX_STEPS - 1
        done = terminated | truncated
        next_obs = self.obs = self._observe()
        any_done = bool(done.any())
        self.episodes.add(np.ones(()), done if any_done else None)
        if any_done:
            self.state[:, done] = self.rng.uniform(-0.05, 0.05, (4, int(done.sum())))
            self.obs = self._observe()
        return next_obs, torch.ones(self.num_envs), torch.from_numpy(terminated), torch.from_numpy(truncated)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state.copy(), "rng": self.rng.bit_generator.state, "episodes": self.episodes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _same_count(self.num_envs, np.shape(state["state"])[-1])
        self.state, self.rng.bit_generator.state = np.array(state["state"]), state["rng"]
        self.episodes.load_state_dict(state["episodes"])
        self.obs = self._observe()

    def close(self) -> None:
        pass


class ActionMap:
    """From a policy's actions to an environment's own, (N, …) in its dtype: finite Box bounds are mapped from [-1, 1], and nothing lies beyond them."""

    def __init__(self, space: gymnasium.Space) -> None:
        self.space = space
        if isinstance(space, gymnasium.spaces.Box):
            self.bounded = np.isfinite(space.low) & np.isfinite(space.high)
            low, high = np.where(self.bounded, space.low, -1.0), np.where(self.bounded, space.high, 1.0)
            self.middle, self.half = (low + high) / 2, (high - low) / 2

    def __call__(self, act: Tensor) -> np.ndarray:
        if isinstance(self.space, gymnasium.spaces.Discrete):
            return (act.numpy() + self.space.start).astype(self.space.dtype)
        assert isinstance(self.space, gymnasium.spaces.Box)
        scaled = self.middle + act.numpy().reshape(-1, *self.space.shape) * self.half
        return np.clip(scaled, self.space.low, self.space.high).astype(self.space.dtype)


class GymEnvs:
    """N copies of a Gymnasium environment, shared out over groups in this process or in `workers` processes."""

    def __init__(self, env: str, num_envs: int, seed: int, workers: int = 0) -> None:
        self.env, self.num_envs, self.seed = env, num_envs, seed
        spec, self.spaces, action_space = _inspect(env)
        self.action_space, self.to_env = action_space, ActionMap(action_space)
        groups = max(1, min(workers, num_envs))
        edges = [num_envs * k // groups for k in range(groups + 1)]
        self.parts = [slice(start, stop) for start, stop in pairwise(edges)]
        self.groups: list[Worker | Here] = [
            Worker(spec, p.stop - p.start, self.spaces, action_space) if workers else Here(spec, p.stop - p.start) for p in self.parts
        ]
        self.episodes = Episodes(num_envs)
        self.episode = np.zeros(num_envs, np.int64)  # ordinal of the running episode
        self.next_seed = np.array([self._seed(i, 1) for i in range(num_envs)])
        self.actions: list[list[np.ndarray]] = [[] for _ in range(num_envs)]  # since the reset
        none = np.empty((0, *action_space.shape), action_space.dtype)
        self.obs = torch.from_numpy(np.stack([self._replay(i, self._seed(i, 0), none) for i in range(num_envs)]))
        self._check(self.obs.numpy(), np.zeros(num_envs))

    def _seed(self, index: int, episode: int) -> int:
        return int(np.random.SeedSequence((self.seed, index, episode)).generate_state(1)[0])

    def _replay(self, index: int, seed: int, actions: np.ndarray) -> np.ndarray:
        part, group = next((p, g) for p, g in zip(self.parts, self.groups, strict=True) if p.start <= index < p.stop)
        return group.replay(index - part.start, seed, actions)

    def step(self, act: Tensor) -> Step:
        actions = self.to_env(act)
        for group, part in zip(self.groups, self.parts, strict=True):
            group.send(actions[part], self.next_seed[part])
        answers = [group.receive() for group in self.groups]
        next_obs, obs, reward, terminated, truncated = answers[0] if len(answers) == 1 else (np.concatenate(a) for a in zip(*answers, strict=True))
        self._check(next_obs, reward)
        for log, action in zip(self.actions, actions, strict=True):
            log.append(action)
        done = terminated | truncated
        any_done = bool(done.any())
        self.episodes.add(reward, done if any_done else None)
        for i in done.nonzero()[0] if any_done else ():
            self.actions[i] = []
            self.episode[i] += 1
            self.next_seed[i] = self._seed(i, int(self.episode[i]) + 1)
        self.obs = torch.from_numpy(obs)
        return torch.from_numpy(next_obs), torch.from_numpy(reward).float(), torch.from_numpy(terminated), torch.from_numpy(truncated)

    def _check(self, obs: np.ndarray, reward: np.ndarray) -> None:
        if not (np.isfinite(obs).all() and np.isfinite(reward).all()):
            bad_obs, bad_reward = ~np.isfinite(obs).all(1), ~np.isfinite(reward)
            i = int((bad_obs | bad_reward).nonzero()[0][0])
            what = f"observation {obs[i]}" if bad_obs[i] else f"reward {reward[i]}"
            when = f"step {self.episodes.length[i] + 1} of episode {self.episode[i]}"
            raise RunError(f"{self.env} number {i} gave the {what} at {when}: expected finite numbers")

    def state_dict(self) -> dict[str, Any]:
        empty = np.empty((0, *self.action_space.shape), self.action_space.dtype)
        actions = [np.stack(log) if log else empty for log in self.actions]
        state = {"env": self.env, "seed": self.seed, "episode": self.episode.copy(), "actions": actions}
        return state | {"obs": self.obs.numpy().copy(), "episodes": self.episodes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _same_count(self.num_envs, len(state["actions"]))
        if state["env"] != self.env:
            raise ValueError(f"the saved environments are {state['env']}, these are {self.env}")
        self.seed, self.episode = int(state["seed"]), np.array(state["episode"])
        self.next_seed = np.array([self._seed(i, int(k) + 1) for i, k in enumerate(self.episode)])
        saved = np.asarray(state["obs"], np.float32)
        obs = np.stack([self._replay(i, self._seed(i, int(self.episode[i])), np.asarray(state["actions"][i])) for i in range(self.num_envs)])
        wrong = (obs.view(np.int32) != saved.view(np.int32)).any(1).nonzero()[0]
        if wrong.size:
            i = int(wrong[0])
            raise ValueError(
                f"{self.env} number {i} did not come back to its saved observation after the same seed and {len(state['actions'][i])} actions: it is not "
                f"deterministic under reset(seed=…), or its version changed (gymnasium {gymnasium.__version__} here); such a run cannot go on exactly"
            )
        self.actions = [list(np.asarray(log)) for log in state["actions"]]
        self.episodes.load_state_dict(state["episodes"])
        self.obs = torch.from_numpy(obs)

    def close(self) -> None:
        for group in self.groups:
            group.close()


class Here(env_worker.EnvGroup):
    """The environments of a group in this process: `send` does the work."""

    def send(self, actions: np.ndarray, seeds: np.ndarray) -> None:
        self.answer = self.step(actions, seeds)

    def receive(self) -> tuple[np.ndarray, ...]:
        return self.answer


class Worker:
    """The environments of a group in a process of their own, which ends when its input ends: with `close`, or with this process, however that dies."""

    def __init__(self, spec: gymnasium.envs.registration.EnvSpec, count: int, spaces: Spaces, action_space: Any) -> None:
        self.count, self.spaces, self.action_space, self.env = count, spaces, action_space, spec.id
        # -P: the directory of the script, which is inside this package, must not become an import path
        self.process = subprocess.Popen([sys.executable, "-P", env_worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.requests, self.answers = cast(BinaryIO, self.process.stdin), cast(BinaryIO, self.process.stdout)
        setup = json.dumps({"path": sys.path, "spec": spec.to_json(), "count": count}).encode()
        self._request(struct.pack("<q", len(setup)) + setup)
        self.started = False
        self._end = weakref.finalize(self, self._finish, self.process, self.requests, self.answers)

    def _request(self, *parts: bytes) -> None:
        self.requests.write(b"".join(parts))
        self.requests.flush()

    def _answer(self, count: int) -> bytes:
        try:
            status = env_worker.read(self.answers, 1)
            if status == env_worker.OK:
                return env_worker.read(self.answers, count)
            text = env_worker.read(self.answers, struct.unpack("<q", env_worker.read(self.answers, 8))[0]).decode()
        except EOFError:
            text = f"it ended with exit code {self.process.wait()}"
        raise RunError(f"a worker process of {self.env} failed: {text}")

    def _ready(self) -> None:
        if not self.started:  # asked for only when first needed, so that all workers start side by side
            self._answer(0)
            self.started = True

    def replay(self, index: int, seed: int, actions: np.ndarray) -> np.ndarray:
        self._ready()
        self._request(env_worker.REPLAY, struct.pack("<qqq", index, seed, len(actions)), actions.tobytes())
        return np.frombuffer(self._answer(4 * self.spaces.obs_dim), np.float32)

    def send(self, actions: np.ndarray, seeds: np.ndarray) -> None:
        self._request(env_worker.STEP, actions.tobytes(), seeds.tobytes())

    def receive(self) -> tuple[np.ndarray, ...]:
        n, d = self.count, self.spaces.obs_dim
        data = bytearray(self._answer(n * (8 * d + 8 + 2)))
        obs = np.frombuffer(data, np.float32, 2 * n * d).reshape(2, n, d)
        reward = np.frombuffer(data, np.float64, n, 8 * n * d)
        ended = np.frombuffer(data, bool, 2 * n, 8 * n * d + 8 * n).reshape(2, n)
        return obs[0], obs[1], reward, ended[0], ended[1]

    def close(self) -> None:
        self._end()

    @staticmethod
    def _finish(process: "subprocess.Popen[bytes]", requests: BinaryIO, answers: BinaryIO) -> None:
        with contextlib.suppress(BrokenPipeError):  # of a worker that has died already
            requests.close()
        process.wait()
        answers.close()


def make(env: str, num_envs: int, seed: int, backend: str | None = None) -> Envs:
    """`num_envs` copies of the Gymnasium environment `env`, already reset. `backend`: one of `backends(env)`, by default the first.

    UsageError (a ValueError) for an unknown id (naming the nearest), a missing package or an unsupported space; RunError, now and in `step`, for NaN or
    infinity in an observation or reward, or when a worker process fails.
    """
    if num_envs < 1:
        raise UsageError(f"num_envs must be at least 1, got {num_envs}")
    backend = backend or backends(env)[0]
    if backend == "native" and env == "CartPole-v1":
        return CartPole(num_envs, seed)
    if backend not in ("sync", "processes"):
        raise UsageError(f"backend of {env} must be one of {', '.join(dict.fromkeys((*backends(env), 'sync', 'processes')))}, got {backend!r}")
    return GymEnvs(env, num_envs, seed, workers=cores() if backend == "processes" else 0)


def backends(env: str) -> tuple[str, ...]:
    """The backends that can run `env` and are worth measuring, the default first."""
    if env == "CartPole-v1":
        return ("native", "sync")
    entry = _spec(env).entry_point  # a worker can import a name, not an object, and not one from the script that was started
    return ("sync", "processes") if isinstance(entry, str) and not entry.startswith("__main__") else ("sync",)


def speed(env: str, num_envs: int, backend: str, seconds: float = 0.5) -> float:
    """Environment steps per second of nothing but the environments, under actions drawn beforehand: the ceiling of any training on them."""
    envs = make(env, num_envs, 0, backend)
    generator = torch.Generator().manual_seed(0)
    A, shape = envs.spaces.act_dim, (64, num_envs)
    draws = torch.randint(A, shape, generator=generator) if envs.spaces.discrete else torch.rand(*shape, A, generator=generator) * 2 - 1
    steps, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds or not steps:
        for act in draws:
            envs.step(act)
        steps += draws.shape[0] * num_envs
    envs.close()
    return steps / spent


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spaces(env: str) -> Spaces:
    """The spaces of `env`. Same errors as `make`."""
    return CartPole(1, 0).spaces if env == "CartPole-v1" else _inspect(env)[1]


def make_one(env: str, **options: Any) -> gymnasium.Env:
    """One Gymnasium environment, with errors in one line that say what to do."""
    spec = _spec(env)
    try:
        return gymnasium.make(spec, disable_env_checker=True, **options)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise UsageError(f"{env} needs a package that is not installed ({str(error).splitlines()[0]}): pip install 'onetorch[rl]'") from None
    except gymnasium.error.Error as error:
        raise UsageError(f"{env} cannot be made: {str(error).splitlines()[0]}") from None


def _spec(env: str) -> gymnasium.envs.registration.EnvSpec:
    try:
        return gymnasium.spec(env)
    except (gymnasium.error.Error, ImportError) as error:
        near = _nearest(env)
        raise UsageError(f"unknown environment {env!r}" + (f"; nearest: {', '.join(near)}" if near else f" ({str(error).splitlines()[0]})")) from None


def _nearest(env: str) -> list[str]:
    ids = {name.lower(): name for name in gymnasium.registry}
    return [ids[name] for name in difflib.get_close_matches(env.lower(), ids, n=3, cutoff=0.5)]


def _inspect(env: str) -> tuple[gymnasium.envs.registration.EnvSpec, Spaces, Any]:
    one = make_one(env)
    obs, act = one.observation_space, one.action_space
    spec = one.spec
    one.close()
    if not isinstance(obs, gymnasium.spaces.Box):
        raise UsageError(f"{env} has the observation space {obs}; supported: Box")
    if not isinstance(act, gymnasium.spaces.Box | gymnasium.spaces.Discrete):
        raise UsageError(f"{env} has the action space {act}; supported: Box, Discrete")
    assert spec is not None
    obs_dim = int(np.prod(obs.shape))
    if isinstance(act, gymnasium.spaces.Discrete):
        return spec, Spaces(obs_dim, int(act.n), discrete=True), act
    return spec, Spaces(obs_dim, int(np.prod(act.shape)), discrete=False), act


def _same_count(have: int, saved: Sequence[int] | int) -> None:
    if have != saved:
        raise ValueError(f"{saved} environments were saved, {have} are here")
