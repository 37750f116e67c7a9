"""PPO's training steps per second on HalfCheetah-v5 and Hopper-v5 against stable-baselines3, CleanRL and Spinning Up, each on one core.

    python benchmarks/ppo_mujoco.py --seeds 3 --steps 40000 --peer-python VENV/bin/python --peer "cleanrl=COMMAND" --peer "spinningup=COMMAND"

Everyone trains for the same number of environment steps with their own defaults, ours with the recipe of that environment, interleaved, in processes of their
own pinned to one core. The time counts from the first environment step (stable-baselines3, Spinning Up and ours: from the call that trains, environments and
model made within it) to the end of training. The return is the mean over the training episodes that ended in the last fifth of the steps.

stable-baselines3 is run through its public API by --peer-python. The others have to be given as a command that takes ENV STEPS SEED and prints as its last
line {"seconds", "cpu", "steps", "episodes": [[step, return], …]}, because neither starts on today's packages. CleanRL's ppo_continuous_action.py needs for
Gymnasium 1 an observation_space handed to TransformObservation, and SyncVectorEnv to reset within the step as it did. Spinning Up's PyTorch PPO needs an
empty module in the place of TensorFlow, one process in the place of mpi4py, and Gym's old reset and step over Gymnasium's. Their code is otherwise their
own, at their defaults.

The target: at least 5 times the steps per second of each, by the median over seeds. What nobody can pass on one core is printed beside it: the steps per
second if MuJoCo's own step, in the states that our run goes through, were all there is to do. Writes benchmarks/results/ppo_mujoco.json.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENVS = {"HalfCheetah-v5": "ppo-halfcheetah", "Hopper-v5": "ppo-hopper"}
TARGET = 5.0
HERE = Path(__file__).resolve()
RESULT = HERE.parent / "results" / "ppo_mujoco.json"


def ours(env: str, steps: int, seed: int) -> dict[str, Any]:
    import dataclasses

    import mujoco

    from onetorch import recipes
    from onetorch.rl import ppo
    from onetorch.runs.run import Run

    config = dataclasses.replace(recipes.find(ENVS[env])(), total_steps=steps, seed=seed)
    simulate, simulated, count = mujoco.mj_step, 0.0, 0

    def timed(*arguments: Any) -> None:  # adds a quarter of a microsecond to some twenty or more
        nonlocal simulated, count
        start = time.perf_counter()
        simulate(*arguments)
        simulated, count = simulated + time.perf_counter() - start, count + 1

    mujoco.mj_step = timed
    with tempfile.TemporaryDirectory() as folder:
        with Run(Path(folder) / "run", config, quiet=True, fixed={"threads": "1", "device": "cpu"}) as run:
            begin, cpu = time.monotonic(), time.process_time()
            ppo.train(config, run)
            seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    # the log has the mean of the last 100 episodes and their count; between two rows the episodes that ended have this mean
    episodes, before = [], (0, 0.0)
    for row in rows:
        if row["episodes"] > before[0] and row["episodes"] <= 100:
            total = row["return"] * row["episodes"]
            new = row["episodes"] - before[0]
            episodes += [(row["step"], (total - before[1]) / new)] * new
            before = (row["episodes"], total)
        elif row["episodes"] > before[0]:
            new = row["episodes"] - before[0]
            episodes += [(row["step"], row["return"])] * new
            before = (row["episodes"], 0.0)
    return {"seconds": seconds, "cpu": cpu, "steps": rows[-1]["step"], "episodes": episodes, "physics_per_second": round(count / simulated, 1)}


def stable_baselines3(env: str, steps: int, seed: int) -> dict[str, Any]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

    episodes: list[tuple[int, float]] = []

    class Note(BaseCallback):
        def _on_step(self) -> bool:
            episodes.extend((self.num_timesteps, float(info["episode"]["r"])) for info in self.locals["infos"] if "episode" in info)
            return True

    begin, cpu = time.monotonic(), time.process_time()
    model = PPO("MlpPolicy", env, seed=seed).learn(steps, callback=Note())
    return {"seconds": time.monotonic() - begin, "cpu": time.process_time() - cpu, "steps": model.num_timesteps, "episodes": episodes}


def child(words: list[str]) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent.parent), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    late = [value for step, value in row.pop("episodes") if step >= 0.8 * row["steps"]]
    row["return"] = round(statistics.fmean(late), 1) if late else None
    return row | {"per_second": round(row["steps"] / row["seconds"], 1), "per_cpu_second": round(row["steps"] / row["cpu"], 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="*", default=list(ENVS), choices=list(ENVS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--peer-python", default=sys.executable, help="python that has stable-baselines3 (default: this one, with the extra `peers`)")
    parser.add_argument("--peer", action="append", default=[], help="NAME=COMMAND, a peer that takes ENV STEPS SEED; may be given several times")
    parser.add_argument("--core", type=int, help="core to pin everything to (default: the first allowed)")
    parser.add_argument("--side", choices=("ours", "stable_baselines3"), help=argparse.SUPPRESS)
    parser.add_argument("work", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        env, steps, seed = options.work
        print(json.dumps(globals()[options.side](env, int(steps), int(seed))))
        return 0
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core if options.core is not None else min(os.sched_getaffinity(0))})
    sides = {"ours": [sys.executable, str(HERE), "--side", "ours"], "stable-baselines3": [options.peer_python, str(HERE), "--side", "stable_baselines3"]}
    sides |= {name: shlex.split(command) for name, _, command in (peer.partition("=") for peer in options.peer)}
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    failed = False
    for env in options.envs:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for seed in range(options.seeds):
            for name, words in sides.items():
                row = child([*words, env, str(options.steps), str(seed)])
                rows[name].append(row)
                sys.stderr.write(f"{env} seed {seed} {name}: {row['per_second']} steps/s, return {row['return']}\n")
        summary = {}
        for name, runs in rows.items():
            ratios = sorted(a["per_second"] / b["per_second"] for a, b in zip(rows["ours"], runs, strict=True))
            cpu = statistics.median(a["per_cpu_second"] / b["per_cpu_second"] for a, b in zip(rows["ours"], runs, strict=True))
            earned = [run["return"] for run in runs if run["return"] is not None]
            summary[name] = {
                "per_second": statistics.median(run["per_second"] for run in runs),
                "ours_times": round(statistics.median(ratios), 2), "from": round(ratios[0], 2), "to": round(ratios[-1], 2), "ours_times_cpu": round(cpu, 2),
                "return": round(statistics.fmean(earned), 1) if earned else None,
            }  # fmt: skip
            s = summary[name]
            if name == "ours":
                s["physics_per_second"] = physics = statistics.median(run["physics_per_second"] for run in runs)
            else:
                s["physics_times"] = round(physics / s["per_second"], 2)
            if name != "ours":
                failed |= s["ours_times"] < TARGET
            times = "" if name == "ours" else f": ours {s['ours_times']} times as many ({s['from']} to {s['to']}; by CPU time {s['ours_times_cpu']})"
            times += f"; {physics:,.0f} if there were only the physics" + ("" if name == "ours" else f", {s['physics_times']} times as many")
            print(f"{env}, {options.steps:,} steps, one core, {options.seeds} seeds, {name}: {s['per_second']:,.0f} steps/s{times}; return {s['return']}")
        result[env] = {"steps": options.steps, "target": TARGET, "summary": summary, "runs": rows}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
