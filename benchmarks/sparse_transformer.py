"""Does block-sparse attention pay in training? Bits per byte over wall-clock time for dense, local, strided and fixed attention at long contexts.

    python benchmarks/sparse_transformer.py [--contexts 2048 4096] [--kinds …] [--seeds 2] [--steps 300] [--longer 1] [--threads 1]

The recipe `gpt` with another size, on the source of Python's standard library (or --data), the same batches for every kind of attention. Dense attention
trains for --steps; the others for --longer times as many, which is for comparing at about the same time: a run is best at the end of its schedule. Dense
attention by the fastest way this machine has for it: a measurement chooses between torch's fused one and our own over causal blocks. A run is a process; the
kinds take turns, seed by seed. The clocks run while training and stand while evaluating. All are evaluated on the same held-out windows of that context. With
one thread the ratios are of CPU seconds, which are wall-clock seconds on a quiet core and do not mind the neighbours; else of wall-clock.

Two questions, answered for each sparse kind against dense attention with the same seed: after what share of dense attention's whole time has it reached, for
the first time, the bits per byte that dense attention ends with ("sooner" is one over that; none where it never does in its run); and how much time does a
step take. Also noted: the seconds of a pass in every way that was measured. The result is written anew after each seed. Exits 1 where no sparse kind is
sooner with every seed.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
KINDS = ("dense", "local", "strided", "fixed")
TOKENS = 4096  # bytes in a step


def child(kind: str, context: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from onetorch.generative import gpt
    from onetorch.runs.run import Run

    torch.set_num_threads(arguments.threads)
    steps = arguments.steps if kind == "dense" else round(arguments.steps * arguments.longer)
    config = gpt.Config(
        data=arguments.data, seed=seed, steps=steps, batch=max(TOKENS // context, 1), context=context, layers=2, heads=4, width=128, attention=kind,
        stride=128, base_batch=None, base_width=None, ngram_rows=32_768, rotary_base=float(context), eval_every=max(steps // 20, 1),
        eval_windows=2**16 // context, eval_samples=0,
    )  # fmt: skip
    # More patient than the speed plan, whose two seconds are over after a few passes of such windows.
    ways = [{"device": "cpu", "dtype": dtype, "attention": path} for dtype in ("float32", "bfloat16") for path in gpt.paths(config)]
    seconds_of = {f"{way['attention']} {way['dtype']}": passes(gpt, config, way) for way in ways}
    path, dtype = min(seconds_of, key=seconds_of.__getitem__).split()
    away = begun = (0.0, 0.0)  # wall and CPU seconds: of evaluation so far; when training began
    curve: list[tuple[float, float, float]] = []  # wall and CPU seconds of training, bits per byte
    validate = gpt.validate

    def clock() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def timed(*args: Any) -> dict[str, float]:
        nonlocal away
        start = clock()
        columns = validate(*args)
        curve.append((round(start[0] - begun[0] - away[0], 2), round(start[1] - begun[1] - away[1], 2), columns["val_bpb"]))
        now = clock()
        away = (away[0] + now[0] - start[0], away[1] + now[1] - start[1])
        return columns

    gpt.validate = timed

    class Timed(Run):
        def steps(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            begun = clock()
            yield from super().steps(*args, **kwargs)

    with tempfile.TemporaryDirectory() as place:
        fixed = {"threads": str(arguments.threads), "attention": path, "dtype": dtype}
        with Timed(Path(place) / "run", config, fixed=fixed, quiet=True, checkpoint_seconds=1e9) as run:
            model = gpt.train(config, run)
            plan = dict(run.record["plan"])
        rows = [json.loads(line) for line in (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()]
    result = gpt.evaluate(model, config, windows=2**17 // context, baselines=False)
    seconds = statistics.median(b["cpu_seconds"] - a["cpu_seconds"] for a, b in itertools.pairwise(rows) if "val_bpb" not in b)
    found = {"kind": kind, "context": context, "seed": seed, "plan": plan, "curve": curve, "step_cpu_seconds": seconds}
    found |= {"bpb": result["bpb"], "bpb_se": result["bpb_se"], "flops_per_byte": gpt.flops(config, context) / context}
    return found | {"pass_seconds": seconds_of}


def passes(gpt: Any, config: Any, choice: dict[str, Any]) -> float:
    """Seconds of a forward and a backward pass of a quarter of a batch (a window at least)."""
    work, seconds = gpt.trial(config, choice), []
    for _ in range(4):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def sooner(dense: dict[str, Any], other: dict[str, Any], clock: int) -> float | None:
    """Dense attention's time over the other's to dense attention's last value in the curve."""
    last = dense["curve"][-1]
    return next((last[clock] / row[clock] for row in other["curve"] if row[2] <= last[2]), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--longer", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "sparse_transformer.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, context, seed = arguments.child
        sys.stdout.write("\n" + json.dumps(child(kind, int(context), int(seed), arguments)) + "\n")
        return 0

    runs: list[dict[str, Any]] = []
    good = False
    for seed in range(arguments.seeds):
        for context, kind in itertools.product(arguments.contexts, arguments.kinds):
            words = [sys.executable, HERE, *sys.argv[1:], "--child", kind, context, seed]
            environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": str(arguments.threads)}
            done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{kind}, context {context}, seed {seed} failed:\n{done.stderr}")
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            r = runs[-1]
            wall, cpu, _ = r["curve"][-1]
            line = f"context {context}  seed {seed}  {kind:8} {wall:7.1f} s {cpu:7.1f} CPU-s  {r['bpb']:.4f} ± {r['bpb_se']:.4f} bits per byte"
            sys.stdout.write(f"{line}  step {r['step_cpu_seconds'] * 1e3:.0f} CPU-ms  {r['plan']}\n")
            sys.stdout.flush()
        good = summary(runs, arguments)
    return 0 if good else 1


def summary(runs: list[dict[str, Any]], arguments: argparse.Namespace) -> bool:
    """Print and write what the runs so far say; whether with each context a sparse kind is sooner with every seed."""
    table, good = [], True
    clock = 1 if arguments.threads == 1 else 0
    for context in arguments.contexts:
        dense = {r["seed"]: r for r in runs if r["context"] == context and r["kind"] == "dense"}
        for kind in arguments.kinds:
            mine = [r for r in runs if r["context"] == context and r["kind"] == kind]
            ratios = [sooner(dense[r["seed"]], r, clock) for r in mine] if dense and kind != "dense" else []
            row = {"context": context, "kind": kind, "bpb": statistics.mean(r["bpb"] for r in mine)}
            row["seconds"] = statistics.mean(r["curve"][-1][clock] for r in mine)
            table.append(row | {"sooner": ratios})
            said = ", ".join("never" if r is None else f"{r:.2f} times" for r in ratios)
            sys.stdout.write(f"context {context}  {kind:8} {row['seconds']:7.1f} s  {row['bpb']:.4f} bits per byte" + (f"  sooner: {said}\n" if said else "\n"))
        sparse = [r["sooner"] for r in table if r["context"] == context and r["kind"] != "dense"]
        good &= any(ratios and all(r is not None and r > 1 for r in ratios) for ratios in sparse)

    from onetorch.runs import provenance

    hardware = {name: value for name, value in provenance.hardware().items() if name != "host"}
    result = {"steps": arguments.steps, "longer": arguments.longer, "threads": arguments.threads, "bytes_per_step": TOKENS, "table": table, "runs": runs}
    result |= {"hardware": hardware, "versions": provenance.versions(), "date": time.strftime("%Y-%m-%d")}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return good


if __name__ == "__main__":
    sys.exit(main())
