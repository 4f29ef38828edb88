"""`digitlab delete` and `digitlab restore`: a study with its runs is hidden, and brought back.

Nothing is erased: MLflow hides the runs, and a note on Optuna's study hides it from digitlab.
"""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from digitlab.base.errors import UserError, counted, nearest
from digitlab.base.invocation import command, storage_of
from digitlab.config.recorded import config_from_yaml
from digitlab.records.record import open_tracker
from digitlab.results.held import held_study, other_tracker
from digitlab.study.storage import DELETED, leader_lock, open_storage, study_names, study_notes


def delete_study(name: str, lab: Path, stores: Sequence[str], yes: bool) -> int:
    """Hide a study and its runs; return 0, or 1 where the answer is no.

    Raises:
        UserError: the study is in use, or not whole here, or nobody is there to be asked.
    """
    with held_study(name, lab, stores) as study:
        store, tracker = study.store, study.tracker
        runs = [row.run_id for row in tracker.find({"digitlab.study_id": store.study_id})]
        trials = counted(len(store.rows()), "trial")
        what = f"study {name} with {trials} and {counted(len(runs), 'run')}"
        if not yes and not _agreed(what):
            print("nothing was deleted")
            return 1
        # The note first: a call that is killed has then hidden the study, and is undone as a whole.
        deleted = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "runs": runs}
        store.note(DELETED, deleted)
        for run in runs:
            tracker.delete(run)
    print(f"deleted: {what}; bring it back with: {command('restore', name, *stores)}")
    return 0


def _agreed(what: str) -> bool:
    print(f"delete {what}? It can be restored. [y/N] ", end="", flush=True)
    answer = sys.stdin.readline() if sys.stdin is not None else ""
    if not answer:
        raise UserError("delete asks first, and standard input is closed: answer, or give --yes.")
    return answer.strip().lower() in ("y", "yes")


def restore_study(name: str, lab: Path, stores: Sequence[str]) -> int:
    """Bring back a study and the runs that were deleted with it; return 0.

    Raises:
        UserError: no such study was deleted, its runs are in another tracker, or one is gone for
            good.
    """
    storage = open_storage(lab, storage_of(stores))
    notes = _notes(storage, name)
    if not notes.get(DELETED):
        deleted = [each for each in study_names(storage) if _notes(storage, each).get(DELETED)]
        raise UserError(f"study {name} was not deleted: {nearest(name, deleted)}")
    with leader_lock(storage, lab, name):
        tracker = open_tracker(config_from_yaml(str(notes["config"])), lab)
        if other := other_tracker(notes, tracker):
            raise UserError(f"study {name} cannot be restored: {other}")
        for run in notes[DELETED]["runs"]:
            tracker.restore(run)
        storage.set_study_user_attr(storage.get_study_id_from_name(name), DELETED, None)
    print(f"restored: study {name} with {counted(len(notes[DELETED]['runs']), 'run')}")
    return 0


def _notes(storage: Any, name: str) -> dict[str, Any]:
    if name not in study_names(storage):
        return {}
    return study_notes(storage, name)
