import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from onetorch.sparse import Conv1d, Conv2d, Conv3d, DynamicSparsity, EdgeBias, Layout, conv, cpu, patterns

MEASURED = conv.costs_of
DENSE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
SPARSE = {1: Conv1d, 2: Conv2d, 3: Conv3d}


@pytest.fixture(autouse=True, params=["products", "dense"])
def chosen(request, monkeypatch):
    """Every check runs on the sparse products, where a layer can take them, and on the dense convolution."""
    monkeypatch.setattr(conv, "costs_of", lambda *_: (0.0, 0.0) if request.param == "products" else (1.0, 1.0))
    return request.param


@torch.no_grad()
def error(got, want):
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)) if want.numel() else 0.0


def random_case(seed):
    """Sizes, strides, paddings and dilations against torch's dense convolution in float64, forward and gradients; the worst error over its bound."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=g))

    dims = 1 + seed % 3
    dtype, bound = ((torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 1e-2))[pick(0, 3)]
    block = (8 << pick(0, 2), 8 << pick(0, 2))
    C, K = pick(1, 40), pick(1, 40)
    layout = Layout.from_mask(torch.rand(-(-K // block[0]), -(-C // block[1]), generator=g) < 0.6, block, (K, C))
    kernel, stride, dilation = (tuple(pick(1, high) for _ in range(dims)) for high in (4, 3, 3))
    padding = [tuple(pick(0, 3) for _ in range(dims)), "valid", "same"][pick(0, 3)]
    stride = (1,) * dims if padding == "same" else stride
    bias, gate = bool(pick(0, 2)), bool(pick(0, 2))
    layer = SPARSE[dims](C, K, kernel, layout, stride, padding, dilation, bias, dtype=dtype, gate=gate)
    if gate:
        layer.gate.data.uniform_(0.5, 1.5)
    x = torch.randn(2, C, *(pick(5, 9) for _ in range(dims)), generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    y = layer(x)
    wide = x.detach().double().requires_grad_()
    weight = layer.to_dense().detach().double().requires_grad_()
    want = DENSE[dims](wide, weight, layer.bias.detach().double() if bias else None, stride, padding, dilation)
    assert y.shape == want.shape
    grad = torch.randn(want.shape, generator=g, dtype=torch.float64)
    (y.double() * grad).sum().backward()
    (want * grad).sum().backward()
    blocks = weight.grad.flatten(2).movedim(2, 0)  # (taps, K, C) -> (kept, br, bc, taps)
    dweight = layout.from_dense(blocks).movedim(0, 3).reshape(layer.weight.shape)
    inside = layout.from_dense(layout.element_mask())
    errors = [error(y, want.detach()), error(x.grad, wide.grad)]
    tail = (1,) * dims
    if gate:
        parts = (dweight * layer.weight.detach()).flatten(1)  # the gradient of a gate is a sum over a block, in which much may cancel
        errors += [float((layer.gate.grad.double() - parts.sum(1)).abs().max() / parts.abs().sum(1).max().clamp_min(1e-30)) if layout.kept else 0.0]
        dweight = dweight * layer.gate.detach().view(-1, 1, 1, *tail)
    errors += [error(layer.weight.grad, dweight)]
    assert not bool(layer.weight.grad[(~inside).view(*inside.shape, *tail).expand_as(layer.weight)].any())
    if bias:
        errors += [error(layer.bias.grad, grad.sum((0, *range(2, dims + 2))))]
    return max(errors) / bound


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
def test_equals_torch(path):
    worst = {seed: random_case(seed) for seed in range(120 if path == "compiled" else 30)}
    assert max(worst.values()) <= 1, {seed: ratio for seed, ratio in worst.items() if ratio > 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_line_of_taps_is_one_matrix(path, dtype):
    """Against the dense weight, tap by tap: position p of line i in the columns of place 2 p of a window; for the input's gradient all turned around."""
    layout = Layout.from_mask(torch.tensor([[True, False, True], [False, True, True]]), (16, 8))
    layer = Conv2d(24, 32, (2, 3), layout, dilation=(1, 2), dtype=dtype)
    weight = torch.arange(1.0, layer.weight.numel() + 1, dtype=dtype).view(layer.weight.shape)  # no number twice
    dense = layout.to_dense(weight.flatten(3).movedim(3, 0)).view(2, 3, 32, 24)
    for side, there in zip(layer.sides, (dense, dense.flip(0, 1).mT), strict=True):
        blocks = conv._pack(weight.flatten(3), side, 2)
        outputs, inputs = there.shape[2:]
        for i in range(2):
            want = torch.zeros(outputs, 5, inputs, dtype=dtype)
            want[:, ::2] = there[i].movedim(0, 1)
            assert torch.equal(side.rows.to_dense(blocks[i]), want.flatten(1))
        assert torch.equal(conv._unpack(list(blocks), side, 6), weight.flatten(3))


def test_gradcheck(path):
    torch.manual_seed(0)
    layer = Conv2d(12, 8, (2, 3), patterns.random((8, 12), 8, 0.5, torch.Generator().manual_seed(0)), padding=1, dtype=torch.float64)
    x = torch.randn(1, 12, 3, 3, dtype=torch.float64, requires_grad=True)

    def f(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_initialisation_state_and_copies(tmp_path):
    torch.manual_seed(0)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, :10] = True
    layer = Conv2d(315, 30, 3, Layout.from_mask(mask, 16, (30, 315)))
    weight = layer.to_dense().detach()
    assert float(weight[:16, :160].abs().max()) <= (160 * 9) ** -0.5
    assert float(weight[:16, :160].std() * (3 * 160 * 9) ** 0.5) == pytest.approx(1, abs=0.02)
    assert not bool(weight[16:].any())
    assert not bool(layer.bias[16:].any())
    assert bool(layer.bias[:16].any())
    save_file(layer.state_dict(), tmp_path / "conv.safetensors")
    other = Conv2d(315, 30, 3, patterns.random((30, 315), 16, 0.3))
    other.load_state_dict(load_file(tmp_path / "conv.safetensors"))
    x = torch.randn(1, 315, 4, 4)
    assert torch.equal(layer(x), other(x))
    assert torch.allclose(copy.deepcopy(layer).double()(x.double()).float(), layer(x), atol=1e-5)
    assert torch.equal(layer(x[0]), layer(x)[0])


def test_the_costs_are_measured_once(monkeypatch, tmp_path):
    library = cpu.library()
    if library is None:
        pytest.skip("no C++ compiler on this machine")
    monkeypatch.setattr(conv, "measured", {})
    monkeypatch.setattr(conv.cpu, "library", lambda: SimpleNamespace(_name=str(tmp_path / "kernels.so")))
    monkeypatch.setattr(conv, "_measure", lambda *_: (0.25, 1.5))
    assert MEASURED(torch.float32, (32, 32), 9) == (0.25, 1.5)
    monkeypatch.setattr(conv, "_measure", lambda *_: (9.0, 9.0))
    assert MEASURED(torch.float32, (32, 32), 4) == (0.25, 1.5)  # in this process
    conv.measured.clear()
    assert MEASURED(torch.float32, (32, 32), 25) == (0.25, 1.5)  # and in the next
    monkeypatch.setattr(conv, "costs_of", MEASURED)
    x = torch.zeros(1, 256, 28, 28)
    for density, dense in ((0.25, False), (0.5, True)):  # (29 / 28)^2 (0.25 + 1.5 density): 0.67 and 1.07
        layer = Conv2d(256, 256, 3, patterns.balanced_random((256, 256), 32, density), padding=1)
        assert layer._dense_is_faster(x, [28, 28]) == dense
        assert layer.choice(28).startswith(f"{'dense' if dense else 'sparse'}: density {density:.3f}, forward and backward by products take")
    monkeypatch.setattr(conv, "_measure", lambda *_: (0.0, 1.0))  # forward alone has costs of its own
    assert " forward by products take 0.54 of" in layer.choice(28, 28, backward=False)
    with torch.no_grad():
        assert not layer._dense_is_faster(x, [28, 28])
    assert Conv2d(256, 256, 3, layer.layout, stride=2).choice(28).startswith("dense: density 0.500, products are for stride 1")


def test_measuring_leaves_the_generator_alone():
    before = torch.get_rng_state()
    with torch.no_grad():
        fixed, rising = conv._measure(torch.float32, (64, 64), 1, False)
    assert fixed + rising > 0
    assert torch.equal(before, torch.get_rng_state())


def test_the_layout_may_change():
    torch.manual_seed(0)
    layer = Conv1d(40, 24, 3, patterns.random((24, 40), 8, 0.5, torch.Generator().manual_seed(0)), padding=1)
    dynamic = DynamicSparsity(layer, torch.optim.SGD(layer.parameters(), 0.0), every=1, end=2, fraction=0.8)
    x = torch.randn(2, 40, 9)
    layer(x).square().sum().backward()
    dense = layer.to_dense().detach().requires_grad_()
    nn.functional.conv1d(x, dense, layer.bias.detach(), padding=1).square().sum().backward()
    scores = dense.grad.view(3, 8, 5, 8, 3).square().sum((1, 3, 4))
    assert torch.allclose(layer.dense_blocks(layer.probe.grad), scores, rtol=1e-3)
    old, weight = layer.layout, layer.to_dense().detach()
    assert dynamic.step()
    new = layer.layout
    assert new != old
    assert new.kept == old.kept
    assert float(scores[new.mask & ~old.mask].min()) > float(scores[~new.mask & ~old.mask].max())
    assert torch.equal(layer.to_dense().detach(), weight * (old & new).element_mask()[:, :, None])
    assert torch.allclose(layer(x), nn.functional.conv1d(x, layer.to_dense(), layer.bias, padding=1), atol=1e-5)


def test_the_dense_weight_is_kept_only_while_nothing_changes(chosen):
    """Without a gradient asked for, the dense form is made once, and again after every kind of change; training and copies hold none."""
    torch.manual_seed(0)
    layer = Conv2d(48, 32, 3, patterns.random((32, 48), 16, 0.6, torch.Generator().manual_seed(0)), padding=1, gate=True)
    x = torch.randn(2, 48, 5, 5)

    def check(layer):
        want = nn.functional.conv2d(x, layer.to_dense().detach(), layer.bias, padding=1)
        for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with mode():
                assert torch.allclose(layer(x), want, atol=1e-5)

    check(layer)
    if chosen == "dense":
        assert layer._filled() is not layer._filled()  # gradients are on
        with torch.no_grad():
            assert layer._filled() is layer._filled()
        assert copy.deepcopy(layer) not in conv._filled
        assert layer(x.clone().requires_grad_()).requires_grad
        assert layer not in conv._filled
    check(layer)
    other = copy.deepcopy(layer)
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), 1e-4).step()
    check(layer)
    check(other)
    for change in (
        lambda: layer.gate.mul_(2.0),
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: layer.set_layout(patterns.random((32, 48), 16, 0.4, torch.Generator().manual_seed(1))),
        lambda: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
        lambda: layer.requires_grad_(False),
    ):
        with torch.no_grad():
            change()
        check(layer)
    z = x.clone().requires_grad_()
    layer(z).sum().backward()  # frozen weights, whose dense form may have been made without gradients
    assert torch.allclose(z.grad[0], z.grad[1])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch.compile itself does to an autograd.Function
def test_compiles_whole():
    layer = Conv2d(16, 24, 3, patterns.random((24, 16), 8, 0.5, torch.Generator().manual_seed(0)), padding=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(compiled(x), layer(x))
    grads = [torch.autograd.grad(f(x).square().sum(), layer.parameters()) for f in (compiled, layer)]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 0, 1), (1, "same", 1)])
def test_edge_bias_by_counting(dims, stride, padding, dilation):
    """The outputs that see padding are those for which a convolution of ones gives less; two have the same gain where they miss the same positions."""
    size, g = (7, 6, 5)[:dims], torch.Generator().manual_seed(0)
    layer = EdgeBias(4, size, 3, stride, padding, dilation, dtype=torch.float64)
    with torch.no_grad():
        layer.gain.copy_(torch.rand(layer.gain.shape, generator=g))
        layer.bias.copy_(torch.rand(layer.bias.shape, generator=g))
    taps = 3**dims
    each = torch.eye(taps, dtype=torch.float64).view(taps, 1, *[3] * dims)  # one output channel a kernel position: 1 where it lies inside
    seen = DENSE[dims](torch.ones(1, 1, *size, dtype=torch.float64), each, None, stride, padding, dilation)[0].flatten(1).T  # (P, taps)
    kinds = {}
    for row in seen.tolist():
        if min(row) == 0:
            kinds.setdefault(tuple(row), len(kinds))
    assert layer.gain.shape == layer.bias.shape == (len(kinds), 4)
    if (dims, stride, padding, dilation) == (2, 1, 1, 1):
        assert len(kinds) == 8
    y = torch.randn(2, 4, *layer.size, generator=g, dtype=torch.float64)
    want = y.flatten(2).clone()
    for place, row in enumerate(seen.tolist()):
        if min(row) == 0:
            kind = kinds[tuple(row)]
            want[:, :, place] = want[:, :, place] * layer.gain[kind].detach() + layer.bias[kind].detach()
    assert torch.allclose(layer(y), want.view_as(y), rtol=1e-14)
    if len(kinds):
        inputs = (y.requires_grad_(), layer.gain.detach().requires_grad_(), layer.bias.detach().requires_grad_())
        assert torch.autograd.gradcheck(lambda y, gain, bias: torch.func.functional_call(layer, {"gain": gain, "bias": bias}, (y,)), inputs, fast_mode=True)


@pytest.mark.parametrize("faster", [True, False])
def test_another_dtype_than_the_weights(monkeypatch, faster):
    """The products read memory as the dtype of x: it must be the weight's."""
    monkeypatch.setattr(Conv2d, "_dense_is_faster", lambda *_: faster)
    layer = Conv2d(24, 16, 3, patterns.dense((16, 24), 8))
    with pytest.raises(ValueError, match=r"x: expected torch\.float32 as the weight has, got torch\.float64"):
        layer(torch.zeros(1, 24, 5, 5).double())
    with pytest.raises(ValueError, match=r"x: expected torch\.float64 as the weight has, got torch\.float32"):
        layer.double()(torch.zeros(1, 24, 5, 5))


def test_wrong_arguments():
    layout = patterns.dense((16, 24), 8)
    for call, message in (
        (lambda: Conv2d(16, 24, 3, layout), r"layout: expected \(24, 16\) without heads, output by input channels"),
        (lambda: Conv2d(24, 16, 3, layout.mask), "layout: expected a Layout, got Tensor"),
        (lambda: Conv2d(24, 16, (3, 3, 3), layout), "kernel_size: expected an int or 2 ints, each at least 1"),
        (lambda: Conv2d(24, 16, 3, layout, stride=0), "stride: expected an int or 2 ints, each at least 1, got 0"),
        (lambda: Conv2d(24, 16, 3, layout, stride=2, padding="same"), 'padding: "same" needs stride 1'),
        (lambda: Conv2d(24, 16, 3, layout, padding="full"), "padding: expected ints"),
        (lambda: Conv2d(24, 16, 3, layout, padding=-1), "padding: expected an int or 2 ints, each at least 0"),
        (lambda: Conv2d(24, 16, 3, layout)(torch.zeros(1, 16, 5, 5)), r"x: expected \(batch, 24, 2 sizes\), got \(1, 16, 5, 5\)"),
        (lambda: Conv2d(24, 16, 3, layout)(torch.zeros(1, 24, 2, 5)), r"x: expected sizes that hold the kernel \(3, 3\)"),
        (lambda: Conv2d(24, 16, 3, layout)([1.0]), "x: expected a tensor, got list"),
        (lambda: Conv2d(24, 16, 3, layout)(torch.zeros(1, 24, 5, 5, device="meta")), "x: expected a strided tensor on cpu, .* got torch.strided on meta"),
        (lambda: EdgeBias(4, (5,), 3, padding=1)(torch.zeros(1, 4, 5).double()), "y: expected torch.float32 as the weight has, got torch.float64"),
        (lambda: EdgeBias(4, (5, 5, 5, 5), 3), "input_size: expected 1 to 3 sizes"),
        (lambda: EdgeBias(4, (2,), 3), "input_size: expected sizes that hold the kernel"),
        (lambda: EdgeBias(4, (5,), 3)(torch.zeros(1, 4, 5)), r"y: expected \(batch, 4, 3\), got \(1, 4, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
