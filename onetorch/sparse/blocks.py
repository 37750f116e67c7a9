"""Operations on the kept blocks themselves: softmax over the blocks of a row, and the product of two block-sparse matrices.

    scores = sdd(q, k, layout, transpose_b=True)       # (B, kept, br, bc)
    y = dsd(softmax(scores, layout, scale=0.125), v, layout)

With `sdd` and `dsd` before and after it the softmax is attention in pieces, as openai/blocksparse has it; `attention` is the same in one kernel that keeps
no scores. All of it is PyTorch's own operations, on every device and to any order of differentiation.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from onetorch.sparse.layout import Layout
from onetorch.sparse.products import _accumulator, _check_layout, _check_number, _check_restriction, _check_values, _inside

CHUNK = 1 << 24  # elements of gathered blocks that `sss` holds at a time


def _row_sums(x: Tensor, layout: Layout, rows: Tensor) -> Tensor:
    """(..., kept, br) -> the sums over the blocks of a block row, (..., H R, br)."""
    sums = x.new_zeros(*x.shape[:-2], (layout.heads or 1) * layout.grid[0], x.shape[-1])
    if x.device.type == "cpu":  # each device's accumulation that keeps one order
        return sums.index_add(-2, rows, x)
    return sums.movedim(-2, 0).index_put((rows,), x.movedim(-2, 0), accumulate=True).movedim(0, -2)


class _Softmax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, allowed: Tensor | None, layout: Layout, scale: float) -> Tensor:
        rows = layout.rows.long()
        x = scores.to(_accumulator(scores.dtype)) * scale
        if allowed is not None:
            x = x.masked_fill(~allowed, -torch.inf)
        lines = x.new_full((*x.shape[:-3], (layout.heads or 1) * layout.grid[0], x.shape[-2]), -torch.inf)
        place = rows[:, None].expand(x.shape[:-1])
        top = lines.scatter_reduce(-2, place, x.amax(-1), "amax") if layout.kept else lines
        top = top.masked_fill(top == -torch.inf, 0.0)  # nothing may be seen: any finite number will do
        exps = (x - top.index_select(-2, rows).unsqueeze(-1)).exp()
        total = _row_sums(exps.sum(-1), layout, rows)
        share = exps / total.index_select(-2, rows).clamp_min(torch.finfo(x.dtype).tiny).unsqueeze(-1)
        # not `to` alone: where it does nothing, torch 2.11 compiles a Function whose gradient is 0
        return share if share.dtype == scores.dtype else share.to(scores.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, _, ctx.layout, ctx.scale = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (p,) = ctx.saved_tensors
        kind, rows = _accumulator(p.dtype), ctx.layout.rows.long()
        p, grad = p.to(kind), grads[0].to(kind)
        product = p * grad
        mean = _row_sums(product.sum(-1), ctx.layout, rows).index_select(-2, rows).unsqueeze(-1)
        return (ctx.scale * (product - p * mean)).to(grads[0].dtype), None, None, None


def softmax(values: Tensor, layout: Layout, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """softmax(scale values) along the rows of the matrix, over its kept blocks: values (..., kept, br, bc) -> the same shape.

    mask (kept, br, bc) bool, true where allowed: `layout.from_dense(allowed)`; what is not allowed, and what lies beyond the edge, takes no part and gets
    0, as does a row that allows nothing. Sums are carried in float32 at least. Differentiable any number of times. ValueError names the argument that does
    not fit.
    """
    _check_layout(layout)
    _check_values(values, layout)
    _check_restriction("mask", mask, layout.values_shape, (torch.bool,), values.device)
    _check_number("scale", scale)
    inside = _inside(layout.index, layout.heads or 1, layout.grid, layout.block, *layout.shape)
    allowed = mask if inside is None else inside if mask is None else mask & inside
    return _Softmax.apply(values, allowed, layout, float(scale))


@torch.compiler.assume_constant_result  # how many pairs there are depends on values, which a graph cannot know; it watches the identity of the layouts
def _meeting(a_layout: Layout, b_layout: Layout, layout: Layout | None) -> tuple[Layout, Tensor, Tensor, Tensor]:
    """The layout of the product, and where the two blocks and the result of each pair that meets stand, three times (pairs,)."""
    possible = a_layout @ b_layout
    layout = possible if layout is None else layout
    possible._same(layout)
    H, K, C = a_layout.heads or 1, a_layout.grid[1], b_layout.grid[1]
    offsets = b_layout.index[: H * K + 1].long()
    a_rows, a_columns, b_columns = a_layout.rows.long(), a_layout.columns.long(), b_layout.columns.long()
    count = offsets[a_columns + 1] - offsets[a_columns]  # how many blocks of b each block of a meets
    left = torch.arange(a_layout.kept, device=layout.device).repeat_interleave(count)
    right = offsets[a_columns][left] + torch.arange(left.shape[0], device=layout.device) - (count.cumsum(0) - count)[left]
    where = a_rows[left] * C + b_columns[right] % C
    wanted = layout.mask.view(-1)[where]
    left, right, where = left[wanted], right[wanted], where[wanted]
    return layout, left, right, (layout.mask.view(-1).cumsum(0) - 1)[where]


def sss(a: Tensor, b: Tensor, a_layout: Layout, b_layout: Layout, layout: Layout | None = None) -> tuple[Tensor, Layout]:
    """sparse (R, K) @ sparse (K, C) -> (values (..., kept, br, bc), layout).

    a (..., kept, br, bk) of `a_layout`, b (..., kept, bk, bc) of `b_layout`, with the same leading dimensions, heads and blocks of K. `layout` (R, C) is what
    of the product is wanted; left out: all that can be other than zero, `a_layout @ b_layout`. Memory grows with the pairs of blocks that meet (for the
    backward pass), not with R, K and C. What blocks hold beyond the edge is not read. Differentiable any number of times; on the CPU bit-identical from
    call to call. Under torch.compile (torch 2.13 on) layouts are constants: others compile again. ValueError names the argument that does not fit.
    """
    for name, one in (("a_layout", a_layout), ("b_layout", b_layout)):
        if not isinstance(one, Layout):
            raise ValueError(f"{name}: expected a Layout, got {type(one).__name__}")
    _check_values(a, a_layout, "a")
    _check_values(b, b_layout, "b")
    if a.shape[:-3] != b.shape[:-3] or a.dtype != b.dtype:
        raise ValueError(f"b: expected leading dimensions {tuple(a.shape[:-3])} and {a.dtype} as a has, got {tuple(b.shape)} {b.dtype}")
    layout, left, right, target = _meeting(a_layout, b_layout, layout)
    kind = _accumulator(a.dtype)
    H, (br, bk), bc = a_layout.heads or 1, a_layout.block, b_layout.block[1]

    def clean(values: Tensor, of: Layout) -> Tensor:
        inside = _inside(of.index, H, of.grid, of.block, *of.shape)
        return values.to(kind) if inside is None else values.to(kind).masked_fill(~inside, 0.0)

    def product(x: Tensor, y: Tensor) -> Tensor:
        if x.device.type == "meta":
            return x @ y
        with torch.autocast(x.device.type, enabled=False):  # sums are carried in `kind`
            return x @ y

    x, y = clean(a, a_layout), clean(b, b_layout)
    values = x.new_zeros(*a.shape[:-3], layout.kept, br, bc)
    parts = [(left, right, target)]
    if not torch.compiler.is_compiling():  # which would ask into how many parts a number of pairs falls that it takes for unknown
        step = max(1, CHUNK // (max(1, prod(a.shape[:-3])) * (br * bk + bk * bc + br * bc)))
        parts = list(zip(left.split(step), right.split(step), target.split(step), strict=True))
    for i, j, t in parts:
        values = values.index_add(-3, t, product(x.index_select(-3, i), y.index_select(-3, j)))
    return values.to(a.dtype), layout
