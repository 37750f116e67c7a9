"""A module from its config and its weights, without a second copy in memory and with no more memory than the weights explain; and what it answers.

Whoever sends a folder chooses its config, and `build(config)` makes what the config says: a width of a billion asks for all memory there is. So every tensor
that a received folder's `build` or forward pass would make is counted before it is made, and one that goes beyond what its weights' file
explains is refused.
"""

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from onetorch.runs import state
from onetorch.runs.errors import CheckpointError, OneTorchError

SLACK = 16 << 20  # bytes that any module may take beside its weights, or an eighth of them
# Outputs agree within this much of the largest magnitude of an output: other processors, thread counts and kernels add numbers in another order. Integers and
# booleans agree exactly.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.complex64: 1e-4}

_LOCK = threading.RLock()  # a build may load another model
_aten = torch.ops.aten
_RANDOM = {_aten.uniform_, _aten.normal_, _aten.random_, _aten.bernoulli_, _aten.exponential_, _aten.cauchy_, _aten.log_normal_, _aten.geometric_}
_MATMUL = {_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm}
_NO_LARGER = {
    _aten.native_layer_norm, _aten.native_group_norm, _aten._softmax, _aten._log_softmax, _aten.sum, _aten.mean, _aten.amax, _aten.amin, _aten.argmax,
    _aten.max, _aten.any, _aten.all, _aten.var, _aten.var_mean, _aten.linalg_vector_norm, _aten.cumsum, _aten.sort, _aten.topk, _aten.gather, _aten.equal,
    _aten.cat, _aten.stack, _aten.clone, _aten._to_copy, _aten._unsafe_view, _aten.tril, _aten.triu, _aten.diagonal_copy, _aten.native_dropout,
    _aten.roll,    _aten.zeros_like, _aten.ones_like, _aten.empty_like, _aten._local_scalar_dense, _aten._scaled_dot_product_flash_attention_for_cpu,
}  # fmt: skip
_EMPTY = {_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty, _aten.new_empty_strided}


class Watch(TorchDispatchMode):
    """Counts the memory of the tensors made under it, and refuses what goes beyond `touched` bytes (`reserved` for memory that is asked for and not filled).

    Random fills are left out where `unfilled`: of a module whose weights come next.
    """

    def __init__(self, what: str, touched: float = math.inf, reserved: float = math.inf, operations: float = math.inf, unfilled: bool = False) -> None:
        super().__init__()
        self.what, self.unfilled, self.operations = what, unfilled, operations
        self.limits = {False: touched, True: reserved}
        self.live: dict[bool, dict[int, tuple[StorageWeakRef, int]]] = {False: {}, True: {}}
        self.used = {False: 0, True: 0}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler (two seconds) to keep it off this method; whoever compiles a module has loaded it before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable or func.is_view:
            if self.unfilled and func.overloadpacket in _RANDOM and kwargs.get("generator") is None:
                return args[0]
            return func(*args, **kwargs)
        empty = func.overloadpacket in _EMPTY
        limit, live = self.limits[empty], self.live[empty]
        if math.isfinite(limit):
            promised = _promised(func, args, kwargs)
            if self.used[empty] + promised > limit:
                self.used[empty] = self._sweep(live)
            self.operations -= 1
            if self.used[empty] + promised > limit or self.operations < 0:
                raise CheckpointError(f"{self.what} asks for more memory than the weights explain ({func} of {promised:,} bytes): refused before it was taken")
        result = func(*args, **kwargs)
        if math.isfinite(limit):
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    if storage._cdata not in live:
                        live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                        self.used[empty] += storage.nbytes()
        return result

    @staticmethod
    def _sweep(live: dict[int, tuple[StorageWeakRef, int]]) -> int:
        for key in [k for k, (reference, _) in live.items() if reference.expired()]:
            del live[key]
        return sum(size for _, size in live.values())


def _promised(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Bytes that the operation's results will take, or a bound on them, found without making them."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    packet = func.overloadpacket
    dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else torch.get_default_dtype())
    count: int | None = None
    if any(argument.name == "size" for argument in func._schema.arguments[:2]):  # empty, zeros, full, new_zeros, randn, …
        count = math.prod(next(a for a in args if isinstance(a, list | tuple)))
    elif packet is _aten.arange and all(isinstance(a, int) for a in args):
        count, dtype = len(range(*args)), torch.int64
    elif torch.Tag.pointwise in func.tags and tensors:
        # torch.broadcast_shapes would import half of torch for this.
        count = math.prod(max(sizes) for sizes in itertools.zip_longest(*(reversed(t.shape) for t in tensors), fillvalue=1))
    elif packet in _MATMUL:
        left, right = args[-2:]
        count = left.numel() // max(left.shape[-1], 1) * right.shape[-1]
    elif packet is _aten.embedding:
        count = args[1].numel() * args[0].shape[-1]
    elif packet is _aten.repeat:
        count = args[0].numel() * math.prod(args[1])
    elif packet is _aten.constant_pad_nd:
        added = [sum(pair) for pair in zip(args[1][::2], args[1][1::2], strict=True)]  # of the last axis first
        count = math.prod(size + more for size, more in itertools.zip_longest(reversed(args[0].shape), added, fillvalue=0))
    elif packet in _NO_LARGER:
        count, dtype = sum(t.numel() for t in tensors), torch.float64
    if count is not None:
        return count * max([dtype.itemsize, *(t.element_size() for t in tensors)])

    def meta(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    # The same operation on tensors without memory. The first time, torch imports what it takes for that, which takes a second.
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = kwargs | {"device": torch.device("meta")}
    try:
        args, kwargs = tree_map_only(Tensor, meta, (args, kwargs))
        result = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError, ValueError):
        return 0  # only the data can tell (nonzero, item), a kernel of others, or it will fail in earnest with the message that belongs to it
    return sum(t.nbytes for t in (result if isinstance(result, tuple | list) else (result,)) if isinstance(t, Tensor))


@contextlib.contextmanager
def _no_initialization() -> Iterator[None]:
    """`nn.init` does nothing in this thread: the weights come next. Other threads' modules are initialised as ever."""
    mine = threading.get_ident()

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def initialize(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            return tensor if threading.get_ident() == mine else original(tensor, *args, **kwargs)

        return initialize

    with _LOCK:
        originals = {name: f for name, f in vars(nn.init).items() if name.endswith("_") and not name.startswith("_") and callable(f)}
        vars(nn.init).update({name: replacement(original) for name, original in originals.items()})
        try:
            yield
        finally:
            vars(nn.init).update(originals)


def slack(weights: dict[str, Tensor]) -> int:
    """Bytes that the module of these weights may take beside them."""
    return max(SLACK, size(weights) // 8)


def size(weights: dict[str, Tensor]) -> int:
    """In bytes."""
    return sum(t.nbytes for t in weights.values())


def rebuild(build: Callable[[Any], nn.Module], config: Any, weights: dict[str, Tensor], what: str, watched: bool) -> nn.Module:
    """`build(config)` with `weights` (whose memory it then shares), in eval mode on the CPU.

    `watched`: the config is a stranger's. Raises CheckpointError, which calls the config `what`, when build fails, asks for too much, or gives another module.
    """
    limits = {"touched": slack(weights), "reserved": 2 * size(weights) + SLACK, "operations": 16 * len(weights) + 1000} if watched else {}
    try:
        with _no_initialization(), Watch(what, **limits, unfilled=True):
            model = build(config)
    except OneTorchError:
        raise
    except Exception as error:  # whatever the algorithm's code makes of a config that it was not written for
        raise CheckpointError(f"{what}: build(config) fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    problem = state.misfit(weights, model.state_dict())
    if problem:
        raise CheckpointError(f"{what}: the weights are not those of build(config): {problem}")
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    model.load_state_dict(weights, assign=True)
    for first, *others in tied.values():  # assigning gave each name a parameter of its own
        for name in others:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, model.get_parameter(first))
    return model.eval()


def outputs(model: nn.Module, inputs: list[Tensor], limit: float, what: str) -> dict[str, Tensor]:
    """What the module answers, flat: a tensor is `output`, the parts of a tuple or dict are `output.0`, `output.name`.

    Raises CheckpointError, which calls the inputs `what`, when the pass fails, takes more than `limit` bytes, or gives something else than tensors.
    """
    generators, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        torch.manual_seed(0)
        torch.set_num_threads(1)  # as on any other machine; and a few inputs are not worth waking the other cores, which may be busy
        with torch.no_grad(), Watch(what, touched=limit, reserved=limit) if math.isfinite(limit) else contextlib.nullcontext():
            result = model(*inputs)
    except OneTorchError:
        raise
    except Exception as error:  # whatever the module makes of inputs that it was not written for
        raise CheckpointError(f"{what}: the module fails on them: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    finally:
        torch.set_rng_state(generators)
        torch.set_num_threads(threads)
    found: dict[str, Tensor] = {}
    _flatten(result, "output", found, what)
    return found


def _flatten(value: Any, name: str, found: dict[str, Tensor], what: str) -> None:
    if isinstance(value, Tensor):
        found[name] = value.detach().contiguous()
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            _flatten(part, f"{name}.{i}", found, what)
    elif isinstance(value, dict):
        for key, part in value.items():
            _flatten(part, f"{name}.{key}", found, what)
    elif value is not None:
        raise CheckpointError(f"{what}: the module answers with a {type(value).__name__}; golden outputs are tensors, or tuples and dicts of them")


def difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[str | None, float]:
    """(what differs beyond TOLERANCE, or None; the largest difference, relative to the largest magnitude of its output)."""
    if expected.keys() != found.keys():
        return f"the module answers {', '.join(found)}, not {', '.join(expected)}", math.inf
    worst = 0.0
    for name, want in expected.items():
        have = found[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            return f"{name} is {tuple(have.shape)} {have.dtype}, not {tuple(want.shape)} {want.dtype}".replace("torch.", ""), math.inf
        if want.dtype not in TOLERANCE:
            if not torch.equal(have, want):
                return f"{name} differs", math.inf
            continue
        wide = torch.complex128 if want.is_complex() else torch.float64
        a, b = want.to(wide).numpy(), have.to(wide).numpy()
        finite = np.isfinite(a)
        # Masked logits are -inf: what is not finite has to be the same.
        if not np.array_equal(a[~finite], b[~finite]) or not np.isfinite(b[finite]).all():
            return f"{name} is not finite where it was, or the other way round", math.inf
        scale = float(np.abs(a[finite]).max(initial=0))
        off = float(np.abs(a[finite] - b[finite]).max(initial=0))
        relative = off / scale if scale else (math.inf if off else 0.0)
        worst = max(worst, relative)
        if not relative <= TOLERANCE[want.dtype]:
            return f"{name} differs by {relative:.2g} of its largest value, more than {TOLERANCE[want.dtype]:g}", relative
    return None, worst
