"""`digitlab explain`: what each layer makes of a digit, and which pixels led to the answer."""

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from digitlab.base.errors import require, visible
from digitlab.base.files import safe_name, write_output
from digitlab.config.types import DataConfig
from digitlab.data.datasets import TEST, class_names, known_classes, load_digits
from digitlab.data.images import standardise, to_unit
from digitlab.digits.decode import read_image
from digitlab.digits.predict import DigitReader, read_picture
from digitlab.records.reader import lab_tracker, load_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RULE = "a file, or the index of a test image, from 0"
_STEPS = 64  # of the integral
_MAPS = 8  # of a layer, in the picture
_LAYERS = {"conv2d": "convolution {} ({} filters)", "linear": "dense {} ({} units)"}
_ACTIVATIONS = ("relu", "relu_", "gelu", "silu", "elu", "leaky_relu", "tanh", "sigmoid")


def explain(
    image: str,
    run: str | None,
    against: int | None,
    out: Path | None,
    lab: Path,
    stores: Sequence[str] = (),
) -> int:
    """Print what a run's network reads in an image, and draw why; returns 0.

    Args:
        image: the index of a test image, or an image file, prepared as MNIST's were.
        against: the digit to compare the answer with; the next likely one where it is None, or
            where it is the answer itself.

    Raises:
        UserError: no such run or image, or the picture cannot be written.
    """
    tracker = lab_tracker(lab, stores)
    row, config, network = load_run(tracker, run)
    labels = class_names(config.data.name, lab)
    known = known_classes(labels)
    shown = ", ".join(f"{digit} ({labels[digit]})" for digit in known)
    rule = f"a class of {config.data.name}: {shown}"
    require(against is None or against in known, f"--against {against}", rule)
    if image.isdecimal():
        digits = load_digits(lab, config.data.name, TEST, config.data.allow_unknown)
        count = len(digits.labels)
        require(int(image) < count, f"explain {image}", f"{_RULE} to {count - 1}")
        pixels = torch.from_numpy(digits.images[int(image)])
        title, name = f"test image {image}, a {labels[digits.labels[int(image)]]}", image
    else:
        require(bool(image) and not re.fullmatch(r"-\d+", image), f"explain {image!r}", _RULE)
        grey = read_image(Path(image))  # before the reader, which may have to be calibrated first
        _, prepared = read_picture(DigitReader(tracker, row.run_id, lab), image, grey)
        require(not prepared.problem, f"{image}: {prepared.problem}", "an image of one digit")
        pixels = torch.from_numpy(prepared.image)
        title, name = image, Path(image).stem
    with torch.no_grad():
        logits = network(standardise(to_unit(pixels[None, None]), config.data))
    probabilities = logits.softmax(1)[0]
    ranked = probabilities.argsort(descending=True).tolist()
    best = ranked[0]
    others = [digit for digit in ranked[1:] if digit in known] or ranked[1:]
    other = next(digit for digit in others if against in (None, best, digit))
    likely = ", ".join(f"{labels[digit]} {probabilities[digit]:.2%}" for digit in ranked[:3])
    print(visible(f"{title}: {row.name} reads {likely} (uncalibrated)"))
    file = safe_name(f"{row.name}-{name}-{best}-not-{other}") + ".png"
    target = out or lab / "explained" / file
    picture = draw_reasons(network, config.data, pixels, (best, other), labels)
    write_output(target, picture, "--out" if out else "", lab)
    print(
        visible(f"why {labels[best]} and not {labels[other]}, and what each layer sees: {target}")
    )
    return 0


def draw_reasons(
    network: nn.Module,
    data: DataConfig,
    pixels: Tensor,
    digits: tuple[int, int],
    labels: Sequence[str],
) -> bytes:
    """Return a PNG of why a network reads the first digit, not the second, in pixels (28, 28).

    Args:
        pixels: uint8.
        labels: the names of the classes.
    """
    image = standardise(to_unit(pixels[None, None]), data)
    maps, _ = activations(network, image)
    reasons = attribution(network, image, *digits)
    file = io.BytesIO()
    names = [labels[digit] for digit in digits]
    _draw(pixels.numpy(), reasons.numpy(), maps, *names).savefig(file, dpi=110)
    return file.getvalue()


class _LayerOutputs(TorchFunctionMode):
    """Collects what convolutions and linear layers give, after the activation that follows.

    It sees functions, not modules, so that an activation counts however a network calls it; and
    it is this thread's own, so that two images can be explained at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[str, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _LAYERS:
            self.outputs.append((name, output))
        elif name in _ACTIVATIONS and self.outputs:
            self.outputs[-1] = (self.outputs[-1][0], output)
        return output


def activations(network: nn.Module, image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return what each layer but the last gives for one image (1, 1, 28, 28), and the logits.

    Maps (C, h, w) after the activation, by the layer's name in words; the units of a linear layer
    are one map.
    """
    with torch.no_grad(), _LayerOutputs() as seen:
        logits = network(image)
    count: Counter[str] = Counter()
    maps = {}
    for kind, output in seen.outputs[:-1]:  # the last are the logits
        count[kind] += 1
        maps[_LAYERS[kind].format(count[kind], output.shape[1])] = _as_maps(output[0])
    return maps, logits


def _as_maps(layer: Tensor) -> Tensor:
    if layer.ndim == 3:
        return layer
    rows = max(n for n in range(1, math.isqrt(len(layer)) + 1) if len(layer) % n == 0)
    return layer.view(1, rows, -1)


def most_varied(maps: Tensor) -> Tensor:
    """Return the maps (C, h, w) that vary most, eight at most."""
    return maps[maps.flatten(1).std(1).argsort(descending=True)[:_MAPS]]


def attribution(network: nn.Module, image: Tensor, digit: int, other: int) -> Tensor:
    """Return how much each pixel (28, 28) adds to the evidence for one digit over another.

    Integrated gradients (Sundararajan et al. 2017) of the difference of the two logits, along the
    line from a black image; they add up to the change of that difference (completeness).
    """
    black = torch.full_like(image, float(image.min()))
    places, weights = (
        torch.from_numpy(array / 2).to(image) for array in np.polynomial.legendre.leggauss(_STEPS)
    )
    line = black + (places + 0.5)[:, None, None, None] * (image - black)
    logits = network(line.requires_grad_())
    [slopes] = torch.autograd.grad((logits[:, digit] - logits[:, other]).sum(), line)
    mean_slopes: Tensor = torch.tensordot(weights, slopes, 1)
    return ((image - black) * mean_slopes)[0, 0]


def _draw(
    digit: np.ndarray, reasons: np.ndarray, maps: dict[str, Tensor], best: str, other: str
) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_MAPS * 1.1, 2.6 + 1.3 * len(maps)), layout="constrained")
    heights = [2, *[1] * len(maps)]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    left, right = parts[0].subplots(1, 2)
    left.imshow(digit, cmap="gray_r")
    left.set_title("the image", fontsize=9)
    reach = float(np.abs(reasons).max()) or 1.0
    drawn = right.imshow(reasons, cmap="RdBu", vmin=-reach, vmax=reach)
    title = f"blue: evidence for {best}, red: for {other}"
    right.set_title(title, fontsize=9, parse_math=False)
    parts[0].colorbar(drawn, ax=right, shrink=0.8)
    for place, (name, layer) in zip(parts[1:], maps.items(), strict=True):
        shown = most_varied(layer).numpy()
        some = f": the {len(shown)} that vary most" if len(layer) > len(shown) else ""
        place.suptitle(f"{name}{some}, after the activation", fontsize=9)
        for axes, image in zip(place.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            axes.imshow(image, cmap="magma")
            axes.axis("off")
    for axes in (left, right):
        axes.axis("off")
    return figure
