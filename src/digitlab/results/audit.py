"""`digitlab audit`: whether a study's trials and runs agree, and what can be repaired."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from optuna.storages import RDBStorage

from digitlab.base.errors import UserError, counted, visible
from digitlab.base.invocation import storage_of
from digitlab.config.recorded import result_settings, with_values
from digitlab.config.types import Config, TrackerName
from digitlab.records.reader import damage, lab_records
from digitlab.records.record import Records, open_records
from digitlab.records.sessions import tracker_of, unlocked
from digitlab.records.tracker import RunRow, Tracker
from digitlab.results.held import other_tracker
from digitlab.results.missing import missing_runs
from digitlab.study.goal import Goal, TrialRow
from digitlab.study.settle import has_result, settle, trial_value
from digitlab.study.storage import (
    leader_lock,
    listed_studies,
    open_storage,
    refuse_deleted,
    require_study,
    study_notes,
)
from digitlab.study.trials import TrialStore, is_own, load_study


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be."""

    kind: str
    trial: int | None
    run_id: str | None
    detail: str


_DELIVERY_S = 60.0  # to wait for a tracker that is slow or away

# The kinds that can be repaired: what waits is delivered, what nobody runs is ended or requeued,
# what is surplus is deleted.
PENDING, RUNNING, SURPLUS = "pending", "running", "several runs"
REFUSED = "refused"  # a record that the tracker does not take, or that cannot be read
REPAIRABLE = (PENDING, RUNNING, SURPLUS)


def find_problems(
    config: Config, rows: Iterable[TrialRow], runs: Iterable[RunRow]
) -> list[Problem]:
    """Compare a study's trials with its runs; nobody leads the study meanwhile.

    Args:
        runs: all that carry the study's id, oldest first.
    """
    problems = []
    by_trial: dict[int, list[RunRow]] = {}
    for run in runs:
        number = _trial_of(run)
        if run.tags.get("digitlab.kind") == "trial" and number is not None:
            by_trial.setdefault(number, []).append(run)
        elif run.tags.get("digitlab.kind") == "trial":
            detail = f"run {run.name} is of a trial, but its number is not recorded"
            problems.append(Problem("no trial", None, run.run_id, detail))
        elif not run.is_ended:
            problems.append(_left_running(run, None))
    for row in rows:
        problems += _trial_problems(config, row, by_trial.pop(row.number, []))
    for number, orphans in by_trial.items():
        problems += [
            # Not surplus: the study may be an older copy, whose later trials a deletion would take.
            Problem("no trial", number, run.run_id, f"trial {number} is not in the study")
            for run in orphans
        ]
    return problems


def _trial_of(run: RunRow) -> int | None:
    number = run.tags.get("digitlab.trial", "")
    return int(number) if number.isdecimal() else None


def _left_running(run: RunRow, number: int | None) -> Problem:
    detail = f"run {run.name} is marked as running, and nothing runs it"
    return Problem(RUNNING, number, run.run_id, detail)


def _trial_problems(config: Config, row: TrialRow, runs: list[RunRow]) -> list[Problem]:
    if row.state == "running":
        detail = f"trial {row.number} is marked as running, and nothing runs it"
        return [Problem(RUNNING, row.number, None, detail)]
    problems = [_left_running(run, row.number) for run in runs if not run.is_ended]
    if row.state == "waiting":
        return problems
    # Earlier attempts stay beside the one that counts: the sealed one, else the present one.
    results = [run for run in runs if has_result(run, row)]
    present = [run for run in runs if run.tags.get("digitlab.attempt") == str(row.attempt)]
    same = [run for run in results if not _differences(config, row, run)]
    current = (same or results or present)[-1:]
    if not current:
        detail = f"the {row.state} trial {row.number} has no run; was it deleted in the tracker?"
        return [*problems, Problem("no run", row.number, None, detail)]
    problems += [
        Problem(SURPLUS, row.number, run.run_id, f"trial {row.number} has run {current[0].run_id}")
        for run in {id(run): run for run in (*results, *present)}.values()
        if run is not current[0]
    ]
    return problems + _differences(config, row, current[0])


def _differences(config: Config, row: TrialRow, run: RunRow) -> list[Problem]:
    """What a trial that has ended and its run do not agree in."""
    found = []
    state = run.tags.get("digitlab.state")
    if state != row.state:
        found.append(("state differs", f"trial {row.number} is {row.state}, its run {state}"))
    refused = row.state == "failed" and "training_flops" not in run.metrics
    settings = {} if refused else result_settings(with_values(config, row.values))
    for name, value in settings.items():
        if run.params.get(name) != str(value):
            detail = f"{name} is {value} in trial {row.number}, {run.params.get(name)} in its run"
            found.append(("parameter differs", detail))
    value = trial_value(row.state, run.metrics)
    if row.state in ("finished", "pruned") and value != row.value:
        found.append(("value differs", f"{row.value} in trial {row.number}, {value} in its run"))
    measured = replace(row, value=value, notes={"metrics": run.metrics})
    values = Goal.of(config.study).values(measured)
    if row.state == "finished" and row.objectives not in (None, values):
        detail = f"{row.objectives} in trial {row.number}, {values} in its run"
        found.append(("value differs", f"its objectives are {detail}"))
    return [Problem(kind, row.number, run.run_id, detail) for kind, detail in found]


def find_damage(tracker: Tracker, runs: Iterable[RunRow]) -> list[Problem]:
    """Read each finished run's files, and compare them with what was recorded."""
    problems = []
    for run in runs:
        trained = "digitlab.weights_sha256" in run.tags
        if run.tags.get("digitlab.state") != "finished" or not trained:
            continue
        number = _trial_of(run)
        try:
            details = damage(tracker, run)
        except UserError as error:
            details = [str(error)]
        problems += [Problem("record differs", number, run.run_id, text) for text in details]
    return problems


def find_all(store: TrialStore, config: Config, tracker: Tracker) -> list[Problem]:
    """Return all problems of a study that nobody leads, those of its files included."""
    if config.tracking.name is TrackerName.none:
        return []
    runs = tracker.find({"digitlab.study_id": store.study_id})
    missing = missing_runs(store.notes(), store.study_id, tracker, runs)
    return [
        *find_problems(config, store.rows(), runs),
        *(Problem("no run", one.trial, one.run_id, one.detail) for one in missing),
        *find_damage(tracker, runs),
    ]


def repair(problems: Iterable[Problem], store: TrialStore, records: Records) -> list[Problem]:
    """Repair what can be; return the problems that are left.

    The caller holds the study, and has listed the problems: surplus runs are deleted.
    """
    problems = list(problems)
    parent = store.notes().get("run_id")
    if any(problem.kind == RUNNING for problem in problems):
        settle(store, records, parent)
    for problem in problems:
        if problem.kind == RUNNING and problem.run_id == parent is not None:  # others are settled
            records.outbox.resume_run(parent, store.study_id).end("interrupted")
        elif problem.kind == SURPLUS and problem.run_id is not None:
            records.tracker.delete(problem.run_id)
    return [problem for problem in problems if problem.kind not in REPAIRABLE]


def audit_studies(
    studies: list[str], lab: Path, is_repair: bool, as_json: bool, stores: Sequence[str] = ()
) -> int:
    """Audit studies, all of the lab's if none is named; return 1 while anything is wrong, else 0.

    Raises:
        UserError: a study does not exist, or another process leads it.
    """
    address = storage_of(stores)
    storage = open_storage(lab, address)
    for name in studies:
        require_study(storage, name)
        refuse_deleted(name, study_notes(storage, name))
    found: list[Problem] = []
    left: list[Problem] = []
    unsent: dict[str, int] = {}  # records in the outbox, by tracker; of those looked for
    if not studies and (lab / "outbox").is_dir():  # runs outside a study wait there, too
        with lab_records(lab, stores) as records:
            found += _find_pending(records, unsent, is_repair, as_json)
            is_sent = not unsent[records.tracker.identity]
            left += [one for one in found if one.kind != PENDING or not is_sent]
    if not studies and (lab / "mlflow.db").is_file():
        with lab_records(lab, stores) as records:
            orphans = _find_orphans(records, storage)
        _print(orphans, as_json)
        found, left = found + orphans, left + orphans
    names = list(dict.fromkeys(studies)) or listed_studies(storage)
    for name in names:
        notes = study_notes(storage, name)
        if not is_own(notes):  # another program's, or its first call was refused
            if not as_json:
                print(f"skipped: {name!r} is no study of digitlab's, or has not started")
            continue
        with leader_lock(storage, lab, name):
            problems, rest = _audit_named(name, lab, address, unsent, is_repair, as_json)
            found, left = found + problems, left + rest
    others = [] if studies else _find_others(lab, unsent)
    _print(others, as_json)
    found, left = found + others, left + others
    if as_json:
        document = {"problems": [asdict(p) for p in left], "repaired": len(found) - len(left)}
        print(json.dumps(document, indent=1))
    else:
        repaired = f", {len(found) - len(left)} repaired" if is_repair else ""
        audited = counted(len(names), "study", "studies")
        print(f"{audited}, {counted(len(left), 'problem')}{repaired}")
    return 1 if left else 0


def _find_orphans(records: Records, storage: RDBStorage) -> list[Problem]:
    """Return the studies that have runs in the lab and are not in Optuna's storage.

    A tracker beside the lab may hold the studies of other labs, too.
    """
    if records.tracker.identity.partition(" ")[0] != "lab":
        return []
    known = {study.user_attrs.get("study_id") for study in storage.get_all_studies()}
    remedy = "restore its optuna.db from a copy, or give study.storage=ADDRESS"
    return [
        Problem(
            "no study", None, run.run_id, f"study {run.name} is not in Optuna's storage: {remedy}"
        )
        for run in records.tracker.find({"digitlab.kind": "study"})
        if run.tags.get("digitlab.study_id") not in known
    ]


def _find_others(lab: Path, unsent: Mapping[str, int]) -> list[Problem]:
    """Return the records of ended processes that wait for trackers that were not looked for."""
    waiting: Counter[str] = Counter()
    unknown: list[Problem] = []
    for folder in unlocked(lab / "outbox"):
        identity, number = tracker_of(folder), len(list(folder.glob("*.run")))
        waiting[identity] += number
        if number and not identity:
            detail = f"{folder / 'session.json'} does not say for which tracker its records are"
            unknown.append(Problem(REFUSED, None, None, detail))
    return unknown + [
        Problem(
            PENDING, None, None,
            f"{counted(number, 'record')} of ended processes for another tracker ({identity}) in "
            "the lab's outbox: the next command that opens that tracker sends them",
        )
        for identity, number in waiting.items()
        if number and identity and identity not in unsent
    ]  # fmt: skip


def _find_pending(
    records: Records, unsent: dict[str, int], is_repair: bool, as_json: bool
) -> list[Problem]:
    """Return that records of ended processes wait in the outbox; a repair sends them.

    What is left afterwards is noted in `unsent`; a tracker that is there is not looked for again.
    """
    tracker, outbox = records.tracker, records.outbox
    if tracker.identity in unsent:
        return []
    waiting = unsent[tracker.identity] = outbox.leftovers()
    if not waiting:
        return []
    refused: list[Problem] = []
    if is_repair:
        outbox.adopt()
        unsent[tracker.identity] = outbox.flush(_DELIVERY_S)
        refused = [Problem(REFUSED, None, None, str(error)) for _, error in outbox.failures()]
    wait = "record of ended processes waits", "records of ended processes wait"
    text = f"{counted(waiting, *wait)} in the lab's outbox"
    problems = [Problem(PENDING, None, None, text), *refused]
    _print(problems, as_json)
    return problems


def _print(problems: Iterable[Problem], as_json: bool) -> None:
    for problem in () if as_json else problems:
        print(visible(f"{problem.kind}: {problem.detail}"))


def _audit_named(
    name: str,
    lab: Path,
    address: str | None,
    unsent: dict[str, int],
    is_repair: bool,
    as_json: bool,
) -> tuple[list[Problem], list[Problem]]:
    """As `_audit_study`; a study that cannot be read is a problem, and does not end the audit."""
    try:
        opened = load_study(lab, name, address)
    except UserError as error:
        problems = [Problem("unreadable", None, None, f"study {name!r}: {error}")]
        _print(problems, as_json)
        return problems, problems
    return _audit_study(*opened, lab, unsent, is_repair, as_json)


def _audit_study(
    store: TrialStore,
    config: Config,
    lab: Path,
    unsent: dict[str, int],
    is_repair: bool,
    as_json: bool,
) -> tuple[list[Problem], list[Problem]]:
    """Return the problems that were found, and those that are left."""
    with open_records(config, lab) as records:
        pending = _find_pending(records, unsent, is_repair, as_json)
        unknown = _what_is_unknown(store, records, unsent, is_repair)
        if unknown:
            _print(unknown, as_json)
            found = [*pending, *unknown]
            is_sent = is_repair and not unsent.get(records.tracker.identity)
            return found, [one for one in found if one.kind != PENDING or not is_sent]
        problems = find_all(store, config, records.tracker)
        _print(problems, as_json)
        problems = pending + problems
        left = repair(problems, store, records) if is_repair else problems
    return problems, left


def _what_is_unknown(
    store: TrialStore, records: Records, unsent: Mapping[str, int], is_repair: bool
) -> list[Problem]:
    """Return why it is not known yet what the study's runs are: nothing can be said of them."""
    outbox = records.outbox
    if other := other_tracker(store.notes(), records.tracker):
        return [Problem("other tracker", None, None, f"study {store.config.name!r}: {other}")]
    if held := outbox.held_elsewhere(store.study_id):
        detail = f"another process of this lab is still to send {counted(held, 'record')} of it"
        return [Problem("held elsewhere", None, None, detail)]
    if not is_repair:  # what waits is no more than listed
        return []
    if left := unsent.get(records.tracker.identity):
        why = outbox.problem.rstrip(".") or "it is slow"
        detail = f"the tracker has yet to take {counted(left, 'record')} ({why}); try again later"
        return [Problem("not sent", None, None, detail)]
    refused = sum(study_id == store.study_id for study_id, _ in outbox.failures())
    refused += outbox.leftovers(store.study_id)  # were adopted with another study's
    if refused:
        detail = f"the tracker lacks {counted(refused, 'record')} of study {store.config.name!r}"
        return [Problem(REFUSED, None, None, detail)]
    return []
