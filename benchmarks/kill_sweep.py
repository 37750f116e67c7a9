"""A sweep that is killed again and again loses nothing: python benchmarks/kill_sweep.py [--kills 20] [--seed 0]

A 20-trial sweep is begun; then, 20 times at a random moment, one of its processes gets kill -9: the sweep itself, the process that starts the trials, or one
of the trials. Whenever the command has ended the same command is given once more. At the end every trial must be done, its weights, optimizer, random
generators, metrics and result must be those of the same trials in a sweep that nobody disturbed, and no trial may have run twice to its end: from the moment
that a trial's record says "done", not a byte of it may change. After each kill of the sweep no process of it may be left.
Prints the row, writes results/kill_sweep.json; exits 1 on a miss.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IDEA = ROOT / "tests" / "runs" / "idea.py"
STEPS, PAUSE = 160, 0.05  # a trial takes eight seconds, nearly all of it asleep, so that there is a while to be killed in
LONGEST = 2.0  # seconds between two kills
EARLY = 0.2  # share of the kills that may come while torch is still imported; the others wait until a trial runs
LIMIT = 900.0  # seconds for all


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]
    return []


def living(session: int) -> list[int]:
    """The processes of a nursery and its trials, which have a session of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its, *_ = path.read_text().rpartition(")")[2].split()
            if int(its) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def done(where: Path) -> dict[str, bytes]:
    """The records of the trials that are done, by id."""
    found = {path.parent.name: path.read_bytes() for path in where.glob("*/run.json")}
    return {id: text for id, text in found.items() if json.loads(text)["status"] == "done"}


def outcome(trial: Path) -> dict[str, object]:
    """All that a trial leaves that does not tell the time."""
    last = max((trial / "checkpoints").glob("[0-9]*"))
    files = json.loads((last / "manifest.json").read_bytes())["files"]
    lines = (trial / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "cpu_seconds")} for line in lines]
    hashes = {name: files[name]["sha256"] for name in ("model.safetensors", "state.safetensors")}
    return {"step": last.name, "hashes": hashes, "rows": rows, "result": json.loads((trial / "run.json").read_bytes())["result"]}


def by_values(where: Path) -> dict[tuple[float, int], dict[str, object]]:
    configs = {path.parent: json.loads(path.read_bytes())["config"] for path in where.glob("*/config.json")}
    return {(config["lr"], config["seed"]): outcome(trial) for trial, config in configs.items()}


def command(where: Path) -> list[str]:
    fields = ["--lr", "0.05", "0.02", "0.01", "0.005", "--seed", "0..4", "--steps", str(STEPS), "--pause", str(PAUSE)]
    options = ["--slots", "4", "--checkpoint_seconds", "0.2", "--dir", str(where)]
    return [sys.executable, "-m", "onetorch", "sweep", str(IDEA), *fields, *options]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    killed = {"sweep": 0, "nursery": 0, "trial": 0}
    commands, orphans, twice = 0, 0, set()
    records: dict[str, bytes] = {}

    with tempfile.TemporaryDirectory(prefix="onetorch-kill-sweep-") as name:
        where, calm = Path(name) / "killed", Path(name) / "calm"
        while time.monotonic() - start < LIMIT:
            commands += 1
            with open(Path(name) / "log", "ab") as log:
                sweep = subprocess.Popen(command(where), stdout=log, stderr=log, env=env, cwd=name)
            sessions: set[int] = set()
            while sweep.poll() is None and sum(killed.values()) < args.kills:
                early = chance.random() < EARLY
                while not early and sweep.poll() is None and not any(map(children, children(sweep.pid))):
                    time.sleep(0.01)
                wait = time.monotonic() + chance.uniform(0, LONGEST)
                while time.monotonic() < wait and sweep.poll() is None:
                    time.sleep(0.01)
                nursery = children(sweep.pid)
                trials = [pid for parent in nursery for pid in children(parent)]
                sessions |= set(nursery)
                if sweep.poll() is not None:
                    break
                there = {kind: pids for kind, pids in {"sweep": [sweep.pid], "nursery": nursery, "trial": trials}.items() if pids}
                kind = chance.choice(list(there))
                try:
                    os.kill(chance.choice(there[kind]), signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it ended by itself a moment ago
                killed[kind] += 1
                if kind == "sweep":
                    sweep.wait()
                    break
            if sweep.returncode == -signal.SIGKILL:
                deadline = time.monotonic() + 5
                while any(map(living, sessions)) and time.monotonic() < deadline:
                    time.sleep(0.01)
                orphans += sum(len(living(session)) for session in sessions)
            code = sweep.wait(timeout=LIMIT)
            now = done(where)
            twice |= {id for id, text in records.items() if now.get(id) != text}
            records |= now
            if code == 0:
                break
        enough = sum(killed.values()) >= args.kills
        subprocess.run(command(calm), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, cwd=name)
        expected, found = by_values(calm), by_values(where)
        finished = len(done(where))
    same = sum(found.get(values) == result for values, result in expected.items())
    total, seconds = len(expected), time.monotonic() - start
    victims = ", ".join(f"{n} {kind}" for kind, n in killed.items())
    print(
        f"| 20-trial sweep, kill -9 {sum(killed.values())} times ({victims}), {commands} commands | {finished} of {total} done"
        f" | {same} of {total} bit-identical to the undisturbed | {len(twice)} run twice to the end | {orphans} orphans | {seconds:.0f} s |"
    )
    result = {"kills": killed, "commands": commands, "trials": total, "done": finished, "identical": same, "twice": len(twice), "orphans": orphans}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    out = Path(__file__).with_name("results")
    out.mkdir(exist_ok=True)
    (out / "kill_sweep.json").write_text(json.dumps(result | {"seed": args.seed, "seconds": round(seconds), "machine": machine}, indent=1) + "\n")
    return int(not (enough and total == finished == same == len(found) == 20 and not twice and not orphans))


if __name__ == "__main__":
    sys.exit(main())
