"""A sweep: one run for each combination of several values for some fields of a config. Imports no torch.

    sweep.json   recipe, grid, trials (id, values, config), options      run.lock     held while a sweep runs here
    source.py    the algorithm's file, when it is a user's own           output.txt   what the process that starts the trials printed
    3fa9c1d204/  a run like any other, with its output in output.txt

A trial's id is a hash of its recipe, its whole config and the fixed choices of the speed plan, and the name of its folder. So the same command finds the same
trials, in whatever order its values stand: what is done is skipped, what was stopped or killed goes on, what failed is tried once more.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from onetorch.runs import algorithm, folder
from onetorch.runs import config as configs
from onetorch.runs.errors import OneTorchError, RunError, Stopped, UsageError
from onetorch.runs.nursery import Code, Nursery, Order
from onetorch.runs.provenance import cores
from onetorch.runs.sweep_view import View, past, tail

ATTEMPTS = 3  # in one command, of a trial that a signal keeps killing
ALONE = 5.0  # seconds that the first trial has for itself, to measure the speed plan that the others take from the cache
GRACE = 25.0  # seconds that trials have to save and leave after a stop signal; a run's own limit is 18
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

Grid = dict[str, list[Any]]


# -- the grid ----------------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Trial:
    """One run of a sweep."""

    id: str
    values: dict[str, Any]  # of the fields in which the sweep's trials differ, as JSON
    config: dict[str, Any]  # the whole config, as JSON
    folder: Path
    state: str = "waiting"  # or running, done, failed, stopped, killed
    why: str = ""  # it failed
    result: dict[str, Any] = dataclasses.field(default_factory=dict)  # what `evaluate` returned
    seconds: float = 0.0  # of wall-clock time in all

    @property
    def name(self) -> str:
        """Its values as one reads them."""
        return " ".join(f"{k}={configs.text(v)}" for k, v in self.values.items())


def values(texts: Sequence[str], kind: Any) -> list[Any]:
    """The values of type `kind` that the words after a flag mean; ValueError says what is wrong with one.

    >>> values(["0..3"], int), values(["1e-3", "0.1"], float), values(["[64,64]", "[8]"], tuple[int, ...])
    ([0, 1, 2, 3], [0.001, 0.1], [(64, 64), (8,)])
    """
    found: list[Any] = []
    for text in texts:
        ends = configs.RANGE.fullmatch(text)
        if ends and configs.type_name(kind).partition("|")[0] == "int":
            first, last = int(ends[1]), int(ends[2])
            if last < first:
                raise ValueError(f"{text} is empty: a range goes from the smaller to the larger, both included")
            found += range(first, last + 1)
            continue
        if len(texts) > 1 and configs.type_name(kind).startswith("[") and text[:1] not in ("[", "("):
            raise ValueError(f"expected lists such as [64,64] [32], got {text!r}")
        found.append(configs.parse(text, kind))
    for i, value in enumerate(found):
        if value in found[:i]:
            raise ValueError(f"{configs.text(value)} is given twice")
    return found


def identity(recipe: str, config: dict[str, Any], plan: dict[str, str]) -> str:
    """The id of a trial: ten hexadecimal digits of a hash of all that decides its result."""
    content = json.dumps([recipe, config, plan], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:10]


@dataclasses.dataclass
class Sweep:
    """What is to be run: the trials of one recipe in one folder."""

    folder: Path
    recipe: str
    target: str  # how the command line calls it: a name or a path
    source: algorithm.Algorithm
    plan: dict[str, str]
    trials: list[Trial]

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The values of each field in which the trials differ."""
        found: dict[str, list[Any]] = {}
        for trial in self.trials:
            for name, value in trial.values.items():
                if value not in found.setdefault(name, []):
                    found[name].append(value)
        return found

    @property
    def command(self) -> str:
        """The command that begins this sweep, and goes on with it."""
        words = ["onetorch", "sweep", self.target]
        common = {k: v for k, v in self._given().items() if k not in self.grid}
        for name, several in {**{k: [v] for k, v in common.items()}, **self.grid}.items():
            words += [f"--{name}", *map(configs.text, several)]
        if self.plan:
            words += ["--plan", ",".join(f"{k}={v}" for k, v in self.plan.items())]
        return shlex.join([*words, "--dir", str(self.folder)])

    def _given(self) -> dict[str, Any]:
        """The fields in which the first trial differs from the algorithm's defaults."""
        first, plain = self.trials[0].config, configs.to_json(self.source.Config())
        return {name: _get(first, name) for name, _ in configs.leaves(self.source.Config) if _get(first, name) != _get(plain, name)}

    def words(self, trial: Trial) -> list[str]:
        """The command that makes this trial's run by itself."""
        words = ["onetorch", "train", self.target]
        plain = configs.to_json(self.source.Config())
        for name, _ in configs.leaves(self.source.Config):
            if name in trial.values or _get(trial.config, name) != _get(plain, name):
                words += [f"--{name}", configs.text(_get(trial.config, name))]
        return words + (["--plan", ",".join(f"{k}={v}" for k, v in self.plan.items())] if self.plan else [])


def _get(config: dict[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part]
    return config


def design(
    source: algorithm.Algorithm, base: Any, grid: Grid, *, recipe: str, target: str, plan: dict[str, str] | None = None, dir: str | Path | None = None
) -> Sweep:
    """The sweep over every combination of the values in `grid` (field to values of its type) around the config `base`.

    Without `dir` the folder's name follows from the trials. UsageError names the first value that the config refuses.
    """
    plan = dict(sorted((plan or {}).items()))
    if any(not several for several in grid.values()):
        raise UsageError(f"--{next(n for n, several in grid.items() if not several)}: expected values, got none")
    trials = []
    for combination in itertools.product(*grid.values()):
        chosen = dict(zip(grid, combination, strict=True))
        try:
            config = configs.to_json(configs.replace(base, chosen))
        except UsageError as error:
            raise UsageError(f"{' '.join(f'--{k} {configs.text(v)}' for k, v in chosen.items())}: {error}") from error
        trials.append(Trial(identity(recipe, config, plan), {k: configs.to_json(v) for k, v in chosen.items()}, config, Path()))
    if dir is None:
        dir = Path("runs") / f"sweep-{recipe}-{hashlib.sha256(' '.join(sorted(t.id for t in trials)).encode()).hexdigest()[:8]}"
    for trial in trials:
        trial.folder = Path(dir) / trial.id
    return Sweep(Path(dir), recipe, target, source, plan, trials)


def is_sweep(path: Path) -> bool:
    """Whether a sweep was begun in the folder `path`."""
    return (path / "sweep.json").exists()


def load(path: Path) -> Sweep:
    """The sweep in a folder with all trials it ever had; their states are those of the last look."""
    data = folder.read_json(path / "sweep.json")
    try:
        source = algorithm.read(data["algorithm"].rpartition(".")[2]) if data["algorithm"] != "source.py" else algorithm.read(path / "source.py")
        trials = [Trial(t["id"], t["values"], t["config"], path / t["id"]) for t in data["trials"]]
        made = Sweep(path, data["recipe"], data["target"], source, dict(data["options"]["plan"]), trials)
        for trial in trials:
            configs.from_json(trial.config, source.Config, f"{path / 'sweep.json'}: trial {trial.id}")
            if trial.id != identity(made.recipe, trial.config, made.plan):
                raise RunError(f"{path / 'sweep.json'} is damaged: the trial {trial.id} has another config than its id says; restore it from a copy")
    except (LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path / 'sweep.json'} is damaged ({type(error).__name__}: {error}); restore it from a copy") from error
    for trial in trials:
        look(trial)
    return made


def look(trial: Trial) -> None:
    """Read from the trial's folder how it stands."""
    trial.why = ""
    if not folder.holds_run(trial.folder):
        trial.state = "waiting"
        return
    try:
        record = folder.read_json(trial.folder / "run.json")
        trial.state = folder.status(trial.folder, record)
        trial.result = dict(record["result"])
        trial.seconds = float(record["cost"]["seconds"])
        trial.why = str(record.get("why", "")) if trial.state == "failed" else ""
    except (OneTorchError, LookupError, TypeError, ValueError) as error:
        trial.state, trial.why = "failed", f"its record is damaged: {error}"


def _write(made: Sweep, slots: int, on: str | None) -> None:
    """Write sweep.json, keeping trials of earlier commands. Raises UsageError where the folder's sweep is another one."""
    path, source = made.folder / "sweep.json", made.source
    text = source.path.read_bytes()
    if path.exists():
        old = load(made.folder)
        digest = folder.read_json(path).get("sha256")
        what = [
            f"it is a sweep of {old.recipe}, not of {made.recipe}" if old.recipe != made.recipe else "",
            f"its plan is {_plan(old.plan)}, not {_plan(made.plan)}" if old.plan != made.plan else "",
            f"{source.path} has changed since it was begun" if digest != hashlib.sha256(text).hexdigest() else "",
        ]
        if any(what):
            raise UsageError(f"{made.folder} cannot go on: {'; '.join(filter(None, what))}. Choose another --dir")
        trials = list({t.id: t for t in [*old.trials, *made.trials]}.values())
    else:
        trials = made.trials
        if source.module is None:
            temporary = made.folder / ".source.py.new"
            temporary.write_bytes(text)
            temporary.replace(made.folder / "source.py")
    names = [n for n, _ in configs.leaves(source.Config) if n in made.grid or any(_get(t.config, n) != _get(trials[0].config, n) for t in trials)]
    entry = {
        "format": folder.FORMAT,
        "recipe": made.recipe,
        "target": made.target,
        "algorithm": source.module or "source.py",
        "sha256": hashlib.sha256(text).hexdigest(),
        "grid": {n: list({json.dumps(_get(t.config, n)): _get(t.config, n) for t in trials}.values()) for n in names},
        "options": {"plan": made.plan, "slots": slots, "on": on or "here"},
        "command": made.command,
        "trials": [{"id": t.id, "values": {n: _get(t.config, n) for n in names}, "config": t.config} for t in trials],
    }
    folder.write_json(path, entry)


def _plan(plan: dict[str, str]) -> str:
    return ",".join(f"{k}={v}" for k, v in plan.items()) or "measured"


# -- running it --------------------------------------------------------------------------------------------------------------------------------


class Host(Protocol):
    """Where trials run: `nursery.Nursery` on this machine, `cluster.Cluster` on Ray."""

    def start(self, order: Order, slot: int) -> None: ...
    def wait(self, timeout: float) -> list[tuple[str, int]]: ...
    def tell(self, number: int) -> None: ...
    def idle(self, slot: int) -> None: ...
    def close(self) -> None: ...


def run(
    recipe: Any,
    grid: dict[str, Any],
    *,
    dir: str | Path | None = None,
    slots: int | None = None,
    plan: dict[str, Any] | None = None,
    on: str | None = None,
    time_limit: float | None = None,
    checkpoint_seconds: float | None = None,
    quiet: bool = False,
) -> list[Trial]:
    """Run a sweep and return its trials, whatever became of them.

        trials = sweep.run("ppo", {"lr": [1e-3, 3e-4], "seed": range(5), "total_steps": 100_000})

    Args:
        recipe: the name of an algorithm, the path of a file of yours, or a recipe (`onetorch.recipes.find("…")`).
        grid: field to a list or range of values, or to the one value that all trials have.
        dir, slots, plan, on, time_limit, checkpoint_seconds: as the options of `onetorch sweep`.

    Raises UsageError before anything starts, and Stopped after a stop signal or the time limit, when all trials have saved.
    """
    if isinstance(recipe, str | Path):
        source = algorithm.read(recipe)
        name, base = source.name, configs.replace(source.Config(), {})
    else:
        source = algorithm.read(recipe.algorithm)
        name, base = recipe.name, recipe(source.Config)
    kinds = dict(configs.leaves(source.Config))
    several: Grid = {}
    for field, given in grid.items():
        if field not in kinds:
            raise UsageError(f"{name} has no field {field!r}{configs.nearest(field, kinds)}; `onetorch show {name}` lists them")
        listed = list(given) if isinstance(given, list | range) else [given]
        several[field] = [configs.from_json(configs.to_json(value), kinds[field], field) for value in listed]
        if any(value in several[field][:i] for i, value in enumerate(several[field])):
            raise UsageError(f"{field}: a value is given twice")
    made = design(source, base, several, recipe=name, target=str(recipe) if isinstance(recipe, str | Path) else name, plan=_texts(plan), dir=dir)
    return execute(made, slots=slots, on=on, time_limit=time_limit, checkpoint_seconds=checkpoint_seconds, quiet=quiet)


def _texts(plan: dict[str, Any] | None) -> dict[str, str]:
    return {k: str(v) for k, v in (plan or {}).items()}


def execute(
    made: Sweep,
    *,
    slots: int | None = None,
    on: str | None = None,
    time_limit: float | None = None,
    checkpoint_seconds: float | None = None,
    quiet: bool = False,
) -> list[Trial]:
    """Run what `made` lacks. See `run`."""
    if slots is not None and slots < 1:
        raise UsageError(f"--slots: expected a number of trials at a time, at least 1, got {slots}")
    if on is not None and on != "ray" and not on.startswith("ray:"):
        raise UsageError(f"--on: expected ray or ray:ADDRESS, got {on!r}")
    where = made.folder
    if where.exists() and not where.is_dir():
        raise UsageError(f"{where} is a file; a sweep needs a folder of its own")
    if folder.holds_run(where):
        raise UsageError(f"{where} holds a run; a sweep needs a folder of its own, choose another --dir")
    ours = ("run.lock", "source.py", "output.txt")
    if where.is_dir() and not is_sweep(where) and (foreign := [p.name for p in where.iterdir() if p.name not in ours and not p.name.startswith(".")]):
        raise UsageError(f"{where} is not empty ({foreign[0]} stands in it); a sweep needs a folder of its own")
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(folder.explain(error, where)) from error
    lock = folder.Lock(where)
    try:
        return _execute(made, slots, on, time_limit, checkpoint_seconds, quiet)
    finally:
        lock.release()


def _execute(made: Sweep, slots: int | None, on: str | None, time_limit: float | None, checkpoint_seconds: float | None, quiet: bool) -> list[Trial]:
    for trial in made.trials:
        look(trial)
    before = {t.id: t.state for t in made.trials}
    todo = [t for t in made.trials if t.state != "done"]
    code = Code(made.recipe, made.source.module, str(made.source.path), None if made.source.module else str((made.folder / "source.py").resolve()))
    host: Host
    shares: list[dict[str, Any]]
    if on:
        from onetorch.runs.cluster import Cluster

        host = cluster = Cluster(code, made.folder / "output.txt", on.partition(":")[2] or None, slots, len(todo), made.plan)
        shares, place = cluster.shares, cluster.place
    else:
        host = Nursery(code, made.folder / "output.txt")
        shares, place = _shares(slots, len(todo), made.plan)
    try:
        _write(made, len(shares), on)
        view = View(made, len(shares), quiet)
        view.introduce(place, before, past(made.recipe, dict.fromkeys((Path("runs"), made.folder.parent, made.folder))))
        with view:
            stop = _loop(made, todo, host, shares, view, time_limit, checkpoint_seconds)
    finally:
        host.close()
    if stop:
        raise Stopped(*stop)
    return made.trials


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here: its own entries where it is set, else the GPUs that the driver lists. Imports no torch, wakes no GPU."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def _shares(slots: int | None, trials: int, plan: dict[str, str]) -> tuple[list[dict[str, Any]], str]:
    """What each slot may use (fields of `Order`), and that in words."""
    cards = [] if plan.get("device") == "cpu" else gpus()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(cores()))
    asked = int(plan["threads"]) if plan.get("threads", "").isdigit() else 0
    if slots is None:
        slots = max(1, min(len(cards) if cards else len(usable) // max(asked, 1), trials))
    width = max(1, len(usable) // slots)
    shares = []
    for slot in range(slots):
        bound = [usable[(slot * width + i) % len(usable)] for i in range(width)]
        shares.append(
            {"threads": asked or width, "cores": bound if max(asked, 1) <= width else None, "gpu": cards[slot % len(cards)] if cards else None}
        )  # fmt: skip
    words = f"{slots} at a time, each with {asked or width} thread{'s' * ((asked or width) > 1)}"
    if cards:
        words += f" and one of {len(cards)} GPU{'s' * (len(cards) > 1)}"
    return shares, words


def _loop(
    made: Sweep, todo: list[Trial], host: Host, shares: list[dict[str, Any]], view: View, time_limit: float | None, checkpoint_seconds: float | None
) -> tuple[str, int] | None:
    """Start trials while slots are free, hear how they end; returns why it stopped early, if it did."""
    queue, running, free = list(todo), dict[str, tuple[Trial, int]](), list(range(len(shares)))
    attempts = dict.fromkeys((t.id for t in todo), 0)
    start, started = time.monotonic(), 0
    pilot: tuple[Trial, float] | None = None  # the first trial and when it began, as long as it is alone
    stop: tuple[str, int] | None = None
    told, deadline = 0, math.inf
    came: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, lambda n, _: came.append(n)) for number in SIGNALS}
    try:
        while running or (queue and not stop):
            if not came and stop is None and time_limit is not None and time.monotonic() - start > time_limit:
                stop = ("the time limit is reached", 0)
                host.tell(signal.SIGTERM)
                deadline = time.monotonic() + GRACE
            while told < len(came):  # the second one reaches the trials too, and makes them leave at once
                number = came[told]
                told += 1
                stop = (f"{signal.Signals(number).name} came", 128 + number)
                host.tell(number)
                deadline = time.monotonic() + GRACE
                view.say(f"{signal.Signals(number).name}: every trial finishes its step, saves and stops (once more: at once)")
            if time.monotonic() > deadline:
                host.tell(signal.SIGKILL)
            if pilot and (pilot[0].state != "running" or time.monotonic() - pilot[1] > ALONE or _on_its_way(pilot[0])):
                pilot = None
            while queue and free and not stop and not pilot:
                trial, slot = queue.pop(0), free.pop(0)
                running[trial.id] = (trial, slot)
                attempts[trial.id] += 1
                trial.state = "running"
                view.started(trial)
                where = str(trial.folder.resolve())
                host.start(Order(trial.id, where, trial.config, made.words(trial), made.plan, checkpoint_seconds=checkpoint_seconds, **shares[slot]), slot)
                if not started:
                    pilot = (trial, time.monotonic())
                started += 1
            for id, code in host.wait(0.02 if pilot else 0.1):
                trial, slot = running.pop(id)
                free.append(slot)
                _judge(trial, code)
                if trial.state in ("killed", "stopped") and not stop and attempts[id] < ATTEMPTS:
                    queue.append(trial)
                view.ended(trial, again=trial in queue)
            if not queue:
                for slot in free:
                    host.idle(slot)
            view.update()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return stop


def _on_its_way(trial: Trial) -> bool:
    """Whether the trial has begun its loop, and so has its speed plan."""
    try:
        return bool(json.loads((trial.folder / "run.json").read_bytes())["progress"]["total"])
    except (OSError, ValueError, LookupError, TypeError):
        return False  # not yet


def _judge(trial: Trial, code: int) -> None:
    """Put down how a trial that has ended stands: its record says it, unless it could not."""
    look(trial)
    if trial.state == "done":
        return
    if code < 0:
        trial.state, trial.why = "killed", f"by {_signal_name(-code)}"
    elif code in {128 + number for number in SIGNALS}:
        trial.state = "stopped"
    elif trial.state != "failed":
        trial.state = "failed"
    if trial.state == "failed" and not trial.why:
        known = {UsageError.exit_code, RunError.exit_code}  # after these the last line says why
        trial.why = (_last_line(trial.folder / "output.txt") if code in known else "") or f"it left with code {code} before it was done"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(path: Path) -> str:
    end = tail(path).decode(errors="replace").strip()
    return end.rpartition("\n")[2].removeprefix("onetorch: ")[:300]
