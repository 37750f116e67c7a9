"""A wide MLP at 75 % block sparsity, with and without a layout that changes, beside dense MLPs at equal time.

    python benchmarks/sparse_dynamic.py                            # both tasks, five seeds each, about ten minutes on three idle cores
    python benchmarks/sparse_dynamic.py --tasks bytes --seconds 10 --seeds 2

Tasks, on real data:
    bytes     the next byte of Python's standard library from the 32 before it (embeddings of 32, then the MLP; Bengio et al. 2003); bits per byte on the
              last tenth
    digits    scikit-learn's 1,797 digits of 8 x 8; error on 400 of them, which the seed draws
Networks, with the same learning rate, batch and schedule each:
    dense           every weight
    dense, narrow   dense of half the width: about as many weights in the hidden layers as the sparse ones
    static          75 % of the blocks of the hidden layers missing, at random, for good
    SET, RigL       the same with 30 % (falling) of the blocks exchanged every `EVERY` steps of the first three quarters

Equal time: the seconds per step of each network are measured first, in turn, on one thread (a step that changes the layout, and the one before it, in their
share); each network then trains for as many steps as fit into the given seconds. So the curves do not depend on what else the machine does meanwhile.
Writes benchmarks/results/sparse_dynamic.json: means and 95 % intervals over the seeds, and the curves.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from onetorch.generative import data
from onetorch.sparse import DynamicSparsity, Linear, patterns

NETWORKS = ("dense", "dense, narrow", "static", "SET", "RigL")
EVERY, FRACTION, DENSITY, POINTS = 25, 0.3, 0.25, 4
TASKS = {  # width, block, batch, learning rate, seconds
    "bytes": {"width": 2048, "block": 32, "batch": 256, "lr": 3e-3, "seconds": 20.0, "metric": "bits per byte"},
    "digits": {"width": 1024, "block": 16, "batch": 128, "lr": 1e-3, "seconds": 5.0, "metric": "error in %"},
}
CONTEXT, EMBEDDING = 32, 32
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5 % quantile for so many seeds
RESULT = Path(__file__).parent / "results" / "sparse_dynamic.json"


def network(task: str, name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    width, block = TASKS[task]["width"] // (2 if name == "dense, narrow" else 1), TASKS[task]["block"]

    def linear(inputs: int, outputs: int) -> nn.Module:
        if name.startswith("dense"):
            return nn.Linear(inputs, outputs)
        return Linear(inputs, outputs, patterns.balanced_random((outputs, inputs), block, DENSITY, generator))

    inputs, outputs = (CONTEXT * EMBEDDING, 256) if task == "bytes" else (64, 10)
    front = [nn.Embedding(256, EMBEDDING), nn.Flatten()] if task == "bytes" else []
    return nn.Sequential(*front, linear(inputs, width), nn.ReLU(), linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


class Data:
    def __init__(self, task: str, seed: int):
        self.task, self.batch = task, TASKS[task]["batch"]
        self.generator = torch.Generator().manual_seed(seed)
        if task == "bytes":
            text = torch.frombuffer(bytearray(data.read(None).data), dtype=torch.uint8)
            cut = text.shape[0] * 9 // 10
            self.train, held = text[:cut], text[cut:]
            at = torch.arange(10_000) * ((held.shape[0] - CONTEXT - 1) // 10_000)
            self.test = self.windows(held, at)
        else:
            from sklearn.datasets import load_digits

            digits = load_digits()
            x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
            order = torch.randperm(x.shape[0], generator=self.generator)
            self.train, self.test = (x[order[400:]], y[order[400:]]), (x[order[:400]], y[order[:400]])

    def windows(self, text: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        window = text[at[:, None] + torch.arange(CONTEXT + 1)].long()
        return window[:, :-1], window[:, -1]

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.task == "bytes":
            return self.windows(self.train, torch.randint(self.train.shape[0] - CONTEXT, (self.batch,), generator=self.generator))
        at = torch.randint(self.train[0].shape[0], (self.batch,), generator=self.generator)
        return self.train[0][at], self.train[1][at]

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        total = 0.0
        for x, y in zip(self.test[0].split(1000), self.test[1].split(1000), strict=True):
            logits = model(x)
            if self.task == "bytes":
                total += float(nn.functional.cross_entropy(logits, y, reduction="sum")) / math.log(2)
            else:
                total += 100 * int((logits.argmax(1) != y).sum())
        return total / self.test[1].shape[0]


def trainer(task: str, name: str, seed: int, steps: int, every: int = EVERY):
    """-> (model, data, a function that does one step)."""
    model, source = network(task, name, seed), Data(task, seed)
    optimizer = torch.optim.Adam(model.parameters(), TASKS[task]["lr"], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))
    grow = {"SET": "random", "RigL": "gradient"}.get(name)
    dynamic = None if grow is None else DynamicSparsity(model, optimizer, grow=grow, every=every, end=max(1, steps * 3 // 4), fraction=FRACTION)

    def step() -> None:
        x, y = next(source)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
        if dynamic is not None:
            dynamic.step()
        optimizer.zero_grad()

    return model, source, step


def seconds_per_step(task: str, rounds: int = 7) -> dict[str, float]:
    """Medians, all networks in turn; of those that change, the time of EVERY steps with one change in it."""
    runs = {(name, False): trainer(task, name, 0, 10_000, 10**9)[2] for name in NETWORKS}
    runs |= {(name, True): trainer(task, name, 0, 10_000, 1)[2] for name in ("SET", "RigL")}
    times: dict = {key: [] for key in runs}
    for round_ in range(rounds + 1):
        for key, step in runs.items():
            start = time.perf_counter()
            for _ in range(5):
                step()
            if round_:
                times[key].append((time.perf_counter() - start) / 5)
    middle = {key: statistics.median(values) for key, values in times.items()}
    return {name: middle[name, False] + ((middle[name, True] - middle[name, False]) / EVERY if (name, True) in middle else 0.0) for name in NETWORKS}


def run(task: str, name: str, seed: int, steps: int) -> dict:
    model, source, step = trainer(task, name, seed, steps)
    marks, curve = {round(steps * n / POINTS) for n in range(1, POINTS + 1)}, []
    for n in range(1, steps + 1):
        step()
        if n in marks:
            curve.append([round(n / steps, 4), source.score(model)])
    return {"task": task, "network": name, "seed": seed, "steps": steps, "curve": curve, "weights": sum(p.numel() for p in model.parameters())}


def interval(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seconds", type=float, help="of training per network; left out: the task's own")
    parser.add_argument("--seeds", type=int, default=5, choices=list(STUDENT))
    parser.add_argument("--workers", type=int, default=3, help="processes of one thread each")
    parser.add_argument("--rates", type=Path, help="a file of seconds per step, measured before (written where it does not exist)")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(run(**json.loads(arguments.one))))
        return
    if arguments.rates and arguments.rates.exists():
        rates = json.loads(arguments.rates.read_text())
    else:
        rates = {task: seconds_per_step(task) for task in arguments.tasks}
        if arguments.rates:
            arguments.rates.write_text(json.dumps(rates))
    jobs = [
        {"task": task, "name": name, "seed": seed, "steps": round((arguments.seconds or TASKS[task]["seconds"]) / rates[task][name])}
        for task in arguments.tasks
        for seed in range(arguments.seeds)
        for name in NETWORKS
    ]
    done, running = [], []
    while jobs or running:
        while jobs and len(running) < arguments.workers:
            file = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
            process = subprocess.Popen([sys.executable, __file__, "--one", json.dumps(jobs.pop(0))], stdout=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
            running.append((process, file))
        time.sleep(0.2)
        for process, file in [pair for pair in running if pair[0].poll() is not None]:
            running.remove((process, file))
            if process.returncode:
                sys.exit(f"a training run failed with code {process.returncode}")
            file.seek(0)
            done.append(json.loads(file.read()))
            file.close()
    result = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__, "tasks": {}}
    for task in arguments.tasks:
        rows = {}
        print(f"{task}: {TASKS[task]['metric']}")
        for name in NETWORKS:
            runs = sorted((r for r in done if r["task"] == task and r["network"] == name), key=lambda r: r["seed"])
            curve = [[point[0], *interval([r["curve"][n][1] for r in runs])] for n, point in enumerate(runs[0]["curve"])]
            mean, half = curve[-1][1:]
            rows[name] = {
                "mean": round(mean, 4), "interval": round(half, 4), "steps": runs[0]["steps"], "weights": runs[0]["weights"],
                "ms_per_step": round(1000 * rates[task][name], 2), "curve": [[round(v, 4) for v in point] for point in curve],
            }  # fmt: skip
            row = rows[name]
            print(f"{task:<7} {name:<14} {mean:8.4f} +- {half:.4f} {row['steps']} x {row['ms_per_step']} ms, {row['weights']:,} weights")
        print()
        seconds = arguments.seconds or TASKS[task]["seconds"]
        result["tasks"][task] = {"seeds": arguments.seeds, "seconds": seconds, "metric": TASKS[task]["metric"], "networks": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
