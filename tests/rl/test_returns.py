"""Advantages and returns against numbers worked out by hand."""

import pytest
import torch

from onetorch.rl.returns import discounted_return, explained_variance, gae


def test_gae_by_hand() -> None:
    # gamma = lam = 1/2, one environment, four steps; the task ends at step 1, a time limit cuts at step 2, step 3 runs on
    reward = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    value = torch.tensor([[0.5], [1.0], [2.0], [3.0]])
    next_value = torch.tensor([[1.0], [100.0], [8.0], [6.0]])  # 100: what follows a termination must not count
    terminated = torch.tensor([[False], [True], [False], [False]])
    truncated = torch.tensor([[False], [False], [True], [False]])
    # delta: 1 + .5*1 - .5 = 1; 2 - 1 = 1; 3 + .5*8 - 2 = 5; 4 + .5*6 - 3 = 4. A_3 = 4, A_2 = 5, A_1 = 1, A_0 = 1 + .25*1
    adv = gae(reward, value, next_value, terminated, truncated, gamma=0.5, lam=0.5)
    assert adv.flatten().tolist() == [1.25, 1.0, 5.0, 4.0]


def test_gae_is_the_sum_of_discounted_deltas() -> None:
    generator = torch.Generator().manual_seed(0)
    T, N, gamma, lam = 9, 4, 0.9, 0.8
    reward, value, next_value = (torch.randn(T, N, generator=generator, dtype=torch.float64) for _ in range(3))
    terminated, truncated = (torch.rand(T, N, generator=generator) < 0.2 for _ in range(2))
    adv = gae(reward, value, next_value, terminated, truncated, gamma, lam)
    for n in range(N):
        for t in range(T):
            expected, weight = 0.0, 1.0
            for k in range(t, T):
                follows = 0.0 if terminated[k, n] else next_value[k, n].item()
                expected += weight * (reward[k, n].item() + gamma * follows - value[k, n].item())
                weight *= gamma * lam
                if terminated[k, n] or truncated[k, n]:
                    break
            assert adv[t, n].item() == pytest.approx(expected, abs=1e-12)


def test_gae_with_lambda_one_is_the_return_minus_the_value() -> None:
    reward, value = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[5.0], [6.0], [7.0]])
    no = torch.zeros(3, 1, dtype=torch.bool)
    adv = gae(reward, value, torch.tensor([[6.0], [7.0], [10.0]]), no, no, gamma=1.0, lam=1.0)
    assert (adv + value).flatten().tolist() == [13.0, 12.0, 11.0]  # three rewards and then 10


def test_discounted_return_carries_over_and_restarts() -> None:
    reward = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    done = torch.tensor([[False, True], [True, False], [False, False]])
    out = discounted_return(reward, done, gamma=0.5, last=torch.tensor([8.0, 0.0]))
    assert out.tolist() == [[5.0, 2.0], [3.5, 2.0], [1.0, 3.0]]


def test_explained_variance() -> None:
    target = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(torch.full((4,), 9.0), target) == pytest.approx(0.0)
    assert explained_variance(target * 0.5, target) == pytest.approx(0.75)
    assert explained_variance(target, torch.ones(4)) is None


def test_shapes_that_differ_are_named() -> None:
    a, b = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"truncated \(2, 2\)"):
        gae(a, a, a, b, b[:2], 0.9, 0.9)
