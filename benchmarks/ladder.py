"""From nanoGPT's CPU recipe to ours, one change at a time: what does each bring?

    python benchmarks/ladder.py --data tinyshakespeare.txt [--seeds 3] [--target 1.898] [--out FILE]

Every rung keeps what the rungs above it changed. The first is nanoGPT's set-up (sizes, batches, Adam, a cosine over 2,000 steps) on our block, which has rotary
positions, normalized queries and keys and squared ReLU where nanoGPT's has learned positions and GELU. A rung's row: its CPU seconds of training on one thread,
evaluations apart, until its loss on the last tenth of the text (256 windows of 64, nats per byte) first reached the target, which is where nanoGPT's own recipe
ends, and at its end, with the loss there. Evaluated eight times or more in a run. Result: benchmarks/results/ladder.json, drawn as ladder.svg beside it.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from onetorch import recipes
from onetorch.generative import gpt
from onetorch.runs import provenance
from onetorch.runs.run import Run

HERE = Path(__file__).resolve()
MUON = {"optimizer": "muon", "lr_matrix": 0.04, "lr_embedding": 0.1, "lr_head": 0.01, "clip": None}
RUNGS: list[tuple[str, dict[str, Any]]] = [
    ("nanoGPT's sizes, batches, Adam and cosine", {}),
    ("bfloat16 where this machine is faster with it", {}),
    ("Muon for the matrices, a rate for each kind of weight, 600 steps", {"steps": 600, **MUON}),
    ("batches of 24, 140 steps, the rate constant and then down", {"batch": 24, "steps": 140, "schedule": "wsd", "warmup": 5, "lr_floor": 0.0}),
    ("three layers", {"layers": 3}),
    ("embeddings of 2-, 3- and 4-grams, two layers, 80 steps", {"layers": 2, "steps": 80, "ngram_orders": (2, 3, 4), "ngram_rows": 10_000}),
]


def climb(config: gpt.Config, dtype: str | None, target: float) -> dict[str, Any]:
    """Train and take the time."""
    away, begun, curve = 0.0, 0.0, []
    validate = gpt.validate

    def timed(*args: Any) -> dict[str, float]:
        nonlocal away
        start = time.process_time()
        columns = validate(*args)
        curve.append((start - begun - away, columns["val_loss"]))
        away += time.process_time() - start
        return columns

    class Timed(Run):
        def steps(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            begun = time.process_time()
            yield from super().steps(*args, **kwargs)

    gpt.validate = timed  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as place:
            with Timed(Path(place) / "run", config, fixed={"threads": "1"} | ({"dtype": dtype} if dtype else {}), quiet=True, checkpoint_seconds=1e9) as run:
                model = gpt.train(config, run)
                plan = dict(run.record["plan"])
    finally:
        gpt.validate = validate
    reached = next((seconds for seconds, loss in curve if loss <= target), None)
    parameters = sum(p.numel() for p in model.parameters())
    return {"reached": reached, "seconds": curve[-1][0], "loss": curve[-1][1], "parameters": parameters, "plan": plan, "curve": curve}


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves of all rungs, loss over CPU seconds, with the target; needs the extra `media`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for i, (name, _) in enumerate(RUNGS):
        for row in (row for row in result["rows"] if row["rung"] == name):
            label = f"{name}: {seconds(result, name)}" if row["seed"] == 0 else None
            axes.plot(*zip(*row["curve"], strict=True), color=pyplot.colormaps["viridis"](i / len(RUNGS)), linewidth=1.2, label=label)
    axes.axhline(result["target"], color="black", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", ylim=(1.7, 2.8), xlabel="CPU seconds of training, one thread", ylabel="nats per character, held out")
    title = f"CPU seconds to {result['target']} nats:"
    figure.legend(loc="outside lower left", ncols=2, fontsize=8, frameon=False, title=title, title_fontsize=8, alignment="left")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def seconds(result: dict[str, Any], rung: str) -> str:
    """The median over the seeds of the CPU seconds to the target."""
    reached = [row["reached"] for row in result["rows"] if row["rung"] == rung]
    return "never" if None in reached else f"{statistics.median(reached):.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", type=float, default=1.898)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "ladder.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        config = recipes.find("gpt-nanogpt-char")()
        for i, (name, change) in enumerate(RUNGS):
            config = dataclasses.replace(config, **change)
            timed = dataclasses.replace(config, data=arguments.data, seed=seed, eval_every=max(config.steps // 16, 5), eval_windows=256, eval_samples=0)
            rows.append({"rung": name, "seed": seed, **climb(timed, "float32" if i == 0 else None, arguments.target)})
            r = rows[-1]
            reached = "never" if r["reached"] is None else f"{r['reached']:.1f} CPU-s"
            end = f"end: {r['loss']:.4f} after {r['seconds']:.1f} CPU-s, {r['parameters']:,} parameters"
            print(f"seed {seed}  {name:60}  to {arguments.target}: {reached:>11}  {end}", flush=True)
    hardware = {name: value for name, value in provenance.hardware().items() if name != "host"}
    result = {"target": arguments.target, "rows": rows, "hardware": hardware, "versions": provenance.versions(), "date": time.strftime("%Y-%m-%d")}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, arguments.out.with_suffix(".svg"))
    for name, _ in RUNGS:
        print(f"{name:60}  {seconds(result, name)} CPU-s")


if __name__ == "__main__":
    main()
