"""Which run holds the result of a trial that a killed driver left."""

import pytest

from digitlab.records.tracker import RunRow
from digitlab.study.goal import TrialRow
from digitlab.study.settle import has_result, trial_value


def run(state: str, attempt: int, status: str = "FINISHED") -> RunRow:
    tags = {"digitlab.state": state, "digitlab.attempt": str(attempt)}
    return RunRow("id", "name", status, tags, {}, {})


@pytest.mark.parametrize(
    ("state", "attempt", "status", "expected"),
    [
        ("finished", 2, "FINISHED", True),
        ("finished", 1, "FINISHED", True),  # a sealed run always wins
        ("finished", 2, "RUNNING", False),  # not all of it is delivered
        ("pruned", 2, "KILLED", True),
        ("pruned", 1, "KILLED", False),  # the trial was requeued since
        ("interrupted", 2, "KILLED", False),
        ("failed", 2, "FAILED", False),
        ("running", 2, "RUNNING", False),
    ],
)
def test_a_result_is_sealed_or_of_the_present_attempt(
    state: str, attempt: int, status: str, expected: bool
) -> None:
    row = TrialRow(0, "running", None, {}, {"attempt": 2})
    assert has_result(run(state, attempt, status), row) is expected


def test_a_trial_is_compared_by_its_last_accuracy_or_that_of_its_rung() -> None:
    metrics = {"val_accuracy": 0.9, "rung_accuracy": 0.5}
    assert trial_value("finished", metrics) == 0.9
    assert trial_value("pruned", metrics) == 0.5
    assert trial_value("failed", metrics) is None
