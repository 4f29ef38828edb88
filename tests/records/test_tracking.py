"""What every tracker must do, and what becomes of a run while MLflow is away."""

import gc
import logging
import math
import os
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from digitlab.base.errors import UserError
from digitlab.config.compose import compose
from digitlab.records.mlflow import _REFUSED, MlflowTracking, Start, Tracking, open_tracking

HOST = "127.0.0.1"
LONG = "".join(str(i % 10) for i in range(20_000))


# ---- places to record in -------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _no_waiting() -> Iterator[None]:
    """MLflow's client waits up to a second, by chance, before it tries again, and logs that.

    pytest keeps what is logged, and with it the errors and all that their frames hold.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
        patch.setattr(logging.getLogger("urllib3"), "level", logging.ERROR)
        yield


_FOUR_AT_ONCE = """
import os, sys
from pathlib import Path
from digitlab.records.mlflow import MlflowTracking
for _ in range(4):
    if not os.fork():
        MlflowTracking(None, "digitlab", Path(sys.argv[1]))
        os._exit(0)
print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)))
"""


@pytest.fixture(scope="module")
def opened_by_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A lab whose store four processes made together, and how each of them ended."""
    lab = tmp_path_factory.mktemp("lab")
    command = [sys.executable, "-c", _FOUR_AT_ONCE, str(lab)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return lab, (done.stdout + done.stderr).strip()


class Server:
    """A real `mlflow server` on a port of this machine."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder = folder
        with (
            closing(sqlite3.connect(database)) as made,
            closing(sqlite3.connect(folder / "server.db")) as mine,
        ):
            made.backup(mine)  # to migrate an empty one takes seconds
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
        deadline = time.monotonic() + 90
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, opened_by_four: tuple[Path, str]
) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), opened_by_four[0] / "mlflow.db")
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
def gate(server: Server) -> Iterator[Gate]:
    gate = Gate(server)
    yield gate
    gate.close()


@pytest.fixture(params=["sqlite", "server"])
def tracking(
    request: pytest.FixtureRequest, opened_by_four: tuple[Path, str], tmp_path: Path
) -> Tracking:
    """Each tracker there is, with no runs yet."""
    if request.param == "sqlite":
        return MlflowTracking(None, request.node.name, opened_by_four[0])
    server: Server = request.getfixturevalue("server")
    return MlflowTracking(server.uri, request.node.name, tmp_path)


# ---- what every tracker must do ------------------------------------------------------------------


def start(name: str, **tags: str) -> Start:
    return Start(name, tags, {"seed": 3})


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("finished", "FINISHED"),
        ("failed", "FAILED"),
        ("pruned", "KILLED"),
        ("interrupted", "KILLED"),
    ],
)
def test_run_has_the_status_of_the_state_that_it_ended_in(
    tracking: Tracking, state: str, status: str
) -> None:
    record = tracking.start(start("first", **{"digitlab.kind": "train"}))
    assert record.run_id is not None
    begun = tracking.get(record.run_id)
    assert (begun.status, begun.ended) == ("RUNNING", False)
    record.end(state)
    [row] = tracking.find({"digitlab.kind": "train"})
    assert row.run_id == record.run_id
    assert (row.name, row.status, row.ended) == ("first", status, True)
    assert row.tags["digitlab.state"] == state


def test_run_that_ended_can_run_once_more(tracking: Tracking) -> None:
    record = tracking.start(start("study"))
    record.end("interrupted")
    again = tracking.resume(record.run_id)
    again.end("running")
    row = tracking.get("study")
    assert (row.status, row.ended, row.tags["digitlab.state"]) == ("RUNNING", False, "running")
    again.log({"value": 2.0}, tags={"colour": "red"})
    again.end("finished")
    row = tracking.get("study")
    assert (row.status, row.metrics, row.tags["colour"]) == ("FINISHED", {"value": 2.0}, "red")


def test_parameters_are_kept_whole_however_long_or_many(tracking: Tracking) -> None:
    many = {f"knob.{i}": i / 7 for i in range(250)}
    tracking.start(Start("long", {}, {"long": LONG, "empty": "", "none": None, **many}))
    params = tracking.get("long").params
    pieces = sorted(key for key in params if key.startswith("long"))
    assert "".join(params[key] for key in pieces) == LONG
    assert params["empty"] == ""
    assert params["none"] == "None"
    assert {key: float(params[key]) for key in many} == many


def test_metrics_are_kept_exactly_by_step(tracking: Tracking) -> None:
    logged = [("loss", 1, 0.1 + 0.2), ("loss", 2, 1 / 3), ("loss", 3, 1e-300)]
    logged += [("rate", 1, 123456789.12345679), ("rate", 3, -0.0), ("zero", 0, 5e-324)]
    record = tracking.start(start("exact"))
    for name, step, value in reversed(logged):
        record.log({name: value}, step=step)
    assert tracking.history(record.run_id) == sorted(logged)
    assert tracking.get("exact").metrics == {"loss": 1e-300, "rate": 0.0, "zero": 5e-324}


def test_later_tag_replaces_an_earlier_one(tracking: Tracking) -> None:
    record = tracking.start(start("tagged", colour="red"))
    record.log(tags={"colour": "blue", "size": "9"})
    tags = tracking.get("tagged").tags
    assert (tags["colour"], tags["size"]) == ("blue", "9")


def parcel(folder: Path) -> Path:
    """A folder as runs hand over, with a folder in it."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 3\n")
    (folder / "pictures" / "a.png").write_bytes(bytes(range(256)))
    (folder / "empty").write_bytes(b"")
    return folder


def test_kept_files_are_moved_and_come_back_byte_for_byte(
    tracking: Tracking, tmp_path: Path
) -> None:
    record = tracking.start(start("files"))
    folder = parcel(tmp_path / "parcel")
    record.keep(folder)
    assert not folder.exists()
    assert tracking.artifact(record.run_id, "config.yaml") == b"seed: 3\n"
    assert tracking.artifact(record.run_id, "pictures/a.png") == bytes(range(256))
    assert tracking.artifact(record.run_id, "empty") == b""


def test_missing_artifact_is_told_in_one_line(tracking: Tracking) -> None:
    record = tracking.start(start("files"))
    with pytest.raises(UserError, match=r"config\.yaml") as told:
        tracking.artifact(record.run_id, "config.yaml")
    assert "\n" not in str(told.value)


def test_runs_are_found_by_all_their_tags_oldest_first(tracking: Tracking) -> None:
    for name in ("c", "a", "b"):
        tracking.start(start(name, study="s", kind="trial"))
        time.sleep(0.002)  # MLflow tells times apart by the millisecond
    tracking.start(start("d", study="s", kind="final"))
    tracking.start(start("e", study="other", kind="trial"))
    found = tracking.find({"study": "s", "kind": "trial"})
    assert [row.name for row in found] == ["c", "a", "b"]
    assert tracking.find({"study": "none"}) == []
    assert len(tracking.find({})) == 5


def test_deleted_run_is_found_no_more(tracking: Tracking) -> None:
    gone, left = (tracking.start(start(name, study="s")) for name in ("gone", "left"))
    tracking.delete(gone.run_id)
    assert [row.run_id for row in tracking.find({"study": "s"})] == [left.run_id]
    with pytest.raises(UserError, match="gone: no such run"):
        tracking.get("gone")


def test_run_that_is_dropped_is_found_no_more(tracking: Tracking) -> None:
    void, left = (tracking.start(start(name, study="s")) for name in ("void", "left"))
    void.log({"loss": 1.0}, step=1)
    void.end("finished")
    void.drop()
    assert [row.run_id for row in tracking.find({"study": "s"})] == [left.run_id]
    assert tracking.kept_back() == 0


def test_run_is_got_by_id_beginning_of_an_id_and_name(tracking: Tracking) -> None:
    record = tracking.start(start("mine"))
    tracking.start(start("yours"))
    run_id = str(record.run_id)
    assert [tracking.get(run).run_id for run in (run_id, run_id[:12], "mine")] == [run_id] * 3


def test_name_of_several_runs_is_refused_with_their_ids(tracking: Tracking) -> None:
    ids = [str(tracking.start(start("twin")).run_id) for _ in range(2)]
    with pytest.raises(UserError, match="twin: 2 runs") as told:
        tracking.get("twin")
    assert "\n" not in str(told.value)
    beginnings = str(told.value).rsplit(": ", 1)[1].split(", ")
    assert sorted(tracking.get(beginning).run_id for beginning in beginnings) == sorted(ids)


def test_misspelt_name_is_refused_with_the_nearest(tracking: Tracking) -> None:
    for name in ("default-seed-0", "default-seed-1", "smoke"):
        tracking.start(start(name))
    with pytest.raises(UserError) as told:
        tracking.get("defualt-seed-0")
    message = str(told.value)
    assert message.startswith("defualt-seed-0: no such run")
    assert "default-seed-0" in message.removeprefix("defualt-seed-0")
    assert "smoke" not in message
    assert "\n" not in message


def test_run_of_an_empty_store_is_refused_in_one_line(tracking: Tracking) -> None:
    with pytest.raises(UserError, match=r"^nothing: no such run") as told:
        tracking.get("nothing")
    assert "\n" not in str(told.value)


def test_child_names_its_parent(tracking: Tracking) -> None:
    parent = tracking.start(start("study"))
    tracking.start(Start("study-0", {}, {}, parent.run_id))
    assert tracking.get("study-0").tags["mlflow.parentRunId"] == parent.run_id
    assert "mlflow.parentRunId" not in tracking.get("study").tags


def test_latest_registered_version_is_the_champion(tracking: Tracking, tmp_path: Path) -> None:
    assert isinstance(tracking, MlflowTracking)
    records = [tracking.start(start(name)) for name in ("first", "second")]
    for number, record in enumerate(records):
        record.keep(parcel(tmp_path / "parcel"))
        record.end("finished")
        card = f"**the {number}th**\n\n- reads digits"
        tracking.register("digits", record.run_id, {"trial": str(number)}, card)
    champion = tracking.client.get_model_version_by_alias("digits", "champion")
    assert (champion.run_id, champion.tags["trial"]) == (records[1].run_id, "1")
    assert champion.description == "**the 1th**\n\n- reads digits"
    assert champion.source.endswith(f"{records[1].run_id}/artifacts/model")
    versions = tracking.client.search_model_versions("name = 'digits'")
    described = {version.run_id: version.description for version in versions}
    assert described[str(records[0].run_id)] == "**the 0th**\n\n- reads digits"
    assert len(described) == 2


def test_views_are_laid_out_on_the_experiment_and_replaced_by_later_ones(
    tracking: Tracking,
) -> None:
    assert isinstance(tracking, MlflowTracking)
    for value in ("{}", LONG[:4999]):  # as long as a view may be
        tracking.lay_out({"mlflow.sharedViewState.mine": value, "plain": "1"})
    experiment = tracking.client.get_experiment(tracking.experiment)
    assert experiment.tags["mlflow.sharedViewState.mine"] == LONG[:4999]
    assert experiment.tags["plain"] == "1"
    assert tracking.find({}) == []


def test_runs_page_is_that_of_the_experiment_where_its_runs_are_served(
    tracking: Tracking, request: pytest.FixtureRequest
) -> None:
    assert isinstance(tracking, MlflowTracking)
    server = "http://127.0.0.1:5000"  # where `digitlab ui` serves what is in the lab
    if request.node.callspec.id == "server":
        server = request.getfixturevalue("server").uri
    page, _, place = tracking.runs_page().partition("/#")
    assert page == server
    assert place.startswith(f"/experiments/{tracking.experiment}/runs?")


def test_recording_prints_nothing(
    tracking: Tracking, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tell_all(tracking, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_no_tracking_takes_everything_and_holds_nothing(tmp_path: Path) -> None:
    tracking = Tracking()
    record = tracking.start(start("nobody", study="s"))
    for each in (record, tracking.resume("0123456789")):
        each.log({"loss": 1.0}, step=1, tags={"colour": "red"})
        folder = parcel(tmp_path / "parcel")
        each.keep(folder)
        assert not folder.exists()
        each.end("finished")
    tracking.register("digits", "0123456789", {}, "a card")
    tracking.lay_out({"mlflow.sharedViewState.mine": "{}"})
    assert tracking.runs_page() == ""
    tracking.delete("0123456789")
    assert record.run_id is None
    assert tracking.find({}) == tracking.find({"study": "s"}) == []
    assert tracking.history("0123456789") == []
    assert tracking.kept_back() == tracking.deliver() == 0
    for ask in (
        lambda: tracking.get("nobody"),
        lambda: tracking.artifact("0123456789", "config.yaml"),
    ):
        with pytest.raises(UserError, match="tracking=none"):
            ask()


# ---- opening -------------------------------------------------------------------------------------


def test_four_processes_open_an_empty_lab_at_once(opened_by_four: tuple[Path, str]) -> None:
    assert opened_by_four[1] == "0 0 0 0"
    with closing(sqlite3.connect(opened_by_four[0] / "mlflow.db")) as database:
        names = database.execute("SELECT name FROM experiments").fetchall()
    assert names.count(("digitlab",)) == 1


def test_store_of_a_lab_lets_readers_and_a_writer_go_side_by_side(
    opened_by_four: tuple[Path, str],
) -> None:
    with closing(sqlite3.connect(opened_by_four[0] / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_new_experiment_can_be_opened_by_many_at_once_on_a_server(
    server: Server, tmp_path: Path
) -> None:
    together = threading.Barrier(6)

    def open_it(_: int) -> str:
        together.wait(10)
        return MlflowTracking(server.uri, "new to all", tmp_path).experiment

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(open_it, range(6)))) == 1


def test_file_that_is_no_database_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 1000)
    with pytest.raises(UserError, match=r"mlflow\.db: cannot be used \(.*not a database") as told:
        MlflowTracking(None, "digitlab", tmp_path)
    assert "\n" not in str(told.value)
    assert (tmp_path / "mlflow.db").read_bytes() == b"no database " * 1000


@pytest.mark.parametrize("uri", [f"http://{HOST}:1", "nonsense://x", "a/folder"])
def test_store_that_cannot_be_used_is_told_in_one_line(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be used") as told:
        MlflowTracking(uri, "digitlab", tmp_path)
    assert uri in str(told.value)
    assert "\n" not in str(told.value)


def test_password_in_the_uri_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{HOST}:1") as told:
        MlflowTracking(f"http://me:secret@{HOST}:1", "digitlab", tmp_path)
    assert "secret" not in str(told.value)


# ---- the outbox: MLflow is away ------------------------------------------------------------------


def tell_all(
    tracking: Tracking, lab: Path, before: Callable[[int], None] = lambda step: None
) -> None:
    """A whole run, `before` called ahead of each step, 0 to 5; its record is let go of."""
    before(0)
    record = tracking.start(Start("run", {"kind": "train"}, {"seed": 3, "long": LONG[:5000]}))
    before(1)
    record.log({"loss": 0.3, "accuracy": 1 / 3}, step=1, tags={"colour": "red"})
    before(2)
    record.log({"loss": 0.2, "accuracy": 2 / 3}, step=2)
    before(3)
    record.keep(parcel(lab / "parcel"))
    before(4)
    record.log(tags={"sha256": "abc"})
    before(5)
    record.end("finished")
    del record
    gc.collect()  # its lock goes with it, as when its process ends


STEPS = range(6)


def runs(tracking: Tracking) -> list[tuple[object, ...]]:
    """What the tracker holds of each of its runs, but for ids, times and tags of its own."""
    told = ("kind", "colour", "sha256", "digitlab.state")
    return [
        (
            row.name,
            row.status,
            {key: row.tags.get(key) for key in told},
            row.params,
            tracking.history(row.run_id),
            kept_files(tracking, row.run_id),
        )
        for row in tracking.find({})
    ]


def kept_files(tracking: Tracking, run_id: str) -> dict[str, bytes]:
    files = {}
    for path in ("config.yaml", "pictures/a.png", "empty"):
        with suppress(UserError):
            files[path] = tracking.artifact(run_id, path)
    return files


def folders(lab: Path) -> list[Path]:
    return sorted((lab / "outbox").glob("*"))


@pytest.fixture(scope="module")
def undisturbed(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[object, ...]]:
    """What a whole run leaves in the tracker when nothing goes wrong."""
    lab = tmp_path_factory.mktemp("undisturbed")
    tracking = MlflowTracking(server.uri, "undisturbed", lab)
    tell_all(tracking, lab)
    assert folders(lab) == []
    return runs(tracking)


@pytest.fixture
def connect(
    gate: Gate, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[], MlflowTracking]:
    """Opens the tracking anew, as another process would, through the gate."""
    return lambda: MlflowTracking(gate.uri, request.node.name, tmp_path)


Connect = Callable[[], MlflowTracking]
Runs = list[tuple[object, ...]]


def test_tracker_that_is_away_is_waited_for_unless_it_refuses(
    gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose("train", [f"tracking.uri={gate.uri}"])[0].config
    gate.shut()
    later = threading.Timer(3, gate.open)
    later.start()
    assert open_tracking(config, tmp_path, 60).find({}) == []
    later.join()
    assert f"{gate.uri}: cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("API request to endpoint /api failed with error code 401 != 200", True),
        ("API request to endpoint /api failed with error code 403 != 200", True),
        ("PERMISSION_DENIED: Permission denied", True),
        ("HTTPConnectionPool(host='h', port=8401): <object at 0x7f4030> timed out", False),
    ],
)
def test_refused_login_is_told_from_a_tracker_that_is_away(said: str, refused: bool) -> None:
    assert bool(_REFUSED.search(said)) == refused


def test_killed_server_loses_nothing_of_a_run_that_goes_on(
    server: Server, tmp_path: Path, undisturbed: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = MlflowTracking(server.uri, "killed", tmp_path)
    try:
        tell_all(tracking, tmp_path, lambda step: server.kill() if step == 2 else None)
        told = capsys.readouterr().err.strip()
        assert "\n" not in told
        assert str(tmp_path / "outbox") in told
        assert len(folders(tmp_path)) == 1
        assert not (tmp_path / "parcel").exists()
    finally:
        server.start()
    another = MlflowTracking(server.uri, "killed", tmp_path)
    assert runs(another) != undisturbed
    assert another.kept_back() == 1
    assert another.deliver() == 1
    assert runs(another) == undisturbed
    assert folders(tmp_path) == []
    assert another.deliver() == another.kept_back() == 0
    assert runs(another) == undisturbed


def test_run_that_is_dropped_while_the_server_is_away_is_never_delivered(
    server: Server, tmp_path: Path
) -> None:
    tracking = MlflowTracking(server.uri, "dropped", tmp_path)
    try:
        server.kill()
        record = tracking.start(start("void", study="s"))
        record.end("finished")
        assert tracking.kept_back() == 1
        record.drop()
        assert tracking.kept_back() == 0
    finally:
        server.start()
    assert tracking.deliver() == 0
    assert tracking.find({"study": "s"}) == []


def test_what_is_kept_for_a_run_that_was_deleted_meanwhile_is_let_go(
    server: Server, tmp_path: Path
) -> None:
    tracking = MlflowTracking(server.uri, "void", tmp_path)
    record = tracking.start(start("void", study="s"))
    try:
        server.kill()
        record.log({"loss": 1.0}, step=1)
        record.end("finished")
    finally:
        server.start()
    assert tracking.kept_back() == 1
    tracking.delete(str(record.run_id))
    assert tracking.deliver() == 1
    assert tracking.kept_back() == 0
    assert tracking.find({"study": "s"}) == []


@pytest.mark.parametrize("step", STEPS)
def test_outage_that_outlasts_the_run_is_made_up_for(
    connect: Connect, gate: Gate, tmp_path: Path, undisturbed: Runs, step: int
) -> None:
    tell_all(connect(), tmp_path, lambda at: gate.shut() if at == step else None)
    gate.open()
    another = connect()
    assert another.deliver() == 1
    assert runs(another) == undisturbed
    assert folders(tmp_path) == []


@pytest.mark.parametrize("step", [0, 3])
def test_outage_that_ends_before_the_run_is_made_up_for_by_the_run(
    connect: Connect, gate: Gate, tmp_path: Path, undisturbed: Runs, step: int
) -> None:
    tracking = connect()
    trouble = {step: gate.shut, 5: gate.open}
    tell_all(tracking, tmp_path, lambda at: trouble[at]() if at in trouble else None)
    assert folders(tmp_path) == []
    assert runs(tracking) == undisturbed


def test_run_that_begins_in_an_outage_has_an_id_once_it_is_delivered(
    connect: Connect, gate: Gate
) -> None:
    tracking = connect()
    gate.shut()
    record = tracking.start(start("early"))
    assert record.run_id is None
    gate.open()
    record.end("finished")
    assert record.run_id == tracking.get("early").run_id


def test_reading_while_the_tracker_is_away_is_told_in_one_line(
    connect: Connect, gate: Gate
) -> None:
    tracking = connect()
    run_id = str(tracking.start(start("there")).run_id)
    gate.shut()
    for ask in (
        lambda: tracking.find({}),
        lambda: tracking.get("there"),
        lambda: tracking.get(run_id),
        lambda: tracking.history(run_id),
        lambda: tracking.artifact(run_id, "config.yaml"),
        lambda: tracking.delete(run_id),
        lambda: tracking.register("digits", run_id, {}, "a card"),
        lambda: tracking.lay_out({"mlflow.sharedViewState.mine": "{}"}),
    ):
        with pytest.raises(UserError, match="not reached") as told:
            ask()
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("requests", [1, 2, 3, 8])
def test_run_is_begun_once_though_an_answer_is_lost(
    connect: Connect, gate: Gate, tmp_path: Path, undisturbed: Runs, requests: int
) -> None:
    tracking = connect()
    gate.open(requests, answer_last=False)
    tell_all(tracking, tmp_path)
    gate.open()
    connect().deliver()
    assert runs(tracking) == undisturbed
    assert folders(tmp_path) == []


@pytest.mark.parametrize("requests", [1, 2, 4, 8])
def test_delivery_that_breaks_off_goes_on_where_it_was(
    connect: Connect, gate: Gate, tmp_path: Path, undisturbed: Runs, requests: int
) -> None:
    tracking, another = connect(), connect()
    gate.shut()
    tell_all(tracking, tmp_path)
    gate.open(requests)
    assert another.deliver() == 0
    gate.open()
    assert connect().deliver() == 1
    assert runs(tracking) == undisturbed
    assert folders(tmp_path) == []


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("written", [0, 3])
def test_delivery_killed_before_it_notes_a_step_does_not_deliver_it_twice(
    connect: Connect,
    gate: Gate,
    tmp_path: Path,
    undisturbed: Runs,
    written: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracking = connect()
    gate.shut()
    tell_all(tracking, tmp_path)
    gate.open()
    replace, left = Path.replace, [written]

    def killed(self: Path, target: Path) -> Path:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            tracking.deliver()
    gc.collect()  # the lock goes, as when the process ends
    assert connect().deliver() == 1
    assert runs(tracking) == undisturbed
    assert folders(tmp_path) == []


def test_delivery_killed_after_it_handed_over_files_can_be_ended(
    connect: Connect,
    gate: Gate,
    tmp_path: Path,
    undisturbed: Runs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracking = connect()
    gate.shut()
    tell_all(tracking, tmp_path)
    gate.open()
    remove = shutil.rmtree

    def killed(folder: Path, **_: bool) -> None:
        remove(folder)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            tracking.deliver()
    gc.collect()
    connect().deliver()
    assert runs(tracking) == undisturbed
    assert folders(tmp_path) == []


_WRITER = """
import sys
from pathlib import Path
from digitlab.records.mlflow import MlflowTracking, Start
uri, experiment, lab, folder = sys.argv[1:]
record = MlflowTracking(uri, experiment, Path(lab)).start(Start("dies", {}, {"seed": 3}))
record.log({"loss": 0.3}, step=1)
print("begun", flush=True)
sys.stdin.readline()
record.log({"loss": 0.2}, step=2)
record.keep(Path(folder))
print("away", flush=True)
sys.stdin.readline()
"""


def test_run_whose_process_was_killed_in_an_outage_is_delivered_as_interrupted(
    connect: Connect, gate: Gate, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tracking = connect()
    arguments = [gate.uri, request.node.name, str(tmp_path), str(parcel(tmp_path / "parcel"))]
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "begun\n"
        gate.shut()
        writer.stdin.write("on\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "away\n"
        gate.open()
        assert tracking.deliver() == 0, "the folder of a live process was touched"
        assert len(folders(tmp_path)) == 1
        writer.kill()
    assert tracking.deliver() == 1
    row = tracking.get("dies")
    assert (row.status, row.tags["digitlab.state"]) == ("KILLED", "interrupted")
    assert tracking.history(row.run_id) == [("loss", 1, 0.3), ("loss", 2, 0.2)]
    assert kept_files(tracking, row.run_id)["pictures/a.png"] == bytes(range(256))
    assert folders(tmp_path) == []


def test_live_run_delivers_its_own_folder(connect: Connect, gate: Gate, tmp_path: Path) -> None:
    tracking = connect()
    record = tracking.start(start("live"))
    gate.shut()
    record.log({"loss": 0.3}, step=1)
    gate.open()
    assert connect().deliver() == 0
    assert len(folders(tmp_path)) == 1
    assert tracking.history(record.run_id) == []
    record.end("finished")
    assert tracking.history(record.run_id) == [("loss", 1, 0.3)]
    assert tracking.get("live").status == "FINISHED"
    assert folders(tmp_path) == []


def test_run_that_has_ended_can_be_delivered_while_its_process_lives_on(
    connect: Connect, gate: Gate, tmp_path: Path
) -> None:
    tracking = connect()
    gate.shut()
    record = tracking.start(start("ended"))
    record.end("finished")
    gate.open()
    assert connect().deliver() == 1
    assert tracking.get("ended").status == "FINISHED"
    assert folders(tmp_path) == []
    del record  # it lived until here


@pytest.mark.parametrize("tries", [0, 1])
def test_torn_last_line_is_left_out(
    connect: Connect, gate: Gate, tmp_path: Path, tries: int
) -> None:
    tracking = connect()
    record = tracking.start(start("torn"))
    gate.shut()
    record.log({"loss": 0.3}, step=1)
    del record
    gc.collect()  # its lock goes with it, as when its process is killed
    [folder] = folders(tmp_path)
    with open(folder / "operations.jsonl", "a") as file:
        file.write('{"do": "log", "metrics": {"lo')
    for _ in range(tries):  # deliveries that fail, since the tracker is still away
        assert tracking.deliver() == 0
    gate.open()
    assert tracking.deliver() == 1
    row = tracking.get("torn")
    assert (row.status, row.tags["digitlab.state"]) == ("KILLED", "interrupted")
    assert tracking.history(row.run_id) == [("loss", 1, 0.3)]
    assert folders(tmp_path) == []


def test_note_on_a_finished_run_kept_back_leaves_it_finished(
    connect: Connect, gate: Gate, tmp_path: Path
) -> None:
    tracking = connect()
    record = tracking.start(start("done"))
    record.end("finished")
    gate.shut()
    tracking.resume(record.run_id).log(tags={"verdict": "identical"})
    gc.collect()
    gate.open()
    assert tracking.deliver() == 1
    row = tracking.get("done")
    assert row.tags["verdict"] == "identical"
    assert (row.status, row.tags["digitlab.state"]) == ("FINISHED", "finished")


def test_process_killed_while_it_makes_the_tables_leaves_a_lab_that_can_be_used(
    tmp_path: Path,
) -> None:
    code = (
        "import sys; from pathlib import Path; from digitlab.records import mlflow as tracking; "
        "tracking._TABLES = Path('none are kept'); "
        "tracking.MlflowTracking(None, 'digitlab', Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    new = tmp_path / "mlflow.db.new"
    while process.poll() is None and not (new.exists() and new.stat().st_size > 100_000):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert new.exists()  # it was killed half-way
    (tmp_path / "mlflow.db.new-journal").touch()  # as it often leaves behind
    assert not (tmp_path / "mlflow.db").exists()
    assert MlflowTracking(None, "digitlab", tmp_path).find({}) == []
    assert not list(tmp_path.glob("mlflow.db.new*"))
