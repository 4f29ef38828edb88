"""Which trials are best: of one objective or two, with bounds or without."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna import create_study
from optuna.trial import create_trial

from digitlab.config.compose import compose
from digitlab.config.types import Objective
from digitlab.study.goal import Goal, TrialRow

ACCURACY, SIZE = Objective.val_accuracy, Objective.model_parameters
BOTH = Goal((ACCURACY, SIZE), {})


NOT_PRUNED = "study.pruner=none"


def row(number: int, accuracy: float | None, size: int = 1, state: str = "finished") -> TrialRow:
    return TrialRow(number, state, accuracy, {}, {"metrics": {"model_parameters": size}})


def numbers(rows: list[TrialRow]) -> list[int]:
    return [one.number for one in rows]


def test_the_most_accurate_comes_first_and_of_equal_ones_the_earlier() -> None:
    rows = [row(0, 0.5), row(1, 0.9), row(2, 0.9), row(3, None), row(4, 0.99, state="pruned")]
    assert numbers(Goal((ACCURACY,), {}).best_first(rows)) == [1, 2, 0]
    assert numbers(Goal((ACCURACY,), {}).best_first(rows, "pruned")) == [4]


def test_the_smallest_that_is_accurate_enough_comes_first_then_what_misses_least() -> None:
    rows = [row(0, 0.2, 1), row(1, 0.9, 70), row(2, 0.85, 60), row(3, 0.7, 10)]
    assert numbers(Goal((SIZE,), {ACCURACY: 0.85}).best_first(rows)) == [2, 1, 3, 0]


def test_a_bound_on_a_cost_excludes_the_most_accurate() -> None:
    rows = [row(0, 0.99, 5001), row(1, 0.9, 5000), TrialRow(2, "finished", 1.0, {}, {})]
    goal = Goal((ACCURACY,), {SIZE: 5000})
    assert numbers(goal.best_first(rows)) == [1, 0, 2]
    assert [goal.meets(one) for one in rows] == [False, True, False]
    assert goal.violations(rows[0]) == {"model_parameters": pytest.approx(1 / 5000)}


def test_of_two_objectives_the_front_comes_first_most_accurate_first() -> None:
    rows = [row(0, 0.9, 50), row(1, 0.95, 60), row(2, 0.94, 70), row(3, 0.8, 10), row(4, 0.8, 10)]
    assert numbers(BOTH.front(rows)) == [0, 1, 3, 4]
    turned = compose("sweep", ["study.objectives=[model_parameters,val_accuracy]", NOT_PRUNED])
    assert Goal.of(turned[0].config.study) == BOTH  # their order is none of importance
    assert numbers(BOTH.best_first(rows)) == [1, 0, 3, 4, 2]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_front_is_optuna_s(points: list[tuple[int, int]]) -> None:
    rows = [row(number, accuracy / 9, size) for number, (accuracy, size) in enumerate(points)]
    study = create_study(directions=BOTH.directions)
    study.add_trials([create_trial(values=BOTH.values(one)) for one in rows])
    assert numbers(BOTH.front(rows)) == [trial.number for trial in study.best_trials]


def test_a_trial_is_described_with_the_cost_that_is_searched_for() -> None:
    assert Goal((ACCURACY,), {}).describe(row(0, 0.5, 9)) == "50.00%"
    assert BOTH.describe(row(0, 0.5, 1234)) == "50.00%, 1,234 parameters"
    small = Goal((Objective.training_flops,), {})
    assert small.describe(row(0, 0.5)) == "50.00%, inf operations"


def test_what_is_searched_for_is_said_in_words() -> None:
    assert Goal((ACCURACY,), {SIZE: 5000}).aim() == "high val_accuracy, model_parameters <= 5000"
    assert BOTH.aim() == "high val_accuracy and low model_parameters"
    assert Goal((SIZE,), {ACCURACY: 0.99}).aim() == "low model_parameters, val_accuracy >= 0.99"
