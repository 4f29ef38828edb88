"""The trials of a study: one suite for sqlite and for a real PostgreSQL server."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from studies import open_store

from digitlab.base import faults
from digitlab.base.errors import UserError
from digitlab.base.invocation import CALLER
from digitlab.study.goal import TrialRow
from digitlab.study.trials import TrialStore, load_study, twin

Open = Callable[..., TrialStore]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.cluster)])
def open_again(
    request: pytest.FixtureRequest, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Open]:
    """Open the same study anew, as the next driver does."""
    address = None
    if request.param == "postgresql":
        postgres = request.getfixturevalue("postgres")
        address = postgres.create()
        monkeypatch.setenv("PGPASSWORD", postgres.password)
    opened: list[TrialStore] = []

    def open_again(*overrides: str) -> TrialStore:
        opened.append(open_store(lab, *overrides, address=address))
        return opened[-1]

    yield open_again
    for store in opened:
        store.storage.engine.dispose()


def finish(store: TrialStore, accuracy: float = 0.5) -> int:
    number = store.ask().number
    store.tell(number, "finished", accuracy, {"metrics": {"val_accuracy": accuracy}})
    return number


def test_what_is_written_is_read_by_the_next_driver(open_again: Open) -> None:
    store = open_again()
    assert [finish(store, 0.1 * n) for n in range(3)] == [0, 1, 2]
    pruned = store.ask()
    store.report(pruned.number, 0, 0.25)
    store.tell(pruned.number, "pruned", 0.25, {"metrics": {}})
    store.tell(store.ask().number, "failed", None, {"reason": "it raised"})
    store.ask()
    assert open_again().rows() == store.rows()
    assert [row.state for row in store.rows()] == [*["finished"] * 3, "pruned", "failed", "running"]
    assert store.rows()[3].value == 0.25
    assert store.rows()[4].notes["reason"] == "it raised"


def test_a_trial_has_all_its_values_or_is_not_there(open_again: Open, monkeypatch) -> None:
    store = open_again()

    def fail(name: str) -> None:
        if name == "trial.drawn":
            raise RuntimeError

    monkeypatch.setattr(faults, "hook", fail)
    with pytest.raises(RuntimeError):
        store.ask()
    monkeypatch.setattr(faults, "hook", None)
    assert open_again().rows() == []
    assert open_again().ask().values == open_again("study.name=beside").ask().values


def test_values_depend_on_earlier_trials_and_the_number_alone(open_again: Open) -> None:
    whole = open_again("study.sampler=tpe", "study.startup_trials=2")
    numbers = [finish(whole, 0.1 * n) for n in range(6)]
    for n in numbers:  # a driver for each trial
        finish(open_again("study.sampler=tpe", "study.startup_trials=2", "study.name=b"), 0.1 * n)
    beside = open_again("study.sampler=tpe", "study.startup_trials=2", "study.name=b")
    assert [row.values for row in beside.rows()] == [row.values for row in whole.rows()]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "tpe", "gp"])
def test_a_driver_for_each_trial_draws_the_same_where_options_have_settings_of_their_own(
    open_again: Open, sampler: str
) -> None:
    space = ("model=choice(seed,convnet)", "optim=choice(adamw,sgd)", f"study.sampler={sampler}")
    space += ("study.startup_trials=3",)
    whole = open_again(*space)
    for n in range(8):
        finish(whole, 0.05 * n)
    for n in range(8):
        finish(open_again(*space, "study.name=b"), 0.05 * n)
    assert open_again(*space, "study.name=b").rows() == whole.rows()
    assert whole.rows()[0].values == {"optim": "adamw", "model": "convnet"} | {
        "model.hidden": 64,
        "optim.learning_rate": 0.01,
    }
    models = [row.values["model"] for row in whole.rows()]
    assert set(models) == {"seed", "convnet"}
    assert ["model.hidden" in row.values for row in whole.rows()] == [
        model == "convnet" for model in models
    ]


def test_a_requeued_trial_is_taken_first_with_its_values_and_its_attempts(open_again: Open) -> None:
    store = open_again()
    first = store.ask()
    store.report(first.number, 0, 0.25)
    store.requeue(first.number, is_charged=True, reason="its worker died")
    store.ask()
    again = open_again()
    taken = again.take_waiting()
    assert taken is not None
    assert (taken.number, taken.state, taken.values) == (0, "running", first.values)
    assert (taken.attempt, taken.notes["charged"]) == (2, 1)
    assert again.take_waiting() is None


def test_a_pruner_sees_values_up_to_the_reported_rung_only(open_again: Open) -> None:
    """A requeued trial keeps the later rungs of its earlier attempt; they must not decide."""
    store = open_again("study.pruner=halving", "study.rungs=[0.2,0.4]")
    requeued = store.ask()
    for rung, accuracy in enumerate([0.9, 0.1]):
        store.report(requeued.number, rung, accuracy)
    store.requeue(requeued.number, is_charged=False, reason="the driver was killed")
    for _ in range(2):  # two more that are better at rung 1, and worse at rung 0
        other = store.ask() if store.rows()[0].state != "waiting" else store.take_waiting()
        assert other is not None
    store.report(1, 0, 0.5)
    store.report(1, 1, 0.6)
    assert store.report(0, 0, 0.9) is False  # the best of all at rung 0
    assert store.rows()[0].value == 0.9
    assert store.report(0, 1, 0.1) is True


SCREENING = (
    "study.pruner=screening",
    "study.rungs=[0.1]",
    "study.sampler=random",
    "study.trials=6",
    "study.finish=2",
)


def screen(store: TrialStore, accuracy: float) -> TrialRow:
    """Run the next trial as a driver does: to its rung, and to the end if it goes on."""
    row = store.ask()
    if store.report(row.number, 0, accuracy) and row.values != store.own:
        return store.tell(row.number, "pruned", accuracy, {"metrics": {}})
    return store.tell(row.number, "finished", accuracy, {"metrics": {}})


ACCURACIES = (0.9, 0.3, 0.5, 0.4)  # the first are those of the recipe's own values


def test_the_last_trials_have_the_values_of_the_best_screened_ones(open_again: Open) -> None:
    store = open_again(*SCREENING)
    rows = [screen(store, accuracy) for accuracy in (*ACCURACIES, 0.1, 0.1)]
    assert [row.state for row in rows] == ["finished", *["pruned"] * 3, *["finished"] * 2]
    assert [row.values for row in rows[4:]] == [rows[2].values, rows[3].values]
    assert [row.notes["promoted_from"] for row in rows[4:]] == [2, 3]
    assert open_again(*SCREENING).rows() == rows


def test_screening_goes_on_from_the_store_alone(open_again: Open) -> None:
    whole = open_again(*SCREENING)
    accuracies = (*ACCURACIES, 0.1, 0.1)
    rows = [screen(whole, accuracy) for accuracy in accuracies]
    for accuracy in accuracies:  # a driver for each trial
        screen(open_again(*SCREENING, "study.name=b"), accuracy)
    assert open_again(*SCREENING, "study.name=b").rows() == rows


def test_an_extended_study_screens_and_finishes_more(open_again: Open) -> None:
    store = open_again(*SCREENING)
    for accuracy in (*ACCURACIES, 0.1):
        screen(store, accuracy)
    promoted = store.ask()
    store.requeue(promoted.number, is_charged=False, reason="it was stopped")
    store = open_again(*SCREENING, "study.trials=10")
    taken = store.take_waiting()
    assert taken is not None
    assert store.report(taken.number, 0, 0.4) is False  # though its number is one of the first 8
    store.tell(taken.number, "finished", 0.4, {"metrics": {}})
    later = [screen(store, accuracy) for accuracy in (0.2, 0.6, 0.1, 0.1)]
    assert [row.state for row in later] == ["pruned", "pruned", "finished", "finished"]
    # The third of the first screened trials was not trained to the end, and is now.
    assert [row.notes.get("promoted_from") for row in later] == [None, None, 7, 1]


def test_where_too_few_were_screened_the_sampler_draws(open_again: Open) -> None:
    store = open_again(*SCREENING)
    screen(store, 0.9)
    for _ in range(2):
        store.tell(store.ask().number, "failed", None, {"reason": "it raised"})
    rows = [screen(store, accuracy) for accuracy in (0.4, 0.1, 0.2)]
    assert [row.state for row in rows] == ["pruned", "finished", "finished"]
    assert [row.notes.get("promoted_from") for row in rows] == [None, 3, None]
    assert all(rows[2].values != row.values for row in store.rows()[:5])


def test_a_promoted_trial_that_failed_is_not_promoted_again(open_again: Open) -> None:
    store = open_again(*SCREENING)
    for accuracy in ACCURACIES:
        screen(store, accuracy)
    store.tell(store.ask().number, "failed", None, {"reason": "it raised"})
    assert screen(store, 0.1).notes["promoted_from"] == 3


def test_screened_trials_with_equal_values_are_promoted_once(open_again: Open) -> None:
    finite = ("model.hidden=choice(16,32)", "optim.learning_rate=choice(0.003)")
    store = open_again(*SCREENING, *finite, "study.trials=12")
    own = {"model.hidden": 64, "optim.learning_rate": 0.01}
    assert store.own == own  # not in the space
    rows = [screen(store, 0.1 * store.rows()[-1].number if store.rows() else 0) for _ in range(12)]
    assert [row.state for row in rows] == [*["pruned"] * 10, *["finished"] * 2]
    assert {row.values["model.hidden"] for row in rows[10:]} == {16, 32}


def test_failed_trials_count_only_where_the_study_says_so(open_again: Open) -> None:
    for counted in (True, False):
        store = open_again(f"study.name=count-{counted}", f"study.count_failed={counted}")
        finish(store)
        store.tell(store.ask().number, "failed", None, {})
        assert store.is_full(2) is counted


def test_a_grid_is_full_when_all_its_points_are_drawn(open_again: Open) -> None:
    grid = ("model.hidden=choice(16,32)", "optim.learning_rate=choice(0.01,0.02)")
    values = []
    for _ in range(4):  # a driver for each: the grid's place survives it
        store = open_again(*grid, "study.sampler=grid")
        assert not store.is_full(99)
        number = finish(store)
        values.append(store.rows()[number].values)
    assert open_again(*grid, "study.sampler=grid").is_full(99)
    assert len({json.dumps(value) for value in values}) == 4


def test_a_grid_whose_points_failed_ends_and_repeats_none(open_again: Open) -> None:
    grid = ("model.hidden=choice(16,32)", "optim.learning_rate=0.01")
    store = open_again(*grid, "study.sampler=grid", "study.count_failed=false")
    store.tell(store.ask().number, "failed", None, {})
    assert not store.is_full(99)
    finish(store)
    assert store.is_full(99)


def test_notes_are_read_as_the_next_driver_will_read_them(open_again: Open) -> None:
    store = open_again()
    store.note("numbers", {1: (2, 3)})
    assert store.notes()["numbers"] == open_again().notes()["numbers"] == {"1": [2, 3]}


def test_a_study_keeps_its_identity_and_its_notes(open_again: Open) -> None:
    store = open_again()
    store.note("champion", {"trial": 3})
    again = open_again()
    assert again.notes()["champion"] == {"trial": 3}
    assert again.study_id == store.study_id
    assert len(store.study_id) == 32
    assert open_again("study.name=other").study_id != store.study_id


def test_equal_values_of_a_finite_space_are_found(open_again: Open) -> None:
    finite = ("model.hidden=choice(16)", "optim.learning_rate=0.01")
    store = open_again(*finite)
    number = finish(store, 0.7)
    same = twin(store, store.ask())
    assert same is not None
    assert (same.number, same.value) == (number, 0.7)
    endless = open_again("study.name=endless")
    finish(endless)
    assert twin(endless, endless.ask()) is None


def test_a_study_that_does_not_exist_is_named(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(lab)
    with pytest.raises(UserError, match="smoke has not started yet"):
        load_study(lab, "smoke")
    with pytest.raises(UserError, match="did you mean smoke"):
        load_study(lab, "smok")
    monkeypatch.setenv(CALLER, "make")
    with pytest.raises(UserError, match="Run `make sweep` for it"):
        load_study(lab, "smoke")


FRONT = "study.objectives=[val_accuracy,model_parameters]"
SMALLEST = ("study.objectives=[model_parameters]", "study.require.val_accuracy=0.5")


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
@pytest.mark.parametrize("goal", [(FRONT,), SMALLEST, ("study.require.model_parameters=50",)])
def test_a_sampler_learns_from_objectives_and_bounds(
    open_again: Open, sampler: str, goal: tuple[str, ...]
) -> None:
    overrides = (
        *(*goal, "study.pruner=none"),
        *(f"study.sampler={sampler}", "study.startup_trials=2"),
    )
    store = open_again(*overrides)
    for number in range(5):
        row = store.ask()
        metrics = {"val_accuracy": 0.4 + 0.1 * number, "model_parameters": 30 + 10 * number}
        store.tell(row.number, "finished", metrics["val_accuracy"], {"metrics": metrics})
    again = open_again(*overrides)
    assert again.rows() == store.rows()
    assert [row.value for row in again.rows()] == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8])
    broken = [one.constraints for one in again.study.get_trials()]
    assert broken == [one.constraints for one in store.study.get_trials()]
    assert [store.goal.meets(row) for row in store.rows()] == [
        all(share <= 0 for share in one.values()) for one in broken
    ]
    assert again.ask().values == store.ask().values
