"""What sharing costs: `share`, `get` and `verify` of a model of 100 MB, against copying the same bytes and hashing the copy.

    python benchmarks/share_cost.py [--mb 100] [--rounds 9]

The baseline is what anybody would do by hand: copy each file (shutil.copyfile), then the SHA-256 of each copy (hashlib.file_digest). All run in turn in this
process, whose Python and torch are started and warm (one to two seconds, not counted), from files that are in the page cache. Medians; exit code 1 when one
takes more than 1.5 times the baseline.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 1.5
ALGORITHM = '''"""A multilayer perceptron of a given size."""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    seed: int = 0  # of the weights
    layers: int = 8  # linear layers
    width: int = 1024  # of each


@dataclass
class State:
    model: nn.Module
    iteration: int = 0


def build(config):
    layers = []
    for _ in range(config.layers):
        layers += [nn.Linear(config.width, config.width), nn.GELU()]
    return nn.Sequential(*layers)


def train(config, run):
    torch.manual_seed(config.seed)
    state = run.restore(State(build(config)))
    for state.iteration in run.steps(state.iteration, 1):
        run.log(state.iteration, loss=0.0)
        run.checkpoint(state)
    return state.model


def evaluate(model, config, *, media: Path | None = None, rows: int = 4):
    with torch.no_grad():
        return {"mean": model(torch.ones(rows, config.width)).mean().item()}


def example(config) -> Tensor:
    return torch.randn(4, config.width)
'''


def make_run(where: Path, width: int) -> None:
    """A finished run of the algorithm above, with random weights."""
    from onetorch.runs import algorithm
    from onetorch.runs.run import Run

    where.parent.mkdir(parents=True, exist_ok=True)
    path = where.parent / "perceptron.py"
    path.write_text(ALGORITHM, encoding="utf-8")
    source = algorithm.read(path)
    module = source.load()
    with Run(where, module.Config(width=width), recipe="perceptron", source=path, quiet=True) as run:
        model = module.train(run.config, run)
        run.finish()
        run.result(**module.evaluate(model, run.config))


def by_hand(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    for file in target.iterdir():
        with open(file, "rb") as copy:
            hashlib.file_digest(copy, "sha256").hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "share_cost.json")
    words = parser.parse_args()

    import torch

    from onetorch.runs import provenance, trust
    from onetorch.share import folder, places
    from onetorch.share.pack import pack, publish
    from onetorch.share.verify import verify

    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        run, model = base / "run", base / "model"
        make_run(run, int((words.mb * 1e6 / 4 / 8) ** 0.5))
        publish(pack(run, str(model), licence="MIT", gate=trust.anybody), str(model))
        size = sum(file.stat().st_size for file in model.iterdir())
        target = base / "out"

        def get() -> None:
            verify(folder.fetch(places.place(model), target), trust.anybody)

        work: dict[str, Callable[[], object]] = {
            "copy and hash": lambda: by_hand(model, target),
            "share": lambda: publish(pack(run, str(target), licence="MIT", gate=trust.anybody), str(target)),
            "get": get,
            "verify": lambda: verify(folder.read(places.place(model)), trust.anybody),
        }
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(words.rounds + 1):
            order = list(work.items())
            for name, call in order[turn % len(order) :] + order[: turn % len(order)]:  # what one leaves to the disk is not always the same one's burden
                shutil.rmtree(target, ignore_errors=True)
                begin = time.perf_counter()
                call()
                if turn:  # the first is to warm up
                    seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: medians[name] / medians["copy and hash"] for name in ("share", "get", "verify")}
    for name, median in medians.items():
        verdict = f"   {ratios[name]:.2f} of copy and hash, at most {LIMIT}" if name in ratios else ""
        sys.stdout.write(f"{name:20} {1000 * median:7.1f} ms{verdict}\n")
    result = {
        "bytes": size, "rounds": words.rounds, "seconds": medians, "all_seconds": seconds, "ratios": ratios, "limit": LIMIT,
        "passed": max(ratios.values()) <= LIMIT, "threads": torch.get_num_threads(), "processor": provenance.processor(), "torch": torch.__version__,
    }  # fmt: skip
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
