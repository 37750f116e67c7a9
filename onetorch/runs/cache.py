"""What this machine found out once and need not find out again: small JSON values in the user's cache folder, one file for each kind."""

import json
import os
from pathlib import Path
from typing import Any


def path(kind: str) -> Path:
    """The file that holds the values of a kind."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onetorch" / f"{kind}.json"


def get(kind: str, key: str) -> Any:
    """The value kept under `key`, or None; a file that is missing or damaged holds none, for whatever stands here can be found out again."""
    try:
        return _read(path(kind)).get(key)
    except OSError:
        return None


def put(kind: str, key: str, value: Any) -> str | None:
    """Keep a JSON value; returns why not where the folder cannot be written."""
    file = path(kind)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        values = _read(file) if file.exists() else {}
        temporary = file.with_name(f".{kind}.{os.getpid()}")
        temporary.write_text(json.dumps({**values, key: value}, indent=1), encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        return str(error)
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
