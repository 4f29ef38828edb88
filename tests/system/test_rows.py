"""Faults that a person has met, or could: each is a test of whole commands in real processes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, CallIn, Parent, until
from studies import assert_whole, problems_of, rows_of, runs_of, states_of
from trackers import CODE, Server

from digitlab.records.mlflow import MlflowTracker
from digitlab.records.reader import load_run
from digitlab.records.tracker import RunRow
from digitlab.results.audit import audit_studies

ENDLESS = ("trainer.epochs=100000", "study.pruner=none")
DIGITLAB = Path(sys.executable).with_name("digitlab")


def all_runs(lab: Path) -> list[RunRow]:
    """Return the lab's runs; none before its tracker is set up."""
    if not (lab / "mlflow.db").exists():
        return []
    return MlflowTracker(None, "digitlab", lab).find({})


def training(lab: Path, *overrides: str) -> Parent:
    return Parent(lab, [*TINY, *overrides], "train")


@pytest.mark.slow
def test_a_training_that_was_killed_is_ended_by_the_next_command(lab: Path) -> None:
    first = training(lab, *ENDLESS)
    until(lambda: bool(all_runs(lab)), first)
    first.kill()
    assert [run.status for run in all_runs(lab)] == ["RUNNING"]
    assert list((lab / "outbox").glob("*"))
    second = training(lab)
    assert second.wait() == 0
    assert "left unfinished by a process that has ended" in second.log.read_text()
    states = [run.tags["digitlab.state"] for run in all_runs(lab)]
    assert states == ["interrupted", "finished"]
    assert not list((lab / "outbox").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGHUP, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_training_that_receives_a_signal_is_recorded_as_interrupted(
    lab: Path, number: int
) -> None:
    parent = training(lab, *ENDLESS)
    until(lambda: "epoch" in parent.log.read_text(), parent)
    os.kill(parent.process.pid or 0, number)
    assert parent.wait(60) == 130
    [run] = all_runs(lab)
    assert (run.status, run.tags["digitlab.state"]) == ("KILLED", "interrupted")


@pytest.mark.long
def test_a_study_under_nohup_outlives_its_terminal_and_sigterm_to_its_group_charges_nothing(
    lab: Path,
) -> None:
    study = [*TINY, "study.trials=100000", "study.pruner=none", "study.retries=0"]
    with open(lab / "log.txt", "w") as log:
        process = subprocess.Popen(
            ["nohup", str(DIGITLAB), "sweep", *study],
            env=os.environ | CODE,
            cwd=lab,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_trials(lab, process, 1)
        os.killpg(process.pid, signal.SIGHUP)
        wait_for_trials(lab, process, sum(row.is_ended for row in rows_of(lab)) + 2)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    rows = rows_of(lab)
    assert {row.state for row in rows} <= {"finished", "waiting"}
    assert {row.notes.get("charged", 0) for row in rows} == {0}
    assert problems_of(lab) == []
    assert "go on with: digitlab sweep experiments=smoke" in (lab / "log.txt").read_text()


def wait_for_trials(lab: Path, process: "subprocess.Popen[bytes]", ended: int) -> None:
    while sum(row.is_ended for row in rows_of(lab)) < ended:
        assert process.poll() is None, (lab / "log.txt").read_text()[-2000:]
        time.sleep(0.2)


@pytest.mark.slow
def test_audit_gives_a_killed_driver_its_sealed_trial(
    lab: Path, run_sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sealed record in the outbox is the truth: no second run of the trial is made."""
    orders = {"kill_at": {"point": "trial.before_tell", "count": 2}}
    (lab / "faults.json").write_text(json.dumps(orders))
    study = ("study.pruner=none", "study.workers=1")
    parent = run_sweep(*study)
    assert parent.wait() == -signal.SIGKILL
    assert states_of(lab) == ["finished", "running"]

    assert audit_studies(["smoke"], lab, is_repair=False, as_json=False) == 1
    assert "trial 1 is marked as running, and nothing runs it" in capsys.readouterr().out
    assert audit_studies(["smoke"], lab, is_repair=True, as_json=False) == 0
    assert states_of(lab) == ["finished", "finished"]
    assert len(runs_of(lab, kind="trial", trial="1")) == 1
    assert audit_studies(["smoke"], lab, is_repair=False, as_json=False) == 0

    assert run_sweep(*study).wait() == 0
    assert_whole(lab, 3)
    assert [row.attempt for row in rows_of(lab)] == [1, 1, 1]


@pytest.mark.long
def test_the_run_that_was_printed_for_an_earlier_champion_is_still_there(
    lab: Path, run_sweep
) -> None:
    study = ("study.pruner=none", "study.trials=1")
    first = run_sweep(*study, published=True)
    assert first.wait() == 0
    printed = first.log.read_text().partition("digitlab reproduce ")[2].split()[0]
    assert run_sweep(*study, "study.trials=2", published=True).wait() == 0
    tracker = MlflowTracker(None, "digitlab", lab)
    assert tracker.get(printed).tags["digitlab.champion_of"] == "1 trial"
    newest = runs_of(lab, kind="champion")[-1].run_id
    assert not newest.startswith(printed)
    alias = tracker.client.get_model_version_by_alias("smoke", "champion")
    assert alias.run_id == newest
    assert len(tracker.client.search_model_versions("name = 'smoke'")) == 2
    row, config, _ = load_run(tracker, printed)  # its weights are what they were
    assert row.params["model.hidden"] == str(config.model.hidden)


@pytest.mark.long
def test_commands_that_a_study_on_a_server_prints_run_as_they_are(
    lab: Path, run_sweep, call_in: CallIn, tracker_server: Server
) -> None:
    where = f"tracking.uri={tracker_server.uri}"
    study = ("study.name=served", "study.pruner=none", "study.trials=1")
    parent = run_sweep(*study, where, published=True)
    assert parent.wait() == 0
    log, call = parent.log.read_text(), call_in(lab)
    printed = re.findall(r"^\w+: +digitlab (.+)$", log, re.MULTILINE)
    assert [command.split()[0] for command in printed] == ["reproduce", "sweep"], log
    for command in printed:
        status, out, err = call(*shlex.split(command))
        assert (status, err) == (0, ""), command
    assert "2 trials" in out
