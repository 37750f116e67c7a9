"""What all cores are good for: 4 seeds on 4 cores and 10 seeds on 4 cores against one alone, and one run with all cores at hand against one on one core.

    python benchmarks/seeds_on_cores.py [--rounds 3] [--algorithms ppo sac] [--cores 4]

Seeds: `onetorch sweep RECIPE --seed 0..3 --slots 4 --plan threads=1`, whole command, start-up and saving included, against the same sweep of one seed. Their
aggregate is 4 times the steps in the time of the first over the steps in the time of the second; at least 3.5 is wanted. Ten: the same of seeds 0..9, and for
PPO at the length at which every seed has solved CartPole; at most 2 (PPO) and 4 (SAC) times the time of one are wanted.

Cores: `onetorch train RECIPE` with the speed plan it finds by itself where it may use all cores, against the same with `--plan threads=1` on one core. By the
seconds between the first and the last row of its metrics, so that neither pays for its plan. It must not be slower: at least 0.95 times as fast is wanted,
the rest is the clock's noise.

Everything takes turns; medians over the rounds count. The machine must have nothing else to do: what else runs is named by its load. Prints the rows, writes
them to benchmarks/results/seeds_on_cores.json, where rows of other algorithms stay, exits with 1 where something is below what is wanted.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
RESULT = HERE.parent / "results" / "seeds_on_cores.json"
WORK = {"ppo": ("CartPole-v1", 1_500_000), "sac": ("Pendulum-v1", 4000)}  # some ten seconds of one core each
TEN = {"ppo": (100_000, 2.0), "sac": (4000, 4.0)}  # steps of each of ten seeds, and how many times the time of one they may take
AGGREGATE, ALONE = 3.5, 0.95


def run(words: list[str], cores: set[int], folder: Path) -> float:
    """Seconds of a whole command that may use these cores."""
    path = os.pathsep.join(filter(None, (str(HERE.parent.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(folder)}
    environment.pop("OMP_NUM_THREADS", None)
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "onetorch", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    return time.perf_counter() - begin


def rate(folder: Path) -> tuple[float, dict[str, Any]]:
    """Training steps per second of a run between its first and its last row, and its plan."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    return (last["step"] - first["step"]) / (last["seconds"] - first["seconds"]), json.loads((folder / "run.json").read_text())["plan"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="*", default=list(WORK), choices=list(WORK))
    parser.add_argument("--rounds", type=int, default=3, help="of each (default 3)")
    parser.add_argument("--cores", type=int, default=4, help="of this process's cores to use (default 4)")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    n = len(cores)
    wanted = {"aggregate": AGGREGATE * n / 4, "all cores against one": ALONE, "ten against one": {name: most for name, (_, most) in TEN.items()}}
    result: dict[str, Any] = {"cores": n, "wanted": wanted, "system": platform.platform(), "python": platform.python_version()}
    result["rows"] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    good = True
    for algorithm in options.algorithms:
        env, steps = WORK[algorithm]
        load = round(os.getloadavg()[0], 2)
        common = [algorithm, "--env", env, "--total_steps", str(steps)]
        names = ("one seed, s", "seeds on all cores, s", "one of ten, s", "ten seeds, s", "one core, steps/s", "all cores, steps/s")
        each: dict[str, list[float]] = {name: [] for name in names}
        with tempfile.TemporaryDirectory(prefix="onetorch-seeds-") as name:
            folder = Path(name)
            run(["train", *common, "--dir", "plan"], set(cores), folder)  # the plan is measured and kept; kernels are built
            for k in range(options.rounds):
                sweep = ["sweep", *common, "--slots", str(n), "--plan", "threads=1"]
                each["one seed, s"].append(run([*sweep, "--seed", "0", "--dir", f"one{k}"], set(cores), folder))
                each["seeds on all cores, s"].append(run([*sweep, "--seed", f"0..{n - 1}", "--dir", f"all{k}"], set(cores), folder))
                short = ["sweep", algorithm, "--env", env, "--total_steps", str(TEN[algorithm][0]), "--slots", str(n), "--plan", "threads=1"]
                each["one of ten, s"].append(run([*short, "--seed", "0", "--dir", f"short{k}"], set(cores), folder))
                each["ten seeds, s"].append(run([*short, "--seed", "0..9", "--dir", f"ten{k}"], set(cores), folder))
                run(["train", *common, "--dir", f"core{k}", "--plan", "threads=1"], {cores[0]}, folder)
                run(["train", *common, "--dir", f"cores{k}"], set(cores), folder)
                each["one core, steps/s"].append(rate(folder / f"core{k}")[0])
                fast, plan = rate(folder / f"cores{k}")
                each["all cores, steps/s"].append(fast)
        figures = {
            "aggregate": statistics.median(n * a / b for a, b in zip(each["one seed, s"], each["seeds on all cores, s"], strict=True)),
            "ten against one": statistics.median(b / a for a, b in zip(each["one of ten, s"], each["ten seeds, s"], strict=True)),
            "all cores against one": statistics.median(b / a for a, b in zip(each["one core, steps/s"], each["all cores, steps/s"], strict=True)),
        }
        good &= figures["aggregate"] >= AGGREGATE * n / 4 and figures["ten against one"] <= TEN[algorithm][1] and figures["all cores against one"] >= ALONE
        rounded = {name: round(value, 2) for name, value in figures.items()} | {name: [round(value, 2) for value in values] for name, values in each.items()}
        result["rows"][f"{algorithm} {env}"] = {"load before": load, "plan": plan, **rounded}
        print(f"{algorithm} on {env}: " + "; ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
