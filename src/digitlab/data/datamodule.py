"""The digits of one run as a Lightning data module."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from digitlab.config.types import Config, EvaluateOn
from digitlab.data.datasets import TEST, TRAIN, load_digits, require_images, stratified_split
from digitlab.data.images import Batches, EvaluationBatches, as_tensors

Labelled = tuple[Tensor, Tensor]  # uint8 (N, 1, 28, 28) and int64 (N,)


class DigitsData(pl.LightningDataModule):
    """The images that a run learns from and is measured on, by `config.data.evaluate_on`.

    The test files are opened by `setup("test")` alone, so that no training can see them.
    """

    def __init__(self, config: Config, lab: Path) -> None:
        super().__init__()
        self.config, self.lab = config, lab
        self.sha256: dict[str, str] = {}  # of each file that was opened
        self.training: Labelled | None = None
        self.validation: Labelled | None = None  # none with evaluate_on=test
        self.test: Labelled | None = None

    def setup(self, stage: str) -> None:
        """Read the files of a stage of the Trainer; a second call does nothing.

        Raises:
            UserError: the files are not available or not the known ones, or the configuration asks
                for more images than they hold.
        """
        if stage in ("fit", "validate") and self.training is None:
            self.training = self._split(self._load(TRAIN))
        if stage == "test" and self.test is None:
            self.test = self._load(TEST)

    def move(self, device: torch.device) -> None:
        """Move the images that were read to a device, where they stay."""
        for name in ("training", "validation", "test"):
            if digits := getattr(self, name):
                setattr(self, name, tuple(part.to(device) for part in digits))

    def _load(self, files: tuple[str, str]) -> Labelled:
        data = self.config.data
        digits = load_digits(self.lab, data.name, files, data.allow_unknown)
        self.sha256 |= digits.sha256
        return as_tensors(digits)

    def _split(self, digits: Labelled) -> Labelled:
        """Set the validation set apart, and return the images to learn from."""
        data, (images, labels) = self.config.data, digits
        if data.evaluate_on is EvaluateOn.validation:
            given = (data.validation_images, data.split_seed)
            rest, validation = stratified_split(labels.numpy(), *given)
            self.validation = (images[validation], labels[validation])
            images, labels = images[rest], labels[rest]
        if data.images:
            require_images(data.images, len(labels))
            _, part = stratified_split(labels.numpy(), data.images, data.split_seed)
            images, labels = images[part], labels[part]
        return images, labels

    def train_dataloader(self) -> Batches:
        """Return batches of standardised, augmented images and their labels."""
        assert self.training is not None
        return Batches(*self.training, self.config.data, self.config.trainer.seed)

    def val_dataloader(self) -> EvaluationBatches | list[Any]:
        """Return batches of the validation set; with evaluate_on=test there are none."""
        return EvaluationBatches(*self.validation, self.config.data) if self.validation else []

    def test_dataloader(self) -> EvaluationBatches:
        """Return batches of the test set."""
        assert self.test is not None
        return EvaluationBatches(*self.test, self.config.data)
