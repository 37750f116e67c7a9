"""The replay memory: what goes in comes out, in the ring's order, time limits and images included."""

from typing import Any

import pytest
import torch
from torch import Tensor

from onetorch.rl.buffer import Batch, PrioritizedReplay, Replay, SumTree

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


def by_hand(replay: Replay, row: int, n: int, gamma: float) -> tuple[float, Tensor, float, float]:
    """n-step return, final observation, terminated and discount, walked along one transition at a time."""
    total, discount, k = 0.0, 1.0, 0
    while True:
        step = replay.gather(torch.tensor([row]))
        total, discount, k = total + discount * float(step.reward), discount * gamma, k + 1
        newest = int(replay.age(torch.tensor([row]))) < replay.num_envs
        if k == n or step.terminated or step.truncated or newest:
            return total, step.next_obs[0], float(step.terminated), discount
        row = (row + replay.num_envs) % replay.capacity


def test_n_step_returns_of_a_small_history() -> None:
    """Rewards 0, 10, 20, …, one environment. Its first episode is cut off after 3 steps, its second ends after 2, its third is cut after 3."""
    replay = filled(steps(1, 7, (1,)), capacity=20)
    batch, discount = replay.gather_n(torch.arange(7), 3, 0.5)
    assert isinstance(discount, Tensor)
    # whole; two steps to the limit; one; two to the end; one; two, since the last but one step is the newest but one; one
    assert batch.reward.tolist() == [0 + 10 / 2 + 20 / 4, 10 + 20 / 2, 20, 30 + 40 / 2, 40, 50 + 60 / 2, 60]
    assert discount.tolist() == [0.125, 0.25, 0.5, 0.25, 0.5, 0.25, 0.5]
    assert batch.terminated.tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert batch.truncated.tolist() == [1, 1, 1, 0, 0, 0, 0]
    # episode e, step t is looked at as 10 e + t: what is reached, not what the next episode begins with
    assert batch.next_obs.flatten().tolist() == [3, 3, 3, 12, 12, 22, 22]
    assert batch.obs.flatten().tolist() == [0, 1, 2, 10, 11, 20, 21]


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize(("num_envs", "count"), [(1, 9), (1, 30), (2, 4), (2, 23), (3, 40)])
def test_n_step_returns_agree_with_a_walk(num_envs: int, count: int, image: bool) -> None:
    replay = filled(steps(num_envs, count, (2,), image), capacity=12, image=image)
    rows = torch.arange(len(replay))
    for n in (1, 2, 3, 5):
        batch, discount = replay.gather_n(rows, n, 0.9)
        discount = torch.as_tensor(discount).expand(len(rows))
        for i in rows.tolist():
            total, next_obs, terminated, expected = by_hand(replay, i, n, 0.9)
            assert batch.reward[i].item() == pytest.approx(total, rel=1e-6)
            assert (batch.terminated[i].item(), discount[i].item()) == (terminated, pytest.approx(expected, rel=1e-6))
            assert terminated or torch.equal(batch.next_obs[i], next_obs)


def test_n_step_returns_do_not_see_what_was_never_written() -> None:
    replay = Replay(20, (1,), act_dtype=torch.int64)
    replay.rows.fill_(float("nan"))  # memory as it may come
    for step in steps(1, 7, (1,)):
        replay.add(*step)
    batch, discount = replay.gather_n(torch.arange(7), 3, 0.5)
    assert batch.reward.tolist() == [0 + 10 / 2 + 20 / 4, 10 + 20 / 2, 20, 30 + 40 / 2, 40, 50 + 60 / 2, 60]
    assert torch.as_tensor(discount).isfinite().all()


@pytest.mark.parametrize("size", [1, 5, 64, 65, 5000])
def test_sum_tree_finds_what_a_cumulative_sum_finds(size: int) -> None:
    tree, generator = SumTree(size), torch.Generator().manual_seed(size)
    values = torch.zeros(size, dtype=torch.float64)
    for _ in range(20):
        index = torch.randperm(size, generator=generator)[: max(1, size // 7)]
        values[index] = torch.randint(0, 4, (len(index),), generator=generator).double()  # whole numbers: sums are exact
        values[0] = 1.0
        tree[index] = values[index]
        tree[torch.tensor([0])] = values[:1]
    assert torch.equal(tree[torch.arange(size)], values)
    assert float(tree.total()) == float(values.sum())
    u = torch.rand(4000, generator=generator, dtype=torch.float64)
    assert torch.equal(tree.find(u), torch.searchsorted(values.cumsum(0), u * values.sum(), right=True))


def test_sum_tree_never_finds_a_zero() -> None:
    """Sums of tenths are inexact, and u comes as near to 1 as it can: what is found must still have a chance."""
    tree = SumTree(9000)
    there = torch.arange(0, 9000, 7)[:-3]
    tree[there] = torch.full((len(there),), 0.1, dtype=torch.float64)
    u = torch.cat((torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1], torch.tensor([1 - 2**-53], dtype=torch.float64)))
    found = tree.find(u)
    assert bool((tree[found] > 0).all())
    assert (int(found[0]), int(found[-1])) == (0, int(there[-1]))


def test_of_an_index_that_comes_twice_the_last_number_counts() -> None:
    tree = SumTree(200)
    tree[torch.tensor([3, 150, 3, 3])] = torch.tensor([1.0, 4.0, 2.0, 0.5], dtype=torch.float64)
    assert tree[torch.tensor([3, 150])].tolist() == [0.5, 4.0]
    assert tree.total().item() == 4.5


def prioritized(capacity: int, history: list[Step], alpha: float) -> PrioritizedReplay:
    replay = PrioritizedReplay(capacity, (1,), num_envs=history[0][0].shape[0], act_dtype=torch.int64, alpha=alpha)
    for step in history:
        replay.add(*step)
    return replay


def test_priorities_chances_and_weights_by_hand() -> None:
    replay = prioritized(10, steps(1, 4, (1,)), alpha=0.5)
    rows = torch.arange(4)
    replay.prioritize(rows, torch.tensor([-4.0, 1.0, 9.0, 0.0]))
    # p^alpha is 2, 1, 3 and 0.001: chances of 2/6, 1/6, 3/6 and nearly none
    chance = replay.tree[rows] / replay.tree.total()
    assert chance.tolist() == pytest.approx([2 / 6.001, 1 / 6.001, 3 / 6.001, 0.001 / 6.001], rel=1e-4)
    # w = (4 P)^-1 is 6/8, 6/4, 6/12; divided by the greatest of the batch
    assert replay.weights(rows[:3], beta=1.0).tolist() == pytest.approx([0.5, 1.0, 1 / 3], rel=1e-4)
    assert replay.weights(rows[:3], beta=0.5).tolist() == pytest.approx([0.5**0.5, 1.0, 3**-0.5], rel=1e-4)
    assert replay.weights(rows[:3], beta=0.0).tolist() == [1.0, 1.0, 1.0]
    drawn = replay.draw(60_010, torch.Generator().manual_seed(0))
    # one of each of B ranges of equal mass: never further than one range from the expected count
    counts = torch.bincount(drawn, minlength=4)
    assert (counts - 60_010 * chance).abs().max() <= 2
    replay.add(*steps(1, 1, (1,))[0])
    assert replay.tree[torch.tensor([4])].item() == pytest.approx(3.0, rel=1e-4)  # new: the greatest so far


def test_alpha_0_draws_uniformly() -> None:
    replay = prioritized(10, steps(2, 9, (1,)), alpha=0.0)
    replay.prioritize(torch.arange(10), torch.arange(10.0))
    assert torch.equal(replay.weights(torch.arange(10), 0.7), torch.ones(10))
    assert torch.bincount(replay.draw(1000, torch.Generator().manual_seed(0))).tolist() == [100] * 10


def test_a_transition_that_is_overwritten_loses_its_priority() -> None:
    replay = prioritized(4, steps(1, 4, (1,)), alpha=1.0)
    replay.prioritize(torch.arange(4), torch.tensor([100.0, 0.0, 0.0, 0.0]))
    assert (replay.draw(50, torch.Generator().manual_seed(0)) == 0).all()
    replay.prioritize(torch.tensor([0]), torch.tensor([0.0]))
    replay.add(*steps(1, 1, (1,))[0])
    assert replay.tree[torch.tensor([0])].item() == pytest.approx(100.0)  # as the newest


def test_prioritized_goes_on_bit_for_bit() -> None:
    history = steps(2, 14, (1,))
    straight = prioritized(10, history[:8], 0.6)
    straight.prioritize(torch.arange(6), torch.arange(6.0))
    after = PrioritizedReplay(10, (1,), num_envs=2, act_dtype=torch.int64, alpha=0.6)
    after.load_state_dict(straight.state_dict())
    for replay in (straight, after):
        for step in history[8:]:
            replay.add(*step)
        replay.prioritize(torch.arange(3), torch.tensor([9.0, 3.0, 1.0]))
    a, b = (r.draw(64, torch.Generator().manual_seed(1)) for r in (straight, after))
    assert torch.equal(a, b)
    assert torch.equal(straight.weights(a, 0.4), after.weights(a, 0.4))


def test_an_empty_prioritized_memory_is_named() -> None:
    with pytest.raises(ValueError, match="empty"):
        PrioritizedReplay(10, (1,), alpha=0.5).sample(1, torch.Generator())
