"""Products of a block-sparse and a dense matrix, named as in the literature by the kind of result and operands: d dense, s sparse.

    dsd(values, dense, layout)    (R, C) sparse @ (..., C, N)     -> (..., R, N)
    dds(dense, values, layout)    (..., M, R) @ (R, C) sparse     -> (..., M, C)
    sdd(a, b, layout)             (..., R, K) @ (..., K, C), only at the kept blocks -> values (..., kept, br, bc)

float64, float32, bfloat16 and float16; sums are carried in float32 at least. What stands in unused blocks of a dense operand is never read, so a NaN
there has no effect; nor is what stands in a block's values beyond the edge of the matrix. Results are bit-identical from call to call.
The kernels are C++ on the CPU where a compiler is found (`cpu.py`) and Triton on a GPU (`gpu.py`); elsewhere they are PyTorch's batched products of gathered
blocks.
Each is differentiable any number of times: the derivatives are these same products.
"""

import functools
import warnings
from collections.abc import Callable
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from onetorch.sparse import costs, cpu
from onetorch.sparse.layout import Layout

DTYPES = tuple(cpu.DTYPES)


# The operators. Canonical shapes: dense (G, H, M, K), values (1 or G, kept, br, bc), where G counts the batch and H the heads of the layout. --------


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from onetorch.sparse import gpu
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        warnings.warn("Triton is not installed: block-sparse products on the GPU take their PyTorch path, several times slower", stacklevel=2)
        return None
    return gpu


def _kernels(x: Tensor) -> ModuleType | None:
    """The kernels for tensors like this one; None: the PyTorch path."""
    if x.device.type == "cpu":
        return cpu if cpu.library() is not None else None
    return _triton() if x.device.type == "cuda" and x.dtype != torch.float64 else None  # float64 is for checks, and Triton cannot compile all of it


def _grid(rows: int, columns: int, block: tuple[int, int] | torch.Size) -> tuple[int, int]:
    return -(-rows // block[0]), -(-columns // block[1])


def _kept_blocks(index: Tensor, H: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the kept blocks, counted through all heads."""
    kept = (index.shape[0] - H * sum(grid) - 2) // 4
    return index[-kept:] if kept else index[:0], index[H * grid[0] + 1 : H * grid[0] + 1 + kept]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks_of(x: Tensor, count: int, block: int, dim: int) -> Tensor:
    """Cut dimension 2 or 3 of (G, H, M, K) into `count` blocks: (G, H * count, block, K) or (G, H * count, M, block), zeros beyond the edge."""
    missing = count * block - x.shape[dim]
    x = torch.nn.functional.pad(x, (0, missing) if dim == 3 else (0, 0, 0, missing))
    x = x.unflatten(dim, (count, block))
    return (x.movedim(3, 2) if dim == 3 else x).flatten(1, 2)


def _inside(index: Tensor, H: int, grid: tuple[int, int], block: tuple[int, int], rows: int, columns: int) -> Tensor | None:
    """(kept, br, bc) bool: the elements of each kept block that exist; None where all do."""
    if rows % block[0] == 0 and columns % block[1] == 0:
        return None
    r, c = _kept_blocks(index, H, grid)
    row = (r % grid[0] * block[0])[:, None] + torch.arange(block[0], device=r.device)
    column = (c % grid[1] * block[1])[:, None] + torch.arange(block[1], device=c.device)
    return (row < rows)[:, :, None] & (column < columns)[:, None, :]


def _dds_pytorch(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, rows: int, columns: int, transpose: bool) -> Tensor:
    G, H, M, _K = x.shape
    block = (values.shape[2], values.shape[3])
    grid = _grid(rows, columns, block)
    at, to = _kept_blocks(index, H, grid)
    blocks = values.to(_accumulator(x.dtype))
    if (inside := _inside(index, H, grid, block, rows, columns)) is not None:
        blocks = blocks.masked_fill(~inside, 0.0)
    if transpose:
        at, to, grid, block, blocks, columns = to, at, grid[::-1], block[::-1], blocks.mT, rows
    taken = _blocks_of(x.to(blocks.dtype), grid[0], block[0], 3)[:, at]  # (G, kept, M, block)
    sums = blocks.new_zeros(G, H * grid[1], M, block[1])
    if x.device.type == "cpu":  # each device's accumulation that keeps one order
        sums.index_add_(1, to, taken @ blocks)
    else:
        sums.index_put_((torch.arange(G, device=x.device)[:, None], to[None]), taken @ blocks, accumulate=True)
    y = sums.unflatten(1, (H, grid[1])).transpose(2, 3).reshape(G, H, M, grid[1] * block[1])[..., :columns]
    return (y if bias is None else y + bias).to(x.dtype).contiguous()


def _dds_eager(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, rows: int, columns: int, transpose: bool) -> Tensor:
    """x (G, H, M, rows) @ S (rows, columns) -> (G, H, M, columns); transposed: x (G, H, M, columns) @ S^T -> (G, H, M, rows). `bias`, of the output's
    last size, is added.
    """
    grid = _grid(rows, columns, (values.shape[2], values.shape[3]))
    kernels = _kernels(x)
    if kernels is cpu and costs.dense_is_faster(x, values, rows, columns):
        y = costs.dense_dds(x, values, index, bias, grid, transpose)
        if y is not None:
            return y
    if kernels is not None:
        return kernels.dds(x, values, index, bias, grid, rows if transpose else columns, transpose)
    with torch.autocast(x.device.type, enabled=False):
        return _dds_pytorch(x, values, index, bias, rows, columns, transpose)


def _sdd_eager(a: Tensor, b: Tensor, index: Tensor, block_rows: int, block_columns: int, reduce: bool) -> Tensor:
    """a (G, H, M, K) @ b (G, H, K, N) at the kept blocks -> (G, kept, br, bc), or the sum over G as (1, kept, br, bc)."""
    _G, H, M, _K = a.shape
    block = (block_rows, block_columns)
    grid = _grid(M, b.shape[3], block)
    kernels = _kernels(a)
    if kernels is cpu and costs.dense_sdd_is_faster(a, b, (index.shape[0] - H * sum(grid) - 2) // 4, block):
        return costs.dense_sdd(a, b, index, grid, block)
    if kernels is not None:
        return kernels.sdd(a, b, index, grid, block, reduce)
    rows, columns = _kept_blocks(index, H, grid)
    kind = _accumulator(a.dtype)
    with torch.autocast(a.device.type, enabled=False):
        values = _blocks_of(a.to(kind), grid[0], block[0], 2)[:, rows] @ _blocks_of(b.to(kind), grid[1], block[1], 3)[:, columns]
    if (inside := _inside(index, H, grid, block, M, b.shape[3])) is not None:
        values = values.masked_fill(~inside, 0.0)  # an infinity times the padding would be NaN
    return (values.sum(0, keepdim=True) if reduce else values).to(a.dtype)


def _fill_eager(values: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
    """values (G, kept, br, bc), without heads -> (G, rows, columns), zeros outside the blocks."""
    G, _kept, br, bc = values.shape
    R, C = grid = _grid(rows, columns, (br, bc))
    if values.device.type == "cpu" and cpu.library() is not None:
        return cpu.fill(values, index, grid, (rows, columns))
    r, c = _kept_blocks(index, 1, grid)
    blocks = values.new_zeros(G, R * C, br, bc).index_copy_(1, r.long() * C + c, values)
    return blocks.view(G, R, C, br, bc).transpose(2, 3).reshape(G, R * br, C * bc)[:, :rows, :columns].contiguous()


def _take_eager(dense: Tensor, index: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """dense (G, rows, columns), without heads -> (G, kept, br, bc), zeros beyond the edge."""
    grid = _grid(dense.shape[1], dense.shape[2], (block_rows, block_columns))
    if dense.device.type == "cpu" and cpu.library() is not None:
        return cpu.take(dense, index, grid, (block_rows, block_columns))
    (R, C), (r, c) = grid, _kept_blocks(index, 1, grid)
    padded = torch.nn.functional.pad(dense, (0, C * block_columns - dense.shape[2], 0, R * block_rows - dense.shape[1]))
    return padded.view(-1, R, block_rows, C, block_columns).transpose(2, 3)[:, r.long(), c.long()].contiguous()


# Defined and implemented one by one, which leaves out three Python frames that `torch.library.custom_op` puts around each call.
torch.library.define("onetorch_sparse::dds", "(Tensor x, Tensor values, Tensor index, Tensor? bias, int rows, int columns, bool transpose) -> Tensor")
torch.library.define("onetorch_sparse::sdd", "(Tensor a, Tensor b, Tensor index, int block_rows, int block_columns, bool reduce) -> Tensor")
torch.library.define("onetorch_sparse::fill", "(Tensor values, Tensor index, int rows, int columns) -> Tensor")
torch.library.define("onetorch_sparse::take", "(Tensor dense, Tensor index, int block_rows, int block_columns) -> Tensor")
torch.library.impl("onetorch_sparse::dds", "CompositeExplicitAutograd", _dds_eager)
torch.library.impl("onetorch_sparse::sdd", "CompositeExplicitAutograd", _sdd_eager)
torch.library.impl("onetorch_sparse::fill", "CompositeExplicitAutograd", _fill_eager)
torch.library.impl("onetorch_sparse::take", "CompositeExplicitAutograd", _take_eager)
_dds, _sdd = torch.ops.onetorch_sparse.dds.default, torch.ops.onetorch_sparse.sdd.default
_fill, _take = torch.ops.onetorch_sparse.fill.default, torch.ops.onetorch_sparse.take.default


@torch.library.register_fake("onetorch_sparse::dds")
def _(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, rows: int, columns: int, transpose: bool) -> Tensor:
    return x.new_empty(*x.shape[:3], rows if transpose else columns)


@torch.library.register_fake("onetorch_sparse::sdd")
def _(a: Tensor, b: Tensor, index: Tensor, block_rows: int, block_columns: int, reduce: bool) -> Tensor:
    G, H, M, _K = a.shape
    grid = _grid(M, b.shape[3], (block_rows, block_columns))
    return a.new_empty(1 if reduce else G, (index.shape[0] - H * sum(grid) - 2) // 4, block_rows, block_columns)


@torch.library.register_fake("onetorch_sparse::fill")
def _(values: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_empty(values.shape[0], rows, columns)


@torch.library.register_fake("onetorch_sparse::take")
def _(dense: Tensor, index: Tensor, block_rows: int, block_columns: int) -> Tensor:
    grid = _grid(dense.shape[1], dense.shape[2], (block_rows, block_columns))
    return dense.new_empty(dense.shape[0], (index.shape[0] - sum(grid) - 2) // 4, block_rows, block_columns)


def _dds_setup(ctx, inputs, output) -> None:
    x, values, index, bias, ctx.rows, ctx.columns, ctx.transpose = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x if values.requires_grad else None, values if x.requires_grad else None, index)
    ctx.block, ctx.shared = values.shape[2:], values.shape[0] == 1


def _dds_backward(ctx, grad: Tensor):
    x, values, index = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _call(_dds, grad, values, index, None, ctx.rows, ctx.columns, not ctx.transpose)
    if ctx.needs_input_grad[1]:
        a, b = (grad.mT, x) if ctx.transpose else (x.mT, grad)
        dvalues = _call(_sdd, a, b, index, *ctx.block, ctx.shared)
    if ctx.needs_input_grad[3]:
        dbias = grad.sum((0, 1, 2))
    return dx, dvalues, None, dbias, None, None, None


def _sdd_setup(ctx, inputs, output) -> None:
    a, b, index, _, _, ctx.reduce = inputs
    ctx.save_for_backward(a if b.requires_grad else None, b if a.requires_grad else None, index)
    ctx.rows, ctx.columns = a.shape[2], b.shape[3]


def _sdd_backward(ctx, grad: Tensor):
    a, b, index = ctx.saved_tensors
    da = db = None
    if ctx.needs_input_grad[0]:  # dA = G B^T, so dA^T = B G^T
        da = _call(_dds, b, grad, index, None, ctx.rows, ctx.columns, True).mT
    if ctx.needs_input_grad[1]:  # dB = A^T G
        db = _call(_dds, a.mT, grad, index, None, ctx.rows, ctx.columns, False)
    return da, db, None, None, None, None


torch.library.register_autograd("onetorch_sparse::dds", _dds_backward, setup_context=_dds_setup)
torch.library.register_autograd("onetorch_sparse::sdd", _sdd_backward, setup_context=_sdd_setup)


def _fill_setup(ctx, inputs, output) -> None:
    values, index, _, _ = inputs
    ctx.save_for_backward(index)
    ctx.sizes = values.shape[2:]


def _fill_backward(ctx, grad: Tensor):
    return _call(_take, grad, *ctx.saved_tensors, *ctx.sizes), None, None, None


def _take_setup(ctx, inputs, output) -> None:
    dense, index, _, _ = inputs
    ctx.save_for_backward(index)
    ctx.sizes = dense.shape[1:]


def _take_backward(ctx, grad: Tensor):
    return _call(_fill, grad, *ctx.saved_tensors, *ctx.sizes), None, None, None


torch.library.register_autograd("onetorch_sparse::fill", _fill_backward, setup_context=_fill_setup)
torch.library.register_autograd("onetorch_sparse::take", _take_backward, setup_context=_take_setup)


# Under torch.func.vmap the new dimension joins G.


def _front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The vmapped dimension first; where there is none, expanded."""
    return x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)


def _dds_vmap(info, dims, x, values, index, bias, rows, columns, transpose):
    size = info.batch_size
    if dims[2] is not None:
        raise ValueError("layout: expected the same layout for every element of vmap")
    x = _front(x, dims[0], size)  # (size, G, H, M, K)
    G = x.shape[1]
    if dims[1] is not None or values.shape[0] > 1:
        values = _front(values, dims[1], size)
        values = values.expand(size, G, *values.shape[2:]).flatten(0, 1)
    y = _dds(x.flatten(0, 1), values, index, bias if dims[3] is None else None, rows, columns, transpose).unflatten(0, (size, G))
    if dims[3] is not None:
        y = y + bias.movedim(dims[3], 0)[:, None, None, None, :]
    return y, 0


def _sdd_vmap(info, dims, a, b, index, block_rows, block_columns, reduce):
    if dims[2] is not None:
        raise ValueError("layout: expected the same layout for every element of vmap")
    a, b = _front(a, dims[0], info.batch_size), _front(b, dims[1], info.batch_size)
    values = _sdd(a.flatten(0, 1), b.flatten(0, 1), index, block_rows, block_columns, False).unflatten(0, a.shape[:2])
    return values.sum(1, keepdim=True) if reduce else values, 0


def _move_vmap(operator, info, dims, moved, index, *sizes):
    if dims[1] is not None:
        raise ValueError("layout: expected the same layout for every element of vmap")
    moved = _front(moved, dims[0], info.batch_size)
    return operator(moved.flatten(0, 1), index, *sizes).unflatten(0, moved.shape[:2]), 0


_fill_vmap, _take_vmap = functools.partial(_move_vmap, _fill), functools.partial(_move_vmap, _take)
torch.library.register_vmap("onetorch_sparse::dds", _dds_vmap)
torch.library.register_vmap("onetorch_sparse::sdd", _sdd_vmap)
torch.library.register_vmap("onetorch_sparse::fill", _fill_vmap)
torch.library.register_vmap("onetorch_sparse::take", _take_vmap)


# torch.func's derivatives do not see an operator's registered one, only that of an autograd.Function: inside them the operators are called as such.


def _as_function(operator, setup, backward, vmap) -> type[torch.autograd.Function]:
    members = {"forward": operator, "setup_context": setup, "backward": backward, "vmap": vmap}
    return type(operator._name, (torch.autograd.Function,), {name: staticmethod(function) for name, function in members.items()})


_FUNCTIONS: dict[object, type[torch.autograd.Function]] = {
    _dds: _as_function(_dds, _dds_setup, _dds_backward, _dds_vmap),
    _sdd: _as_function(_sdd, _sdd_setup, _sdd_backward, _sdd_vmap),
    _fill: _as_function(_fill, _fill_setup, _fill_backward, _fill_vmap),
    _take: _as_function(_take, _take_setup, _take_backward, _take_vmap),
}


# Where nothing looks on (no compiler, no mode, no subclass), the dispatcher is left out: its Python frames cost as much as a product at 2 % density.


def _direct(eager, setup, backward) -> tuple[type[torch.autograd.Function], Callable[..., Tensor]]:
    def forward(ctx, *inputs):
        setup(ctx, inputs, None)
        return eager(*inputs)

    return type(eager.__name__, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}), eager


_PLAIN = (Tensor, torch.nn.Parameter)
_DIRECT: dict[object, tuple[type[torch.autograd.Function], Callable[..., Tensor]]] = {
    _dds: _direct(_dds_eager, _dds_setup, _dds_backward),
    _sdd: _direct(_sdd_eager, _sdd_setup, _sdd_backward),
    _fill: _direct(_fill_eager, _fill_setup, _fill_backward),
    _take: _direct(_take_eager, _take_setup, _take_backward),
}


def _plain(tensor: Tensor) -> bool:
    """Whether what stands in the tensor's memory is its numbers: not so where they are to be negated (the imaginary part of a conjugate) or are known zeros."""
    return type(tensor) in _PLAIN and not tensor.is_neg() and not tensor._is_zerotensor()


def _call(operator, *arguments):
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[operator].apply(*arguments)
    first, second = arguments[0], arguments[1]
    if operator in _DIRECT and _plain(first) and _plain(second) and first.device.type == "cpu" and not torch._C._len_torch_dispatch_stack():
        function, eager = _DIRECT[operator]
        return function.apply(*arguments) if torch.is_grad_enabled() else eager(*arguments)
    return operator(*arguments)


# The public functions: what may come in, and its canonical shape. -----------------------------------------------------------------------------------


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the dtype it asks for; float64 is left as it is, as torch's own products do."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which meta does not know
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _check_tensor(name: str, tensor: Tensor, layout: Layout, least: int) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got {tensor.layout}; {name}.to_dense() is one")
    if tensor.device != layout.device:
        raise ValueError(f"{name}: expected it on {layout.device}, where the layout is, got {tensor.device}; layout.to(device) moves the layout")
    if tensor.ndim < least:
        raise ValueError(f"{name}: expected at least {least} dimensions, got shape {tuple(tensor.shape)}")


def _check_operand(name: str, tensor: Tensor, weight: Tensor) -> None:
    """For layers: what meets the weight must be of its dtype, which autocast sees to itself, and on its device."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.device != weight.device:
        raise ValueError(f"{name}: expected a strided tensor on {weight.device}, where the weight is, got {tensor.layout} on {tensor.device}")
    casts = weight.device.type != "meta" and torch.is_autocast_enabled(weight.device.type)
    if tensor.dtype != weight.dtype and not (casts and tensor.dtype in DTYPES):
        raise ValueError(f"{name}: expected {weight.dtype} as the weight has, got {tensor.dtype}")


def _check_values(values: Tensor, layout: Layout, name: str = "values") -> None:
    _check_tensor(name, values, layout, 3)
    if tuple(values.shape[-3:]) != layout.values_shape:
        raise ValueError(f"{name}: expected (..., {', '.join(map(str, layout.values_shape))}) for {layout!r}, got {tuple(values.shape)}")


def _check_layout(layout: Layout) -> None:
    if not isinstance(layout, Layout):
        raise ValueError(f"layout: expected a Layout, got {type(layout).__name__}")


def _check_dense(name: str, dense: Tensor, layout: Layout, size: int, dim: int) -> None:
    """`size` is what dimension `dim` (-1 or -2) must be; a layout with heads wants its heads before the matrix."""
    _check_tensor(name, dense, layout, 2 if layout.heads is None else 3)
    if dense.shape[dim] != size:
        raise ValueError(f"{name}: expected size {size} in dimension {dim} for {layout!r}, got {tuple(dense.shape)}")
    if layout.heads is not None and dense.shape[-3] != layout.heads:
        raise ValueError(f"{name}: expected {layout.heads} heads in dimension -3 for {layout!r}, got {tuple(dense.shape)}")


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name}: expected {other.dtype} as {other_name} has, got {tensor.dtype}")


def _check_restriction(name: str, tensor: Tensor | None, shape: tuple[int, ...], kinds: tuple[torch.dtype, ...], device: torch.device) -> None:
    if tensor is None:
        return
    expected = f"{name}: expected {shape} {str(kinds[0]).removeprefix('torch.')} on {device}"
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{expected}, got {type(tensor).__name__}")
    if tensor.shape != shape or tensor.dtype not in kinds or tensor.device != device or tensor.layout != torch.strided:
        raise ValueError(f"{expected}, got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, {tensor.layout}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a number, got {type(value).__name__}")


def _canonical(x: Tensor, layout: Layout) -> Tensor:
    """(..., [heads,] M, K) -> (G, H, M, K)."""
    lead = x.shape[: x.ndim - (2 if layout.heads is None else 3)]
    return x.reshape(prod(lead), layout.heads or 1, *x.shape[-2:])


def dds(dense: Tensor, values: Tensor, layout: Layout, *, transpose_dense: bool = False, transpose_sparse: bool = False, bias: Tensor | None = None) -> Tensor:
    """dense (..., [heads,] M, R) @ sparse (R, C) -> (..., [heads,] M, C), plus `bias` (C,).

    values (kept, br, bc) for all of the batch, or (..., kept, br, bc) with the leading dimensions of `dense`, one set each. `transpose_dense` takes dense
    as (..., R, M);
    `transpose_sparse` multiplies by the transposed matrix, dense (..., M, C) -> (..., M, R). ValueError names the argument that does not fit.
    """
    _check_layout(layout)
    _check_values(values, layout)
    inner, outer = layout.shape[::-1] if transpose_sparse else layout.shape
    _check_dense("dense", dense, layout, inner, -2 if transpose_dense else -1)
    if bias is not None:
        _check_tensor("bias", bias, layout, 1)
        if tuple(bias.shape) != (outer,):
            raise ValueError(f"bias: expected ({outer},), got {tuple(bias.shape)}")
        dense, values, bias = _cast(dense, values, bias.resolve_neg())
        _check_same("bias", bias, "dense", dense)
    else:
        dense, values = _cast(dense, values)
    _check_same("values", values, "dense", dense)
    x = dense.mT if transpose_dense else dense
    lead = x.shape[: x.ndim - (2 if layout.heads is None else 3)]
    if values.ndim == 3:
        blocks = values.unsqueeze(0)
        # one matrix of all tokens where that is only another view of the same memory
        flat = layout.heads is None and x.is_contiguous()
        canonical = x.reshape(1, 1, prod(x.shape[:-1]), x.shape[-1]) if flat else _canonical(x, layout)
    else:
        if values.shape[:-3] != lead:
            raise ValueError(f"values: expected no leading dimensions or {tuple(lead)} as dense has, got {tuple(values.shape)}")
        blocks, canonical = values.reshape(prod(lead), *layout.values_shape), _canonical(x, layout)
    y = _call(_dds, canonical, blocks, layout.index, bias, *layout.shape, transpose_sparse)
    return y.reshape(*x.shape[:-1], outer)


def dsd(values: Tensor, dense: Tensor, layout: Layout, *, transpose_sparse: bool = False, transpose_dense: bool = False) -> Tensor:
    """sparse (R, C) @ dense (..., [heads,] C, N) -> (..., [heads,] R, N), as a transposed view of contiguous memory.

    values as in `dds`. `transpose_sparse`: (C, R) @ (..., R, N); `transpose_dense` takes dense as (..., N, C).
    """
    _check_layout(layout)
    _check_values(values, layout)
    _check_dense("dense", dense, layout, layout.shape[0 if transpose_sparse else 1], -1 if transpose_dense else -2)
    return dds(dense, values, layout, transpose_dense=not transpose_dense, transpose_sparse=not transpose_sparse).mT


def sdd(a: Tensor, b: Tensor, layout: Layout, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """a (..., [heads,] R, K) @ b (..., [heads,] K, C) at the kept blocks only -> values (..., kept, br, bc), exact zeros beyond the edge.

    The leading dimensions of `a` and `b` are equal. `transpose_a` takes a as (..., K, R), `transpose_b` takes b as (..., C, K).
    """
    _check_layout(layout)
    a_inner, b_inner = (-2 if transpose_a else -1), (-1 if transpose_b else -2)
    _check_dense("a", a, layout, layout.shape[0], -3 - a_inner)
    _check_dense("b", b, layout, layout.shape[1], -3 - b_inner)
    if a.shape[a_inner] != b.shape[b_inner]:
        raise ValueError(f"b: expected size {a.shape[a_inner]} in dimension {b_inner} as a has in {a_inner}, got {tuple(b.shape)}")
    if a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"b: expected leading dimensions {tuple(a.shape[:-2])} as a has, got {tuple(b.shape)}")
    a, b = _cast(a, b)
    _check_same("b", b, "a", a)
    lead = a.shape[: a.ndim - (2 if layout.heads is None else 3)]
    values = _call(_sdd, _canonical(a.mT if transpose_a else a, layout), _canonical(b.mT if transpose_b else b, layout), layout.index, *layout.block, False)
    return values.reshape(*lead, *layout.values_shape)
