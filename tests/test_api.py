"""`import digitlab`, as a script or a notebook uses it."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image
from samples import copy_digits, studies

import digitlab

SMALL = ("experiments=smoke", "data=sample", "model.widths=[4]", "trainer.epochs=1")


def test_a_run_is_trained_found_and_used(tmp_path: Path) -> None:
    lab = copy_digits(tmp_path / "lab")
    run = digitlab.train(*SMALL, lab=lab)
    assert (run.kind, run.state) == ("train", "finished")
    assert digitlab.load_run(run.run_id[:12], lab) == run
    assert run.config() == digitlab.compose(*SMALL)
    guesses, labels = run.predictions()
    accuracy = (guesses == labels).double().mean().item()
    assert accuracy == pytest.approx(run.metrics["val_accuracy"])
    assert sum(p.numel() for p in run.network().parameters()) == run.metrics["model_parameters"]
    assert digitlab.reproduce(run.run_id, lab) == "identical"
    Image.new("L", (28, 28), 255).save(tmp_path / "empty.png")
    [answer] = digitlab.Predictor(lab=lab).predict(tmp_path / "empty.png")
    assert answer.status == "none"


def test_a_study_is_a_table_with_a_champion(tmp_path_factory: pytest.TempPathFactory) -> None:
    study = digitlab.load_study("smoke", studies(tmp_path_factory))
    trials = study.trials()
    assert list(trials.index) == list(range(6))
    assert {"state", "value", "model.hidden", "optim.learning_rate"} <= set(trials)
    champion = study.champion()
    assert champion is not None
    assert trials.state[champion["trial"]] == "finished"


@pytest.mark.slow
def test_what_is_recorded_elsewhere_is_found_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, other = copy_digits(tmp_path / "lab"), f"tracking.uri=sqlite:///{tmp_path}/other.db"
    monkeypatch.chdir(tmp_path)
    run = digitlab.train(*SMALL, other, lab=lab)
    assert run.stores == (other,)
    assert run.network() is not None
    assert digitlab.load_run(run.run_id, lab, [other]) == run
    with pytest.raises(digitlab.UserError, match="no such run"):
        digitlab.load_run(run.run_id, lab)
    with pytest.raises(digitlab.UserError, match="the run finished, and its record is not there"):
        digitlab.train(*SMALL, "tracking=none", lab=lab)


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(digitlab.UserError, match=r"trainer.epochs=0 is invalid"):
        digitlab.train("trainer.epochs=0", lab=tmp_path)
    with pytest.raises(digitlab.UserError, match="study nothing does not exist"):
        digitlab.load_study("nothing", tmp_path)


def test_all_that_is_public_is_there_and_described() -> None:
    for name in digitlab.__all__:
        assert getattr(digitlab, name).__doc__


@pytest.mark.slow
def test_an_observer_of_ones_own_sees_a_run_and_can_end_it(tmp_path: Path) -> None:
    class Observer(digitlab.TrainingObserver):
        def __init__(self) -> None:
            self.curve: list[float] = []

        def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
            self.curve.append(metrics["val_accuracy"])
            if epoch == 2:
                raise digitlab.StopTraining

    lab, observer = copy_digits(tmp_path / "lab"), Observer()
    run = digitlab.train(*SMALL, lab=lab, observers=[observer])
    assert observer.curve == [run.metrics["val_accuracy"]]
    with pytest.raises(digitlab.UserError, match="the run is interrupted"):
        digitlab.train(*SMALL, "trainer.epochs=3", lab=lab, observers=[observer])
    assert len(observer.curve) == 3
