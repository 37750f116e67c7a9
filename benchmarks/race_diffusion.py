"""How much sooner our diffusion has samples of some FID than lucidrains' denoising-diffusion-pytorch, training and sampling each.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install torch==2.13.0 denoising-diffusion-pytorch==2.3.4
    taskset -c 0 python benchmarks/race_diffusion.py --peer /tmp/peer/bin/python --images digits

Both train on the same images, on one thread, in turn, seed by seed. The peer is its own Trainer with its own defaults (v, sigmoid path, batches of 16, Adam
at 1e-4, EMA of 0.995) and a U-Net with at least our parameters; its samples are those of its averaged weights by its DDIM. Ours are whole runs of the recipe
cut to so many steps, `train` from beginning to end with its speed plan. FID is ours, of the same features against the same held-out images, and so many
samples of each. For every FID that the peer has at a milestone: the peer's seconds by those of our cheapest run that is at least as good. Sampling likewise,
from the last milestone and our longest run, each with several numbers of steps: the peer's cheapest way to within a tenth of its best FID, by ours to that.

Result: benchmarks/results/race_diffusion_IMAGES.json; exit code 1 where a ratio is below the target or a FID was not reached.
"""

import argparse
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
TARGET = 7.0
RECIPE = {"digits": "diffusion", "glyphs": "diffusion-glyphs"}
PEER: dict[str, list[Any]] = {"digits": ["--dim", 16, "--mults", 1, 2, 4, 8], "glyphs": ["--dim", 16, "--mults", 1, 2, 4]}


def ours(images_name: str, seed: int, steps: list[int], ladder: list[int], samples: int) -> dict[str, Any]:
    import dataclasses

    import torch

    from onetorch import recipes
    from onetorch.generative import diffusion
    from onetorch.runs.run import Run

    torch.set_num_threads(1)
    rows = []
    validate = diffusion.validate
    diffusion.validate = lambda *args: {}  # samples at the milestones are not counted on either side
    network, reference, _ = compared(images_name)
    for count in steps:
        config = dataclasses.replace(recipes.find(RECIPE[images_name])(), seed=seed, steps=count, warmup=max(1, min(50, count // 10)), eval_every=10**9)
        with tempfile.TemporaryDirectory() as place:
            os.environ["XDG_CACHE_HOME"] = place  # no speed plan from an earlier run
            start, start_cpu = time.perf_counter(), time.process_time()
            with Run(Path(place) / "run", config, fixed={"threads": "1"}, quiet=True) as run:
                model = diffusion.train(config, run)
                row: dict[str, Any] = {"step": count, "wall": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}
                row["plan"] = dict(run.record["plan"])
            del os.environ["XDG_CACHE_HOME"]
        rows.append(row | sampled(model, seed, samples, config.sample_steps, network, reference))
    rungs = [{"sampling_steps": n} | sampled(model, seed, samples, n, network, reference) for n in ladder]
    diffusion.validate = validate
    return {"parameters": sum(p.numel() for p in model.parameters()), "rows": rows, "ladder": rungs}


def sampled(model: Any, seed: int, count: int, steps: int, network: Any, reference: Any) -> dict[str, Any]:
    import torch

    from onetorch.generative import diffusion, fid

    data, _ = diffusion.load(model.config)
    generator = torch.Generator().manual_seed(seed)
    start, start_cpu = time.perf_counter(), time.process_time()
    labels = diffusion.drawn_labels(data, model.config.classes, count, generator)
    pixels = diffusion.sample(model, labels, generator, model.config.sampler, steps)
    seconds = {"cpu": time.process_time() - start_cpu, "wall": time.perf_counter() - start}
    found = fid.distance(network.embed(pixels), reference)
    return {"sampling": seconds, "fid": found.fid, "fid_se": found.error, "fid_infinity": found.infinity}


def compared(images_name: str) -> tuple[Any, Any, Any]:
    """The network, the held-out images' features, and the training images."""
    from onetorch.generative import fid, images

    train, held_out = images.parts(images.digits() if images_name == "digits" else images.glyphs(), "validation")
    network = fid.features(train)
    return network, network.embed(held_out.pixels), train


def peer(given: argparse.Namespace, seed: int, place: Path, levels: int) -> dict[str, Any]:
    import numpy as np

    from onetorch.generative import fid

    network, reference, train = compared(given.images)
    np.save(place / "train.npy", train.pixels)
    words = [given.peer, HERE.with_name("race_diffusion_peer.py"), "--train", place / "train.npy", "--levels", levels, *PEER[given.images], "--seed", seed]
    words += ["--milestones", *given.milestones, "--samples", given.samples, "--sampling-steps", given.peer_sampling]
    words += ["--ladder", *given.peer_ladder, "--out", place / "peer"]
    done = subprocess.run(list(map(str, words)), env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the peer, seed {seed}, failed:\n{done.stderr[-2000:]}")
    result = json.loads((place / "peer" / "result.json").read_text())
    for row in result["rows"] + result["ladder"]:
        found = fid.distance(network.embed(np.load(place / "peer" / row.pop("samples"))), reference)
        row |= {"fid": found.fid, "fid_se": found.error, "fid_infinity": found.infinity}
    return result


def ratios(theirs: dict[str, Any], mine: dict[str, Any], measure: str) -> tuple[dict[str, float | None], float | None]:
    """(by FID of the peer's milestones: how many times sooner ours is there, None where it never is; the same for sampling)."""
    training: dict[str, float | None] = {}
    for row in theirs["rows"]:
        enough = [r[measure] for r in mine["rows"] if r["fid"] <= row["fid"]]
        training[f"{row['fid']:.2f}"] = row[measure] / min(enough) if enough else None
    rungs = [theirs["rows"][-1], *theirs["ladder"]]
    bar = 1.1 * min(r["fid"] for r in rungs)
    cheapest = min(r["sampling"][measure] for r in rungs if r["fid"] <= bar)
    enough = [r["sampling"][measure] for r in [mine["rows"][-1], *mine["ladder"]] if r["fid"] <= bar]
    return training, cheapest / min(enough) if enough else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--images", choices=list(RECIPE), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--milestones", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000])
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200, 400, 800], help="of our runs")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--peer-sampling", type=int, default=50, help="steps of the peer's DDIM at the milestones")
    parser.add_argument("--peer-ladder", type=int, nargs="*", default=[10, 20, 100])
    parser.add_argument("--ladder", type=int, nargs="*", default=[3, 5, 10])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    levels = {"digits": 17, "glyphs": 256}[given.images]

    from onetorch.generative import fid
    from onetorch.runs import provenance

    network, reference, train = compared(given.images)
    apart = fid.distance(network.embed(train.pixels[: given.samples]), reference)
    result: dict[str, Any] = {"images": given.images, "target": TARGET, "samples": given.samples, "seeds": {}}
    result |= {"train_fid": apart.fid, "train_fid_se": apart.error}
    result["hardware"] = {name: value for name, value in provenance.hardware().items() if name != "host"}
    result |= {"versions": provenance.versions(), "date": time.strftime("%Y-%m-%d")}
    out = given.out or HERE.parent / "results" / f"race_diffusion_{given.images}.json"
    print(f"training against held-out images: FID {apart.fid:.2f} ± {apart.error:.2f}", flush=True)
    good, sooner, sampling = True, [], []
    for seed in given.seeds:
        mine = ours(given.images, seed, given.steps, given.ladder, given.samples)
        for row in mine["rows"] + mine["ladder"]:
            print(f"seed {seed}  ours   {line(row)}", flush=True)
        with tempfile.TemporaryDirectory() as place:
            theirs = peer(given, seed, Path(place), levels)
        for row in theirs["rows"] + theirs["ladder"]:
            print(f"seed {seed}  peer   {line(row)}", flush=True)
        found = {measure: ratios(theirs, mine, measure) for measure in ("cpu", "wall")}
        result["seeds"][seed] = {"peer": theirs, "ours": mine, "training": {m: f[0] for m, f in found.items()}, "sampling": {m: f[1] for m, f in found.items()}}
        training, drawing = found["wall"]
        print(f"seed {seed}  sooner, training to the FID: {training}; sampling: {drawing}", flush=True)
        sooner.append(min((v for v in training.values() if v is not None), default=0.0))
        sampling.append(drawing or 0.0)
        good = good and None not in training.values() and sooner[-1] >= TARGET and sampling[-1] >= TARGET
        good = good and mine["parameters"] <= theirs["parameters"]
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"least of the milestones, median of {len(sooner)} seeds: {statistics.median(sooner):.1f} times sooner; sampling {statistics.median(sampling):.1f}")
    return 0 if good else 1


def line(row: dict[str, Any]) -> str:
    what = f"{row['step']:5} steps  {row['cpu']:7.1f} CPU-s {row['wall']:7.1f} s" if "step" in row else f"{row['sampling_steps']:5} steps of sampling"
    return f"{what}  FID {row['fid']:.2f} ± {row['fid_se']:.2f} (infinity {row['fid_infinity']:.2f}), sampled in {row['sampling']['wall']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
