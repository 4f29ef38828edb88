"""Tell ink from paper: how far each pixel of a picture stands out from what is around it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from digitlab.digits.decode import Grey

Mask = NDArray[np.bool_]

_WINDOW = 0.3  # of the shorter side: wider than any stroke, narrower than most shadows
_APART, _MUCH = 20.0, 0.12  # grey levels from the paper, of a share of it: shadows are looked for
_COARSE = 64  # pixels of the shorter side, below which its filters take strokes for paper


def ink_of(grey: Grey) -> tuple[Grey, float]:
    """Return how far each pixel stands out from the paper, in grey levels, and the paper's noise.

    The paper is a quadratic surface, fitted to what is left when outliers are set aside; where
    that leaves much, as a hard shadow does, it is what lies around each pixel.
    """
    paper = _surface(grey)
    ink, noise = _apart(grey, paper)
    share = float((np.abs(grey - paper) > _APART).mean())
    if share > _MUCH and min(grey.shape) >= _COARSE:
        local, least = local_ink(grey)
        if float((local > _APART).mean()) < share / 2:
            return local, least
    return ink, noise


def peak_of(ink: Grey) -> float:
    """Return the grey level of full ink: what the darkest tenth of a stroke reaches."""
    top = float(ink.max())
    strong = ink[ink > top / 2]
    return float(np.quantile(strong, 0.9)) if strong.size else 0.0


def border_of(values: NDArray[Any]) -> NDArray[Any]:
    """Return the pixels at the edge of a picture (H, W), in a row; of a small one, one wide."""
    width = max(1, min(values.shape) // 30)
    edges = [values[:width], values[-width:], values[:, :width], values[:, -width:]]
    return np.concatenate([part.ravel() for part in edges])


def _surface(grey: Grey) -> Grey:
    """Fit the border's level or, where it is not the flat background of a drawing, a surface."""
    height, width = grey.shape
    level = float(np.median(border_of(grey)))
    paper = np.full(grey.shape, level, np.float32)
    if float((np.abs(grey - level) <= 2).mean()) >= 0.5:
        return paper
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], -1).astype(np.float32)
    step = max(1, int((height * width / 20000) ** 0.5))  # a sample is enough for six numbers
    sample, values = terms[::step, ::step].reshape(-1, 6), grey[::step, ::step].reshape(-1)
    for reach in (60.0, 30.0, 15.0):
        near = np.abs(values - paper[::step, ::step].reshape(-1)) < reach
        if near.sum() < 100:
            break
        fitted = np.linalg.lstsq(sample[near], values[near], rcond=None)[0]
        paper = (terms @ fitted).astype(np.float32)
    return paper


def local_ink(grey: Grey) -> tuple[Grey, float]:
    """Return ink and noise against a paper that is as sharp as the edges of its shadows.

    A morphological closing fills what is dark and narrower than a window, an opening what is
    light. Ink is dark where more is darker than the border's shadow than lighter than its light.
    In a shadow ink differs less from its paper: it is scaled by the light there.
    """
    size = max(3, round(_WINDOW * min(grey.shape)))
    calm = np.asarray(ndimage.median_filter(grey, 3), np.float32)
    low, high = np.quantile(border_of(calm), (0.1, 0.9))
    if np.maximum(low - calm, 0).sum() > np.maximum(calm - high, 0).sum():
        paper = ndimage.grey_closing(calm, size)
        rest = (paper - calm) * (paper.max() / np.maximum(paper, 0.2 * paper.max()))
    else:
        rest = calm - ndimage.grey_opening(calm, size)
    rest = np.asarray(rest - np.median(rest))
    rest = np.asarray(ndimage.grey_opening(rest, (3, 3)))  # the steps of a slanting edge
    noise = max(1.0, 1.4826 * float(np.median(np.abs(rest))))
    return np.maximum(rest, 0).astype(np.float32), noise


def _apart(grey: Grey, paper: Grey) -> tuple[Grey, float]:
    """Return ink in its direction, and the noise of the paper."""
    rest = grey - paper
    near = np.abs(rest) < max(15.0, 0.2 * float(np.abs(rest).max()))
    noise = 1.4826 * float(np.median(np.abs(rest[near]))) if near.any() else 0.0
    sign = -1.0 if float(rest[~near].sum()) < 0 else 1.0
    return np.maximum(sign * rest, 0).astype(np.float32), noise
