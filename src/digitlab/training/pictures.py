"""Pictures of what a network misreads, and of how it learned."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from digitlab.training.fit import FitResult, Frame, one_of_each

_MISREAD_SHOWN = 32  # digits


def draw_pictures(fit: FitResult) -> dict[str, bytes]:
    """Return PNG files by name.

    confusion.png; misread.png where any digit was misread; evolution.png of a fit with a film.
    """
    figures = {"confusion.png": _draw_confusion(fit.logits.argmax(1), fit.labels)}
    misread = _draw_misread(fit.logits, fit.labels, fit.images)
    if misread is not None:
        figures["misread.png"] = misread
    if fit.film:
        shown = one_of_each(fit.labels)
        figures["evolution.png"] = _draw_film(fit.film, fit.images[shown], fit.labels[shown])
    return {name: _to_png(figure) for name, figure in figures.items()}


def _to_png(figure: Figure) -> bytes:
    content = BytesIO()
    # zlib's level 6 takes three times as long as level 1, for a tenth of the size.
    figure.savefig(content, format="png", dpi=100, pil_kwargs={"compress_level": 1})
    return content.getvalue()


def _draw_confusion(guesses: Tensor, labels: Tensor) -> Figure:
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
    axes.set(xticks=range(10), yticks=range(10), xlabel="read as", ylabel="is")
    correct, total = int(np.trace(counts)), int(counts.sum())
    title = f"{total - correct} of {total} misread ({correct / total:.2%} right)"
    axes.set_title(title, fontsize=10)
    return figure


def _draw_misread(logits: Tensor, labels: Tensor, images: Tensor) -> Figure | None:
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
        title = f"{labels[i]} read as {guesses[i]}"
        axes.text(x + cell / 2, y + 8, title, ha="center", va="bottom", fontsize=6)
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
    return figure


def _draw_film(film: Sequence[Frame], images: Tensor, labels: Tensor) -> Figure:
    """Draw how sure the network was of ten digits, epoch by epoch, and its first filters.

    Args:
        film: frames in the order of their epochs; of many, nine are shown.
        images, labels: uint8 (10, 1, 28, 28) and (10,), the digits of the frames.
    """
    places = np.unique(np.linspace(0, len(film) - 1, min(9, len(film))).round().astype(int))
    frames = [film[place] for place in places]
    cell, height, top = 130, 30, 40  # pixels: a frame's width, a digit's row, the filters
    canvas = np.full((top + 10 * height, 40 + cell * len(frames)), 0.97)
    width, tall = canvas.shape[1] / 90, canvas.shape[0] / 90
    figure = Figure(figsize=(width, tall + 0.8))
    axes = figure.add_axes((0.01, 0.5 / (tall + 0.8), 0.98, tall / (tall + 0.8)))
    for row, image in enumerate(images[:, 0].numpy()):
        canvas[top + row * height + 1 : top + row * height + 29, 4:32] = 1 - image / 255
    for column, frame in enumerate(frames):
        left = 40 + column * cell
        _tile(canvas[4 : top - 6, left : left + cell - 10], frame.filters.numpy())
        for row, probabilities in enumerate(frame.probabilities.numpy()):
            base = top + (row + 1) * height - 3
            for digit, probability in enumerate(probabilities):
                bar = canvas[base - 1 - round(24 * float(probability)) : base, left + 12 * digit :]
                bar[:, 1:11] = 0.15 if digit == labels[row] else 0.6
        title = f"epoch {frame.epoch}" if frame.epoch else "untrained"
        axes.text(left + cell / 2, -4, title, ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("above: filters of the first layer; a row a digit: probabilities of 0 to 9,\n"
                    "the right one dark", fontsize=8)  # fmt: skip
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    return figure


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
