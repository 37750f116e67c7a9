"""Sparse kernel or dense product: a cost model measured on this machine.

The kernels of this package lose to a dense product where the layout is nearly full and the machine multiplies dense matrices by better means (matrix
units, a vendor's library). For each dtype, block, number of threads and class of token counts the density from which the dense product (on a weight
filled in for the call) is faster is measured once, in about half a second, and kept beside the compiled kernels. `choice` says which one a
product takes, and why. On a GPU the choice is between two sparse kernels, `tma_is_faster`.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from onetorch.sparse import cpu
from onetorch.sparse.layout import Layout

NEVER = 2.0  # a density that no layout has
LEAST = 0.1  # below this density nothing is measured: the sparse kernel it is
SIZE = 2048  # of the weight that is measured: at 1024 it lies in the second-level cache and dense looks slower than it is
measured: dict[str, float] = {}  # what is known in this process


def _class(tokens: int) -> int:
    """The number of tokens that stands for this one, 0 for so few that filling in the weight would cost more than the product."""
    return 512 if tokens >= 128 else 64 if tokens >= 16 else 0


def dense_dds(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: tuple[int, int], transpose: bool) -> Tensor | None:
    """None where what came out is not finite: a NaN in an unused block may have met a zero, and the sparse kernel reads only what is used."""
    with torch.autocast("cpu", enabled=False):
        weight = cpu.fill(values, index, grid, (grid[0] * values.shape[2], grid[1] * values.shape[3]))[0]
        y = torch.nn.functional.linear(x, weight if transpose else weight.mT, bias).contiguous()
        full = values.shape[1] == grid[0] * grid[1]
        return y if full or bool(y.sum(dtype=torch.float32).isfinite()) else None


def dense_sdd(a: Tensor, b: Tensor, index: Tensor, grid: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """a (1, 1, R br, K) @ b (1, 1, K, C bc) as a whole, and of that the kept blocks: (1, kept, br, bc)."""
    with torch.autocast("cpu", enabled=False):
        return cpu.take((a @ b)[0], index, grid, block)


def break_even(dtype: torch.dtype, block: tuple[int, int], tokens: int, product: str = "dds") -> float:
    """The density from which the dense product is faster, for this class of token counts; NEVER where it is not even at 1."""
    lib = cpu.library()
    assert lib is not None
    key = f"{product} {str(dtype).removeprefix('torch.')} {block[0]}x{block[1]} tokens {tokens} threads {torch.get_num_threads()}"
    if key not in measured:
        _remember(key, Path(lib._name).with_suffix(f".torch-{torch.__version__}.json"), partial(_measure, dtype, block, tokens, product))
    return measured[key]


def _remember(key: str, path: Path, measure: Callable[[], float]) -> None:
    """Take what was measured under this key from the file, or measure now and keep it there."""
    known = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        known[key] = round(measure(), 3)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    measured.update(known)


def _measure(dtype: torch.dtype, block: tuple[int, int], tokens: int, product: str = "dds") -> float:
    x = torch.linspace(-1, 1, tokens * SIZE, device="cpu").view(1, 1, tokens, SIZE).to(dtype)  # no random numbers: the caller's generators stay as they are
    R, C = SIZE // block[0], SIZE // block[1]
    checker = (torch.arange(R, device="cpu")[:, None] + torch.arange(C, device="cpu")) % 2 == 0
    candidates: dict[tuple[str, float], Callable[[], Tensor | None]] = {}
    for density, mask in ((1.0, torch.ones_like(checker)), (0.5, checker)):
        layout = Layout.from_mask(mask, block)
        if product == "sdd":
            candidates["sparse", density] = partial(cpu.sdd, x.mT, x, layout.index, (R, C), block, True)
            candidates["dense", density] = partial(dense_sdd, x.mT, x, layout.index, (R, C), block)
            continue
        values = torch.linspace(-1, 1, layout.kept * block[0] * block[1], device="cpu").view(1, *layout.values_shape).to(dtype)
        candidates["sparse", density] = partial(cpu.dds, x, values, layout.index, None, (R, C), SIZE, True)
        candidates["dense", density] = partial(dense_dds, x, values, layout.index, None, (R, C), True)
    times: dict = {name: [] for name in candidates}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # one thread's own time does not count what others do on its core
    for round_ in range(8):
        for name, run in candidates.items():
            start = clock()
            run()
            if round_:  # the first warms up
                times[name].append(clock() - start)
        if round_ >= 3 and sum(map(sum, times.values())) > 0.4:
            break
    gap = {density: median(s / d for s, d in zip(times["sparse", density], times["dense", density], strict=True)) - 1 for density in (0.5, 1.0)}
    if gap[1.0] <= 0:
        return NEVER
    if gap[0.5] >= 0:
        return max(LEAST, 0.5 - 0.5 * gap[0.5] / max(gap[1.0] - gap[0.5], gap[0.5]))
    return 1.0 - 0.5 * gap[1.0] / (gap[1.0] - gap[0.5])


def tma_is_faster(key: str, version: str, pointer: Callable[[], Tensor], tma: Callable[[], Tensor]) -> bool:
    """Of two kernels of the GPU for the same product, both called on the arguments of the first call of their class, which then takes a few milliseconds
    longer (and compiles both). A CUDA graph that is being captured cannot wait for a measurement: it takes what is known in this process, or `pointer`.
    """
    if key not in measured:
        if torch.cuda.is_current_stream_capturing():
            return False
        _remember(key, cpu._cache_folder() / f"gpu-{version}.json", partial(_speedup, pointer, tma))
    return measured[key] > 1


def _speedup(pointer: Callable[[], Tensor], tma: Callable[[], Tensor]) -> float:
    def milliseconds(call: Callable[[], Tensor]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(5):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    pointer(), tma()  # compiles
    return median(milliseconds(pointer) / milliseconds(tma) for _ in range(9))


def _whole(shape: tuple[int, int], block: tuple[int, int], density: float, tokens: int) -> bool:
    """Whether the dense product is thought of at all: whole blocks, not too few of them, not too few tokens."""
    return shape[0] % block[0] == 0 and shape[1] % block[1] == 0 and density >= LEAST and _class(tokens) > 0


def dense_is_faster(x: Tensor, values: Tensor, rows: int, columns: int) -> bool:
    """For dds with one set of values, without heads; others are always sparse."""
    G, H, M, _K = x.shape
    sets, kept, br, bc = values.shape
    density = kept * br * bc / max(1, rows * columns)
    return H == 1 and sets == 1 and _whole((rows, columns), (br, bc), density, G * M) and density >= break_even(x.dtype, (br, bc), _class(G * M))


def dense_sdd_is_faster(a: Tensor, b: Tensor, kept: int, block: tuple[int, int]) -> bool:
    """For one product without heads; others are always sparse."""
    G, H, M, K = a.shape
    density = kept * block[0] * block[1] / max(1, M * b.shape[3])
    return G == 1 and H == 1 and _whole((M, b.shape[3]), block, density, K) and density >= break_even(a.dtype, block, _class(K), "sdd")


def choice(layout: Layout, tokens: int, dtype: torch.dtype = torch.float32) -> str:
    """What a layer with this layout does with this many tokens on this machine, in words: the kernel of its forward product (and of the gradient of its
    input), and that of the gradient of its weight. A measurement of half a second may run, once per machine. For example:

    sparse: density 0.250, the dense product is faster from 0.981; gradient of the weight sparse, dense from 0.942
    """
    if not isinstance(layout, Layout):
        raise ValueError(f"layout: expected a Layout, got {type(layout).__name__}")
    if type(tokens) is not int or tokens < 0:
        raise ValueError(f"tokens: expected an int, at least 0, got {tokens!r}")
    if dtype not in cpu.DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(str(d).removeprefix('torch.') for d in cpu.DTYPES)}, got {dtype}")
    if layout.device.type != "cpu" or cpu.library() is None:
        return "pytorch: batched products of gathered blocks"
    if layout.heads is not None or not _whole(layout.shape, layout.block, layout.density, tokens):
        return f"sparse: density {layout.density:.3f}, {tokens} tokens"
    said = []
    for product in ("dds", "sdd"):
        limit = break_even(dtype, layout.block, _class(tokens), product)
        said.append(("dense" if layout.density >= limit else "sparse", limit))
    (forward, limit), (weight, weight_limit) = said
    where = "the dense product is never faster here" if limit == NEVER else f"the dense product is faster from {limit:.3f}"
    from_where = "never" if weight_limit == NEVER else f"from {weight_limit:.3f}"
    return f"{forward}: density {layout.density:.3f}, {where}; gradient of the weight {weight}, dense {from_where}"
