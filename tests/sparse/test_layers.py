import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from onetorch.sparse import MLP, Conv2d, Layout, Linear, Projection, patterns


def layer(bias=True, shape=(100, 72), block=(16, 8), seed=0, dtype=None):
    torch.manual_seed(seed)
    mask = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) < 0.5
    return Linear(shape[1], shape[0], Layout.from_mask(mask, block, shape), bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_is_a_linear_layer_with_zeros(path, bias):
    sparse = layer(bias)
    dense = sparse.to_linear()
    assert torch.equal(dense.weight == 0, ~sparse.layout.element_mask())
    assert torch.equal(sparse.to_dense(), dense.weight)
    x = torch.randn(3, 5, 72)
    assert torch.allclose(sparse(x), dense(x), atol=1e-5)
    assert torch.allclose(sparse(x[0, 0]), dense(x[0, 0]), atol=1e-5)
    sparse(x).square().sum().backward()
    dense(x).square().sum().backward()
    assert torch.allclose(sparse.layout.to_dense(sparse.weight.grad), dense.weight.grad * sparse.layout.element_mask(), rtol=1e-4, atol=1e-4)
    if bias:
        assert torch.allclose(sparse.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)


def test_from_linear_and_back():
    dense = nn.Linear(72, 100)
    full = Linear.from_linear(dense, patterns.dense((100, 72), 8))
    again = full.to_linear()
    assert torch.equal(again.weight, dense.weight)
    assert torch.equal(again.bias, dense.bias)


def test_it_learns(path):
    """A least-squares problem whose solution has the layout's zeros."""
    sparse = layer(False, (32, 48), (8, 8))
    truth = torch.randn(32, 48) * sparse.layout.element_mask()
    x = torch.randn(200, 48)
    optimizer = torch.optim.Adam(sparse.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (sparse(x) - x @ truth.T).square().mean().backward()
        optimizer.step()
    assert float((sparse.to_dense().detach() - truth).abs().max()) < 1e-2


def test_initialisation_is_scaled_to_the_inputs_that_are_there():
    torch.manual_seed(0)
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[0], mask[1, :10] = True, True  # 1276 inputs, 320 inputs, none
    sparse = Linear(1276, 96, Layout.from_mask(mask, 32, (96, 1276)))
    assert sparse.fan_in().tolist() == [1276] * 32 + [320] * 32 + [0] * 32
    weight = sparse.to_dense().detach()
    for rows, inputs in ((slice(0, 32), 1276), (slice(32, 64), 320)):
        part = weight[rows][weight[rows] != 0]
        assert float(part.abs().max()) <= inputs**-0.5
        assert float(part.std() * (3 * inputs) ** 0.5) == pytest.approx(1, abs=0.02)  # uniform on (-s, s): s / sqrt(3)
    assert not bool(sparse.bias[64:].any())
    assert bool(sparse.bias[:64].any())
    assert not bool(sparse.weight[mask.nonzero()[:, 1] == 39][:, :, 28:].any())  # beyond the edge


def test_identity():
    layout = patterns.banded(40, 16, 1)
    sparse = Linear(40, 40, layout).identity_()
    x = torch.randn(3, 40)
    assert torch.equal(sparse(x), x)
    with pytest.raises(ValueError, match="identity needs the blocks of the diagonal"):
        Linear(16, 16, Layout.from_mask(torch.tensor([[True, True], [True, False]]), 8)).identity_()


@pytest.mark.parametrize("block", [16, (16, 32), (32, 16)], ids=str)
def test_orthogonal(block):
    torch.manual_seed(0)
    layout = patterns.balanced_random((256, 256), block, 0.25)
    sparse = Linear(256, 256, layout).orthogonal_(gain=2.0)
    norms = sparse.to_dense().detach().square().sum(1)
    assert float(norms.mean()) == pytest.approx(4.0, rel=1e-5)
    if layout.block[0] <= layout.block[1]:
        assert torch.allclose(norms, torch.full((256,), 4.0), rtol=1e-4)
    basis = sparse.weight[0] if layout.block[0] <= layout.block[1] else sparse.weight[0].T
    gram = basis @ basis.T
    assert torch.allclose(gram / gram[0, 0], torch.eye(min(layout.block)), atol=1e-5)


def test_state_travels_through_safetensors(tmp_path):
    a, b = layer(seed=1), layer(seed=1)
    with torch.no_grad():
        b.weight.zero_()
    save_file(a.state_dict(), tmp_path / "layer.safetensors")
    b.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(a.to_dense(), b.to_dense())


def test_the_layout_is_loaded_with_the_weights():
    a, b = layer(seed=1), layer(seed=2)
    assert a.layout != b.layout
    assert a.layout.kept != b.layout.kept
    parameter = b.weight
    b.load_state_dict(a.state_dict())
    assert b.weight is parameter
    assert b.layout == a.layout
    x = torch.randn(3, 72)
    assert torch.equal(a(x), b(x))
    c = Linear(72, 100, layer(seed=2).layout, device="meta")
    c.load_state_dict(a.state_dict(), assign=True)
    assert torch.equal(a(x), c(x))
    with pytest.raises(ValueError, match=r"layout_mask: expected weights of \(7, 9\) blocks of \(16, 8\), got those of \(13, 5\) blocks of \(8, 16\)"):
        b.load_state_dict(layer(block=(8, 16)).state_dict())
    broken = a.state_dict()
    broken["weight"] = broken["weight"][1:]
    with pytest.raises(ValueError, match=r"weight: expected the .* blocks of layout_mask, got"):
        layer(seed=3).load_state_dict(broken)


def test_parameters_that_are_yet_to_come():
    """On meta a layer has no numbers, but knows its blocks."""
    want = layer(seed=1)
    empty = Linear(72, 100, want.layout, device="meta")
    assert empty.weight.is_meta
    assert empty.bias.is_meta
    assert empty.layout == want.layout
    filled = empty.to_empty(device="cpu")
    assert torch.equal(filled.layout_mask, want.layout.mask)
    filled.reset_parameters()
    filled.load_state_dict(want.state_dict())
    x = torch.randn(3, 72)
    assert torch.equal(filled(x), want(x))
    conv = Conv2d(72, 100, 3, want.layout, device="meta").to_empty(device="cpu")
    conv.reset_parameters()
    assert conv(torch.randn(1, 72, 5, 5)).shape == (1, 100, 3, 3)


def test_moves_and_copies():
    sparse = layer()
    assert layer(dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    moved = copy.deepcopy(sparse).double()
    x = torch.randn(4, 72)
    assert torch.allclose(moved(x.double()).float(), sparse(x), atol=1e-5)
    assert moved.layout == sparse.layout
    assert moved.layout_mask.dtype == torch.bool
    assert sum(p.numel() for p in sparse.parameters()) == sparse.layout.kept * 128 + 100
    assert "density" in repr(sparse)


def test_gates_and_their_gradient(path):
    """A gate multiplies its block; its gradient is the sum of weight times dense gradient over the block; a gate of 0 is a block that is not there."""
    torch.manual_seed(0)
    layout = patterns.random((40, 72), (8, 16), 0.5, torch.Generator().manual_seed(0))
    gated = Linear(72, 40, layout, dtype=torch.float64, gate=True)
    plain = Linear(72, 40, layout, dtype=torch.float64)
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if name != "gate"})
    x = torch.randn(5, 72, dtype=torch.float64)
    assert torch.equal(gated(x), plain(x))
    with torch.no_grad():
        gated.gate.uniform_(0.5, 1.5)[::3] = 0.0
        plain.weight.mul_(gated.gate.view(-1, 1, 1))
    assert torch.equal(gated.to_dense(), plain.to_dense())
    gated(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert torch.allclose(gated.gate.grad, (plain.weight.grad * gated.weight.detach()).sum((1, 2)), rtol=1e-10)
    assert torch.allclose(gated.weight.grad, plain.weight.grad * gated.gate.detach().view(-1, 1, 1), rtol=1e-12)
    mask = layout.mask.clone()
    mask[layout.mask] = gated.gate.detach() != 0
    gated.set_layout(Layout.from_mask(mask, (8, 16), (40, 72)))
    assert torch.allclose(gated(x), plain(x), rtol=1e-12)
    assert gated.gate.shape == (gated.layout.kept,)
    assert bool((gated.gate != 0).all())


def test_mlp(path):
    torch.manual_seed(0)
    up, down = patterns.random((96, 40), 8, 0.5), patterns.random((40, 96), 8, 0.5)
    mlp = MLP(40, 96, up, down, torch.tanh, dtype=torch.float64)
    x = torch.randn(3, 40, dtype=torch.float64)
    want = mlp.down.to_dense() @ torch.tanh(mlp.up.to_dense() @ x.T + mlp.up.bias[:, None]) + mlp.down.bias[:, None]
    assert torch.allclose(mlp(x), want.T, rtol=1e-12)
    with pytest.raises(ValueError, match=r"layout: expected \(40, 96\)"):
        MLP(40, 96, up, up)


def test_projection():
    torch.manual_seed(0)
    x, y = torch.randn(3, 40, dtype=torch.float64, requires_grad=True), torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    narrow = Projection(40, count=10, generator=torch.Generator().manual_seed(1))
    at = narrow.index.tolist()
    assert at == sorted(set(at))
    select = torch.zeros(10, 40, dtype=torch.float64)
    select[range(10), at] = 1.0  # the same as matrices
    assert torch.equal(narrow.gather(x), x @ select.T)
    assert torch.equal(narrow.scatter(y), y @ select)
    assert torch.equal(narrow.scatter_add(x, y), x + y @ select)
    assert torch.equal(narrow.scatter_mul(x, y), x * (y @ select + (1 - select.sum(0))))
    for f, inputs in ((narrow.gather, (x,)), (narrow.scatter, (y,)), (narrow.scatter_add, (x, y)), (narrow.scatter_mul, (x, y))):
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert Projection(40, stride=16).index.tolist() == [0, 16, 32]
    assert Projection(4, index=torch.tensor([3, 1])).gather(torch.arange(4)).tolist() == [3, 1]
    for arguments, message in (
        ({}, "index, count, stride: expected exactly one"),
        ({"count": 41}, r"count: expected 1\.\.40, got 41"),
        ({"stride": 0}, r"stride: expected 1\.\.40, got 0"),
        ({"index": torch.tensor([1, 1])}, r"index: expected different int64 entries in 0\.\.39"),
        ({"index": torch.tensor([40])}, r"index: expected different int64 entries in 0\.\.39"),
    ):
        with pytest.raises(ValueError, match=message):
            Projection(40, **arguments)
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 40\), got \(3, 10\)"):
        narrow.gather(y)
    with pytest.raises(ValueError, match=r"y: expected leading dimensions \(3,\) as x has, got \(2, 10\)"):
        narrow.scatter_add(x, y[:2])
    with pytest.raises(ValueError, match=r"y: expected torch\.float64 as x has, got torch\.int64"):
        narrow.scatter_mul(x, y.long())
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 40\), got list"):
        narrow.scatter_add([1.0], y)
    with pytest.raises(ValueError, match=r"stride: expected 1\.\.8, got 1\.5"):
        Projection(8, stride=1.5)


def test_wrong_arguments():
    layout = patterns.dense((64, 32), 8)
    with pytest.raises(ValueError, match=r"layout: expected \(32, 64\) without heads, outputs by inputs"):
        Linear(64, 32, layout)
    with pytest.raises(ValueError, match="layout: expected a Layout, got Tensor"):
        Linear(32, 64, layout.mask)
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got torch\.complex64"):
        Linear(32, 64, layout, dtype=torch.complex64)
    with pytest.raises(ValueError, match="x: expected a tensor, got list"):
        Linear(32, 64, layout)([1.0])
    with pytest.raises(ValueError, match=r"linear: expected an nn\.Linear, got Linear"):
        Linear.from_linear(Linear(32, 64, layout), layout)
