"""What a run costs beside the training: a row of metrics, a turn of the loop, the name of a phase, a checkpoint.

    python benchmarks/overheads.py [--rows 20000] [--saves 30] [--out benchmarks/results/overheads.json]

Targets: a row of five scalars at most 20 microseconds (median of single calls); `run.phase` at most 0.5 (mean over many);
an atomic checkpoint with hashes at most 1.3 times `torch.save` and fsync of
the same state (median of the ratios of neighbours, the two in turn, after a warm-up, since a file system's first pages cost more than recycled ones).
Plain `torch.save` overwrites one file, as most people do; a run removes its oldest checkpoint in a thread while training goes on, which is timed by itself.
Exits 1 on a miss.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import onetorch
from onetorch.runs import checkpoint, provenance

ROW_TARGET = 20.0  # microseconds
PHASE_TARGET = 0.5  # microseconds
SAVE_TARGET = 1.3  # times plain


@dataclass(frozen=True)
class Config:
    seed: int = 0


@dataclass
class State:
    model: nn.Module
    iteration: int = 0


def rows(folder: Path, count: int) -> dict[str, float]:
    """Microseconds of one `run.log` of five scalars, flushes to the file included, of one turn of `run.steps` with `run.checkpoint` not due, of `run.phase`."""
    with onetorch.Run(folder, Config(), quiet=True) as run:
        logs, turns = [], []
        state = run.restore(State(nn.Linear(2, 2)))
        mark = time.perf_counter()
        for state.iteration in run.steps(0, count):
            begin = time.perf_counter()
            run.log(state.iteration, loss=0.123456789, accuracy=0.5, grad_norm=1.25, entropy=0.693147, lr=3e-4)
            logs.append(time.perf_counter() - begin)
            if state.iteration < count:
                run.checkpoint(state)
            now = time.perf_counter()
            turns.append(now - mark - logs[-1])
            mark = now
        begin = time.perf_counter()
        for _ in range(count):
            run.phase("action")
            run.phase("environment")
        phase = (time.perf_counter() - begin) / (2 * count)
    size = (folder / "metrics.jsonl").stat().st_size
    return {
        "row_us_median": 1e6 * statistics.median(logs),
        "row_us_mean": 1e6 * statistics.mean(logs),
        "row_us_p99": 1e6 * sorted(logs)[int(0.99 * len(logs))],
        "row_bytes": size / count,
        "turn_us_median": 1e6 * statistics.median(turns),
        "turn_us_mean": 1e6 * statistics.mean(turns),
        "phase_us_mean": 1e6 * phase,
    }


def saves(folder: Path, megabytes: int, count: int) -> dict[str, float]:
    """Milliseconds of `torch.save` + fsync and of `checkpoint.save` for a model and two moments of together so many MiB, in turn."""
    generator = torch.Generator().manual_seed(megabytes)
    size = (megabytes << 20) // 4 // 3 // 8
    model = {f"layers.{i}.weight": torch.randn(size, generator=generator) for i in range(8)}
    moments = {f"optimizer.state.{i}.{m}": torch.randn(size, generator=generator) for i in range(8) for m in ("exp_avg", "exp_avg_sq")}
    record = {"step": 0, "state": {"iteration": 0}}
    plain, ours, removal = [], [], []
    for turn in range(count + 4):
        begin = time.perf_counter()
        with open(folder / "plain.pt", "wb") as file:
            torch.save({"model": model, "optimizer": moments}, file)
            file.flush()
            os.fsync(file.fileno())
        plain.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        checkpoint.save(folder / "checkpoints", turn + 1, model, moments, record | {"step": turn + 1})
        ours.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        checkpoint.retire(folder / "checkpoints")
        removal.append(time.perf_counter() - begin)
    plain, ours, removal = plain[4:], ours[4:], removal[4:]
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "plain_ms": 1e3 * statistics.median(plain),
        "ours_ms": 1e3 * statistics.median(ours),
        "removing_ms": 1e3 * statistics.median(removal),
        "ratio_median": quartiles[1],
        "ratio_quartile_low": quartiles[0],
        "ratio_quartile_high": quartiles[2],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--saves", type=int, default=30, help="at 1 and 10 MiB; a quarter of it at 100")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (else the system's temporary folder)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overheads.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": provenance.hardware(), "versions": provenance.versions(), "threads": torch.get_num_threads(), "seeds": "one per size"}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        result["log"] = rows(Path(name) / "log", args.rows)
        log = result["log"]
        mean, tail = log["row_us_mean"], log["row_us_p99"]
        sys.stdout.write(f"a row of five scalars: {log['row_us_median']:.1f} us (mean {mean:.1f}, p99 {tail:.1f}; <= {ROW_TARGET})\n")
        sys.stdout.write(f"a turn of run.steps and run.checkpoint, not due: {log['turn_us_median']:.2f} us (mean {log['turn_us_mean']:.2f})\n")
        sys.stdout.write(f"the name of a phase: {log['phase_us_mean']:.3f} us (<= {PHASE_TARGET})\n")
        result["checkpoint"] = {}
        for megabytes in (1, 10, 100):
            place = Path(name) / str(megabytes)
            place.mkdir()
            row = result["checkpoint"][f"{megabytes} MiB"] = saves(place, megabytes, args.saves if megabytes < 100 else max(8, args.saves // 4))
            sys.stdout.write(
                f"checkpoint of {megabytes} MiB: {row['ours_ms']:.1f} ms (and {row['removing_ms']:.1f} beside the training to remove the oldest),"
                f" torch.save + fsync {row['plain_ms']:.1f} ms, ratio {row['ratio_median']:.2f}"
                f" [{row['ratio_quartile_low']:.2f}, {row['ratio_quartile_high']:.2f}] (<= {SAVE_TARGET})\n"
            )
    missed = [f"{size}: {row['ratio_median']:.2f}" for size, row in result["checkpoint"].items() if row["ratio_median"] > SAVE_TARGET]
    missed += [f"row: {log['row_us_median']:.1f} us"] if log["row_us_median"] > ROW_TARGET else []
    missed += [f"phase: {log['phase_us_mean']:.3f} us"] if log["phase_us_mean"] > PHASE_TARGET else []
    result["missed"] = missed
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if missed:
        sys.stdout.write(f"MISSED: {'; '.join(missed)}\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
