"""One run in several processes, each of which computes a part of every batch (torch.distributed, DistributedDataParallel; gloo on processors, NCCL on GPUs).

Every process runs the same loop on the same state, which only the gradient needs to be exchanged for: an algorithm wraps its model, takes its part of the batch
and the mean of the loss, and is otherwise as it was. Process 0 owns the folder: it writes checkpoints and metrics, decides on the speed plan and on when to
stop, and evaluates. What it writes does not depend on the number of processes, so a run may go on with another number.

`onetorch train gpt --nproc 2` starts the processes itself, on this machine and over its loopback; under torchrun, which may span machines that see the same
folder, each process that it starts joins the others: `torchrun --nproc-per-node 4 -m onetorch train gpt --dir DIR`.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onetorch.runs.errors import UsageError

PR_SET_PDEATHSIG = 1

wrapped: list[nn.Module] = []  # by an algorithm that can work in several processes


def world() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from zero."""
    return dist.get_rank() if world() > 1 else 0


def join(place: str) -> None:
    """Meet the other processes: `place` is "rank,world,file" as `launch` gives it, or "torchrun"."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if place == "torchrun":
        dist.init_process_group(backend, init_method="env://")
        local = int(os.environ["LOCAL_RANK"])
    else:
        number, count, file = place.split(",", 2)
        local = int(number)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody is left when the process that started us is killed
        dist.init_process_group(backend, init_method=f"file://{file}", rank=local, world_size=int(count))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)


def leave() -> None:
    """The end of working together; process 0 may go on alone."""
    if world() > 1:
        dist.barrier()  # none goes while another may still be waiting for it
        wrapped.clear()  # what holds the group would end it at the interpreter's end, when its threads can no longer be joined
        dist.destroy_process_group()


def wrap(model: nn.Module) -> nn.Module:
    """The model whose backward pass leaves the mean gradient of all processes; `model` itself where there is one."""
    if world() == 1:
        return model
    wrapped.append(model)
    return nn.parallel.DistributedDataParallel(model)


def part(rows: int) -> slice:
    """This process's rows of a batch. UsageError where they cannot be shared out evenly."""
    count = world()
    if rows % count:
        raise UsageError(f"a batch of {rows} cannot be shared out evenly among {count} processes: choose --batch or --nproc so that it can")
    return slice(rows // count * rank(), rows // count * (rank() + 1))


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if world() > 1:
        dist.all_reduce(x, dist.ReduceOp.SUM)
        x /= world()
    return x


@contextlib.contextmanager
def local(model: nn.Module, yes: bool) -> Iterator[None]:
    """Within it, where `yes`, the gradient is not exchanged yet: more is to be added to it."""
    if yes and isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def agree(value: Any) -> Any:
    """What process 0 gave, in every process; plain values only."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def agree_to_stop(told: bool) -> bool:
    """Whether process 0 was told to stop, in every process."""
    if world() == 1:
        return told
    flag = torch.tensor(int(told))
    dist.broadcast(flag, 0)
    return bool(flag)
