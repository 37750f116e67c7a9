"""What every algorithm earns on every environment: one table, with the target and the published figure beside.

    python benchmarks/returns.py                                            every cell, as far as it is not done yet, then the table
    python benchmarks/returns.py --only ppo:HalfCheetah-v5 --seeds 3 --core 2
    python benchmarks/returns.py --table                                    the table of what is there

A run is `onetorch train RECIPE --env ENV --total_steps N --seed S` in a process of its own pinned to one core, RECIPE being the tuned one for that environment
where there is one (`ppo-halfcheetah`), else the algorithm's name. What it earns is what `train` measures at its end: the mean undiscounted return of 20
episodes in environments of their own, with the likeliest actions. Each run leaves benchmarks/results/returns/ALGORITHM-ENV-STEPS-SEED.json: that number,
its command, config, seconds and curve (mean return of the last 100 training episodes over steps and seconds). Runs that have their file are skipped, so
this can be stopped and continued, and several can work on different cells. A cell's number is the mean over its seeds with a 95 % interval by Student's t.

Targets are this project's own. Published figures: `zoo` is RL Baselines3 Zoo's benchmark.md, one run each, tuned, deterministic, of the older environments of
the same names (v3 for MuJoCo, LunarLander-v2); `spinup` is about what the curves on Spinning Up's benchmarks page show
at a million steps of HalfCheetah-v3.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))  # the onetorch beside this file, as in the runs that it starts
FOLDER = HERE.parent / "results" / "returns"
POINTS = 60  # of a curve that are kept


class Cell(NamedTuple):
    algorithm: str
    env: str
    steps: int
    seeds: int
    target: float | None = None
    published: str = ""

    @property
    def name(self) -> str:
        return f"{self.algorithm}-{self.env}-{self.steps}"


CELLS = (
    Cell("ppo", "CartPole-v1", 100_000, 10, 490, "500 zoo"),
    Cell("dqn", "CartPole-v1", 50_000, 10, 490, "500 zoo"),
    Cell("vpg", "CartPole-v1", 100_000, 10),
    Cell("trpo", "CartPole-v1", 100_000, 10),
    Cell("ppo", "Acrobot-v1", 1_000_000, 3, -80, "-73.5 zoo"),
    Cell("dqn", "Acrobot-v1", 100_000, 10, -77, "-76.6 zoo"),
    Cell("ppo", "MountainCar-v0", 1_000_000, 3, None, "-110.4 zoo"),
    Cell("sac", "Pendulum-v1", 20_000, 10, -155, "-157.0 zoo"),
    Cell("td3", "Pendulum-v1", 20_000, 10, -155, "-151.9 zoo"),
    Cell("ddpg", "Pendulum-v1", 20_000, 10, None, "-152.1 zoo"),
    Cell("ppo", "LunarLander-v3", 1_000_000, 3, 245, "242.1 zoo"),
    Cell("dqn", "LunarLander-v3", 100_000, 10, 155, "154.4 zoo"),
    Cell("ppo", "HalfCheetah-v5", 1_000_000, 3, 5800, "5819 zoo"),
    Cell("ppo", "Hopper-v5", 1_000_000, 3, 2600, "2410 zoo"),
    Cell("ppo", "Walker2d-v5", 1_000_000, 3, 3580, "3479 zoo"),
    Cell("trpo", "HalfCheetah-v5", 1_000_000, 3, 4400),
    Cell("trpo", "Hopper-v5", 1_000_000, 3),
    Cell("trpo", "Walker2d-v5", 1_000_000, 3),
    Cell("vpg", "HalfCheetah-v5", 1_000_000, 3, 600, "600 spinup"),
    Cell("sac", "HalfCheetah-v5", 1_000_000, 3, 12_000, "9535 zoo"),
    Cell("sac", "Hopper-v5", 1_000_000, 3, 3500, "2326 zoo"),
    Cell("sac", "Walker2d-v5", 1_000_000, 3, 5000, "3863 zoo"),
    Cell("td3", "HalfCheetah-v5", 1_000_000, 3, 10_200, "9656 zoo"),
    Cell("td3", "Hopper-v5", 1_000_000, 3, 3500, "3606 zoo"),
    Cell("td3", "Walker2d-v5", 1_000_000, 3, 4680, "4718 zoo"),
    Cell("ddpg", "HalfCheetah-v5", 1_000_000, 3, 9000, "9000 spinup"),
)


def recipe(cell: Cell) -> str:
    """The tuned recipe for the cell's environment where there is one, else the algorithm's own."""
    from onetorch import recipes

    tuned = f"{cell.algorithm}-{cell.env.rpartition('-')[0].lower()}"
    return tuned if tuned in recipes.known() else cell.algorithm


def train(cell: Cell, seed: int) -> dict[str, Any]:
    """One run to its end, as a row. Raises CalledProcessError, with the run's last words on stderr."""
    words = ["train", recipe(cell), "--env", cell.env, "--total_steps", str(cell.steps), "--seed", str(seed)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent.parent), os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        done = subprocess.run([sys.executable, "-m", "onetorch", *words, "--dir", str(folder)], capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.stderr.write(done.stderr[-2000:])
            done.check_returncode()
        record, config = (json.loads((folder / name).read_text()) for name in ("run.json", "config.json"))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "return" in row]
    kept = [rows[round(k * (len(rows) - 1) / (POINTS - 1))] for k in range(POINTS)] if len(rows) > POINTS else rows
    return {
        "algorithm": cell.algorithm, "env": cell.env, "steps": cell.steps, "seed": seed, "command": " ".join(["onetorch", *words]),
        "result": {k: v for k, v in record["result"].items() if k != "video"},
        "cost": record["cost"], "plan": record["plan"], "config": config["config"],
        "versions": record["versions"], "machine": record["hardware"], "python": platform.python_version(),
        "curve": {name: [row[name] for row in kept] for name in ("step", "return", "cpu_seconds", "seconds")},
    }  # fmt: skip


def table() -> list[str]:
    from onetorch.rl.evaluation import interval

    lines = ["| algorithm | environment | steps | return, mean of seeds ± 95 % | seeds | CPU-s a run | target | published |", "|---" * 8 + "|"]
    for cell in CELLS:
        found = [json.loads(path.read_text()) for path in sorted(FOLDER.glob(f"{cell.name}-s*.json"))]
        reached, seconds, met = "", "", ""
        if found:
            mean, half = interval([row["result"]["return"] for row in found])
            reached = f"{mean:,.1f}" + (f" ± {half:,.1f}" if len(found) > 1 else "")
            seconds = f"{sum(row['cost']['cpu_seconds'] for row in found) / len(found):,.0f}"
            met = "" if cell.target is None else " (met)" if mean >= cell.target else " (not met)"
        target = "" if cell.target is None else f"{cell.target:,g}{met}"
        lines.append(f"| {cell.algorithm} | {cell.env} | {cell.steps:,} | {reached or 'not run'} | {len(found)} | {seconds} | {target} | {cell.published} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="cells as ALGORITHM:ENV, or ALGORITHM")
    parser.add_argument("--seeds", type=int, help="so many seeds of each cell (default: 10 where a run is short, 3 where it is long)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0), so that several can share a cell")
    parser.add_argument("--steps", type=int, help="environment steps in the place of the cells' own")
    parser.add_argument("--core", type=int, help="core to pin to (default: the first allowed)")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    chosen = [c._replace(steps=options.steps or c.steps) for c in CELLS if not options.only or {c.algorithm, f"{c.algorithm}:{c.env}"} & set(options.only)]
    if not chosen:
        parser.error(f"no such cell: {', '.join(options.only)}; cells are {', '.join(f'{c.algorithm}:{c.env}' for c in CELLS)}")
    if not options.table:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {options.core if options.core is not None else min(os.sched_getaffinity(0))})
        FOLDER.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + 3600 * options.hours
        for cell in chosen:
            for seed in range(options.first, options.first + (options.seeds or cell.seeds)):
                path = FOLDER / f"{cell.name}-s{seed}.json"
                if path.exists() or time.monotonic() > deadline:
                    continue
                row = train(cell, seed)
                temporary = path.with_suffix(f".{os.getpid()}")
                temporary.write_text(json.dumps(row) + "\n")
                temporary.replace(path)
                sys.stderr.write(f"{cell.name} seed {seed}: {row['result']['return']} ({row['cost']['cpu_seconds']:.0f} CPU-s)\n")
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
