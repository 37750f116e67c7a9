"""Kill -9 a run again and again, at random moments and in the middle of saving, and resume it each time: nothing may be lost and the end must be the same.

    python benchmarks/kill.py [--recipe ppo|gpt|FILE] [--random 100] [--aimed 100] [--points 100] [--fresh 3] [--seed 0] [--field value …]

Four ways to die: `random`, at a uniformly drawn moment of a process's life; `aimed`, so many microseconds after the folder of an unfinished checkpoint
appears; `points`, right before the n-th operation on a file of the run (open, rename, remove, truncate, make a folder), n drawn anew each time; `fresh`, at
random moments again, but with the real command line in a new interpreter. In the first three the processes are forked from one that has torch imported and has
computed nothing, with Python's and numpy's generators seeded anew as in a fresh process, and they save after every iteration.

After every death: every checkpoint that stands under its name must verify, and the newest must be no older than before. When a run is through: weights,
optimizer and all other state, and every row of metrics but for its times must be bit for bit those of a run that nobody disturbed.
Then the next run begins, until the deaths are counted. Exits 1 on any loss or difference.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # an optimizer imports it on first use, which takes seconds in every process

from onetorch import cli
from onetorch.runs import checkpoint, folder, provenance
from onetorch.runs import config as configs
from onetorch.runs import run as runs

PATIENCE = 300.0  # seconds after which a process that should have ended is a failure


class Torture:
    """One recipe, its undisturbed run, and runs that are killed."""

    def __init__(self, resolved: cli.Resolved, place: Path, seed: int) -> None:
        self.resolved, self.place = resolved, place
        self.module = resolved.source.load()
        self.config = configs.from_json(configs.to_json(resolved.config), self.module.Config)
        self.draw = random.Random(seed)
        self.fixed: dict[str, str] = {}
        self.failures: list[str] = []
        self.deaths: dict[str, int] = {}
        self.completed = 0
        begin = time.perf_counter()
        self.wait(self.fork(place / "reference", None))
        self.seconds = time.perf_counter() - begin  # of a process's whole life
        self.reference = self.outcome(place / "reference")
        plan = folder.read_json(place / "reference" / "run.json")["plan"]
        self.fixed = {name: str(choice) for name, choice in plan.items()}

    def fork(self, where: Path, die_at: int | None) -> int:
        """Start a process that begins or goes on with the run in `where`, and kills itself before its `die_at`-th operation on the run's files."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            random.seed()
            np.random.seed()
            runs.CHECKPOINT_SHARE = float("inf")
            with open(where.parent / "log.txt", "a", encoding="utf-8") as log:
                os.dup2(log.fileno(), 2)
            if die_at is not None:
                _die_before(where, die_at)
            resume = folder.holds_run(where)
            with runs.Run(
                where,
                folder.config(where, self.module.Config) if resume else self.config,
                recipe=self.resolved.name,
                algorithm=self.resolved.source.module,
                source=self.resolved.source.path,
                fixed=self.fixed,
                resume=resume,
                checkpoint_seconds=0.0,
                quiet=True,
            ) as run:
                self.module.train(run.config, run)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, child: int) -> int:
        """The exit status of a process, killed when it outlives all patience."""
        end = time.perf_counter() + PATIENCE
        while time.perf_counter() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise TimeoutError(f"a process of the run did not end in {PATIENCE:.0f} s")

    def outcome(self, where: Path) -> tuple[Any, ...]:
        """What must not depend on how often the run was killed: weights, state, metrics. Of the global generators only torch's: Python's and numpy's begin
        anywhere in a process that does not seed them, as an algorithm that does not use them need not."""
        found, damaged = checkpoint.newest(where / "checkpoints")
        assert found is not None
        assert not damaged
        weights = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in _flat(found.model)}
        tensors = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in _flat(found.state) if not name.startswith("generators.numpy")}
        rows = [{k: v for k, v in row.items() if k not in folder.TIMES} for row in folder.rows(where)]
        return found.step, weights, tensors, json.dumps(found.record["state"]["fields"]), rows

    def torment(self, way: str, count: int, kill: Callable[[Path], int]) -> None:
        """Kill runs in one way until `count` processes have died; `kill(folder)` starts one, may kill it, and returns its exit status."""
        number, died = 0, 0
        while died < count and not self.failures:
            number += 1
            where = self.place / f"{way}-{number}"
            newest = 0
            while True:
                # A run must come to its end sometime, and so must the last one: what is killed too often before a first save would never.
                spare = died >= count
                status = self.wait(self.fork(where, None)) if spare else kill(where)
                if status == 0:
                    break
                if status != -signal.SIGKILL:
                    self.failures.append(f"{where.name}: the process ended with {status} after {died} deaths; see {where.parent / 'log.txt'}")
                    return
                died += 1
                before, newest = newest, self.inspect(where)
                if newest < before:
                    self.failures.append(f"{where.name}: the checkpoint of step {before} is gone, the newest is {newest}")
                    return
            self.completed += 1
            end = self.outcome(where)
            names = ("last step", "weights", "state tensors", "state", "metrics")
            self.failures += [f"{where.name}: {n} differ from the undisturbed run's" for n, a, b in zip(names, end, self.reference, strict=True) if a != b]
        self.deaths[way] = died

    def inspect(self, where: Path) -> int:
        """The step of the newest checkpoint (0 where there is none); every one that stands under its name must verify."""
        steps = checkpoint.steps(where / "checkpoints")
        for step in steps:
            try:
                checkpoint.load(where / "checkpoints" / checkpoint.folder_name(step))
            except checkpoint.CheckpointError as error:
                self.failures.append(f"{where.name}: {error}")
        return max(steps, default=0)

    # -- the ways to die -----------------------------------------------------------------------------------------------------------------------

    def random(self, where: Path) -> int:
        child = self.fork(where, None)
        time.sleep(self.draw.uniform(0.0, 0.5 * self.seconds))
        return self.finish(child)

    def aimed(self, where: Path) -> int:
        """Let some saves pass, then kill up to 4 ms after the next unfinished checkpoint appears."""
        child = self.fork(where, None)
        parent, passing, seen = where / "checkpoints", self.draw.randrange(4), set[str]()
        end = time.perf_counter() + PATIENCE
        while time.perf_counter() < end:
            try:
                new = {name for name in os.listdir(parent) if name.startswith(".new-")} - seen
            except FileNotFoundError:
                new = set()
            if new:
                seen |= new
                if len(seen) > passing:
                    until = time.perf_counter() + self.draw.choice((0.0, 2e-4, 1e-3, 4e-3)) * self.draw.random()
                    while time.perf_counter() < until:
                        pass
                    break
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
        return self.finish(child)

    def points(self, where: Path) -> int:
        return self.wait(self.fork(where, self.draw.randrange(1, 120)))

    def finish(self, child: int) -> int:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(child, signal.SIGKILL)
        return self.wait(child)

    def fresh(self, where: Path) -> int:
        """The command line in a new interpreter, killed at a random moment; the plan is that of the undisturbed run."""
        if folder.holds_run(where):
            words = ["resume", str(where)]
        else:
            plan = ["--plan", ",".join(f"{k}={v}" for k, v in self.fixed.items())] if self.fixed else []
            target = self.resolved.name if self.resolved.source.module else str(self.resolved.source.path)
            words = ["train", target, *self.resolved.given, "--dir", str(where), *plan]
        with open(where.parent / "log.txt", "a", encoding="utf-8") as log:
            process = subprocess.Popen([sys.executable, "-m", "onetorch", *words, "--checkpoint_seconds", "0"], stdout=log, stderr=log, start_new_session=True)
            try:
                # Importing torch takes seconds, in which there is nothing to lose: the clock starts when the process has the run's lock.
                while process.poll() is None and folder.owner(where) is None:
                    time.sleep(0.005)
                return process.wait(self.draw.uniform(0.0, 0.7 * self.seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()


def _flat(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.reshape(-1)) for name, tensor in tensors.items()]


def _die_before(where: Path, count: int) -> None:
    """Have this process kill itself before its `count`-th operation on a file under `where`; Python announces these to an audit hook."""
    prefix, left = str(where), count
    events = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "os.listdir", "os.scandir"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in events and str(arguments[0]).startswith(prefix):
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--recipe", default="ppo", help="a recipe's name or an algorithm file")
    for way, count in (("random", 100), ("aimed", 100), ("points", 100), ("fresh", 3)):
        parser.add_argument(f"--{way}", type=int, default=count, metavar="N", help=f"so many deaths (default {count})")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments; the recipe's own seed is --field seed=…")
    parser.add_argument("--field", action="append", default=[], metavar="NAME=VALUE", help="a field of the recipe, to make it shorter")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (else the system's temporary folder)")
    parser.add_argument("--out", type=Path, default=None, help="the result's file (else results/kill-RECIPE.json)")
    args = parser.parse_args()
    resolved = cli._resolve(args.recipe, {name: [value] for name, _, value in (field.partition("=") for field in args.field)})
    out = args.out or Path(__file__).parent / "results" / f"kill-{resolved.name}.json"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        torture = Torture(resolved, Path(name), args.seed)
        sys.stdout.write(f"{resolved.name}: undisturbed in {torture.seconds:.2f} s, {torture.reference[0]} iterations\n")
        for way in ("random", "aimed", "points", "fresh"):
            torture.torment(way, getattr(args, way), getattr(torture, way))
            sys.stdout.write(f"{way}: {torture.deaths.get(way, 0)} deaths, {torture.completed} runs completed so far, {len(torture.failures)} failures\n")
            sys.stdout.flush()
        if torture.failures:
            sys.stdout.write((Path(name) / "log.txt").read_text(encoding="utf-8")[-4000:] + "\n")
    result = {
        "machine": provenance.hardware(),
        "versions": provenance.versions(),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "recipe": resolved.name,
        "config": configs.to_json(resolved.config),
        "plan": torture.fixed,
        "deaths": torture.deaths,
        "completed_runs_identical": torture.completed - len({f.partition(":")[0] for f in torture.failures}),
        "failures": torture.failures,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    deaths = ", ".join(f"{n} {way}" for way, n in torture.deaths.items())
    sys.stdout.write(f"{resolved.name}: killed {sum(torture.deaths.values())} times ({deaths}), {torture.completed} runs came to their end")
    sys.stdout.write(", all bit for bit as undisturbed\n" if not torture.failures else "".join(f"\nFAILED {f}" for f in torture.failures) + "\n")
    return bool(torture.failures)


if __name__ == "__main__":
    sys.exit(main())
