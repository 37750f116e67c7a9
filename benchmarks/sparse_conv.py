"""Block-sparse convolutions beside torch's dense one, forward and forward + backward on one thread; no row may take more than 1.02 of dense.

    python benchmarks/sparse_conv.py            # four minutes

Both are timed in turn, in shuffled order, and the medians of the ratios are reported, beside that of dense to itself, which is the noise.
`costs` are what the layer chose by (see `conv.costs_of`). Writes benchmarks/results/sparse_conv.json and exits 1 where a row misses the target.
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

CASES = ((3, 256, 28, 2), (3, 128, 56, 1), (3, 512, 14, 2), (1, 512, 28, 2))  # kernel, channels, size of the images, images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
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
        for density in (1.0, 0.75, 0.5, 0.25, 0.125):
            if density * channels < arguments.block:
                continue
            layout = patterns.balanced_random((channels, channels), arguments.block, density, torch.Generator().manual_seed(0))
            sparse = Conv2d(channels, channels, kernel, layout, padding=kernel // 2)
            layers = (("dense", dense), ("sparse", sparse), ("dense again", dense))
            for label in ("forward", "forward + backward"):
                backward = "backward" in label

                def run(layer, backward=backward, x=x, grad=grad):
                    with torch.set_grad_enabled(backward):
                        y = layer(x)
                        if backward:
                            torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)

                times = interleaved({name: lambda layer=layer, run=run: run(layer) for name, layer in layers}, arguments.seconds)
                again = round(ratio(times, "dense again", "dense"), 3)
                more = {"choice": sparse.choice(size, backward=backward), "dense_again": again, "dense_ms": round(statistics.median(times["dense"]) * 1e3, 1)}
                what = f"{kernel} x {kernel}, {channels} channels, {images} of {size} x {size}, block {arguments.block}, density {layout.density:.3f} {label}"
                report.row(f"{what}: time / dense", ratio(times, "sparse", "dense"), 1.02, **more, rounds=len(times["dense"]))
    missed = sum(not row["met"] for row in report.rows)
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    costs = {key: value for key, value in conv.measured.items() if "threads 1" in key}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    result = {"machine": model, "threads": 1, **versions, "load": list(os.getloadavg()), "costs": costs, "missed": missed, "rows": report.rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
