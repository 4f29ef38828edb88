"""Bring Optuna's trials and MLflow's runs to one truth, and `digitlab audit`: is it one?"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digitlab.base.errors import UserError, nearest
from digitlab.config.recorded import with_values
from digitlab.config.types import Config, Tracker
from digitlab.records.mlflow import RunRecord, RunRow, Tracking, open_tracking
from digitlab.records.reader import damage
from digitlab.records.record import Identity, begin_record, trial_tags
from digitlab.study.fingerprint import begun_config
from digitlab.study.storage import open_storage, study_names
from digitlab.study.trials import Search, TrialRow, trial_value
from digitlab.study.workers.processes import only_parent


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be, and whether it could be mended."""

    kind: str
    trial: int | None
    run_id: str | None
    detail: str
    mended: bool = False


def trial_runs(tracking: Tracking, study: str, number: int) -> list[RunRow]:
    """The runs that carry a trial's tags; more than one after a crash."""
    return tracking.find({"digitlab.kind": "trial", **trial_tags(study, number)})


def record_taken(
    tracking: Tracking, config: Config, identity: Identity, notes: Mapping[str, Any]
) -> RunRecord:
    """Record a finished trial whose result was not trained but taken from elsewhere."""
    record = begin_record(tracking, config, identity)
    metrics = {k: v for k, v in notes["metrics"].items() if k not in ("seconds", "done")}
    record.log(metrics, tags={"digitlab.taken_from": str(notes.get("taken_from", ""))})
    record.end("finished")
    return record


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


def audit(
    search: Search, tracking: Tracking, config: Config, repair: bool, deep: bool = True
) -> list[Problem]:
    """Hold every trial of a study that nobody runs against its run, and mend if asked.

    Args:
        search: the study; its trials' states and values are what runs are held against.
        config: what the study was begun with.
        repair: mend what can be mended.
        deep: also read each run's artifacts and hash the weights, and make a run for a trial of a
            shared study that has none: while workers elsewhere go on, it may wait in an outbox.
    """
    study = search.config.name
    again = repair and (deep or search.engine is None)
    audited = _Audit(search, tracking, config, repair, again)
    kept = tracking.kept_back()
    if kept:
        delivered = tracking.deliver() if repair else 0
        detail = f"{kept} records wait in the lab's outbox for the tracker to be back"
        audited.problems.append(Problem("kept back", None, None, detail, delivered == kept))
    # Trials first: what has ended there has ended in its run, though workers elsewhere go on.
    rows = search.rows()
    runs = tracking.find({"digitlab.study": study})
    by_trial: dict[int, list[RunRow]] = {}
    for run in runs:
        if run.tags.get("digitlab.kind") == "trial":
            by_trial.setdefault(int(run.tags["digitlab.trial"]), []).append(run)
        elif not run.ended:
            audited.left_running(run)
    for row in rows:
        audited.trial(row, by_trial.pop(row.number, []))
    if search.engine is not None:  # of trials that have begun since
        by_trial = {n: orphans for n, orphans in by_trial.items() if n >= len(search.rows())}
    for number, orphans in by_trial.items():
        for run in orphans:
            audited.surplus(run, number, "no trial", f"trial {number} is not in the study")
    if deep:
        for run in tracking.find({"digitlab.study": study}):
            audited.artifacts(run)
    return audited.problems


class _Audit:
    def __init__(
        self, search: Search, tracking: Tracking, config: Config, repair: bool, again: bool
    ) -> None:
        """Args: again: make runs for trials that have none."""
        self.search, self.tracking, self.config = search, tracking, config
        self.repair, self.again = repair, again
        self.lost = search.lost()
        self.problems: list[Problem] = []

    def _found(self, kind: str, number: int | None, run: RunRow | None, detail: str) -> None:
        run_id = run.run_id if run else None
        self.problems.append(Problem(kind, number, run_id, detail))

    def left_running(self, run: RunRow) -> None:
        if self.repair:
            self.tracking.resume(run.run_id).end("interrupted")
        detail = f"run {run.name} is marked as running, and nobody runs it"
        self.problems.append(Problem("running", None, run.run_id, detail, self.repair))

    def surplus(self, run: RunRow, number: int, kind: str, detail: str) -> None:
        if self.repair:
            self.tracking.delete(run.run_id)
        self.problems.append(Problem(kind, number, run.run_id, detail, self.repair))

    def trial(self, row: TrialRow, runs: list[RunRow]) -> None:
        if row.state == "running":
            if self.search.engine is not None and row.number not in self.lost:
                return  # a worker somewhere gives signs of life for it
            if self.repair:
                reconcile_trial(self.search, self.tracking, row, None)
            detail = "the trial is marked as running, and nobody runs it"
            self.problems.append(Problem("running", row.number, None, detail, self.repair))
            return
        if row.state == "waiting":
            for run in [] if self.search.engine else runs:  # it may have been taken meanwhile
                if not run.ended:
                    self.left_running(run)
            return
        if self.config.tracking.name is Tracker.none:
            return
        same = [run for run in runs if not _differences(row, run)]
        best = (same or runs)[-1:]
        for run in runs:
            if run not in best:
                self.surplus(run, row.number, "several runs", f"another run is {best[0].run_id}")
        if not best:
            mended = self.again and self._record_again(row)
            detail = f"the {row.state} trial has no run"
            self.problems.append(Problem("no run", row.number, None, detail, mended))
            return
        for kind, detail in _differences(row, best[0]):
            self._found(kind, row.number, best[0], detail)

    def _record_again(self, row: TrialRow) -> bool:
        """A run made of what the study knows of the trial: no weights, no curve."""
        study = self.search.config.name
        parent = self.search.notes().get("run_id")
        tags = trial_tags(study, row.number) | {"digitlab.repaired": "from the study's storage"}
        identity = Identity(f"{study}-{row.number}", "trial", tags, parent)
        try:
            config = with_values(self.config, row.values)
        except UserError:  # the values contradict each other, which is why the trial failed
            config = self.config
        record = begin_record(self.tracking, config, identity)
        record.log({k: v for k, v in row.notes.get("metrics", {}).items() if k != "done"})
        record.end(row.state)
        return True

    def artifacts(self, run: RunRow) -> None:
        """A finished run that was trained has its files, and all is as it was recorded."""
        told = run.tags.keys() & {"digitlab.taken_from", "digitlab.repaired"}
        if run.tags.get("digitlab.state") != "finished" or told:
            return
        number = int(run.tags["digitlab.trial"]) if "digitlab.trial" in run.tags else None
        try:
            self.tracking.artifact(run.run_id, "config.yaml")
            if run.tags.get("digitlab.kind") != "study":
                for detail in damage(self.tracking, run):
                    self._found("record differs", number, run, detail)
        except UserError as error:
            self._found("missing artifact", number, run, str(error))


def _differences(row: TrialRow, run: RunRow) -> list[tuple[str, str]]:
    """(kind, detail) of what a trial that has ended and its run say differently."""
    found = []
    state = run.tags.get("digitlab.state")
    if state != row.state or not run.ended:
        said = f"{state} ({run.status})"
        found.append(("state differs", f"the trial is {row.state}, its run {said}"))
    refused = row.state == "failed" and "digitlab.weights_sha256" not in run.tags
    for knob, value in ({} if refused else row.values).items():
        if run.params.get(knob) != str(value):
            detail = f"{knob} is {value} in the trial, {run.params.get(knob)} in its run"
            found.append(("parameter differs", detail))
    value = trial_value(row.state, run.metrics)
    if row.state in ("finished", "pruned") and value != row.value:
        found.append(("value differs", f"{row.value} in the trial, {value} in its run"))
    return found


def inspect(studies: list[str], lab: Path, repair: bool, as_json: bool) -> int:
    """Audit studies, all of the lab's if none is named; 1 while anything is wrong, else 0.

    Raises:
        UserError: a study does not exist, or is running.
    """
    storage = open_storage(lab)
    known = study_names(storage)
    problems: list[Problem] = []
    for name in studies or known:
        if name not in known:
            raise UserError(f"{name}: no such study, {nearest(name, known)}")
        with only_parent(lab, name):
            notes = storage.get_study_user_attrs(storage.get_study_id_from_name(name))
            if "config" not in notes:  # its first call was refused before it began
                continue
            config = begun_config(notes)
            search = Search(storage, config)
            problems += audit(search, open_tracking(config, lab), config, repair)
    wrong = [problem for problem in problems if not problem.mended]
    if as_json:
        told = ("kind", "trial", "run_id", "detail")
        listed = [{name: getattr(problem, name) for name in told} for problem in wrong]
        print(json.dumps({"problems": listed, "repaired": len(problems) - len(wrong)}, indent=1))
    else:
        for problem in problems:
            print(f"{'mended' if problem.mended else problem.kind}: {problem.detail}")
        print(f"{len(studies or known)} studies, {len(wrong)} problems")
    return 1 if wrong else 0
