import importlib

import pytest
import torch

from onetorch.sparse import Layout, attention, patterns, reference

operators = importlib.import_module("onetorch.sparse.attention")
BOUND = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 1e-2}


@torch.no_grad()
def error(got, want):
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(0.1)) if want.numel() else 0.0


def random_case(seed):
    """Random sizes, heads, dtype and restrictions; the worst error over its bound, of output, log-sum-exp and gradients, against float64 dense attention."""
    g = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=g))

    dtype = list(BOUND)[seed % 4]
    block = (8 << pick(0, 4), 8 << pick(0, 4))
    S = pick(1, 150)
    Sk = S if pick(0, 2) else pick(1, 150)
    B, Hk, D, Dv = pick(1, 3), pick(1, 3), [8, 16, 33, 64][pick(0, 4)], [8, 16, 40, 64][pick(0, 4)]
    H = Hk * pick(1, 3)
    heads = (H,) if pick(0, 2) else ()
    layout = Layout.from_mask(torch.rand(*heads, -(-S // block[0]), -(-Sk // block[1]), generator=g) < 0.7, block, (S, Sk))

    def tensor(h, s, d):
        x = torch.randn(B, s, h, d, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)  # as a projection leaves it
        return (x if pick(0, 2) else x.contiguous()).requires_grad_()

    q, k, v = tensor(H, S, D), tensor(Hk, Sk, D), tensor(Hk, Sk, Dv)
    full = torch.rand(*heads, S, Sk, generator=g) < 0.8
    causal = bool(pick(0, 2))
    padding = torch.rand(B, Sk, generator=g) < 0.8 if pick(0, 2) else None
    mask = layout.from_dense(full) if pick(0, 2) else None
    groups = torch.randint(0, 2, (S,), generator=g).sort().values if Sk == S and pick(0, 2) else None
    order = torch.randperm(S, generator=g) if Sk == S and pick(0, 2) else None
    keep = layout.element_mask() & full if mask is not None else layout.element_mask()
    if order is not None:
        back = order.argsort()
        keep = keep[..., back, :][..., back]
    keep = keep.expand(B, H, S, Sk)
    if causal:
        keep = keep & (torch.arange(S)[:, None] >= torch.arange(Sk))
    if padding is not None:
        keep = keep & padding[:, None, None]
    if groups is not None:
        keep = keep & (groups[:, None] == groups)
    out, lse = attention(q, k, v, layout, causal=causal, key_padding=padding, mask=mask, groups=groups, order=order, return_lse=True)
    sees = keep.any(-1)
    grad, grad_lse = torch.randn(out.shape, generator=g, dtype=torch.float64), torch.randn(lse.shape, generator=g, dtype=torch.float64)
    gradients = torch.autograd.grad((out.double() * grad).sum() + (lse.double().masked_fill(~sees, 0.0) * grad_lse).sum(), (q, k, v))

    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    keys, values = (t.repeat_interleave(H // Hk, 1) for t in wide[1:])
    scores = (D**-0.5 * wide[0] @ keys.mT).masked_fill(~(keep | ~sees[..., None]), -torch.inf)
    want, want_lse = torch.softmax(scores, -1) @ values * sees[..., None], scores.logsumexp(-1)
    wanted = torch.autograd.grad((want * grad).sum() + (want_lse * sees * grad_lse).sum(), wide)
    assert error(want.detach(), reference.attention(q.detach(), keys.detach(), values.detach(), keep, D**-0.5)) < 1e-14
    assert bool((lse[~sees] == -torch.inf).all())
    assert not bool(out[~sees].any())
    errors = [error(out, want), error(lse[sees], want_lse[sees]), *[error(a, b) for a, b in zip(gradients, wanted, strict=True)]]
    return max(errors) / BOUND[dtype]


def test_random_cases(path):
    ratios = {seed: random_case(seed) for seed in range({"compiled": 400, "pytorch": 120, "triton": 12}[path])}
    assert max(ratios.values()) <= 1, {seed: ratio for seed, ratio in ratios.items() if ratio > 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_torch_on_a_causal_sequence(path, dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 200, 32, generator=g).to(dtype) for _ in range(3))
    got = attention(q, k, v, patterns.causal(200, 64), causal=True)
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert error(got, want) <= BOUND[dtype]


def test_strided_in_its_order_is_the_strided_mask_in_the_natural_one(path):
    g = torch.Generator().manual_seed(0)
    S, stride = 200, 12  # groups of 16 and 17 tokens, which share blocks of 16
    q, k, v = (torch.randn(1, 2, S, 16, generator=g, dtype=torch.float64) for _ in range(3))
    order, groups = patterns.strided_order(S, stride), patterns.strided_groups(S, stride)
    got = attention(q, k, v, patterns.strided(S, 16, stride), causal=True, order=order, groups=groups)
    at = torch.arange(S)
    keep = (at[:, None] >= at) & ((at[:, None] - at) % stride == 0)
    assert error(got, reference.attention(q, k, v, keep, 0.25)) <= 1e-12


def test_two_layouts_merge_by_their_log_sum_exp(path):
    """Attention to a layout is the mixture of attention to its two halves, weighted by exp(lse): values and gradients."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 96, 16, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    whole, part = patterns.causal(96, 16), patterns.local(96, 16, 32)
    rest = Layout.from_mask(whole.mask & ~part.mask, 16)
    a, la = attention(q, k, v, part, causal=True, return_lse=True)
    b, lb = attention(q, k, v, rest, causal=True, return_lse=True)
    share = torch.sigmoid(la - lb)[..., None]
    merged, want = share * a + (1 - share) * b, attention(q, k, v, whole, causal=True)
    assert error(merged, want.detach()) <= 1e-12
    weight = torch.randn(want.shape, generator=g, dtype=torch.float64)
    for x, y in zip(torch.autograd.grad((merged * weight).sum(), (q, k, v)), torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
        assert error(x, y) <= 1e-12


def test_gradcheck(path):
    g = torch.Generator().manual_seed(0)
    layout = patterns.local(20, 8, 9)
    q, k, v = (torch.randn(1, h, 20, 4, generator=g, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, layout, causal=True, return_lse=True), (q, k, v), fast_mode=True)


def test_operator_passes_opcheck(path):
    g = torch.Generator().manual_seed(0)
    layout = patterns.local(20, 8, 9)
    q, k, v = (torch.randn(1, h, 20, 4, generator=g, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    padding = torch.ones(1, 20, dtype=torch.bool)
    torch.library.opcheck(operators._attention, (q, k, v, layout.index, 8, 8, 1, 0.5, True, None, None, padding, None))


def test_compiles_whole():
    layout = patterns.local(64, 16, 24)
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))

    def f(q, k, v):
        return attention(q, k, v, layout, causal=True).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(f(q, k, v), (q, k, v)), strict=True):
        assert torch.equal(a, b)


def test_blocks_that_are_not_kept_are_never_read(path):
    g = torch.Generator().manual_seed(0)
    layout = patterns.block_diagonal(64, 16, 4)
    q, k, v = (torch.randn(1, 1, 64, 8, generator=g) for _ in range(3))
    want = attention(q, k, v, layout)
    k[:, :, 16:32], v[:, :, 16:32] = torch.nan, torch.inf
    got = attention(q, k, v, layout)
    assert torch.equal(got[:, :, :16], want[:, :, :16])
    assert torch.equal(got[:, :, 32:], want[:, :, 32:])
    assert bool(got[:, :, 16:32].isnan().all())


def test_padding_may_hold_anything(path):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 40, 8, generator=g) for _ in range(3))
    exists = torch.arange(40) < torch.tensor([[40], [21]])
    layout = patterns.dense(40, 16)
    want = attention(q, k, v, layout, key_padding=exists)
    k[1, :, 21:], v[1, :, 21:] = torch.inf, torch.nan
    k, v = k.requires_grad_(), v.requires_grad_()
    got = attention(q, k, v, layout, key_padding=exists)
    assert torch.equal(got, want)
    for gradient in torch.autograd.grad(got.square().sum(), (k, v)):
        assert bool(gradient.isfinite().all())
        assert not bool(gradient[1, :, 21:].any())


def test_bit_identical_from_call_to_call(path):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 150, 24, generator=g, requires_grad=True) for _ in range(3))
    layout = patterns.random(150, 32, 0.6, g)
    runs = []
    for _ in range(3):
        out = attention(q, k, v, layout)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_large_scores_do_not_overflow(path):
    q = torch.full((1, 1, 32, 8), 100.0)
    k = torch.linspace(-100, 100, 32)[None, None, :, None].expand(1, 1, 32, 8).contiguous()
    v = torch.arange(32.0)[None, None, :, None].expand(1, 1, 32, 8).contiguous()
    assert torch.equal(attention(q, k, v, patterns.dense(32, 8), scale=10.0), torch.full((1, 1, 32, 8), 31.0))


def test_empty_and_nothing_to_see(path):
    layout = Layout.from_mask(torch.zeros(2, 2, dtype=torch.bool), 8)
    q, k, v = (torch.randn(2, 1, 16, 4, requires_grad=True) for _ in range(3))
    out, lse = attention(q, k, v, layout, return_lse=True)
    assert not bool(out.any())
    assert bool((lse == -torch.inf).all())
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not bool(grad.any())
    assert attention(q[:0], k[:0], v[:0], layout).shape == (0, 1, 16, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 16, 4)}, r"q: expected \(batch, heads, tokens, depth\), got \(2, 16, 4\)"),
        ({"k": torch.zeros(2, 3, 16, 4), "v": torch.zeros(2, 3, 16, 4)}, "k: expected a number of heads that divides the 4 of q, got 3"),
        ({"k": torch.zeros(2, 2, 16, 5)}, r"k: expected \(2, heads, tokens, 4\)"),
        ({"v": torch.zeros(2, 2, 15, 4)}, r"v: expected \(2, 2, 16\) as k begins"),
        ({"v": torch.zeros(2, 2, 16, 4).double()}, "k, v: expected torch.float32 as q has"),
        ({"q": torch.zeros(2, 4, 16, 4).long()}, "q: expected one of"),
        ({"q": torch.zeros(2, 4, 16, 4, device="meta")}, "q: expected it on cpu"),
        ({"layout": patterns.causal(24, 8)}, r"layout: expected \(16, 16\), queries by keys"),
        ({"layout": Layout.from_mask(torch.ones(3, 2, 2, dtype=torch.bool), 8)}, "layout: expected one for all heads or 4"),
        ({"key_padding": torch.ones(2, 15, dtype=torch.bool)}, r"key_padding: expected \(2, 16\) bool"),
        ({"mask": torch.ones(4, 8, 8)}, r"mask: expected \(3, 8, 8\) bool"),
        ({"groups": torch.zeros(15, dtype=torch.int64)}, r"groups: expected \(16,\) int64"),
        ({"order": torch.zeros(16)}, r"order: expected \(16,\) int64"),
        ({"order": torch.zeros(16, dtype=torch.int64)}, r"order: expected a permutation of 0\.\.15"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"q": torch.zeros(2, 4, 16, 4), "k": torch.zeros(2, 2, 16, 4), "v": torch.zeros(2, 2, 16, 4), "layout": patterns.causal(16, 8)} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
