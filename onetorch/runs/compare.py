"""Several runs side by side: read from their folders, grouped by what differs, brought onto one grid. Imports no torch.

The logs of others (`foreign`) may stand among them.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onetorch.runs import folder, stats
from onetorch.runs.config import nearest
from onetorch.runs.errors import OneTorchError, RunError, UsageError
from onetorch.runs.stats import Array, Estimate

CLOCKS = ("step", "seconds", "cpu_seconds")
SMALLER_IS_BETTER = ("loss", "error", "bits", "bpb", "bpd", "nll", "perplexity", "kl", "fid", "mse", "divergence", "regret", "seconds")
VALUES = 30  # of a field up to which each is held against one of them
TAIL = 0.1  # the last tenth of a run's rows makes its final value


@dataclass(frozen=True)
class Column:
    """One logged quantity of a run; three arrays (n,) in the order of the steps."""

    steps: Array
    seconds: Array
    values: Array

    def x(self, clock: str) -> Array:
        """The horizontal axis, "steps" or "seconds"."""
        return self.steps if clock == "steps" else self.seconds


@dataclass(frozen=True)
class Entry:
    """A run as read from its folder."""

    path: Path
    record: dict[str, Any]  # run.json
    status: str
    config: dict[str, Any]  # dotted field name to JSON value, with the algorithm's name first
    columns: dict[str, Column]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    def outcome(self, y: str) -> float | None:
        """What the run reached in `y`: the number its evaluation recorded, else the mean of the last tenth of the logged values.

        None where it has no such quantity, and for a run that is not done: half a training is no result.
        """
        if self.status != "done":
            return None
        value = self.record["result"].get(y)
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            return float(value)
        column = self.columns.get(y)
        if column is None:
            return None
        return float(column.values[-max(1, int(len(column.values) * TAIL)) :].mean())


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed; `values` are the fields in which groups differ."""

    name: str
    values: dict[str, Any]
    entries: tuple[Entry, ...]

    def outcomes(self, y: str) -> Array:
        """(n,) what each run reached in `y`, those left out that have none."""
        return np.array([v for e in self.entries if (v := e.outcome(y)) is not None])


@dataclass(frozen=True)
class Comparison:
    """Runs, their groups, the fields that differ between groups, and what could not be read."""

    entries: list[Entry]
    groups: list[Group]
    varying: list[str]
    notes: list[str] = field(default_factory=list)


def find(words: Sequence[str]) -> list[Path]:
    """The runs that paths of runs, and of sweeps (folders with runs in them), mean; each once. UsageError for a path that holds none.

    A folder with a log of others (see `foreign`) counts as a run.
    """
    from onetorch.runs import foreign
    if not words:
        raise UsageError("expected one run or more, or a sweep (a folder with runs in it)")
    found: dict[Path, Path] = {}
    for path in map(Path, words):
        if folder.holds_run(path) or foreign.files(path):
            inside = [path]
        elif path.is_dir():
            below = sorted({*path.glob("*/"), *path.glob("*/*/")})
            visible = [p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            inside = [p for p in visible if (p / "config.json").exists() or foreign.files(p)]
        else:
            raise UsageError(f"there is no folder {path}")
        if not inside:
            raise UsageError(f"{path} holds no run (no config.json in it or below, nor a progress.txt, progress.csv, monitor.csv or events.out.tfevents)")
        for run in inside:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read(path: Path) -> Entry:
    """The run in `path`, or the log of others there; RunError for a damaged one."""
    from onetorch.runs import foreign

    if foreign.files(path):
        return foreign.read(path)
    record, entry = folder.read_json(path / "run.json"), folder.read_json(path / "config.json")
    record = {"result": {}, "cost": {}, "progress": {}, "versions": {}, "hardware": {}, "plan": {}, "git": None} | record
    if any(not isinstance(record[name], dict) for name in ("result", "cost", "progress", "versions", "hardware", "plan")):
        raise UsageError(f"{path / 'run.json'} is damaged (a part of it is no object)")
    algorithm = str(entry.get("algorithm", "?"))
    if algorithm == "source.py" and (path / "source.py").is_file():
        # Two states of one's own file are two algorithms: their runs are no seeds of each other.
        digest = hashlib.sha256((path / "source.py").read_bytes()).hexdigest()[:6]
        algorithm = f"{record.get('recipe', 'source')}.py {digest}"
    config: dict[str, Any] = {"algorithm": algorithm.rpartition(".")[2] if algorithm.startswith("onetorch.") else algorithm}
    config |= _flat(entry.get("config"))
    return Entry(path.resolve(), record, folder.status(path, record), config, _columns(path))


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items() if isinstance(config, dict) else ():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _columns(path: Path) -> dict[str, Column]:
    # Rows of the same names are taken apart together: the work of an interpreter is by column, not by number.
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in _rows(path):
        alike.setdefault(tuple(row), []).append(row)
    found: dict[str, list[tuple[list[Any], list[Any], list[Any]]]] = {}
    for names, rows in alike.items():
        for name in names:
            if name in CLOCKS:
                continue
            kept = rows
            if not {type(row[name]) for row in rows} <= {int, float}:
                kept = [row for row in rows if type(row[name]) in (int, float)]
            found.setdefault(name, []).append(([row["step"] for row in kept], [row.get("seconds", 0.0) for row in kept], [row[name] for row in kept]))
    columns = {}
    for name, parts in found.items():
        try:
            joined = np.concatenate([np.array(part, dtype=np.float64) for part in parts], axis=1)
        except (OverflowError, TypeError, ValueError) as error:
            raise RunError(f"{path / 'metrics.jsonl'} is damaged: it holds a number that no float can be ({error})") from error
        # A run never writes infinities; a file from elsewhere may hold them, and one would empty a whole plot.
        joined = joined[:, np.isfinite(joined).all(0)]
        if joined.size:
            columns[name] = Column(*joined[:, np.argsort(joined[0], kind="stable")])
    return columns


def _rows(path: Path) -> list[dict[str, Any]]:
    """All rows at once: one call of the JSON parser takes a third of the time of one a line."""
    metrics = path / "metrics.jsonl"
    whole = metrics.read_bytes().rpartition(b"\n")[0] if metrics.exists() else b""
    try:
        rows = json.loads(b"[" + whole.replace(b"\n", b",") + b"]")
    except (ValueError, RecursionError):
        rows = None
    if rows is None or not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        return list(folder.rows(path))  # which names the damaged line
    return rows


def load(words: Sequence[str]) -> Comparison:
    """Read the runs that `words` mean and group them. A damaged run among several is left out with a note; a single one is an error."""
    paths = find(words)
    entries, notes = [], []
    for path in paths:
        try:
            entries.append(read(path))
        except (OneTorchError, OSError) as error:
            if len(paths) == 1:
                raise
            notes.append(f"{path} is left out: {error}")
    if not entries:
        raise UsageError(f"not one of {len(paths)} runs can be read; {notes[0]}")
    return group(entries, notes)


def group(entries: list[Entry], notes: Sequence[str] = ()) -> Comparison:
    """Group runs that differ only in seed, and name each group by the fields in which it differs from others."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        key = json.dumps({n: v for n, v in entry.config.items() if n.rpartition(".")[2] != "seed"}, sort_keys=True)
        groups.setdefault(key, []).append(entry)
    heads = [members[0].config for members in groups.values()]
    # A field counts as varying where groups of the same algorithm differ in it: fields that only one algorithm has say nothing more than its name.
    seen: dict[str, dict[str, set[str]]] = {}
    for head in heads:
        for name, value in head.items():
            if name.rpartition(".")[2] != "seed":
                kind = "" if name == "algorithm" else head["algorithm"]
                seen.setdefault(name, {}).setdefault(kind, set()).add(json.dumps(value))
    varying = [name for name, kinds in seen.items() if any(len(values) > 1 for values in kinds.values())]
    made = []
    for members, head in zip(groups.values(), heads, strict=True):
        values = {n: head[n] for n in varying if n in head}
        name = " ".join(show(v) if n == "algorithm" else f"{n}={_short(v)}" for n, v in values.items())
        made.append(Group(name or str(members[0].record.get("recipe", members[0].name)), values, tuple(sorted(members, key=lambda e: _order(e.seed)))))
    made.sort(key=lambda g: [_order(g.values.get(n)) for n in varying])
    names: dict[str, int] = {}
    for place, one in enumerate(made):
        names[one.name] = names.get(one.name, 0) + 1
        if names[one.name] > 1:
            made[place] = Group(f"{one.name} ({names[one.name]})", one.values, one.entries)
    return Comparison(entries, made, varying, list(notes))


def _order(value: Any) -> list[tuple[int, float, str]]:
    """Numbers by size, then all else by text with the numbers in it by size; values of different types in one field are no error."""
    if isinstance(value, int | float):
        return [(0, float(value), "")]
    words = re.split(r"(\d+(?:\.\d+)?)", json.dumps(value))
    return [(1, float(word), "") if place % 2 else (2, 0.0, word) for place, word in enumerate(words)]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value)


def show(value: Any, width: int = 40) -> str:
    """A config's JSON value as short text.

    >>> show([64, 64]), show(None), show(0.001)
    ('[64,64]', 'none', '0.001')
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False) if isinstance(value, list) else {None: "none", True: "true", False: "false"}.get(value)
    text = str(value) if text is None or (type(value) in (int, float)) else text
    return text if len(text) <= width else f"{text[: width // 2]}…{text[-(width - width // 2 - 1) :]}"


def quantities(entries: Sequence[Entry]) -> list[str]:
    """The logged quantities with at least two points in some run, in the order they were first logged."""
    names: dict[str, None] = {}
    for entry in entries:
        names |= dict.fromkeys(n for n, c in entry.columns.items() if len(c.values) > 1)
    return list(names)


def main_result(entries: Sequence[Entry], y: str | None = None) -> str | None:
    """The quantity by which runs are compared: `y`, else the first number of the evaluations' results, else the first that was logged, else None."""
    known: dict[str, None] = {}
    for entry in entries:
        known |= dict.fromkeys(n for n, v in entry.record["result"].items() if type(v) in (int, float))
    for entry in entries:
        known |= dict.fromkeys(entry.columns)
    if y is not None and y not in known:
        raise UsageError(f"no run has a quantity {y!r}{nearest(y, known)}; there are {', '.join(known)}")
    return y or next(iter(known), None)


def smaller_is_better(y: str) -> bool:
    """A guess from the name, to be said wherever it is used.

    >>> smaller_is_better("val_loss"), smaller_is_better("return"), smaller_is_better("lossless")
    (True, False, False)
    """
    return any(word in SMALLER_IS_BETTER for word in y.lower().replace("-", "_").replace("/", "_").replace(".", "_").split("_"))


def on_grid(columns: Sequence[Column], clock: str, points: int) -> tuple[Array, Array] | None:
    """(x (T,), values (n, T)) of n curves on one grid, or None where they share no stretch.

    The grid ends where the shortest curve does: nothing is extrapolated. Curves with the same x of at most `points` points are taken as they are, others are
    interpolated linearly at `points` equal distances.
    """
    xs = [c.x(clock) for c in columns]
    if len(xs[0]) <= points and all(np.array_equal(xs[0], x) for x in xs[1:]):
        return xs[0], np.stack([c.values for c in columns])
    begin, end = max(x[0] for x in xs), min(x[-1] for x in xs)
    if not end > begin:
        return None
    grid = np.linspace(begin, end, points)
    return grid, np.stack([np.interp(grid, x, c.values) for x, c in zip(xs, columns, strict=True)])


def thin(column: Column, points: int) -> Column:
    """At most `points` of a curve's points, the first and last among them, and of each stretch between its lowest and highest: no spike is lost."""
    n = len(column.values)
    if n <= points or points < 4:
        return column if n <= points else _take(column, np.unique(np.linspace(0, n - 1, points).astype(int)))
    edges = np.linspace(1, n - 1, (points - 2) // 2 + 1).astype(int)
    stretch = [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]
    kept = {0, n - 1}
    for part in stretch:
        kept |= {part.start + int(np.argmin(column.values[part])), part.start + int(np.argmax(column.values[part]))}
    return _take(column, np.array(sorted(kept)))


def _take(column: Column, index: Any) -> Column:
    return Column(column.steps[index], column.seconds[index], column.values[index])


@dataclass(frozen=True)
class Effect:
    """What changing one field did to the result: value `after` against `before`, all else alike; for a field of many values the rank correlation."""

    name: str
    before: Any
    after: Any
    change: Estimate
    blocks: int  # settings of the other fields in which both values stand; 0 for a correlation

    @property
    def matters(self) -> bool | None:
        """Whether the interval leaves out zero; None without an interval."""
        if self.change.low is None or self.change.high is None:
            return None
        return self.change.low > 0 or self.change.high < 0


def effects(comparison: Comparison, y: str) -> tuple[list[Effect], list[str]]:
    """The effect of every varying field on `y`, the largest first, and the fields whose effect cannot be told from these runs.

    Two values of a field are compared in the settings of all other fields where both stand (blocks), so that what differs beside the field does not count as
    its effect. Each value is held against the one that stands in most groups.
    """
    groups = [(g.values, o) for g in comparison.groups if (o := g.outcomes(y)).size]
    found: list[Effect] = []
    untold: list[str] = []
    for name in comparison.varying:
        cells: dict[str, dict[str, Array]] = {}  # other fields' values to this field's value to outcomes
        values: dict[str, Any] = {}
        for setting, outcomes in groups:
            if name in setting:
                key = json.dumps(setting[name])
                values[key] = setting[name]
                cells.setdefault(json.dumps({k: v for k, v in setting.items() if k != name}, sort_keys=True), {})[key] = outcomes
        often = sorted(values, key=lambda k: (-sum(k in cell for cell in cells.values()), _order(values[k])))
        told = False
        for key in sorted(often[1:], key=lambda k: _order(values[k])):
            blocks = [(cell[often[0]], cell[key]) for cell in cells.values() if key in cell and often[0] in cell]
            if blocks and len(values) <= VALUES:
                found.append(Effect(name, values[often[0]], values[key], stats.difference(blocks), len(blocks)))
                told = True
        numbers = [(s[name], o.mean()) for s, o in groups if type(s.get(name)) in (int, float)]
        if not told and len({x for x, _ in numbers}) >= 4:
            x, out = np.array(numbers, dtype=np.float64).T
            found.append(Effect(name, x.min(), x.max(), stats.rank_correlation(x, out), 0))
            told = True
        if not told:
            untold.append(name)
    return sorted(found, key=lambda e: (e.blocks == 0, -abs(e.change.value))), untold
