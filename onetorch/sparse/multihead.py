"""Multi-head self-attention over a block-sparse layout.

    layer = MultiheadAttention(512, 8, patterns.local(4096, 64, window=256), causal=True)
    y = layer(x)                                       # (B, 4096, 512)
"""

from typing import Any

import torch
from torch import Tensor, nn

from onetorch.sparse.attention import KeyValueCache, attention, decode
from onetorch.sparse.layout import Layout, _with_values
from onetorch.sparse.products import DTYPES, _check_number, _check_operand, _check_restriction


class MultiheadAttention(nn.Module):
    """y = softmax(q k^T / sqrt(D) over the kept blocks) v W_o, with q, k and v linear in x; D = features / heads.

    features        of x and y, a multiple of heads
    heads           query heads; `key_heads` divides them (grouped-query attention, Ainslie et al. 2023); left out: as many
    layout          (S, S), one for all heads or one per query head; a shorter sequence takes the layout's first rows and columns
    causal, groups, order, mask   as `attention` has them
    dropout         of the probabilities, while training; a token that is written on its own (`decode`) has none
    bias            of the two projections

    qkv is Linear(features, (heads + 2 key_heads) D): queries, keys, values; out is Linear(features, features).
    """

    layout: Layout
    groups: Tensor | None
    order: Tensor | None
    mask: Tensor | None

    def __init__(
        self,
        features: int,
        heads: int,
        layout: Layout,
        *,
        key_heads: int | None = None,
        causal: bool = False,
        groups: Tensor | None = None,
        order: Tensor | None = None,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        if not isinstance(layout, Layout):
            raise ValueError(f"layout: expected a Layout, got {type(layout).__name__}")
        for name, count in (("features", features), ("heads", heads), ("key_heads", key_heads)):
            if type(count) is not int or count < 1:
                raise ValueError(f"{name}: expected an int, at least 1, got {count!r}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, got {dtype}")
        if features % heads:
            raise ValueError(f"heads: expected a divisor of the {features} features, got {heads}")
        if heads % key_heads:
            raise ValueError(f"key_heads: expected a divisor of the {heads} heads, got {key_heads}")
        if layout.shape[0] != layout.shape[1] or layout.heads not in (None, heads):
            raise ValueError(f"layout: expected as many queries as keys, and one for all heads or {heads}, got {layout!r}")
        _check_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a share in 0..1, not 1, got {dropout}")
        self.features, self.heads, self.key_heads, self.causal, self.dropout = features, heads, key_heads, causal, dropout
        self.layout = layout if device is None else layout.to(device)
        for name, tensor in (("groups", groups), ("order", order), ("mask", mask)):
            kinds, size = ((torch.bool,), layout.values_shape) if name == "mask" else ((torch.int64, torch.int32), layout.shape[:1])
            _check_restriction(name, tensor, size, kinds, tensor.device if isinstance(tensor, Tensor) else layout.device)
            if tensor is not None:
                _with_values(name, tensor)
            self.register_buffer(name, None if tensor is None else tensor.to(self.layout.device), persistent=False)
        depth = features // heads
        self.qkv = nn.Linear(features, (heads + 2 * key_heads) * depth, bias, device=self.layout.device, dtype=dtype)
        self.out = nn.Linear(features, features, bias, device=self.layout.device, dtype=dtype)

    def new_cache(self, batch: int) -> KeyValueCache:
        """Room for the keys and values of a whole sequence, in the dtype of the weights."""
        weight = self.qkv.weight
        return KeyValueCache(batch, self.key_heads, self.layout.shape[1], self.features // self.heads, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor, *, key_padding: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """x (B, T, features) -> (B, T, features). `key_padding` (B, T) bool, true where the token exists.

        With a `cache` (`new_cache`), x are the T tokens after those that the cache holds; their keys and values are added to it, and `key_padding` covers
        all tokens so far. ValueError where x does not fit or reaches over the end of the layout.
        """
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != self.features:
            raise ValueError(f"x: expected (batch, tokens, {self.features}), got {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}")
        _check_operand("x", x, self.qkv.weight)
        if cache is not None and not isinstance(cache, KeyValueCache):
            raise ValueError(f"cache: expected a KeyValueCache, got {type(cache).__name__}")
        B, T, _ = x.shape
        start = 0 if cache is None else cache.length
        S = self.layout.shape[0]
        if not 1 <= T <= S - start:
            raise ValueError(f"x: expected 1..{S - start} tokens, as many as the layout has left, got {T}")
        _check_restriction("key_padding", key_padding, (B, start + T), (torch.bool,), x.device)
        depth = self.features // self.heads
        sizes = [self.heads, self.key_heads, self.key_heads]
        q, k, v = self.qkv(x).view(B, T, sum(sizes), depth).transpose(1, 2).split(sizes, 1)
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            cache.append(k, v)
        options: dict[str, Any] = {"groups": self.groups, "order": self.order, "mask": self.mask}
        if T == S:
            y = attention(q, k, v, self.layout, causal=self.causal, key_padding=key_padding, dropout=dropout, **options)
        elif start == 0 and self.order is None and self.mask is None:
            options["groups"] = None if self.groups is None else self.groups[:T]
            y = attention(q, k, v, self.layout.crop(T, T), causal=self.causal, key_padding=key_padding, dropout=dropout, **options)
        elif cache is not None:
            if key_padding is not None:
                key_padding = nn.functional.pad(key_padding, (0, S - key_padding.shape[1]))
            y = decode(q, cache.k, cache.v, self.layout, start, causal=self.causal, key_padding=key_padding, **options)
        else:
            raise ValueError(f"x: expected the layout's {S} tokens, since it has an order or a mask of its own, got {T}")
        assert isinstance(y, Tensor)
        return self.out(y.transpose(1, 2).reshape(B, T, self.features))

    def extra_repr(self) -> str:
        return f"{self.features}, heads={self.heads}, key_heads={self.key_heads}, causal={self.causal}, dropout={self.dropout}, {self.layout!r}"

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.qkv.weight.device.type != "meta":
            self.layout = self.layout.to(self.qkv.weight.device)
        return self
