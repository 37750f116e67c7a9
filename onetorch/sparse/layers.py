"""Layers with block-sparse weights.

    layer = Linear(1024, 4096, patterns.balanced_random((4096, 1024), 32, density=0.25))
    y = layer(x)                                       # (..., 1024) -> (..., 4096)
    layer.to_dense()                                   # (4096, 1024), zeros where no block is kept

Blocks follow nn.Linear's weight: layout rows are outputs, columns are inputs.
"""

import math

import torch
from torch import Tensor, nn

from onetorch.sparse.layout import Layout
from onetorch.sparse.products import dds


class Linear(nn.Module):
    """y = x W^T + b, where W (out_features, in_features) is zero outside the blocks that `layout` keeps.

    weight (kept, br, bc), bias (out_features). The layout is saved with the weights; loading weights of another layout raises ValueError.
    Initialised as `reset_parameters` says: like nn.Linear, with the number of inputs that each output really has.
    """

    layout: Layout
    layout_mask: Tensor

    def __init__(
        self, in_features: int, out_features: int, layout: Layout, bias: bool = True, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        if not isinstance(layout, Layout):
            raise ValueError(f"layout: expected a Layout, got {type(layout).__name__}")
        if layout.shape != (out_features, in_features) or layout.heads is not None:
            raise ValueError(f"layout: expected ({out_features}, {in_features}) without heads, outputs by inputs as nn.Linear's weight, got {layout!r}")
        self.in_features, self.out_features = in_features, out_features
        self.layout = layout if device is None else layout.to(device)
        kind = {"device": self.layout.device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(layout.values_shape, **kind))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(out_features, **kind)) if bias else None  # type: ignore[arg-type]
        self.register_buffer("layout_mask", self.layout.mask)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 1:
            return self.forward(x[None])[0]
        return dds(x, self.weight, self.layout, transpose_sparse=True, bias=self.bias)

    def to_dense(self) -> Tensor:
        """The weight as (out_features, in_features). Differentiable."""
        return self.layout.to_dense(self.weight)

    def fan_in(self) -> Tensor:
        """(out_features,): how many inputs each output has."""
        blocks = torch.full((self.layout.grid[1],), self.layout.block[1], device=self.layout.device)
        blocks[-1] = self.in_features - (self.layout.grid[1] - 1) * self.layout.block[1]
        return (self.layout.mask * blocks).sum(1).repeat_interleave(self.layout.block[0])[: self.out_features]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """U(-s, s) with s = 1 / sqrt(inputs of that output), for weights and bias: nn.Linear's own, scaled to the sparsity. An output without inputs has
        bias 0.
        """
        bound = self.fan_in().clamp_min(1).rsqrt()
        padded = torch.nn.functional.pad(bound, (0, self.layout.grid[0] * self.layout.block[0] - self.out_features))
        self.weight.uniform_(-1, 1).mul_(padded.view(-1, self.layout.block[0])[self.layout.rows.long()][:, :, None])
        self._clear_edges()
        if self.bias is not None:
            self.bias.uniform_(-1, 1).mul_(bound * (self.fan_in() > 0))

    @torch.no_grad()
    def identity_(self) -> "Linear":
        """Weights 1 where output and input have the same number, 0 elsewhere; bias 0. ValueError where the layout does not keep the diagonal."""
        wanted = torch.eye(self.out_features, self.in_features, dtype=torch.bool, device=self.layout.device)
        if not bool((self.layout.element_mask() | ~wanted).all()):
            raise ValueError(f"layout: identity needs the blocks of the diagonal, which are not all kept in {self.layout!r}")
        self.weight.copy_(self.layout.from_dense(wanted.to(self.weight.dtype)))
        if self.bias is not None:
            self.bias.zero_()
        return self

    @torch.no_grad()
    def orthogonal_(self, gain: float = 1.0) -> "Linear":
        """Every block (semi-)orthogonal, scaled so that an output's weights have norm `gain` (on average over a block where it is higher than wide); bias 0."""
        br, bc = self.layout.block
        tall, wide = max(br, bc), min(br, bc)
        basis, triangle = torch.linalg.qr(torch.randn(self.layout.kept, tall, wide, device=self.layout.device))
        basis = basis * triangle.diagonal(dim1=1, dim2=2).sgn()[:, None, :]  # uniform over orthogonal matrices
        per_row = self.layout.mask.sum(1)[self.layout.rows.long()]
        scale = gain * math.sqrt(br / wide) / per_row.sqrt()
        self.weight.copy_((basis if br >= bc else basis.mT) * scale[:, None, None])
        self._clear_edges()
        if self.bias is not None:
            self.bias.zero_()
        return self

    def _clear_edges(self) -> None:
        self.weight.copy_(self.layout.from_dense(self.layout.to_dense(self.weight)))

    @staticmethod
    @torch.no_grad()
    def from_linear(linear: nn.Linear, layout: Layout) -> "Linear":
        """The blocks of a dense layer that `layout` keeps."""
        made = Linear(linear.in_features, linear.out_features, layout, linear.bias is not None, linear.weight.device, linear.weight.dtype)
        made.weight.copy_(made.layout.from_dense(linear.weight))
        if made.bias is not None:
            made.bias.copy_(linear.bias)
        return made

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The same function as a dense layer."""
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.weight.device, dtype=self.weight.dtype)
        made.weight.copy_(self.to_dense())
        if self.bias is not None:
            made.bias.copy_(self.bias)
        return made

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.layout!r}"

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.weight.device.type != "meta":
            self.layout = self.layout.to(self.weight.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        mask = state_dict.get(prefix + "layout_mask")
        if mask is not None and (mask.shape != self.layout.mask.shape or not torch.equal(mask.to(self.layout.device), self.layout.mask)):
            raise ValueError(
                f"{prefix}layout_mask: expected weights of {self.layout!r}, got those of {tuple(mask.shape)} blocks, {int(mask.sum())} kept, or of other blocks"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def to_bsr(values: Tensor, layout: Layout) -> Tensor:
    """(kept, br, bc) -> torch's sparse BSR tensor of shape (rows, columns). Whole blocks and no heads: ValueError otherwise."""
    if layout.heads is not None or layout.shape[0] % layout.block[0] or layout.shape[1] % layout.block[1]:
        raise ValueError(f"layout: BSR needs one matrix of whole blocks, got {layout!r}")
    R, C = layout.grid
    return torch.sparse_bsr_tensor(layout.index[: R + 1].long(), layout.columns.long() % C, values, size=layout.shape, check_invariants=False)


def from_bsr(tensor: Tensor) -> tuple[Tensor, Layout]:
    """A torch sparse BSR matrix -> (values, layout). The blocks must have a size of `layout.BLOCKS`."""
    if tensor.layout != torch.sparse_bsr or tensor.ndim != 2:
        raise ValueError(f"tensor: expected a sparse BSR matrix, got {tensor.ndim} dimensions, {tensor.layout}")
    block = (tensor.values().shape[1], tensor.values().shape[2])
    grid = (tensor.shape[0] // block[0], tensor.shape[1] // block[1])
    rows = torch.repeat_interleave(torch.arange(grid[0], device=tensor.device), tensor.crow_indices().diff())
    columns = tensor.col_indices()
    layout = Layout.from_indices(rows, columns, grid, block)
    return tensor.values()[(rows * grid[1] + columns).argsort()], layout
