"""The report about 1,000 runs of 1,000 rows: at most 2 MB, and drawn at most 2 s after it is opened in headless Chromium.

    python benchmarks/report_scale.py [--runs 1000] [--rows 1000] [--quantities 4] [--seeds 5] [--openings 5] [--keep DIR]

The runs are folders with made-up curves, written as a run writes them; what is measured is reading them, writing the page, its size, and opening it from a
file in a fresh browser each time: first contentful paint (the browser's own entry) and the moment at which the curves stand, counted from navigation.
Prints one JSON object, with `--keep` leaves runs and page in DIR, exits 1 on a miss.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "runs"))
from browser import CHROMIUM, Browser  # (the tests' driver of Chromium)

from onetorch.runs import compare, folder, provenance, report

SIZE, PAINT = 2_000_000, 2.0  # bytes; seconds


def make(home: Path, runs: int, rows: int, quantities: int, seeds: int) -> None:
    """Folders of runs over a grid of settings, `seeds` each, with noisy curves that saturate."""
    rng = np.random.default_rng(0)
    for i in range(runs):
        setting, seed = divmod(i, seeds)
        lr, width = 10 ** (-4 + 3 * (setting % 20) / 19), 16 * (1 + setting // 20)
        path = home / f"scale-{i:04d}"
        path.mkdir(parents=True)
        best = 500 * np.exp(-((np.log10(lr) + 2.5) ** 2)) + 0.2 * width + 20 * rng.normal()
        t = np.arange(1, rows + 1) / rows
        curves = [best * (1 - np.exp(-5 * t)) / (q + 1) + 8 * rng.normal(size=rows) for q in range(quantities)]
        seconds = np.cumsum(rng.uniform(0.01, 0.02, rows))
        lines = [
            json.dumps({"step": 2048 * (k + 1), "seconds": round(s, 4), "cpu_seconds": round(s, 4), **{f"quantity_{q}": c[k] for q, c in enumerate(curves)}})
            for k, s in enumerate(seconds.tolist())
        ]
        (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        config = {"seed": seed, "lr": lr, "width": width, "steps": rows}
        (path / "config.json").write_text(json.dumps({"format": folder.FORMAT, "recipe": "scale", "algorithm": "onetorch.rl.scale", "config": config}))
        record = {
            "format": folder.FORMAT,
            "status": "done",
            "recipe": "scale",
            "command": f"onetorch train scale --lr {lr:.3g} --width {width} --seed {seed}",
            "created": "2026-01-01T00:00:00+0000",
            "result": {"quantity_0": float(curves[0][-50:].mean())},
            "cost": {"seconds": float(seconds[-1]), "cpu_seconds": float(seconds[-1])},
        }
        (path / "run.json").write_text(json.dumps(record))


def opened(page: Path) -> dict[str, float]:
    """Seconds from navigation in a fresh browser."""
    with Browser() as browser:
        browser.open(page)
        paint = browser.js("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
        drawn = float(browser.js("document.documentElement.dataset.drawn")) / 1000
        assert not browser.problems(), browser.problems()
        assert not browser.requests(), browser.requests()
        return {"first_paint_seconds": paint, "drawn_seconds": drawn}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("runs", 1000), ("rows", 1000), ("quantities", 4), ("seeds", 5), ("openings", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    if CHROMIUM is None:
        sys.stderr.write("report_scale: no chromium on this machine\n")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        home = options.keep or Path(scratch)
        make(home / "sweep", options.runs, options.rows, options.quantities, options.seeds)
        import bokeh.layouts  # noqa: F401 (its import is not what is measured)

        begin = time.perf_counter()
        comparison = compare.load([str(home / "sweep")])
        read = time.perf_counter() - begin
        page = home / "report.html"
        remarks = list(report.save(comparison, page))
        written = time.perf_counter() - begin - read
        size = page.stat().st_size
        times = [opened(page) for _ in range(options.openings)]
    result: dict[str, Any] = {
        "runs": options.runs,
        "rows": options.rows,
        "bytes": size,
        "read_seconds": round(read, 2),
        "write_seconds": round(written, 2),
        "remarks": remarks,
    }
    for name in times[0]:
        result[name] = {"median": round(statistics.median(t[name] for t in times), 3), "worst": round(max(t[name] for t in times), 3)}
    result |= {"processor": provenance.processor(), "cores": provenance.cores(), "load": round(os.getloadavg()[0], 1)}
    result["met"] = result["bytes"] <= SIZE and result["drawn_seconds"]["median"] <= PAINT
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
