"""Stopping a run early when it diverges, with the reason."""

from dataclasses import asdict, dataclass
from typing import Any

from onetorch.runs.errors import RunError

MEMORY = 0.9  # of the smoothed loss: about the last ten steps


@dataclass
class Divergence:
    """Watches a training loss. `state_dict` and `load_state_dict` make it fit for a run's State.

    The smoothed loss may rise above its lowest value by half of what it had fallen from its first one, and always by a quarter of the first one's size.
    """

    first: float | None = None
    smooth: float = 0.0
    lowest: float = 0.0

    def check(self, loss: float, step: int, cure: str) -> None:
        """Take in the loss of a step; RunError once the run has lost half of what it had learnt. `cure` says what to change."""
        if self.first is None:
            self.first = self.smooth = self.lowest = loss
            return
        self.smooth += (1 - MEMORY) * (loss - self.smooth)
        self.lowest = min(self.lowest, self.smooth)
        if self.smooth > self.lowest + max(self.first - self.lowest, abs(self.first) / 2) / 2:
            raise RunError(
                f"the run diverges: in step {step} the loss (smoothed over ten steps) is {self.smooth:.4g}, after {self.first:.4g} at first "
                f"and {self.lowest:.4g} at best; {cure}"
            )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
