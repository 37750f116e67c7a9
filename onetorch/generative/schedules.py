"""The factor by which a step size, a batch or a context is multiplied in each step of training: one place for all families."""

import math
from typing import Literal

Kind = Literal["wsd", "cosine", "linear", "constant"]


def factor(kind: Kind, step: int, steps: int, warmup: int = 0, decay: float = 0.5, floor: float = 0.0) -> float:
    """The factor in step 1 … steps: rises in proportion to the step for `warmup` steps, then goes as `kind` says down to `floor`, reached just after the last.

    wsd        warm-up, stable, decay: one until the last `decay` of the steps, then down in a straight line (Zhai et al. 2022; Hu et al. 2024)
    cosine     half a period of the cosine from the end of the warm-up (Loshchilov & Hutter 2017)
    linear     a straight line from the end of the warm-up
    constant   one

    >>> [round(factor("wsd", s, 10, warmup=2, decay=0.4), 2) for s in range(1, 11)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    >>> [round(factor("cosine", s, 4, warmup=1), 2) for s in range(1, 5)]
    [1.0, 0.85, 0.5, 0.15]
    """
    rise = step / warmup if warmup else 1.0
    left = (steps + 1 - step) / max(steps + 1 - warmup, 1)  # of the way from the end of the warm-up to just after the last step
    match kind:
        case "wsd":
            fall = (steps + 1 - step) / (decay * steps)
        case "cosine":
            fall = 0.5 - 0.5 * math.cos(math.pi * min(left, 1.0))
        case "linear":
            fall = left
        case "constant":
            fall = 1.0
        case _:
            raise ValueError(f"kind: expected one of wsd, cosine, linear, constant, got {kind!r}")
    return min(rise, floor + (1 - floor) * min(fall, 1.0))


def staged(step: int, steps: int, stages: tuple[float, ...]) -> float:
    """The value of the stage that step 1 … steps lies in, the stages equally long; of a batch or context that grows while training.

    >>> [staged(s, 6, (0.25, 0.5, 1.0)) for s in range(1, 7)]
    [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    """
    return stages[(step - 1) * len(stages) // steps]
