"""What an audit finds, what it repairs, and what it leaves alone."""

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import Call, CallIn
from plain import PlainTracker
from samples import studies
from studies import problems_of, rows_of, runs_of

from digitlab.base.errors import counted
from digitlab.config.compose import compose
from digitlab.config.recorded import config_to_plain, result_settings, with_values
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.tracker import NewRun, NoTracker, RunRow
from digitlab.results import audit
from digitlab.results.audit import find_problems
from digitlab.results.missing import missing_runs
from digitlab.study.goal import TrialRow
from digitlab.study.storage import leader_lock, open_storage

SMOKE = compose("sweep", ["experiments=smoke"])[0].config
OPTIONS = {"model": {"convnet": config_to_plain(SMOKE)["model"]}}
CONFIG = replace(SMOKE, study=replace(SMOKE.study, options=OPTIONS))
VALUES = {"model": "convnet", "model.hidden": 32, "optim.learning_rate": 0.01}
STATUS = {"finished": "FINISHED", "failed": "FAILED", "running": "RUNNING"}


def trial(state: str = "finished", number: int = 0, value: float | None = 0.5, attempt: int = 1):
    return TrialRow(number, state, value, VALUES, {"attempt": attempt})


def run(
    run_id: str = "a",
    state: str = "finished",
    number: int = 0,
    attempt: int = 1,
    value: float = 0.5,
    kind: str = "trial",
    **params: Any,
) -> RunRow:
    tags = {"digitlab.kind": kind, "digitlab.state": state}
    tags |= {"digitlab.trial": str(number), "digitlab.attempt": str(attempt)}
    trained = result_settings(with_values(CONFIG, VALUES))
    own = {key: str(params.get(key.rpartition(".")[2], found)) for key, found in trained.items()}
    metrics = {"training_flops": 1e9, "val_accuracy": value, "rung_accuracy": value}
    return RunRow(run_id, f"smoke-{number}", STATUS.get(state, "KILLED"), tags, own, metrics)


def found(rows: list[TrialRow], runs: list[RunRow]) -> list[tuple[str, int | None, str | None]]:
    return [(p.kind, p.trial, p.run_id) for p in find_problems(CONFIG, rows, runs)]


# ---- finding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["finished", "pruned", "failed"])
def test_trial_and_run_that_agree_are_no_problem(state: str) -> None:
    value = None if state == "failed" else 0.5
    assert find_problems(CONFIG, [trial(state, value=value)], [run(state=state)]) == []


@pytest.mark.parametrize("earlier", ["interrupted", "failed"])
def test_an_earlier_attempt_beside_the_sealed_one_is_no_problem(earlier: str) -> None:
    runs = [run("a", earlier, attempt=1), run("b", attempt=2)]
    assert find_problems(CONFIG, [trial(attempt=2)], runs) == []


def test_a_sealed_run_of_an_earlier_attempt_counts_where_its_trial_has_its_value() -> None:
    """The driver was killed after the seal, and took the result over when it came back."""
    runs = [run("a"), run("b", "interrupted", attempt=2)]
    assert find_problems(CONFIG, [trial(attempt=1)], runs) == []


def test_a_waiting_trial_needs_no_run() -> None:
    assert find_problems(CONFIG, [trial("waiting", value=None)], []) == []
    assert (
        find_problems(CONFIG, [trial("waiting", value=None, attempt=2)], [run(state="failed")])
        == []
    )


def test_a_trial_left_running_is_found() -> None:
    assert found([trial("running", value=None)], [run(state="running")]) == [("running", 0, None)]


@pytest.mark.parametrize("kind", ["study", "confirm", "final", "champion"])
def test_a_run_left_running_is_found_whatever_its_kind(kind: str) -> None:
    assert found([], [run(state="running", kind=kind)]) == [("running", None, "a")]


def test_a_run_left_running_beside_the_sealed_one_is_found() -> None:
    runs = [run("a", "running", attempt=1), run("b", attempt=2)]
    assert found([trial(attempt=2)], runs) == [("running", 0, "a")]


def test_a_trial_without_a_run_is_found() -> None:
    assert found([trial()], []) == [("no run", 0, None)]
    earlier = run(state="interrupted", attempt=1)
    assert found([trial(attempt=2)], [earlier]) == [("no run", 0, None)]


def test_of_two_results_the_one_that_agrees_counts() -> None:
    for runs in ([run("a"), run("b", value=0.6)], [run("b", value=0.6), run("a")]):
        assert found([trial()], runs) == [("several runs", 0, "b")]


def test_a_run_of_a_trial_that_is_not_in_the_study_is_named_and_never_deleted() -> None:
    """The study may be an older copy: a repair would delete what came later."""
    assert found([trial()], [run("a"), run("b", number=7)]) == [("no trial", 7, "b")]
    assert "no trial" not in audit.REPAIRABLE


@pytest.mark.parametrize(
    ("row", "other", "kinds"),
    [
        (trial("failed", value=None), run(), ["state differs"]),
        (trial(), run(hidden=33), ["parameter differs"]),
        (trial(), run(dropout=0.5), ["parameter differs"]),  # of the option, and not searched
        (trial(value=0.75), run(), ["value differs"]),
        (replace(trial(), objectives=[0.75]), run(), ["value differs"]),  # what Optuna has
        (trial("pruned", value=0.75), run(state="pruned"), ["value differs"]),
        (trial(value=0.75), run(hidden=33, learning_rate=1), 2 * ["parameter differs"]),
    ],
)
def test_what_a_trial_and_its_run_disagree_in_is_named(
    row: TrialRow, other: RunRow, kinds: list[str]
) -> None:
    problems = find_problems(CONFIG, [row], [other])
    assert [problem.kind for problem in problems][: len(kinds)] == kinds
    assert {(problem.trial, problem.run_id) for problem in problems} == {(0, "a")}


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return studies(tmp_path_factory)


@pytest.fixture
def lab(original: Path, tmp_path: Path) -> Path:
    """A copy of a lab with two studies: `smoke` is whole, `stopped` has a trial left running."""
    return shutil.copytree(original, tmp_path / "lab")


@pytest.fixture
def call(lab: Path, call_in: CallIn) -> Call:
    return call_in(lab)


def surplus(lab: Path) -> str:
    """Add a second result of trial 0 of `smoke`; return its run's id."""
    first = runs_of(lab, kind="trial", trial="0")[0]
    tracker = MlflowTracker(None, "digitlab", lab)
    kept = {k: v for k, v in first.tags.items() if k.startswith("digitlab.")}
    del kept["digitlab.record"]
    kept.pop("digitlab.weights_sha256", None)  # it has no files
    run_id = tracker.create_run(NewRun("surplus", kept, {}))
    tracker.end_run(run_id, first.tags["digitlab.state"], 0)
    return run_id


def test_whole_study_has_no_problem(call: Call) -> None:
    for names in (["smoke"], ["smoke", "smoke"]):
        assert call("audit", *names) == (0, "1 study, 0 problems\n", "")
    status, out, err = call("audit", "smoke", "--json")
    assert (status, json.loads(out), err) == (0, {"problems": [], "repaired": 0}, "")


def test_surplus_run_is_listed_and_only_then_deleted_and_nothing_else(
    lab: Path, call: Call
) -> None:
    whole = {row.run_id for row in runs_of(lab)}
    run_id = surplus(lab)
    status, out, _ = call("audit", "smoke", "--json")
    [problem] = json.loads(out)["problems"]
    assert (status, problem["kind"], problem["run_id"]) == (1, "several runs", run_id)
    assert {row.run_id for row in runs_of(lab)} == whole | {run_id}  # listed, not touched
    status, out, _ = call("audit", "smoke", "--repair")
    assert status == 0
    assert out.startswith("several runs: trial 0 has run ")
    assert {row.run_id for row in runs_of(lab)} == whole
    assert problems_of(lab) == []


def test_trial_left_running_is_requeued_and_its_run_interrupted(lab: Path, call: Call) -> None:
    before = rows_of(lab, "stopped")
    assert [row.state for row in before] == ["finished", "running"]
    status, out, _ = call("audit", "stopped")
    assert status == 1
    assert "running: trial 1 is marked as running, and nothing runs it" in out
    assert rows_of(lab, "stopped") == before
    status, out, _ = call("audit", "stopped", "--repair", "--json")
    document = json.loads(out)
    assert document["repaired"] >= 1
    after = rows_of(lab, "stopped")
    assert [row.state for row in after] == ["finished", "waiting"]
    assert (after[1].values, after[1].notes["charged"]) == (before[1].values, 0)
    assert all(row.is_ended for row in runs_of(lab, "stopped"))


def test_what_cannot_be_repaired_is_left_and_said(lab: Path, call: Call) -> None:
    finished = next(row for row in rows_of(lab) if row.state == "finished")
    row = runs_of(lab, kind="trial", trial=str(finished.number))[0]
    path = lab / "artifacts" / row.run_id / "artifacts" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    status, out, _ = call("audit", "smoke", "--repair", "--json")
    [problem] = json.loads(out)["problems"]
    assert (status, problem["kind"], problem["trial"]) == (1, "record differs", finished.number)
    assert "weights.safetensors" in problem["detail"]
    assert json.loads(out)["repaired"] == 0


def test_runs_that_are_noted_and_were_deleted_are_named(lab: Path, call: Call) -> None:
    tracker = MlflowTracker(None, "digitlab", lab)
    kinds = ("confirm", "final", "champion")
    trial = runs_of(lab, kind="trial")[0]
    tracker.delete(trial.run_id)
    _, _, err = call("export", "smoke", str(lab.parent / "smoke.zip"))
    assert f"runs restore --run-id {trial.run_id}`" in err
    tracker.restore(trial.run_id)
    gone = [runs_of(lab, kind=kind, state="finished")[-1] for kind in kinds]
    for run in gone:
        tracker.delete(run.run_id)
    status, out, _ = call("audit", "smoke", "--json")
    problems = json.loads(out)["problems"]
    assert (status, {problem["kind"] for problem in problems}) == (1, {"no run"})
    assert [problem["run_id"] for problem in problems] == [run.run_id for run in gone]
    for problem, run in zip(problems, gone, strict=True):
        assert problem["trial"] == int(run.tags["digitlab.trial"])
        assert f"`{tracker.command} runs restore --run-id {run.run_id}`" in problem["detail"]
    target = lab.parent / "smoke.zip"
    status, out, err = call("export", "smoke", str(target))
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert f"runs restore --run-id {gone[0].run_id}`" in err
    assert not target.exists()
    for run in gone:
        tracker.restore(run.run_id)
    assert call("audit", "smoke") == (0, "1 study, 0 problems\n", "")


def test_nothing_is_missing_of_a_study_that_records_nothing(tmp_path: Path) -> None:
    notes = {"final": {"0/1": {"test_accuracy": 0.5}, "0/2": {"failed": "x"}}}
    assert missing_runs(notes, "1", NoTracker(), []) == []
    [one] = missing_runs(notes, "1", PlainTracker(tmp_path), [])
    assert (one.trial, one.run_id) == (0, None)


def test_an_export_says_which_runs_are_gone_for_good(lab: Path, call: Call) -> None:
    champion = runs_of(lab, kind="champion")[0]
    with closing(sqlite3.connect(lab / "mlflow.db")) as database, database:  # as `mlflow gc`
        for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", [champion.run_id])
    status, out, err = call("export", "smoke", str(lab.parent / "smoke.zip"))
    assert (status, err) == (0, "")
    lacking = "the run of the champion is not in the tracker, and cannot be restored there"
    assert f"the export lacks a run: {lacking}" in out
    status, out, _ = call("audit", "smoke")
    assert (status, out.splitlines()[0]) == (1, f"no run: {lacking}")


@pytest.mark.parametrize("more", [[], ["--repair"]])
def test_audit_is_refused_while_a_driver_leads_the_study(
    lab: Path, call: Call, more: list[str]
) -> None:
    run_id = surplus(lab)
    with leader_lock(open_storage(lab), lab, "smoke"):
        status, out, err = call("audit", "smoke", *more)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "study.name=smoke is in use" in err
    assert run_id in {row.run_id for row in runs_of(lab)}


def test_study_of_another_program_is_skipped_by_name(lab: Path, call: Call) -> None:
    study = optuna.create_study(storage=open_storage(lab), study_name="someone else's")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    status, out, err = call("audit", "smoke", "someone else's")
    assert (status, err) == (0, "")
    assert "skipped: \"someone else's\" is no study of digitlab's" in out
    assert "0 problems" in out
    status, out, _ = call("audit", "someone else's", "--json")
    assert (status, json.loads(out)["problems"]) == (0, [])


def rename(lab: Path, old: str, new: str, **notes: object) -> None:
    """Give a study another name, and notes in another's place, behind Optuna's back."""
    with closing(sqlite3.connect(lab / "optuna.db")) as database, database:
        for key, value in notes.items():
            database.execute(
                "UPDATE study_user_attributes SET value_json=? WHERE key=? AND study_id="
                "(SELECT study_id FROM studies WHERE study_name=?)",
                [json.dumps(value), key, old],
            )
        database.execute("UPDATE studies SET study_name=? WHERE study_name=?", [new, old])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("team/vision", {}),
        ("../../outside", {}),
        ("/tmp/outside", {"config": "study: [", "study_id": 3}),
        ("a\nb\x1b[31m", {"config": None}),
    ],
)
def test_study_with_any_name_or_notes_is_named_and_touches_no_file_outside(
    lab: Path, call: Call, name: str, notes: dict[str, object]
) -> None:
    rename(lab, "stopped", name, **notes)
    before = {path for path in lab.parent.rglob("*") if lab not in path.parents}
    status, out, err = call("audit")
    assert (status, err) == (1, "")
    [line] = [line for line in out.splitlines() if line.startswith("unreadable: ")]
    assert repr(name) in line
    # The other one was audited. With another study_id the runs are of a study that is not there.
    left = counted(1 + ("study_id" in notes), "problem")
    assert f"2 studies, {left}" in out
    for command in (("report", name), ("reproduce", "--study", name)):
        status, out, err = call(*command)
        assert (status, out, err.count("digitlab: ")) == (2, "", 1)
    assert {path for path in lab.parent.rglob("*") if lab not in path.parents} == before
    assert not Path("/tmp/outside.leader").exists()
    assert {path.parent for path in lab.rglob("*.leader")} == {lab / "locks"}


def test_a_deleted_study_is_refused_with_the_command_that_restores_it(call: Call) -> None:
    assert call("delete", "smoke", "--yes")[0] == 0
    for command in ("audit", "show", "best"):
        status, out, err = call(command, "smoke")
        assert (status, out, err.count("\n")) == (2, "", 1), command
        assert "study smoke was deleted" in err
        assert "`digitlab restore smoke`" in err


def test_unknown_study_is_one_line(call: Call) -> None:
    status, out, err = call("audit", "smoek")
    assert (status, out) == (2, "")
    assert err == "digitlab: study smoek does not exist: did you mean smoke?\n"
