"""Bits per dimension of every likelihood family on the same held-out digits, beside plain models.

    python benchmarks/likelihoods.py [--seeds 0 1 2] [--recipes gpt-digits glow vae diffusion] [--out FILE]

Each recipe is trained as it stands, on one thread, and evaluated on the last fifth, once for each seed. The measure is the same for all: -log2 P(image) by the
number of pixels. The GPT's is exact, pixel after pixel. Glow's is exact but for the noise that fills the levels (a mean over 16 draws of it, and below it the
bound of their mean density), the VAE's is the importance-weighted bound of 64 draws with the ELBO above it, diffusion's the variational bound and the
probability flow. None is below the model's true figure but by chance. Errors are standard errors over images; a spread is over seeds. The target is 60 % of
what a model costs that knows nothing; note that a histogram of each pixel by itself meets it.

Result: benchmarks/results/likelihoods.json; exit code 1 where glow or vae miss the target in a seed.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from onetorch import recipes
from onetorch.generative import images, likelihood
from onetorch.runs import algorithm, provenance
from onetorch.runs.run import Run

HERE = Path(__file__).resolve()
TARGET = 0.6
OPTIONS: dict[str, dict[str, Any]] = {"diffusion": {"flow_steps": 25}}
COLUMNS = {"bpd_iw": "mean density of 16 draws", "elbo_bpd": "ELBO", "flow_bpd": "probability flow"}


def measure(name: str, seed: int) -> dict[str, Any]:
    """One run of a recipe and its evaluation."""
    recipe = recipes.find(name)
    config = dataclasses.replace(recipe(), seed=seed)
    module = algorithm.read(recipe.algorithm).load()
    with tempfile.TemporaryDirectory() as place:
        start = time.process_time()
        with Run(Path(place) / "run", config, recipe=name, fixed={"threads": "1"}, quiet=True) as run:
            model = module.train(config, run)
        seconds = time.process_time() - start
    found = module.evaluate(model, config, baselines=False, **OPTIONS.get(recipe.algorithm, {}))
    return {"seed": seed, "train_cpu_seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())} | found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=["gpt-digits", "glow", "vae", "diffusion"])
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "likelihoods.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    train, held_out = images.parts(images.digits(), "validation")
    plain = likelihood.baselines(train, held_out)
    bar = TARGET * plain["uniform_bpd"]
    print(f"{len(held_out)} held-out digits, bits per dimension")
    print(f"  {'knows nothing':44}{plain['uniform_bpd']:.3f}   {TARGET:.0%} of it: {bar:.3f}")
    for name, what in (("histogram", "histogram of each pixel"), ("gaussian", "PCA-Gaussian")):
        print(f"  {what:44}{plain[f'{name}_bpd']:.3f} ± {plain[f'{name}_bpd_se']:.3f}", flush=True)
    kept = json.loads(given.out.read_text(encoding="utf-8"))["families"] if given.out.exists() else {}  # those that are not measured again
    hardware = {name: value for name, value in provenance.hardware().items() if name != "host"}
    result: dict[str, Any] = {"baselines": plain, "target": bar, "families": kept, "hardware": hardware, "versions": provenance.versions()}
    result["date"] = time.strftime("%Y-%m-%d")
    good = True
    for name in given.recipes:
        rows = result["families"][name] = [measure(name, seed) for seed in given.seeds]
        good = good and (name not in ("glow", "vae") or max(r["bpd"] for r in rows) < bar)
        for column, what in {"bpd": "", **COLUMNS}.items():
            if column in rows[0]:
                values = sorted(r[column] for r in rows)
                title = f"{name}, {what}" if what else name
                mean, error = sum(values) / len(values), rows[0][f"{column}_se"]
                print(f"  {title:44}{mean:.3f} ± {error:.3f}   {values[0]:.3f} to {values[-1]:.3f} over {len(rows)} seeds")
        seconds, fids = ([r[key] for r in rows] for key in ("train_cpu_seconds", "fid"))
        print(f"    trained in {min(seconds):.0f} to {max(seconds):.0f} CPU-s; FID {min(fids):.1f} to {max(fids):.1f}", flush=True)
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
