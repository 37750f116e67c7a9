"""Block-sparse kernels on a GPU, against dense, torch's BSR and FlexAttention, in the same run.

    python benchmarks/sparse_gpu.py [--only index products kernels attention] [--tokens 8192] [--size 4096] [--seconds 0.5]
    python benchmarks/sparse_gpu.py --dry        # without a GPU: each row once, small, on the processor's kernels; shows only that the benchmark itself runs

Share: the rate per kept block by the dense rate of the same machine, which is (dense time x density) / time. Of products against cuBLAS in bfloat16
at least 0.95, 0.80, 0.55, 0.30 is wanted at blocks of 128, 64, 32, 16, of attention against torch's dense FlashAttention 0.90 and 0.75 at blocks of
128 and 64; and never more time than a peer's. Each row's result is first compared with dense in float32. The candidates take turns in shuffled order, each
timed by events around as many calls as last some milliseconds, with the second-level cache overwritten before; medians of the ratios count. A layout's index
is made once under torch.cuda.set_sync_debug_mode("error"), so that a wait for the device ends the run, and is to take at most 50 microseconds.
On a GPU of compute capability 9.0 on, `kernels` times the two kernels of each product, through pointers and through TMA, beside each other; no target: the
package measures them too, and takes the faster. Writes benchmarks/results/sparse_gpu.json; exits with 1 where a row misses what is wanted.
"""

import argparse
import functools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onetorch.sparse import Layout, Linear, attention, patterns, to_bsr
from onetorch.sparse.convert import to_block_mask

PRODUCTS = {128: 0.95, 64: 0.80, 32: 0.55, 16: 0.30}  # block: the least share
ATTENTION = {128: 0.90, 64: 0.75}
INDEX = 50.0  # microseconds at most
CLOSE = 2e-2  # largest difference over largest value, bfloat16 against float32
Candidates = dict[str, Callable[[], Any]]


class Clock:
    """Seconds of calls on the GPU, in turn; in a dry run each is only called."""

    def __init__(self, seconds: float, dry: bool) -> None:
        self.seconds, self.dry = seconds, dry
        self.flush = None if dry else torch.empty(64 << 20, dtype=torch.int32, device="cuda")  # more than any second-level cache holds

    def once(self, call: Callable[[], Any], calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        assert self.flush is not None
        self.flush.zero_()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def __call__(self, candidates: Candidates) -> dict[str, list[float]]:
        for call in candidates.values():
            call()  # compiles, tunes
        if self.dry:
            return {name: [1.0] for name in candidates}
        calls = {name: max(1, round(5e-3 / self.once(call, 3))) for name, call in candidates.items()}
        times: dict[str, list[float]] = {name: [] for name in candidates}
        order, until = list(candidates), time.perf_counter() + self.seconds
        while len(times[order[0]]) < 5 or time.perf_counter() < until:
            random.shuffle(order)
            for name in order:
                times[name].append(self.once(candidates[name], calls[name]))
        return times


class Report:
    def __init__(self, dry: bool) -> None:
        self.dry, self.rows, self.kernels = dry, list[dict[str, Any]](), list[dict[str, Any]]()

    def row(self, what: str, measured: float, wanted: float, least: bool, **more: Any) -> None:
        met = measured >= wanted if least else measured <= wanted
        if not self.dry:
            self.rows.append({"what": what, "measured": round(measured, 3), "least" if least else "most": wanted, "met": met, **more})
        verdict = "dry " if self.dry else "ok  " if met else "MISS"
        figure = "" if self.dry else f"{measured:8.3f}  (at {'least' if least else 'most'} {wanted})  " + "  ".join(f"{k} {v}" for k, v in more.items())
        print(f"{verdict} {what:<72} {figure}", flush=True)

    def against(self, what: str, times: dict[str, list[float]], density: float, least: float, flop: float) -> None:
        """The row of the share, and one for each peer."""
        share = statistics.median(d * density / s for d, s in zip(times["dense"], times["sparse"], strict=True))
        tflops = {f"{name}_tflops": round(flop * (1 if name == "dense" else density) / statistics.median(t) / 1e12, 1) for name, t in times.items()}
        self.row(f"{what}: share of the dense rate per kept block", share, least, True, **tflops)
        for name in times.keys() - {"dense", "sparse"}:
            self.row(f"{what}: time / {name}'s", statistics.median(s / p for s, p in zip(times["sparse"], times[name], strict=True)), 1.0, False)

    def beside(self, what: str, times: dict[str, list[float]], flop: float) -> None:
        """Two kernels for the same product, without a target."""
        tflops = {f"{name}_tflops": round(flop / statistics.median(t) / 1e12, 1) for name, t in times.items()}
        ratio = statistics.median(p / t for p, t in zip(times["pointer"], times["tma"], strict=True))
        self.kernels.append({"what": what, "pointer_time_over_tma": round(ratio, 3), **tflops})
        print(f"     {what:<72} {ratio:8.3f}  (pointer's time / TMA's)  " + "  ".join(f"{k} {v}" for k, v in tflops.items()), flush=True)


def agree(what: str, ours: Tensor, truth: Tensor) -> None:
    error = (ours.float() - truth).abs().max() / truth.abs().max().clamp(min=1e-6)
    if not error <= CLOSE:
        sys.exit(f"{what}: wrong by {error:.3g} of the largest value, at most {CLOSE} is rounding")


def index(report: Report, clock: Clock, given: argparse.Namespace) -> None:
    """A layout of the same number of blocks made anew on the device, as pruning and growing do at every change."""
    n = 8 if given.dry else 128
    mask = torch.zeros(n * n, dtype=torch.bool, device=given.device)
    mask[torch.randperm(n * n, device=given.device)[: n * n // 2]] = True
    layout = Layout.from_mask(mask.view(n, n), 32)
    again = mask.view(n, n).flip(0).contiguous()
    if not given.dry:
        torch.cuda.set_sync_debug_mode("error")
        layout.with_mask(again, n * n // 2)
        torch.cuda.set_sync_debug_mode("default")
    times = clock({"index": lambda: layout.with_mask(again, n * n // 2)})
    report.row(f"index of {n} x {n} blocks, microseconds", 1e6 * statistics.median(times["index"]), INDEX, False)


def products(report: Report, clock: Clock, given: argparse.Namespace) -> None:
    size, tokens = given.size, given.tokens
    x = torch.randn(tokens, size, device=given.device).to(torch.bfloat16).requires_grad_()
    grad = torch.randn(tokens, size, device=given.device).to(torch.bfloat16)
    dense = torch.nn.Linear(size, size, bias=False, device=given.device, dtype=torch.bfloat16)

    def both(layer: torch.nn.Linear | Linear) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), (x, layer.weight), grad)

    for block, least in PRODUCTS.items():
        for density in (0.5,) if given.dry else (0.5, 0.25, 0.1):
            layout = patterns.balanced_random((size, size), block, density, torch.Generator().manual_seed(0)).to(given.device)
            sparse = Linear(size, size, layout, bias=False, device=given.device, dtype=torch.bfloat16)
            whole = layout.to_dense(sparse.weight.detach())
            what = f"bfloat16 block {block} density {layout.density:.3f}, {tokens} tokens"

            agree(f"{what} forward", sparse(x).detach(), x.detach().float() @ whole.float().T)
            dx, dw = both(sparse)
            agree(f"{what} dx", dx, grad.float() @ whole.float())
            agree(f"{what} dw", dw, layout.from_dense(grad.float().T @ x.detach().float()))
            candidates: Candidates = {"dense": functools.partial(dense, x), "sparse": functools.partial(sparse, x)}
            if not given.dry:
                bsr = to_bsr(sparse.weight.detach(), layout)
                candidates["torch BSR"] = functools.partial(torch.matmul, bsr, x.mT)
            flop = 2.0 * tokens * size * size
            with torch.no_grad():
                times = clock(candidates)
            report.against(f"{what} forward", times, layout.density, least, flop)
            times = clock({"dense": functools.partial(both, dense), "sparse": functools.partial(both, sparse)})
            report.against(f"{what} forward + backward", times, layout.density, least, 3 * flop)


def kernels(report: Report, clock: Clock, given: argparse.Namespace) -> None:
    """The three products of a linear layer, x (1, 1, tokens, size)."""
    if given.dry or torch.cuda.get_device_capability() < (9, 0):
        return
    from onetorch.sparse import gpu  # needs Triton

    size, tokens = given.size, given.tokens
    x, grad = (torch.randn(1, 1, tokens, size, device=given.device).to(torch.bfloat16) for _ in range(2))
    for block in (128, 64, 32):
        for density in (0.5, 0.25, 0.1):
            layout = patterns.balanced_random((size, size), block, density, torch.Generator().manual_seed(0)).to(given.device)
            values = torch.randn(1, *layout.values_shape, device=given.device).to(torch.bfloat16)
            whole = layout.to_dense(values[0]).float()
            of_index = layout.index, None, layout.grid, size
            for name, truth, arguments, pointer, tma in (
                ("forward", x.float() @ whole.T, (x, values, *of_index, True), gpu.dds_pointer, gpu.dds_tma),
                ("dx", grad.float() @ whole, (grad, values, *of_index, False), gpu.dds_pointer, gpu.dds_tma),
                (
                    "dw",
                    layout.from_dense(grad[0, 0].float().T @ x[0, 0].float())[None],
                    (grad.mT, x, layout.index, layout.grid, layout.block, True),
                    gpu.sdd_pointer,
                    gpu.sdd_tma,
                ),
            ):
                what = f"bfloat16 block {block} density {layout.density:.3f}, {tokens} tokens {name}"
                agree(f"{what} pointer", pointer(*arguments), truth)
                agree(f"{what} TMA", tma(*arguments), truth)
                times = clock({"pointer": functools.partial(pointer, *arguments), "tma": functools.partial(tma, *arguments)})
                report.beside(what, times, 2.0 * tokens * size * size * layout.density)


def attentions(report: Report, clock: Clock, given: argparse.Namespace) -> None:
    B, H, S, D = (1, 2, 256, 16) if given.dry else (4, 16, 4096, 64)
    q, k, v = (torch.randn(B, H, S, D, device=given.device).to(torch.bfloat16).requires_grad_() for _ in range(3))
    grad = torch.randn(B, H, S, D, device=given.device).to(torch.bfloat16)
    sdpa = functional.scaled_dot_product_attention
    flex = None
    if not given.dry:
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention)
    for block, least in ATTENTION.items():
        n, generator = S // block, torch.Generator().manual_seed(0)
        random_mask = torch.rand(n, n, generator=generator) < 0.25
        random_mask.fill_diagonal_(True)
        for name, layout, causal in (
            ("random", Layout.from_mask(random_mask, block), False),
            ("causal", patterns.causal(S, block), True),
            ("local window", patterns.local(S, block, S // 8), True),
        ):
            layout = layout.to(given.device)
            blocks = to_block_mask(layout, causal=causal) if flex else None
            what = f"attention bfloat16 block {block} S {S} {name}"
            allowed = layout.element_mask()
            allowed = allowed.tril() if causal else allowed
            y = attention(q, k, v, layout, causal=causal)
            assert isinstance(y, Tensor)
            agree(what, y.detach(), sdpa(q.float(), k.float(), v.float(), attn_mask=allowed).detach())
            forwards: Candidates = {"dense": functools.partial(sdpa, q, k, v), "sparse": functools.partial(attention, q, k, v, layout, causal=causal)}
            if flex:
                forwards["FlexAttention"] = functools.partial(flex, q, k, v, block_mask=blocks)
            flop = 4.0 * B * H * S * S * D
            with torch.no_grad():
                report.against(f"{what} forward", clock(forwards), layout.density, least, flop)
            trained: Candidates = {name: functools.partial(lambda f: torch.autograd.grad(f(), (q, k, v), grad), f) for name, f in forwards.items()}
            report.against(f"{what} forward + backward", clock(trained), layout.density, least, 3.5 * flop)


PARTS = {"index": index, "products": products, "kernels": kernels, "attention": attentions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--size", type=int, default=4096, help="of the square weights")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row")
    parser.add_argument("--dry", action="store_true", help="small, on the processor, no timing")
    given = parser.parse_args()
    given.device = "cpu" if given.dry else "cuda"
    if given.dry:
        given.size, given.tokens = 256, 48
    elif not torch.cuda.is_available():
        sys.exit("there is no GPU here; --dry runs each row once on the processor")
    random.seed(0)
    torch.manual_seed(0)
    report, clock = Report(given.dry), Clock(given.seconds, given.dry)
    for part in given.only:
        PARTS[part](report, clock, given)
    if given.dry:
        return 0
    missed = sum(not row["met"] for row in report.rows)
    result = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(), "missed": missed, "rows": report.rows}
    result |= {"kernels": report.kernels} if report.kernels else {}
    (Path(__file__).resolve().parent / "results" / "sparse_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(report.rows) - missed} of {len(report.rows)} rows met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
