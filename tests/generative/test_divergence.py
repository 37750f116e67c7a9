import math

from onetorch.generative.divergence import Divergence
from onetorch.runs.errors import RunError


def steps_until_refused(losses: list[float]) -> int | None:
    watch = Divergence()
    for step, loss in enumerate(losses, 1):
        try:
            watch.check(loss, step, "")
        except RunError:
            return step
    return None


def test_a_loss_that_climbs_back_is_refused_and_one_that_wobbles_is_not() -> None:
    learning = [1.5 + 4 * math.exp(-t / 30) for t in range(200)]
    assert steps_until_refused(learning) is None
    assert steps_until_refused([x + 0.4 * (-1) ** t for t, x in enumerate(learning)]) is None
    assert steps_until_refused([*learning, 9.0, *learning[-50:]]) is None  # one bad batch
    # From 1.5, learnt from 5.5: it may rise by half of 4. After n steps at 5.5 the smoothed loss is 5.5 - 4 * 0.9^n > 3.5 from n = 7 on.
    assert steps_until_refused([*learning, *[5.5] * 20]) == 207


def test_one_that_never_learns_anything_and_explodes_is_refused() -> None:
    assert steps_until_refused([5.5, 5.6, 5.4, *[8.0] * 20]) == 3 + 8  # a quarter of 5.5 is 1.375: 2.5 (1 - 0.9^n) > 1.375 from n = 8 on
    assert steps_until_refused([-3.0] * 10 + [-2.9] * 10) is None  # densities have losses below zero


def test_it_goes_on_after_a_save() -> None:
    watch, other = Divergence(), Divergence()
    for t in range(20):
        watch.check(3.0 - 0.1 * t, t, "")
    other.load_state_dict(watch.state_dict())
    assert other == watch
