"""Digits in memory as a Lightning data module: batches by index, prepared as they are formed."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Generator, Tensor

from digitlab.base.errors import require
from digitlab.config.types import Config, DataConfig, EvaluateOn
from digitlab.data.augment import augment
from digitlab.data.datasets import TEST, TRAIN, load_digits, stratified_split

_BLOCKS = 20  # of a pass, at least: how finely progress is told and rungs are met
_MOST = 16  # batches of a block: a quarter of a second until a run notices that it shall stop


def random_stream(seed: int, stream: int) -> Generator:
    """A generator of its own for each use of one seed, so that the uses do not disturb each other.

    Streams: 0 order of the images, 1 augmentation.
    """
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return Generator().manual_seed(int(state >> np.uint64(1)))


def to_unit(images: Tensor) -> Tensor:
    """uint8 (N, 1, 28, 28) to float in [0, 1]."""
    return images.float().div_(255)


def standardise(images: Tensor, config: DataConfig) -> Tensor:
    """Float images in [0, 1] less the mean, over the deviation; changes them in place."""
    return images.sub_(config.mean).div_(config.std)


class Batches:
    """The training images in a new order at each pass: blocks of batches, prepared as formed.

    A block is what Lightning's loop turns over at once. What the loop does beside the step takes
    0.5 ms, a third of the step of a small network: shared by a block, it is no longer felt.
    """

    def __init__(self, images: Tensor, labels: Tensor, config: DataConfig, seed: int) -> None:
        self.images, self.labels, self.config = images, labels, config
        self.order = random_stream(seed, 0)
        self.chance = random_stream(seed, 1)
        lone = len(labels) % config.batch_size == 1 < len(labels)
        self.count = len(labels) - lone  # of a pass: batch norm has no use for a batch of one
        self.steps = math.ceil(self.count / config.batch_size)  # batches of a pass
        self.block = min(_MOST, max(1, self.steps // _BLOCKS))  # batches

    def __len__(self) -> int:
        return math.ceil(self.steps / self.block)

    def __iter__(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        order = torch.randperm(len(self.labels), generator=self.order)[: self.count]
        for indices in torch.split(order, self.block * self.config.batch_size):
            yield self._block(indices)

    def _block(self, indices: Tensor) -> list[tuple[Tensor, Tensor]]:
        config, size = self.config, self.config.batch_size
        images = to_unit(self.images.index_select(0, indices))  # of all batches at once
        labels = self.labels.index_select(0, indices)
        parts = [
            standardise(augment(part, config.augment, self.chance), config)
            for part in torch.split(images, size)
        ]
        return list(zip(parts, torch.split(labels, size), strict=True))


class DigitsData(pl.LightningDataModule):
    """What one run learns from and is measured on, as `config.data.evaluate_on` says.

    With evaluate_on=validation nothing of the test set is opened; with test it is opened by
    `measured()`, which a run calls once, when it has finished training.
    """

    def __init__(self, config: Config, lab: Path) -> None:
        super().__init__()
        self.config, self.lab = config, lab
        data = config.data
        digits = load_digits(lab, data.name, TRAIN, data.allow_unknown)
        self.sha256 = dict(digits.sha256)
        images, labels = digits.images[:, None], digits.labels
        if data.evaluate_on is EvaluateOn.validation:
            learn, held = stratified_split(labels, data.validation_images, data.split_seed)
            self.validation = (images[held], labels[held])
            images, labels = images[learn], labels[learn]
        if data.images:
            given, most = f"data.images={data.images}", len(labels) - 1
            require(data.images <= most, given, f"an integer <= {most} here, or 0 for all")
            _, learn = stratified_split(labels, data.images, data.split_seed)
            images, labels = images[learn], labels[learn]
        self.learned = (images, labels)

    def train_dataloader(self) -> Batches:
        return Batches(*self.learned, self.config.data, self.config.trainer.seed)

    def measured(self) -> tuple[Tensor, Tensor]:
        """Images uint8 (M, 1, 28, 28) and labels (M,) to measure on."""
        data = self.config.data
        if data.evaluate_on is EvaluateOn.validation:
            return self.validation
        digits = load_digits(self.lab, data.name, TEST, data.allow_unknown)
        self.sha256 |= digits.sha256
        return digits.images[:, None], digits.labels
