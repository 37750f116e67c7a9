"""Vanilla policy gradient: its loss by hand, against the exact gradient of the expected return, and wrong inputs."""

import math
from typing import Any

import pytest
import torch

from onetorch.rl import vpg
from onetorch.rl.nets import categorical_logp


def test_policy_loss_by_hand() -> None:
    loss = vpg.policy_loss(torch.tensor([-0.5, -1.0, -2.0]), torch.tensor([2.0, -1.0, 0.5]))
    assert loss.item() == pytest.approx(-(-1.0 + 1.0 - 1.0) / 3)


def test_gradient_is_that_of_the_expected_return() -> None:
    """One state, three actions that pay 1, 2 and 6: J = sum_a p_a r_a, so dJ / dlogit_a = p_a (r_a - J), whatever the batch's proportions stand for."""
    logits, reward = torch.log(torch.tensor([0.5, 0.25, 0.25])).requires_grad_(), torch.tensor([1.0, 2.0, 6.0])
    act = torch.tensor([0, 0, 1, 2])  # as often as the policy takes them
    J = 0.5 + 0.5 + 1.5
    logp, _ = categorical_logp(logits.expand(4, 3), act)
    vpg.policy_loss(logp, reward[act] - J).backward()
    assert logits.grad is not None
    assert (-logits.grad).tolist() == pytest.approx([0.5 * (1 - J), 0.25 * (2 - J), 0.25 * (6 - J)])


def test_the_policy_takes_one_step_and_the_critic_many() -> None:
    config = vpg.Config(num_envs=8, batch_size=256, hidden=(16,), value_epochs=3, value_minibatches=4)
    state = vpg.begin(config, 8, "native")
    vpg.update(config, state, vpg.rollout(config, state, 32))
    assert (state.pi_optimizer.steps, state.v_optimizer.steps) == (1, 12)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_envs", 7), ("num_envs", -1), ("batch_size", 0), ("value_epochs", 0), ("value_minibatches", 9999)]
    + [("lr", 0.0), ("value_lr", math.inf), ("gamma", 1.5), ("lam", -0.1), ("entropy_coef", math.nan), ("hidden", (64, 0))],
)
def test_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        vpg.Config(**{field: value})
