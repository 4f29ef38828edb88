"""Stored images as tensors to compute with: standardised, and formed into batches."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from digitlab.config.types import DataConfig
from digitlab.data.augment import augment
from digitlab.data.datasets import Digits

_GATHERED = 16  # batches that are copied out of the data set at once
EVALUATION_BATCH = 500  # images: large enough to be fast, small enough to stay in the cache


def random_stream(seed: int, stream: int) -> Generator:
    """Return a generator for one use of a seed, so that the uses do not disturb each other.

    Streams: 0 order of the images, 1 augmentation.
    """
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return Generator().manual_seed(int(state >> np.uint64(1)))


def as_tensors(digits: Digits) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, 1, 28, 28) and labels int64 (N,), in the memory that they are in."""
    return torch.from_numpy(digits.images)[:, None], torch.from_numpy(digits.labels)


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 (N, 1, 28, 28) to float in [0, 1]."""
    return images.float().div_(255)


def standardise(images: Tensor, config: DataConfig) -> Tensor:
    """Subtract the mean from images in [0, 1] and divide by the deviation, in place."""
    return images.sub_(config.mean).div_(config.std)


class Batches:
    """The training images in a new order at each pass, as float batches with their labels.

    A DataLoader would fetch image by image, which takes several times as long, and would draw from
    torch's global generator at each pass, which dropout draws from too.
    """

    def __init__(self, images: Tensor, labels: Tensor, config: DataConfig, seed: int) -> None:
        self.images, self.labels, self.config = images, labels, config
        self.order = random_stream(seed, 0)
        self.augmentation = random_stream(seed, 1)
        # Batch norm cannot train on a batch of one image: such a last batch is left out.
        is_last_alone = len(labels) % config.batch_size == 1 < len(labels)
        self.count = len(labels) - is_last_alone  # images of a pass
        self.first_batch = 0  # of the next pass
        self.yielded = 0  # batches of the present pass

    def __len__(self) -> int:
        return math.ceil(self.count / self.config.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, changes = self.config.batch_size, self.config.augment
        self.yielded, self.first_batch = self.first_batch, 0
        self.pass_order = self.order.get_state()
        order = torch.randperm(len(self.labels), generator=self.order)[: self.count]
        order = order[self.yielded * size :].to(self.images.device)
        # Index and convert several batches in one go: small ones cost more in calls than in work.
        for indices in torch.split(order, _GATHERED * size):
            images = to_unit(self.images.index_select(0, indices))
            labels = self.labels.index_select(0, indices)
            for part, digits in zip(
                torch.split(images, size), torch.split(labels, size), strict=True
            ):
                moved = augment(part, changes, self.augmentation)
                self.yielded += 1
                yield standardise(moved, self.config), digits

    def state_dict(self) -> dict[str, Any]:
        """Return where the present pass is, as tensors and numbers."""
        augmentation = self.augmentation.get_state()
        return {"order": self.pass_order, "augmentation": augmentation, "yielded": self.yielded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on where another one was."""
        self.order.set_state(state["order"])
        self.augmentation.set_state(state["augmentation"])
        self.first_batch = state["yielded"]


class EvaluationBatches:
    """Images in their own order, as float batches with their labels."""

    def __init__(self, images: Tensor, labels: Tensor, config: DataConfig) -> None:
        self.images, self.labels, self.config = images, labels, config

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / EVALUATION_BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = (torch.split(whole, EVALUATION_BATCH) for whole in (self.images, self.labels))
        for images, labels in zip(*parts, strict=True):
            yield standardise(to_unit(images), self.config), labels
