"""One run outside a study: how it can end, and what its record then holds."""

import errno
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import DATA, CallIn, Parent
from samples import copy_digits

from digitlab.base import faults
from digitlab.base.errors import UserError
from digitlab.config.compose import compose
from digitlab.config.types import Config
from digitlab.data.datasets import TEST, TRAIN
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.reader import damage, recorded_config, recorded_environment, recorded_guesses
from digitlab.records.record import Identity, open_records
from digitlab.records.tracker import NoTracker, RunRow
from digitlab.study.run import Outcome, name_of, run_once, train

SMALL = ["experiments=smoke", "data=sample", "model.widths=[4]", "model.hidden=8"]
SMALL += ["data.batch_size=200", "trainer.epochs=2", "name=smoke-seed-0"]
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "x",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def once(lab: Path, *overrides: str) -> Outcome:
    config = compose("train", [*SMALL, *overrides])[0].config
    tags = {"digitlab.study": "s", "digitlab.trial": "4"}
    with open_records(config, lab) as records:
        return run_once(
            config, Identity("s-4", "trial", tags, None, (), {"cores": 2}), records, lab
        )


def run_of(lab: Path, name: str) -> RunRow:
    return MlflowTracker(None, "digitlab", lab).get(name)


def state_of(lab: Path, name: str = "smoke-seed-0") -> str:
    row = run_of(lab, name)
    assert row.is_ended
    return row.tags["digitlab.state"]


# ---- a run that finishes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    outcome: Outcome
    tracker: MlflowTracker
    row: RunRow
    config: Config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    lab = copy_digits(tmp_path_factory.mktemp("finished") / "lab")
    outcome = once(lab)
    tracker = MlflowTracker(None, "digitlab", lab)
    config = compose("train", SMALL)[0].config
    return Finished(outcome, tracker, tracker.get(str(outcome.run_id)), config)


def test_finished_run_has_a_whole_record_of_what_it_was_given(finished: Finished) -> None:
    outcome, row = finished.outcome, finished.row
    assert (outcome.state, outcome.reason) == ("finished", "")
    assert (row.name, row.status, row.tags["digitlab.state"]) == ("s-4", "FINISHED", "finished")
    assert row.tags["digitlab.trial"] == "4"
    assert damage(finished.tracker, row) == []
    assert recorded_config(finished.tracker, row) == finished.config
    environment = recorded_environment(finished.tracker, row)
    assert (environment["cores"], environment["numerics"]["device"]) == (2, "cpu")


def test_metrics_are_recorded_once_an_epoch_and_the_last_are_the_outcome(
    finished: Finished,
) -> None:
    history = finished.tracker.history(finished.row.run_id)
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        steps = [step for metric, step, _ in history if metric == name]
        assert steps == [1, 2]
        assert finished.outcome.metrics[name] == finished.row.metrics[name]
    assert [step for metric, step, _ in history if metric == "seconds"] == [2]
    assert finished.row.metrics["model_parameters"] > 0


def test_recorded_answers_give_the_recorded_accuracy(finished: Finished) -> None:
    guesses, labels = recorded_guesses(finished.tracker, finished.row)
    accuracy = float((guesses == labels).mean())
    assert accuracy == pytest.approx(finished.row.metrics["val_accuracy"])


def test_record_names_the_data_that_were_read(finished: Finished, lab: Path) -> None:
    def digests(files: Sequence[str]) -> dict[str, str]:
        return {name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in files}

    assert json.loads(finished.row.tags["digitlab.data_sha256"]) == digests(TRAIN)
    outcome = once(lab, "data.evaluate_on=test", "trainer.epochs=1")
    row = run_of(lab, "s-4")
    assert json.loads(row.tags["digitlab.data_sha256"]) == digests([*TRAIN, *TEST])
    assert row.metrics["test_accuracy"] == outcome.metrics["test_accuracy"]
    assert "val_accuracy" not in row.metrics


def test_run_without_tracking_gives_the_same_and_leaves_nothing(
    finished: Finished, lab: Path
) -> None:
    outcome = once(lab, "tracking=none")
    assert (outcome.state, outcome.run_id) == ("finished", None)
    for name in ("train_loss", "val_loss"):
        assert outcome.metrics[name] == finished.outcome.metrics[name]
    assert [path.name for path in lab.iterdir()] == ["data"]


@pytest.mark.slow
def test_an_allocation_of_slurm_does_not_keep_it_from_training(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert train(compose("train", [*SMALL, "tracking=none"])[0], lab).exit_status == 0


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "default"),
        (["experiments=seed"], "seed"),
        (["experiments=seed", "trainer.epochs=5"], "seed epochs=5"),
        (["experiments=smoke", "model.widths=[32, 64]", "tracking=none"], "smoke widths=32,64"),
        (["experiments=seed", "model=convnet", "trainer.epochs=1", "trainer.epochs=2"],
         "seed model=convnet epochs=2"),
        (["study.name=mine", "data.images=100"], "mine images=100"),
        (["experiments=seed", "trainer.epochs=5", "name=my own"], "my own"),
    ],
)  # fmt: skip
def test_name_says_what_was_changed_against_the_recipe(overrides: list[str], name: str) -> None:
    assert name_of(compose("train", overrides)[0], NoTracker()) == name


def test_name_leaves_out_the_folder_of_ones_own(tmp_path: Path) -> None:
    words = [f"--config-dir={tmp_path}", "experiments=seed", "trainer.epochs=5"]
    assert name_of(compose("train", words)[0], NoTracker()) == "seed epochs=5"


def test_name_that_is_taken_is_numbered() -> None:
    class Named(NoTracker):
        names: ClassVar = ["seed", "seed #2", "seed epochs=5", "seed #9", "seedling", "seed #x"]

        def find(self, tags: Mapping[str, str]) -> list[RunRow]:
            return [RunRow("id", name, "FINISHED", {}, {}, {}) for name in self.names]

    def named(*overrides: str) -> str:
        return name_of(compose("train", ["experiments=seed", *overrides])[0], Named())

    assert named() == "seed #10"
    assert named("trainer.epochs=5") == "seed epochs=5 #2"
    assert named("trainer.epochs=6") == "seed epochs=6"
    long = named(*(f"data.augment.{key}=0.123456789" for key in ("shift", "rotate", "shear")))
    assert len(long) <= 100


# ---- a run that ends before ----------------------------------------------------------------------


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], None]], None]:
    """Do something once, at a fault point."""

    def at(point: str, act: Callable[[], None]) -> None:
        calls: list[str] = []

        def hook(name: str) -> None:
            if name == point and not calls:
                calls.append(name)
                act()

        monkeypatch.setattr(faults, "hook", hook)

    return at


@pytest.fixture
def default_signals() -> Iterator[None]:
    """SIGHUP as a terminal's shell leaves it, whatever started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_between_two_batches_is_recorded_as_interrupted(
    lab: Path, at, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    at("job.batch", lambda: os.kill(os.getpid(), number))
    assert train(compose("train", SMALL)[0], lab).exit_status == 130
    assert state_of(lab) == "interrupted"
    assert "(smoke-seed-0) interrupted" in capsys.readouterr().out


@pytest.mark.usefixtures("default_signals")
def test_an_ignored_sighup_stays_ignored_and_the_run_goes_on(lab: Path, at) -> None:
    """As `nohup` asks for."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at("job.batch", lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert train(compose("train", SMALL)[0], lab).exit_status == 0
    assert state_of(lab) == "finished"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


ALWAYS = "trainer.checkpoint_minutes=1e-9"  # a checkpoint after each block


def test_a_run_that_was_stopped_is_gone_on_with_by_the_same_command(
    lab: Path, at, call_in: CallIn
) -> None:
    call = call_in(lab)
    at("job.batch", lambda: os.kill(os.getpid(), signal.SIGINT))
    status, out, _ = call("train", *SMALL, ALWAYS)
    assert status == 130
    assert "interrupted: it was stopped; the same command goes on from there" in out
    status, out, _ = call("train", *SMALL, ALWAYS)
    assert status == 0
    assert "goes on at step" in out
    assert out.count("epoch 1/2") == 1
    first, second = run_of(lab, "smoke-seed-0"), run_of(lab, "smoke-seed-0 #2")
    assert first.tags["digitlab.state"] == "interrupted"
    assert second.metrics["resumed_at_step"] >= 1
    assert not list((lab / "checkpoints").iterdir())
    # The same training from its beginning has the same weights.
    assert call("reproduce", "smoke-seed-0 #2")[0] == 0
    status, out, _ = call("train", *SMALL, ALWAYS, "name=unbroken")
    assert (status, "goes on" in out) == (0, False)
    weights = "digitlab.weights_sha256"
    assert run_of(lab, "unbroken").tags[weights] == second.tags[weights]
    assert call("audit")[0] == 0


def test_a_reproduction_begins_anew(lab: Path, at, call_in: CallIn) -> None:
    call = call_in(lab)
    assert call("train", *SMALL, ALWAYS)[0] == 0
    at("job.checkpoint", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert call("train", *SMALL, ALWAYS, "name=stopped")[0] == 130
    status, out, _ = call("reproduce", "smoke-seed-0")
    assert (status, "goes on" in out) == (0, False)


def test_run_that_diverges_has_failed_for_that_reason(lab: Path) -> None:
    wild = ["optim=sgd", "optim.schedule=constant", "optim.learning_rate=10"]
    wild += ["optim.weight_decay=1", "model.batch_norm=false"]
    outcome = once(lab, *wild)
    assert outcome.state == "failed"
    assert re.search(r"the loss is (nan|inf) in epoch \d at learning rate 10", outcome.reason)
    row = run_of(lab, "s-4")
    assert (row.status, row.tags["digitlab.reason"]) == ("FAILED", outcome.reason)


def test_error_in_training_is_the_reason_that_is_recorded(lab: Path, at) -> None:
    def fail() -> None:
        raise ZeroDivisionError("x" * 9000)

    at("job.started", fail)
    outcome = once(lab)
    assert (outcome.state, outcome.reason[:20]) == ("failed", "ZeroDivisionError: x")
    assert len(run_of(lab, "s-4").tags["digitlab.reason"]) == 5000  # MLflow takes 8,000 at most


def test_data_that_are_missing_or_too_few_are_refused_before_anything_is_recorded(
    lab: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="train-images-idx3-ubyte is missing"):
        once(tmp_path)
    with pytest.raises(UserError, match=r"data\.validation_images=2000 is invalid"):
        once(lab, "data.validation_images=2000")
    for folder in (tmp_path, lab):
        assert MlflowTracker(None, "digitlab", folder).find({}) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds CUDA")
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_recorded(
    lab: Path, call_in: CallIn, command: str
) -> None:
    status, _, err = call_in(lab)(command, *SMALL[:-1], "trainer.device=cuda")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("digitlab: trainer.device=cuda is invalid: it must be a device that")
    assert MlflowTracker(None, "digitlab", lab).find({}) == []


@pytest.mark.slow
def test_full_disk_ends_a_run_in_one_line_and_the_next_ends_its_record(
    lab: Path, call_in: CallIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    appended = []

    def fill(name: str) -> None:
        appended.extend([name] if name == "outbox.appended" else [])
        if len(appended) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    call = call_in(lab)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "hook", fill)
        status, _, err = call("train", *SMALL, "trainer.epochs=1")
    assert status == 2
    assert re.fullmatch(r"digitlab: .*No space left on device.*\n", err)
    assert call("audit", "--repair")[0] == 0
    assert state_of(lab) == "interrupted"


@pytest.mark.slow
def test_a_run_that_stopped_early_is_recorded_with_its_best_epoch(
    lab: Path, call_in: CallIn
) -> None:
    words = ["optim.schedule=constant", "optim.learning_rate=0.05", "trainer.epochs=40"]
    words += ["trainer.early_stopping=1", "name=s"]
    call = call_in(lab)
    status, out, _ = call("train", *SMALL[:-2], *words)
    run = run_of(lab, "s")
    best = int(run.metrics["best_epoch"])
    assert status == 0
    assert f"(epoch {best}, the best of {best + 1})" in out
    assert "stopped early: no better epoch in 1 (trainer.early_stopping)" in out
    history = MlflowTracker(None, "digitlab", lab).history(run.run_id)
    curve = [value for name, step, value in history if (name, step <= 40) == ("val_accuracy", True)]
    assert run.metrics["val_accuracy"] == max(curve)
    assert call("audit")[0] == 0
    assert call("reproduce", "s")[0] == 0


@pytest.mark.parametrize(
    ("command", "word"), [("sweep", "study.name=s"), ("train", "data.evaluate_on=test")]
)
def test_early_stopping_is_refused_where_nothing_validates_the_fit(
    lab: Path, call_in: CallIn, command: str, word: str
) -> None:
    words = [*SMALL[:-1], "trainer.early_stopping=2", word]
    status, _, err = call_in(lab)(command, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("digitlab: trainer.early_stopping=2 ")
    assert MlflowTracker(None, "digitlab", lab).find({}) == []


# ---- a run that is killed ------------------------------------------------------------------------


def killed_at(lab: Path, point: str) -> None:
    """A training whose process kills itself at a fault point."""
    (lab / "faults.json").write_text(json.dumps({"kill_at": {"point": point}}))
    assert Parent(lab, [*SMALL, "trainer.epochs=5000"], "train").wait() == -signal.SIGKILL


# Before the tracker has the run, and after.
@pytest.mark.slow
@pytest.mark.parametrize("point", ["job.batch", "outbox.acknowledged"])
def test_killed_run_is_ended_as_interrupted_by_the_next_train(
    lab: Path, call_in: CallIn, point: str
) -> None:
    killed_at(lab, point)
    status, out, _ = call_in(lab)(
        "train", *SMALL, "name=smoke-seed-1", "trainer.seed=1", "trainer.epochs=1"
    )
    assert status == 0
    assert "Run smoke-seed-0 was left unfinished by a process that has ended" in out
    assert state_of(lab) == "interrupted"
    assert state_of(lab, "smoke-seed-1") == "finished"


@pytest.mark.slow
def test_killed_run_is_found_by_an_audit_and_ended_by_its_repair(
    lab: Path, call_in: CallIn
) -> None:
    killed_at(lab, "outbox.acknowledged")
    assert run_of(lab, "smoke-seed-0").status == "RUNNING"
    call = call_in(lab)
    status, out, _ = call("audit")
    assert (status, out.count("pending: ")) == (1, 1)
    assert run_of(lab, "smoke-seed-0").status == "RUNNING"
    status, out, _ = call("audit", "--repair", "--json")
    assert (status, json.loads(out)) == (0, {"problems": [], "repaired": 1})
    assert state_of(lab) == "interrupted"
    assert call("audit")[0] == 0
