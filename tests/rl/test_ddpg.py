"""DDPG: its target and losses by hand, and gradients where they belong."""

import math
from typing import Any

import pytest
import torch
from offpolicy_runs import small

from onetorch.rl import ddpg
from onetorch.rl.buffer import Batch
from onetorch.runs.errors import UsageError

CONFIG = small(ddpg.Config, env="TrapBox-v0", hidden=(), gamma=0.9, tau=0.25)
BATCH = Batch(torch.ones(2, 1), torch.tensor([[0.25], [-0.5]]), torch.tensor([1.0, 2.0]), torch.ones(2, 1), torch.tensor([0.0, 1.0]), torch.zeros(2))


def linear() -> ddpg.State:
    state = ddpg.begin(CONFIG)
    with torch.no_grad():
        state.model.pi.flat.copy_(torch.tensor([0.5, 0.0]))  # pi = tanh(s / 2)
        state.target.pi.flat.copy_(torch.tensor([2.0, 0.0]))  # tanh(2 s)
        state.model.q.flat.copy_(torch.tensor([1.0, 2.0, 0.0]))  # Q = s + 2 a
        state.target.q.flat.copy_(torch.tensor([2.0, -1.0, 0.0]))  # 2 s - a
    return state


def test_target_and_losses_by_hand() -> None:
    state = linear()
    # reward 1, gamma 0.9; the second transition ended: its reward alone
    assert ddpg.bellman_target(CONFIG, state, BATCH).tolist() == pytest.approx([1 + 0.9 * (2 - math.tanh(2.0)), 2.0])
    # Q = (1.5, 0)
    assert ddpg.critic_loss(state.model, BATCH, torch.tensor([2.0, 0.5])).item() == pytest.approx((0.25 + 0.25) / 2)
    assert ddpg.policy_loss(state.model, BATCH).item() == pytest.approx(-(1 + 2 * math.tanh(0.5)))


def test_targets_follow_by_tau() -> None:
    state = linear()
    before = [t.clone() for t in (state.target.pi.flat, state.target.q.flat)]
    ddpg.update(CONFIG, state, BATCH)
    for old, target, live in zip(before, (state.target.pi, state.target.q), (state.model.pi, state.model.q), strict=True):
        torch.testing.assert_close(target.flat.detach(), 0.75 * old + 0.25 * live.flat.detach())


def test_gradients_flow_only_where_they_should() -> None:
    config = small(ddpg.Config, env="Pendulum-v1")
    state = ddpg.begin(config)
    for _ in range(30):
        ddpg.explore(config, state, True)()
    model, sample = state.model, state.replay.sample(16, state.rng)
    y = ddpg.bellman_target(config, state, sample)
    assert not y.requires_grad
    model.pi.flat.grad = None
    ddpg.critic_loss(model, sample, y).backward()
    assert model.q.flat.grad is not None
    assert (model.q.flat.grad != 0).float().mean() > 0.3
    assert model.pi.flat.grad is None
    model.q.flat.grad = None
    ddpg.policy_loss(model, sample).backward()
    assert model.pi.flat.grad is not None
    assert (model.pi.flat.grad != 0).float().mean() > 0.3
    assert model.q.flat.grad is None
    assert state.target.q.flat.grad is None


def test_discrete_actions_are_refused() -> None:
    with pytest.raises(UsageError, match="CartPole-v1 has Discrete actions; DDPG needs Box ones"):
        ddpg.build(ddpg.Config(env="CartPole-v1"))


@pytest.mark.parametrize(("field", "value"), [("act_noise", -0.1), ("q_lr", 0.0), ("tau", 2.0), ("hidden", (0,)), ("replay", 0), ("update_every", 0)])
def test_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        ddpg.Config(**{field: value})
