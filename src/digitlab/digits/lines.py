"""Take straight lines out of the ink: of ruled paper, of a crease, of what is crossed out."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from digitlab.digits.decode import Grey
from digitlab.digits.ink import Mask

# Chosen on validation images of MNIST with lines across them.
_INK, _FAINT = 0.5, 0.2  # of full ink: what a line has along its middle, and beside it
_WHOLE = 0.97  # of a line's length that has ink
_STEADY = 0.8  # of its length over which it is as thick as it is taken to be
_REACH = 0.12  # of the picture's side, to each side of the middle of the thickest line
_LEAST = 0.15  # of the picture's side, for what is left to be a digit
_MOST = 40  # lines of one picture
_MARGIN = 0.05  # of a side, at each edge: the filters that find ink may find none there
_CELLS = 40  # a side of the coarse picture in which lines are looked for first
# Pixels beside a line that are taken with it in a picture of 28x28, and for how many more of a side
# they are one more: there lines are blurred.
_SLACK, _STEP = (0.75, 1.25, 1.75, 2.5, 3.5), 130

Point = NDArray[np.integer]  # row and column
Points = NDArray[np.integer]  # (N, 2)


def without_lines(ink: Grey) -> Grey:
    """Return ink (H, W) of 0 to 1 without the straight lines that cross it from edge to edge.

    A stroke that crosses a line goes on through it. The ink is returned as it is where what would
    be left touches an edge, or is too small for a digit: its lines may be strokes.
    """
    rest, box = ink.copy(), _reached(ink > _INK)
    for _ in range(_MOST):
        ends = _find_line(rest[box])
        if ends is None:
            break
        cleaned = _without(rest[box], *ends)
        if np.array_equal(cleaned, rest[box]):  # of what is all ink
            break
        rest[box] = cleaned
    left = rest[box] > _INK
    boxes = ndimage.find_objects(ndimage.label(left)[0])
    longest = max((part.stop - part.start for box in boxes for part in box), default=0)
    is_digit = not _edge_points(left).size and longest > _LEAST * min(left.shape)
    return rest if is_digit else ink


def _reached(mask: Mask) -> tuple[slice, slice]:
    """Return the picture without the few pixels at its edges in which no ink is found."""
    height, width = mask.shape
    gap, most = 0, int(_MARGIN * min(height, width))
    while gap < most and not _edge_points(mask[gap : height - gap, gap : width - gap]).size:
        gap += 1
    return slice(gap, height - gap), slice(gap, width - gap)


def _edge_points(mask: Mask) -> Points:
    """Return the pixels of a mask at the edge of its picture."""
    edge = mask.copy()
    edge[1:-1, 1:-1] = False
    return np.argwhere(edge)


def _find_line(ink: Grey) -> tuple[Point, Point] | None:
    """Return the two ends of the line that lies deepest in the ink; None where there is none."""
    mask = ink > _INK
    block = -(-max(mask.shape) // _CELLS)
    padded = np.pad(mask, [(0, -side % block) for side in mask.shape])
    rows, columns = (side // block for side in padded.shape)
    coarse: Mask = np.asarray(padded.reshape(rows, block, columns, block).any((1, 3)))
    points = _edge_points(coarse)
    ends = _best_line(points, points, coarse)
    if ends is None or block == 1:
        return ends
    points = _edge_points(mask)
    near = [points[(np.abs(points // block - end) <= 1).all(1)] for end in ends]
    return _best_line(near[0], near[1], mask)


def _best_line(begins: Points, ends: Points, mask: Mask) -> tuple[Point, Point] | None:
    """Return the line from one of some pixels to one of others that lies deepest in the ink."""
    i, j = (index.ravel() for index in np.indices((len(begins), len(ends))))
    is_across = np.abs(begins[i] - ends[j]).max(1, initial=0) >= max(1, min(mask.shape) - 1)
    first, last = begins[i[is_across]], ends[j[is_across]]
    steps = np.linspace(0, 1, max(mask.shape))[:, None]
    paths = first[:, None] + (last - first)[:, None] * steps
    # The pixels of a line lie up to one beside the straight one.
    near = ndimage.binary_dilation(mask, np.ones((3, 3), bool))
    rows, columns = np.moveaxis(np.rint(paths).astype(int), 2, 0)
    is_whole = near[rows, columns].mean(1) >= _WHOLE
    if not is_whole.any():
        return None
    depth = ndimage.distance_transform_edt(mask)
    depths = ndimage.map_coordinates(depth, np.moveaxis(paths[is_whole], 2, 0), order=1)
    best = int(np.median(depths, 1).argmax())
    return first[is_whole][best], last[is_whole][best]


def _without(ink: Grey, begin: Point, end: Point) -> Grey:
    """Return ink without one line: what is above and below it goes on through it."""
    down, right = np.abs(end - begin)
    if down > right:
        return _without(ink.T, begin[::-1], end[::-1]).T
    slope = (end[0] - begin[0]) / (end[1] - begin[1])
    middle = begin[0] + (np.arange(ink.shape[1]) - begin[1]) * slope  # of the line, by column
    away = np.arange(len(ink))[:, None] - middle
    above, below = (_thickness(ink > _INK, middle, side) for side in (-1, 1))
    rest, blur = ink, max(0, min(ink.shape) - 28) / _STEP
    for slack in np.add(_SLACK, blur):  # as little as takes it off the edges
        rest = _through(ink, (away > -above - slack) & (away < below + slack))
        is_near = np.abs(away) < max(above, below) + slack + 2
        if not _edge_points(is_near & (rest > _FAINT)).size:
            break
    return rest


def _thickness(mask: Mask, middle: NDArray[np.floating], side: int) -> int:
    """Return by how many pixels a line goes beyond its middle, to the side -1 or 1."""
    columns = np.arange(mask.shape[1])
    for more in range(1, max(3, int(_REACH * len(mask)))):
        rows = np.rint(middle + side * more).astype(int)
        inside = (rows >= 0) & (rows < len(mask))
        if not inside.any() or mask[rows[inside], columns[inside]].mean() < _STEADY:
            return more - 1
    return 0  # no line is as thick


def _through(ink: Grey, line: Mask) -> Grey:
    """Return ink with what is above and below a line, in its place where that is less."""
    rest = ink.copy()
    for column, is_line, filled in zip(ink.T, line.T, rest.T, strict=True):
        gone, kept = np.flatnonzero(is_line), np.flatnonzero(~is_line)
        if kept.size:
            filled[gone] = np.minimum(column[gone], np.interp(gone, kept, column[kept]))
    return rest
