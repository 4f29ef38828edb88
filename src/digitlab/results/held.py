"""A study that a command holds as a whole: nobody leads it, and its tracker has all its records."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digitlab.base.errors import UserError, counted, refuse_damage
from digitlab.base.invocation import command, storage_of
from digitlab.records.record import open_records
from digitlab.records.tracker import Tracker
from digitlab.study.storage import leader_lock, open_storage, require_study
from digitlab.study.trials import TrialStore, load_study


@dataclass(frozen=True)
class HeldStudy:
    """A study, and the tracker that has all of its records."""

    store: TrialStore
    tracker: Tracker


@contextmanager
def held_study(name: str, lab: Path, stores: Sequence[str]) -> Iterator[HeldStudy]:
    """Hold a study that is whole, so that no process changes it meanwhile.

    Raises:
        UserError: there is no such study, a process leads it, its runs are in another tracker, or
            records of it are still to be sent.
    """
    address = storage_of(stores)
    storage = open_storage(lab, address)
    require_study(storage, name)  # a lock would leave its file behind
    with leader_lock(storage, lab, name):
        store, config = load_study(lab, name, address)
        with open_records(config, lab) as records:
            if other := other_tracker(store.notes(), records.tracker):
                raise UserError(f"study {name}: {other}")
            waiting = records.outbox.leftovers(store.study_id)
            waiting += records.outbox.held_elsewhere(store.study_id)
            if waiting:
                wait = f"record of study {name} waits", f"records of study {name} wait"
                raise UserError(
                    f"{counted(waiting, *wait)} in the outbox, and it must be whole. "
                    f"End what else records in this lab, and run "
                    f"`{command('audit', name, '--repair', *stores)}` first."
                )
            yield HeldStudy(store, records.tracker)


def other_tracker(notes: Mapping[str, Any], tracker: Tracker) -> str:
    """Return what is wrong if a tracker is not the one of a study of these notes, else nothing.

    MLFLOW_TRACKING_URI is of each call, and what a wrong tracker lacks is not lost.
    """
    with refuse_damage("what is noted of the study's tracker"):
        noted = str(notes.get("fingerprint", {}).get("tracker", tracker.identity))
    if noted == tracker.identity:
        return ""
    there, here = (name.replace(" ", ", experiment ", 1) for name in (noted, tracker.identity))
    return (
        f"its runs are in the tracker {there}, and this call opens {here}. It must be the same: "
        "set MLFLOW_TRACKING_URI to that address, or unset it for the lab's own."
    )
