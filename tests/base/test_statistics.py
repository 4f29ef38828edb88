"""Intervals against textbooks and scipy."""

import dataclasses
import math
import statistics
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from digitlab.base.statistics import Interval, mean_interval, pooled_intervals

FRACTIONS = st.floats(0, 1)
GROUP = st.lists(FRACTIONS, min_size=1, max_size=8)

# Cushny and Peebles 1905, Student's own example: ten differences of sleep, here tenths of an hour
SLEEP = [0.12, 0.24, 0.13, 0.13, 0.00, 0.10, 0.18, 0.08, 0.46, 0.14]
# Dobson 1983, "PlantGrowth" of R: dried weights of plants, here in tens
PLANTS = [
    [0.417, 0.558, 0.518, 0.611, 0.450, 0.461, 0.517, 0.453, 0.533, 0.514],
    [0.481, 0.417, 0.441, 0.359, 0.587, 0.383, 0.603, 0.489, 0.432, 0.469],
    [0.631, 0.512, 0.554, 0.550, 0.537, 0.529, 0.492, 0.615, 0.580, 0.526],
]


# --- intervals ---


def test_student_s_own_example() -> None:
    interval = mean_interval(SLEEP)
    assert interval.mean == pytest.approx(0.158, abs=1e-12)
    assert interval.low == pytest.approx(0.07001142, abs=1e-8)  # R: t.test(paired = TRUE)
    assert interval.high == pytest.approx(0.24598858, abs=1e-8)
    assert interval.n == 10


def test_intervals_that_share_a_variance_are_those_of_the_analysis_of_variance() -> None:
    intervals = pooled_intervals(PLANTS)
    found = [(i.mean, i.low, i.high) for i in intervals]
    expected = [(0.5032, 0.463, 0.544), (0.4661, 0.426, 0.507), (0.5526, 0.512, 0.593)]
    np.testing.assert_allclose(found, expected, atol=6e-4)  # R: emmeans, three digits
    half = 2.051831 * 0.6233746 / 10 / math.sqrt(10)  # t(27) and R's residual standard error
    for interval in intervals:
        assert interval.high - interval.mean == pytest.approx(half, abs=1e-7)
        assert interval.mean - interval.low == pytest.approx(half, abs=1e-7)


@pytest.mark.parametrize(
    ("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)]
)
def test_the_half_width_is_the_table_s_quantile_times_the_standard_error(n: int, t: float) -> None:
    values = [0.5 + 0.001 * (-1) ** k for k in range(n)]
    interval = mean_interval(values)
    error = statistics.stdev(values) / math.sqrt(n)
    assert (interval.high - interval.mean) / error == pytest.approx(t, abs=5e-4)


@settings(deadline=None, max_examples=100)
@given(st.lists(FRACTIONS, min_size=2, max_size=12))
def test_an_interval_is_scipy_s_cut_at_0_and_1(values: list[float]) -> None:
    deviation = statistics.stdev(values)
    assume(deviation > 1e-9)
    mean = statistics.fmean(values)
    error = deviation / math.sqrt(len(values))
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(mean, abs=1e-12)
    assert interval.low == pytest.approx(max(low, 0), abs=1e-9)
    assert interval.high == pytest.approx(min(high, 1), abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(st.lists(GROUP, min_size=1, max_size=5))
@example([[0.0], [1.0]])
@example([[1.0, 1.0, 1.0]])
@example([[0.1, 0.1, 0.1], [0.7]])
def test_intervals_hold_their_means_and_stay_fractions(groups: list[list[float]]) -> None:
    intervals = pooled_intervals(groups)
    for group, interval in zip(groups, intervals, strict=True):
        assert 0 <= interval.low <= interval.mean <= interval.high <= 1
        assert interval.mean == pytest.approx(statistics.fmean(group), abs=1e-12)
        assert interval.n == len(group)


@settings(deadline=None, max_examples=50)
@given(GROUP)
def test_one_group_alone_is_a_single_interval(group: list[float]) -> None:
    assert pooled_intervals([group]) == [mean_interval(group)]


@settings(deadline=None, max_examples=50)
@given(st.lists(GROUP, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_groups_does_not_matter(groups: list[list[float]], chance: Any) -> None:
    order = list(range(len(groups)))
    chance.shuffle(order)
    shuffled = pooled_intervals([groups[i] for i in order])
    for i, interval in zip(order, shuffled, strict=True):
        of = pooled_intervals(groups)[i]
        assert dataclasses.astuple(interval) == pytest.approx(dataclasses.astuple(of), abs=1e-9)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([0.75]) == Interval(0.75, 0.75, 0.75, 1)
    assert pooled_intervals([[0.2], [0.4]]) == [
        Interval(0.2, 0.2, 0.2, 1),
        Interval(0.4, 0.4, 0.4, 1),
    ]


def test_one_value_beside_others_takes_its_spread_from_them() -> None:
    alone, beside = pooled_intervals([[0.5], SLEEP])
    of_ten = mean_interval(SLEEP)
    assert beside == of_ten
    assert alone.high - 0.5 == pytest.approx((of_ten.high - of_ten.mean) * math.sqrt(10), abs=1e-12)


def test_intervals_are_cut_at_0_and_1() -> None:
    assert mean_interval([0.0, 0.1]).low == 0
    assert mean_interval([0.9, 1.0]).high == 1


@pytest.mark.parametrize("groups", [[], [[]], [[0.5], []]])
def test_no_values_are_refused(groups: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="one value or more"):
        pooled_intervals(groups)


def test_no_values_have_no_mean() -> None:
    with pytest.raises(ValueError, match="one value or more"):
        mean_interval([])


def test_an_interval_covers_the_truth_95_times_in_100() -> None:
    chance = np.random.default_rng(0)
    intervals = [mean_interval(chance.normal(0.9, 0.01, 5).tolist()) for _ in range(4000)]
    covered = sum(i.low <= 0.9 <= i.high for i in intervals) / 4000
    assert covered == pytest.approx(0.95, abs=0.0104)  # three standard errors


def test_pooled_intervals_cover_the_truth_95_times_in_100_and_are_tighter() -> None:
    chance = np.random.default_rng(0)
    covered, narrower = 0, 0.0
    for _ in range(2000):
        groups = [chance.normal(mean, 0.01, 3).tolist() for mean in (0.90, 0.91, 0.93)]
        first = pooled_intervals(groups)[0]
        covered += first.low <= 0.90 <= first.high
        alone = mean_interval(groups[0])
        narrower += (alone.high - alone.low) - (first.high - first.low)
    assert covered / 2000 == pytest.approx(0.95, abs=0.0147)  # three standard errors
    assert narrower / 2000 > 0.01


@pytest.mark.parametrize(
    ("low", "high", "overlap"),
    [
        (0.3, 0.7, True),
        (0.45, 0.46, True),
        (0.5, 0.6, True),
        (0.1, 0.4, True),
        (0.51, 0.6, False),
        (0.1, 0.39, False),
    ],
)
def test_intervals_overlap_where_they_share_a_point(low: float, high: float, overlap: bool) -> None:
    one, two = Interval(0.45, 0.4, 0.5, 3), Interval((low + high) / 2, low, high, 3)
    assert one.overlaps(two) is overlap
    assert two.overlaps(one) is overlap


def test_an_interval_is_shown_in_per_cent_with_its_n() -> None:
    assert str(Interval(0.99534, 0.9948, 0.9958, 5)) == "99.53 % (99.48 to 99.58, n=5)"


def test_a_lone_value_is_shown_without_an_interval() -> None:
    assert str(mean_interval([0.971])) == "97.10 % (n=1)"
    assert str(pooled_intervals([[0.5], [0.4, 0.6]])[0]) == "50.00 % (n=1)"
