import json
import math
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from onetorch.runs import state
from onetorch.runs.errors import CheckpointError, RunError

VALUES: list[Any] = [
    None,
    True,
    0,
    -(2**100),
    "text \ud800 ü",
    0.1,
    -0.0,
    math.inf,
    -math.inf,
    (1, (2.5, "x"), []),
    [1, [2, {"a": (3,)}]],
    {"a": 1, "b": {"c": [None]}},
    {1: "int", "1": "str", "$tensor": "not one"},
    {"$float": "x"},
    {"$dict": [1]},
    {},
    np.float32(1.1),
    np.int64(-7),
    np.bool_(True),
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.array(2.5),
    np.zeros((0, 3), dtype=np.uint32),
    np.broadcast_to(np.arange(3.0), (2, 3)),  # read-only and not contiguous
    torch.arange(6).reshape(2, 3).t(),
    torch.tensor(1.5, dtype=torch.bfloat16),
    torch.tensor([True, False]),
    torch.zeros(0, 4),
    torch.tensor([1 + 2j]),
    torch.tensor([1, 65535], dtype=torch.uint16),
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray | np.generic):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and repr(a) == repr(b)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: repr(v)[:30])
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(state.pack(value, "x", tensors), allow_nan=False))
    assert same(value, state.unpack(tree, tensors))


@pytest.mark.parametrize("value", [object(), {1.5: 2}, np.array(["a"]), np.array([object()]), {1, 2}, b"bytes", np.datetime64("2020-01-01"), torch.float32])
def test_what_cannot_be_saved_is_named_with_its_place(value: Any) -> None:
    with pytest.raises(RunError, match=r"state x\.deep"):
        state.pack({"deep": value}, "x", {})


def test_names_that_spell_the_same_do_not_collide() -> None:
    value = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "c": {1: torch.tensor(3), "1": torch.tensor(4)}}
    tensors: dict[str, torch.Tensor] = {}
    assert same(value, state.unpack(state.pack(value, "x", tensors), tensors))
    assert len(tensors) == 4


class Extra(nn.Module):
    """A module with a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def set_extra_state(self, value: dict[str, Any]) -> None:
        self.seen = value["seen"]


@dataclass
class Everything:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    extra: Extra
    tensor: torch.Tensor
    array: np.ndarray
    torch_rng: torch.Generator
    numpy_rng: np.random.Generator
    python_rng: random.Random
    recent: list[float] = field(default_factory=list)
    nested: dict[str, Any] = field(default_factory=dict)
    pair: tuple[Any, ...] = ()
    iteration: int = 0


def everything(seed: int, steps: int) -> Everything:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[2].weight = nn.Parameter(model[0].weight.detach().t().contiguous())
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=0.01, betas=(0.8, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    made = Everything(
        model,
        optimizer,
        schedule,
        Extra(),
        torch.zeros(3),
        np.zeros(2),
        torch.Generator().manual_seed(seed),
        np.random.default_rng(seed),
        random.Random(seed),
        nested={"tensor": torch.zeros(2), "count": 0, "generators": [np.random.Generator(np.random.MT19937(seed))]},
        pair=(torch.zeros(1), 0),
    )
    for _ in range(steps):
        advance(made)
    return made


def advance(s: Everything) -> list[float]:
    """A step that draws from every generator and changes every field; returns all that a continuation must repeat."""
    x = torch.randn(5, 3, generator=s.torch_rng) + torch.randn(5, 3) + random.random() + np.random.rand()
    loss = s.model(x).square().mean()
    s.optimizer.zero_grad()
    loss.backward()
    s.optimizer.step()
    s.schedule.step()
    s.extra.seen += 1
    s.tensor += loss.detach()
    s.array += s.numpy_rng.standard_normal()
    s.recent.append(s.python_rng.random())
    s.nested["tensor"] += s.nested["generators"][0].standard_normal()
    s.nested["count"] += 1
    s.pair = (s.pair[0] + 1, s.pair[1] + 1)
    s.iteration += 1
    numbers = [loss.item(), *s.tensor.tolist(), *s.array.tolist(), s.recent[-1], *s.nested["tensor"].tolist(), s.optimizer.param_groups[0]["lr"]]
    return [*numbers, s.nested["count"], s.pair[0].item(), s.pair[1], s.iteration, s.extra.seen, float(torch.randn(()))]


def through_json(s: Everything) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    tree, model, others = state.pack_state(s)
    clone = lambda tensors: {k: v.clone() for k, v in tensors.items()}  # noqa: E731
    return json.loads(json.dumps(tree, allow_nan=False)), clone(model), clone(others)


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    first = everything(1, 3)
    packed = through_json(first)
    expected = [advance(first) for _ in range(3)]
    other = everything(2, 5)
    kept = (other.tensor, other.array, other.recent, other.nested, other.nested["tensor"])
    state.restore_state(other, *packed)
    assert [advance(other) for _ in range(3)] == expected
    assert all(a is b for a, b in zip(kept, (other.tensor, other.array, other.recent, other.nested, other.nested["tensor"]), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), other.model.state_dict().values(), strict=True))


def test_weights_keep_their_own_names() -> None:
    _, model, _ = state.pack_state(everything(0, 1))
    assert list(model)[:2] == ["0.weight", "0.bias"]


@dataclass
class Small:
    model: nn.Module
    count: Any = 0


def test_other_code_is_named() -> None:
    packed = state.pack_state(Small(nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"written by other code.*'count', 'model'.*'array'"):
        state.restore_state(everything(0, 0), *packed)
    with pytest.raises(CheckpointError, match=r"does not fit the algorithm: state model: .*size mismatch"):
        state.restore_state(Small(nn.Linear(3, 2)), *packed)


@pytest.mark.parametrize(
    "tree",
    [None, {}, {"fields": []}, {"fields": {"model": None, "count": 0}}, {"fields": {"model": {"$state_dict": {}}, "count": {"$tensor": "x"}}}],
)
def test_a_forged_tree_is_an_error_of_ours(tree: Any) -> None:
    with pytest.raises(CheckpointError):
        state.restore_state(Small(nn.Linear(2, 2)), tree, {}, {})


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (torch.tensor([1.0, math.nan]), "count"),
        (torch.tensor([1.0, math.nan], dtype=torch.bfloat16), "count"),
        (torch.tensor([complex(0, math.nan)]), "count"),
        (np.array([math.nan]), "count"),
        ({"a": [0.0, (math.nan,)]}, "state.fields.count.a.1.0"),
    ],
)
def test_every_nan_is_found(value: Any, place: str) -> None:
    assert state.find_nan(*state.pack_state(Small(nn.Linear(2, 2), value))) == place


def test_infinity_and_integers_are_no_nan() -> None:
    value = [math.inf, torch.tensor([-math.inf]), torch.tensor([1]), torch.zeros(0), OrderedDict(a=torch.tensor([True]))]
    assert state.find_nan(*state.pack_state(Small(nn.Linear(2, 2), value))) is None
