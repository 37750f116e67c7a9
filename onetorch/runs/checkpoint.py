"""Checkpoints that are whole or not there: written aside, flushed to disk, renamed; believed only when every hash agrees.

    checkpoints/00001200/
      model.safetensors   the weights, readable by anyone        state.safetensors   every other tensor of the state
      state.json          the rest of the state                  manifest.json       step, and size and SHA-256 of each file

Rules. A checkpoint MUST hold these names as regular files; the manifest MUST name the other three and no more; sizes MUST be compared before a file is
read, and the bytes that were hashed MUST be the bytes that are parsed. The folder's name MUST be the manifest's step. "The latest" is the highest step
whose manifest verifies; it is computed, never stored. A reader MUST NOT use pickle and MUST raise CheckpointError, and nothing else, for whatever it finds.
"""

import contextlib
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onetorch.runs import sealed
from onetorch.runs.errors import CheckpointError, RunError
from onetorch.runs.folder import FORMAT, explain

MODEL, STATE, RECORD, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
FILES = (MODEL, STATE, RECORD)
MANIFEST_LIMIT = 65_536  # bytes; a manifest of ours has about 400


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    folder: Path
    step: int
    model: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    record: dict[str, Any]
    file: memoryview  # model.safetensors as it was read
    sha256: str  # of it


def folder_name(step: int) -> str:
    """The name under which a checkpoint of `step` stands; the digits make names sort as numbers do."""
    return f"{step:08d}"


def save(parent: Path, step: int, model: dict[str, torch.Tensor], state: dict[str, torch.Tensor], record: dict[str, Any]) -> Path:
    """Write a checkpoint atomically into `parent`. RunError if the disk does not take it: what was there before stands."""
    contents: dict[str, list[sealed.Piece]] = {MODEL: sealed.dump(model), STATE: sealed.dump(state), RECORD: [json.dumps(record, allow_nan=False).encode()]}
    target = parent / folder_name(step)
    temporary = parent / f".new-{target.name}-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        # Flushing is waiting for the disk, which takes several files at once, and hashing is work for a core: all go on beside each other.
        flushes = []
        for name, pieces in contents.items():
            sealed.write(temporary / name, pieces)
            flushes.append(sealed.flush(temporary / name))
        manifest = {"format": FORMAT, "step": step, "files": {name: _entry(pieces) for name, pieces in contents.items()}}
        sealed.write(temporary / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        flushes += [sealed.flush(path) for path in (temporary / MANIFEST, temporary)]
        for flush in flushes:
            flush.result()
        for later in steps(parent):
            if later >= step:
                # Only damaged ones can stand here: resuming goes on from the newest that verifies. They are kept for whoever wants to look, under a
                # name that does not count, lest good ones be retired in their stead.
                os.rename(parent / folder_name(later), parent / f".damaged-{folder_name(later)}-{secrets.token_hex(3)}")
        os.rename(temporary, target)
        for flush in [sealed.flush(path) for path in (parent, parent.parent)]:
            flush.result()
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"no checkpoint at step {step}: {explain(error, target)}; earlier ones stand, `onetorch resume` goes on from the last") from error
    return target


def _entry(pieces: list[sealed.Piece]) -> dict[str, Any]:
    """What the manifest says of a file: hashed as handed to the system, not as read back."""
    return {"bytes": sealed.length(pieces), "sha256": sealed.sha256(pieces)}


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
    contents: dict[str, memoryview] = {}
    for name in FILES:
        if only_model and name == STATE:
            continue
        expected = manifest["files"][name]
        contents[name], found = sealed.read(folder / name, expected["bytes"])
        if found != expected["sha256"]:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    try:
        record = sealed.parse_json(contents[RECORD], RECORD)
        model = sealed.parse(contents[MODEL], MODEL)
        # Of the state a part may live on by itself, and should not keep the memory of the whole file.
        state = {} if only_model else {name: tensor.clone() for name, tensor in sealed.parse(contents[STATE], STATE).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{folder} cannot be read although its hashes agree: {error}") from error  # a fault of the writer, or a forged folder
    if record.get("step") != manifest["step"]:
        raise CheckpointError(f"{folder / RECORD} is of another step than the manifest")
    return Checkpoint(folder, manifest["step"], model, state, record, contents[MODEL], manifest["files"][MODEL]["sha256"])


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = sealed.parse_json(sealed.read(path, limit=MANIFEST_LIMIT)[0], path)
    found = manifest.get("format")
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
