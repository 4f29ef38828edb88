"""Operations reach the tracker in order and once, whatever is away, whenever it is killed."""

import errno
import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from disks import full_databases
from filelock import FileLock
from trackers import (
    FILES,
    HISTORY,
    LONG,
    WHOLE,
    Gate,
    Server,
    record_steps,
    recorded,
    waiting,
)

from digitlab.base.errors import UserError
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.outbox import Outbox
from digitlab.records.sessions import Sessions
from digitlab.records.spool import Changes, FileSpool, RunSpool, decode, encode
from digitlab.records.tracker import (
    Dataset,
    LogBatch,
    NewRun,
    NoTracker,
    Registration,
    TrackerAway,
    TrackerRefused,
    TrackerUnwritable,
)

Open = Callable[..., Outbox]
LOG = {"do": "log", "metrics": {"a": 1.0}, "step": 1, "tags": {}}
CREATE = {"do": "create", "run": asdict(NewRun("bad", {}, {}))}


@pytest.fixture
def open_outbox(gate: Gate, tmp_path: Path, request: pytest.FixtureRequest) -> Open:
    """Open a lab's outbox to the server, through the gate, as another process would."""
    opened: list[Outbox] = []

    def open_outbox(lab: Path = tmp_path) -> Outbox:
        opened.append(Outbox(lab, MlflowTracker(gate.uri, request.node.name, lab)))
        return opened[-1]

    return open_outbox


CHAMPION = Registration("digits", {}, "a card", Dataset("mnist", "0123abcd", "test"))


def record(outbox: Outbox, before: Callable[[int], None] = lambda step: None) -> None:
    """Record a whole run, `before` called ahead of each step, 0 to 5."""
    steps = record_steps(outbox)
    for number in range(6):
        before(number)
        next(steps)


def new(name: str = "run", **tags: str) -> NewRun:
    return NewRun(name, tags, {"seed": "3"})


# A tracker that answers


def test_whole_run_is_delivered_and_leaves_nothing_behind(open_outbox: Open) -> None:
    outbox = open_outbox()
    record(outbox)
    assert outbox.flush(60) == 0
    assert recorded(outbox.tracker) == [WHOLE]
    assert [path.name for path in waiting(outbox.folder.parent)[0].iterdir()] == ["session.json"]
    outbox.close()
    assert waiting(outbox.folder.parent) == []
    outbox.check()


def test_metrics_are_in_the_tracker_within_two_seconds(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    spool = outbox.open_run(new())
    run_id = spool.run_id(60)
    assert run_id
    logged = time.monotonic()
    spool.log({"loss": 0.5}, step=1)
    while outbox.tracker.history(run_id) != [("loss", 1, 0.5)]:
        time.sleep(0.05)
    assert time.monotonic() - logged < 2
    outbox.close()


def test_run_is_resumed_and_another_note_leaves_its_state(open_outbox: Open) -> None:
    outbox = open_outbox()
    spool = outbox.open_run(new("study"))
    run_id = spool.run_id(60)
    assert run_id
    assert outbox.resume_run(run_id, "study") is spool  # one spool of a run, or both would end it
    spool.end("interrupted")
    again = outbox.resume_run(run_id, "study")
    again.end("running")
    outbox.flush(60)
    assert outbox.tracker.get("study").status == "RUNNING"
    again.log({"value": 2.0}, tags={"colour": "red"})
    again.end("finished")
    outbox.resume_run(run_id, "study").log(tags={"verdict": "identical"})
    outbox.flush(60)
    outbox.close()
    row = outbox.tracker.get("study")
    assert (row.status, row.tags["digitlab.state"]) == ("FINISHED", "finished")
    assert (row.metrics["value"], row.tags["verdict"]) == (2.0, "identical")
    assert waiting(outbox.folder.parent) == []


def test_records_of_a_study_that_another_live_process_is_to_send_are_counted(
    open_outbox: Open, gate: Gate
) -> None:
    """New runs and resumed ones; no process is to send what stands in a damaged folder."""
    outbox, third, other = open_outbox(), open_outbox(), open_outbox()
    run_id = outbox.open_run(new(**{"digitlab.study_id": "mine"})).run_id(60)
    assert run_id
    outbox.flush(60)
    gate.shut()
    outbox.open_run(new("second", **{"digitlab.study_id": "mine"}))
    outbox.open_run(new("foreign", **{"digitlab.study_id": "theirs"}))
    third.resume_run(run_id, "mine").end("interrupted")
    assert other.held_elsewhere("mine") == 3  # the first run is not ended yet
    assert other.held_elsewhere("theirs") == 1
    damaged = outbox.folder / "1-1"
    damaged.mkdir()
    (damaged / "session.json").write_text("{")
    (damaged / "000001-x.run").write_bytes(encode({"do": "resume", "study_id": "mine"}))
    assert other.held_elsewhere("mine") == 3
    gate.open()
    for one in (outbox, third, other):
        one.close()


@pytest.mark.slow
def test_a_server_that_is_away_is_asked_every_two_seconds_while_somebody_waits(
    open_outbox: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, attempts = open_outbox(), []

    def away(run: NewRun, may_exist: bool) -> str:
        attempts.append(run.name)
        raise TrackerAway("it is away")

    monkeypatch.setattr(outbox.tracker, "create_run", away)
    outbox.open_run(new())
    assert outbox.flush(6) == 1
    assert 2 <= len(attempts) <= 9  # three while it waits, and the first of the back-off
    monkeypatch.undo()
    outbox.close()


def test_run_that_nobody_ended_is_interrupted_when_the_outbox_closes(open_outbox: Open) -> None:
    outbox = open_outbox()
    outbox.open_run(new())
    outbox.close()
    assert outbox.tracker.get("run").tags["digitlab.state"] == "interrupted"


def test_folder_of_a_process_that_was_killed_before_it_had_a_name_is_removed(
    tmp_path: Path,
) -> None:
    (tmp_path / "outbox" / ".18e-7").mkdir(parents=True)
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    record(outbox)
    outbox.close()
    assert waiting(tmp_path) == []


def test_the_outbox_s_own_name_is_durable_before_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power loss would take the whole outbox, whatever was synced in it."""
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    Sessions(tmp_path / "outbox", "none").own()
    assert synced[0] == str(tmp_path)


def test_a_file_system_that_locks_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_descriptor: int, _how: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("digitlab.records.sessions.fcntl.flock", flock)
    monkeypatch.setattr("digitlab.records.sessions.FileLock", lambda _: nullcontext())
    with pytest.raises(UserError, match="must be on a file system that locks"):
        Sessions(tmp_path / "outbox", "none").own()


def test_what_a_broken_removal_has_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "outbox" / "17a-1").mkdir(parents=True)
    own = Sessions(tmp_path / "outbox", "none").own()
    assert list((tmp_path / "outbox").iterdir()) == [own]


def test_run_that_ended_takes_no_more_operations(open_outbox: Open) -> None:
    outbox = open_outbox()
    spool = outbox.open_run(new())
    spool.end("finished")
    with pytest.raises(RuntimeError, match="resumed"):
        spool.log({"loss": 1.0})
    outbox.close()


def test_no_tracker_keeps_nothing(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, NoTracker())
    record(outbox)
    spool = outbox.resume_run("0123", "study")
    spool.log({"loss": 1.0})
    assert (spool.run_id(60), outbox.pending(), outbox.flush(60)) == (None, 0, 0)
    assert outbox.adopt() == []
    outbox.check()
    outbox.close()
    assert list(tmp_path.iterdir()) == []


# A tracker that is away


@pytest.mark.slow
@pytest.mark.parametrize("step", range(6))
def test_outage_is_made_up_for_by_the_run_or_by_the_next_process(
    open_outbox: Open, gate: Gate, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("digitlab.records.outbox._CLOSE_S", 0.1)
    outbox = open_outbox()

    def shut(at: int) -> None:
        if at == step:
            outbox.flush(60)
            gate.shut()

    record(outbox, shut)
    outbox.close()
    assert waiting(outbox.folder.parent)
    gate.open()
    while outbox._thread is not None:  # it still waits for its last answer
        outbox.close()
    other = open_outbox()
    assert other.adopt() == []  # it ended: nothing was interrupted
    assert other.flush(60) == 0
    assert recorded(other.tracker) == [WHOLE]
    other.close()
    assert waiting(outbox.folder.parent) == []


def test_outage_that_ends_is_noticed(open_outbox: Open, gate: Gate) -> None:
    outbox = open_outbox()
    gate.shut()
    record(outbox)
    while not outbox.problem:
        time.sleep(0.05)
    assert "does not answer" in outbox.problem
    assert outbox.pending() == 1
    gate.open()
    assert outbox.flush(60) == 0
    assert outbox.problem == ""
    assert recorded(outbox.tracker) == [WHOLE]
    outbox.close()


@pytest.mark.slow
def test_tracker_that_is_away_delays_nobody(open_outbox: Open, gate: Gate) -> None:
    outbox = open_outbox()
    gate.shut()
    for _ in range(20):
        started = time.monotonic()
        record(outbox)
        assert time.monotonic() - started < 1  # a request takes 10 s before it is given up
    assert outbox.pending() == 20
    assert outbox.flush(0.2) == 20
    assert outbox.flush(60, stopped=lambda: True) == 20
    gate.open()
    assert outbox.flush(60) == 0
    assert recorded(outbox.tracker) == [WHOLE] * 20
    outbox.close()


@pytest.mark.slow
@pytest.mark.parametrize("requests", [1, 2, 4, 6])
@pytest.mark.parametrize("answer_last", [False, True])
def test_run_is_delivered_once_though_the_delivery_breaks_off(
    open_outbox: Open, gate: Gate, requests: int, answer_last: bool
) -> None:
    outbox = open_outbox()
    gate.open(requests, answer_last)
    record(outbox)
    while not outbox.problem:
        time.sleep(0.02)
    gate.open()
    assert outbox.flush(60) == 0
    assert recorded(outbox.tracker) == [WHOLE]
    outbox.close()


@pytest.mark.slow
def test_killed_server_loses_nothing(tracker_server: Server, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, MlflowTracker(tracker_server.uri, "killed", tmp_path))
    try:
        record(outbox, lambda step: tracker_server.kill() if step == 2 else None)
    finally:
        tracker_server.start()
    assert outbox.flush(60) == 0
    assert recorded(outbox.tracker) == [WHOLE]
    outbox.close()


def test_reading_from_a_tracker_that_is_away_is_reported_in_one_line(
    open_outbox: Open, gate: Gate
) -> None:
    tracker = open_outbox().tracker
    run_id = tracker.create_run(new("there"))
    gate.shut()
    for ask in (
        lambda: tracker.find({}),
        lambda: tracker.get("there"),
        lambda: tracker.history(run_id),
        lambda: tracker.artifact(run_id, "config.yaml"),
        lambda: tracker.is_deleted(run_id),
        lambda: tracker.register(run_id, CHAMPION),
    ):
        with pytest.raises(TrackerAway, match="does not answer") as raised:
            ask()
        assert "\n" not in str(raised.value)


def test_model_is_registered_once_however_often_it_is_sent(tmp_path: Path) -> None:
    """With the metrics and the state that were recorded before and after it."""

    class Failing(MlflowTracker):
        left = 2

        def end_run(self, run_id: str, state: str, time_ms: int) -> None:
            self.left -= 1
            if self.left >= 0:
                raise TrackerAway("503")
            super().end_run(run_id, state, time_ms)

    tracker = Failing(None, "digitlab", tmp_path)
    outbox = Outbox(tmp_path, tracker)
    spool = outbox.open_run(new("best"), {"model/MLmodel": b""})
    spool.log({"test_accuracy": 0.5}, 1)
    spool.register(CHAMPION)
    spool.end("finished")
    assert outbox.flush(60) == 0
    outbox.check()
    outbox.close()
    row = tracker.get("best")
    assert (tracker.left, row.status) == (-1, "FINISHED")
    [version] = tracker.client.search_model_versions("name = 'digits'")
    assert (version.run_id, version.description) == (row.run_id, "a card")
    [model] = tracker.client.search_logged_models([tracker.experiment])
    assert [(metric.key, metric.value) for metric in model.metrics] == [("test_accuracy", 0.5)]


def test_run_that_the_tracker_always_fails_on_delays_no_other(tmp_path: Path) -> None:
    class Failing(MlflowTracker):
        def log(self, run_id: str, batch: LogBatch) -> None:
            if "bad" in batch.tags:
                raise TrackerAway("500")
            super().log(run_id, batch)

    outbox = Outbox(tmp_path, Failing(None, "digitlab", tmp_path))
    bad, good = outbox.open_run(new("bad")), outbox.open_run(new("good"))
    bad.log(tags={"bad": "yes"})
    good.end("finished")
    while outbox.pending() > 1:
        outbox.flush(0.1)
    assert outbox.tracker.get("good").status == "FINISHED"
    assert outbox.problem == "500"
    outbox.check()  # it may pass
    outbox._stop(5)


def test_an_outage_does_not_change_the_order_within_a_run(tmp_path: Path) -> None:
    """A run that is resumed while its earlier end waits has two files in the outbox."""
    states: list[str] = []
    reached, resumed = threading.Event(), threading.Event()

    class Away(MlflowTracker):
        def log(self, run_id: str, batch: LogBatch) -> None:
            state = batch.tags.get("digitlab.state", "")
            if state == "interrupted" and not resumed.is_set():
                reached.set()
                resumed.wait(60)
                raise TrackerAway("once")
            states.extend([state] * bool(state))
            super().log(run_id, batch)

    outbox = Outbox(tmp_path, Away(None, "digitlab", tmp_path))
    first = outbox.open_run(new())
    run_id = first.run_id(60)
    assert run_id is not None
    first.end("interrupted")
    assert reached.wait(60)
    outbox.resume_run(run_id, "study").end("running")
    resumed.set()
    outbox.flush(60)
    outbox.close()
    assert states[:2] == ["interrupted", "running"]


# A tracker that refuses


def test_refused_run_is_reported_and_no_other_waits_for_it(open_outbox: Open) -> None:
    outbox = open_outbox()
    bad, good = outbox.open_run(new("bad")), outbox.open_run(new("good"))
    bad.log({"not a name: \n!": 1.0})
    bad.end("finished")
    good.end("finished")
    outbox.flush(60)
    with pytest.raises(TrackerRefused, match=r"'bad' was refused .* rm ") as raised:
        outbox.check()
    assert "\n" not in str(raised.value)
    assert outbox.tracker.get("good").status == "FINISHED"
    outbox.close()
    # The next process tries once, and reports it again; the printed command ends that.
    other = open_outbox()
    assert other.adopt() == []
    other.flush(60)
    with pytest.raises(TrackerRefused) as raised:
        other.check()
    other.close()
    subprocess.run(str(raised.value).split("give the record up with: ")[1], shell=True, check=True)
    last = open_outbox()
    last.adopt()
    assert last.flush(60) == 0
    last.check()
    last.close()
    assert waiting(outbox.folder.parent) == []


def test_refusal_is_not_repeated(tmp_path: Path) -> None:
    class Refusing(MlflowTracker):
        calls = 0

        def log(self, run_id: str, batch: LogBatch) -> None:
            Refusing.calls += 1
            raise TrackerRefused("403")

    outbox = Outbox(tmp_path, Refusing(None, "digitlab", tmp_path))
    spool = outbox.open_run(new())
    outbox.flush(60)
    spool.log({"loss": 1.0})
    spool.end("finished")
    assert outbox.flush(60) == 0
    outbox.close()
    assert Refusing.calls == 1


def test_mistake_in_a_program_is_raised_as_it_is(tmp_path: Path) -> None:
    class Wrong(MlflowTracker):
        def log(self, run_id: str, batch: LogBatch) -> None:
            raise KeyError("mine")

    outbox = Outbox(tmp_path, Wrong(None, "digitlab", tmp_path))
    outbox.open_run(new()).end("finished")
    outbox.flush(60)
    with pytest.raises(KeyError, match="mine"):
        outbox.check()
    outbox.close()


def test_what_is_left_of_a_run_that_was_deleted_meanwhile_is_let_go(open_outbox: Open) -> None:
    outbox = open_outbox()
    spool = outbox.open_run(new(study="s"))
    run_id = spool.run_id(60)
    assert run_id
    outbox.tracker.delete(run_id)
    spool.log({"loss": 1.0}, step=1)
    spool.end("finished")
    assert outbox.flush(60) == 0
    outbox.check()
    outbox.close()
    assert waiting(outbox.folder.parent) == []
    assert outbox.tracker.find({"study": "s"}) == []


def test_nothing_is_let_go_when_the_experiment_was_deleted(open_outbox: Open) -> None:
    outbox = open_outbox()
    tracker = outbox.tracker
    assert isinstance(tracker, MlflowTracker)
    spool = outbox.open_run(new())
    outbox.flush(60)
    tracker.client.delete_experiment(tracker.experiment)
    spool.log({"loss": 1.0}, step=1)
    spool.end("finished")
    outbox.flush(60)
    with pytest.raises(TrackerRefused, match=r"experiment .* was deleted"):
        outbox.check()
    outbox.close()
    tracker.client.restore_experiment(tracker.experiment)
    other = open_outbox()
    other.adopt()
    assert other.flush(60) == 0
    assert other.tracker.get("run").metrics == {"loss": 1.0}
    other.close()


# Processes that are killed


def after_kill(lab: Path) -> list[tuple[object, ...]]:
    """Let a new process take over, and return what the tracker has then."""
    outbox = Outbox(lab, MlflowTracker(None, "digitlab", lab))
    lines = outbox.adopt()
    assert outbox.flush(60) == 0
    outbox.check()
    found = recorded(outbox.tracker)
    assert len(lines) <= sum(run[2] == "interrupted" for run in found)
    outbox.close()
    assert [path for path in waiting(lab) if not path.name.startswith(".")] == []
    return found


POINTS = [("outbox.created", 1), *(("outbox.appended", n) for n in (1, 2, 3, 4, 5, 6))]
POINTS += [("outbox.sealed", 1), ("outbox.sealed", 2), ("outbox.removed", 1)]
POINTS += [("outbox.sent", n) for n in (1, 2, 3, 4, 5, 6)]
POINTS += [("outbox.acknowledged", n) for n in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("point", "count"), POINTS)
def test_run_of_a_killed_process_is_delivered_exactly_once(
    tmp_path: Path, kill_at: Callable[..., bool], point: str, count: int
) -> None:
    assert kill_at(tmp_path, "record", point, count), "the point was not met"
    [run] = after_kill(tmp_path)
    name, status, state, *_, history, files = run
    assert name == "run"
    assert set(history) <= set(HISTORY)
    assert len(set(history)) == len(history), "a metric was doubled"
    if state == "finished":
        assert run == WHOLE
    else:
        assert (status, state) == ("KILLED", "interrupted")
        assert files in ({}, FILES)


@pytest.mark.slow
@pytest.mark.parametrize("first", [("outbox.appended", 4), ("outbox.sealed", 2)])
@pytest.mark.parametrize(
    "second", [("outbox.sent", 1), ("outbox.sent", 3), ("outbox.acknowledged", 1)]
)
def test_process_that_took_over_may_be_killed_too(
    tmp_path: Path,
    kill_at: Callable[..., bool],
    first: tuple[str, int],
    second: tuple[str, int],
) -> None:
    assert kill_at(tmp_path, "record", *first)
    assert kill_at(tmp_path, "adopt", *second)
    [run] = after_kill(tmp_path)
    assert run == WHOLE or (run[2] == "interrupted" and len(run[5]) == len(set(run[5])))


@pytest.mark.slow
def test_torn_last_operation_is_left_out(tmp_path: Path, kill_at: Callable[..., bool]) -> None:
    assert kill_at(tmp_path, "record", "outbox.appended", 4)
    [path] = (tmp_path / "outbox").glob("*/*.run")
    whole = path.read_bytes()
    path.write_bytes(whole + encode({"do": "log", "metrics": {"torn": 1.0}})[:-9])
    [run] = after_kill(tmp_path)
    assert (run[2], run[5]) == ("interrupted", HISTORY)


def test_torn_files_are_left_out_wherever_they_end() -> None:
    first, second = encode({"do": "log"}), encode({"do": "files"}, FILES)
    back = b'{"do": "log", "sizes": {"a": -3}, "crc32": 0}\n'  # to be read for ever
    for wrong in (back, b"[" * 100_000 + b"\n", b"[]\n", b'{"sizes": [], "crc32": 0}\n'):
        assert decode(first + wrong + second)[1] == len(first)
    for length in range(len(first), len(first) + len(second)):
        operations, end = decode((first + second)[:length])
        assert ([operation.what["do"] for operation in operations], end) == (["log"], len(first))
    damaged = bytearray(first + second)
    damaged[-5] ^= 1
    assert decode(bytes(damaged))[1] == len(first)
    operations, end = decode(first + second)
    assert (operations[1].files, end) == (FILES, len(first + second))


@pytest.mark.parametrize(
    "lines",
    [
        [LOG],
        [CREATE, {"do": "log", "metrics": {"a": "x"}, "step": 1, "tags": {}}],
        [CREATE, {"do": "end", "state": "gone", "tags": {}}],
        [CREATE, {"do": "datasets", "datasets": [["mnist"]]}],
        [CREATE, {"do": "unheard-of"}],
        [{"do": "create", "run": {"name": "run"}}],
        [{"do": "create", "run": {**CREATE["run"], "color": "red"}}],
        [{**CREATE, "time_ms": 2**64}],
        [CREATE, {**LOG, "step": -1}],
        [CREATE, CREATE],
        [{}],
    ],
)
def test_a_damaged_record_is_kept_and_reported_and_no_other_waits_for_it(
    tmp_path: Path, lines: list[dict[str, Any]]
) -> None:
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    good = outbox.open_run(new("good"))
    folder = outbox._sessions.own()
    content = b"".join(encode({"time_ms": 1, **what}) for what in lines)
    (folder / "000000-bad.run").write_bytes(content)
    (folder.with_name("damaged")).mkdir()  # of which the session cannot be read either
    (folder.with_name("damaged") / "session.json").write_text("[]")
    good.seal()
    outbox._stop(5)
    for descriptor in outbox._sessions._locks.values():
        os.close(descriptor)  # as if the process had ended
    other = Outbox(tmp_path, outbox.tracker)
    assert any("damaged, or of another version" in line for line in other.adopt())
    other.flush(60)
    other.check(study_id="")  # what others have left ends no run of this process
    with pytest.raises(TrackerRefused, match=r"damaged, or of another version.* rm ") as raised:
        other.check()
    assert "\n" not in str(raised.value)
    assert (folder / "000000-bad.run").read_bytes() == content
    assert other.tracker.get("good").tags["digitlab.state"] == "interrupted"
    other.close()


def test_a_record_that_is_damaged_in_its_middle_is_kept_whole(tmp_path: Path) -> None:
    lines = [CREATE, LOG, {"do": "end", "state": "finished", "tags": {}}]
    content = bytearray(b"".join(encode({**what, "time_ms": 1}) for what in lines))
    content[content.index(b'"metrics"')] ^= 1
    path = tmp_path / "1.run"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read from byte"):
        FileSpool.load(path, Changes())
    assert path.read_bytes() == content


def test_a_record_that_is_damaged_at_an_earlier_end_is_kept_whole(tmp_path: Path) -> None:
    ends = [{"do": "end", "state": state, "tags": {}} for state in ("running", "finished")]
    content = bytearray(b"".join(encode({**what, "time_ms": 1}) for what in (CREATE, *ends)))
    content[content.index(b'"state": "running"')] ^= 1
    path = tmp_path / "1.run"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read from byte"):
        FileSpool.load(path, Changes())
    assert path.read_bytes() == content


def test_every_operation_that_is_written_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "a.run"
    spool = FileSpool(path, Changes())
    spool.create(NewRun("run", {"a": "b"}, {"c": "d"}, "parent"), FILES)
    spool.log({"loss": float("nan"), "rate": 1.0}, 1, {"colour": "red"})
    spool.add_datasets([Dataset("mnist", "0123", "training")])
    spool.add_files(FILES)
    spool.register(Registration("digits", {"a": "b"}, "card", Dataset("mnist", "0123", "test")))
    spool.end("running")
    spool.end("finished")
    resumed = FileSpool(tmp_path / "b.run", Changes())
    resumed.resume("run-id", "study-id")
    written = {name for name in vars(RunSpool) if name[0] != "_"} - {"seal", "leave", "run_id"}
    assert written == {"log", "add_datasets", "add_files", "register", "end"}  # all of them above
    for one in (spool, resumed):
        assert FileSpool.load(one.path, Changes()).size == one.size > 0


def test_sessions_of_living_processes_are_left_alone(open_outbox: Open, gate: Gate) -> None:
    outbox, other = open_outbox(), open_outbox()
    spool = outbox.open_run(new("mine"))
    outbox.flush(60)
    gate.shut()
    spool.log({"loss": 1.0}, step=1)
    assert other.adopt() == []
    assert other.leftovers() == other.pending() == 0
    gate.open()
    spool.end("finished")
    outbox.close()
    other.close()
    assert outbox.tracker.get("mine").status == "FINISHED"


def test_a_folder_that_another_process_looks_into_is_taken_over_afterwards(
    tmp_path: Path, kill_at: Callable[..., bool]
) -> None:
    kill_at(tmp_path, "record", "outbox.appended", 4)
    [session] = (tmp_path / "outbox").glob("*/session.json")
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    taken: list[str] = []
    adopting = threading.Thread(target=lambda: taken.extend(outbox.adopt()))
    with FileLock(tmp_path / "outbox.lock"), open(session) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        adopting.start()
        adopting.join(0.5)
        assert adopting.is_alive()
    adopting.join()
    assert len(taken) == 1
    outbox.close()


def test_a_run_that_another_process_goes_on_with_is_not_ended(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    left = outbox.open_run(new("left"))
    left.leave()
    outbox.close()
    assert outbox.tracker.get("left").status == "RUNNING"
    assert waiting(tmp_path) == []


def test_records_for_another_tracker_are_left_alone(
    tmp_path: Path, kill_at: Callable[..., bool]
) -> None:
    kill_at(tmp_path, "record", "outbox.appended", 4)
    other = Outbox(tmp_path, MlflowTracker(None, "other", tmp_path))
    assert other.adopt() == []
    assert other.leftovers() == 0
    other.close()
    assert len(after_kill(tmp_path)) == 1


# The disk


def test_full_disk_is_raised_and_leaves_no_half_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    steps = record_steps(outbox)
    next(steps)
    spool = next(steps)
    write = os.write
    left = [10]

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, content: _fill(write, left, file, content))
        with pytest.raises(OSError, match="No space left"):
            spool.log({"loss": 9.0}, step=9)
    for _ in steps:
        pass
    assert outbox.flush(60) == 0
    assert recorded(outbox.tracker) == [WHOLE]
    outbox.close()


def test_record_that_cannot_be_read_now_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, or a file system that is away for a moment."""
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(FileSpool, "unsent", lambda _: os.read(-1, 1))
        outbox.open_run(new()).end("finished")
        assert outbox.flush(60) == 1  # at once
        with pytest.raises(OSError, match="Bad file descriptor"):
            outbox.check()
    assert outbox.flush(60) == 0
    outbox.check()
    assert recorded(outbox.tracker)
    outbox.close()


def test_record_of_another_process_that_cannot_be_read_is_left_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    monkeypatch.setattr(first, "_send_all", lambda: None)
    monkeypatch.setattr(first, "flush", lambda _: 1)  # it ends without sending
    first.open_run(new()).end("finished")
    first.close()
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(FileSpool, "unsent", lambda _: os.read(-1, 1))
        outbox.adopt()
        assert outbox.flush(60) == 0
        outbox.check(study_id="")
    outbox.close()
    last = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    last.adopt()
    assert last.flush(60) == 0
    assert recorded(last.tracker)
    last.close()


def test_full_disk_of_the_lab_is_no_outage_and_space_lets_the_records_through(
    tmp_path: Path,
) -> None:
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    outbox.open_run(new()).log({"loss": 1.0}, step=1)
    assert outbox.flush(60) == 0
    with full_databases():
        later = outbox.open_run(NewRun("later", {}, {"seed": "3", "long": LONG[:6000]}))
        assert outbox.flush(60) == 1  # at once
        with pytest.raises(TrackerUnwritable, match="disk is full") as raised:
            outbox.check()
        assert "\n" not in str(raised.value)
    later.end("finished")
    assert outbox.flush(60) == 0
    outbox.check()
    assert outbox.tracker.get("later").status == "FINISHED"
    outbox.close()


def _fill(write: Callable[[int, bytes], int], left: list[int], file: int, content: bytes) -> int:
    """Write as a disk that has room for `left` bytes."""
    if not left[0]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = write(file, content[: left[0]])
    left[0] -= written
    return written


def test_sealed_run_is_synced_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))
    spool = outbox.open_run(new())
    monkeypatch.setattr(outbox, "_send_all", lambda: None)  # it is not delivered first
    spool.add_files(FILES)
    synced: list[str] = []
    fsync = os.fsync

    def note(file: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    spool.seal()
    [path] = (tmp_path / "outbox").glob("*/*.run")
    assert synced == [str(path), str(path.parent)]
    monkeypatch.undo()
    outbox.close()


def test_many_threads_may_record_at_once(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, MlflowTracker(None, "digitlab", tmp_path))

    def work(number: int) -> None:
        for _ in range(3):
            record(outbox)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outbox.flush(60) == 0
    assert recorded(outbox.tracker) == [WHOLE] * 12
    outbox.close()
