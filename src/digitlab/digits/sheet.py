"""Find the sheet in a picture: the paper on a table, the plot in a figure, the box of a form."""

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from digitlab.digits.ink import Grey, Mask, ink_of, peak_of

_SHEET = 0.06  # of the picture that a sheet covers at least
_INK = (0.002, 0.5)  # of a sheet that is ink
_POLYGON = 0.95  # of its hull that six corners hold: of an ellipse they hold 0.83
_SOLID = 0.93  # of its hull that a sheet fills


def find_sheet(grey: Grey) -> Grey:
    """Return the part of a picture that the ink is on, what is around it painted like paper.

    A sheet is a region that differs from its surroundings, has straight edges, and has ink inside;
    the picture itself is returned where it has none.
    """
    for _ in range(3):  # on a table, of a form, in a box
        sheet = _region(_tones(grey))
        if sheet is None:
            ink, noise = ink_of(grey)
            lines = ink > max(0.3 * peak_of(ink), 4 * noise)
            sheet = _region([~lines])
        if sheet is None:
            return grey
        grey = _cut_out(grey, sheet)
    return grey


def _tones(grey: Grey) -> list[Mask]:
    """Return what is light, and what is dark, without the grain of a table and thin lines."""
    calm = ndimage.median_filter(grey, max(3, min(grey.shape) // 40))
    counts, edges = np.histogram(calm, 64)
    middle = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(counts), np.cumsum(counts * middle)
    with np.errstate(divide="ignore", invalid="ignore"):  # Otsu 1979
        spread = (total[-1] * below / below[-1] - total) ** 2 / (below * (below[-1] - below))
    light = calm > edges[1 + int(np.nanargmax(spread[:-1]))] if calm.min() < calm.max() else None
    return [] if light is None else [light, ~light]


def _region(tones: list[Mask]) -> Mask | None:
    """Return the largest sheet among the connected parts of some masks."""
    found: list[Mask] = []
    for tone in tones:
        labels, _ = ndimage.label(tone)
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        for label in np.flatnonzero(sizes > _SHEET * (1 - _INK[1]) * tone.size):
            part = labels == label
            whole = ndimage.binary_fill_holes(part)
            ink = 1 - float(part.sum()) / float(whole.sum())
            if whole.mean() > _SHEET and _INK[0] < ink < _INK[1] and _is_sheet(whole):
                found.append(whole)
    return max(found, key=np.sum) if found else None


def _is_sheet(whole: Mask) -> bool:
    """Whether a region without holes is a polygon, and leaves two corners of the picture free."""
    if whole[:: len(whole) - 1, :: len(whole[0]) - 1].sum() > 2:
        return False
    rows = np.flatnonzero(whole.any(1))
    first, last = whole[rows].argmax(1), whole.shape[1] - whole[rows, ::-1].argmax(1)
    points = np.concatenate([np.c_[y, x] for y in (rows, rows + 1) for x in (first, last)])
    try:
        hull = points[ConvexHull(points).vertices].astype(float)
    except QhullError:  # all on one line
        return False
    area = _area(hull)
    corners = hull
    while len(corners) > 6:  # leave out the corner that holds least
        before, after = np.roll(corners, 1, 0) - corners, np.roll(corners, -1, 0) - corners
        lost = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0])
        corners = np.delete(corners, lost.argmin(), 0)
    return bool(_area(corners) > _POLYGON * area and whole.sum() > _SOLID * area)


def _area(corners: np.ndarray) -> float:
    y, x = corners.T
    return abs(float(y @ np.roll(x, 1) - x @ np.roll(y, 1))) / 2


def _cut_out(grey: Grey, sheet: Mask) -> Grey:
    """Return the box around a sheet, without its edges, where shadows and frames are."""
    rows, columns = ndimage.find_objects(sheet.astype(np.uint8))[0]
    sheet, grey = sheet[rows, columns], grey[rows, columns]
    edge = 2 + min(sheet.shape) // 50
    depth = ndimage.distance_transform_edt(np.pad(sheet, 1))[1:-1, 1:-1]
    inner = depth > edge
    nearest = ndimage.distance_transform_edt(
        ~inner, return_distances=False, return_indices=True
    )
    return np.asarray(grey[tuple(nearest)], np.float32)
