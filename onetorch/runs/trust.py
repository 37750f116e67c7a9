"""Whose code it is. Code in a run's or a model's folder is a stranger's until the person who would run it has said otherwise.

Onetorch's own algorithms run from the installed package, whatever a folder holds. Another algorithm is a file `source.py` in the folder, and executing it is
executing whatever its author wished. It is a user's own when exactly these bytes were trained by this user before: `onetorch train idea.py` notes the file's
SHA-256 in the user's state folder. The note cannot be forged by a folder that comes from elsewhere, holds after a folder was moved, and one changed byte ends
it. Anything else needs `--trust-code`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onetorch.runs.errors import UsageError

Gate = Callable[[bytes, Path], None]  # is handed code before it runs, and where it stands; raises UsageError to stop it

def notes() -> Path:
    """The file with one line, a SHA-256 and a file name, for each algorithm this user has trained."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "onetorch" / "own_code"


def own(code: bytes) -> bool:
    """Whether this user has trained exactly this file before."""
    try:
        known = notes().read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{notes()} cannot be read ({error}); mend or remove it: it lists the code that is yours") from error
    digest = hashlib.sha256(code).hexdigest()
    return any(line.partition(" ")[0] == digest for line in known.splitlines())


def remember(code: bytes, name: str) -> str | None:
    """Note that this code is the user's own; returns why not where the note cannot be written."""
    try:
        if own(code):
            return None
        notes().parent.mkdir(parents=True, exist_ok=True)
        with open(notes(), "a", encoding="utf-8") as file:  # one short line at a time is appended whole
            file.write(f"{hashlib.sha256(code).hexdigest()} {printable(name)}\n")
    except (OSError, UsageError) as error:
        return str(error)
    return None


def own_only(code: bytes, path: Path) -> None:
    """The gate for runs: passes the user's own code."""
    if not own(code):
        raise UsageError(f"{path} would run {_amount(code)}, not part of onetorch and not code that you have trained: read it; --trust-code if you trust it")


def nobody(code: bytes, path: Path) -> None:
    """The gate for model folders: passes nothing."""
    raise UsageError(f"{path} would run {_amount(code)}, not part of onetorch; it was not run: read it; --trust-code if you trust it")


def anybody(code: bytes, path: Path) -> None:
    """The gate of one who has said that the code is trusted."""


def _amount(code: bytes) -> str:
    lines = code.strip().splitlines()
    return f"{printable(lines[0].decode(errors='replace'))!r}" if len(lines) == 1 else f"code of {len(lines)} lines"


def imports(config: Any) -> Iterator[bytes]:
    """The code that a config in JSON asks for: `import module` for a text such as "module:name", by which Gymnasium and others import the module."""
    if isinstance(config, dict | list):
        for part in config.values() if isinstance(config, dict) else config:
            yield from imports(part)
    elif isinstance(config, str) and (match := re.match(r"([A-Za-z_][\w.]*):", config)):
        yield f"import {match[1]}\n".encode()


def printable(text: str) -> str:
    """The text with control and format characters written out, so that what a terminal shows is what stands there.

    >>> printable("a = 1 \\x1b[2K # \\u202e")
    'a = 1 \\\\x1b[2K # \\\\u202e'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
