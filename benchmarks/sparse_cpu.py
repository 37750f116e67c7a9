"""Block-sparse kernels on the CPU, against dense and against what else can train block-sparse on a CPU, in the same run.

    python benchmarks/sparse_cpu.py                      # every row, about half an hour
    python benchmarks/sparse_cpu.py --quick              # a few rows, two minutes
    python benchmarks/sparse_cpu.py --threads one --only products
    python benchmarks/sparse_cpu.py --threads one --only products never_slower --dtypes bfloat16

Overhead is time / (dense time x density): 1.00 means that the time falls exactly with the density. All candidates of a row are timed in turn, in
shuffled order, each after one call that is not timed, and the medians of the ratios are reported. Forward is a Linear layer without bias as users call
it (packing and autograd included); forward + backward adds both gradients. Peers of forward + backward: the dense layer; the dense layer with its weight
multiplied by the mask; and torch's BSR by hand, which is all it allows (its autograd has no gradient to the input): two BSR products and a dense
gradient of the weight. The rate of a row, counted on kept elements, stands beside its share of the machine's measured peak: the best that torch's dense
product or a full layout of ours reached in cache. `reading` is the bandwidth of one pass over the kept weights.
Writes benchmarks/results/sparse_cpu_one_thread.json, or _all_cores or _both, or the file that --out names (what is kept there is split by table), with the
machine's load; exits 1 where a row misses its target. Rows on all
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

from onetorch.sparse import Layout, Linear, attention, choice, cpu, dds, patterns, to_bsr

warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
ROUNDS = 5  # at least
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
    """{name: function} -> {name: [seconds, ...]}, all timed in every round, in shuffled order, each after a call that brings its code and data in. On one
    thread the seconds are that thread's own, which do not count what others do on its core.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    order = list(candidates)
    times = {name: [] for name in order}
    end = time.perf_counter() + seconds
    while len(times[order[0]]) < (rounds or ROUNDS) or (rounds is None and time.perf_counter() < end):
        random.shuffle(order)
        for name in order:
            candidates[name]()
            start = clock()
            candidates[name]()
            times[name].append(clock() - start)
        if time.perf_counter() > end + 20:
            break
    return times


def machine_peak(dtype):
    """FLOP/s of the best product of 512 x 1024 x 1024 seen in half a second, torch's or ours."""
    layout = Layout.from_mask(torch.ones(8, 8, dtype=torch.bool), 128)
    x, weight = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    blocks = layout.from_dense(weight)
    with torch.no_grad():
        times = interleaved({"dense": lambda: functional.linear(x, weight), "ours": lambda: dds(x, blocks, layout, transpose_sparse=True)}, 0.5)
    return 2 * 512 * 1024 * 1024 / min(min(t) for t in times.values())


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


def train_by_hand(bsr, transposed, x, grad):
    """Forward, gradient of the input and gradient of the weight with torch's BSR."""
    return (bsr @ x.T).T, (transposed @ grad.T).T, grad.T @ x


def products(report, arguments):
    peak = {}
    for name, blocks, which, tokens, targets in PRODUCTS:
        if arguments.threads not in (which, "both") or name not in arguments.dtypes:
            continue
        dtype = getattr(torch, name)
        torch.set_num_threads(1 if which == "one" else arguments.cores)
        if (name, which) not in peak:
            peak[name, which] = machine_peak(dtype)
        size = arguments.size
        x = torch.randn(tokens, size).to(dtype).requires_grad_()
        dense = torch.nn.Linear(size, size, bias=False, dtype=dtype)
        grad = torch.randn(tokens, size).to(dtype)
        for block in blocks[:1] if arguments.quick else blocks:
            for density, target in zip(DENSITIES, targets, strict=True):
                if arguments.quick and density not in (0.5, 0.1):
                    continue
                layout = balanced(size, block, density, 0)
                sparse = Linear(size, size, layout, bias=False, dtype=dtype)
                mask = layout.element_mask().to(dtype)
                masked = lambda x, mask=mask, dense=dense: functional.linear(x, dense.weight * mask)  # noqa: E731
                bsr = to_bsr(sparse.weight.detach(), layout) if dtype == torch.float32 else None  # it has no bfloat16 on the CPU
                transposed = None if bsr is None else bsr.to_dense().T.contiguous().to_sparse_bsr((block, block))

                def forward(layer, x=x):
                    with torch.no_grad():
                        layer(x)

                def both(layer, weight, x=x, grad=grad):
                    torch.autograd.grad(layer(x), (x, weight), grad)

                plain = x.detach()
                for label in ("forward", "forward + backward"):
                    if label == "forward":
                        candidates = {"dense": lambda dense=dense: forward(dense), "sparse": lambda sparse=sparse: forward(sparse)}
                        if bsr is not None:
                            candidates["torch BSR"] = lambda bsr=bsr, x=plain: bsr @ x.T
                    else:
                        candidates = {
                            "dense": lambda dense=dense: both(dense, dense.weight),
                            "sparse": lambda sparse=sparse: both(sparse, sparse.weight),
                            "dense with mask": lambda masked=masked, dense=dense: both(masked, dense.weight),
                        }
                        if bsr is not None:
                            candidates["torch BSR by hand"] = lambda b=bsr, t=transposed, x=plain, grad=grad: train_by_hand(b, t, x, grad)
                    times = interleaved(candidates, arguments.seconds)
                    flop = 2 * tokens * size * size * (3 if "backward" in label else 1)
                    rates = {"dense": flop / statistics.median(times["dense"]), "sparse": flop * layout.density / statistics.median(times["sparse"])}
                    more = {key: f"{rate / 1e9:.0f} GFLOP/s" for key, rate in rates.items()}
                    more["of_peak"] = round(rates["sparse"] / peak[name, which], 2)
                    more["peak"] = f"{peak[name, which] / 1e9:.0f} GFLOP/s"
                    row = f"{name} block {block} density {layout.density:.3f} {which} {label}"
                    report.row(f"{row}: overhead", ratio(times, "sparse", "dense") / layout.density, target, **more)
                    if "torch BSR" in times:
                        report.row(f"{row}: time / torch BSR's", ratio(times, "sparse", "torch BSR"), 0.333)
                    if "backward" in label and density >= 0.05:
                        peers = [peer for peer in times if peer != "sparse"]
                        fastest = min(peers, key=lambda peer: statistics.median(times[peer]))
                        least = {16: 2.0, 32: 2.0, 64: 1.6, 128: 1.25}[block]
                        report.row(f"{row}: time / fastest peer's", ratio(times, "sparse", fastest), round(1 / least, 3), peer=fastest)


def never_slower(report, arguments):
    """Time over dense time, at densities where sparsity has least to give, and for few tokens."""
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        torch.set_num_threads(1 if arguments.threads == "one" else arguments.cores)
        dense = torch.nn.Linear(2048, 2048, bias=False, dtype=dtype)
        for tokens in (512, 64, 8, 1):
            x = torch.randn(tokens, 2048).to(dtype).requires_grad_()
            grad = torch.randn(tokens, 2048).to(dtype)
            for block in (32,) if arguments.quick else (16, 32, 64, 128):
                for density in (1.0, 0.5) if arguments.quick else (1.0, 0.9, 0.75, 0.5, 0.1):
                    layout = balanced(2048, block, density, 0)
                    sparse = Linear(2048, 2048, layout, bias=False, dtype=dtype)
                    row = f"{name} block {block} density {layout.density:.3f} {tokens} tokens"
                    chosen = choice(layout, tokens, dtype)
                    with torch.no_grad():
                        candidates = {"dense": lambda x=x, dense=dense: dense(x), "sparse": lambda x=x, sparse=sparse: sparse(x)}
                        times = interleaved(candidates, arguments.seconds / 4)
                    report.row(f"{row} forward: time / dense time", ratio(times, "sparse", "dense"), 1.02, choice=chosen)
                    if tokens == 512:
                        candidates = {
                            key: lambda x=x, layer=layer, grad=grad: torch.autograd.grad(layer(x), (x, layer.weight), grad)
                            for key, layer in (("dense", dense), ("sparse", sparse))
                        }
                        times = interleaved(candidates, arguments.seconds / 2)
                        report.row(f"{row} forward + backward: time / dense time", ratio(times, "sparse", "dense"), 1.02, choice=chosen)


def few_tokens(report, arguments):
    """Time over the time to read the kept weights once: their sum as integers, the fastest of torch's reductions. One layer's weights lie in the cache when it
    is called again; those of twelve layers, called in turn as in a model that generates, come from memory. `arithmetic` is the same ratio for the
    multiplications alone, at the machine's peak: below it no kernel can come.
    """
    torch.set_num_threads(1 if arguments.threads == "one" else arguments.cores)
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        peak = machine_peak(dtype)
        for block in (32,) if arguments.quick else (32, 128):
            layers = [Linear(4096, 4096, balanced(4096, block, 0.25, seed), bias=False, dtype=dtype) for seed in range(12)]
            bits = [layer.weight.detach().view(-1).view(torch.int32) for layer in layers]
            for count, where in ((1, "the cache"), (12, "memory")):
                for tokens in (1, 4, 8, 16, 64):
                    x = torch.randn(tokens, 4096).to(dtype)

                    def read(count=count, bits=bits):
                        return [x.sum(dtype=torch.int32) for x in bits[:count]]

                    def multiply(count=count, layers=layers, x=x):
                        return [layer(x) for layer in layers[:count]]

                    with torch.no_grad():
                        times = interleaved({"read": read, "sparse": multiply}, arguments.seconds)
                    reading = statistics.median(times["read"]) / count
                    numel, nbytes = layers[0].weight.numel(), layers[0].weight.nbytes
                    what = f"{name} block {block} density 0.25 {tokens} tokens forward: time / reading the weights from {where}"
                    more = {"arithmetic": round(2 * tokens * numel / peak / reading, 2), "reading": f"{nbytes / reading / 1e9:.0f} GB/s"}
                    report.row(what, ratio(times, "sparse", "read"), 1.5, **more)


def attentions(report, arguments):
    sdpa = functional.scaled_dot_product_attention
    for name in arguments.dtypes:
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
    parser.add_argument("--dtypes", choices=("float32", "bfloat16"), nargs="*", default=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--size", type=int, default=2048, help="of the square weights of `products`")
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
