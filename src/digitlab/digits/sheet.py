"""Find the sheet in a picture: the paper on a table, the plot in a figure, the box of a form."""

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from digitlab.digits.ink import Grey, Mask, ink_of, local_ink, peak_of

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
        sheet = _tone(grey)
        if sheet is None or _is_crossed(sheet, grey):  # a shadow's edge
            sheet = _box(grey)
        if sheet is None or _is_crossed(sheet, grey):
            break
        grey = _cut_out(grey, sheet)
    return grey


def _box(grey: Grey) -> Mask | None:
    """Return the largest sheet that lines enclose."""
    ink, noise = ink_of(grey)
    paper = ink <= max(0.3 * peak_of(ink), 4 * noise)
    paper[[0, -1]] = paper[:, [0, -1]] = True  # what touches the edge is not enclosed
    return _region(paper)


def _tone(grey: Grey) -> Mask | None:
    """Return the largest sheet that is lighter, or darker, than its surroundings."""
    block = max(1, max(grey.shape) // 200)  # fine enough for a sheet
    image = Image.fromarray(grey)
    calm = ndimage.median_filter(np.asarray(image.reduce(block)), 5)  # without grain and lines
    light = calm > _threshold(calm)
    found = [sheet for sheet in map(_region, (light, ~light)) if sheet is not None]
    if not found:
        return None
    whole = np.kron(max(found, key=np.sum), np.ones((block, block), bool))
    return whole[: grey.shape[0], : grey.shape[1]]


def _threshold(levels: Grey) -> float:
    """Return the level that parts them best into two classes (Otsu 1979)."""
    counts, edges = np.histogram(levels, 64)
    middle = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(counts)[:-1], np.cumsum(counts * middle)
    spread = (total[-1] * below / levels.size - total[:-1]) ** 2 / (below * (levels.size - below))
    return float(edges[1 + int(spread.argmax())])


def _region(tone: Mask) -> Mask | None:
    """Return the largest connected part of a mask that is a sheet, with its ink."""
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
    return max(found, key=np.sum, default=None)


def _is_crossed(sheet: Mask, grey: Grey) -> bool:
    """Whether ink goes on beyond a sheet: then its edge is that of a shadow."""
    ink, noise = local_ink(grey)
    labels, count = ndimage.label(ink > max(0.3 * peak_of(ink), 4 * noise))
    names = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(sheet | True, labels, names)
    inside = ndimage.sum_labels(sheet, labels, names) / np.maximum(sizes, 1)
    framed = np.ones_like(sheet)
    framed[1:-1, 1:-1] = False
    sizes[np.unique(labels[framed])[1:] - 1 if count else []] = 0  # the table
    crossing = (inside > 0.1) & (inside < 0.9)
    return bool((sizes[crossing] > 0.2 * sizes.max(initial=0)).any())


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
