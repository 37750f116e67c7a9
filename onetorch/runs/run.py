"""A run: one execution of an algorithm, and the folder that holds it.

The algorithm owns its loop and calls a few verbs; without the lines that say `run.` a correct program remains:

    state = run.restore(State(model, optimizer, …))
    for state.iteration in run.steps(state.iteration, total):
        …
        run.finite(loss=loss, grad_norm=norm)
        run.phase("update")
        run.log(step, loss=loss)
        run.checkpoint(state)
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shlex
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch

from onetorch.runs import checkpoint, distributed, folder, peak, plan, provenance, sealed, state, trust
from onetorch.runs.config import to_json
from onetorch.runs.errors import CheckpointError, NonFinite, RunError, Stopped, UsageError
from onetorch.runs.progress import Progress, clock

S = TypeVar("S")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 18.0  # seconds a step may still take after a stop signal; whoever sent it waits 20
CHECKPOINT_SECONDS = 10.0  # between two checkpoints, or …
CHECKPOINT_SHARE = 0.03  # … longer, so that saving takes at most this share of the time
INITIAL = "initial.safetensors"  # the weights that a run began from, where they were given
FLUSH_SECONDS = 0.5  # a row of metrics is in the file at most this much later


class Run:
    """One execution of an algorithm in `folder`.

    Args:
        folder: where the run stands or shall stand; created if need be.
        config: the algorithm's frozen dataclass; of a resumed run it must be the one it was begun with.
        recipe: the name the run goes by.
        algorithm, source: module (of onetorch's own) and path of the file that runs, else those of `config`'s class; a user's own file is copied into the
            folder, so that the folder is enough to go on.
        command: the words that repeat this run.
        weights: begin with these instead of the algorithm's own (names and shapes of its model's); `origin` is where they came from, for the record.
        fixed: choices of the speed plan that shall not be measured, as `--plan` takes them (`{"threads": "1"}`).
        threads: the most threads that the speed plan may choose, for a run that shares its machine with others.
        git: what `provenance.git` says of `source`, where that is known already.
        resume: go on with what stands in `folder`; else a folder that holds a run is refused.
        time_limit: seconds after which the run stops as if told to.
        checkpoint_seconds: least time between two checkpoints.
        explain: the times of phases are to be looked at: on a GPU `phase` waits until its work is done, so that it counts where it was asked for.
        quiet: show no progress.

    Use it in a `with` statement: leaving it records how the run ended and gives the folder free.

    Raises UsageError when the folder is in use, holds a run already or something else, RunError when it cannot be written.
    """

    def __init__(
        self,
        folder_: str | os.PathLike[str],
        config: Any,
        *,
        recipe: str | None = None,
        algorithm: str | None = None,
        source: Path | None = None,
        command: list[str] | None = None,
        weights: dict[str, torch.Tensor] | None = None,
        origin: dict[str, Any] | None = None,
        fixed: dict[str, str] | None = None,
        threads: int | None = None,
        git: tuple[dict[str, Any] | None, str] | None = None,
        resume: bool = False,
        time_limit: float | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        explain: bool = False,
        quiet: bool = False,
    ) -> None:
        self.folder = Path(folder_)
        self.config = config
        self.quiet = quiet
        self.iteration = 0
        self._total: int | None = None
        self._resume = resume
        self._threads = threads
        self._git = git
        self._limit = time_limit
        self._checkpoint_seconds = checkpoint_seconds
        self._stop: tuple[str, int] | None = None  # (why, exit code) once a signal or the time limit has come
        self._looping = False  # from the first iteration until the last state is saved
        self._handlers: dict[int, Any] = {}
        self._watchdog: threading.Timer | None = None
        self._state: Any = None
        self._saved: int | None = None  # iteration of the newest checkpoint
        self._save_cost = 0.0
        self._progress: Progress | None = None
        self._shown: dict[str, float] = {}
        self._rows: list[bytes] = []
        self._written = hashlib.sha256()  # of metrics.jsonl so far
        self._retiring: threading.Thread | None = None
        self._last_step: int | None = None
        self._logged = 0.0  # when the last row was, or the loop began
        self._peak: float | None = None
        self._flops = 0.0  # that `log` was told of in this process's loop
        self._phases: dict[str, float] = {}  # seconds of this process's loop
        self._loop = (0.0, 0.0)  # when the loop began and ended, on the clock of perf_counter
        self.first = 0  # iterations that were done when this process's loop began
        self._lap = time.perf_counter()
        self._wait = explain and torch.cuda.is_available()
        self._initialized = False
        self._given = (weights, origin)
        self._open(recipe, algorithm, source, command, fixed or {})
        self._start = self._saved_at = self._flushed = time.perf_counter()
        self._start_cpu = time.process_time()
        self._before = (0.0, 0.0)  # wall and CPU seconds spent before this process

    # -- the folder ------------------------------------------------------------------------------------------------------------------------

    def _open(self, recipe: str | None, algorithm: str | None, source: Path | None, command: list[str] | None, fixed: dict[str, str]) -> None:
        if not dataclasses.is_dataclass(self.config) or isinstance(self.config, type):
            raise UsageError(f"a run's config must be an instance of a dataclass, got {self.config!r}")
        path = self.folder
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; a run needs a folder of its own")
        if not self._resume:
            if folder.holds_run(path):
                raise folder.refuse(path)
            ours = ("run.lock", "run.json", "source.py", "git.diff", "media", "output.txt", INITIAL)  # what a run killed in its first moments leaves
            foreign = [p.name for p in path.iterdir() if p.name not in ours and not p.name.startswith(".")] if path.is_dir() else []
            if foreign:
                raise UsageError(f"{path} is not empty ({foreign[0]} stands in it); a run needs a folder of its own")
        elif not folder.holds_run(path):
            raise UsageError(f"{path} holds no run (no config.json); begin one with `onetorch train RECIPE --dir {shlex.quote(str(path))}`")
        self._made = [p for p in (path, *path.parents) if not p.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(folder.explain(error, path)) from error
        self._lock = folder.Lock(path)
        try:
            if self._resume:
                self._reopen()
            else:
                self._begin(recipe, algorithm, source, command, fixed)
            self._metrics = open(path / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
            distributed.agree(self.record)
        except OSError as error:
            self._lock.release()
            raise RunError(folder.explain(error, path)) from error
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, recipe: str | None, algorithm: str | None, source: Path | None, command: list[str] | None, fixed: dict[str, str]) -> None:
        if folder.holds_run(self.folder):
            raise UsageError(f"{self.folder} holds a run that another process began just now; choose another --dir")
        if algorithm is None and source is None:
            module = sys.modules.get(type(self.config).__module__)
            file = getattr(module, "__file__", None)  # a notebook has none
            source = Path(file) if file and Path(file).is_file() else None  # of a class typed at a prompt or piped in it is no path
            algorithm = module.__name__ if module and module.__name__.startswith("onetorch.") else None
        git, diff = self._git or (provenance.git(source) if source else (None, ""))
        self.record: dict[str, Any] = {
            "format": folder.FORMAT,
            "status": "running",
            "pid": os.getpid(),
            "recipe": recipe or type(self.config).__module__.rpartition(".")[2],
            "command": shlex.join(command or provenance.command()),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seed": getattr(self.config, "seed", None),
            "git": git,
            "versions": provenance.versions(),
            "hardware": provenance.hardware(),
            "fixed": fixed,
            "plan": {},
            "progress": {"done": 0, "total": None, "unit": "steps"},
            "cost": {"seconds": 0.0, "cpu_seconds": 0.0},
            "result": {},
        }
        if diff:
            (self.folder / "git.diff").write_text(diff, encoding="utf-8")
        if source and algorithm is None:
            code = source.read_bytes()
            (self.folder / "source.py").write_bytes(code)
            self._remember(code, source.name)
        for code in trust.imports(to_json(self.config)):
            self._remember(code, "named by a config")
        weights, origin = self._given
        self._given = (None, None)
        if weights is not None:
            # Kept in the run, so that one killed before its first checkpoint begins again from the same weights, wherever they came from.
            pieces = sealed.dump(weights)
            self.record["from"] = {**(origin or {}), "bytes": sealed.length(pieces), "sha256": sealed.sha256(pieces)}
            (self.folder / INITIAL).unlink(missing_ok=True)  # of a run that was killed before it had a config
            sealed.write(self.folder / INITIAL, pieces)
            sealed.flush(self.folder / INITIAL).result()
        folder.write_json(self.folder / "run.json", self.record)
        # Last: a folder holds a run from the moment that its config stands in it.
        entry = {"format": folder.FORMAT, "recipe": self.record["recipe"], "algorithm": algorithm or (source and "source.py"), "config": to_json(self.config)}
        folder.write_json(self.folder / "config.json", entry)

    def _remember(self, code: bytes, name: str) -> None:
        problem = trust.remember(code, name)
        if problem:
            self.say(f"{name} could not be noted as your own code ({problem}): `onetorch resume` of this run will want --trust-code")

    def _reopen(self) -> None:
        self.record = folder.read_json(self.folder / "run.json")
        kinds = {"recipe": str, "command": str, "fixed": dict, "plan": dict, "progress": dict, "cost": dict, "result": dict, "hardware": dict, "versions": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(self.record.get(name), kind)]
        if wrong:
            raise RunError(f"{self.folder / 'run.json'} is damaged ({wrong[0]} is missing or not what it was); restore it from a copy")
        for litter in self.folder.glob(".*.json.*"):  # of a process that was killed while it wrote
            litter.unlink(missing_ok=True)
        saved = folder.read_json(self.folder / "config.json").get("config")
        if saved != to_json(self.config):
            raise UsageError(f"{self.folder / 'config.json'} is not the config that was given; a run goes on with its own")
        self.record |= {"status": "running", "pid": os.getpid()}
        self.record.setdefault("resumed", []).append(time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        folder.write_json(self.folder / "run.json", self.record)

    @property
    def media(self) -> Path:
        """The folder for pictures, videos and samples, created on first use."""
        path = self.folder / "media"
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(folder.explain(error, path)) from error
        return path

    # -- the verbs of the loop -------------------------------------------------------------------------------------------------------------

    def plan(
        self, measure: plan.Measure | None = None, *, key: str = "", asked: dict[str, tuple[Any, ...]] | None = None, **dimensions: tuple[Any, ...]
    ) -> dict[str, Any]:
        """The fastest way to do this run's work on this machine.

        Every keyword is a dimension with its candidates, the default first: `threads=(1, 2, 4), dtype=("float32", "bfloat16")`. `measure(choice)` returns a
        function of no arguments that does one fixed amount of work under `choice`, on throwaway copies. `key` names what else the answer depends on (the
        model's size). `asked` are more candidates of a dimension, which are chosen where `--plan` asks for them and not measured else. A resumed run keeps its
        plan, `--plan` fixes it, an equal run takes it from the machine's cache. The plan always has a `device`, the GPU where there is one: only an algorithm
        that names the candidates (`plan.devices()`) has them measured. Torch has the plan's `threads`.
        """
        given = "device" in dimensions
        dimensions = {"device": plan.devices()[::-1], **dimensions}
        if self._threads and "threads" in dimensions:
            dimensions["threads"] = tuple(n for n in dimensions["threads"] if n <= self._threads) or (self._threads,)
        narrowed = plan.fix(dimensions, self.record["fixed"], asked)
        if not given:  # to measure it would cost a model on each
            narrowed["device"] = narrowed["device"][:1]
        recorded = self.record["plan"]
        key = plan.cache_key(key or self.record["recipe"], narrowed)
        note = ""
        if self._resume and recorded and recorded.keys() == narrowed.keys():
            if recorded["device"] not in dimensions["device"]:
                raise RunError(f"{self.folder} ran on {recorded['device']}, which is not here: go on where it is, or begin a new run in another --dir")
            choice, note = dict(recorded), "as recorded"
        elif (kept := plan.cached(key, narrowed)) is not None:
            choice, note = kept, "measured earlier on this machine; --plan fixes it"
        else:
            generators = (torch.get_rng_state(), np.random.get_state(), random.getstate())
            choice, seconds = plan.choose(measure, narrowed)
            torch.set_rng_state(generators[0])
            np.random.set_state(generators[1])
            random.setstate(generators[2])
            note = f"measured in {seconds:.1f} s; --plan fixes it" if seconds else "nothing to measure"
            problem = plan.keep(key, choice) if seconds else None
            if problem:
                note += f", not kept for the next run: {problem}"
        distributed.agree(choice)
        plan.set_threads(choice)
        self.record["plan"] = choice
        folder.write_json(self.folder / "run.json", self.record)
        self.say(f"plan: {plan.show(choice)} ({note})")
        return dict(choice)

    def initialize(self, model: torch.nn.Module) -> None:
        """Give a new model the weights that this run is to begin from (`train --from`); does nothing where there are none.

        `restore` does it for `state.model`. An algorithm that makes copies of its model (targets, averages) calls this before it makes them.
        UsageError when names or shapes are not the model's, CheckpointError when the run's copy of the weights is damaged.
        """
        entry = self.record.get("from")
        if entry is None or self._initialized or (self._resume and checkpoint.steps(self.folder / "checkpoints")):
            return
        path = self.folder / INITIAL
        content, digest = sealed.read(path, entry["bytes"])
        if digest != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in run.json")
        weights = sealed.parse(content, path)
        problem = state.misfit(weights, model.state_dict())
        if problem:
            raise UsageError(f"the weights of {entry.get('path', path)} do not fit this model: {problem}; begin with the config they were made with")
        model.load_state_dict(weights)
        self._initialized = True
        self.say(f"begins from the weights of {entry.get('path', path)}")

    def _initialize(self, live: Any) -> None:
        if "from" in self.record:
            if not isinstance(getattr(live, "model", None), torch.nn.Module):
                raise UsageError("this algorithm cannot begin from given weights: its State has no module called `model`")
            self.initialize(live.model)

    def restore(self, live: S) -> S:
        """Bring a state (a dataclass) to the newest valid checkpoint; where there is none, `state.model` to the weights given to begin from, if any.

        Returns the same object.

        Raises CheckpointError when checkpoints stand there and none can be used, or when config or code are not the ones that wrote it.
        """
        if not (dataclasses.is_dataclass(live) and not isinstance(live, type)):
            raise TypeError(f"restore: expected an instance of the algorithm's State dataclass, got {type(live).__name__}")
        self._state = live
        if self._resume:
            self._go_on(live)
        else:
            self._initialize(live)
            distributed.agree(None)
        return live

    def _go_on(self, live: Any) -> None:
        found, damaged = checkpoint.newest(self.folder / "checkpoints")
        distributed.agree(found and found.step)  # before the others are needed to share out what was found
        for problem in damaged:
            self.say(f"{problem}; going on from an older checkpoint")
        if found is None:
            self.say(f"{self.folder} was stopped before its first checkpoint: it begins again")
            self._cut_metrics(0, self._written.hexdigest())
            self._initialize(live)
            return
        record = found.record
        kinds = {"last_step": int | None, "metrics_bytes": int, "metrics_sha256": str, "seconds": float, "cpu_seconds": float, "state": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name, ...), kind)]
        if wrong:
            raise CheckpointError(f"{found.folder / checkpoint.RECORD} has no {wrong[0]}, or not as this onetorch writes it")
        self._check_config(record.get("config"))
        state.restore_state(live, record["state"], found.model, found.state)
        self._saved = self.iteration = found.step
        self._before = (record["seconds"], record["cpu_seconds"])
        self._last_step = record["last_step"]
        self._cut_metrics(record["metrics_bytes"], record["metrics_sha256"])
        self.say(f"goes on from {found.folder}")

    def _check_config(self, saved: Any) -> None:
        now = to_json(self.config)
        if saved != now:
            changed = [k for k in {*now, *saved} if saved.get(k) != now.get(k)] if isinstance(saved, dict) else []
            what = "; ".join(f"{k} was {saved.get(k)!r}, is {now.get(k)!r}" for k in sorted(changed))
            raise CheckpointError(f"{self.folder / 'config.json'} changed since the checkpoint ({what}): put it back, or begin a new run in another --dir")

    def _cut_metrics(self, size: int, sha256: str) -> None:
        """Take off the rows that were written after the checkpoint, so that none stands twice."""
        path = self.folder / "metrics.jsonl"
        found = path.stat().st_size
        if not 0 <= size <= found:
            raise CheckpointError(f"{path} has {found} bytes, the checkpoint knows {size}: rows are lost; restore it from a copy")
        self._written = hashlib.sha256()
        with open(path, "rb") as file:
            left = size
            while chunk := file.read(min(left, 1 << 20)):
                self._written.update(chunk)
                left -= len(chunk)
        if self._written.hexdigest() != sha256:
            raise CheckpointError(f"{path} is damaged: its first {size} bytes are not those the checkpoint knows; restore it from a copy")
        os.truncate(path, size)

    def steps(self, done: int, total: int, *, unit: str = "steps", scale: int = 1) -> Iterator[int]:
        """The iterations still to do, `done + 1` to `total`, with a progress bar, stop signals and the time limit.

        `scale` is how many `unit` an iteration stands for. A state given to `restore` is saved when the loop ends. Raises Stopped.
        """
        if self.record["fixed"] and not self.record["plan"]:
            raise UsageError(f"--plan: {self.record['recipe']} has no speed plan")
        if distributed.world() > 1 and not distributed.wrapped:
            raise UsageError(f"--nproc: {self.record['recipe']} trains in one process; it does not share out its batches")
        self.record["progress"] = {"done": done, "total": total, "unit": unit, "scale": scale}
        self._total = total
        self.first = done
        self._progress = Progress(done, total, unit, scale, self.quiet)
        self.iteration = done
        self._write_record()  # whoever looks at the folder sees how far there is to go
        self._start_signals()
        self._looping = True
        self._logged = time.perf_counter()
        self._phases, self._flops = {}, 0.0
        self._loop = (time.perf_counter(), math.inf)
        try:
            for iteration in range(done + 1, total + 1):
                self._leave_if_told()
                self.iteration = iteration
                self._lap = time.perf_counter()
                yield iteration
                self.record["progress"]["done"] = iteration
                self._progress.update(iteration, self._shown)
                if self._limit is not None and time.perf_counter() - self._start > self._limit and self._stop is None and iteration < total:
                    self._stop = ("the time limit is reached", 0)
            self._leave_if_told()
            self._progress.update(total, self._shown, last=True)
        finally:
            self._loop = (self._loop[0], time.perf_counter())
            self._progress.close()
            self._progress = None

    def log(self, step: int, *, flops: Any = None, **values: Any) -> None:
        """One row of metrics at `step` (a whole number that never falls). None is left out. ValueError for NaN, infinity or what is no number or text.

        With `flops`, the floating point operations that the model's mathematics needed since the last row, the row ends with `mfu`: the model-FLOPs utilisation
        (Chowdhery et al. 2022), the share of them in what matrix products reach on this machine (`peak`) in the wall-clock time since that row, everything
        included.
        """
        if type(step) is not int:
            raise ValueError(f"log: step must be an int, got {step!r}")
        if self._last_step is not None and step < self._last_step:
            raise ValueError(f"log: step {step} comes after step {self._last_step}; steps never fall")
        now = time.perf_counter()
        row: dict[str, Any] = {
            "step": step,
            "seconds": round(self._before[0] + now - self._start, 4),
            "cpu_seconds": round(self._before[1] + time.process_time() - self._start_cpu, 4),
        }
        for name, value in values.items():
            kind = type(value)
            if kind is not float and kind is not int:
                if value is None:
                    continue
                if kind is not str and kind is not bool:
                    try:
                        value = value.item()
                    except (AttributeError, RuntimeError, ValueError) as error:
                        raise ValueError(f"log: {name} must be one number or a text, got {value!r}") from error
            row[name] = value
        if not values.keys().isdisjoint(folder.TIMES):
            raise ValueError(f"log: {', '.join(folder.TIMES)} are written by the run; call yours otherwise")
        if flops is not None:
            self._flops += flops
            row["mfu"] = round(flops / self._peak_flops() / (now - self._logged), 6)
        self._logged = time.perf_counter()
        try:
            text = json.dumps(row, allow_nan=False)
        except TypeError as error:
            bad = {k: v for k, v in row.items() if not isinstance(v, bool | int | float | str)}
            raise ValueError(f"log: no number or text at step {step}: {bad}") from error
        except ValueError as error:
            bad = {k: v for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
            raise ValueError(f"log: not finite at step {step}: {bad}; leave a value out by giving None") from error
        self._last_step = step
        self._rows.append(text.encode() + b"\n")
        if not self._shown:
            self._shown = {k: v for k, v in list(row.items())[3:6] if isinstance(v, int | float)}
        else:
            for name in self._shown:
                if isinstance(row.get(name), int | float):
                    self._shown[name] = row[name]
        if now - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _peak_flops(self) -> float:
        if self._peak is None:
            chosen, begin = self.record["plan"], time.perf_counter()
            dtype = chosen.get("dtype", "float32").replace("float8", "bfloat16")  # of what is left in it when the largest products are in float8
            self._peak = peak.peak(dtype, torch.get_num_threads(), chosen.get("device", "cpu")) * distributed.world()
            self.say(f"peak: {self._peak / 1e9:,.0f} GFLOP/s in matrix products, found in {time.perf_counter() - begin:.1f} s")
        return self._peak

    def phase(self, name: str) -> None:
        """What was done since the last such line, or since the step began, was `name`: "environment", "action", "update", "logging" or what fits.

        The sums of this process are in run.json, and `--explain` shows them; what no line names counts as rest. A call costs a third of a microsecond.
        """
        if self._wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        phases = self._phases
        phases[name] = phases.get(name, 0.0) + now - self._lap
        self._lap = now

    def phases(self) -> dict[str, float]:
        """Seconds of this process's loop by phase, the rest included; empty where the loop names none."""
        begin, end = self._loop
        return self._phases and self._phases | {"rest": min(end, time.perf_counter()) - begin - sum(self._phases.values())}

    def ceiling(self) -> tuple[float, float] | None:
        """(FLOP that `log` was told of in this process's loop, FLOP/s that matrix products reach on this machine); None where it was told of none."""
        return (self._flops, self._peak_flops()) if self._flops else None

    def show(self, **values: float) -> None:
        """The numbers beside the progress bar; else the first three that are logged."""
        self._shown = values

    def _flush(self, sync: bool = False) -> None:
        try:
            view = memoryview(b"".join(self._rows))
            self._rows.clear()
            self._written.update(view)
            while view:
                view = view[self._metrics.write(view) :]
            if sync:
                os.fsync(self._metrics.fileno())
        except OSError as error:
            raise RunError(f"{folder.explain(error, self.folder / 'metrics.jsonl')}; {self._last_good()}") from error
        self._flushed = time.perf_counter()

    def finite(self, *, late: bool = False, **values: Any) -> None:
        """Raise NonFinite if a loss or gradient norm is NaN or infinite. Call it before the optimizer's step, so that the weights stay good; or say `late`."""
        for name, value in values.items():
            number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            good = bool(torch.isfinite(number).all()) if isinstance(number, torch.Tensor) else math.isfinite(number)
            if not good:
                weights = "the weights are spoilt" if late else "the weights were not changed by it"
                raise NonFinite(f"{name} {'has become' if late else 'is'} {number} in iteration {self.iteration}: {weights}; {self._last_good()}")

    def _last_good(self) -> str:
        if self._saved is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.folder / 'checkpoints' / checkpoint.folder_name(self._saved)}"

    def checkpoint(self, live: Any) -> None:
        """Save the state, if it is time to or the run was told to stop. Call it at the end of each iteration.

        Raises NonFinite if a NaN stands in the state, RunError if the disk does not take it.
        """
        self._state = live
        since = time.perf_counter() - self._saved_at
        due = since >= max(self._checkpoint_seconds, self._save_cost / CHECKPOINT_SHARE) or self._stop is not None or self.iteration == self._total
        if distributed.agree_to(due) if distributed.sharding else due:
            self._save(live)

    def _save(self, live: Any) -> None:
        if self._saved == self.iteration:
            return
        begin = time.perf_counter()
        self._flush(sync=True)
        tree, model, others = state.pack_state(live)
        bad = state.find_nan(tree, model, others)
        if bad:
            raise NonFinite(f"{bad} holds NaN after iteration {self.iteration}: nothing was saved; {self._last_good()}")
        seconds, cpu_seconds = self.cost()
        record = {
            "format": folder.FORMAT,
            "step": self.iteration,
            "last_step": self._last_step,
            "metrics_bytes": self._metrics.seek(0, os.SEEK_END),
            "metrics_sha256": self._written.hexdigest(),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "config": to_json(self.config),
            "state": tree,
        }
        if self._retiring:
            self._retiring.join()
        checkpoint.save(self.folder / "checkpoints", self.iteration, model, others, record)
        self._retiring = threading.Thread(target=checkpoint.retire, args=(self.folder / "checkpoints",))
        self._retiring.start()
        self._saved = self.iteration
        self.record["progress"]["done"] = self.iteration
        self._write_record()
        self._saved_at = time.perf_counter()
        self._save_cost = self._saved_at - begin

    # -- stopping --------------------------------------------------------------------------------------------------------------------------

    def _start_signals(self) -> None:
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        name, code = signal.Signals(number).name, 128 + number
        if self._stop and self._stop[1]:
            self._leave_now(code)
        self._stop = (f"{name} came", code)
        if not self._looping:
            raise Stopped(*self._stop)  # before the loop and after finish() nothing waits to be saved
        self._watchdog = threading.Timer(GRACE, self._leave_now, (code, f"the step took longer than {GRACE:.0f} s"))
        self._watchdog.daemon = True
        self._watchdog.start()
        # Not through sys.stderr, which the signal may have interrupted in the middle of a write.
        with contextlib.suppress(OSError):  # nobody may be reading any more; the state is to be saved all the same
            os.write(2, f"\n{name}: finishes this step, saves and stops (once more: at once)\n".encode())

    def _leave_now(self, code: int, why: str = "told twice") -> None:
        # A save under way is lost with this process, and only it: what stands under its own name is whole.
        with contextlib.suppress(OSError):
            show_cursor = "\x1b[?25h" if os.isatty(2) else ""
            os.write(2, f"{show_cursor}\nonetorch: {why}: left at once; {self._last_good()}\n".encode())
        os._exit(code)

    def _leave_if_told(self) -> None:
        stop = self._stop
        if distributed.agree_to(stop is not None) and stop:
            if self._state is not None and self.iteration > 0:
                self._save(self._state)
            raise Stopped(*stop)

    def _restore_signals(self) -> None:
        if self._watchdog:
            self._watchdog.cancel()
            self._watchdog = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # -- the end ---------------------------------------------------------------------------------------------------------------------------

    def cost(self) -> tuple[float, float]:
        """Wall and CPU seconds of training so far, earlier processes of this run included."""
        return self._before[0] + time.perf_counter() - self._start, self._before[1] + time.process_time() - self._start_cpu

    def result(self, **values: Any) -> None:
        """Record what the run reached, as `onetorch runs` shows it."""
        self.record["result"] = {**self.record["result"], **values}
        self._write_record()

    def say(self, text: str) -> None:
        """One line to the person at the terminal."""
        if not self.quiet:
            if self._progress and self._progress.bar:
                self._progress.bar.console.print(text, highlight=False, markup=False)
            else:
                try:
                    sys.stderr.write(text + "\n")
                    sys.stderr.flush()
                except BrokenPipeError:
                    self.quiet = True  # whoever read it has gone (`2>&1 | head`); the training goes on

    def finish(self) -> None:
        """Training is over: save the last state, if the algorithm has not. Raises Stopped if a signal came meanwhile."""
        if self._state is not None and self.iteration > 0:
            self._save(self._state)
        self._flush(sync=True)
        self._looping = False
        if self._stop:
            raise Stopped(*self._stop)

    def _write_record(self) -> None:
        seconds, cpu_seconds = self.cost()
        self.record["cost"] = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
        self.record["phases"] = {name: round(spent, 3) for name, spent in self.phases().items()}
        folder.write_json(self.folder / "run.json", self.record)

    def close(self, status: str = "done", why: str = "") -> None:
        """Record how the run ended and give its folder free."""
        self._restore_signals()
        if self._metrics.closed:
            return
        if self._progress:
            self._progress.close()
        try:
            self._flush()
            self.record["status"] = status
            self.record["why"] = why
            self._write_record()
        finally:
            if self._retiring:
                self._retiring.join()
            self._metrics.close()
            self._lock.release()

    def _forget(self) -> None:
        """Take back what `_begin` made: a run that was refused before its first iteration leaves no folder that would be in the way of the next attempt."""
        for name in ("config.json", "run.json", "metrics.jsonl", "source.py", "git.diff", "run.lock", INITIAL):
            (self.folder / name).unlink(missing_ok=True)
        for path in self._made:
            with contextlib.suppress(OSError):  # the algorithm left something in it
                path.rmdir()

    def __enter__(self) -> Self:
        self._start_signals()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            try:
                self.finish()
            except BaseException as late:
                self._end(late)
                raise
            self.close("done")
        else:
            self._end(error)

    def _end(self, error: BaseException) -> None:
        status = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        try:
            self.close(status, " ".join(str(error).split()) or type(error).__name__)
        except RunError as second:
            # The first error is the one to hear about; a full disk refuses the note about itself too.
            error.add_note(f"the run's record could not be written either: {second}")
        if isinstance(error, UsageError) and not self._resume and self.iteration == 0:
            self._forget()

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.record['status']}, after {clock(self.cost()[0])})"
