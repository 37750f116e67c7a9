"""Attention over the kept blocks of a layout, forward and backward, without the S x S matrix.

    layout = patterns.local(4096, 64, window=256)
    out = attention(q, k, v, layout, causal=True)              # (B, H, S, D)

One fused kernel each way, C++ on the CPU and Triton on a GPU; elsewhere the same mathematics on gathered blocks in PyTorch. The backward pass keeps
the output and the log-sum-exp and recomputes the probabilities block by block (Dao et al.: FlashAttention, 2022).
"""

import math

import torch
from torch import Tensor

from onetorch.sparse.layout import Layout
from onetorch.sparse.products import (
    _FUNCTIONS,
    DTYPES,
    _accumulator,
    _as_function,
    _call,
    _cast,
    _check_layout,
    _check_number,
    _check_restriction,
    _dds,
    _grid,
    _inside,
    _kept_blocks,
    _kernels,
    _sdd,
)

# The operators. q (B, H, S, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv); `heads` is that of the layout, 1 or H. -----------------------------------------


def _scores(
    q: Tensor, k: Tensor, index: Tensor, block: tuple[int, int], heads: int, scale: float, causal: bool, position, group, padding, mask
) -> tuple[Tensor, Tensor]:
    """The scores at the kept blocks, -inf where they are not allowed, (G, kept, br, bc), and the row each block row of them belongs to, (kept,)."""
    H, S, Sk = q.shape[1], q.shape[2], k.shape[2]
    grid = _grid(S, Sk, block)
    rows, columns = _kept_blocks(index, heads, grid)
    query = ((rows % grid[0] * block[0])[:, None] + torch.arange(block[0], device=q.device)).clamp_max(S - 1)  # (kept, br)
    key = ((columns % grid[1] * block[1])[:, None] + torch.arange(block[1], device=q.device)).clamp_max(Sk - 1)  # (kept, bc)
    allowed = torch.ones(query.shape[0], *block, dtype=torch.bool, device=q.device)
    inside = _inside(index, heads, grid, block, S, Sk)
    if inside is not None:
        allowed = allowed & inside
    if causal:
        place = torch.arange(max(S, Sk), device=q.device) if position is None else position
        allowed = allowed & (place[query][:, :, None] >= place[key][:, None, :])
    if group is not None:
        allowed = allowed & (group[query][:, :, None] == group[key][:, None, :])
    if mask is not None:
        allowed = allowed & mask
    if padding is not None:
        allowed = allowed & padding[:, key][:, :, None, :]  # (B, kept, br, bc)
        if heads == 1:
            allowed = allowed.repeat_interleave(H, 0)
    scores = scale * _sdd(_by_layout(q, heads), _by_layout(k, heads).mT, index, *block, False)
    return scores.masked_fill(~allowed, -torch.inf), rows.long()


def _mix(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers, held in int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _keep(index: Tensor, block: tuple[int, int], B: int, H: int, heads: int, grid: tuple[int, int], dropout: float, seed: Tensor) -> Tensor:
    """(G, kept, br, bc) bool: the probabilities that dropout keeps, a function of seed, batch, head, query and key alone. As in csrc/attention.cpp."""
    rows, columns = _kept_blocks(index, heads, grid)
    query = ((rows % grid[0] * block[0])[:, None] + torch.arange(block[0], device=index.device)).long()  # (kept, br)
    key = ((columns % grid[1] * block[1])[:, None] + torch.arange(block[1], device=index.device)).long()  # (kept, bc)
    of_seed = _mix(seed ^ _mix((seed >> 32) + 0x9E3779B9))
    if heads == 1:
        head = _mix(of_seed + torch.arange(B * H, device=index.device))[:, None]  # (G, 1)
    else:
        head = _mix(of_seed + torch.arange(B, device=index.device)[:, None] * H + rows // grid[0])  # (G, kept)
    of_query = _mix(head[:, :, None] ^ ((query * 0x9E3779B1) & 0xFFFFFFFF))
    of_key = _mix(key ^ 0xC2B2AE35)
    return _mix(of_query[..., :, None] + of_key[:, None, :]) >= min(0xFFFFFFFF, round(dropout * 2**32))


def _by_layout(x: Tensor, heads: int) -> Tensor:
    """(B, H, S, D) -> (B H, 1, S, D) for a layout that all heads share."""
    return x.flatten(0, 1).unsqueeze(1) if heads == 1 else x


def _repeat(x: Tensor, H: int) -> Tensor:
    return x.repeat_interleave(H // x.shape[1], 1) if x.shape[1] != H else x


@torch.library.custom_op("onetorch_sparse::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, br: int, bc: int, heads: int, scale: float, causal: bool,
               position: Tensor | None, group: Tensor | None, padding: Tensor | None, mask: Tensor | None,
               dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, S, _D = q.shape
    block, grid = (br, bc), _grid(S, k.shape[2], (br, bc))
    if (kernels := _kernels(q)) is not None:
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        return kernels.attention(q, k, v, index, grid, block, heads, scale, causal, position, group, padding, mask, dropout, seed)
    kind = _accumulator(q.dtype)
    values = _by_layout(_repeat(v, H).to(kind), heads)
    scores, rows = _scores(q.to(kind), _repeat(k, H).to(kind), index, block, heads, scale, causal, position, group, padding, mask)
    G = scores.shape[0]
    place = rows[None, :, None].expand(G, -1, br)
    lines = scores.new_full((G, heads * grid[0], br), -torch.inf)
    top = lines.scatter_reduce(1, place, scores.amax(3), "amax").nan_to_num(neginf=0.0) if rows.numel() else torch.zeros_like(lines)
    exps = (scores - top[:, rows, :, None]).exp()
    total = torch.zeros_like(lines).scatter_add(1, place, exps.sum(3))
    lse = top + total.log()
    p = exps / total[:, rows, :, None].clamp_min(torch.finfo(kind).tiny)
    if seed is not None:
        p = torch.where(_keep(index, block, B, H, heads, grid, dropout, seed), p / (1 - dropout), 0.0)
    out = _dds(values.mT, p, index, None, S, k.shape[2], True).mT.reshape(B, H, S, v.shape[3])
    return out.to(q.dtype).contiguous(), lse.reshape(B, H, grid[0] * br)[:, :, :S].contiguous()


@torch.library.custom_op("onetorch_sparse::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: Tensor, br: int, bc: int, heads: int,
    scale: float, causal: bool, position: Tensor | None, group: Tensor | None, padding: Tensor | None, mask: Tensor | None,
    dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, S, _D = q.shape
    Hk, Sk = k.shape[1:3]
    block, grid = (br, bc), _grid(S, Sk, (br, bc))
    if (kernels := _kernels(q)) is not None:
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        grad, grad_lse = grad.contiguous(), None if grad_lse is None else grad_lse.contiguous()
        arguments = (index, grid, block, heads, scale, causal, position, group, padding, mask, dropout, seed)
        return kernels.attention_backward(q, k, v, out, lse, grad, grad_lse, *arguments)
    kind = _accumulator(q.dtype)
    keys, values = _repeat(k, H).to(kind), _repeat(v, H).to(kind)
    scores, rows = _scores(q.to(kind), keys, index, block, heads, scale, causal, position, group, padding, mask)

    def lines(x: Tensor) -> Tensor:  # (B, H, S) -> (G, kept, br, 1)
        x = torch.nn.functional.pad(x, (0, grid[0] * br - S)).reshape(B * H // heads, heads * grid[0], br)
        return x[:, rows, :, None]

    p = (scores - lines(lse.masked_fill(lse == -torch.inf, torch.inf))).exp()
    delta = (grad.to(kind) * out.to(kind)).sum(3)
    if grad_lse is not None:
        delta = delta - grad_lse
    dp = _sdd(_by_layout(grad.to(kind), heads), _by_layout(values, heads).mT, index, *block, False)
    dropped = p
    if seed is not None:
        keep = _keep(index, block, B, H, heads, grid, dropout, seed)
        dropped, dp = (torch.where(keep, t / (1 - dropout), 0.0) for t in (p, dp))
    ds = scale * (p * (dp - lines(delta))).masked_fill(p == 0, 0.0)
    dq = _dds(_by_layout(keys, heads).mT, ds, index, None, S, Sk, True).mT.reshape(q.shape)
    dk = _dds(_by_layout(q.to(kind), heads).mT, ds, index, None, S, Sk, False).mT
    dv = _dds(_by_layout(grad.to(kind), heads).mT, dropped, index, None, S, Sk, False).mT
    dk, dv = (t.reshape(B, Hk, H // Hk, Sk, t.shape[-1]).sum(2) for t in (dk, dv))
    return tuple(t.to(q.dtype).contiguous() for t in (dq, dk, dv))


@_attention.register_fake
def _(q, k, v, index, br, bc, heads, scale, causal, position, group, padding, mask, dropout, seed):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=_accumulator(q.dtype))


@_attention_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, *rest):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup(ctx, inputs, output) -> None:
    q, k, v, index, *ctx.numbers, position, group, padding, mask, ctx.dropout, seed = inputs
    ctx.save_for_backward(q, k, v, *output, index, position, group, padding, mask, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    q, k, v, out, lse, index, *restrictions, seed = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    gradients = _call(_attention_backward, grad, grad_lse, q, k, v, out, lse, index, *ctx.numbers, *restrictions, ctx.dropout, seed)
    return *gradients, *[None] * 12


_attention.register_autograd(_backward, setup_context=_setup)


# Under torch.func.vmap the new dimension joins the batch; with dropout each element of it drops other probabilities.


def _fold(dims, tensors: tuple[Tensor | None, ...], size: int) -> list[Tensor | None]:
    """(size B, ...) of each, expanded where it has no new dimension."""
    moved = [None if t is None else t.movedim(d, 0) if d is not None else t.expand(size, *t.shape) for t, d in zip(tensors, dims, strict=True)]
    return [None if t is None else t.flatten(0, 1) for t in moved]


def _check_shared(dims, names: dict[int, str]) -> None:
    for at, name in names.items():
        if dims[at] is not None:
            raise ValueError(f"{name}: expected the same for every element of vmap")


def _attention_vmap(info, dims, q, k, v, index, br, bc, heads, scale, causal, position, group, padding, mask, dropout, seed):
    _check_shared(dims, {3: "layout", 9: "order", 10: "groups", 12: "mask", 14: "seed"})
    size = info.batch_size
    q, k, v, padding = _fold((*dims[:3], dims[11]), (q, k, v, padding), size)
    out, lse = _attention(q, k, v, index, br, bc, heads, scale, causal, position, group, padding, mask, dropout, seed)
    return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


def _attention_backward_vmap(info, dims, grad, grad_lse, q, k, v, out, lse, index, br, bc, heads, scale, causal, position, group, padding, mask, dropout, seed):
    _check_shared(dims, {7: "layout", 13: "order", 14: "groups", 16: "mask", 18: "seed"})
    size = info.batch_size
    folded = _fold((*dims[:7], dims[15]), (grad, grad_lse, q, k, v, out, lse, padding), size)
    gradients = _attention_backward(*folded[:7], index, br, bc, heads, scale, causal, position, group, folded[7], mask, dropout, seed)
    return tuple(t.unflatten(0, (size, -1)) for t in gradients), (0, 0, 0)


_attention.register_vmap(_attention_vmap)
_attention_backward.register_vmap(_attention_backward_vmap)


def _no_second_derivative(ctx, *grads: Tensor) -> None:
    raise NotImplementedError("attention is differentiable once: its derivative has none")


_FUNCTIONS[_attention] = _as_function(_attention, _setup, _backward, _attention_vmap)
_FUNCTIONS[_attention_backward] = _as_function(_attention_backward, lambda ctx, inputs, output: None, _no_second_derivative, _attention_backward_vmap)


# What the public functions accept. -----------------------------------------------------------------------------------------------------------------


def _check_tokens(layout: Layout, groups: Tensor | None, order: Tensor | None) -> None:
    S, Sk = layout.shape
    for name, tokens in (("groups", groups), ("order", order)):
        if tokens is not None and Sk != S:
            raise ValueError(f"{name}: expected as many queries as keys, got a layout of {S} by {Sk}")
        _check_restriction(name, tokens, (S,), (torch.int64, torch.int32), layout.device)
    if order is not None and torch._C._functorch.is_batchedtensor(order):
        raise ValueError("order: expected the same for every element of vmap")
    if order is not None and not torch.compiler.is_compiling():
        seen = torch.zeros(S + 2, dtype=torch.bool, device=order.device)  # sorting would take a sixth of the time of decoding a token
        if not bool(seen.index_fill_(0, (order.long() + 1).clamp_(0, S + 1), True)[1:-1].all()):
            raise ValueError(f"order: expected a permutation of 0..{S - 1}")


def _as_int32(groups: Tensor) -> Tensor:
    """int32 numbers that are equal, less and greater where these are."""
    if groups.dtype == torch.int32:
        return groups
    watched = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    if groups.device.type == "cpu" and not watched:
        low, high = groups.aminmax()
        if low >= -(2**31) and high < 2**31:
            return groups.to(torch.int32)
    values, at = groups.sort()
    rank = torch.nn.functional.pad((values[1:] != values[:-1]).cumsum(0), (1, 0))
    return rank.index_select(0, at.argsort()).to(torch.int32)


# The public function. --------------------------------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    order: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T over the kept blocks) v.

    q             (B, H, S, D)
    k, v          (B, Hk, Sk, D) and (B, Hk, Sk, Dv); H is a multiple of Hk, and query head h reads key head h // (H / Hk) (grouped-query attention)
    layout        (S, Sk), one for all heads or one per query head; queries are rows
    causal        a query sees the keys whose place is not after its own, also within a block
    scale         left out: 1 / sqrt(D)
    key_padding   (B, Sk) bool, true where the key exists
    mask          (kept, br, bc) bool, true where allowed: `layout.from_dense(allowed)` of a (S, Sk) mask
    groups        (S,) int: tokens of different groups do not see each other (packed documents, strided groups)
    order         (S,) int64: attend in this order of the tokens, a permutation; q, k and v come and the output leaves in the natural order, and `causal`,
                  `key_padding` and `groups` mean natural places; the layout and `mask` are in the new order. See `patterns.strided_order`.
    dropout       drop this share of the probabilities and scale the others by 1 / (1 - dropout), in every call: 0 when evaluating
    seed          an int, or an int64 tensor (1,) on the same device, on which alone, with the place in the batch, the head, the query and the key (in the
                  layout's order), it depends what is dropped; nothing of it is stored for the backward pass. Left out: drawn from torch's global generator
    return_lse    also return the log-sum-exp of the scores, (B, H, S), float32 at least; differentiable

    A query that may see nothing gets zeros, and -inf for its log-sum-exp. Keys and values of blocks that are not kept, or that `key_padding` excludes, are
    never read; a NaN that `causal`, `groups` or `mask` excludes inside a kept block does reach the output. Differentiable once.
    ValueError names the argument that does not fit.
    """
    _check_layout(layout)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            raise ValueError(
                f"{name}: expected (batch, heads, tokens, depth), got {tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: expected one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}: expected a strided tensor, got {tensor.layout}")
        if tensor.device != layout.device:
            raise ValueError(f"{name}: expected it on {layout.device}, where the layout is, got {tensor.device}; layout.to(device) moves the layout")
    q, k, v = _cast(q, k, v)
    B, H, S, D = q.shape
    Hk, Sk = k.shape[1:3]
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"k, v: expected {q.dtype} as q has, got {k.dtype} and {v.dtype}")
    if D == 0:
        raise ValueError(f"q: expected a depth of at least 1, got {tuple(q.shape)}")
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k: expected ({B}, heads, tokens, {D}) to fit q, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected {tuple(k.shape[:3])} as k begins, got {tuple(v.shape)}")
    if Hk == 0 or H % Hk:
        raise ValueError(f"k: expected a number of heads that divides the {H} of q, got {Hk}")
    if layout.shape != (S, Sk):
        raise ValueError(f"layout: expected ({S}, {Sk}), queries by keys, got {layout!r}")
    if layout.heads not in (None, H):
        raise ValueError(f"layout: expected one for all heads or {H}, got {layout!r}")
    _check_restriction("key_padding", key_padding, (B, Sk), (torch.bool,), q.device)
    _check_restriction("mask", mask, layout.values_shape, (torch.bool,), q.device)
    _check_tokens(layout, groups, order)
    if scale is not None:
        _check_number("scale", scale)
    _check_number("dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a share in 0..1, not 1, got {dropout}")
    if isinstance(seed, Tensor) and (seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != q.device):
        raise ValueError(f"seed: expected an int or (1,) int64 on {q.device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}")
    if seed is not None and not isinstance(seed, Tensor) and not (type(seed) is int and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed: expected an int of 64 bits or (1,) int64 on {q.device}, got {seed!r}")
    if dropout == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=q.device)
    elif not isinstance(seed, Tensor):
        seed = torch.tensor([seed], device=q.device)
    if key_padding is not None:  # what stands where no key exists must not matter, not even a NaN
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    position = None
    if order is not None:
        order = order.long()
        q, k, v = (t.index_select(2, order) for t in (q, k, v))
        key_padding = None if key_padding is None else key_padding.index_select(1, order)
        groups = None if groups is None else groups.index_select(0, order)
        position = order.to(torch.int32)
    groups = None if groups is None else _as_int32(groups)
    restrictions = (position, groups, None if key_padding is None else key_padding.contiguous(), None if mask is None else mask.contiguous())
    scale = 1 / math.sqrt(D) if scale is None else float(scale)
    out, lse = _call(_attention, q, k, v, layout.index, *layout.block, layout.heads or 1, scale, bool(causal), *restrictions, float(dropout), seed)
    if order is not None:
        back = torch.empty_like(order).scatter_(0, order, torch.arange(S, device=order.device))
        out, lse = out.index_select(2, back), lse.index_select(2, back)
    return (out, lse) if return_lse else out


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    start: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """The rows start .. start + n - 1 of `attention` over a cache of keys and values: what a model that writes token by token needs.

    q             (B, H, n, D): the newest tokens, at the natural places from `start` on
    k, v          (B, Hk, T, D) and (B, Hk, T, Dv): the cache, these tokens' own keys and values included; T is at least start + n and at most the keys of
                  the layout, and what stands from start + n on is never read
    layout        of the whole sequence, (S, Sk); the others are those of `attention`, with key_padding (B, T)

    Only the blocks of the cache that the layout keeps for these rows are read (for one of its heads: a key head reads what any of its query heads needs),
    so a token of a local or strided pattern costs the same however long the text is. Gathers and PyTorch's attention, on every device; on a GPU it waits
    for the number of blocks. Equal to `attention` but for rounding. Under torch.compile one graph serves every `start`. Returns (B, H, n, Dv). ValueError
    names the argument that does not fit.
    """
    _check_layout(layout)
    device = layout.device
    casts = device.type != "meta" and torch.is_autocast_enabled(device.type)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        fits = isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor.device == device and tensor.layout == torch.strided
        if not fits or tensor.dtype not in DTYPES or (tensor.dtype != q.dtype and not casts):
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: expected (batch, heads, tokens, depth) of one floating dtype on {device}, got {got}")
    if type(start) is not int:
        raise ValueError(f"start: expected an int, got {type(start).__name__}")
    (B, H, n, D), (Hk, T), end, (S, Sk) = q.shape, k.shape[1:3], start + q.shape[2], layout.shape
    if k.shape[0] != B or k.shape[3] != D or v.shape[:3] != k.shape[:3] or Hk == 0 or H % Hk:
        raise ValueError(f"k, v: expected ({B}, a divisor of {H}, tokens, {D}) and as many values, got {tuple(k.shape)} and {tuple(v.shape)}")
    if not 0 <= start < end <= min(T, S, Sk) or Sk < T:
        raise ValueError(f"start: expected {n} tokens from {start} on within a cache of {T} and a layout of {(S, Sk)}")
    if layout.heads not in (None, H):
        raise ValueError(f"layout: expected one for all heads or {H}, got {layout!r}")
    _check_restriction("key_padding", key_padding, (B, T), (torch.bool,), device)
    _check_restriction("mask", mask, layout.values_shape, (torch.bool,), device)
    _check_tokens(layout, groups, order)
    if scale is not None:
        _check_number("scale", scale)
    order = None if order is None else order.long()
    br, bc = layout.block
    query = torch.arange(start, end, device=device)
    place = query if order is None else torch.empty_like(order).scatter_(0, order, torch.arange(S, device=device))[start:end]
    kept = layout.mask[..., place // br, :].view(layout.heads or 1, n, -1)  # (1 or H, n, C)
    sets = kept.view(1 if layout.heads is None else Hk, -1, layout.grid[1])  # which key head reads what
    wanted = sets.any(1)  # (1 or Hk, C)
    most = max(1, int(wanted.sum(1).max()))  # never 0: torch.compile, for which the number is unknown, would ask whether it is
    columns = wanted.sort(dim=1, descending=True, stable=True).indices[:, :most]  # (1 or Hk, m)
    torch._check(columns.shape[1] > 0)  # said once more for torch 2.11
    at = (columns[:, :, None] * bc + torch.arange(bc, device=device)).flatten(1)  # places in the layout, (1 or Hk, m bc)
    key = at if order is None else order[at.clamp_max(Sk - 1)]
    exists = (at < Sk) & (key < end)
    key = key.clamp_max(end - 1)
    share = 1 if layout.heads is None else H // Hk

    def of_queries(x: Tensor) -> Tensor:  # (1 or Hk, ...) -> (1 or H, ...)
        return x.repeat_interleave(share, 0)

    picked = of_queries(columns)[:, None, :].expand(-1, n, -1)  # (1 or H, n, m)
    allowed = kept.gather(2, picked).repeat_interleave(bc, 2) & of_queries(exists)[:, None]  # (1 or H, n, m bc)
    if mask is not None and layout.kept:
        number = layout.mask.view(-1).cumsum(0).view(layout.mask.shape) - 1
        number = number[..., place // br, :].view(layout.heads or 1, n, -1).gather(2, picked).clamp_min(0)
        allowed = allowed & mask[number, (place % br)[None, :, None]].flatten(2)
    if causal:
        allowed = allowed & (of_queries(key)[:, None] <= query[:, None])
    if groups is not None:
        allowed = allowed & (groups[of_queries(key)][:, None] == groups[query][:, None])
    allowed = allowed[None]  # (B or 1, 1 or H, n, m bc)
    if layout.heads is None:
        keys, values = (t.index_select(2, key[0]) for t in (k, v))
    else:
        keys, values = (t.gather(2, key[None, :, :, None].expand(B, -1, -1, t.shape[3])) for t in (k, v))
    if key_padding is not None:
        there = key_padding[:, key]  # (B, 1 or Hk, m bc)
        keys, values = (t.masked_fill(~there[..., None], 0.0) for t in (keys, values))
        allowed = allowed & there.repeat_interleave(share, 1)[:, :, None]
    q, keys, values = _cast(q, keys, values)
    blind = ~allowed.any(3, keepdim=True)
    allowed = (allowed | blind).expand(B, H, n, -1)
    grouped = {"enable_gqa": True} if Hk != H else {}  # asked and not passed on: of dynamic sizes torch.compile makes no bool that the function takes
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, allowed, scale=scale, **grouped)
    return out.masked_fill(blind, 0.0)


class KeyValueCache:
    """Room for the keys and values of up to `tokens` tokens: k (B, Hk, tokens, D) and v, of which the first `length` are there."""

    def __init__(self, batch: int, heads: int, tokens: int, depth: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        for name, size in (("batch", batch), ("heads", heads), ("tokens", tokens), ("depth", depth)):
            if type(size) is not int or size < 0:
                raise ValueError(f"{name}: expected an int, at least 0, got {size!r}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, got {dtype}")
        self.k = torch.zeros(batch, heads, tokens, depth, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.length = 0

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """k and v (B, Hk, n, D) of the next n tokens, in the cache's dtype (under autocast in any, which becomes the cache's). ValueError where they do not
        fit.
        """
        (B, H, tokens, D), device = self.k.shape, self.k.device
        casts = device.type != "meta" and torch.is_autocast_enabled(device.type)
        for name, tensor in (("k", k), ("v", v)):
            if not isinstance(tensor, Tensor) or tensor.ndim != 4 or (*tensor.shape[:2], tensor.shape[3]) != (B, H, D):
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name}: expected ({B}, {H}, tokens, {D}) for a cache {tuple(self.k.shape)}, got {got}")
            if self.length + tensor.shape[2] > tokens:
                raise ValueError(f"{name}: expected up to {tokens - self.length} tokens for a cache {tuple(self.k.shape)}, got {tuple(tensor.shape)}")
            if tensor.device != device or (tensor.dtype != self.k.dtype and not (casts and tensor.dtype in DTYPES)):
                raise ValueError(f"{name}: expected {self.k.dtype} on {device} as the cache has, got {tensor.dtype} on {tensor.device}")
        if k.shape != v.shape:
            raise ValueError(f"v: expected {tuple(k.shape)} as k has, got {tuple(v.shape)}")
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
