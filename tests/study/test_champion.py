"""From candidates to the champion."""

import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from digitlab.base.choice import Choice, read_right
from digitlab.base.statistics import accuracy_interval
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.config.types import Config, EvaluateOn, Objective
from digitlab.study.champion import (
    Fit,
    Results,
    confirm_fits,
    describe_selection,
    final_fits,
    measure_fits,
    select_champion,
    summarise,
)
from digitlab.study.champion import candidates as best_candidates
from digitlab.study.champion import test_metrics as metrics_of
from digitlab.study.goal import Goal, TrialRow
from digitlab.study.selection import confirm_candidates


def row(
    number: int,
    value: float | None = 0.9,
    state: str = "finished",
    hidden: int | None = None,
    flops: float = 1e9,
) -> TrialRow:
    values = {"model.hidden": 16 + number if hidden is None else hidden}
    return TrialRow(number, state, value, values, {"metrics": {"training_flops": flops}})


def confirmed(accuracies: dict[int, list[float]]) -> Results:
    """What the jobs of a confirmation ended with, by trial number."""
    return {
        f"{number}/{seed}": fit(accuracy)
        for number, group in accuracies.items()
        for seed, accuracy in enumerate(group, start=1)
    }


def fit(accuracy: float) -> dict[str, Any]:
    """What is noted of a fit, measured on 10,000 images."""
    misread = list(range(round(10_000 * (1 - accuracy))))
    return {"val_accuracy": accuracy, "images": 10_000, "misread": misread}


@pytest.fixture(scope="module")
def config() -> Config:
    return compose("sweep", ["experiments=smoke", "study.confirm_fits=6"])[0].config


ACCURACY = Goal((Objective.val_accuracy,), {})


def candidates(
    rows: list[TrialRow], most: int, own: dict[str, Any] | None = None, goal: Goal = ACCURACY
) -> list[int]:
    return [one.number for one in best_candidates(rows, most, own, goal)]


def test_candidates_are_the_best_finished_trials_best_first() -> None:
    rows = [row(0, 0.91), row(1, 0.95), row(2, 0.93), row(3, 0.94)]
    assert candidates(rows, 3) == [1, 3, 2]


def test_of_equal_candidates_the_earlier_comes_first() -> None:
    assert candidates([row(2), row(0), row(1)], 2) == [0, 1]


def test_trials_that_did_not_finish_are_no_candidates() -> None:
    states = ["pruned", "failed", "running", "waiting"]
    rows = [row(number, 0.99, state) for number, state in enumerate(states)]
    assert candidates([*rows, row(9, 0.5), row(10, None)], 5) == [9]


def test_candidates_have_different_values() -> None:
    rows = [row(0, 0.95, hidden=32), row(1, 0.96, hidden=32), row(2, 0.90, hidden=64)]
    assert candidates(rows, 2) == [1, 2]


def test_there_are_no_candidates_where_nothing_finished() -> None:
    assert candidates([row(0, None, "failed")], 3) == []


def test_the_recipe_s_own_values_are_one_candidate_more_and_never_twice() -> None:
    rows = [row(0, 0.91), row(1, 0.95), row(2, 0.93), row(3, 0.94)]
    own = {"model.hidden": 16}
    assert candidates(rows, 2, own) == [1, 3, 0]
    assert candidates(rows, 4, own) == [1, 3, 2, 0]
    assert candidates(rows, 2, {"model.hidden": 99}) == [1, 3]
    assert candidates(rows, 1, own) == [1]  # there is no choice
    failed = [row(0, None, "failed"), *rows[1:]]
    assert candidates(failed, 2, own) == [1, 3]


SMALL = {Objective.training_flops: 3e9}


def test_candidates_miss_no_bound_if_one_of_them_does_not() -> None:
    rows = [row(0, 0.99, flops=9e9), row(1, 0.91, flops=1e9), row(2, 0.92, flops=3e9)]
    goal = Goal(ACCURACY.objectives, SMALL)
    assert candidates(rows, 2, rows[0].values, goal) == [2, 1]
    unmet = Goal(ACCURACY.objectives, {Objective.training_flops: 1})
    assert candidates(rows, 2, None, unmet) == [1]  # which comes nearest


def test_candidates_of_two_objectives_are_those_on_the_front() -> None:
    both = Goal((Objective.val_accuracy, Objective.training_flops), {})
    rows = [row(0, 0.90, flops=2e9), row(1, 0.95, flops=2e9), row(2, 0.91, flops=1e9)]
    assert candidates(rows, 3, rows[0].values, both) == [1, 2]
    front = [row(number, 0.9 + 0.01 * number, flops=number) for number in range(1, 10)]
    assert candidates(front, 3, None, both) == [9, 5, 1]  # they divide it evenly
    assert candidates(front, 1, None, both) == [9]
    bound = Goal(both.objectives, {Objective.training_flops: 0.1})
    assert candidates(front, 3, None, bound) == [1]


def test_with_a_cost_as_the_objective_the_least_costly_that_is_accurate_enough_is_chosen(
    config: Config,
) -> None:
    wanted = {"study.objectives": ["training_flops"], "study.require.val_accuracy": 0.9}
    config = with_values(config, wanted | {"study.pruner": "none"})
    rows = [row(0, flops=1e9), row(1, flops=2e9), row(2, flops=3e9)]
    found = {0: [0.89, 0.8901], 1: [0.93, 0.9301], 2: [0.99, 0.9901]}
    assert choose(rows, found, config).best == 1


def test_a_lone_candidate_is_confirmed_only_where_accuracy_is_required(config: Config) -> None:
    wanted = {"study.objectives": ["training_flops"], "study.require.val_accuracy": 0.9}
    assert confirm_fits(config, [row(1)], {}) == []
    config = with_values(config, wanted | {"study.pruner": "none"})
    assert [one.number for one in confirm_fits(config, [row(1)], {})] == [1]


def test_where_no_candidate_is_accurate_enough_the_next_one_is_tried(config: Config) -> None:
    """The least costly that pass are the lucky ones: the search for one goes on behind them."""
    wanted = {"study.objectives": ["training_flops"], "study.require.val_accuracy": 0.9}
    more = {"study.pruner": "none", "study.confirm_fits": 9}
    config = with_values(config, wanted | more)
    rows = [row(number, 0.95, flops=number) for number in (1, 2, 3, 4)]
    goal = Goal.of(config.study)
    store = SimpleNamespace(rows=lambda: rows, own=None, goal=goal)
    session = SimpleNamespace(config=config, store=store, stop=lambda: False)
    true = {1: 0.8, 2: 0.81, 3: 0.95, 4: 0.99}

    def run_fits(_: str, fits: list[Fit]) -> Results:
        return {one.key: fit(true[one.number] + one.seed / 1e4) for one in fits}

    first = best_candidates(rows, 2, None, goal)
    found, confirmed = confirm_candidates(session, first, run_fits)  # type: ignore[arg-type]
    assert [one.number for one in found] == [1, 2, 3]
    choice = select_champion(config, found, confirmed)
    assert choice is not None
    assert (choice.best, choice.is_settled) == (3, True)


def choose(rows: list[TrialRow], accuracies: dict[int, list[float]], config: Config) -> Choice:
    choice = select_champion(config, rows, confirmed(accuracies))
    assert choice is not None
    return choice


def test_the_accuracy_that_made_a_trial_a_candidate_is_left_out(config: Config) -> None:
    lucky, steady = row(0, value=1.0), row(1, value=0.5)
    accuracies = {0: [0.900, 0.901, 0.902], 1: [0.950, 0.951, 0.952]}
    assert choose([lucky, steady], accuracies, config).best == 1
    swapped = [dataclasses.replace(r, value=1.5 - r.value) for r in (lucky, steady)]
    assert choose(swapped, accuracies, config).best == 1


def test_trials_whose_numbers_begin_alike_are_not_mixed_up(config: Config) -> None:
    rows = [row(1), row(11), row(111)]
    accuracies = {1: [0.1, 0.11], 11: [0.5, 0.51], 111: [0.9, 0.91]}
    choice = choose(rows, accuracies, config)
    assert choice.best == 111
    assert [choice.interval(n).mean for n in (1, 11, 111)] == pytest.approx([0.105, 0.505, 0.905])


def test_a_single_candidate_is_not_confirmed(config: Config) -> None:
    assert confirm_fits(config, [row(4)], {}) == []
    assert select_champion(config, [row(4)], {}) is None


def test_a_candidate_that_could_not_be_confirmed_does_not_win(config: Config) -> None:
    rows = [row(0, value=0.99), row(1, value=0.98), row(2, value=0.97)]
    assert choose(rows, {1: [0.90, 0.91], 2: [0.95, 0.96]}, config).best == 2


def test_cost_is_that_of_training_and_an_unknown_one_is_high(config: Config) -> None:
    rows = [row(0, flops=2e9), row(1, flops=1e9), dataclasses.replace(row(2), notes={})]
    same = {number: [0.9, 0.9001] for number in range(3)}
    assert choose(rows, same, config).best == 1
    assert choose([rows[2], rows[0]], same, config).best == 0


def race(
    config: Config, rows: list[TrialRow], accuracies: Callable[[Fit], float]
) -> tuple[list[list[str]], Results]:
    """The rounds of a confirmation in which every fit finishes."""
    rounds, results = [], {}
    while fits := confirm_fits(config, rows, results):
        rounds.append([each.key for each in fits])
        results |= {each.key: fit(accuracies(each)) for each in fits}
    return rounds, results


def test_each_candidate_has_a_fit_and_then_those_that_are_undecided(config: Config) -> None:
    """Trial 2 is far behind: it is out as soon as two fits of another tell the spread."""
    levels = {0: 0.99, 1: 0.9895, 2: 0.9}
    rows = [row(number, level) for number, level in levels.items()]
    rounds, _ = race(config, rows, lambda each: levels[each.number] - 0.0005 * (each.seed % 2))
    assert rounds == [["0/1", "1/1", "2/1"], ["0/2", "1/2"], ["0/3"]]


def test_a_clear_case_stops_before_the_budget_is_spent(config: Config) -> None:
    levels = {0: 0.9, 1: 0.99}
    rows = [row(number, level) for number, level in levels.items()]
    rounds, results = race(config, rows, lambda each: levels[each.number])
    assert rounds == [["0/1", "1/1"], ["1/2", "0/2"]]
    choice = select_champion(config, rows, results)
    assert choice is not None
    assert (choice.best, choice.is_settled) == (1, True)


@pytest.mark.parametrize("budget", [0, 2, 3, 5])
def test_the_budget_is_never_exceeded(config: Config, budget: int) -> None:
    study = dataclasses.replace(config.study, confirm_fits=budget)
    rows = [row(0), row(1), row(2)]
    scatter = {1: 0.99, 2: 0.985, 3: 0.992}
    rounds, _ = race(
        dataclasses.replace(config, study=study), rows, lambda each: scatter[each.seed]
    )
    assert sum(map(len, rounds)) == budget


def test_a_fit_that_fails_counts_and_its_candidate_gets_no_other(config: Config) -> None:
    rows = [row(0), row(1), row(2)]
    results: Results = {"0/1": {"failed": "diverged"}, "1/1": fit(0.99), "2/1": fit(0.985)}
    assert [each.key for each in confirm_fits(config, rows, results)] == ["1/2", "2/2"]
    results |= {"1/2": fit(0.98), "2/2": fit(0.99)}
    assert len(confirm_fits(config, rows, results)) == 1  # of six


def test_candidates_are_confirmed_on_seeds_that_no_other_fit_has(config: Config) -> None:
    rows = [row(0), row(1)]
    scatter = {1: 0.99, 2: 0.985, 3: 0.992}
    rounds, _ = race(config, rows, lambda each: scatter[each.seed])
    seeds = {int(key.split("/")[1]) for each in rounds for key in each}
    tested = {job.config.trainer.seed for job in final_fits(config, rows[0])}
    measured = {job.config.trainer.seed for job in measure_fits(config, rows[0], rows[1])}
    assert seeds == {1, 2, 3}
    assert len(tested) == config.study.final_seeds
    assert len(measured) == config.study.measure_seeds
    assert not seeds & tested
    assert not measured & (seeds | tested)
    assert config.trainer.seed not in seeds | tested | measured


def test_the_champion_and_the_recipe_s_own_values_are_measured_alike(config: Config) -> None:
    champion, own = row(3), row(0)
    keys = [each.key for each in measure_fits(config, champion, own)]
    assert keys == ["3/2001", "0/2001", "3/2002", "0/2002"]
    assert [each.key for each in measure_fits(config, own, own)] == ["0/2001", "0/2002"]
    assert [each.key for each in measure_fits(config, champion, None)] == ["3/2001", "3/2002"]
    none = dataclasses.replace(config, study=dataclasses.replace(config.study, measure_seeds=0))
    assert measure_fits(none, champion, own) == []


def test_only_the_final_fits_see_the_test_images(config: Config) -> None:
    rows = [row(0, hidden=33), row(1)]
    for jobs, measured_on in (
        (confirm_fits(config, rows, {}), EvaluateOn.validation),
        (measure_fits(config, *rows), EvaluateOn.validation),
        (final_fits(config, rows[0]), EvaluateOn.test),
    ):
        for job in jobs:
            assert job.config.data.evaluate_on is measured_on
            assert job.key == f"{job.number}/{job.config.trainer.seed}"
            assert job.config.model.hidden == {0: 33, 1: 17}[job.number]


def test_seeds_go_round_at_the_largest(config: Config) -> None:
    last = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, seed=2**31 - 1))
    results: Results = {}
    for seed in (0, 1):
        fits = confirm_fits(last, [row(0), row(1)], results)
        assert [job.config.trainer.seed for job in fits] == [seed, seed]
        results |= {job.key: fit(0.9 + 0.01 * seed) for job in fits}


def test_test_accuracy_covers_seeds_and_images_and_one_seed_has_no_interval(
    config: Config,
) -> None:
    finals = {f"0/{seed}": fit(value) for seed, value in enumerate([0.97, 0.98, 0.975])}
    summary = summarise(row(0), describe_selection(config, None, None, {}), finals)
    tested = read_right(list(finals.values()))
    assert summary["test_accuracy"] == dataclasses.asdict(accuracy_interval([tested], 0))
    assert summary["weights_of"] == "0/0"
    assert all(error > 0 for error in summary["test_errors"])
    assert set(metrics_of(summary)) == {
        *("test_accuracy_mean", "test_accuracy_low", "test_accuracy_high"),
        "test_seeds",
    }
    alone = summarise(row(0), {}, {"0/0": finals["0/0"]})
    assert alone["test_accuracy"] == {"mean": 0.97, "low": None, "high": None, "n": 1}
    assert alone["test_errors"] is None
    assert metrics_of(alone) == {"test_accuracy_mean": 0.97, "test_seeds": 1}


def test_what_was_lucky_in_the_choice_is_no_part_of_what_it_was_worth(config: Config) -> None:
    rows = [row(0, value=0.992), row(1, value=0.5)]
    choice = choose(rows, {0: [0.99, 0.991], 1: [0.95, 0.951]}, config)
    measured = {
        "0/2001": fit(0.98),
        "0/2002": fit(0.981),
        "1/2001": fit(0.96),
        "1/2002": fit(0.961),
    }
    selection = describe_selection(config, choice, rows[1], measured)
    assert selection["measured"]["mean"] == pytest.approx(0.9805)
    assert selection["gain"]["value"] == pytest.approx(0.02)
    assert selection["gain"]["low"] > 0.01
    assert json.loads(json.dumps(selection))["val_accuracy"]["1"]["n"] == 2
    best = {key: one for key, one in measured.items() if key.startswith("0")}
    assert describe_selection(config, choice, rows[1], best)["gain"] is None
    assert describe_selection(config, choice, rows[0], best)["own"] == 0
    assert "measured" not in describe_selection(config, choice, rows[1], {})
