"""Block-sparse kernels on the CPU, against dense and against PyTorch's BSR in the same run.

    python benchmarks/sparse_cpu.py                      # every row, about ten minutes
    python benchmarks/sparse_cpu.py --quick              # a few rows, one minute
    python benchmarks/sparse_cpu.py --threads 1 --only products

Overhead is time / (dense time x density): 1.00 means that the time falls exactly with the density. All candidates of a row are timed in turn, in
shuffled order, and the medians of the ratios are reported. Forward is a Linear layer without bias as users call it (packing and autograd included);
forward + backward adds both gradients.
`peak` is the best rate of the dense product seen in this run; a row shows the sparse rate (on kept elements) as a fraction of it.
Writes benchmarks/results/sparse_cpu_one_thread.json, or _all_cores or _both, with the machine's load; exits 1 where a row misses its target. Rows on all
cores mean something only where nothing else runs: a thread that loses its core makes the others wait at the end of each product.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.nn import functional

from onetorch.sparse import Layout, Linear, attention, cpu, patterns, to_bsr

warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
DENSITIES = (0.5, 0.25, 0.1, 0.05, 0.02)
# dtype, blocks, one thread or all, tokens, the most overhead at each density
PRODUCTS = (
    ("float32", (32, 64, 128), "one", 512, (1.00, 1.05, 1.15, 1.35, 2.0)),
    ("float32", (32, 64, 128), "all", 2048, (0.70, 0.75, 0.95, 1.20, 1.8)),
    ("float32", (16,), "one", 512, (1.15, 1.2, 1.4, 1.8, 3.0)),
    ("bfloat16", (64, 128), "one", 512, (1.05, 1.15, 1.3, 1.5, 2.5)),
    ("bfloat16", (64, 128), "all", 2048, (1.05, 1.15, 1.3, 1.5, 2.5)),
    ("bfloat16", (32,), "one", 512, (1.15, 1.2, 1.5, 1.8, 3.0)),
    ("bfloat16", (32,), "all", 2048, (1.15, 1.2, 1.5, 1.8, 3.0)),
)


def interleaved(candidates, seconds, rounds=None):
    """{name: function} -> {name: [seconds, ...]}, all timed in every round, in shuffled order."""
    order = list(candidates)
    for name in order:
        candidates[name]()
    times = {name: [] for name in order}
    end = time.perf_counter() + seconds
    while len(times[order[0]]) < (rounds or 5) or (rounds is None and time.perf_counter() < end):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() > end + 20:
            break
    return times


def ratio(times, name, to):
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


class Report:
    def __init__(self):
        self.rows = []

    def row(self, what, measured, target, **more):
        met = bool(measured <= target)
        self.rows.append({"what": what, "measured": round(measured, 3), "target": target, "met": met, **more})
        extra = "  ".join(f"{key} {value}" for key, value in more.items())
        sys.stdout.write(f"{'ok  ' if met else 'MISS'} {what:<64} {measured:6.3f}  (at most {target})  {extra}\n")
        sys.stdout.flush()


def balanced(size, block, density, seed):
    """`density` of the blocks, the same number in each row; where that is less than one block a row, random blocks."""
    make = patterns.balanced_random if round(density * size / block) >= 1 and density * size / block > 0.99 else patterns.random
    return make((size, size), block, density, torch.Generator().manual_seed(seed))


def products(report, arguments):
    peak = {}
    for name, blocks, which, tokens, targets in PRODUCTS:
        if arguments.threads not in (which, "both"):
            continue
        dtype = getattr(torch, name)
        torch.set_num_threads(1 if which == "one" else arguments.cores)
        size = 2048
        x = torch.randn(tokens, size).to(dtype).requires_grad_()
        dense = torch.nn.Linear(size, size, bias=False, dtype=dtype)
        grad = torch.randn(tokens, size).to(dtype)
        for block in blocks[:1] if arguments.quick else blocks:
            for density, target in zip(DENSITIES, targets, strict=True):
                if arguments.quick and density not in (0.5, 0.1):
                    continue
                layout = balanced(size, block, density, 0)
                sparse = Linear(size, size, layout, bias=False, dtype=dtype)

                def forward(layer, x=x):
                    with torch.no_grad():
                        layer(x)

                def both(layer, x=x, grad=grad):
                    torch.autograd.grad(layer(x), (x, layer.weight), grad)

                for label, run in (("forward", forward), ("forward + backward", both)):
                    candidates = {"dense": lambda run=run, dense=dense: run(dense), "sparse": lambda run=run, sparse=sparse: run(sparse)}
                    if dtype == torch.float32 and label == "forward":
                        bsr = to_bsr(sparse.weight.detach(), layout)
                        transposed = x.detach().T.contiguous()
                        candidates["torch BSR"] = lambda bsr=bsr, t=transposed: bsr @ t
                    times = interleaved(candidates, arguments.seconds)
                    flop = 2 * tokens * size * size * (3 if run is both else 1)
                    rate = flop / min(times["dense"]) / 1e9
                    peak[name, which] = max(peak.get((name, which), 0), rate)
                    kept = flop * layout.density / statistics.median(times["sparse"]) / 1e9
                    overhead = ratio(times, "sparse", "dense") / layout.density
                    more = {"dense": f"{rate:.0f} GFLOP/s", "sparse": f"{kept:.0f} GFLOP/s", "of_peak": round(kept / peak[name, which], 2)}
                    if "torch BSR" in times:
                        more["faster_than_bsr"] = round(ratio(times, "torch BSR", "sparse"), 1)
                    row = f"{name} block {block} density {layout.density:.3f} {which}"
                    report.row(f"{row} {label}: overhead", overhead, target, **more)
                    if "torch BSR" in times:
                        report.row(f"{row} forward: time / torch BSR's", ratio(times, "sparse", "torch BSR"), 0.333)


def never_slower(report, arguments):
    """Time over dense time, at densities where sparsity has least to give, and for few tokens."""
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        torch.set_num_threads(1)
        dense = torch.nn.Linear(2048, 2048, bias=False, dtype=dtype)
        for tokens in (512, 64, 8, 1):
            x = torch.randn(tokens, 2048).to(dtype)
            for block in (32,) if arguments.quick else (16, 32, 64, 128):
                for density in (1.0, 0.5) if arguments.quick else (1.0, 0.9, 0.75, 0.5, 0.1):
                    layout = balanced(2048, block, density, 0)
                    sparse = Linear(2048, 2048, layout, bias=False, dtype=dtype)
                    with torch.no_grad():
                        candidates = {"dense": lambda x=x, dense=dense: dense(x), "sparse": lambda x=x, sparse=sparse: sparse(x)}
                        times = interleaved(candidates, arguments.seconds / 2)
                    what = f"{name} block {block} density {layout.density:.3f} {tokens} tokens forward: time / dense time"
                    report.row(what, ratio(times, "sparse", "dense"), 1.02)


def few_tokens(report, arguments):
    """Time over the time to read the kept weights once (a sum over the same values)."""
    torch.set_num_threads(1)
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        for tokens in (1, 8, 64):
            for block in (32,) if arguments.quick else (32, 128):
                layout = balanced(4096, block, 0.25, 0)
                sparse = Linear(4096, 4096, layout, bias=False, dtype=dtype)
                x = torch.randn(tokens, 4096).to(dtype)
                flat = sparse.weight.detach().view(-1).view(torch.int32)
                with torch.no_grad():
                    times = interleaved({"read": lambda flat=flat: flat.max(), "sparse": lambda x=x, sparse=sparse: sparse(x)}, arguments.seconds)
                what = f"{name} block {block} density 0.25 {tokens} tokens forward: time / reading the weights"
                report.row(what, ratio(times, "sparse", "read"), 1.5)


def attentions(report, arguments):
    sdpa = functional.scaled_dot_product_attention
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        for which in ("one", "all"):
            if arguments.threads not in (which, "both"):
                continue
            torch.set_num_threads(1 if which == "one" else arguments.cores)
            for S, H in ((2048, 4), (4096, 4)):
                if arguments.quick and S > 2048:
                    continue
                q, k, v = (torch.randn(1, H, S, 64).to(dtype).requires_grad_() for _ in range(3))
                grad = torch.randn(1, H, S, 64).to(dtype)
                order, groups = patterns.strided_order(S, 64), patterns.strided_groups(S, 64)
                g = torch.Generator().manual_seed(0)
                half, tenth = (Layout.from_mask(torch.rand(S // 64, S // 64, generator=g) < d, 64) for d in (0.5, 0.1))
                cases = {
                    "density 0.5": (half, {}, "dense", half.density, (1.25, 1.35)),
                    "density 0.1": (tenth, {}, "dense", tenth.density, (1.25, 1.35)),
                    "causal": (patterns.causal(S, 64), {"causal": True}, "is_causal", 1.0, (1.05, 1.05)),
                    "local window 256": (patterns.local(S, 64, 256), {"causal": True}, "dense", 1.0, (0.10, 0.10)),
                    "strided 64": (patterns.strided(S, 64, 64), {"causal": True, "order": order, "groups": groups}, "dense", 1.0, (0.12, 0.12)),
                }
                for case, (layout, options, against, density, targets) in cases.items():
                    if S < 4096 and ("local" in case or "strided" in case):
                        continue
                    for label, target in zip(("forward", "forward + backward"), targets, strict=True):
                        def run(f, label=label, grad=grad, q=q, k=k, v=v):
                            if label == "forward":
                                with torch.no_grad():
                                    f()
                            else:
                                torch.autograd.grad(f(), (q, k, v), grad)

                        candidates = {
                            "sparse": lambda run=run, layout=layout, options=options, q=q, k=k, v=v: run(lambda: attention(q, k, v, layout, **options)),
                            against: lambda run=run, against=against, q=q, k=k, v=v: run(lambda: sdpa(q, k, v, is_causal=against == "is_causal")),
                        }
                        times = interleaved(candidates, arguments.seconds)
                        more = {"sparse_ms": round(statistics.median(times["sparse"]) * 1e3, 1), "sdpa_ms": round(statistics.median(times[against]) * 1e3, 1)}
                        unit = "overhead" if density < 1 else f"time / {against}"
                        report.row(f"attention {name} {which} S {S} {case} {label}: {unit}", ratio(times, "sparse", against) / density, target, **more)


def index(report, arguments):
    mask = torch.rand(128, 128) < 0.5
    torch.set_num_threads(1)
    times = interleaved({"index": lambda: Layout.from_mask(mask, 32)}, 1)
    report.row("index of 128 x 128 blocks, milliseconds", 1e3 * statistics.median(times["index"]), 1.0)


PARTS = {"index": index, "products": products, "never_slower": never_slower, "few_tokens": few_tokens, "attention": attentions}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rows")
    parser.add_argument("--threads", choices=("one", "all", "both"), default="both")
    parser.add_argument("--only", choices=tuple(PARTS), nargs="*", default=tuple(PARTS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--cores", type=int, default=torch.get_num_threads(), help="what `all` means")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    name = {"one": "one_thread", "all": "all_cores", "both": "both"}[arguments.threads]
    out = arguments.out or Path(__file__).parent / "results" / f"sparse_cpu_{name}.json"
    if cpu.library() is None:
        sys.exit("no C++ compiler: this benchmark is of the compiled kernels")
    random.seed(0)
    torch.manual_seed(0)
    report = Report()
    for part in arguments.only:
        PARTS[part](report, arguments)
    missed = [row for row in report.rows if not row["met"]]
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    result = {"machine": model, "cores": arguments.cores, **versions, "load": list(os.getloadavg()), "missed": len(missed), "rows": report.rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{len(report.rows) - len(missed)} of {len(report.rows)} rows met; {out}\n")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
