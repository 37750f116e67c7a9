"""The most floating point operations a second that a matrix product reaches on this machine: what a run's model-FLOPs utilisation is a fraction of.

Measured, not taken from a data sheet: no sheet knows how many cores a process was given or whether its processor multiplies bfloat16 in hardware.
"""

import time

import torch

from onetorch.runs import cache, provenance

CACHE = "peaks"  # where peaks are kept between runs
SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
SECONDS = 0.15  # of measuring, all sizes together; a size that would take longer is left out


def peak(dtype: str = "float32", threads: int = 1, device: str = "cpu") -> float:
    """FLOP/s of the fastest product of two square matrices of `dtype` with so many threads; the same on a GPU, where threads do not matter.

    A product of n x n matrices counts 2 n^3. Measured once for a machine and kept in the user's cache folder. ValueError for a dtype that is none of torch's.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype: expected the name of a torch dtype such as float32 or bfloat16, got {dtype!r}")
    if device not in SIZES:
        raise ValueError(f"device: expected one of {', '.join(SIZES)}, got {device!r}")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{provenance.processor()}, {provenance.cores()} cores, {threads} threads"
    key = f"{where}, {dtype}, torch {torch.__version__}"
    known = cache.get(CACHE, key)
    if not (isinstance(known, float) and known > 0):
        known = _measure(kind, threads, device)
        cache.put(CACHE, key, known)  # where it cannot be kept, it is measured again next time
    return known


def _measure(dtype: torch.dtype, threads: int, device: str) -> float:
    before, best = torch.get_num_threads(), 0.0
    generator = torch.Generator().manual_seed(0)  # numbers of all sizes: a GPU that multiplies zeros draws less power and runs faster
    torch.set_num_threads(threads)
    try:
        start, last = time.perf_counter(), 0.0
        for size in SIZES[device]:
            if time.perf_counter() - start + 8 * last > SECONDS and last:  # twice the size takes eight times as long
                break
            a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
            torch.mm(a, b)
            end = time.perf_counter() + SECONDS / len(SIZES[device])
            while time.perf_counter() < end or not last:
                last = _seconds(a, b)
                best = max(best, 2 * size**3 / last)
    finally:
        torch.set_num_threads(before)
    return best


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.is_cuda:
        # CPU time, all threads being busy: on a crowded machine the clock would tell how crowded it is.
        begin = time.process_time()
        torch.mm(a, b)
        return (time.process_time() - begin) / torch.get_num_threads()
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    torch.mm(a, b)
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event) / 1000
