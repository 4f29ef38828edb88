"""Find the sheet in a picture: the paper on a table, the plot in a figure, the box of a form."""

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from digitlab.digits.decode import Grey
from digitlab.digits.ink import Mask, ink_of, local_ink, peak_of

_SHEET = 0.06  # of the picture that a sheet covers at least
_INK = (0.002, 0.5)  # of a sheet that is ink
_BESIDE = 0.005  # of its area, below which what stands outside is a text that names it
_LEAST_STEP = 16.0  # grey levels between tones
_POLYGON = 0.95  # of its hull that six corners hold: of an ellipse they hold 0.83
_SOLID = 0.93  # of its hull that a sheet fills


def find_sheet(grey: Grey) -> tuple[Grey, Mask]:
    """Return the part of a picture that the ink is on, and which pixels of it are the sheet's.

    What is around the sheet is painted like its paper.

    A sheet is a region that differs from its surroundings, has straight edges, and has ink inside;
    the picture itself is returned where it has none.
    """
    inner = np.ones(grey.shape, bool)
    for _ in range(3):  # on a table, of a form, in a box
        candidates = (sheet for find in (_boxes, _tones) for sheet in find(grey))
        sheet = next((sheet for sheet in candidates if _holds_ink(sheet, grey)), None)
        if sheet is None:
            break
        box = ndimage.find_objects(sheet.astype(np.uint8))[0]
        sheet = _without_edge(sheet[box])
        grey, inner = _cut_out(grey[box], sheet), inner[box] & sheet
    return grey, inner


def _boxes(grey: Grey) -> list[Mask]:
    """Return sheets that lines enclose."""
    ink, noise = ink_of(grey)
    paper = ink <= max(0.3 * peak_of(ink), 4 * noise)
    paper[[0, -1]] = paper[:, [0, -1]] = True  # what touches the edge is not enclosed
    return _sheets(paper)


def _tones(grey: Grey) -> list[Mask]:
    """Return sheets that are lighter, or darker, than their surroundings."""
    block = max(1, max(grey.shape) // 200)  # fine enough for a sheet
    calm = ndimage.median_filter(np.asarray(Image.fromarray(grey).reduce(block)), 5)  # of grain
    if np.ptp(calm) < _LEAST_STEP:
        return []
    middle = _threshold(calm)
    light = calm > middle
    parts = [light, ~light]
    # Where a shadow lies on a sheet and its table there are more than two tones.
    parts += [calm > _threshold(calm[~light]), calm <= _threshold(calm[light])]
    height, width = grey.shape
    return [
        np.kron(sheet, np.ones((block, block), bool))[:height, :width]
        for part in parts
        for sheet in _sheets(part)
        if _has_edge(sheet, calm)
    ]


def _has_edge(sheet: Mask, calm: Grey) -> bool:
    """Whether levels change at once at a sheet's edge, and not by and by as light does."""
    outside = ndimage.binary_dilation(sheet, iterations=3) & ~sheet
    inside = ndimage.binary_dilation(~sheet, iterations=3) & sheet
    return abs(float(np.median(calm[outside]) - np.median(calm[inside]))) > _LEAST_STEP


def _threshold(levels: Grey) -> float:
    """Return the level that parts them best into two classes (Otsu 1979)."""
    low, high = float(levels.min()), float(levels.max())
    if high - low < 0.01:  # levels; as numpy does where all are equal: it makes no finer classes
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(levels, 64, (low, high))
    middle = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(counts)[:-1], np.cumsum(counts * middle)
    rest = np.maximum(below * (levels.size - below), 1)
    spread = (total[-1] * below / levels.size - total[:-1]) ** 2 / rest
    return float(edges[1 + int(spread.argmax())])


def _sheets(tone: Mask) -> list[Mask]:
    """Return the connected parts of a mask that are sheets, with their ink."""
    labels, _ = ndimage.label(tone)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # the rest
    found: list[Mask] = []
    for label in np.flatnonzero(sizes > _SHEET * (1 - _INK[1]) * tone.size):
        part = labels == label
        whole = ndimage.binary_fill_holes(part)
        ink = 1 - float(part.sum()) / float(whole.sum())
        if whole.mean() > _SHEET and _INK[0] < ink < _INK[1] and _is_sheet(whole):
            found.append(whole)
    return sorted(found, key=np.sum, reverse=True)


def _holds_ink(sheet: Mask, grey: Grey) -> bool:
    """Whether no large shape of ink goes on beyond a sheet, or stands outside."""
    ink, noise = local_ink(grey)
    labels, count = ndimage.label(ink > max(0.3 * peak_of(ink), 4 * noise))
    names = np.arange(count + 1)
    sizes = np.bincount(labels.ravel())
    inside = ndimage.sum_labels(sheet, labels, names) / sizes
    sizes[np.unique([*labels[[0, -1]].ravel(), *labels[:, [0, -1]].ravel(), 0])] = 0  # the table
    within = ndimage.find_objects(sheet.astype(np.uint8))[0]
    for name, box in enumerate(ndimage.find_objects(labels), 1):
        encloses = all(
            b.start <= w.start and w.stop <= b.stop for b, w in zip(box, within, strict=True)
        )
        if encloses and inside[name] < 0.5:  # a frame, and no ink that fills its sheet
            sizes[name] = 0
    large = sizes > max(0.2 * sizes.max(), _BESIDE * float(sheet.sum()))
    return bool((inside[large] > 0.9).all())


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


def _without_edge(sheet: Mask) -> Mask:
    """Leave out its edges, where shadows and frames are."""
    edge = 2 + min(sheet.shape) // 50
    depth = ndimage.distance_transform_edt(np.pad(sheet, 1))[1:-1, 1:-1]
    return np.asarray(depth > edge)


def _cut_out(grey: Grey, inner: Mask) -> Grey:
    """Paint what is not inside the sheet like the nearest paper."""
    ink, _ = local_ink(_painted(grey, inner))
    paper = inner & (ink < 0.3 * peak_of(ink))  # ink that ends at the edge does not go on
    return np.where(inner, grey, _painted(grey, paper))


def _painted(grey: Grey, paper: Mask) -> Grey:
    """Paint all else like the nearest paper."""
    nearest = ndimage.distance_transform_edt(~paper, return_distances=False, return_indices=True)
    painted: Grey = grey[tuple(nearest)]
    return painted
