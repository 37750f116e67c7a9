"""Arithmetic in fewer bits than float32 has: the kinds a machine has, and what training in each of them needs.

bfloat16 has the range of float32 and needs nothing. float16 does not: gradients would vanish in it, and so the loss is multiplied with a large number before
the backward pass and the gradient divided by it after (Micikevicius et al. 2018, arXiv:1710.03740). float8 is for the products of matrices alone, which
torchao (extra `float8`) computes of operands scaled tensor by tensor, on GPUs that have it; all else is then in bfloat16. Weights are float32 in all of them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from onetorch.runs.errors import UsageError

ASKED = ("float16", "float8")  # what `--plan dtype=…` takes, whatever the machine; a plan does not choose them by itself
LARGEST, PATIENCE = 2.0**16, 2000  # of a loss's factor; steps without overflow after which it is doubled
CAPABILITY = (8, 9)  # compute capability from which NVIDIA's GPUs multiply float8


def kinds() -> tuple[str, ...]:
    """The kinds that are worth a measurement here, float32 first."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ("float32", "float16")
    return ("float32", "bfloat16")


def dtype(kind: str) -> torch.dtype:
    """What the activations are in."""
    return torch.bfloat16 if kind == "float8" else getattr(torch, kind)


def to_float8(model: nn.Module, emulate: bool = False) -> None:
    """Let every linear layer in `model` whose sides are multiples of 16 multiply in float8; weights keep their names and values.

    UsageError where this machine cannot. `emulate`: compute with the rounding of float8 in more bits, on any machine.
    """
    if not emulate:
        if not torch.cuda.is_available():
            raise UsageError("dtype=float8 needs an NVIDIA GPU of compute capability 8.9 or above; here is none")
        if (found := torch.cuda.get_device_capability()) < CAPABILITY:
            raise UsageError(f"dtype=float8 needs compute capability 8.9 or above; {torch.cuda.get_device_name()} has {found[0]}.{found[1]}")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError as error:
        raise UsageError("dtype=float8 needs torchao: pip install 'onetorch[float8]'") from error

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % 16 == module.out_features % 16 == 0

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate, pad_inner_dim=True), module_filter_fn=fits)


class LossScale:
    """The factor of a loss in float16; of other kinds it is one and stays so. `state_dict` and `load_state_dict` make it fit for a run's State.

    Begins at 2^16, is halved when the gradient overflows, and doubled after 2000 steps without. torch.amp.GradScaler does the same for one optimizer in one
    process; here all optimizers and, of a sharded gradient, all processes leave out the same steps, because one norm decides.

    >>> scale = LossScale("float16")
    >>> scale.take(torch.tensor(float("inf"))), scale.factor
    (False, 32768.0)
    """

    def __init__(self, kind: str) -> None:
        self.factor, self.good, self.enabled = LARGEST if kind == "float16" else 1.0, 0, kind == "float16"

    @torch.no_grad()
    def undo(self, model: nn.Module) -> None:
        """Divide the gradients by the factor."""
        if self.enabled:
            torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1 / self.factor)

    def take(self, grad_norm: Tensor) -> bool:
        """Whether the step is to be taken, by the norm of the whole gradient; the factor is moved for the next.

        A norm that is no number at a factor below one is not the factor's doing, nor is one where there is no factor: the step is then not refused here.
        """
        if not self.enabled:
            return True
        if not math.isfinite(grad_norm.item()) and self.factor >= 1:
            self.factor, self.good = self.factor / 2, 0
            return False
        self.good += 1
        if self.good == PATIENCE:
            self.factor, self.good = self.factor * 2, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "good": self.good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self.good = state["factor"], state["good"]
