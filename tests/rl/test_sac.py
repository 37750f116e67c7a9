"""SAC: its losses and targets by hand, gradients where they belong, and known answers of small problems."""

import math
from typing import Any

import pytest
import torch
from offpolicy_runs import small, train

from onetorch.rl import sac
from onetorch.rl.buffer import Batch
from onetorch.rl.envs import Spaces

CONFIG = small(sac.Config)


def linear(discrete: bool = False) -> sac.State:
    """A state whose nets are linear functions of one observation and one action (or two Discrete ones), with weights to do sums with."""
    state = sac.begin(small(sac.Config, env="TrapBox-v0", hidden=(), gamma=0.9))
    if discrete:
        state.model = sac.Agent(Spaces(1, 2, True), ())
        state.target = sac.Stack(2, (1, 2))
        with torch.no_grad():
            state.model.pi.flat.copy_(torch.tensor([math.log(3.0), 0.0, 0.0, 0.0]))  # logits (log 3 s, 0): at s = 1 pi = (3/4, 1/4)
            state.model.q.flat.copy_(torch.tensor([1.0, 2.0, 0.0, 0.0, 3.0, 1.0, 0.0, 0.0]))  # Q_1 = (s, 2 s), Q_2 = (3 s, s)
            state.target.flat.copy_(torch.tensor([4.0, 2.0, 0.0, 0.0, 2.0, 6.0, 0.0, 0.0]))  # at s = 1 the smaller ones are (2, 2)
    else:
        with torch.no_grad():
            state.model.pi.flat.copy_(torch.tensor([0.5, 0.0, 0.0, -1.0]))  # mean = s / 2, log_std = -1
            state.model.q.flat.copy_(torch.tensor([1.0, 2.0, 0.0, 3.0, -1.0, 0.5]))  # Q_1 = s + 2 a, Q_2 = 3 s - a + 0.5
            state.target.flat.copy_(torch.tensor([1.0, 1.0, 0.0, 1.0, -1.0, 0.0]))  # s + a and s - a: the smaller is s - |a|
    return state


def batch(discrete: bool = False) -> Batch:
    act = torch.tensor([1, 0]) if discrete else torch.tensor([[0.25], [-0.5]])
    return Batch(torch.ones(2, 1), act, torch.tensor([1.0, 2.0]), torch.ones(2, 1), torch.tensor([0.0, 1.0]), torch.zeros(2))


def noise_to_come(state: sac.State) -> torch.Tensor:
    rng = torch.Generator()
    rng.set_state(state.rng.get_state())
    return torch.randn(2, 1, generator=rng)


def test_squashed_gaussian_by_torchs_distributions() -> None:
    torch.manual_seed(0)
    out, noise = (2 * torch.randn(50, 6)).requires_grad_(), torch.randn(50, 3)
    with torch.no_grad():
        out[0, 3:], out[1, 3:] = 5.0, -30.0  # beyond the bounds of log_std
    act, logp = sac.Squashed.apply(out, noise)
    weight_act, weight_logp = torch.randn(50, 3), torch.randn(50)
    grad = torch.autograd.grad((act * weight_act).sum() + (logp * weight_logp).sum(), out)[0]

    wide = out.detach().double().requires_grad_()
    mean, log_std = wide.chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    squash = torch.distributions.transforms.TanhTransform()
    u = normal.mean + normal.stddev * noise.double()
    want = (normal.log_prob(u) - squash.log_abs_det_jacobian(u, u.tanh())).sum(-1)
    want_grad = torch.autograd.grad((u.tanh() * weight_act).sum() + (want * weight_logp).sum(), wide)[0]
    torch.testing.assert_close(act.double(), u.tanh(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logp.double(), want, atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, atol=1e-5, rtol=1e-5)
    assert (grad[0, 3:] == 0).all()
    assert (grad[1, 3:] == 0).all()


@pytest.mark.parametrize("u", [-30.0, -12.0, 0.0, 8.0, 12.0, 30.0])
def test_log_probability_near_the_edge(u: float) -> None:
    """At u = 12 the density's factor 1 - tanh(u)^2 = 4 exp(-24) / (1 + exp(-24))^2 is far below what float32 can tell from 1 - 1."""
    out = torch.tensor([[u, 0.0]], requires_grad=True)  # mean u, std 1, no noise: log N(u) = -log(2 pi) / 2
    act, logp = sac.Squashed.apply(out, torch.zeros(1, 1))
    want = -0.5 * math.log(2 * math.pi) - (math.log(4) - 2 * abs(u) - 2 * math.log1p(math.exp(-2 * abs(u))))
    assert logp.item() == pytest.approx(want, rel=1e-6)
    by_out = torch.autograd.grad(logp.sum(), out)[0]
    assert by_out[0].tolist() == pytest.approx([2 * math.tanh(u), -1.0])  # d log pi / du = 2 tanh u; a wider Gaussian is less dense
    assert abs(act.item()) <= 1


def test_soft_bellman_target_by_hand() -> None:
    state, alpha = linear(), torch.tensor(0.5)
    noise = noise_to_come(state)[0].item()
    y = sac.bellman_target(state_config(), state, batch(), alpha)
    u = 0.5 + math.exp(-1) * noise
    logp = -0.5 * noise**2 + 1 - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(u) ** 2)
    # reward 1, gamma 0.9, min(s + a, s - a) = 1 - |a|; the second transition ended: its reward alone
    assert y.tolist() == pytest.approx([1 + 0.9 * (1 - abs(math.tanh(u)) - 0.5 * logp), 2.0], rel=1e-5)


def state_config() -> sac.Config:
    return small(sac.Config, env="TrapBox-v0", hidden=(), gamma=0.9)


def test_soft_bellman_target_of_discrete_actions_by_hand() -> None:
    y = sac.bellman_target(state_config(), linear(True), batch(True), torch.tensor(0.5))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert y.tolist() == pytest.approx([1 + 0.9 * (2 + 0.5 * entropy), 2.0], rel=1e-6)


def test_critic_loss_by_hand() -> None:
    y = torch.tensor([2.0, 0.0])
    # Q_1 = (1 + 0.5, 1 - 1), Q_2 = (3.5 - 0.25, 3.5 + 0.5): squared errors 0.25, 0, 1.5625, 16, each critic's averaged over two
    assert sac.critic_loss(linear().model, batch(), y).item() == pytest.approx((0.25 + 0 + 1.5625 + 16) / 2)
    # the actions were 1 and 0: Q_1 = (2, 1), Q_2 = (1, 3): errors 0, 1, -1, 3
    assert sac.critic_loss(linear(True).model, batch(True), y).item() == pytest.approx((0 + 1 + 1 + 9) / 2)


def test_policy_loss_by_hand() -> None:
    state = linear()
    noise = noise_to_come(state).flatten().tolist()
    loss, logp = sac.policy_loss(state, batch(), torch.tensor(0.5))
    losses, logps = [], []
    for e in noise:
        u = 0.5 + math.exp(-1) * e
        logps.append(-0.5 * e**2 + 1 - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(u) ** 2))
        losses.append(0.5 * logps[-1] - min(1 + 2 * math.tanh(u), 3.5 - math.tanh(u)))
    assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert logp.item() == pytest.approx(sum(logps) / 2, rel=1e-5)


def test_policy_loss_of_discrete_actions_by_hand() -> None:
    loss, logp = sac.policy_loss(linear(True), batch(True), torch.tensor(0.5))
    negentropy = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    # the smaller Q are (1, 1)
    assert loss.item() == pytest.approx(0.5 * negentropy - 1, rel=1e-6)
    assert logp.item() == pytest.approx(negentropy, rel=1e-6)


def test_temperature_loss_by_hand() -> None:
    log_alpha = torch.tensor(0.5, requires_grad=True)
    logp = torch.tensor(3.0, requires_grad=True)
    loss = sac.temperature_loss(log_alpha, logp, -1.0)
    assert loss.item() == pytest.approx(-1.0)
    loss.backward()
    assert log_alpha.grad is not None
    assert log_alpha.grad.item() == pytest.approx(-2.0)  # entropy -3 is below the -1 aimed at: descent raises alpha
    assert logp.grad is None


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_gradients_flow_only_where_they_should(env: str) -> None:
    config = small(sac.Config, env=env)
    state = sac.begin(config)
    for _ in range(30):
        sac.explore(config, state, True)()
    model, sample = state.model, state.replay.sample(16, state.rng)
    y = sac.bellman_target(config, state, sample, torch.ones(()))
    assert not y.requires_grad
    sac.critic_loss(model, sample, y).backward()
    assert model.q.flat.grad is not None
    assert (model.q.flat.grad != 0).float().mean() > 0.3
    assert model.pi.flat.grad is None
    model.q.flat.grad = None
    loss, logp = sac.policy_loss(state, sample, torch.ones(()))
    (loss + sac.temperature_loss(state.log_alpha, logp, -1.0)).backward()
    assert model.pi.flat.grad is not None
    assert (model.pi.flat.grad != 0).float().mean() > 0.3
    assert model.q.flat.grad is None
    assert state.target.flat.grad is None
    assert state.log_alpha.grad is not None
    before = [p.detach().clone() for p in (model.pi.flat, model.q.flat, state.target.flat, state.log_alpha)]
    sac.update(config, state, sample)
    after = [p.detach() for p in (model.pi.flat, model.q.flat, state.target.flat, state.log_alpha)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(after[2], before[2] + config.tau * (after[1] - before[2]))


def test_the_optimal_policy_of_discrete_actions_is_boltzmanns(tmp_path: Any) -> None:
    """One step of reward 0, 1 or 2 for three actions: with the temperature at 1 the best policy is exp(r) / sum exp(r) = 0.090, 0.245, 0.665."""
    config = small(sac.Config, env="Payday-v0", alpha=1.0, lr=1e-2, total_steps=1500)
    model, _ = train(sac, tmp_path / "run", config)
    assert model.pi(torch.ones(1, 1)).softmax(-1)[0].tolist() == pytest.approx([0.0900, 0.2447, 0.6652], abs=0.01)
    assert model.q(torch.ones(1, 1))[0, 0].tolist() == pytest.approx([0.0, 1.0, 2.0], abs=0.05)


def test_finds_the_best_of_box_actions_and_the_entropy_aimed_at(tmp_path: Any) -> None:
    """One step that pays 1 - 2 (a - 0.5)^2; H = -1 asks for a spread of about a tenth around the best action."""
    config = small(sac.Config, env="Target-v0", lr=3e-3, target_entropy=-1.0, batch_size=64, replay=5000, total_steps=1500)
    model, rows = train(sac, tmp_path / "run", config)
    assert model(torch.ones(1, 1)).item() == pytest.approx(0.5, abs=0.08)
    assert sum(row["entropy"] for row in rows[-10:]) / 10 == pytest.approx(-1.0, abs=0.3)
    assert model.q(torch.tensor([[1.0, 0.5]])).flatten().tolist() == pytest.approx([1.0, 1.0], abs=0.15)


@pytest.mark.parametrize(
    ("field", "value"),
    [("total_steps", 0), ("num_envs", 0), ("batch_size", 0), ("lr", 0.0), ("q_lr", math.inf), ("alpha", -1.0), ("gamma", 1.5), ("tau", -0.1)]
    + [("random_steps", -1), ("replay", 0), ("hidden", (0,)), ("updates_per_step", 0.0), ("log_every", 0), ("target_entropy", math.inf)],
)
def test_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        sac.Config(**{field: value})
