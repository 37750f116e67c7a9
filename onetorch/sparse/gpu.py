"""The Triton kernels: products and attention on a GPU, forward and backward, called with the same arguments as the C++ kernels of `cpu.py`.

A block narrower than the tensor cores want is not multiplied alone: the kept blocks of one output column stand one after the other along K, and a tile of
K takes several of them, each lane with its own index. Each output tile is summed by one program in the order of the index, and what flows back is
summed over the transposed index, so there are no atomics and the same kernel gives the same bits. No kernel has a number read back from the device, so a
call can be captured in a CUDA graph.

The products have a second kernel for Hopper, through TMA. Nobody has run it on a GPU yet, so nothing is taken on faith: `costs.tma_is_faster` times both on
the first call of a class of shapes, outside of captures, and the faster one serves that class on this machine from then on.

Triton's interpreter (TRITON_INTERPRET=1, set before Triton is first imported) runs these kernels on tensors of the CPU; that is how they are tested where
there is no GPU.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from onetorch.sparse import costs

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


def _tile(size: int, most: int = 1 << 30) -> int:
    """The tile that holds `size`, or a part of it: a power of two, at least what tl.dot takes."""
    return max(16, min(most, triton.next_power_of_2(size)))


def _most(dtype: torch.dtype) -> int:
    """The longest side of a tile. Exact float32 products have no tensor cores: a large tile of them is unrolled, and takes minutes to compile."""
    return 32 if dtype == torch.float32 and _precision(dtype) == "ieee" else 128


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _warps(tile: int) -> int:
    return 8 if tile >= 128 * 128 else 4


def _parts(index: Tensor, heads: int, grid: tuple[int, int]) -> tuple[Tensor, ...]:
    """What `Layout.index` holds: by rows, offsets and block columns; by columns, offsets, block rows and where the values stand; and the block
    row of each kept block."""
    kept = (index.shape[0] - heads * sum(grid) - 2) // 4
    return index.split([heads * grid[0] + 1, kept, heads * grid[1] + 1, kept, kept, kept])


# Products. Shapes as in `products.py`: x (G, H, M, K), values (1 or G, kept, br, bc), index as `Layout.index`. -----------------------------------------


def _side(index: Tensor, H: int, grid: tuple[int, int], block: tuple[int, int], transpose: bool) -> tuple[Tensor, Tensor, Tensor, int, int, int, int]:
    """What `dds` sums over: offsets of the output blocks, their inner blocks, where the values stand (of the transpose in place: nothing reads this); then the
    side of a block and the number of blocks, each inner and outer."""
    (R, C), (br, bc) = grid, block
    row_offsets, block_columns, column_offsets, block_rows, order, _ = _parts(index, H, grid)
    if transpose:
        return row_offsets, block_columns, row_offsets, bc, br, C, R
    return column_offsets, block_rows, order, br, bc, R, C


@triton.jit
def _dds_kernel(
    x, values, bias, y, offsets, inner_block, position, M, K, N, H, tiles, outer_blocks, inner_blocks,
    x_g, x_h, x_m, x_k, v_set, v_block, v_k, v_n, BI: tl.constexpr, BO: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr, TN: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile (TM tokens, one output block). Neighbouring programs share their tokens, so that x is read from the cache."""
    at = tl.program_id(0)
    parts: tl.constexpr = (BO + TN - 1) // TN  # of an output block
    line = at % (H * outer_blocks * parts) // parts  # output block, counted through all heads
    g = (at // (H * outer_blocks * parts * tiles)).to(tl.int64)
    tile = at // (H * outer_blocks * parts) % tiles
    h = line // outer_blocks
    m = tile * TM + tl.arange(0, TM)
    n = at % parts * TN + tl.arange(0, TN)
    out = (line % outer_blocks) * BO + n
    n_there = (n < BO) & (out < N)
    begin = tl.load(offsets + line)
    length = (tl.load(offsets + line + 1) - begin) * BI  # of the kept blocks, one after the other along K
    x_rows = x + g * x_g + h.to(tl.int64) * x_h + m.to(tl.int64)[:, None] * x_m
    v_set_at = values + g * v_set
    lane = tl.arange(0, TK)
    total = tl.zeros((TM, TN), dtype=ACC)
    for start in range(0, length, TK):
        if TK <= BI:  # all lanes within one block: one index for the tile
            which = begin + start // BI
            k = tl.multiple_of(start % BI, TK) + lane  # said, or else a tile that is dense along K is loaded number by number
            block = tl.load(inner_block + which) - h * inner_blocks
            where = (tl.load(position + which) if HAS_POSITION else which).to(tl.int64)
            column = block * BI + k
            there = column < K
            v_at = v_set_at + where * v_block + k[:, None] * v_k + n[None, :] * v_n
        else:
            which = begin + (start + lane) // BI
            k = (start + lane) % BI
            inside = start + lane < length
            block = tl.load(inner_block + which, mask=inside, other=0) - h * inner_blocks
            where = (tl.load(position + which, mask=inside, other=0) if HAS_POSITION else which).to(tl.int64)
            column = block * BI + k
            there = inside & (column < K)
            v_at = v_set_at + where[:, None] * v_block + k[:, None] * v_k + n[None, :] * v_n
        a = tl.load(x_rows + column.to(tl.int64)[None, :] * x_k, mask=(m < M)[:, None] & there[None, :], other=0.0)
        b = tl.load(v_at, mask=there[:, None] & n_there[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        total += tl.load(bias + out, mask=n_there, other=0.0).to(ACC)[None, :]
    y_at = y + ((g * H + h) * M + m.to(tl.int64)[:, None]) * N + out[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(m < M)[:, None] & n_there[None, :])


def dds_pointer(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: tuple[int, int], columns: int, transpose: bool) -> Tensor:
    """`dds` for x of any strides; values contiguous, the result not empty."""
    G, H, M, K = x.shape
    sets, kept, br, bc = values.shape
    y = x.new_empty(G, H, M, columns)
    offsets, inner, position, BI, BO, inner_blocks, outer_blocks = _side(index, H, grid, (br, bc), transpose)
    v_k, v_n = (1, bc) if transpose else (bc, 1)
    most = _most(x.dtype)
    TM, TK, TN = _tile(M, most), min(64, most), _tile(BO, most)
    tiles = -(-M // TM)
    _dds_kernel[(G * tiles * H * outer_blocks * -(-BO // TN),)](
        x, values, bias if bias is not None else y, y, offsets, inner, position, M, K, columns, H, tiles, outer_blocks, inner_blocks,
        *x.stride(), kept * br * bc if sets > 1 else 0, br * bc, v_k, v_n, BI=BI, BO=BO, TM=TM, TK=TK, TN=TN, HAS_POSITION=not transpose,
        HAS_BIAS=bias is not None, ACC=_accumulator(x.dtype), PRECISION=_precision(x.dtype), num_warps=_warps(TM * TN),
        num_stages=5 if x.element_size() == 2 else 3,  # of five, the index that comes before its tile takes two; more than three have no room in float32
    )  # fmt: skip
    return y


@triton.jit
def _sdd_kernel(
    a, b, values, rows, columns, G, K, M, N, kept, row_blocks, column_blocks, a_g, a_h, a_m, a_k, b_g, b_h, b_k, b_n,
    BR: tl.constexpr, BC: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr, TN: tl.constexpr, REDUCE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one kept block of one element of the batch, or of their sum."""
    down: tl.constexpr = (BR + TM - 1) // TM  # tiles of a block
    across: tl.constexpr = (BC + TN - 1) // TN
    part = tl.program_id(0) % (down * across)
    block = tl.program_id(0) // (down * across) % kept
    first = tl.program_id(0) // (down * across * kept)
    row, column = tl.load(rows + block), tl.load(columns + block)
    h = (row // row_blocks).to(tl.int64)
    i, j, lane = part // across * TM + tl.arange(0, TM), part % across * TN + tl.arange(0, TN), tl.arange(0, TK)
    m, n = (row % row_blocks) * BR + i, (column % column_blocks) * BC + j
    m_there, n_there = (i < BR) & (m < M), (j < BC) & (n < N)
    total = tl.zeros((TM, TN), dtype=ACC)
    left = a + first.to(tl.int64) * a_g + h * a_h + m.to(tl.int64)[:, None] * a_m
    right = b + first.to(tl.int64) * b_g + h * b_h + n.to(tl.int64)[None, :] * b_n
    for _ in range(G if REDUCE else 1):
        for start in range(0, K, TK):
            k = (start + lane).to(tl.int64)
            p = tl.load(left + k[None, :] * a_k, mask=m_there[:, None] & (k < K)[None, :], other=0.0)
            q = tl.load(right + k[:, None] * b_k, mask=(k < K)[:, None] & n_there[None, :], other=0.0)
            total = tl.dot(p, q, total, input_precision=PRECISION, out_dtype=ACC)
        left += a_g
        right += b_g
    total = tl.where(m_there[:, None] & n_there[None, :], total, 0.0)  # an infinity times the padding would be NaN
    at = values + (first.to(tl.int64) * kept + block) * (BR * BC) + i[:, None] * BC + j[None, :]
    tl.store(at, total.to(values.dtype.element_ty), mask=(i < BR)[:, None] & (j < BC)[None, :])


def sdd_pointer(a: Tensor, b: Tensor, index: Tensor, grid: tuple[int, int], block: tuple[int, int], reduce: bool) -> Tensor:
    """`sdd` for operands of any strides; the result not empty."""
    G, H, M, K = a.shape
    _, columns, *_, rows = _parts(index, H, grid)
    kept = len(rows)
    values = a.new_empty(1 if reduce else G, kept, *block)
    most = _most(a.dtype)
    TM, TN = _tile(block[0], most), _tile(block[1], most)
    _sdd_kernel[(values.shape[0] * kept * -(-block[0] // TM) * -(-block[1] // TN),)](
        a, b, values, rows, columns, G, K, M, b.shape[3], kept, *grid, *a.stride(), *b.stride(), BR=block[0], BC=block[1], TM=TM, TK=min(64, most),
        TN=TN, REDUCE=reduce, ACC=_accumulator(a.dtype), PRECISION=_precision(a.dtype), num_warps=_warps(TM * TN), num_stages=3,
    )  # fmt: skip
    return values


# The same products on Hopper: TMA brings whole tiles into shared memory, and the grid is persistent (each program walks over several output tiles). --------


@triton.jit
def _dds_tma_kernel(
    x, values, bias, y, offsets, inner_block, position, G, H, M, N, tiles, outer_blocks, inner_blocks, set_blocks,
    BI: tl.constexpr, BO: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr, TRANSPOSE_X: tl.constexpr, TRANSPOSE_S: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Tiles of (TM tokens, one output block) in the order of `_dds_kernel`. x and values are descriptors, the dense dimension of x last.

    Triton loads ahead in the inner loop, no more: flatten=True does not fuse the two, the bounds of the inner one being loaded themselves, and
    warp_specialize=True has no effect at 8 warps and at 4 halves the tile but not its descriptor (3.7 says so and fails, 3.6 says nothing).
    """
    steps: tl.constexpr = BI // TK  # of a block
    for at in tl.range(tl.program_id(0), G * tiles * H * outer_blocks, tl.num_programs(0)):
        line = at % (H * outer_blocks)  # output block, counted through all heads
        g = at // (H * outer_blocks * tiles)
        h = line // outer_blocks
        first = at // (H * outer_blocks) % tiles * TM
        total = tl.zeros((TM, BO), dtype=tl.float32)
        for step in tl.range(tl.load(offsets + line) * steps, tl.load(offsets + line + 1) * steps):
            which = step // steps
            k = step % steps * TK
            column = (tl.load(inner_block + which) - h * inner_blocks) * BI + k
            if TRANSPOSE_X:
                a = tl.trans(x.load([g, h, column, first]).reshape(TK, TM))
            else:
                a = x.load([g, h, first, column]).reshape(TM, TK)
            if TRANSPOSE_S:
                b = tl.trans(values.load([g * set_blocks + which, 0, k]).reshape(BO, TK))
            else:
                b = values.load([g * set_blocks + tl.load(position + which), k, 0]).reshape(TK, BO)
            total = tl.dot(a, b, total)
        m, out = first + tl.arange(0, TM), line % outer_blocks * BO + tl.arange(0, BO)
        if HAS_BIAS:
            total += tl.load(bias + out, mask=out < N, other=0.0).to(tl.float32)[None, :]
        y_at = y + ((tl.cast(g, tl.int64) * H + h) * M + m.to(tl.int64)[:, None]) * N + out[None, :]
        tl.store(y_at, total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (out < N)[None, :])


@triton.jit
def _sdd_tma_kernel(
    a, b, values, rows, columns, sets, G, K, M, N, kept, row_blocks, column_blocks,
    BR: tl.constexpr, BC: tl.constexpr, TK: tl.constexpr, TRANSPOSE_A: tl.constexpr, TRANSPOSE_B: tl.constexpr,
):  # fmt: skip
    """Kept blocks, each of one element of the batch (G = 1) or of the sum over all (sets = 1). a and b are descriptors, their dense dimension last."""
    steps = tl.cdiv(K, TK)
    for at in tl.range(tl.program_id(0), sets * kept, tl.num_programs(0)):
        block, first = at % kept, at // kept
        row, column = tl.load(rows + block), tl.load(columns + block)
        h = row // row_blocks
        m, n = row % row_blocks * BR, column % column_blocks * BC
        total = tl.zeros((BR, BC), dtype=tl.float32)
        for step in tl.range(0, G * steps):
            g, k = first + step // steps, step % steps * TK
            if TRANSPOSE_A:
                p = tl.trans(a.load([g, h, k, m]).reshape(TK, BR))
            else:
                p = a.load([g, h, m, k]).reshape(BR, TK)
            if TRANSPOSE_B:
                q = tl.trans(b.load([g, h, n, k]).reshape(BC, TK))
            else:
                q = b.load([g, h, k, n]).reshape(TK, BC)
            total = tl.dot(p, q, total)
        i, j = tl.arange(0, BR), tl.arange(0, BC)
        total = tl.where((m + i < M)[:, None] & (n + j < N)[None, :], total, 0.0)  # an infinity times the padding would be NaN
        tl.store(values + tl.cast(at, tl.int64) * (BR * BC) + i[:, None] * BC + j[None, :], total.to(values.dtype.element_ty))


@functools.cache
def _hopper(device: torch.device) -> tuple[str, int] | None:
    """Name and number of multiprocessors of a GPU that has TMA, None for any other device."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (9, 0):
        return None
    return torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).multi_processor_count


def _tma_reads(x: Tensor) -> bool:
    """Whether TMA reads x (G, H, M, K) as it lies: M or K dense, the address and the other strides multiples of 16 bytes."""
    x = x if x.stride(3) == 1 else x.mT
    strides = [stride * x.element_size() for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    return x.numel() > 0 and x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride and stride % 16 == 0 for stride in strides)  # 0: expanded


def _descriptor(x: Tensor, tile: tuple[int, int]) -> TensorDescriptor:
    """Of x (G, H, M, K), to be read in tiles of (M, K); what lies beyond its edges is read as zeros. Where M is the dense dimension both are transposed."""
    if x.stride(3) != 1:
        x, tile = x.mT, tile[::-1]
    strides = [stride if size > 1 else 16 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]  # one of size 1 is never used, but must be aligned
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, *tile])


def _programs(tiles: int, shared: int, device: torch.device) -> int:
    """As many as run at the same time. What a multiprocessor has room for is 227 KB of shared memory, of which a program takes 2 KB besides the tiles."""
    hopper = _hopper(device)
    assert hopper is not None
    return min(tiles, hopper[1] * ((227 << 10) // (shared + 2048)))


def _choose(pointer: Callable, tma: Callable, arguments: tuple, block: tuple[int, int], sizes: tuple[int, ...]) -> Callable:
    """The kernel for this call: the one through TMA where it can work and has been measured to be faster, for this class of shapes on this machine."""
    first, second = arguments[:2]
    hopper = _hopper(first.device)
    if hopper is None or first.dtype not in (torch.bfloat16, torch.float16) or min(block) < 32 or not (_tma_reads(first) and _tma_reads(second)):
        return pointer
    # a size counts by its power of two, so that a measurement serves sizes like it
    classes = [size.bit_length() for size in (*sizes, *first.shape, *second.shape, first.stride(3) == 1, second.stride(3) == 1)]
    key = f"{tma.__name__} {hopper[0]} {first.dtype} block {block[0]}x{block[1]} {classes}"
    return tma if costs.tma_is_faster(key, _version(), partial(pointer, *arguments), partial(tma, *arguments)) else pointer


@functools.cache
def _version() -> str:
    """Of kernels and compiler: what was measured with others does not count."""
    return f"{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}.triton-{triton.__version__}.torch-{torch.__version__}"


def dds_tma(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: tuple[int, int], columns: int, transpose: bool) -> Tensor:
    """`dds` for what `_choose` lets through; K a multiple of the block's inner side."""
    G, H, M, _K = x.shape
    sets, kept, br, bc = values.shape
    y = x.new_empty(G, H, M, columns)
    offsets, inner, position, BI, BO, inner_blocks, outer_blocks = _side(index, H, grid, (br, bc), transpose)
    TM, TK = 64 if M <= 64 else 128, min(64, BI)
    tiles = -(-M // TM)
    of_values = TensorDescriptor(values, [sets * kept, br, bc], [br * bc, bc, 1], [1, BO, TK] if transpose else [1, TK, BO])
    programs = _programs(G * tiles * H * outer_blocks, 3 * (TM + BO) * TK * x.element_size(), x.device)  # three tiles of each, five stages: as in dds_pointer
    _dds_tma_kernel[(programs,)](
        _descriptor(x, (TM, TK)), of_values, bias if bias is not None else y, y, offsets, inner, position, G, H, M, columns, tiles, outer_blocks,
        inner_blocks, kept if sets > 1 else 0, BI=BI, BO=BO, TM=TM, TK=TK, TRANSPOSE_X=x.stride(3) != 1, TRANSPOSE_S=transpose,
        HAS_BIAS=bias is not None, num_warps=_warps(TM * BO), num_stages=5,
    )  # fmt: skip
    return y


def sdd_tma(a: Tensor, b: Tensor, index: Tensor, grid: tuple[int, int], block: tuple[int, int], reduce: bool) -> Tensor:
    """`sdd` for what `_choose` lets through."""
    (G, H, M, K), (BR, BC) = a.shape, block
    _, columns, *_, rows = _parts(index, H, grid)
    sets, kept = 1 if reduce else G, len(rows)
    values = a.new_empty(sets, kept, BR, BC)
    TK = 64
    _sdd_tma_kernel[(_programs(sets * kept, 3 * (BR + BC) * TK * a.element_size(), a.device),)](
        _descriptor(a, (BR, TK)), _descriptor(b, (TK, BC)), values, rows, columns, sets, G if reduce else 1, K, M, b.shape[3], kept, *grid, BR=BR, BC=BC,
        TK=TK, TRANSPOSE_A=a.stride(3) != 1, TRANSPOSE_B=b.stride(3) != 1, num_warps=_warps(BR * BC), num_stages=3,
    )  # fmt: skip
    return values


def dds(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: tuple[int, int], columns: int, transpose: bool) -> Tensor:
    """x (G, H, M, K) @ S -> (G, H, M, columns), S the sparse matrix of this grid of blocks, or its transpose."""
    G, H, M, K = x.shape
    _sets, _kept, br, bc = values.shape
    if not G * H * M * columns:
        return x.new_empty(G, H, M, columns)
    arguments = x, values.contiguous(), index, bias, grid, columns, transpose
    if K % (bc if transpose else br):  # what the values hold beyond the edge must not be read, and TMA brings whole blocks
        return dds_pointer(*arguments)
    return _choose(dds_pointer, dds_tma, arguments, (br, bc), (columns, transpose))(*arguments)


def sdd(a: Tensor, b: Tensor, index: Tensor, grid: tuple[int, int], block: tuple[int, int], reduce: bool) -> Tensor:
    """a (G, H, M, K) @ b (G, H, K, N) at the kept blocks -> (G, kept, br, bc), or summed over G -> (1, kept, br, bc)."""
    G, H = a.shape[:2]
    kept = len(_parts(index, H, grid)[1])
    if not kept or not (G or reduce):
        return a.new_empty(1 if reduce else G, kept, *block)
    arguments = a, b, index, grid, block, reduce
    return _choose(sdd_pointer, sdd_tma, arguments, block, (kept, reduce))(*arguments)


# Attention. q (B, H, S, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv); `heads` is that of the layout, 1 or H. ------------------------------------------------


@triton.jit
def _allowed(
    block, query, key, i, j, b, S, Sk, place, group, padding, mask,
    BR: tl.constexpr, BC: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PLACE: tl.constexpr, HAS_GROUP: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """(TM, TN): which scores of a kept block exist and are allowed."""
    there_q, there_k = (i < BR) & (query < S), (j < BC) & (key < Sk)
    allowed = there_q[:, None] & there_k[None, :]
    if CAUSAL:
        if HAS_PLACE:
            place_q, place_k = tl.load(place + query, mask=there_q, other=0), tl.load(place + key, mask=there_k, other=0)
            allowed &= place_q[:, None] >= place_k[None, :]
        else:
            allowed &= query[:, None] >= key[None, :]
    if HAS_GROUP:
        group_q, group_k = tl.load(group + query, mask=there_q, other=0), tl.load(group + key, mask=there_k, other=0)
        allowed &= group_q[:, None] == group_k[None, :]
    if HAS_PADDING:
        allowed &= (tl.load(padding + b * Sk + key, mask=there_k, other=0) != 0)[None, :]
    if HAS_MASK:
        at = mask + tl.cast(block, tl.int64) * (BR * BC) + i[:, None] * BC + j[None, :]
        allowed &= tl.load(at, mask=(i < BR)[:, None] & (j < BC)[None, :], other=0) != 0
    return allowed


@triton.jit
def _exp2(x):
    return tl.exp(x * LN2) if x.dtype == tl.float64 else tl.exp2(x)  # in float64 there is no exp2


@triton.jit
def _log2(x):
    return tl.log(x) / LN2 if x.dtype == tl.float64 else tl.log2(x)


@triton.jit
def _mix(x):
    """The hash of `attention._mix`, in uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _keep(seed, drop, batch_head, query, key):
    """(TM, TN): which probabilities dropout keeps. As `attention._keep`."""
    number = tl.load(seed)
    of_seed = _mix(number.to(tl.uint32) ^ _mix((number >> 32).to(tl.uint32) + 0x9E3779B9))
    head = _mix(of_seed + batch_head.to(tl.uint32))
    of_query, of_key = _mix(head ^ (query.to(tl.uint32) * 0x9E3779B1)), _mix(key.to(tl.uint32) ^ 0xC2B2AE35)
    return _mix(of_query[:, None] + of_key[None, :]).to(tl.int64) >= drop


@triton.jit
def _rows_of(base, row, stride, there, depth, D):
    """A (rows, depth) tile; zeros where it is not there and beyond the depth."""
    return tl.load(base + row.to(tl.int64)[:, None] * stride + depth[None, :], mask=there[:, None] & (depth < D)[None, :], other=0.0)


@triton.jit
def _attention_kernel(
    q, k, v, out, lse, offsets, columns, place, group, padding, mask, seed, drop, factor, scale, H, Hk, S, Sk, D, Dv, R, C, heads,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, BR: tl.constexpr, BC: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TD: tl.constexpr, TV: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PLACE: tl.constexpr, HAS_GROUP: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one block row of one head: a running softmax over its kept blocks (Milakov and Gimelshein 2018, arXiv:1805.02867)."""
    down: tl.constexpr = (BR + TM - 1) // TM  # tiles of a block
    across: tl.constexpr = (BC + TN - 1) // TN
    row = tl.program_id(0) // down % R
    h = tl.program_id(0) // (down * R) % H
    b = (tl.program_id(0) // (down * R * H)).to(tl.int64)
    hk = h // (H // Hk)
    line = (h if heads > 1 else 0) * R + row
    i, d, e = tl.program_id(0) % down * TM + tl.arange(0, TM), tl.arange(0, TD), tl.arange(0, TV)
    query = row * BR + i
    there_q = (i < BR) & (query < S)
    queries = _rows_of(q + b * q_b + h.to(tl.int64) * q_h, query, q_s, there_q, d, D)
    keys, vals = k + b * k_b + hk.to(tl.int64) * k_h, v + b * v_b + hk.to(tl.int64) * v_h
    top = tl.full((TM,), float("-inf"), dtype=ACC)
    total = tl.zeros((TM,), dtype=ACC)
    sums = tl.zeros((TM, TV), dtype=ACC)
    first_column = (h if heads > 1 else 0) * C
    for part in range(tl.load(offsets + line) * across, tl.load(offsets + line + 1) * across):
        block, j = part // across, part % across * TN + tl.arange(0, TN)
        key = (tl.load(columns + block) - first_column) * BC + j
        there_k = (j < BC) & (key < Sk)
        scores = tl.dot(queries, tl.trans(_rows_of(keys, key, k_s, there_k, d, D)), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)
        allowed = _allowed(block, query, key, i, j, b, S, Sk, place, group, padding, mask, BR, BC, CAUSAL, HAS_PLACE, HAS_GROUP, HAS_PADDING, HAS_MASK)
        scores = tl.where(allowed, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        p = _exp2(scores - origin[:, None])
        shrink = _exp2(top - origin)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:  # after the sum: the probabilities are dropped, not the scores
            p = tl.where(_keep(seed, drop, b * H + h, query, key), p * factor, 0.0)
        values = _rows_of(vals, key, v_s, there_k, e, Dv)
        sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
        top = new_top
    sees = total != 0.0  # a NaN is seen, and goes on to the output
    sums = tl.where(sees[:, None], sums / tl.where(sees, total, 1.0)[:, None], 0.0)
    at = (b * H + h) * S + query.to(tl.int64)
    tl.store(out + at[:, None] * Dv + e[None, :], sums.to(out.dtype.element_ty), mask=there_q[:, None] & (e < Dv)[None, :])
    tl.store(lse + at, tl.where(sees, (top + _log2(tl.where(sees, total, 1.0))) * LN2, float("-inf")), mask=there_q)


@triton.jit
def _attention_dq_kernel(
    grad, q, k, v, lse, delta, dq, offsets, columns, place, group, padding, mask, seed, drop, factor, scale, H, Hk, S, Sk, D, Dv, R, C, heads,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, BR: tl.constexpr, BC: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TD: tl.constexpr, TV: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PLACE: tl.constexpr, HAS_GROUP: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale sum_blocks P * (dP - delta) k, for a tile of one block row of one head."""
    down: tl.constexpr = (BR + TM - 1) // TM  # tiles of a block
    across: tl.constexpr = (BC + TN - 1) // TN
    row = tl.program_id(0) // down % R
    h = tl.program_id(0) // (down * R) % H
    b = (tl.program_id(0) // (down * R * H)).to(tl.int64)
    hk = h // (H // Hk)
    line = (h if heads > 1 else 0) * R + row
    i, d, e = tl.program_id(0) % down * TM + tl.arange(0, TM), tl.arange(0, TD), tl.arange(0, TV)
    query = row * BR + i
    there_q = (i < BR) & (query < S)
    at = (b * H + h) * S
    queries = _rows_of(q + b * q_b + h.to(tl.int64) * q_h, query, q_s, there_q, d, D)
    grads = _rows_of(grad + at * Dv, query, Dv, there_q, e, Dv)
    norm = tl.load(lse + at + query, mask=there_q, other=0.0) / LN2
    norm = tl.where(norm == float("-inf"), 0.0, norm)  # a row that sees nothing: all its scores are -inf
    shift = tl.load(delta + at + query, mask=there_q, other=0.0)
    keys, vals = k + b * k_b + hk.to(tl.int64) * k_h, v + b * v_b + hk.to(tl.int64) * v_h
    sums = tl.zeros((TM, TD), dtype=ACC)
    first_column = (h if heads > 1 else 0) * C
    for part in range(tl.load(offsets + line) * across, tl.load(offsets + line + 1) * across):
        block, j = part // across, part % across * TN + tl.arange(0, TN)
        key = (tl.load(columns + block) - first_column) * BC + j
        there_k = (j < BC) & (key < Sk)
        key_rows = _rows_of(keys, key, k_s, there_k, d, D)
        scores = tl.dot(queries, tl.trans(key_rows), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)
        allowed = _allowed(block, query, key, i, j, b, S, Sk, place, group, padding, mask, BR, BC, CAUSAL, HAS_PLACE, HAS_GROUP, HAS_PADDING, HAS_MASK)
        p = tl.where(allowed, _exp2(scores - norm[:, None]), 0.0)
        dp = tl.dot(grads, tl.trans(_rows_of(vals, key, v_s, there_k, e, Dv)), input_precision=PRECISION, out_dtype=ACC)
        if DROPOUT:
            dp = tl.where(_keep(seed, drop, b * H + h, query, key), dp * factor, 0.0)
        ds = tl.where(allowed, p * (dp - shift[:, None]), 0.0)
        sums = tl.dot(ds.to(key_rows.dtype), key_rows, sums, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        dq + (at + query.to(tl.int64))[:, None] * D + d[None, :], (sums * scale).to(dq.dtype.element_ty), mask=there_q[:, None] & (d < D)[None, :]
    )


@triton.jit
def _attention_dkv_kernel(
    grad, q, k, v, lse, delta, dk, dv, offsets, rows, order, place, group, padding, mask, seed, drop, factor, scale, H, Hk, S, Sk, D, Dv, R, C, heads,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, BR: tl.constexpr, BC: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TD: tl.constexpr, TV: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PLACE: tl.constexpr, HAS_GROUP: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of one block column of one key head: over the query heads that share it, and over the transposed index."""
    down: tl.constexpr = (BR + TM - 1) // TM  # tiles of a block
    across: tl.constexpr = (BC + TN - 1) // TN
    column = tl.program_id(0) // across % C
    hk = tl.program_id(0) // (across * C) % Hk
    b = (tl.program_id(0) // (across * C * Hk)).to(tl.int64)
    j, d, e = tl.program_id(0) % across * TN + tl.arange(0, TN), tl.arange(0, TD), tl.arange(0, TV)
    key = column * BC + j
    there_k = (j < BC) & (key < Sk)
    key_rows = _rows_of(k + b * k_b + hk.to(tl.int64) * k_h, key, k_s, there_k, d, D)
    value_rows = _rows_of(v + b * v_b + hk.to(tl.int64) * v_h, key, v_s, there_k, e, Dv)
    dks = tl.zeros((TN, TD), dtype=ACC)
    dvs = tl.zeros((TN, TV), dtype=ACC)
    shared = H // Hk
    for h in range(hk * shared, hk * shared + shared):
        layer = h if heads > 1 else 0
        at = (b * H + h) * S
        for part in range(tl.load(offsets + layer * C + column) * down, tl.load(offsets + layer * C + column + 1) * down):
            t, i = part // down, part % down * TM + tl.arange(0, TM)
            block = tl.load(order + t)
            query = (tl.load(rows + t) - layer * R) * BR + i
            there_q = (i < BR) & (query < S)
            queries = _rows_of(q + b * q_b + tl.cast(h, tl.int64) * q_h, query, q_s, there_q, d, D)
            grads = _rows_of(grad + at * Dv, query, Dv, there_q, e, Dv)
            norm = tl.load(lse + at + query, mask=there_q, other=0.0) / LN2
            norm = tl.where(norm == float("-inf"), 0.0, norm)
            scores = tl.dot(queries, tl.trans(key_rows), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)
            allowed = _allowed(block, query, key, i, j, b, S, Sk, place, group, padding, mask, BR, BC, CAUSAL, HAS_PLACE, HAS_GROUP, HAS_PADDING, HAS_MASK)
            p = tl.where(allowed, _exp2(scores - norm[:, None]), 0.0)
            dp = tl.dot(grads, tl.trans(value_rows), input_precision=PRECISION, out_dtype=ACC)
            dropped = p
            if DROPOUT:
                keep = _keep(seed, drop, b * H + h, query, key)
                dropped, dp = tl.where(keep, p * factor, 0.0), tl.where(keep, dp * factor, 0.0)
            dvs = tl.dot(tl.trans(dropped).to(grads.dtype), grads, dvs, input_precision=PRECISION, out_dtype=ACC)
            shift = tl.load(delta + at + query, mask=there_q, other=0.0)
            ds = tl.where(allowed, p * (dp - shift[:, None]), 0.0)
            dks = tl.dot(tl.trans(ds).to(queries.dtype), queries, dks, input_precision=PRECISION, out_dtype=ACC)
    to = (b * Hk + hk) * Sk + key.to(tl.int64)
    tl.store(dk + to[:, None] * D + d[None, :], (dks * scale).to(dk.dtype.element_ty), mask=there_k[:, None] & (d < D)[None, :])
    tl.store(dv + to[:, None] * Dv + e[None, :], dvs.to(dv.dtype.element_ty), mask=there_k[:, None] & (e < Dv)[None, :])


def _common(q, k, v, grid, block, heads, scale, causal, position, group, padding, mask, dropout, seed):
    """What the three kernels of attention take alike: arguments by name, whose pointers are any tensor where there is nothing to point to."""
    (_B, H, S, D), (Hk, Sk), Dv, none = q.shape, k.shape[1:3], v.shape[3], q
    most = min(_most(q.dtype), 64 if max(D, Dv) > 64 else 128)
    TD, TV = _tile(D), _tile(Dv)
    sizes = {"TM": _tile(block[0], most), "TN": _tile(block[1], most), "TD": TD, "TV": TV}
    flags = {"HAS_PLACE": position is not None, "HAS_GROUP": group is not None, "HAS_PADDING": padding is not None, "HAS_MASK": mask is not None}
    restrictions = {"place": position, "group": group, "padding": padding, "mask": mask, "seed": seed}
    strides = {f"{n}_{axis}": t.stride(a) for n, t in (("q", q), ("k", k), ("v", v)) for a, axis in enumerate("bhs")}
    return {
        "q": q, "k": k, "v": v, "scale": scale, "H": H, "Hk": Hk, "S": S, "Sk": Sk, "D": D, "Dv": Dv, "R": grid[0], "C": grid[1], "heads": heads,
        **{name: none if t is None else t for name, t in restrictions.items()}, **strides, "BR": block[0], "BC": block[1], **sizes,
        "drop": min(0xFFFFFFFF, round(dropout * 2**32)), "factor": 1 / (1 - dropout), "CAUSAL": causal, **flags, "DROPOUT": seed is not None,
        "ACC": _accumulator(q.dtype), "PRECISION": _precision(q.dtype),
        "num_warps": _warps(sizes["TM"] * max(sizes["TN"], TD, TV)), "num_stages": 2,
    }  # fmt: skip


def attention(q, k, v, index, grid, block, heads, scale, causal, position, group, padding, mask, dropout, seed) -> tuple[Tensor, Tensor]:
    """Output (B, H, S, Dv) and log-sum-exp (B, H, S). The last dimension of q, k and v must be dense."""
    (B, H, S, _D), R = q.shape, grid[0]
    out, lse = q.new_empty(B, H, S, v.shape[3]), q.new_empty(B, H, S, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if lse.numel():
        common = _common(q, k, v, grid, block, heads, scale, causal, position, group, padding, mask, dropout, seed)
        _attention_kernel[(B * H * R * -(-block[0] // common["TM"]),)](out=out, lse=lse, offsets=index, columns=index[heads * R + 1 :], **common)
    return out, lse


def attention_backward(
    q, k, v, out, lse, grad, grad_lse, index, grid, block, heads, scale, causal, position, group, padding, mask, dropout, seed
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, whose last dimension must be dense; `grad` must be contiguous."""
    (B, H, _S, _D), Hk, (R, C) = q.shape, k.shape[1], grid
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(3)
    if grad_lse is not None:
        delta = delta - grad_lse
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    row_offsets, columns, column_offsets, rows, order, _ = _parts(index, heads, grid)
    common = _common(q, k, v, grid, block, heads, scale, causal, position, group, padding, mask, dropout, seed) | {"grad": grad, "lse": lse, "delta": delta}
    if dq.numel():
        _attention_dq_kernel[(B * H * R * -(-block[0] // common["TM"]),)](dq=dq, offsets=row_offsets, columns=columns, **common)
    if dk.numel() or dv.numel():
        _attention_dkv_kernel[(B * Hk * C * -(-block[1] // common["TN"]),)](dk=dk, dv=dv, offsets=column_offsets, rows=rows, order=order, **common)
    return dq, dk, dv
