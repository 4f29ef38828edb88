"""A deleted study is hidden everywhere, keeps its name, and comes back as it was."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import Call, CallIn
from samples import recorded, studies
from studies import results_of

from digitlab.records.mlflow import MlflowTracker
from digitlab.study.storage import leader_lock, open_storage


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(studies(tmp_path_factory), tmp_path_factory.mktemp("deleted") / "lab")


@pytest.fixture
def call(copied: Path, call_in: CallIn) -> Call:
    return call_in(copied)


def test_it_asks_first(call: Call, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, status in (("n\n", 1), ("\n", 1), ("", 2)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        assert call("delete", "smoke")[0] == status
    assert recorded(copied, "smoke").runs()


def test_a_study_that_a_process_leads_is_not_deleted(call: Call, copied: Path) -> None:
    with leader_lock(open_storage(copied), copied, "smoke"):
        status, _, err = call("delete", "smoke", "--yes")
    assert status == 2
    assert "is in use" in err


@pytest.mark.slow
def test_deleted_and_restored(call: Call, copied: Path) -> None:
    before = results_of(copied)
    runs = {row.run_id for row in recorded(copied, "smoke").runs()}
    tracker = MlflowTracker(None, "digitlab", copied)
    gone = recorded(copied, "smoke").runs(kind="final")[0].run_id
    tracker.delete(gone)  # by somebody else, before: it is not brought back
    status, out, _ = call("delete", "smoke", "--yes")
    assert (status, f"{len(runs) - 1} runs" in out) == (0, True)
    assert tracker.find({"digitlab.study": "smoke"}) == []
    assert [s["study"] for s in json.loads(call("studies", "--json")[1])] == ["stopped"]
    assert [s["study"] for s in json.loads(call("studies", "--deleted", "--json")[1])] == ["smoke"]
    for words in (("show",), ("report",), ("audit",), ("delete", "--yes"), ("best",)):
        status, _, err = call(words[0], "smoke", *words[1:])
        assert status == 2
        assert "restore smoke" in err or words == ("audit",)
    status, _, err = call("sweep", "experiments=smoke", "data=sample")
    assert (status, "`digitlab restore smoke`" in err) == (2, True)

    status, out, _ = call("restore", "smoke")
    assert (status, f"{len(runs) - 1} runs" in out) == (0, True)
    assert {row.run_id for row in recorded(copied, "smoke").runs()} == runs - {gone}
    assert results_of(copied) == before
    tracker.restore(gone)
    assert call("audit", "smoke")[0] == 0
    status, _, err = call("restore", "smoke")
    assert (status, "was not deleted" in err) == (2, True)


def test_what_a_killed_call_has_half_deleted_is_restored_whole(
    call: Call, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {row.run_id for row in recorded(copied, "smoke").runs()}
    delete, calls = MlflowTracker.delete, []

    def fail_at_the_third(tracker: MlflowTracker, run_id: str) -> None:
        calls.append(run_id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        delete(tracker, run_id)

    monkeypatch.setattr(MlflowTracker, "delete", fail_at_the_third)
    assert call("delete", "smoke", "--yes")[0] == 130
    assert call("restore", "smoke")[0] == 0
    assert {row.run_id for row in recorded(copied, "smoke").runs()} == runs
