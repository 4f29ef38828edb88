"""Studies from beginning to end, as a person runs them, on the smallest of everything."""

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, Parent, until
from studies import assert_whole, problems_of, results_of, rows_of, runs_of, states_of

from digitlab.base.console import Board
from digitlab.config.compose import compose
from digitlab.study import driver
from digitlab.study.trials import load_study


def is_published(lab: Path, *overrides: str) -> bool:
    return driver.is_published(compose("sweep", [*TINY, *overrides])[0].config, lab)


def test_a_study_ends_with_its_total_says_so_and_can_be_extended(lab, run_sweep) -> None:
    study = ("study.confirm=2", "study.final_seeds=2")
    assert not is_published(lab, *study)
    assert not (lab / "optuna.db").exists()
    parent = run_sweep(*study, published=True)
    assert parent.wait() == 0
    assert_whole(lab, 3)
    log = parent.log.read_text()
    assert "champion: trial" in log
    assert "digitlab reproduce " in log
    before = results_of(lab)
    earlier = runs_of(lab, kind="champion")[0]

    assert is_published(lab, *study)
    assert not is_published(lab, *study, "study.trials=4")
    assert not is_published(lab, *study, "study.margin=0.01")
    assert not is_published(lab, *study, "study.final_seeds=3")
    assert is_published(lab, *study, "study.trials=2", "study.final_seeds=1")  # which it keeps
    assert not is_published(lab, *study, "study.name=other")
    assert run_sweep(*study, published=True).wait() == 0
    assert "study smoke is complete: 3 trials" in parent.log.read_text()

    assert run_sweep(*study, "study.trials=5").wait() == 0
    assert_whole(lab, 5)
    assert results_of(lab)[:3] == before
    # The earlier champion stays, so that what was printed for it still works.
    assert [run.run_id for run in runs_of(lab, kind="champion")] == [earlier.run_id]


@pytest.mark.slow
def test_the_test_set_is_read_by_final_fits_alone_once_each(lab, run_sweep) -> None:
    parent = run_sweep("study.confirm=2", "study.final_seeds=2", "study.audit_pruning=1")
    assert parent.wait() == 0
    opened = (lab / "opened").read_text().splitlines()
    files = ["worker t10k-images-idx3-ubyte", "worker t10k-labels-idx1-ubyte"]
    assert sorted(line for line in opened if line.startswith("worker")) == sorted(2 * files)


@pytest.mark.slow
def test_the_smallest_network_that_is_accurate_enough_is_found(lab, run_sweep) -> None:
    goal = ("study.objectives=[model_parameters]", "study.require.val_accuracy=0.05")
    goal += ("study.confirm_fits=9",)
    parent = run_sweep(*goal, "study.confirm=2", "study.pruner=none", published=True)
    assert parent.wait() == 0
    assert_whole(lab, 3)
    rows = rows_of(lab)
    size = {row.number: row.notes["metrics"]["model_parameters"] for row in rows}
    champion = load_study(lab, "smoke")[0].notes()["champion"]
    assert size[champion["trial"]] == min(size.values())
    log = parent.log.read_text()
    assert "it is the smallest that is at least 5 % accurate, as shown" in log
    assert f"on new seeds, {min(size.values()):,.0f} parameters" in log


@pytest.mark.slow
def test_two_objectives_give_a_front_whose_points_are_confirmed(lab, run_sweep) -> None:
    goal = ("study.objectives=[val_accuracy,model_parameters]", "study.confirm=3")
    parent = run_sweep(*goal, "study.pruner=none", published=True)
    assert parent.wait() == 0
    assert_whole(lab, 3)
    store, _ = load_study(lab, "smoke")
    champion = store.notes()["champion"]
    assert champion["front"] == [row.number for row in store.goal.front(store.rows())]
    assert champion["trial"] in champion["front"]
    assert set(champion["val_accuracy"]) == {str(number) for number in champion["front"]}
    assert "Pareto front: trials" in parent.log.read_text()


@pytest.mark.slow
def test_every_run_of_a_study_is_recorded_whole(lab, run_sweep) -> None:
    assert run_sweep("study.confirm=2", "study.pruner=none", published=True).wait() == 0
    kinds = {"study": 1, "trial": 3, "confirm": 3, "final": 1, "champion": 1}
    for kind, count in kinds.items():
        runs = runs_of(lab, kind=kind)
        assert len(runs) == count, kind
        assert {run.status for run in runs} == {"FINISHED"}
    champion, final = runs_of(lab, kind="champion")[0], runs_of(lab, kind="final")[0]
    assert champion.tags["digitlab.weights_sha256"] == final.tags["digitlab.weights_sha256"]
    assert champion.metrics["test_accuracy_mean"] == final.metrics["test_accuracy"]
    assert champion.metrics["test_seeds"] == 1
    for row in rows_of(lab):
        run = runs_of(lab, kind="trial", trial=str(row.number))[0]
        assert run.metrics["val_accuracy"] == row.value
        assert {k: run.params[k] for k in row.values} == {k: str(v) for k, v in row.values.items()}


@pytest.mark.slow
def test_a_study_without_a_tracker_leaves_no_records(lab, run_sweep) -> None:
    plain = ("tracking=none", "study.pruner=none")
    assert run_sweep(*plain, "study.trials=1").wait() == 0
    assert run_sweep(*plain, "study.trials=2").wait() == 0
    assert not (lab / "mlflow.db").exists()
    assert not (lab / "outbox").exists()
    assert states_of(lab) == ["finished", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_study_that_can_go_on_and_charges_nothing(lab, run_sweep, number) -> None:
    parent = run_sweep(
        "study.trials=2", "trainer.epochs=5000", "study.pruner=none", "study.retries=0"
    )
    until(lambda: "running" in states_of(lab), parent)
    os.kill(parent.process.pid, number)
    assert parent.wait(60) == 130
    assert set(states_of(lab)) == {"waiting"}
    assert [row.notes["charged"] for row in rows_of(lab)] == [0] * len(rows_of(lab))
    assert problems_of(lab) == []
    assert {run.tags["digitlab.state"] for run in runs_of(lab)} == {"interrupted"}
    if number != signal.SIGHUP:  # whose terminal is gone
        assert "go on with: digitlab sweep experiments=smoke" in parent.log.read_text()


@pytest.mark.slow
def test_ctrl_c_in_a_fit_without_retries_ends_with_130_and_the_study_goes_on(
    lab, run_sweep
) -> None:
    orders = {"hang": {"point": "job.batch", "jobs": [2]}}  # the first is the trial's
    (lab / "faults.json").write_text(json.dumps(orders))
    study = ("study.trials=1", "study.pruner=none", "study.retries=0", "study.workers=1")
    parent = run_sweep(*study)
    until(lambda: any(r.tags["digitlab.kind"] == "final" for r in runs_of(lab)), parent)
    os.kill(parent.process.pid, signal.SIGINT)
    assert parent.wait(60) == 130
    (lab / "faults.json").unlink()
    assert run_sweep(*study).wait() == 0
    assert_whole(lab, 1)


@pytest.mark.slow
def test_a_trial_whose_worker_died_goes_on_from_its_checkpoint(lab, run_sweep) -> None:
    study = ["study.trials=2", "study.workers=1", "trainer.checkpoint_minutes=1e-9"]
    orders = {"die": {"point": "job.checkpoint", "jobs": [1, 4]}}  # trial 0, and a final fit
    (lab / "faults.json").write_text(json.dumps(orders))
    assert run_sweep(*study, "study.pruner=none", "study.measure_seeds=0").wait() == 0
    assert_whole(lab, 2)
    finished = [run for run in runs_of(lab) if run.tags["digitlab.state"] == "finished"]
    resumed = [run for run in finished if "resumed_at_step" in run.metrics]
    assert [run.tags["digitlab.kind"] for run in resumed] == ["trial", "final"]
    assert rows_of(lab)[0].attempt == 2
    assert not list((lab / "checkpoints").iterdir())
    values = [row.value for row in rows_of(lab)]
    (lab / "faults.json").unlink()
    again = [*study, "study.pruner=none", "study.measure_seeds=0", "study.name=undisturbed"]
    assert run_sweep(*again).wait() == 0
    assert [row.value for row in rows_of(lab, "undisturbed")] == values
    [disturbed] = [run for run in resumed if run.tags["digitlab.kind"] == "final"]
    [final] = runs_of(lab, "undisturbed", kind="final")
    assert disturbed.metrics["test_accuracy"] == final.metrics["test_accuracy"]


@pytest.mark.slow
def test_a_second_driver_of_one_study_is_refused(lab, run_sweep) -> None:
    first = run_sweep("trainer.epochs=5000", "study.pruner=none")
    until(lambda: "running" in states_of(lab), first)
    assert run_sweep().wait() == 2
    assert "study.name=smoke is in use" in first.log.read_text()
    os.kill(first.process.pid, signal.SIGINT)
    assert first.wait(60) == 130


_JOBS = {"raise": [1, 2], "hang": [3]}  # both attempts of trial 0, and trial 1


@pytest.mark.long
def test_trials_that_raise_hang_or_die_do_not_end_the_study(lab, run_sweep) -> None:
    orders = {what: {"point": "job.batch", "jobs": jobs} for what, jobs in _JOBS.items()}
    (lab / "faults.json").write_text(json.dumps(orders))
    study = ("study.trials=4", "study.retries=1", "study.trial_minutes=0.1", "study.workers=1")
    parent = run_sweep(*study)
    assert parent.wait() == 0
    rows = rows_of(lab)
    assert [row.state for row in rows[:2]] == ["failed", "failed"]
    assert "raised at job.batch" in rows[0].notes["reason"]
    assert (rows[0].notes["charged"], rows[0].attempt) == (1, 2)
    assert "study.trial_minutes" in rows[1].notes["reason"]
    assert rows[1].attempt == 1  # another attempt would take as long
    assert_whole(lab, 4)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_the_trial_once(lab, run_sweep) -> None:
    wild = ("data.mean=1e39", "model.batch_norm=false")  # more than a float32 can hold
    parent = run_sweep(*wild, "study.trials=2")
    assert parent.wait() == 1
    rows = rows_of(lab)
    assert [(row.state, row.attempt) for row in rows] == [("failed", 1), ("failed", 1)]
    assert all("learning rate" in row.notes["reason"] for row in rows)
    assert "no trial finished" in parent.log.read_text()
    assert problems_of(lab) == []


@pytest.mark.long
def test_equal_configurations_are_trained_once(lab, run_sweep) -> None:
    space = ("model.hidden=choice(16,32)", "optim.learning_rate=0.01", "study.workers=1")
    study = ("study.sampler=random", "study.trials=4", "study.pruner=none")
    assert run_sweep(*space, *study).wait() == 0
    rows = rows_of(lab)
    taken = [row for row in rows if "taken_from" in row.notes]
    assert len(rows) - len(taken) == len({str(row.values) for row in rows})
    for row in taken:
        assert row.value == rows[int(row.notes["taken_from"])].value
    assert_whole(lab, 4)


@pytest.mark.long
def test_a_grid_ends_when_it_is_complete_and_patience_when_nothing_improves(lab, run_sweep) -> None:
    grid = ("model.hidden=choice(16,32)", "optim.learning_rate=choice(0.01,0.02)")
    assert run_sweep(*grid, "study.sampler=grid", "study.trials=9", "study.pruner=none").wait() == 0
    rows = rows_of(lab)
    assert len({str(row.values) for row in rows}) == len(rows) == 4
    patient = ("study.name=patient", "study.patience=1", "study.workers=1", "study.trials=30")
    assert run_sweep(*patient, "study.pruner=none").wait() == 0
    values = [row.value for row in rows_of(lab, "patient")]
    assert values.index(max(values)) == len(values) - 2


@pytest.mark.slow
@pytest.mark.parametrize("store", ["optuna.db", pytest.param("mlflow.db", marks=pytest.mark.long)])
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
    parent = run_sweep("study.trials=2", "study.pruner=none")
    assert parent.wait() == 2
    line = parent.log.read_text().splitlines()[-1]
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
def test_a_full_disk_stops_the_study_and_space_lets_it_go_on(lab, tmp_path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted: root is needed")
    try:
        shutil.copytree(lab, small, dirs_exist_ok=True)
        study = [*TINY, "study.trials=6", "study.pruner=none"]
        parent = Parent(small, study)
        until(lambda: "finished" in states_of(small), parent)
        fill(small / "ballast")
        assert parent.wait() == 2
        (small / "ballast").unlink()
        assert 0 < sum(state == "finished" for state in states_of(small)) < 6
        assert Parent(small, study).wait() == 0
        assert_whole(small, 6)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_every_sampler_and_pruner_works_with_and_without_a_tracker(lab, run_sweep, sampler) -> None:
    pruner = {"tpe": "median", "gp": "hyperband"}[sampler]
    study = (f"study.sampler={sampler}", f"study.pruner={pruner}", "study.startup_trials=2")
    parent = run_sweep(*study, "study.trials=4", "tracking=none")
    assert parent.wait() == 0
    rows = rows_of(lab)
    assert len(rows) == 4
    assert all(row.state in ("finished", "pruned") for row in rows)
    assert "test accuracy" in parent.log.read_text()


@pytest.mark.slow
def test_a_promoted_trial_passes_the_rung_of_its_screening_with_the_same_accuracy(
    lab, run_sweep
) -> None:
    study = ("study.pruner=screening", "study.rungs=[0.3]", "study.trials=5", "study.finish=2")
    assert run_sweep(*study, "study.workers=1").wait() == 0
    rows = rows_of(lab)
    assert [row.state for row in rows] == ["finished", *["pruned"] * 2, *["finished"] * 2]
    for row in rows[3:]:
        screened = rows[row.notes["promoted_from"]]
        assert row.notes["metrics"]["rung_accuracy"] == screened.value
    assert_whole(lab, 5)


@pytest.mark.long
def test_a_trial_left_running_in_optuna_is_settled_from_its_sealed_run(lab, run_sweep) -> None:
    assert run_sweep("study.pruner=none").wait() == 0
    before = results_of(lab)
    with closing(sqlite3.connect(lab / "optuna.db")) as database:
        database.execute("update trials set state='RUNNING' where number=2")
        database.commit()
    assert run_sweep("study.pruner=none").wait() == 0
    assert results_of(lab) == before
    assert_whole(lab, 3)


def test_a_quota_of_one_core_gives_one_worker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "usable_cores", lambda: 1)
    config = compose("sweep", [*TINY, "study.trials=6"])[0].config
    assert driver._count_workers(config, Board()) == 1
    config = replace(config, study=replace(config.study, workers=3))
    assert driver._count_workers(config, Board()) == 3
    assert "asks for more threads than the 1 cores" in capsys.readouterr().out
