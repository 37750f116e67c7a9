"""Training steps per second of DQN on CartPole-v1, beside stable-baselines3's DQN at its own defaults, on one core.

    python benchmarks/dqn_speed.py --repeats 5 [--steps 20000] [--core 0] [--peer-python /path/to/venv/bin/python]

Both train the same: two hidden layers of 64, batches of 32, one gradient step for every 4 environment steps from step 100 on, a replay memory of a million, a
copy of the target every 2,500 gradient steps, Adam at 1e-4. Ours steps 8 environments at once and takes two gradient steps; a second row steps one, as
stable-baselines3 does. In turn (ours, ours with one environment, theirs, …), each in a process of its own; the clock starts with the training and stops after
--steps environment steps; imports (which for torch's optimizers come with the first of them) and the speed plan's measuring are left out. Prints a row each,
writes benchmarks/results/dqn_speed.json, and exits with 1 where the median of the ratios of neighbours, in CPU seconds, is below the target.
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

TARGET = 3.0
HERE = Path(__file__).resolve()
SIDES = ("ours", "ours, one environment", "theirs")


def ours(steps: int, seed: int, num_envs: int) -> dict[str, Any]:
    import torch

    from onetorch.rl import dqn
    from onetorch.runs.run import Run

    torch.optim.Adam([torch.zeros(1)])
    every = max(4, num_envs)
    config = dqn.Config(
        seed=seed, total_steps=steps, num_envs=num_envs, hidden=(64, 64), batch_size=32, update_every=every, updates=every // 4, update_after=100, lr=1e-4,
        replay=1_000_000, target_every=2500, tau=1.0, epsilon=0.05, epsilon_fraction=0.1, double=False, anneal=False, n_step=1, adam_eps=1e-8, huber=1.0,
        max_grad_norm=10.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        # Only the state at the end is saved: stable-baselines3 saves nothing.
        run = Run(Path(folder) / "run", config, quiet=True, fixed={"threads": "1", "backend": "native", "device": "cpu"}, checkpoint_seconds=1e9)
        with run:
            dqn.train(config, run)
        last = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    result = {key: last[key] for key in ("seconds", "cpu_seconds", "updates", "step")}
    return result | {"versions": {"torch": torch.__version__}}


def theirs(steps: int, seed: int) -> dict[str, Any]:
    import gymnasium
    import stable_baselines3
    import torch

    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1)])
    begin, begin_cpu = time.perf_counter(), time.process_time()
    model = stable_baselines3.DQN("MlpPolicy", "CartPole-v1", seed=seed, device="cpu")
    model.learn(steps)
    versions = {"stable-baselines3": stable_baselines3.__version__, "torch": torch.__version__, "gymnasium": gymnasium.__version__}
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "updates": model._n_updates, "step": model.num_timesteps, "versions": versions}


def child(python: str, side: str, steps: int, seed: int) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent.parent), os.environ.get("PYTHONPATH")))), "OMP_NUM_THREADS": "1"}
    words = [python, str(HERE), "--side", side, "--steps", str(steps), "--seed", str(seed)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return {"seed": seed, "per_second": round(result["step"] / result["seconds"]), "per_cpu_second": round(result["step"] / result["cpu_seconds"])} | result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, seeds 0, 1, … (default 5)")
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps of a run (default 20,000)")
    parser.add_argument("--peer-python", default=sys.executable, help="python that has stable-baselines3 (default: this one, with the extra `peers`)")
    parser.add_argument("--core", type=int, default=None, help="core to pin everything to (default: the first allowed)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        result = theirs(options.steps, options.seed) if options.side == "theirs" else ours(options.steps, options.seed, 1 if "one" in options.side else 8)
        sys.stdout.write(json.dumps(result) + "\n")
        return 0
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0)) if options.core is None else options.core})
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in range(options.repeats):
        for side in SIDES:
            rows[side].append(child(options.peer_python if side == "theirs" else sys.executable, side, options.steps, seed))
            sys.stderr.write(f"{side:22} {rows[side][-1]['per_second']:6,} steps/s, {rows[side][-1]['per_cpu_second']:6,} per CPU second\n")
    summary: dict[str, Any] = {side: {k: statistics.median(row[k] for row in rows[side]) for k in ("per_second", "per_cpu_second")} for side in SIDES}
    for side in SIDES[:2]:
        for key in ("per_second", "per_cpu_second"):
            ratios = [a[key] / b[key] for a, b in zip(rows[side], rows["theirs"], strict=True)]
            summary[side][f"ratio_{key}"] = round(statistics.median(ratios), 2)
            summary[side][f"range_{key}"] = [round(min(ratios), 2), round(max(ratios), 2)]
        s = summary[side]
        sys.stdout.write(
            f"DQN CartPole-v1, one core, {side}: {s['per_second']:,} training steps a second, stable-baselines3 {summary['theirs']['per_second']:,}: "
            f"{s['ratio_per_second']} times ({s['range_per_second'][0]} to {s['range_per_second'][1]}), {s['ratio_per_cpu_second']} in CPU time\n"
        )
    met = summary["ours"]["ratio_per_cpu_second"] >= TARGET
    result = {"target_ratio": TARGET, "met": met, "summary": summary, "machine": {"processor": processor(), "cores_used": 1, "system": platform.platform()}}
    path = HERE.parent / "results" / "dqn_speed.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result | {"python": platform.python_version(), "runs": rows}, indent=1) + "\n")
    return 0 if met else 1


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.is_file() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
