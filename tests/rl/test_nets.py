"""Distributions against torch.distributions, and running moments against those of all the data."""

import math

import pytest
import torch
from torch import nn

from onetorch.rl import stacks
from onetorch.rl.envs import Spaces
from onetorch.rl.nets import (
    ActorCritic,
    Adam,
    Encoder,
    Pixels,
    RunningNorm,
    categorical_kl,
    categorical_logp,
    categorical_vjp,
    encoder,
    gaussian_kl,
    gaussian_logp,
    gaussian_vjp,
    mlp,
)  # fmt: skip


def test_categorical_against_torch_distributions() -> None:
    torch.manual_seed(0)
    logits, act = 3 * torch.randn(50, 5), torch.randint(5, (50,))
    logp, entropy = categorical_logp(logits, act)
    reference = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logp, reference.log_prob(act))
    torch.testing.assert_close(entropy, reference.entropy())


def test_gaussian_against_torch_distributions() -> None:
    torch.manual_seed(0)
    mean, log_std, act = torch.randn(50, 3), torch.tensor([-2.0, 0.0, 1.0]), torch.randn(50, 3)
    logp, entropy = gaussian_logp(mean, log_std, act)
    reference = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(logp, reference.log_prob(act))
    torch.testing.assert_close(entropy.expand(50), reference.entropy())


def test_gaussian_by_hand() -> None:
    logp, _ = gaussian_logp(torch.zeros(1, 1), torch.tensor([math.log(2.0)]), torch.tensor([[2.0]]))
    assert logp.item() == pytest.approx(-0.5 - math.log(2.0) - 0.5 * math.log(2 * math.pi))


def test_way_back_by_hand() -> None:
    # z = (3 - 1) / 2 = 1: by the mean z / std = 1/2, by log std z^2 - 1 = 0 and the entropy's 1
    _, _, gaussian = gaussian_vjp(torch.ones(1, 1), torch.tensor([math.log(2.0)]), torch.tensor([[3.0]]))
    by_mean, by_log_std = gaussian(torch.tensor([4.0]), 5.0)
    assert (by_mean.item(), by_log_std.item()) == (pytest.approx(2.0), pytest.approx(5.0))
    # p = (1/4, 3/4), a = 1: by the logits onehot - p = (-1/4, 1/4)
    _, _, categorical = categorical_vjp(torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([1]))
    torch.testing.assert_close(categorical(torch.tensor([4.0]), 0.0), torch.tensor([[-1.0, 1.0]]))
    # dH / dlogits = -p (log p + H), H = log 4 - 3/4 log 3: (-1/4 (-3/4 log 3), -3/4 (1/4 log 3))
    torch.testing.assert_close(categorical(torch.tensor([0.0]), 1.0), 3 / 16 * math.log(3.0) * torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize(
    ("spaces", "activation"),
    [
        (Spaces(3, 2, False), "tanh"),
        (Spaces(3, 2, False), "silu"),
        (Spaces(3, 4, True), "relu"),
        (Spaces(3, 5, True, multi=(2, 3)), "tanh"),
        (Spaces(0, 3, True, image=(1, 12, 12)), "relu"),
    ],
    ids=["box", "box, torch's passes", "choice", "choices", "pixels"],
)
def test_way_back_is_autograds(spaces: Spaces, activation: str) -> None:
    torch.manual_seed(0)
    model = ActorCritic(spaces, (64, 64), activation, log_std=-0.5)
    obs = spaces.example(40)
    act = model.act(obs, model.noise(40)).detach()
    by_logp, by_v, coef = torch.randn(40), torch.randn(40), 0.3
    for _ in range(2):  # it adds
        logp, entropy, value, backward = model.vjp(obs, act)
        assert not any(x.requires_grad for x in (logp, entropy, value))
        backward(by_logp, by_v, coef)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (plain_logp, plain_entropy), plain_value = model.logp(obs, act), model.value(obs)
    torch.testing.assert_close((logp, entropy, value), (plain_logp.detach(), plain_entropy.detach(), plain_value.detach()))
    ((plain_logp * by_logp).sum() + coef * plain_entropy.mean() + (plain_value * by_v).sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], 2 * p.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("discrete", [True, False])
def test_actions_follow_pi(discrete: bool) -> None:
    torch.manual_seed(0)
    model = ActorCritic(Spaces(3, 4, discrete), (8,), "tanh", log_std=-1.0)
    with torch.no_grad():
        model.state_dict()["pi.2.weight"].mul_(100)  # away from the uniform start
        obs = torch.randn(3)
        act = model.act(obs.expand(100_000, 3), model.noise(100_000))
        out = model.pi(obs)
        if discrete:
            share = torch.bincount(act, minlength=4) / len(act)
            torch.testing.assert_close(share, out.softmax(-1), atol=0.006, rtol=0)  # 4 standard errors of a share near 1/2
        else:
            torch.testing.assert_close(act.mean(0), out, atol=0.006, rtol=0)
            torch.testing.assert_close(act.std(0), torch.full((4,), math.exp(-1.0)), atol=0.004, rtol=0)
        assert torch.equal(model.act(obs, None), out.argmax(-1) if discrete else out)


@pytest.mark.parametrize("discrete", [True, False])
def test_gradients_reach_every_weight_and_only_its_own_net(discrete: bool) -> None:
    torch.manual_seed(0)
    model = ActorCritic(Spaces(3, 2, discrete), (8, 8), "silu")
    obs, act = torch.randn(16, 3), torch.randint(2, (16,)) if discrete else torch.randn(16, 2)
    logp, _ = model.logp(obs, act)
    logp.sum().backward()
    pi = [*model.pi.parameters(), *([] if model.log_std is None else [model.log_std])]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pi)
    assert all(p.grad is None for p in model.v.parameters())
    model.value(obs).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.v.parameters())


def test_first_policy_is_nearly_uniform() -> None:
    torch.manual_seed(0)
    model = ActorCritic(Spaces(4, 3, True), (64, 64), "tanh")
    _, entropy = model.logp(torch.randn(100, 4), torch.zeros(100, dtype=torch.int64))
    assert entropy.min().item() > math.log(3) - 1e-3


def test_mlp_layers() -> None:
    net = mlp((5, 7, 2), nn.ReLU, out_gain=0.5)
    assert [type(layer) for layer in net] == [nn.Linear, nn.ReLU, nn.Linear]
    first, last = net[0], net[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    torch.testing.assert_close(first.weight.T @ first.weight, 2 * torch.eye(5))  # orthonormal columns times sqrt(2)
    torch.testing.assert_close(last.weight @ last.weight.T, 0.25 * torch.eye(2))
    assert first.bias.abs().sum() == 0


def test_running_norm_has_the_moments_of_all_rows() -> None:
    torch.manual_seed(0)
    norm, data = RunningNorm(3), torch.randn(1000, 3) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([0.0, 5.0, -3.0])
    probe = torch.tensor([[20.0, -20.0, 1.0]])
    assert norm(probe).tolist() == [[10.0, -10.0, 1.0]]  # the identity, up to the clip, before any data
    for part in data.split([1, 499, 500]):
        norm.update(part)
    torch.testing.assert_close(norm.mean, data.double().mean(0))
    torch.testing.assert_close(norm.var, data.double().var(0, correction=0))
    torch.testing.assert_close(norm(data).std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    assert set(norm.state_dict()) == {"mean", "var", "count"}
    for assign in (False, True):
        other = RunningNorm(3)
        other.load_state_dict(norm.state_dict(), assign=assign)
        assert torch.equal(other(data), norm(data))


def test_kl_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2
    assert categorical_kl(torch.zeros(2), torch.log(torch.tensor([1.0, 3.0]))).item() == pytest.approx(0.5 * math.log(4 / 3))
    # std 1 and 2, means 1 apart: ln 2 + (1 + 1) / 8 - 1/2; twice, for two components
    one, two = torch.zeros(2), torch.full((2,), math.log(2.0))
    assert gaussian_kl(torch.zeros(2), one, torch.ones(2), two).item() == pytest.approx(2 * (math.log(2) - 0.25))


@pytest.mark.parametrize("discrete", [True, False])
def test_kl_against_torch_distributions(discrete: bool) -> None:
    torch.manual_seed(0)
    model = ActorCritic(Spaces(3, 4, discrete), (8,), "tanh")
    if discrete:
        p, q = ((3 * torch.randn(50, 4),) for _ in range(2))
        reference = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for (x,) in (p, q)))
    else:
        p, q = ((torch.randn(50, 4), torch.randn(4)) for _ in range(2))
        normal = [torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1) for mean, log_std in (p, q)]
        reference = torch.distributions.kl_divergence(*normal)
    torch.testing.assert_close(model.kl(p, q), reference)
    assert model.kl(p, p).abs().max() < 1e-6


def test_adam_is_torchs_on_one_vector() -> None:
    torch.manual_seed(0)
    nets = [mlp((3, 4, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    reference = torch.optim.Adam([{"params": nets[0][0].parameters(), "lr": 0.1}, {"params": nets[0][2].parameters(), "lr": 0.03}], eps=1e-5)
    begin = [0.1, 0.03]
    ours = Adam((nets[1][0].parameters(), 0.1), (nets[1][2].parameters(), 0.03), eps=1e-5)
    for k, obs in enumerate(torch.randn(6, 5, 3)):
        for group, lr in zip(reference.param_groups, begin, strict=True):
            group["lr"] = lr * (1 - k / 10)
        reference.zero_grad()
        ours.zero_grad()
        for net in nets:
            ((10.0 if k % 2 else 0.01) * net(obs).square().mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(nets[0].parameters(), 0.5)
        assert (norm > 0.5) == (k % 2 == 1)
        assert ours.clip(0.5) == pytest.approx(norm.item(), rel=1e-5)
        reference.step()
        ours.step(1 - k / 10)
        if k == 3:  # what is saved is all there is
            saved = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in ours.state_dict().items()}
            ours = Adam((nets[1][0].parameters(), 0.1), (nets[1][2].parameters(), 0.03), eps=1e-5)
            ours.load_state_dict(saved)
    assert torch.equal(ours.weights, torch.cat([p.flatten() for p in nets[1].parameters()]))
    torch.testing.assert_close(ours.weights, torch.cat([p.detach().flatten() for p in nets[0].parameters()]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("P", [1, 15, 16, 37, 1000])
@pytest.mark.parametrize("rates", [(0.02,), (0.02, 0.005)], ids=["one step size", "two"])
def test_adam_in_cpp_and_in_torch(P: int, rates: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both against torch.optim.Adam in float64, over lengths that do and do not fill vectors."""
    if stacks.library() is None:
        pytest.skip("no C++ compiler on this machine")
    torch.manual_seed(0)
    begins, grads = torch.randn(len(rates), P), torch.randn(20, len(rates), P) * torch.logspace(-4, 2, P)
    reference = [begin.double() for begin in begins]
    optimizers = [torch.optim.Adam([{"params": [p], "lr": lr}]) for p, lr in zip(reference, rates, strict=True)]
    ways = {"native": [*begins.clone()], "torch": [*begins.clone()]}
    ours = {name: Adam(*(([p], lr) for p, lr in zip(params, rates, strict=True))) for name, params in ways.items()}
    for k, grad in enumerate(grads):
        for params in (reference, *ways.values()):
            for p, g in zip(params, grad, strict=True):
                p.grad = g.to(p.dtype)
        for optimizer, lr in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = lr * (1 - k / 20)
            optimizer.step()
        ours["native"].step(1 - k / 20)
        with monkeypatch.context() as without:
            without.setattr(stacks, "library", lambda: None)
            ours["torch"].step(1 - k / 20)
    for name, optimizer in ours.items():
        torch.testing.assert_close(torch.stack(ways[name]).double(), torch.stack(reference), rtol=1e-5, atol=1e-5)
        assert torch.equal(optimizer.weights, torch.cat(ways[name]))


def test_several_choices_are_independent() -> None:
    torch.manual_seed(0)
    model = ActorCritic(Spaces(3, 5, True, multi=(2, 3)), (8,), "tanh")
    with torch.no_grad():
        model.state_dict()["pi.2.weight"].mul_(100)
    obs = torch.randn(20, 3)
    parts = [torch.distributions.Categorical(logits=logits) for logits in model.pi(obs).split((2, 3), -1)]
    act = model.act(obs, None)
    assert torch.equal(act, torch.stack([part.logits.argmax(-1) for part in parts], -1))
    logp, entropy = model.logp(obs, act)
    torch.testing.assert_close(logp, sum(part.log_prob(act[:, k]) for k, part in enumerate(parts)))
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))
    other = (model.dist(obs)[0].roll(1, 0),)
    kl = sum(torch.distributions.kl_divergence(p, torch.distributions.Categorical(logits=q)) for p, q in zip(parts, other[0].split((2, 3), -1), strict=True))
    torch.testing.assert_close(model.kl(model.dist(obs), other), kl)
    with torch.no_grad():
        drawn = model.act(obs[:1].expand(100_000, 3), model.noise(100_000))
    share = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=6) / len(drawn)
    joint = parts[0].probs[0][:, None] * parts[1].probs[0]
    torch.testing.assert_close(share, joint.flatten(), atol=0.006, rtol=0)


def test_pixels_are_divided_by_255_and_numbers_pass_beside() -> None:
    torch.manual_seed(0)
    pixels, numbers = torch.randint(0, 256, (5, 3, 20, 30), dtype=torch.uint8), torch.randn(5, 2)
    alone, beside = Pixels(0, (3, 20, 30), nn.ReLU), Pixels(2, (3, 20, 30), nn.ReLU)
    beside.load_state_dict(alone.state_dict())
    features = alone.convolutions(pixels.float() / 255).flatten(1)  # 20 x 30 -> 10 x 15 -> 5 x 8, 32 channels
    assert alone.width == features.shape[1] == 32 * 5 * 8
    torch.testing.assert_close(alone(pixels), features)
    torch.testing.assert_close(beside(torch.cat((numbers, pixels.flatten(1).float()), 1)), torch.cat((numbers, features), 1))
    assert alone(pixels.expand(4, 5, 3, 20, 30)).shape == (4, 5, alone.width)


def test_encoder_gives_fifty_features_of_a_picture_and_the_numbers_beside_it() -> None:
    net, width = encoder(Spaces(2 + 3 * 9 * 12, 1, False, image=(3, 9, 12)))
    assert isinstance(net, Encoder)
    numbers, picture = torch.tensor([[3.0, -7.0]]).expand(4, 2), torch.randint(256, (4, 3, 9, 12))
    out = net(torch.cat((numbers, picture.flatten(1).float()), 1))
    assert out.shape == (4, width) == (4, 52)
    assert torch.equal(out[:, :2], numbers)
    normal = torch.atanh(out[:, 2:].double())  # of mean 0 and variance 1 in each row, before tanh
    assert normal.mean(1).abs().max() < 1e-3
    assert (normal.var(1, correction=0) - 1).abs().max() < 1e-2
    alone, width = encoder(Spaces(0, 1, False, image=(3, 9, 12)))
    alone.load_state_dict(net.state_dict())
    assert width == 50
    torch.testing.assert_close(alone(picture.to(torch.uint8)), out[:, 2:])
    same, width = encoder(Spaces(7, 1, False))
    assert (list(same.parameters()), width) == ([], 7)


def test_numbers_are_normalised_and_pixels_are_not() -> None:
    model = ActorCritic(Spaces(2 + 144, 2, True, image=(1, 12, 12)), (8,), "tanh", normalize_obs=True)
    obs = torch.cat((torch.randn(500, 2) * 3 + 5, torch.randint(0, 256, (500, 144)).float()), 1)
    model.observe(obs)
    normal = model.normalize(obs)
    torch.testing.assert_close(normal[:, :2].mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    assert torch.equal(normal[:, 2:], obs[:, 2:])
    assert ActorCritic(Spaces(0, 2, True, image=(1, 12, 12)), (8,), "tanh", normalize_obs=True).norm is None
