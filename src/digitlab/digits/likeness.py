"""What a drawing is like, and how little would change its answer."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from digitlab.config.types import DataConfig
from digitlab.data.datasets import TRAIN, Digits, class_names, load_digits
from digitlab.data.images import standardise, to_unit

_NEAREST = 5
_LEVELS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 90, 128)  # of 255, largest changes to try
_STEPS = 8


@dataclass(frozen=True)
class TrainingDigit:
    """A training image and what it shows."""

    label: str
    image: list[list[int]]


@dataclass(frozen=True)
class FoolingImage:
    """An adversarial example: read as another class, though no pixel changed by more than that."""

    label: str
    largest_change: float  # of the way from black to white
    image: list[list[int]]


def nearest(image: NDArray[np.uint8], lab: Path, data: DataConfig) -> list[TrainingDigit]:
    """Return the training images that are most like an image (28, 28), the nearest first.

    Distances are between means of 2x2 pixels, which a shift by one pixel hardly changes.
    """
    if not (lab / "data" / data.name / TRAIN[0]).is_file():
        return []  # not fetched for this alone
    digits, small = _shrunk(lab, data.name, data.allow_unknown)
    names = class_names(data.name, lab)
    wanted = _shrink(image[None])[0]
    distances = (small**2).sum(1) - 2 * small @ wanted
    places = np.argpartition(distances, min(_NEAREST, len(distances) - 1))[:_NEAREST]
    places = places[np.argsort(distances[places])]
    return [TrainingDigit(names[digits.labels[i]], digits.images[i].tolist()) for i in places]


@lru_cache(1)
def _shrunk(lab: Path, name: str, allow_unknown: bool) -> tuple[Digits, NDArray[np.float32]]:
    digits = load_digits(lab, name, TRAIN, allow_unknown)
    return digits, _shrink(digits.images)


def _shrink(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    means = images.reshape(-1, 14, 2, 14, 2).mean((2, 4), dtype=np.float32)
    small: NDArray[np.float32] = means.reshape(-1, 196)
    return small


def fool(
    network: nn.Module, image: NDArray[np.uint8], lab: Path, data: DataConfig
) -> FoolingImage | None:
    """Change an image (28, 28) as little as will do for another answer; None if too much is needed.

    Projected gradient descent (Madry et al. 2018), in one batch with an image for each size of the
    largest change; the smallest that succeeds is taken.
    """
    start = to_unit(torch.from_numpy(image)[None, None])
    label = _logits(network, start, data).argmax(1)
    changes = torch.tensor(_LEVELS)[:, None, None, None] / 255
    low, high = (start - changes).clamp(0, 1), (start + changes).clamp(0, 1)
    pixels = start.expand(len(_LEVELS), -1, -1, -1)
    for _ in range(_STEPS):
        pixels = pixels.detach().requires_grad_()
        logits = _logits(network, pixels, data)
        loss = nn.functional.cross_entropy(logits, label.expand(len(pixels)), reduction="sum")
        [slope] = torch.autograd.grad(loss, pixels)
        pixels = (pixels.detach() + 2.5 / _STEPS * changes * slope.sign()).clamp(low, high)
    found = (255 * pixels).round().to(torch.uint8)  # as a picture holds it
    answers = _logits(network, to_unit(found), data).argmax(1)
    for level, answer, picture in zip(_LEVELS, answers.tolist(), found, strict=True):
        if answer != int(label):
            names = class_names(data.name, lab)
            return FoolingImage(names[answer], level / 255, picture[0].tolist())
    return None


def _logits(network: nn.Module, pixels: Tensor, data: DataConfig) -> Tensor:
    logits: Tensor = network(standardise(pixels.clone(), data))
    return logits
