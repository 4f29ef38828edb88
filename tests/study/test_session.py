"""How a study is opened, whose it is, and what must be left alone; by scripted workers."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import optuna
import pytest
from conftest import DATA, TINY
from leading import lead, train_well
from studies import open_store, problems_of, results_of, rows_of, runs_of
from trackers import waiting

from digitlab.base import faults
from digitlab.base.console import Board
from digitlab.base.errors import UserError
from digitlab.base.server import LeaderLock
from digitlab.base.stop import StopSignal
from digitlab.config.compose import compose
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.tracker import Dataset, NewRun, Registration, RunRow
from digitlab.results.audit import audit_studies
from digitlab.study import session
from digitlab.study.run import train
from digitlab.study.session import StudySession, open_session
from digitlab.study.storage import open_storage, study_names

STUDY = ("study.pruner=none", "study.trials=2")


@contextmanager
def opened(lab: Path, *overrides: str) -> Iterator[StudySession]:
    composed = compose("sweep", [*TINY, *STUDY, *overrides])[0]
    with Board() as board, open_session(composed, lab, board, StopSignal()) as session:
        yield session


def refusal(lab: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as raised, opened(lab, *overrides):
        pass
    assert "\n" not in str(raised.value)
    return str(raised.value)


def all_runs(lab: Path) -> list[RunRow]:
    return MlflowTracker(None, "digitlab", lab).find({})


@pytest.fixture
def finished(lab: Path) -> Path:
    """A lab with a study of two trials."""
    assert lead(lab, train_well, *STUDY)[0] == 0
    return lab


@pytest.mark.slow
def test_a_name_of_another_labs_study_in_one_tracker_is_refused(lab: Path, tmp_path: Path) -> None:
    shared = (*STUDY, f"tracking.uri=sqlite:///{tmp_path}/shared.db")
    assert lead(lab, train_well, *shared)[0] == 0
    tracker = MlflowTracker(shared[-1].partition("=")[2], "digitlab", lab)
    before = tracker.find({})
    other = tmp_path / "other"
    shutil.copytree(DATA, other / "data" / "sample", ignore=shutil.ignore_patterns("*.md"))
    text = refusal(other, *shared)
    assert "study.name=smoke is taken" in text
    assert "study.name=NEW" in text
    assert tracker.find({}) == before
    assert rows_of(other) == []
    assert lead(other, train_well, *shared, "study.name=beside")[0] == 0
    assert lead(lab, train_well, *shared) == (0, [])


@pytest.mark.slow
def test_a_study_whose_optuna_database_is_gone_leaves_its_runs_alone(finished: Path) -> None:
    before = all_runs(finished)
    aside = finished / "aside"
    aside.mkdir()
    for path in finished.glob("optuna.db*"):
        path.rename(aside / path.name)
    assert "restore the optuna.db" in refusal(finished)
    assert all_runs(finished) == before
    for path in [*finished.glob("optuna.db*"), *aside.iterdir()]:
        path.replace(finished / path.name if path.parent == aside else aside / f"{path.name}.new")
    assert lead(finished, train_well, *STUDY) == (0, [])


def test_a_study_that_was_deleted_in_optuna_is_named_and_its_runs_stay(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = all_runs(finished)
    optuna.delete_study(study_name="smoke", storage=open_storage(finished))
    assert "study.name=smoke is taken" in refusal(finished)
    assert audit_studies([], finished, is_repair=True, as_json=False) == 1
    assert "study smoke is not in Optuna's storage" in capsys.readouterr().out
    assert all_runs(finished) == before


@pytest.mark.slow
def test_a_study_that_was_renamed_in_optuna_goes_on_under_its_new_name(finished: Path) -> None:
    before, runs = results_of(finished), all_runs(finished)
    storage = open_storage(finished)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE studies SET study_name = 'renamed'")
    assert "study.name=smoke is taken" in refusal(finished)
    assert audit_studies(["renamed"], finished, is_repair=True, as_json=False) == 0
    assert all_runs(finished) == runs
    assert lead(finished, train_well, *STUDY, "study.name=renamed", "study.trials=3")[0] == 0
    assert results_of(finished, "renamed")[:2] == before
    assert problems_of(finished, "renamed") == []
    assert audit_studies(["renamed"], finished, is_repair=False, as_json=False) == 0


def test_a_deleted_experiment_is_named_before_any_training(finished: Path) -> None:
    tracker = MlflowTracker(None, "digitlab", finished)
    tracker.client.delete_experiment(tracker.experiment)
    assert "experiment 'digitlab' was deleted" in refusal(finished, "study.trials=3")
    with pytest.raises(UserError, match=r"was deleted.*experiments restore"):
        train(compose("train", TINY)[0], finished)
    assert not list((finished / "outbox").glob("*"))
    assert len(rows_of(finished)) == 2


@pytest.mark.slow
def test_a_deleted_run_of_the_study_is_named_with_the_command_that_restores_it(
    finished: Path,
) -> None:
    [parent] = runs_of(finished, kind="study")
    MlflowTracker(None, "digitlab", finished).delete(parent.run_id)
    text = refusal(finished, "study.trials=3")
    assert f"its own run {parent.run_id} was deleted" in text
    assert not list((finished / "outbox").glob("*"))
    found = re.search(r"`(.+)`", text)
    assert found
    subprocess.run(found[1], shell=True, check=True, capture_output=True, env=os.environ)
    assert lead(finished, train_well, *STUDY, "study.trials=3")[0] == 0
    assert problems_of(finished) == []


@pytest.mark.slow
def test_another_tracker_or_experiment_is_refused_with_both_named(
    finished: Path, tmp_path: Path
) -> None:
    other = f"sqlite:///{tmp_path}/other.db"
    assert f"tracker: lab digitlab -> {other} digitlab" in refusal(
        finished, f"tracking.uri={other}"
    )
    text = refusal(finished, "tracking.experiment=other")
    assert "tracker: lab digitlab -> lab other" in text
    assert "tracker: lab digitlab -> none" in refusal(finished, "tracking=none")


def test_audit_is_refused_while_the_study_is_led(finished: Path) -> None:
    with opened(finished):
        for is_repair in (False, True):
            with pytest.raises(UserError, match=r"study\.name=smoke is in use"):
                audit_studies(["smoke"], finished, is_repair, as_json=False)
    assert audit_studies(["smoke"], finished, is_repair=False, as_json=False) == 0


def test_a_study_has_one_run_of_its_own_even_if_it_was_not_noted(finished: Path) -> None:
    open_store(finished).note("run_id", None)  # a driver was killed before it could
    assert lead(finished, train_well, *STUDY) == (0, [])
    assert len(runs_of(finished, kind="study")) == 1
    assert open_store(finished).notes()["run_id"] == runs_of(finished, kind="study")[0].run_id


def test_the_study_s_own_run_is_on_the_disk_before_optuna_names_it(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made once: a power loss that took its record would leave it without parameters."""
    noted: list[object] = []

    def look(name: str) -> None:
        if name == "outbox.sealed":
            [study] = open_storage(lab).get_all_studies()
            noted.append(study.user_attrs.get("run_id"))

    monkeypatch.setattr(faults, "hook", look)
    with opened(lab):
        pass
    assert noted[:1] == [None]


def test_a_registered_model_of_another_study_keeps_its_name(lab: Path) -> None:
    tracker = MlflowTracker(None, "another", lab)
    run_id = tracker.create_run(NewRun("theirs", {}, {}))
    tracker.upload(run_id, {"model/MLmodel": b""})
    tracker.register(run_id, Registration("smoke", {}, "", Dataset("mnist", "0123abcd", "test")))
    with pytest.raises(UserError, match="registered model of that name"):
        lead(lab, train_well, *STUDY)


def test_a_study_of_another_program_is_left_alone(lab: Path) -> None:
    study = optuna.create_study(storage=open_storage(lab), study_name="smoke")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    with pytest.raises(UserError, match="another program's study"):
        lead(lab, train_well, *STUDY)
    [found] = open_storage(lab).get_all_studies()
    assert found.user_attrs == {}


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.validation_images=5000", "it must be less than the 2000 training images"),
        ("data.images=1600", "it must be at most 1599, or 0 for all"),
    ],
)
def test_more_images_than_there_are_are_refused_before_the_study_is_created(
    lab: Path, override: str, reason: str
) -> None:
    assert refusal(lab, override) == f"{override} is invalid: {reason}."
    assert study_names(open_storage(lab)) == []


@pytest.mark.parametrize("text", ["choice(0,100,1600)", "int(interval(100,1600))"])
def test_a_range_of_more_images_than_there_are_is_refused_before_the_study_is_created(
    lab: Path, text: str
) -> None:
    assert "data.images=1600 is invalid: it must be at most 1599" in refusal(
        lab, f"data.images={text}"
    )
    assert study_names(open_storage(lab)) == []


def test_a_source_that_is_none_is_refused_before_the_study_is_created(lab: Path) -> None:
    storage = open_storage(lab)
    optuna.create_study(storage=storage, study_name="empty")
    assert lead(lab, train_well, *STUDY, "study.name=gone")[0] == 0
    open_store(lab, "study.name=gone").note("deleted", {"runs": []})
    for source, reason in (
        ("nothing", "study.fork_from=nothing does not exist"),
        ("gone", "study gone was deleted"),
        ("empty", "study.fork_from=empty is invalid: it must be a study of this program"),
    ):
        text = refusal(lab, "study.name=new", f"study.fork_from={source}")
        assert reason in text
        assert "new" not in text.partition("known are")[2]
        assert study_names(storage) == ["empty", "gone"]
    assert lead(lab, train_well, *STUDY, "study.name=new", "study.seed=7")[0] == 0


def test_a_driver_that_lost_its_lock_while_another_one_led_writes_no_more(finished: Path) -> None:
    class Regained(LeaderLock):
        def check(self, stopped: Callable[[], bool] = lambda: False) -> bool:
            return True

    with opened(finished) as session:
        session.lock = Regained()
        session.check_lock()
        session.store.note("leader", "another")
        with pytest.raises(UserError, match="another process has gone on with it"):
            session.check_lock()
        assert session.lock.is_lost


def test_a_driver_that_lost_its_lock_leaves_the_study_s_run_to_the_other(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost(LeaderLock):
        def check(self, stopped: Callable[[], bool] = lambda: False) -> bool:
            self.is_lost = True
            raise UserError("study.name=smoke is in use: wait for it.")

    monkeypatch.setattr(session, "leader_lock", lambda *_: nullcontext(Lost()))
    with pytest.raises(UserError, match="is in use"):
        lead(lab, train_well, *STUDY)
    [run] = [run for run in all_runs(lab) if run.tags["digitlab.kind"] == "study"]
    assert (run.status, waiting(lab)) == ("RUNNING", [])


@pytest.mark.parametrize("name", ["a?b", "feature%2Fx", "o'neil #%? lab, {ü}$"])
def test_a_lab_in_any_folder_holds_both_its_stores(lab: Path, name: str) -> None:
    odd = lab.rename(lab.with_name(name))
    assert lead(odd, train_well, *STUDY, "study.trials=1")[0] == 0
    assert problems_of(odd) == []
    assert len(MlflowTracker(None, "digitlab", odd).find({"digitlab.kind": "trial"})) == 1
    assert {path.name for path in odd.iterdir()} >= {"mlflow.db", "optuna.db", "artifacts"}
    beside = (path for path in odd.parent.iterdir() if path != odd)
    assert not any(path.is_file() or any(path.iterdir()) for path in beside)
