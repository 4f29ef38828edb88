"""Digits in the scenes that people photograph and save: each kind is drawn from a seed.

A digit is uint8 (28, 28), light on dark, as MNIST's; a scene is a Pillow image. Used by robust.py
and by the tests of the preparation.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Pixels = NDArray[np.uint8]
Levels = NDArray[np.floating]
_INKS = [(25, 25, 30), (20, 40, 150), (150, 20, 25), (60, 60, 65), (15, 90, 45)]
_PAPERS = [(250, 250, 248), (235, 228, 210), (205, 205, 200), (245, 232, 140), (215, 228, 240)]


def _pick(chance: Generator, colours: list[tuple[int, int, int]]) -> Levels:
    return np.array(colours[int(chance.integers(len(colours)))], float)


def coverage(digit: Pixels, size: int, stroke: float = 0) -> Levels:
    """Draw a digit `size` pixels high with sharp edges: how much of each pixel is ink, 0 to 1.

    Args:
        stroke: by how many pixels of the 28 each edge of the stroke moves outwards.
    """
    fine = Image.fromarray(np.pad(digit, 2)).resize((size, size), Image.Resampling.BICUBIC)
    level = np.asarray(fine, float) / 255
    pixel = size / 32
    if stroke:
        inside = ndimage.distance_transform_edt(level > 0.5)
        outside = ndimage.distance_transform_edt(level <= 0.5)
        return np.clip((inside - outside) + stroke * pixel + 0.5, 0, 1)
    return np.clip((level - 0.5) * max(1.0, pixel / 2) + 0.5, 0, 1)


def page(
    digit: Pixels,
    chance: Generator,
    paper: Levels | None = None,
    ink: Levels | None = None,
    fill: tuple[float, float] = (0.35, 0.75),
    stroke: float = 0,
    ruling: Callable[[ImageDraw.ImageDraw, int], None] | None = None,
) -> Levels:
    """Write a digit on paper with ruling: levels (H, W, 3). It fills a share of the side."""
    side = int(chance.integers(160, 480))
    size = int(side * chance.uniform(*fill))
    paper = _pick(chance, _PAPERS) if paper is None else paper
    ink = _pick(chance, _INKS) if ink is None else ink
    sheet = Image.new("RGB", (side, side), tuple(int(level) for level in paper))
    if ruling is not None:
        ruling(ImageDraw.Draw(sheet), side)
    shape = np.zeros((side, side, 1))
    top, left = chance.integers(2, side - size - 1, 2)
    shape[top : top + size, left : left + size, 0] = coverage(digit, size, stroke)
    return np.asarray(sheet, float) * (1 - shape) + ink * shape


def photo(levels: Levels, chance: Generator) -> Image.Image:
    """Take a photo of it: uneven light, blur, noise and JPEG."""
    height, width = levels.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    slope = chance.uniform(-0.15, 0.15, 2)
    lit = levels * (1 - 0.1 + slope[0] * x + slope[1] * y)[..., None]
    lit = ndimage.gaussian_filter(lit, (chance.uniform(0.3, 1.2),) * 2 + (0,))
    lit += chance.normal(0, chance.uniform(1, 6), lit.shape)
    file = io.BytesIO()
    Image.fromarray(lit.clip(0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=int(chance.integers(60, 95))
    )
    return Image.open(file)


def drawing(levels: Levels) -> Image.Image:
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _on_table(levels: Levels, chance: Generator) -> Levels:
    """Lay a sheet on a darker table, turned and seen at a slant."""
    side = len(levels)
    width, height = (int(side * chance.uniform(1.25, 1.9)) for _ in range(2))
    table = chance.uniform(25, 110, 3) * (0.6, 0.5, 0.4) + chance.uniform(0, 20)
    grain = ndimage.gaussian_filter(chance.normal(0, 1, (height, width)), (1, 12))
    picture = table + 8 * (grain / grain.std())[..., None]
    turn = np.radians(chance.uniform(-15, 15))
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (side / 2)
    turned = square @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    corners = turned + chance.uniform(-0.05, 0.05, (4, 2)) * side + (width / 2, height / 2)
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, square + side / 2, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    seen = np.linalg.solve(np.array(rows), np.array(values))
    sheet = drawing(levels).convert("RGBA")
    laid = sheet.transform(
        (width, height), Image.Transform.PERSPECTIVE, tuple(seen), Image.Resampling.BICUBIC
    )
    opaque = np.asarray(laid.getchannel("A"), float)[..., None] / 255
    shade = ndimage.gaussian_filter(np.roll(opaque, 4, (0, 1)), (3, 3, 0))  # what it casts
    return picture * (1 - 0.4 * shade * (1 - opaque)) * (1 - opaque) + opaque * np.asarray(
        laid.convert("RGB"), float
    )


def _shadow(levels: Levels, chance: Generator) -> Levels:
    """Darken one side of a line through the middle, with a sharp edge."""
    height, width = levels.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle, offset = chance.uniform(0, 2 * np.pi), chance.uniform(-0.3, 0.3)
    reach = np.cos(angle) * x + np.sin(angle) * y - offset
    dark = np.clip(reach * width / 4 + 0.5, 0, 1)[..., None]
    return levels * (1 - chance.uniform(0.3, 0.55) * dark)


def _squared(
    chance: Generator, horizontal: bool = False, ink: Levels | None = None
) -> Callable[[ImageDraw.ImageDraw, int], None]:
    colour = tuple(int(level) for level in chance.uniform((130, 150, 175), (190, 205, 225)))
    colour = colour if ink is None else tuple(int(level) for level in ink)

    def rule(draw: ImageDraw.ImageDraw, side: int) -> None:
        step, width = side * chance.uniform(0.06, 0.2), int(chance.integers(1, 3))
        for place in np.arange(step * chance.random(), side, step):
            draw.line([(0, place), (side, place)], colour, width)
            if not horizontal:
                draw.line([(place, 0), (place, side)], colour, width)

    return rule


def _box(chance: Generator, least: float, width: int) -> Callable[[ImageDraw.ImageDraw, int], None]:
    colour = tuple(int(level) for level in chance.uniform(0, 120, 3))

    def rule(draw: ImageDraw.ImageDraw, side: int) -> None:
        gap = side * chance.uniform(0, least)
        draw.rectangle([gap, gap, side - 1 - gap, side - 1 - gap], outline=colour, width=width)

    return rule


def framed(digit: Pixels, chance: Generator) -> Image.Image:
    inner = (0.4, 0.8)
    return drawing(page(digit, chance, fill=inner, ruling=_box(chance, 0.02, 1)))


def boxed(digit: Pixels, chance: Generator) -> Image.Image:
    """In the box of a form, whose line is as dark as ink."""
    side, size = int(chance.integers(160, 480)), chance.uniform(0.4, 0.62)
    paper, ink = _pick(chance, _PAPERS), _pick(chance, _INKS)
    form = Image.new("RGB", (side, side), tuple(int(level) for level in paper))
    draw, low, high = ImageDraw.Draw(form), int(0.12 * side), int(0.88 * side)
    line, width = (
        tuple(int(level) for level in chance.uniform(0, 110, 3)),
        int(chance.integers(1, 5)),
    )
    for left, right in ((low, high), (high, 2 * high), (-side, low))[: int(chance.integers(1, 4))]:
        draw.rectangle([left, low, right, high], outline=line, width=width)
    shape, whole = np.zeros((side, side, 1)), int(size * side)
    room = (high - low - whole) // 3
    top, left = (
        low + (high - low - whole) // 2 + int(chance.integers(-room, room + 1)) for _ in "yx"
    )
    shape[top : top + whole, left : left + whole, 0] = coverage(digit, whole)
    return photo(np.asarray(form, float) * (1 - shape) + ink * shape, chance)


def figure(digit: Pixels, chance: Generator) -> Image.Image:
    """Save it as matplotlib does: `imshow` in a white figure, with ticks or without."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4, 3))
    axes = drawn.subplots()
    axes.imshow(digit, cmap=["viridis", "gray", "gray_r", "Blues"][int(chance.integers(4))])
    if chance.random() < 0.3:
        axes.axis("off")
    if chance.random() < 0.3:
        axes.set_title("a digit")
    file = io.BytesIO()
    drawn.savefig(file, dpi=int(chance.integers(60, 140)))
    return Image.open(file)


def window(digit: Pixels, chance: Generator) -> Image.Image:
    """A screenshot with a transparent margin around a light or a dark window."""
    dark = chance.random() < 0.4
    paper, ink = (30.0, 235.0) if dark else (245.0, 30.0)
    shot = drawing(page(digit, chance, np.full(3, paper), np.full(3, ink))).convert("RGBA")
    margin = int(chance.integers(5, 60))
    whole = Image.new("RGBA", tuple(side + 2 * margin for side in shot.size), (0, 0, 0, 0))
    whole.paste(shot, (margin, margin))
    return whole


def at_edge(digit: Pixels, chance: Generator) -> Image.Image:
    """So near to an edge of the picture that it touches it."""
    size = int(chance.integers(100, 300))
    shape = coverage(digit, size)
    rows, columns = (np.flatnonzero((shape > 0.5).any(axis)) for axis in (1, 0))
    shape = shape[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    gaps = chance.integers(size // 8, size // 2, 4)
    gaps[int(chance.integers(4))] = 0
    shape = np.pad(shape, gaps.reshape(2, 2))[..., None]
    levels = _pick(chance, _PAPERS) * (1 - shape) + _pick(chance, _INKS) * shape
    return photo(levels, chance)


def ruled_in_ink(digit: Pixels, chance: Generator) -> Image.Image:
    """On ruled or squared paper with lines of the same ink."""
    ink = _pick(chance, _INKS)
    ruling = _squared(chance, chance.random() < 0.5, ink)
    return photo(page(digit, chance, ink=ink, ruling=ruling), chance)


def crossed_out(digit: Pixels, chance: Generator) -> Image.Image:
    """With a straight line from edge to edge across it, of the same ink."""
    ink = _pick(chance, _INKS)

    def rule(draw: ImageDraw.ImageDraw, side: int) -> None:
        begin, end = side * chance.uniform(0, 1, 2)
        line = [(0, begin), (side, end)] if chance.random() < 0.5 else [(begin, 0), (end, side)]
        width = int(side * chance.uniform(0.01, 0.04))
        draw.line(line, tuple(int(level) for level in ink), width)

    return photo(page(digit, chance, ink=ink, ruling=rule), chance)


KINDS: dict[str, Callable[[Pixels, Generator], Image.Image]] = {
    "a drawing, ink and paper of any colour": lambda d, c: drawing(page(d, c)),
    "a photo of paper": lambda d, c: photo(page(d, c), c),
    "blue ink on yellow paper": lambda d, c: photo(
        page(d, c, np.array([245.0, 232, 140]), np.array([20.0, 40, 150])), c
    ),
    "a thin pen": lambda d, c: photo(page(d, c, stroke=-0.4), c),
    "a thick pen": lambda d, c: photo(page(d, c, stroke=0.7), c),
    "a note on a dark table": lambda d, c: photo(_on_table(page(d, c), c), c),
    "squared paper on a dark table": lambda d, c: photo(
        _on_table(page(d, c, ruling=_squared(c)), c), c
    ),
    "a figure of matplotlib": figure,
    "a screenshot with a transparent margin": window,
    "a one-pixel frame": framed,
    "the box of a form": boxed,
    "squared paper": lambda d, c: photo(page(d, c, ruling=_squared(c)), c),
    "ruled paper": lambda d, c: photo(page(d, c, ruling=_squared(c, True)), c),
    "paper with lines as dark as the ink": ruled_in_ink,
    "crossed out by a line from edge to edge": crossed_out,
    "a hard shadow across it": lambda d, c: photo(_shadow(page(d, c), c), c),
    "a note on a table, a shadow across it": lambda d, c: photo(
        _shadow(_on_table(page(d, c), c), c), c
    ),
    "touching the edge of the picture": at_edge,
}


# With lines as dark as the ink: what is read in them is read without the lines.
CROSSED = ("paper with lines as dark as the ink", "crossed out by a line from edge to edge")


def scene(kind: str, digit: Pixels, seed: int) -> Image.Image:
    """Draw a digit in a scene of KINDS; the same seed gives the same picture."""
    return KINDS[kind](digit, np.random.default_rng([seed, *kind.encode()]))
