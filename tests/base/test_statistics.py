"""Intervals against textbooks and scipy."""

import math
import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from digitlab.base.statistics import (
    Difference,
    Interval,
    accuracy_interval,
    estimate,
    mean_interval,
)

FRACTIONS = st.floats(0, 1)

# Cushny and Peebles 1905, Student's own example: ten differences of sleep, here tenths of an hour
SLEEP = [0.12, 0.24, 0.13, 0.13, 0.00, 0.10, 0.18, 0.08, 0.46, 0.14]

# --- intervals ---


def test_student_s_own_example() -> None:
    interval = mean_interval(SLEEP)
    assert interval.mean == pytest.approx(0.158, abs=1e-12)
    assert interval.low == pytest.approx(0.07001142, abs=1e-8)  # R: t.test(paired = TRUE)
    assert interval.high == pytest.approx(0.24598858, abs=1e-8)
    assert interval.n == 10


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
@given(st.lists(FRACTIONS, min_size=2, max_size=8))
def test_an_interval_holds_its_mean_and_stays_fractions(values: list[float]) -> None:
    interval = mean_interval(values)
    assert interval.low is not None
    assert interval.high is not None
    assert 0 <= interval.low <= interval.mean + 1e-12
    assert interval.mean - 1e-12 <= interval.high <= 1
    assert interval.n == len(values)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([0.75]) == Interval(0.75, None, None, 1)


def test_intervals_are_cut_at_0_and_1() -> None:
    assert mean_interval([0.0, 0.1]).low == 0
    assert mean_interval([0.9, 1.0]).high == 1


def test_no_values_have_no_mean() -> None:
    with pytest.raises(ValueError, match="one value or more"):
        mean_interval([])


def test_an_interval_covers_the_truth_95_times_in_100() -> None:
    chance = np.random.default_rng(0)
    intervals = [mean_interval(chance.normal(0.9, 0.01, 5).tolist()) for _ in range(4000)]
    covered = sum(i.low <= 0.9 <= i.high for i in intervals) / 4000
    assert covered == pytest.approx(0.95, abs=0.0104)  # three standard errors


def test_an_interval_is_shown_in_per_cent_with_its_n() -> None:
    assert str(Interval(0.99534, 0.9948, 0.9958, 5)) == "99.53 % (99.48 to 99.58, n=5)"


def test_a_lone_value_is_shown_without_an_interval() -> None:
    assert str(mean_interval([0.971])) == "97.10 % (n=1)"


def test_a_difference_is_shown_in_points_with_its_sign() -> None:
    assert str(Difference(0.0012, 0.0005, 0.0019)) == "+0.12 points (0.05 to 0.19)"
    assert str(Difference(-0.0001, None, None)) == "-0.01 points (n=1)"


# --- fits on the same images ---


def fits(chance: np.random.Generator, right: list[float], n: int) -> np.ndarray:
    """Fits of one configuration, which read each image right with its own probability."""
    return chance.random((n, len(right))) < np.array(right)


def test_the_variance_is_that_of_the_two_way_table() -> None:
    """Against sums over the table by hand, as in a textbook's analysis of variance."""
    chance = np.random.default_rng(0)
    groups = [fits(chance, [0.9, 0.5, 0.99, 0.2] * 50, n) for n in (3, 4)]
    found = estimate(groups, 0, 1)
    assert found is not None
    images = 200
    between = residual = 0.0
    for group in groups:
        table = group.astype(float)
        rows, columns = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
        between += float(((rows - table.mean()) ** 2).sum())
        residual += float(((table - rows - columns + table.mean()) ** 2).sum())
    weight, freedom = 1 / 3 + 1 / 4, 2 + 3
    spread = weight * between / freedom
    explained = weight * residual / (freedom * (images - 1)) / images
    over = np.var(groups[0].mean(0) - groups[1].mean(0), ddof=1) / images
    assert found.value == pytest.approx(groups[0].mean() - groups[1].mean())
    assert found.over_seeds == pytest.approx(max(spread, 0.8 * explained))
    assert found.over_images == pytest.approx(max(0, over - explained))
    assert found.error**2 == pytest.approx(found.over_seeds + found.over_images)


def test_single_fits_say_nothing_of_the_spread() -> None:
    alone = np.ones((1, 20), bool)
    assert estimate([alone, alone], 0, 1) is None
    assert accuracy_interval([alone], 0) == Interval(1.0, None, None, 1)
    # Beside others it is compared, and has no interval of its own.
    more = np.ones((3, 20), bool)
    assert estimate([alone, more], 0, 1) is not None
    assert accuracy_interval([alone, more], 0).low is None


def test_images_that_are_all_read_right_leave_room_for_error() -> None:
    perfect = np.ones((3, 1000), bool)
    interval = accuracy_interval([perfect], 0)
    low = scipy.stats.binomtest(1000, 1000).proportion_ci(0.95, "wilson").low
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(1))
    found = estimate([perfect, perfect], 0, 1)
    assert found is not None
    assert found.error > 0


def test_an_accuracy_of_fits_that_agree_has_wilson_s_interval() -> None:
    """Seeds that all read the same add nothing: as one fit on that many images."""
    once = np.arange(1000) >= 7
    interval = accuracy_interval([np.array([once] * 4)], 0)
    wilson = scipy.stats.binomtest(993, 1000).proportion_ci(0.95, "wilson")
    assert interval.low == pytest.approx(wilson.low, abs=2e-4)
    assert interval.high == pytest.approx(wilson.high, abs=2e-4)


def draw(chance: np.random.Generator, n: int, groups: int, spread: float) -> list[np.ndarray]:
    """Fits as they were measured: 0.67 % errors, 0.05 points over seeds, on 10,000 new images.

    Few images are hard; a fit misreads one where its own luck and the image's difficulty add up.

    Args:
        spread: of what a seed adds for all images at once.
    """
    hard = chance.binomial(10_000, 0.04)
    difficulty = chance.normal(size=hard)
    made = []
    for _ in range(groups):
        right = np.ones((n, 10_000), bool)
        own = np.sqrt(0.9) * difficulty + np.sqrt(0.1) * chance.normal(size=hard)
        luck = chance.normal(size=(n, hard)) + spread * chance.normal(size=(n, 1))
        right[:, :hard] = own + luck > -1.37  # 16.7 % of the hard ones are misread
        made.append(right)
    return made


@pytest.mark.long
@pytest.mark.parametrize("spread", [0.0, 0.06], ids=["images alone", "seeds as a whole, too"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_intervals_cover_the_truth_93_to_97_times_in_100(n: int, spread: float) -> None:
    chance = np.random.default_rng(n)
    draws = 2000
    truth = 1 - 0.04 * scipy.stats.norm.cdf(-1.37 / math.sqrt(2 + spread**2))
    differences = upper = accuracies = 0
    for _ in range(draws):
        groups = draw(chance, n, 2, spread)
        found = estimate(groups, 0, 1)
        assert found is not None
        differences += abs(found.value) <= found.reach(0.975)
        upper += found.value + found.reach(0.95) >= 0
        interval = accuracy_interval(groups[:1], 0)
        assert interval.low is not None
        assert interval.high is not None
        accuracies += interval.low <= truth <= interval.high
    for covered in (differences, accuracies):
        assert 0.93 <= covered / draws <= 0.97
    assert 0.93 <= upper / draws <= 0.98  # of a bound, which is not shown, but decides
