"""Writes to a storage that is away for a moment, or whose answer is lost."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from disks import full_databases
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import OperationalError

from digitlab.base.files import disk_problem
from digitlab.study.mirror import RESULT, MirroredStudy
from digitlab.study.storage import STORE_ERRORS, open_storage


class Unreliable:
    """A storage that loses the first request to a method, or the answer to it."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.faults: dict[str, str] = {}  # request or answer, by the method's name

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.storage, name)
        if name not in self.faults:
            return method

        def call(*arguments: Any, **named: Any) -> Any:
            fault = self.faults.pop(name, "")
            if fault != "request":
                answer = method(*arguments, **named)
            if fault:
                raise OperationalError(name, {}, Exception("the connection was lost"))
            return answer

        return call


@pytest.fixture
def storage(lab: Path) -> Unreliable:
    return Unreliable(open_storage(lab))


def running() -> optuna.trial.FrozenTrial:
    return create_trial(state=TrialState.RUNNING)


def both(mirror: MirroredStudy, lab: Path) -> list[Any]:
    """What the storage holds, which must be what the copy in memory holds."""
    held = [
        (trial.number, trial.state, trial.values, trial.intermediate_values, trial.user_attrs)
        for trial in open_storage(lab).get_all_trials(mirror.id)
    ]
    assert held == [
        (trial.number, trial.state, trial.values, trial.intermediate_values, trial.user_attrs)
        for trial in mirror.trials()
    ]
    return held


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_every_write_is_done_once(lab: Path, storage: Unreliable, lost: str) -> None:
    mirror = MirroredStudy(storage, "study", lambda: False)  # type: ignore[arg-type]
    writes = ("create_new_trial", "set_trial_intermediate_value", "set_trial_user_attr")
    storage.faults = dict.fromkeys((*writes, "set_trial_state_values", "set_study_user_attr"), lost)
    mirror.insert(running())
    mirror.set_rung(0, 0, 0.5)
    mirror.set_state(0, TrialState.COMPLETE, [0.75], {"metrics": {}})
    mirror.set_attribute("note", 1)
    assert storage.faults == {}
    assert both(mirror, lab) == [
        (0, TrialState.COMPLETE, [0.75], {0: 0.5}, {RESULT: {"metrics": {}}})
    ]
    assert mirror.attributes()["note"] == 1


def test_a_trial_ended_otherwise_by_somebody_else_is_an_error(
    lab: Path, storage: Unreliable
) -> None:
    mirror = MirroredStudy(storage, "study", lambda: False)  # type: ignore[arg-type]
    mirror.insert(running())
    storage.storage.set_trial_state_values(mirror._id(0), TrialState.FAIL)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        mirror.set_state(0, TrialState.COMPLETE, [0.5])


def test_a_stop_ends_the_attempts(lab: Path, storage: Unreliable) -> None:
    stopped: list[bool] = []
    mirror = MirroredStudy(storage, "study", lambda: bool(stopped))  # type: ignore[arg-type]
    stopped.append(True)
    storage.faults = {"create_new_trial": "request"}
    with pytest.raises(KeyboardInterrupt):
        mirror.insert(running())
    assert mirror.trials() == []


def test_a_full_disk_is_no_outage(lab: Path) -> None:
    mirror = MirroredStudy(open_storage(lab), "study", lambda: False)
    with full_databases(), pytest.raises(STORE_ERRORS) as raised:  # at once
        mirror.set_attribute("note", "x" * 100_000)
    assert disk_problem(raised.value) == "database or disk is full"
    mirror.set_attribute("note", 1)
    assert mirror.attributes()["note"] == 1


def test_the_next_process_has_the_same_copy(lab: Path, storage: Unreliable) -> None:
    mirror = MirroredStudy(storage, "study", lambda: False)  # type: ignore[arg-type]
    for _ in range(2):
        mirror.insert(running())
    mirror.set_state(1, TrialState.WAITING)
    again = MirroredStudy(open_storage(lab), "study", lambda: False)
    assert both(again, lab) == both(mirror, lab)
    assert again.attributes() == mirror.attributes()
    again.insert(running())
    assert [trial.number for trial in again.trials()] == [0, 1, 2]
