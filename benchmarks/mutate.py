"""Damage checkpoints in every way we can think of: each loads identically or raises CheckpointError, and nothing in it is ever executed.

    python benchmarks/mutate.py [--recipe ppo|gpt|FILE] [--count 10000] [--forged 2000] [--seed 0] [--field NAME=VALUE …]

`damaged`: one thing is changed and the manifest's hashes are what they were, unless the manifest is what is changed. What loads must be bit for bit the
checkpoint as it was written. `forged`: contents are changed and the manifest is made to agree, as a liar would; what loads cannot be told from another
checkpoint, so here only the kind of the exception and the absence of execution are judged, when a run resumes from it. An audit hook counts as an execution
every exec, new process, import, loaded library and unpickled object while a checkpoint is read. Exits 1 on any other exception, difference or execution.
"""

import argparse
import collections
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from onetorch import cli
from onetorch.runs import checkpoint, provenance
from onetorch.runs import config as configs
from onetorch.runs import run as runs
from onetorch.runs.errors import CheckpointError

EXECUTIONS = ("exec", "import", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pickle.find_class", "ctypes.dlopen")
SECONDS = 10.0  # a single load that takes longer hangs
ODD: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1.5, -0.0, float("inf"), float("nan"), "", "x", "../../etc/passwd", "\x00", "\ud800"]
ODD += [[], {}, [[]], [None], {"": None}, {"$tensor": "nowhere"}, {"$float": "x"}, {"$numpy": 3}, {"$dict": [[1]]}, {"$tuple": 7}, {"$state_dict": None}]

watching, executions = False, collections.Counter[str]()


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event in EXECUTIONS:
        executions[f"{event} {arguments[0]!s:.60}"] += 1


class Payload:
    """What a pickle of this would do when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


class Captured(Exception):  # noqa: N818 (carries the state out of train)
    pass


def made(resolved: cli.Resolved, where: Path) -> tuple[runs.Run, Any]:
    """A run of the recipe with two checkpoints, opened again to be resumed, and the algorithm's state object."""
    module = resolved.source.load()
    config = configs.from_json(configs.to_json(resolved.config), module.Config)
    runs.CHECKPOINT_SHARE = float("inf")
    with runs.Run(where, config, recipe=resolved.name, checkpoint_seconds=0.0, quiet=True) as run:
        module.train(config, run)
    run = runs.Run(where, config, resume=True, quiet=True)

    class Catcher:
        """Hands on every verb but the one that gets the state."""

        def __getattr__(self, name: str) -> Any:
            return getattr(run, name)

        def restore(self, state: Any) -> Any:
            raise Captured(state)

    try:
        module.train(config, Catcher())
    except Captured as caught:
        return run, caught.args[0]
    raise AssertionError("train did not call run.restore")


def same(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint) -> bool:
    """Whether two checkpoints in memory are equal bit for bit."""

    def tensors(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> bool:
        alike = x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and x[k].shape == y[k].shape for k in x)
        return alike and all(torch.equal(x[k].reshape(-1).view(torch.uint8), y[k].reshape(-1).view(torch.uint8)) for k in x)

    return a.step == b.step and tensors(a.model, b.model) and tensors(a.state, b.state) and json.dumps(a.record) == json.dumps(b.record)


class Damage:
    """The ways to change one checkpoint; each method changes files under `self.target` and returns nothing."""

    def __init__(self, target: Path, other: Path, draw: random.Random) -> None:
        self.target, self.other, self.draw = target, other, draw
        self.manifest = (target / checkpoint.MANIFEST).read_bytes()

    def file(self) -> Path:
        return self.target / self.draw.choice((*checkpoint.FILES, checkpoint.MANIFEST))

    def bytes(self, change: Callable[[bytearray], Any], path: Path | None = None) -> None:
        path = path or self.file()
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    def place(self, content: bytearray) -> int:
        # Half of the places among the first bytes: lengths and headers stand there.
        return self.draw.randrange(min(len(content), 64) if self.draw.random() < 0.5 else len(content))

    def flip_bit(self) -> None:
        def change(c: bytearray) -> None:
            c[self.place(c)] ^= 1 << self.draw.randrange(8)

        self.bytes(change)

    def change_bytes(self) -> None:
        def change(c: bytearray) -> None:
            for _ in range(self.draw.randrange(1, 20)):
                c[self.place(c)] = self.draw.randrange(256)

        self.bytes(change)

    def truncate(self) -> None:
        def change(c: bytearray) -> None:
            del c[self.place(c) :]

        self.bytes(change)

    def append(self) -> None:
        self.bytes(lambda c: c.extend(self.draw.randbytes(self.draw.randrange(1, 100)) if self.draw.random() < 0.5 else b" \n"))

    def insert(self) -> None:
        def change(c: bytearray) -> None:
            p = self.place(c)
            c[p:p] = self.draw.randbytes(self.draw.randrange(1, 9))

        self.bytes(change)

    def cut_out(self) -> None:
        def change(c: bytearray) -> None:
            p = self.place(c)
            del c[p : p + self.draw.randrange(1, 4097)]

        self.bytes(change)

    def zero_page(self) -> None:
        def change(c: bytearray) -> None:
            p = self.place(c) // 4096 * 4096
            c[p : p + 4096] = bytes(len(c[p : p + 4096]))

        self.bytes(change)

    def empty(self) -> None:
        self.file().write_bytes(b"")

    def swap_with_other(self) -> None:
        path = self.file()
        shutil.copyfile(self.other / path.name, path)

    def swap_within(self) -> None:
        a, b = self.draw.sample((*checkpoint.FILES, checkpoint.MANIFEST), 2)
        x, y = (self.target / a).read_bytes(), (self.target / b).read_bytes()
        (self.target / a).write_bytes(y)
        (self.target / b).write_bytes(x)

    def whole_other(self) -> None:
        shutil.rmtree(self.target)
        shutil.copytree(self.other, self.target)

    def remove(self) -> None:
        self.file().unlink()

    def make_folder(self) -> None:
        path = self.file()
        path.unlink()
        path.mkdir()

    def make_pipe(self) -> None:
        path = self.file()
        path.unlink()
        os.mkfifo(path)

    def link(self) -> None:
        path = self.file()
        kept = path.with_name("kept")
        path.rename(kept)
        to = self.draw.choice(("kept", path.name, "/dev/zero", ""))
        path.symlink_to(to) if to else os.link(kept, path)

    def pickle(self) -> None:
        self.file().write_bytes(pickle.dumps(Payload()))

    def stray_file(self) -> None:
        (self.target / self.draw.choice(("model.pt", "optimizer.pkl", "__init__.py", "conftest.py"))).write_bytes(pickle.dumps(Payload()))

    def odd(self, node: Any) -> Any:
        """A copy of a JSON value with one thing in it changed."""
        choice = self.draw.random()
        if isinstance(node, dict) and node and choice < 0.85:
            key = self.draw.choice(list(node))
            if choice < 0.05:
                return {k: v for k, v in node.items() if k != key}
            if choice < 0.1:
                return {**node, self.draw.choice(("x", "__class__", "$tensor", key.upper())): self.draw.choice(ODD)}
            return {k: self.odd(v) if k == key else v for k, v in node.items()}
        if isinstance(node, list) and node and choice < 0.85:
            place = self.draw.randrange(len(node))
            return [self.odd(v) if i == place else v for i, v in enumerate(node)]
        if isinstance(node, int) and choice < 0.3:
            return node + self.draw.choice((-1, 1, 10**9, 0.0))
        if isinstance(node, str) and choice < 0.3:
            return self.draw.choice((node.upper(), node[:-1], node + "0", node[::-1]))
        return self.draw.choice(ODD)

    def edited(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        kind = self.draw.randrange(8)
        if kind == 0:  # the same key twice: the last one counts
            text = text.replace("{", '{"step": 3, "format": 7, ', 1)
        elif kind == 1:
            depth = self.draw.choice((100, 10_000, 200_000))
            text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
        elif kind == 2:
            text = self.draw.choice(("null", "[]", "{}", "0", '"x"', "{", "[" * 100_000, "1" * 5000, '{"format": 1}', "\ufeff" + text, "NaN"))
        elif kind == 3:
            path.write_bytes(text.encode(self.draw.choice(("utf-16", "utf-32-le", "utf-8-sig"))))
            return
        else:
            text = json.dumps(self.odd(json.loads(text)))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))

    def edit_manifest(self) -> None:
        self.edited(self.target / checkpoint.MANIFEST)

    def edit_record(self) -> None:
        self.edited(self.target / checkpoint.RECORD)

    def edit_header(self) -> None:
        """Change the JSON at the beginning of a safetensors file."""
        path = self.target / self.draw.choice((checkpoint.MODEL, checkpoint.STATE))
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        text = json.dumps(self.odd(json.loads(content[8 : 8 + size]))).encode("utf-8", "surrogatepass")
        length = self.draw.choice((len(text), len(text), len(text), 2**63, 2**32, 0))
        path.write_bytes(length.to_bytes(8, "little") + text + content[8 + size :])

    def agree(self) -> None:
        """Make the manifest say what the files are now."""
        manifest = json.loads(self.manifest)
        for name in checkpoint.FILES:
            if (self.target / name).is_file():
                manifest["files"][name] = checkpoint._entry([(self.target / name).read_bytes()])
        (self.target / checkpoint.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


DAMAGED = ("flip_bit", "change_bytes", "truncate", "append", "insert", "cut_out", "zero_page", "empty", "swap_with_other", "swap_within", "whole_other")
DAMAGED += ("remove", "make_folder", "make_pipe", "link", "pickle", "stray_file", "edit_record", "edit_header", *3 * ("edit_manifest",))
FORGED = ("edit_record", "edit_record", "edit_record", "edit_header", "edit_header", "change_bytes", "truncate", "pickle", "swap_with_other", "swap_within")


def main() -> int:
    global watching
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--recipe", default="ppo", help="a recipe's name or an algorithm file")
    parser.add_argument("--count", type=int, default=10_000, help="damaged checkpoints")
    parser.add_argument("--forged", type=int, default=2000, help="checkpoints that were changed together with their manifest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--field", action="append", default=[], metavar="NAME=VALUE", help="a field of the recipe, to make it shorter")
    parser.add_argument("--out", type=Path, default=None, help="the result's file (else results/mutate-RECIPE.json)")
    args = parser.parse_args()
    resolved = cli._resolve(args.recipe, {name: [value] for name, _, value in (field.partition("=") for field in args.field)})
    out = args.out or Path(__file__).parent / "results" / f"mutate-{resolved.name}.json"
    draw = random.Random(args.seed)
    outcomes: dict[str, collections.Counter[str]] = {"damaged": collections.Counter(), "forged": collections.Counter()}
    faults: list[str] = []
    sys.addaudithook(hook)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"longer than {SECONDS} s")))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        run, state = made(resolved, Path(name) / "run")
        metrics = run.folder / "metrics.jsonl"
        rows = metrics.read_bytes()
        steps = checkpoint.steps(run.folder / "checkpoints")
        good = Path(name) / "good"
        shutil.copytree(run.folder / "checkpoints", good)
        newest, other = (good / checkpoint.folder_name(step) for step in steps)
        whole = checkpoint.load(newest)
        run.restore(state)  # imports what a load imports once
        target = run.folder / "checkpoints" / newest.name
        shutil.rmtree(run.folder / "checkpoints" / other.name)
        damage = Damage(target, other, draw)
        jobs = [("damaged", DAMAGED[i % len(DAMAGED)]) for i in range(args.count)] + [("forged", FORGED[i % len(FORGED)]) for i in range(args.forged)]
        for number, (kind, way) in enumerate(jobs):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(newest, target)
            getattr(damage, way)()
            if kind == "forged":
                damage.agree()
                metrics.write_bytes(rows)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            watching = True
            try:
                if kind == "forged":
                    run.restore(state)
                    outcome = "loads"
                else:
                    outcome = "loads identically" if same(checkpoint.load(target), whole) else "DIFFERS"
            except CheckpointError as error:
                outcome = "CheckpointError"
                if "\n" in str(error):
                    outcome = "MORE THAN ONE LINE"
            except BaseException as error:
                outcome = f"{type(error).__name__.upper()}"
                faults.append(f"{kind} {number} ({way}): {traceback.format_exc()[-600:]}")
            finally:
                watching = False
                signal.setitimer(signal.ITIMER_REAL, 0.0)
            outcomes[kind][outcome] += 1
            if outcome in ("DIFFERS", "MORE THAN ONE LINE"):
                faults.append(f"{kind} {number} ({way}): {outcome}")
        if Path("executed").exists():
            executions["payload"] += 1
        run.close("stopped", "the torture is over")
        os.chdir("/")
    for event, times in executions.items():
        faults.append(f"executed: {event}, {times} times")
    result = {
        "machine": provenance.hardware(),
        "versions": provenance.versions(),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "recipe": resolved.name,
        "config": configs.to_json(resolved.config),
        "outcomes": {kind: dict(counts) for kind, counts in outcomes.items()},
        "executions": dict(executions),
        "faults": faults[:20],
        "seconds": round(time.perf_counter() - begin, 1),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for kind, counts in outcomes.items():
        sys.stdout.write(f"{resolved.name}, {kind}: {sum(counts.values())} checkpoints: {', '.join(f'{n} {what}' for what, n in counts.most_common())}\n")
    sys.stdout.write(f"{sum(executions.values())} executions, {len(faults)} faults\n" + "".join(f"FAULT {f}\n" for f in faults[:5]))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
