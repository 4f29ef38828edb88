"""Pictures of what a run gets wrong, and of how it learned."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from digitlab.training.fit import Frame

_SHOWN = 32  # misread digits in the picture
_PNG = {"compress_level": 1}  # of zlib: level 6 takes three times as long for a tenth of the size


def draw_confusions(logits: Tensor, labels: Tensor, images: Tensor, folder: Path) -> None:
    """Write `confusion.png` and, where any digit was misread, `misread.png` into `folder`.

    Args:
        logits: (M, 10) of the images.
        labels: (M,) what they are.
        images: uint8 (M, 1, 28, 28).
    """
    guesses = logits.argmax(1)
    counts = np.zeros((10, 10), dtype=int)
    np.add.at(counts, (labels.numpy(), guesses.numpy()), 1)
    _draw_matrix(counts).savefig(folder / "confusion.png", dpi=100, pil_kwargs=_PNG)
    # The most confident mistakes first: the gap between the guess and the truth.
    gaps = logits.max(1).values - logits.gather(1, labels[:, None])[:, 0]
    worst = [int(i) for i in gaps.argsort(descending=True)[:_SHOWN] if gaps[i] > 0]
    if worst:
        titles = [f"{labels[i]} read as {guesses[i]}" for i in worst]
        figure = _draw_digits(images[worst, 0].numpy(), titles)
        figure.savefig(folder / "misread.png", dpi=100, pil_kwargs=_PNG)


def draw_film(film: Sequence[Frame], images: Tensor, labels: Tensor, folder: Path) -> None:
    """Write `evolution.png`: how sure the network was of ten digits, and its first filters.

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
    figure.savefig(folder / "evolution.png", dpi=100, pil_kwargs=_PNG)


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


def _draw_matrix(counts: np.ndarray) -> Figure:
    figure = Figure(figsize=(6, 5.8))  # placed by hand: a layout engine draws everything twice
    axes = figure.add_axes((0.09, 0.08, 0.88, 0.86))
    wrong = counts * (1 - np.eye(10, dtype=int))
    axes.imshow(wrong, cmap="Reds", vmin=0, vmax=max(1, wrong.max()))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            ink = "white" if wrong[row, column] > 0.6 * wrong.max() else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=ink)
    axes.set(xticks=range(10), yticks=range(10), xlabel="read as", ylabel="is")
    correct = int(np.trace(counts))
    total = int(counts.sum())
    axes.set_title(
        f"{total - correct} of {total} misread ({correct / total:.2%} right)", fontsize=10
    )
    return figure


def _draw_digits(images: np.ndarray, titles: list[str]) -> Figure:
    """One mosaic, since a figure of 32 axes takes ten times as long."""
    columns = 8
    rows = -(-len(images) // columns)
    cell = 40  # pixels: the digit's 28, a line of text, space
    mosaic = np.full((rows * cell, columns * cell), 255, np.uint8)
    figure = Figure(figsize=(columns * 1.1, rows * 1.1))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        y, x = i // columns * cell, i % columns * cell
        mosaic[y + 10 : y + 38, x + 6 : x + 34] = 255 - image
        axes.text(x + cell / 2, y + 8, title, ha="center", va="bottom", fontsize=6)
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
    return figure
