"""Records of runs in MLflow. No module but those named mlflow... in this room imports mlflow."""

import json
import logging
import os
import re
import shlex
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

from filelock import FileLock

from digitlab.base.errors import UserError, first_line, nearest, visible
from digitlab.base.files import disk_problem
from digitlab.base.paths import sqlite_address
from digitlab.base.server import with_timeouts
from digitlab.records import local
from digitlab.records.local import (
    LOCATION,
    list_artifacts,
    place_of,
    prepare_database,
    sqlite_uri,
    write_artifacts,
)
from digitlab.records.tracker import (
    Dataset,
    LogBatch,
    NewRun,
    Registration,
    RunRow,
    Tracker,
    TrackerAway,
    TrackerRefused,
)

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # s
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the outbox tries again

from mlflow import MlflowClient, entities
from mlflow.entities import (
    DatasetInput,
    Experiment,
    InputTag,
    LifecycleStage,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException

from digitlab.records.mlflow_errors import http_status, translated
from digitlab.records.mlflow_models import log_model, model_files, owner_of, register_model

logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it logs what it then raises

_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "pruned": "KILLED",
    "interrupted": "KILLED",
}
_LONGEST = 6000  # characters of a parameter's value in MLflow's stores
_PAGES = "http://127.0.0.1:5000"  # where `digitlab ui` serves what is in the lab
_MOST_PARAMS, _MOST_METRICS, _MOST_TAGS = 100, 700, 100  # in one call


def _open(uri: str | None, name: str, lab: Path) -> tuple[MlflowClient, Experiment]:
    """Return a client and its experiment, which is made where there is none."""
    if uri is None:
        with FileLock(lab / "mlflow.lock"):  # processes that open an empty database fail
            prepare_database(lab, _make_tables)
            return _open(sqlite_uri(lab), name, lab)
    if uri.startswith(("sqlite", "postgresql", "mysql", "mssql")):
        # MLflow would try for minutes, and say nothing. Its import takes 0.4 s.
        from mlflow.store.db.utils import create_sqlalchemy_engine

        if uri.startswith("sqlite:///"):  # MLflow, too, makes the folder of a file
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        uri = with_timeouts(uri) if uri.startswith("postgresql") else uri
        engine = create_sqlalchemy_engine(uri)  # type: ignore[no-untyped-call]
        engine.connect().close()
        engine.dispose()
    client = MlflowClient(uri)
    if client.get_experiment_by_name(name) is None:
        try:
            client.create_experiment(name, None if uri.startswith("http") else LOCATION)
        except MlflowException:
            if client.get_experiment_by_name(name) is None:  # else another process was faster
                raise
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return client, experiment


def _command(uri: str) -> str:
    return f"MLFLOW_TRACKING_URI={shlex.quote(_shown(uri))} {sys.executable} -m mlflow"


def _require_active(experiment: Experiment, command: str) -> None:
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise TrackerRefused(
            f"MLflow's experiment '{experiment.name}' was deleted, and takes no runs. Restore it "
            f"with `{command} experiments restore --experiment-id {experiment.experiment_id}`, or "
            "use another with tracking.experiment=NAME."
        )


def _shown(uri: str) -> str:
    """Return an address without password and options."""
    return re.sub(r"//[^/@]*@", "//", uri).split("?")[0]


class MlflowTracker(Tracker):
    """MLflow on sqlite in the lab, or on the server or database of `uri`."""

    def __init__(self, uri: str | None, experiment: str, lab: Path) -> None:
        """Open or create the experiment; TrackerAway or UserError if it cannot be used."""
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        self.lab, self.uri = lab, uri or sqlite_uri(lab)
        self.where, self.command = _shown(uri) if uri else "lab", _command(self.uri)
        self.identity, self.is_server = f"{self.where} {experiment}", self.uri.startswith("http")
        try:
            self.client, self.opened = _open(uri, experiment, lab)
        except Exception as error:
            problem = disk_problem(error)
            is_away = not problem and (http_status(error) or 400) >= 500
            place = f"tracking.uri={self.where}" if uri else str(lab / "mlflow.db")
            raise (TrackerAway if is_away else UserError)(
                f"{place} cannot be used ({problem or first_line(error)}). It must be an MLflow "
                "server or a writable database. Correct it, or record nothing with tracking=none."
            ) from error
        self.experiment: str = self.opened.experiment_id
        _require_active(self.opened, self.command)
        # MLflow's server handles these artifacts for its clients; without one, they are files here.
        self.location: str = self.opened.artifact_location.rstrip("/")  # of all runs' artifacts
        self.is_local = self.location.startswith(LOCATION.rstrip("/")) and not self.is_server

    @translated
    def create_run(self, run: NewRun, may_exist: bool = False) -> str:
        mine = f"tags.`digitlab.record` = '{run.key}'"
        found = self.client.search_runs([self.experiment], mine, ViewType.ALL) if may_exist else []
        whole = max(found, key=lambda one: len(one.data.params), default=None)
        run_id = _run_id(whole or _create(self.client, self.experiment, run))
        if self.is_server:
            _remove_twins(self.client, self.client.search_runs([self.experiment], mine), run_id)
        return run_id

    @translated
    def log(self, run_id: str, batch: LogBatch) -> None:
        for part in _parts(batch):
            self.client.log_batch(run_id, *part)
        if batch.datasets:
            self.client.log_inputs(run_id, list(map(_input, batch.datasets)))

    @translated
    def upload(self, run_id: str, files: Mapping[str, bytes]) -> None:
        _write(self.local_folder(run_id), files, partial(self.client.log_artifacts, run_id))
        if not self.is_local:
            _require_stored(self.client, run_id, files)

    @translated
    def register(self, run_id: str, what: Registration) -> None:
        logged = log_model(self.client, run_id, what)
        place = place_of(self.lab, logged.artifact_location) if self.is_local else None
        send = partial(self.client.log_model_artifacts, logged.model_id)
        _write(place, model_files(self, run_id), send)
        register_model(self.client, run_id, logged, what)

    @translated
    def owner_of(self, model: str) -> str | None:
        return owner_of(self.client, model)

    @translated
    def end_run(self, run_id: str, state: str, time_ms: int) -> None:
        if state == "running":
            self.client.update_run(run_id, _STATUS[state])
        else:
            self.client.set_terminated(run_id, _STATUS[state], time_ms)

    @translated
    def find(self, tags: Mapping[str, str]) -> list[RunRow]:
        return _search(self.client, self.experiment, tags)

    @translated
    def find_deleted(self, tags: Mapping[str, str]) -> list[RunRow]:
        return _search(self.client, self.experiment, tags, ViewType.DELETED_ONLY)

    @translated
    def get(self, run: str) -> RunRow:
        try:
            return _row(self.client.get_run(run))
        except MlflowException as error:
            if http_status(error) not in (400, 404):
                raise
        return _match(run, _search(self.client, self.experiment, {}))

    @translated
    def is_deleted(self, run_id: str) -> bool:
        _require_active(self.client.get_experiment(self.experiment), self.command)
        try:
            stage = self.client.get_run(run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # by `mlflow gc`: no proxy's 404
                return True
            raise
        return bool(stage == LifecycleStage.DELETED)

    @translated
    def history(self, run_id: str) -> list[tuple[str, int, float]]:
        names = self.client.get_run(run_id).data.metrics
        points = (p for name in names for p in self.client.get_metric_history(run_id, name))
        return sorted((p.key, p.step, p.value) for p in points)

    @translated
    def artifact(self, run_id: str, path: str) -> bytes:
        place = self.client.get_run(run_id).info.artifact_uri
        try:
            if not self.is_server and place.startswith(LOCATION):
                return place_of(self.lab, place, path).read_bytes()
            with tempfile.TemporaryDirectory() as folder:
                return Path(self.client.download_artifacts(run_id, path, folder)).read_bytes()
        except (MlflowException, OSError) as error:
            if disk_problem(error):
                raise
            self.client.get_run(run_id)  # raises when it is the tracker that is away
            raise UserError(
                f"Run {run_id} has no artifact {path}: it was not recorded, or removed since. "
                "Restore it from a copy, or train the run again."
            ) from error

    @translated
    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.log(run_id, LogBatch(tags=dict(tags)))

    @translated
    def delete(self, run_id: str) -> None:
        self.client.delete_run(run_id)

    @translated
    def restore(self, run_id: str) -> None:
        self.client.restore_run(run_id)

    @translated
    def files(self, run_id: str) -> list[str]:
        place = self.client.get_run(run_id).info.artifact_uri
        if not self.is_server and place.startswith(LOCATION):
            return list_artifacts(place_of(self.lab, place))
        return sorted(_listed(self.client, run_id))

    def local_folder(self, run_id: str) -> Path | None:
        # As MLflow composes the place of a run in an experiment's.
        return place_of(self.lab, f"{self.location}/{run_id}/artifacts") if self.is_local else None

    @translated
    def set_experiment_tags(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_experiment_tag(self.experiment, key, value)

    def runs_page(self) -> str:
        server = self.uri if self.is_server else _PAGES
        return f"{server}/#/experiments/{self.experiment}/runs?workflowType=machine_learning"


def _write(place: Path | None, files: Mapping[str, bytes], send: Callable[[str], None]) -> None:
    """Write artifacts to their place on this disk, or have `send` take a folder of them."""
    if place is not None:
        write_artifacts(place, files)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_artifacts(Path(folder), files)
        send(folder)


def _create(client: MlflowClient, experiment: str, run: NewRun) -> Run:
    tags = {**run.tags, "digitlab.record": run.key}
    if run.parent_run_id:
        tags["mlflow.parentRunId"] = run.parent_run_id
    return client.create_run(experiment, run.time_ms, tags, run.name)


def _remove_twins(client: MlflowClient, found: Iterable[Run], run_id: str) -> None:
    """Delete what was made twice: MLflow's client repeats a request that is answered too late."""
    for other in found:
        if _run_id(other) != run_id and not other.data.params:
            client.delete_run(other.info.run_id)


def _require_stored(client: MlflowClient, run_id: str, files: Mapping[str, bytes]) -> None:
    """Raise ConnectionError for a file that is not there: MLflow's client believes any 200."""
    sizes = _listed(client, run_id)
    if any(sizes.get(path) != len(content) for path, content in files.items()):
        raise ConnectionError("a file that was sent is not there")


def _listed(client: MlflowClient, run_id: str) -> dict[str, int]:
    """Return the bytes of each artifact, by its path."""
    sizes, folders = dict[str, int](), [""]
    while folders:
        for file in client.list_artifacts(run_id, folders.pop() or None):
            if file.is_dir:
                folders.append(file.path)
            else:
                sizes[file.path] = file.file_size or 0
    return sizes


def _parts(batch: LogBatch) -> Iterator[tuple[list[Metric], list[Param], list[RunTag]]]:
    """Yield metrics, parameters and tags, as many as MLflow takes in one call."""
    params = [
        Param(key if not part else f"{key}/{part}", value[at : at + _LONGEST])
        for key, value in batch.params.items()
        for part, at in enumerate(range(0, len(value) or 1, _LONGEST))
    ]
    metrics = [Metric(name, value, ms, step) for name, value, step, ms in batch.metrics]
    tags = [RunTag(key, value) for key, value in batch.tags.items()]
    while params or metrics or tags:
        yield metrics[:_MOST_METRICS], params[:_MOST_PARAMS], tags[:_MOST_TAGS]
        del metrics[:_MOST_METRICS], params[:_MOST_PARAMS], tags[:_MOST_TAGS]


def _input(dataset: Dataset) -> DatasetInput:
    source = json.dumps({"uri": f"data/{dataset.name}"})  # in the lab
    tags = [InputTag("mlflow.data.context", dataset.context)]
    return DatasetInput(entities.Dataset(dataset.name, dataset.digest, "local", source), tags)


def _search(
    client: MlflowClient, experiment: str, tags: Mapping[str, str], view: int = ViewType.ACTIVE_ONLY
) -> list[RunRow]:
    # MLflow's grammar cannot express a value that holds a quote.
    text = " and ".join(f"tags.`{k}` = '{value}'" for k, value in tags.items() if "'" not in value)
    rows: list[RunRow] = []
    token: str | None = ""
    while token is not None:
        page = client.search_runs([experiment], text, view, 1000, ["start_time ASC"], token or None)
        rows += map(_row, page)
        token = page.token or None
    return [row for row in rows if tags.items() <= row.tags.items()]


def _match(run: str, rows: list[RunRow]) -> RunRow:
    """Return the one row that has the name, or whose id begins so."""
    matches = [row for row in rows if row.name == run]
    matches = matches or [row for row in rows if len(run) >= 4 and row.run_id.startswith(run)]
    finished = [row for row in matches if row.status == "FINISHED"]
    if len(matches) == 1 or len(finished) == 1:
        return (finished or matches)[0]
    if matches:
        ids = ", ".join(row.run_id[:8] for row in matches[-5:])
        raise UserError(
            f"{run}: {len(matches)} runs have this name: it must name one. Give an id: {ids}"
        )
    raise UserError(f"{run}: no such run, {nearest(run, {row.name for row in rows})}")


def _make_tables(path: Path) -> None:
    MlflowClient(sqlite_address(path)).search_experiments(max_results=1)


def save_tables() -> None:
    """Make the tables for labs to come; `make setup` does it."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "mlflow.db")
        prepare_database(Path(folder), _make_tables)
        with closing(sqlite3.connect(made)) as database:
            database.execute("PRAGMA journal_mode=DELETE")  # all of it in the one file
        local.TABLES.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, new := local.TABLES.with_suffix(".new"))
        new.replace(local.TABLES)


def _run_id(run: Run) -> str:
    """Return a run's id; MLflow's client takes an empty answer of a server for a run without."""
    if not run.info.run_id:
        raise ConnectionError("the answer holds no run")
    return str(run.info.run_id)


def _row(run: Run) -> RunRow:
    data, info = run.data, run.info
    held = data.tags, data.params, data.metrics, info.start_time or 0, info.end_time or 0
    return RunRow(_run_id(run), visible(info.run_name), info.status, *held)
