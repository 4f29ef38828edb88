"""`digitlab export` and `digitlab import`: a study with its runs, from one lab to another."""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage

from digitlab.base.errors import UserError, counted, first_line, visible
from digitlab.base.files import open_output
from digitlab.base.invocation import command
from digitlab.config.compose import compose
from digitlab.config.recorded import config_from_yaml, config_to_yaml, with_values
from digitlab.config.types import Config
from digitlab.data.datasets import OWN, own_folder
from digitlab.records.reader import recorded_config, recorded_data
from digitlab.records.record import datasets_of, open_tracker
from digitlab.records.tracker import Dataset, LogBatch, NewRun, RunRow, Tracker
from digitlab.results.audit import find_damage
from digitlab.results.bundle import (
    Bundle,
    Index,
    RunPart,
    TrialPart,
    opened_bundle,
    refuse_bundle,
    write_bundle,
)
from digitlab.results.held import held_study
from digitlab.results.missing import missing_runs
from digitlab.study.goal import Goal
from digitlab.study.storage import leader_lock, open_storage, study_names

_RUN_OF = ("mlflow.parentRunId", "digitlab.weights_run", "digitlab.superseded_by")  # tags: run ids


_PLACES = ("tracking.uri=", "tracking.experiment=", "study.storage=")  # words that name stores
_IMPORTING = "importing"  # the attribute of a study that is being imported; its config comes last


def export_study(name: str, target: Path, lab: Path, stores: Sequence[str]) -> int:
    """Write a study, its trials, its runs and their files into one file; return 0.

    Raises:
        UserError: the study is in use, or not whole here, a run is not as it was recorded, or was
            deleted in the tracker, or the file is there already, or cannot be written.
    """
    # Whatever stands there may be an export, and the only copy of another study.
    with held_study(name, lab, stores) as study, open_output(target, str(target), lab) as output:
        store, tracker = study.store, study.tracker
        rows = tracker.find({"digitlab.study_id": store.study_id})
        damaged = find_damage(tracker, rows)
        if damaged:
            raise UserError(
                f"study {name} cannot be exported, as its record is damaged: "
                f"{damaged[0].detail}. Train it again."
            )
        missing = missing_runs(store.notes(), store.study_id, tracker, rows, store.rows())
        for one in missing:
            if one.run_id is not None:
                raise UserError(
                    f"study {name} would not be exported as a whole: {one.detail}. Restore it, and "
                    f"whatever else `{command('audit', name, *stores)}` names, then export again."
                )
        trials = [TrialPart.of(trial) for trial in store.study.get_trials(deepcopy=False)]
        runs = [_part(tracker, row) for row in rows]
        index = Index(1, name, store.notes(), trials, runs)
        with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as file:
            write_bundle(file, index, _contents(tracker, rows))
    print(f"written: {target}: {_described(name, len(trials), len(runs))}")
    for one in missing:
        print(f"the export lacks a run: {one.detail}")
    data = own_folder(config_from_yaml(str(store.notes()["config"])).data.name, lab)
    if data is not None:
        print(visible(f"the export holds no images: copy {data} into data/ of the other lab, too"))
    return 0


def _described(name: str, trials: int, runs: int) -> str:
    return f"study {name} with {counted(trials, 'trial')} and {counted(runs, 'run')}"


def _part(tracker: Tracker, row: RunRow) -> RunPart:
    times = row.started_ms, row.ended_ms
    history = tracker.history(row.run_id)
    return RunPart(
        row.run_id, row.name, row.status, row.tags, row.params, row.metrics, *times, history, {}
    )


def _contents(tracker: Tracker, rows: Sequence[RunRow]) -> Iterator[tuple[str, str, bytes]]:
    for row in rows:
        for path in tracker.files(row.run_id):
            yield row.run_id, path, tracker.artifact(row.run_id, path)


def import_study(path: Path, lab: Path, stores: Sequence[str]) -> int:
    """Verify a study that was exported, and record it here; return 0.

    Runs get new ids. Optuna's study comes last: an import that was killed is started again, and
    finds the runs that it has recorded by their keys. The model that the champion registered is not
    imported: MLflow's registry here has none of it.

    Raises:
        UserError: the file is damaged, or a study of this name is here already.
    """
    config = compose("train", stores)[0].config
    storage = open_storage(lab, config.study.storage)
    with opened_bundle(path) as bundle:
        index = bundle.index
        name, rows = index.study, bundle.find({})
        with refuse_bundle(path):
            recorded = _placed(config_from_yaml(index.notes["config"]), config, name)
            _verify(bundle, rows)
            directions = Goal.of(recorded.study).directions
            trials = [part.trial(len(directions)) for part in index.trials]
        with leader_lock(storage, lab, name):
            tracker = open_tracker(recorded, lab)
            _refuse_known(storage, tracker, name, index.notes["study_id"])
            _refuse_originals(tracker, name, index.notes["study_id"], rows)
            ids = _record(tracker, bundle, rows)
            _insert(storage, index, trials, recorded, tracker.identity, ids, stores)
    print(f"imported: {_described(name, len(trials), len(rows))}")
    data = own_folder(recorded.data.name, lab)
    if data is not None and not (data / OWN).is_file():
        where = f"copy data/{recorded.data.name} of the other lab to {data}"
        print(visible(f"its images are not here: {where}"))
    print(f"look at it: {command('show', name, *stores)}")
    return 0


def _verify(bundle: Bundle, rows: Sequence[RunRow]) -> None:
    """Raise ValueError unless each file is the one exported, and each record the one sealed."""
    for row in rows:
        if "digitlab.record" not in row.tags:
            raise ValueError(f"run {row.run_id} lacks the key of its record")
        for path in bundle.files(row.run_id):
            bundle.artifact(row.run_id, path)
        try:
            _datasets(bundle, row)
        except UserError as error:
            raise ValueError(first_line(error)) from error
    damaged = find_damage(bundle, rows)
    if damaged:
        raise ValueError(damaged[0].detail)


def _datasets(bundle: Bundle, row: RunRow) -> list[Dataset]:
    """Return what a run has read, or its champion was measured on: it follows from the record."""
    fit = bundle.parts.get(row.tags.get("digitlab.weights_run", ""))  # of a champion
    source = fit.row() if fit else row
    read = recorded_data(source)
    found = datasets_of(recorded_config(bundle, source).data, read) if read else []
    return found[-1:] if fit else found


def _placed(recorded: Config, here: Config, name: str) -> Config:
    """Return the study's configuration, with its stores where this lab's are."""
    tracking = {"uri": here.tracking.uri, "experiment": here.tracking.experiment}
    values: dict[str, Any] = {f"tracking.{key}": value for key, value in tracking.items()}
    values |= {"study.storage": here.study.storage, "study.name": name}
    return with_values(recorded, values)


def _refuse_known(storage: RDBStorage, tracker: Tracker, name: str, study_id: str) -> None:
    foreign = [
        row
        for row in tracker.find({"digitlab.study": name, "digitlab.kind": "study"})
        if row.tags.get("digitlab.study_id") != study_id
    ]
    known = name in study_names(storage)
    if known and not foreign:
        number = storage.get_study_id_from_name(name)
        notes = storage.get_study_user_attrs(number)
        if _IMPORTING in notes and "config" not in notes:  # a call that was killed has left it
            storage.delete_study(number)
            known = False
    if foreign or known:
        raise UserError(
            f"study {name} is here already: a name belongs to one study. Import it into another "
            "lab, with DIGITLAB_HOME=FOLDER."
        )


def _refuse_originals(tracker: Tracker, name: str, study_id: str, rows: Sequence[RunRow]) -> None:
    """Refuse the tracker that the runs came from: an import would write into them."""
    exported = {row.run_id for row in rows}
    if any(row.run_id in exported for row in tracker.find({"digitlab.study_id": study_id})):
        raise UserError(
            f"study {name} has its runs in this tracker already: an import must go into another. "
            "Give tracking.uri=ADDRESS, or unset MLFLOW_TRACKING_URI for the lab's own."
        )


def _record(tracker: Tracker, bundle: Bundle, rows: Sequence[RunRow]) -> dict[str, str]:
    """Record the runs; return their new ids by the old ones."""
    ids: dict[str, str] = {}
    for row in rows:
        new = NewRun(row.name, {}, {}, None, row.tags["digitlab.record"], row.started_ms)
        ids[row.run_id] = tracker.create_run(new, may_exist=True)
    for row in rows:
        run_id = ids[row.run_id]
        tags = {k: ids.get(v, v) if k in _RUN_OF else v for k, v in row.tags.items()}
        # Of several values at one step the last to be logged was the run's: it is later here, too.
        metrics = [
            (name, value, step, row.started_ms + (value == row.metrics.get(name)))
            for name, step, value in bundle.history(row.run_id)
        ]
        tracker.log(run_id, LogBatch(row.params, metrics, tags, _datasets(bundle, row)))
        paths = bundle.files(row.run_id)
        tracker.upload(run_id, {path: bundle.artifact(row.run_id, path) for path in paths})
        state = row.tags.get("digitlab.state", "running")
        if row.is_ended:
            tracker.end_run(run_id, state, row.ended_ms)
    return ids


def _insert(
    storage: RDBStorage, index: Index, trials: Sequence[Any], recorded: Config, tracker: str,
    ids: dict[str, str], stores: Sequence[str],
) -> None:  # fmt: skip
    study = storage.create_new_study(Goal.of(recorded.study).directions, index.study)
    storage.set_study_user_attr(study, _IMPORTING, True)
    for trial in trials:
        storage.create_new_trial(study, template_trial=trial)
    notes = {key: value for key, value in index.notes.items() if key != "config"}
    notes["fingerprint"] = notes.get("fingerprint", {}) | {"tracker": tracker}
    # The command that goes on is printed with them.
    own = [word for word in notes.get("overrides", []) if not word.startswith(_PLACES)]
    notes["overrides"] = [*own, *stores]
    for place in (notes, notes.get("champion", {})):
        if "run_id" in place:
            place["run_id"] = ids.get(place["run_id"], place["run_id"])
    for key, value in notes.items():
        storage.set_study_user_attr(study, key, value)
    storage.set_study_user_attr(study, "config", config_to_yaml(recorded))  # last: it is whole now
