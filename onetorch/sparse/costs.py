"""Sparse kernel or dense product: a cost model measured on this machine.

The kernels of this package lose to a dense product where the layout is nearly full and the machine multiplies dense matrices by better means (matrix
units, a vendor's library). For each dtype, block, number of threads and class of token counts the density from which the dense product (on a weight
filled in for the call) is faster is measured once, in about a tenth of a second, and kept beside the compiled kernels. `choice` says which one a
product takes, and why.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from onetorch.sparse import cpu
from onetorch.sparse.layout import Layout

NEVER = 2.0  # a density that no layout has
LEAST = 0.1  # below this density nothing is measured: the sparse kernel it is
SIZE = 1024
measured: dict[str, float] = {}  # what is known in this process


def _class(tokens: int) -> int:
    """The number of tokens that stands for this one, 0 for so few that filling in the weight would cost more than the product."""
    return 512 if tokens >= 128 else 64 if tokens >= 16 else 0


def dense_weight(values: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
    """values (1, kept, br, bc) without heads -> (R br, C bc)."""
    (R, C), (kept, br, bc) = grid, values.shape[1:]
    dense = values.new_zeros(R, br, C, bc)
    rows, columns = index[index.shape[0] - kept :], index[R + 1 : R + 1 + kept]
    dense.transpose(1, 2)[rows.long(), columns.long()] = values[0]
    return dense.view(R * br, C * bc)


def dense_dds(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: tuple[int, int], transpose: bool) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        weight = dense_weight(values, index, grid)
        return torch.nn.functional.linear(x, weight if transpose else weight.mT, bias).contiguous()


def break_even(dtype: torch.dtype, block: tuple[int, int], tokens: int) -> float:
    """The density from which the dense product is faster, for this class of token counts; NEVER where it is not even at 1."""
    lib = cpu.library()
    assert lib is not None
    key = f"{str(dtype).removeprefix('torch.')} {block[0]}x{block[1]} tokens {tokens} threads {torch.get_num_threads()}"
    if key in measured:
        return measured[key]
    path = Path(lib._name).with_suffix(f".torch-{torch.__version__}.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        known[key] = round(_measure(dtype, block, tokens), 3)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    measured.update(known)
    return measured[key]


def _measure(dtype: torch.dtype, block: tuple[int, int], tokens: int) -> float:
    x = torch.linspace(-1, 1, tokens * SIZE).view(1, 1, tokens, SIZE).to(dtype)  # no random numbers: the caller's generators stay as they are
    R, C = SIZE // block[0], SIZE // block[1]
    checker = (torch.arange(R)[:, None] + torch.arange(C)) % 2 == 0
    candidates = {}
    for density, mask in ((1.0, torch.ones(R, C, dtype=torch.bool)), (0.5, checker)):
        layout = Layout.from_mask(mask, block)
        values = torch.linspace(-1, 1, layout.kept * block[0] * block[1]).view(1, *layout.values_shape).to(dtype)
        candidates["sparse", density] = lambda v=values, i=layout.index: cpu.dds(x, v, i, None, (R, C), SIZE, True)
        candidates["dense", density] = lambda v=values, i=layout.index: dense_dds(x, v, i, None, (R, C), True)
    times: dict = {name: [] for name in candidates}
    for round_ in range(6):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if round_:  # the first warms up
                times[name].append(time.perf_counter() - start)
    gap = {density: median(s / d for s, d in zip(times["sparse", density], times["dense", density], strict=True)) - 1 for density in (0.5, 1.0)}
    if gap[1.0] <= 0.05:  # within the noise
        return NEVER
    if gap[0.5] >= 0:
        return max(LEAST, 0.5 - 0.5 * gap[0.5] / max(gap[1.0] - gap[0.5], gap[0.5]))
    return 1.0 - 0.5 * gap[1.0] / (gap[1.0] - gap[0.5])


def dense_is_faster(x: Tensor, values: Tensor, index: Tensor, rows: int, columns: int) -> bool:
    """For one set of values without heads and of whole blocks; other products are always sparse."""
    G, H, M, _K = x.shape
    sets, kept, br, bc = values.shape
    if H != 1 or sets != 1 or rows % br or columns % bc or kept * br * bc < LEAST * rows * columns or not _class(G * M):
        return False
    return kept * br * bc >= break_even(x.dtype, (br, bc), _class(G * M)) * rows * columns


def choice(layout: Layout, tokens: int, dtype: torch.dtype = torch.float32) -> str:
    """Which kernel `dds` and `dsd` take for this many tokens on this machine, in words; a measurement may run."""
    if layout.device.type != "cpu" or cpu.library() is None:
        return "pytorch: batched products of gathered blocks"
    x = torch.empty(1, layout.heads or 1, tokens, layout.shape[0], dtype=dtype, device="meta")
    values = torch.empty(1, *layout.values_shape, dtype=dtype, device="meta")
    if layout.heads is not None or layout.density < LEAST or not _class(tokens) or layout.shape[0] % layout.block[0] or layout.shape[1] % layout.block[1]:
        return f"sparse: density {layout.density:.3f}, {tokens} tokens"
    limit = break_even(dtype, layout.block, _class(tokens))
    where = "the dense product is never faster here" if limit == NEVER else f"the dense product is faster from {limit:.3f}"
    return f"{'dense' if dense_is_faster(x, values, layout.index, *layout.shape) else 'sparse'}: density {layout.density:.3f}, {where}"
