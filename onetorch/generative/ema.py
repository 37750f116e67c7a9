"""Exponential moving averages of a model's weights, at several rates at once (Polyak & Juditsky 1992; Karras et al. 2024 on why several)."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """The averages e of the parameters w of `model`: after each optimizer step, e <- r e + (1 - r) w for each rate r.

    In the first updates the rate is at most (1 + t) / (10 + t) after t updates, so that the average soon forgets the weights that training began with.
    Buffers are not averaged. `state_dict` and `load_state_dict` make it fit for a run's State.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> ema = EMA(model, (0.5,))
    >>> _ = nn.init.ones_(model.weight)
    >>> ema.update()  # the rate is at most 1 / 10
    >>> with ema.swapped(0.5):
    ...     round(model.weight.item(), 4)
    0.9
    """

    def __init__(self, model: nn.Module, rates: tuple[float, ...]) -> None:
        if not all(0 <= r < 1 for r in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"rates: expected different numbers of at least 0 and below 1, got {rates}")
        self.rates, self.updates = rates, 0
        self._names = [name for name, _ in model.named_parameters()]
        self._weights: list[Tensor] = [p for _, p in model.named_parameters()]
        self._averages = [[p.detach().clone() for p in self._weights] for _ in rates]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for rate, average in zip(self.rates, self._averages, strict=True):
            torch._foreach_lerp_(average, self._weights, 1 - min(rate, (1 + self.updates) / (10 + self.updates)))
        self.updates += 1

    @contextlib.contextmanager
    def swapped(self, rate: float | None) -> Iterator[None]:
        """Within it the model holds the average of `rate`, after it its own weights again; None leaves it its own."""
        if rate is None:
            yield
            return
        average = self._averages[self.rates.index(rate)]
        self._swap(average)
        try:
            yield
        finally:
            self._swap(average)

    def compare(self, validate: Callable[[Path], dict[str, float]], file: Path) -> dict[str, float]:
        """The columns of `validate(file)` for each set of weights: of the first rate's average as they are, of the weights themselves with raw_ before, of the
        other rates' averages with _ema_RATE after. The file has a name of its own for each.
        """
        columns = {f"raw_{column}": value for column, value in validate(file.with_stem(f"{file.stem}-raw")).items()}
        for i, rate in enumerate(self.rates):
            with self.swapped(rate):
                found = validate(file.with_stem(f"{file.stem}-ema-{rate:g}") if i else file)
            columns |= {f"{column}_ema_{rate:g}" if i else column: value for column, value in found.items()}
        return columns

    @torch.no_grad()
    def _swap(self, average: list[Tensor]) -> None:
        for p, e in zip(self._weights, average, strict=True):
            kept = p.clone()
            p.copy_(e)
            e.copy_(kept)

    @torch.no_grad()
    def keep(self, rate: float) -> None:
        """Give the model the average of `rate` for good: the weights that a run ends with."""
        torch._foreach_copy_(self._weights, self._averages[self.rates.index(rate)])

    def state_dict(self) -> dict[str, Any]:
        """The averages by rate and name, and the number of updates."""
        averages = {str(r): dict(zip(self._names, e, strict=True)) for r, e in zip(self.rates, self._averages, strict=True)}
        return {"updates": self.updates, "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring the averages to a saved state; ValueError where its rates or names are others."""
        saved = state["averages"]
        if [str(r) for r in self.rates] != list(saved):
            raise ValueError(f"averages of the rates {list(saved)} were saved, expected {self.rates}")
        for rate, average in zip(self.rates, self._averages, strict=True):
            if list(saved[str(rate)]) != self._names:
                raise ValueError(f"the averages that were saved are of another model's parameters: {list(saved[str(rate)])[:3]} …")
            for name, e in zip(self._names, average, strict=True):
                e.copy_(saved[str(rate)][name])
        self.updates = state["updates"]
