"""One run in several processes, each of which computes a part of every batch (torch.distributed; gloo on processors, NCCL on GPUs).

Every process runs the same loop on the same state, which only the gradient needs to be exchanged for: an algorithm wraps its model, takes its part of the batch
and the mean of the loss, and is otherwise as it was. Process 0 owns the folder: it writes checkpoints and metrics, decides on the speed plan and on when to
stop, and evaluates.

Each process holds all of the model (DistributedDataParallel), or, with `--shard`, its share of every weight, of its gradient and of what optimizers and
averages remember of it (`fully_shard`, FSDP2); the weights are gathered part by part when they are computed with. What process 0 writes is the same: nothing
is sharded on disk. A checkpoint holds whole tensors, which torch.distributed.checkpoint's state dicts gather and hand out again, so that a run may go on with
another number of processes, with `--shard` or without. Therefore process 0 needs room for the whole state when it saves, every process when it resumes, and
for all weights of the model, but nothing else of it, while it is evaluated. Several processes sum gradients in another order than one, sharded in a third:
in float32 their losses differ by less than a millionth.

`onetorch train gpt --nproc 2` starts the processes itself, on this machine and over its loopback; under torchrun, which may span machines that see the same
folder, each process that it starts joins the others: `torchrun --nproc-per-node 4 -m onetorch train gpt --dir DIR`.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onetorch.runs.errors import UsageError

M = TypeVar("M", bound=nn.Module)

PR_SET_PDEATHSIG = 1

wrapped: list[nn.Module] = []  # by an algorithm that can work in several processes
sharding = False  # whether `wrap` shards
joined = False  # whether this process has worked with others


def world() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from zero."""
    return dist.get_rank() if world() > 1 else 0


def join(place: str, shard: bool = False) -> None:
    """Meet the other processes: `place` is "rank,world,file" as `launch` gives it, or "torchrun". With `shard`, `wrap` shards."""
    global joined, sharding
    joined, sharding = True, shard
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


def end(code: int) -> None:
    """End this process with an exit code, where it has worked with others; it has to be done with everything but flushing what it printed.

    torch keeps the group of a sharded model for ever, and what stops by an exception keeps any. Its threads live on, and one that the system lets wait may
    still hold a tensor; when it gives that back to an interpreter that is closing, the process aborts ("terminate called without an active exception"; torch
    2.13). So the interpreter is not closed.
    """
    if joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wrap(model: nn.Module, parts: Iterable[nn.Module] = ()) -> nn.Module:
    """The model whose backward pass leaves the mean gradient of all processes; `model` itself where there is one process.

    A sharded model is changed in place: its parameters are replaced. So this comes before optimizers and averages are made of them. `parts` are the modules
    in it that compute one after another, the weights of each of which are gathered by themselves.
    """
    if world() == 1:
        return model
    wrapped.append(model)
    if not sharding:
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world(),))
    for module in (*parts, model):
        fully_shard(module, mesh=mesh)
    return model


def shards(model: nn.Module) -> list[Any]:
    """The modules whose weights are gathered together: none where the model is not sharded."""
    if not (sharding and wrapped):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within it every process has all weights of the model, as they were when it began, and may use it by itself. To be entered by all at once."""
    parts = shards(model)
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in parts:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def unwrap(model: M, build: Callable[[], M]) -> M:
    """In process 0 a plain model, made by `build`, with the weights of one that is sharded; `model` itself where it is not, or elsewhere."""
    if shards(model):
        weights = state_dict(model)
        if rank() == 0:
            model = build()
            model.load_state_dict(weights)
    return model


def state_dict(value: Any) -> dict[str, Any]:
    """`value.state_dict()`; what is sharded of it is whole in process 0, on its processor, and empty elsewhere. For all processes to call at once."""
    model = _sharded(value)
    if model is None:
        return _gather(value.state_dict()) if sharding else value.state_dict()
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if model is value:
        return dcp.get_model_state_dict(model, options=options)
    number = {name: i for i, name in enumerate(_parameters(value, model))}
    found: Any = dcp.get_optimizer_state_dict(model, value, options=options)
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in found.get("param_groups", [])]
    return {"state": {number[name]: entry for name, entry in found.get("state", {}).items()}, "param_groups": groups}


def load_state_dict(value: Any, saved: dict[str, Any]) -> None:
    """`value.load_state_dict(saved)`; of what is sharded each process takes its share of the whole tensors in `saved`. For all processes to call at once."""
    model = _sharded(value)
    if model is None:
        value.load_state_dict(_hand_out(saved, value.state_dict()) if sharding else saved)
        return
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True)
    if model is value:
        dcp.set_model_state_dict(model, saved, options=options)
        return
    names = _parameters(value, model)
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
    dcp.set_optimizer_state_dict(model, value, {"state": {names[i]: s for i, s in saved["state"].items()}, "param_groups": groups}, options=options)


def _sharded(value: Any) -> nn.Module | None:
    """The sharded model that `value` is, or whose optimizer it is."""
    if isinstance(value, nn.Module):
        return value if shards(value) else None
    if not sharding or not isinstance(value, torch.optim.Optimizer):
        return None
    held = {id(p) for group in value.param_groups for p in group["params"]}
    return next((m for m in wrapped if held <= {id(p) for p in m.parameters()}), None)


def _parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of an optimizer's parameters in the order in which its state numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _gather(node: Any) -> Any:
    """A tree with whole tensors for its sharded ones in process 0, and empty ones elsewhere."""
    if isinstance(node, dict):
        return {key: _gather(inner) for key, inner in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(map(_gather, node))
    if not isinstance(node, dist.tensor.DTensor):
        return node
    found = node.full_tensor()
    return found.cpu() if rank() == 0 else found.new_empty(0)


def _hand_out(saved: Any, live: Any) -> Any:
    """A tree with this process's share of the tensors whose counterpart in `live` is sharded."""
    if isinstance(saved, dict) and isinstance(live, dict):
        return {key: _hand_out(inner, live.get(key)) for key, inner in saved.items()}
    if isinstance(saved, list | tuple) and isinstance(live, list | tuple):
        return type(saved)(_hand_out(s, lv) for s, lv in zip(saved, live, strict=True))
    return share(saved, live) if isinstance(saved, Tensor) else saved


def share(x: Tensor, live: Any) -> Tensor:
    """This process's share of a tensor that is whole in every process, where `live` is sharded as it shall be; else `x` itself."""
    if not is_share(live):
        return x
    return dist.tensor.distribute_tensor(x.to(live.device), live.device_mesh, live.placements, src_data_rank=None)


def is_share(x: Any) -> bool:
    """Whether a tensor is this process's share of one."""
    return sharding and isinstance(x, dist.tensor.DTensor)


def plain(x: Tensor) -> Tensor:
    """A tensor that is sharded, or was computed of such, whole in every process."""
    return x.full_tensor() if is_share(x) else x  # type: ignore[attr-defined]


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
        return
    for module in shards(model):
        module.set_requires_gradient_sync(not yes, recurse=False)
    yield


def agree(value: Any) -> Any:
    """What process 0 gave, in every process; plain values only."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def agree_to(yes: bool) -> bool:
    """Whether process 0 said so, in every process."""
    if world() == 1:
        return yes
    flag = torch.tensor(int(yes))
    dist.broadcast(flag, 0)
    return bool(flag)
