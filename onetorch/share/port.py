"""Tensors out of a .pt file, which is a pickle: read by torch's restricted unpickler, in a process of its own with limits, and nowhere else in onetorch.

`torch.load(weights_only=True)` executes nothing that a file names beyond a short list of torch's own. It has had holes, and a small file may ask for much
memory: so the process that calls it has bounded memory, time and file size, no environment but what Python needs, and hands back only a safetensors file.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from onetorch.runs import sealed
from onetorch.runs.errors import CheckpointError, UsageError

SECONDS = 600  # of processor time
ROOM = 256 << 20  # bytes of memory beside four times the file: its tensors, their copies, and Python


def tensors_of(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pt / .pth / .bin / .ckpt file: of its state dict, nested names joined by dots; `key` picks a part.

    Raises UsageError for another ending, CheckpointError for a file that is damaged, asks for too much, or holds anything but tensors and plain values.
    """
    if path.suffix == ".safetensors":
        content, _ = sealed.read(path)
        return sealed.parse(content, path)
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise UsageError(f"{path}: weights are read from .safetensors, .pt, .pth, .bin and .ckpt files")
    with sealed.opened(path) as (_, size):
        pass
    with tempfile.TemporaryDirectory(prefix="onetorch-port-") as scratch:
        out = Path(scratch) / "out.safetensors"
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
        words = [sys.executable, "-P", "-m", "onetorch.share.port", str(path.resolve()), str(out), str(size), key or ""]
        try:
            done = subprocess.run(words, cwd=scratch, env=kept, capture_output=True, timeout=2 * SECONDS, check=False, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            raise CheckpointError(f"{path}: reading it took more than {2 * SECONDS} s") from error
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines() or [f"its process ended with {done.returncode}"]
            raise CheckpointError(f"{path} is refused: {last[-1][:400]}")
        content, _ = sealed.read(out, limit=2 * size + (1 << 20))
        return sealed.parse(content, path)


def _flat(value: Any, name: str, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[name] = value
    elif isinstance(value, dict):
        for key, part in value.items():
            _flat(part, f"{name}.{key}" if name else str(key), found)


def _child(path: str, out: str, size: int, key: str) -> None:
    import torch

    if sys.platform == "linux":  # elsewhere this limit is not kept
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * size + ROOM,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + (1 << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        for part in filter(None, key.split(".")):
            value = value[part]
        found: dict[str, Tensor] = {}
        _flat(value, "", found)
        if not found:
            raise ValueError("it holds no tensors" + ("" if isinstance(value, dict) else f", but a {type(value).__name__}"))
        total = sum(t.nbytes for t in found.values())
        if total > 2 * size:
            raise ValueError(f"{size} bytes that claim to be tensors of {total}")
        sealed.write(Path(out), sealed.dump(found))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
