"""Which images a run learns from and is measured on, and when their files are opened."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from digitlab.base.errors import UserError
from digitlab.config.compose import compose
from digitlab.data.datamodule import DigitsData


def data(lab: Path, *overrides: str, stage: str = "fit") -> DigitsData:
    config = compose("train", ["experiments=smoke", "data=sample", *overrides])[0].config
    digits = DigitsData(config, lab)
    digits.setup(stage)
    return digits


def sizes(digits: DigitsData) -> list[int | None]:
    parts = (digits.training, digits.validation, digits.test)
    return [None if part is None else len(part[1]) for part in parts]


def test_the_stage_and_evaluate_on_decide_what_is_read(lab: Path) -> None:
    assert sizes(data(lab)) == [1600, 400, None]
    assert sizes(data(lab, stage="validate")) == [1600, 400, None]
    assert sizes(data(lab, "data.evaluate_on=test")) == [2000, None, None]
    assert sizes(data(lab, stage="test")) == [None, None, 500]
    assert sizes(data(lab, stage="predict")) == [None, None, None]


def test_loaders_are_of_their_own_images(lab: Path) -> None:
    digits = data(lab)
    digits.setup("test")
    loaders = (digits.train_dataloader(), digits.val_dataloader(), digits.test_dataloader())
    counts = [sum(len(labels) for _, labels in loader) for loader in loaders]
    assert counts == [1600, 400, 500]
    assert list(data(lab, "data.evaluate_on=test").val_dataloader()) == []


def test_files_are_opened_once_and_test_files_by_the_test_stage_alone(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    original = builtins.open

    def noted(file: Any, *rest: Any, **options: Any) -> Any:
        if "ubyte" in str(file):
            opened.append(Path(file).name)
        return original(file, *rest, **options)

    monkeypatch.setattr(builtins, "open", noted)
    digits = data(lab)
    digits.setup("fit")
    digits.setup("validate")
    assert opened == ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"] == [*digits.sha256]
    digits.setup("test")
    digits.setup("test")
    assert opened[2:] == ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    assert [*digits.sha256] == opened


def test_the_validation_set_is_of_the_training_images_alone(lab: Path) -> None:
    split, whole = data(lab), data(lab, "data.evaluate_on=test")
    assert split.training is not None
    assert split.validation is not None
    assert whole.training is not None
    both = torch.cat([split.training[0], split.validation[0]]).flatten(1)
    expected = sorted(image.numpy().tobytes() for image in whole.training[0].flatten(1))
    assert sorted(image.numpy().tobytes() for image in both) == expected


def test_a_run_may_learn_from_a_stratified_part_of_the_images(lab: Path) -> None:
    whole = data(lab, "data.evaluate_on=test").training
    part = data(lab, "data.evaluate_on=test", "data.images=500").training
    again = data(lab, "data.evaluate_on=test", "data.images=500", "trainer.seed=9").training
    assert whole is not None
    assert part is not None
    assert again is not None
    assert len(part[1]) == 500
    shares = part[1].bincount() / 500 - whole[1].bincount() / 2000
    assert shares.abs().max() < 0.005
    assert torch.equal(part[0], again[0])  # whatever the training seed


def test_more_images_than_there_are_is_refused_with_the_limit(lab: Path) -> None:
    with pytest.raises(UserError, match=r"data.images=2000\b.*at most 1999"):
        data(lab, "data.evaluate_on=test", "data.images=2000")
