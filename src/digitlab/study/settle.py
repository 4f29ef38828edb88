"""What a killed driver left: trials that are marked as running, though nothing runs them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from digitlab.base.choice import note_predictions
from digitlab.records.reader import recorded_guesses
from digitlab.records.record import Records
from digitlab.records.tracker import RunRow, Tracker
from digitlab.study.goal import TrialRow
from digitlab.study.trials import TrialStore

PHASES = ("unpruned", "confirm", "measure", "final")  # of fits, and the kinds of their runs
FitKey = tuple[str, str, str]  # kind, number of the trial, and seed, as they are tagged


@dataclass(frozen=True)
class RecordedFits:
    """What earlier calls have recorded of fits."""

    results: dict[FitKey, dict[str, Any]]  # of those that were sealed, and not noted
    attempts: Counter[FitKey]


def trial_value(state: str, metrics: dict[str, float]) -> float | None:
    """Return what a trial is compared by: its last validation accuracy, or that of its rung."""
    return metrics.get({"finished": "val_accuracy", "pruned": "rung_accuracy"}.get(state, ""))


def settle(
    store: TrialStore,
    records: Records,
    parent_run_id: str | None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Settle every trial that is marked as running: the leader's lock proves that none runs.

    A run that was sealed is the truth, and the trial gets its result. Any other is ended as
    interrupted, and the trial waits to be run again with the same values. Nothing is charged.
    """
    running = [row for row in store.rows() if row.state == "running"]
    mine = {"digitlab.study_id": store.study_id}
    for row in running:
        tags = mine | {"digitlab.kind": "trial", "digitlab.trial": str(row.number)}
        ended = [run for run in records.tracker.find(tags) if has_result(run, row)]
        if ended:
            _tell(store, records.tracker, row, ended[-1])
        else:
            store.requeue(row.number, is_charged=False, reason="its driver was killed")
        state = store.rows()[row.number].state
        say(f"trial {row.number}: left by an earlier call; {state}")
    for run in records.tracker.find(mine | {"digitlab.state": "running"}):
        if not run.is_ended and run.run_id != parent_run_id:
            records.outbox.resume_run(run.run_id, store.study_id).end("interrupted")


def recorded_fits(store: TrialStore, tracker: Tracker) -> RecordedFits:
    """Return what earlier calls have recorded of fits.

    It is asked once, when the study is opened: later the tracker may be away.
    """
    notes = store.notes()
    noted = {key for phase in PHASES for key in notes.get(phase, {})}
    found = RecordedFits({}, Counter())
    for kind in PHASES:
        for run in tracker.find({"digitlab.study_id": store.study_id, "digitlab.kind": kind}):
            number, seed = (run.tags.get(f"digitlab.{name}", "") for name in ("trial", "seed"))
            found.attempts[kind, number, seed] += 1
            is_sealed = run.tags.get("digitlab.state") == "finished"
            if is_sealed and f"{number}/{seed}" not in noted:
                misread = note_predictions(*recorded_guesses(tracker, run))
                found.results[kind, number, seed] = run.metrics | misread
    return found


def has_result(run: RunRow, row: TrialRow) -> bool:
    """Whether a run holds the trial's result.

    A whole training is one whatever became of its attempt; a pruning depended on the trials of
    its time, so that only the present attempt's counts.
    """
    state = run.tags.get("digitlab.state")
    is_present = run.tags.get("digitlab.attempt") == str(row.attempt)
    return run.is_ended and (state == "finished" or (state == "pruned" and is_present))


def _tell(store: TrialStore, tracker: Tracker, row: TrialRow, run: RunRow) -> None:
    state = run.tags["digitlab.state"]
    history = tracker.history(run.run_id)
    curve = [
        value for name, _, value in sorted(history, key=lambda x: x[1]) if name == "val_accuracy"
    ]
    notes = {"metrics": run.metrics, "curve": curve}
    store.tell(row.number, state, trial_value(state, run.metrics), notes)
