import dataclasses
import sys
from pathlib import Path

import pytest

from onetorch.runs import algorithm
from onetorch.runs.errors import UsageError

IDEA = Path(__file__).with_name("idea.py")

RICH = '''"""A file with all that a Config may hold."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import a_module_that_is_nowhere as torch

WIDTH = 8 * 8
raise_if_run = torch.zeros(3)


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


@dataclass(frozen=True)
class Optim:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Config:
    seed: int = 0  # of everything
    width: int = WIDTH  # a constant of the module
    kind: Kind = Kind.ONE
    where: Path | None = None  # ünïcode
    most: float = 1.0
    mode: Literal["a", "b"] = "a"; other: int = 1  # two on a line
    optim: Optim = Optim()  # nested
    many: tuple[int, ...] = (1, 2)
    torch: int = 3  # a field with the name of an import


def build(config: Config) -> torch.nn.Module:
    raise RuntimeError


def train(config, run):
    raise RuntimeError


def evaluate(model: torch.nn.Module, config: Config, *, media: torch.Path = None, episodes: int = 20, best: bool = False) -> dict[str, torch.Tensor]:
    """What it earns.

    best: of the best checkpoint.
    """
    raise RuntimeError
'''


def write(tmp_path: Path, text: str, name: str = "mine.py") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_config_is_read_without_running_the_file(tmp_path: Path) -> None:
    found = algorithm.read(write(tmp_path, RICH))
    config = found.Config()
    assert config.width == 64
    assert config.torch == 3
    assert config.optim.betas == (0.9, 0.999)
    assert found.doc == "A file with all that a Config may hold."
    assert found.docs["seed"] == "of everything"
    assert found.docs["where"] == "ünïcode"
    assert found.docs["kind"] == ""
    assert found.options == {"episodes": (int, 20), "best": (bool, False)}
    assert found.evaluates == "What it earns.\n\nbest: of the best checkpoint."
    assert "a_module_that_is_nowhere" not in sys.modules


def test_new_defaults_are_written_so_that_they_read_back(tmp_path: Path) -> None:
    found = algorithm.read(write(tmp_path, RICH))
    Config = found.Config
    kind, optim = type(Config().kind), type(Config().optim)
    values = {"width": 7, "kind": kind.TWO, "where": Path("x y"), "most": float("-inf"), "mode": "b", "other": 2, "optim": optim(lr=1e-9), "many": (3,)}
    config = dataclasses.replace(Config(), **values)
    again = algorithm.read(write(tmp_path, algorithm.with_defaults(found, config, list(values)), "again.py"))
    assert repr(again.Config()) == repr(config)
    assert again.docs == found.docs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = (", "mine.py:1 is not valid Python"),
        ("x = 1\n", "it lacks Config, build, train, evaluate"),
        (RICH.replace("def train(", "def rain("), "it lacks train"),
        (RICH.replace("WIDTH = 8 * 8", "WIDTH = 8 / 0"), "mine.py:13: Config cannot be read: ZeroDivisionError"),
        (RICH.replace("seed: int", "seed: torch.dtype"), "a_module_that_is_nowhere"),
        (RICH.replace("seed: int", "seed: 'Nowhere'"), "Nowhere"),
        (RICH.replace("@dataclass(frozen=True)\nclass Config", "class Config"), "Config must be a dataclass"),
    ],
)
def test_a_file_that_is_no_algorithm_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        algorithm.read(write(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_import_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"mine\.py:11 does not import: ModuleNotFoundError"):
        algorithm.read(write(tmp_path, RICH)).load()


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, RICH)
    with pytest.raises(UsageError, match=r"did you mean 'mine\.py'"):
        algorithm.read(tmp_path / "mein.py")
    with pytest.raises(UsageError, match="did you mean 'ppo'"):
        algorithm.read("poo")


def test_the_idea_loads() -> None:
    found = algorithm.read(IDEA)
    module = found.load()
    assert dataclasses.asdict(module.Config()) == dataclasses.asdict(found.Config())
    assert list(found.options) == ["batches"]
