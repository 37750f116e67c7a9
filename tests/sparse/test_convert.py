import math

import pytest
import torch

from onetorch.sparse import Layout, Linear, attention, from_bsr, patterns, to_bsr
from onetorch.sparse.convert import from_block_mask, from_blocksparse, from_scipy, to_block_mask, to_blocksparse, to_scipy


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_bsr():
    layout = patterns.random((64, 96), (16, 32), 0.4, torch.Generator().manual_seed(0))
    values = torch.randn(layout.values_shape)
    bsr = to_bsr(values, layout)
    torch._validate_sparse_bsr_tensor_args(bsr.crow_indices(), bsr.col_indices(), bsr.values(), bsr.shape)
    assert torch.equal(bsr.to_dense(), layout.to_dense(values))
    again, same = from_bsr(bsr)
    assert same == layout
    assert torch.equal(again, values)
    with pytest.raises(ValueError, match="BSR needs one matrix of whole blocks"):
        to_bsr(values, Layout.from_mask(layout.mask, layout.block, (60, 96)))
    with pytest.raises(ValueError, match="tensor: expected a sparse BSR matrix"):
        from_bsr(torch.zeros(3, 3))


def test_scipy():
    sparse = pytest.importorskip("scipy.sparse")
    layout = patterns.random((64, 96), (16, 32), 0.4, torch.Generator().manual_seed(0))
    values = torch.randn(layout.values_shape)
    matrix = sparse.bsr_array(to_scipy(values, layout), shape=layout.shape)
    matrix.check_format()
    assert torch.equal(torch.from_numpy(matrix.toarray()), layout.to_dense(values))
    again, same = from_scipy(matrix)
    assert same == layout
    assert torch.equal(again, values)
    twice = sparse.bsr_matrix((matrix.data[[0, 0, 1]], [1, 1, 0], [0, 3, 3, 3, 3]), shape=layout.shape)  # not sorted, and one block stands twice
    values, layout = from_scipy(twice)
    assert torch.equal(layout.to_dense(values), torch.from_numpy(twice.toarray()))
    assert layout.kept == 2
    with pytest.raises(ValueError, match=r"matrix: expected a scipy BSR matrix, got csr_array; matrix.tobsr\(blocksize\) makes one"):
        from_scipy(matrix.tocsr())
    with pytest.raises(ValueError, match="BSR needs one matrix of whole blocks"):
        to_scipy(torch.randn(layout.values_shape), Layout.from_mask(layout.mask, layout.block, (60, 96)))


@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
@pytest.mark.parametrize("heads", [None, 2])
def test_block_mask(heads):
    """FlexAttention with the converted mask attends as ours does, and its own masks come back."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    g = torch.Generator().manual_seed(0)
    layout = Layout.from_mask(torch.rand(*([heads] if heads else []), 5, 5, generator=g) < 0.6, 16, 70)
    allowed = torch.rand(70, 70, generator=g) < 0.7
    mask = layout.from_dense(allowed.expand(*([heads] if heads else []), 70, 70))
    q, k, v = (torch.randn(1, 2, 70, 16, generator=g) for _ in range(3))
    theirs = to_block_mask(layout, causal=True, mask=mask)
    got = flex_attention(q, k, v, block_mask=theirs)
    want = attention(q, k, v, layout, causal=True, mask=mask)
    sees = (layout.element_mask() & allowed & torch.ones(70, 70, dtype=torch.bool).tril()).any(-1).expand(2, 70)
    assert torch.allclose(got[0, sees], want[0, sees], atol=1e-5)
    assert torch.equal(theirs.to_dense()[0].bool(), layout.mask.view(-1, 5, 5))
    again, elements = from_block_mask(theirs)
    assert again == layout
    causal = layout.from_dense(torch.ones(70, 70, dtype=torch.bool).tril().expand(*([heads] if heads else []), 70, 70))
    assert torch.equal(elements, mask & causal)

    window = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 20 + 13 * h), None, heads, 100, 100, device="cpu", BLOCK_SIZE=(16, 32))
    layout, mask = from_block_mask(window)  # some blocks are full, some are not
    at = torch.arange(100)
    band = torch.stack([(at[:, None] >= at) & (at[:, None] - at < 20 + 13 * h) for h in range(heads or 1)])
    q, k, v = (torch.randn(1, 2, 100, 16, generator=g) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, band)
    assert torch.allclose(attention(q, k, v, layout, mask=mask), want, atol=1e-5)
    assert layout.heads == heads

    differs = create_block_mask(lambda b, h, q, k: q - 50 * b >= k, 2, None, 100, 100, device="cpu", BLOCK_SIZE=32)
    with pytest.raises(ValueError, match="block_mask: expected the same blocks for the whole batch, got 2 that differ"):
        from_block_mask(differs)
    with pytest.raises(ValueError, match="mask: expected"):
        to_block_mask(layout, mask=mask.float())


def z_curve(x, y):
    return sum((x >> n & 1) << 2 * n | (y >> n & 1) << 2 * n + 1 for n in range(8))


@pytest.mark.parametrize("z_order", [True, False])
def test_openai_blocksparse(z_order):
    """Their order, block by block: (input, output) pairs along the z curve, or by output and then input; each block with its inputs down."""
    layout = patterns.random((40, 56), 8, 0.5, torch.Generator().manual_seed(0))
    layer = Linear(56, 40, layout, bias=False)
    weight, theirs = to_blocksparse(layer.weight.detach(), layout, z_order=z_order)
    assert theirs.shape == (7, 5)
    pairs = sorted(map(tuple, theirs.nonzero().tolist()), key=lambda p: z_curve(*p) if z_order else (p[1], p[0]))
    x = torch.randn(3, 56)
    y = torch.zeros(3, 40)
    for w, (c, k) in zip(weight, pairs, strict=True):
        y[:, 8 * k : 8 * k + 8] += x[:, 8 * c : 8 * c + 8] @ w
    assert torch.allclose(y, layer(x).detach(), atol=1e-5)
    values, again = from_blocksparse(weight, theirs, z_order=z_order)
    assert again == layout
    assert torch.equal(values, layer.weight.detach())
    with pytest.raises(ValueError, match=r"weight: expected \(kept, b, b\)"):
        from_blocksparse(weight[1:], theirs)
    with pytest.raises(ValueError, match="layout: openai/blocksparse has square blocks"):
        to_blocksparse(torch.zeros(1, 8, 16), Layout.from_mask(torch.ones(1, 1, dtype=torch.bool), (8, 16)))
    assert math.prod(weight.shape) == layer.weight.numel()


def test_wrong_arguments():
    layout = patterns.dense((16, 24), 8)
    values = torch.zeros(6, 8, 8)
    for call, message in (
        (lambda: to_bsr(values[:5], layout), r"values: expected \(\.\.\., 6, 8, 8\)"),
        (lambda: to_bsr(values[None], layout), r"values: expected \(6, 8, 8\), one set, got \(1, 6, 8, 8\)"),
        (lambda: to_bsr(1.0, layout), "values: expected a tensor, got float"),
        (lambda: to_bsr(values, layout.mask), "layout: expected a Layout, got Tensor"),
        (lambda: to_scipy(values[:, :4], layout), r"values: expected \(\.\.\., 6, 8, 8\)"),
        (lambda: to_scipy(values.bfloat16(), layout), "values: numpy has no bfloat16"),
        (lambda: from_bsr(1.0), "tensor: expected a sparse BSR matrix, got float"),
        (lambda: from_block_mask(values), "block_mask: expected a BlockMask, got Tensor"),
        (lambda: to_block_mask(layout, mask=[True]), r"mask: expected \(6, 8, 8\) bool on cpu, got list"),
        (lambda: from_blocksparse(values, layout.mask.numpy()), "their_layout: expected a tensor, got ndarray"),
        (lambda: from_blocksparse(values.to("meta"), layout.mask), "weight: expected a strided tensor that has values"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
