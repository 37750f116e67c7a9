"""Muon (Jordan et al. 2024) in float32 too, and of whole matrices also where each process holds only a share of every one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onetorch.runs import distributed


class Muon(torch.optim.Muon):
    """torch's Muon, and where the `dtype` of the arithmetic is float32 or matrices are sharded, the same step written out.

    torch's own orthogonalizes in bfloat16. That is quicker, and good enough; but where two sums of a gradient differ in their last digit, as those of one
    process and of two do, it rounds some entries to neighbours that are 2^-8 apart, and the losses of the two runs part within a few steps by 1e-5 to 1e-4.

    It takes sharded matrices too, but multiplies them shard by shard, which is a third order of summation. Here their momentum stays sharded; the direction,
    which is as large as a gradient, is gathered matrix by matrix and orthogonalized whole in every process, and each takes its share of the result. That
    costs every process the arithmetic of one.
    """

    def __init__(self, params: Any, dtype: torch.dtype = torch.bfloat16, **how: Any) -> None:
        super().__init__(params, **how)
        self.dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16  # float16 has too short a range

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all matrices; every process at once."""
        if self.dtype == torch.bfloat16 and not any(distributed.is_share(p) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)
        return loss

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        direction = distributed.plain(grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
        change = orthogonalize(direction.to(self.dtype), group["ns_coefficients"], group["ns_steps"], group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(distributed.share(change, p), alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """The matrix x (m, n) with all its singular values brought near one, by Newton and Schulz's iteration in the dtype of x.

    Each step takes the singular values s to a s + b s^3 + c s^5, beginning from x over its Frobenius norm (Jordan et al. 2024).
    """
    a, b, c = coefficients
    wide = x.T if x.size(0) > x.size(1) else x
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if x.size(0) > x.size(1) else wide
