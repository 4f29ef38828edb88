"""`digitlab explain`: what each layer makes of a digit, and which pixels spoke for the answer."""

import math
from pathlib import Path

import numpy as np
import torch
from captum.attr import IntegratedGradients
from matplotlib.figure import Figure
from torch import Tensor, nn

from digitlab.base.errors import UserError, require
from digitlab.config.types import DataConfig
from digitlab.data.datasets import TEST, load_digits
from digitlab.data.images import standardise, to_unit
from digitlab.digits.decode import read_image
from digitlab.digits.prepare import prepare
from digitlab.records.reader import lab_tracking, load_run

_STEPS = 64  # of the integral
_MAPS = 8  # of a layer, in the picture


def explain(shown: str, run: str, against: int | None, out: Path | None, lab: Path) -> int:
    """Say what a run's network reads in an image, and draw why; returns 0.

    Args:
        shown: the index of a test image, or an image file, prepared as MNIST's were.
        against: the digit that the answer is held against; the next likely one if None.

    Raises:
        UserError: no such run or image, or the picture cannot be written.
    """
    tracking = lab_tracking(lab)
    row, config, network = load_run(tracking, run)
    if shown.isdecimal():
        digits = load_digits(lab, config.data.name, TEST, config.data.allow_unknown)
        count = len(digits.labels)
        rule = f"a file, or an index of a test image, 0 to {count - 1}"
        require(int(shown) < count, f"explain {shown}", rule)
        pixels = digits.images[int(shown)]
        what, name = f"test image {shown}, a {int(digits.labels[int(shown)])}", shown
    else:
        prepared = prepare(read_image(Path(shown)))
        require(not prepared.problem, f"{shown} ({prepared.problem})", "an image of one digit")
        pixels = torch.from_numpy(prepared.image)
        what, name = shown, Path(shown).stem
    logits = network(standardise(to_unit(pixels[None, None]), config.data))
    probabilities = logits.softmax(1)[0]
    ranked = probabilities.argsort(descending=True).tolist()
    said, other = ranked[0], ranked[1] if against is None else against
    require(said != other, f"--against {other}", "a digit that the network did not say")
    told = ", ".join(f"{digit} {probabilities[digit]:.2%}" for digit in ranked[:3])
    print(f"{what}: {row.name} says {told}")
    target = out or lab / "explained" / f"{row.name}-{name}-{said}-not-{other}.png"
    draw_reasons(network, config.data, pixels, (said, other), target)
    print(f"why {said} and not {other}, and what each layer sees: {target}")
    return 0


def draw_reasons(
    network: nn.Module, data: DataConfig, pixels: Tensor, digits: tuple[int, int], target: Path
) -> None:
    """Draw why a network says the first digit and not the second of uint8 pixels (28, 28).

    Raises:
        UserError: the picture cannot be written.
    """
    image = standardise(to_unit(pixels[None, None]), data)
    maps, _ = activations(network, image)
    reasons = attribution(network, image, *digits)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _draw(pixels.numpy(), reasons.numpy(), maps, *digits).savefig(target, dpi=110)
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written: {error.strerror}") from error


def activations(network: nn.Module, image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What each layer but the last gives for one image (1, 1, 28, 28), and the logits.

    Maps (C, h, w) by the layer's name; the units of a linear layer are one map.
    """
    maps: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name: maps.update({name: output[0].detach()})
        )
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        logits = network(image)
    for hook in hooks:
        hook.remove()
    maps.popitem()  # the logits
    return {name: _as_maps(layer) for name, layer in maps.items()}, logits


def _as_maps(layer: Tensor) -> Tensor:
    if layer.ndim == 3:
        return layer
    rows = max(n for n in range(1, math.isqrt(len(layer)) + 1) if len(layer) % n == 0)
    return layer.view(1, rows, -1)


def liveliest(maps: Tensor) -> Tensor:
    """The maps (C, h, w) that vary most, eight at most."""
    return maps[maps.flatten(1).std(1).argsort(descending=True)[:_MAPS]]


def attribution(network: nn.Module, image: Tensor, said: int, other: int) -> Tensor:
    """How much each pixel (28, 28) speaks for one digit rather than another.

    Integrated gradients (Sundararajan et al. 2017) of the difference of the two logits, from a
    black image; their sum is what the image adds to that difference.
    """
    black = torch.full_like(image, float(image.min()))

    def gap(images: Tensor) -> Tensor:
        logits: Tensor = network(images)
        return logits[:, said] - logits[:, other]

    pixels: Tensor = IntegratedGradients(gap).attribute(image, black, n_steps=_STEPS)
    return pixels[0, 0].detach()


def _draw(
    digit: np.ndarray, reasons: np.ndarray, maps: dict[str, Tensor], said: int, other: int
) -> Figure:
    figure = Figure(figsize=(_MAPS * 1.1, 2.6 + 1.3 * len(maps)), layout="constrained")
    heights = [2, *[1] * len(maps)]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    top, below = parts[0], parts[1:]
    left, right = top.subplots(1, 2)
    left.imshow(digit, cmap="gray_r")
    left.set_title("the image", fontsize=9)
    reach = float(np.abs(reasons).max()) or 1.0
    drawn = right.imshow(reasons, cmap="RdBu", vmin=-reach, vmax=reach)
    right.set_title(f"blue speaks for {said}, red for {other}", fontsize=9)
    top.colorbar(drawn, ax=right, shrink=0.8)
    for place, (name, layer) in zip(below, maps.items(), strict=True):
        shown = liveliest(layer).numpy()
        which = f"{len(layer)} maps, the liveliest" if len(layer) > 1 else "its units"
        place.suptitle(f"layer {name}: {which}", fontsize=9)
        for axes, image in zip(place.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            axes.imshow(image, cmap="magma")
            axes.axis("off")
    for axes in (left, right):
        axes.axis("off")
    return figure
