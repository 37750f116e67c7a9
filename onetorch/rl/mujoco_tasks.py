"""Gymnasium's MuJoCo tasks (version 5, with their defaults), N at once: one model, N states, and a loop around MuJoCo's own step.

What costs beside the physics is done for all environments together: observations, rewards and ends are a few array operations. Every number is Gymnasium's
(`sync` gives the same bits, from the same seeds): the same calls of MuJoCo in the same order, the same draws at a reset, float32 where Gymnasium has it.
MuJoCo lets go of Python's lock, so that threads share the work.

Todorov, Erez, Tassa 2012, "MuJoCo: a physics engine for model-based control"; the tasks are described at gymnasium.farama.org.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from onetorch.rl.envs import ActionMap, Episodes, Spaces, Step, episode_seed, same_count, shown
from onetorch.runs.errors import RunError

Fields = dict[str, Any]  # of MjData, of all environments, by name: (N, …); numpy float64, or torch float32 (`warp_tasks`)


@dataclass(frozen=True)
class Task:
    """`reward(xp, b, velocity, act)` gives reward (N,) and terminated (N,) after a step, from the fields b, the velocity (N, 1 or 2) of what `place` gives, and
    the actions (N, A) float32. `xp` is numpy or torch, as in `classic`."""

    model: str  # the file among Gymnasium's assets
    frame_skip: int  # steps of the simulation per step of the task
    max_steps: int  # the time limit
    fields: tuple[str, ...]  # of MjData that the functions below read
    observe: Callable[[Any, Fields], Any]  # (N, D)
    reward: Callable[[Any, Fields, Any, Any], tuple[Any, Any]]
    noise: float  # half the width of the positions at a reset
    normal: bool = False  # velocities at a reset are normal with standard deviation `noise`, else uniform like the positions
    place: Callable[[Any, Fields, Any], Any] | None = None  # (N, 1 or 2), of which the velocity counts; also given the bodies' masses
    forces: bool = False  # external forces are read, which MuJoCo computes only when asked


def _sides(xp: Any, b: Fields) -> Any:
    return xp.concatenate((b["qpos"][:, 1:], b["qvel"]), 1)


def _sides_clipped(xp: Any, b: Fields) -> Any:
    return xp.concatenate((b["qpos"][:, 1:], xp.clip(b["qvel"], -10, 10)), 1)


def _effort(xp: Any, act: Any, weight: float) -> Any:
    return weight * xp.square(act).sum(1)


def _x(xp: Any, b: Fields, mass: Any) -> Any:
    return b["qpos"][:, :1]


def _never(xp: Any, b: Fields) -> Any:
    return xp.zeros_like(b["qpos"][:, 0], dtype=bool)


def _half_cheetah(xp: Any, b: Fields, velocity: Any, act: Any) -> tuple[Any, Any]:
    return velocity[:, 0] - _effort(xp, act, 0.1), _never(xp, b)


def _swimmer_observe(xp: Any, b: Fields) -> Any:
    return xp.concatenate((b["qpos"][:, 2:], b["qvel"]), 1)


def _swimmer(xp: Any, b: Fields, velocity: Any, act: Any) -> tuple[Any, Any]:
    return velocity[:, 0] - _effort(xp, act, 1e-4), _never(xp, b)


def _hopper(xp: Any, b: Fields, velocity: Any, act: Any) -> tuple[Any, Any]:
    state = xp.abs(xp.concatenate((b["qpos"][:, 2:], b["qvel"]), 1))  # the angle first
    healthy = (xp.amax(state, 1) < 100) & (b["qpos"][:, 1] > 0.7) & (state[:, 0] < 0.2)
    return velocity[:, 0] + healthy * 1.0 - _effort(xp, act, 1e-3), ~healthy


def _walker2d(xp: Any, b: Fields, velocity: Any, act: Any) -> tuple[Any, Any]:
    z, angle = b["qpos"][:, 1], b["qpos"][:, 2]
    healthy = (z > 0.8) & (z < 2.0) & (angle > -1.0) & (angle < 1.0)
    return velocity[:, 0] + healthy * 1.0 - _effort(xp, act, 1e-3), ~healthy


def _torso(xp: Any, b: Fields, mass: Any) -> Any:
    return b["xpos"][:, 1, :2]


def _ant_observe(xp: Any, b: Fields) -> Any:
    contact = xp.clip(b["cfrc_ext"], -1.0, 1.0)[:, 1:].reshape(len(b["qpos"]), -1)
    return xp.concatenate((b["qpos"][:, 2:], b["qvel"], contact), 1)


def _ant(xp: Any, b: Fields, velocity: Any, act: Any) -> tuple[Any, Any]:
    finite = xp.isfinite(b["qpos"]).all(1) & xp.isfinite(b["qvel"]).all(1)
    healthy = finite & (b["qpos"][:, 2] >= 0.2) & (b["qpos"][:, 2] <= 1.0)
    contact = 5e-4 * xp.square(xp.clip(b["cfrc_ext"], -1.0, 1.0)).reshape(len(act), -1).sum(1)
    return velocity[:, 0] + healthy * 1.0 - (_effort(xp, act, 0.5) + contact), ~healthy


def _centre_of_mass(xp: Any, b: Fields, mass: Any) -> Any:
    return (xp.einsum("b,nbj->nj", mass, b["xipos"]) / mass.sum())[:, :2]


def _humanoid_observe(xp: Any, b: Fields) -> Any:
    n = len(b["qpos"])
    inner = [b[name][:, 1:].reshape(n, -1) for name in ("cinert", "cvel")]
    return xp.concatenate((b["qpos"][:, 2:], b["qvel"], *inner, b["qfrc_actuator"][:, 6:], b["cfrc_ext"][:, 1:].reshape(n, -1)), 1)


def _humanoid(xp: Any, b: Fields, velocity: Any, act: Any) -> tuple[Any, Any]:
    z = b["qpos"][:, 2]
    healthy = (z > 1.0) & (z < 2.0)
    contact = xp.clip(5e-7 * xp.square(b["cfrc_ext"]).reshape(len(act), -1).sum(1), -xp.inf, 10.0)
    return 1.25 * velocity[:, 0] + healthy * 5.0 - (0.1 * xp.square(b["ctrl"]).sum(1) + contact), ~healthy


def _pendulum_observe(xp: Any, b: Fields) -> Any:
    return xp.concatenate((b["qpos"], b["qvel"]), 1)


def _inverted_pendulum(xp: Any, b: Fields, velocity: Any, act: Any) -> tuple[Any, Any]:
    terminated = ~xp.isfinite(_pendulum_observe(xp, b)).all(1) | (xp.abs(b["qpos"][:, 1]) > 0.2)
    return 1.0 * ~terminated, terminated


def _double_observe(xp: Any, b: Fields) -> Any:
    q = b["qpos"]
    force = xp.clip(b["qfrc_constraint"], -10, 10)[:, :1]
    return xp.concatenate((q[:, :1], xp.sin(q[:, 1:]), xp.cos(q[:, 1:]), xp.clip(b["qvel"], -10, 10), force), 1)


def _inverted_double_pendulum(xp: Any, b: Fields, velocity: Any, act: Any) -> tuple[Any, Any]:
    x, y, v1, v2 = b["site_xpos"][:, 0, 0], b["site_xpos"][:, 0, 2], b["qvel"][:, 1], b["qvel"][:, 2]
    terminated = y <= 1
    return 10.0 * ~terminated - (0.01 * x**2 + (y - 2) ** 2) - (1e-3 * v1**2 + 5e-3 * v2**2), terminated


FINGERTIP, TARGET = 3, 4  # bodies of the Reacher


def _reacher_observe(xp: Any, b: Fields) -> Any:
    q, away = b["qpos"], b["xpos"][:, FINGERTIP] - b["xpos"][:, TARGET]
    return xp.concatenate((xp.cos(q[:, :2]), xp.sin(q[:, :2]), q[:, 2:], b["qvel"][:, :2], away[:, :2]), 1)


def _reacher(xp: Any, b: Fields, velocity: Any, act: Any) -> tuple[Any, Any]:
    away = b["xpos"][:, FINGERTIP] - b["xpos"][:, TARGET]
    return -xp.sqrt(xp.square(away).sum(1)) - xp.square(act).sum(1), _never(xp, b)


STATE = ("qpos", "qvel")
TASKS = {
    "HalfCheetah-v5": Task("half_cheetah.xml", 5, 1000, STATE, _sides, _half_cheetah, 0.1, normal=True, place=_x),
    "Hopper-v5": Task("hopper.xml", 4, 1000, STATE, _sides_clipped, _hopper, 5e-3, place=_x),
    "Walker2d-v5": Task("walker2d_v5.xml", 4, 1000, STATE, _sides_clipped, _walker2d, 5e-3, place=_x),
    "Swimmer-v5": Task("swimmer.xml", 4, 1000, STATE, _swimmer_observe, _swimmer, 0.1, place=_x),
    "Ant-v5": Task("ant.xml", 5, 1000, (*STATE, "xpos", "cfrc_ext"), _ant_observe, _ant, 0.1, normal=True, place=_torso, forces=True),
    "Humanoid-v5": Task(
        "humanoid.xml", 5, 1000, (*STATE, "ctrl", "xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext"), _humanoid_observe, _humanoid, 1e-2,
        place=_centre_of_mass, forces=True,
    ),
    "InvertedPendulum-v5": Task("inverted_pendulum.xml", 2, 1000, STATE, _pendulum_observe, _inverted_pendulum, 0.01),
    "InvertedDoublePendulum-v5": Task(
        "inverted_double_pendulum.xml", 5, 1000, (*STATE, "site_xpos", "qfrc_constraint"), _double_observe, _inverted_double_pendulum, 0.1, normal=True
    ),
    "Reacher-v5": Task("reacher.xml", 2, 50, (*STATE, "xpos"), _reacher_observe, _reacher, 0.1),
}  # fmt: skip


def load(task: Task) -> Any:
    """Its MjModel, as Gymnasium has it."""
    import mujoco

    return mujoco.MjModel.from_xml_path(str(Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / task.model))


def fault(env: str, number: int, obs: np.ndarray, reward: float, act: np.ndarray, length: int, episode: int) -> RunError:
    """The error that says what environment `number` gave after `length` steps of its episode: `obs` (D,) or `reward`, one of them not finite."""
    what = f"reward {reward}" if np.isfinite(obs).all() else f"observation {shown(obs)}"
    when = f"step {length + 1} of episode {episode}"
    return RunError(f"{env} number {number} gave the {what} at {when}: expected finite numbers (it was given the action {shown(act)})")


class MujocoEnvs:
    """N environments of the task `env`, one of TASKS, stepped by `threads` threads. ImportError where mujoco is not installed."""

    def __init__(self, env: str, num_envs: int, seed: int, threads: int = 1) -> None:
        import mujoco

        self.env, self.task, self.num_envs, self.seed, self.mujoco = env, TASKS[env], num_envs, seed, mujoco
        self.model = load(self.task)
        self.mass = self.model.body_mass
        self.dt = self.model.opt.timestep * self.task.frame_skip
        if self.model.ntree == 1:  # one tree of bodies is one island: to look for islands takes a seventh of a Hopper's step, and changes no bit
            self.model.opt.disableflags |= int(getattr(mujoco.mjtDisableBit, "mjDSBL_ISLAND", 0))  # where it is missing, nobody looks unless asked
        self.data = [mujoco.MjData(self.model) for _ in range(num_envs)]
        if mujoco.get_mjcb_time() is None:  # MjData has set a clock, which is read all through a step and takes as long again; nobody here asks it
            mujoco.set_mjcb_time(None)
        self.first_qpos, self.first_qvel = self.data[0].qpos.copy(), self.data[0].qvel.copy()
        low, high = self.model.actuator_ctrlrange.astype(np.float32).T
        self.to_env = ActionMap(gymnasium.spaces.Box(low, high, dtype=np.float32))
        # MjData's fields are views of memory that stays where it is: copying them together is all that is to be done for an environment.
        self.fields = {name: np.stack([getattr(d, name) for d in self.data]) for name in self.task.fields}
        self.views = [[(self.fields[name][i], getattr(d, name)) for name in self.task.fields] for i, d in enumerate(self.data)]
        self.ctrl = [d.ctrl for d in self.data]
        edges = [num_envs * k // threads for k in range(threads + 1)]
        self.parts = [range(start, stop) for start, stop in pairwise(edges) if stop > start]
        self.pool = ThreadPoolExecutor(len(self.parts) - 1) if len(self.parts) > 1 else None

        self.episodes = Episodes(num_envs)
        self.episode = np.zeros(num_envs, np.int64)
        for i in range(num_envs):
            self._reset(i)
        self.place = self._place()  # (N, 1 or 2), where they are, to tell how fast they are after the next step
        obs = self.task.observe(np, self.fields).astype(np.float32)
        self.obs = torch.from_numpy(obs)
        self.spaces = Spaces(obs_dim=obs.shape[1], act_dim=self.model.nu, discrete=False)

    def _reset(self, i: int) -> None:
        """Begin episode `episode[i]` of environment i, with Gymnasium's draws in Gymnasium's order."""
        rng = np.random.default_rng(episode_seed(self.seed, i, int(self.episode[i])))
        data, noise, reacher = self.data[i], self.task.noise, self.env == "Reacher-v5"
        self.mujoco.mj_resetData(self.model, data)
        data.qpos[:] = self.first_qpos + rng.uniform(-noise, noise, self.model.nq)
        if reacher:
            while True:
                goal = rng.uniform(-0.2, 0.2, 2)
                if np.linalg.norm(goal) < 0.2:
                    break
            data.qpos[-2:] = goal
            noise = 0.005
        draw = noise * rng.standard_normal(self.model.nv) if self.task.normal else rng.uniform(-noise, noise, self.model.nv)
        data.qvel[:] = self.first_qvel + draw
        if reacher:
            data.qvel[-2:] = 0
        self.mujoco.mj_forward(self.model, data)
        for mine, theirs in self.views[i]:
            mine[...] = theirs

    def _place(self) -> np.ndarray:
        return self.task.place(np, self.fields, self.mass).copy() if self.task.place else np.zeros((self.num_envs, 1))

    def _advance(self, part: range, act: np.ndarray) -> None:
        step, forces = self.mujoco.mj_step, self.mujoco.mj_rnePostConstraint if self.task.forces else None
        model, skip = self.model, self.task.frame_skip
        for i in part:
            self.ctrl[i][:] = act[i]
            step(model, self.data[i], skip)
            if forces:
                forces(model, self.data[i])
            for mine, theirs in self.views[i]:
                mine[...] = theirs

    def simulate(self, act: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One step under actions (N, A) float32 within the task's own bounds: observations (N, D) float64, reward (N,) float64, terminated (N,)."""
        waiting = [self.pool.submit(self._advance, part, act) for part in self.parts[1:]] if self.pool else []
        self._advance(self.parts[0], act)
        for future in waiting:
            future.result()
        place = self._place()
        velocity = (place - self.place) / self.dt
        self.place = place
        return self.task.observe(np, self.fields), *self.task.reward(np, self.fields, velocity, act)

    def step(self, act: Tensor) -> Step:
        given = self.to_env(act)
        obs, reward, terminated = self.simulate(given)
        if not math.isfinite(np.add.reduce(obs, None) + np.add.reduce(reward)):  # one NaN or infinity makes the sum one
            self._name(obs, reward, given)
        truncated = self.episodes.length >= self.task.max_steps - 1
        done = terminated | truncated
        next_obs = torch.from_numpy(obs.astype(np.float32))
        self.obs = next_obs
        any_done = bool(done.any())
        self.episodes.add(reward, done if any_done else None)
        if any_done:
            ended = done.nonzero()[0]
            for i in ended:
                self.episode[i] += 1
                self._reset(int(i))
            first = {name: field[ended] for name, field in self.fields.items()}
            if self.task.place:
                self.place[ended] = self.task.place(np, first, self.mass)
            self.obs = next_obs.clone()
            self.obs[torch.from_numpy(ended)] = torch.from_numpy(self.task.observe(np, first).astype(np.float32))
        return next_obs, torch.from_numpy(reward.astype(np.float32)), torch.from_numpy(terminated), torch.from_numpy(truncated)

    def begin(self, act: Tensor) -> Callable[[], Step]:
        return partial(self.step, act)

    def _name(self, obs: np.ndarray, reward: np.ndarray, act: np.ndarray) -> None:
        bad = (~np.isfinite(obs).all(1) | ~np.isfinite(reward)).nonzero()[0]
        if not bad.size:
            return  # only the sum was too large
        i = int(bad[0])
        raise fault(self.env, i, obs[i], reward[i], act[i], self.episodes.length[i], self.episode[i])

    def state_dict(self) -> dict[str, Any]:
        kind = self.mujoco.mjtState.mjSTATE_INTEGRATION
        simulated = np.empty((self.num_envs, self.mujoco.mj_stateSize(self.model, kind)))
        for row, data in zip(simulated, self.data, strict=True):
            self.mujoco.mj_getState(self.model, data, row, kind)
        state = {"env": self.env, "seed": self.seed, "episode": self.episode.copy(), "simulated": simulated, "place": self.place.copy()}
        return state | {"obs": self.obs.numpy().copy(), "episodes": self.episodes.state_dict(), "mujoco": self.mujoco.__version__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        same_count(self.num_envs, len(state["simulated"]))
        if state["env"] != self.env:
            raise ValueError(f"the saved environments are {state['env']}, these are {self.env}")
        kind = self.mujoco.mjtState.mjSTATE_INTEGRATION
        saved, size = np.asarray(state["simulated"]), self.mujoco.mj_stateSize(self.model, kind)
        if saved.shape[1] != size or state["mujoco"] != self.mujoco.__version__:
            raise ValueError(f"{self.env} was saved by mujoco {state['mujoco']}, this is {self.mujoco.__version__}: such a run cannot go on exactly")
        for row, data in zip(saved, self.data, strict=True):
            self.mujoco.mj_resetData(self.model, data)
            self.mujoco.mj_setState(self.model, data, np.ascontiguousarray(row), kind)
        self.seed, self.episode, self.place = int(state["seed"]), np.array(state["episode"]), np.array(state["place"])
        self.episodes.load_state_dict(state["episodes"])
        self.obs = torch.from_numpy(np.array(state["obs"]))

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown()
