"""The replay memory: what goes in comes out, in the ring's order, time limits and images included."""

from typing import Any

import pytest
import torch
from torch import Tensor

from onetorch.rl.buffer import Batch, Replay

Step = tuple[Tensor, ...]


def steps(num_envs: int, count: int, shape: tuple[int, ...], image: bool = False) -> list[Step]:
    """A made-up history in which every number tells its place: environment n, step t of episode e; episodes are cut after 3 steps, or end after 2."""
    history, t, e = [], [0] * num_envs, [0] * num_envs

    def look(n: int) -> Tensor:
        return torch.full(shape, 100 * n + 10 * (e[n] % 10) + t[n]).to(torch.uint8 if image else torch.float32)

    for k in range(count):
        obs = torch.stack([look(n) for n in range(num_envs)])
        for n in range(num_envs):
            t[n] += 1
        next_obs = torch.stack([look(n) for n in range(num_envs)])
        terminated = torch.tensor([t[n] == 2 and e[n] % 2 == 1 for n in range(num_envs)])
        truncated = torch.tensor([t[n] == 3 for n in range(num_envs)])
        for n in (terminated | truncated).nonzero().flatten().tolist():
            t[n], e[n] = 0, e[n] + 1
        act = torch.arange(num_envs) + k
        history.append((obs, act, torch.arange(num_envs) + 10.0 * k, next_obs, terminated, truncated))
    return history


def filled(history: list[Step], capacity: int, image: bool = False) -> Replay:
    num_envs, shape = history[0][0].shape[0], tuple(history[0][0].shape[1:])
    replay = Replay(capacity, shape, num_envs=num_envs, obs_dtype=torch.uint8 if image else torch.float32, act_dtype=torch.int64)
    for step in history:
        replay.add(*step)
    return replay


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize(("num_envs", "count"), [(1, 3), (1, 12), (1, 13), (1, 14), (1, 40), (2, 5), (2, 6), (2, 19), (3, 25)])
def test_holds_the_last_transitions(num_envs: int, count: int, image: bool) -> None:
    history = steps(num_envs, count, (2, 2), image)
    replay = filled(history, capacity=12, image=image)
    assert len(replay) == min(12, num_envs * count)
    got = replay.gather(torch.arange(len(replay)))
    assert got.obs.dtype == (torch.uint8 if image else torch.float32)
    assert got.act.dtype == torch.int64
    kept = history[-(12 // num_envs) :]
    assert sorted(got.reward.tolist()) == sorted(torch.cat([step[2] for step in kept]).tolist())
    for i in range(len(replay)):
        k, n = divmod(int(got.reward[i]), 10)
        obs, act, _, next_obs, terminated, truncated = (x[n] for x in history[k])
        assert torch.equal(got.obs[i], obs)
        assert int(got.act[i]) == int(act)
        assert (bool(got.terminated[i]), bool(got.truncated[i])) == (bool(terminated), bool(truncated))
        if not (image and terminated):
            assert torch.equal(got.next_obs[i], next_obs)
        assert int(replay.age(torch.tensor([i]))) == num_envs * (count - k) - 1 - n


def test_the_next_step_is_found_by_age() -> None:
    replay = filled(steps(2, 9, (1,)), capacity=10)
    rows = torch.arange(10)
    there = replay.age(rows) >= 2
    assert int(there.sum()) == 8
    now, later = replay.gather(rows[there]), replay.gather((rows[there] + 2) % 10)
    assert torch.equal(later.reward, now.reward + 10)
    inside = (now.terminated + now.truncated) == 0
    assert inside.any()
    assert torch.equal(later.obs[inside], now.next_obs[inside])
    assert not torch.equal(later.obs, now.next_obs)


def test_samples_every_transition_with_equal_chance() -> None:
    replay = filled(steps(2, 9, (1,)), capacity=10)
    drawn = replay.sample(100_000, torch.Generator().manual_seed(0)).reward
    values, counts = drawn.unique(return_counts=True)
    assert len(values) == 10
    # binomial with p = 1/10: standard deviation sqrt(100000 * 0.1 * 0.9) = 95
    assert (counts - 10_000).abs().max() < 5 * 95
    again = replay.sample(100_000, torch.Generator().manual_seed(0)).reward
    assert torch.equal(drawn, again)


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("count", [0, 3, 8])
def test_goes_on_bit_for_bit(image: bool, count: int) -> None:
    history = steps(2, 14, (3,), image)
    straight = filled(history, 10, image)
    before = filled(history[:count] or history[:1], 10, image)
    if not count:
        before = Replay(10, (3,), num_envs=2, obs_dtype=torch.uint8 if image else torch.float32, act_dtype=torch.int64)
    after = Replay(10, (3,), num_envs=2, obs_dtype=torch.uint8 if image else torch.float32, act_dtype=torch.int64)
    after.load_state_dict(before.state_dict())
    for step in history[count:]:
        after.add(*step)
    a, b = (r.sample(64, torch.Generator().manual_seed(1)) for r in (straight, after))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_memory_is_what_is_said() -> None:
    assert Replay(1000, (17,), (6,)).nbytes == 1000 * 4 * (2 * 17 + 6 + 3)
    images = Replay(1000, (84, 84), obs_dtype=torch.uint8, act_dtype=torch.int64)
    assert images.nbytes == 1001 * 84 * 84 + 1000 * 4 * 4


def test_shapes_of_box_actions() -> None:
    replay = Replay(5, (2,), (3,), num_envs=2)
    assert replay.capacity == 6
    replay.add(torch.zeros(2, 2), torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.ones(2), torch.ones(2, 2), torch.zeros(2).bool(), torch.ones(2).bool())
    batch = replay.gather(torch.tensor([1]))
    assert isinstance(batch, Batch)
    assert batch.act.tolist() == [[4.0, 5.0, 6.0]]
    assert (batch.terminated.tolist(), batch.truncated.tolist()) == ([0.0], [1.0])


@pytest.mark.parametrize(
    "wrong", [{"capacity": 0}, {"num_envs": 0}, {"capacity": 2, "num_envs": 3}, {"obs_dtype": torch.float64}, {"act_dtype": torch.float64}]
)
def test_wrong_sizes_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        Replay(**{"capacity": 10, "obs_shape": (1,)} | wrong)


def test_wrong_use_is_named() -> None:
    replay = Replay(10, (3,), num_envs=2)
    with pytest.raises(ValueError, match="empty"):
        replay.sample(1, torch.Generator())
    no = torch.zeros(2).bool()
    with pytest.raises(ValueError, match=r"expected 2 transitions with observations \(3,\), got obs \(1, 3\)"):
        replay.add(torch.zeros(1, 3), torch.zeros(1), torch.zeros(1), torch.zeros(1, 3), no[:1], no[:1])
    replay.add(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), torch.zeros(2, 3), no, no)
    with pytest.raises(ValueError, match="this one takes"):
        Replay(10, (4,), num_envs=2).load_state_dict(replay.state_dict())
