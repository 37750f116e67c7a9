"""EnvPool's environments (extra `envpool`), named `envpool/ID`: Atari, MuJoCo, Box2D and more, written in C++ and stepped by threads of its own.

    envs = make("envpool/Pong-v5", num_envs=8, seed=0)

They are EnvPool's tasks, not Gymnasium's: the same names may differ in detail. Its Atari frames come grey, 84 x 84 and four at a time, so no `frame_stack` is
wanted there. Each environment's seed is fixed when it is made and its later episodes follow from the ones before; so its state is that seed and all actions
since it was made: loading makes it anew and repeats them, which takes as long as the steps did, and checks the observation reached. What ends the process
ends this one: these environments have no process of their own.

Weng et al. 2022, "EnvPool: a highly parallel reinforcement learning environment execution engine", arXiv:2206.10558.
"""

import difflib
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from onetorch.rl.envs import ActionMap, Episodes, Spaces, Step, action_size, episode_seed, same_count, shown
from onetorch.runs.errors import RunError, UsageError
from onetorch.runs.provenance import cores

PREFIX = "envpool/"


def _make(env: str, num_envs: int, seed: int) -> tuple[Any, gymnasium.Space, gymnasium.Space]:
    """The pool, the spaces of one environment's observations and actions. UsageError without the extra and for an unknown id."""
    try:
        import envpool
    except ImportError as error:
        raise UsageError(f"{env} needs a package that is not installed ({error}): pip install 'onetorch[envpool]'") from None
    name, known = env.removeprefix(PREFIX), envpool.list_all_envs()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise UsageError(f"unknown environment {env!r}" + (f"; nearest: {', '.join(PREFIX + one for one in near)}" if near else ""))
    seeds = [episode_seed(seed, i, 0) % 2**31 for i in range(num_envs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it declares its bounds in float64, of which Gymnasium complains
        pool = envpool.make_gymnasium(name, num_envs=num_envs, env_seed=seeds, num_threads=min(num_envs, cores()))
        return pool, pool.observation_space, pool.action_space


def spaces(env: str) -> Spaces:
    """The spaces of `env`, "envpool/ID". UsageError where it has others than Box observations, and Box, Discrete or MultiDiscrete actions."""
    pool, obs, act = _make(env, 1, 0)
    pool.close()
    return _spaces(env, obs, act)


def _spaces(env: str, obs: gymnasium.Space, act: gymnasium.Space) -> Spaces:
    if not isinstance(obs, gymnasium.spaces.Box):
        raise UsageError(f"{env} has the observation space {obs}; of EnvPool's, Box is supported")
    act_dim, multi = action_size(env, act)
    image = (obs.shape[0], obs.shape[1], obs.shape[2]) if obs.dtype == np.uint8 and len(obs.shape) == 3 else None  # (C, H, W)
    return Spaces(0 if image else math.prod(obs.shape), act_dim, not isinstance(act, gymnasium.spaces.Box), multi, image)


class PoolEnvs:
    """`num_envs` environments "envpool/ID"."""

    def __init__(self, env: str, num_envs: int, seed: int) -> None:
        self.env, self.num_envs, self.seed = env, num_envs, seed
        self.pool, observation_space, self.action_space = _make(env, num_envs, seed)
        self.spaces = _spaces(env, observation_space, self.action_space)
        self.to_env = ActionMap(self.action_space)
        self.shape = (num_envs, *self.spaces.obs_shape)
        self.episodes, self.episode = Episodes(num_envs), np.zeros(num_envs, np.int64)
        self.actions: list[np.ndarray] = []  # all since the pool was made, (N, …) each
        self.obs = self._tensor(self.pool.reset()[0])

    def _tensor(self, obs: np.ndarray) -> Tensor:
        dtype = np.uint8 if self.spaces.obs_dtype == torch.uint8 else np.float32
        return torch.from_numpy(np.array(obs, dtype).reshape(-1, *self.shape[1:]))  # a copy: the pool may use its memory again

    def _advance(self, actions: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """next_obs, reward, terminated, truncated of the step that was sent; what ended begins anew and `obs` is what to act on next."""
        obs, reward, terminated, truncated, _ = self.pool.recv(reset=False, return_info=True)
        self.actions.append(actions)
        next_obs = self.obs = self._tensor(obs)
        done = terminated | truncated
        if done.any():
            ended = done.nonzero()[0]
            self.obs = next_obs.clone()
            self.obs[torch.from_numpy(ended)] = self._tensor(self.pool.reset(ended.astype(np.int32))[0])
        return next_obs, reward.astype(np.float64), terminated.astype(bool), (truncated & ~terminated).astype(bool)

    def step(self, act: Tensor) -> Step:
        return self.begin(act)()

    def begin(self, act: Tensor) -> Callable[[], Step]:
        if act.numel() != self.num_envs * math.prod(self.action_space.shape or ()):
            raise ValueError(f"act must be {self.num_envs} actions of {self.action_space}, got a tensor {tuple(act.shape)}")
        actions = self.to_env(act)
        self.pool.send(actions)
        return partial(self._end, actions)

    def _end(self, actions: np.ndarray) -> Step:
        next_obs, reward, terminated, truncated = self._advance(actions)
        if not (math.isfinite(next_obs.sum(dtype=torch.float64).item()) and math.isfinite(reward.sum())):
            self._name(next_obs.numpy(), reward, actions)
        done = terminated | truncated
        self.episodes.add(reward, done if done.any() else None)
        self.episode += done
        return next_obs, torch.from_numpy(reward).float(), torch.from_numpy(terminated), torch.from_numpy(truncated)

    def _name(self, obs: np.ndarray, reward: np.ndarray, actions: np.ndarray) -> None:
        bad = (~np.isfinite(obs).reshape(self.num_envs, -1).all(1) | ~np.isfinite(reward)).nonzero()[0]
        if not bad.size:
            return  # only the sum was too large
        i = int(bad[0])
        what = f"reward {reward[i]}" if np.isfinite(obs[i]).all() else f"observation {shown(obs[i])}"
        when = f"step {self.episodes.length[i] + 1} of episode {self.episode[i]}"
        raise RunError(f"{self.env} number {i} gave the {what} at {when}: expected finite numbers (it was given the action {shown(actions[i])})")

    def state_dict(self) -> dict[str, Any]:
        space: Any = self.action_space
        actions = np.stack(self.actions) if self.actions else np.empty((0, self.num_envs, *space.shape), space.dtype)
        if isinstance(space, gymnasium.spaces.Discrete) and space.n <= 256:
            actions = actions.astype(np.uint8)
        state = {"env": self.env, "seed": self.seed, "actions": actions, "episode": self.episode.copy()}
        return state | {"obs": self.obs.numpy().copy(), "episodes": self.episodes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = np.asarray(state["obs"])
        same_count(self.num_envs, len(saved))
        if state["env"] != self.env:
            raise ValueError(f"the saved environments are {state['env']}, these are {self.env}")
        self.close()
        self.seed = int(state["seed"])
        (self.pool, *_), self.actions = _make(self.env, self.num_envs, self.seed), []
        self.obs = self._tensor(self.pool.reset()[0])
        for actions in np.asarray(state["actions"]).astype(self.action_space.dtype):
            self.pool.send(actions)
            self._advance(actions)
        if self.obs.numpy().tobytes() != saved.tobytes():
            raise ValueError(
                f"{self.env} did not come back to its saved observations after the same seeds and {len(self.actions)} steps: its version changed, "
                "or it is not deterministic; such a run cannot go on exactly"
            )
        self.episode = np.array(state["episode"])
        self.episodes.load_state_dict(state["episodes"])

    def close(self) -> None:
        self.pool.close()
