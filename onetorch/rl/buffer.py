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

`PrioritizedReplay` draws each transition in proportion to a priority (Schaul et al. 2016, arXiv:1511.05952), from a tree of sums.
"""

import math
from itertools import pairwise
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

    def gather_n(self, rows: Tensor, n: int, gamma: float) -> tuple[Batch, Tensor | float]:
        """The transitions in `rows` (B,), each over its next n steps (Sutton 1988), and the discount of the value that follows, (B,) or one for all.

        The reward is R = r_t + gamma r_{t+1} + … + gamma^(k-1) r_{t+k-1}; next_obs, terminated and truncated are those of step t+k-1; the discount is gamma^k.
        k is n, or less where the episode ended or was cut off before, or where the next step has not been taken yet: what is added up is always true.
        """
        if n == 1:
            return self.gather(rows), gamma
        ahead = self.num_envs * torch.arange(n, device=rows.device).unsqueeze(1)
        window = (rows + ahead) % self.capacity  # (n, B)
        reward, *_, terminated, truncated = self.rows.index_select(0, window.flatten()).split(self.widths, dim=1)[1 if self.image is not None else 2 :]
        over = torch.logical_or(terminated, truncated).view(n, -1)
        taken = ahead <= self.age(rows)
        taken[1:] &= ~over.cummax(0).values[:-1]
        discounts = gamma ** torch.arange(n, device=rows.device, dtype=torch.float32).unsqueeze(1)
        k = taken.sum(0)
        first, last = self.gather(rows), self.gather(window.gather(0, (k - 1).unsqueeze(0)).squeeze(0))
        reward = torch.where(taken, discounts * reward.view(n, -1), 0.0)  # not a product: what has never been written may be NaN
        batch = Batch(first.obs, first.act, reward.sum(0), last.next_obs, last.terminated, last.truncated)
        return batch, gamma ** k.float()

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
            self.final = {int(k): v.to(self.rows.device, copy=True) for k, v in state["final"].items()}


class SumTree:
    """`size` numbers >= 0, float64, of which one is drawn in proportion to itself, in O(log size): a tree whose nodes hold the sums of their 64 children."""

    WIDTH = 64

    def __init__(self, size: int, device: str | torch.device = "cpu") -> None:
        self.levels: list[Tensor] = []  # from the leaves, each (nodes, 64), to the root, (1, 64)
        while not self.levels or size > 1:
            size = -(-size // self.WIDTH)
            self.levels.append(torch.zeros(size, self.WIDTH, dtype=torch.float64, device=device))

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.levels[0].view(-1)[index]

    def __setitem__(self, index: Tensor, values: Tensor) -> None:
        self.levels[0].view(-1).scatter_(0, index, values.expand(index.shape))  # of an index that comes twice the last counts; indexing leaves it to threads
        for level, above in pairwise(self.levels):
            index = index // self.WIDTH
            above.view(-1)[index] = level[index].sum(1)  # added up anew: no rounding error stays

    def total(self) -> Tensor:
        return self.levels[-1].sum()

    def find(self, u: Tensor) -> Tensor:
        """For u (B,) float64 in [0, 1): the first index whose cumulative sum is above u times the total; never one whose number is 0."""
        node = torch.zeros(len(u), dtype=torch.int64, device=u.device)
        left = u * self.total()
        for level in reversed(self.levels):
            sums = level[node].cumsum(1)
            # Rounding must not lead beyond the last child that has any.
            left = torch.minimum(left, sums[:, -1] * (1 - 2**-50)).unsqueeze(1)
            child = (sums <= left).sum(1, keepdim=True)
            left = (left - torch.where(child > 0, sums.gather(1, (child - 1).clamp(min=0)), 0.0)).squeeze(1)
            node = node * self.WIDTH + child.squeeze(1)
        return node

    def state_dict(self) -> dict[str, Any]:
        return {"levels": self.levels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for level, saved in zip(self.levels, state["levels"], strict=True):
            level.copy_(saved)


class PrioritizedReplay(Replay):
    """A Replay that draws transition i with chance P(i) = p_i^alpha / sum_k p_k^alpha (Schaul et al. 2016).

    p_i is what `prioritize` last said of it, |TD error| + 1e-6; a new transition has the greatest so far, so that each is seen soon. alpha 0 draws uniformly.
    """

    def __init__(self, capacity: int, obs_shape: tuple[int, ...], act_shape: tuple[int, ...] = (), *, alpha: float, **options: Any) -> None:
        super().__init__(capacity, obs_shape, act_shape, **options)
        self.alpha = alpha
        self.tree = SumTree(self.capacity, self.rows.device)
        self.greatest = torch.ones((), dtype=torch.float64, device=self.rows.device)  # p^alpha

    def add(self, obs: Tensor, act: Tensor, reward: Tensor, next_obs: Tensor, terminated: Tensor, truncated: Tensor) -> None:
        at = self.count % self.capacity
        super().add(obs, act, reward, next_obs, terminated, truncated)
        self.tree[torch.arange(at, at + self.num_envs, device=self.rows.device)] = self.greatest

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Rows (batch,) int64, one of each of `batch` ranges of equal mass, as in the paper's appendix B.2.1."""
        if not self.count:
            raise ValueError("the replay memory is empty: add transitions before you sample")
        u = torch.rand(batch, dtype=torch.float64, generator=generator, device=self.rows.device)
        return self.tree.find((u + torch.arange(batch, device=u.device)) / batch)

    def weights(self, rows: Tensor, beta: float) -> Tensor:
        """w_i = (N P(i))^-beta, divided by the greatest of the batch: (B,) float32, what undoes the bias of drawing `rows` by priority; wholly at beta = 1."""
        chance = self.tree[rows] / self.tree.total()
        weight = (len(self) * chance) ** -beta
        return (weight / weight.max()).float()

    def prioritize(self, rows: Tensor, td_error: Tensor) -> None:
        """Give the transitions in `rows` (B,) the priorities |td_error| + 1e-6, td_error (B,)."""
        priority = (td_error.abs().double() + 1e-6) ** self.alpha
        self.greatest = torch.maximum(self.greatest, priority.max())
        self.tree[rows] = priority

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"tree": self.tree.state_dict(), "greatest": self.greatest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.tree.load_state_dict(state["tree"])
        self.greatest = state["greatest"].to(self.rows.device, copy=True)
