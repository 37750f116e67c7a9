"""A run's folder on disk: its JSON files, its lock, its listing. Imports no torch.

    config.json    format, recipe, algorithm, config        run.json      status, command, provenance, plan, cost, result
    metrics.jsonl  one row per log call                      checkpoints/  see `checkpoint.py`
    source.py      the algorithm file that ran, when it is a user's own
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onetorch.runs.config import from_json
from onetorch.runs.errors import RunError, UsageError

FORMAT = 1  # of config.json, run.json and the checkpoints; raised when an older reader would misread a newer folder
TIMES = ("seconds", "cpu_seconds", "mfu")  # columns of metrics.jsonl that differ between equal runs; all others are the same bit for bit


def explain(error: OSError, path: Path) -> str:
    """What an OSError on `path` means and what to do, in one line."""
    cures = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EROFS: "the file system is read-only: remount it or choose another --dir",
        errno.EACCES: "permission denied: change the owner or mode, or choose another --dir",
        errno.EPERM: "permission denied: change the owner or mode, or choose another --dir",
        errno.EFBIG: "the file size limit is reached: raise it (ulimit -f)",
    }
    return f"{path}: {cures.get(error.errno or 0, error.strerror or str(error))}"


def write_json(path: Path, data: Any) -> None:
    """Replace `path` by `data` so that a reader, or a kill at any moment, sees the old file or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(explain(error, path)) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object written by `write_json`; RunError names a missing, damaged or newer file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except OSError as error:
        raise RunError(explain(error, path)) from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged (not JSON: {error}); restore it from a copy") from error
    if not isinstance(data, dict):
        raise RunError(f"{path} is damaged (expected a JSON object); restore it from a copy")
    if data.get("format") != FORMAT:
        raise RunError(f"{path} has format {data.get('format')!r}, this onetorch reads format {FORMAT}; use the version of onetorch that wrote it")
    return data


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in `folder`. A model folder has a config too, and a manifest beside it."""
    return (folder / "config.json").exists() and not (folder / "manifest.json").exists()


def config(path: Path, Config: type) -> Any:
    """The config of the run in `path` as an instance of the algorithm's `Config`."""
    return from_json(read_json(path / "config.json").get("config"), Config, f"{path / 'config.json'}")


class Lock:
    """The exclusive right to write into a run's folder; freed by the kernel however the process ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        try:
            self.file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 (held open: the lock lives as long as the file)
        except OSError as error:
            raise RunError(explain(error, self.path)) from error
        for patience in (0.01, 0.1, 0.0):  # a look by `owner` holds it for a moment too
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not patience:
                    self.file.close()
                    raise UsageError(f"{folder} is in use by {owner(folder)}; wait for it or stop it, or choose another --dir") from error
                time.sleep(patience)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self.file.flush()

    def release(self) -> None:
        self.file.close()


def owner(folder: Path) -> str | None:
    """The living process that holds the run's lock, in words, or None."""
    try:
        with open(folder / "run.lock", encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        pass  # no lock was ever taken here
    return None


def refuse(folder: Path) -> UsageError:
    """Why no run can begin in `folder`, which holds one."""
    process = owner(folder)
    if process:
        return UsageError(f"{folder} is in use by {process}; wait for it or stop it, or choose another --dir")
    return UsageError(f"{folder} already holds a run; `onetorch resume {shlex.quote(str(folder))}` goes on with it, or choose another --dir")


def status(folder: Path, record: dict[str, Any]) -> str:
    """The run's state as it is, not as last written: a process that was killed could not write."""
    state = str(record.get("status", "?"))
    return "killed" if state == "running" and owner(folder) is None else state


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a kill cut short is left out, any other damage is a RunError with its line."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RunError(f"{path}:{number} is damaged (not JSON)") from error
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise RunError(f"{path}:{number} is damaged (a row is an object with an integer 'step')")
            yield row
