"""Least squares by momentum: the smallest algorithm that has everything a run must keep."""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from onetorch.runs.run import Run


@dataclass(frozen=True)
class Config:
    seed: int = 0  # of weights and data
    steps: int = 40  # optimizer steps
    lr: float = 0.05  # step size of SGD
    hidden: tuple[int, ...] = (8,)  # widths
    pause: float = 0.0  # seconds slept in a step
    break_at: int = 0  # iteration whose loss becomes NaN; 0 for none

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass
class State:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    mean: Tensor
    iteration: int = 0


def build(config: Config) -> nn.Module:
    widths = (4, *config.hidden, 1)
    return nn.Sequential(*(layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())))


def train(config: Config, run: Run) -> nn.Module:
    torch.manual_seed(config.seed)
    model = build(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)
    state = run.restore(State(model, optimizer, torch.Generator().manual_seed(config.seed), torch.zeros(())))
    for state.iteration in run.steps(state.iteration, config.steps):
        x = torch.randn(16, 4, generator=state.generator)
        noise = torch.randn(16, 1)  # from the global generator, which a run keeps too
        loss = (model(x) - x.sum(1, keepdim=True) - 0.01 * noise).square().mean()
        if state.iteration == config.break_at:
            loss = loss * float("nan")
        optimizer.zero_grad()
        loss.backward()
        run.finite(loss=loss)
        optimizer.step()
        state.mean.mul_(0.9).add_(0.1 * loss.detach())
        time.sleep(config.pause)
        run.log(state.iteration, loss=loss.item(), mean=state.mean)
        run.checkpoint(state)
    return model


def evaluate(model: nn.Module, config: Config, *, media: Path | None = None, batches: int = 4) -> dict[str, float | int]:
    generator = torch.Generator().manual_seed(config.seed + 1)
    x = torch.randn(16 * batches, 4, generator=generator)
    with torch.no_grad():
        error = (model(x) - x.sum(1, keepdim=True)).square().mean().item()
    if media is not None:
        (media / "samples.txt").write_text(f"{error}\n", encoding="utf-8")
    return {"error": error, "batches": batches}
