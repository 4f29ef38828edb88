"""Records of runs in MLflow. The only module that imports mlflow."""

import errno
import functools
import logging
import os
import re
import shlex
import shutil
import sqlite3
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from filelock import FileLock

from digitlab.base.errors import UserError, first_line, nearest
from digitlab.base.files import sync_folder
from digitlab.records.store import Batch, NewRun, RunRow, Tracker, TrackerAway, TrackerRefused

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # s
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the outbox tries again

import requests
import sqlalchemy.exc
from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import ERROR_CODE_TO_HTTP_STATUS, InvalidUrlException, MlflowException

logging.getLogger("mlflow").setLevel(logging.ERROR)

_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "pruned": "KILLED",
    "interrupted": "KILLED",
}
_LONGEST = 6000  # characters of a parameter's value in MLflow's stores
_MOST_PARAMS, _MOST_METRICS, _MOST_TAGS = 100, 700, 100  # in one call
# Where a lab's runs have their artifacts: relative to the folder that `digitlab ui` serves them
# from, which is lab/artifacts. An absolute path would break when the lab is moved.
_LOCAL = "mlflow-artifacts:/"

# A locked database is an operational error.
_AWAY = (requests.RequestException, ConnectionError, TimeoutError, sqlalchemy.exc.OperationalError)
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)  # of a disk

_P = ParamSpec("_P")
_T = TypeVar("_T")


def sqlite_uri(lab: Path) -> str:
    """Return the address of the store in the lab; a writer waits up to a minute for another."""
    return f"sqlite:///{lab / 'mlflow.db'}?timeout=60"


def _http_status(error: Exception) -> int | None:
    """Return the HTTP status that an error amounts to; None if it is a mistake in a program."""
    status: int | None = None
    # MLflow reports a status that it has no code for, such as 413, as an internal error.
    found = re.search(r"failed with error code (\d{3}) != 200", str(error))
    if isinstance(error, MlflowException):
        status = ERROR_CODE_TO_HTTP_STATUS.get(error.error_code, 500)
        if found or isinstance(error, InvalidUrlException):
            status = int(found[1]) if found else 400
        # A store wraps whatever is raised inside it.
        elif isinstance(error.__cause__, (TypeError, LookupError, AttributeError)):
            status = None
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
    elif isinstance(error, _AWAY) or getattr(error, "errno", None) in _PASSING:
        status = 503
    elif isinstance(error, (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError)):
        status = 400
    return status


def _translate(error: Exception, where: str) -> Exception:
    """Return an error of MLflow's, or of what it uses, as one of the tracker's."""
    status = _http_status(error)
    if status is None or isinstance(error, UserError):
        return error
    reason = first_line(error)
    if status >= 500 or status in (408, 429):
        return TrackerAway(
            f"The tracker {where} does not answer ({reason}). What was recorded is kept; try again "
            "when it is back."
        )
    return TrackerRefused(f"The tracker {where} refused: {reason}")


def _translated(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make a method of a tracker raise the tracker's errors."""

    @functools.wraps(method)
    def translated(*arguments: _P.args, **named: _P.kwargs) -> _T:
        try:
            return method(*arguments, **named)
        except UserError:
            raise
        except Exception as error:
            tracker = arguments[0]
            assert isinstance(tracker, MlflowTracker)
            explained = _translate(error, tracker.where)
            if explained is error:
                raise
            raise explained from error

    return translated


class MlflowTracker(Tracker):
    """MLflow on sqlite in the lab, or on the server or database of `uri`."""

    def __init__(self, uri: str | None, experiment: str, lab: Path) -> None:
        """Open the experiment; create it where there is none.

        Raises:
            TrackerAway, UserError: it cannot be used, in one line.
        """
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        self.where = first_line(uri).split("?")[0] if uri else "lab"
        self.where = re.sub(r"//[^/@]*@", "//", self.where)
        self.identity = f"{self.where} {experiment}"
        self.artifacts = lab / "artifacts"
        # The address of `digitlab ui`, where the records are in the lab.
        self.server = uri if uri and uri.startswith("http") else "http://127.0.0.1:5000"
        self.is_server = uri is not None and uri.startswith("http")
        self.uri = uri or sqlite_uri(lab)
        try:
            if uri is None:
                with FileLock(lab / "mlflow.lock"):  # processes that open an empty database fail
                    _prepare_database(lab)
                    self.client = MlflowClient(self.uri)
                    found = self._open(experiment)
            else:
                self.client = MlflowClient(uri)
                found = self._open(experiment)
        except Exception as error:
            explained = _translate(error, self.where)
            if isinstance(explained, UserError) and explained is error:
                raise
            kind = TrackerAway if isinstance(explained, TrackerAway) else UserError
            place = f"tracking.uri={self.where}" if uri else str(lab / "mlflow.db")
            raise kind(
                f"{place} cannot be used ({first_line(error)}). It must be an MLflow server or "
                "database. Correct it, or record nothing with tracking=none."
            ) from error
        self.experiment = found.experiment_id
        self.is_local = found.artifact_location.startswith(_LOCAL) and not self.is_server

    def _open(self, name: str) -> Experiment:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            with suppress(MlflowException):  # another process was faster
                self.client.create_experiment(name, None if self.is_server else _LOCAL)
            found = self.client.get_experiment_by_name(name)
            assert found is not None
        self._require_active(found)
        return found

    def _require_active(self, experiment: Experiment) -> None:
        if experiment.lifecycle_stage == LifecycleStage.DELETED:
            address = shlex.quote(re.sub(r"//[^/@]*@", "//", self.uri.split("?")[0]))
            command = f"{sys.executable} -m mlflow experiments restore --experiment-id"
            raise TrackerRefused(
                f"MLflow's experiment '{experiment.name}' was deleted, and takes no runs. Restore "
                f"it: MLFLOW_TRACKING_URI={address} {command} {experiment.experiment_id}; or use "
                "another: tracking.experiment=NAME"
            )

    @_translated
    def create_run(self, run: NewRun, may_exist: bool = False) -> str:
        if may_exist:
            mine = f"tags.`digitlab.record` = '{run.key}'"
            found = self.client.search_runs([self.experiment], mine, ViewType.ALL)
            if found:
                return str(found[-1].info.run_id)
        tags = {**run.tags, "digitlab.record": run.key}
        if run.parent_run_id:
            tags["mlflow.parentRunId"] = run.parent_run_id
        return str(self.client.create_run(self.experiment, run.time_ms, tags, run.name).info.run_id)

    @_translated
    def log(self, run_id: str, batch: Batch) -> None:
        params = [
            Param(key if not part else f"{key}/{part}", value[at : at + _LONGEST])
            for key, value in batch.params.items()
            for part, at in enumerate(range(0, len(value) or 1, _LONGEST))
        ]
        metrics = [Metric(name, value, ms, step) for name, value, step, ms in batch.metrics]
        tags = [RunTag(key, value) for key, value in batch.tags.items()]
        while params or metrics or tags:
            self.client.log_batch(
                run_id, metrics[:_MOST_METRICS], params[:_MOST_PARAMS], tags[:_MOST_TAGS]
            )
            del metrics[:_MOST_METRICS], params[:_MOST_PARAMS], tags[:_MOST_TAGS]

    @_translated
    def upload(self, run_id: str, files: Mapping[str, bytes]) -> None:
        if self.is_local:
            _write_all(self.artifacts / run_id / "artifacts", files)
            return
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self.client.log_artifacts(run_id, folder)

    @_translated
    def end_run(self, run_id: str, state: str, time_ms: int) -> None:
        if state == "running":
            self.client.update_run(run_id, _STATUS[state])
        else:
            self.client.set_terminated(run_id, _STATUS[state], time_ms)

    @_translated
    def find(self, tags: Mapping[str, str]) -> list[RunRow]:
        text = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        return self._search(text)

    def _search(self, text: str) -> list[RunRow]:
        rows: list[RunRow] = []
        token: str | None = ""
        while token is not None:
            page = self.client.search_runs(
                [self.experiment],
                text,
                ViewType.ACTIVE_ONLY,
                1000,
                ["start_time ASC"],
                token or None,
            )
            rows += map(_row, page)
            token = page.token or None
        return rows

    @_translated
    def get(self, run: str) -> RunRow:
        try:
            return _row(self.client.get_run(run))
        except MlflowException as error:
            if _http_status(error) not in (400, 404):
                raise
        rows = self._search("")
        matches = [row for row in rows if row.name == run]
        matches = matches or [row for row in rows if len(run) >= 4 and row.run_id.startswith(run)]
        finished = [row for row in matches if row.status == "FINISHED"]
        if len(matches) == 1 or len(finished) == 1:
            return (finished or matches)[0]
        if matches:
            ids = ", ".join(row.run_id[:8] for row in matches[-5:])
            raise UserError(f"{run}: {len(matches)} runs have this name; give an id: {ids}")
        raise UserError(f"{run}: no such run, {nearest(run, {row.name for row in rows})}")

    @_translated
    def is_deleted(self, run_id: str) -> bool:
        self._require_active(self.client.get_experiment(self.experiment))
        try:
            stage = self.client.get_run(run_id).info.lifecycle_stage
        except MlflowException as error:
            if _http_status(error) == 404:  # removed for good by `mlflow gc`
                return True
            raise
        return bool(stage == LifecycleStage.DELETED)

    @_translated
    def history(self, run_id: str) -> list[tuple[str, int, float]]:
        names = self.client.get_run(run_id).data.metrics
        return sorted(
            (name, metric.step, metric.value)
            for name in names
            for metric in self.client.get_metric_history(run_id, name)
        )

    @_translated
    def artifact(self, run_id: str, path: str) -> bytes:
        place = self.client.get_run(run_id).info.artifact_uri
        missing = UserError(f"Run {run_id} has no artifact {path}.")
        if not self.is_server and place.startswith(_LOCAL):
            folder = _below(self.artifacts, place.removeprefix(_LOCAL))
            try:
                return _below(folder, path).read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise missing from None
        try:
            with tempfile.TemporaryDirectory() as folder_name:
                local = self.client.download_artifacts(run_id, path, folder_name)
                return Path(local).read_bytes()
        except (MlflowException, OSError) as error:
            if (_http_status(error) or 500) >= 500:
                raise
            raise missing from error

    @_translated
    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.log(run_id, Batch(tags=dict(tags)))

    @_translated
    def delete(self, run_id: str) -> None:
        self.client.delete_run(run_id)

    @_translated
    def register(self, model: str, run_id: str, tags: Mapping[str, str], card: str) -> None:
        if not self.client.search_registered_models(f"name = '{model}'"):
            self.client.create_registered_model(model)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/model"
        made = self.client.create_model_version(model, source, run_id, dict(tags), description=card)
        self.client.set_registered_model_alias(model, "champion", made.version)

    @_translated
    def set_experiment_tags(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_experiment_tag(self.experiment, key, value)

    def runs_page(self) -> str:
        page = f"#/experiments/{self.experiment}/runs?workflowType=machine_learning"
        return f"{self.server}/{page}"


def _row(run: Run) -> RunRow:
    data, info = run.data, run.info
    return RunRow(
        info.run_id,
        info.run_name,
        info.status,
        dict(data.tags),
        dict(data.params),
        dict(data.metrics),
    )


def _below(folder: Path, path: str) -> Path:
    """Return a path below a folder; a store's content must not lead anywhere else."""
    found = (folder / path).resolve()
    if not found.is_relative_to(folder.resolve()):
        raise UserError(f"Artifact path {path} is invalid: it must not lead out of its folder.")
    return found


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files so that after a power loss all are there; those of an earlier attempt go."""
    folders = {folder, folder.parent, folder.parent.parent}
    for name, content in files.items():
        path = _below(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.add(path.parent)
        new = path.with_name(f"{path.name}.new")
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    for changed in folders:
        sync_folder(changed)


def save_servable(network: torch.nn.Module, example: np.ndarray, folder: Path) -> None:
    """Write a model that MLflow loads and serves: a pt2 archive without pickled code of ours.

    The only pickle in the archive is torch's sample input, plain tensors, which MLflow asks for.

    Args:
        network: takes images (N, ...) and returns a row for each.
        example: an input, which the signature is taken from.
        folder: must not exist.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    network.eval()  # or dropout is exported with the rest
    with torch.no_grad():
        output = network(torch.from_numpy(example)).numpy()
    libraries = [f"{name}=={version(name)}" for name in ("torch", "numpy", "mlflow")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on tensors that share memory
        mlflow.pytorch.save_model(
            network,
            folder,
            signature=infer_signature(example, output),
            input_example=example,
            pip_requirements=libraries,
            serialization_format="pt2",
        )


# MLflow takes 3 to 8 s to make its tables, so an installation makes them once, and copies them.
_TABLES = Path(sys.prefix) / "share" / "digitlab" / f"mlflow-{version('mlflow')}.db"


def keep_tables() -> None:
    """Make MLflow's tables for labs to come; `make setup` does it."""
    with tempfile.TemporaryDirectory() as folder:
        _make_database(Path(folder))
        _TABLES.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folder) / "mlflow.db", new := _TABLES.with_suffix(".new"))
        new.replace(_TABLES)


def _prepare_database(lab: Path) -> None:
    if not (lab / "mlflow.db").exists():
        _make_database(lab)
    with closing(sqlite3.connect(lab / "mlflow.db", timeout=60)) as database:
        # Readers and a writer go on side by side; the file remembers it.
        database.execute("PRAGMA journal_mode=WAL")


def _make_database(lab: Path) -> None:
    """Make MLflow's tables beside their place: a kill half-way would leave some that it refuses."""
    new = lab / "mlflow.db.new"
    for left in lab.glob(f"{new.name}*"):  # with its journal, which sqlite would apply to ours
        left.unlink()
    if _TABLES.exists():
        shutil.copyfile(_TABLES, new)
    else:
        MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
    with closing(sqlite3.connect(new)) as database, database:  # MLflow's own experiment, Default
        database.execute("UPDATE experiments SET artifact_location = ?", [f"{_LOCAL}0"])
    new.replace(lab / "mlflow.db")
