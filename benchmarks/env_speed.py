"""Environment steps a second: python benchmarks/env_speed.py [--threads]

On one core (taskset -c 0): the native batches of N = 1, 8 and 64 beside Gymnasium's SyncVectorEnv of as many, the same environments one after the other under
`sync`, Gymnasium's own environment stepped by itself, and for MuJoCo the bare calls of its step, the ceiling. Random actions, drawn before. The contenders of
a row take turns, so that what else the machine does falls on all of them; medians of the rounds. With --threads, on all cores: `threads` and `processes`
beside `native`. Writes results/env_speed.json, or env_speed_threads.json.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch

from onetorch.rl import classic, envs, mujoco_tasks

ROOT = Path(__file__).resolve().parents[1]
SECONDS, ROUNDS, DRAWN = 0.15, 5, 50


def actions(batch: envs.Envs, seed: int) -> torch.Tensor:
    rng, spaces, n = torch.Generator().manual_seed(seed), batch.spaces, batch.num_envs
    if spaces.discrete:
        return torch.randint(spaces.act_dim, (DRAWN, n), generator=rng)
    return 2 * torch.rand(DRAWN, n, spaces.act_dim, generator=rng) - 1


def ours(env: str, n: int, backend: str) -> Callable[[int], None]:
    batch = envs.make(env, n, 0, backend)
    drawn = list(actions(batch, 0))

    def run(steps: int) -> None:
        for t in range(steps):
            batch.step(drawn[t % DRAWN])

    return run


def vector(env: str, n: int) -> Callable[[int], None]:
    batch = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(env, disable_env_checker=True)] * n)
    batch.reset(seed=0)
    batch.action_space.seed(0)
    drawn = [batch.action_space.sample() for _ in range(DRAWN)]

    def run(steps: int) -> None:
        for t in range(steps):
            batch.step(drawn[t % DRAWN])

    return run


def alone(env: str, n: int) -> Callable[[int], None]:
    one = gymnasium.make(env, disable_env_checker=True)
    one.reset(seed=0)
    one.action_space.seed(0)
    drawn = [one.action_space.sample() for _ in range(DRAWN)]

    def run(steps: int) -> None:
        for t in range(steps * n):
            _, _, terminated, truncated, _ = one.step(drawn[t % DRAWN])
            if terminated or truncated:
                one.reset()

    return run


def physics(env: str, n: int) -> Callable[[int], None]:
    task = mujoco_tasks.TASKS[env]
    batch = mujoco_tasks.MujocoEnvs(env, n, 0)
    model, drawn = batch.model, actions(batch, 0).numpy()
    low, high = model.actuator_ctrlrange.T
    given = [[(low + high) / 2 + act * (high - low) / 2 for act in row] for row in drawn]
    begun = [(data.qpos.copy(), data.qvel.copy()) for data in batch.data]

    def run(steps: int) -> None:
        for t in range(steps):
            for i, data in enumerate(batch.data):
                data.ctrl[:] = given[t % DRAWN][i]
                mujoco.mj_step(model, data, task.frame_skip)
                if t % 50 == 49:  # as episodes end, lest they come to lie where the physics is another
                    mujoco.mj_resetData(model, data)
                    data.qpos[:], data.qvel[:] = begun[i]

    return run


def rates(contenders: dict[str, Callable[[int], None]], n: int) -> dict[str, int]:
    """Environment steps a second of each, in turn."""
    steps = {}
    for name, run in contenders.items():
        run(3)
        count = 1
        while True:
            begin = time.perf_counter()
            run(count)
            taken = time.perf_counter() - begin
            if taken > SECONDS / 4:
                break
            count *= 2
        steps[name] = max(1, round(count * SECONDS / taken))
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run(steps[name])
            seen[name].append(steps[name] * n / (time.perf_counter() - begin))
    return {name: round(statistics.median(values)) for name, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for env in (*mujoco_tasks.TASKS, *classic.TASKS):
        for n in (8, 64) if options.threads else (1, 8, 64):
            if options.threads:
                if env in classic.TASKS:
                    continue
                contenders = {name: ours(env, n, name) for name in ("native", "threads", "processes")}
            else:
                contenders = {"native": ours(env, n, "native"), "SyncVectorEnv": vector(env, n), "sync": ours(env, n, "sync"), "Gymnasium alone": alone(env, n)}
                if env in mujoco_tasks.TASKS:
                    contenders["physics"] = physics(env, n)
            found = rates(contenders, n)
            rows.append({"env": env, "num_envs": n, **found})
            if not options.threads:
                rows[-1]["times_SyncVectorEnv"] = round(found["native"] / found["SyncVectorEnv"], 2)
            print(f"{env:26} {n:3}  " + "  ".join(f"{name} {value:,}" for name, value in list(rows[-1].items())[2:]), flush=True)
    machine = {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0)), "system": platform.system(), "python": platform.python_version()}
    versions = {"gymnasium": gymnasium.__version__, "mujoco": mujoco.__version__, "numpy": np.__version__, "torch": torch.__version__}
    command = "python benchmarks/env_speed.py" + (" --threads" if options.threads else "")
    result: dict[str, Any] = {"command": command, "unit": "environment steps / s", "rounds": ROUNDS, "statistic": "median", "machine": machine}
    result |= {"versions": versions, "rows": rows}
    name = "env_speed_threads.json" if options.threads else "env_speed.json"
    (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
