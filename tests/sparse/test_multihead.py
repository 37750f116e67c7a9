import pytest
import torch
from torch import nn

from onetorch.sparse import Layout, MultiheadAttention, patterns


@torch.no_grad()
def error(a, b):
    return float((a.double() - b.double()).abs().max() / b.abs().max())


def torch_layer(layer):
    """nn.MultiheadAttention with the same weights: it stacks queries, keys and values too."""
    dense = nn.MultiheadAttention(layer.features, layer.heads, batch_first=True, dtype=layer.qkv.weight.dtype)
    with torch.no_grad():
        dense.in_proj_weight.copy_(layer.qkv.weight)
        dense.in_proj_bias.copy_(layer.qkv.bias)
        dense.out_proj.weight.copy_(layer.out.weight)
        dense.out_proj.bias.copy_(layer.out.bias)
    return dense


@pytest.mark.parametrize("heads", [None, 4])
def test_equals_torch_with_the_layout_as_mask(path, heads):
    torch.manual_seed(0)
    mask = torch.rand(*([heads] if heads else []), 5, 5) < 0.5
    layout = Layout.from_mask(mask | torch.eye(5, dtype=torch.bool), 8, 37)
    layer = MultiheadAttention(32, 4, layout, causal=True, dtype=torch.float64)
    dense = torch_layer(layer)
    x = torch.randn(3, 37, 32, dtype=torch.float64)
    padding = torch.rand(3, 37) < 0.9
    padding[:, 0] = True
    keep = layout.element_mask() & torch.ones(37, 37, dtype=torch.bool).tril() | torch.eye(37, dtype=torch.bool)
    keep = keep.expand(4, 37, 37).repeat(3, 1, 1)
    sees = (keep.view(3, 4, 37, 37) & padding[:, None, None]).any(3).all(1)  # torch gives NaN to a query that sees nothing
    y = layer(x, key_padding=padding)
    want = dense(x, x, x, attn_mask=~keep, key_padding_mask=~padding)[0]
    assert error(y[sees], want[sees]) <= 1e-12
    y[sees].square().sum().backward()
    assert bool(layer.qkv.weight.grad.any())


def test_grouped_queries_by_repeating_keys():
    torch.manual_seed(0)
    layout = patterns.local(24, 8, 12)
    few = MultiheadAttention(32, 4, layout, key_heads=2, causal=True, dtype=torch.float64)
    many = MultiheadAttention(32, 4, layout, causal=True, dtype=torch.float64)
    with torch.no_grad():
        for name in ("weight", "bias"):
            q, k, v = getattr(few.qkv, name).split([32, 16, 16])
            k, v = (t.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v))
            getattr(many.qkv, name).copy_(torch.cat([q, k, v]))
        many.out.load_state_dict(few.out.state_dict())
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    assert error(few(x), many(x)) <= 1e-12


@pytest.mark.parametrize("options", [{}, {"order": True, "groups": True}, {"mask": True}, {"key_heads": 1}], ids=str)
@torch.no_grad()
def test_writes_token_by_token_what_it_reads_at_once(options):
    torch.manual_seed(0)
    S, stride = 40, 8
    layout = patterns.strided(S, 8, stride) if "order" in options else patterns.local(S, 8, 20)
    given = dict(options)
    if "order" in options:
        given |= {"order": patterns.strided_order(S, stride), "groups": patterns.strided_groups(S, stride)}
    if "mask" in options:
        given |= {"mask": layout.from_dense((torch.rand(S, S) < 0.8).float()).bool()}
    layer = MultiheadAttention(16, 2, layout, causal=True, dtype=torch.float64, **given)
    x = torch.randn(2, S, 16, dtype=torch.float64)
    padding = torch.rand(2, S) < 0.9
    want = layer(x, key_padding=padding)
    cache, parts = layer.new_cache(2), []
    for n in (11, 1, 1, 2, 25):  # a prompt, then tokens
        new = slice(cache.length, cache.length + n)
        parts.append(layer(x[:, new], key_padding=padding[:, : new.stop], cache=cache))
    assert cache.length == S
    assert error(torch.cat(parts, 1), want) <= 1e-12
    if not {"order", "mask"} & set(options):
        assert error(layer(x[:, :21]), layer(x)[:, :21]) <= 1e-12  # a shorter sequence


def test_dropout_only_while_training():
    torch.manual_seed(0)
    layer = MultiheadAttention(16, 2, patterns.dense(24, 8), dropout=0.5)
    x = torch.randn(1, 24, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_writes_token_by_token_under_autocast():
    """The cache is in the dtype of the weights, queries in that of autocast."""
    torch.manual_seed(0)
    layer, x = MultiheadAttention(32, 4, patterns.local(24, 8, 10), causal=True), torch.randn(2, 24, 32)
    with torch.no_grad():
        want = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            cache = layer.new_cache(2)
            got = torch.cat([layer(part, cache=cache) for part in x.split([10, 1, 13], 1)], 1)
    assert got.dtype == torch.bfloat16
    assert float((got - want).abs().max()) < 0.03 * float(want.abs().max())


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_writing_compiles_whole(dynamic):
    torch.manual_seed(0)
    layer, x = MultiheadAttention(32, 4, patterns.local(24, 8, 10), key_heads=2, causal=True), torch.randn(2, 24, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    cache = layer.new_cache(2)
    parts = [layer(x[:, :10], cache=cache)]
    for at in range(10, 24):
        with torch._dynamo.config.patch(error_on_recompile=at > 11):
            parts.append(compiled(x[:, at : at + 1], cache=cache))
    assert error(torch.cat(parts, 1), layer(x)) <= 1e-6
    torch._dynamo.reset()


def test_wrong_arguments():
    layout = patterns.causal(16, 8)
    for arguments, message in (
        ((16, 3, layout), "heads: expected a divisor of the 16 features, got 3"),
        ((16, 4, patterns.dense((16, 24), 8)), "layout: expected as many queries as keys"),
        ((16, 4, layout.mask), "layout: expected a Layout, got Tensor"),
        ((16, 4, Layout.from_mask(torch.ones(2, 2, 2, dtype=torch.bool), 8)), "one for all heads or 4"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiheadAttention(*arguments)
    with pytest.raises(ValueError, match="key_heads: expected a divisor of the 4 heads, got 3"):
        MultiheadAttention(16, 4, layout, key_heads=3)
    with pytest.raises(ValueError, match=r"dropout: expected a share in 0\.\.1, not 1, got 1"):
        MultiheadAttention(16, 4, layout, dropout=1)
    with pytest.raises(ValueError, match=r"groups: expected \(16,\) int64 on cpu, got \(15,\) torch\.int64"):
        MultiheadAttention(16, 4, layout, groups=torch.zeros(15).long())
    with pytest.raises(ValueError, match=r"features: expected an int, at least 1, got 16\.0"):
        MultiheadAttention(16.0, 4, layout)
    layer = MultiheadAttention(16, 4, layout, order=torch.arange(16))
    with pytest.raises(ValueError, match=r"x: expected \(batch, tokens, 16\), got \(2, 16\)"):
        layer(torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"x: expected 1\.\.16 tokens, as many as the layout has left, got 17"):
        layer(torch.zeros(1, 17, 16))
    cache = layer.new_cache(1)
    with pytest.raises(ValueError, match=r"key_padding: expected \(1, 3\) bool on cpu, got \(1, 2\)"):
        layer(torch.zeros(1, 3, 16), cache=cache, key_padding=torch.ones(1, 2, dtype=torch.bool))
    assert cache.length == 0
    with pytest.raises(ValueError, match="cache: expected a KeyValueCache, got int"):
        layer(torch.zeros(1, 3, 16), cache=1)
    with pytest.raises(ValueError, match=r"x: expected torch\.float32 as the weight has, got torch\.float64"):
        layer(torch.zeros(1, 16, 16).double())
    with pytest.raises(ValueError, match="x: expected the layout's 16 tokens, since it has an order or a mask of its own, got 9"):
        layer(torch.zeros(1, 9, 16))
