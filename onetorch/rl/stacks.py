"""Stacks of small MLPs, twin critics say, whose forward and backward pass are one call each.

On nets this small the cost is not the arithmetic alone: a matrix library's call on 256 rows reaches a third of what the core can do, and the operations
between (bias, ReLU, their gradients, casts) cost as much again. So on a CPU with a C++ compiler both passes are one C++ function, `csrc/mlp.cpp`, built
once; elsewhere the same in plain torch. Both are differentiable in the usual way: nothing in the algorithms knows of it.

All weights of a stack lie in one flat parameter. So an optimizer's step, a moving average and a copy are one operation each. In a state dict they
nevertheless stand under the names and in the shapes that an `nn.ModuleList` of `nn.Sequential` of `nn.Linear` gives them.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stack(nn.Module):
    """`count` MLPs of one shape with ReLU between the layers, each with weights of its own.

    x (B, sizes[0]), the same for all -> (count, B, sizes[-1]); with count = None one MLP, -> (B, sizes[-1]). Weights and biases begin uniform between
    ±1 / sqrt(fan_in), torch's default, which the published results of SAC and TD3 were reached with.
    """

    def __init__(self, count: int | None, sizes: Sequence[int]) -> None:
        super().__init__()
        self.count, self.sizes = count, tuple(sizes)
        shapes = [shape for fan_in, fan_out in pairwise(sizes) for shape in ((fan_out, fan_in), (fan_out,))]
        bounds = [1 / math.sqrt(fan_in) for fan_in in self.sizes[:-1] for _ in range(2)]
        self.shapes = shapes * (count or 1)
        self.flat = nn.Parameter(torch.cat([torch.empty(math.prod(s)).uniform_(-b, b) for s, b in zip(self.shapes, bounds * (count or 1), strict=True)]))

    def split(self, flat: Tensor) -> list[Tensor]:
        """Weights (out, in) and biases (out,) in turn, layer by layer and net by net, as views of `flat`."""
        return [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in self.shapes]), self.shapes, strict=True)]

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """`frozen`: gradients flow to x alone."""
        parts = iter(self.split(self.flat.detach() if frozen else self.flat))
        outs = [self._net(x, parts) for _ in range(self.count or 1)]
        return outs[0] if self.count is None else torch.stack(outs)

    def _net(self, x: Tensor, parts: Iterator[Tensor]) -> Tensor:
        last = len(self.sizes) - 2
        for i in range(last + 1):
            x = F.linear(x, next(parts), next(parts))
            x = x if i == last else x.relu_()
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
