import itertools
import math

import pytest

from onetorch.generative import schedules


def test_shapes_by_hand() -> None:
    at = range(1, 9)
    assert [schedules.factor("linear", s, 8, warmup=3) for s in at] == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert [schedules.factor("cosine", s, 8, warmup=3) for s in at] == pytest.approx([1 / 3, 2 / 3, *cosine])
    assert [schedules.factor("constant", s, 8, warmup=2) for s in at] == [0.5, *[1.0] * 7]
    assert [schedules.factor("wsd", s, 8, decay=0.5) for s in at] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear"])
def test_the_floor_is_reached_just_after_the_last_step(kind: schedules.Kind) -> None:
    values = [schedules.factor(kind, s, 1000, warmup=10, floor=0.1) for s in range(1, 1002)]
    assert values[9] == pytest.approx(1.0)
    assert values[1000] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))
    assert min(values[10:]) >= 0.1


def test_a_warmup_longer_than_the_run_still_rises() -> None:
    assert [schedules.factor("cosine", s, 4, warmup=8) for s in range(1, 5)] == pytest.approx([0.125, 0.25, 0.375, 0.5])


def test_wrong_kind_is_named() -> None:
    with pytest.raises(ValueError, match="kind: expected one of wsd, cosine, linear, constant, got 'polynomial'"):
        schedules.factor("polynomial", 1, 2)  # type: ignore[arg-type]
