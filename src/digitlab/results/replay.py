"""`digitlab reproduce --study`: run a whole study again by one worker, and compare the two."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError, counted, refuse_damage
from digitlab.base.invocation import command, storage_of
from digitlab.base.usage import MACHINE_METRICS
from digitlab.config.compose import Composed, store_words
from digitlab.config.recorded import with_values
from digitlab.config.types import Config, derived_name
from digitlab.records.reader import recorded_environment
from digitlab.records.record import Identity, Records, RunRecorder, open_records
from digitlab.records.tracker import RunRow
from digitlab.results.verdict import (
    IDENTICAL,
    INCOMPARABLE,
    NOT_REPRODUCED,
    Change,
    Verdict,
    differences,
)
from digitlab.study.driver import sweep
from digitlab.study.goal import TrialRow
from digitlab.study.storage import DELETED, study_names, study_notes
from digitlab.study.summary import continue_command
from digitlab.study.trials import TrialStore, load_study


def replay(study: str, lab: Path, as_json: bool, stores: Sequence[str] = ()) -> int:
    """Run the study again under another name; returns the exit status of the verdict.

    Only the verdict is recorded. A replay that was stopped goes on when it is called again.

    Raises:
        UserError: there is no such study, or it has no champion yet.
    """
    original, recorded = load_study(lab, study, storage_of(stores))
    notes = original.notes()
    if "champion" not in notes:
        raise UserError(
            f"{study} has no champion yet: only a finished study can be replayed. "
            f"Finish it with `{continue_command(notes)}` first."
        )
    given = [row for row in original.rows() if "/" in str(row.notes.get("taken_from", ""))]
    with refuse_damage(f"what the storage holds of study {study!r}"):
        config = _replay_config(original, recorded, notes)
    with open_records(recorded, lab) as records:
        tracker = records.tracker
        row = tracker.get(str(notes["run_id"])) if notes.get("run_id") else None
        now = describe_environment()
        found = differences(recorded_environment(tracker, row), now) if row else []
        if notes.get("workers", 0) != 1:
            found.append(Change("study.workers", notes.get("workers", "not recorded"), 1))
        if recorded.study.minutes:
            found.append(Change("study.minutes", recorded.study.minutes, "another machine's"))
        with redirect_stdout(sys.stderr if as_json else sys.stdout):
            print(f"replaying study {study} as {config.study.name}, by one worker")
            for difference in found:
                print(f"  {difference}")
            if given:
                taken = counted(len(given), "trial")
                print(f"  {taken} that it took over from another study: as recorded, not trained")
            again = command("reproduce", f"--study={study}", *store_words(recorded))
            status = sweep(Composed(config, ()), lab, again=again, given=given)
        if status == 130:
            raise KeyboardInterrupt
        parted = compare_studies(original, TrialStore(original.storage, config))
        is_harmless = all(difference.is_harmless for difference in found)
        verdict = IDENTICAL if not parted else NOT_REPRODUCED if is_harmless else INCOMPARABLE
        recorder = _record(records, config, row, verdict, parted, now)
        reasons = [*map(str, found), *parted]
        try:
            records.outbox.flush_run(recorder.spool)
        finally:  # the verdict is shown whatever becomes of its record
            reached = Verdict(verdict, reasons, recorder.run_id(), row.run_id if row else study)
            reached.show(as_json, f"study {study}")
        if row:
            records.tracker.tag(row.run_id, {"digitlab.reproduced": verdict})
    return reached.exit_status


def _replay_config(original: TrialStore, recorded: Config, notes: Mapping[str, Any]) -> Config:
    """Return the configuration of the replay: the first that is not finished, or a new one."""
    name, number = derived_name(original.config.name, "-replay"), 0
    storage = original.storage
    while name in study_names(storage):
        notes_of_it = study_notes(storage, name)
        if "champion" not in notes_of_it and not notes_of_it.get(DELETED):
            break
        number += 1
        name = derived_name(original.config.name, f"-replay{number}")
    # What it took over is in its own record: the other study may have grown, or be gone.
    own: dict[str, Any] = {"study.name": name, "study.fork_from": None}
    # The total counts the trials that failed, since all are run again.
    own |= {"study.count_failed": True, "study.workers": 1}
    own |= {"tracking.name": "none", "launcher.name": "processes"}
    return with_values(recorded, _as_it_ended(notes) | own)


def _as_it_ended(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a study may change meanwhile, as they were at its champion."""
    return {f"study.{name}": value for name, value in notes["champion"]["asked"].items()}


def compare_studies(original: TrialStore, again: TrialStore) -> list[str]:
    """Return what differs between two studies, trial by trial and in their champions."""
    results = []
    for search in (original, again):
        found = {f"trial {row.number}": _result(row) for row in search.rows()}
        champion = search.notes().get("champion", {})
        kept = ("trial", "values", "val_accuracy", "test_accuracy")
        results.append(found | {"champion": {k: champion.get(k) for k in kept}})
    first, second = results
    missing = {"state": "missing"}
    parted = []
    for name in sorted(first | second, key=lambda n: (n == "champion", len(n), n)):
        was, now = (side.get(name, missing) for side in (first, second))
        changed = [
            f"{key} was {was.get(key)}, is {now.get(key)}"
            for key in sorted(was | now)
            if was.get(key) != now.get(key)
        ]
        if changed:
            parted.append(f"{name}: {'; '.join(changed)}")
    return parted


def _result(row: TrialRow) -> dict[str, Any]:
    metrics = {k: v for k, v in row.notes.get("metrics", {}).items() if k not in MACHINE_METRICS}
    return {"state": row.state, "value": row.value, **row.values, **metrics}


def _record(
    records: Records,
    config: Config,
    original: RunRow | None,
    verdict: str,
    parted: Sequence[str],
    environment: Mapping[str, Any],
) -> RunRecorder:
    """Record a run that has the verdict."""
    tags = {"digitlab.reproduction_of": original.run_id if original else ""}
    tags["digitlab.verdict"] = verdict
    identity = Identity(config.study.name, "reproduction", tags, None, (), environment)
    recorder = RunRecorder(records.outbox, config, identity)
    recorder.add_files({"replay.json": json.dumps(list(parted), indent=1).encode()})
    recorder.end("finished")
    return recorder
