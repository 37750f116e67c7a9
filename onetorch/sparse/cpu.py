"""The C++ kernels of the CPU: built once for this machine where a compiler is found, and called on raw pointers.

The library is a plain shared object without torch's headers, so it builds in seconds and serves every torch version; it shares torch's OpenMP threads.
It lies in the user's cache folder under a name that holds the hash of its source, the compiler's version, the flags and the CPU's features. Where there
is no compiler `library()` is None and the products take their PyTorch path.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SOURCE = Path(__file__).parent / "csrc"
# -ffp-contract=fast lets a multiply and an add become one fused instruction, which is what the kernels are built on; nothing else is allowed to change a result
FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=fast", "-fPIC")


def _cpu_features() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}))


def _cache_folder() -> Path:
    folder = Path.home() / ".cache" / "onetorch" / "sparse"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"onetorch-sparse-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:  # another user could put a library there
            raise PermissionError(f"{folder}: expected a folder that only this user can write") from None
        return folder


def _say(text: str) -> None:
    sys.stderr.write(f"onetorch.sparse: {text}\n")


def _build(compiler: str, source_folder: Path, target: Path) -> bool:
    """Compile into `target` unless it is there by the time the lock is ours; False where the compiler fails."""
    import fcntl

    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return True
        _say(f"building the CPU kernels with {compiler} (once, some ten to thirty seconds) ...")
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            sources = sorted(source_folder.glob("*.cpp"))
            for openmp in (("-fopenmp",), ()):  # Apple's clang has no OpenMP: one thread is better than none
                objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
                steps = [
                    subprocess.Popen([compiler, *FLAGS, *openmp, "-c", str(source), "-o", o], stderr=subprocess.PIPE, text=True)
                    for source, o in zip(sources, objects, strict=True)
                ]
                errors = "".join([step.communicate()[1] for step in steps])
                if all(step.returncode == 0 for step in steps):
                    linked = subprocess.run([compiler, *FLAGS, *openmp, "-shared", *objects, "-o", str(made)], capture_output=True, text=True)
                    errors = linked.stderr
                    if linked.returncode == 0:
                        os.replace(made, target)
                        _say(f"built in {time.perf_counter() - start:.0f} s: {target}")
                        return True
        _say(f"{compiler} failed, the products take their PyTorch path: {errors.strip().splitlines()[-1] if errors.strip() else 'no message'}")
        return False


@functools.cache
def built(source_folder: Path) -> ctypes.CDLL | None:
    """The C++ files of a folder as one library, built where it has not been yet; None where there is no compiler (or no POSIX system)."""
    compiler = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    if compiler is None or os.name != "posix":
        _say("no C++ compiler found (g++, clang++): the products take their PyTorch path, several times slower")
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    source = b"".join(path.read_bytes() for path in sorted(source_folder.iterdir()))
    key = hashlib.sha256(b"\0".join([source, version.encode(), " ".join(FLAGS).encode(), _cpu_features().encode()])).hexdigest()[:16]
    target = _cache_folder() / f"kernels-{key}.so"
    if not target.exists() and not _build(compiler, source_folder, target):
        return None
    return ctypes.CDLL(str(target))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The block-sparse kernels, or None where they cannot be built."""
    lib = built(SOURCE)
    if lib is None:
        return None
    i32, i64, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    sizes = ctypes.POINTER(i64)
    lib.onetorch_dds.argtypes = [i32, pointer, sizes, sizes, pointer, i64, i64, i64, i64, i64, pointer, pointer, pointer, i64, i64, pointer, pointer, i64, i32]
    lib.onetorch_sdd.argtypes = [i32, pointer, pointer, sizes, sizes, sizes, i64, i64, pointer, pointer, i64, i64, i64, i32, pointer, i32]
    lib.onetorch_move.argtypes = [pointer, pointer, sizes, pointer, pointer, i32, i32]
    lib.onetorch_move_taps.argtypes = [pointer, pointer, pointer, sizes, i32, i32, i32]
    lib.onetorch_move.restype = lib.onetorch_move_taps.restype = None
    attention: list = [i32, pointer, pointer, pointer, sizes, sizes, sizes, sizes, pointer, pointer, ctypes.c_double, i32, pointer, pointer, pointer, pointer]
    attention += [ctypes.c_double, pointer]
    lib.onetorch_attention.argtypes = [*attention, pointer, pointer, i32]
    lib.onetorch_attention_backward.argtypes = [*attention, pointer, pointer, pointer, pointer, pointer, pointer, pointer, i32]
    return lib


def _threads(multiplications: int) -> int:
    """Torch's threads, but no more than the work is worth: waking one costs as much as a million multiplications. The results do not depend on it."""
    return max(1, min(torch.get_num_threads(), multiplications // 1_000_000))


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("onetorch.sparse: no memory left for the packed operands")
    assert status == 0, status


def _longs(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def dds(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: tuple[int, int], columns: int, transpose: bool) -> Tensor:
    """x (G, H, M, K) with any strides @ values (1 or G, kept, br, bc) as (K, columns), or transposed as (columns, K) -> (G, H, M, columns). `grid` is (R,
    C) of the layout.
    """
    lib = library()
    assert lib is not None
    G, H, M, _K = x.shape
    R, C = grid
    values = values.contiguous()
    kept, br, bc = values.shape[1:]
    y = x.new_empty(G, H, M, columns)  # torch.empty would go to the default device, which may be another
    if y.numel() == 0:
        return y
    base, row_offsets, column_offsets = index.data_ptr(), H * R + 1, H * C + 1
    if transpose:  # block columns of the transposed matrix are the block rows as they stand
        offsets, rows, order = base, base + 4 * row_offsets, None
        block, stride, size = (bc, br), (1, bc), (C, R)
    else:
        offsets = base + 4 * (row_offsets + kept)
        rows, order = offsets + 4 * column_offsets, offsets + 4 * (column_offsets + kept)
        block, stride, size = (br, bc), (bc, 1), (R, C)
    per_batch = values.stride(0) if values.shape[0] > 1 else 0
    bias_at = None if bias is None else bias.contiguous().data_ptr()
    _check(
        lib.onetorch_dds(
            DTYPES[x.dtype], x.data_ptr(), _longs(*x.shape), _longs(*x.stride()), values.data_ptr(), per_batch, *block, *stride,
            offsets, rows, order, *size, bias_at, y.data_ptr(), columns, _threads(max(G * M, 4) * kept * br * bc),
        )
    )  # fmt: skip
    return y


def sdd(a: Tensor, b: Tensor, index: Tensor, grid: tuple[int, int], block: tuple[int, int], reduce: bool) -> Tensor:
    """a (G, H, M, K) @ b (G, H, K, N), any strides, at the kept blocks -> (G, kept, br, bc), or their sum over G as (1, kept, br, bc)."""
    lib = library()
    assert lib is not None
    G, H, M, K = a.shape
    R, C = grid
    kept = (index.shape[0] - H * R - H * C - 2) // 4
    out = a.new_empty(1 if reduce else G, kept, *block)
    if out.numel() == 0:
        return out
    if G == 0 or K == 0:
        return out.zero_()
    columns, rows = index.data_ptr() + 4 * (H * R + 1), index.data_ptr() + 4 * (index.shape[0] - kept)
    _check(
        lib.onetorch_sdd(
            DTYPES[a.dtype], a.data_ptr(), b.data_ptr(), _longs(G, H, M, b.shape[3], K), _longs(*a.stride()), _longs(*b.stride()), *block,
            rows, columns, kept, R, C, int(reduce), out.data_ptr(), _threads(G * K * kept * block[0] * block[1]),
        )
    )  # fmt: skip
    return out


KEPT = 1 << 28  # bytes of all pieces together
_pieces: list[ctypes.Array] = []  # memory of large results that were let go of, the last one first


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor, a large one in memory that comes back to `_pieces` when nothing holds it any more. The system's allocator would give pages of this
    size back at each call, and fetching new ones takes longer than writing them: up to half of a convolution's time.
    """
    count = math.prod(shape)
    size = count * like.element_size() + 64
    if size < 1 << 18:
        return like.new_empty(shape)
    piece = next((piece for piece in _pieces if len(piece) == size), None)
    if piece is None:
        piece = (ctypes.c_char * size)()
    else:
        try:
            _pieces.remove(piece)
        except ValueError:  # another thread was quicker
            piece = (ctypes.c_char * size)()
    held = type(piece).from_buffer(piece)
    weakref.finalize(held, _come_back, piece).atexit = False
    # at the beginning of a line, as torch's own memory: lines that are written in two parts take twice as long
    return torch.frombuffer(held, dtype=like.dtype, count=count, offset=-ctypes.addressof(piece) % 64).view(shape)


def _come_back(piece: ctypes.Array) -> None:
    _pieces.insert(0, piece)
    while sum(map(len, _pieces)) > KEPT:
        del _pieces[-1:]


def fill(values: Tensor, index: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """values (G, kept, br, bc), without heads -> (G, *shape), zeros outside the blocks."""
    dense = _empty(values, (values.shape[0], *shape))
    _move(values.contiguous(), dense, index, grid, True)
    return dense


def take(dense: Tensor, index: Tensor, grid: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """dense (G, rows, columns), without heads -> (G, kept, br, bc), zeros beyond the edge."""
    values = _empty(dense, (dense.shape[0], (index.shape[0] - sum(grid) - 2) // 4, *block))
    _move(values, dense.contiguous(), index, grid, False)
    return values


def _move(values: Tensor, dense: Tensor, index: Tensor, grid: tuple[int, int], fill: bool) -> None:
    lib = library()
    assert lib is not None
    (G, rows, columns), (br, bc), width = dense.shape, values.shape[2:], dense.element_size()
    size, columns_at = _longs(*grid, br, bc * width, rows, columns * width), index.data_ptr() + 4 * (grid[0] + 1)
    threads = _threads(8 * rows * columns)  # as long as eight multiplications
    for g in range(G):
        one, matrix = values.data_ptr() + g * values.stride(0) * width, dense.data_ptr() + g * rows * columns * width
        lib.onetorch_move(one, matrix, size, index.data_ptr(), columns_at, int(fill), threads)


def pack_taps(weight: Tensor, place: Tensor, lines: int, turned: bool) -> Tensor:
    """weight (kept, br, bc, taps) of words of 4 or 8 bytes -> its blocks (lines, taps / lines * kept, br, bc), `turned` (..., bc, br): see `conv._Side`."""
    kept, br, bc, taps = weight.shape
    packed = _empty(weight, (lines, taps // lines * kept, *((bc, br) if turned else (br, bc))))
    _move_taps(weight.contiguous(), list(packed), place, turned, True)
    return packed


def unpack_taps(lines: list[Tensor], place: Tensor, taps: int, turned: bool) -> Tensor:
    """Back: as many blocks of each line -> (kept, br, bc, taps)."""
    kept, block = place.shape[0] // taps, lines[0].shape[1:]
    weight = _empty(lines[0], (kept, *(block[::-1] if turned else block), taps))
    _move_taps(weight, [line.contiguous() for line in lines], place, turned, False)
    return weight


def _move_taps(weight: Tensor, lines: list[Tensor], place: Tensor, turned: bool, pack: bool) -> None:
    lib = library()
    assert lib is not None
    size = _longs(*weight.shape, weight.shape[3] // len(lines), weight.element_size())
    at = (ctypes.c_void_p * len(lines))(*(line.data_ptr() for line in lines))
    lib.onetorch_move_taps(weight.data_ptr(), at, place.data_ptr(), size, int(turned), int(pack), _threads(8 * weight.numel()))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _attention_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    grid: tuple[int, int],
    block: tuple[int, int],
    heads: int,
    scale: float,
    causal: bool,
    position: Tensor | None,
    group: Tensor | None,
    padding: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple:
    B, H, S, D = q.shape
    sizes = _longs(B, H, k.shape[1], S, k.shape[2], D, v.shape[3], *grid, *block, heads)
    strides = [_longs(*t.stride()[:3]) for t in (q, k, v)]
    columns = index.data_ptr() + 4 * (heads * grid[0] + 1)
    return (
        DTYPES[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        sizes,
        *strides,
        index.data_ptr(),
        columns,
        scale,
        int(causal),
        *map(_pointer, (position, group, padding, mask)),
        dropout,
        _pointer(seed),
    )


def _attention_threads(q: Tensor, k: Tensor, index: Tensor, grid: tuple[int, int], block: tuple[int, int], heads: int, *_: object) -> int:
    B, H, _S, D = q.shape
    kept = (index.shape[0] - heads * sum(grid) - 2) // 4
    return _threads(B * H // heads * kept * block[0] * block[1] * 2 * D)


def attention(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """-> (B, H, S, Dv) and the log-sum-exp (B, H, S). q, k and v have a contiguous last dimension; see csrc/attention.cpp."""
    lib = library()
    assert lib is not None
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if lse.numel():
        _check(lib.onetorch_attention(*_attention_arguments(q, k, v, *arguments), out.data_ptr(), lse.data_ptr(), _attention_threads(q, k, *arguments)))
    return out, lse


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, *arguments
) -> tuple[Tensor, Tensor, Tensor]:
    lib = library()
    assert lib is not None
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    if lse.numel():
        gradients = [t.data_ptr() for t in (grad, dq, dk, dv)]
        _check(
            lib.onetorch_attention_backward(
                *_attention_arguments(q, k, v, *arguments), out.data_ptr(), lse.data_ptr(), _pointer(grad_lse), *gradients, _attention_threads(q, k, *arguments)
            )
        )
    return dq, dk, dv
