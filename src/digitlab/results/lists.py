"""`digitlab runs` and `digitlab studies`: what is recorded, in the order that `--help` names."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from digitlab.base.console import print_table, table
from digitlab.base.errors import refuse_damage
from digitlab.base.invocation import SHORT_ID, command, storage_of
from digitlab.records.reader import lab_tracker
from digitlab.records.tracker import RunRow
from digitlab.study.mirror import RESULT
from digitlab.study.storage import (
    DELETED,
    open_storage,
    refuse_deleted,
    require_study,
    study_notes,
)
from digitlab.study.trials import is_own


def list_runs(
    lab: Path, stores: Sequence[str], wanted: Mapping[str, str | None], form: str, most: int
) -> int:
    """Print the runs whose tags are as wanted; return 0.

    Those measured on test images come before those of validation images, and these before pruned
    ones; the best of each come first.

    Args:
        wanted: values of the tags digitlab.*; None for any.
        form: table, json or csv.
        most: runs to print; 0 for all.
    """
    tags = {f"digitlab.{key}": value for key, value in wanted.items() if value is not None}
    found = lab_tracker(lab, stores).find(tags)
    study = wanted["study"]
    if study is not None and not found:
        storage = open_storage(lab, storage_of(stores))
        require_study(storage, study)
        refuse_deleted(study, study_notes(storage, study))
    rows = [row for row in found if wanted["kind"] or not _is_beside(row)]
    rows.sort(key=_rank)
    shown = rows[:most] if most else rows
    _write([_run(row) for row in shown], form, _RUN_COLUMNS)
    if form == "table" and len(shown) < len(rows):
        chosen = (f"--{key}={value}" for key, value in wanted.items() if value)
        everything = command("runs", "--most=0", *chosen, *stores)
        print(f"{len(shown)} of {len(rows)} runs; all: {everything}")
    return 0


def _is_beside(row: RunRow) -> bool:
    """Whether a run is listed only where its kind is asked for.

    A study's own run trains nothing: `digitlab studies` lists it. An earlier champion is none.
    """
    kind, is_superseded = row.tags.get("digitlab.kind"), "digitlab.superseded_by" in row.tags
    return kind == "study" or (kind == "champion" and is_superseded)


def _rank(row: RunRow) -> tuple[int, float, int]:
    shown = (_test_accuracy(row), *(row.metrics.get(name) for name in _METRICS[:2]))
    for place, accuracy in enumerate(shown):
        if accuracy is not None:
            return place, -accuracy, row.started_ms
    return len(shown), 0.0, -row.started_ms


def _test_accuracy(row: RunRow) -> float | None:
    """Return the accuracy on test images: of a champion, the mean of its final fits."""
    return row.metrics.get("test_accuracy", row.metrics.get("test_accuracy_mean"))


def _run(row: RunRow) -> dict[str, Any]:
    names = ("kind", "state", "study", "trial")
    started = datetime.fromtimestamp(row.started_ms / 1000).astimezone()
    return {
        "run_id": row.run_id,
        "name": row.name,
        **{name: row.tags.get(f"digitlab.{name}") for name in names},
        "superseded_by": row.tags.get("digitlab.superseded_by"),
        "started": started.isoformat(timespec="seconds"),
        "test_accuracy": _test_accuracy(row),
        **{name: row.metrics.get(name) for name in _METRICS},
        "params": row.params,
    }


def list_studies(lab: Path, stores: Sequence[str], deleted: bool, form: str) -> int:
    """Print the studies that were not deleted, or those that were; return 0."""
    storage = open_storage(lab, storage_of(stores))
    found = []
    for study in storage.get_all_studies():
        notes = study.user_attrs
        if not is_own(notes) or bool(notes.get(DELETED)) != deleted:
            continue
        number = storage.get_study_id_from_name(study.study_name)
        trials = storage.get_all_trials(number, deepcopy=False)
        with refuse_damage(f"what the storage holds of study {study.study_name!r}"):
            found.append(_study(study.study_name, notes, trials))
    found.sort(key=lambda s: (-(s["test_accuracy"] or 0), -(s["val_accuracy"] or 0), s["study"]))
    _write(found, form, _STUDY_COLUMNS)
    return 0


def _study(name: str, notes: Mapping[str, Any], trials: Sequence[Any]) -> dict[str, Any]:
    states = [trial.state.name.lower() for trial in trials]
    test = notes.get("champion", {}).get("test_accuracy", {})
    finished = [trial for trial in trials if trial.state.name == "COMPLETE"]
    values = [trial.user_attrs[RESULT]["metrics"]["val_accuracy"] for trial in finished]
    return {
        "study": name,
        "trials": len(trials),
        "finished": states.count("complete"),
        "pruned": states.count("pruned"),
        "failed": states.count("fail"),
        "val_accuracy": max(values, default=None),
        "test_accuracy": None if not test else float(test["mean"]),
        "test_seeds": test.get("n"),
        "front": notes.get("champion", {}).get("front", []),
        "seconds": notes.get("seconds"),
        "study_id": notes["study_id"],
    }


_METRICS = ("val_accuracy", "rung_accuracy", "seconds", "model_parameters", "training_flops")
_RUN_COLUMNS = {
    "name": "name", "kind": "kind", "state": "state", "val_accuracy": "validation",
    "test_accuracy": "test", "run_id": "run",
}  # fmt: skip
_STUDY_COLUMNS = {
    "study": "study", "trials": "trials", "finished": "finished", "pruned": "pruned",
    "failed": "failed", "val_accuracy": "validation", "test_accuracy": "test",
}  # fmt: skip


def _write(found: Sequence[Mapping[str, Any]], form: str, columns: Mapping[str, str]) -> None:
    if form == "json":
        print(json.dumps(list(found), indent=1))
    elif form == "csv":
        flat = [{**one, **one.get("params", {})} for one in found]
        names = dict.fromkeys(name for one in flat for name in one if name != "params")
        writer = csv.DictWriter(sys.stdout, list(names), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    elif found:
        lines = [[_cell(key, one[key]) for key in columns] for one in found]
        print_table(table("", list(columns.values()), lines, is_cut=True))
    else:
        print("there are none")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.endswith("_accuracy"):
        return f"{value:.2%}"
    if key == "run_id":
        return str(value)[:SHORT_ID]
    return str(value)
