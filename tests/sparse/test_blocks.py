import pytest
import torch

from onetorch.sparse import Layout, attention, blocks, dsd, patterns, reference, sdd, softmax, sss

BOUND = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@torch.no_grad()
def error(got, want):
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)) if want.numel() else 0.0


def random_layout(g, R, C, block, heads=None, cut=(0, 0)):
    shape = (R * block[0] - cut[0], C * block[1] - cut[1])
    return Layout.from_mask(torch.rand(*([heads] if heads else []), R, C, generator=g) < 0.5, block, shape)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("heads", [None, 3])
def test_softmax_equals_the_dense_one(dtype, heads):
    g = torch.Generator().manual_seed(0)
    for block, cut in (((8, 16), (0, 0)), ((16, 8), (5, 3)), ((32, 32), (31, 1))):
        layout = random_layout(g, 4, 5, block, heads, cut)
        x = (3 * torch.randn(2, *layout.values_shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
        full = torch.rand(*([heads] if heads else []), *layout.shape, generator=g) < 0.8
        for mask in (None, layout.from_dense(full)):
            keep = (layout.element_mask() if mask is None else layout.element_mask() & full).view(-1, *layout.shape)
            y = softmax(x, layout, scale=0.5, mask=mask)
            assert y.dtype == dtype
            grad = torch.randn(y.shape, generator=g, dtype=torch.float64)
            (dx,) = torch.autograd.grad((y.double() * grad).sum(), x)
            for n in range(2):
                scores = (0.5 * reference.to_dense(x[n].detach(), layout)).requires_grad_()
                want = torch.softmax(scores.masked_fill(~keep, -torch.inf), -1).masked_fill(~keep.any(-1, keepdim=True), 0.0)
                inside = layout.from_dense(layout.element_mask())
                (want * reference.to_dense(grad[n] * inside, layout)).nan_to_num(0.0).sum().backward()
                assert error(y[n], reference.sample(want.detach(), layout)) <= BOUND[dtype]
                assert error(dx[n], 0.5 * reference.sample(scores.grad.nan_to_num(0.0), layout)) <= 2 * BOUND[dtype]
                assert not bool(y[n][~inside].any())


def test_softmax_to_second_order_and_under_vmap():
    g = torch.Generator().manual_seed(0)
    layout = random_layout(g, 2, 3, (8, 8), None, (3, 2))
    mask = torch.rand(layout.values_shape, generator=g) < 0.8
    x = torch.randn(layout.values_shape, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: softmax(x, layout, mask=mask), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: softmax(x, layout, scale=2.0, mask=mask), x, fast_mode=True)
    many = torch.randn(3, *layout.values_shape, generator=g, dtype=torch.float64)
    assert torch.allclose(torch.func.vmap(lambda x: softmax(x, layout))(many), softmax(many, layout), rtol=1e-14)
    grads = torch.func.vmap(torch.func.grad(lambda x: softmax(x, layout).square().sum()))(many)
    for n in range(3):
        one = many[n].clone().requires_grad_()
        assert torch.allclose(grads[n], torch.autograd.grad(softmax(one, layout).square().sum(), one)[0], rtol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch.compile itself does with any autograd.Function
def test_softmax_compiles_whole():
    layout = patterns.local(64, 16, 24)
    x = torch.randn(2, *layout.values_shape, requires_grad=True)
    compiled = torch.compile(lambda x: softmax(x, layout).square().sum(), fullgraph=True, backend="aot_eager")
    assert torch.allclose(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(softmax(x, layout).square().sum(), x)[0], rtol=1e-6)


def test_pieces_make_attention(path):
    g = torch.Generator().manual_seed(0)
    layout = patterns.local(40, 8, 12)
    q, k, v = (torch.randn(2, 3, 40, 8, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    causal = layout.from_dense(torch.ones(40, 40, dtype=torch.bool).tril())
    pieces = dsd(softmax(sdd(q, k, layout, transpose_b=True), layout, scale=8**-0.5, mask=causal), v, layout)
    fused = attention(q, k, v, layout, causal=True)
    assert error(pieces, fused.detach()) <= 1e-12
    for a, b in zip(torch.autograd.grad(pieces.square().sum(), (q, k, v)), torch.autograd.grad(fused.square().sum(), (q, k, v)), strict=True):
        assert error(a, b) <= 1e-12


def test_softmax_of_nothing_and_of_large_numbers():
    empty = Layout.from_mask(torch.zeros(2, 2, dtype=torch.bool), 8)
    assert softmax(torch.zeros(3, *empty.values_shape), empty).shape == (3, 0, 8, 8)
    layout = Layout.from_mask(torch.tensor([[True, True], [True, False]]), 8)
    x = torch.full(layout.values_shape, 1e4)
    x[0, :, 0] = 2e4
    y = softmax(x, layout)
    assert torch.equal(y[0, :, 0], torch.ones(8))
    assert torch.equal(y[2], torch.full((8, 8), 0.125))
    assert not bool(softmax(x, layout, mask=torch.zeros(layout.values_shape, dtype=torch.bool)).any())


def random_product(seed):
    g = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=g))

    dtype = list(BOUND)[seed % 4]
    br, bk, bc = (8 << pick(0, 3) for _ in range(3))
    R, K, C, heads = pick(1, 5), pick(1, 5), pick(1, 5), (None, 2)[pick(0, 2)]
    rows, inner, columns = R * br - pick(0, br), K * bk - pick(0, bk), C * bc - pick(0, bc)
    lead = (heads,) if heads else ()
    a_layout = Layout.from_mask(torch.rand(*lead, R, K, generator=g) < 0.5, (br, bk), (rows, inner))
    b_layout = Layout.from_mask(torch.rand(*lead, K, C, generator=g) < 0.5, (bk, bc), (inner, columns))
    given = Layout.from_mask(torch.rand(*lead, R, C, generator=g) < 0.5, (br, bc), (rows, columns)) if pick(0, 2) else None
    batch = [(), (2,)][pick(0, 2)]
    a, b = (torch.randn(*batch, *layout.values_shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for layout in (a_layout, b_layout))
    values, layout = sss(a, b, a_layout, b_layout, given)
    grad = torch.randn(values.shape, generator=g, dtype=torch.float64)
    da, db = torch.autograd.grad((values.double() * grad).sum(), (a, b))
    errors = []
    for n in range(batch[0] if batch else 1):
        one = [(t[n] if batch else t).detach() for t in (a, b, values, grad, da, db)]
        left, right = (reference.to_dense(t, of).requires_grad_() for t, of in zip(one[:2], (a_layout, b_layout), strict=True))
        want = left @ right
        weight = reference.to_dense(one[3], layout)
        (want * weight).sum().backward()
        errors += [error(one[2], reference.sample(want, layout))]
        errors += [error(one[4], reference.sample(left.grad, a_layout)), error(one[5], reference.sample(right.grad, b_layout))]
        if given is None:
            assert not bool((want.detach() != 0).view(-1, *layout.shape)[~layout.element_mask().view(-1, *layout.shape)].any())
    return max(errors) / BOUND[dtype]


def test_sparse_times_sparse():
    worst = {seed: random_product(seed) for seed in range(200)}
    assert max(worst.values()) <= 1, {seed: ratio for seed, ratio in worst.items() if ratio > 1}


def test_sparse_times_sparse_in_chunks_and_to_second_order(monkeypatch):
    g = torch.Generator().manual_seed(0)
    a_layout, b_layout = random_layout(g, 3, 4, (8, 8)), random_layout(g, 4, 2, (8, 16))
    a, b = (torch.randn(layout.values_shape, generator=g, dtype=torch.float64, requires_grad=True) for layout in (a_layout, b_layout))
    want = sss(a, b, a_layout, b_layout)[0]
    monkeypatch.setattr(blocks, "CHUNK", 700)
    assert torch.allclose(sss(a, b, a_layout, b_layout)[0], want, rtol=1e-14)
    assert torch.autograd.gradcheck(lambda a, b: sss(a, b, a_layout, b_layout)[0], (a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda a, b: sss(a, b, a_layout, b_layout)[0], (a, b), fast_mode=True)


def test_sparse_times_sparse_under_autocast():
    """Sums are carried in float32."""
    layout, other = patterns.dense((16, 24), 8), patterns.dense((24, 8), 8)
    a, b = torch.randn(layout.values_shape), torch.randn(other.values_shape)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = sss(a, b, layout, other)
    assert torch.equal(values, sss(a, b, layout, other)[0])


def test_wrong_arguments():
    layout, other = patterns.dense((16, 24), 8), patterns.dense((24, 8), 8)
    a, b = torch.zeros(layout.values_shape), torch.zeros(other.values_shape)
    for call, message in (
        (lambda: softmax(a[1:], layout), r"values: expected \(\.\.\., 6, 8, 8\)"),
        (lambda: softmax(a.long(), layout), "values: expected one of"),
        (lambda: softmax(a, layout, mask=torch.ones(6, 8, 8)), r"mask: expected \(6, 8, 8\) bool"),
        (lambda: softmax(a, layout, mask=[True]), r"mask: expected \(6, 8, 8\) bool on cpu, got list"),
        (lambda: softmax(a, layout, scale=None), "scale: expected a number, got NoneType"),
        (lambda: softmax(a, layout.mask), "layout: expected a Layout, got Tensor"),
        (lambda: sss(a, b, layout, layout), r"b: expected \(\.\.\., 6, 8, 8\)"),
        (lambda: sss(a, a, layout, layout), "other: expected 24 rows in blocks of 8 and heads None on cpu"),
        (lambda: sss(a, b.double(), layout, other), "b: expected leading dimensions .* torch.float32 as a has"),
        (lambda: sss(a, b, layout, other, layout), "other: expected shape"),
        (lambda: sss(a, b, layout, other.mask), "b_layout: expected a Layout, got Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="a compiler that cannot give back a layout before torch 2.13")
@pytest.mark.parametrize("dynamic", [None, True])
def test_sss_compiles_whole_for_each_layout(dynamic):
    """Layouts of equal shapes and numbers of blocks, so that only their identity tells them apart."""
    g = torch.Generator().manual_seed(0)
    compiled = torch.compile(sss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lead in ((2,), (3,), (4,)):
        left, right, given = (patterns.random(shape, 16, 0.4, g) for shape in ((60, 96), (96, 48), (60, 48)))
        a, b = (torch.randn(*lead, *layout.values_shape, generator=g, requires_grad=True) for layout in (left, right))
        for wanted in (None, given):
            (values, layout), (want, want_layout) = compiled(a, b, left, right, wanted), sss(a, b, left, right, wanted)
            assert layout == want_layout
            assert torch.equal(values, want)
            for x, y in zip(torch.autograd.grad(values.square().sum(), (a, b)), torch.autograd.grad(want.square().sum(), (a, b)), strict=True):
                assert torch.equal(x, y)
    torch._dynamo.reset()
