"""Batched environments: N copies of one task, stepped together, tensors (N, …) in and out.

    envs = make("CartPole-v1", num_envs=64, seed=0)
    next_obs, reward, terminated, truncated = envs.step(act)     # what the step led to; then act on envs.obs
    end = envs.begin(act); …; next_obs, reward, terminated, truncated = end()     # the same, with work of yours done meanwhile

`next_obs` is always the observation that the step truly reached. An environment that ended begins anew by itself: `envs.obs`, what to act on next, then
already holds the first observation of its next episode. A time limit is `truncated`, never `terminated`.

The backends of one interface are interchangeable, and each is resumable bit for bit:

- **native**: CartPole, Pendulum, Acrobot and MountainCar (`classic`, also on a GPU) and the MuJoCo tasks (`mujoco_tasks`) written for all environments at
  once, the same numbers as Gymnasium's; **threads**: the same MuJoCo tasks on all cores;
- **sync**: any Gymnasium environment, one after the other in this process;
- **processes**: the same, shared out over one worker process per core;
- **warp**: the same MuJoCo tasks in MuJoCo Warp, in float32, made for GPUs (`warp_tasks`);
- **envpool**: what EnvPool has, under the names `envpool/ID` (`pool`).

In sync and processes every episode is reset with an explicit seed that follows from (seed, environment, episode). So the state of a deterministic environment
is that seed and the actions since: loading resets, replays them, and checks that the observation reached is the saved one bit for bit. No object is ever
pickled.
"""

import contextlib
import difflib
import importlib.util
import math
import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from torch import Tensor

from onetorch.rl import env_worker
from onetorch.rl.env_groups import Here, Worker, receive
from onetorch.rl.env_worker import MAKING, REPLAYING, RESETTING, STEPPING, Fault
from onetorch.runs.errors import RunError, UsageError
from onetorch.runs.provenance import cores

TIMEOUT = 60.0  # seconds that one reset or one step of one environment may take
FETCHED = 1024  # steps after which the ends of episodes are fetched from a device, asked for or not

# what `step` returns: next_obs (N, D) float32, reward (N,) float32, terminated (N,) bool, truncated (N,) bool
Step = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Spaces:
    """What a task takes and gives.

    Observations are (D,) float32, or a picture (C, H, W) uint8; where a task (a Dict) has both, the pixels, 0 to 255, are the last C * H * W of the D numbers.
    Actions are one of A (Discrete: a tensor (N,) int64), or (A,) float32 in [-1, 1] (Box: (N, A)), or K choices at once (MultiDiscrete and MultiBinary:
    (N, K) int64, the k-th one of multi[k], A their sum).
    """

    obs_dim: int  # D; 0 where observations are pictures alone
    act_dim: int  # A
    discrete: bool  # not Box
    multi: tuple[int, ...] = ()  # empty for Discrete and Box
    image: tuple[int, int, int] | None = None  # (C, H, W)

    @property
    def obs_shape(self) -> tuple[int, ...]:
        return (self.obs_dim,) if self.obs_dim or self.image is None else self.image

    @property
    def obs_dtype(self) -> torch.dtype:
        return torch.float32 if self.obs_dim or self.image is None else torch.uint8

    def example(self, count: int) -> Tensor:
        """Observations (count, …) such as these spaces hold: numbers around 0, and pixels."""
        pixels = torch.randint(0, 256, (count, *(self.image or (0,))))
        if not self.obs_dim:
            return pixels.to(torch.uint8)
        return torch.cat((torch.randn(count, self.obs_dim - math.prod(self.image or (0,))), pixels.flatten(1)), 1)


class Envs(Protocol):
    spaces: Spaces
    num_envs: int
    obs: Tensor  # (N, D) float32: what to act on now

    @property
    def episodes(self) -> "Episodes": ...

    def step(self, act: Tensor) -> Step:
        """act (N,) int64 for Discrete; (N, A) float for Box, where [-1, 1] is mapped onto the environment's bounds and what lies beyond is clipped."""

    def begin(self, act: Tensor) -> Callable[[], Step]:
        """Begins `step`; what is returned ends it, and has to be called before anything else is asked. Other processes ("processes", "envpool") are at work
        in between; what runs in this process does it at the end, which is soon enough for a GPU to have been given its work before."""

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
            self.note(self.running[done].tolist())
            self.running[done] = 0
            self.length[done] = 0

    def note(self, returns: list[float]) -> None:
        """Of episodes that ended, the earliest first."""
        self.recent = (self.recent + returns)[-self.window :]
        self.finished += len(returns)

    def mean_return(self) -> float | None:
        """Mean over the last `window` finished episodes; None before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running.copy(), "length": self.length.copy(), "recent": list(self.recent), "finished": self.finished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running, self.length = np.array(state["running"]), np.array(state["length"])
        self.recent, self.finished = list(state["recent"]), int(state["finished"])


class EpisodesThere:
    """Episodes of environments on a device, counted there without a wait: which ended, and with what return, is fetched into `known` where somebody asks."""

    def __init__(self, known: Episodes, device: str | torch.device | None) -> None:
        self.known, self.device = known, device
        # of the running episodes (N,), and for each step since the last fetch the returns of those that it ended, NaN for the others: all on the device
        self.paid, self.length, self.ended = self._there(known.running), self._there(known.length), list[Tensor]()

    def _there(self, values: np.ndarray) -> Tensor:
        return torch.tensor(values, device=self.device)

    def add(self, reward: Tensor, terminated: Tensor, max_steps: int) -> Tensor:
        """One step of all environments: reward (N,), terminated (N,). Returns truncated (N,), which episodes have come to the time limit."""
        self.paid, self.length = self.paid + reward, self.length + 1
        truncated = self.length >= max_steps
        done = terminated | truncated
        self.ended.append(torch.where(done, self.paid, math.nan))
        if len(self.ended) == FETCHED:
            self._note()
        self.paid, self.length = self.paid.masked_fill(done, 0), self.length.masked_fill(done, 0)
        return truncated

    def _note(self) -> None:
        returns = torch.stack(self.ended)
        self.known.note(returns[~returns.isnan()].tolist())
        self.ended.clear()

    def fetch(self) -> Episodes:
        if self.ended:
            self._note()
        self.known.running, self.known.length = self.paid.cpu().numpy(), self.length.cpu().numpy()
        return self.known

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.known.load_state_dict(state)
        self.paid, self.length = self._there(self.known.running), self._there(self.known.length)
        self.ended.clear()


class ActionMap:
    """From a policy's actions to an environment's own, (N, …) in its dtype: finite Box bounds are mapped from [-1, 1], and nothing lies beyond them; whole
    numbers are the nearest. Bounds so far apart that the dtype cannot hold the distance count as none."""

    def __init__(self, space: gymnasium.Space) -> None:
        self.space = space
        if isinstance(space, gymnasium.spaces.Box):
            with np.errstate(over="ignore"):
                bounded = np.isfinite(space.low) & np.isfinite(space.high) & np.isfinite(space.high - space.low)
            low, high = np.where(bounded, space.low, -1.0), np.where(bounded, space.high, 1.0)
            self.middle, self.half = (low + high) / 2, (high - low) / 2
            self.same = bool((self.middle == 0).all() and (self.half == 1).all())

    def __call__(self, act: Tensor) -> np.ndarray:
        space: Any = self.space
        if isinstance(space, gymnasium.spaces.Box):
            given = act.detach().numpy().reshape(-1, *space.shape)
            scaled = given if self.same else self.middle + given * self.half
            scaled = np.rint(scaled) if space.dtype.kind in "iu" else scaled
            return np.minimum(np.maximum(scaled, space.low), space.high).astype(space.dtype, copy=False)
        start = getattr(space, "start", 0)  # MultiBinary has none
        return (act.numpy().reshape(-1, *space.shape) + start).astype(space.dtype)


class GymEnvs:
    """N copies of a Gymnasium environment, shared out over groups in this process or in `workers` processes."""

    def __init__(self, env: str, num_envs: int, seed: int, workers: int = 0, timeout: float = TIMEOUT, action_repeat: int = 1) -> None:
        self.env, self.num_envs, self.seed = env, num_envs, seed
        spec, self.spaces, self.action_space, observation = _inspect(env)
        self.to_env = ActionMap(self.action_space)
        groups = max(1, min(workers, num_envs))
        edges = [num_envs * k // groups for k in range(groups + 1)]
        self.parts = [slice(start, stop) for start, stop in pairwise(edges)]
        self.groups: list[Worker | Here] = [
            Worker(spec, p, observation, timeout, action_repeat) if workers else Here(spec, p, timeout, action_repeat) for p in self.parts
        ]  # workers start side by side
        self.closed = False
        self.episodes = Episodes(num_envs)
        self.episode = np.zeros(num_envs, np.int64)  # ordinal of the running episode
        self.next_seed = np.array([self._seed(i, 1) for i in range(num_envs)])
        self.actions: list[list[np.ndarray]] = [[] for _ in range(num_envs)]  # since the reset
        none = np.empty((0, *self.action_space.shape), self.action_space.dtype)
        self.obs = torch.from_numpy(np.stack([self._replay(i, self._seed(i, 0), none) for i in range(num_envs)]))
        self._check(self.obs.numpy(), RESETTING, stepping=False)

    def _seed(self, index: int, episode: int) -> int:
        return episode_seed(self.seed, index, episode)

    def _replay(self, index: int, seed: int, actions: np.ndarray) -> np.ndarray:
        part, group = next((p, g) for p, g in zip(self.parts, self.groups, strict=True) if p.start <= index < p.stop)
        try:
            group.send_replay(index - part.start, seed, actions)
            return receive([group])[0][0]
        except Fault as fault:
            raise self._named(fault, stepping=False) from None

    def step(self, act: Tensor) -> Step:
        return self.begin(act)()

    def begin(self, act: Tensor) -> Callable[[], Step]:
        if self.closed:
            raise RunError(f"these {self.num_envs} {self.env} are closed: make new ones")
        if act.numel() != self.num_envs * math.prod(self.action_space.shape):
            raise ValueError(f"act must be {self.num_envs} actions of {self.action_space}, got a tensor {tuple(act.shape)}")
        actions = self.to_env(act)
        for group, part in zip(self.groups, self.parts, strict=True):
            group.send_step(actions[part], self.next_seed[part])
        return partial(self._end, actions)

    def _end(self, actions: np.ndarray) -> Step:
        try:
            answers = receive(self.groups)
        except Fault as fault:
            raise self._named(fault, stepping=True) from None
        reward, next_obs, obs, terminated, truncated = answers[0] if len(answers) == 1 else (np.concatenate(a) for a in zip(*answers, strict=True))
        done = terminated | truncated
        any_done = bool(done.any())
        self._check(next_obs, STEPPING, reward, actions)
        if any_done:
            self._check(obs, RESETTING)
        for log, action in zip(self.actions, actions, strict=True):
            log.append(action)
        self.episodes.add(reward, done if any_done else None)
        for i in done.nonzero()[0] if any_done else ():
            self.actions[i] = []
            self.episode[i] += 1
            self.next_seed[i] = self._seed(i, int(self.episode[i]) + 1)
        self.obs = torch.from_numpy(obs)
        return torch.from_numpy(next_obs), torch.from_numpy(reward).float(), torch.from_numpy(terminated), torch.from_numpy(truncated)

    def _check(self, obs: np.ndarray, phase: int, reward: np.ndarray | None = None, actions: np.ndarray | None = None, stepping: bool = True) -> None:
        """RunError where a number is not finite."""
        total = 0.0 if obs.dtype == np.uint8 else np.add.reduce(obs, None, np.float64)  # one NaN or infinity makes the sum one
        if math.isfinite(total) and (reward is None or math.isfinite(np.add.reduce(reward))):
            return
        bad_obs = np.array([not np.isfinite(row).all() for row in obs])
        bad_reward = np.zeros(self.num_envs, bool) if reward is None else ~np.isfinite(reward)
        if not (bad_obs | bad_reward).any():
            return  # only the sum was too large
        i = int((bad_obs | bad_reward).nonzero()[0][0])
        given = "" if actions is None or np.isfinite(actions[i]).all() else f" (it was given the action {shown(actions[i])})"
        what = f"observation {shown(obs[i])}" if bad_obs[i] or reward is None else f"reward {reward[i]}"
        fault = Fault(f"gave the {what}", f"expected finite numbers{given}")
        fault.at = (i, phase, 0)
        raise self._named(fault, stepping)

    def _named(self, fault: Fault, stepping: bool) -> RunError:
        """The error that says which environment did what and when. All of them are ended, since after a fault none can go on as if nothing had happened."""
        self.closed = True
        for group in self.groups:
            group.kill()
        number, phase, replayed = fault.at
        when = {
            MAKING: "while it was made",
            RESETTING: f"at the reset of episode {self.episode[number] + stepping}",
            STEPPING: f"at step {self.episodes.length[number] + 1} of episode {self.episode[number]}",
            REPLAYING: f"at step {replayed + 1} of the replay of episode {self.episode[number]}",
        }[phase]
        error = RunError(f"{self.env} number {number} {fault.what} {when}" + (f": {fault.detail}" if fault.detail else ""))
        for line in fault.trace.splitlines():
            error.add_note(line)
        return error

    def state_dict(self) -> dict[str, Any]:
        empty = np.empty((0, *self.action_space.shape), self.action_space.dtype)
        actions = [np.stack(log) if log else empty for log in self.actions]
        state = {"env": self.env, "seed": self.seed, "episode": self.episode.copy(), "actions": actions}
        return state | {"obs": self.obs.numpy().copy(), "episodes": self.episodes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        same_count(self.num_envs, len(state["actions"]))
        if state["env"] != self.env:
            raise ValueError(f"the saved environments are {state['env']}, these are {self.env}")
        self.seed, self.episode = int(state["seed"]), np.array(state["episode"])
        self.next_seed = np.array([self._seed(i, int(k) + 1) for i, k in enumerate(self.episode)])
        saved = np.asarray(state["obs"])
        obs = np.stack([self._replay(i, self._seed(i, int(self.episode[i])), np.asarray(state["actions"][i])) for i in range(self.num_envs)])
        for i in range(self.num_envs):
            if obs[i].tobytes() != saved[i].tobytes():
                raise ValueError(
                    f"{self.env} number {i} did not come back to its saved observation after the same seed and {len(state['actions'][i])} actions: it is not "
                    f"deterministic under reset(seed=…), or its version changed (gymnasium {gymnasium.__version__} here); such a run cannot go on exactly"
                )
        self.actions = [list(np.asarray(log)) for log in state["actions"]]
        self.episodes.load_state_dict(state["episodes"])
        self.obs = torch.from_numpy(obs)

    def close(self) -> None:
        self.closed = True
        for group in self.groups:
            group.hang_up()
        for group in self.groups:
            group.close()


def stack_spaces(spaces: Spaces, k: int) -> Spaces:
    """The spaces of Stacked environments."""
    if k == 1:
        return spaces
    if spaces.image and spaces.obs_dim:
        raise UsageError("frame_stack is for vectors or pictures, not for both together: wrap the environment with gymnasium.wrappers.FrameStackObservation")
    image = (k * spaces.image[0], *spaces.image[1:]) if spaces.image else None
    return replace(spaces, obs_dim=k * spaces.obs_dim, image=image)


class Stacked:
    """`envs` whose observation is the last k of theirs, the newest last: (N, k * D) or (N, k * C, H, W). At a reset the first is repeated."""

    def __init__(self, envs: Envs, k: int) -> None:
        self.envs, self.k, self.num_envs = envs, k, envs.num_envs
        self.spaces = stack_spaces(envs.spaces, k)
        self.obs = self._repeat(envs.obs)

    @property
    def episodes(self) -> Episodes:
        return self.envs.episodes

    def _repeat(self, obs: Tensor) -> Tensor:
        return torch.cat((obs,) * self.k, 1)

    def step(self, act: Tensor) -> Step:
        return self.begin(act)()

    def begin(self, act: Tensor) -> Callable[[], Step]:
        return partial(self._end, self.envs.begin(act))

    def _end(self, end: Callable[[], Step]) -> Step:
        newest, reward, terminated, truncated = end()
        next_obs = self.obs = torch.cat((self.obs[:, newest.shape[1] :], newest), 1)
        done = terminated | truncated
        if done.any():
            self.obs = next_obs.clone()
            self.obs[done] = self._repeat(self.envs.obs[done])
        return next_obs, reward, terminated, truncated

    def state_dict(self) -> dict[str, Any]:
        return {"envs": self.envs.state_dict(), "obs": self.obs.cpu().numpy().copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if tuple(state["obs"].shape) != tuple(self.obs.shape):
            raise ValueError(f"observations {tuple(state['obs'].shape)} were saved, here they are {tuple(self.obs.shape)}")
        self.envs.load_state_dict(state["envs"])
        self.obs = torch.as_tensor(np.asarray(state["obs"])).clone().to(self.obs.device)

    def close(self) -> None:
        self.envs.close()


class Moved:
    """`envs` for a policy that is elsewhere, on `device`: each step's actions are fetched from there, and what they led to is sent there."""

    def __init__(self, envs: Envs, device: str) -> None:
        self.envs, self.device, self.spaces, self.num_envs = envs, device, envs.spaces, envs.num_envs
        self.obs = envs.obs.to(device)

    @property
    def episodes(self) -> Episodes:
        return self.envs.episodes

    def step(self, act: Tensor) -> Step:
        return self.begin(act)()

    def begin(self, act: Tensor) -> Callable[[], Step]:
        return partial(self._end, self.envs.begin(act.to(self.envs.obs.device)))

    def _end(self, end: Callable[[], Step]) -> Step:
        reached, *others = end()
        next_obs = reached.to(self.device)
        self.obs = next_obs if self.envs.obs is reached else self.envs.obs.to(self.device)
        reward, terminated, truncated = (x.to(self.device) for x in others)
        return next_obs, reward, terminated, truncated

    def state_dict(self) -> dict[str, Any]:
        return self.envs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.envs.load_state_dict(state)
        self.obs = self.envs.obs.to(self.device)

    def close(self) -> None:
        self.envs.close()


def make(
    env: str,
    num_envs: int,
    seed: int,
    backend: str | None = None,
    *,
    frame_stack: int = 1,
    action_repeat: int = 1,
    timeout: float = TIMEOUT,
    device: str = "cpu",
) -> Envs:
    """`num_envs` copies of the Gymnasium environment `env` ("module:id" imports a module of yours that registers it, "envpool/ID" is one of EnvPool's), already
    reset. `backend`: one of `backends(env)`, by default the first. `frame_stack`: an observation is the last so many, the newest last (see Stacked).
    `action_repeat`: an action is held for so many of the environment's own steps, or until the episode ends; what is then seen is the last of them, what is
    paid their sum (Mnih et al. 2015's frame skip). `device`: where a policy finds and leaves all tensors. The native classic tasks run there, and "warp" on the
    GPU where there is one; all others stay on the CPU. The tensors of what runs elsewhere are moved at each step.

    UsageError (a ValueError) for an unknown id (naming the nearest), a missing package or an unsupported space. RunError, now and in `step`, when an
    environment raises, exits, is killed, hangs (one reset or step takes longer than `timeout` seconds), gives NaN, infinity, or a wrong shape or type: its
    message says which environment did what at which step, its notes are the traceback, and no process is left. In `sync` what ends the process ends this one.
    """
    if num_envs < 1:
        raise UsageError(f"num_envs must be at least 1, got {num_envs}")
    if not timeout > 0:
        raise UsageError(f"timeout must be above 0 seconds, got {timeout}")
    if frame_stack < 1:
        raise UsageError(f"frame_stack must be at least 1, got {frame_stack}")
    if action_repeat < 1:
        raise UsageError(f"action_repeat must be at least 1, got {action_repeat}")
    known = backends(env, action_repeat)
    backend = backend or known[0]
    usable = known if known == ("envpool",) else dict.fromkeys((*known, *(asked(env) if action_repeat == 1 else ()), "sync", "processes"))
    if backend not in usable:
        raise UsageError(f"backend of {env} must be one of {', '.join(usable)}, got {backend!r}")
    from onetorch.rl import classic, mujoco_tasks, pool, warp_tasks

    there = device != "cpu" and backend == "native" and env in classic.TASKS
    made: Envs
    if backend in ("sync", "processes"):
        made = GymEnvs(env, num_envs, seed, cores() if backend == "processes" else 0, timeout, action_repeat)
    elif backend == "envpool":
        made = pool.PoolEnvs(env, num_envs, seed)
    elif env in classic.TASKS:
        made = classic.Classic(env, num_envs, seed, device if there else None)
    else:
        try:
            if backend == "warp":
                where = device if device.startswith("cuda") else "cuda" if torch.cuda.is_available() else "cpu"
                made, there = warp_tasks.WarpEnvs(env, num_envs, seed, where), where == device
            else:
                made = mujoco_tasks.MujocoEnvs(env, num_envs, seed, cores() if backend == "threads" else 1)
        except ImportError as error:
            raise UsageError(_missing(env, error, backend)) from None
    made = made if frame_stack == 1 else Stacked(made, frame_stack)
    return made if there or device == "cpu" else Moved(made, device)


def backends(env: str, action_repeat: int = 1) -> tuple[str, ...]:
    """The backends that can run `env` and are worth measuring, the default first. Only Gymnasium's own environments hold an action for several steps."""
    from onetorch.rl import classic, mujoco_tasks

    if env.startswith("envpool/"):
        if action_repeat > 1:
            raise UsageError(f"action_repeat is for Gymnasium's environments, not for EnvPool's: expected 1 for {env}, got {action_repeat}")
        return ("envpool",)
    if env in classic.TASKS and action_repeat == 1:
        return ("native", "sync")
    if env in mujoco_tasks.TASKS and action_repeat == 1:
        there = ("warp",) if torch.cuda.is_available() and importlib.util.find_spec("mujoco_warp") else ()  # on a processor it is slower than "native"
        return ("native", *(("threads",) if cores() > 1 else ()), *there)
    entry = _spec(env).entry_point  # a worker can import a name, not an object, and not one from the script that was started
    return ("sync", "processes") if isinstance(entry, str) and not entry.startswith("__main__") else ("sync",)


def beside_updates(env: str) -> tuple[str, ...]:
    """Those of them that are worth measuring where few environments step while gradient steps are taken: the default, and processes, whose steps then take
    no time as long as there is a core for them."""
    default, *others = backends(env)
    return (default, *(backend for backend in others if backend == "processes"))


def asked(env: str) -> tuple[str, ...]:
    """Backends of `env` beside `backends(env)` that `--plan backend=…` may ask for."""
    from onetorch.rl import mujoco_tasks

    return ("warp",) if env in mujoco_tasks.TASKS else ()


def speed(env: str, num_envs: int, backend: str, seconds: float = 0.5) -> float:
    """Environment steps per second of nothing but the environments, under actions drawn beforehand: the ceiling of any training on them."""
    envs = make(env, num_envs, 0, backend)
    generator = torch.Generator().manual_seed(0)
    A, multi, shape = envs.spaces.act_dim, envs.spaces.multi, (64, num_envs)
    if multi:
        draws = torch.stack([torch.randint(choices, shape, generator=generator) for choices in multi], -1)
    else:
        draws = torch.randint(A, shape, generator=generator) if envs.spaces.discrete else torch.rand(*shape, A, generator=generator) * 2 - 1
    steps, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds or not steps:
        for act in draws:
            envs.step(act)
        steps += draws.shape[0] * num_envs
    envs.close()
    return steps / spent


def spaces(env: str, *, frame_stack: int = 1, multi: bool = False, images: bool = False) -> Spaces:
    """The spaces of `env`. Same errors as `make`; UsageError too for several choices at once or pictures where the algorithm does not say it takes them."""
    from onetorch.rl import classic, pool

    found = classic.TASKS[env].spaces if env in classic.TASKS else pool.spaces(env) if env.startswith(pool.PREFIX) else _inspect(env)[1]
    if found.multi and not multi:
        several = f"{env} has actions that are {len(found.multi)} choices at once, of {found.multi}"
        raise UsageError(f"{several}; this algorithm takes one, `ppo`, `trpo` and `vpg` several")
    if found.image and not images:
        raise UsageError(f"{env} has pictures (C, H, W) = {found.image} for observations; this algorithm takes vectors")
    return stack_spaces(found, frame_stack)


def make_one(env: str, **options: Any) -> gymnasium.Env:
    """One Gymnasium environment, with errors in one line that say what to do. Atari games as in Mnih et al. 2015: every fourth frame, grey, 84 x 84."""
    spec = _spec(env)
    atari = str(spec.entry_point).startswith("ale_py.")
    try:
        one = gymnasium.make(spec, disable_env_checker=True, **options, **({"frameskip": 1} if atari else {}))
        return gymnasium.wrappers.AtariPreprocessing(one) if atari else one
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise UsageError(_missing(env, error)) from None
    except gymnasium.error.Error as error:
        raise UsageError(f"{env} cannot be made: {str(error).splitlines()[0]}") from None
    except Exception as error:  # the environment's own
        raise _traced(UsageError(f"{env} cannot be made: {_shortly(error)}"), error) from None


def _shortly(error: Exception) -> str:
    what = " ".join(str(error).split())
    return what if isinstance(error, ImportError) else f"{type(error).__name__}: {what}"


def _traced(told: UsageError, error: Exception) -> UsageError:
    """`told`, with the traceback of what was raised in code that is not ours as its notes."""
    if not isinstance(error, ImportError):
        for line in "".join(traceback.format_exception(error)).splitlines():
            told.add_note(line)
    return told


def _missing(env: str, error: Exception, backend: str | None = None) -> str:
    extra = "atari" if env.startswith("ALE/") else "warp" if backend == "warp" else "rl"
    return f"{env} needs a package that is not installed ({str(error).splitlines()[0]}): pip install 'onetorch[{extra}]'"


def _spec(env: str) -> gymnasium.envs.registration.EnvSpec:
    if env.startswith("envpool/"):
        raise UsageError(f"{env} comes from EnvPool, which makes batches and no single environment")
    if env.startswith("ALE/") and env not in gymnasium.registry:
        try:
            import ale_py
        except ImportError as error:
            raise UsageError(_missing(env, error)) from None
        gymnasium.register_envs(ale_py)
    module, colon, name = env.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)  # which registers it
        except Exception as error:  # the user's own code, which may do anything
            # Not looked for here by itself: a config, which may be a stranger's, names it.
            first = module.partition(".")[0]
            here = isinstance(error, ModuleNotFoundError) and error.name == first and Path(f"{first}.py").is_file()
            hint = "; to take the one in this folder, put PYTHONPATH=. before the command" if here else ""
            raise _traced(UsageError(f"{env}: the module {module!r} cannot be imported ({_shortly(error)}){hint}"), error) from None
    try:
        return gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        near = _nearest(name)
        raise UsageError(f"unknown environment {env!r}" + (f"; nearest: {', '.join(near)}" if near else f" ({str(error).splitlines()[0]})")) from None


def _nearest(env: str) -> list[str]:
    """Up to three known ids whose names are close to that of `env`, the newest version of each. Only names are compared: in an id as short as Ant-v3 the
    version is half of what any other id would have to be like."""
    named: dict[str, gymnasium.envs.registration.EnvSpec] = {}
    for spec in gymnasium.registry.values():
        known = named.setdefault(spec.name.lower(), spec)
        # CartPole-v1 before phys2d/CartPole-v1, v1 before v0
        if (spec.namespace is None, spec.version or 0) > (known.namespace is None, known.version or 0):
            named[spec.name.lower()] = spec
    name = re.sub(r"^.*/|-v\d+$", "", env.lower())
    return [named[near].id for near in difflib.get_close_matches(name, named, n=3, cutoff=0.7)]


def _inspect(env: str) -> tuple[gymnasium.envs.registration.EnvSpec, Spaces, Any, env_worker.Observation]:
    with contextlib.closing(make_one(env)) as one:
        act, spec = one.action_space, one.spec
        try:
            observation = env_worker.Observation(one.observation_space)
        except TypeError as error:
            raise UsageError(f"{env} has the {error}") from None
    assert spec is not None
    act_dim, multi = action_size(env, act)
    if not act_dim or not math.prod(observation.shape):
        raise UsageError(f"{env} has the {'observation' if act_dim else 'action'} space {one.observation_space if act_dim else act}, which holds no number")
    obs_dim = observation.shape[0] if observation.vectors else 0
    found = Spaces(obs_dim, act_dim, not isinstance(act, gymnasium.spaces.Box), multi, observation.image)
    return spec, found, act, observation


def action_size(env: str, space: gymnasium.Space) -> tuple[int, tuple[int, ...]]:
    """A, and the choices of several at once, as in Spaces. UsageError for what is not supported."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(space.n), ()
    if isinstance(space, gymnasium.spaces.Box):
        return math.prod(space.shape), ()
    if isinstance(space, gymnasium.spaces.MultiDiscrete | gymnasium.spaces.MultiBinary):
        multi = tuple(space.nvec.ravel().tolist()) if isinstance(space, gymnasium.spaces.MultiDiscrete) else (2,) * math.prod(space.shape)
        return sum(multi), multi
    raise UsageError(f"{env} has the action space {space}; supported: Box, Discrete, MultiDiscrete, MultiBinary")


def episode_seed(seed: int, index: int, episode: int) -> int:
    """What the `episode`-th reset of environment number `index` is given."""
    return int(np.random.SeedSequence((seed, index, episode)).generate_state(1)[0])


def shown(row: np.ndarray) -> str:
    """In one line, and not all of a long one."""
    return " ".join(np.array2string(row, max_line_width=10_000, threshold=400, edgeitems=5).split("\n"))


def same_count(have: int, saved: Sequence[int] | int) -> None:
    if have != saved:
        raise ValueError(f"{saved} environments were saved, {have} are here")
