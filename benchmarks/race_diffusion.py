"""How much sooner our diffusion has samples of some FID than lucidrains' denoising-diffusion-pytorch, training and sampling each.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install torch==2.13.0 denoising-diffusion-pytorch==2.3.4
    taskset -c 0 python benchmarks/race_diffusion.py --peer /tmp/peer/bin/python --images digits

Both train on the same images, on one thread, in turn, seed by seed, each in a process of its own. The peer is its own Trainer with its own defaults (v, sigmoid
path, batches of 16, Adam at 1e-4, EMA of 0.995) and a U-Net with at least our parameters; its samples are those of its averaged weights by its DDIM. Ours are
whole runs of the recipe cut to so many steps. Ours is told the labels, which the peer has no use for; its samples' labels are drawn as the data have them. With
--unlabelled ours has none either, and is held against the peer's times in the result's file.
FID is ours, of the same features against the same held-out images, and so many samples of each. For every FID that the peer has at a milestone: the peer's
seconds by those of our cheapest run that is at least as good. Times by the same rule for both:

    loop     from the first step to the last, without evaluation
    process  from the start of the process: imports, reading and preparing, and for ours the measuring of the speed plan too

Sampling likewise, from the last milestone and our longest run, each with several numbers of steps: the peer's cheapest way to within a tenth of its best FID,
by ours to that. Seeds that stand in the result's file already are kept, so that they can be run one by one.

Result: benchmarks/results/race_diffusion_IMAGES.json; exit code 1 where a ratio of the loops is below the target or a FID was not reached.
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

BEGUN = time.perf_counter()
HERE = Path(__file__).resolve()
TARGET = 7.0
RECIPE = {"digits": "diffusion", "glyphs": "diffusion-glyphs"}
PEER: dict[str, list[Any]] = {"digits": ["--dim", 16, "--mults", 1, 2, 4, 8], "glyphs": ["--dim", 16, "--mults", 1, 2, 4]}


def ours(given: argparse.Namespace) -> dict[str, Any]:
    """Runs of one seed, in a process that has done nothing before."""
    import dataclasses

    import torch

    from onetorch import recipes
    from onetorch.generative import diffusion
    from onetorch.runs.run import Run

    class Timed(Run):
        def steps(self, *args: Any, **kwargs: Any) -> Any:
            self.begun = clock()
            yield from super().steps(*args, **kwargs)

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    before: dict[str, float] = {}
    network = reference = None
    diffusion.validate = lambda *args: {}  # samples at the milestones are not counted on either side
    for count in given.steps:
        recipe = recipes.find(RECIPE[given.images])()
        config = dataclasses.replace(recipe, seed=given.seeds[0], steps=count, warmup=max(1, min(recipe.warmup, count // 10)), eval_every=10**9)
        if given.unlabelled:
            config = dataclasses.replace(config, classes=0)
        with tempfile.TemporaryDirectory() as place:
            os.environ["XDG_CACHE_HOME"] = place  # no speed plan from an earlier run
            with Timed(Path(place) / "run", config, fixed={"threads": "1"}, quiet=True) as run:
                model = diffusion.train(config, run)
                row: dict[str, Any] = {"step": count, **since(run.begun), "plan": dict(run.record["plan"])}
                before = before or {"cpu": run.begun[0], "wall": run.begun[1] - BEGUN}
            del os.environ["XDG_CACHE_HOME"]
        if network is None:
            network, reference, _ = compared(given.images)
        rows.append(row | sampled(model, given.seeds[0], given.samples, config.sample_steps, network, reference))
    rungs = [{"sampling_steps": n} | sampled(model, given.seeds[0], given.samples, n, network, reference) for n in given.ladder]
    return {"parameters": sum(p.numel() for p in model.parameters()), "before": before, "rows": rows, "ladder": rungs}


def clock() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def since(start: tuple[float, float]) -> dict[str, float]:
    now = clock()
    return {"cpu": now[0] - start[0], "wall": now[1] - start[1]}


def sampled(model: Any, seed: int, count: int, steps: int, network: Any, reference: Any) -> dict[str, Any]:
    import torch

    from onetorch.generative import diffusion, fid

    data, _ = diffusion.load(model.config)
    generator = torch.Generator().manual_seed(seed)
    start = clock()
    labels = diffusion.drawn_labels(data, model.config.classes, count, generator)
    pixels = diffusion.sample(model, labels, generator, model.config.sampler, steps)
    seconds = since(start)
    found = fid.distance(network.embed(pixels), reference)
    return {"sampling": seconds, "fid": found.fid, "fid_se": found.error, "fid_infinity": found.infinity}


def compared(images_name: str) -> tuple[Any, Any, Any]:
    """The network, the held-out images' features, and the training images."""
    from onetorch.generative import fid, images

    train, held_out = images.parts(images.digits() if images_name == "digits" else images.glyphs(), "validation")
    network = fid.features(train)
    return network, network.embed(held_out.pixels), train


def half(words: list[Any], what: str) -> None:
    done = subprocess.run(list(map(str, words)), env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr[-2000:]}")


def peer(given: argparse.Namespace, seed: int, place: Path, levels: int) -> dict[str, Any]:
    import numpy as np

    from onetorch.generative import fid

    network, reference, train = compared(given.images)
    np.save(place / "train.npy", train.pixels)
    words = [given.peer, HERE.with_name("race_diffusion_peer.py"), "--train", place / "train.npy", "--levels", levels, *PEER[given.images], "--seed", seed]
    words += ["--milestones", *given.milestones, "--samples", given.samples, "--sampling-steps", given.peer_sampling]
    half([*words, "--ladder", *given.peer_ladder, "--out", place / "peer"], f"the peer, seed {seed},")
    result = json.loads((place / "peer" / "result.json").read_text())
    for row in result["rows"] + result["ladder"]:
        found = fid.distance(network.embed(np.load(place / "peer" / row.pop("samples"))), reference)
        row |= {"fid": found.fid, "fid_se": found.error, "fid_infinity": found.infinity}
    return result


def ratios(theirs: dict[str, Any], mine: dict[str, Any], measure: str, process: bool = False) -> dict[str, float | None]:
    """By FID of the peer's milestones: how many times sooner ours is there, None where it never is; with `process` from the start of the processes."""
    before = [x["before"][measure] if process else 0.0 for x in (theirs, mine)]
    training: dict[str, float | None] = {}
    for row in theirs["rows"]:
        enough = [r[measure] for r in mine["rows"] if r["fid"] <= row["fid"]]
        training[f"{row['fid']:.2f}"] = (before[0] + row[measure]) / (before[1] + min(enough)) if enough else None
    return training


def sampling_ratio(theirs: dict[str, Any], mine: dict[str, Any], measure: str) -> float | None:
    rungs = [theirs["rows"][-1], *theirs["ladder"]]
    bar = 1.1 * min(r["fid"] for r in rungs)
    cheapest = min(r["sampling"][measure] for r in rungs if r["fid"] <= bar)
    enough = [r["sampling"][measure] for r in [mine["rows"][-1], *mine["ladder"]] if r["fid"] <= bar]
    return cheapest / min(enough) if enough else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--images", choices=list(RECIPE), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--milestones", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000])
    parser.add_argument("--steps", type=int, nargs="+", default=[15, 20, 25, 30, 40, 80, 160, 400], help="of our runs")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--peer-sampling", type=int, default=50, help="steps of the peer's DDIM at the milestones")
    parser.add_argument("--peer-ladder", type=int, nargs="*", default=[10, 20, 100])
    parser.add_argument("--ladder", type=int, nargs="*", default=[3, 5, 10])
    parser.add_argument("--unlabelled", action="store_true", help="ours without labels, against the seeds that the result's file has")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # this process is our half of one seed, and writes its result there
    given = parser.parse_args()
    if given.ours:
        given.ours.write_text(json.dumps(ours(given)), encoding="utf-8")
        return 0
    levels = {"digits": 17, "glyphs": 256}[given.images]

    from onetorch.generative import fid
    from onetorch.runs import provenance

    network, reference, train = compared(given.images)
    apart = fid.distance(network.embed(train.pixels[: given.samples]), reference)
    out = given.out or HERE.parent / "results" / f"race_diffusion_{given.images}.json"
    kept = json.loads(out.read_text(encoding="utf-8"))["seeds"] if out.exists() else {}
    result: dict[str, Any] = {"images": given.images, "target": TARGET, "samples": given.samples, "train_fid": apart.fid, "train_fid_se": apart.error}
    result["hardware"] = {name: value for name, value in provenance.hardware().items() if name != "host"}
    result |= {"versions": provenance.versions(), "date": time.strftime("%Y-%m-%d"), "seeds": kept}
    print(f"training against held-out images: FID {apart.fid:.2f} ± {apart.error:.2f}", flush=True)
    half_of_ours: list[Any] = ["--images", given.images, "--samples", given.samples, "--steps", *given.steps, "--ladder", *given.ladder]
    half_of_ours = [sys.executable, HERE, "--peer", given.peer, *half_of_ours, *(["--unlabelled"] if given.unlabelled else [])]
    for seed in map(str, given.seeds):
        if given.unlabelled and seed not in kept:
            sys.exit(f"--unlabelled is held against a peer that has run: there is no seed {seed} in {out}")
        with tempfile.TemporaryDirectory() as place:
            half([*half_of_ours, "--seeds", seed, "--ours", Path(place) / "ours.json"], f"ours, seed {seed},")
            mine = json.loads((Path(place) / "ours.json").read_text(encoding="utf-8"))
            for row in mine["rows"] + mine["ladder"]:
                print(f"seed {seed}  ours   {line(row)}", flush=True)
            theirs = kept[seed]["peer"] if given.unlabelled else peer(given, int(seed), Path(place), levels)
        for row in theirs["rows"] + theirs["ladder"]:
            print(f"seed {seed}  peer   {line(row)}", flush=True)
        found: dict[str, Any] = {"peer": theirs, "ours": mine}
        for measure in ("cpu", "wall"):
            found[measure] = {"loop": ratios(theirs, mine, measure), "process": ratios(theirs, mine, measure, True)}
            found[measure]["sampling"] = sampling_ratio(theirs, mine, measure)
        if given.unlabelled:
            result["seeds"][seed]["unlabelled"] = {name: value for name, value in found.items() if name != "peer"}
        else:
            result["seeds"][seed] = found
        print(f"seed {seed}  times sooner, by CPU: {found['cpu']}", flush=True)
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if summary([s.get("unlabelled", {}) | {"peer": s["peer"]} if given.unlabelled else s for s in result["seeds"].values()]) else 1


def summary(seeds: list[dict[str, Any]]) -> bool:
    """Print the ratios by milestone, least to most of the seeds; whether all meet the target with no more parameters than the peer's."""
    good = all(s["ours"]["parameters"] <= s["peer"]["parameters"] for s in seeds)
    for name in ("loop", "process"):
        print(f"{name}: times sooner by CPU")
        for step in sorted({row["step"] for s in seeds for row in s["peer"]["rows"]}):
            found, fids = [], []
            for s in seeds:
                for row, ratio in zip(s["peer"]["rows"], s["cpu"][name].values(), strict=True):
                    if row["step"] == step:
                        fids.append(row["fid"])
                        found.append(ratio or 0.0)  # 0: not reached
            peer_at = f"{step:5} steps of the peer, FID {min(fids):.1f} to {max(fids):.1f}, {len(fids)} seeds"
            print(f"  {peer_at}: {min(found):.1f} to {max(found):.1f}, median {statistics.median(found):.1f}")
            good = good and (name == "process" or min(found) >= TARGET)
    drawing = sorted(s["cpu"]["sampling"] or 0.0 for s in seeds)
    print(f"sampling: {drawing[0]:.1f} to {drawing[-1]:.1f} times sooner, median {statistics.median(drawing):.1f}")
    return good and drawing[0] >= TARGET


def line(row: dict[str, Any]) -> str:
    what = f"{row['step']:5} steps  {row['cpu']:7.1f} CPU-s {row['wall']:7.1f} s" if "step" in row else f"{row['sampling_steps']:5} steps of sampling"
    fid = f"FID {row['fid']:.2f} ± {row['fid_se']:.2f} (infinity {row['fid_infinity']:.2f})"
    return f"{what}  {fid}, sampled in {row['sampling']['cpu']:.1f} CPU-s"


if __name__ == "__main__":
    sys.exit(main())
