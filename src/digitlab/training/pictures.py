"""Pictures of what a network misreads, and of how it learned."""

import warnings
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from digitlab.training.film import Frame, learned_last
from digitlab.training.fit import FitResult

# Names of classes may be in any script, of which the font has some.
warnings.filterwarnings("ignore", message="Glyph .* missing")
_MISREAD_SHOWN = 32  # digits


def draw_pictures(fit: FitResult) -> dict[str, bytes]:
    """Return image files by name.

    confusion.png; misread.png where any digit was misread; evolution.png and evolution.gif, which
    moves, of a fit with a film.
    """
    figures = {"confusion.png": _draw_confusion(fit.logits.argmax(1), fit.labels, fit.classes)}
    misread = _draw_misread(fit.logits, fit.labels, fit.images, fit.classes)
    if misread is not None:
        figures["misread.png"] = misread
    files = {name: _to_png(figure) for name, figure in figures.items()}
    if fit.film:
        count = len(fit.film[0].probabilities)
        shown = fit.film, fit.images[:count], fit.labels[:count]
        files["evolution.png"] = _to_png(_draw_film(*shown))
        files["evolution.gif"] = _animate_film(*shown)
    return files


def _to_png(figure: Figure) -> bytes:
    content = BytesIO()
    # zlib's level 6 takes three times as long as level 1, for a tenth of the size.
    figure.savefig(content, format="png", dpi=100, pil_kwargs={"compress_level": 1})
    return content.getvalue()


def _draw_confusion(guesses: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Draw how often each digit was read as each other one."""
    counts = (labels * 10 + guesses).bincount(minlength=100).view(10, 10).numpy()
    figure = Figure(figsize=(6, 5.8))  # placed by hand: a layout engine draws everything twice
    axes = figure.add_axes((0.09, 0.08, 0.88, 0.86))
    wrong = counts * (1 - np.eye(10, dtype=int))
    axes.imshow(wrong, cmap="Reds", vmin=0, vmax=max(1, wrong.max()))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            ink = "white" if wrong[row, column] > 0.6 * wrong.max() else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=ink)
    axes.set(xlabel="read as", ylabel="is")
    short = [name[:7] for name in classes]
    axes.set_xticks(range(10), short, fontsize=8, parse_math=False)
    axes.set_yticks(range(10), short, fontsize=8, parse_math=False, rotation=90)
    correct, total = int(np.trace(counts)), int(counts.sum())
    title = f"{total - correct} of {total} misread ({correct / total:.2%} right)"
    axes.set_title(title, fontsize=10)
    return figure


def _draw_misread(
    logits: Tensor, labels: Tensor, images: Tensor, classes: Sequence[str]
) -> Figure | None:
    """Draw the most confident mistakes, or return None where there are none."""
    guesses = logits.argmax(1)
    gaps = logits.max(1).values - logits.gather(1, labels[:, None])[:, 0]  # guess over truth
    worst = [int(i) for i in gaps.argsort(descending=True)[:_MISREAD_SHOWN] if gaps[i] > 0]
    if not worst:
        return None
    columns, cell = 8, 40  # pixels: the digit's 28, a line of text, space
    rows = -(-len(worst) // columns)
    figure = Figure(figsize=(columns * 1.1, rows * 1.1))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    # One mosaic, since a figure of 32 axes takes ten times as long.
    mosaic = np.full((rows * cell, columns * cell), 255, np.uint8)
    for place, i in enumerate(worst):
        y, x = place // columns * cell, place % columns * cell
        mosaic[y + 10 : y + 38, x + 6 : x + 34] = 255 - images[i, 0].numpy()
        title = f"{classes[int(labels[i])]} read as {classes[int(guesses[i])]}"
        axes.text(x + cell / 2, y + 8, title, ha="center", va="bottom", fontsize=6,
                  parse_math=False)  # fmt: skip
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
    return figure


def _draw_film(film: Sequence[Frame], images: Tensor, labels: Tensor) -> Figure:
    """Draw how sure the network was of ten digits, moment by moment, and its first filters.

    Args:
        film: frames in their order; of many, nine are shown.
        images, labels: uint8 (N, 1, 28, 28) and (N,), of which the ten learned last are shown.
    """
    film = _some(film, 9)
    shown = learned_last([frame.probabilities for frame in film], labels)
    painted = [_paint_frame(frame, labels, shown) for frame in film]
    canvas = np.hstack([_paint_digits(images, shown), *painted])
    width, tall = canvas.shape[1] / 90, canvas.shape[0] / 90
    figure = Figure(figsize=(width, tall + 0.8))
    axes = figure.add_axes((0.01, 0.5 / (tall + 0.8), 0.98, tall / (tall + 0.8)))
    for column, frame in enumerate(film):
        middle = _DIGIT + (column + 0.5) * _FRAME
        axes.text(middle, -4, frame.moment, ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("above: filters of the first layer; a row an image: probability of each\n"
                    "class, the right one dark", fontsize=8)  # fmt: skip
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    return figure


def _animate_film(film: Sequence[Frame], images: Tensor, labels: Tensor) -> bytes:
    """Return the same as an animated GIF, a frame a moment."""
    film, pictures = _some(film, _MOST_FRAMES), []
    shown = learned_last([frame.probabilities for frame in film], labels)
    digits = _paint_digits(images, shown)
    for frame in film:
        canvas = np.hstack([digits, _paint_frame(frame, labels, shown)])
        titled = np.vstack([np.full((16, canvas.shape[1]), 0.97), canvas])
        picture = Image.fromarray((255 * titled).astype(np.uint8)).resize(
            (2 * titled.shape[1], 2 * titled.shape[0]), Image.Resampling.NEAREST
        )
        ImageDraw.Draw(picture).text((2 * _DIGIT, 8), frame.moment, fill=0, font_size=18)
        pictures.append(picture)
    content, last = BytesIO(), 4 * _FRAME_MS
    times = [*[_FRAME_MS] * (len(pictures) - 1), last]
    pictures[0].save(content, "GIF", save_all=True, append_images=pictures[1:], duration=times,
                     loop=0)  # fmt: skip
    return content.getvalue()


# Pixels: the column of digits, a frame, the row of a digit, the filters above.
_DIGIT, _FRAME, _ROW, _TOP = 40, 130, 30, 40
_FRAME_MS, _MOST_FRAMES = 500, 60


def _some(film: Sequence[Frame], most: int) -> list[Frame]:
    """Return the frames, or as many of them, the first and the last included."""
    places = np.unique(np.linspace(0, len(film) - 1, min(most, len(film))).round().astype(int))
    return [film[place] for place in places]


def _paint_digits(images: Tensor, shown: Sequence[int]) -> np.ndarray:
    """Return the images at these places, one above the other: 0 is black, 1 white."""
    canvas = np.full((_TOP + len(shown) * _ROW, _DIGIT), 0.97)
    for row, image in enumerate(images[shown, 0].numpy()):
        canvas[_TOP + row * _ROW + 1 : _TOP + row * _ROW + 29, 4:32] = 1 - image / 255
    return canvas


def _paint_frame(frame: Frame, labels: Tensor, shown: Sequence[int]) -> np.ndarray:
    """Return a frame: filters, and what the network makes of the images at these places."""
    canvas = np.full((_TOP + len(shown) * _ROW, _FRAME), 0.97)
    _tile(canvas[4 : _TOP - 6, : _FRAME - 10], frame.filters.numpy())
    for row, image in enumerate(shown):
        base = _TOP + (row + 1) * _ROW - 3
        for digit, probability in enumerate(frame.probabilities[image].tolist()):
            bar = canvas[base - 1 - round(24 * probability) : base, 12 * digit :]
            bar[:, 1:11] = 0.15 if digit == labels[image] else 0.6
    return canvas


def _tile(canvas: np.ndarray, filters: np.ndarray) -> None:
    """Paint as many filters side by side into the canvas as fit, each magnified alike."""
    if not filters.size:
        return
    reach = np.abs(filters).max() or 1.0
    magnified = np.kron(0.5 + 0.5 * filters / reach, np.ones((1, 4, 4)))
    step = magnified.shape[1] + 2
    across = canvas.shape[1] // step
    for i, tile in enumerate(magnified[: across * (canvas.shape[0] // step)]):
        y, x = i // across * step, i % across * step
        canvas[y : y + step - 2, x : x + step - 2] = tile
