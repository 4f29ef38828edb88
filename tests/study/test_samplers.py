"""Optuna's samplers, seeded trial by trial, and the pruner of successive halving."""

from dataclasses import replace

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from studies import open_store

from digitlab.base.errors import UserError
from digitlab.study.samplers import HalvingPruner, ScreeningPruner, build_sampler, count_points

FOUR = ("learning_rate", "momentum", "warmup", "ema")


def study_of(*curves: list[float]) -> optuna.Study:
    """Trials with these accuracies at their rungs, all still running."""
    study = optuna.create_study(direction="maximize")
    for curve in curves:
        values = dict(enumerate(curve))
        study.add_trial(create_trial(state=TrialState.RUNNING, intermediate_values=values))
    return study


def pruned(brackets: int, *curves: list[float]) -> list[int]:
    study = study_of(*curves)
    pruner = HalvingPruner(brackets)
    return [trial.number for trial in study.trials if pruner.prune(study, trial)]


def test_the_best_third_at_a_rung_goes_on() -> None:
    accuracies = [0.1, 0.9, 0.3, 0.8, 0.5, 0.6]
    assert pruned(1, *([a] for a in accuracies)) == [0, 2, 4, 5]


def test_of_the_first_two_the_best_goes_on() -> None:
    assert pruned(1, [0.5]) == []
    assert pruned(1, [0.5], [0.4]) == [1]
    assert pruned(1, [0.5], [0.5]) == []  # a tie


def test_a_trial_is_compared_at_its_last_rung_alone() -> None:
    assert pruned(1, [0.9, 0.1], [0.1, 0.9], [0.5]) == [0, 2]


def test_brackets_compete_among_themselves_and_start_one_rung_later_each() -> None:
    # Trials 1 and 3 are of bracket 1, which does not prune at rung 0.
    assert pruned(2, [0.9], [0.1], [0.8], [0.2]) == [2]
    assert pruned(2, [0.9, 0.9], [0.1, 0.1], [0.95, 0.95], [0.2, 0.2]) == [0, 1]


def test_a_trial_before_its_first_rung_goes_on() -> None:
    assert pruned(1, [], [0.5]) == []


def screened(pruner: ScreeningPruner, *trials: FrozenTrial) -> list[int]:
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    return [trial.number for trial in study.trials if pruner.prune(study, trial)]


def trial_of(
    accuracy: float, state: TrialState = TrialState.RUNNING, **notes: object
) -> FrozenTrial:
    values, attributes = {0: accuracy}, {"result": notes}
    return create_trial(state=state, intermediate_values=values, user_attrs=attributes)


def test_the_first_trials_are_screened_whatever_their_accuracy() -> None:
    trials = [trial_of(accuracy) for accuracy in (0.9, 0.1, 0.8, 0.1)]
    assert screened(ScreeningPruner(2, True), *trials) == [0, 1]
    before = create_trial(state=TrialState.RUNNING)  # its first rung
    assert screened(ScreeningPruner(2, True), before) == []


def test_failed_trials_are_screened_trials_only_where_they_count() -> None:
    trials = [trial_of(0.5), trial_of(0.5, TrialState.FAIL), trial_of(0.5), trial_of(0.5)]
    assert screened(ScreeningPruner(2, True), *trials) == [0, 1]
    assert screened(ScreeningPruner(2, False), *trials) == [0, 1, 2]


def test_a_promoted_trial_is_never_pruned() -> None:
    trials = [trial_of(0.5), trial_of(0.5, promoted_from=0), trial_of(0.5)]
    assert screened(ScreeningPruner(3, True), *trials) == [0, 2]


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp"])
def test_values_depend_on_the_seed_and_the_number_of_the_trial(lab, sampler: str) -> None:
    store = open_store(lab, f"study.sampler={sampler}")

    def draw(number: int, seed: int = 0) -> float:
        config = replace(store.config, seed=seed)
        study = optuna.create_study(sampler=build_sampler(config, store.space, number))
        return study.ask({"x": FloatDistribution(0, 1)}).params["x"]

    values = [draw(0), draw(1), draw(2), draw(0, seed=1)]
    assert len(set(values)) == 4
    assert values == [draw(0), draw(1), draw(2), draw(0, seed=1)]


def test_a_grid_counts_its_points_and_takes_choices_only(lab) -> None:
    grid = ("model.hidden=choice(16,32,64)", "optim.learning_rate=choice(0.01,0.02)")
    store = open_store(lab, *grid, "study.sampler=grid")
    assert count_points(store.config, store.space) == 6
    with pytest.raises(UserError, match=r"optim.learning_rate is invalid: a grid takes choices"):
        open_store(lab, grid[0], "study.sampler=grid", "study.name=other")


def test_a_grid_that_is_too_large_to_be_listed_is_refused(lab) -> None:
    ten = "choice(1,2,3,4,5,6,7,8,9,10)"
    grid = [f"model.hidden={ten}", "model.pools=choice([1],[2])"]
    grid += [f"optim.{name}=choice({','.join(f'0.0{n}' for n in range(1, 10))})" for name in FOUR]
    with pytest.raises(UserError, match=r"of 131220 points is invalid: it must be .* 100000"):
        open_store(lab, *grid, "study.sampler=grid")


def test_a_grid_may_choose_among_options_but_takes_no_setting_that_only_some_have(lab) -> None:
    grid = ("model=choice(seed,convnet)", "optim.learning_rate=choice(0.01,0.02)")
    fixed = ("model.hidden=64", "study.sampler=grid")
    store = open_store(lab, *grid, *fixed)
    assert count_points(store.config, store.space) == 4
    drawn = [store.ask().values for _ in range(4)]
    assert {(values["model"], values["optim.learning_rate"]) for values in drawn} == {
        (model, rate) for model in ("seed", "convnet") for rate in (0.01, 0.02)
    }
    with pytest.raises(UserError, match=r"model.hidden is invalid: only model=convnet has it"):
        open_store(lab, *grid, "model.hidden=choice(8,16)", fixed[1], "study.name=other")
