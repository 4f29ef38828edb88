"""The runs that a study's notes name and its tracker lacks: they were deleted there."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from digitlab.base.errors import refuse_damage
from digitlab.records.tracker import NoTracker, RunRow, Tracker, restore_command
from digitlab.study.champion import finished_results
from digitlab.study.goal import TrialRow
from digitlab.study.settle import PHASES


@dataclass(frozen=True)
class MissingRun:
    """A run that is noted, and that the tracker does not list."""

    trial: int | None
    run_id: str | None  # None where it cannot be restored
    detail: str


# Number of the trial, what its run is of, and whether a run is that one.
_Noted = tuple[int | None, str, Callable[[RunRow], bool]]


def missing_runs(
    notes: Mapping[str, Any],
    study_id: str,
    tracker: Tracker,
    runs: Sequence[RunRow],
    trials: Iterable[TrialRow] = (),
) -> list[MissingRun]:
    """Return what is missing of a study's own run, its trials, its fits and its champion.

    Args:
        runs: all that carry the study's id.
        trials: whose runs are looked for; an audit compares them by itself.
    """
    with refuse_damage("what is noted of the study's fits"):
        wanted = [*_noted(notes), *(_of_trial(row) for row in trials if row.is_ended)]
        lacking = [noted for noted in wanted if not any(map(noted[2], runs))]
    if not lacking or isinstance(tracker, NoTracker):  # of a study that records nothing
        return []
    deleted = tracker.find_deleted({"digitlab.study_id": study_id})
    found = []
    for trial, what, is_it in lacking:
        run_id = next((run.run_id for run in reversed(deleted) if is_it(run)), None)
        detail = f"the run of {what} is not in the tracker, and cannot be restored there"
        if run_id is not None:
            restore = restore_command(tracker, run_id)
            detail = f"the run of {what} was deleted in the tracker, where `{restore}` restores it"
        found.append(MissingRun(trial, run_id, detail))
    return found


def _noted(notes: Mapping[str, Any]) -> Iterator[_Noted]:
    if notes.get("run_id") is not None:
        yield None, "the study itself", lambda run: run.run_id == notes["run_id"]
    for phase in PHASES:
        for key in finished_results(notes.get(phase, {})):
            number, _, seed = key.partition("/")
            yield int(number), f"{phase} fit {key} (trial/seed)", _of_fit(phase, number, seed)
    champion = notes.get("champion", {})
    if champion.get("run_id") is not None:
        trial = int(champion["trial"])
        yield trial, "the champion", lambda run: run.run_id == champion["run_id"]


def _of_trial(row: TrialRow) -> _Noted:
    tags = {"digitlab.kind": "trial", "digitlab.trial": str(row.number)}
    return row.number, f"trial {row.number}", lambda run: tags.items() <= run.tags.items()


def _of_fit(kind: str, number: str, seed: str) -> Callable[[RunRow], bool]:
    tags = {"digitlab.kind": kind, "digitlab.trial": number, "digitlab.seed": seed}
    tags["digitlab.state"] = "finished"
    return lambda run: tags.items() <= run.tags.items()
