"""Choosing the next symbol from logits."""

import torch
from torch import Tensor


def check(temperature: float, top_k: int) -> None:
    """ValueError for a temperature below zero or a top_k below zero."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0 keeps all symbols), got {top_k}")


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """The distribution that is sampled from: softmax(logits / temperature) over the `top_k` largest logits, zero elsewhere.

    Args:
        logits: (..., V), any float dtype.
        temperature: 0 puts all mass on the largest logit (the first of equals).
        top_k: number of symbols kept; 0 keeps all. Equals of the k-th are kept too.

    Returns (..., V) float32, rows summing to one.

    >>> probabilities(torch.tensor([0.0, 0.0, -1.0]), top_k=2).tolist()
    [0.5, 0.5, 0.0]
    """
    check(temperature, top_k)
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k, dim=-1).values[..., -1:]  # (..., 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.softmax(logits / temperature, dim=-1)


def sample(logits: Tensor, generator: torch.Generator, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """One symbol (B,) int64 for each row of logits (B, V), drawn from `probabilities` with `generator`."""
    return torch.multinomial(probabilities(logits, temperature, top_k), 1, generator=generator).squeeze(-1)
