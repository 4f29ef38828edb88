"""Prepare new images as MNIST's were: light on dark, in a box of 20x20, centred by mass."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from digitlab.base.errors import UserError
from digitlab.data.datasets import KNOWN, find_known
from digitlab.digits.decode import Grey
from digitlab.digits.ink import Mask, border_of, ink_of, peak_of
from digitlab.digits.lines import without_lines
from digitlab.digits.sheet import find_sheet

SIDE, BOX = 28, 20  # pixels, of the image and of the digit in it (LeCun et al. 1998)
_LEAST_CONTRAST = 16.0  # grey levels of 255 between paper and ink
_SMALLEST = 8  # pixels of the larger side of a digit that can be read
# Stroke widths in pixels of the 20x20 box, between which 98 of 100 of MNIST's digits lie,
# measured on 1,500 of them enlarged eight times.
_THINNEST, _THICKEST = 1.5, 5.3
_WIDEST = 2.5  # times its height: no digit of the 60,000 that MNIST has for training is wider
# Times its width: what is longer and reaches from edge to edge is a ruled line or a crease.
_LINE = 20


@dataclass(frozen=True)
class Prepared:
    """`image` uint8 (28, 28), black where nothing was found; `problem` is the reason."""

    image: NDArray[np.uint8]
    problem: str = ""


def prepare_as(grey: Grey, data: str, lab: Path, keeps_lines: bool = True) -> Prepared:
    """Prepare a grey picture as the images of a data set were: by `prepare`, or scaled alone."""
    if is_centred(data, lab):
        return prepare(grey, keeps_lines)
    image = scale(grey)
    is_light = float(np.median(border_of(image))) > 127
    # Kuzushiji-MNIST is light on dark; of data of one's own nothing is known.
    return Prepared(255 - image if is_light and data in KNOWN else image)


def is_centred(data: str, lab: Path) -> bool:
    """Whether the images of a data set show their ink alone, centred as MNIST's."""
    try:
        return find_known(data, lab).is_centred
    except UserError:  # a run that was recorded elsewhere
        return True


def scale(grey: Grey) -> NDArray[np.uint8]:
    """Return a picture as (28, 28); one that is no square is filled up from its edges."""
    missing = [max(grey.shape) - side for side in grey.shape]
    square = np.pad(grey, [(gap // 2, gap - gap // 2) for gap in missing], "edge")
    small = Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small).round().clip(0, 255).astype(np.uint8)


class _NoDigitError(Exception):
    """There is no single digit in the picture; the text is the reason."""


def prepare(grey: Grey, keeps_lines: bool = True) -> Prepared:
    """Find one digit in a grey picture (H, W) of 0 to 255, of either polarity.

    Paper and its shading are removed, specks and what touches the edge left out; the tight box
    around the rest is brought to 20x20 pixels by area with its aspect kept, strokes that no digit
    of MNIST has are made thinner or thicker, and the centre of mass is put into the middle.

    Args:
        keeps_lines: whether a line from edge to edge is ink like any other. It may be the bar of
            a 7 that was cut out tight, or a rule of the paper.
    """
    try:
        return Prepared(_centred(_boxed(_digit(grey, keeps_lines))))
    except _NoDigitError as error:
        return Prepared(np.zeros((SIDE, SIDE), np.uint8), str(error))


def _digit(grey: Grey, keeps_lines: bool) -> Grey:
    """Return the ink of the one digit, 0 to 1, in its tight box."""
    sheet, inner = find_sheet(grey)
    ink, noise = ink_of(sheet)
    peak = peak_of(ink)
    if peak < max(_LEAST_CONTRAST, 6 * noise):
        raise _NoDigitError("nothing stands out from its background")
    clean = float((ink == 0).mean()) > 0.5 and noise == 0
    floor = 0.0 if clean else max(4 * noise, 0.12 * peak)
    ink = np.clip((ink - floor) / (peak - floor), 0, 1).astype(np.float32)
    ink = ink if keeps_lines else without_lines(ink)
    least = 0.0 if clean else 0.2
    while least < 0.5 and _is_ruled(ink > least):  # with lines that are fainter than its ink
        least += 0.15
        ink = np.clip((ink - 0.15) / 0.85, 0, 1)
    kept = _shapes(ink, ink > least, inner)
    ink = _cut(np.where(kept, ink, 0).astype(np.float32))
    if max(ink.shape) < _SMALLEST:
        raise _NoDigitError(f"what there is has fewer than {_SMALLEST} pixels a side")
    if ink.shape[1] > _WIDEST * ink.shape[0]:
        raise _NoDigitError("it is wider than any digit")
    return ink


def _boxed(ink: Grey) -> Grey:
    """Return a digit, cut tight, of a usual stroke width and reduced by area to 20 pixels."""
    if max(ink.shape) > 1.4 * BOX:  # drawn larger: the box ends where ink is half of full
        ink = _cut(ink, 0.5 * float(ink.max()))
    ink = _stroke(ink)
    height, width = ink.shape
    scale = BOX / max(height, width)
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    return (_overlap(height, rows) @ ink @ _overlap(width, columns).T).astype(np.float32)


def _shapes(ink: Grey, mask: Mask, inner: Mask) -> Mask:
    """Return the pixels of the shapes that make up the one digit.

    Args: inner: the pixels of the sheet; what reaches beyond it touches its edge.
    """
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        raise _NoDigitError("nothing stands out from its background")
    weights = ndimage.sum_labels(ink, labels, np.arange(1, count + 1))
    boxes = ndimage.find_objects(labels)
    margin = 1 + np.array(mask.shape) // 150
    inside = np.array([_is_inside(box, margin, mask.shape) for box in boxes])
    inside &= ndimage.sum_labels(~inner, labels, np.arange(1, count + 1)) == 0
    weights[[_is_line(box, mask.shape) for box in boxes]] = 0
    if not weights.any():
        raise _NoDigitError("a line from edge to edge")
    if not inside.all() and weights[inside].max(initial=0) > 0.1 * weights.max():
        strokes = _is_stroke(mask, labels, weights, int((inside * weights).argmax()))
        weights = np.where(inside | strokes, weights, 0)
    large = weights > 0.04 * weights.max()
    if large.sum() > 12:
        raise _NoDigitError(f"{int(large.sum())} shapes, which make no digit")
    wide = [boxes[i] for i in np.flatnonzero(weights > 0.3 * weights.max())]
    wide.sort(key=lambda box: box[1].start)
    for left, right in pairwise(wide):
        short, tall = sorted(b[0].stop - b[0].start for b in (left, right))
        if right[1].start >= left[1].stop and short > 0.6 * tall:
            raise _NoDigitError("more than one digit: cut them apart")
    kept = np.isin(labels, 1 + np.flatnonzero(large))
    if kept.mean() > 0.7:
        raise _NoDigitError("more ink than paper")
    return kept


def _is_inside(box: tuple[slice, ...], margin: NDArray[np.int_], shape: tuple[int, ...]) -> bool:
    sides = zip(box, margin, shape, strict=True)
    return all(
        bool(part.start >= least and part.stop <= side - least) for part, least, side in sides
    )


def _is_stroke(
    mask: NDArray[np.bool_], labels: NDArray[np.integer], weights: NDArray[np.floating], first: int
) -> NDArray[np.bool_]:
    """Return which shapes are strokes of the digit of shape `first`, as the body of a 5's bar.

    Edges of the paper, shadows and fingers are wider, run along the edge, or are further away.
    """
    boxes = ndimage.find_objects(labels)
    names = np.arange(1, len(boxes) + 1)
    half = np.asarray(ndimage.maximum(ndimage.distance_transform_edt(mask), labels, names))
    reach = _length(boxes[first])
    near = [
        all(
            a.start < b.stop + reach and b.start < a.stop + reach
            for a, b in zip(box, boxes[first], strict=True)
        )
        and _length(box) < 0.8 * min(mask.shape)
        for box in boxes
    ]
    stroke: NDArray[np.bool_] = (half < 1.6 * half[first]) & (weights > 0.2 * weights[first])
    stroke &= np.array(near)
    return stroke


def _length(box: tuple[slice, ...]) -> int:
    return max(int(part.stop - part.start) for part in box)


def _is_ruled(mask: NDArray[np.bool_]) -> bool:
    """Whether a connected shape goes from edge to edge."""
    boxes = ndimage.find_objects(ndimage.label(mask)[0])
    height, width = mask.shape
    return any(y.stop - y.start == height or x.stop - x.start == width for y, x in boxes)


def _is_line(box: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    height, width = (int(part.stop - part.start) for part in box)
    upright = height == shape[0] and height > _LINE * width
    return upright or (width == shape[1] and width > _LINE * height)


def _cut(ink: Grey, least: float = 0.0) -> Grey:
    """Return the tight box around all ink above `least`."""
    mask = ink > least
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def stroke_width(ink: Grey) -> float:
    """Return the stroke width of a digit cut tight, in pixels of the 20x20 box.

    In a strip, the mean distance to the edge is a quarter of its width.
    """
    mask = np.pad(ink > 0.5, 1)
    if not mask.any():
        return 0.0
    distance = ndimage.distance_transform_edt(mask)
    # The transform measures to the next pixel's centre: half a pixel more than to the edge.
    width = 4 * (float(np.mean(distance[mask])) - 0.5) + 1
    return float(width * BOX / max(ink.shape))


def _stroke(ink: Grey) -> Grey:
    """Bring strokes that are thinner or thicker than MNIST's to its limits."""
    side = max(ink.shape)
    if side < 2 * BOX:  # too coarse to be changed by less than a pixel
        return ink
    width = stroke_width(ink)
    pixel = side / BOX
    if 0 < width < _THINNEST:
        change = (_THINNEST - width) / 2 * pixel
        room = int(np.ceil(change)) + 1
        ink = np.pad(ink, room)
        away = ndimage.distance_transform_edt(ink <= 0.5)
        return _cut(np.maximum(ink, np.clip(change + 0.5 - away, 0, 1)).astype(np.float32))
    if width > _THICKEST:
        change = (width - _THICKEST) / 2 * pixel
        deep = ndimage.distance_transform_edt(np.pad(ink > 0.5, 1))[1:-1, 1:-1]
        thin = np.clip(deep - change, 0, 1).astype(np.float32)
        return _cut(thin) if thin.max() > 0.5 else ink
    return ink


def _overlap(given: int, asked: int) -> Grey:
    """Return the matrix (asked, given) of a resampling by area; Pillow's BOX takes whole pixels."""
    edges = np.arange(asked + 1) * given / asked
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(given)[None]
    shared = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)
    parts: Grey = (shared * asked / given).astype(np.float32)
    return parts


def _centred(small: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Place it in 28x28, its centre of mass as near to the middle as whole pixels allow."""
    centre, room = np.array(ndimage.center_of_mass(small)), SIDE - np.array(small.shape)
    top, left = np.clip(np.rint(SIDE / 2 - centre), 0, room).astype(int)
    placed = np.zeros((SIDE, SIDE), np.float32)
    placed[top : top + small.shape[0], left : left + small.shape[1]] = small
    return np.clip(np.rint(placed * 255), 0, 255).astype(np.uint8)
