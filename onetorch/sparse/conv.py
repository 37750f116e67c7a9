"""Convolutions whose weight is zero outside blocks of (output channels, input channels), for every position of the kernel.

    layer = Conv2d(256, 512, 3, patterns.balanced_random((512, 256), 32, density=0.25), padding=1)
    y = layer(x)                                       # (N, 256, H, W) -> (N, 512, H, W)

With stride 1, in float32 and float64 on the CPU, each row of kernel positions is one block-sparse product with the input, channels last, seen through a
window that overlaps in memory: nothing is laid out per position. Where torch's dense convolution was measured faster on this machine (`costs_of`, for
forward alone and with backward; `choice` says which it is), and for every other stride, dtype and device, the weight is filled in and torch's dense
convolution is taken; there a NaN in a channel that no block uses is read. Beside torch's dense convolution on one core of an AMD EPYC, forward and
backward, blocks of 32: 1 x 1, 512 channels: 0.65 of its time with half of the blocks, 0.41 at 25 %; 3 x 3: 0.63 to 0.71 at 50 %, 0.37 to 0.44 at 25 %.
Where the dense one is taken (mostly above half of the blocks, one or two images) training fills in the weight at each call and takes its gradient out
again: 1.00 to 1.04 of dense; where no gradient is asked for it stays filled in: 1.00 to 1.02 (benchmarks/sparse_conv.py).
Convolutions after openai/blocksparse (Gray, Radford, Kingma:
GPU Kernels for Block-Sparse Weights, 2017), whose blocks are lists of channels: permute the channels to bring such lists into blocks.
"""

import functools
import itertools
import json
import math
import os
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from onetorch.sparse import cpu
from onetorch.sparse.layers import BlockSparse
from onetorch.sparse.layout import Layout
from onetorch.sparse.products import _PLAIN, _call, _check_operand, _dds, _fill, _plain, _sdd

Size = int | tuple[int, ...]
EXACT = (torch.float32, torch.float64)  # the products of several rows are added in their own dtype
CHANNELS = 256
MOST = 0.92  # of dense: what the products may be expected to take at most; at other sizes than the measured one the estimate is low by up to a twelfth
measured: dict[str, tuple[float, float]] = {}  # what is known in this process


class _Filled(NamedTuple):
    """The dense weight of a layer, and what it was made of."""

    layout: Layout
    parts: tuple[Tensor, Tensor]  # the weight and the gates: while they are held nothing else comes to stand at their addresses
    made: tuple[int, ...]  # their addresses and versions
    dense: Tensor


_filled: weakref.WeakKeyDictionary["_Conv", _Filled] = weakref.WeakKeyDictionary()  # beside the layers: a copy of a layer begins without


def _looked_on() -> bool:
    """Whether a compiler, a transform or a mode watches what is done: then nothing is remembered from call to call."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def _sizes(name: str, value: Size, dims: int, least: int) -> tuple[int, ...]:
    sizes = (value,) * dims if isinstance(value, int) else value
    if not isinstance(sizes, (tuple, list)) or len(sizes) != dims or not all(type(n) is int and n >= least for n in sizes):
        raise ValueError(f"{name}: expected an int or {dims} ints, each at least {least}, got {value!r}")
    return tuple(sizes)


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


class _Side(NamedTuple):
    """A line of kernel positions (the last kernel dimension) as one block-sparse matrix (outputs, span inputs). Block t * kept + k of the weight, of tap t,
    stands at `place` among the blocks of its line, as it is or, where the input's gradient turns lines, taps and blocks around, transposed.
    """

    rows: Layout
    place: Tensor
    turned: bool


def _sides(layout: Layout, lines: int, positions: int, dilation: int) -> tuple[_Side, _Side]:
    """Of the convolution and of the gradient of its input."""
    transpose = layout.transpose()
    in_transpose = layout.index[layout.index.shape[0] - 2 * layout.kept : layout.index.shape[0] - layout.kept].long()
    sides = []
    for one, number in ((layout, torch.arange(layout.kept, device=layout.device)), (transpose, in_transpose)):
        (R, C), (br, bc), span = one.grid, one.block, (positions - 1) * dilation + 1
        mask = one.mask.new_zeros(R, span, C)
        mask[:, ::dilation] = one.mask[:, None]
        rows = Layout._of(mask.flatten(1), one.block, (R * br, span * C * bc), positions * one.kept)
        at = torch.zeros(R, span, C, device=one.device, dtype=torch.int64)
        at[rows.rows.long(), rows.columns.long() % (span * C) // C, rows.columns.long() % C] = torch.arange(positions * one.kept, device=one.device)
        r, c = one.rows.long(), one.columns.long() % C
        place = torch.empty(positions, one.kept, device=one.device, dtype=torch.int64)
        place[:, number] = at[r, :, c].T[::dilation]
        turned = one is transpose
        sides.append(_Side(rows, (place.flip(0) if turned else place).repeat(lines, 1).flatten(), turned))
    return sides[0], sides[1]


def _in_place(weight: Tensor) -> bool:
    return not _looked_on() and _plain(weight) and weight.device.type == "cpu" and weight.dtype in EXACT and cpu.library() is not None


def _pack(weight: Tensor, side: _Side, lines: int) -> Tensor:
    """(kept, br, bc, taps) -> (lines, positions kept, br, bc), the blocks of each line as those of a product of this side."""
    if _in_place(weight):
        return cpu.pack_taps(weight, side.place, lines, side.turned)
    blocks = weight.movedim(3, 0).unflatten(0, (lines, -1)).flatten(1, 2)
    blocks = blocks.flip(0).mT if side.turned else blocks
    return blocks[:, side.place[: blocks.shape[1]].argsort()].contiguous()


def _unpack(blocks: list[Tensor], side: _Side, taps: int) -> Tensor:
    """Back, from the blocks of each line."""
    if _in_place(blocks[0]):
        return cpu.unpack_taps(blocks, side.place, taps, side.turned)
    stacked = torch.stack(blocks)[:, side.place[: blocks[0].shape[0]]]
    stacked = stacked.mT.flip(0) if side.turned else stacked
    return stacked.reshape(taps, side.place.shape[0] // taps, *stacked.shape[2:]).movedim(0, 3).contiguous()


class _Taps(torch.autograd.Function):
    """x (L + E, inputs), weight (kept, br, bc, taps) -> (L, outputs): y[l] = sum over lines i of x[l + starts[i] : + span] against line i, where E is the
    reach of the last. No window is laid out: that `span` rows of x follow each other in memory is all that a product needs.
    """

    @staticmethod
    def forward(ctx, x, weight, sides, starts):
        ctx.save_for_backward(x, weight)
        ctx.sides, ctx.starts = sides, starts
        rows = sides[0].rows
        each = zip(starts, _pack(weight, sides[0], len(starts)), strict=True)
        parts = (_dds(_windows(x, start, starts, rows), blocks[None], rows.index, None, *rows.shape, True) for start, blocks in each)
        return functools.reduce(Tensor.add_, parts)[0, 0]

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = _taps_of_input(grad, weight, ctx.sides, ctx.starts) if ctx.needs_input_grad[0] else None
        dweight = _TapsWeight.apply(grad, x, ctx.sides, ctx.starts, weight.shape[3]) if ctx.needs_input_grad[1] else None
        return dx, dweight, None, None


class _TapsWeight(torch.autograd.Function):
    """The gradient of the weight of `_Taps` from that of its result, (L, outputs), and its x."""

    @staticmethod
    def forward(ctx, grad, x, sides, starts, taps):
        ctx.save_for_backward(grad, x)
        ctx.sides, ctx.starts = sides, starts
        rows = sides[0].rows
        blocks = [_sdd(grad.mT[None, None], _windows(x, start, starts, rows), rows.index, *rows.block, False)[0] for start in starts]
        return _unpack(blocks, sides[0], taps)

    @staticmethod
    def backward(ctx, dweight):
        grad, x = ctx.saved_tensors
        dgrad = _Taps.apply(x, dweight, ctx.sides, ctx.starts) if ctx.needs_input_grad[0] else None
        dx = _taps_of_input(grad, dweight, ctx.sides, ctx.starts) if ctx.needs_input_grad[1] else None
        return dgrad, dx, None, None, None


def _reach(starts: tuple[int, ...], rows: Layout, channels: int) -> int:
    return starts[-1] + rows.shape[1] // channels - 1


def _windows(x: Tensor, start: int, starts: tuple[int, ...], rows: Layout) -> Tensor:
    """(1, 1, L, span inputs), rows that overlap in memory."""
    x = x.contiguous()
    return x[start:].as_strided((1, 1, x.shape[0] - _reach(starts, rows, x.shape[1]), rows.shape[1]), (0, 0, x.shape[1], 1))


def _taps_of_input(grad: Tensor, weight: Tensor, sides: tuple[_Side, _Side], starts: tuple[int, ...]) -> Tensor:
    reach = _reach(starts, sides[1].rows, grad.shape[1])
    padded = nn.functional.pad(grad, (0, 0, reach, reach))
    return _Taps.apply(padded, weight, sides[::-1], tuple(starts[-1] - start for start in reversed(starts)))


@torch.compiler.assume_constant_result
def costs_of(dtype: torch.dtype, block: tuple[int, int], taps: int, backward: bool = True) -> tuple[float, float]:
    """(fixed, rising): forward and backward, or forward alone, take fixed + rising * density of the time of torch's dense convolution on this machine, whose
    weight is filled in and whose gradient is taken out, as measured once (about a second) on one image of 28 x 28 and CHANNELS channels, and kept beside the
    compiled kernels, so that a run that goes on chooses as before.
    """
    lib = cpu.library()
    if lib is None:
        return 1.0, 1.0
    width = 1 if taps == 1 else 3  # of a square kernel that stands for the others
    key = f"conv{'' if backward else ' forward'} {str(dtype).removeprefix('torch.')} {block[0]}x{block[1]} kernel {width} threads {torch.get_num_threads()}"
    if key in measured:
        return measured[key]
    path = Path(lib._name).with_suffix(f".conv-torch-{torch.__version__}.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        known[key] = [round(cost, 3) for cost in _measure(dtype, block, width, backward)]
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    measured.update({name: (fixed, rising) for name, (fixed, rising) in known.items()})
    return measured[key]


def _measure(dtype: torch.dtype, block: tuple[int, int], width: int, backward: bool) -> tuple[float, float]:
    grid = CHANNELS // block[0], CHANNELS // block[1]
    with torch.device("cpu"), torch.inference_mode(False), torch.set_grad_enabled(backward), torch.random.fork_rng(devices=[]):
        x = torch.linspace(-1, 1, CHANNELS * 28 * 28).view(1, CHANNELS, 28, 28).to(dtype).requires_grad_(backward)
        runs: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
        densities = []
        for every in (4, 1):
            mask = (torch.arange(grid[0])[:, None] + torch.arange(grid[1])) % every == 0
            layer = Conv2d(CHANNELS, CHANNELS, width, Layout.from_mask(mask, block), padding=width // 2, dtype=dtype)
            runs.append((functools.partial(layer._sparse, size=[28, 28]), layer.weight))
            densities.append(layer.layout.density)
        runs.insert(0, (layer._dense, layer.weight))  # with its weight to fill in, as it would be taken
        times: list[list[float]] = [[], [], []]
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # one thread's own time does not count what others do on its core
        for round_ in range(5 if backward else 9):
            for (run, weight), taken in zip(runs, times, strict=True):
                start = clock()
                y = run(x)
                if backward:
                    torch.autograd.grad(y, (x, weight), y)
                if round_:  # the first warms up
                    taken.append(clock() - start)
    grown = (28 / (28 + width // 2)) ** 2  # the padding's share is counted by who asks
    low, high = [grown * statistics.median(s / d for s, d in zip(taken, times[0], strict=True)) for taken in times[1:]]
    rising = max(0.0, (high - low) / (densities[1] - densities[0]))
    return max(0.0, high - rising * densities[1]), rising


class _Conv(BlockSparse):
    """See Conv2d."""

    dims: int
    sides: tuple[_Side, _Side]
    _choices: dict[tuple, tuple[list[int], bool]]  # for each kind of input: the size of the output, and whether the dense convolution is taken

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
        self.even_padding = None if any(before != after for before, after in self.padding) else tuple([before for before, _ in self.padding])
        self.taps = math.prod(self.kernel_size)
        self._create(layout, self.kernel_size, gate, device, dtype)
        self.bias = nn.Parameter(self.weight.new_empty(out_channels)) if bias else None
        self.reset_parameters()

    def _take(self, layout: Layout) -> None:
        super()._take(layout)
        self._choices = {}
        self.sides = _sides(layout, math.prod(self.kernel_size[:-1]), self.kernel_size[-1], self.dilation[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, *size) or without N -> (N, out_channels, *size'). ValueError where x does not fit."""
        _check_operand("x", x, self.weight)
        if x.ndim == self.dims + 1:
            return self.forward(x[None])[0]
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected (batch, {self.in_channels}, {self.dims} sizes), got {tuple(x.shape)}")
        if _looked_on():
            size = self._leaving(list(x.shape[2:]))
            return self._dense(x) if self._dense_is_faster(x, size) else self._sparse(x, size)
        backward = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        key = (x.shape[2:], x.dtype, x.device.type, backward, self.probe is None, torch.is_autocast_enabled("cpu"), torch.get_num_threads())
        if key not in self._choices:
            if len(self._choices) >= 1000:
                self._choices.clear()
            size = self._leaving(list(x.shape[2:]))
            self._choices[key] = size, self._dense_is_faster(x, size)
        size, dense = self._choices[key]
        return self._dense(x) if dense else self._sparse(x, size)

    def _dense_is_faster(self, x: Tensor, size: list[int]) -> bool:
        if self.probe is not None or x.device.type != "cpu" or x.dtype not in EXACT or torch.is_autocast_enabled("cpu") or any(s != 1 for s in self.stride):
            return True
        backward = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return self._cost(x.dtype, list(x.shape[2:]), size, backward) >= MOST

    def _cost(self, dtype: torch.dtype, entering: list[int], size: list[int], backward: bool) -> float:
        """The time of the products over that of the dense convolution, for images of the size `entering` that leave with `size`."""
        (R, C), (br, bc) = self.layout.grid, self.layout.block
        grown = math.prod([max(n + max(ends), out) / out for n, out, ends in zip(entering, size, self.padding, strict=True)])
        grown *= R * br * C * bc / (self.out_channels * self.in_channels)
        fixed, rising = costs_of(dtype, self.layout.block, math.prod(self.kernel_size), backward)
        # what does not fall with the density is work on the images, which counts for less the more channels there are; with several taps only in part, and
        # from 64 to 512 channels the root fits
        moving = (CHANNELS / 2 * (1 / self.in_channels + 1 / self.out_channels)) ** (1.0 if self.taps == 1 else 0.5)
        return grown * (fixed * moving + rising * self.layout.density)

    def choice(self, *size: int, backward: bool = True) -> str:
        """What the layer does with images of this size (all sizes, or one for all) in its own dtype on this machine, in words. A measurement of a second
        may run, once per machine. For example:

        sparse: density 0.250, forward and backward by products take 0.53 of the dense convolution's time; dense from 0.92
        """
        density = f"density {self.layout.density:.3f}"
        if self.weight.device.type != "cpu" or cpu.library() is None or self.weight.dtype not in EXACT or any(s != 1 for s in self.stride):
            return f"dense: {density}, products are for stride 1, float32 or float64 and the compiled kernels of the CPU"
        entering = list(_sizes("size", size[0] if len(size) == 1 else size, self.dims, 1))
        cost = self._cost(self.weight.dtype, entering, self._leaving(entering), backward)
        what = "forward and backward" if backward else "forward"
        return f"{'dense' if cost >= MOST else 'sparse'}: {density}, {what} by products take {cost:.2f} of the dense convolution's time; dense from {MOST}"

    def _leaving(self, entering: list[int]) -> list[int]:
        """The sizes of the output. ValueError where the kernel does not fit."""
        each = zip(entering, self.kernel_size, self.stride, self.dilation, self.padding, strict=True)
        size = [(n + before + after - (k - 1) * d - 1) // s + 1 for n, k, s, d, (before, after) in each]
        if min(size) < 1:
            raise ValueError(f"x: expected sizes that hold the kernel {self.kernel_size}, got {tuple(entering)}")
        return size

    def _dense(self, x: Tensor) -> Tensor:
        weight = self._filled() if self.probe is None else self.to_dense() + self.probe
        padding = self.even_padding
        if padding is None:
            x, padding = nn.functional.pad(x, [n for ends in self.padding[::-1] for n in ends]), (0,) * self.dims
        convolution = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self.dims - 1]
        return convolution(x, weight, self.bias, self.stride, padding, self.dilation)

    def _filled(self) -> Tensor:
        """`to_dense()`. Where no gradient is asked for, the one made last as long as weights, gates and layout are the same; training lets go of it. They are
        the same while torch counts no change of them: what is written through `.data` it does not count.
        """
        weight, gate = self.weight, self.weight if self.gate is None else self.gate
        asked = torch.is_grad_enabled() and (weight.requires_grad or gate.requires_grad)
        if asked or _looked_on() or type(weight) not in _PLAIN or weight.is_inference() or gate.is_inference():
            _filled.pop(self, None)
            return self.to_dense()
        made = weight.data_ptr(), weight._version, gate.data_ptr(), gate._version
        last = _filled.get(self)
        if last is not None and last.layout is self.layout and last.made == made:
            return last.dense
        with torch.inference_mode(False), torch.no_grad():
            dense = self.to_dense()
        _filled[self] = _Filled(self.layout, (weight.detach(), gate.detach()), made, dense)
        return dense

    def _sparse(self, x: Tensor, size: list[int]) -> Tensor:
        """Stride 1. The images lie channels last, one after the other, as one long list of places. Zeros after each line, and lines of zeros after each
        image, are the padding of this one's end and of the next one's beginning alike, so each kernel position is a shift of the list.
        """
        N, (R, C), (br, bc) = x.shape[0], self.layout.grid, self.layout.block
        grown = [max(n + max(ends), out) for n, out, ends in zip(x.shape[2:], size, self.padding, strict=True)]
        pitch = [math.prod(grown[dim + 1 :]) for dim in range(self.dims)]
        places, first = N * math.prod(grown), sum(before * p for (before, _), p in zip(self.padding, pitch, strict=True))
        steps = [range(0, k * d * p, d * p) for k, d, p in zip(self.kernel_size, self.dilation, pitch, strict=True)]
        starts = tuple(sum(at) for at in itertools.product(*steps[:-1]))
        reach = starts[-1] + steps[-1][-1]
        flat = x.new_zeros(max(first + places, places + reach), C * bc)
        inner = flat[first : first + places].view(N, *grown, C * bc)
        inner[(slice(None), *(slice(n) for n in x.shape[2:]), slice(self.in_channels))] = x.movedim(1, -1)
        y = _Taps.apply(flat, self.gated_weight().flatten(3), self.sides, starts)[:places].view(N, *grown, R * br)
        y = y[(slice(None), *(slice(n) for n in size), slice(self.out_channels))]
        return (y if self.bias is None else y + self.bias).movedim(-1, 1)

    def to_dense(self) -> Tensor:
        """The weight, times the gates, as (out_channels, in_channels, *kernel_size). Differentiable."""
        (kept, br, bc), taps = self.layout.values_shape, self.taps
        dense = _call(_fill, self.gated_weight().reshape(1, kept, br, bc * taps), self.layout.index, self.out_channels, self.in_channels * taps)
        return dense.view(self.out_channels, self.in_channels, *self.kernel_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """U(-s, s) with s = 1 / sqrt(inputs of that output, all taps counted), for weights and bias: torch's own, scaled to the sparsity."""
        if self.weight.is_meta:
            return
        layout, br = self.layout, self.layout.block[0]
        inputs = (layout.mask * self.block_sizes()[0] / min(br, self.out_channels)).sum(1)  # (R,), with all taps
        bound = inputs.clamp_min(1).rsqrt()
        self.weight.uniform_(-1, 1).mul_(bound[layout.rows.long()].view(-1, *[1] * (self.weight.ndim - 1)))
        taps = self.weight.flatten(3).movedim(3, 0)
        self.weight.copy_(layout.from_dense(layout.to_dense(taps)).movedim(0, 3).view_as(self.weight))  # nothing beyond the edge
        if self.bias is not None:
            self.bias.uniform_(-1, 1).mul_((bound * (inputs > 0)).repeat_interleave(br)[: self.out_channels])

    def new_probe(self) -> Tensor:
        return self.weight.new_zeros(()).expand(self.out_channels, self.in_channels, *self.kernel_size).requires_grad_()

    def dense_blocks(self, dense: Tensor) -> Tensor:
        (R, C), (br, bc) = self.layout.grid, self.layout.block
        padded = nn.functional.pad(dense.flatten(2).square().sum(2), (0, C * bc - self.in_channels, 0, R * br - self.out_channels))
        return padded.view(R, br, C, bc).sum((1, 3))

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
    torch has them; `gate` as in `Linear`. Initialised like torch's, with the number of inputs that each output really has. See `EdgeBias` for what
    padding does to the border.
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
        if not isinstance(input_size, (tuple, list)) or len(input_size) not in (1, 2, 3):
            raise ValueError(f"input_size: expected 1 to 3 sizes, got {input_size!r}")
        dims = len(input_size)
        input_size = _sizes("input_size", input_size, dims, 1)
        if type(channels) is not int or channels < 1:
            raise ValueError(f"channels: expected an int, at least 1, got {channels!r}")
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
        _check_operand("y", y, self.gain)
        if y.shape[2:] != self.size or y.shape[1:2] != self.gain.shape[1:]:
            raise ValueError(f"y: expected (batch, {self.gain.shape[1]}, {', '.join(map(str, self.size))}), got {tuple(y.shape)}")
        inner = self.gain.new_ones(1, self.gain.shape[1])
        gain, bias = torch.cat([inner, self.gain])[self.edge], torch.cat([inner - 1, self.bias])[self.edge]  # (P, channels)
        return torch.addcmul(bias.T.unflatten(1, self.size), y, gain.T.unflatten(1, self.size))

    def extra_repr(self) -> str:
        return f"{self.gain.shape[1]}, {self.gain.shape[0]} sets, output {self.size}"
