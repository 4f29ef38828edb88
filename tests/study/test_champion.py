"""From candidates to the champion."""

import dataclasses

import pytest

from digitlab.base.statistics import mean_interval
from digitlab.config.compose import compose
from digitlab.config.types import Config, EvaluateOn
from digitlab.study.champion import (
    candidates,
    confirm_fits,
    final_fits,
    select_champion,
    summarise,
)
from digitlab.study.trials import TrialRow


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
    choice = select_champion(rows, confirmed({0: [0.900, 0.901, 0.902], 1: [0.950, 0.951, 0.952]}))
    assert choice.champion.number == 1
    assert choice.tied == [1]
    assert choice.intervals[0].mean == pytest.approx(0.901)
    assert choice.intervals[1].n == 3


def test_of_the_tied_the_cheapest_wins() -> None:
    rows = [row(0, flops=3e9), row(1, flops=1e9), row(2, flops=2e9), row(3, flops=1.0)]
    accuracies = {0: [0.95, 0.96], 1: [0.949, 0.959], 2: [0.951, 0.959], 3: [0.5, 0.51]}
    choice = select_champion(rows, confirmed(accuracies))
    assert choice.tied == [0, 1, 2]
    assert choice.champion.number == 1


def test_of_the_tied_and_equally_cheap_the_earlier_wins() -> None:
    rows = [row(5), row(2), row(7)]
    choice = select_champion(rows, confirmed({n: [0.9, 0.91] for n in (5, 2, 7)}))
    assert choice.champion.number == 2


def test_the_accuracy_that_made_a_trial_a_candidate_is_left_out() -> None:
    lucky, steady = row(0, value=1.0), row(1, value=0.5)
    accuracies = confirmed({0: [0.900, 0.901, 0.902], 1: [0.950, 0.951, 0.952]})
    choice = select_champion([lucky, steady], accuracies)
    assert choice.champion is steady
    for other in (0.0, 1.0):
        again = select_champion(
            [dataclasses.replace(r, value=other) for r in (lucky, steady)], accuracies
        )
        assert again.intervals == choice.intervals
        assert again.tied == choice.tied


def test_trials_whose_numbers_begin_alike_are_not_mixed_up() -> None:
    rows = [row(1), row(11), row(111)]
    accuracies = {1: [0.1, 0.11], 11: [0.5, 0.51], 111: [0.9, 0.91]}
    choice = select_champion(rows, confirmed(accuracies))
    assert choice.champion.number == 111
    assert [i.mean for i in choice.intervals.values()] == pytest.approx([0.105, 0.505, 0.905])


def test_a_single_candidate_is_the_champion_without_confirmation(config: Config) -> None:
    only = row(4)
    assert confirm_fits(config, [only]) == []
    choice = select_champion([only], {})
    assert choice.champion is only
    assert choice.intervals == {}
    assert choice.tied == [4]


def test_a_candidate_that_could_not_be_confirmed_does_not_win_over_one_that_was() -> None:
    rows = [row(0, value=0.99), row(1, value=0.98), row(2, value=0.97)]
    choice = select_champion(rows, confirmed({1: [0.90, 0.91], 2: [0.95, 0.96]}))
    assert choice.champion.number == 2


def test_candidates_are_confirmed_on_seeds_that_no_other_fit_has(config: Config) -> None:
    rows = [row(0), row(1)]
    jobs = confirm_fits(config, rows)
    finals = final_fits(config, rows[0])
    assert {(job.number, job.kind) for job in jobs} == {(0, "confirm"), (1, "confirm")}
    assert len(jobs) == 2 * 3
    seeds = {job.config.trainer.seed for job in jobs}
    tested = {job.config.trainer.seed for job in finals}
    assert len(seeds) == 3
    assert len(tested) == len(finals) == config.study.final_seeds
    assert not seeds & tested
    assert config.trainer.seed not in seeds | tested


def test_only_the_final_fits_see_the_test_images(config: Config) -> None:
    rows = [row(0, hidden=33), row(1)]
    for jobs, fold in (
        (confirm_fits(config, rows), EvaluateOn.validation),
        (final_fits(config, rows[0]), EvaluateOn.test),
    ):
        for job in jobs:
            assert job.config.data.evaluate_on is fold
            assert job.key == f"{job.number}/{job.config.trainer.seed}"
            assert job.config.model.hidden == {0: 33, 1: 17}[job.number]


def test_seeds_go_round_at_the_largest(config: Config) -> None:
    last = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, seed=2**31 - 1))
    seeds = [job.config.trainer.seed for job in confirm_fits(last, [row(0), row(1)])]
    assert seeds[:3] == [0, 1, 2]


def test_test_accuracy_is_the_mean_over_the_final_fits() -> None:
    values = [0.97, 0.98, 0.975]
    finals = {f"0/{seed}": {"test_accuracy": value} for seed, value in enumerate(values)}
    summary = summarise(select_champion([row(0)], {}), finals)
    assert summary["test_accuracy"] == dataclasses.asdict(mean_interval(values))
    assert summary["weights_of"] == "0/0"


def test_a_trial_of_unknown_cost_is_no_cheap_one() -> None:
    rows = [row(0, flops=2.0), dataclasses.replace(row(1), notes={})]
    choice = select_champion(rows, confirmed({0: [0.9, 0.91], 1: [0.9, 0.91]}))
    assert choice.champion.number == 0
