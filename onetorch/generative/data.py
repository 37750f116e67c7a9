"""Text as bytes, a file or a folder of files, or shards of tokens made elsewhere; the three splits, and the batches and windows cut from them.

A text is a read-only uint8 array. Its last tenth is the validation split, the tenth before it the tuning split, the rest is for training; a run that is to be
reported trains on all but the validation split. Choose hyperparameters on the tuning split and look at the validation split once, at the end.

Images are rows of tokens, (N, D + 1): a token that begins each, one above the levels of a pixel, and the D pixels, row by row, channel by channel. A window is
an image.

Shards are files of token numbers, mapped and not read into memory: `.bin` as nanoGPT's preparations write it (uint16, nothing else; or after the header of
1,024 bytes that llm.c puts before it) and `.npy` of uint16 or uint32. Files whose name holds "val" are the validation split, where there are any.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onetorch.generative.images import Images
from onetorch.generative.stream import Stream
from onetorch.runs.errors import UsageError

Text = NDArray[np.uint8]

LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")  # of the standard library: not part of it, or not like the rest
FRACTION = 10  # validation and tuning split are one part in so many of the whole each


HEADER, HEADER_MAGIC = 1024, 20240520  # bytes of llm.c's header, and the int32 that it begins with


class Shards:
    """Arrays of whole numbers one after another, indexed as one: by a slice without step (again Shards) or by an array of places (an int64 array).

    `held_out` is how many at the end are the validation split by the names of their files.
    """

    def __init__(self, arrays: list[NDArray[np.unsignedinteger]], held_out: int = 0) -> None:
        self.arrays, self.held_out = arrays, held_out
        self._ends = np.cumsum([a.size for a in arrays], dtype=np.int64)
        self.size = int(self._ends[-1]) if arrays else 0

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            begin, end, _ = at.indices(self.size)
            starts = self._ends - [a.size for a in self.arrays]
            cut = [a[max(begin - s, 0) : max(end - s, 0)] for a, s in zip(self.arrays, starts.tolist(), strict=True)]
            return Shards([a for a in cut if a.size])
        found = np.empty(at.shape, np.int64)
        shard = np.searchsorted(self._ends, at, "right")
        for i in np.unique(shard):
            here = shard == i
            found[here] = self.arrays[i][at[here] - (self._ends[i] - self.arrays[i].size)]
        return found

    def largest(self) -> int:
        """The largest number of all."""
        return max(int(a.max()) for a in self.arrays)


Tokens = NDArray[np.unsignedinteger] | Shards  # a text is one of these: its tokens are its bytes


class Splits(NamedTuple):
    """The parts of a text that a model is trained on, chosen by, and reported on; in this order in the text."""

    train: Any
    tuning: Any
    validation: Any


def read(path: Path | None) -> Text:
    """All bytes of a text file, or of the text files under a folder joined in the order of their paths; None is the source of Python's standard library.

    A file is mapped and not read into memory. Of an `.npy` of uint8 these are the numbers in their order: images (N, H, W) as a sequence of pixels, row by
    row, a window beginning anywhere. In a folder, hidden files and folders and files that hold a zero byte (they are no text) are left out.
    Raises UsageError naming the path when it is missing, cannot be read or holds no text.
    """
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in _files(library, LEFT_OUT) if p.suffix == ".py"]
        return _join(files, library, "no Python source stands there; name a text with --data")
    try:
        if path.is_dir():
            return _join(_files(path), path, "no text stands in this folder")
        if not path.exists():
            raise UsageError(f"data {path}: there is no such file or folder")
        if not path.stat().st_size:
            raise UsageError(f"data {path}: the file is empty")
        if path.suffix == ".npy":
            return _array(path)
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise UsageError(f"data {path} cannot be read: {error.strerror}") from error


def shards(path: Path | None) -> Shards | None:
    """The token shards that a `.bin` or `.npy` file or a folder of them is, or None where the path is something else: a text, pictures, or not there.

    In a folder the shards stand side by side, in the order of their names; other files are passed over where one shard has "train" in its name, as in
    nanoGPT's folders, and else a folder that holds any is none of shards. Raises UsageError naming a file that cannot be read or holds no tokens.
    """
    if path is None or not path.exists():
        return None
    files = [path]
    if path.is_dir():
        seen = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        files = [p for p in seen if p.suffix in (".bin", ".npy")]
        if len(files) < len(seen) and not any("train" in p.stem for p in files):
            return None
    arrays = [_shard(p) for p in files]
    found = [a for a in arrays if a is not None]
    if not found:
        return None
    for file, array in zip(files, arrays, strict=True):
        if array is None:
            raise UsageError(f"data {file}: expected a row of uint16 or uint32 as in the shards beside it")
    training = [a for a, p in zip(found, files, strict=True) if "val" not in p.stem]
    held_out = [a for a, p in zip(found, files, strict=True) if "val" in p.stem]
    return Shards(training + held_out, sum(a.size for a in held_out) if training else 0)


def _shard(path: Path) -> NDArray[np.unsignedinteger] | None:
    """A file's tokens; None where it is an array of something else, or no shard by its name."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return array if array.dtype in (np.uint16, np.uint32) and array.ndim == 1 and array.size else None
        if path.suffix != ".bin":
            return None
        size, begin = path.stat().st_size, 0
        with open(path, "rb") as file:
            magic, count = (int.from_bytes(file.read(n)[-4:], "little") for n in (4, 8))
        if magic == HEADER_MAGIC:
            begin = HEADER
            if size != HEADER + 2 * count:
                raise UsageError(f"data {path}: its header says {count:,} tokens of 2 bytes, {size - HEADER:,} bytes follow it; the file is not whole")
        if size % 2 or size <= begin:
            raise UsageError(f"data {path}: expected tokens of 2 bytes each (uint16), got {size:,} bytes; a text goes by another ending than .bin")
        return np.memmap(path, "<u2", "r", begin)
    except OSError as error:
        raise UsageError(f"data {path} cannot be read: {error.strerror}") from error
    except (ValueError, EOFError) as error:
        raise UsageError(f"data {path} cannot be read: {' '.join(str(error).split())}") from error


def _array(path: Path) -> Text:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"data {path} cannot be read: {' '.join(str(error).split())}") from error
    if array.dtype != np.uint8:
        raise UsageError(f"data {path}: expected an array of uint8, got {array.dtype}")
    return np.asarray(array).reshape(-1)


def _files(folder: Path, left_out: tuple[str, ...] = ()) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UsageError(f"data {error.filename} cannot be read: {error.strerror}") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if f not in left_out and not f.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    # By parts, so that the order is the same on every system and does not depend on the separator.
    return sorted((p for p in found if p.is_file()), key=lambda p: p.relative_to(folder).parts)


def _join(files: list[Path], folder: Path, otherwise: str) -> Text:
    parts = []
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UsageError(f"data {file} cannot be read: {error.strerror}") from error
        if b"\0" not in content:
            parts.append(content)
    joined = b"".join(parts)
    if not joined:
        raise UsageError(f"data {folder}: {otherwise}")
    return np.frombuffer(joined, dtype=np.uint8)


def pixels(images: Images) -> NDArray[np.uint16]:
    """Images as rows of tokens (N, D + 1)."""
    flat = images.pixels.reshape(len(images), -1)
    return np.concatenate([np.full((len(flat), 1), images.levels, np.uint16), flat], 1, dtype=np.uint16)


def digest(text: Tokens) -> str:
    """The first 16 hexadecimal digits of the text's sha-256, by which a resumed run knows its data."""
    whole = hashlib.sha256()
    for array in text.arrays if isinstance(text, Shards) else [text]:
        whole.update(array.data)
    return whole.hexdigest()[:16]


def split(text: Any, context: int, name: Path | str | None = None) -> Splits:
    """Cut a text into train (first 8/10), tuning (next 1/10) and validation (last 1/10), views all three; shards that name a validation split into that,
    and the rest into train (first 9/10) and tuning.

    Raises UsageError when a part does not hold two windows (of `context` tokens and the one that follows).
    """
    if not isinstance(text, Shards) and (text.dtype != np.uint8 or text.ndim != 1):
        raise ValueError(f"split: expected a one-dimensional uint8 array, got {text.dtype} of shape {text.shape}")
    if isinstance(text, Shards) and text.held_out:
        last = text.size - text.held_out
        before = last * (FRACTION - 1) // FRACTION
    else:
        last, before = (text.size * (FRACTION - k) // FRACTION for k in (1, 2))
    parts = Splits(text[:before], text[before:last], text[last:])
    if min(p.size for p in parts) < 2 * context + 1:
        unit = "tokens" if isinstance(text, Shards) else "bytes"
        raise UsageError(
            f"data {name or ''}: too short, {text.size:,} {unit}; a tenth of the text must hold two windows of context = {context} {unit}, "
            f"for which {FRACTION * (2 * context + 1):,} {unit} are enough; give more text or a smaller --context"
        )
    return parts


def parts(text: Any, context: int, held_out: Literal["validation", "tuning"], name: Path | str | None = None) -> tuple[Any, Any]:
    """(what to train on, what to evaluate on): all but the last tenth and the last tenth, or, for tuning, the first 8/10 and the tenth after them."""
    cut = split(text, context, name)
    if held_out == "tuning":
        return cut.train, cut.tuning
    return text[: cut.train.size + cut.tuning.size], cut.validation


def batch(text: Tokens | Stream, size: int, context: int, generator: torch.Generator) -> Tensor:
    """`size` windows of `context` + 1 tokens at random places, as an int64 tensor (size, context + 1); draws from `generator` alone."""
    if isinstance(text, Stream):
        return text.batch(size, context, generator)
    if isinstance(text, np.ndarray) and text.ndim == 2:
        chosen = torch.randint(len(text), (size,), generator=generator).numpy()
        return torch.from_numpy(text[chosen, : context + 1].astype(np.int64))
    starts = torch.randint(text.size - context, (size, 1), generator=generator).numpy()  # (B, 1)
    return torch.from_numpy(text[starts + np.arange(context + 1)].astype(np.int64))  # (B, T + 1)


def windows(text: Tokens, context: int, rows: int = 64, count: int | None = None) -> Iterator[Tensor]:
    """The text in windows that do not overlap, in batches of at most `rows`, as int64 tensors (rows, T + 1).

    Window w holds tokens wT to wT + T, both ends included, so that every token but the text's first is the target of one prediction, once. The last window
    is shorter where the length asks for it. With `count`, only so many whole windows are taken, evenly spread over the text. Of images each is a window.
    """
    if isinstance(text, np.ndarray) and text.ndim == 2:
        index = np.arange(len(text)) if count is None or count >= len(text) else np.linspace(0, len(text) - 1, count).round().astype(np.int64)
        yield from (torch.from_numpy(text[index[i : i + rows]].astype(np.int64)) for i in range(0, len(index), rows))
        return
    whole, rest = divmod(text.size - 1, context)
    chosen = np.arange(whole) if count is None or count >= whole else np.linspace(0, whole - 1, count).round().astype(np.int64)
    for i in range(0, len(chosen), rows):
        starts = chosen[i : i + rows, None] * context
        yield torch.from_numpy(text[starts + np.arange(context + 1)].astype(np.int64))
    if rest and len(chosen) == whole:
        yield torch.from_numpy(text[np.arange(whole * context, text.size)].astype(np.int64))[None]


def block_standard_error(values: NDArray[np.float64], weights: NDArray[np.float64], blocks: int = 40) -> float:
    """Standard error of the weighted mean of a series whose neighbours are alike, by the method of batch means.

    The series is cut into `blocks` runs of neighbours (fewer when it is short); for block means m_b with weights w_b summing to one and mean m the estimate
    is sqrt(B / (B - 1) * sum_b w_b^2 (m_b - m)^2). NaN for fewer than two values.

    >>> round(block_standard_error(np.array([1.0, 3.0]), np.ones(2)), 6)
    1.0
    """
    count = min(blocks, values.size)
    if count < 2:
        return float("nan")
    edges = np.arange(count) * values.size // count
    w = np.add.reduceat(weights, edges)
    means = np.add.reduceat(values * weights, edges) / w
    w = w / w.sum()
    return float(np.sqrt(count / (count - 1) * np.sum(w**2 * (means - w @ means) ** 2)))
