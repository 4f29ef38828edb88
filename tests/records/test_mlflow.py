"""MLflow's own: opening, what its errors amount to, and a lab that is moved."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from parts import Postgres
from sqlalchemy import make_url, text
from sqlalchemy.orm import Session
from trackers import CODE, FILES, HOST, Server, answers

from digitlab.base import server
from digitlab.base.errors import UserError
from digitlab.records import local
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.mlflow_errors import http_status
from digitlab.records.mlflow_models import save_servable
from digitlab.records.tracker import (
    Dataset,
    LogBatch,
    NewRun,
    Registration,
    TrackerAway,
    TrackerRefused,
)
from digitlab.results.verdict import Change

_FOUR_AT_ONCE = """
import os, sys
from pathlib import Path
from digitlab.records.mlflow import MlflowTracker
for _ in range(4):
    if not os.fork():
        MlflowTracker(None, "digitlab", Path(sys.argv[1]))
        os._exit(0)
print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)))
"""


@pytest.mark.slow
def test_four_processes_open_an_empty_lab_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FOUR_AT_ONCE, str(tmp_path)]
    environment = os.environ | CODE
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout + done.stderr).strip() == "0 0 0 0"
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        names = database.execute("SELECT name FROM experiments").fetchall()
        assert names.count(("digitlab",)) == 1
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_name_of_a_run_forges_no_line(tmp_path: Path) -> None:
    tracker = MlflowTracker(None, "digitlab", tmp_path)
    run_id = tracker.create_run(NewRun("a\nb: 99%\x1b[2K", {}, {}))
    assert tracker.get(run_id).name == r"a\nb: 99%\x1b[2K"
    assert str(Change("libraries.x\n", "1\x1b[2K", "2")).startswith(r"libraries.x\n was 1\x1b[2K")


@pytest.mark.slow
def test_new_experiment_can_be_opened_by_many_at_once_on_a_server(
    tracker_server: Server, tmp_path: Path
) -> None:
    together = threading.Barrier(6)

    def open_it(_: int) -> str:
        together.wait(30)
        return MlflowTracker(tracker_server.uri, "new to all", tmp_path).experiment

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(open_it, range(6)))) == 1


def test_file_that_is_no_database_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 1000)
    with pytest.raises(UserError, match=r"mlflow\.db cannot be used \(.*not a database") as raised:
        MlflowTracker(None, "digitlab", tmp_path)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "mlflow.db").read_bytes() == b"no database " * 1000


@pytest.mark.parametrize("uri", [f"http://{HOST}:1", "nonsense://x", "a/folder"])
def test_store_that_cannot_be_used_is_refused_in_one_line(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be used") as raised:
        MlflowTracker(uri, "digitlab", tmp_path)
    assert uri in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, TrackerAway) == uri.startswith("http")


@pytest.mark.parametrize("place", [f"//{HOST}:1/x", "//"])
def test_database_that_is_not_there_is_not_waited_for(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits"))
    monkeypatch.setenv("PGHOST", str(tmp_path))  # no server's socket is there
    with pytest.raises(UserError, match=r"tracking\.uri=postgresql.*cannot be used \(") as raised:
        MlflowTracker(f"postgresql+psycopg:{place}", "digitlab", tmp_path)
    assert "\n" not in str(raised.value)


def test_database_server_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections are accepted by the system, and nobody reads them."""
    monkeypatch.setitem(server.TIMEOUTS, "connect_timeout", 2)  # s; psycopg takes no less
    with closing(socket.create_server((HOST, 0))) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match=r"tracking\.uri=postgresql.*timeout") as raised:
            MlflowTracker(f"postgresql+psycopg://me:secret@{HOST}:{port}/x", "digitlab", tmp_path)
    assert "secret" not in str(raised.value)


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_runs_are_recorded_in_a_database_server(
    postgres: Postgres, mlflow_tables: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    tracker = MlflowTracker(postgres.create(template=mlflow_tables), "digitlab", tmp_path)
    run_id = tracker.create_run(NewRun("run", {"a": "1"}, {"seed": "3"}))
    tracker.log(run_id, LogBatch(metrics=[("loss", 0.5, 1, 1000)]))
    tracker.end_run(run_id, "finished", 2000)
    assert tracker.get("run").status == "FINISHED"
    assert tracker.history(run_id) == [("loss", 1, 0.5)]


@pytest.mark.parametrize("timeout", ["", "?connect_timeout=3&sslmode=prefer"])
def test_an_address_keeps_the_limits_that_it_has(timeout: str) -> None:
    query = make_url(server.with_timeouts(f"postgresql+psycopg://a:b@c/d{timeout}")).query
    assert query["connect_timeout"] == ("3" if timeout else "10")
    assert query.get("sslmode") == ("prefer" if timeout else None)
    assert server.TIMEOUTS.keys() <= query.keys()
    other = f"postgresql+pg8000://a:b@c/d{timeout}"
    assert server.with_timeouts(other) == other


@pytest.mark.parametrize("name", ["folder", "file/a.db"])
def test_file_that_cannot_be_one_is_not_waited_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"tracking\.uri=sqlite.*cannot be used \(") as raised:
        MlflowTracker(f"sqlite:///{tmp_path / name}", "digitlab", tmp_path)
    assert "\n" not in str(raised.value)


def test_folder_of_a_database_is_made(tmp_path: Path) -> None:
    MlflowTracker(f"sqlite:///{tmp_path / 'new' / 'a.db'}", "digitlab", tmp_path)
    assert (tmp_path / "new" / "a.db").is_file()


def test_an_experiment_that_is_refused_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MlflowException("you may not", PERMISSION_DENIED)

    MlflowTracker(None, "digitlab", tmp_path)
    monkeypatch.setattr(MlflowClient, "create_experiment", refuse)
    with pytest.raises(UserError, match=r"cannot be used \(you may not\)"):
        MlflowTracker(None, "new", tmp_path)


def test_a_404_of_something_between_does_not_mean_that_a_run_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(None, "digitlab", tmp_path)

    def answer(*_: object) -> None:
        raise MlflowException("API request failed with error code 404 != 200")

    monkeypatch.setattr(MlflowClient, "get_run", answer)
    with pytest.raises(TrackerRefused):
        tracker.is_deleted("0" * 32)


def test_a_tracker_on_a_server_imports_no_database() -> None:
    """MLflow's database modules take half a second."""
    code = (
        "import sys, digitlab.records.mlflow; print({'alembic', 'sqlalchemy.orm'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_password_in_the_address_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{HOST}:1") as raised:
        MlflowTracker(f"http://me:secret@{HOST}:1", "digitlab", tmp_path)
    assert "secret" not in str(raised.value)


def response(status: int) -> requests.Response:
    answer = requests.Response()
    answer.status_code = status
    return answer


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RestException({"error_code": "INTERNAL_ERROR"}), 500),
        (RestException({"error_code": "PERMISSION_DENIED"}), 403),
        (RestException({"error_code": "INVALID_PARAMETER_VALUE"}), 400),
        (MlflowException("API request to endpoint /a failed with error code 413 != 200"), 413),
        (MlflowException("API request to http://h failed with exception timed out"), 503),
        (MlflowException("Not a proper runs:/ URI"), None),
        (requests.HTTPError(response=response(502)), 502),
        (requests.ConnectionError(), 503),
        (OSError(28, "No space left"), 400),
        (PermissionError(13, "no"), 400),
        (KeyError("mine"), None),
    ],
)
def test_errors_amount_to_a_status(error: Exception, status: int | None) -> None:
    assert http_status(error) == status


def test_locked_database_is_away_not_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(None, "digitlab", tmp_path)
    run_id = tracker.create_run(NewRun("run", {}, {}))
    original = Session.execute

    def impatient(self: Session, statement: Any, *rest: Any, **more: Any) -> Any:
        """MLflow waits 20 s for a lock; the test does not."""
        if "busy_timeout" in str(statement):
            statement = text("PRAGMA busy_timeout = 10")
        return original(self, statement, *rest, **more)

    monkeypatch.setattr(Session, "execute", impatient)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TrackerAway):
            tracker.log(run_id, LogBatch(tags={"a": "b"}))


def test_process_killed_while_it_makes_the_tables_leaves_a_lab_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db.new").write_bytes(b"half of it")
    (tmp_path / "mlflow.db.new-journal").touch()  # as a kill often leaves behind
    monkeypatch.setattr(local, "TABLES", tmp_path / "none are kept")
    assert MlflowTracker(None, "digitlab", tmp_path).find({}) == []
    assert not list(tmp_path.glob("mlflow.db.new*"))


# A lab that is moved


class Mean(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((1, 2, 3))


@contextmanager
def served(lab: Path, log: Path) -> Iterator[str]:
    """Serve a lab as `digitlab ui` does."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    code = "import sys; from pathlib import Path; from digitlab.pages.ui import become_mlflow; "
    code += "become_mlflow(Path(sys.argv[1]), int(sys.argv[2]))"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(lab), str(port)],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | CODE,
        )  # fmt: skip
    try:
        while not answers(f"http://{HOST}:{port}"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://{HOST}:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_experiments_that_mlflow_made_hold_files_where_its_server_finds_them(
    tmp_path: Path,
) -> None:
    tracker = MlflowTracker(None, "Default", tmp_path)
    run_id = tracker.create_run(NewRun("a run", {}, {}))
    tracker.upload(run_id, FILES)
    assert {path: tracker.artifact(run_id, path) for path in FILES} == FILES
    uri = tracker.client.get_run(run_id).info.artifact_uri
    assert uri == f"mlflow-artifacts:/0/{run_id}/artifacts"
    assert (tmp_path / "artifacts" / "0" / run_id / "artifacts" / "config.yaml").is_file()


@pytest.mark.long
def test_moved_lab_is_read_written_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, moved = tmp_path / "lab", tmp_path / "lab2"
    lab.mkdir()
    tracker = MlflowTracker(None, "digitlab", lab)
    run_id = tracker.create_run(NewRun("before", {}, {}))
    tracker.upload(run_id, FILES)
    save_servable(Mean(), np.zeros((2, 1, 4, 4), np.float32), tmp_path / "model")
    model = {f"model/{p.relative_to(tmp_path / 'model')}": p.read_bytes()
             for p in (tmp_path / "model").rglob("*") if p.is_file()}  # fmt: skip
    tracker.upload(run_id, model)
    measured_on = Dataset("mnist", "0123abcd", "test")
    tracker.register(run_id, Registration("digits", {}, "a card", measured_on))
    del tracker
    shutil.move(lab, moved)
    for path in moved.glob("mlflow.db*"):
        assert str(tmp_path).encode() not in path.read_bytes(), "an absolute path"

    tracker = MlflowTracker(None, "digitlab", moved)
    assert {path: tracker.artifact(run_id, path) for path in FILES} == FILES
    later = tracker.create_run(NewRun("after", {}, {}))
    tracker.upload(later, FILES)
    assert tracker.artifact(later, "config.yaml") == FILES["config.yaml"]
    assert not lab.exists()

    with served(moved, tmp_path / "log") as uri:
        client = MlflowClient(uri)
        for run in (run_id, later):
            path = client.download_artifacts(run, "pictures/a.png", str(tmp_path))
            assert Path(path).read_bytes() == FILES["pictures/a.png"]
        default = client.get_experiment("0").artifact_location
        assert default == "mlflow-artifacts:/0"
        [logged] = client.search_logged_models(["1"])
        code = "import mlflow, numpy; x = numpy.ones((2, 1, 4, 4), numpy.float32); "
        for name in (f"models:/{logged.model_id}", "models:/digits@champion"):
            code += f"print(mlflow.pyfunc.load_model('{name}').predict(x).tolist()); "
        environment = os.environ | {"MLFLOW_TRACKING_URI": uri}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.stdout.split("\n")[-3:] == ["[1.0, 1.0]", "[1.0, 1.0]", ""], done.stderr[-2000:]
