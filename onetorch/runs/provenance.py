"""Where a run came from: commit and diff, versions, hardware."""

import functools
import os
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

DIFF_LIMIT = 1 << 20  # bytes of `git diff` kept


def git(source: Path) -> tuple[dict[str, Any] | None, str]:
    """({"commit", "dirty"}, diff against it) of the repository around `source`; (None, "") where there is none or git is missing."""

    def call(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(source.parent), *words], capture_output=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None

    commit = call("rev-parse", "HEAD")
    # An installed package inside somebody's project would report that project's commit: the file has to be tracked.
    if commit is None or call("ls-files", "--error-unmatch", source.name) is None:
        return None, ""
    diff = (call("diff", "HEAD") or "")[:DIFF_LIMIT]
    return {"commit": commit.strip(), "dirty": bool(diff)}, diff


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """Host, processor, cores and GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"host": socket.gethostname(), "system": platform.platform(), "processor": processor(), "cores": cores(), "gpus": gpus}


def versions() -> dict[str, str]:
    """Python and the packages that decide a result."""
    return dict(_versions())


@functools.cache  # what a process has imported stays what it is
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("onetorch", "torch", "numpy", "gymnasium", "mujoco", "mujoco-warp", "warp-lang"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def extras() -> dict[str, list[str]]:
    """Each extra of the installed onetorch, and which of its packages are missing."""
    needs = metadata.requires("onetorch") or []
    lacking: dict[str, list[str]] = {extra: [] for extra in metadata.metadata("onetorch").get_all("Provides-Extra") or []}
    for need in needs:
        name, extra = re.match(r"[\w.-]+", need), re.search(r"extra == ['\"]([\w-]+)", need)
        if name and extra:
            try:
                metadata.version(name[0])
            except metadata.PackageNotFoundError:
                lacking[extra[1]].append(name[0])
    return lacking


def command() -> list[str]:
    """The words of this process's command line."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
