"""Studies from beginning to end, as a person runs them, on the smallest of everything."""

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import TINY, Parent
from test_crashes import assert_whole, open_study, problems

from digitlab.records.mlflow import open_tracking
from digitlab.study.audit import inspect
from digitlab.study.fingerprint import begun_config


def states(lab: Path) -> list[str]:
    return [row.state for row in open_study(lab).rows()]


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tracking_of(lab: Path):
    return open_tracking(begun_config(open_study(lab).notes()), lab)


def test_a_study_ends_with_its_total_says_so_and_can_be_extended(lab, run_sweep) -> None:
    assert run_sweep("study.confirm=2", "study.final_seeds=2").wait() == 0
    assert_whole(lab, 3)
    log = (lab / "log.txt").read_text()
    assert "champion: trial" in log
    assert "make reproduce RUN=" in log

    before = [(row.number, row.value) for row in open_study(lab).rows()]
    assert run_sweep("study.confirm=2", "study.final_seeds=2").wait() == 0
    assert "study smoke is complete: 3 trials" in (lab / "log.txt").read_text()

    assert run_sweep("study.confirm=2", "study.final_seeds=2", "study.trials=5").wait() == 0
    assert_whole(lab, 5)
    assert [(row.number, row.value) for row in open_study(lab).rows()][:3] == before


def test_the_test_set_is_read_by_final_fits_alone_once_each(lab, run_sweep) -> None:
    assert run_sweep("study.confirm=2", "study.final_seeds=2", "study.audit_pruning=1").wait() == 0
    opened = (lab / "opened").read_text().splitlines()
    files = ["final t10k-images-idx3-ubyte", "final t10k-labels-idx1-ubyte"]
    assert sorted(opened) == sorted(2 * files)


def test_every_run_of_a_study_is_recorded_whole(lab, run_sweep) -> None:
    assert run_sweep("study.confirm=2", "study.pruner=none").wait() == 0
    tracking = tracking_of(lab)
    kinds = {"study": 1, "trial": 3, "confirm": 2, "final": 1, "champion": 1}
    for kind, count in kinds.items():
        rows = tracking.find({"digitlab.study": "smoke", "digitlab.kind": kind})
        assert len(rows) == count, kind
        assert {row.status for row in rows} == {"FINISHED"}
    champion = tracking.find({"digitlab.kind": "champion"})[0]
    final = tracking.find({"digitlab.kind": "final"})[0]
    assert champion.tags["digitlab.weights_sha256"] == final.tags["digitlab.weights_sha256"]
    assert champion.metrics["test_accuracy_mean"] == final.metrics["test_accuracy"]
    assert champion.metrics["test_seeds"] == 1
    for row in open_study(lab).rows():
        run = tracking.find({"digitlab.kind": "trial", "digitlab.trial": str(row.number)})[0]
        assert run.metrics["val_accuracy"] == row.value
        assert {k: run.params[k] for k in row.values} == {k: str(v) for k, v in row.values.items()}


def test_a_study_without_a_tracker_is_held_against_nothing(lab, run_sweep) -> None:
    plain = ("tracking=none", "study.pruner=none")
    assert run_sweep(*plain, "study.trials=1").wait() == 0
    parent = run_sweep(*plain, "study.trials=2")
    assert parent.wait() == 0
    assert "mended" not in parent.log.read_text()
    assert problems(lab, open_study(lab)) == []


@pytest.mark.long
def test_a_study_that_differs_is_refused_by_name_and_can_be_forked(lab, run_sweep) -> None:
    plain = ("study.pruner=none", "study.workers=1")
    assert run_sweep(*plain).wait() == 0
    assert run_sweep(*plain, "optim.weight_decay=0.5", "study.rungs=[0.4]").wait() == 2
    line = (lab / "log.txt").read_text().splitlines()[-1]
    assert "optim.weight_decay was 0.01, is 0.5" in line
    assert "study.rungs was [0.3], is [0.4]" in line
    assert "study.fork_from=smoke" in line

    # A narrower range: the trials that lie in it are taken over, values and all.
    old = open_study(lab).rows()
    rate = sorted(row.values["optim.learning_rate"] for row in old)[1]
    narrow = f"optim.learning_rate=tag(log,interval({rate},0.03))"
    assert run_sweep(*plain, narrow, "study.name=fork", "study.fork_from=smoke").wait() == 0
    forked = [row for row in open_study(lab, "study.name=fork").rows() if "taken_from" in row.notes]
    fitting = [row for row in old if row.values["optim.learning_rate"] >= rate]
    assert [(row.value, row.values) for row in forked] == [(r.value, r.values) for r in fitting]
    assert len(open_study(lab, "study.name=fork").rows()) == 3
    assert problems(lab, open_study(lab, "study.name=fork")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_study_that_can_go_on(lab, run_sweep, number) -> None:
    long = ("study.trials=2", "trainer.epochs=5000", "study.pruner=none")  # minutes
    parent = run_sweep(*long)
    until(lambda: "running" in states(lab) if (lab / "optuna.db").exists() else False)
    os.kill(parent.process.pid, number)
    assert parent.wait(60) == 130
    assert set(states(lab)) == {"waiting"}
    assert problems(lab, open_study(lab)) == []
    runs = tracking_of(lab).find({"digitlab.study": "smoke"})
    assert {run.tags["digitlab.state"] for run in runs} == {"interrupted"}
    if number != signal.SIGHUP:  # whose terminal is gone
        assert "go on with: make sweep EXPERIMENT=smoke" in parent.log.read_text()


@pytest.mark.long
def test_trials_that_raise_hang_or_diverge_do_not_end_the_study(lab, run_sweep) -> None:
    (lab / "killer.json").write_text(json.dumps({"raise": [0], "hang": [1]}))
    parent = run_sweep("study.trials=4", "study.retries=1", "study.trial_minutes=0.25")
    assert parent.wait() == 0
    rows = open_study(lab).rows()
    assert [row.state for row in rows[:2]] == ["failed", "failed"]
    assert "told to raise" in rows[0].notes["reason"]
    assert rows[0].notes["attempts"] == 1
    assert "study.trial_minutes=0.25" in rows[1].notes["reason"]
    assert_whole(lab, 4)


@pytest.mark.long
def test_a_loss_that_is_not_finite_fails_the_trial_once(lab, run_sweep) -> None:
    wild = ("data.mean=1e39", "model.batch_norm=false")  # more than a float32 can hold
    assert run_sweep(*wild, "study.trials=2").wait() == 1
    rows = open_study(lab).rows()
    assert [row.state for row in rows] == ["failed", "failed"]
    assert all("Diverged" in row.notes["reason"] for row in rows)
    assert all("learning rate" in row.notes["reason"] for row in rows)
    assert "no trial finished" in (lab / "log.txt").read_text()
    assert problems(lab, open_study(lab)) == []


@pytest.mark.long
def test_equal_configurations_are_trained_once(lab, run_sweep) -> None:
    space = ("model.hidden=choice(16,32)", "optim.learning_rate=0.01", "study.workers=1")
    assert (
        run_sweep(*space, "study.sampler=random", "study.trials=4", "study.pruner=none").wait() == 0
    )
    rows = open_study(lab, *space).rows()
    taken = [row for row in rows if "taken_from" in row.notes]
    assert len(rows) - len(taken) == len({str(row.values) for row in rows})
    for row in taken:
        assert row.value == rows[int(row.notes["taken_from"])].value
    assert_whole(lab, 4)


@pytest.mark.long
def test_a_grid_ends_when_it_is_complete_and_patience_when_nothing_improves(lab, run_sweep) -> None:
    grid = ("model.hidden=choice(16,32)", "optim.learning_rate=choice(0.01,0.02)")
    assert run_sweep(*grid, "study.sampler=grid", "study.trials=9", "study.pruner=none").wait() == 0
    rows = open_study(lab, *grid, "study.sampler=grid").rows()
    assert len({str(row.values) for row in rows}) == len(rows) == 4
    worse = ("study.name=patient", "study.patience=1", "study.workers=1", "study.trials=30")
    assert run_sweep(*worse, "study.pruner=none").wait() == 0
    values = [row.value for row in open_study(lab, "study.name=patient").rows()]
    assert values.index(max(values)) == len(values) - 2


@pytest.mark.long
def test_two_parents_of_one_study_do_not_run_together(lab, run_sweep) -> None:
    first = run_sweep("trainer.epochs=5000", "study.pruner=none")
    until(lambda: (lab / "optuna.db").exists() and "running" in states(lab))
    assert run_sweep().wait() == 2
    assert "it is running already" in first.log.read_text()
    os.kill(first.process.pid, signal.SIGINT)
    assert first.wait(60) == 130


@pytest.mark.long
def test_the_audit_finds_and_mends(lab, run_sweep, capsys) -> None:
    assert run_sweep("study.pruner=none").wait() == 0
    capsys.readouterr()
    assert inspect([], lab, repair=False, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"problems": [], "repaired": 0}
    tracking = tracking_of(lab)
    runs = {
        int(run.tags["digitlab.trial"]): run for run in tracking.find({"digitlab.kind": "trial"})
    }
    tracking.delete(runs[0].run_id)
    tracking.resume(runs[1].run_id).log({"val_accuracy": 0.123}, step=99)
    weights = lab / "artifacts" / runs[2].run_id / "artifacts" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with closing(sqlite3.connect(lab / "optuna.db")) as database:
        database.execute("update trials set state='RUNNING' where number=2")
        database.commit()
    assert inspect(["smoke"], lab, repair=False, as_json=True) == 1
    found = json.loads(capsys.readouterr().out)["problems"]
    trials = [(p["kind"], p["trial"]) for p in found]
    assert trials[:3] == [("no run", 0), ("value differs", 1), ("running", 2)]
    assert sorted(trials[3:]) == [("record differs", 1), ("record differs", 2)]
    assert inspect([], lab, repair=True, as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert [p["kind"] for p in told["problems"]] == ["value differs", *["record differs"] * 2]
    assert told["repaired"] == 2
    weights.unlink()
    assert inspect([], lab, repair=False, as_json=True) == 1
    kinds = [p["kind"] for p in json.loads(capsys.readouterr().out)["problems"]]
    assert sorted(kinds) == ["missing artifact", "record differs", "value differs"]


@pytest.mark.long
@pytest.mark.parametrize("store", ["optuna.db", "mlflow.db"])
def test_a_broken_database_is_named_and_left_alone(lab, run_sweep, store) -> None:
    assert run_sweep("study.trials=1", "study.pruner=none").wait() == 0
    aside = lab / "aside"
    aside.mkdir()
    for path in lab.glob(f"{store}*"):  # its journal is a part of it
        shutil.copy(path, aside)
        path.unlink()
    whole = (aside / store).read_bytes()
    (lab / store).write_bytes(b"no database" + whole[11:4096])
    broken = (lab / store).read_bytes()
    assert run_sweep("study.trials=2", "study.pruner=none").wait() == 2
    line = (lab / "log.txt").read_text().splitlines()[-1]
    assert store in line
    assert "cannot be used" in line
    assert (lab / store).read_bytes() == broken
    for path in lab.glob(f"{store}*"):
        path.unlink()
    for path in aside.iterdir():
        shutil.copy(path, lab)
    assert run_sweep("study.trials=2", "study.pruner=none").wait() == 0
    assert_whole(lab, 2)


def fill(path: Path) -> None:
    """A file as large as the disk lets it be."""
    try:
        with open(path, "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
    except OSError as error:
        assert error.errno == errno.ENOSPC  # noqa: PT017


@pytest.mark.long
def test_a_full_disk_stops_the_study_and_space_lets_it_go_on(lab, run_sweep, tmp_path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted: root is needed")
    try:
        shutil.copytree(lab, small, dirs_exist_ok=True)
        study = [*TINY, "study.trials=6", "study.pruner=none"]
        parent = Parent(small, study)
        until(lambda: (small / "optuna.db").exists() and "finished" in states(small))
        fill(small / "ballast")
        assert parent.wait() == 2
        (small / "ballast").unlink()
        assert 0 < sum(state == "finished" for state in states(small)) < 6
        assert Parent(small, study).wait() == 0
        assert_whole(small, 6)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_every_sampler_and_pruner_works_with_and_without_a_tracker(lab, run_sweep, sampler) -> None:
    pruner = {"tpe": "median", "gp": "hyperband"}[sampler]
    study = (f"study.sampler={sampler}", f"study.pruner={pruner}", "study.startup_trials=2")
    assert run_sweep(*study, "study.trials=4", "tracking=none").wait() == 0
    rows = open_study(lab).rows()
    assert len(rows) == 4
    assert all(row.state in ("finished", "pruned") for row in rows)
    assert not (lab / "mlflow.db").exists()
    assert "test accuracy" in (lab / "log.txt").read_text()
