"""Gymnasium's MuJoCo tasks in MuJoCo Warp (extra `warp`): N worlds stepped as one batch, on a GPU where there is one, as torch tensors that stay there.

    envs = make("HalfCheetah-v5", num_envs=4096, seed=0, backend="warp", device="cuda")

Models, observations, rewards, ends and the ranges of resets are those of `mujoco_tasks`. The physics is float32 with another implementation of the contact
solver, so that a rollout follows MuJoCo's closely for some steps and then parts from it; and draws come from torch's generator, so that a seed gives other
episodes than in the other backends. Humanoid's solver is Newton's: PGS, which its model asks for, is not in MuJoCo Warp. Where a capsule stands on the floor at
less than 30 degrees to the vertical, MuJoCo Warp turns the friction pyramid otherwise than MuJoCo, which is seen in Ant and Humanoid.

A step is one launch of a captured graph (Warp has these on a processor too) and a few dozen operations of torch, and waits for nothing.

MuJoCo Warp: github.com/google-deepmind/mujoco_warp. Macklin et al., "Warp: a high-performance Python framework for GPU simulation", github.com/NVIDIA/warp.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onetorch.rl.envs import Episodes, EpisodesThere, Spaces, Step, same_count
from onetorch.rl.mujoco_tasks import STATE, TASKS, fault, load
from onetorch.runs.errors import RunError
from onetorch.runs.state import set_generator

SIMULATED = (*STATE, "qacc_warmstart")  # what the next step follows from, beside the actions; the last is where the solver begins


class WarpEnvs:
    """N environments of the task `env`, one of TASKS, simulated on `device`, "cpu" or "cuda". ImportError where mujoco_warp is not installed.

    The first one on a machine compiles Warp's kernels, which takes a minute or two; they are kept in Warp's cache.
    """

    def __init__(self, env: str, num_envs: int, seed: int, device: str | torch.device = "cpu") -> None:
        import mujoco
        import warp

        warp.config.log_level = max(warp.config.log_level, warp.LOG_ERROR)  # else it tells of each of its 40 modules, at every start
        import mujoco_warp

        self.env, self.task, self.num_envs, self.seed, self.device, self.warp = env, TASKS[env], num_envs, seed, torch.device(device), warp
        self.version = f"mujoco_warp {mujoco_warp.__version__} and warp {warp.__version__}"
        model = load(self.task)
        if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
            model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        self.dt = model.opt.timestep * self.task.frame_skip
        with warp.ScopedDevice(str(self.device)):
            # both hold the memory that the tensors below and the graphs use
            self.model, self.data = simulated, data = mujoco_warp.put_model(model), mujoco_warp.make_data(model, nworld=num_envs)
            simulated.opt.warn_overflow = 0  # `_watch` names what matters, the kernels would print it

            def look() -> None:
                mujoco_warp.forward(simulated, data)
                if self.task.forces:
                    mujoco_warp.rne_postconstraint(simulated, data)

            def advance() -> None:
                for _ in range(self.task.frame_skip):
                    mujoco_warp.step(simulated, data)
                if self.task.forces:
                    mujoco_warp.rne_postconstraint(simulated, data)

            for work in (look, advance):  # compiles and loads, which a capture may not
                work()
            with warp.ScopedCapture() as looking:
                look()
            with warp.ScopedCapture() as advancing:
                advance()
            warp.synchronize_device()  # Warp has a stream of its own, from here on all goes through torch's
        self.looking, self.advancing = looking.graph, advancing.graph
        self.fields = {name: warp.to_torch(getattr(data, name)) for name in dict.fromkeys((*self.task.fields, *SIMULATED, "ctrl", "overflow"))}
        self.mass, self.first_qpos = self._there(model.body_mass), self._there(model.qpos0)
        self.low, self.high = self._there(model.actuator_ctrlrange).unbind(1)
        self.middle, self.half = (self.low + self.high) / 2, (self.high - self.low) / 2
        lost = mujoco_warp.OverflowType
        self.lost = int(lost.NEFC | lost.NJMAX_NNZ | lost.BROADPHASE | lost.NARROWPHASE | lost.CCD)  # contacts left out where there was no room

        self.rng = torch.Generator(self.device).manual_seed(seed)
        self._episodes = Episodes(num_envs)
        self.there = EpisodesThere(self._episodes, self.device)
        self.episode = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self.obs, self.place = self._begin(torch.ones_like(self.episode, dtype=torch.bool))
        self.spaces = Spaces(obs_dim=self.obs.shape[1], act_dim=model.nu, discrete=False)
        # Whether anything was not as it must be, with the step at which that was first so; and the same as far as the host has been told.
        self.seen = torch.zeros((), dtype=torch.bool, device=self.device)
        self.told = torch.zeros((), dtype=torch.bool, pin_memory=self.device.type == "cuda")
        self.record: tuple[Tensor, ...] = ()

    def _there(self, values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _launch(self, graph: Any) -> None:
        self.warp.capture_launch(graph, self.warp.stream_from_torch(self.device) if self.device.type == "cuda" else None)

    def _look(self) -> tuple[Tensor, Tensor]:
        """Observations (N, D) and places (N, 1 or 2), copies."""
        place = self.task.place(torch, self.fields, self.mass).clone() if self.task.place else torch.zeros(self.num_envs, 1, device=self.device)
        return self.task.observe(torch, self.fields), place

    def _uniform(self, width: float, count: int) -> Tensor:
        return torch.rand(self.num_envs, count, generator=self.rng, device=self.device) * (2 * width) - width

    def _begin(self, done: Tensor) -> tuple[Tensor, Tensor]:
        """Begin new episodes where `done`; what `_look` gives, which holds there only. Drawn for all: how many are needed is not known here."""
        noise, nq, nv = self.task.noise, self.fields["qpos"].shape[1], self.fields["qvel"].shape[1]
        qpos = self.first_qpos + self._uniform(noise, nq)
        if self.env == "Reacher-v5":
            radius, angle = 0.2 * torch.rand(2, self.num_envs, generator=self.rng, device=self.device)
            radius, angle = (0.2 * radius).sqrt(), 10 * math.pi * angle
            qpos[:, -2:] = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)  # even over a disk
            qvel = self._uniform(0.005, nv)
            qvel[:, -2:] = 0
        elif self.task.normal:
            qvel = noise * torch.randn(self.num_envs, nv, generator=self.rng, device=self.device)
        else:
            qvel = self._uniform(noise, nv)
        ended = done.unsqueeze(1)
        for name, first in (("qpos", qpos), ("qvel", qvel)):
            self.fields[name].copy_(torch.where(ended, first, self.fields[name]))
        for name in ("ctrl", "qacc_warmstart"):
            self.fields[name].masked_fill_(ended, 0)
        if self.task.fields != STATE:  # what else is observed has to follow the state; a step computes all of it anew, so for who goes on nothing changes
            self._launch(self.looking)
        return self._look()

    def step(self, act: Tensor) -> Step:
        given = torch.clamp(self.middle + act.detach().reshape(self.num_envs, -1) * self.half, self.low, self.high)
        self.fields["ctrl"].copy_(given)
        self._launch(self.advancing)
        next_obs, place = self._look()
        reward, terminated = self.task.reward(torch, self.fields, (place - self.place) / self.dt, given)
        self._watch(next_obs, reward, given)
        truncated = self.there.add(reward, terminated, self.task.max_steps)
        done = terminated | truncated
        self.episode = self.episode + done
        ended, (obs, begun) = done.unsqueeze(1), self._begin(done)
        self.obs, self.place = torch.where(ended, obs, next_obs), torch.where(ended, begun, place)
        return next_obs, reward, terminated, truncated

    def begin(self, act: Tensor) -> Callable[[], Step]:
        return partial(self.step, act)

    def _watch(self, next_obs: Tensor, reward: Tensor, act: Tensor) -> None:
        """RunError where a number is not finite or contacts did not fit: at once on a processor, on a GPU when the host has heard of it, without a wait."""
        crowded = (self.fields["overflow"] & self.lost) != 0
        bad = ~(next_obs.isfinite().all(1) & reward.isfinite()) | crowded
        now = (bad, crowded, next_obs, reward, act, self.there.length, self.episode)
        self.record = tuple(torch.where(self.seen, before, after) for before, after in zip(self.record or now, now, strict=True))
        self.seen = self.seen | bad.any()
        self.told.copy_(self.seen, non_blocking=True)  # into the host's own memory, where it may arrive during a later step
        if self.told:
            bad_there, crowded_there, obs, paid, given, length, episode = (x.cpu().numpy() for x in self.record)
            i = int(bad_there.nonzero()[0][0])
            if crowded_there[i]:
                raise RunError(f"{self.env} number {i} had more contacts than there is room for, at step {length[i] + 1} of episode {episode[i]}")
            raise fault(self.env, i, obs[i], paid[i], given[i], length[i], episode[i])

    @property
    def episodes(self) -> Episodes:
        return self.there.fetch()

    def state_dict(self) -> dict[str, Any]:
        simulated = {name: self.fields[name] for name in SIMULATED}
        held = {name: x.cpu().numpy().copy() for name, x in (simulated | {"place": self.place, "obs": self.obs, "episode": self.episode}).items()}
        return {"env": self.env, "seed": self.seed, **held, "rng": self.rng.get_state(), "episodes": self.episodes.state_dict(), "version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was saved on another device goes on with the same states and other beginnings."""
        same_count(self.num_envs, len(state["qpos"]))
        if state["env"] != self.env:
            raise ValueError(f"the saved environments are {state['env']}, these are {self.env}")
        if state["version"] != self.version:
            raise ValueError(f"{self.env} was saved by {state['version']}, this is {self.version}: such a run cannot go on exactly")
        for name in SIMULATED:
            self.fields[name].copy_(torch.as_tensor(np.asarray(state[name])))
        self.obs, self.place, self.episode = (torch.tensor(np.asarray(state[name]), device=self.device) for name in ("obs", "place", "episode"))
        self.seed = int(state["seed"])
        set_generator(self.rng, state["rng"])
        self.there.load_state_dict(state["episodes"])

    def close(self) -> None:
        pass
