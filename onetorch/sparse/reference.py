"""The dense truth: what every kernel of this package must equal, in as few words as it takes. Slow, in float64, one block at a time."""

import torch
from torch import Tensor

from onetorch.sparse.layout import Layout


def to_dense(values: Tensor, layout: Layout) -> Tensor:
    """(kept, br, bc) -> (heads, rows, columns) float64; one head where the layout has none."""
    (R, C), (br, bc) = layout.grid, layout.block
    dense = torch.zeros(layout.heads or 1, R * br, C * bc, dtype=torch.float64)
    for n, (head, row, column) in enumerate(layout.mask.view(-1, R, C).nonzero().tolist()):
        dense[head, row * br : (row + 1) * br, column * bc : (column + 1) * bc] = values[n]
    return dense[:, : layout.shape[0], : layout.shape[1]]


def sample(dense: Tensor, layout: Layout) -> Tensor:
    """(heads, rows, columns) -> the kept blocks (kept, br, bc), zeros beyond the edge."""
    (R, C), (br, bc) = layout.grid, layout.block
    values = torch.zeros(layout.kept, br, bc, dtype=torch.float64)
    for n, (head, row, column) in enumerate(layout.mask.view(-1, R, C).nonzero().tolist()):
        part = dense[head, row * br : (row + 1) * br, column * bc : (column + 1) * bc]
        values[n, : part.shape[0], : part.shape[1]] = part
    return values


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T over the elements that `keep` (S, S) or (..., S, S) allows) v; zeros for a query that may see nothing."""
    scores = (scale * q.double() @ k.double().mT).masked_fill(~keep, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v.double()
