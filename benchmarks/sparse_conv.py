"""Block-sparse convolutions beside torch's dense one, forward + backward on one thread; no row may take more than 1.02 of dense.

    python benchmarks/sparse_conv.py            # two minutes

Both are timed in turn, in shuffled order, and the medians of the ratios are reported; `costs` are what the layer chose by (see `conv.costs_of`). Writes
benchmarks/results/sparse_conv.json and exits 1 where a row misses the target.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
from pathlib import Path

import torch
from sparse_cpu import Report, interleaved, ratio
from torch import nn

from onetorch.sparse import Conv2d, conv, cpu, patterns

CASES = ((3, 256, 28, 8), (3, 128, 56, 4), (3, 512, 14, 8), (1, 512, 28, 8))  # kernel, channels, size of the images, images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparse_conv.json")
    arguments = parser.parse_args()
    if cpu.library() is None:
        sys.exit("no C++ compiler: this benchmark is of the compiled kernels")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    report = Report()
    for kernel, channels, size, images in CASES:
        dense = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        x = torch.randn(images, channels, size, size, requires_grad=True)
        grad = torch.randn(images, channels, size, size)
        for density in (1.0, 0.75, 0.5, 0.25, 0.1):
            layout = patterns.balanced_random((channels, channels), arguments.block, density, torch.Generator().manual_seed(0))
            sparse = Conv2d(channels, channels, kernel, layout, padding=kernel // 2)
            candidates = {
                name: lambda layer=layer, x=x, grad=grad: torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)
                for name, layer in (("dense", dense), ("sparse", sparse))
            }
            times = interleaved(candidates, arguments.seconds)
            chosen = "dense" if sparse._dense_is_faster(x, [size, size]) else "sparse"
            more = {"chosen": chosen, "dense_ms": round(statistics.median(times["dense"]) * 1e3, 1), "rounds": len(times["dense"])}
            what = f"{kernel} x {kernel}, {channels} channels, {images} of {size} x {size}, block {arguments.block}, density {layout.density:.3f}: time / dense"
            report.row(what, ratio(times, "sparse", "dense"), 1.02, **more)
    missed = sum(not row["met"] for row in report.rows)
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    costs = {key: value for key, value in conv.measured.items() if "threads 1" in key}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    result = {"machine": model, "threads": 1, **versions, "load": list(os.getloadavg()), "costs": costs, "missed": missed, "rows": report.rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
