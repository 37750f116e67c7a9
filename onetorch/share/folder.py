"""The model folder: its files, its manifest, and how one is read that came from anywhere.

    model.safetensors   the weights                              README.md        the card: what a person reads, and the Hub
    config.json         recipe, algorithm, typed config          provenance.json  results, command, commit, versions, hardware, cost
    source.py           the algorithm's file as it ran           golden.safetensors   inputs and outputs of the module (where there are)
    manifest.json       size and SHA-256 of each of the others; written last

Rules. A folder MUST hold a manifest and the files that it names, as regular files, and no others (names that begin with a dot are not looked at). The manifest
MUST name files of this list only; all but golden.safetensors are required. A reader MUST compare sizes before it reads, hashes before it parses, and MUST parse
the bytes that it hashed. Nothing is compressed and nothing is pickled. What breaks a rule is refused by a CheckpointError with the file's name.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from onetorch.runs import sealed
from onetorch.runs.errors import CheckpointError, RunError, UsageError
from onetorch.runs.folder import FORMAT, explain
from onetorch.share.places import Place

MODEL, CONFIG, SOURCE, CARD, PROVENANCE = "model.safetensors", "config.json", "source.py", "README.md", "provenance.json"
GOLDEN, MANIFEST = "golden.safetensors", "manifest.json"
REQUIRED = (MODEL, CONFIG, SOURCE, CARD, PROVENANCE)
# In bytes. Parsed JSON takes some twenty times its length, so that what is parsed stays small beside any model worth the word.
LIMITS = {CONFIG: 1 << 18, PROVENANCE: 1 << 18, SOURCE: 1 << 20, CARD: 1 << 20, GOLDEN: 1 << 24, MANIFEST: 1 << 16}
HEADER_LIMIT = 1 << 20  # bytes, or a 64th of the file


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Contents:
    """A model folder in memory, every file as hashed; `where` is what messages call the folder."""

    where: str
    files: dict[str, memoryview]

    def name(self, file: str) -> str:
        """What messages call a file of it."""
        return f"{self.where}/{file}"

    def tensors(self, file: str) -> dict[str, Tensor]:
        """A safetensors file of it."""
        return sealed.parse(self.files[file], self.name(file), max(HEADER_LIMIT, len(self.files[file]) // 64))

    def json(self, file: str) -> dict[str, Any]:
        """A JSON file of it, of this onetorch's format."""
        data = sealed.parse_json(self.files[file], self.name(file))
        _same_format(data, self.name(file))
        return data


def _same_format(data: dict[str, Any], what: str) -> None:
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{what} has format {data.get('format')!r}, this onetorch reads format {FORMAT}; use the version of onetorch that wrote it")


def entries(content: memoryview, what: str) -> dict[str, Entry]:
    """The manifest's entries, as far as they can be checked without the files."""
    data = sealed.parse_json(content, what)
    _same_format(data, what)
    listed = data.get("files")
    if data.keys() != {"format", "files"} or not isinstance(listed, dict):
        raise CheckpointError(f"{what} is damaged: expected format and files")
    found: dict[str, Entry] = {}
    for name, entry in listed.items():
        if name == MANIFEST or name not in (MODEL, *LIMITS):
            raise CheckpointError(f"{what} names the file {name!r}; a model folder holds {', '.join((*REQUIRED, GOLDEN))} and nothing else")
        match entry:
            case {"bytes": int(size), "sha256": str(digest)} if len(entry) == 2 and type(size) is int and size >= 0:
                found[name] = Entry(size, digest)
            case _:
                raise CheckpointError(f"{what} is damaged: {name} needs bytes and sha256")
        if name in LIMITS and size > LIMITS[name]:
            raise CheckpointError(f"{what} claims {size} bytes for {name}; at most {LIMITS[name]} are read")
    for name in REQUIRED:
        if name not in found:
            raise CheckpointError(f"{what} does not name {name}, which every model folder has")
    if written(data) != content:
        raise CheckpointError(f"{what} is damaged: its bytes are not those that onetorch writes")
    total, memory = sum(e.bytes for e in found.values()), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if total > memory:
        raise CheckpointError(f"{what} claims {total} bytes in all; this machine has {memory} bytes of memory")
    return found


def read(place: Place, into: Path | None = None) -> Contents:
    """All files of the model folder at `place`, each checked against the manifest; `into`, an existing empty folder, gets a copy as they come."""
    manifest, _ = place.read(MANIFEST, None, LIMITS[MANIFEST])
    listed = entries(manifest, place.name(MANIFEST))
    present = place.names()
    for name in sorted(present - listed.keys() - {MANIFEST}) if present is not None else ():
        if not name.startswith("."):
            raise CheckpointError(f"{place.name(repr(name)[1:-1])} is not named by the manifest; a model folder holds nothing else: remove it")
    files: dict[str, memoryview] = {}
    # Small files first: what is wrong is mostly found in them.
    for name, entry in sorted(listed.items(), key=lambda item: item[1].bytes):
        if into is None:
            files[name], digest = place.read(name, entry.bytes, None)
        else:
            with open(into / name, "xb") as copy:
                files[name], digest = place.read(name, entry.bytes, None, copy.write)
        if digest != entry.sha256:
            raise CheckpointError(f"{place.name(name)} is damaged: its SHA-256 is not the manifest's")
    if into is not None:
        (into / MANIFEST).write_bytes(manifest)
    return Contents(str(place), files)


def free(path: Path) -> None:
    """UsageError unless a folder can be made at `path`."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} exists and is no folder; choose another name")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path} is not empty; a model folder is written whole or not at all: choose another name")


@contextlib.contextmanager
def making(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its name when the block ends well, and vanishes when it does not."""
    free(path)
    temporary = path.absolute().with_name(f".new-{path.name or 'model'}-{secrets.token_hex(3)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise RunError(explain(error, path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fetch(place: Place, path: Path) -> Contents:
    """Copy the model folder at `place` to `path`, which appears whole and checked or not at all."""
    with making(path) as temporary:
        contents = read(place, temporary)
    return Contents(str(path), contents.files)


def manifest(files: dict[str, list[sealed.Piece]], known: dict[str, str]) -> bytes:
    """The manifest of these files, as it stands in the folder; `known` holds the SHA-256 of those that were hashed before."""
    listed = {name: {"bytes": sealed.length(pieces), "sha256": known.get(name) or sealed.sha256(pieces)} for name, pieces in files.items()}
    return written({"format": FORMAT, "files": listed})


def written(manifest: dict[str, Any]) -> bytes:
    """A manifest as it stands in the folder, to the byte."""
    return json.dumps(manifest, indent=1).encode() + b"\n"


def write(path: Path, files: dict[str, list[sealed.Piece]], known: dict[str, str]) -> None:
    """Write a model folder, the manifest last; it appears under its name when all of it is there. `known` as in `manifest`.

    Unlike a checkpoint it does not wait for the disk: whoever reads it checks every hash, and the run that it was made from still stands.
    """
    with making(path) as temporary:
        for name, pieces in files.items():
            sealed.write(temporary / name, pieces)
        sealed.write(temporary / MANIFEST, [manifest(files, known)])


def is_model(path: Path) -> bool:
    """Whether a model folder stands at `path`, sound or not."""
    return (path / MANIFEST).exists() or (path / MANIFEST).is_symlink()
