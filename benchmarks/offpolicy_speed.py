"""Training steps per second of SAC and TD3 on one core, against stable-baselines3, CleanRL and Spinning Up: their own code at their own defaults.

    python benchmarks/offpolicy_speed.py --peer-python PYTHON --cleanrl CLONE --spinningup CLONE [--shims FOLDER] [--algorithms sac td3] [--envs Pendulum-v1 …]

A training step is one step of the environment, one gradient step, and all else that the loop does. Each run goes to 900 steps; the first 200 collect with
random actions (a setting of each). The rate is that of steps 300 to 900 by the processor's time, which other work on the machine disturbs less than the clock
on the wall; on a quiet machine one thread on one core takes as much of either (`wall` in the results). All compute in torch of one thread on one core, in
turn, each in a process of its own; the median over the rounds counts. Ours is measured at batch 256 beside stable-baselines3 and CleanRL, and with Spinning
Up's settings (batch 100, 50 updates after every 50 steps) beside Spinning Up; in float32 and, where the processor multiplies it, bfloat16. `--shims` holds a
folder `CleanRL` and one `Spinning Up`, put on their import path: they want an older Gymnasium, gym, MPI and TensorFlow. Prints the rows, writes
benchmarks/results/offpolicy_speed.json, and exits with 1 where the better of ours is below the target against a peer.
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

FIRST, FROM, TO, TARGET = 200, 300, 900, 2.5
HERE = Path(__file__).resolve()
FILES = {"sac": "sac_continuous_action.py", "td3": "td3_continuous_action.py"}


def ours(algorithm: str, env: str, dtype: str, batch: int, seed: int) -> dict[str, Any]:
    import importlib

    from onetorch.runs.run import Run

    module = importlib.import_module(f"onetorch.rl.{algorithm}")
    rhythm = {"batch_size": 100, "update_every": 50} if batch == 100 else {"batch_size": batch}
    config = module.Config(env=env, total_steps=TO, random_steps=FIRST, update_after=FIRST, log_every=FROM, seed=seed, **rhythm)
    with tempfile.TemporaryDirectory() as folder:
        with Run(Path(folder) / "run", config, quiet=True, fixed={"threads": "1", "dtype": dtype, "device": "cpu"}) as run:
            module.train(config, run)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (next(row for row in rows if row["step"] == step) for step in (FROM, TO))
    return {"rate": (TO - FROM) / (last["cpu_seconds"] - first["cpu_seconds"]), "wall": (TO - FROM) / (last["seconds"] - first["seconds"])}


def counted() -> None:
    """Every environment that is made from now on counts its steps; the process prints the rate and ends at the last one."""
    import gymnasium

    make = gymnasium.make

    class Count(gymnasium.Wrapper):
        steps, start = 0, (0.0, 0.0)

        def step(self, action: Any) -> Any:
            result = self.env.step(action)
            Count.steps += 1
            if Count.steps == FROM:
                Count.start = (time.process_time(), time.perf_counter())
            elif Count.steps == TO:
                cpu, wall = time.process_time() - Count.start[0], time.perf_counter() - Count.start[1]
                os.write(3, json.dumps({"rate": (TO - FROM) / cpu, "wall": (TO - FROM) / wall}).encode())
                os._exit(0)
            return result

    gymnasium.make = lambda *names, **options: Count(make(*names, **options))


def theirs(peer: str, algorithm: str, env: str, seed: int, clone: str) -> None:
    import runpy

    import torch

    torch.set_num_threads(1)
    counted()
    if peer == "stable-baselines3":
        import stable_baselines3

        getattr(stable_baselines3, algorithm.upper())("MlpPolicy", env, learning_starts=FIRST, seed=seed).learn(10 * TO)
    elif peer == "CleanRL":
        sys.path.insert(0, clone)
        sys.argv = ["cleanrl", "--env-id", env, "--total-timesteps", str(10 * TO), "--learning-starts", str(FIRST), "--seed", str(seed)]
        runpy.run_path(f"{clone}/cleanrl/{FILES[algorithm]}", run_name="__main__")
    else:
        import importlib

        sys.path.insert(0, clone)
        gym = importlib.import_module("gym")
        train = getattr(importlib.import_module(f"spinup.algos.pytorch.{algorithm}.{algorithm}"), algorithm)
        train(lambda: gym.make(env), seed=seed, update_after=FIRST, start_steps=FIRST, logger_kwargs={"output_dir": "log"})


def child(python: str, words: list[str], shims: str | None) -> dict[str, float]:
    path = filter(None, (shims, str(HERE.parent.parent), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        read, write = os.pipe()
        command = ["bash", "-c", f'exec "$0" "$@" 3>&{write}', python, str(HERE), *words]
        done = subprocess.run(command, env=environment, cwd=folder, pass_fds=(write,), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        os.close(write)
        with os.fdopen(read) as stream:
            text = stream.read()
    if not text:
        raise RuntimeError(f"{' '.join(words)} gave no rate: {done.stderr[-2000:]}")
    return {name: round(value, 1) for name, value in json.loads(text).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--algorithms", nargs="+", default=["sac", "td3"])
    parser.add_argument("--envs", nargs="+", default=["HalfCheetah-v5", "Pendulum-v1"])
    parser.add_argument("--peer-python", default=sys.executable, help="python with stable-baselines3 and what the clones need (default: this one)")
    parser.add_argument("--cleanrl", help="folder of a clone of CleanRL")
    parser.add_argument("--spinningup", help="folder of a clone of Spinning Up")
    parser.add_argument("--shims", help="folder with the modules that the clones miss")
    parser.add_argument("--out", default=HERE.parent / "results" / "offpolicy_speed.json", help="the results, added to what stands there")
    parser.add_argument("--core", type=int, default=None, help="core to pin everything to (default: the first allowed)")
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        who, algorithm, env, what, seed = options.run
        if who == "ours":
            dtype, batch = what.split("/")
            os.write(3, json.dumps(ours(algorithm, env, dtype, int(batch), int(seed))).encode())
        else:
            theirs(who, algorithm, env, int(seed), what)
        return 0

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0)) if options.core is None else options.core})
    from onetorch.rl import stacks

    sides = [("ours", f"{dtype}/{batch}") for batch in (256, 100) for dtype in stacks.dtypes()]  # builds the kernels, too
    sides += [("stable-baselines3", "-")]
    sides += [("CleanRL", str(Path(options.cleanrl).resolve()))] if options.cleanrl else []
    sides += [("Spinning Up", str(Path(options.spinningup).resolve()))] if options.spinningup else []
    path = Path(options.out)
    result = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    result |= {"target_ratio": TARGET, "machine": next((n.partition(":")[2].strip() for n in names if n.startswith("model name")), platform.processor())}
    for algorithm in options.algorithms:
        for env in options.envs:
            rates: dict[str, list[dict[str, float]]] = {}
            for seed in range(options.rounds):
                for who, what in sides:
                    python = sys.executable if who == "ours" else options.peer_python
                    shims = str(Path(options.shims).resolve() / who) if options.shims and who != "ours" else None
                    rate = child(python, ["--run", who, algorithm, env, what, str(seed)], shims)
                    rates.setdefault(f"ours {what}" if who == "ours" else who, []).append(rate)
                    sys.stderr.write(f"{algorithm} {env} {who} {what if who == 'ours' else ''}: {rate['rate']:.0f} steps/s ({rate['wall']:.0f} on the wall)\n")
            medians = {name: statistics.median(value["rate"] for value in values) for name, values in rates.items()}
            ratios = {
                f"{mine} : {peer}": round(medians[mine] / medians[peer], 2)
                for mine in medians if mine.startswith("ours")
                for peer in medians if not peer.startswith("ours") and mine.endswith("/100") == (peer == "Spinning Up")
            }  # fmt: skip
            result["rows"][f"{algorithm} {env}"] = {"steps_per_second": medians, "ratios": ratios, "runs": rates}
            for name, ratio in ratios.items():
                sys.stdout.write(f"{algorithm} {env}: {name} = {ratio}\n")
            sys.stdout.flush()
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    best: dict[str, float] = {}
    for row, values in result["rows"].items():
        for name, ratio in values["ratios"].items():
            peer = f"{row} {name.partition(' : ')[2]}"
            best[peer] = max(ratio, best.get(peer, 0.0))
    return 0 if all(ratio >= TARGET for ratio in best.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
