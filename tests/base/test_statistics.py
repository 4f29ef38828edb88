"""Intervals against textbooks and scipy, and the champion that is chosen by them."""

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
from digitlab.config.compose import compose
from digitlab.config.types import Config, EvaluateOn
from digitlab.study.champion import candidates, choose, confirm_jobs, final_jobs
from digitlab.study.champion import test_interval as interval_of_finals
from digitlab.study.trials import TrialRow

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


# --- the champion ---


def row(
    number: int,
    value: float | None = 0.9,
    state: str = "finished",
    hidden: int | None = None,
    flops: float = 1e9,
) -> TrialRow:
    values = {"model.hidden": 16 + number if hidden is None else hidden}
    return TrialRow(number, state, value, values, {"metrics": {"training_flops": flops}})


def confirmed(accuracies: dict[int, list[float]]) -> dict[str, dict[str, float]]:
    """What the jobs of a confirmation ended with, by trial number."""
    return {
        f"{number}/{seed}": {"val_accuracy": accuracy}
        for number, group in accuracies.items()
        for seed, accuracy in enumerate(group, start=1)
    }


@pytest.fixture(scope="module")
def config() -> Config:
    return compose("sweep", ["experiments=smoke", "study.confirm_seeds=3"])[0].config


def test_candidates_are_the_best_finished_trials_best_first() -> None:
    rows = [row(0, 0.91), row(1, 0.95), row(2, 0.93), row(3, 0.94)]
    assert [r.number for r in candidates(rows, 3)] == [1, 3, 2]


def test_of_equal_candidates_the_earlier_comes_first() -> None:
    assert [r.number for r in candidates([row(2), row(0), row(1)], 2)] == [0, 1]


def test_trials_that_did_not_finish_are_no_candidates() -> None:
    states = ["pruned", "failed", "running", "waiting"]
    rows = [row(number, 0.99, state) for number, state in enumerate(states)]
    assert candidates([*rows, row(9, 0.5), row(10, None)], 5) == [row(9, 0.5)]


def test_candidates_have_different_values() -> None:
    rows = [row(0, 0.95, hidden=32), row(1, 0.96, hidden=32), row(2, 0.90, hidden=64)]
    assert [r.number for r in candidates(rows, 2)] == [1, 2]


def test_there_are_no_candidates_where_nothing_finished() -> None:
    assert candidates([row(0, None, "failed")], 3) == []


def test_the_best_mean_on_new_seeds_wins_where_nothing_is_tied() -> None:
    rows = [row(0, flops=1.0), row(1, flops=9e9)]
    choice = choose(rows, confirmed({0: [0.900, 0.901, 0.902], 1: [0.950, 0.951, 0.952]}))
    assert choice.champion.number == 1
    assert choice.tied == [1]
    assert choice.intervals[0].mean == pytest.approx(0.901)
    assert choice.intervals[1].n == 3


def test_of_the_tied_the_cheapest_wins() -> None:
    rows = [row(0, flops=3e9), row(1, flops=1e9), row(2, flops=2e9), row(3, flops=1.0)]
    accuracies = {0: [0.95, 0.96], 1: [0.949, 0.959], 2: [0.951, 0.959], 3: [0.5, 0.51]}
    choice = choose(rows, confirmed(accuracies))
    assert choice.tied == [0, 1, 2]
    assert choice.champion.number == 1


def test_of_the_tied_and_equally_cheap_the_earlier_wins() -> None:
    rows = [row(5), row(2), row(7)]
    choice = choose(rows, confirmed({n: [0.9, 0.91] for n in (5, 2, 7)}))
    assert choice.champion.number == 2


def test_the_accuracy_that_made_a_trial_a_candidate_is_left_out() -> None:
    lucky, steady = row(0, value=1.0), row(1, value=0.5)
    accuracies = confirmed({0: [0.900, 0.901, 0.902], 1: [0.950, 0.951, 0.952]})
    choice = choose([lucky, steady], accuracies)
    assert choice.champion is steady
    for other in (0.0, 1.0):
        again = choose([dataclasses.replace(r, value=other) for r in (lucky, steady)], accuracies)
        assert again.intervals == choice.intervals
        assert again.tied == choice.tied


def test_trials_whose_numbers_begin_alike_are_not_mixed_up() -> None:
    rows = [row(1), row(11), row(111)]
    accuracies = {1: [0.1, 0.11], 11: [0.5, 0.51], 111: [0.9, 0.91]}
    choice = choose(rows, confirmed(accuracies))
    assert choice.champion.number == 111
    assert [i.mean for i in choice.intervals.values()] == pytest.approx([0.105, 0.505, 0.905])


def test_a_single_candidate_is_the_champion_without_confirmation(config: Config) -> None:
    only = row(4)
    assert confirm_jobs(config, [only]) == {}
    choice = choose([only], {})
    assert choice.champion is only
    assert choice.intervals == {}
    assert choice.tied == [4]


def test_a_candidate_that_could_not_be_confirmed_does_not_win_over_one_that_was() -> None:
    rows = [row(0, value=0.99), row(1, value=0.98), row(2, value=0.97)]
    choice = choose(rows, confirmed({1: [0.90, 0.91], 2: [0.95, 0.96]}))
    assert choice.champion.number == 2


def test_candidates_are_confirmed_on_seeds_that_no_other_fit_has(config: Config) -> None:
    rows = [row(0), row(1)]
    jobs = confirm_jobs(config, rows)
    finals = final_jobs(config, rows[0])
    assert {(job.number, job.kind) for job in jobs.values()} == {(0, "confirm"), (1, "confirm")}
    assert len(jobs) == 2 * 3
    seeds = {job.config.trainer.seed for job in jobs.values() if job.config}
    tested = {job.config.trainer.seed for job in finals.values() if job.config}
    assert len(seeds) == 3
    assert len(tested) == len(finals) == config.study.final_seeds
    assert not seeds & tested
    assert config.trainer.seed not in seeds | tested


def test_only_the_final_fits_see_the_test_images(config: Config) -> None:
    rows = [row(0, hidden=33), row(1)]
    for jobs, fold in (
        (confirm_jobs(config, rows), EvaluateOn.validation),
        (final_jobs(config, rows[0]), EvaluateOn.test),
    ):
        for key, job in jobs.items():
            assert job.config is not None
            assert job.config.data.evaluate_on is fold
            assert key == f"{job.number}/{job.config.trainer.seed}"
            assert job.config.model.hidden == {0: 33, 1: 17}[job.number]


def test_seeds_go_round_at_the_largest(config: Config) -> None:
    last = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, seed=2**31 - 1))
    seeds = [
        job.config.trainer.seed
        for job in confirm_jobs(last, [row(0), row(1)]).values()
        if job.config
    ]
    assert seeds[:3] == [0, 1, 2]


def test_test_accuracy_is_the_mean_over_the_final_fits() -> None:
    finals = {f"0/{seed}": {"test_accuracy": value} for seed, value in enumerate(SLEEP)}
    assert interval_of_finals(finals) == mean_interval(SLEEP)
