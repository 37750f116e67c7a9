"""What every algorithm earns on every environment: one table, with the target and the published figure beside.

    python benchmarks/returns.py                                            every cell, as far as it is not done yet, then the table
    python benchmarks/returns.py --only sac:HalfCheetah-v5:300000 --seeds 3 --core 2
    python benchmarks/returns.py --only sac:HalfCheetah-v5:300000 --seeds 1 --core 3 --peer PYTHON      stable-baselines3 in ours' place
    python benchmarks/returns.py --table                                    the table of what is there

A run is `onetorch train RECIPE --env ENV --total_steps N --seed S` in a process of its own with one thread, RECIPE being the tuned one for that environment
where there is one (`ppo-halfcheetah`), else the algorithm's name. What it earns is what `train` measures at its end: the mean undiscounted return of 20
episodes in environments of their own, with the likeliest actions. Each run leaves benchmarks/results/returns/ALGORITHM-ENV-STEPS-SEED.json: that number,
its command, config, seconds and curve (mean return of the last 100 training episodes over steps and seconds). Runs that have their file are skipped, and one
that was stopped or killed goes on from its last checkpoint in runs/returns, so this can be stopped and continued, and several can work on different cells.
A cell's number is the mean over its seeds with a 95 % interval by Student's t, and the table of all cells stands in README.md beside the files. Settings are
chosen on other seeds than these. The cells at 60,000 steps of HalfCheetah, with bfloat16 and with float32 products between hidden layers, show what the fast
products cost in returns.

With `--peer PYTHON` the runs are stable-baselines3's, of the same algorithm at its own defaults, under that interpreter: its log is a monitor.csv in
runs/returns, which `onetorch plot` and `report` draw beside ours, its evaluation is the same (20 episodes, the likeliest actions, the same environment seeds),
and its results stand in files called sb3-…. Such a run cannot go on once it was cut; its curve stays.

Targets are this project's own; at 300,000 steps the peer's figure is the target. Published figures: `zoo` is RL Baselines3 Zoo's benchmark.md, one run each,
tuned, deterministic, of the older environments of the same names (v3 for MuJoCo, LunarLander-v2); `spinup` is about what the curves on Spinning Up's
benchmarks page show at a million steps of HalfCheetah-v3.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))  # the onetorch beside this file, as in the runs that it starts
FOLDER = HERE.parent / "results" / "returns"
RUNS = HERE.parent.parent / "runs" / "returns"  # while they go
POINTS = 60  # of a curve that are kept
EPISODES, EVALUATION_SEED = 20, 1_000_000  # of the algorithms' own `evaluate`


class Cell(NamedTuple):
    algorithm: str
    env: str
    steps: int
    seeds: int
    target: float | None = None
    published: str = ""
    dtype: str = ""  # of products between hidden layers; empty: see `plan`

    @property
    def name(self) -> str:
        return f"{self.algorithm}-{self.env}-{self.steps}" + (f"-{self.dtype}" if self.dtype else "")


SHORT = (("sac", "HalfCheetah-v5", 60_000), ("td3", "HalfCheetah-v5", 60_000))  # whether bfloat16 products cost returns
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
    Cell("dqn", "LunarLander-v3", 100_000, 16, 155, "154.4 zoo"),
    Cell("ppo", "HalfCheetah-v5", 1_000_000, 3, 5800, "5819 zoo"),
    Cell("ppo", "Hopper-v5", 1_000_000, 3, 2600, "2410 zoo"),
    Cell("ppo", "Walker2d-v5", 1_000_000, 3, 3580, "3479 zoo"),
    Cell("trpo", "HalfCheetah-v5", 1_000_000, 3, 4400),
    Cell("trpo", "Hopper-v5", 1_000_000, 3),
    Cell("trpo", "Walker2d-v5", 1_000_000, 3),
    Cell("vpg", "HalfCheetah-v5", 1_000_000, 3, 600, "600 spinup"),
    *(Cell(algorithm, env, steps, 3, dtype=dtype) for algorithm, env, steps in SHORT for dtype in ("bfloat16", "float32")),
    Cell("sac", "HalfCheetah-v5", 300_000, 3),
    Cell("sac", "Hopper-v5", 300_000, 3),
    Cell("sac", "Walker2d-v5", 300_000, 3),
    Cell("td3", "HalfCheetah-v5", 300_000, 3),
    Cell("td3", "Hopper-v5", 300_000, 3),
    Cell("td3", "Walker2d-v5", 300_000, 3),
    Cell("ddpg", "HalfCheetah-v5", 300_000, 3),
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


def plan(cell: Cell) -> str:
    """The part of the speed plan that is fixed: one thread, and bfloat16 products where an algorithm and the machine have them and the cell does not say
    otherwise, so that all seeds run alike."""
    from onetorch.rl import stacks

    best = "bfloat16" if cell.algorithm in ("sac", "td3", "ddpg") and "bfloat16" in stacks.dtypes() else ""
    return "threads=1" + (f",dtype={cell.dtype or best}" if cell.dtype or best else "")


def run(words: list[str]) -> None:
    """One process to its end. Raises CalledProcessError, with its last words on stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent.parent), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])
        done.check_returncode()


def thin(rows: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, list[float]]:
    """Columns of at most POINTS of the rows."""
    kept = [rows[round(k * (len(rows) - 1) / (POINTS - 1))] for k in range(POINTS)] if len(rows) > POINTS else rows
    return {name: [row[name] for row in kept] for name in names}


def train(cell: Cell, seed: int, folder: Path) -> dict[str, Any]:
    """One run to its end, as a row."""
    words = ["train", recipe(cell), "--env", cell.env, "--total_steps", str(cell.steps), "--seed", str(seed), "--plan", plan(cell)]
    command = ["resume", str(folder)] if (folder / "run.json").exists() else [*words, "--dir", str(folder)]
    run([sys.executable, "-m", "onetorch", *command, "--checkpoint_seconds", "60"])
    record, config = (json.loads((folder / name).read_text()) for name in ("run.json", "config.json"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "algorithm": cell.algorithm, "env": cell.env, "steps": cell.steps, "seed": seed, "command": " ".join(["onetorch", *words]),
        "result": {k: v for k, v in record["result"].items() if k != "video"},
        "cost": record["cost"], "plan": record["plan"], "config": config["config"],
        "versions": record["versions"], "machine": record["hardware"], "python": platform.python_version(),
        "curve": thin([row for row in rows if "return" in row], ("step", "return", "cpu_seconds", "seconds")),
    }  # fmt: skip


def train_peer(cell: Cell, seed: int, folder: Path, python: str) -> dict[str, Any]:
    """One run of stable-baselines3 to its end, as a row; it goes on nowhere, so it begins anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run([python, str(HERE), "--as_peer", cell.algorithm, cell.env, str(cell.steps), str(seed), str(folder)])
    row = json.loads((folder / "result.json").read_text())
    return {"algorithm": cell.algorithm, "env": cell.env, "steps": cell.steps, "seed": seed} | row


def as_peer(algorithm: str, env: str, steps: int, seed: int, folder: Path) -> None:
    """stable-baselines3's `algorithm` at its defaults, in an interpreter that has it: monitor.csv and result.json in `folder`."""
    import csv
    from importlib import metadata

    import gymnasium
    import stable_baselines3
    import torch
    from stable_baselines3.common.monitor import Monitor

    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), time.process_time()
    model = getattr(stable_baselines3, algorithm.upper())("MlpPolicy", Monitor(gymnasium.make(env), str(folder / "monitor.csv")), seed=seed)
    model.learn(steps)
    cost = {"seconds": round(time.perf_counter() - start, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
    model.save(folder / "model.zip")
    returns, one = [], gymnasium.make(env)
    for episode in range(EPISODES):
        (obs, _), total, done = one.reset(seed=EVALUATION_SEED + episode), 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = one.step(model.predict(obs, deterministic=True)[0])
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    rows: list[dict[str, Any]] = []
    with (folder / "monitor.csv").open() as file:
        file.readline()  # a remark
        episodes = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    for k, row in enumerate(episodes):
        last = [episode["r"] for episode in episodes[max(0, k - 99) : k + 1]]
        rows.append({"step": int(row["l"]) + (rows[-1]["step"] if rows else 0), "return": round(sum(last) / len(last), 3), "seconds": row["t"]})
    mean = sum(returns) / EPISODES
    result = {
        "command": f"stable_baselines3.{algorithm.upper()}('MlpPolicy', '{env}', seed={seed}).learn({steps}), one thread",
        "result": {"return": round(mean, 3), "return_min": round(min(returns), 3), "return_max": round(max(returns), 3), "episodes": EPISODES},
        "cost": cost, "versions": {name: metadata.version(name) for name in ("stable-baselines3", "torch", "numpy", "gymnasium", "mujoco")},
        "python": platform.python_version(), "curve": thin(rows, ("step", "return", "seconds")),
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def summary(files: list[Path]) -> tuple[float, str, str]:
    """Mean return, that with its interval and the mean of CPU-seconds, of result files; NaN and nothing where there are none."""
    from onetorch.rl.evaluation import interval

    found = [json.loads(path.read_text()) for path in files]
    if not found:
        return math.nan, "", ""
    mean, half = interval([row["result"]["return"] for row in found])
    return mean, f"{mean:,.1f}" + (f" ± {half:,.1f}" if len(found) > 1 else ""), f"{sum(row['cost']['cpu_seconds'] for row in found) / len(found):,.0f}"


def table() -> list[str]:
    names = "algorithm, environment, steps, return (mean of seeds ± 95 %), seeds, CPU-s a run, stable-baselines3 (seeds; CPU-s), target, published"
    columns = names.split(", ")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for cell in CELLS:
        ours, theirs = (sorted(FOLDER.glob(f"{prefix}{cell.name}-s*.json")) for prefix in ("", "sb3-"))
        (mean, reached, seconds), (peer, peer_reached, peer_seconds) = summary(ours), summary(theirs)
        beside = f"{peer_reached} ({len(theirs)}; {peer_seconds})" if theirs else ""
        aim, target = (cell.target, f"{cell.target:,g}") if cell.target is not None else (peer, "the peer's") if theirs else (math.nan, "")
        target += "" if math.isnan(mean) or math.isnan(aim) else " (met)" if mean >= aim else " (not met)"
        algorithm = f"{cell.algorithm} ({cell.dtype})" if cell.dtype else cell.algorithm
        values = (algorithm, cell.env, f"{cell.steps:,}", reached or "not run", str(len(ours)), seconds, beside, target, cell.published)
        lines.append(f"| {' | '.join(values)} |")
    return lines


def page() -> str:
    """README.md beside the files."""
    about = (
        "What each algorithm earns: the mean return of 20 episodes at the end of a run, by the likeliest actions, over seeds, with its 95 % interval.\n"
        "Each run's command, config, curve and machine are in a file of its own here. `python benchmarks/returns.py` trains what is missing and writes this\n"
        "page; it says where the targets and the published figures are from. One thread a run, on cores of servers with an AMD EPYC, at times busy ones.\n"
    )
    return "\n".join(("# Returns", "", about, *table(), ""))


def put(path: Path, text: str) -> None:
    """The file, whole or not at all, whoever else is writing it."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="cells as ALGORITHM, ALGORITHM:ENV or ALGORITHM:ENV:STEPS")
    parser.add_argument("--seeds", type=int, help="so many seeds of each cell (default: 10 where a run is short, 3 where it is long)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0), so that several can share a cell")
    parser.add_argument("--core", type=int, nargs="+", help="cores to stay on, one at a time (default: the first allowed)")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--peer", metavar="PYTHON", help="run stable-baselines3 under this interpreter in ours' place")
    parser.add_argument("--keep", action="store_true", help="leave the runs' folders in runs/returns once they are done")
    parser.add_argument("--table", action="store_true", help="only the table of what is there")
    parser.add_argument("--as_peer", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_peer:
        algorithm, env, steps, seed, folder = options.as_peer
        as_peer(algorithm, env, int(steps), int(seed), Path(folder))
        return 0
    chosen = [c for c in CELLS if not options.only or {c.algorithm, f"{c.algorithm}:{c.env}", f"{c.algorithm}:{c.env}:{c.steps}"} & set(options.only)]
    if not chosen:
        parser.error(f"no such cell: {', '.join(options.only)}; cells are {', '.join(f'{c.algorithm}:{c.env}:{c.steps}' for c in CELLS)}")
    if not options.table:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, options.core or {min(os.sched_getaffinity(0))})
        os.environ["OMP_NUM_THREADS"] = "1"
        FOLDER.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + 3600 * options.hours
        for cell in chosen:
            for seed in range(options.first, options.first + (options.seeds or cell.seeds)):
                name = f"{'sb3-' if options.peer else ''}{cell.name}-s{seed}"
                path, folder = FOLDER / f"{name}.json", RUNS / name
                if path.exists() or time.monotonic() > deadline:
                    continue
                row = train_peer(cell, seed, folder, options.peer) if options.peer else train(cell, seed, folder)
                put(path, json.dumps(row) + "\n")
                if not options.keep:
                    shutil.rmtree(folder)
                sys.stderr.write(f"{name}: {row['result']['return']} ({row['cost']['cpu_seconds']:.0f} CPU-s)\n")
    put(FOLDER / "README.md", page())
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
