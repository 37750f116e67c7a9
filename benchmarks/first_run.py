"""From a fresh clone to a solved CartPole by the README's first command: python3 benchmarks/first_run.py

Clones this repository (its last commit) into a temporary folder and runs `./go train ppo --dir …` there. Solved is the first row of metrics.jsonl in which the
mean return of the last 100 episodes is at least 475. The package cache is expected to be warm: run it twice. Prints the phases, writes results/first_run.json
beside this file; exits 1 if the clone, the set-up and the training up to that row together take more than 90 s.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET_S = 90
RETURN = 475
EPISODES = 100
LIMIT_S = 600


def solved(metrics: Path) -> dict[str, float] | None:
    """The first row that solves it, if there is one yet; a last line that is still being written does not count."""
    if not metrics.exists():
        return None
    for line in metrics.read_text().split("\n")[:-1]:
        row = json.loads(line)
        if row.get("return", 0) >= RETURN and row["episodes"] >= EPISODES:
            return row
    return None


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="onetorch first run ") as temporary:
        start = time.perf_counter()
        clone, run = Path(temporary) / "onetorch", Path(temporary) / "run"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        reached = {"clone": time.perf_counter() - start}
        signs = {"venv": clone / ".venv" / "pyvenv.cfg", "install": clone / ".venv" / "bin" / "onetorch", "start": run / "config.json"}
        row = None
        with open(Path(temporary) / "log", "w+") as log:
            process = subprocess.Popen(["./go", "train", "ppo", "--dir", str(run)], cwd=clone, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                now = time.perf_counter() - start
                reached |= {phase: now for phase, sign in signs.items() if phase not in reached and sign.exists()}
                row = row or solved(run / "metrics.jsonl")
                if row:
                    reached.setdefault("training", now)
                if now > LIMIT_S:
                    process.kill()
                time.sleep(0.02)
            log.seek(0)
            said = log.read()
        reached["rest"] = time.perf_counter() - start
        row = row or solved(run / "metrics.jsonl")
        if process.returncode or not row:
            print(said)
            print(f"exit code {process.returncode}; " + ("solved" if row else f"no row with a mean return of {RETURN} over {EPISODES} episodes"))
            return 1

    total = reached.get("training", reached["rest"])
    print("phase       seconds")
    last, phases = 0.0, {}
    for phase in ("clone", "venv", "install", "start", "training", "rest"):
        if phase in reached:
            phases[phase], last = round(reached[phase] - last, 1), reached[phase]
            print(f"{phase:10} {phases[phase]:8.1f}{'  (the evaluation, the video, the report)' if phase == 'rest' else ''}")
    met = total <= TARGET_S
    print(f"solved after {total:.1f} s (at most {TARGET_S}), at step {row['step']}, {row['seconds']:.1f} s into the run  {'met' if met else 'MISSED'}")
    result = {
        "command": "python3 benchmarks/first_run.py",
        "installer": "uv" if shutil.which("uv") else "pip",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()},
        "phases_s": phases,
        "solved_s": round(total, 1),
        "target_s": TARGET_S,
        "row": row,
        "met": met,
    }
    target = ROOT / "benchmarks" / "results" / "first_run.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
