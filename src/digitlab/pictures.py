"""Pictures of what a run gets wrong."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

_SHOWN = 32  # misread digits in the picture


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
    _draw_matrix(counts).savefig(folder / "confusion.png", dpi=100)
    # The most confident mistakes first: the gap between the guess and the truth.
    gaps = logits.max(1).values - logits.gather(1, labels[:, None])[:, 0]
    worst = [int(i) for i in gaps.argsort(descending=True)[:_SHOWN] if gaps[i] > 0]
    if worst:
        titles = [f"{labels[i]} read as {guesses[i]}" for i in worst]
        figure = _draw_digits(images[worst, 0].numpy(), titles)
        figure.savefig(folder / "misread.png", dpi=100)


def _draw_matrix(counts: np.ndarray) -> Figure:
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    wrong = counts * (1 - np.eye(10, dtype=int))
    axes.imshow(wrong, cmap="Reds", vmin=0, vmax=max(1, wrong.max()))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(column, row, str(count), ha="center", va="center", fontsize=8)
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
    figure = Figure(figsize=(columns * 1.1, rows * 1.1), layout="constrained")
    axes = figure.subplots()
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        y, x = i // columns * cell, i % columns * cell
        mosaic[y + 10 : y + 38, x + 6 : x + 34] = 255 - image
        axes.text(x + cell / 2, y + 8, title, ha="center", va="bottom", fontsize=6)
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
    return figure
