"""TRPO: conjugate gradient, Fisher products, line search and step against what is worked out by other means; wrong inputs."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from onetorch.rl import envs, trpo
from onetorch.rl.envs import Spaces
from onetorch.rl.nets import ActorCritic, Adam

SMALL = trpo.Config(num_envs=8, batch_size=256, hidden=(16,), value_minibatches=2)


def test_surrogate_by_hand() -> None:
    old = torch.tensor([-1.0, -2.0])
    gain = trpo.surrogate(old + torch.tensor([1.5, 0.5]).log(), old, torch.tensor([2.0, -1.0]))
    assert gain.item() == pytest.approx((3.0 - 0.5) / 2)


def test_conjugate_gradient_is_exact_after_as_many_steps_as_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    A, b = root @ root.T + torch.eye(6), torch.randn(6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(trpo.conjugate_gradient(lambda v: A @ v, b, steps=6), torch.linalg.solve(A, b))


def test_conjugate_gradient_by_hand() -> None:
    A, b = torch.tensor([[4.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
    # one step goes along b as far as b'b / b'Ab = 5 / 20
    assert trpo.conjugate_gradient(lambda v: A @ v, b, steps=1).tolist() == pytest.approx([0.25, 0.5])
    assert trpo.conjugate_gradient(lambda v: A @ v, b, steps=2).tolist() == pytest.approx([1 / 11, 7 / 11], abs=1e-6)
    calls = []
    x = trpo.conjugate_gradient(lambda v: calls.append(1) or 2 * v, torch.tensor([1.0, 0.0]), steps=10)  # type: ignore[func-returns-value]
    assert (x.tolist(), len(calls)) == ([0.5, 0.0], 1)  # done after one step, and no division by the residual 0
    assert trpo.conjugate_gradient(lambda v: v, torch.zeros(2), steps=10).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("discrete", [True, False])
def test_fisher_products_against_an_explicit_fisher_matrix(discrete: bool) -> None:
    """F = E[ E_a[ grad log pi (grad log pi)' ] ]: for Discrete summed over the actions, for Box by its closed form in mean and log_std."""
    torch.manual_seed(0)
    model = ActorCritic(Spaces(3, 2, discrete), (4,), "tanh", log_std=-0.3, twice=True).double()
    with torch.no_grad():
        model.pi[-1].weight.mul_(100)
    obs, params = torch.randn(7, 3, dtype=torch.float64), model.policy_parameters()
    P = sum(p.numel() for p in params)

    def jacobian(output: torch.Tensor) -> torch.Tensor:
        rows = [torch.autograd.grad(y, params, retain_graph=True, allow_unused=True, materialize_grads=True) for y in output.flatten()]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])

    F = torch.zeros(P, P, dtype=torch.float64)
    for row in obs:
        if discrete:
            logp = model.pi(row).log_softmax(-1)
            J = jacobian(logp)  # (A, P)
            F += J.T @ (logp.exp().detach()[:, None] * J)
        else:
            assert model.log_std is not None
            J = jacobian(model.pi(row))
            F += J.T @ (torch.exp(-2 * model.log_std.detach())[:, None] * J)  # of a mean: 1 / std^2
            F[-2:, -2:] += 2 * torch.eye(2)  # of a log_std, which stands last: 2
    F /= len(obs)
    product = trpo.fisher(model, obs, damping=0.1)
    for v in torch.randn(3, P, dtype=torch.float64):
        torch.testing.assert_close(product(v), F @ v + 0.1 * v)
    assert all(p.grad is None for p in model.parameters())


def test_line_search_takes_the_first_step_that_is_near_enough_and_gains() -> None:
    tried: list[float] = []

    def moved(fraction: float) -> tuple[float, float]:
        tried.append(fraction)
        return 0.02 * fraction**2, 1.0 - fraction if fraction > 0.6 else fraction  # too far above 0.707, a loss above 0.6

    assert trpo.line_search(moved, 0.01, 0.4, backtracks=10, backtrack=0.8) == pytest.approx(0.8**3)
    assert tried == pytest.approx([1, 0.8, 0.64, 0.512])
    assert trpo.line_search(moved, 0.01, 0.9, backtracks=10, backtrack=0.8) == 0.0  # no step gains so much
    assert trpo.line_search(moved, 0.01, 0.4, backtracks=3, backtrack=0.8) == 0.0


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_a_step_gains_and_stays_in_the_trust_region(env: str) -> None:
    config = dataclasses.replace(SMALL, env=env, delta=0.01)
    state = trpo.begin(config, 8, "native" if env == "CartPole-v1" else "sync")
    for _ in range(3):
        batch = trpo.rollout(config, state, 64)
        with torch.no_grad():
            old = tuple(x.clone() for x in state.model.dist(batch["obs"]))
        losses = trpo.update(config, state, batch)
        with torch.no_grad():
            kl = state.model.kl(old, state.model.dist(batch["obs"])).mean().item()
        assert kl == pytest.approx(losses["kl"], rel=1e-4)
        assert 0.002 < kl <= 0.01
        assert (losses["gain"] or 0) > 0


def test_a_failed_line_search_leaves_the_policy_as_it_was() -> None:
    """Advantages that want less noise: KL(old || new) grows exponentially as the deviation shrinks, so the quadratic model of so large a step is far off."""
    config = dataclasses.replace(SMALL, env="Pendulum-v1", delta=10.0, backtracks=1)
    state = trpo.begin(config, 8, "sync")
    batch = trpo.rollout(config, state, 32)
    batch["adv"] = 0.5 - batch["act"].squeeze(-1).square()
    before = parameters_to_vector(state.model.policy_parameters()).clone()
    losses = trpo.update(config, state, batch)
    assert (losses["step_taken"], losses["kl"]) == (0.0, 0.0)
    assert torch.equal(parameters_to_vector(state.model.policy_parameters()), before)
    assert trpo.update(dataclasses.replace(config, line_search=False), state, batch)["kl"] > 10


def test_the_natural_gradient_takes_its_step_without_a_search() -> None:
    """On a policy of one state, given by its two logits: p = (3/4, 1/4), F = p (1 - p) [[1, -1], [-1, 1]], one action 0 of advantage 1.

    g = (1/4, -1/4), an eigenvector of F with eigenvalue 3/8: x = g / (3/8), x'Fx = g'x = 1/3, so the step is sqrt(2 delta * 3) (2/3, -2/3).
    """
    model = ActorCritic(Spaces(1, 2, True), (), "tanh", twice=True).double()
    with torch.no_grad():
        model.pi[0].weight.zero_()
        model.pi[0].bias.copy_(torch.log(torch.tensor([3.0, 1.0])))
    obs, act = torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    logp = model.logp(obs, act)[0].detach()
    batch = {"obs": obs, "act": act, "logp": logp, "adv": torch.ones(4).double(), "value": torch.zeros(4).double(), "ret": torch.ones(4).double()}
    config = dataclasses.replace(SMALL, delta=0.24, line_search=False, damping=0.0, cg_steps=1, value_minibatches=1)
    state = trpo.State(model, Adam((model.v.parameters(), 1e-3)), envs.make("CartPole-v1", 1, 0), None)
    losses = trpo.update(config, state, batch)
    assert (model.pi[0].bias - torch.log(torch.tensor([3.0, 1.0]))).tolist() == pytest.approx([0.8, -0.8], rel=1e-6)
    assert losses["step_taken"] == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_envs", 7), ("num_envs", -1), ("batch_size", 0), ("value_epochs", 0), ("value_minibatches", 9999), ("delta", 0.0), ("backtrack", 1.0)]
    + [("damping", -0.1), ("cg_steps", 0), ("backtracks", 0), ("value_lr", math.inf), ("gamma", 1.5), ("lam", -0.1), ("hidden", (64, 0))],
)
def test_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        trpo.Config(**{field: value})
