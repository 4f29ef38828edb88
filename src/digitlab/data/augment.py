"""Random changes of whole batches of training images."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from digitlab.config.types import AugmentConfig

SIDE = 28  # pixels


def augment(images: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    """Rotate, scale, shear, shift, erase and thicken each image by its own random amounts.

    Args:
        images: (N, 1, 28, 28), float, 0 is black; what moves in from outside is black.
        config: the largest amounts; 0 turns a change off.
        generator: the only source of randomness, so that a seed fixes every batch.

    Returns:
        Images of the same shape and layout.
    """
    if config.shift or config.rotate or config.scale or config.shear:
        images = _move(images, config, generator)
    if config.stroke:
        images = _stroke(images, config.stroke, generator)
    if config.erase:
        images = _erase(images, config.erase, generator)
    return images


_line = torch.linspace(1 / SIDE - 1, 1 - 1 / SIDE, SIDE)  # centres of pixels; -1 to 1 is the image
_PIXELS = torch.stack([_line.repeat(SIDE), _line.repeat_interleave(SIDE), torch.ones(SIDE**2)])


def _move(images: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    """Sample each image at the places that its own affine map takes the pixels from."""
    # One matrix product for the batch: torch's affine_grid takes three times as long, and its
    # layout of the grid slows grid_sample down too.
    n = len(images)
    # Drawn on the processor, so that a seed moves the images alike on every device.
    drawn = torch.rand(5, n, generator=generator).to(images.device)
    angle, scale, shear, x, y = drawn.mul_(2).sub_(1)
    angle = angle * math.radians(config.rotate)
    size = 1 + scale * config.scale
    lean = torch.tan(shear * math.radians(config.shear))
    cosine, sine = torch.cos(angle) / size, torch.sin(angle) / size
    shift = 2 * config.shift / SIDE
    rows = [cosine, lean * cosine - sine, x * shift, sine, lean * sine + cosine, y * shift]
    matrices = torch.stack(rows, dim=1).view(2 * n, 3)
    grid = (matrices @ _PIXELS.to(images.device)).view(n, 2, SIDE, SIDE).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, align_corners=False)


def _erase(images: Tensor, side: int, generator: Generator) -> Tensor:
    """Paint a black square of `side` pixels, centred anywhere in the image."""
    pixels = torch.arange(SIDE)
    corners = torch.randint(0, SIDE, (2, len(images), 1), generator=generator) - side // 2
    inside = (pixels >= corners) & (pixels < corners + side)  # (2, N, 28)
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(square.to(images.device), 0)


def _stroke(images: Tensor, most: float, generator: Generator) -> Tensor:
    """Move each pixel part of the way to the lightest, or the darkest, of its neighbourhood."""
    drawn = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    way = drawn.mul_(2).sub_(1).mul_(most)
    thick = F.max_pool2d(images, 3, 1, 1)
    thin = -F.max_pool2d(-images, 3, 1, 1)
    return images + way.clamp(min=0) * (thick - images) + way.clamp(max=0) * (images - thin)
