"""Recipes: named configs, with what each is expected to reach. Importing them does not import torch.

A recipe is a function from an algorithm's `Config` class to a config:

    @recipe("ppo", reaches="mean return 475 of 500 within 60 s on one core")
    def ppo_cartpole(Config):
        \"\"\"PPO on CartPole-v1.\"\"\"
        return Config(env="CartPole-v1")

Called without the class, `ppo_cartpole()` imports the algorithm and returns its real config. Every algorithm is also a recipe under its own name.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from onetorch.runs import algorithm
from onetorch.runs.config import nearest
from onetorch.runs.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named config of an algorithm and what it is expected to reach."""

    name: str
    algorithm: str  # the name of one of onetorch's algorithm files
    reaches: str  # metric, value and budget in words, as measured; empty where nobody has measured
    doc: str
    make: Callable[[Any], Any]

    def __call__(self, Config: Any = None) -> Any:
        return self.make(Config or algorithm.read(self.algorithm).load().Config)


def recipe(of: str, *, reaches: str) -> Callable[[Callable[[Any], Any]], Recipe]:
    """Make a recipe of a function; its name is the function's with hyphens, its doc the first line of the docstring."""

    def decorate(make: Callable[[Any], Any]) -> Recipe:
        return Recipe(make.__name__.replace("_", "-"), of, reaches, (make.__doc__ or "").strip().split("\n")[0], make)

    return decorate


def known() -> dict[str, Recipe]:
    """Every recipe by name: the algorithms under their own names first."""
    named: dict[str, Recipe] = {}
    for part in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{part.name}")
        named |= {r.name: r for r in vars(module).values() if isinstance(r, Recipe)}
    files = algorithm.builtin()
    plain = {name: Recipe(name, name, "", algorithm.headline(path), lambda Config: Config()) for name, path in files.items() if name not in named}
    order = list(files)
    return dict(sorted((plain | named).items(), key=lambda item: (order.index(item[1].algorithm), item[0])))


def find(name: str) -> Recipe:
    """The recipe called `name`; UsageError names the nearest."""
    recipes = known()
    if name not in recipes:
        raise UsageError(f"there is no recipe {name!r}{nearest(name, recipes)}; `onetorch list` shows them")
    return recipes[name]
