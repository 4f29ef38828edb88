"""Random changes of whole batches of training images."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from digitlab.config import AugmentConfig

SIDE = 28  # pixels


def augment(images: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    """Turn, stretch, shear, shift and blot each image by its own random amounts.

    Args:
        images: (N, 1, 28, 28), float, 0 is black; what moves in from outside is black.
        config: the largest amounts; 0 turns a change off.
        generator: the only source of chance, so that a seed fixes every batch.

    Returns:
        Images of the same shape and layout.
    """
    if config.shift or config.rotate or config.scale or config.shear:
        images = _move(images, config, generator)
    if config.erase:
        images = _erase(images, config.erase, generator)
    return images


def _move(images: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    def amounts(largest: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * largest

    angle = amounts(math.radians(config.rotate))
    size = 1 + amounts(config.scale)
    shear = torch.tan(amounts(math.radians(config.shear)))
    shift_x, shift_y = amounts(2 * config.shift / SIDE), amounts(2 * config.shift / SIDE)
    cosine, sine = torch.cos(angle) / size, torch.sin(angle) / size
    rows = [cosine, shear * cosine - sine, shift_x, sine, shear * sine + cosine, shift_y]
    matrices = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _erase(images: Tensor, side: int, generator: Generator) -> Tensor:
    """A black square of `side` pixels, centred anywhere in the image."""
    pixels = torch.arange(SIDE)
    corners = torch.randint(0, SIDE, (2, len(images), 1), generator=generator) - side // 2
    inside = (pixels >= corners) & (pixels < corners + side)  # (2, N, 28)
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(square, 0)
