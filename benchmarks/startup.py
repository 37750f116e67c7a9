"""How soon the command line answers, and what ./go adds to it: python3 benchmarks/startup.py

Prints a row for each command: median milliseconds of wall-clock from its start to its end, and whether torch was imported. Writes results/startup.json beside
this file; exits 1 if a target is missed. The commands take turns, so that what else the machine does falls on all of them.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GO = [sys.executable, str(ROOT / "go")] if os.name == "nt" else [str(ROOT / "go")]
ONETORCH = str(ROOT / ".venv" / ("Scripts/onetorch.exe" if os.name == "nt" else "bin/onetorch"))
ANSWER_MS = 150
OVERHEAD_MS = 100
ROUNDS = 21
COMMANDS = {  # words: exit code
    ("--help",): 0,
    ("list",): 0,
    ("show", "ppo"): 0,
    ("trian", "ppo"): 2,
    ("train", "pppo"): 2,
    ("train", "ppo", "--seeed", "1"): 2,
    ("train", "ppo", "--lr", "quick"): 2,
    ("--version",): 0,
}


def milliseconds(command: list[str], code: int) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    taken = 1000 * (time.perf_counter() - start)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}, expected {code}: {done.stderr.strip()}")
    if code == 2 and len(done.stderr.splitlines()) != 1:
        raise SystemExit(f"{' '.join(command)}: expected one line on stderr, got {done.stderr!r}")
    return taken


def imports_torch(words: tuple[str, ...]) -> bool:
    python = str(Path(ONETORCH).with_name("python.exe" if os.name == "nt" else "python"))
    said = subprocess.run([python, "-X", "importtime", "-m", "onetorch", *words], capture_output=True, text=True, cwd=ROOT).stderr
    loaded = {line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import time:")}
    if "onetorch.cli" not in loaded:
        raise SystemExit("-X importtime shows no import of onetorch.cli: this check sees nothing")
    return "torch" in loaded


def main() -> int:
    subprocess.run([*GO, "--version"], check=True, stdout=subprocess.DEVNULL)
    times: dict[tuple[str, ...], list[float]] = {words: [] for words in COMMANDS}
    through_go: list[float] = []
    for _ in range(ROUNDS):
        for words, code in COMMANDS.items():
            times[words].append(milliseconds([ONETORCH, *words], code))
        through_go.append(milliseconds([*GO, "--version"], 0))

    found = [(" ".join(["onetorch", *words]), statistics.median(times[words]), ANSWER_MS, imports_torch(words)) for words in COMMANDS]
    found.append(("added by ./go", statistics.median(through_go) - statistics.median(times[("--version",)]), OVERHEAD_MS, False))

    rows = []
    for what, ms, target_ms, torch in found:
        met = ms <= target_ms and not torch
        rows.append({"what": what, "ms": round(ms, 1), "target_ms": target_ms, "imports_torch": torch, "met": met})
        print(f"{what:34} {ms:7.1f} ms  (at most {target_ms})  {'imports torch' if torch else 'no torch'}  {'met' if met else 'MISSED'}")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    result = {"command": "python3 benchmarks/startup.py", "rounds": ROUNDS, "statistic": "median", "machine": machine, "rows": rows}
    path = ROOT / "benchmarks" / "results" / "startup.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
