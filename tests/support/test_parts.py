"""The parts of a cluster are what they are taken for: real, guarded, lost and back."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from parts import (
    MARK,
    MlflowServer,
    Postgres,
    RayCluster,
    kill_part,
    processes_of,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def connect(server: Postgres, address: str, password: str, **more: int) -> psycopg.Connection:
    url = address.replace("+psycopg", "")
    return psycopg.connect(url, password=password, autocommit=True, **more)


def test_postgresql_asks_for_the_password(postgres: Postgres) -> None:
    address = postgres.create()
    assert postgres.password not in address
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        connect(postgres, address, "wrong")
    with connect(postgres, address, postgres.password) as connection:
        query = "SELECT current_user, rolsuper FROM pg_roles WHERE rolname = current_user"
        assert connection.execute(query).fetchall() == [("digitlab", False)]
    assert postgres.query("SHOW fsync") == [("on",)]
    assert postgres.query("SHOW max_connections") == [("300",)]


def test_mlflow_asks_for_the_password_and_is_back_with_its_records(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name, value in mlflow_server.credentials.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(mlflow_server.uri)
    assert client.search_experiments() == []  # the default one is the admin's
    run = client.create_run(client.create_experiment("parts")).info
    client.log_metric(run.run_id, "accuracy", 0.5)
    (tmp_path / "kept.txt").write_text("kept")
    client.log_artifact(run.run_id, str(tmp_path / "kept.txt"))
    assert run.artifact_uri.startswith("mlflow-artifacts:")
    assert list(mlflow_server.folder.glob("artifacts/**/kept.txt"))

    mlflow_server.stop()
    with pytest.raises(MlflowException, match="Max retries exceeded"):
        client.get_run(run.run_id)
    mlflow_server.start()
    assert client.get_run(run.run_id).data.metrics == {"accuracy": 0.5}
    assert Path(client.download_artifacts(run.run_id, "kept.txt")).read_text() == "kept"

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(MlflowException, match="401"):
        client.get_run(run.run_id)
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    with pytest.raises(MlflowException, match="401"):
        client.search_experiments()


def test_ray_refuses_a_node_without_the_token(start_ray: Callable[..., RayCluster]) -> None:
    cluster = start_ray(nodes=1)
    wrong = cluster.join({**cluster.environment, "RAY_AUTH_TOKEN": "0" * 32})
    none = cluster.join({"RAY_AUTH_MODE": "disabled"})
    for node in (wrong, none):
        assert node.process is not None
        assert node.process.wait(120) == 1
        assert "InvalidAuthToken" in node.log.read_text()
    assert cluster.wait(1) == [cluster.nodes[0].host]


def test_what_belongs_to_a_part_is_killed_and_nothing_else(tmp_path: Path) -> None:
    command = ["sh", "-c", "setsid sleep 1000 & exec sleep 1000"]
    one = subprocess.Popen(command, env=os.environ | {MARK: str(tmp_path / "one" / "inside")})
    other = subprocess.Popen(command, env=os.environ | {MARK: str(tmp_path / "one-more")})
    deadline = time.monotonic() + 10
    while len(processes_of(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    kill_part(tmp_path / "one")
    assert one.wait() == -9
    assert other.poll() is None
    assert len(processes_of(tmp_path)) == 2
    kill_part(tmp_path)
    other.wait()


def test_parts_go_when_the_tests_are_killed(parts: Path) -> None:
    folder = parts / "killed"
    folder.mkdir()
    keeper = str(Path(__file__).with_name("parts.py"))
    command = (
        f"import subprocess as s; s.run(['{sys.executable}', '{keeper}', '{folder}'], stdin=0)"
    )
    with subprocess.Popen(["sleep", "1000"], env=os.environ | {MARK: str(folder)}) as part:
        with subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE) as tests:
            assert part.poll() is None
            assert tests.stdin is not None
            tests.stdin.close()  # as the kernel does for a killed process
            tests.wait(60)
        assert part.wait(60) == -9
    assert not folder.exists()
