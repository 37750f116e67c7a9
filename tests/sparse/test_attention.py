import importlib

import pytest
import torch

from onetorch.sparse import KeyValueCache, Layout, attention, cpu, decode, patterns, reference

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
    torch.library.opcheck(operators._attention, (q, k, v, layout.index, 8, 8, 1, 0.5, True, None, None, padding, None, 0.0, None))


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


def test_scores_that_are_nan(path):
    """A query of NaN has NaN for output and log-sum-exp, and a NaN counts as one whatever its lower bits are."""
    layout = patterns.dense(32, 8)
    q, k, v = (torch.randn(1, 1, 32, 8) for _ in range(3))
    q[0, 0, 5] = torch.nan
    out, lse = attention(q, k, v, layout, return_lse=True)
    assert bool(out[0, 0, 5].isnan().all())
    assert bool(lse[0, 0, 5].isnan())
    assert bool(out[0, 0, 6:].isfinite().all())
    assert bool(lse[0, 0, 6:].isfinite().all())
    k[0, 0, 9, 0] = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)[0]
    assert bool(attention(q, k, v, layout).isnan().all())


def test_groups_of_64_bits(path):
    """Numbers that are equal in their lower 32 bits are different groups."""
    layout = patterns.dense(32, 8)
    q, k, v = (torch.randn(1, 1, 32, 8) for _ in range(3))
    small = torch.tensor([0, 1, 2, 3]).repeat_interleave(8)
    large = torch.tensor([0, 2**32, -(2**32), 2**62]).repeat_interleave(8)
    assert torch.equal(attention(q, k, v, layout, groups=large), attention(q, k, v, layout, groups=small))


def test_order_of_32_bits(path):
    layout, order = patterns.strided(32, 8, 4), patterns.strided_order(32, 4)
    q, k, v = (torch.randn(1, 2, 32, 8) for _ in range(3))
    assert torch.equal(attention(q, k, v, layout, order=order.int()), attention(q, k, v, layout, order=order))
    assert torch.equal(decode(q[:, :, 20:21], k, v, layout, 20, order=order.int()), decode(q[:, :, 20:21], k, v, layout, 20, order=order))


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


def dropped_share(q, k, layout, seed, dropout, **options):
    """(B, H, S, S): the factor of each probability, read off with the identity as values."""
    S = q.shape[2]
    values = torch.eye(S, dtype=q.dtype).expand(q.shape[0], k.shape[1], S, S)
    plain, dropped = (attention(q, k, values, layout, dropout=p, seed=seed, **options) for p in (0.0, dropout))
    return torch.where(plain > 0, dropped / plain.clamp_min(1e-300), 0.0), plain > 0


@pytest.mark.parametrize("heads", [None, 4])
def test_dropout(path, heads):
    """Each probability is either dropped or scaled, at random; forward and gradients are those of dense attention under the mask that is read off."""
    g = torch.Generator().manual_seed(0)
    B, H, Hk, S, D, p = 2, 4, 2, 72, 8, 0.3
    mask = torch.ones(*([heads] if heads else []), 5, 5, dtype=torch.bool).tril()
    layout = Layout.from_mask(mask, 16, S)
    q, k, v = (torch.randn(B, h, S, D, generator=g, dtype=torch.float64, requires_grad=True) for h in (H, Hk, Hk))
    factor, sees = dropped_share(q.detach(), k.detach(), layout, 7, p, causal=True)
    assert torch.allclose(factor[factor > 0], torch.tensor(1 / 0.7, dtype=torch.float64), rtol=1e-9)
    factor = (factor > 0).double() / 0.7
    rate = 1 - float((factor > 0)[sees].double().mean())
    assert rate == pytest.approx(p, abs=4 * (p * (1 - p) / int(sees.sum())) ** 0.5)
    for other in range(1, B * H):  # every head of every batch has its own
        same = ((factor.flatten(0, 1)[0] > 0) == (factor.flatten(0, 1)[other] > 0))[sees[0, 0]].double().mean()
        assert float(same) == pytest.approx(p**2 + (1 - p) ** 2, abs=0.05)
    out, lse = attention(q, k, v, layout, causal=True, dropout=p, seed=7, return_lse=True)
    keys, values = (t.repeat_interleave(H // Hk, 1) for t in (k, v))
    scores = (D**-0.5 * q @ keys.mT).masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -torch.inf)
    want = (torch.softmax(scores, -1) * factor) @ values
    weight, weight_lse = (torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (out, lse))
    assert error(out, want.detach()) <= 1e-12
    assert error(lse, scores.logsumexp(-1).detach()) <= 1e-12
    got = torch.autograd.grad((out * weight).sum() + (lse * weight_lse).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad((want * weight).sum() + (scores.logsumexp(-1) * weight_lse).sum(), (q, k, v)), strict=True):
        assert error(a, b) <= 1e-12
    assert torch.equal(out, attention(q, k, v, layout, causal=True, dropout=p, seed=torch.tensor([7])))
    assert not torch.equal(out, attention(q, k, v, layout, causal=True, dropout=p, seed=8))
    torch.manual_seed(3)
    drawn = attention(q, k, v, layout, causal=True, dropout=p)
    torch.manual_seed(3)
    assert torch.equal(drawn, attention(q, k, v, layout, causal=True, dropout=p))
    assert not torch.equal(drawn, attention(q, k, v, layout, causal=True, dropout=p))
    for dtype in (torch.float32, torch.bfloat16):
        low = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*low, layout, causal=True, dropout=p, seed=7)
        assert error(out, want.detach()) <= (1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler on this machine")
def test_both_paths_drop_the_same(monkeypatch):
    g = torch.Generator().manual_seed(0)
    for heads, block, seed in ((None, (16, 8), 2**63 - 1), (3, (8, 32), 12345), (None, 64, 0)):
        mask = torch.rand(*([heads] if heads else []), -(-70 // (block if isinstance(block, int) else block[0])), 9, generator=g) < 0.7
        layout = Layout.from_mask(mask[..., : -(-70 // (block if isinstance(block, int) else block[1]))], block, 70)
        q, k = (torch.randn(2, 3, 70, 8, generator=g, dtype=torch.float64) for _ in range(2))
        compiled, sees = dropped_share(q, k, layout, seed, 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "library", lambda: None)
            plain, _ = dropped_share(q, k, layout, seed, 0.5)
        assert torch.equal(compiled > 0, plain > 0)
        assert 0.4 < float((plain > 0)[sees].double().mean()) < 0.6


def test_dropout_compiles_and_passes_opcheck(path):
    g = torch.Generator().manual_seed(0)
    layout = patterns.local(20, 8, 9)
    q, k, v = (torch.randn(1, h, 20, 4, generator=g, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    torch.library.opcheck(operators._attention, (q, k, v, layout.index, 8, 8, 1, 0.5, True, None, None, None, None, 0.3, torch.tensor([5])))
    compiled = torch.compile(lambda q, k, v, s: attention(q, k, v, layout, causal=True, dropout=0.3, seed=s), fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        s = torch.tensor([seed])
        assert torch.equal(compiled(q, k, v, s), attention(q, k, v, layout, causal=True, dropout=0.3, seed=s))


def test_per_sample_gradients_by_torch_func(path):
    g = torch.Generator().manual_seed(0)
    layout = patterns.local(20, 8, 9)
    q, k, v = (torch.randn(3, 1, h, 20, 4, generator=g, dtype=torch.float64) for h in (4, 2, 2))

    def loss(q, k, v):
        out, lse = attention(q, k, v, layout, causal=True, return_lse=True)
        return out.square().sum() + lse.sum()

    batched = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, 0))(q, k[0], v)
    for n in range(3):
        inputs = [t.clone().requires_grad_() for t in (q[n], k[0], v[n])]
        for a, b in zip(batched, torch.autograd.grad(loss(*inputs), inputs), strict=True):
            assert torch.equal(a[n], b)
    with pytest.raises(NotImplementedError, match="attention is differentiable once"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, k[0], v[0]).sum())(q[0])


def random_decode(seed):
    """A whole sequence token group by token group over a cache whose rest is NaN, against attention over the whole."""
    g = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=g))

    block, S, B, Hk = (8 << pick(0, 3), 8 << pick(0, 3)), pick(1, 90), pick(1, 3), pick(1, 3)
    H = Hk * pick(1, 3)
    heads = (H,) if pick(0, 2) else ()
    layout = Layout.from_mask(torch.rand(*heads, -(-S // block[0]), -(-S // block[1]), generator=g) < 0.6, block, S)
    q, k, v = (torch.randn(B, h, S, 8, generator=g, dtype=torch.float64) for h in (H, Hk, Hk))
    options = {"scale": 0.7, "causal": True}
    if pick(0, 2):
        options["order"] = torch.randperm(S, generator=g)
    if pick(0, 2):
        options["groups"] = torch.randint(0, 2, (S,), generator=g)
    if pick(0, 2):
        options["mask"] = layout.from_dense((torch.rand(*heads, S, S, generator=g) < 0.8).double()).bool()
    padding = torch.rand(B, S, generator=g) < 0.8 if pick(0, 2) else None
    want = attention(q, k, v, layout, key_padding=padding, **options)
    cache = KeyValueCache(B, Hk, S, 8, dtype=torch.float64)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    parts = []
    while cache.length < S:
        start, n = cache.length, pick(1, 4)
        new = slice(start, min(S, start + n))
        cache.append(k[:, :, new], v[:, :, new])
        if padding is not None:
            options["key_padding"] = padding
        parts.append(decode(q[:, :, new], cache.k, cache.v, layout, start, **options))
    return error(torch.cat(parts, 2), want)


def test_decode_is_attention_token_by_token():
    errors = {seed: random_decode(seed) for seed in range(150)}
    assert max(errors.values()) <= 1e-12, {seed: e for seed, e in errors.items() if e > 1e-12}


def test_decode_compiles_whole_and_once_for_all_places():
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 64, 16, generator=g) for _ in range(2))
    empty = Layout.from_mask(torch.zeros(4, 4, dtype=torch.bool), 16)
    for layout, heads in ((patterns.local(64, 16, 24), 2), (Layout.from_mask(torch.rand(4, 4, 4, generator=g) < 0.6, 16), 4), (empty, 2)):
        compiled = torch.compile(lambda q, start, layout=layout: decode(q, k, v, layout, start), fullgraph=True, backend="aot_eager")
        for start in range(30, 64):
            q = torch.randn(1, heads, 1, 16, generator=g)
            with torch._dynamo.config.patch(error_on_recompile=start > 31):
                assert torch.equal(compiled(q, start), decode(q, k, v, layout, start))
        torch._dynamo.reset()


def test_decode_low_precision_and_without_causal():
    g = torch.Generator().manual_seed(0)
    layout = patterns.local(64, 16, 20)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=g) for _ in range(3))
    want = reference.attention(q[:, :, 40:43], k[:, :, :43], v[:, :, :43], layout.element_mask()[40:43, :43], 0.25)
    assert error(decode(q[:, :, 40:43], k, v, layout, 40, causal=False), want) <= 5e-6
    low = decode(*(t.bfloat16() for t in (q[:, :, 40:43], k, v)), layout, 40, causal=False)
    assert low.dtype == torch.bfloat16
    assert error(low, want) <= 2e-2


def test_decode_and_cache_under_autocast():
    layout = patterns.local(64, 16, 20)
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    cache = KeyValueCache(1, 2, 64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        cache.append(k.bfloat16(), v.bfloat16())
        got = decode(q[:, :, 40:43], cache.k, cache.v, layout, 40)
    assert got.dtype == torch.bfloat16
    assert error(got, decode(q[:, :, 40:43].double(), k.double(), v.double(), layout, 40)) <= 2e-2


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        (torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 1, 8), r"v: expected \(1, 2, 4, 8\) as k has, got \(1, 2, 1, 8\)"),
        (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), r"k: expected \(1, 2, tokens, 8\) for a cache \(1, 2, 16, 8\), got \(1, 2, 8\)"),
        (torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8).double(), "v: expected torch.float32 on cpu as the cache has, got torch.float64"),
        (torch.zeros(1, 2, 17, 8), torch.zeros(1, 2, 17, 8), "k: expected up to 16 tokens"),
        ([1.0], torch.zeros(1, 2, 4, 8), "k: expected .* got list"),
    ],
)
def test_cache_wrong_arguments(k, v, message):
    cache = KeyValueCache(1, 2, 16, 8)
    with pytest.raises(ValueError, match=message):
        cache.append(k, v)
    assert cache.length == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 15}, r"start: expected 2 tokens from 15 on within a cache of 16 and a layout of \(16, 16\)"),
        ({"start": -1}, "start: expected 2 tokens from -1 on"),
        ({"k": torch.zeros(2, 3, 16, 4), "v": torch.zeros(2, 3, 16, 4)}, r"k, v: expected \(2, a divisor of 4, tokens, 4\)"),
        ({"q": torch.zeros(4, 2, 4)}, "q: expected"),
        ({"v": torch.zeros(2, 2, 16, 4).double()}, "v: expected .* of one floating dtype on cpu, got .* torch.float64"),
        ({"key_padding": torch.ones(2, 15, dtype=torch.bool)}, r"key_padding: expected \(2, 16\) bool"),
        ({"key_padding": torch.ones(2, 16, dtype=torch.bool, device="meta")}, r"key_padding: expected \(2, 16\) bool on cpu, got .* on meta"),
        ({"mask": torch.ones(4, 8, 8)}, r"mask: expected \(3, 8, 8\) bool"),
        ({"order": torch.zeros(15).long()}, r"order: expected \(16,\)"),
        ({"order": torch.zeros(16).long()}, r"order: expected a permutation of 0\.\.15"),
        ({"order": torch.arange(1, 17)}, r"order: expected a permutation of 0\.\.15"),
        ({"order": torch.arange(-1, 15)}, r"order: expected a permutation of 0\.\.15"),
        ({"groups": torch.zeros(16)}, r"groups: expected \(16,\) int64 on cpu, got \(16,\) torch.float32"),
        ({"q": torch.zeros(2, 4, 2, 4).int()}, "q: expected .* of one floating dtype"),
        ({"start": 1.5}, "start: expected an int, got float"),
        ({"scale": "x"}, "scale: expected a number, got str"),
        ({"layout": Layout.from_mask(torch.ones(3, 2, 2, dtype=torch.bool), 8)}, "layout: expected one for all heads or 4"),
    ],
)
def test_decode_wrong_arguments(change, message):
    arguments = {"q": torch.zeros(2, 4, 2, 4), "k": torch.zeros(2, 2, 16, 4), "v": torch.zeros(2, 2, 16, 4), "layout": patterns.causal(16, 8), "start": 3}
    with pytest.raises(ValueError, match=message):
        decode(**(arguments | change))
    with pytest.raises(ValueError, match="k: expected up to 1 tokens for a cache"):
        KeyValueCache(2, 2, 1, 4).append(torch.zeros(2, 2, 2, 4), torch.zeros(2, 2, 2, 4))


def test_under_vmap(path):
    """A new dimension equals one call for each of its elements, forward and (batched gradients) backward."""
    g = torch.Generator().manual_seed(0)
    layout = patterns.local(20, 8, 9)
    q, k, v = (torch.randn(3, 1, h, 20, 4, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    padding = torch.rand(3, 1, 20, generator=g) < 0.8
    together = torch.func.vmap(lambda q, k, v, p: attention(q, k, v, layout, causal=True, key_padding=p), in_dims=(0, None, 0, 0))(q, k[0], v, padding)
    for n in range(3):
        assert torch.equal(together[n], attention(q[n], k[0], v[n], layout, causal=True, key_padding=padding[n]))
    inputs = [t[0].requires_grad_() for t in (q, k, v)]
    out = attention(*inputs, layout, causal=True)
    grads = torch.randn(3, *out.shape, generator=g, dtype=torch.float64)
    batched = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        for a, b in zip(batched, torch.autograd.grad(out, inputs, grads[n], retain_graph=True), strict=True):
            assert torch.equal(a[n], b)
    masks = torch.ones(3, *layout.values_shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask: expected the same for every element of vmap"):
        torch.func.vmap(lambda m: attention(q[0], k[0], v[0], layout, mask=m))(masks)
    tokens = torch.arange(q.shape[3]).repeat(3, 1)
    with pytest.raises(ValueError, match="groups: expected the same for every element of vmap"):
        torch.func.vmap(lambda t: attention(q[0], k[0], v[0], layout, groups=t))(tokens)
    with pytest.raises(ValueError, match="order: expected the same for every element of vmap"):
        torch.func.vmap(lambda t: attention(q[0], k[0], v[0], layout, order=t))(tokens)


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
        ({"groups": [0] * 16}, r"groups: expected \(16,\) int64 on cpu, got list"),
        ({"key_padding": [True]}, r"key_padding: expected \(2, 16\) bool on cpu, got list"),
        ({"q": torch.zeros(2, 4, 16, 0), "k": torch.zeros(2, 2, 16, 0)}, "q: expected a depth of at least 1"),
        ({"k": torch.zeros(2, 2, 16, 4).to_sparse()}, "k: expected a strided tensor, got torch.sparse_coo"),
        ({"scale": [1.0]}, "scale: expected a number, got list"),
        ({"dropout": "x"}, "dropout: expected a number, got str"),
        ({"dropout": 0.5, "seed": 1.5}, "seed: expected an int of 64 bits .* got 1.5"),
        ({"dropout": 1.0}, r"dropout: expected a share in 0\.\.1, not 1, got 1.0"),
        ({"dropout": 0.5, "seed": torch.zeros(2).long()}, r"seed: expected an int or \(1,\) int64 on cpu, got \(2,\)"),
        ({"order": torch.zeros(16)}, r"order: expected \(16,\) int64"),
        ({"order": torch.zeros(16, dtype=torch.int64)}, r"order: expected a permutation of 0\.\.15"),
        ({"order": torch.arange(1, 17)}, r"order: expected a permutation of 0\.\.15"),
        ({"order": torch.arange(-1, 15)}, r"order: expected a permutation of 0\.\.15"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"q": torch.zeros(2, 4, 16, 4), "k": torch.zeros(2, 2, 16, 4), "v": torch.zeros(2, 2, 16, 4), "layout": patterns.causal(16, 8)} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
