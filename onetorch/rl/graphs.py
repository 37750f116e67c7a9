"""Gradient steps that a GPU is told once: recorded as a CUDA graph, and launched as one from then on.

A gradient step of SAC launches some 160 operations of a few microseconds each: a GPU ends them sooner than the host can name them. A graph repeats the very
launches that were recorded: the same kernels on the same addresses, with the same numbers where the host gave any. Therefore whatever changes has to stand in
tensors that stay: the batch is copied into some, `nets.Adam` counts its steps on the device, and the generator is registered, so that the graph draws on where
it stands. And nothing may wait for the device meanwhile, so losses are looked at afterwards. On a processor the step is called as it is.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onetorch.rl.buffer import Batch
from onetorch.runs.run import Run

Seen = dict[str, Tensor]

WARM = 3  # steps before one is recorded, in which libraries set up what a recording may not
LOOK = 100  # steps between two looks at the losses: to look is to wait


class Step:
    """`update(batch, run, *which)`, which returns numbers () on the device by name; `which` are constants, for each of which there is a recording.

    What update returned is good until the next call. Where `run` is given it raises NonFinite for a number that is not finite: on a processor before the
    weights are changed by it, as update itself has it, on a GPU up to LOOK steps later.
    """

    def __init__(self, update: Callable[..., Seen], generator: torch.Generator, run: Run | None = None) -> None:
        self.update, self.generator, self.run = update, generator, run
        self.calls: dict[tuple[Any, ...], int] = {}
        self.recorded: dict[tuple[Any, ...], Callable[[], Seen] | None] = {}
        self.batch: Batch | None = None  # what recordings read
        self.sum: Tensor | None = None  # float64 () of all that recordings returned: it stays NaN or infinite once anything was
        self.replayed = 0

    def __call__(self, batch: Batch, *which: Any) -> Seen:
        if not on_gpu(self.generator):
            return self.update(batch, self.run, *which)
        self.calls[which] = self.calls.get(which, 0) + 1
        if self.calls[which] <= WARM:
            return aside(partial(self.update, batch, self.run, *which))
        if self.batch is None:
            self.batch = Batch(*(x.clone() for x in batch))
            self.sum = torch.zeros((), dtype=torch.float64, device=batch.reward.device)
        for mine, given in zip(self.batch, batch, strict=True):
            mine.copy_(given)
        if which not in self.recorded:
            self.recorded[which] = self._record(which)
        replay = self.recorded[which]
        if replay is None:
            return self.update(batch, self.run, *which)
        seen = replay()
        self.replayed += 1
        if self.run and self.replayed % LOOK == 0:
            self.run.finite(late=True, **seen)
            self.run.finite(late=True, losses=self.sum)
        return seen

    def _record(self, which: tuple[Any, ...]) -> Callable[[], Seen] | None:
        def work() -> Seen:
            seen = self.update(self.batch, None, *which)
            assert self.sum is not None
            for value in seen.values():
                self.sum.add_(value)
            return seen

        try:
            return record(work, self.generator)
        except RuntimeError as error:
            sys.stderr.write(f"the gradient step could not be recorded as a CUDA graph, and is launched kernel by kernel: {error}\n")
            return None


def on_gpu(generator: torch.Generator) -> bool:
    return generator.device.type == "cuda"


def aside(work: Callable[[], Seen]) -> Seen:
    """`work()` on a stream of its own, as torch wants it before a recording."""
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        seen = work()
    here.wait_stream(side)
    return seen


def record(work: Callable[[], Seen], generator: torch.Generator) -> Callable[[], Seen]:
    """What launches all at once what `work()` would launch, and returns the tensors that hold what it returns. Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.stream(torch.cuda.Stream()) as _, torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        seen = work()

    def replay() -> Seen:
        graph.replay()
        return seen

    return replay
