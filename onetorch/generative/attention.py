"""Causal self-attention of sequence models: dense, or over the blocks of a sparse pattern, and with a cache of keys and values for sampling.

The sparse patterns are those of the Sparse Transformer (Child, Gray, Radford, Sutskever 2019, arXiv:1904.10509), in whole blocks, as its kernels are:

| kind    | what a position sees                                                                                                     |
|---------|--------------------------------------------------------------------------------------------------------------------------|
| dense   | every position up to its own                                                                                             |
| local   | the last `stride` positions, rounded up to whole blocks                                                                  |
| strided | in even layers as local, in odd layers every `stride`-th position before it: two layers connect any two positions        |
| fixed   | its own segment of `stride` positions and the last `stride` / 8 of each segment before, others of them in each head      |
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from onetorch import sparse
from onetorch.sparse import patterns
from onetorch.sparse.layout import Layout

Kind = Literal["dense", "local", "strided", "fixed"]
PATHS = ("explicit", "sdpa", "blocks")  # ways to the same dense attention; sparse patterns have the last alone
LONG = 1024  # from this context on the explicit (T, T) scores cost too much memory, and blocks are worth a try


@dataclass
class Pattern:
    """What each position of `context` sees: the blocks that are kept, in another order of the positions and only within groups where these are given."""

    layout: Layout
    order: Tensor | None = None  # (context,) int64
    groups: Tensor | None = None  # (context,) int64

    def to(self, device: torch.device | str) -> "Pattern":
        order, groups = (None if t is None else t.to(device) for t in (self.order, self.groups))
        return Pattern(self.layout.to(device), order, groups)

    @cached_property
    def allowed(self) -> Tensor:
        """(context, context) or (heads, context, context) bool, in the natural order: whether the query (row) sees the key (column)."""
        seen = self.layout.element_mask()
        at = torch.arange(seen.size(-1), device=seen.device)
        if self.order is not None:
            place = self.order.argsort()  # where each position went
            seen = seen[..., place, :][..., place]
        if self.groups is not None:
            seen = seen & (self.groups[:, None] == self.groups)
        return seen & (at[:, None] >= at)


def pattern(kind: Kind, context: int, stride: int, layer: int, heads: int) -> Pattern:
    """The pattern of a layer, counted from zero."""
    if kind == "dense":
        return Pattern(patterns.causal(context, _block(context)))
    if kind == "fixed":
        summary = stride // 8
        return Pattern(patterns.fixed(context, _block(summary), stride, summary, heads))
    if kind == "local" or layer % 2 == 0:
        return Pattern(patterns.local(context, _block(stride // 2), stride))
    block, order = _block(context // stride), patterns.strided_order(context, stride)
    return Pattern(patterns.strided(context, block, stride), order, patterns.strided_groups(context, stride))


def _block(size: int) -> int:
    """The largest block that is no longer than `size`, up to 64."""
    return max((b for b in (8, 16, 32, 64) if b <= size), default=8)


def pairs(seen: Pattern | None, context: int, heads: int) -> int:
    """Pairs of query and key over all heads in a window of `context`; None is dense."""
    if seen is None:
        return heads * context * (context + 1) // 2
    allowed = seen.allowed
    return int(allowed.sum()) * (1 if allowed.ndim == 3 else heads)


@dataclass
class Cache:
    """Keys and values of the positions that a model has seen: with it a position costs what it costs, and not its whole past again."""

    length: int = 0  # positions held
    held: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer to keys and values (B, H, context, D)

    def extend(self, layer: int, k: Tensor, v: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, H, T, D) of a layer behind those it holds, and give all; the model moves `length` when all layers have."""
        if layer not in self.held:
            self.held[layer] = (k.new_empty(*k.shape[:2], context, k.size(3)), v.new_empty(*v.shape[:2], context, v.size(3)))
        end = self.length + k.size(2)
        for room, new in zip(self.held[layer], (k, v), strict=True):
            room[:, :, self.length : end] = new
        keys, values = self.held[layer]
        return keys[:, :, :end], values[:, :, :end]


def attend(q: Tensor, k: Tensor, v: Tensor, path: str, scale: float, mask: Tensor | None = None, seen: Pattern | None = None) -> Tensor:
    """softmax(scale q k^T where a position sees another) v, (B, H, T, D).

    explicit   in PyTorch, with `mask` (T, S) or (H, T, S): zero where the query sees the key, else -inf
    sdpa       torch's fused attention, causal
    blocks     `sparse.attention` over the pattern `seen`; a shorter window is filled up to the pattern's length
    """
    if path == "explicit":
        assert mask is not None
        return torch.softmax(q @ (k * scale).transpose(-2, -1) + mask, dim=-1) @ v  # scores (B, H, T, S)
    if path == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    assert seen is not None
    T, context = q.size(2), seen.layout.shape[0]
    if context > T:
        q, k, v = (F.pad(t, (0, 0, 0, context - T)) for t in (q, k, v))  # nothing before sees what comes after
    y = sparse.attention(q, k, v, seen.layout, causal=True, scale=scale, order=seen.order, groups=seen.groups)
    assert isinstance(y, Tensor)
    return y[:, :, :T]
