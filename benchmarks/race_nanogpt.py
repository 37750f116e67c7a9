"""How much sooner our recipes reach the loss at which nanoGPT's recipe for a CPU ends, and how far they come in the time that it takes.

    python benchmarks/race_nanogpt.py --peer NANOGPT_CHECKOUT --data tinyshakespeare.txt [--seeds 5] [--first 0] [--threads 1] [--out FILE]

The peer is nanoGPT's own train.py (https://github.com/karpathy/nanoGPT) with the options its README gives for a CPU: windows of 64, batch 12, 4 layers of width
128, 2,000 steps; only its evaluations during training are switched off. Both train on the first nine tenths of the text, one after the other in processes of
their own, seed by seed. All are evaluated by the same routine: nats per character over the whole last tenth in windows that do not overlap, so that no
prediction sees more than the window's characters before it: 64, but 256 for the recipes gpt-shakespeare-256 and gpt-shakespeare-counts. Beside them stands the
best count model of the same text (`ngram.py`), which looks back as far as it likes.

Times, by the same rule for all:
    loop     from the first step to the last, without evaluation
    process  from the start of the process to the end of training: imports, reading and preparing, and for ours the measuring of the speed plan too
What must hold in every seed: gpt-shakespeare ends at or below the peer's best seed with at most as many parameters (nanoGPT's way of counting, without position
embeddings), 10 times sooner; gpt-shakespeare-256 ends at 1.60 or below, and gpt-shakespeare-counts below the count model too, each in fewer CPU seconds (the
whole process) than the peer's loop takes; and the latter with a small network and eight steps, its counting included, is where the peer ends 30 times sooner.
Another row is the first GPT without the embeddings of n-grams and a layer deeper. p is that of a one-sided t-test that the ratio is above the target.
With --threads 0 the peer uses torch's default number of threads and ours what its speed plan chooses.

--first begins with another seed and keeps the rows of the seeds before it that stand in FILE, so that a long race can be run in parts. Leaves with code 1 where
something does not hold.
"""

import argparse
import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TARGET = 10.0  # times sooner, at no more parameters
FAR = 1.60  # nats
WINDOW = 64
RECIPE: dict[str, tuple[str, dict[str, Any]]] = {  # its name, and what is changed in it
    "ours": ("gpt-shakespeare", {}),
    "ours, no n-grams": ("gpt-shakespeare", {"layers": 3, "ngram_orders": (), "ngram_rows": 1, "steps": 140}),
    "ours, larger": ("gpt-shakespeare-256", {}),
    "ours, counts": ("gpt-shakespeare-counts", {}),
    "ours, counts, short": ("gpt-shakespeare-counts", {"steps": 8, "batch": 12, "context": 64, "layers": 1, "heads": 2, "width": 64, "base_width": 64}),
}
ANY = {"ours, counts, short": 30.0}  # times sooner, any model
FURTHER = ("ours, larger", "ours, counts")
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5 % quantile for so many seeds


def clock() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def since(start: tuple[float, float]) -> dict[str, float]:
    now = clock()
    return {"cpu": now[0] - start[0], "wall": now[1] - start[1]}


def loss_in_windows(logits: Any, text: Any, window: int = WINDOW) -> tuple[float, int]:
    """(nats per symbol, symbols) of every symbol of `text` but the first; logits maps (rows, T) to (rows, T, symbols)."""
    import torch
    import torch.nn.functional as F

    from onetorch.generative import data

    total, count = 0.0, 0
    with torch.no_grad():
        for w in data.windows(text, window):
            total += F.cross_entropy(logits(w).flatten(0, 1).double(), w[:, 1:].flatten(), reduction="sum").item()
            count += w[:, 1:].numel()
    return total / count, count


def peer(folder: Path, text: Path, seed: int, threads: int) -> dict[str, Any]:
    born = time.perf_counter() - time.process_time()  # this process has done little but compute so far
    import numpy as np
    import torch

    if threads:
        torch.set_num_threads(threads)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    torch.manual_seed(seed)
    torch.manual_seed = lambda _: None  # type: ignore[assignment]  # train.py sets a seed of its own
    begun: dict[str, tuple[float, float]] = {}
    construct = torch.optim.AdamW.__init__

    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        begun["loop"] = clock()  # the last thing train.py does before its loop

    torch.optim.AdamW.__init__ = constructed  # type: ignore[method-assign]
    sys.argv = ["train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--log_interval=1", "--block_size=64", "--batch_size=12"]
    sys.argv += ["--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"]
    sys.argv += ["--eval_iters=1", "--eval_interval=1000000000", f"--out_dir={tempfile.gettempdir()}/nanogpt-race"]
    space = runpy.run_path("train.py", run_name="__main__")
    loop, process = since(begun["loop"]), {"cpu": time.process_time(), "wall": time.perf_counter() - born}
    model = space["model"].eval()
    from onetorch.generative import data

    whole = data.read(text)
    held_out = np.searchsorted(np.unique(whole), data.parts(whole, WINDOW, "validation")[1]).astype(np.uint8)  # its characters, in its order
    loss, count = loss_in_windows(lambda w: model(w[:, :-1].contiguous(), w[:, 1:].contiguous())[0], held_out)
    return {"loss": loss, "characters": count, "parameters": model.get_num_params(), "loop": loop, "process": process}


def ours(kind: str, text: Path, seed: int, threads: int) -> dict[str, Any]:
    born = time.perf_counter() - time.process_time()
    import dataclasses

    from onetorch import recipes
    from onetorch.generative import data, gpt
    from onetorch.runs.run import Run

    recipe, changed = RECIPE[kind]
    config = dataclasses.replace(recipes.find(recipe)(), data=text, seed=seed, eval_every=10**9, eval_samples=0, **changed)
    evaluating = {"cpu": 0.0, "wall": 0.0}

    def timed(evaluate: Any) -> Any:
        def call(*args: Any) -> Any:
            start = clock()
            result = evaluate(*args)
            for name, value in since(start).items():
                evaluating[name] += value
            return result

        return call

    gpt.score = timed(gpt.score)  # the last step evaluates; that is taken out
    begun: dict[str, tuple[float, float]] = {}

    class Timed(Run):
        def steps(self, *args: Any, **kwargs: Any) -> Any:
            for i in super().steps(*args, **kwargs):
                begun.setdefault("loop", clock())
                yield i

    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place  # no speed plan from an earlier run
        with Timed(Path(place) / "run", config, fixed={"threads": str(threads)} if threads else {}, quiet=True) as run:
            model = gpt.train(config, run)
            loop, process = since(begun["loop"]), {"cpu": time.process_time(), "wall": time.perf_counter() - born}
            plan = dict(run.record["plan"])
        del os.environ["XDG_CACHE_HOME"]
        loop, process = ({k: v[k] - evaluating[k] for k in v} for v in (loop, process))
    held_out = data.parts(data.read(text), WINDOW, "validation")[1]
    model.dtype = gpt.torch.float32
    loss, count = loss_in_windows(lambda w: model(w[:, :-1]), held_out, config.context)
    parameters = sum(p.numel() for p in model.parameters())
    return {"loss": loss, "characters": count, "parameters": parameters, "loop": loop, "process": process, "plan": plan}


def prepare(folder: Path, text: Path) -> None:
    """Run the peer's own preparation on the text, which it would download."""
    place = folder / "data" / "shakespeare_char"
    (place / "input.txt").write_bytes(text.read_bytes())
    sys.modules["requests"] = types.ModuleType("requests")  # imported there for the download alone
    runpy.run_path(str(place / "prepare.py"), run_name="__main__")


def child(kind: str, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    words = [sys.executable, HERE, "--child", kind, "--peer", arguments.peer, "--data", arguments.data, "--seed", seed, "--threads", arguments.threads]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    if arguments.threads:
        environment["OMP_NUM_THREADS"] = str(arguments.threads)
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{kind}, seed {seed} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]) | {"seed": seed}


def ratio(rows: dict[str, list[dict[str, Any]]], kind: str, span: str, measure: str) -> dict[str, Any]:
    values = [p[span][measure] / o[span][measure] for p, o in zip(rows["nanoGPT"], rows[kind], strict=True)]
    logs = [math.log(v) for v in values]
    error = statistics.stdev(logs) / math.sqrt(len(values)) if len(values) in STUDENT else float("nan")
    mean, half = statistics.mean(logs), STUDENT.get(len(values), math.nan) * error
    found = {"median": statistics.median(values), "mean": math.exp(mean), "interval95": [math.exp(mean - half), math.exp(mean + half)], "values": values}
    return found | {"p": tail((mean - math.log(ANY.get(kind, TARGET))) / error, len(values) - 1) if error > 0 else None}


def tail(t: float, degrees: int) -> float:
    """P(T > t) of Student's t."""
    n = 200_000  # with x = tan(u), the density's integral from t to infinity is one over a bounded range
    low, high = math.atan(t / math.sqrt(degrees)), math.pi / 2
    width = (high - low) / n
    area = sum(math.cos(low + (i + 0.5) * width) ** (degrees - 1) for i in range(n)) * width
    return area * math.gamma((degrees + 1) / 2) / (math.sqrt(math.pi) * math.gamma(degrees / 2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "race_nanogpt.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.peer, arguments.data = arguments.peer.resolve(), arguments.data.resolve()
    if arguments.child:
        run = peer(arguments.peer, arguments.data, arguments.seed, arguments.threads) if arguments.child == "nanoGPT" else None
        sys.stdout.write("\n" + json.dumps(run or ours(arguments.child, arguments.data, arguments.seed, arguments.threads)) + "\n")
        return 0

    prepare(arguments.peer, arguments.data)
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("nanoGPT", *RECIPE)}
    if arguments.first:
        before = json.loads(arguments.out.read_text(encoding="utf-8"))["runs"]
        rows = {kind: [row for row in before[kind] if row["seed"] < arguments.first] for kind in rows}
    for seed in range(arguments.first, arguments.seeds):
        for kind in rows:
            row = child(kind, arguments, seed)
            rows[kind].append(row)
            times = "  ".join(f"{span} {row[span]['cpu']:.1f} CPU-s {row[span]['wall']:.1f} s" for span in ("loop", "process"))
            sys.stdout.write(f"seed {seed}  {kind:19}  loss {row['loss']:.4f}  {row['parameters']:,} parameters  {times}\n")
            sys.stdout.flush()

    from onetorch.generative import data, ngram
    from onetorch.runs import provenance

    best = min(r["loss"] for r in rows["nanoGPT"])
    counted = ngram.bits_per_byte(*data.parts(data.read(arguments.data), WINDOW, "validation")) * math.log(2)
    sys.stdout.write(f"count model         loss {counted:.4f}\n")
    result: dict[str, Any] = {"threads": arguments.threads or "default", "peer_best_loss": best, "count_model_loss": counted, "ratios": {}, "far": {}}
    good = True
    for kind in RECIPE:
        sooner = {f"{span}_{m}": ratio(rows, kind, span, m) for span in ("loop", "process") for m in ("cpu", "wall")}
        reached = max(r["loss"] for r in rows[kind]) <= best
        fewer = rows[kind][0]["parameters"] <= rows["nanoGPT"][0]["parameters"]
        result["ratios"][kind] = {"target": ANY.get(kind, TARGET), "reached": reached, "not_more_parameters": fewer} | sooner
        for name, r in sooner.items():
            low, high = r["interval95"]
            p = "" if r["p"] is None else f", p {r['p']:.2g}"
            sys.stdout.write(f"{kind:19}  {name:12}  {r['median']:.1f} times sooner (95 % interval of the mean {low:.1f} to {high:.1f}{p})\n")
        sys.stdout.write(f"{kind:19}  loss at or below nanoGPT's best seed ({best:.4f}) in every seed: {reached}; not more parameters: {fewer}\n")
        if kind == "ours":
            timed = sooner.values() if arguments.threads else [r for name, r in sooner.items() if name.endswith("wall")]  # many threads wait by spinning
            good = good and reached and fewer and all(r["median"] >= TARGET for r in timed)
        if kind in ANY:
            good = good and reached and sooner["loop_cpu" if arguments.threads else "loop_wall"]["median"] >= ANY[kind]
        if kind in FURTHER:
            worst = max(r["loss"] for r in rows[kind])
            within = all(o["process"]["cpu"] <= p["loop"]["cpu"] for o, p in zip(rows[kind], rows["nanoGPT"], strict=True))
            result["far"][kind] = {"target": FAR, "worst_loss": worst, "within_the_peers_cpu_seconds": within, "below_the_count_model": worst < counted}
            good = good and worst <= FAR and within and (worst < counted or kind != "ours, counts")
            sys.stdout.write(f"{kind:19}  worst seed {worst:.4f} (to be at most {FAR:.2f}), each in fewer CPU seconds than nanoGPT: {within}; ")
            sys.stdout.write(f"below the count model: {worst < counted}\n")
    hardware = {name: value for name, value in provenance.hardware().items() if name != "host"}
    result |= {"runs": rows, "hardware": hardware, "versions": provenance.versions(), "date": time.strftime("%Y-%m-%d")}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
