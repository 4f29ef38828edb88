"""A tracker's server that misbehaves: what is recorded reaches it once, and nobody waits for it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trackers import WHOLE, record_steps, recorded, waiting
from unruly import KINDS, LIES, Unruly

from digitlab.base.errors import UserError
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.outbox import Outbox
from digitlab.records.tracker import LogBatch, NewRun, TrackerAway, TrackerRefused

pytestmark = pytest.mark.slow
# Errors of the request: it would be refused again.
REFUSALS = ("400 INVALID_PARAMETER_VALUE", "403 PERMISSION_DENIED", "413")
Open = Callable[[], Outbox]


@pytest.fixture
def open_outbox(
    unruly: Unruly, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Open]:
    """Open the lab's outbox to the server that misbehaves, as another process would."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    opened: list[Outbox] = []

    def open_outbox() -> Outbox:
        opened.append(Outbox(tmp_path, MlflowTracker(unruly.uri, request.node.name, tmp_path)))
        return opened[-1]

    yield open_outbox
    for outbox in opened:
        outbox._stop(20)
        outbox._sessions.close()


def record(outbox: Outbox) -> None:
    for _ in record_steps(outbox):
        pass


# At the first request, in the middle of the uploads; all of them, with other figures, by hand.
@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recorded_reaches_a_server_once_that_misbehaves_for_a_while(
    open_outbox: Open, unruly: Unruly, kind: str, skipped: int
) -> None:
    """At each request of a run's delivery; a refusal is kept for the next process."""
    outbox = open_outbox()
    unruly.misbehave(kind, skipped, count=3)  # the client itself tries twice
    started = time.monotonic()
    record(outbox)
    assert time.monotonic() - started < 1.5  # whatever the server does
    assert outbox.flush(60) == 0
    assert unruly.hits
    unruly.behave()
    if kind in REFUSALS:
        with pytest.raises(TrackerRefused, match="is kept") as raised:
            outbox.check()
        assert "\n" not in str(raised.value)
        outbox._stop(20)
        outbox._sessions.close()
        outbox = open_outbox()
        assert outbox.adopt() == []
        assert outbox.flush(60) == 0
    outbox.check()
    assert recorded(outbox.tracker) == [WHOLE]
    outbox.close()
    assert waiting(outbox.folder.parent) == []


@pytest.mark.parametrize("kind", KINDS)
def test_reading_from_a_server_that_misbehaves_is_refused_in_one_line(
    open_outbox: Open, unruly: Unruly, kind: str
) -> None:
    tracker = open_outbox().tracker
    run_id = tracker.create_run(NewRun("there", {}, {}))
    tracker.upload(run_id, {"config.yaml": b"a: b\n"})
    unruly.misbehave(kind)
    for ask in (
        lambda: tracker.find({}),
        lambda: tracker.get("there"),
        lambda: tracker.history(run_id),
        lambda: tracker.artifact(run_id, "config.yaml"),
        lambda: tracker.files(run_id),
        lambda: tracker.is_deleted(run_id),
    ):
        with pytest.raises(UserError) as raised:
            ask()
        assert "\n" not in str(raised.value)
        assert isinstance(raised.value, TrackerRefused) == (kind in REFUSALS)
        assert isinstance(raised.value, TrackerAway) == (kind not in REFUSALS)


@pytest.mark.parametrize("kind", LIES)
def test_an_answer_without_what_was_asked_for_is_no_answer(
    open_outbox: Open, unruly: Unruly, kind: str
) -> None:
    """MLflow's client takes it for a run without an id."""
    outbox = open_outbox()
    tracker = outbox.tracker
    run_id = tracker.create_run(NewRun("there", {}, {}))
    tracker.log(run_id, LogBatch({"seed": "3"}))
    unruly.misbehave(kind)
    with pytest.raises(TrackerAway, match="does not answer"):
        tracker.get(run_id)
    unruly.misbehave(kind, count=1)
    record(outbox)
    assert outbox.flush(60) == 0
    outbox.check()
    assert recorded(outbox.tracker)[1:] == [WHOLE]
