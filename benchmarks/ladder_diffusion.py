"""From the set-up of lucidrains' denoising-diffusion-pytorch to ours, one change at a time: what does each bring?

    python benchmarks/ladder_diffusion.py [--seed 0] [--target 25] [--out FILE]

Every rung keeps what the rungs above it changed. The first is the peer's set-up in our code: its sizes of a U-Net, noise mixed with images as v, batches of 16,
Adam at 1e-4, an average of 0.995, DDIM (in 20 steps), no labels, float32. Digits; a rung's row: its CPU seconds of training on one thread, evaluations apart,
until the FID of 500 samples of the averaged weights first was at the target, and at its end, with the FID there. Evaluated eight times in a run.

Result: benchmarks/results/ladder_diffusion.json and .svg, the FID of every rung over CPU seconds.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer imports it on first use, which takes seconds

from onetorch import recipes
from onetorch.generative import diffusion
from onetorch.runs import provenance
from onetorch.runs.run import Run

HERE = Path(__file__).resolve()
SHAPE = {"backbone": "transformer", "width": 192, "depth": 3, "patch": 4}
RUNGS: list[tuple[str, dict[str, Any]]] = [
    ("lucidrains' sizes, batches, Adam, v and DDIM", {}),
    ("a step size of 1e-3 in batches of 64", {"lr": 1e-3, "batch": 64, "steps": 320}),
    ("labels", {"classes": 10}),
    ("a transformer of 4x4 pixels a token, its matrices by Muon", {**SHAPE, "steps": 320}),
    ("bfloat16 where this machine is faster with it", {}),
    ("flow matching, Heun in 10 steps", {"objective": "flow", "sampler": "heun", "sample_steps": 10}),
    ("a step size of 1e-2 for what Muon does not train, batches of 128", {"lr": 1e-2, "batch": 128, "steps": 80}),
    ("an average of 0.99, rates falling in the second half", {"ema": 0.99, "decay": 0.5}),
]
BFLOAT16 = 4  # the rung from which on the speed plan may choose


def climb(config: diffusion.Config, dtype: str | None, target: float) -> dict[str, Any]:
    """Train and take the time."""
    away, begun, curve = 0.0, 0.0, []
    validate = diffusion.validate

    def timed(model: Any, data: Any, held_out: Any, grid: Path) -> dict[str, float]:
        nonlocal away
        start, columns = time.process_time(), {}
        if not grid.stem.endswith("-raw"):
            columns = validate(model, data, held_out, grid)
            curve.append((start - begun - away, columns["fid"], columns["fid_se"]))
        away += time.process_time() - start
        return columns

    class Timed(Run):
        def steps(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            begun = time.process_time()
            yield from super().steps(*args, **kwargs)

    diffusion.validate = timed  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as place:
            fixed = {"threads": "1"} | ({"dtype": dtype} if dtype else {})
            with Timed(Path(place) / "run", config, fixed=fixed, quiet=True, checkpoint_seconds=1e9) as run:
                model = diffusion.train(config, run)
                plan = dict(run.record["plan"])
    finally:
        diffusion.validate = validate
    reached = next((seconds for seconds, fid, _ in curve if fid <= target), None)
    parameters = sum(p.numel() for p in model.parameters())
    return {"reached": reached, "seconds": curve[-1][0], "fid": curve[-1][1], "fid_se": curve[-1][2], "parameters": parameters, "plan": plan, "curve": curve}


def draw(rows: list[dict[str, Any]], target: float, path: Path) -> None:
    """Each rung's FID over CPU seconds, both logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "ladder"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for i, row in enumerate(rows):
        seconds, fids, _ = zip(*row["curve"], strict=True)
        axes.plot(seconds, fids, marker=".", color=matplotlib.colormaps["viridis"](i / len(rows)), label=f"{i + 1}. {row['rung']}")
    axes.axhline(target, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="CPU seconds of training, one thread", ylabel="FID of 500 samples, digits")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=25.0)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "ladder_diffusion.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = recipes.find("diffusion-lucidrains")()
    rows = []
    for i, (name, change) in enumerate(RUNGS):
        config = dataclasses.replace(config, **change)
        timed = dataclasses.replace(config, seed=given.seed, eval_every=config.steps // 8, eval_samples=500, eval_share=1e9)
        rows.append({"rung": name, "steps": config.steps, **climb(timed, "float32" if i < BFLOAT16 else None, given.target)})
        r = rows[-1]
        reached = "never" if r["reached"] is None else f"{r['reached']:.1f} CPU-s"
        end = f"end: {r['fid']:.2f} ± {r['fid_se']:.2f} after {r['seconds']:.1f} CPU-s, {r['parameters']:,} parameters"
        print(f"{name:66}  to {given.target:g}: {reached:>11}  {end}", flush=True)
        hardware = {name: value for name, value in provenance.hardware().items() if name != "host"}
        result = {"target": given.target, "seed": given.seed, "rows": rows, "hardware": hardware, "versions": provenance.versions()}
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(result | {"date": time.strftime("%Y-%m-%d")}, indent=1) + "\n", encoding="utf-8")
        draw(rows, given.target, given.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
