"""One run: how it can end, and what its record then holds."""

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError
from digitlab.config.compose import compose
from digitlab.config.recorded import config_from_yaml, config_to_plain, flat
from digitlab.config.types import Config
from digitlab.networks.table import build_network
from digitlab.records.mlflow import Start, Tracking
from digitlab.records.record import Identity, stage
from digitlab.study import run
from digitlab.study.run import Broken, Ended, Outcome, Spoken, perform
from digitlab.training.fit import Watch
from digitlab.training.module import Diverged
from digitlab.training.pictures import draw_confusions

DATA = Path(__file__).parents[1] / "support" / "digits"
SMALL = ["experiments=smoke", "data=sample", "model.widths=[4]", "model.hidden=8"]
SMALL += ["data.batch_size=200", "trainer.epochs=3"]
ENVIRONMENT = {"commit": "c0ffee", "libraries": {"torch": "1"}, "cores": 2}
PNG = b"\x89PNG\r\n\x1a\n"


@cache
def configure(*overrides: str) -> Config:
    return compose("train", [*SMALL, *overrides])[0].config


class Notebook:
    """A tracker of one run that notes down every call."""

    run_id = "0123456789"

    def __init__(self) -> None:
        self.begun: list[Start] = []
        self.logged: list[tuple[dict[str, float], int, dict[str, str]]] = []
        self.files: dict[str, bytes] = {}
        self.ends: list[str] = []

    def start(self, start: Start) -> "Notebook":
        self.begun.append(start)
        return self

    def log(
        self,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        assert not self.ends
        self.logged.append((dict(metrics or {}), step, dict(tags or {})))

    def keep(self, folder: Path) -> None:
        assert not self.files
        for path in folder.rglob("*.*"):
            self.files[str(path.relative_to(folder))] = path.read_bytes()
        shutil.rmtree(folder)

    def end(self, state: str) -> None:
        self.ends.append(state)

    @property
    def tags(self) -> dict[str, str]:
        return {key: value for _, _, tags in self.logged for key, value in tags.items()}

    def history(self, name: str) -> list[tuple[int, float]]:
        return [(step, metrics[name]) for metrics, step, _ in self.logged if name in metrics]


class Heard(Watch):
    """Keeps what it is told of epochs."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        assert epoch == len(self.epochs) + 1
        self.epochs.append(dict(metrics))


class Raising(Watch):
    """Ends a run at its fifth step, or at its first rung."""

    def __init__(self, error: BaseException, rung: bool = False) -> None:
        self.error, self.at_rung, self.steps = error, rung, 0

    def batch(self, done: float) -> None:
        self.steps += 1
        if not self.at_rung and self.steps == 5:
            raise self.error

    def rung(self, rung: float, accuracy: float) -> None:
        if self.at_rung:
            raise self.error


def identity() -> Identity:
    tags = {"digitlab.study": "s", "digitlab.trial": "4"}
    return Identity("s-4", "trial", tags, "parent", ("trainer.epochs=3",), ENVIRONMENT)


def do(lab: Path, watch: Watch, *overrides: str, rungs: list[float] | None = None) -> Any:
    notebook = Notebook()
    return perform(configure(*overrides), identity(), notebook, lab, watch, rungs), notebook


Finished = tuple[Outcome, Notebook, Heard, Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that was left in peace: its outcome, its record, what was heard, its lab."""
    lab = tmp_path_factory.mktemp("lab")
    shutil.copytree(DATA, lab / "data" / "sample")
    heard = Heard()
    outcome, notebook = do(lab, heard)
    return outcome, notebook, heard, lab


# ---- a run that finishes -------------------------------------------------------------------------


def test_finished_run_is_recorded_as_finished(finished: Finished) -> None:
    outcome, notebook, heard, _ = finished
    assert (outcome.state, outcome.reason, outcome.error) == ("finished", "", None)
    assert outcome.run_id == notebook.run_id
    assert notebook.ends == ["finished"]
    assert "digitlab.reason" not in notebook.tags
    assert outcome.metrics.items() >= heard.epochs[-1].items()
    assert outcome.metrics["seconds"] > 0


def test_record_begins_with_identity_and_every_parameter(finished: Finished) -> None:
    [begun] = finished[1].begun
    assert (begun.name, begun.parent) == ("s-4", "parent")
    assert begun.tags == {
        "digitlab.kind": "trial",
        "digitlab.state": "running",
        "digitlab.study": "s",
        "digitlab.trial": "4",
        "digitlab.overrides": '["trainer.epochs=3"]',
        "mlflow.source.git.commit": "c0ffee",
    }
    leaves = flat(config_to_plain(configure()))
    assert begun.params == {
        key: str(value)
        for key, value in leaves.items()
        if key.split(".")[0] not in ("study", "tracking", "launcher")
    }
    assert begun.params["trainer.epochs"] == "3"
    assert begun.params["model.widths"] == "[4]"


def test_metrics_are_recorded_by_epoch_as_they_were_heard(finished: Finished) -> None:
    _, notebook, heard, _ = finished
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert notebook.history(name) == [
            (epoch, metrics[name]) for epoch, metrics in enumerate(heard.epochs, start=1)
        ]
    network = build_network(configure().model)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert notebook.history("model_parameters") == [(0, parameters)]
    assert [step for step, _ in notebook.history("seconds")] == [3]


def test_tracker_is_called_once_an_epoch(finished: Finished, lab: Path) -> None:
    _, notebook, _, _ = finished
    _, short = do(lab, Watch(), "trainer.epochs=1")
    assert len(notebook.logged) - len(short.logged) == 2
    of_epochs = [metrics for metrics, _, _ in notebook.logged if "val_loss" in metrics]
    assert len(of_epochs) == 3
    assert len(notebook.logged) <= 3 + 3  # facts before, digests and seconds after


def test_kept_config_is_the_config(finished: Finished) -> None:
    text = finished[1].files["config.yaml"].decode()
    assert config_from_yaml(text) == configure()
    assert configure().trainer.threads == 1  # as it stands there, since it may change the bits
    assert "threads: 1" in text


def test_kept_environment_is_the_one_that_was_given(finished: Finished) -> None:
    environment = json.loads(finished[1].files["environment.json"])
    numerics = environment.pop("numerics")
    assert environment == ENVIRONMENT
    assert (numerics["device"], numerics["threads"]) == ("cpu", configure().trainer.threads)
    assert numerics["deterministic"] is True


def test_environment_names_commit_libraries_and_machine() -> None:
    environment = describe_environment()
    assert re.fullmatch(r"[0-9a-f]{40}|", environment["commit"])
    for library in ("torch", "numpy", "mlflow", "optuna", "pytorch-lightning", "digitlab"):
        assert environment["libraries"][library] == version(library)
    assert all(environment["libraries"].values())
    assert environment["cores"] >= 1
    assert environment["processor"]
    assert json.loads(json.dumps(environment)) == environment


def test_kept_weights_are_the_digest_and_the_accuracy_of_the_record(finished: Finished) -> None:
    outcome, notebook, heard, _ = finished
    weights = notebook.files["weights.safetensors"]
    digest = hashlib.sha256(weights).hexdigest()
    assert digest == outcome.weights_sha256 == notebook.tags["digitlab.weights_sha256"]
    network = build_network(configure().model)
    network.load_state_dict(safetensors.torch.load(weights))
    predictions = notebook.files["predictions.safetensors"]
    digest = hashlib.sha256(predictions).hexdigest()
    assert digest == notebook.tags["digitlab.predictions_sha256"]
    told = safetensors.torch.load(predictions)
    assert told["logits"].shape == (400, 10)
    assert torch.equal(told["logits"].argmax(1), told["predictions"].long())
    assert heard.epochs[-1]["val_accuracy"] > 0.3


def test_record_names_the_files_of_data_that_were_read(finished: Finished) -> None:
    told = json.loads(finished[1].tags["digitlab.data_sha256"])
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    assert told == {name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in names}


def test_pictures_are_kept(finished: Finished) -> None:
    files = finished[1].files
    pictures = sorted(name for name in files if name.startswith("pictures/"))
    assert pictures == ["pictures/confusion.png", "pictures/evolution.png", "pictures/misread.png"]
    assert all(files[name].startswith(PNG) for name in pictures)


def test_nothing_is_left_in_the_staging_folder(finished: Finished) -> None:
    assert list((finished[3] / "staging").iterdir()) == []


def test_perfect_run_has_no_picture_of_misread_digits(tmp_path: Path) -> None:
    labels = torch.arange(10)
    images = torch.zeros(10, 1, 28, 28, dtype=torch.uint8)
    draw_confusions(torch.eye(10), labels, images, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]


def test_one_misread_digit_is_enough_for_a_picture(tmp_path: Path) -> None:
    labels = torch.tensor([1, 1, 2])
    logits = torch.eye(10)[[1, 7, 2]]
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    draw_confusions(logits, labels, images, tmp_path)
    assert (tmp_path / "misread.png").read_bytes().startswith(PNG)


def test_final_fit_records_its_test_accuracy_once(lab: Path) -> None:
    outcome, notebook = do(lab, Watch(), "data.evaluate_on=test", "trainer.epochs=2")
    assert notebook.history("test_accuracy") == [(2, outcome.metrics["test_accuracy"])]
    assert notebook.history("val_accuracy") == []
    assert len(json.loads(notebook.tags["digitlab.data_sha256"])) == 4


def test_run_without_tracking_gives_the_same_and_leaves_nothing(
    finished: Finished, lab: Path
) -> None:
    outcome = perform(configure(), identity(), Tracking(), lab, Watch())
    assert (outcome.state, outcome.run_id) == ("finished", None)
    assert outcome.weights_sha256 == finished[0].weights_sha256
    assert sorted(path.name for path in lab.iterdir()) == ["data", "staging"]
    assert list((lab / "staging").iterdir()) == []


# ---- a run that ends before ----------------------------------------------------------------------


@pytest.mark.parametrize("state", ["pruned", "interrupted", "failed"])
def test_watch_can_end_a_run_in_any_state(lab: Path, state: str) -> None:
    outcome, notebook = do(lab, Raising(Ended(state, "enough of it")))
    assert (outcome.state, outcome.reason, outcome.error) == (state, "enough of it", None)
    assert notebook.ends == [state]
    assert notebook.tags == {"digitlab.reason": "enough of it"}
    assert (notebook.files, outcome.weights_sha256) == ({}, "")
    assert outcome.metrics["seconds"] > 0
    assert outcome.metrics["done"] == 5 / 24


def test_pruned_run_keeps_the_accuracy_that_it_was_pruned_for(lab: Path) -> None:
    outcome, notebook = do(lab, Raising(Ended("pruned", "too low"), rung=True), rungs=[0.25])
    [(step, accuracy)] = notebook.history("rung_accuracy")
    assert step == 25
    assert outcome.metrics.items() >= {"rung": 0.25, "rung_accuracy": accuracy}.items()
    assert 0 < accuracy < 1


def test_run_that_diverges_has_failed_for_that_reason(lab: Path) -> None:
    wild = ["optim=sgd", "optim.schedule=constant", "optim.learning_rate=10"]
    wild += ["optim.weight_decay=1", "model.batch_norm=false"]
    outcome, notebook = do(lab, Watch(), *wild)
    assert outcome.state == "failed"
    assert isinstance(outcome.error, Diverged)
    assert re.match(
        r"Diverged: the loss is (nan|inf) in epoch \d at learning rate 10$", outcome.reason
    )
    assert notebook.tags == {"digitlab.reason": outcome.reason}
    assert notebook.ends == ["failed"]


def test_error_in_training_is_the_outcome_of_the_run(lab: Path) -> None:
    error = ZeroDivisionError("x" * 9000)
    outcome, notebook = do(lab, Raising(error))
    assert (outcome.state, outcome.error) == ("failed", error)
    assert outcome.reason.startswith("ZeroDivisionError: xxx")
    assert len(notebook.tags["digitlab.reason"]) == 5000  # MLflow takes no more than 8,000
    assert notebook.ends == ["failed"]


@pytest.mark.parametrize(
    "error",
    [
        UserError("data.name=x: no such data set"),
        OSError(28, "No space left on device"),
        Broken("optuna's storage: database is locked"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_that_is_no_fault_of_the_configuration_is_raised(
    lab: Path, error: BaseException
) -> None:
    notebook = Notebook()
    with pytest.raises(type(error)) as told:
        perform(configure(), identity(), notebook, lab, Raising(error))
    assert told.value is error
    assert notebook.ends == ["interrupted"]


def test_signal_between_two_batches_interrupts_the_run_and_is_recorded(lab: Path) -> None:
    class Ending(Spoken):
        def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)  # which Lightning hears, too

    config, notebook = configure(), Notebook()
    with Ending(config) as watch:
        outcome = perform(config, Identity("a", "train"), notebook, lab, watch)
    assert (outcome.state, notebook.ends) == ("interrupted", ["interrupted"])


def test_staging_folder_is_shared_with_others_and_cleared_of_what_was_left(lab: Path) -> None:
    staging = lab / "staging"
    (staging / "left").mkdir(parents=True)
    os.utime(staging / "left", (0, 0))
    (staging / "another").mkdir()
    (staging / "gone").symlink_to(staging / "handed over since the folder was listed")
    folder = stage(lab, configure(), Identity("mine", "train"))
    assert {path.name for path in staging.iterdir()} == {folder.name, "another", "gone"}


def test_staging_folder_that_cannot_be_made_is_raised(lab: Path) -> None:
    (lab / "staging").write_text("in the way")
    notebook = Notebook()
    with pytest.raises(OSError, match="staging"):
        perform(configure("trainer.epochs=1"), identity(), notebook, lab, Watch())
    assert notebook.ends == ["interrupted"]


def test_full_disk_while_recording_is_raised(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "draw_confusions", full)
    notebook = Notebook()
    with pytest.raises(OSError, match="No space left"):
        perform(configure("trainer.epochs=1"), identity(), notebook, lab, Watch())
    assert notebook.ends == ["interrupted"]
    assert notebook.files == {}


def test_missing_data_are_raised_and_named(tmp_path: Path) -> None:
    notebook = Notebook()
    with pytest.raises(UserError, match="train-images-idx3-ubyte is missing"):
        perform(configure(), identity(), notebook, tmp_path, Watch())
    assert notebook.ends == ["interrupted"]
