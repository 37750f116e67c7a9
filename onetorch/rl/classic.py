"""The classic control tasks written for all environments at once, with Gymnasium's constants and time limits.

Each task is a few functions of `xp`, which is numpy or torch: on the CPU numpy, whose calls cost a third of torch's on batches this small and give the bits of
Gymnasium; on another device torch, where everything stays. The state is float64 (S, N), and each operation is done in Gymnasium's order. The functions take and
give arrays whose last axis is the environment.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from onetorch.rl.envs import Episodes, EpisodesThere, Spaces, Step, episode_seed, same_count
from onetorch.runs.state import set_generator


class Task(Protocol):
    spaces: Spaces
    state_dim: int  # S
    max_steps: int  # the time limit

    def begin(self, xp: Any, uniform: Any) -> Any:
        """First states (S, n) from numbers uniform in [0, 1), (S, n)."""

    def step(self, xp: Any, state: Any, act: Any) -> tuple[Any, Any, Any]:
        """State (S, N) and actions (N,) or (N, A) to the next state, the reward (N,) and terminated (N,)."""

    def observe(self, xp: Any, state: Any) -> Any:
        """(D, N)."""


class CartPole:
    """Barto, Sutton, Anderson 1983. State: x, x_dot, theta, theta_dot."""

    spaces, state_dim, max_steps = Spaces(obs_dim=4, act_dim=2, discrete=True), 4, 500
    GRAVITY, TOTAL_MASS, POLE_MASS, LENGTH, FORCE, TAU = 9.8, 1.1, 0.1, 0.5, 10.0, 0.02  # SI units; LENGTH is half the pole's
    X_LIMIT, THETA_LIMIT = 2.4, 12 * 2 * math.pi / 360

    def begin(self, xp: Any, uniform: Any) -> Any:
        return -0.05 + 0.1 * uniform

    def step(self, xp: Any, state: Any, act: Any) -> tuple[Any, Any, Any]:
        x, x_dot, theta, theta_dot = state
        force = xp.where(act == 1, self.FORCE, -self.FORCE)
        cos, sin = xp.cos(theta), xp.sin(theta)
        pole = self.POLE_MASS * self.LENGTH
        temp = (force + pole * xp.square(theta_dot) * sin) / self.TOTAL_MASS
        theta_acc = (self.GRAVITY * sin - cos * temp) / (self.LENGTH * (4.0 / 3.0 - self.POLE_MASS * xp.square(cos) / self.TOTAL_MASS))
        x_acc = temp - pole * theta_acc * cos / self.TOTAL_MASS
        state = xp.stack((x + self.TAU * x_dot, x_dot + self.TAU * x_acc, theta + self.TAU * theta_dot, theta_dot + self.TAU * theta_acc))
        terminated = (xp.abs(state[0]) > self.X_LIMIT) | (xp.abs(state[2]) > self.THETA_LIMIT)
        return state, xp.ones_like(x), terminated

    def observe(self, xp: Any, state: Any) -> Any:
        return state


class Pendulum:
    """Swing up and hold. State: theta (0 is upright), theta_dot; the action is the torque / 2, clipped to [-1, 1]."""

    spaces, state_dim, max_steps = Spaces(obs_dim=3, act_dim=1, discrete=False), 2, 200
    GRAVITY, DT, MAX_SPEED, MAX_TORQUE = 10.0, 0.05, 8.0, 2.0  # mass and length are 1

    def begin(self, xp: Any, uniform: Any) -> Any:
        theta, theta_dot = 2 * uniform - 1
        return xp.stack((math.pi * theta, theta_dot))

    def step(self, xp: Any, state: Any, act: Any) -> tuple[Any, Any, Any]:
        theta, theta_dot = state
        u = xp.clip(act[:, 0] * self.MAX_TORQUE, -self.MAX_TORQUE, self.MAX_TORQUE)  # float32, as are its products below
        angle = (theta + math.pi) % (2 * math.pi) - math.pi
        cost = angle**2 + 0.1 * theta_dot**2 + 0.001 * u**2
        theta_dot = xp.clip(theta_dot + (1.5 * self.GRAVITY * xp.sin(theta) + 3.0 * u) * self.DT, -self.MAX_SPEED, self.MAX_SPEED)
        return xp.stack((theta + theta_dot * self.DT, theta_dot)), -cost, xp.zeros_like(theta, dtype=bool)

    def observe(self, xp: Any, state: Any) -> Any:
        return xp.stack((xp.cos(state[0]), xp.sin(state[0]), state[1]))


class Acrobot:
    """Two links, a torque of -1, 0 or 1 between them, to raise the tip by a link's length above the base; the equations of Sutton and Barto's book.

    State: theta1 (0 hangs down), theta2 (relative to the first link), and their speeds. Links have length and mass 1.
    """

    spaces, state_dim, max_steps = Spaces(obs_dim=6, act_dim=3, discrete=True), 4, 500
    DT, MAX_SPEED_1, MAX_SPEED_2, GRAVITY, COM = 0.2, 4 * math.pi, 9 * math.pi, 9.8, 0.5  # COM: centre of mass along a link

    def begin(self, xp: Any, uniform: Any) -> Any:
        return self._single(xp, -0.1 + 0.2 * uniform)

    @staticmethod
    def _single(xp: Any, x: Any) -> Any:
        """Rounded to float32, as the first states are."""
        return x.astype(np.float32).astype(np.float64) if xp is np else x.float().double()

    def slope(self, xp: Any, y: Any, torque: Any) -> Any:
        theta1, theta2, dtheta1, dtheta2 = y
        cos2, sin2, com2 = xp.cos(theta2), xp.sin(theta2), self.COM**2
        d1 = com2 + (1 + com2 + 2 * self.COM * cos2) + 1 + 1
        d2 = com2 + self.COM * cos2 + 1
        phi2 = self.COM * self.GRAVITY * xp.cos(theta1 + theta2 - math.pi / 2)
        phi1 = -self.COM * dtheta2**2 * sin2 - 2 * self.COM * dtheta2 * dtheta1 * sin2
        phi1 = phi1 + (self.COM + 1) * self.GRAVITY * xp.cos(theta1 - math.pi / 2) + phi2
        acc2 = (torque + d2 / d1 * phi1 - self.COM * dtheta1**2 * sin2 - phi2) / (com2 + 1 - d2**2 / d1)
        return xp.stack((dtheta1, dtheta2, -(d2 * acc2 + phi1) / d1, acc2))

    def step(self, xp: Any, state: Any, act: Any) -> tuple[Any, Any, Any]:
        torque = act - 1.0
        k1 = self.slope(xp, state, torque)  # Runge-Kutta of order 4
        k2 = self.slope(xp, state + self.DT / 2 * k1, torque)
        k3 = self.slope(xp, state + self.DT / 2 * k2, torque)
        k4 = self.slope(xp, state + self.DT * k3, torque)
        state = state + self.DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = state[:2]
        for _ in range(2):  # a step turns a link by less than two turns
            angles = xp.where(angles > math.pi, angles - 2 * math.pi, angles)
            angles = xp.where(angles < -math.pi, angles + 2 * math.pi, angles)
        fast1 = xp.clip(state[2], -self.MAX_SPEED_1, self.MAX_SPEED_1)
        fast2 = xp.clip(state[3], -self.MAX_SPEED_2, self.MAX_SPEED_2)
        terminated = -xp.cos(angles[0]) - xp.cos(angles[1] + angles[0]) > 1.0
        return xp.stack((angles[0], angles[1], fast1, fast2)), xp.where(terminated, 0.0, -1.0), terminated

    def observe(self, xp: Any, state: Any) -> Any:
        return xp.stack((xp.cos(state[0]), xp.sin(state[0]), xp.cos(state[1]), xp.sin(state[1]), state[2], state[3]))


class MountainCar:
    """Moore 1990: out of a valley by swinging. State: position, velocity; actions: left, none, right."""

    spaces, state_dim, max_steps = Spaces(obs_dim=2, act_dim=3, discrete=True), 2, 200
    FORCE, GRAVITY, LEFT, RIGHT, MAX_SPEED, GOAL = 0.001, 0.0025, -1.2, 0.6, 0.07, 0.5

    def begin(self, xp: Any, uniform: Any) -> Any:
        return xp.stack((-0.6 + 0.2 * uniform[0], xp.zeros_like(uniform[1])))

    def step(self, xp: Any, state: Any, act: Any) -> tuple[Any, Any, Any]:
        position, velocity = state
        # Gymnasium takes this cosine from the C library, whose last bit is not always numpy's.
        cos = np.fromiter(map(math.cos, (3 * position).tolist()), np.float64, position.shape[0]) if xp is np else xp.cos(3 * position)
        velocity = xp.clip(velocity + ((act - 1) * self.FORCE + cos * -self.GRAVITY), -self.MAX_SPEED, self.MAX_SPEED)
        position = xp.clip(position + velocity, self.LEFT, self.RIGHT)
        velocity = xp.where((position == self.LEFT) & (velocity < 0), 0.0, velocity)
        return xp.stack((position, velocity)), -xp.ones_like(position), (position >= self.GOAL) & (velocity >= 0)

    def observe(self, xp: Any, state: Any) -> Any:
        return state


TASKS: dict[str, Task] = {"CartPole-v1": CartPole(), "Pendulum-v1": Pendulum(), "Acrobot-v1": Acrobot(), "MountainCar-v0": MountainCar()}


class Classic:
    """N environments of the task `env`, one of TASKS. With a `device` all tensors are there, and stay there.

    There no step waits for the device.
    """

    def __init__(self, env: str, num_envs: int, seed: int, device: str | torch.device | None = None) -> None:
        self.env, self.task, self.num_envs, self.seed, self.device = env, TASKS[env], num_envs, seed, device
        self.spaces = self.task.spaces
        self.rng: Any = np.random.default_rng(seed) if device is None else torch.Generator(device).manual_seed(seed)
        self.xp: Any = np if device is None else torch
        self.state = self._begin(num_envs)  # (S, N) float64
        self.obs = self._observe()
        self._episodes = Episodes(num_envs)
        self.there = EpisodesThere(self._episodes, device)  # stays as it is where there is no `device`

    def _begin(self, count: int) -> Any:
        shape = (self.task.state_dim, count)
        if self.device is None:
            return self.task.begin(np, self.rng.random(shape))
        return self.task.begin(torch, torch.rand(shape, generator=self.rng, device=self.device, dtype=torch.float64))

    def _observe(self) -> Tensor:
        obs = self.task.observe(self.xp, self.state).T
        return torch.from_numpy(obs.astype(np.float32, order="C")) if self.device is None else obs.float().contiguous()

    def step(self, act: Tensor) -> Step:
        if self.device is not None:
            return self._step_there(act)
        self.state, reward, terminated = self.task.step(np, self.state, act.detach().numpy())
        truncated = self._episodes.length >= self.task.max_steps - 1
        done = terminated | truncated
        next_obs = self.obs = self._observe()
        any_done = bool(done.any())
        self._episodes.add(reward, done if any_done else None)
        if any_done:
            self.state[:, done] = self._begin(int(done.sum()))
            self.obs = self._observe()
        return next_obs, torch.from_numpy(reward).float(), torch.from_numpy(terminated), torch.from_numpy(truncated)

    def begin(self, act: Tensor) -> Callable[[], Step]:
        return partial(self.step, act)

    def _step_there(self, act: Tensor) -> Step:
        self.state, reward, terminated = self.task.step(torch, self.state, act.detach())
        truncated = self.there.add(reward, terminated, self.task.max_steps)
        done = terminated | truncated
        next_obs = self._observe()
        self.state = torch.where(done, self._begin(self.num_envs), self.state)  # beginnings for all: how many are needed is not known here
        self.obs = self._observe()
        return next_obs, reward.float(), terminated, truncated

    @property
    def episodes(self) -> Episodes:
        return self._episodes if self.device is None else self.there.fetch()

    def state_dict(self) -> dict[str, Any]:
        state = self.state.copy() if self.device is None else self.state.cpu().numpy().copy()
        rng = self.rng.bit_generator.state if self.device is None else self.rng.get_state()
        return {"env": self.env, "state": state, "rng": rng, "episodes": self.episodes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was saved on another device goes on with the same states and other beginnings."""
        same_count(self.num_envs, state["state"].shape[-1])
        if state.get("env", "CartPole-v1") != self.env:  # the first runs had no other, and did not say
            raise ValueError(f"the saved environments are {state['env']}, these are {self.env}")
        saved, rng = np.array(state["state"]), state["rng"]
        self.state = saved if self.device is None else torch.tensor(saved, device=self.device)
        self.there.load_state_dict(state["episodes"])
        if self.device is None:
            self.rng = np.random.default_rng((self.seed, self._episodes.finished))
            if isinstance(rng, dict):
                self.rng.bit_generator.state = rng
        elif isinstance(rng, dict):
            self.rng.manual_seed(episode_seed(self.seed, 0, self._episodes.finished))
        else:
            set_generator(self.rng, rng)
        self.obs = self._observe()

    def close(self) -> None:
        pass
