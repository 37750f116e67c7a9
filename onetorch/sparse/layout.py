"""Which blocks of a matrix are kept: an immutable set, with the index and the transposed index that every product needs.

mask = torch.rand(64, 64) < 0.1
layout = Layout.from_mask(mask, block=32)          # a 2048 x 2048 matrix in blocks of 32 x 32
values = torch.randn(layout.kept, 32, 32)          # the kept blocks, in row-major order of the blocks
layout.to_dense(values)                            # (2048, 2048), zeros where no block is kept
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BLOCKS = (8, 16, 32, 64, 128)
STORED = {torch.uint8: "U8", torch.int64: "I64"}  # safetensors' names of what a layout is saved as


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(type(n) is int for n in pair):
        raise ValueError(f"{name}: expected an int or a pair of ints, got {value!r}")
    return pair[0], pair[1]


def _ends_in(name: str, tensor: Tensor, sizes: tuple[int, ...], device: torch.device) -> None:
    expected = f"{name}: expected (..., {', '.join(map(str, sizes))})"
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{expected}, got {type(tensor).__name__}")
    if tuple(tensor.shape[-len(sizes) :]) != sizes:
        raise ValueError(f"{expected}, got {tuple(tensor.shape)}")
    if tensor.device != device or tensor.layout != torch.strided:
        raise ValueError(f"{expected}, strided, on {device}, where the layout is, got {tensor.layout} on {tensor.device}")


def _with_values(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided tensor that has values, got {tensor.layout} on {tensor.device}")


@dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """The kept blocks of a (rows, columns) matrix, or of one such matrix per head.

    Build one with `from_mask`, `from_indices` or a function of `onetorch.sparse.patterns`.

    mask    (R, C) or (heads, R, C) bool: which blocks are kept
    block   (br, bc) elements of a block, each one of 8, 16, 32, 64, 128
    shape   (rows, columns) elements of the matrix; R = ceil(rows / br), C = ceil(columns / bc): the last blocks may reach over the edge, and what they
            hold there does not exist
    kept    number of kept blocks, over all heads; values of the layout are (kept, br, bc), sorted by head, row, column
    rows, columns   (kept,) int32: block row and block column of each kept block, counted through all heads (head * R + row, head * C + column)
    index   int32, what the kernels read: row offsets (H R + 1) | columns (kept) | column offsets (H C + 1) | the transposed index: rows (kept) | and
            where their values stand (kept) | rows (kept)
    """

    mask: Tensor
    block: tuple[int, int]
    shape: tuple[int, int]
    kept: int
    rows: Tensor
    columns: Tensor
    index: Tensor

    @staticmethod
    def from_mask(mask: Tensor, block: int | tuple[int, int], shape: int | tuple[int, int] | None = None) -> "Layout":
        """The layout that keeps the blocks where `mask`, bool (R, C) or (heads, R, C), is true. `shape` is the matrix in elements; left out: R and C
        whole blocks.

        ValueError for a mask of another rank or dtype, an unknown block size, or a shape that is not covered by exactly these blocks.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise ValueError(f"mask: expected a bool tensor, got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}")
        _with_values("mask", mask)
        if mask.ndim not in (2, 3) or 0 in mask.shape:
            raise ValueError(f"mask: expected (rows, columns) or (heads, rows, columns) of blocks, none of them 0, got shape {tuple(mask.shape)}")
        br, bc = _pair("block", block)
        if br not in BLOCKS or bc not in BLOCKS:
            raise ValueError(f"block: expected sizes among {BLOCKS}, got {(br, bc)}")
        R, C = mask.shape[-2:]
        rows, columns = _pair("shape", shape) if shape is not None else (R * br, C * bc)
        if -(-rows // br) != R or -(-columns // bc) != C:
            raise ValueError(
                f"shape: {R} x {C} blocks of {br} x {bc} cover ({(R - 1) * br + 1}..{R * br}, {(C - 1) * bc + 1}..{C * bc}) elements, got {(rows, columns)}"
            )
        H = mask.numel() // (R * C)
        if H * max(R, C) >= 2**31 or mask.numel() >= 2**31:
            raise ValueError(f"mask: {H} heads of {R} x {C} blocks are more than the 32-bit index can count")
        return Layout._of(mask, (br, bc), (rows, columns), None)

    @staticmethod
    @torch.inference_mode(False)  # tensors that are made in inference mode could never take part in training
    def _of(mask: Tensor, block: tuple[int, int], shape: tuple[int, int], kept: int | None) -> "Layout":
        """The layout of a mask that is checked. With `kept`, the number of its blocks, nothing here waits for the device."""
        mask = mask.detach().contiguous().clone()
        R, C = mask.shape[-2:]
        heads = mask.reshape(-1, R, C)

        def where(flat: Tensor) -> Tensor:
            return (flat.nonzero() if kept is None else torch.nonzero_static(flat, size=kept)).view(-1)

        at = where(heads.view(-1))
        block_rows, block_columns = at // C, at // (R * C) * C + at % C
        transposed = where(heads.mT.reshape(-1))
        t_rows, t_columns = transposed // (R * C) * R + transposed % R, transposed // R
        position = heads.view(-1).cumsum(0) - 1
        order = position[t_rows * C + t_columns % C]

        def offsets(count: Tensor) -> Tensor:
            return torch.nn.functional.pad(count.reshape(-1).cumsum(0), (1, 0))

        index = torch.cat([offsets(heads.sum(2)), block_columns, offsets(heads.sum(1)), t_rows, order, block_rows]).to(torch.int32)
        return Layout(mask, block, shape, at.shape[0], block_rows.to(torch.int32), block_columns.to(torch.int32), index)

    def with_mask(self, mask: Tensor, kept: int) -> "Layout":
        """The same grid with another mask, bool like this one's, of which the caller knows that exactly `kept` entries are true: nothing is checked but
        the shape, and nothing waits for the device.
        """
        if not isinstance(mask, Tensor) or mask.shape != self.mask.shape or mask.dtype != torch.bool or mask.device != self.device:
            got = f"{tuple(mask.shape)} {mask.dtype} on {mask.device}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask: expected {tuple(self.mask.shape)} bool on {self.device}, got {got}")
        return Layout._of(mask, self.block, self.shape, kept)

    @staticmethod
    def from_indices(
        rows: Tensor,
        columns: Tensor,
        grid: tuple[int, ...],
        block: int | tuple[int, int],
        shape: int | tuple[int, int] | None = None,
        heads: Tensor | None = None,
    ) -> "Layout":
        """The layout that keeps blocks (rows[i], columns[i]), or (heads[i], rows[i], columns[i]), of a `grid` of (R, C) or (heads, R, C) blocks; their
        order does not matter.

        ValueError names the index that is out of range or stands twice.
        """
        if not isinstance(grid, (tuple, list)) or not all(type(n) is int and n > 0 for n in grid):
            raise ValueError(f"grid: expected positive ints, got {grid!r}")
        if len(grid) not in (2, 3) or (len(grid) == 3) != (heads is not None):
            raise ValueError(
                f"grid: expected (R, C), or (heads, R, C) together with `heads`, got {grid} and heads {'given' if heads is not None else 'left out'}"
            )
        named = {"rows": (rows, grid[-2]), "columns": (columns, grid[-1])} | ({"heads": (heads, grid[0])} if heads is not None else {})
        for name, (index, size) in named.items():
            if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
                got = f"{tuple(index.shape)} {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
                raise ValueError(f"{name}: expected a 1-D tensor of int32 or int64, got {got}")
            _with_values(name, index)
            if index.shape != rows.shape or index.device != rows.device:
                raise ValueError(f"{name}: expected {tuple(rows.shape)} on {rows.device} as rows has, got {tuple(index.shape)} on {index.device}")
            wrong = (index < 0) | (index >= size)
            if wrong.any():
                at = int(wrong.nonzero()[0])
                raise ValueError(f"{name}: expected indices in 0..{size - 1}, got {int(index[at])} at position {at}")
        flat = rows.long() * grid[-1] + columns.long()
        if heads is not None:
            flat = flat + heads.long() * (grid[-2] * grid[-1])
        total = math.prod(grid)
        if total >= 2**31:
            raise ValueError(f"grid: {grid} blocks are more than the 32-bit index can count")
        seen = torch.bincount(flat, minlength=total)
        if (seen > 1).any():
            twice = int((seen > 1).nonzero()[0])
            raise ValueError(f"rows, columns: block {(twice // grid[-1] % grid[-2], twice % grid[-1])} stands {int(seen[twice])} times, expected once")
        return Layout.from_mask((seen > 0).view(grid), block, shape)

    @property
    def heads(self) -> int | None:
        return self.mask.shape[0] if self.mask.ndim == 3 else None

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C): blocks of one head."""
        return self.mask.shape[-2], self.mask.shape[-1]

    @property
    def density(self) -> float:
        """Kept blocks over all blocks."""
        return self.kept / self.mask.numel()

    @property
    def device(self) -> torch.device:
        return self.mask.device

    @property
    def values_shape(self) -> tuple[int, int, int]:
        return self.kept, *self.block

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self is other or (
            self.block == other.block
            and self.shape == other.shape
            and self.mask.shape == other.mask.shape
            and self.device == other.device
            and torch.equal(self.mask, other.mask)
        )

    def __hash__(self) -> int:
        return hash((self.block, self.shape, tuple(self.mask.shape), tuple(self.mask.view(-1).nonzero().view(-1).tolist())))

    def __repr__(self) -> str:
        R, C = self.grid
        heads = f"{self.heads} heads of " if self.heads else ""
        blocks = f"{R} x {C} blocks of {self.block[0]} x {self.block[1]}"
        return f"Layout({heads}{self.shape[0]} x {self.shape[1]}, {blocks}, {self.kept} kept, density {self.density:.4f}, {self.device})"

    def picture(self, width: int = 64) -> str:
        """The kept blocks as text, one character per block, or per square of blocks where there are more than `width` columns; darker is denser. Heads
        stand below each other.
        """
        if type(width) is not int or width < 1:
            raise ValueError(f"width: expected an int, at least 1 character, got {width!r}")
        R, C = self.grid
        step = -(-C // width)
        parts = []
        for mask in self.mask.view(-1, R, C).float().cpu():
            share = torch.nn.functional.avg_pool2d(mask[None, None], step, ceil_mode=True, count_include_pad=False)[0, 0]
            parts.append("\n".join("".join("·░▒▓█"[min(4, 1 + int(s * 3.999)) if s > 0 else 0] for s in line) for line in share.tolist()))
        return "\n\n".join(parts)

    def to(self, device: torch.device | str) -> "Layout":
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device: expected a torch.device or its name, got {device!r}") from error
        if device == self.device:
            return self
        if self.device.type == "meta":
            raise ValueError(f"device: expected meta, where this layout is and has no blocks to move, got {device}")
        return Layout(self.mask.to(device), self.block, self.shape, self.kept, self.rows.to(device), self.columns.to(device), self.index.to(device))

    def _same(self, other: "Layout") -> None:
        if not isinstance(other, Layout):
            raise ValueError(f"other: expected a Layout, got {type(other).__name__}")
        for name in ("block", "shape", "heads", "device"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other: expected {name} {getattr(self, name)}, got {getattr(other, name)}")

    def __or__(self, other: "Layout") -> "Layout":
        """Union."""
        self._same(other)
        return Layout.from_mask(self.mask | other.mask, self.block, self.shape)

    def __and__(self, other: "Layout") -> "Layout":
        """Intersection."""
        self._same(other)
        return Layout.from_mask(self.mask & other.mask, self.block, self.shape)

    def __matmul__(self, other: "Layout") -> "Layout":
        """Where the product of a matrix of this layout with one of the other can be other than zero."""
        if not isinstance(other, Layout):
            raise ValueError(f"other: expected a Layout, got {type(other).__name__}")
        inner = self.shape[1], self.block[1], self.heads, self.device
        if inner != (other.shape[0], other.block[0], other.heads, other.device):
            raise ValueError(f"other: expected {inner[0]} rows in blocks of {inner[1]} and heads {inner[2]} on {inner[3]}, got {other!r}")
        return Layout.from_mask(self.mask.float() @ other.mask.float() > 0, (self.block[0], other.block[1]), (self.shape[0], other.shape[1]))

    def transpose(self) -> "Layout":
        """The layout of the transposed matrix (of each head). The values of a matrix move with `transpose_values`."""
        return Layout.from_mask(self.mask.mT, (self.block[1], self.block[0]), (self.shape[1], self.shape[0]))

    def transpose_values(self, values: Tensor) -> Tensor:
        """(..., kept, br, bc) of this layout -> (..., kept, bc, br) of `transpose()`."""
        _ends_in("values", values, self.values_shape, self.device)
        return values.index_select(-3, self.index[-2 * self.kept : self.index.shape[0] - self.kept]).mT

    def permute(self, rows: Tensor | None = None, columns: Tensor | None = None) -> "Layout":
        """The layout whose block row i is row rows[i] of this one, and block column j is columns[j]. Whole blocks only: ValueError where an edge block
        would move.
        """
        mask = self.mask
        for name, order, axis, size, block, length in (
            ("rows", rows, -2, self.grid[0], self.block[0], self.shape[0]),
            ("columns", columns, -1, self.grid[1], self.block[1], self.shape[1]),
        ):
            if order is None:
                continue
            if not isinstance(order, Tensor) or order.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name}: expected int64 indices, got {order.dtype if isinstance(order, Tensor) else type(order).__name__}")
            _with_values(name, order)
            if order.ndim != 1 or order.shape[0] != size or not torch.equal(order.sort().values.long(), torch.arange(size, device=order.device)):
                raise ValueError(f"{name}: expected a permutation of 0..{size - 1}, got {order.tolist() if order.numel() < 10 else tuple(order.shape)}")
            if length % block and int(order[-1]) != size - 1:
                raise ValueError(f"{name}: block {size - 1} reaches over the edge and must stay last, got block {int(order[-1])} there")
            mask = mask.index_select(axis, order.to(mask.device))
        return Layout.from_mask(mask, self.block, self.shape)

    def crop(self, rows: int, columns: int) -> "Layout":
        """The layout of the first `rows` and `columns` elements of the matrix (of each head). ValueError where it has fewer."""
        if not (type(rows) is type(columns) is int and 0 < rows <= self.shape[0] and 0 < columns <= self.shape[1]):
            raise ValueError(f"rows, columns: expected 1..{self.shape[0]} and 1..{self.shape[1]}, got {(rows, columns)}")
        return Layout.from_mask(self.mask[..., : -(-rows // self.block[0]), : -(-columns // self.block[1])], self.block, (rows, columns))

    def element_mask(self) -> Tensor:
        """(rows, columns) or (heads, rows, columns) bool: which elements the kept blocks cover."""
        grown = self.mask.repeat_interleave(self.block[0], -2).repeat_interleave(self.block[1], -1)
        return grown[..., : self.shape[0], : self.shape[1]]

    def to_dense(self, values: Tensor) -> Tensor:
        """(..., kept, br, bc) -> (..., [heads,] rows, columns), zeros outside the kept blocks. Differentiable."""
        _ends_in("values", values, self.values_shape, self.device)
        (R, C), (br, bc), H = self.grid, self.block, self.heads or 1
        lead = values.shape[:-3]
        at = self.rows.long() * C + self.columns.long() % C
        blocks = values.new_zeros(*lead, H * R * C, br, bc).index_copy(-3, at, values)
        dense = blocks.view(*lead, H, R, C, br, bc).transpose(-3, -2).reshape(*lead, H, R * br, C * bc)[..., : self.shape[0], : self.shape[1]]
        return dense if self.heads else dense.squeeze(-3)

    def from_dense(self, dense: Tensor) -> Tensor:
        """(..., [heads,] rows, columns) -> the kept blocks (..., kept, br, bc), zeros beyond the edge. Differentiable."""
        expected = (() if self.heads is None else (self.heads,)) + self.shape
        _ends_in("dense", dense, expected, self.device)
        (R, C), (br, bc), H = self.grid, self.block, self.heads or 1
        lead = dense.shape[: dense.ndim - len(expected)]
        padded = torch.nn.functional.pad(dense, (0, C * bc - self.shape[1], 0, R * br - self.shape[0]))
        blocks = padded.reshape(*lead, H, R, br, C, bc).transpose(-3, -2).reshape(*lead, H * R * C, br, bc)
        return blocks.index_select(-3, self.rows.long() * C + self.columns.long() % C)

    def state(self) -> dict[str, Tensor]:
        """The layout as tensors: mask uint8, block and shape int64, to stand beside others in a safetensors file. `from_state` is the way back."""
        return {"mask": self.mask.to(torch.uint8), "block": torch.tensor(self.block), "shape": torch.tensor(self.shape)}

    @staticmethod
    def from_state(state: dict[str, Tensor]) -> "Layout":
        if not isinstance(state, dict) or set(state) != {"mask", "block", "shape"}:
            raise ValueError(f"state: expected mask, block and shape, got {sorted(state) if isinstance(state, dict) else type(state).__name__}")
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or (name != "mask" and (tensor.shape != (2,) or tensor.dtype != torch.int64)):
                got = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"state: expected {name} as a tensor{'' if name == 'mask' else ', (2,) int64'}, got {got}")
        block, shape = state["block"].tolist(), state["shape"].tolist()
        return Layout.from_mask(state["mask"] != 0, tuple(block), tuple(shape))

    def save(self, path: str | os.PathLike) -> None:
        """Write `state()` as a safetensors file."""
        header, data = {}, b""
        for name, tensor in sorted(self.state().items()):
            raw = bytes(tensor.cpu().contiguous().view(torch.uint8).view(-1).tolist())
            header[name] = {"dtype": STORED[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)

    @staticmethod
    def load(path: str | os.PathLike) -> "Layout":
        """The layout of a file that `save` wrote, on the CPU. ValueError names the file where it is not one."""
        raw = Path(path).read_bytes()
        try:
            size = int.from_bytes(raw[:8], "little")
            header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
            kinds = {name: dtype for dtype, name in STORED.items()}
            state = {}
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                if not 0 <= begin < end <= len(data):
                    raise ValueError(f"{name} ends after the file")
                state[name] = torch.frombuffer(bytearray(data[begin:end]), dtype=kinds[entry["dtype"]]).reshape(entry["shape"])
            return Layout.from_state(state)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path}: expected a layout in safetensors format, as Layout.save writes it: {error}") from error
