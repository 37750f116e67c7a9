"""What a sweep adds to a trial: python benchmarks/sweep_overhead.py

64 trials of a trivial recipe on one core, one at a time: by `onetorch sweep --slots 1`, and by a loop written by hand that imports torch once and makes the
same 64 runs one after the other in its own process, with no process between them. Whole commands are timed, from the start of the interpreter to its end; both
make the same run folders. They take turns, and the overhead of a trial is the median over the rounds of the difference, divided by 64. A fresh interpreter for
each trial is timed too, three times. Prints the row, writes results/sweep_overhead.json; exits 1 above 50 ms.
"""

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IDEA = ROOT / "tests" / "runs" / "idea.py"
TARGET_MS = 50
TRIALS, STEPS, ROUNDS = 64, 5, 5

LOOP = """
import sys
from pathlib import Path
import torch
from onetorch.runs import algorithm
from onetorch.runs.run import Run

source = algorithm.read(Path(sys.argv[1]))
module = source.load()
for seed in range(int(sys.argv[2])):
    with Run(f"{sys.argv[4]}/{seed}", module.Config(seed=seed, steps=int(sys.argv[3])), recipe="idea", source=source.path, quiet=True) as run:
        model = module.train(run.config, run)
        run.finish()
        run.result(**module.evaluate(model, run.config, media=run.media))
"""


def timed(words: list[str], folder: Path) -> tuple[float, float]:
    """(wall-clock, CPU) seconds of a command and all processes it started."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # also of all that is started here: both sides get one core, and so one thread
    sweeps, loops, alone = [], [], []
    common = [str(IDEA), "--steps", str(STEPS)]
    with tempfile.TemporaryDirectory(prefix="onetorch-sweep-overhead-") as name:
        folder = Path(name)
        for _ in range(ROUNDS):
            words = [sys.executable, "-m", "onetorch", "sweep", *common, "--seed", f"0..{TRIALS - 1}", "--slots", "1", "--dir", "sweep"]
            sweeps.append(timed(words, folder))
            loops.append(timed([sys.executable, "-c", LOOP, str(IDEA), str(TRIALS), str(STEPS), "loop"], folder))
            done = sum(json.loads(p.read_bytes())["status"] == "done" for where in ("sweep", "loop") for p in folder.glob(f"{where}/*/run.json"))
            assert done == 2 * TRIALS, f"{done} of {2 * TRIALS} runs are done"
            for where in ("sweep", "loop"):
                shutil.rmtree(folder / where)
        for i in range(3):
            alone.append(timed([sys.executable, "-m", "onetorch", "train", *common, "--dir", f"alone-{i}"], folder))
    overhead, cpu = (statistics.median(1e3 * (s[i] - floor[i]) / TRIALS for s, floor in zip(sweeps, loops, strict=True)) for i in (0, 1))
    sweep_s, loop_s, alone_s = (statistics.median(wall for wall, _ in times) for times in (sweeps, loops, alone))
    result = {
        "overhead_ms": round(overhead, 1),
        "overhead_cpu_ms": round(cpu, 1),
        "target_ms": TARGET_MS,
        "wall_and_cpu_s": {name: [[round(x, 2) for x in s] for s in times] for name, times in (("sweep", sweeps), ("loop", loops), ("alone", alone))},
        "trials": TRIALS,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": [round(x, 1) for x in os.getloadavg()]},
    }
    print(
        f"| 64 trials of a trivial recipe on one core | sweep {sweep_s:.2f} s | the same runs in one process {loop_s:.2f} s"
        f" | overhead a trial {overhead:.1f} ms (at most {TARGET_MS}), {cpu:.1f} ms of it CPU | a fresh interpreter each: {1e3 * alone_s:.0f} ms |"
    )
    out = Path(__file__).with_name("results")
    out.mkdir(exist_ok=True)
    (out / "sweep_overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(overhead > TARGET_MS)


if __name__ == "__main__":
    sys.exit(main())
