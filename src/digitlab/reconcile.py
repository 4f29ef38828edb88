"""Bring a trial and its record to one truth after a process has died."""

from digitlab.search import Search, TrialRow, trial_value
from digitlab.tracking import RunRow, Tracking


def trial_runs(tracking: Tracking, study: str, number: int) -> list[RunRow]:
    """The runs that carry a trial's tags; more than one after a crash."""
    tags = {"digitlab.study": study, "digitlab.kind": "trial", "digitlab.trial": str(number)}
    return tracking.find(tags)


def reconcile_trial(search: Search, tracking: Tracking, row: TrialRow, blame: str | None) -> str:
    """Settle a trial that is marked as running though nobody runs it; returns its new state.

    A run that had ended is the truth: the trial is told its result. Otherwise the run is marked
    as interrupted and the trial waits to be run again. `blame` says what the trial itself did to
    its worker; after `study.retries` of that it has failed for good.
    """
    runs = trial_runs(tracking, search.config.name, row.number)
    for run in runs:
        state = run.tags.get("digitlab.state", "")
        if run.ended and state in ("finished", "pruned", "failed"):
            notes = {"metrics": run.metrics}
            search.tell(row.number, state, trial_value(state, run.metrics), notes)
            return state
    attempts = int(row.notes.get("attempts", 0)) + (blame is not None)
    failed = attempts > search.config.retries or (blame or "").startswith("it took longer")
    for run in runs:
        record = tracking.resume(run.run_id)
        if blame:
            record.log(tags={"digitlab.reason": blame})
        if not run.ended:
            record.end("failed" if failed else "interrupted")
    if failed:
        search.tell(row.number, "failed", None, {"attempts": attempts, "reason": blame or ""})
        return "failed"
    search.put_back(row.number, attempts)
    return "waiting"
