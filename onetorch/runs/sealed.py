"""Files whose bytes are checked before they are believed: read, hash and write whole files; tensors as safetensors, without a second copy in memory.

A safetensors file is eight bytes (the length n of the header, little-endian), n bytes of JSON, and the tensors' memory. A reader here MUST have compared size
and SHA-256 with a manifest before it parses, MUST refuse a header that does not account for every byte exactly once, and MUST allocate nothing that the
file's own size does not bound. https://github.com/huggingface/safetensors#format
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from onetorch.runs.errors import CheckpointError, RunError
from onetorch.runs.folder import explain

CHUNK = 1 << 20  # bytes
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FLUSHERS = ThreadPoolExecutor(5, thread_name_prefix="flush")  # as many as a checkpoint has to flush; it starts its threads when asked
NAMES = {name: dtype for dtype, name in DTYPES.items()}

Piece = bytes | memoryview


# -- bytes -----------------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file for reading, and its size. CheckpointError for anything else: a link could point anywhere, a pipe never ends."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is no regular file")
            yield file, status.st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except MemoryError as error:
        raise CheckpointError(f"{path} does not fit into memory") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{path} is a symbolic link; only the files themselves are read") from error
        raise CheckpointError(explain(error, path)) from error


def absorb(stream: Any, size: int, *sinks: Callable[[memoryview], Any]) -> memoryview:
    """Exactly `size` bytes of `stream` (fewer where it ends), each chunk handed to every sink while it is still in the processor's cache.

    The memory is reserved and not touched before the bytes are there.
    """
    view, done = np.empty(size, np.uint8).data, 0
    while done < size:
        count = stream.readinto(view[done : done + CHUNK])
        if not count:
            break
        for sink in sinks:
            sink(view[done : done + count])
        done += count
    return view[:done]


def read(path: Path, size: int | None = None, limit: int | None = None) -> tuple[memoryview, str]:
    """The bytes of a regular file and their SHA-256. CheckpointError if it has not `size` bytes, or more than `limit`; both are compared before it is read."""
    with opened(path) as (file, found):
        if size is not None and found != size:
            raise CheckpointError(f"{path} is damaged: {found} bytes where the manifest says {size}")
        if limit is not None and found > limit:
            raise CheckpointError(f"{path} is damaged: {found} bytes where at most {limit} are expected")
        digest = hashlib.sha256()
        content = absorb(file, found, digest.update)
    if len(content) != found:
        raise CheckpointError(f"{path} became shorter while it was read")
    return content, digest.hexdigest()


def sha256(pieces: list[Piece]) -> str:
    """Of the pieces one after the other."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def length(pieces: list[Piece]) -> int:
    """In bytes."""
    return sum(memoryview(piece).nbytes for piece in pieces)


def write(path: Path, pieces: list[Piece]) -> None:
    """Write a new file; `flush` makes the disk keep it."""
    with open(path, "xb") as file:
        for piece in pieces:
            file.write(piece)


def flush(path: Path) -> Future[None]:
    """Have the disk keep a file's content, or a folder's names, beside whatever else is to be done; the result comes when it does."""
    return FLUSHERS.submit(_sync, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(content: Piece, what: object) -> dict[str, Any]:
    """A JSON object in which no key stands twice. CheckpointError names `what` it was read from."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        data = json.loads(bytes(content).decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is damaged: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{what} is damaged: expected a JSON object")
    return data


# -- tensors ---------------------------------------------------------------------------------------------------------------------------------------


def dump(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    """The pieces of a safetensors file: the header, then every tensor's own memory, so that saving makes no second copy of what is on the CPU."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[Piece] = []
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):  # widest first, so that every tensor is aligned
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise RunError(f"state {name}: a tensor of {tensor.dtype}, {tensor.layout} cannot be saved; use a dense one of {', '.join(NAMES)}")
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
        if tensor.nbytes:
            pieces.append(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def parse(content: memoryview, what: object, header_limit: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, which share `content`'s memory. CheckpointError names `what` and what is wrong.

    `header_limit`: most bytes of JSON that are parsed, which take some ten times as much memory.
    """

    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"{what} is no safetensors file: {why}")

    size = int.from_bytes(content[:8], "little")
    data = len(content) - 8 - size  # bytes of all tensors
    if len(content) < 8 or data < 0:
        raise bad(f"it claims a header of {size} bytes and has {len(content)} in all")
    if header_limit is not None and size > header_limit:
        raise bad(f"a header of {size} bytes; at most {header_limit} are read")
    header = parse_json(content[8 : 8 + size], f"{what} (header)")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise bad("__metadata__ is no table of texts")
    places: list[tuple[int, int]] = []
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(start), int(end)]} if len(entry) == 3 and kind in NAMES:
                pass
            case _:
                raise bad(f"{name!r} needs dtype (one of {', '.join(NAMES)}), shape and data_offsets")
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in shape) or type(start) is not int or type(end) is not int:
            raise bad(f"{name!r}: sizes are whole numbers")
        dtype = NAMES[kind]
        # Python's integers do not overflow: a shape that claims more than there is is found here, before anything is made of it.
        if not 0 <= start <= end <= data or end - start != math.prod(shape) * dtype.itemsize:
            raise bad(f"{name!r}: shape {shape} of {kind} does not fill bytes {start} to {end} of {data}")
        places.append((start, end))
        if end == start:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            flat = torch.frombuffer(content, dtype=torch.uint8, count=end - start, offset=8 + size + start)
            flat = flat if (8 + size + start) % dtype.itemsize == 0 else flat.clone()  # only other writers leave a tensor unaligned
            tensors[name] = flat.view(dtype).view(shape)
    end = 0
    for place in sorted(places):
        if place[0] != end:
            raise bad(f"its tensors overlap or leave a gap at byte {end}")
        end = place[1]
    if end != data:
        raise bad(f"its tensors fill {end} of {data} bytes")
    return tensors
