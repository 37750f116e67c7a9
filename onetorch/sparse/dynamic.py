"""Layouts that change while training: blocks are dropped where the weights are small and grown where they may help.

    dynamic = DynamicSparsity(model, optimizer, grow="gradient", every=100, end=7500)
    for x, y in data:
        loss(model(x), y).backward()
        optimizer.step()
        dynamic.step()
        optimizer.zero_grad()

| grow       | density | what it is                                                                                             |
| "random"   | None    | SET: sparse evolutionary training, Mocanu et al. 2018                                                  |
| "gradient" | None    | RigL: Evci et al., Rigging the Lottery: Making All Tickets Winners, 2020 (arXiv:1911.11134)            |
| None       | 0.25    | gradual magnitude pruning: Zhu, Gupta, To prune, or not to prune, 2017 (arXiv:1710.01878)              |
| "gradient" | 0.25    | both at once, as in Liu et al., Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, 2021 |

The papers move single weights; here whole blocks move, and what is compared between them is the root of the mean square over a block.
"""

import math

import torch
from torch import Tensor, nn

from onetorch.sparse.layers import BlockSparse, _check_moves
from onetorch.sparse.products import _check_number


def cosine_fraction(step: int, end: int, fraction: float) -> float:
    """The share of the blocks that is exchanged at this step: fraction / 2 (1 + cos(pi step / end)) (RigL, equation in section 3)."""
    return fraction / 2 * (1 + math.cos(math.pi * min(step, end) / end))


def cubic_density(step: int, begin: int, end: int, first: float, last: float) -> float:
    """last + (first - last) (1 - (step - begin) / (end - begin))^3 between `begin` and `end`, constant outside (Zhu & Gupta, equation 1)."""
    done = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return last + (first - last) * (1 - done) ** 3


class DynamicSparsity:
    """Moves the blocks of every block-sparse layer of `model` while it trains.

    `step()` counts the optimizer's steps; call it after `optimizer.step()` and before the gradients are cleared. Every `every` steps after `begin`, and
    not after `end`, each layer for itself drops its `cosine_fraction` of blocks with the smallest weights (times the gate, where it has gates) and grows as
    many: at random, or where the gradient of the dense weight is largest. Grown blocks begin at 0; a block that is dropped and grown at the same step stays
    as it is. The moments that the optimizer keeps move along with their blocks, those of grown blocks begin at 0 (while Adam's count of steps is the
    layer's: its first steps in a new block are small).

    model       its layers of `onetorch.sparse` take part; ValueError where there are none
    optimizer   one or several (a tuple) that hold the layers' parameters; not LBFGS, whose history runs through all parameters at once (ValueError)
    grow        "random", "gradient", or None: nothing is grown, for gradual pruning only
    every, begin, end   in steps; RigL stops after three quarters of the training
    fraction    the share of the blocks that is exchanged at first
    density     None: the number of blocks stays, so that compiled code stays valid and nothing waits for the device. Otherwise each layer goes from its own
                density to this one along `cubic_density`, and its parameters change size.
    generator   for "random", on the layers' device; left out: torch's global one

    The gradient of the dense weight costs one dense product and (outputs, inputs) floats of memory, at the steps that need it only: in the step before an
    update each layer gets a `probe`, whose gradient it is. Gradients of several backward passes add up as those of the weights do.

    `state_dict` has all that is needed to go on bit for bit, together with those of model (which holds the layouts), optimizer, and the global random
    generator where none is given. Not made for several processes that each keep a copy of the model: they would grow different blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | tuple[torch.optim.Optimizer, ...],
        *,
        grow: str | None = "gradient",
        every: int = 100,
        begin: int = 0,
        end: int,
        fraction: float = 0.3,
        density: float | None = None,
        generator: torch.Generator | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a module, got {type(model).__name__}")
        self.optimizers = optimizer if isinstance(optimizer, tuple) else (optimizer,)
        for one in self.optimizers:
            if not isinstance(one, torch.optim.Optimizer):
                raise ValueError(f"optimizer: expected an optimizer or a tuple of them, got {type(one).__name__}")
        _check_moves(self.optimizers)
        for name, steps in (("every", every), ("begin", begin), ("end", end)):
            if type(steps) is not int:
                raise ValueError(f"{name}: expected a number of steps, got {steps!r}")
        _check_number("fraction", fraction)
        if density is not None:
            _check_number("density", density)
        self.layers = [layer for layer in model.modules() if isinstance(layer, BlockSparse)]
        if not self.layers:
            raise ValueError(f"model: expected at least one layer of onetorch.sparse, got {type(model).__name__} without any")
        if grow not in ("random", "gradient", None):
            raise ValueError(f'grow: expected "random", "gradient" or None, got {grow!r}')
        if grow is None and density is None:
            raise ValueError("density: expected a final density where nothing is grown, got None")
        if every < 1:
            raise ValueError(f"every: expected at least 1 step, got {every}")
        if not 0 <= begin < end:
            raise ValueError(f"begin, end: expected 0 <= begin < end, got {begin} and {end}")
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction: expected a value in 0..1, got {fraction}")
        if density is not None and not 0 < density <= 1:
            raise ValueError(f"density: expected a value in 0..1, not 0, got {density}")
        held = {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for layer in self.layers:
            if id(layer.weight) not in held:
                raise ValueError(f"optimizer: expected it to hold the weights of every layer, got none for {layer}")
        self.grow, self.every, self.begin, self.end, self.fraction, self.density, self.generator = grow, every, begin, end, fraction, density, generator
        self.steps = 0
        self.first = [layer.layout.kept for layer in self.layers]  # blocks at the beginning, where the density falls from
        self._arm()

    def _due(self, step: int) -> bool:
        return self.begin < step <= self.end and step % self.every == 0

    def _arm(self) -> None:
        """Give the layers their probes for the coming step, where it will need them."""
        wanted = self.grow == "gradient" and self._due(self.steps + 1)
        for layer in self.layers:
            layer.probe = layer.new_probe() if wanted else None

    def step(self) -> bool:
        """Count a step of the optimizer; True where layouts changed."""
        self.steps += 1
        due = self._due(self.steps)
        if due:
            for number, layer in enumerate(self.layers):
                self._update(layer, self.first[number])
        self._arm()
        return due

    @torch.no_grad()
    def _update(self, layer: BlockSparse, first: int) -> None:
        layout = layer.layout
        total, kept = layout.mask.numel(), layout.kept
        wanted = kept
        if self.density is not None:
            wanted = min(kept, round(total * cubic_density(self.steps, self.begin, self.end, first / total, self.density)))
        moved = 0 if self.grow is None else min(round(cosine_fraction(self.steps, self.end, self.fraction) * wanted), wanted)
        if moved == 0 and wanted == kept:
            return
        size = layer.block_sizes().view(-1)
        C = layout.grid[1]
        at = layout.rows.long() * C + layout.columns.long() % C
        magnitude = layer.gated_weight().float().square().flatten(1).sum(1) / size[at]
        stay = at[magnitude.topk(wanted - moved).indices]
        mask = torch.zeros(total, dtype=torch.bool, device=layout.device).index_fill(0, stay, True)
        if moved:
            score = torch.rand(total, generator=self.generator, device=layout.device) if self.grow == "random" else self._gradient(layer) / size
            mask = mask.index_fill(0, score.masked_fill(mask, -1.0).topk(moved).indices, True)
        layer.set_layout(layout.with_mask(mask.view(layout.mask.shape), wanted), *self.optimizers)

    def _gradient(self, layer: BlockSparse) -> Tensor:
        if layer.probe is None or layer.probe.grad is None:
            raise ValueError(f"step: expected a backward pass through {layer} before a step that grows by gradients, got none")
        return layer.dense_blocks(layer.probe.grad.float()).view(-1)

    def state_dict(self) -> dict:
        state = {"steps": self.steps, "first": list(self.first)}
        return state if self.generator is None else state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        expected = {"steps", "first"} | (set() if self.generator is None else {"generator"})
        wanted = f"state: expected {sorted(expected)} of {len(self.layers)} layers"
        if not isinstance(state, dict) or set(state) != expected:
            raise ValueError(f"{wanted}, got {sorted(state) if isinstance(state, dict) else type(state).__name__}")
        if type(state["steps"]) is not int or not isinstance(state["first"], list) or len(state["first"]) != len(self.layers):
            raise ValueError(f"{wanted}, got steps {state['steps']!r} and first {state['first']!r}")
        self.steps, self.first = state["steps"], list(state["first"])
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self._arm()
