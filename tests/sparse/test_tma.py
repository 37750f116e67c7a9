"""The products through TMA, in Triton's interpreter: test_gpu.py runs this file in a process of its own."""

import os

import pytest
import torch

from onetorch.sparse import Layout, costs, dds, dsd, products, sdd

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="test_gpu.py runs it through Triton's interpreter")
BLOCKS = [32, 64, 128, (32, 128), (64, 32)]


@pytest.fixture
def taken(monkeypatch):
    """As on a GPU of one multiprocessor where TMA always is the faster; what was called, in order."""
    from onetorch.sparse import gpu

    names: list[str] = []

    def noted(name, kernel):
        return lambda *arguments: names.append(name) or kernel(*arguments)

    for name in ("dds_pointer", "dds_tma", "sdd_pointer", "sdd_tma"):
        monkeypatch.setattr(gpu, name, noted(name, getattr(gpu, name)))
    monkeypatch.setattr(products, "_kernels", lambda x: gpu)
    monkeypatch.setattr(gpu, "_hopper", lambda device: ("the interpreter", 1))
    monkeypatch.setattr(costs, "tma_is_faster", lambda key, version, pointer, tma: True)
    return names


def near(got, want):
    """Bound of bfloat16: half a unit in the last place of the largest number, and the rounding of what came in."""
    assert (got.double() - want).abs().max() <= 2**-7 * want.abs().max()


def case(block, shape=None, heads=None, batch=2, tokens=37, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(*([heads] if heads else []), 3, 2, generator=g) < 0.7
    layout = Layout.from_mask(mask, block, shape)
    lead = (batch, heads) if heads else (batch,)
    x, y = (torch.randn(*lead, tokens, size, generator=g).to(dtype) for size in layout.shape)
    return layout, torch.randn(layout.values_shape, generator=g).to(dtype), x, y


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_forward_and_gradients(taken, block, heads):
    """x S, y S^T and the gradients of both, tokens that fill no tile."""
    layout, values, x, y = case(block, heads=heads)
    dense = layout.to_dense(values.double())
    for transpose, (a, grad), right in ((False, (x, y), dense), (True, (y, x), dense.mT)):
        a, v = a.clone().requires_grad_(), values.clone().requires_grad_()
        out = dds(a, v, layout, transpose_sparse=transpose)
        near(out, a.double() @ right)
        da, dv = torch.autograd.grad(out, (a, v), grad)
        near(da, grad.double() @ right.mT)
        near(dv, layout.from_dense((x.double().mT @ y.double()).sum(0)))
    assert set(taken) == {"dds_tma", "sdd_tma"}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_transposed_operands(taken, block):
    layout, values, x, y = case(block, tokens=40)
    dense = layout.to_dense(values.double())
    near(dds(x.mT.contiguous(), values, layout, transpose_dense=True), x.double() @ dense)
    near(dsd(values, y.mT.contiguous(), layout), dense @ y.double().mT)
    near(dsd(values, x.mT.contiguous(), layout, transpose_sparse=True), dense.mT @ x.double().mT)
    want = layout.from_dense(x.double().mT @ y.double())
    for ta in (False, True):
        for tb in (False, True):
            near(sdd(x if ta else x.mT.contiguous(), y.mT.contiguous() if tb else y, layout, transpose_a=ta, transpose_b=tb), want)
    assert taken == ["dds_tma"] * 3 + ["sdd_tma"] * 4


def test_edges_bias_and_one_set_of_values_each(taken):
    """The last column of blocks reaches over the edge, where the values hold NaN; the last row too, of a result of sdd."""
    layout, values, x, _ = case(32, (96, 56), tokens=5)
    own = torch.stack([values, -values])
    own[:, layout.columns == 1, :, 24:] = torch.nan
    bias = torch.linspace(-1, 1, 56).bfloat16()
    near(dds(x, own, layout, bias=bias), x.double() @ layout.to_dense(own.double()) + bias.double())
    layout, _, x, y = case(64, (136, 72), tokens=70)
    got = sdd(x.mT, y, layout)
    near(got, layout.from_dense(x.double().mT @ y.double()))
    assert not got[:, ~layout.from_dense(layout.element_mask()).bool()].any()  # beyond the edge exact zeros
    assert taken == ["dds_tma", "sdd_tma"]


def test_unused_blocks_are_never_read(taken):
    layout = Layout.from_mask(torch.tensor([[1, 0], [0, 0], [1, 1]]).bool(), 32)
    x, values = torch.randn(3, 96), torch.randn(layout.values_shape)
    x, values = x.half(), values.half()
    want = dds(x, values, layout)
    x[:, 32:64] = torch.nan
    assert torch.equal(dds(x, values, layout), want)
    assert set(taken) == {"dds_tma"}


def test_bit_identical_however_many_programs_share_the_tiles(taken, monkeypatch):
    from onetorch.sparse import gpu

    layout, values, x, y = case(64, tokens=150)
    results = []
    for programs in (1, 1, 3, 100):
        monkeypatch.setattr(gpu, "_programs", lambda tiles, shared, device, programs=programs: min(tiles, programs))
        results.append((dds(x, values, layout), dds(y, values, layout, transpose_sparse=True), sdd(x.mT, y, layout)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert set(taken) == {"dds_tma", "sdd_tma"}


def misplaced(x):
    """The same numbers, one further in memory than a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


@pytest.mark.parametrize(
    ("why", "block", "shape", "dtype", "tokens", "change"),
    [
        ("the dtype", 32, (96, 64), torch.float32, 8, lambda x: x),
        ("the block", 16, (48, 32), torch.float16, 8, lambda x: x),
        ("the rows, an edge within the sum", 32, (88, 64), torch.float16, 8, lambda x: x),
        ("the address", 32, (96, 64), torch.float16, 8, misplaced),
        ("the stride, an odd number of tokens", 32, (96, 64), torch.float16, 7, lambda x: x.mT.contiguous().mT),
        ("no dense dimension", 32, (96, 64), torch.float16, 8, lambda x: x.repeat_interleave(2, -1)[..., ::2]),
        ("no batch in memory", 32, (96, 64), torch.float16, 8, lambda x: x[:1].expand_as(x)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pointers_where_tma_cannot_work(taken, why, block, shape, dtype, tokens, change):
    layout, values, x, _ = case(block, shape, tokens=tokens, dtype=dtype)
    x = change(x)
    near(dds(x, values, layout), x.double() @ layout.to_dense(values.double()))
    assert taken == ["dds_pointer"], why
