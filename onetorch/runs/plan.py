"""The speed plan: which of several equal ways to do the work is fastest on this machine, found by measuring for at most two seconds.

Importing this file imports no torch, so that `--plan` can be read before there is work to do.
"""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from onetorch.runs import cache, provenance
from onetorch.runs.config import nearest
from onetorch.runs.errors import UsageError

BUDGET = 2.0  # seconds for all measurements of a plan
MARGIN = 0.95  # a choice must take at most this fraction of the incumbent's time: noise shall not move a plan
CACHE = "plans"  # where plans are kept between runs
CLEAR = 1.5  # two choices this far apart after three rounds need no more of them

Choice = dict[str, Any]
Measure = Callable[[Choice], Callable[[], Any]]


def parse(text: str) -> dict[str, str]:
    """The choices fixed by `--plan`, still as text.

    >>> parse("threads=1,dtype=bfloat16")
    {'threads': '1', 'dtype': 'bfloat16'}
    """
    fixed = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"--plan: expected name=value,name=value, got {part!r}")
        fixed[name.strip()] = value.strip()
    return fixed


def show(choice: Choice) -> str:
    """The plan as `--plan` takes it."""
    return ",".join(f"{k}={v}" for k, v in choice.items())


def fix(dimensions: dict[str, tuple[Any, ...]], fixed: dict[str, str], asked: dict[str, tuple[Any, ...]] | None = None) -> dict[str, tuple[Any, ...]]:
    """`dimensions` with the fixed ones narrowed to one candidate, which may be one of `asked` too; UsageError for a name or value that is not there."""
    narrowed = dict(dimensions)
    for name, text in fixed.items():
        if name not in dimensions:
            raise UsageError(f"--plan: there is no choice {name!r}{nearest(name, dimensions)}; this one has {', '.join(dimensions)}")
        candidates = (*dimensions[name], *(v for v in (asked or {}).get(name, ()) if v not in dimensions[name]))
        options = [v for v in candidates if str(v) == text]
        if not options and all(type(v) is int for v in dimensions[name]) and text.isdigit() and int(text) > 0:
            options = [int(text)]  # any number of threads or environments may be asked for, measured or not
        if not options:
            known = [str(v) for v in candidates]
            raise UsageError(f"--plan: {name} is one of {', '.join(known)}, got {text!r}{nearest(text, known)}")
        narrowed[name] = (options[0],)
    return narrowed


def choose(measure: Measure | None, dimensions: dict[str, tuple[Any, ...]], budget: float = BUDGET) -> tuple[Choice, float]:
    """The fastest choice and the seconds it took to find it.

    One dimension is varied at a time, the others held at the best so far; the first candidate of each is the default and stays unless another is clearly
    faster. Candidate and incumbent run in turn and their fastest times are compared, so that a machine that slows down slows both. Once the budget is spent
    no further work begins; what has begun (one preparation, or one unit of work of each of the two) ends.
    """
    start = time.perf_counter()
    best: Choice = {name: candidates[0] for name, candidates in dimensions.items()}
    if measure is None or all(len(c) == 1 for c in dimensions.values()):
        return best, 0.0
    slices = sum(len(c) - 1 for c in dimensions.values())
    incumbent = _timed(measure, best)
    for name, candidates in dimensions.items():
        for value in candidates:
            if value == best[name]:
                continue
            left = budget - (time.perf_counter() - start)
            if left <= 0:
                return best, time.perf_counter() - start
            trial = {**best, name: value}
            challenger = _timed(measure, trial)
            if _faster(challenger, incumbent, left / max(slices, 1), left):
                best, incumbent = trial, challenger
            slices -= 1
    return best, time.perf_counter() - start


def _timed(measure: Measure, choice: Choice) -> Callable[[], float]:
    import torch

    # On a machine that has other things to do, threads wait for each other longer than there is anything to prepare.
    set_threads({name: 1 for name in choice if name == "threads"})
    work = measure(choice)

    def run() -> float:
        set_threads(choice)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return run


def _faster(challenger: Callable[[], float], incumbent: Callable[[], float], seconds: float, left: float) -> bool:
    """`seconds` are this challenger's share of the `left` ones."""
    start = time.perf_counter()
    warm, theirs = challenger(), incumbent()
    if warm > 20 * theirs and warm > seconds:
        return False  # hopeless, and another trial would cost what is left for the others
    mine, lasted = warm, time.perf_counter() - start
    for done in range(1, 51):
        if (begin := time.perf_counter()) + lasted > start + left:
            break  # another round would not fit
        if done % 2:  # each is first in turn: what interrupts the process in a rhythm shall not always hit the same one
            mine, theirs = min(mine, challenger()), min(theirs, incumbent())
        else:
            theirs, mine = min(theirs, incumbent()), min(mine, challenger())
        lasted = time.perf_counter() - begin
        if time.perf_counter() - start > seconds or (done >= 3 and not theirs / CLEAR < mine < theirs * CLEAR):
            break
    return mine < MARGIN * theirs


def thread_counts() -> tuple[int, ...]:
    """1, 2 and 4, as far as this process has cores: the candidates for "threads"."""
    return tuple(n for n in (1, 2, 4) if n <= provenance.cores())


def devices() -> tuple[str, ...]:
    """What there is to compute on, the processor first: the candidates for "device" of an algorithm whose nets may be too small for a GPU."""
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def set_threads(choice: Choice) -> None:
    """Give torch the plan's number of threads, if it has one."""
    import torch

    if "threads" in choice and torch.get_num_threads() != choice["threads"]:
        torch.set_num_threads(choice["threads"])


def cache_key(key: str, dimensions: dict[str, tuple[Any, ...]]) -> str:
    """What a plan depends on: processor, cores, GPU, versions, the algorithm's own key and the candidates."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    parts = [provenance.processor(), provenance.cores(), gpu, torch.__version__, key, {k: [str(v) for v in c] for k, c in dimensions.items()}]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cached(key: str, dimensions: dict[str, tuple[Any, ...]]) -> Choice | None:
    """The plan kept under `key`, if every choice is still a candidate."""
    saved = cache.get(CACHE, key)
    if not isinstance(saved, dict):
        return None
    options = {name: [v for v in candidates if str(v) == saved.get(name)] for name, candidates in dimensions.items()}
    return {name: found[0] for name, found in options.items()} if all(options.values()) else None


def keep(key: str, choice: Choice) -> str | None:
    """Keep a plan for the next run; returns why not where the cache folder cannot be written."""
    return cache.put(CACHE, key, {k: str(v) for k, v in choice.items()})
