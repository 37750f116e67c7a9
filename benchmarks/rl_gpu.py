"""Reinforcement learning on a GPU: steps per second of PPO's whole training, updates per second of SAC and TD3, with and without MuJoCo Warp.

    python benchmarks/rl_gpu.py [--only ppo sac td3 ppo-warp sac-warp] [--seconds 5] [--repeats 5]
    python benchmarks/rl_gpu.py --dry        # without a GPU: each row once, tiny, on the processor; shows only that the benchmark itself runs

ppo: 4096 torch-native CartPoles, 64 steps of each an iteration, two passes of 16 minibatches of 16,384, nets of 64 x 64; acting, stepping, learning and what
is logged. At least 1,000,000 environment steps a second are wanted. sac, td3: HalfCheetah's 17 numbers and 6 actions, two hidden layers of 256, a batch of 256
drawn from a replay memory of a million full of noise: draw and gradient step, with the checks that training makes, without an environment. At least 1,100 and
1,400 a second are wanted (LeanRL reports 725 and 936 on an H100, environment included).
ppo-warp: as ppo, but 4096 HalfCheetahs in MuJoCo Warp. 100,000 environment steps a second are wanted, what MuJoCo does on a dozen cores without any learning.
sac-warp: SAC's training with 1024 of them, a gradient step on 256 for every 64 environment steps; as many as sac's 1,100 updates feed, 70,000, are wanted.
Both rows need the extra `warp`, and say so where it is missing. The clock starts and stops when the GPU has done all it was told;
what is timed runs for --seconds before it is timed; medians of --repeats count. PPO's row says too what share of the time the rollout takes.
Writes benchmarks/results/rl_gpu.json; exits with 1 where a row misses what is wanted, with 2 where there is no GPU.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from onetorch.rl import ppo, sac, td3
from onetorch.rl.envs import Spaces
from onetorch.rl.graphs import Step
from onetorch.runs.errors import UsageError
from onetorch.runs.run import Run

WANTED = {"ppo": 1_000_000, "sac": 1_100, "td3": 1_400, "ppo-warp": 100_000, "sac-warp": 70_000}
OBS, ACT = 17, 6  # HalfCheetah-v5's


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rates(work: Callable[[], int], device: str, seconds: float, repeats: int) -> list[float]:
    """Units per second, `repeats` times over `seconds`, of `work`, which returns how many it did."""

    def once() -> float:
        wait(device)
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds or not done:
            done += work()
        wait(device)
        return done / (time.perf_counter() - begin)

    once()
    return [once() for _ in range(repeats)]


def run_ppo(given: argparse.Namespace, folder: Path, env: str = "CartPole-v1", backend: str = "native") -> dict[str, Any]:
    N, T = (16, 4) if given.dry else (4096, 64)
    config = ppo.Config(env=env, num_envs=N, batch_size=N * T, total_steps=10**12, epochs=2, minibatches=16)
    state, rolling, steps = ppo.begin(config, N, backend, given.device), 0.0, 0
    with Run(folder, config, quiet=True, fixed={"device": given.device}) as run:

        def iteration() -> int:
            nonlocal rolling, steps
            begin = time.perf_counter()
            batch = ppo.rollout(config, state, T, run)
            wait(given.device)
            rolling += time.perf_counter() - begin
            losses = ppo.update(config, state, batch, run=run)
            steps += N * T
            episodes = state.envs.episodes
            run.log(steps, **{"return": episodes.mean_return()}, episodes=episodes.finished, **losses)
            return N * T

        begin = time.perf_counter()
        found = rates(iteration, given.device, given.seconds, given.repeats)
        spent = time.perf_counter() - begin
    return {"rates": found, "rollout_share": round(rolling / spent, 3), "return": state.envs.episodes.mean_return()}


def run_critics(algorithm: ModuleType, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Gradient steps of SAC or TD3. The environment is Pendulum, which is never stepped: nets and replay memory are made for HalfCheetah's sizes."""
    batch, hidden, rows = (8, (16, 16), 64) if given.dry else (256, (256, 256), 1_000_000)
    config = algorithm.Config(batch_size=batch, hidden=hidden, replay=rows)
    with mock.patch.object(algorithm, "spaces", return_value=Spaces(OBS, ACT, discrete=False)):
        state = algorithm.begin(config, "native", device=given.device)
    assert state.replay.rows.shape == (rows, 2 * OBS + ACT + 3)
    state.replay.rows.normal_()
    state.replay.rows[:, 2 * OBS + ACT + 1 :] = 0  # no ends
    state.replay.count = rows
    with Run(folder, config, quiet=True, fixed={"device": given.device}) as run:

        learn = Step(partial(algorithm.update, config, state), state.rng, run)

        def updates() -> int:
            for _ in range(10):
                learn(state.replay.sample(batch, state.rng), *([td3.turn(config, state)] if algorithm is td3 else []))
            return 10

        return {"rates": rates(updates, given.device, given.seconds, given.repeats)}


def run_sac(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """SAC's training, environments included."""
    N, batch, hidden = (4, 8, (16, 16)) if given.dry else (1024, 256, (256, 256))
    config = sac.Config(env="HalfCheetah-v5", num_envs=N, batch_size=batch, hidden=hidden, replay=64 * N if given.dry else 1_000_000)
    state = sac.begin(config, "warp", device=given.device)
    with Run(folder, config, quiet=True, fixed={"device": given.device}) as run:
        learn = Step(partial(sac.update, config, state), state.rng, run)

        def iteration() -> int:
            end = sac.explore(config, state, False, run)
            for _ in range(max(1, N // 64)):
                learn(state.replay.sample(batch, state.rng))
            end()
            return N

        found = rates(iteration, given.device, given.seconds, given.repeats)
    return {"rates": found, "return": state.envs.episodes.mean_return()}


ROWS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "ppo": run_ppo, "sac": partial(run_critics, sac), "td3": partial(run_critics, td3),
    "ppo-warp": partial(run_ppo, env="HalfCheetah-v5", backend="warp"), "sac-warp": run_sac,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(WANTED), choices=list(WANTED))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="tiny, on the processor, no timing")
    given = parser.parse_args()
    given.device = "cpu" if given.dry else "cuda"
    if given.dry:
        given.seconds, given.repeats = 0.0, 1
    elif not torch.cuda.is_available():
        sys.stderr.write("there is no GPU here; --dry runs each row once on the processor\n")
        return 2
    rows: dict[str, Any] = {}
    for name in given.only:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = ROWS[name](given, Path(folder) / "run")
            except UsageError as error:  # without the extra warp
                print(f"none {name}: {error}", flush=True)
                continue
        rate = statistics.median(row["rates"])
        row |= {"median": round(rate), "least": WANTED[name], "met": rate >= WANTED[name], "rates": [round(r) for r in row["rates"]]}
        unit = "gradient steps" if name in ("sac", "td3") else "environment steps"
        if given.dry:
            print(f"dry  {name}: {unit} ran", flush=True)
        else:
            rows[name] = row
            print(f"{'ok  ' if row['met'] else 'MISS'} {name}: {rate:,.0f} {unit} a second (at least {WANTED[name]:,})", flush=True)
    if given.dry:
        return 0
    result = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(), "rows": rows}
    (Path(__file__).resolve().parent / "results" / "rl_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["met"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
