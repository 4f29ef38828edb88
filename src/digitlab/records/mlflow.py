"""Records of runs: MLflow, or none. The only module that imports mlflow."""

import errno
import functools
import json
import logging
import os
import random
import re
import shutil
import sqlite3
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout

from digitlab.base.errors import UserError, first_line, nearest
from digitlab.config.types import Config, Tracker

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # s; a trial must not wait minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the outbox tries again

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

logging.getLogger("mlflow").setLevel(logging.ERROR)

_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "pruned": "KILLED",
    "interrupted": "KILLED",
}
_LONGEST = 6000  # characters of a parameter's value in MLflow's stores
_RETRY_SECONDS = 30.0  # between two tries to reach a tracker that is away


@dataclass(frozen=True)
class Start:
    """What is known of a run when it begins."""

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    parent: str | None = None  # run id of the study


@dataclass(frozen=True)
class RunRow:
    """What the tracker holds of a run; `metrics` are the latest values."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]

    @property
    def ended(self) -> bool:
        return self.status in ("FINISHED", "FAILED", "KILLED")


class RunRecord:
    """The record of one run while it is written; this one, of a run that nobody wants."""

    run_id: str | None = None  # the tracker's; None while it has not answered

    def log(
        self,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
        tags: Mapping[str, str] | None = None,
    ) -> None: ...

    def keep(self, folder: Path) -> None:
        """Take over the files of `folder` as the run's artifacts; the folder is gone afterwards."""
        shutil.rmtree(folder)

    def end(self, state: str) -> None:
        """finished, failed, pruned or interrupted; running once more, when it is taken up again."""

    def drop(self) -> None:
        """Take the run back, delivered or not: it is void."""


class Tracking:
    """Where runs are recorded; here, nowhere. tests/test_tracking.py says what others must do."""

    def start(self, start: Start) -> RunRecord:
        return RunRecord()

    def resume(self, run_id: str) -> RunRecord:
        """Write on in a run that was begun earlier, such as a study's."""
        return RunRecord()

    def find(self, tags: Mapping[str, str]) -> list[RunRow]:
        """The runs that carry all of the tags, oldest first; deleted ones are left out."""
        return []

    def get(self, run: str) -> RunRow:
        """The run of an id, a unique beginning of one, or a name."""
        raise UserError(f"{run}: with tracking=none there is no run to be found")

    def history(self, run_id: str) -> list[tuple[str, int, float]]:
        """Every metric that was logged: (name, step, value), sorted."""
        return []

    def artifact(self, run_id: str, path: str) -> bytes:
        raise UserError(f"{path}: with tracking=none there is no artifact to be found")

    def delete(self, run_id: str) -> None: ...

    def register(self, model: str, run_id: str, tags: Mapping[str, str], card: str) -> None:
        """A new version of a model, the run's artifact `model`, with the alias `champion`.

        `card` describes it, in Markdown.
        """

    def runs_page(self) -> str:
        """The address of the page that lists the runs; empty where there is none."""
        return ""

    def lay_out(self, tags: Mapping[str, str]) -> None:
        """Set tags of the experiment, which is where MLflow keeps saved views."""

    def kept_back(self) -> int:
        """How many runs wait for the tracker to be back."""
        return 0

    def deliver(self) -> int:
        """Hand over what was kept back while the tracker was away; how many runs."""
        return 0


def sqlite_uri(lab: Path) -> str:
    """The store in the lab folder; a writer waits up to a minute for another."""
    return f"sqlite:///{lab / 'mlflow.db'}?timeout=60"


# What MLflow says of a login that is wrong, which no waiting changes.
_REFUSED = re.compile(r"error code 40[13]\b|PERMISSION_DENIED|UNAUTHENTICATED")


def open_tracking(config: Config, lab: Path, patience: float = 0.0) -> Tracking:
    """The tracker of `config.tracking`, set up and reachable.

    Args:
        patience: seconds for which a server that is away is tried again; a database is not.

    Raises:
        UserError: it cannot be reached or written.
    """
    if config.tracking.name is Tracker.none:
        return Tracking()
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    deadline = time.monotonic() + (patience if uri.startswith("http") else 0.0)
    while True:
        try:
            return MlflowTracking(config.tracking.uri, config.tracking.experiment, lab)
        except UserError as error:
            if _REFUSED.search(str(error)) or time.monotonic() > deadline:
                raise
            print(error, file=sys.stderr, flush=True)
        time.sleep(random.uniform(5, 10))  # noqa: S311  s


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _reaching(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Turn a tracker that cannot be reached into a line for the user."""

    @functools.wraps(method)
    def reached(*arguments: _P.args, **named: _P.kwargs) -> _T:
        try:
            return method(*arguments, **named)
        except UserError:
            raise
        except Exception as error:
            reason = first_line(error)
            raise UserError(
                f"tracking: not reached ({reason}): try again when it is back"
            ) from error

    return reached


class MlflowTracking(Tracking):
    """MLflow on sqlite in the lab folder, or on the server of `uri`."""

    def __init__(self, uri: str | None, experiment: str, lab: Path) -> None:
        self.outbox = lab / "outbox"
        artifacts = None
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        # The address of `digitlab ui`, where the records are in the lab.
        self.server = uri if uri and uri.startswith("http") else "http://127.0.0.1:5000"
        try:
            if uri is None:
                artifacts = (lab / "artifacts").as_uri()
                uri = sqlite_uri(lab)
                with FileLock(lab / "mlflow.lock"):  # processes that open an empty database fail
                    if not (lab / "mlflow.db").exists():
                        _make_database(lab)
                    self.client = MlflowClient(uri)
                    self.experiment = self._experiment(experiment, artifacts)
                    _use_wal(lab / "mlflow.db")
            else:
                if not uri.startswith("http"):  # a database: it has no place for files of its own
                    artifacts = (lab / "artifacts").as_uri()
                self.client = MlflowClient(uri)
                self.experiment = self._experiment(experiment, artifacts)
        except Exception as error:  # sqlalchemy's, requests', MLflow's own: one cause for the user
            where = str(uri).split("?")[0].split("@")[-1]
            reason = first_line(error)
            raise UserError(
                f"tracking.uri={where}: cannot be used ({reason}): "
                "mend it, or run with tracking=none"
            ) from error

    def _experiment(self, name: str, artifacts: str | None) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifacts)
            except MlflowException:  # another process was faster
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def start(self, start: Start) -> RunRecord:
        tags = dict(start.tags)
        if start.parent:
            tags["mlflow.parentRunId"] = start.parent
        params = {key: str(value) for key, value in start.params.items()}
        create = {
            "do": "create",
            "name": start.name,
            "tags": tags,
            "time": _now(),
            "params": params,
        }
        return _MlflowRecord(self.client, self.experiment, self.outbox / uuid.uuid4().hex, create)

    def resume(self, run_id: str) -> RunRecord:
        return _MlflowRecord(
            self.client, self.experiment, self.outbox / uuid.uuid4().hex, None, run_id
        )

    @_reaching
    def find(self, tags: Mapping[str, str]) -> list[RunRow]:
        text = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        return [_row(run) for run in self._search(text)]

    def _search(self, text: str) -> list[Run]:
        runs: list[Run] = []
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
            runs += page
            token = page.token or None
        return runs

    @_reaching
    def get(self, run: str) -> RunRow:
        try:
            return _row(self.client.get_run(run))
        except MlflowException:
            rows = [_row(found) for found in self._search("")]
        matches = [row for row in rows if row.name == run]
        matches = matches or [row for row in rows if len(run) >= 4 and row.run_id.startswith(run)]
        finished = [row for row in matches if row.status == "FINISHED"]
        if len(matches) == 1 or len(finished) == 1:
            return (finished or matches)[0]
        if matches:
            ids = ", ".join(row.run_id[:8] for row in matches[-5:])
            raise UserError(f"{run}: {len(matches)} runs are called so, give an id: {ids}")
        raise UserError(f"{run}: no such run, {nearest(run, {row.name for row in rows})}")

    @_reaching
    def history(self, run_id: str) -> list[tuple[str, int, float]]:
        names = self.client.get_run(run_id).data.metrics
        values = [
            (name, metric.step, metric.value)
            for name in names
            for metric in self.client.get_metric_history(run_id, name)
        ]
        return sorted(values)

    @_reaching
    def artifact(self, run_id: str, path: str) -> bytes:
        try:
            with tempfile.TemporaryDirectory() as folder:
                return Path(self.client.download_artifacts(run_id, path, folder)).read_bytes()
        except (MlflowException, OSError) as error:
            self.client.get_run(run_id)  # raises when it is the tracker that is away
            raise UserError(f"run {run_id}: its artifact {path} is missing") from error

    @_reaching
    def delete(self, run_id: str) -> None:
        self.client.delete_run(run_id)

    @_reaching
    def register(self, model: str, run_id: str, tags: Mapping[str, str], card: str) -> None:
        known = self.client.search_registered_models(f"name = '{model}'")
        if not known:
            self.client.create_registered_model(model)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/model"
        version = self.client.create_model_version(
            model, source, run_id, dict(tags), description=card
        )
        self.client.set_registered_model_alias(model, "champion", version.version)

    def runs_page(self) -> str:
        experiment = f"#/experiments/{self.experiment}/runs?workflowType=machine_learning"
        return f"{self.server}/{experiment}"

    @_reaching
    def lay_out(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_experiment_tag(self.experiment, key, value)

    def kept_back(self) -> int:
        return sum(1 for _ in self.outbox.glob("*/"))

    def deliver(self) -> int:
        delivered = 0
        for folder in sorted(self.outbox.glob("*/")):
            record = _MlflowRecord(self.client, self.experiment, folder, None)
            delivered += record.deliver_kept()
        return delivered


class _MlflowRecord(RunRecord):
    """Operations on one MLflow run, in order.

    Each is delivered at once. When MLflow does not take one, it and all that follow are written to
    a folder of the lab's outbox first, and delivered when MLflow is back: later in this run, or by
    `MlflowTracking.deliver`. `operations.jsonl` there holds them, `state.json` how far they got.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment: str,
        folder: Path,
        create: dict[str, Any] | None,
        run_id: str | None = None,
    ) -> None:
        self.client, self.experiment, self.folder = client, experiment, folder
        self.run_id = run_id
        self.done = 0  # operations of the folder that MLflow has taken
        self.kept: list[dict[str, Any]] = []  # operations of the folder, all of them
        self.tried = 0.0
        self.lock: FileLock | None = None  # held while the folder is this process's
        if create:
            self._do(create)

    def log(
        self,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        numbers = dict(metrics or {})
        self._do(
            {
                "do": "log",
                "metrics": numbers,
                "step": step,
                "tags": dict(tags or {}),
                "time": _now(),
            }
        )

    def keep(self, folder: Path) -> None:
        self._do({"do": "artifacts", "folder": str(folder)})

    def end(self, state: str) -> None:
        self.tried = 0.0  # the last chance to deliver in this process
        tags = {"digitlab.state": state}
        self._do({"do": "end", "status": _STATUS[state], "tags": tags, "time": _now()})
        if self.lock:  # the folder is whole: any process may hand it over
            self.lock.release()

    def drop(self) -> None:
        if self.kept:
            self.kept, self.done = [], 0
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.run_id is not None:
            with suppress(Exception):  # the tracker is away; the audit finds it later
                self.client.delete_run(self.run_id)

    def _do(self, operation: dict[str, Any]) -> None:
        if not self.kept:
            try:
                self._deliver(operation)
                return
            except Exception as error:  # noqa: BLE001  whatever is wrong with the tracker, the run goes on
                reason = first_line(error)
                print(f"tracking: not reached ({reason}); kept in {self.folder}", file=sys.stderr)
                self.tried = time.monotonic()
                self._lock(10.0)  # s; one that delivers may look into the new folder
        self._write(operation)
        if time.monotonic() - self.tried > _RETRY_SECONDS:
            self.tried = time.monotonic()
            self._deliver_rest()

    def _lock(self, seconds: float = 0.0) -> None:
        for again in (True, True, False):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = FileLock(self.folder / ".lock")
                self.lock.acquire(timeout=seconds)
                return
            except (FileNotFoundError, FileExistsError):  # another process is removing it
                if not again:
                    raise

    def _write(self, operation: dict[str, Any]) -> None:
        if operation["do"] == "artifacts":
            target = self.folder / f"artifacts-{len(self.kept)}"
            shutil.move(operation["folder"], target)
            operation = {"do": "artifacts", "folder": target.name}
        with open(self.folder / "operations.jsonl", "ab", buffering=0) as file:
            whole, line = file.seek(0, os.SEEK_END), (json.dumps(operation) + "\n").encode()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(whole)  # or the next line would be added to a half of this one
                raise
        self.kept.append(operation)
        self._write_state()

    def _write_state(self) -> None:
        state = self.folder / "state.json"
        state.with_suffix(".new").write_text(json.dumps({"run_id": self.run_id, "done": self.done}))
        state.with_suffix(".new").replace(state)

    def _deliver_rest(self, orphan: bool = False) -> bool:
        try:
            while self.done < len(self.kept):
                self._deliver(self.kept[self.done])
                self.done += 1
                self._write_state()
            if orphan and self.run_id and self.client.get_run(self.run_id).info.status == "RUNNING":
                tags = {"digitlab.state": "interrupted"}
                self._deliver({"do": "end", "status": "KILLED", "tags": tags, "time": _now()})
        except Exception:  # noqa: BLE001  still away: the folder holds the rest
            if not self._deleted():
                return False
        self.kept, self.done = [], 0
        shutil.rmtree(self.folder, ignore_errors=True)  # another process may look into it
        if self.lock:
            self.lock.release()
        return True

    def _deleted(self) -> bool:
        """Whether the run is void: its trial was given to another worker meanwhile."""
        try:
            return bool(
                self.run_id
                and self.client.get_run(self.run_id).info.lifecycle_stage == LifecycleStage.DELETED
            )
        except Exception:  # noqa: BLE001  the tracker is away, or has no such run
            return False

    def deliver_kept(self) -> bool:
        """Deliver what a process left in the folder; a run that it did not end is interrupted."""
        try:
            self._lock()
        except Timeout:  # of a run that still goes on
            return False
        try:
            state = json.loads((self.folder / "state.json").read_text())
            self.run_id, self.done = state["run_id"], state["done"]
            lines = (self.folder / "operations.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:  # killed before anything was written
            lines = []
        self.kept = [json.loads(line) for line in lines if line.endswith("\n")]
        try:
            return self._deliver_rest(orphan=True)
        finally:
            if self.lock:
                self.lock.release()

    def _deliver(self, operation: dict[str, Any]) -> None:
        do = operation["do"]
        if do == "create":
            mine = f"tags.`digitlab.record` = '{self.folder.name}'"
            made = self.client.search_runs([self.experiment], mine) if self.kept else []
            if made:  # its answer was lost, or the note that it was made
                self.run_id = made[0].info.run_id
            if self.run_id is None:
                run = self.client.create_run(
                    self.experiment,
                    operation["time"],
                    operation["tags"] | {"digitlab.record": self.folder.name},
                    operation["name"],
                )
                self.run_id = run.info.run_id
            params = [
                Param(key if not part else f"{key}/{part}", value[at : at + _LONGEST])
                for key, value in operation["params"].items()
                for part, at in enumerate(range(0, len(value) or 1, _LONGEST))
            ]
            for at in range(0, len(params), 100):  # MLflow takes no more at once
                self.client.log_batch(self.run_id, params=params[at : at + 100])
            return
        assert self.run_id is not None
        tags = [RunTag(key, value) for key, value in operation.get("tags", {}).items()]
        if do == "log":
            at, step = operation["time"], operation["step"]
            metrics = [Metric(name, x, at, step) for name, x in operation["metrics"].items()]
            self.client.log_batch(self.run_id, metrics=metrics, tags=tags)
        elif do == "artifacts":
            folder = self.folder / operation["folder"]  # an absolute folder stays as it is
            self.client.log_artifacts(self.run_id, str(folder))
            if not self.kept:
                shutil.rmtree(folder)
        else:
            self.client.log_batch(self.run_id, tags=tags)
            if operation["status"] == "RUNNING":
                self.client.update_run(self.run_id, "RUNNING")
            else:
                self.client.set_terminated(self.run_id, operation["status"], operation["time"])


def save_servable(network: torch.nn.Module, example: np.ndarray, folder: Path) -> None:
    """Write a model that MLflow loads and serves: a pt2 archive, no code of ours in a pickle.

    Of pickles the archive holds torch's sample input, plain tensors, which MLflow asks for.

    Args:
        network: takes images (N, ...) and gives a row for each.
        example: an input, which the signature is taken from.
        folder: must not exist.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    network.eval()  # or dropout is baked in
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


def _now() -> int:
    return int(time.time() * 1000)  # MLflow counts milliseconds


def _make_database(lab: Path) -> None:
    """Make MLflow's tables beside their place: a kill half-way would leave some that it refuses."""
    new = lab / "mlflow.db.new"
    for left in lab.glob(f"{new.name}*"):  # with its journal, which would be played back into ours
        left.unlink()
    if _TABLES.exists():
        shutil.copyfile(_TABLES, new)
    else:
        MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
    with closing(sqlite3.connect(new)) as database, database:  # MLflow's own experiment
        place = (lab / "artifacts" / "0").as_uri()
        database.execute("UPDATE experiments SET artifact_location = ?", [place])
    new.replace(lab / "mlflow.db")


# MLflow takes 3 to 8 s to make its tables, so an installation makes them once, and copies them.
_TABLES = Path(sys.prefix) / "share" / "digitlab" / f"mlflow-{version('mlflow')}.db"


def keep_tables() -> None:
    """Make MLflow's tables for labs to come; `make setup` does it."""
    with tempfile.TemporaryDirectory() as folder:
        _make_database(Path(folder))
        _TABLES.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folder) / "mlflow.db", new := _TABLES.with_suffix(".new"))
        new.replace(_TABLES)


def _use_wal(path: Path) -> None:
    """Let readers and a writer of a sqlite file go on side by side; the file remembers it."""
    with closing(sqlite3.connect(path, timeout=60)) as database:
        database.execute("PRAGMA journal_mode=WAL")


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
