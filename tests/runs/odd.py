"""An algorithm whose trials behave and misbehave in every way a sweep must survive, each known by its name; it also tells what its process is given."""

import ctypes
import json
import os
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from onetorch.runs.run import Run


@dataclass(frozen=True)
class Config:
    how: Literal["well", "raises", "nan", "segfault", "killed once", "fails once", "leaves", "refuses", "prints"] = "well"  # it ends
    steps: int = 3  # in all
    child: bool = False  # leave a process behind that would live for ten minutes


@dataclass
class State:
    model: nn.Module
    seen: Tensor
    iteration: int = 0


def build(config: Config) -> nn.Module:
    if config.how == "refuses":
        raise ValueError("this cannot be built")
    return nn.Linear(2, 2)


def train(config: Config, run: Run) -> nn.Module:
    torch.manual_seed(0)
    plan = run.plan(lambda choice: lambda: None, threads=(1, 2, 4, 64))
    given = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "threads": torch.get_num_threads(),
        "plan": plan["threads"],
        "cores": sorted(os.sched_getaffinity(0)),
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "alone": len(os.listdir("/proc/self/task")),
        "main": threading.current_thread() is threading.main_thread(),
        "handlers": [signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, signal.getsignal(signal.SIGINT) is not signal.default_int_handler],
    }
    if config.child:
        given["child"] = subprocess.Popen(["sleep", "600"]).pid
    (run.media / "given.json").write_text(json.dumps(given))
    state = run.restore(State(build(config), torch.zeros(())))
    before = state.iteration
    for state.iteration in run.steps(state.iteration, config.steps):
        state.seen += 1
        run.log(state.iteration, loss=float(state.seen))
        run.checkpoint(state)
        mark = run.folder / "again"
        if state.iteration == 2 and before == 0:
            match config.how:
                case "raises":
                    raise KeyError("a fault of the algorithm")
                case "nan":
                    run.finite(loss=torch.tensor(float("nan")))
                case "segfault":
                    ctypes.string_at(0)
                case "leaves":
                    os._exit(0)
                case "killed once" | "fails once" if not mark.exists():
                    mark.touch()
                    if config.how == "fails once":
                        raise OSError("the disk hiccups")
                    os.kill(os.getpid(), signal.SIGKILL)
                case "prints":
                    os.write(1, b"to standard output\n")
                    os.write(2, b"to standard error\n")
    return state.model


def evaluate(model: nn.Module, config: Config, *, media: Path | None = None) -> dict[str, float | int]:
    return {"sum": sum(p.sum().item() for p in model.parameters())}
