"""What differs between two runs: where they come from, config, results, metrics, weights. Imports no torch."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetorch.runs import compare, folder
from onetorch.runs.compare import show
from onetorch.runs.errors import CheckpointError, RunError, UsageError

HEADER_LIMIT = 100 << 20  # bytes; safetensors' own limit
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1"}
DTYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "|b1", "BF16": "<u2"}

Rows = list[tuple[str, ...]]


def compare_runs(a: Path, b: Path) -> Iterator[tuple[str, Rows]]:
    """Sections (title, lines of cells) on the runs in the folders `a` and `b`; a section with a title alone is a finding in one sentence.

    Metrics are compared number for number but for the columns of time, weights bit for bit in the newest checkpoint of each. Raises UsageError where no
    run stands, RunError for a damaged one.
    """
    for path in (a, b):
        if not folder.holds_run(path):
            raise UsageError(f"{path} holds no run (no config.json)" if path.exists() else f"there is no folder {path}")
    one, two = compare.read(a), compare.read(b)
    yield from _fields("config", one.config, two.config)
    yield from _fields("origin", _origin(one), _origin(two))
    yield from _fields("result", one.record["result"], two.record["result"])
    yield from _metrics(a, b)
    yield from _weights(a, b)


def _fields(title: str, one: dict[str, Any], two: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    rows = [(n, show(one[n], 60) if n in one else "–", show(two[n], 60) if n in two else "–") for n in {**one, **two} if one.get(n, ...) != two.get(n, ...)]
    if rows:
        yield title, [(title.upper(), "A", "B"), *rows]
    else:
        yield f"{title}: the same", []


def _origin(entry: compare.Entry) -> dict[str, Any]:
    record = entry.record
    git = record["git"] if isinstance(record["git"], dict) else {}
    diff = entry.path / "git.diff"
    origin = {"state": entry.status, "recipe": record.get("recipe"), "commit": str(git.get("commit", "none"))[:12]}
    origin["diff"] = hashlib.sha256(diff.read_bytes()).hexdigest()[:12] if diff.is_file() else "none"
    origin |= {f"plan {k}": v for k, v in record["plan"].items()} | {f"version {k}": v for k, v in record["versions"].items()}
    return origin | {k: record["hardware"].get(k) for k in ("processor", "cores", "gpus")}


def _metrics(a: Path, b: Path) -> Iterator[tuple[str, Rows]]:
    """Last values of every quantity, and the first step at which the two rows differ in it."""
    first: dict[str, str] = {}
    last: dict[str, list[Any]] = {}
    counts = [0, 0]
    for one, two in itertools.zip_longest(folder.rows(a), folder.rows(b), fillvalue=None):
        for side, row in enumerate((one, two)):
            counts[side] += row is not None
            for name, value in (row or {}).items():
                if name not in folder.TIMES and name != "step":
                    last.setdefault(name, [None, None])[side] = value
        if one is None or two is None:
            continue
        if one["step"] != two["step"]:
            first.setdefault("step", f"{one['step']} | {two['step']}")
        for name in ({**one, **two}).keys() - {*folder.TIMES, "step"}:
            if one.get(name) != two.get(name):
                first.setdefault(name, str(one["step"] if one["step"] == two["step"] else f"{one['step']} | {two['step']}"))
    rows: Rows = [("METRIC", "LAST IN A", "LAST IN B", "B - A", "FIRST STEP THAT DIFFERS")]
    for name, (x, y) in last.items():
        if x != y or name in first:
            numbers = type(x) in (int, float) and type(y) in (int, float)
            rows.append((name, _value(x), _value(y), f"{y - x:+.4g}" if numbers else "", first.get(name, "none both have")))
    if "step" in first:
        yield f"metrics: the rows are of different steps from {first['step']} on", []
    if counts[0] != counts[1]:
        yield f"metrics: A has {counts[0]} rows, B {counts[1]}", []
    if len(rows) > 1:
        yield "metrics", rows
    elif last and counts[0] == counts[1]:
        yield f"metrics: identical in {counts[0]} rows but for the time they took", []
    elif not last:
        yield "metrics: neither has any", []


def _value(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else show(value)


def _weights(a: Path, b: Path) -> Iterator[tuple[str, Rows]]:
    """Tensor by tensor of the newest checkpoints."""
    found = [_newest(a), _newest(b)]
    if None in found:
        missing = " and ".join(side for side, path in zip("AB", found, strict=True) if path is None)
        yield f"weights: {missing} has no checkpoint", []
        return
    paths = [path for path in found if path is not None]
    steps = [int(path.parent.name) for path in paths]
    if steps[0] != steps[1]:
        yield f"weights: of iteration {steps[0]} in A, {steps[1]} in B", []
    one, two = (Tensors(path) for path in paths)
    rows: Rows = [("TENSOR", "SHAPE", "LARGEST DIFFERENCE", "RELATIVE", "ELEMENTS THAT DIFFER")]
    same = 0
    for name in {**one.entries, **two.entries}:
        if name not in one.entries or name not in two.entries:
            rows.append((name, "", f"only in {'A' if name in one.entries else 'B'}", "", ""))
        elif one.kind(name) != two.kind(name):
            rows.append((name, f"{one.kind(name)} | {two.kind(name)}", "not comparable", "", ""))
        elif (raw := one.raw(name)) == (other := two.raw(name)):
            same += 1
        elif one.dtype(name) not in DTYPES:
            rows.append((name, one.kind(name), f"differs ({one.dtype(name)} is compared by its bytes)", "", ""))
        else:
            x, y = (decode(part, one.dtype(name)) for part in (raw, other))
            with np.errstate(invalid="ignore", over="ignore"):
                gap = np.abs(y - x)
            size = float(np.abs(x).max(initial=0.0))
            largest = float(gap.max())
            relative = f"{largest / size:.3g}" if size and math.isfinite(largest) else ""
            rows.append((name, one.kind(name), f"{largest:.6g}", relative, f"{np.count_nonzero(x != y):,} of {x.size:,}"))
    if len(rows) == 1:
        yield f"weights: identical, {same} {'tensor' if same == 1 else 'tensors'}", []
    else:
        yield "weights", rows
        yield f"{same} of {same + len(rows) - 1} tensors are identical; relative is to the largest magnitude in A", []


def _newest(run: Path) -> Path | None:
    """model.safetensors of the newest checkpoint whose manifest it agrees with; None where there is no checkpoint."""
    parent = run / "checkpoints"
    steps = sorted((p for p in parent.iterdir() if p.name.isascii() and p.name.isdigit()), key=lambda p: int(p.name)) if parent.is_dir() else []
    wrong = ""
    for step in reversed(steps):
        model = step / "model.safetensors"
        try:
            manifest = json.loads((step / "manifest.json").read_text(encoding="utf-8"))["files"][model.name]
            with open(model, "rb") as file:
                if model.stat().st_size == manifest["bytes"] and hashlib.file_digest(file, "sha256").hexdigest() == manifest["sha256"]:
                    return model
            wrong = f"{model} is not what its manifest says"
        except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
            wrong = f"{step} is damaged: {type(error).__name__}: {error}"
    if wrong:
        raise CheckpointError(f"no checkpoint of {run} can be trusted; {wrong}")
    return None


class Tensors:
    """A safetensors file read piece by piece, in numpy: of two large models no more than two tensors are in memory.

    The format: 8 bytes little-endian N, N bytes of JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the data. Raises RunError for a file
    that is not of it. (safetensors' own numpy reader knows no bfloat16.)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = path.stat().st_size
                if length > min(HEADER_LIMIT, size - 8):
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self.entries: dict[str, dict[str, Any]] = header
            self.begin = 8 + length
            for entry in header.values():
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end <= size - self.begin or not all(type(n) is int for n in entry["shape"]):
                    raise ValueError("data outside of the file")
                if entry["dtype"] in DTYPES and math.prod(entry["shape"]) * np.dtype(DTYPES[entry["dtype"]]).itemsize != end - begin:
                    raise ValueError("a shape that is not its data's")
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is no safetensors file: {error}") from error

    def dtype(self, name: str) -> str:
        return str(self.entries[name]["dtype"])

    def kind(self, name: str) -> str:
        """Dtype and shape, such as F32 (64, 4)."""
        return f"{self.dtype(name)} ({', '.join(map(str, self.entries[name]['shape']))})"

    def raw(self, name: str) -> bytes:
        """The tensor's bytes."""
        begin, end = self.entries[name]["data_offsets"]
        with open(self.path, "rb") as file:
            file.seek(self.begin + begin)
            return file.read(end - begin)


def decode(raw: bytes, dtype: str) -> NDArray[np.float64]:
    """The numbers in the bytes of a tensor as float64, flat; a bfloat16 is the upper half of a float32.

    >>> decode(bytes([0x80, 0x3F, 0x00, 0xC0]), "BF16").tolist()
    [1.0, -2.0]
    """
    stored = np.frombuffer(raw, DTYPES[dtype])
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)
