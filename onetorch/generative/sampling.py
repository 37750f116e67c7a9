"""Choosing the next symbol from logits, and going on from a beginning by a model that gives them."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from onetorch.generative.attention import Cache


def check(temperature: float, top_k: int, top_p: float = 1.0, min_p: float = 0.0) -> None:
    """ValueError naming the setting of `probabilities` that is out of range."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0 keeps all symbols), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (1 keeps all symbols), got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must lie in 0 to 1 (0 keeps all symbols), got {min_p}")


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The distribution that is sampled from: softmax(logits / temperature) over the symbols that are kept, zero elsewhere.

    Args:
        logits: (..., V), any float dtype.
        temperature: 0 puts all mass on the largest logit (the first of equals).
        top_k: number of symbols kept, the likeliest; 0 keeps all. Equals of the k-th are kept too.
        top_p: keep the likeliest symbols whose mass reaches this, of the mass that top_k left (nucleus sampling, Holtzman et al. 2020); equals too.
        min_p: keep the symbols with at least this share of the likeliest one's probability (Nguyen et al. 2024).

    Probabilities for top_p and min_p are those at the temperature. Returns (..., V) float32, rows summing to one.

    >>> probabilities(torch.tensor([0.0, 0.0, -1.0]), top_k=2).tolist()
    [0.5, 0.5, 0.0]
    """
    check(temperature, top_k, top_p, min_p)
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k, dim=-1).values[..., -1:]  # (..., 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    p = torch.softmax(logits / temperature, dim=-1)
    if top_p == 1 and min_p == 0:
        return p
    least = min_p * p.amax(-1, keepdim=True)
    if top_p < 1:
        falling = p.sort(-1, descending=True).values
        needed = (falling.cumsum(-1) - falling < top_p).sum(-1, keepdim=True)  # those before which the mass is not reached yet
        least = torch.maximum(least, falling.gather(-1, needed - 1))
    kept = p.masked_fill(p < least, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def sample(logits: Tensor, generator: torch.Generator, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """One symbol (B,) int64 for each row of logits (B, V), drawn from `probabilities` with `generator`."""
    return torch.multinomial(probabilities(logits, temperature, top_k, top_p, min_p), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def go_on(
    model: Any,
    start: list[int],
    length: int,
    generator: torch.Generator,
    rows: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    cached: bool = True,
    seconds: float = math.inf,
) -> list[list[int]]:
    """`rows` continuations of the tokens `start` (one at least) by `length`, each with `start` before it; shorter where `seconds` are over.

    The model sees at most its context: when that is full it begins again with the last half. A cache keeps the keys and values of what it has seen; without
    it (`cached`) the tokens are the same and take longer. `model(tokens, cache)` gives logits of the tokens after them, `model.config.context` is the context.
    """
    if not start:
        raise ValueError("start must hold at least one token, got none")
    device, context, end = next(model.parameters()).device, model.config.context, time.perf_counter() + seconds
    tokens = torch.tensor(start, device=device).repeat(rows, 1)  # (rows, tokens so far)
    begin, cache = max(tokens.size(1) - context, 0), Cache()
    for _ in range(length):
        if time.perf_counter() > end:
            break
        if tokens.size(1) - begin > context:
            begin, cache = tokens.size(1) - max(context // 2, 1), Cache()
        logits = model(tokens[:, begin:], cache if cached else None)[:, -1]  # (rows, V)
        chosen = sample(logits.cpu(), generator, temperature, top_k, top_p, min_p)
        tokens = torch.cat([tokens, chosen.to(device)[:, None]], 1)
    return tokens.tolist()
