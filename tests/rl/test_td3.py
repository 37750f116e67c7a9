"""TD3: its target and losses by hand, the delayed policy, and gradients where they belong."""

import math
from typing import Any

import pytest
import torch
from offpolicy_runs import small

from onetorch.rl import td3
from onetorch.rl.buffer import Batch
from onetorch.runs.errors import UsageError

CONFIG = small(td3.Config, env="TrapBox-v0", hidden=(), gamma=0.9)


def linear() -> td3.State:
    """A state whose nets are linear functions of one observation and one action, with weights to do sums with."""
    state = td3.begin(CONFIG)
    with torch.no_grad():
        state.model.pi.flat.copy_(torch.tensor([0.5, 0.0]))  # pi = tanh(s / 2)
        state.target.pi.flat.copy_(torch.tensor([2.0, 0.0]))  # tanh(2 s)
        state.model.q.flat.copy_(torch.tensor([1.0, 2.0, 0.0, 3.0, -1.0, 0.5]))  # Q_1 = s + 2 a, Q_2 = 3 s - a + 0.5
        state.target.q.flat.copy_(torch.tensor([1.0, 1.0, 0.0, 2.0, -1.0, 0.0]))  # s + a, 2 s - a
    return state


BATCH = Batch(torch.ones(2, 1), torch.tensor([[0.25], [-0.5]]), torch.tensor([1.0, 2.0]), torch.ones(2, 1), torch.tensor([0.0, 1.0]), torch.zeros(2))


def test_target_by_hand() -> None:
    state = linear()
    rng = torch.Generator()
    drawn = set()
    for _ in range(50):
        rng.set_state(state.rng.get_state())
        noise = 0.2 * torch.randn(2, 1, generator=rng)[0].item()
        act = min(max(math.tanh(2.0) + min(max(noise, -0.1), 0.1), -1), 1)
        y = td3.bellman_target(small(td3.Config, env="TrapBox-v0", hidden=(), gamma=0.9, noise_clip=0.1), state, BATCH)
        # reward 1, gamma 0.9, the smaller of 1 + a and 2 - a; the second transition ended: its reward alone
        assert y.tolist() == pytest.approx([1 + 0.9 * min(1 + act, 2 - act), 2.0], rel=1e-6)
        drawn.add((act == 1, noise < -0.1))
    assert drawn == {(True, False), (False, False), (False, True)}  # the action's bound and the noise's were both met


def test_losses_by_hand() -> None:
    model = linear().model
    # as in SAC: Q_1 = (1.5, 0), Q_2 = (3.25, 4)
    assert td3.critic_loss(model, BATCH, torch.tensor([2.0, 0.0])).item() == pytest.approx((0.25 + 0 + 1.5625 + 16) / 2)
    assert td3.policy_loss(model, BATCH).item() == pytest.approx(-(1 + 2 * math.tanh(0.5)))  # of the first critic alone


def test_the_policy_and_the_targets_are_delayed() -> None:
    config = small(td3.Config, env="TrapBox-v0", policy_delay=3)
    state = td3.begin(config)
    for _ in range(10):
        td3.explore(config, state, True)()
    moved = []
    for _ in range(6):
        tensors = (state.model.q.flat, state.model.pi.flat, state.target.q.flat, state.target.pi.flat)
        before = [t.detach().clone() for t in tensors]
        td3.update(config, state, state.replay.sample(8, state.rng), whole=td3.turn(config, state))
        moved.append([not torch.equal(a, b) for a, b in zip(before, tensors, strict=True)])
    assert moved == [[True, False, False, False], [True, False, False, False], [True, True, True, True]] * 2


def test_gradients_flow_only_where_they_should() -> None:
    config = small(td3.Config, env="Pendulum-v1")
    state = td3.begin(config)
    for _ in range(30):
        td3.explore(config, state, True)()
    model, sample = state.model, state.replay.sample(16, state.rng)
    y = td3.bellman_target(config, state, sample)
    assert not y.requires_grad
    model.pi.flat.grad = None
    td3.critic_loss(model, sample, y).backward()
    assert model.q.flat.grad is not None
    assert (model.q.flat.grad != 0).float().mean() > 0.3
    assert model.pi.flat.grad is None
    model.q.flat.grad = None
    td3.policy_loss(model, sample).backward()
    assert model.pi.flat.grad is not None
    assert (model.pi.flat.grad != 0).float().mean() > 0.3
    assert model.q.flat.grad is None
    assert state.target.q.flat.grad is None
    assert state.target.pi.flat.grad is None


def test_discrete_actions_are_refused() -> None:
    with pytest.raises(UsageError, match="CartPole-v1 has Discrete actions; TD3 needs Box ones"):
        td3.build(td3.Config(env="CartPole-v1"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("policy_delay", 0), ("target_noise", -1.0), ("noise_clip", math.nan), ("act_noise", -0.1), ("lr", 0.0), ("gamma", 2.0), ("hidden", (0,)), ("replay", 0)],
)
def test_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        td3.Config(**{field: value})
