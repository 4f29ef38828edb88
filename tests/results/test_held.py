"""Of a study whose records are still on their way, or elsewhere, nothing is said and changed."""

import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from conftest import Call, CallIn
from samples import studies
from studies import problems_of, results_of, rows_of, runs_of

from digitlab.records import delivery
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.outbox import Outbox
from digitlab.records.tracker import NewRun, TrackerAway
from digitlab.results import audit
from digitlab.study.storage import open_storage

COMMANDS = (("export", "smoke", "smoke.zip"), ("delete", "smoke", "--yes"))


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return shutil.copytree(studies(tmp_path_factory), tmp_path / "lab")


@pytest.fixture
def call(lab: Path, call_in: CallIn) -> Call:
    return call_in(lab)


def away(*_: Any) -> NoReturn:
    raise TrackerAway("The tracker is away: wait for it.")


def waiting_record(lab: Path, patch: pytest.MonkeyPatch) -> Outbox:
    """A process that could not send the end of a trial's run: its outbox is still open."""
    patch.setattr(delivery, "_FIRST_WAIT_S", 0.001)
    row = runs_of(lab, kind="trial", trial="0")[0]
    tracker = MlflowTracker(None, "digitlab", lab)
    tracker.end_run(row.run_id, "running", 0)
    tracker.tag(row.run_id, {"digitlab.state": "running"})
    patch.setattr(MlflowTracker, "log", away)
    outbox = Outbox(lab, tracker)
    patch.setattr(outbox, "flush", lambda _: 1)  # it need not wait before it ends
    run = outbox.resume_run(row.run_id, row.tags["digitlab.study_id"])
    run.log({}, 0, {"digitlab.state": row.tags["digitlab.state"]})
    run.end(row.tags["digitlab.state"])
    return outbox


def test_a_repair_that_cannot_send_all_changes_nothing_else(
    lab: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rows = results_of(lab), rows_of(lab)
    with monkeypatch.context() as patch:
        waiting_record(lab, patch).close()
        patch.setattr(audit, "_DELIVERY_S", 0.2)
        for words in (("smoke",), ()):
            status, out, _ = call("audit", *words, "--repair")
            assert (status, "not sent: the tracker has yet to take 1 record (" in out) == (1, True)
            assert out.endswith(", 0 repaired\n")
            assert "interrupted" not in {row.tags["digitlab.state"] for row in runs_of(lab)}
    status, out, _ = call("audit", "smoke", "--repair")
    assert (status, out.splitlines()[-1]) == (0, "1 study, 0 problems, 1 repaired")
    assert (results_of(lab), rows_of(lab), problems_of(lab)) == (before, rows, [])


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("is_ended", [True, False], ids=["left", "held"])
def test_a_study_whose_records_wait_is_refused(
    words: tuple[str, ...], is_ended: bool, lab: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab.parent)
    with monkeypatch.context() as patch:
        outbox = waiting_record(lab, patch)
        if is_ended:
            outbox.close()
        status, _, err = call(*words)
        outbox.close()
    assert (status, "1 record of study smoke waits in the outbox" in err) == (2, True)
    assert not (lab.parent / "smoke.zip").exists()
    assert runs_of(lab)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_study_that_does_not_exist_leaves_no_lock(
    words: tuple[str, ...], lab: Path, call: Call
) -> None:
    before = {*(lab / "locks").iterdir()}
    status, out, err = call(words[0], "smokk", *words[2:])
    assert (status, out) == (2, "")
    assert err == "digitlab: study smokk does not exist: did you mean smoke?\n"
    assert {*(lab / "locks").iterdir()} == before


def test_a_record_that_cannot_be_read_is_named_and_all_else_repaired(
    lab: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        waiting_record(lab, patch).close()
    [folder] = {path.parent for path in (lab / "outbox").glob("*/*.run")}
    damaged = folder / "000000-bad.run"
    damaged.write_text('{"do": "unheard-of", "sizes": {}, "crc32": 0}\n')
    status, out, _ = call("audit", "smoke", "--repair", "--json")
    [problem] = json.loads(out)["problems"]
    assert (status, problem["kind"], json.loads(out)["repaired"]) == (1, "refused", 1)
    assert str(damaged) in problem["detail"]
    assert problems_of(lab) == []
    damaged.unlink()
    assert call("audit", "smoke")[0] == 0


def test_records_for_a_tracker_that_is_not_looked_for_are_named(
    lab: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = MlflowTracker(None, "other", lab)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowTracker, "create_run", away)
        outbox = Outbox(lab, other)
        patch.setattr(outbox, "flush", lambda _: 1)
        outbox.open_run(NewRun("waiting", {}, {}))
        outbox.close()
    status, out, _ = call("audit", "--repair")
    assert (status, "pending: 1 record of ended processes for another tracker" in out) == (1, True)
    assert f"({other.identity})" in out


def test_a_tracker_that_is_not_the_study_s_is_refused(
    lab: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rows = results_of(lab), rows_of(lab)
    monkeypatch.chdir(lab.parent)
    other = f"sqlite:///{lab / 'other.db'}"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", other)
        for words in COMMANDS:
            status, _, err = call(*words)
            assert (status, f"this call opens {other}, experiment digitlab." in err) == (2, True)
            assert err.startswith("digitlab: study smoke: its runs are in the tracker lab")
        status, out, _ = call("audit", "smoke", "--repair")
        assert (status, out.startswith("other tracker: study 'smoke': ")) == (1, True)
    assert (results_of(lab), rows_of(lab), problems_of(lab)) == (before, rows, [])
    assert call("delete", "smoke", "--yes")[0] == 0
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", other)
        status, _, err = call("restore", "smoke")
        assert (status, "cannot be restored: its runs are in the tracker" in err) == (2, True)
    assert open_storage(lab).get_all_studies()
    assert call("restore", "smoke")[0] == 0
    assert results_of(lab) == before
