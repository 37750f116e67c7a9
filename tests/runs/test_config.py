import dataclasses
import enum
import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest

from onetorch.runs import config as configs
from onetorch.runs.errors import UsageError


class Color(enum.Enum):
    RED = 1
    GREEN = "g"


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


@dataclasses.dataclass(frozen=True)
class Outer:
    seed: int = 0
    name: str = "none"
    color: Color = Color.RED
    where: Path | None = None
    limit: float = math.inf
    low: float = -math.inf
    mode: Literal["a", "b", 3] = "a"
    widths: tuple[int, ...] = (64, 64)
    pair: tuple[int, str] = (1, "x")
    many: tuple[Inner, ...] = ()
    flag: bool = True
    optim: Inner = Inner()


VALUES: list[dict[str, Any]] = [
    {},
    {"seed": -(2**70), "name": "", "color": Color.GREEN, "where": Path("a b/ü"), "limit": 1e-300, "mode": 3, "widths": (), "pair": (0, "none"), "flag": False},
    {"limit": -0.0, "low": 0.1 + 0.2, "name": "inf", "many": (Inner(), Inner(lr=2.0)), "optim": Inner(lr=1 / 3, betas=(0.0, math.inf))},
]


@pytest.mark.parametrize("values", VALUES)
def test_a_config_goes_through_json_without_loss(values: dict[str, Any]) -> None:
    config = Outer(**values)
    again = configs.from_json(json.loads(json.dumps(configs.to_json(config), allow_nan=False)), Outer)
    assert again == config
    assert repr(again) == repr(config)  # 0.0 == -0.0 and 1 == True, which is not without loss


def test_json_is_plain() -> None:
    assert configs.to_json(Outer(color=Color.GREEN, where=Path("x"))) == {
        "seed": 0,
        "name": "none",
        "color": "GREEN",
        "where": "x",
        "limit": "inf",
        "low": "-inf",
        "mode": "a",
        "widths": [64, 64],
        "pair": [1, "x"],
        "many": [],
        "flag": True,
        "optim": {"lr": 0.1, "betas": [0.9, 0.999]},
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1.0}, "config.seed"),
        ({"seed": True}, "config.seed"),
        ({"flag": 1}, "config.flag"),
        ({"limit": "1"}, "config.limit"),
        ({"limit": True}, "config.limit"),
        ({"mode": "3"}, "config.mode"),
        ({"color": "BLUE"}, "config.color"),
        ({"color": []}, "config.color"),
        ({"widths": [1, "2"]}, "config.widths[1]"),
        ({"pair": [1]}, "config.pair"),
        ({"where": 3}, "config.where"),
        ({"optim": 3}, "config.optim"),
        ({"optim": {"lr": 0.1}}, "betas"),
        ({"optim": {"lr": -1.0, "betas": [0.0, 0.0]}}, "lr must be above 0"),
        ({"sed": 1}, "did you mean 'seed'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        configs.from_json(configs.to_json(Outer()) | change, Outer)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1e6", int, 1_000_000),
        ("1_000", int, 1000),
        ("-3", int, -3),
        ("inf", float, math.inf),
        ("3", float, 3.0),
        ("[]", tuple[int, ...], ()),
        ("[64, 32]", tuple[int, ...], (64, 32)),
        ("64,32", tuple[int, ...], (64, 32)),
        ("(1,x)", tuple[int, str], (1, "x")),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("off", bool, False),
        ("Yes", bool, True),
        ("GREEN", Color, Color.GREEN),
        ("3", Literal["a", 3], 3),
        ("a/b", Path, Path("a/b")),
        ("", str, ""),
    ],
)
def test_values_from_the_command_line(text: str, kind: Any, value: Any) -> None:
    parsed = configs.parse(text, kind)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1.5", int),
        ("1e400", int),
        ("x", float),
        ("nan", float),
        ("[1,x]", tuple[int, ...]),
        ("[1]", tuple[int, int]),
        ("maybe", bool),
        ("red", Color),
        ("c", Literal["a", "b"]),
        ("", Path),
        ("", int),
        ("x", int | None),
    ],
)
def test_wrong_values_say_what_was_expected(text: str, kind: Any) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        configs.parse(text, kind)
    assert repr(text.strip("[]").split(",")[-1]) in str(caught.value) or text in str(caught.value)


def test_replace_by_dotted_names_keeps_the_checks() -> None:
    changed = configs.replace(Outer(), {"seed": 3, "optim.lr": 0.5})
    assert (changed.seed, changed.optim.lr, changed.optim.betas) == (3, 0.5, (0.9, 0.999))
    with pytest.raises(UsageError, match="lr must be above 0"):
        configs.replace(Outer(), {"optim.lr": -1.0})


def test_leaves_open_nested_configs() -> None:
    assert [name for name, _ in configs.leaves(Outer)][-3:] == ["flag", "optim.lr", "optim.betas"]


def test_what_json_cannot_hold_is_named() -> None:
    with pytest.raises(UsageError, match="cannot hold a set"):
        configs.to_json({1, 2})
