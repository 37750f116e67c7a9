"""Environments that fail, and who says so: python benchmarks/env_faults.py [--count 100] [--peers 5]

Faults of every kind, at a step and at a reset, in one of three environments: it raises, calls sys.exit or os._exit, is killed, crashes, sleeps, spins in C,
gives NaN, infinity, an observation of the wrong shape or dtype, or None. For each: was it named (the number of the environment, what it did, the step; a
traceback where there is one), how many seconds after the fault (a hang: after its timeout), and was a process left. Beside ours Gymnasium's AsyncVectorEnv
and, where it is installed, stable-baselines3's SubprocVecEnv with their defaults, each in a process of its own with 10 s from the fault to say anything and
end. Prints a row per kind and writes results/env_faults.json; exits 1 unless ours named all of them in time and left nothing.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 0.5  # seconds that a step may take, for the hangs
PATIENCE = 10.0  # seconds after the fault that a peer has to say something and to end
NUMBER, COUNT = 1, 3  # which environment fails, of how many
KINDS = ("raise", "sys.exit", "os._exit", "kill", "segfault", "sleep", "spin", "nan", "inf", "shape", "dtype", "none")
WHO = ("onetorch processes", "onetorch sync", "gymnasium", "stable-baselines3")
HANGS = ("sleep", "spin")
NOT_IN_PROCESS = ("os._exit", "kill", "segfault", "spin")  # take or block the very process that would have to say so
TRACED = ("raise", "sys.exit", "segfault", "sleep", "spin", "shape", "dtype", "none")


class Faulty(gymnasium.Env):
    """Action 1 brings the fault, action 2 ends the episode and brings it at the next reset."""

    observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, kind: str = "raise") -> None:
        self.kind, self.at_reset = kind, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.fault() if self.at_reset else np.zeros(4, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.at_reset = action == 2
        return self.fault() if action == 1 else np.zeros(4, np.float32), 1.0, bool(self.at_reset), False, {}

    def fault(self) -> Any:
        acts = {
            "raise": lambda: [][0], "sys.exit": lambda: sys.exit(3), "os._exit": lambda: os._exit(3), "sleep": lambda: time.sleep(3600),
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV), "spin": lambda: sum(range(10**15)),
            "nan": lambda: np.full(4, np.nan, np.float32), "inf": lambda: np.full(4, np.inf, np.float32), "shape": lambda: np.zeros(1, np.float32),
            "dtype": lambda: np.zeros(4, np.complex64), "none": lambda: None,
        }  # fmt: skip
        return acts[self.kind]()


for kind_ in KINDS:
    if f"Faulty-{kind_}-v0" not in gymnasium.registry:
        gymnasium.register(f"Faulty-{kind_}-v0", entry_point="env_faults:Faulty", kwargs={"kind": kind_})


def running() -> dict[int, tuple[int, int]]:
    """Parent and session of all processes but those that are dead and wait to be reaped."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found[int(stat.parent.name)] = (int(parent), int(session))
    return found


def children() -> set[int]:
    """Processes below this one, of any depth, that still run."""
    parents = {pid: parent for pid, (parent, _) in running().items()}
    found, new = set(), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new}
        found |= new
    return found


def ours(backend: str, kind: str, where: str) -> dict[str, Any]:
    import torch

    from onetorch.rl import envs
    from onetorch.runs.errors import RunError

    batch = envs.make(f"Faulty-{kind}-v0", COUNT, 0, backend, timeout=TIMEOUT)
    for _ in range(4):
        batch.step(torch.zeros(COUNT, dtype=torch.int64))
    act = torch.zeros(COUNT, dtype=torch.int64)
    act[NUMBER] = 1 if where == "step" else 2
    begin, told, trace = time.perf_counter(), "", False
    try:
        batch.step(act)
    except RunError as error:
        told, trace = str(error), bool(getattr(error, "__notes__", []))
    seconds = time.perf_counter() - begin
    named = f"number {NUMBER} " in told and ("step 5 of episode 0" if where == "step" else "the reset of episode 1") in told
    named = named and (trace or kind not in TRACED)
    left = len(children())
    batch.close()
    return {"named": named, "seconds": seconds - (TIMEOUT if kind in HANGS else 0), "left": left, "told": told}


def peer(name: str, kind: str, where: str) -> None:
    """One fault, in a process of its own: prints what the peer says, if anything."""
    act = np.zeros(COUNT, np.int64)
    act[NUMBER] = 1 if where == "step" else 2
    if name == "gymnasium":
        batch: Any = gymnasium.vector.AsyncVectorEnv([lambda: gymnasium.make(f"Faulty-{kind}-v0", disable_env_checker=True)] * COUNT)
        batch.reset(seed=0)
    else:
        from stable_baselines3.common.vec_env import SubprocVecEnv

        batch = SubprocVecEnv([lambda: gymnasium.make(f"Faulty-{kind}-v0", disable_env_checker=True)] * COUNT)
        batch.reset()
    for _ in range(4):
        batch.step(np.zeros(COUNT, np.int64))
    sys.stderr.write("ready\n")
    try:
        for given in (act, np.zeros(COUNT, np.int64)):  # Gymnasium resets at the step after the end
            batch.step(given)
    except BaseException as error:
        print("TOLD", repr(error), flush=True)
        raise
    print("SILENT", flush=True)
    batch.close()


def ask(name: str, python: str, kind: str, where: str) -> dict[str, Any]:
    """How a peer takes one fault: named (an error, and the number somewhere in what is printed), said (an error without it), silent, or hung; `ended` where
    its process then came to an end by itself."""
    command = [python, str(Path(__file__)), "--ask", name, kind, where]
    with tempfile.TemporaryFile("w+") as out_file, tempfile.TemporaryFile("w+") as err_file:
        process, ended, deadline = subprocess.Popen(command, stdout=out_file, stderr=err_file, start_new_session=True), True, 0.0
        while process.poll() is None:
            time.sleep(0.05)
            if not deadline and "ready" in os.pread(err_file.fileno(), 1 << 20, 0).decode():
                deadline = time.monotonic() + PATIENCE
            if deadline and time.monotonic() > deadline:
                ended = False
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out_file.seek(0)
        err_file.seek(0)
        out, err = out_file.read(), err_file.read()
    time.sleep(1)  # for helpers of multiprocessing, which end after it
    left = ended and any(session == process.pid for _, session in running().values())
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if "ready" not in err:
        raise SystemExit(f"{name} did not begin: {err}")
    if "TOLD" not in out:
        return {"how": "silent" if "SILENT" in out else "hung", "ended": ended, "left": left}
    said = err.partition("ready")[2] + out
    number = re.search(rf"(?i)(worker|env\w*|index|number|process)[-<>: ]*{NUMBER}\b", said)
    return {"how": "named" if number else "said", "ended": ended, "left": left}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100, help="faults of each kind, half at a step and half at a reset")
    parser.add_argument("--peers", type=int, default=4, help="… of each peer")
    parser.add_argument("--sb3", default=sys.executable, help="a Python that has stable-baselines3")
    parser.add_argument("--who", nargs="*", default=WHO, choices=WHO, help="measure these; rows of the others stay as the last result has them")
    parser.add_argument("--ask", nargs=3)
    options = parser.parse_args()
    if options.ask:
        peer(*options.ask)
        return 0
    path, rows, good = ROOT / "benchmarks" / "results" / "env_faults.json", [], True
    if set(options.who) != set(WHO):
        rows = [row for row in json.loads(path.read_text())["rows"] if row["who"] not in options.who]
    for backend in ("processes", "sync"):
        if f"onetorch {backend}" not in options.who:
            continue
        for kind in KINDS:
            if backend == "sync" and kind in NOT_IN_PROCESS:
                continue
            results = [ours(backend, kind, ("step", "reset")[k % 2]) for k in range(options.count)]
            seconds = [r["seconds"] for r in results]
            row = {
                "who": f"onetorch {backend}", "kind": kind, "faults": len(results), "named": sum(r["named"] for r in results),
                "seconds_median": round(statistics.median(seconds), 3), "seconds_max": round(max(seconds), 3), "left": max(r["left"] for r in results),
                "told": results[0]["told"],
            }  # fmt: skip
            met = row["named"] == len(results) and row["seconds_max"] <= 1 and row["left"] == 0
            good &= met
            rows.append(row | {"met": met})
            print(f"{row['who']:20} {kind:9} named {row['named']:3} of {len(results)}  {row['seconds_median']:6.3f} s, at most {row['seconds_max']:6.3f}  "
                  f"left {row['left']}  {'met' if met else 'MISSED'}", flush=True)  # fmt: skip
    pythons = {"gymnasium": sys.executable, "stable-baselines3": options.sb3}
    for name, python in pythons.items():
        if name not in options.who:
            continue
        if name == "stable-baselines3" and subprocess.run([python, "-c", "import stable_baselines3"], capture_output=True).returncode:
            print(f"{name}: not installed for {python}; give --sb3 PYTHON")
            continue
        for kind in KINDS if options.peers else ():
            results = [ask(name, python, kind, ("step", "reset")[k % 2]) for k in range(options.peers)]
            counts = {how: sum(r["how"] == how for r in results) for how in ("named", "said", "silent", "hung")}
            stuck = sum(not r["ended"] for r in results)
            rows.append({"who": name, "kind": kind, "faults": len(results), **counts, "did_not_end": stuck, "left": sum(r["left"] for r in results)})
            shown = "  ".join(f"{how} {n}" for how, n in counts.items() if n)
            print(f"{name:20} {kind:9} {shown}  of {len(results)}; did not end by itself {stuck}, processes left {rows[-1]['left']}", flush=True)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    versions = {"gymnasium": gymnasium.__version__, "numpy": np.__version__}
    result = {"command": "python benchmarks/env_faults.py", "timeout": TIMEOUT, "patience": PATIENCE, "machine": machine, "versions": versions, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
