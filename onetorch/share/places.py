"""Where model folders stand: a folder of this machine, any URL that fsspec knows (s3://, gs://, https://, memory://), a repository of the Hub (hf://owner/name)."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from onetorch.runs import sealed
from onetorch.runs.errors import CheckpointError, OneTorchError, RunError, UsageError

Sink = Callable[[sealed.Piece], Any]


class Place(Protocol):
    """A folder whose files are read by name. `read` gives the bytes and their SHA-256; CheckpointError for a wrong size, found before anything is read."""

    def read(self, name: str, size: int | None, limit: int | None, *sinks: Sink) -> tuple[memoryview, str]: ...
    def names(self) -> set[str] | None: ...
    def name(self, file: str) -> str: ...


class Folder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def name(self, file: str) -> str:
        return str(self.path / file)

    def names(self) -> set[str]:
        return set(os.listdir(self.path))

    def read(self, name: str, size: int | None, limit: int | None, *sinks: Sink) -> tuple[memoryview, str]:
        with sealed.opened(self.path / name) as (file, found):
            return _absorb(file, found, size, limit, self.name(name), sinks)


class Remote:
    """A folder behind a URL."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.system, self.path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            protocol = url.partition("://")[0]
            cure = "pip install 'onetorch[hub]'" if protocol == "hf" else "install the package it names"
            raise UsageError(f"{url}: {protocol}:// needs a package that is missing ({error}): {cure}") from error
        except ValueError as error:
            raise UsageError(f"{url}: {error}") from error

    def __str__(self) -> str:
        return self.url

    def name(self, file: str) -> str:
        return f"{self.url}/{file}"

    def names(self) -> None:
        return None  # only what the manifest names is ever fetched

    def read(self, name: str, size: int | None, limit: int | None, *sinks: Sink) -> tuple[memoryview, str]:
        path = f"{self.path}/{name}"
        with self._explained(name):
            found = self.system.info(path).get("size")
            with self.system.open(path, "rb") as file:
                return _absorb(_Stream(file), found, size, limit, self.name(name), sinks)

    def write(self, name: str, pieces: list[sealed.Piece]) -> None:
        with self._explained(name):
            self.system.makedirs(self.path, exist_ok=True)
            with self.system.open(f"{self.path}/{name}", "wb") as file:
                for piece in pieces:
                    file.write(piece)

    def exists(self, name: str) -> bool:
        with self._explained(name):
            return bool(self.system.exists(f"{self.path}/{name}"))

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except OneTorchError:
            raise
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.name(name)} is missing") from error
        except Exception as error:  # every file system of fsspec has exceptions of its own
            raise RunError(f"{self.name(name)}: {type(error).__name__}: {error}") from error


class _Stream:
    """`readinto` for the files of fsspec that have only `read`."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readinto(self, view: memoryview) -> int:
        chunk = self.file.read(len(view))
        view[: len(chunk)] = chunk
        return len(chunk)


def _absorb(stream: Any, found: int | None, size: int | None, limit: int | None, what: str, sinks: tuple[Sink, ...]) -> tuple[memoryview, str]:
    if size is not None and found is not None and found != size:
        raise CheckpointError(f"{what} is damaged: {found} bytes where the manifest says {size}")
    if limit is not None and found is not None and found > limit:
        raise CheckpointError(f"{what} is damaged: {found} bytes where at most {limit} are expected")
    expected = found if found is not None else size if size is not None else limit
    assert expected is not None
    digest = hashlib.sha256()
    content = sealed.absorb(stream, expected, digest.update, *sinks)
    if size is not None and (len(content) != size or stream.readinto(memoryview(bytearray(1)))):
        raise CheckpointError(f"{what} is damaged: {len(content)} bytes or more where the manifest says {size}")
    return content, digest.hexdigest()


def is_url(where: str | os.PathLike[str]) -> bool:
    """Whether `where` is a URL and no path."""
    return isinstance(where, str) and "://" in where


def local(path: str | os.PathLike[str]) -> Folder:
    """A folder of this machine; UsageError if there is none."""
    if not Path(path).is_dir():
        raise UsageError(f"there is no folder {path}")
    return Folder(Path(path))


def place(where: str | os.PathLike[str]) -> Place:
    """The folder at a path or URL."""
    return Remote(str(where)) if is_url(where) else local(where)


def hub_repository(url: str) -> str:
    """`owner/name` of `hf://owner/name`; UsageError for anything else.

    >>> hub_repository("hf://ada/cartpole")
    'ada/cartpole'
    """
    repository = url.removeprefix("hf://").strip("/")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(f"{url}: a repository of the Hub is written hf://owner/name")
    return repository


def push_to_hub(repository: str, folder: Path, public: bool) -> str:
    """Upload all files of `folder` as one commit, into a repository that is made (private, unless `public`) where there is none. Returns its address."""
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UsageError(f"hf:// needs the package huggingface_hub ({error}): pip install 'onetorch[hub]'") from error
    api = HfApi()
    try:
        if not api.repo_exists(repository):
            api.create_repo(repository, private=not public)
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in sorted(folder.iterdir())]
        return str(api.create_commit(repository, operations, commit_message="Model folder written by onetorch").commit_url)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RunError(f"hf://{repository}: {type(error).__name__}: {error}; `hf auth login` gives this machine a token") from error
