"""onetorch: create, run and share optimized PyTorch models.

>>> import onetorch
>>> from onetorch.rl import ppo
>>> with onetorch.Run("runs/mine", ppo.Config(seed=1)) as run:  # doctest: +SKIP
...     model = ppo.train(run.config, run)
>>> model = onetorch.load("runs/mine")  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onetorch.runs.run import Run
    from onetorch.share.load import load

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load"]

_HOMES = {"Run": "onetorch.runs.run", "load": "onetorch.share.load"}


def __getattr__(name: str) -> Any:
    # Importing torch takes a second: it waits until something needs it.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'onetorch' has no attribute {name!r}")
