"""Convolutions whose weight is zero outside blocks of (output channels, input channels), for every position of the kernel.

    layer = Conv2d(256, 512, 3, patterns.balanced_random((512, 256), 32, density=0.25), padding=1)
    y = layer(x)                                       # (N, 256, H, W) -> (N, 512, H, W)

A convolution is one block-sparse product with the windows of the input laid out as columns. Laying them out takes time of its own:
on a CPU these layers save weights and memory of the optimizer but not yet time (3 x 3, 256 channels, 28 x 28, forward and backward on one core:
1.35 of torch's dense convolution at 25 % of the blocks, 1.09 at 10 %). Convolutions after openai/blocksparse (Gray, Radford, Kingma:
GPU Kernels for Block-Sparse Weights, 2017), whose blocks are lists of channels: permute the channels to bring such lists into blocks.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from onetorch.sparse.layers import BlockSparse
from onetorch.sparse.layout import Layout
from onetorch.sparse.products import _accumulator, dds

Size = int | tuple[int, ...]


def _sizes(name: str, value: Size, dims: int, least: int) -> tuple[int, ...]:
    sizes = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(sizes) != dims or not all(type(n) is int and n >= least for n in sizes):
        raise ValueError(f"{name}: expected an int or {dims} ints, each at least {least}, got {value!r}")
    return sizes


def _ends(padding: Size | str, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """(before, after) of each dimension, as torch's convolutions pad."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        if any(s != 1 for s in stride):
            raise ValueError(f'padding: "same" needs stride 1, got {stride}')
        return [((k - 1) * d // 2, (k - 1) * d - (k - 1) * d // 2) for k, d in zip(kernel, dilation, strict=True)]
    if isinstance(padding, str):
        raise ValueError(f'padding: expected ints, "same" or "valid", got {padding!r}')
    return [(p, p) for p in _sizes("padding", padding, len(kernel), 0)]


class _Conv(BlockSparse):
    """See Conv2d."""

    dims: int
    tiled: Layout

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        layout: Layout,
        stride: Size = 1,
        padding: Size | Literal["same", "valid"] = 0,
        dilation: Size = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: bool = False,
    ):
        super().__init__()
        if not isinstance(layout, Layout):
            raise ValueError(f"layout: expected a Layout, got {type(layout).__name__}")
        if layout.shape != (out_channels, in_channels) or layout.heads is not None:
            raise ValueError(f"layout: expected ({out_channels}, {in_channels}) without heads, output by input channels, got {layout!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = _sizes("kernel_size", kernel_size, self.dims, 1)
        self.stride, self.dilation = _sizes("stride", stride, self.dims, 1), _sizes("dilation", dilation, self.dims, 1)
        self.padding = _ends(padding, self.kernel_size, self.stride, self.dilation)
        self.taps = math.prod(self.kernel_size)
        self._create(layout, self.kernel_size, gate, device, dtype)
        self.bias = nn.Parameter(torch.empty(out_channels, device=self.layout.device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def _take(self, layout: Layout) -> None:
        super()._take(layout)
        # A block of (br, bc) channels and its taps is, for each output, bc * taps numbers that follow each other: `taps` blocks of the same size.
        columns = layout.grid[1] * layout.block[1] * self.taps
        self.tiled = Layout._of(layout.mask.repeat_interleave(self.taps, 1), layout.block, (layout.shape[0], columns), layout.kept * self.taps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, *size) or without N -> (N, out_channels, *size'). ValueError where x does not fit."""
        if x.ndim == self.dims + 1:
            return self.forward(x[None])[0]
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected (batch, {self.in_channels}, {self.dims} sizes), got {tuple(x.shape)}")
        size = []
        for n, k, s, d, (before, after) in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, self.padding, strict=True):
            size.append((n + before + after - (k - 1) * d - 1) // s + 1)
            if size[-1] < 1:
                raise ValueError(f"x: expected sizes that hold the kernel {self.kernel_size}, got {tuple(x.shape)}")
        # (N, P, channels taps), where channels are those of whole blocks; in float32 at least, since the backward pass adds up what the windows share
        columns = self._windows(x.to(_accumulator(x.dtype)), size).to(x.dtype)
        (br, bc), kept = self.layout.block, self.layout.kept
        values = self.gated_weight().reshape(kept, br, self.taps, bc).transpose(1, 2).reshape(kept * self.taps, br, bc)
        y = self._probed(dds(columns, values, self.tiled, transpose_sparse=True, bias=self.bias), columns)
        return y.mT.unflatten(2, size)  # (N, out_channels, *size), channels last in memory

    def _windows(self, x: Tensor, size: list[int]) -> Tensor:
        whole = self.layout.grid[1] * self.layout.block[1]
        pads = [n for ends in reversed(self.padding) for n in ends] + [0, whole - self.in_channels]
        x = nn.functional.pad(x, pads) if any(pads) else x
        if self.dims < 3:
            one = (1,) * (2 - self.dims)
            flat = x if self.dims == 2 else x.unsqueeze(2)
            return nn.functional.unfold(flat, (*one, *self.kernel_size), (*one, *self.dilation), 0, (*one, *self.stride)).mT
        for dim, (n, k, s, d) in enumerate(zip(size, self.kernel_size, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + dim, (k - 1) * d + 1, s)[..., ::d].narrow(2 + dim, 0, n)  # (N, C, sizes ..., kernel ...)
        return x.movedim(1, 4).flatten(4).flatten(1, 3)

    def to_dense(self) -> Tensor:
        """The weight, times the gates, as (out_channels, in_channels, *kernel_size). Differentiable."""
        taps = self.gated_weight().flatten(3).movedim(3, 0)
        return self.layout.to_dense(taps).movedim(0, 2).unflatten(2, self.kernel_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """U(-s, s) with s = 1 / sqrt(inputs of that output, all taps counted), for weights and bias: torch's own, scaled to the sparsity."""
        layout, br = self.layout, self.layout.block[0]
        inputs = (layout.mask * self.block_sizes()[0] / min(br, self.out_channels)).sum(1)  # (R,), with all taps
        bound = inputs.clamp_min(1).rsqrt()
        self.weight.uniform_(-1, 1).mul_(bound[layout.rows.long()].view(-1, *[1] * (self.weight.ndim - 1)))
        taps = self.weight.flatten(3).movedim(3, 0)
        self.weight.copy_(layout.from_dense(layout.to_dense(taps)).movedim(0, 3).view_as(self.weight))  # nothing beyond the edge
        if self.bias is not None:
            self.bias.uniform_(-1, 1).mul_((bound * (inputs > 0)).repeat_interleave(br)[: self.out_channels])

    def new_probe(self) -> Tensor:
        return self.weight.new_zeros(()).expand(self.tiled.shape).requires_grad_()

    def dense_blocks(self, dense: Tensor) -> Tensor:
        (R, C), (br, bc) = self.layout.grid, self.layout.block
        padded = nn.functional.pad(dense, (0, 0, 0, R * br - self.out_channels))
        return padded.view(R, br, C, bc * self.taps).square().sum((1, 3))

    def block_sizes(self) -> Tensor:
        return super().block_sizes() * self.taps

    def extra_repr(self) -> str:
        sizes = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        return f"{self.in_channels}, {self.out_channels}, {sizes}, bias={self.bias is not None}, {self.layout!r}"


class Conv1d(_Conv):
    """As Conv2d, on (N, in_channels, W)."""

    dims = 1


class Conv2d(_Conv):
    """nn.Conv2d with a weight that is zero outside the blocks of (output channels, input channels) that `layout` (out_channels, in_channels) keeps.

    weight (kept, br, bc, *kernel_size), bias (out_channels); `kernel_size`, `stride`, `padding` (with zeros; ints, "same" or "valid") and `dilation` as
    torch has them; `gate` as in `Linear`. Initialised like torch's, with the number of inputs that each output really has. The windows of the input take
    prod(kernel_size) times its memory. See `EdgeBias` for what padding does to the border.
    """

    dims = 2


class Conv3d(_Conv):
    """As Conv2d, on (N, in_channels, D, H, W)."""

    dims = 3


class EdgeBias(nn.Module):
    """A gain and a bias for the outputs of a convolution whose window reaches into the padding: y gain + bias there, y elsewhere.

    Those outputs see fewer inputs than the others. Every set of kernel positions that fall outside has a gain and a bias of its own per channel, as in
    openai/blocksparse: 8 sets for a 3 x 3 kernel with padding 1. Works after any convolution, dense ones too:

        nn.Sequential(Conv2d(64, 64, 3, layout, padding=1), EdgeBias(64, (32, 32), 3, padding=1))

    channels        of the convolution's output
    input_size      the sizes of the convolution's input, 1 to 3 of them; the other arguments are the convolution's
    gain, bias      (sets, channels), ones and zeros at first; sets in the order of the first output that has them
    """

    edge: Tensor

    def __init__(
        self,
        channels: int,
        input_size: tuple[int, ...],
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | Literal["same", "valid"] = 0,
        dilation: Size = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dims = len(input_size)
        if dims not in (1, 2, 3):
            raise ValueError(f"input_size: expected 1 to 3 sizes, got {input_size!r}")
        kernel, stride, dilation = (_sizes(*pair, dims, 1) for pair in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)))
        outside, size = torch.zeros(1, 1, dtype=torch.bool), []
        for n, k, s, d, (before, after) in zip(input_size, kernel, stride, dilation, _ends(padding, kernel, stride, dilation), strict=True):
            size.append((n + before + after - (k - 1) * d - 1) // s + 1)
            if size[-1] < 1:
                raise ValueError(f"input_size: expected sizes that hold the kernel {kernel}, got {input_size}")
            at = torch.arange(size[-1])[:, None] * s - before + torch.arange(k) * d
            one = (at < 0) | (at >= n)  # (outputs, taps) of this dimension
            outside = (outside[:, None, :, None] | one[None, :, None, :]).flatten(2).flatten(0, 1)
        self.size = tuple(size)
        _, kind = outside.unique(dim=0, return_inverse=True)
        kind = kind.masked_fill(~outside.any(1), -1)
        sets = list(dict.fromkeys(n for n in kind.tolist() if n >= 0))  # in the order in which they appear
        number = {n: place + 1 for place, n in enumerate(sets)} | {-1: 0}
        self.register_buffer("edge", torch.tensor([number[n] for n in kind.tolist()], device=device), persistent=False)
        self.gain = nn.Parameter(torch.ones(len(sets), channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(len(sets), channels, device=device, dtype=dtype))

    def forward(self, y: Tensor) -> Tensor:
        """(N, channels, *size) -> the same. ValueError where the sizes are not those of the convolution's output."""
        if y.shape[2:] != self.size or y.shape[1] != self.gain.shape[1]:
            raise ValueError(f"y: expected (batch, {self.gain.shape[1]}, {', '.join(map(str, self.size))}), got {tuple(y.shape)}")
        inner = self.gain.new_ones(1, self.gain.shape[1])
        gain, bias = torch.cat([inner, self.gain])[self.edge], torch.cat([inner - 1, self.bias])[self.edge]  # (P, channels)
        return torch.addcmul(bias.T.unflatten(1, self.size), y, gain.T.unflatten(1, self.size))

    def extra_repr(self) -> str:
        return f"{self.gain.shape[1]}, {self.gain.shape[0]} sets, output {self.size}"
