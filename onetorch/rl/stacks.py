"""Stacks of small MLPs, twin critics say, whose forward and backward pass are one call each.

On nets this small the cost is not the arithmetic alone: a matrix library's call on 256 rows reaches a third of what the core can do, and the operations
between (bias, activation, their gradients, casts) cost as much again; torch's tanh costs more than both. So on a CPU with a C++ compiler both passes are one
C++ function, `csrc/mlp.cpp`, built once; elsewhere the same in plain torch, on a GPU for all nets of a stack at once. All are differentiable in the usual way:
nothing in the algorithms knows of it. Where even autograd's part is too much, `vjp` goes back without it.

All weights of a stack lie in one flat parameter. So an optimizer's step, a moving average and a copy are one operation each. In a state dict they
nevertheless stand under the names and in the shapes that an `nn.ModuleList` of `nn.Sequential` of `nn.Linear` gives them.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onetorch.sparse import cpu

NATIVE = ("relu", "tanh")  # activations of the C++ passes, numbered as there
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh, "silu": F.silu}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C++ passes, or None where there is no compiler."""
    lib = cpu.built(Path(__file__).parent / "csrc")
    if lib is not None:
        i64, pointer = ctypes.c_int64, ctypes.c_void_p
        sizes: list[Any] = [ctypes.c_int, ctypes.c_int, i64, i64, i64, ctypes.POINTER(i64)]
        lib.onetorch_mlp_forward.argtypes = [*sizes, *[pointer] * 4, ctypes.c_int]
        lib.onetorch_mlp_backward.argtypes = [*sizes, *[pointer] * 7, ctypes.c_int]
        lib.onetorch_adam.argtypes = [i64, *[pointer] * 5, *[ctypes.c_float] * 6]
        lib.onetorch_adam.restype = None
    return lib


def dtypes() -> tuple[str, ...]:
    """What `Stack.dtype` may be here: bfloat16 only where the processor multiplies it. On a GPU, whose products are torch's own, it makes no difference."""
    lib = library()
    return ("float32", "bfloat16") if lib is not None and lib.onetorch_mlp_bf16() else ("float32",)


def _forward(x: Tensor, flat: Tensor, stack: "Stack", count: int) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """out (count, B, out) for x (B, in) contiguous, what the hidden layers gave, and the shape as the C++ functions take it."""
    lib = library()
    assert lib is not None
    B, sizes = len(x), stack.sizes
    hidden, out = torch.empty(count * B * stack.width), torch.empty(count, B, sizes[-1])
    shape = (int(stack.dtype == "bfloat16"), NATIVE.index(stack.activation), count, B, len(sizes) - 1, (ctypes.c_int64 * len(sizes))(*sizes))
    lib.onetorch_mlp_forward(*shape, x.data_ptr(), flat.data_ptr(), hidden.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out, hidden, shape


def _backward(
    shape: tuple[Any, ...], widest: int, x: Tensor, flat: Tensor, hidden: Tensor, grad: Tensor, grad_flat: Tensor | None, grad_x: Tensor | None
) -> None:
    """The gradients by `flat` and by x, where there is a tensor for them, from that by out, after `_forward`."""
    lib = library()
    assert lib is not None
    grad, work = grad.contiguous(), torch.empty(2, len(x), widest)
    pointers = [None if t is None else t.data_ptr() for t in (x, flat, hidden, grad, grad_flat, grad_x, work)]
    lib.onetorch_mlp_backward(*shape, *pointers, torch.get_num_threads())


class _Pass(torch.autograd.Function):
    """x (B, in), flat -> (count, B, out), in C++, by the first `count` nets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flat: Tensor, stack: "Stack", count: int) -> Tensor:
        x = x.contiguous()
        out, hidden, ctx.shape = _forward(x, flat, stack, count)
        ctx.save_for_backward(x, flat, hidden)
        ctx.widest, ctx.whole = max(stack.sizes), count == (stack.count or 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, flat, hidden = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_flat = (torch.empty_like if ctx.whole else torch.zeros_like)(flat) if ctx.needs_input_grad[1] else None
        _backward(ctx.shape, ctx.widest, x, flat, hidden, grad, grad_flat, grad_x)
        return grad_x, grad_flat, None, None


class Stack(nn.Module):
    """`count` MLPs of one shape with `activation` ("relu", "tanh" or "silu") between the layers, each with weights of its own.

    x (B, sizes[0]), the same for all -> (count, B, sizes[-1]); with count = None one MLP, -> (B, sizes[-1]). `dtype` "bfloat16" makes the products between
    hidden layers of at least 64 units bfloat16 ones, with sums, weights and all else in float32; `dtypes()` says where that is possible. Weights and biases
    begin uniform between ±1 / sqrt(fan_in), torch's default, with which the published results of SAC and TD3 were reached.
    """

    def __init__(self, count: int | None, sizes: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        self.count, self.sizes, self.activation, self.dtype = count, tuple(sizes), activation, "float32"
        self.width = sum(self.sizes[1:-1])  # of all hidden layers
        shapes = [shape for fan_in, fan_out in pairwise(sizes) for shape in ((fan_out, fan_in), (fan_out,))]
        bounds = [1 / math.sqrt(fan_in) for fan_in in self.sizes[:-1] for _ in range(2)]
        self.shapes = shapes * (count or 1)
        self.flat = nn.Parameter(torch.cat([torch.empty(math.prod(s)).uniform_(-b, b) for s, b in zip(self.shapes, bounds * (count or 1), strict=True)]))

    def split(self, flat: Tensor) -> list[Tensor]:
        """Weights (out, in) and biases (out,) in turn, layer by layer and net by net, as views of `flat`."""
        return [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in self.shapes]), self.shapes, strict=True)]

    def forward(self, x: Tensor, frozen: bool = False, first: int | None = None) -> Tensor:
        """`frozen`: gradients flow to x alone. `first`: only so many of the nets are asked."""
        flat, count = self.flat.detach() if frozen else self.flat, first or self.count or 1
        if self.native(x):
            # Where no gradient is asked for, autograd's part would take as long as a small net's pass.
            out = _Pass.apply(x, flat, self, count) if torch.is_grad_enabled() else _forward(x.contiguous(), flat, self, count)[0]
        elif x.device.type != "cpu" and count > 1 and x.dim() == 2:
            out = self._together(x, flat, count)
        else:
            parts = iter(self.split(flat))
            out = torch.stack([self._net(x, parts) for _ in range(count)])
        return out.squeeze(0) if self.count is None else out

    def native(self, x: Tensor) -> bool:
        """Whether x goes through the C++ passes."""
        return x.device.type == "cpu" and x.dtype == self.flat.dtype == torch.float32 and x.dim() == 2 and self.activation in NATIVE and library() is not None

    def _net(self, x: Tensor, parts: Iterator[Tensor]) -> Tensor:
        last = len(self.sizes) - 2
        for i in range(last + 1):
            x = F.linear(x, next(parts), next(parts))
            x = x if i == last else ACTIVATIONS[self.activation](x)
        return x

    def _together(self, x: Tensor, flat: Tensor, count: int) -> Tensor:
        """(count, B, out) with one product a layer for all nets: where each call costs a launch, half as many as for twin critics one by one."""
        parts = iter(flat.unflatten(0, (self.count or 1, -1))[:count].split([math.prod(s) for s in self.shapes[: len(self.shapes) // (self.count or 1)]], 1))
        x, last = x.expand(count, *x.shape), len(self.sizes) - 2
        for i, (fan_in, fan_out) in enumerate(pairwise(self.sizes)):
            weight, bias = next(parts).unflatten(1, (fan_out, fan_in)), next(parts).unsqueeze(1)
            x = torch.baddbmm(bias, x, weight.mT)
            x = x if i == last else ACTIVATIONS[self.activation](x)
        return x

    def names(self) -> list[str]:
        layers = [f"{2 * i}.{kind}" for i in range(len(self.sizes) - 1) for kind in ("weight", "bias")]
        return layers if self.count is None else [f"{k}.{layer}" for k in range(self.count) for layer in layers]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, part in zip(self.names(), self.split(self.flat.detach()), strict=True):
            destination[prefix + name] = part

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any, unexpected_keys: Any, error_msgs: Any
    ) -> None:
        names = [prefix + name for name in self.names()]
        missing_keys += [name for name in names if name not in state_dict]
        unexpected_keys += [name for name in state_dict if name.startswith(prefix) and name not in names]
        for name, part in zip(names, self.split(self.flat.detach()), strict=True):
            if name in state_dict and state_dict[name].shape != part.shape:
                error_msgs.append(f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(part.shape)}")
            elif name in state_dict:
                part.copy_(state_dict[name])


def vjp(net: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[Tensor], None]]:
    """net(x) without a graph, and the way back: given a loss's gradient by it (a vector-Jacobian product), it adds that by the weights to their `grad`.

    A Stack in C++ goes both ways without autograd, which on nets of 64 units takes longer than their passes. `net` may be any module; x gets no gradient.
    """
    if not (isinstance(net, Stack) and net.native(x)):
        out = net(x)
        return out.detach(), out.backward
    x, flat = x.contiguous(), net.flat
    out, hidden, shape = _forward(x, flat, net, net.count or 1)

    def backward(grad: Tensor) -> None:
        grad_flat = torch.empty_like(flat)
        _backward(shape, max(net.sizes), x, flat, hidden, grad, grad_flat, None)
        if flat.grad is None:
            flat.grad = grad_flat
        else:
            flat.grad.add_(grad_flat)

    return out.squeeze(0) if net.count is None else out, backward
