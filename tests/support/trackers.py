"""An MLflow server on sqlite, a gate before it that can be shut, and processes that are killed.

A pytest plugin; parts.py has the servers that need PostgreSQL.
"""

import json
import logging
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from digitlab.base.errors import UserError
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.outbox import Outbox
from digitlab.records.spool import RunSpool
from digitlab.records.tracker import NewRun, Tracker

HOST = "127.0.0.1"
SUPPORT = Path(__file__).parent
# Of a process that a test starts: it takes this checkout's code, wherever another is installed.
CODE = {"PYTHONPATH": f"{SUPPORT.parents[1] / 'src'}:{SUPPORT}"}
LONG = "".join(str(i % 10) for i in range(20_000))


@pytest.fixture(scope="session")
def quiet_mlflow() -> Iterator[None]:
    """MLflow's client waits up to a second, by chance, before it tries again, and logs that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
        patch.setattr(logging.getLogger("urllib3"), "level", logging.ERROR)
        yield


class Server:
    """A real `mlflow server` on a port of this machine."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder = folder
        shutil.copyfile(database, folder / "server.db")  # to migrate an empty one takes seconds
        with socket.create_server((HOST, 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://{HOST}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not answers(self.uri):
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="session")
def tracker_server(
    tmp_path_factory: pytest.TempPathFactory, quiet_mlflow: None
) -> Iterator[Server]:
    lab = tmp_path_factory.mktemp("lab")
    MlflowTracker(None, "digitlab", lab).client._tracking_client.store.engine.dispose()
    server = Server(tmp_path_factory.mktemp("server"), lab / "mlflow.db")
    server.start()
    yield server
    server.kill()


class Gate:
    """A port in front of a server that can be shut in a moment."""

    def __init__(self, server: Server) -> None:
        self.behind = server.port
        self.listener = socket.create_server((HOST, 0))
        self.uri = f"http://{HOST}:{self.listener.getsockname()[1]}"
        self.closed = False
        self.open()
        threading.Thread(target=self._accept, daemon=True).start()

    def open(self, requests: float = math.inf, answer_last: bool = True) -> None:
        """Let so many requests through, then shut; the last may go unanswered."""
        self.left, self.answer_last = requests, answer_last

    def shut(self) -> None:
        self.open(0)

    def close(self) -> None:
        self.closed = True
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        try:
            with client, socket.create_connection((HOST, self.behind)) as server:
                for end in (client, server):  # or each request waits 40 ms for the other's leave
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while self._pass_on(client, server):
                    pass
        except OSError:  # one of the two has gone
            return

    def _pass_on(self, client: socket.socket, server: socket.socket) -> bool:
        ready, _, _ = select.select([client, server], [], [], 0.2)
        if self.closed:
            return False
        for end in ready:
            data = end.recv(1 << 16)
            if end is client and data.startswith((b"GET /", b"POST /", b"PUT /", b"PATCH /")):
                if self.left <= 0:
                    return False
                self.left -= 1
            if not data or (end is server and self.left == 0 and not self.answer_last):
                return False
            (server if end is client else client).sendall(data)
        return True


@pytest.fixture
def gate(tracker_server: Server) -> Iterator[Gate]:
    gate = Gate(tracker_server)
    yield gate
    gate.close()


# A run, and what the tracker has of it

FILES = {"config.yaml": b"seed: 3\n", "pictures/a.png": bytes(range(256)), "empty": b""}


def record_steps(outbox: Outbox) -> Iterator[RunSpool]:
    """Record a whole run, a step at each turn."""
    params = {"seed": "3", "long": LONG[:7000]}
    spool = outbox.open_run(NewRun("run", {"kind": "train"}, params))
    yield spool
    spool.log({"loss": 0.3, "accuracy": 1 / 3}, step=1, tags={"colour": "red"})
    yield spool
    spool.log({"loss": 0.2, "accuracy": 2 / 3}, step=2)
    yield spool
    spool.add_files(FILES)
    yield spool
    spool.log(tags={"sha256": "abc"})
    spool.seal()
    yield spool
    spool.end("finished")
    spool.seal()
    yield spool


HISTORY = [("accuracy", 1, 1 / 3), ("accuracy", 2, 2 / 3), ("loss", 1, 0.3), ("loss", 2, 0.2)]
WHOLE = ("run", "FINISHED", "finished", "red", "abc", HISTORY, FILES)


def recorded(tracker: Tracker) -> list[tuple[Any, ...]]:
    """Return what the tracker has of each of its runs, but for ids, times and tags of its own."""
    found = []
    for row in tracker.find({}):
        assert row.params["seed"] == "3"
        tags = (row.tags.get(name) for name in ("digitlab.state", "colour", "sha256"))
        history = tracker.history(row.run_id)
        found.append((row.name, row.status, *tags, history, artifacts(tracker, row.run_id)))
    return found


def artifacts(tracker: Tracker, run_id: str) -> dict[str, bytes]:
    files = {}
    for path in FILES:
        try:
            files[path] = tracker.artifact(run_id, path)
        except UserError as error:
            assert "has no artifact" in str(error)  # noqa: PT017
    return files


def waiting(lab: Path) -> list[Path]:
    return sorted((lab / "outbox").glob("*"))


# Processes that are killed


class Killer:
    """Records a run in a process of its own, which is killed at a point of its life."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | CODE,
        )

    def __call__(self, lab: Path, what: str, point: str = "", count: int = 1) -> bool:
        """Do `what` and return whether the point was met so many times, and the process killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([str(lab), what, point, count]), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        assert status in (0, -signal.SIGKILL)
        return status != 0


@pytest.fixture(scope="session")
def kill_at() -> Iterator[Callable[..., bool]]:
    killer = Killer()
    yield killer
    killer.process.kill()
    killer.process.communicate()


def _obey(lab: Path, what: str, point: str, count: int) -> None:
    from digitlab.base import faults

    left = [count]

    def hook(name: str) -> None:
        left[0] -= name == point
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    faults.hook = hook
    outbox = Outbox(lab, MlflowTracker(None, "digitlab", lab))
    if what == "record":
        for number, _ in enumerate(record_steps(outbox)):
            if number in (1, 3):  # so that the delivery has several parts
                outbox.flush(60)
    elif what == "adopt":
        outbox.adopt()
    outbox.flush(60)
    outbox.close()


if __name__ == "__main__":
    for order in sys.stdin:
        child = os.fork()
        if not child:
            lab, *rest = json.loads(order)
            try:
                _obey(Path(lab), *rest)
                os._exit(0)
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
