"""Replay memory: the last `capacity` transitions, kept as tensors and drawn from uniformly (Lin 1992, "Self-improving reactive agents").

    replay = Replay(1_000_000, obs_shape=(17,), act_shape=(6,))
    replay.add(obs, act, reward, next_obs, terminated, truncated)    # N transitions, one of each environment
    obs, act, reward, next_obs, terminated, truncated = replay.sample(256, generator)

A time limit is not an end: `terminated` says that nothing follows, `truncated` only that the next transition of that environment begins another episode,
which is what an n-step return has to know. `next_obs` is always what the step reached, never the first observation after a reset.

Memory: float observations lie with all else of their transition in one row of float32, so that a sample is one gather: 4 (2 D + A + 3) bytes for D numbers
seen and A done, 172 MB for a million transitions of HalfCheetah. Images (uint8) are kept once and not twice: what a step reached is what the next one of the
same environment began with, and only where a time limit cut the episode is it kept beside. That is the image and 4 (A + 3) bytes:
7.1 GB for a million of 84 x 84.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """B transitions. Views of one gathered tensor where observations are float: do not write into them."""

    obs: Tensor  # (B, *obs_shape) what was acted on
    act: Tensor  # (B, *act_shape) what was done
    reward: Tensor  # (B,) float32 what it was paid
    next_obs: Tensor  # (B, *obs_shape) what it led to; where terminated, of images, anything: nothing follows
    terminated: Tensor  # (B,) float32, 1 where the task ended: no value follows
    truncated: Tensor  # (B,) float32, 1 where a time limit cut the episode off: a value follows, but not in the next row


class Replay:
    """A ring of transitions of `num_envs` environments, in the order of time; row t * num_envs + n (modulo the capacity) is step t of environment n.

    Args:
        capacity: transitions kept, at least; rounded up to a multiple of `num_envs`.
        obs_shape, act_shape: of one observation and one action; () for a Discrete action.
        obs_dtype: torch.float32, or torch.uint8 for images.
        act_dtype: torch.float32, or torch.int64 for Discrete actions, up to 2^24.
        device: where it lies. `sample` wants a generator of the same device.

    ValueError for sizes below 1, other dtypes, and in `add` for other than `num_envs` transitions. Memory is taken as it fills up: `nbytes` when full.
    """

    def __init__(
        self,
        capacity: int,
        obs_shape: tuple[int, ...],
        act_shape: tuple[int, ...] = (),
        *,
        num_envs: int = 1,
        obs_dtype: torch.dtype = torch.float32,
        act_dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        if num_envs < 1 or capacity < num_envs:
            raise ValueError(f"capacity must be at least num_envs, and that 1; got capacity={capacity}, num_envs={num_envs}")
        if obs_dtype not in (torch.float32, torch.uint8) or act_dtype not in (torch.float32, torch.int64):
            raise ValueError(f"expected obs_dtype float32 or uint8 and act_dtype float32 or int64, got {obs_dtype} and {act_dtype}".replace("torch.", ""))
        self.num_envs, self.capacity = num_envs, -(-capacity // num_envs) * num_envs
        self.obs_shape, self.act_shape, self.act_dtype = obs_shape, act_shape, act_dtype
        seen, done = math.prod(obs_shape), math.prod(act_shape)
        self.image: Tensor | None = None
        if obs_dtype == torch.uint8:
            # One step more than the capacity: beyond the newest transition stands what it reached.
            self.image = torch.empty(self.capacity + num_envs, *obs_shape, dtype=torch.uint8, device=device)
            self.widths = [done, 1, 1, 1]
        else:
            self.widths = [seen, done, 1, seen, 1, 1]
        self.rows = torch.empty(self.capacity, sum(self.widths), device=device)
        self.final: dict[int, Tensor] = {}  # place in `image` -> what was reached there when a time limit cut the episode off
        self.count = 0  # transitions ever added

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes when full, without the images that time limits cut off."""
        return self.rows.nbytes + (self.image.nbytes if self.image is not None else 0)

    def add(self, obs: Tensor, act: Tensor, reward: Tensor, next_obs: Tensor, terminated: Tensor, truncated: Tensor) -> None:
        """One step of all environments: obs and next_obs (N, *obs_shape), act (N, *act_shape), reward (N,), terminated and truncated (N,) bool.

        Steps of images must be added in the order in which they happened: each `obs` is the last `next_obs`, or the first of a new episode.
        """
        N, at = self.num_envs, self.count % self.capacity
        if obs.shape != (N, *self.obs_shape) or next_obs.shape != obs.shape or reward.shape != (N,):
            got = f"obs {tuple(obs.shape)}, next_obs {tuple(next_obs.shape)}, reward {tuple(reward.shape)}"
            raise ValueError(f"expected {N} transitions with observations {self.obs_shape}, got {got}")
        row = self.rows[at : at + N]
        ends = (terminated.unsqueeze(1).float(), truncated.unsqueeze(1).float())
        done, paid = act.reshape(N, -1).float(), reward.unsqueeze(1)
        if self.image is None:
            torch.cat((obs.reshape(N, -1), done, paid, next_obs.reshape(N, -1), *ends), dim=1, out=row)
        else:
            torch.cat((done, paid, *ends), dim=1, out=row)
            here, there = self._place(self.count), self._place(self.count + N)
            self.image[here : here + N] = obs
            self.image[there : there + N] = next_obs
            for i in range(N):
                self.final.pop(here + i, None)
            for i in (truncated & ~terminated).nonzero().flatten().tolist():
                self.final[here + i] = next_obs[i].clone()
        self.count += N

    def _place(self, count: int) -> int:
        return count % (self.capacity + self.num_envs)

    def age(self, rows: Tensor) -> Tensor:
        """How many transitions were added after those in `rows` (B,): B int64.

        The next step of the same environment is in (rows + num_envs) % capacity, if age >= num_envs.
        """
        return (self.count - 1 - rows) % self.capacity

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        """`batch` transitions, each drawn with equal chance from all that are there, with replacement. ValueError where there are none yet."""
        return self.gather(self.draw(batch, generator))

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """The rows (batch,) int64 of a sample, for `gather`."""
        if not self.count:
            raise ValueError("the replay memory is empty: add transitions before you sample")
        return torch.randint(len(self), (batch,), generator=generator, device=self.rows.device)

    def gather(self, rows: Tensor) -> Batch:
        """The transitions in `rows` (B,) int64."""
        B, parts = len(rows), self.rows.index_select(0, rows).split(self.widths, dim=1)
        if self.image is None:
            obs, act, reward, next_obs, terminated, truncated = parts
            obs, next_obs = obs.unflatten(1, self.obs_shape), next_obs.unflatten(1, self.obs_shape)
        else:
            act, reward, terminated, truncated = parts
            obs, next_obs = self._images(rows)
        act = act.to(self.act_dtype).reshape(B, *self.act_shape)
        return Batch(obs, act, reward.squeeze(1), next_obs, terminated.squeeze(1), truncated.squeeze(1))

    def _images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert self.image is not None
        here = (self.count - 1 - self.age(rows)) % len(self.image)
        next_obs = self.image.index_select(0, (here + self.num_envs) % len(self.image))
        if self.final:
            for i, place in enumerate(here.tolist()):
                if place in self.final:
                    next_obs[i] = self.final[place]
        return self.image.index_select(0, here), next_obs

    def state_dict(self) -> dict[str, Any]:
        """What has been added, without copying it."""
        state: dict[str, Any] = {"count": self.count, "rows": self.rows[: len(self)]}
        if self.image is not None:
            state |= {"image": self.image[: self.count + self.num_envs if self.count else 0], "final": {str(k): v for k, v in self.final.items()}}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError where the state is of a memory of another shape."""
        rows, count = state["rows"], int(state["count"])
        if rows.shape != (min(count, self.capacity), self.rows.shape[1]) or ("image" in state) != (self.image is not None):
            raise ValueError(f"the saved replay memory has {tuple(rows.shape)} rows after {count} transitions; this one takes {tuple(self.rows.shape)}")
        self.count = count
        self.rows[: len(rows)] = rows
        if self.image is not None:
            self.image[: len(state["image"])] = state["image"]
            self.final = {int(k): v.clone() for k, v in state["final"].items()}
