"""Stacks of MLPs: both ways of computing them against torch's own layers in float64, and what is saved."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from onetorch.rl import stacks
from onetorch.rl.stacks import Stack

NATIVE = stacks.library() is not None
SHAPES: list[tuple[int | None, int, tuple[int, ...]]] = [
    (2, 256, (23, 256, 256, 1)),
    (None, 100, (17, 256, 256, 12)),
    (3, 5, (3, 2)), (2, 37, (3, 70, 130, 66, 5)), (1, 1, (4, 16, 8, 2)), (2, 14, (1, 7, 33)),
]


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(stacks, "library", lambda: None)
    elif not NATIVE:
        pytest.skip("no C++ compiler on this machine")
    return request.param


LAYERS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}


def plain(stack: Stack) -> nn.ModuleList:
    """The same nets of torch's own layers, float64, loaded by the names of the state dict."""
    nets = nn.ModuleList()
    for _ in range(stack.count or 1):
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(stack.sizes):
            layers += [nn.Linear(fan_in, fan_out), LAYERS[stack.activation]()]
        nets.append(nn.Sequential(*layers[:-1]))
    (nets if stack.count else nets[0]).load_state_dict(stack.state_dict())
    return nets.double()


def passes(stack: Stack, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, and the gradients of sum(grad * output), of a stack: by x, and by each weight and bias."""
    x = x.clone().requires_grad_()
    out = stack(x)
    by_x, by_flat = torch.autograd.grad((out * grad).sum(), (x, stack.flat))
    return out.detach(), by_x, stack.split(by_flat)


def reference(stack: Stack, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    nets, x = plain(stack), x.double().requires_grad_()
    out = torch.stack([net(x) for net in nets])
    out = out if stack.count else out[0]
    by_x, *by_weights = torch.autograd.grad((out * grad.double()).sum(), (x, *nets.parameters()))
    return out.detach(), by_x, by_weights


@pytest.mark.parametrize(("count", "first"), [(2, None), (3, 2)])
def test_all_nets_at_once_are_the_nets_one_by_one(count: int, first: int | None) -> None:
    """What stands in for the C++ passes on a GPU, in float64."""
    torch.manual_seed(0)
    stack, x = Stack(count, (5, 16, 12, 3), "silu").double(), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    alone, together = stack(x, first=first), stack._together(x, stack.flat, first or count)
    torch.testing.assert_close(together, alone)
    grad = torch.randn_like(alone)
    for a, b in zip(*(torch.autograd.grad(out, (x, stack.flat), grad) for out in (alone, together)), strict=True):
        torch.testing.assert_close(a, b)


def apart(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
@pytest.mark.parametrize(("count", "batch", "sizes"), SHAPES)
def test_agrees_with_torchs_layers(way: str, count: int | None, batch: int, sizes: tuple[int, ...], activation: str) -> None:
    torch.manual_seed(0)
    stack, x = Stack(count, sizes, activation), torch.randn(batch, sizes[0])
    grad = torch.randn(stack(x).shape)
    out, by_x, by_weights = passes(stack, x, grad)
    want, want_x, want_weights = reference(stack, x, grad)
    assert out.shape == want.shape == ((batch, sizes[-1]) if count is None else (count, batch, sizes[-1]))
    assert apart(out, want) < (2e-6 if activation == "tanh" else 1e-6)
    assert apart(by_x, want_x) < (2e-6 if activation == "tanh" else 1e-6)
    assert len(by_weights) == len(want_weights)
    for got, wanted in zip(by_weights, want_weights, strict=True):
        assert got.shape == wanted.shape
        assert apart(got, wanted) < (2e-6 if activation == "tanh" else 1e-6)


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler on this machine")
def test_tanh_of_any_number() -> None:
    """To four units in the last place of what float64 says, signs and ends included."""
    one = Stack(None, (1, 1, 1), "tanh")
    with torch.no_grad():
        one.flat.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]))  # weight and bias of both layers
        x = torch.cat((torch.linspace(-12, 12, 100_001), torch.logspace(-37, 1, 1000), -torch.logspace(-37, 1, 1000)))
        got, want = one(x.unsqueeze(1)).flatten().double(), x.double().tanh()
        ends = one(torch.tensor([[math.inf], [-math.inf], [3e38], [math.nan]])).flatten().tolist()
    assert ((got - want).abs() / want.abs().clamp(min=1e-38)).max() < 4 * 2**-23
    assert got.abs().max() <= 1
    assert ends[:3] == [1.0, -1.0, 1.0]
    assert math.isnan(ends[3])


@pytest.mark.skipif("bfloat16" not in stacks.dtypes(), reason="this processor does not multiply bfloat16")
def test_bfloat16_rounds_only_the_hidden_products() -> None:
    torch.manual_seed(0)
    stack, x = Stack(2, (23, 256, 256, 1)), torch.randn(64, 23)
    stack.dtype = "bfloat16"
    nets = [(w.double(), b.double()) for w, b in zip(stack.split(stack.flat.detach())[::2], stack.split(stack.flat.detach())[1::2], strict=True)]
    out, grad = stack(x), torch.randn(2, 64, 1)
    by_x = torch.autograd.grad((out * grad).sum(), stack.flat)[0]
    for k in range(2):
        (w0, b0), (w1, b1), (w2, b2) = nets[3 * k : 3 * k + 3]
        h = (x.double() @ w0.T + b0).relu()
        rounded = h.bfloat16().double() @ w1.bfloat16().double().T + b1  # what the products see: both sides rounded to 8 bits, sums exact
        torch.testing.assert_close(out[k].double(), rounded.relu() @ w2.T + b2, atol=1e-4, rtol=1e-4)
    exact = copy.deepcopy(stack)
    exact.dtype = "float32"
    by_exact = torch.autograd.grad((exact(x) * grad).sum(), exact.flat)[0]
    assert 1e-4 < apart(by_x, by_exact.double()) < 0.1
    assert 1e-5 < apart(out, exact(x).double()) < 0.02
    small = Stack(2, (23, 32, 32, 1))  # below 64 units nothing is gained
    before = small(x)
    small.dtype = "bfloat16"
    assert torch.equal(before, small(x))


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("dtype", stacks.dtypes())
def test_threads_do_not_change_a_bit(dtype: str) -> None:
    torch.manual_seed(0)
    stack, x, grad = Stack(2, (23, 256, 256, 1)), torch.randn(256, 23), torch.randn(2, 256, 1)
    stack.dtype, threads, results = dtype, torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(passes(stack, x, grad))
    finally:
        torch.set_num_threads(threads)
    (out, by_x, by_weights), (out3, by_x3, by_weights3) = results
    assert torch.equal(out, out3)
    assert torch.equal(by_x, by_x3)
    assert all(torch.equal(a, b) for a, b in zip(by_weights, by_weights3, strict=True))


def test_frozen_lets_gradients_flow_to_the_input_alone(way: str) -> None:
    stack, x = Stack(2, (3, 8, 1)), torch.randn(6, 3, requires_grad=True)
    out = stack(x, frozen=True)
    assert torch.equal(out, stack(x))
    by_x, by_flat = torch.autograd.grad(out.sum(), (x, stack.flat), allow_unused=True)
    assert by_flat is None
    assert torch.equal(by_x, torch.autograd.grad(stack(x).sum(), x)[0])


def test_the_first_net_can_be_asked_alone(way: str) -> None:
    stack, x = Stack(2, (3, 8, 1)), torch.randn(6, 3, requires_grad=True)
    one = stack(x, first=1)
    assert torch.equal(one, stack(x)[:1])
    by_flat, half = torch.autograd.grad(one.sum(), stack.flat)[0], stack.flat.numel() // 2
    assert by_flat[half:].abs().max() == 0
    assert torch.equal(by_flat[:half], torch.autograd.grad(stack(x).sum(), stack.flat)[0][:half])
    assert torch.equal(torch.autograd.grad(stack(x, frozen=True, first=1).sum(), x)[0], torch.autograd.grad(stack(x)[0].sum(), x)[0])


def test_begins_as_torchs_layers_do() -> None:
    torch.manual_seed(0)
    weight, bias = Stack(None, (100, 400)).split(Stack(None, (100, 400)).flat)
    # uniform between ±1/sqrt(100): standard deviation 0.1 / sqrt(3)
    assert weight.abs().max() <= 0.1
    assert weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert bias.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.15)


def test_what_is_saved_stands_under_the_names_of_plain_layers() -> None:
    stack = Stack(2, (3, 8, 1))
    saved = stack.state_dict()
    assert list(saved) == [f"{k}.{i}.{kind}" for k in (0, 1) for i in (0, 2) for kind in ("weight", "bias")]
    other = Stack(2, (3, 8, 1))
    other.load_state_dict(saved)
    assert torch.equal(stack.flat, other.flat)
    assert list(Stack(None, (3, 8, 1)).state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in saved.items() if k != "1.2.bias"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(saved | {"2.0.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"0.0.weight is \(8, 4\), expected \(8, 3\)"):
        other.load_state_dict(saved | {"0.0.weight": torch.zeros(8, 4)})
