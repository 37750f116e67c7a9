"""An algorithm's state as tensors (safetensors) and JSON, and back, bit for bit. No pickle, so loading executes nothing.

A state is a dataclass whose fields are objects with `state_dict()` / `load_state_dict()`, tensors, numpy arrays, random generators (torch, numpy, Python),
plain values, or lists, tuples and dicts of these. What is sharded among processes is saved whole (`distributed.py`). JSON has fewer types than Python; what
it lacks is written as an object with one `$kind` key.
"""

import dataclasses
import hashlib
import math
import random
from typing import Any

import numpy as np
import torch

from onetorch.runs import distributed
from onetorch.runs.errors import CheckpointError, RunError


def pack(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for `value`; its tensors and arrays go into `tensors` under names that begin with `name`.

    Raises RunError for an object that can be saved in no exact way, with its place in the state.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, torch.Tensor):
        return {"$tensor": _keep(value.detach(), name, tensors)}
    if isinstance(value, np.ndarray | np.generic):
        try:
            # numpy says "not writable" and "not native" of arrays that torch does not take as they are.
            array = np.require(value, value.dtype.newbyteorder("="), ["C", "W"])
            tensor = torch.from_numpy(array).reshape(np.shape(value))
        except TypeError as error:
            raise RunError(f"state {name}: a numpy array of dtype {value.dtype} cannot be saved; use a numeric dtype") from error
        return {"$numpy" if isinstance(value, np.ndarray) else "$numpy_scalar": _keep(tensor, name, tensors)}
    if isinstance(value, torch.Generator):
        return {"$torch_generator": _keep(value.get_state(), name, tensors)}
    if isinstance(value, np.random.Generator):
        return {"$numpy_generator": pack(value.bit_generator.state, name, tensors)}
    if isinstance(value, random.Random):
        return {"$random": pack(value.getstate(), name, tensors)}
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return {"$state_dict": pack(dict(distributed.state_dict(value)), name, tensors)}
    if isinstance(value, tuple) and type(value) is tuple:
        return {"$tuple": [pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise RunError(f"state {name}: a dict key must be a str or an int, got {key!r}")
        if all(type(k) is str and not k.startswith("$") for k in value):
            return {k: pack(v, f"{name}.{k}", tensors) for k, v in value.items()}
        return {"$dict": [[k, pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]}
    raise RunError(f"state {name}: a {type(value).__module__}.{type(value).__qualname__} cannot be saved; give it state_dict() and load_state_dict()")


def _keep(tensor: torch.Tensor, name: str, tensors: dict[str, torch.Tensor]) -> str:
    """Put `tensor` into `tensors` under `name`, or the next free name where another place in the state spells the same (`{"a.b": …}` and `{"a": {"b": …}}`)."""
    while name in tensors:
        name += "'"
    tensors[name] = tensor
    return name


def unpack(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The plain value that `pack` wrote; objects with a state come back as their state."""
    if isinstance(node, list):
        return [unpack(n, tensors) for n in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        (kind, inner), *_ = node.items()
        match kind:
            case "$float":
                return float(inner)
            case "$tensor" | "$torch_generator":
                return tensors[inner]
            case "$numpy":
                return tensors[inner].numpy()
            case "$numpy_scalar":
                return tensors[inner].numpy()[()]
            case "$tuple":
                return tuple(unpack(n, tensors) for n in inner)
            case "$dict":
                return {k: unpack(n, tensors) for k, n in inner}
            case "$state_dict" | "$numpy_generator" | "$random":
                return unpack(inner, tensors)
    return {k: unpack(n, tensors) for k, n in node.items()}


def restore(live: Any, node: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Bring `live` to the state in `node`, in place where it is an object, tensor or array, and return it (or the plain value that takes its place)."""
    saved = unpack(node, tensors)
    if isinstance(live, torch.Generator):
        set_generator(live, saved)
    elif isinstance(live, np.random.Generator):
        live.bit_generator.state = saved
    elif isinstance(live, random.Random):
        live.setstate(saved)
    elif hasattr(live, "load_state_dict"):
        distributed.load_state_dict(live, saved)
    elif isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor) and live.shape == saved.shape and live.dtype == saved.dtype:
        with torch.no_grad():
            live.copy_(saved)
    elif isinstance(live, np.ndarray) and isinstance(saved, np.ndarray) and live.shape == saved.shape and live.dtype == saved.dtype:
        live[...] = saved
    elif isinstance(live, list | tuple) and isinstance(saved, list | tuple) and len(live) == len(saved):
        nodes = node["$tuple"] if isinstance(node, dict) else node
        items = [restore(item, n, tensors, f"{name}.{i}") for i, (item, n) in enumerate(zip(live, nodes, strict=True))]
        if isinstance(live, tuple):
            return tuple(items)
        live[:] = items
    elif isinstance(live, dict) and isinstance(saved, dict) and live.keys() == saved.keys() and not ("$dict" in node and len(node) == 1):
        live.update({k: restore(live[k], node[k], tensors, f"{name}.{k}") for k in live})
    elif isinstance(live, list) and isinstance(saved, list):
        live[:] = saved
    elif isinstance(live, dict) and isinstance(saved, dict):
        live.clear()
        live.update(saved)
    else:
        return saved
    return live


def set_generator(live: torch.Generator, saved: torch.Tensor) -> None:
    """Bring `live` to the state `saved`. Where that is of another device's generator, whose numbers are others anyway, `live` is seeded by it."""
    saved = saved.cpu()
    if saved.shape == live.get_state().shape:
        live.set_state(saved)
    else:
        live.manual_seed(int.from_bytes(hashlib.sha256(saved.numpy().tobytes()).digest()[:7]))


def pack_state(state: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(JSON tree, tensors of the field `model`, all other tensors) of a state, the global random generators included."""
    model: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if field.name == "model":
            # Weights under their own names: others read model.safetensors without knowing onetorch.
            tree["model"] = {"$state_dict": {k: pack(v, k, model) for k, v in distributed.state_dict(value).items()}}
        else:
            tree[field.name] = pack(value, field.name, others)
    generators = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(legacy=False), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators["cuda"] = torch.cuda.get_rng_state_all()
    return {"fields": tree, "generators": pack(generators, "generators", others)}, model, others


def restore_state(state: Any, tree: dict[str, Any], model: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """Bring `state` and the global random generators to what `pack_state` saved; CheckpointError names a field that does not fit."""
    fields = tree.get("fields") if isinstance(tree, dict) else None
    if not isinstance(fields, dict):
        raise CheckpointError("the checkpoint holds no state")
    names = {f.name for f in dataclasses.fields(state)}
    if names != set(fields):
        raise CheckpointError(f"the checkpoint was written by other code: its state has the fields {sorted(fields)}, the algorithm's has {sorted(names)}")
    place = ""
    try:
        for name in fields:
            place = f"state {name}"
            setattr(state, name, restore(getattr(state, name), fields[name], model if name == "model" else others, name))
        place = "random generators"
        generators = unpack(tree["generators"], others)
        torch.set_rng_state(generators["torch"])
        np.random.set_state(generators["numpy"])
        random.setstate(generators["python"])
        if "cuda" in generators and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(generators["cuda"])
    except Exception as error:
        # load_state_dict of any object may raise anything; the user has to know which object and that it is the checkpoint that does not fit it.
        raise CheckpointError(f"the checkpoint does not fit the algorithm: {place}: {' '.join(str(error).split())[:300]}") from error


def misfit(weights: dict[str, torch.Tensor], wanted: dict[str, Any]) -> str | None:
    """What keeps `weights` from being the state `wanted` (names, shapes and dtypes), or None where they are."""
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} is not in the model"
        have, want = weights[name], wanted[name]
        if not isinstance(want, torch.Tensor):
            return f"{name} is a {type(want).__name__} in the model, not a tensor"
        if have.shape != want.shape or have.dtype != want.dtype:
            return f"{name} is {tuple(have.shape)} {have.dtype}, the model's is {tuple(want.shape)} {want.dtype}".replace("torch.", "")
    return None


def find_nan(tree: dict[str, Any], *tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of the first value of a packed state that is or holds a NaN, or None."""
    for name, tensor in (item for group in tensors for item in group.items()):
        # One pass without temporaries: the largest magnitude of a tensor with a NaN is NaN.
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() and math.isnan(torch.linalg.vector_norm(tensor, math.inf).item()):
            return name
    return _find_nan(tree, "state")


def _find_nan(node: Any, name: str) -> str | None:
    if isinstance(node, dict):
        if node.get("$float") == "nan":
            return name
        inner = list(node.items())
    elif isinstance(node, list):
        inner = list(enumerate(node))
    else:
        return None
    return next((found for key, value in inner if (found := _find_nan(value, name if str(key).startswith("$") else f"{name}.{key}"))), None)
