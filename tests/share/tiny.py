"""A small classifier with every kind of config field, tied weights and an evaluation with an interval."""

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from onetorch.runs.run import Run


class Rate(enum.Enum):
    SLOW = 0.01
    FAST = 0.1


@dataclass(frozen=True)
class Optim:
    rate: Rate = Rate.FAST  # of SGD
    betas: tuple[float, float] = (0.9, 0.999)  # unused, but a pair


@dataclass(frozen=True)
class Config:
    seed: int = 0  # of weights and data
    steps: int = 6  # optimizer steps
    width: int = 8  # of the hidden layer
    sizes: tuple[int, ...] = (3, 5)  # unused, but a list
    kind: Literal["relu", "tanh"] = "tanh"  # between the layers
    limit: float | None = None  # unused, but optional
    high: float = float("inf")  # unused, but infinite
    data: Path = Path("data/none")  # unused, but a path
    optim: Optim = field(default_factory=Optim)  # nested


@dataclass
class State:
    model: nn.Module
    target: nn.Module
    iteration: int = 0


class Net(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encode = nn.Linear(config.width, config.width, bias=False)
        self.decode = nn.Linear(config.width, config.width)
        self.decode.weight = self.encode.weight
        self.act = {"relu": nn.ReLU, "tanh": nn.Tanh}[config.kind]()
        self.register_buffer("scale", torch.arange(config.width).float(), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.decode(self.act(self.encode(x * self.scale)))
        return {"logits": logits, "choice": logits.argmax(-1)}


def build(config: Config) -> nn.Module:
    return Net(config)


def train(config: Config, run: Run) -> nn.Module:
    torch.manual_seed(config.seed)
    model = build(config)
    run.initialize(model)
    target = build(config)
    target.load_state_dict(model.state_dict())
    state = run.restore(State(model, target))
    for state.iteration in run.steps(state.iteration, config.steps):
        x = torch.randn(4, config.width)
        loss = (state.model(x)["logits"] - state.target(x)["logits"] - 1).square().mean()
        grads = torch.autograd.grad(loss, list(state.model.parameters()))
        with torch.no_grad():
            for p, g in zip(state.model.parameters(), grads, strict=True):
                p.sub_(1e-3 * config.optim.rate.value * g)
        run.log(state.iteration, loss=loss.item())
        run.checkpoint(state)
    return state.model


@torch.no_grad()
def evaluate(model: nn.Module, config: Config, *, media: Path | None = None, rows: int = 32, seed: int = 5) -> dict[str, float | int | str]:
    x = torch.randn(rows, config.width, generator=torch.Generator().manual_seed(seed))
    values = model(x)["logits"].mean(-1)
    return {"mean": values.mean().item(), "mean_ci95": 1.96 * values.std().item() / rows**0.5, "rows": rows, "video": "none.mp4"}


def example(config: Config) -> tuple[Tensor, ...]:
    return (torch.randn(2, config.width),)
