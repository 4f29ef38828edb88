"""What a killed driver left: trials that are marked as running, though nothing runs them."""

from collections.abc import Callable
from typing import Any

from digitlab.base.choice import note_predictions
from digitlab.records.reader import recorded_guesses
from digitlab.records.record import Records
from digitlab.records.store import RunRow, Tracker
from digitlab.study.trials import TrialRow, TrialStore

# Results of finished fits, by kind, number of the trial, and seed, as they are tagged.
SealedFits = dict[tuple[str, str, str], dict[str, Any]]


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
            records.outbox.resume_run(run.run_id).end("interrupted")


def sealed_fits(store: TrialStore, tracker: Tracker) -> SealedFits:
    """Return the fits that earlier calls have sealed, and did not come to note.

    It is asked once, when the study is opened: later the tracker may be away.
    """

    def result(run: RunRow) -> dict[str, Any]:
        guesses, labels = recorded_guesses(tracker, run)
        return run.metrics | note_predictions(guesses.numpy(), labels.numpy())

    notes = store.notes()
    noted = {key for phase in ("confirm", "final", "unpruned") for key in notes.get(phase, {})}
    return {
        (kind, run.tags.get("digitlab.trial", ""), run.tags.get("digitlab.seed", "")): result(run)
        for kind in ("confirm", "final")
        for run in tracker.find(
            {
                "digitlab.study_id": store.study_id,
                "digitlab.kind": kind,
                "digitlab.state": "finished",
            }
        )
        if f"{run.tags.get('digitlab.trial')}/{run.tags.get('digitlab.seed')}" not in noted
    }


def has_result(run: RunRow, row: TrialRow) -> bool:
    """Whether a run holds the result of the trial's present attempt."""
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
