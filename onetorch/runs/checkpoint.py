"""Checkpoints that are whole or not there: written aside, flushed to disk, renamed; believed only when every hash agrees.

    checkpoints/00001200/
      model.safetensors   the weights, readable by anyone        state.safetensors   every other tensor of the state
      state.json          the rest of the state                  manifest.json       step, and size and SHA-256 of each file

Rules. A checkpoint MUST hold these names as regular files; the manifest MUST name the other three and no more; sizes MUST be compared before a file is
read, and the bytes that were hashed MUST be the bytes that are parsed. The folder's name MUST be the manifest's step. "The latest" is the highest step
whose manifest verifies; it is computed, never stored. A reader MUST NOT use pickle and MUST raise CheckpointError, and nothing else, for whatever it finds.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from onetorch.runs.errors import CheckpointError, RunError
from onetorch.runs.folder import FORMAT, explain

MODEL, STATE, RECORD, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
FILES = (MODEL, STATE, RECORD)
BESIDE_BYTES = 4 << 20  # a state larger than this is flushed while it is hashed
MANIFEST_LIMIT = 65_536  # bytes; a manifest of ours has about 400


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    folder: Path
    step: int
    model: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    record: dict[str, Any]


def folder_name(step: int) -> str:
    """The name under which a checkpoint of `step` stands; the digits make names sort as numbers do."""
    return f"{step:08d}"


def save(parent: Path, step: int, model: dict[str, torch.Tensor], state: dict[str, torch.Tensor], record: dict[str, Any]) -> Path:
    """Write a checkpoint atomically into `parent`. RunError if the disk does not take it: what was there before stands."""
    contents = {MODEL: _safetensors(model), STATE: _safetensors(state), RECORD: [json.dumps(record, allow_nan=False).encode()]}
    target = parent / folder_name(step)
    temporary = parent / f".new-{target.name}-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        with ThreadPoolExecutor(1) as beside:
            # Flushing is waiting for the disk and hashing is work for a core; both release the GIL, so one goes on beside the other. A small state is
            # hashed sooner than a thread starts; of many small flushes in a row the first does the work.
            large = sum(t.nbytes for tensors in (model, state) for t in tensors.values()) > BESIDE_BYTES
            flushes = []
            for name, pieces in contents.items():
                _write(temporary / name, pieces)
                if large:
                    flushes.append(beside.submit(_sync, temporary / name))
            manifest = {"format": FORMAT, "step": step, "files": {name: _entry(pieces) for name, pieces in contents.items()}}
            for flush in flushes:
                flush.result()
        for name in () if large else FILES:
            _sync(temporary / name)
        _write(temporary / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        _sync(temporary / MANIFEST)
        _sync(temporary)
        for later in steps(parent):
            if later >= step:
                # Only damaged ones can stand here: resuming goes on from the newest that verifies. They are kept for whoever wants to look, under a
                # name that does not count, lest good ones be retired in their stead.
                os.rename(parent / folder_name(later), parent / f".damaged-{folder_name(later)}-{secrets.token_hex(3)}")
        os.rename(temporary, target)
        _sync(parent)
        _sync(parent.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"no checkpoint at step {step}: {explain(error, target)}; earlier ones stand, `onetorch resume` goes on from the last") from error
    return target


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


def _safetensors(tensors: dict[str, torch.Tensor]) -> list[Any]:
    """The pieces (buffers) of a safetensors file: its header and then every tensor's own memory, never copied, so that a save costs no second state in memory.

    The format is the header's length in eight bytes, the header (JSON, padded with spaces to a multiple of eight), the tensors in the order of their offsets.
    """
    header: dict[str, Any] = {}
    pieces: list[Any] = []
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):  # widest first: every tensor is aligned
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise RunError(f"state {name}: a tensor of {tensor.dtype}, {tensor.layout} cannot be saved; use a dense one of {', '.join(DTYPES.values())}")
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        if tensor.nbytes:
            pieces.append(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy())
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def _entry(pieces: list[Any]) -> dict[str, Any]:
    """What the manifest says of a file: hashed as handed to the system, not as read back."""
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write(path: Path, pieces: list[Any]) -> None:
    with open(path, "xb") as file:
        for piece in pieces:
            file.write(piece)


def _sync(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def retire(parent: Path, keep: int = 2) -> None:
    """Remove all but the newest `keep` and what killed saves left. A folder is renamed before it is emptied, so that none is ever seen half there."""
    with contextlib.suppress(OSError):  # what stays is removed after the next save
        for old in steps(parent)[keep:]:
            os.rename(parent / folder_name(old), parent / f".old-{folder_name(old)}-{secrets.token_hex(3)}")
        for path in parent.iterdir():
            if path.name.startswith((".old-", ".new-")):
                shutil.rmtree(path, ignore_errors=True)


def steps(parent: Path) -> list[int]:
    """The steps of the checkpoints in `parent`, newest first, verified or not."""
    if not parent.is_dir():
        return []
    return sorted((int(p.name) for p in parent.iterdir() if p.name.isascii() and p.name.isdigit() and p.name == folder_name(int(p.name))), reverse=True)


def load(folder: Path, only_model: bool = False) -> Checkpoint:
    """Read and verify one checkpoint. CheckpointError says what is wrong with it."""
    manifest = _manifest(folder)
    contents: dict[str, bytes] = {}
    for name in FILES:
        if only_model and name == STATE:
            continue
        expected = manifest["files"][name]
        content = _read(folder / name, expected["bytes"])
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
        contents[name] = content
    try:
        record = json.loads(contents[RECORD].decode())
        model = safetensors.torch.load(contents[MODEL])
        state = {} if only_model else safetensors.torch.load(contents[STATE])
    except Exception as error:
        # The hashes agree, so a fault of the writer or a forged folder; safetensors has several exception types of its own.
        raise CheckpointError(f"{folder} cannot be read although its hashes agree: {error}") from error
    if not isinstance(record, dict) or record.get("step") != manifest["step"]:
        raise CheckpointError(f"{folder / RECORD} is of another step than the manifest")
    return Checkpoint(folder, manifest["step"], model, state, record)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(_read(path, None).decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: not JSON") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}, this onetorch reads format {FORMAT}; use the version of onetorch that wrote it")
    files = manifest.get("files")
    if set(manifest) != {"format", "step", "files"} or not isinstance(files, dict) or set(files) != set(FILES):
        raise CheckpointError(f"{path} is damaged: expected format, step and the files {', '.join(FILES)}")
    for entry in files.values():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"} or type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise CheckpointError(f"{path} is damaged: a file needs bytes and sha256")
    if type(manifest["step"]) is not int or folder.name != folder_name(manifest["step"]):
        raise CheckpointError(f"{folder} is not the checkpoint of step {manifest['step']!r} that its manifest says; was it renamed or swapped?")
    return manifest


def _read(path: Path, size: int | None) -> bytes:
    try:
        # O_NOFOLLOW: a link could point at anything; the size is compared before a byte is read.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if size is None and found > MANIFEST_LIMIT:
                raise CheckpointError(f"{path} is damaged: {found} bytes where at most {MANIFEST_LIMIT} are expected")
            if size is not None and found != size:
                raise CheckpointError(f"{path} is damaged: {found} bytes where the manifest says {size}")
            return file.read(found)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except MemoryError as error:
        raise CheckpointError(f"{path} does not fit into memory") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{path} is a symbolic link; a checkpoint holds the files themselves") from error
        raise CheckpointError(explain(error, path)) from error


def newest(parent: Path, only_model: bool = False) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that verifies, or None when there is none at all, and what is wrong with newer ones.

    Raises CheckpointError when checkpoints stand there and not one verifies: going on from nothing would lose work in silence.
    """
    damaged: list[CheckpointError] = []
    for step in steps(parent):
        try:
            return load(parent / folder_name(step), only_model), damaged
        except CheckpointError as error:
            damaged.append(error)
    if damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoints in {parent} are unusable ({'; '.join(map(str, damaged))}); nothing was changed: "
            "restore one from a copy, or begin again in another --dir"
        )
    return None, []
