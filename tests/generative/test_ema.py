import copy

import pytest
import torch
from torch import nn

from onetorch.generative.ema import EMA


def test_the_average_is_the_recursion_by_hand() -> None:
    model = nn.Linear(2, 1)
    ema = EMA(model, (0.9, 0.2))
    with torch.no_grad():
        expected = {r: model.weight.double().clone() for r in ema.rates}
        for t in range(200):
            model.weight.copy_(torch.tensor([[0.01 * t, (-1.0) ** t]]))
            ema.update()
            for r, e in expected.items():
                rate = min(r, (1 + t) / (10 + t))
                e.mul_(rate).add_((1 - rate) * model.weight.double())
    own = model.weight.detach().clone()
    for r, e in expected.items():
        with ema.swapped(r):
            assert torch.allclose(model.weight.double(), e, atol=1e-5)
        assert torch.equal(model.weight, own)
    with pytest.raises(RuntimeError, match="inside"), ema.swapped(0.9):
        raise RuntimeError("inside")
    assert torch.equal(model.weight, own)  # given back also when something went wrong


def test_a_saved_average_goes_on_as_if_nothing_had_happened() -> None:
    model = nn.Linear(3, 2)
    ema = EMA(model, (0.99,))
    for _ in range(3):
        nn.init.normal_(model.weight)
        ema.update()
    saved = copy.deepcopy(ema.state_dict())
    other = EMA(model, (0.99,))
    other.load_state_dict(saved)
    for e in (ema, other):
        e.update()
    assert all(torch.equal(a, b) for a, b in zip(ema._averages[0], other._averages[0], strict=True))
    with pytest.raises(ValueError, match="expected"):
        EMA(model, (0.9,)).load_state_dict(saved)
    with pytest.raises(ValueError, match="another model"):
        EMA(nn.Linear(3, 2, bias=False), (0.99,)).load_state_dict(saved)


def test_keep_ends_with_the_average() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, (0.999,))
    nn.init.ones_(model.weight)
    ema.update()
    ema.keep(0.999)
    assert model.weight.item() == pytest.approx(0.9)


@pytest.mark.parametrize("rates", [(1.0,), (-0.1,), (0.9, 0.9)])
def test_wrong_rates_are_named(rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rates"):
        EMA(nn.Linear(1, 1), rates)
