"""Layers with block-sparse weights.

    layer = Linear(1024, 4096, patterns.balanced_random((4096, 1024), 32, density=0.25))
    y = layer(x)                                       # (..., 1024) -> (..., 4096)
    layer.to_dense()                                   # (4096, 1024), zeros where no block is kept

Blocks follow nn.Linear's weight: layout rows are outputs, columns are inputs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from onetorch.sparse.layout import Layout, _ends_in, _with_values
from onetorch.sparse.products import DTYPES, dds

BEGINS = {"step_size": "lr", "sum": "initial_accumulator_value"}  # state that begins with an option of its optimizer and not with 0: Rprop's, Adagrad's


def _by_blocks(tensor: object, parameter: Tensor) -> bool:
    """Whether an optimizer's state has something for each block: an element for each of its elements, or, as Adafactor's, one for each row or column of it."""
    return isinstance(tensor, Tensor) and tensor.ndim == parameter.ndim and tensor.shape[0] == parameter.shape[0]


def _check_moves(optimizers: tuple[torch.optim.Optimizer, ...], parameters: tuple[Tensor, ...] = ()) -> None:
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer: expected one whose state can move along with the blocks, got LBFGS, whose history runs through all parameters at once")
        for parameter in parameters:
            for key, tensor in optimizer.state.get(parameter, {}).items():
                if isinstance(tensor, Tensor) and tensor.numel() > 1 and not _by_blocks(tensor, parameter):
                    expected = f"optimizer: expected state that can move along with the blocks of a parameter of {tuple(parameter.shape)}"
                    raise ValueError(f"{expected}, got {key} of {tuple(tensor.shape)} from {type(optimizer).__name__}")


class BlockSparse(nn.Module):
    """What the layers share: weights that lie in the blocks of a layout, and a layout that can change (`set_layout`).

    weight  (kept, br, bc), for convolutions (kept, br, bc, *kernel)
    gate    (kept,) or None: what each block's weights are multiplied by; its gradient says how much the loss would change with the block
    layout_mask   the layout's mask, so that it is saved with the weights; loading weights of another layout of the same grid takes on that layout

    `probe` is None but in the steps at whose end RigL wants the gradient of the whole dense weight: see `DynamicSparsity`.
    """

    layout: Layout
    layout_mask: Tensor
    weight: nn.Parameter
    gate: nn.Parameter | None
    probe: Tensor | None

    def _create(self, layout: Layout, kernel: tuple[int, ...], gate: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, got {dtype}")
        place = layout.device if device is None else layout.to(device).device
        if place.type != "meta":  # parameters that are yet to come; which blocks there are is known
            layout = layout.to(place)
        kind = {"device": place, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(*layout.values_shape, *kernel, **kind))  # type: ignore[arg-type]
        self.gate = nn.Parameter(torch.ones(layout.kept, **kind)) if gate else None  # type: ignore[arg-type]
        self.probe = None
        self.register_buffer("layout_mask", layout.mask)
        self._take(layout)

    def _take(self, layout: Layout) -> None:
        """All that changes with the layout but the parameters."""
        self.layout, self.layout_mask = layout, layout.mask

    def gated_weight(self) -> Tensor:
        """The weight times the gates; the weight itself where there are none."""
        return self.weight if self.gate is None else self.weight * self.gate.view(-1, *[1] * (self.weight.ndim - 1))

    def _probed(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.probe is None else _probe(y, x, self.probe)

    def new_probe(self) -> Tensor:
        """A dense weight (outputs, inputs) of zeros that takes no memory and wants a gradient."""
        return self.weight.new_zeros(()).expand(self.layout.shape).requires_grad_()

    def dense_blocks(self, dense: Tensor) -> Tensor:
        """The sums of squares over the blocks of a dense weight as `new_probe` makes it: (R, C)."""
        (R, C), (br, bc), (rows, columns) = self.layout.grid, self.layout.block, self.layout.shape
        padded = torch.nn.functional.pad(dense, (0, C * bc - columns, 0, R * br - rows))
        return padded.view(R, br, C, bc).square().sum((1, 3))

    def block_sizes(self) -> Tensor:
        """(R, C) float: how many elements of each block lie inside the matrix."""
        sizes = []
        for count, block, length in zip(self.layout.grid, self.layout.block, self.layout.shape, strict=True):
            ends = torch.arange(1, count + 1, device=self.layout.device) * block
            sizes.append((block - (ends - length).clamp_min(0)).float())
        return sizes[0][:, None] * sizes[1]

    @torch.no_grad()
    def set_layout(self, layout: Layout, *optimizers: torch.optim.Optimizer) -> None:
        """Take on another layout of the same grid. Blocks in both keep their weights, their gates and all that the optimizers hold for them block by block
        (moments, and Adafactor's factors of them); new blocks begin with weights 0, gate 1 and the state of a first step. Gradients are cleared.

        With as many blocks as before all of it happens in place, so nothing that was compiled for the layer is compiled again, and nothing waits for the
        device. Otherwise the layer gets new parameters, and so do these optimizers; whoever else holds the old ones must fetch them again. ValueError
        where the grid, the blocks, the shape or the device differ, and for an optimizer whose state is not kept block by block, as LBFGS's.
        """
        self.layout._same(layout)
        if layout is self.layout:
            return
        names = ("weight",) if self.gate is None else ("weight", "gate")
        _check_moves(optimizers, tuple(getattr(self, name) for name in names))
        C, old = layout.grid[1], self.layout
        at = layout.rows.long() * C + layout.columns.long() % C
        was = old.mask.view(-1)[at]
        source = (old.mask.view(-1).cumsum(0)[at] - 1).clamp_min(0)
        for name in names:
            parameter = getattr(self, name)
            keep = was.view(-1, *[1] * (parameter.ndim - 1))

            def moved(tensor: Tensor, fresh: float, keep: Tensor = keep) -> Tensor:
                return tensor[source].masked_fill(~keep, fresh) if old.kept else tensor.new_full((layout.kept, *tensor.shape[1:]), fresh)

            held = []
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    if any(p is parameter for p in group["params"]) and parameter in optimizer.state:
                        state = optimizer.state[parameter]
                        held += [(state, key, group.get(BEGINS.get(key, ""), 0.0)) for key in state if _by_blocks(state[key], parameter)]
            new = moved(parameter, 1.0 if name == "gate" else 0.0)
            parameter.grad = None
            if layout.kept == old.kept:
                parameter.copy_(new)
                for state, key, begins in held:
                    state[key].copy_(moved(state[key], begins))
                continue
            for state, key, begins in held:
                state[key] = moved(state[key], begins)
            # a new object: an autograd graph that is still alive holds on to the size of the old one
            fresh = nn.Parameter(new, parameter.requires_grad)
            setattr(self, name, fresh)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["params"] = [fresh if p is parameter else p for p in group["params"]]
                if parameter in optimizer.state:
                    optimizer.state[fresh] = optimizer.state.pop(parameter)
        self._take(layout)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.weight.device.type != "meta":
            self._take(self.layout.to(self.weight.device))
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        mask, weight = state_dict.get(prefix + "layout_mask"), state_dict.get(prefix + "weight")
        if isinstance(mask, Tensor) and isinstance(weight, Tensor) and mask.device.type != "meta":
            mine, empty = self.layout, self.weight.is_meta
            if mask.shape != mine.mask.shape or weight.shape[1:] != self.weight.shape[1:]:
                raise ValueError(
                    f"{prefix}layout_mask: expected weights of {tuple(mine.mask.shape)} blocks of {tuple(self.weight.shape[1:])}, "
                    f"got those of {tuple(mask.shape)} blocks of {tuple(weight.shape[1:])}"
                )
            mask = mask.to(mask.device if empty else mine.device, torch.bool)
            if empty or not torch.equal(mask, mine.mask):
                layout = Layout.from_mask(mask, mine.block, mine.shape)
                if layout.kept != weight.shape[0]:
                    raise ValueError(f"{prefix}weight: expected the {layout.kept} blocks of {prefix}layout_mask, got {weight.shape[0]}")
                for parameter in (self.weight, self.gate):
                    if parameter is not None and parameter.shape[0] != layout.kept:
                        parameter.grad = None
                        parameter.data = parameter.data.new_empty(layout.kept, *parameter.shape[1:])
                self._take(layout)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@torch.library.custom_op("onetorch_sparse::probe", mutates_args=())
def _probe(y: Tensor, x: Tensor, dense: Tensor) -> Tensor:
    """y (..., outputs), unchanged; its gradient, with x (..., inputs), is also that of `dense` (outputs, inputs), as if y were x dense^T."""
    return y.clone()


@_probe.register_fake
def _(y: Tensor, x: Tensor, dense: Tensor) -> Tensor:
    return torch.empty_like(y)


def _probe_setup(ctx, inputs, output) -> None:
    _y, x, dense = inputs
    ctx.save_for_backward(x)
    ctx.dtype = dense.dtype


def _probe_backward(ctx, grad: Tensor):
    (x,) = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    return grad, None, (rows.mT @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(ctx.dtype)


_probe.register_autograd(_probe_backward, setup_context=_probe_setup)


class Linear(BlockSparse):
    """y = x W^T + b, where W (out_features, in_features) is zero outside the blocks that `layout` keeps.

    weight (kept, br, bc), bias (out_features); `gate=True` adds a parameter (kept,), ones at first, that multiplies the blocks. The layout is saved with
    the weights, and loaded with them: see `BlockSparse`.
    Initialised as `reset_parameters` says: like nn.Linear, with the number of inputs that each output really has.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layout: Layout,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: bool = False,
    ):
        super().__init__()
        if not isinstance(layout, Layout):
            raise ValueError(f"layout: expected a Layout, got {type(layout).__name__}")
        if layout.shape != (out_features, in_features) or layout.heads is not None:
            raise ValueError(f"layout: expected ({out_features}, {in_features}) without heads, outputs by inputs as nn.Linear's weight, got {layout!r}")
        self.in_features, self.out_features = in_features, out_features
        self._create(layout, (), gate, device, dtype)
        self.bias = nn.Parameter(self.weight.new_empty(out_features)) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(f"x: expected a tensor, got {type(x).__name__}")
        if x.ndim == 1:
            return self.forward(x[None])[0]
        return self._probed(dds(x, self.gated_weight(), self.layout, transpose_sparse=True, bias=self.bias), x)

    def to_dense(self) -> Tensor:
        """The weight, times the gates, as (out_features, in_features). Differentiable."""
        return self.layout.to_dense(self.gated_weight())

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
        if self.weight.is_meta:
            return
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
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
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


class MLP(nn.Module):
    """y = W2 activation(W1 x + b1) + b2 with block-sparse W1 (hidden, features) and W2 (features, hidden).

    up, down    the two layouts
    activation  any function of a tensor; left out: GELU

    The biases are added inside the products. The activation is torch's own: forward and backward together GELU takes 9 % and ReLU 3 % of the block's time
    at 1024 by 4096, 25 % density, 512 tokens on one core, most of it arithmetic that a fused kernel would do as well.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        up: Layout,
        down: Layout,
        activation: Callable[[Tensor], Tensor] = nn.functional.gelu,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: bool = False,
    ):
        super().__init__()
        self.up = Linear(features, hidden, up, bias, device, dtype, gate=gate)
        self.down = Linear(hidden, features, down, bias, device, dtype, gate=gate)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Projection(nn.Module):
    """Between a wide vector of `features` and a narrow one of some of its entries, each taken once: no weights, only an index.

    Give `index` (1-D, int64, no entry twice), or `count` entries drawn at random (and sorted), or every `stride`-th one. After openai/blocksparse's
    SparseProj: sparse layers of different widths, and layers that work on a part of the features, are joined by it. Dimension -1 is the features'.

    gather(x)          (..., features) -> (..., count)
    scatter(y)         (..., count) -> (..., features), zeros elsewhere
    scatter_add(x, y)  x with y added to its entries
    scatter_mul(x, y)  x with its entries multiplied by y, the others as they are
    """

    index: Tensor

    def __init__(
        self,
        features: int,
        *,
        index: Tensor | None = None,
        count: int | None = None,
        stride: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if sum(given is not None for given in (index, count, stride)) != 1:
            raise ValueError("index, count, stride: expected exactly one of them")
        if type(features) is not int or features < 1:
            raise ValueError(f"features: expected an int, at least 1, got {features!r}")
        if index is not None:
            if not isinstance(index, Tensor):
                raise ValueError(f"index: expected different int64 entries in 0..{features - 1}, got {type(index).__name__}")
            _with_values("index", index)
            if index.ndim != 1 or index.dtype != torch.int64 or index.unique().shape != index.shape or not bool(((index >= 0) & (index < features)).all()):
                raise ValueError(f"index: expected different int64 entries in 0..{features - 1}, got {tuple(index.shape)} {index.dtype}")
        elif count is not None:
            if type(count) is not int or not 0 < count <= features:
                raise ValueError(f"count: expected 1..{features}, got {count}")
            index = torch.randperm(features, generator=generator)[:count].sort().values
        else:
            assert stride is not None
            if type(stride) is not int or not 0 < stride <= features:
                raise ValueError(f"stride: expected 1..{features}, got {stride}")
            index = torch.arange(0, features, stride)
        self.features = features
        self.register_buffer("index", index.to(device))

    def _check(self, name: str, tensor: Tensor, size: int) -> None:
        _ends_in(name, tensor, (size,), self.index.device)

    def gather(self, x: Tensor) -> Tensor:
        self._check("x", x, self.features)
        return x.index_select(-1, self.index)

    def scatter(self, y: Tensor) -> Tensor:
        self._check("y", y, self.index.shape[0])
        return y.new_zeros(*y.shape[:-1], self.features).index_copy(-1, self.index, y)

    def scatter_add(self, x: Tensor, y: Tensor) -> Tensor:
        added = self.gather(x) + self._fitting(x, y)
        return x.index_copy(-1, self.index, added)

    def scatter_mul(self, x: Tensor, y: Tensor) -> Tensor:
        product = self.gather(x) * self._fitting(x, y)
        return x.index_copy(-1, self.index, product)

    def _fitting(self, x: Tensor, y: Tensor) -> Tensor:
        self._check("x", x, self.features)
        self._check("y", y, self.index.shape[0])
        if y.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"y: expected leading dimensions {tuple(x.shape[:-1])} as x has, got {tuple(y.shape)}")
        if y.dtype != x.dtype:
            raise ValueError(f"y: expected {x.dtype} as x has, got {y.dtype}")
        return y

    def extra_repr(self) -> str:
        return f"{self.features}, {self.index.shape[0]} entries"
