"""Statistics of a few runs against numbers worked out by hand, by enumeration of every resample, and by simulation."""

import itertools
import math

import numpy as np
import pytest

from onetorch.runs import stats


def every_resample(scores: list[float]) -> np.ndarray:
    """All n**n equally likely bootstrap samples of n scores."""
    return np.array(list(itertools.product(scores, repeat=len(scores))))


def quantile(values: np.ndarray, share: float) -> float:
    return float(np.sort(values)[math.floor(share * len(values))])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([7.0], 7.0), ([1.0, 2.0, 6.0], 3.0), ([0.0, 1.0, 2.0, 3.0], 1.5), ([9.0, 1.0, 2.0, 3.0, -50.0], 2.0), (list(range(8)) + [1e9], 4.0)],
)
def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end(scores, expected):
    # By hand: of nine values floor(9 / 4) = 2 go at each end; 2, 3, 4, 5, 6 stay.
    assert stats.iqm(scores) == pytest.approx(expected)


def test_the_interquartile_mean_reduces_the_axis_it_is_told():
    table = np.array([[0.0, 10.0], [1.0, 10.0], [2.0, 10.0], [300.0, 10.0]])
    assert stats.iqm(table, axis=0).tolist() == [1.5, 10.0]


def test_the_interval_of_a_mean_is_that_of_all_resamples():
    scores = [1.0, 2.0, 4.0, 8.0, 9.0]
    exact = every_resample(scores).mean(1)
    found = stats.estimate(scores, np.mean, samples=200_000)
    assert found.value == pytest.approx(4.8)
    assert found.n == 5
    # The distribution is discrete with steps of 0.2: sampling may land one step beside.
    assert found.low == pytest.approx(quantile(exact, 0.025), abs=0.21)
    assert found.high == pytest.approx(quantile(exact, 0.975), abs=0.21)


def test_the_interval_of_the_interquartile_mean_is_that_of_all_resamples():
    scores = [1.0, 2.0, 4.0, 8.0, 9.0]
    exact = np.sort(every_resample(scores), axis=1)[:, 1:4].mean(1)
    found = stats.estimate(scores, confidence=0.8, samples=100_000)
    assert found.value == pytest.approx(14 / 3)
    assert (found.low, found.high) == (pytest.approx(quantile(exact, 0.1), abs=0.34), pytest.approx(quantile(exact, 0.9), abs=0.34))


def test_tasks_are_resampled_each_for_itself():
    # Each task is constant, so no resample within a task changes anything; pooled resampling would give an interval from 0 to 10.
    found = stats.estimate([np.array([0.0, 0.0, 0.0]), np.array([10.0, 10.0, 10.0])], np.mean)
    assert (found.value, found.low, found.high, found.n) == (5.0, 5.0, 5.0, 3)


def test_the_same_seed_gives_the_same_interval_and_another_does_not():
    scores = np.random.default_rng(0).normal(size=7)
    assert stats.estimate(scores, seed=3) == stats.estimate(scores, seed=3)
    assert stats.estimate(scores, seed=3) != stats.estimate(scores, seed=4)


def test_a_single_seed_is_labelled_so():
    found = stats.estimate([3.0])
    assert (found.low, found.high, found.n) == (None, None, 1)
    assert str(found) == "3 (one seed: no interval)"
    assert "one seed" in str(stats.probability_of_improvement([1.0], [0.0]))
    assert np.isnan(stats.mean_curve(np.array([[1.0, 2.0]]))[1]).all()


def test_scores_that_are_no_numbers_are_refused():
    for bad in ([1.0, float("nan")], [float("inf")], [[1.0, 2.0], []]):
        with pytest.raises(ValueError, match="finite"):
            stats.estimate(bad)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    # 20 runs of a normal distribution: 95 % nominal. 300 repetitions have a standard error of 1.3 points.
    rng = np.random.default_rng(0)
    held = [(e := stats.estimate(rng.normal(size=20), np.mean, samples=400, seed=i)).low <= 0 <= e.high for i in range(300)]
    assert 0.89 <= np.mean(held) <= 0.98


def test_the_probability_of_improvement_counts_pairs():
    x, y = [1.0, 2.0, 3.0], [2.0, 2.0]
    # Pairs by hand: 1 loses twice, 2 ties twice, 3 wins twice: (0 + 0.5 * 2 + 2) / 6.
    assert stats.probability_of_improvement(x, y).value == pytest.approx(0.5)
    assert stats.probability_of_improvement([5.0, 6.0], [1.0, 2.0, 3.0]).value == 1.0
    assert stats.probability_of_improvement([5.0, 0.0], [1.0, 2.0, 3.0]).value == 0.5
    tasks = stats.probability_of_improvement([[5.0, 6.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, 1.0]])
    assert tasks.value == pytest.approx((1.0 + 0.25) / 2)


def test_the_probability_of_improvement_is_symmetric():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=6), rng.normal(size=9)
    there, back = stats.probability_of_improvement(x, y), stats.probability_of_improvement(y, x)
    assert there.value + back.value == pytest.approx(1)


def test_its_interval_is_that_of_all_resamples():
    x, y = [1.0, 4.0, 6.0], [2.0, 3.0, 5.0]
    every = [np.mean([(a > b) + (a == b) / 2 for a in s for b in t]) for s in every_resample(x) for t in every_resample(y)]
    found = stats.probability_of_improvement(x, y, samples=100_000)
    assert found.value == pytest.approx(5 / 9)  # 1 beats none, 4 two, 6 three
    assert found.low == pytest.approx(quantile(np.array(every), 0.025), abs=0.12)
    assert found.high == pytest.approx(quantile(np.array(every), 0.975), abs=0.12)


def test_a_performance_profile_is_the_share_above():
    scores = [np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 10.0, 0.0, 0.0])]
    profile, low, high = stats.performance_profile(scores, np.array([0.0, 2.0, 5.0]))
    assert profile.tolist() == [0.75, 0.5, 0.25]  # above 0: 4/4 and 2/4; above 2: 2/4 and 2/4; above 5: none and 2/4
    assert (low <= profile).all()
    assert (high >= profile).all()


def test_a_mean_curve_is_the_mean_at_each_point_within_its_interval():
    rng = np.random.default_rng(2)
    curves = rng.normal(size=(6, 40)).cumsum(1)
    mean, low, high = stats.mean_curve(curves)
    assert mean == pytest.approx(curves.mean(0))
    point = stats.estimate(curves[:, -1], np.mean, samples=20_000)
    assert (low[-1], high[-1]) == (pytest.approx(point.low, abs=0.4), pytest.approx(point.high, abs=0.4))


def test_a_difference_is_averaged_over_settings_that_are_alike():
    # The setting shifts everything by 100; the change itself by 1 and 3.
    blocks = [(np.array([0.0, 0.0]), np.array([1.0, 1.0])), (np.array([100.0, 100.0]), np.array([103.0, 103.0]))]
    found = stats.difference(blocks)
    assert (found.value, found.low, found.high, found.n) == (2.0, 2.0, 2.0, 2)
    single = [(np.array([0.0]), np.array([d])) for d in (1.0, 2.0, 3.0)]
    found = stats.difference(single)
    assert (found.value, found.n) == (2.0, 3)
    assert (found.low, found.high) == (1.0, 3.0)  # 1/27 of the resamples are all 1, as many all 3: both beyond 2.5 %
    assert stats.difference(single[:2]).low is None


def test_rank_correlation_with_ties_as_spearman_has_it():
    # Ranks by hand: x -> 1, 2.5, 2.5, 4; y -> 1, 2, 3, 4. Covariance of ranks 4.5, variances 4.5 and 5.
    found = stats.rank_correlation(np.array([1.0, 2.0, 2.0, 9.0]), np.array([1.0, 3.0, 4.0, 8.0]))
    assert found.value == pytest.approx(4.5 / math.sqrt(4.5 * 5.0))
    assert stats.rank_correlation(np.array([1.0, 2.0, 3.0, 4.0]), np.array([8.0, 4.0, 2.0, 1.0])).value == -1.0
    assert stats.rank_correlation(np.ones(5), np.arange(5.0)).value == 0.0
