"""What DQN's recipes reach, and in what time on one core.

    python benchmarks/dqn_returns.py dqn --seeds 10 [--core 0] [--field value …]

Each seed is trained as `onetorch train RECIPE --seed …` trains it, one after the other in this process, and its last policy is evaluated greedily on 100
episodes of its own. Prints a line a seed and the mean over seeds with its 95 % interval (Student's t), and writes benchmarks/results/RECIPE_returns.json with
every curve. Exits with 1 where the mean misses the target in TARGETS.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from onetorch import recipes
from onetorch.rl import dqn
from onetorch.rl.evaluation import interval
from onetorch.runs import config as configs
from onetorch.runs import provenance
from onetorch.runs.run import Run

TARGETS = {"dqn": 490.0}


def one(config: dqn.Config) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        with Run(Path(folder) / "run", config, quiet=True, fixed={"threads": "1"}) as run:
            model = dqn.train(config, run)
        spent = {"seconds": round(time.perf_counter() - begin, 2), "cpu_seconds": round(time.process_time() - begin_cpu, 2)}
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    result = dqn.evaluate(model, config, episodes=100)
    return {"seed": config.seed, "return": result["return"], **spent, "curve": [(row["step"], row["return"]) for row in rows if "return" in row]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe of dqn")
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0, 1, … (default 10)")
    parser.add_argument("--core", type=int, default=None, help="core to pin everything to (default: the first allowed)")
    options, words = parser.parse_known_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0)) if options.core is None else options.core})
    torch.optim.Adam([torch.zeros(1)])  # imports what it needs outside the clock
    kinds = dict(configs.leaves(dqn.Config))
    given = {name.removeprefix("--"): configs.parse(text, kinds[name.removeprefix("--")]) for name, text in zip(words[::2], words[1::2], strict=True)}
    base = configs.replace(recipes.find(options.recipe)(dqn.Config), given)
    runs = []
    for seed in range(options.seeds):
        runs.append(one(configs.replace(base, {"seed": seed})))
        sys.stdout.write(f"seed {seed}: {runs[-1]['return']:.1f} after {base.total_steps:,} steps in {runs[-1]['cpu_seconds']} CPU-s\n")
        sys.stdout.flush()
    mean, half = interval([run["return"] for run in runs])
    cpu = statistics.median(run["cpu_seconds"] for run in runs)
    target = TARGETS.get(options.recipe)
    met = target is None or mean >= target
    sys.stdout.write(f"{options.recipe}: mean return {mean:.1f} ± {half:.1f} over {len(runs)} seeds, {cpu:.1f} CPU-s each (target {target}: {met})\n")
    if not given:
        machine = provenance.hardware() | {"system": platform.platform()}
        summary = {"recipe": options.recipe, "mean": mean, "interval95": half, "cpu_seconds": cpu, "target": target, "met": met, "machine": machine}
        path = Path(__file__).parent / "results" / f"{options.recipe}_returns.json"
        path.write_text(json.dumps(summary | {"config": configs.to_json(base), "versions": provenance.versions(), "runs": runs}) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
