"""What a person sees of a sweep: a forecast of its cost before it starts, then a live table of all trials, or plain lines. Imports no torch."""

import dataclasses
import json
import socket
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onetorch.runs import config as configs
from onetorch.runs import folder
from onetorch.runs.errors import OneTorchError
from onetorch.runs.progress import LINE_SECONDS, clock
from onetorch.runs.provenance import processor

if TYPE_CHECKING:
    from onetorch.runs.sweep import Sweep, Trial

LOOK = 1.0  # seconds between two looks into the running trials' folders
FRAME = 5  # lines of the table that are not trials
PAST = 300  # the newest runs that a forecast looks at
LENGTHS = ("total_steps", "steps")  # the fields that say how long a run is


@dataclasses.dataclass(frozen=True)
class Past:
    """A finished run of the same recipe on this machine."""

    config: dict[str, Any]
    seconds: float


def past(recipe: str, places: Iterable[Path]) -> list[Past]:
    """The finished runs of `recipe` on this machine in the folders `places` and in the sweeps there."""
    found: dict[Path, float] = {}
    for place in places:
        for path in [*place.glob("*/run.json"), *place.glob("*/*/run.json")] if place.is_dir() else []:
            found[path.resolve()] = path.stat().st_mtime
    runs = []
    host, chip = socket.gethostname(), processor()
    for path in sorted(found, key=lambda p: -found[p])[:PAST]:
        try:
            record = folder.read_json(path)
            here = record["hardware"]["host"] == host and record["hardware"]["processor"] == chip
            if record["recipe"] == recipe and record["status"] == "done" and here:
                runs.append(Past(folder.read_json(path.with_name("config.json"))["config"], float(record["cost"]["seconds"])))
        except (OneTorchError, LookupError, TypeError, ValueError):
            continue  # a damaged run tells nothing; `onetorch runs` names it
    return runs


def estimate(config: dict[str, Any], known: Sequence[Past]) -> float | None:
    """The seconds that a run of `config` should take: of those that differ from it in the fewest fields the median, in proportion to the length."""
    if not known:
        return None
    apart = [sum(config.get(k) != v for k, v in p.config.items() if k not in ("seed", *LENGTHS)) for p in known]
    nearest = [p for p, n in zip(known, apart, strict=True) if n == min(apart)]
    return statistics.median(p.seconds * _length(config) / _length(p.config) for p in nearest)


def _length(config: dict[str, Any]) -> float:
    return next((float(config[n]) for n in LENGTHS if isinstance(config.get(n), int | float) and config[n] > 0), 1.0)


def tail(path: Path, size: int = 4096) -> bytes:
    """The last bytes of a file, none where it is not there."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - size))
            return file.read()
    except OSError:
        return b""


def took(seconds: float) -> str:
    """
    >>> took(0.234), took(75)
    ('0.2 s', '1 min 15 s')
    """
    return f"{seconds:.1f} s" if seconds < 10 else clock(seconds)


def number(values_: dict[str, Any]) -> str:
    """The first number of a result or a row of metrics, with its name."""
    return next((f"{k} {v:.4g}" for k, v in values_.items() if isinstance(v, int | float) and not isinstance(v, bool)), "")


class View:
    """The sweep on a terminal as a live table of all trials, elsewhere as plain lines; on standard error."""

    def __init__(self, made: "Sweep", slots: int, quiet: bool) -> None:
        self.made, self.slots, self.quiet = made, slots, quiet
        self.live: Any = None
        self.known: list[Past] = []
        self.begun: dict[str, float] = {}
        self.at: dict[str, tuple[float, str]] = {}  # fraction done and number of running trials
        self.took: list[Past] = []
        self.looked = self.shown = 0.0
        self.left = (0.0, "")  # when it was worked out, and the text

    def say(self, text: str) -> None:
        """One line to the person at the terminal."""
        if self.live:
            self.live.console.print(text, highlight=False, markup=False)
        elif not self.quiet:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def introduce(self, place: str, before: dict[str, str], known: list[Past]) -> None:
        """The grid, what is there already, and what the rest will cost."""
        made, count = self.made, len(self.made.trials)
        self.say(f"sweep: {made.recipe}, {count} trial{'s' * (count > 1)} in {made.folder}")
        grid = made.grid
        for name, several in grid.items():
            self.say(f"  {name.ljust(max(map(len, grid)))}  {' '.join(map(configs.text, several))}")
        states = list(before.values())
        kinds = {"done": "done before", "stopped": "to go on", "killed": "to go on", "running": "to go on", "failed": "to be tried once more", "waiting": "new"}
        counts: dict[str, int] = {}
        for state in states:
            counts[kinds.get(state, state)] = counts.get(kinds.get(state, state), 0) + 1
        if counts.keys() != {"new"}:
            self.say("  " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
        left = [t for t in made.trials if t.state != "done"]
        if not left:
            return
        self.say(f"  {place}")
        self.known = known
        each = [estimate(t.config, known) for t in left]
        if known:
            runs = f"{len(known)} finished run{'s' * (len(known) > 1)} of {made.recipe} on this machine"
            self.say(f"forecast: {self._forecast([e or 0.0 for e in each])} (from {runs})")
        else:
            self.say(f"forecast: no finished run of {made.recipe} on this machine is known; the first trial that is done will tell")

    def _forecast(self, each: list[float]) -> str:
        total = sum(each)
        return f"{took(max(total / self.slots, max(each)))} in all, {took(total)} of trials ({len(each)} of about {took(total / len(each))})"

    def __enter__(self) -> "View":
        self.shown = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), auto_refresh=False, vertical_overflow="ellipsis")
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.vertical_overflow = "visible"
            self.live.update(self._table(len(self.made.trials) + FRAME), refresh=True)
            self.live.stop()
            self.live = None

    def started(self, trial: "Trial") -> None:
        self.begun[trial.id] = time.monotonic()
        self.at.pop(trial.id, None)

    def ended(self, trial: "Trial", again: bool) -> None:
        """Say how a trial ended."""
        self.begun.pop(trial.id)
        self.at.pop(trial.id, None)
        if trial.state == "done":
            self.took.append(Past(trial.config, trial.seconds))
            later = [estimate(t.config, self.took) or 0.0 for t in self.made.trials if t.state in ("waiting", "running")]
            if len(self.took) == 1 and not self.known and later:
                self.say(f"forecast: {self._forecast(later)} (from the first trial)")
        if not self.live:
            what = ", ".join(filter(None, [trial.state, trial.why or number(trial.result)]))
            self.say(f"{self._count()} {trial.id} {trial.name}: {what} ({took(trial.seconds)}){'; goes on later' * again}{self._left()}")
            self.shown = time.monotonic()

    def _count(self) -> str:
        return f"[{sum(t.state == 'done' for t in self.made.trials)}/{len(self.made.trials)}]"

    def update(self) -> None:
        """Look at the running trials and show them, when it is time to."""
        now = time.monotonic()
        if self.quiet or now - self.looked < (LOOK if self.begun else 0.0):
            return
        self.looked = now
        for trial in self.made.trials:
            if trial.id in self.begun:
                self.at[trial.id] = _progress(trial)
        if self.live:
            self.live.update(self._table(self.live.console.height - 2), refresh=True)
        elif now - self.shown > LINE_SECONDS and self.begun:
            self.shown = now
            running = ", ".join(f"{id} {100 * f:.0f} %" for id, (f, _) in list(self.at.items())[:8])
            self.say(f"{self._count()} running: {running}{self._left()}")

    def _left(self) -> str:
        """The time left in all, in words; empty where nothing is known yet. Worked out at most once a second: it looks at every trial."""
        if time.monotonic() - self.left[0] > LOOK or not self.left[1]:
            self.left = (time.monotonic(), self._time_left())
        return self.left[1] if any(t.state in ("waiting", "running") for t in self.made.trials) else ""

    def _time_left(self) -> str:
        known = self.took or self.known
        now, total, longest = time.monotonic(), 0.0, 0.0
        speeds = [(now - self.begun[i]) / f for i, (f, _) in self.at.items() if f > 0.05 and i in self.begun]
        guess = statistics.median(speeds) if speeds else None
        for trial in self.made.trials:
            if trial.state not in ("waiting", "running") and not (trial.state in ("killed", "stopped") and trial.id in self.begun):
                continue
            whole = estimate(trial.config, known)
            whole = guess if whole is None else whole
            if whole is None:
                return ""
            seconds = whole
            if trial.id in self.begun:
                spent, (fraction, _) = now - self.begun[trial.id], self.at.get(trial.id, (0.0, ""))
                seconds = spent / fraction * (1 - fraction) if fraction > 0.05 else max(whole - spent, 0.0)
            total, longest = total + seconds, max(longest, seconds)
        return f"; {took(max(total / self.slots, longest))} left" if total else ""

    def _table(self, room: int) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        order = {"running": 0, "failed": 1, "killed": 2, "stopped": 3, "waiting": 4, "done": 5}
        rows = self.made.trials
        if room < len(rows) + FRAME:
            rows = sorted(rows, key=lambda t: order.get(t.state, 6))
        shown = rows[: max(room - FRAME, 1)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("trial", *self.made.grid, "state", "progress", "number", "time"):
            table.add_column(column, no_wrap=True, min_width=10 if column == "trial" else None)
        colours = {"running": "cyan", "done": "green", "failed": "red", "killed": "red", "stopped": "yellow"}
        for trial in shown:
            fraction, shown_number = self.at.get(trial.id, (0.0, ""))
            fraction = 1.0 if trial.state == "done" else fraction
            seconds = time.monotonic() - self.begun[trial.id] if trial.id in self.begun else trial.seconds
            bar = ("━" * round(8 * fraction)).ljust(8, "╌") + f" {100 * fraction:3.0f} %" if fraction else ""
            said = trial.why[:60] if trial.state in ("failed", "killed") else number(trial.result) if trial.state == "done" else shown_number
            cells = [trial.id, *map(configs.text, trial.values.values()), trial.state, bar, said, took(seconds) if seconds else ""]
            table.add_row(*(Text(cell, colours.get(trial.state, "") if cell == trial.state else "") for cell in cells))
        counts = ", ".join(f"{n} {s}" for s in order if (n := sum(t.state == s for t in self.made.trials)))
        more = f"; {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
        table.caption = counts + more + self._left()
        table.caption_justify = "left"
        return table


def _progress(trial: "Trial") -> tuple[float, str]:
    """(fraction done, first number of the last row) of a running trial, from its folder."""
    *_, last, _ = [b"", b"", *tail(trial.folder / "metrics.jsonl").split(b"\n")]
    try:
        row = json.loads(last)
        progress = json.loads((trial.folder / "run.json").read_bytes())["progress"]
        fraction = min(row["step"] / (progress["total"] * progress.get("scale", 1)), 1.0)
        return fraction, number({k: v for k, v in row.items() if k not in ("step", *folder.TIMES)})
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):
        return 0.0, ""  # it has logged nothing yet
