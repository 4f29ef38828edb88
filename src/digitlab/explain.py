"""`digitlab explain`: what each layer makes of a digit, and which pixels spoke for the answer."""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from captum.attr import IntegratedGradients
from matplotlib.figure import Figure
from torch import Tensor, nn

from digitlab.compose import compose
from digitlab.datamodule import standardise, to_unit
from digitlab.datasets import TEST, load_digits
from digitlab.errors import UserError, require
from digitlab.networks import build_network
from digitlab.recorded import recorded_config, trained
from digitlab.tracking import open_tracking

_STEPS = 64  # of the integral
_MAPS = 8  # of a layer, in the picture


def explain(index: int, run: str, against: int | None, out: Path | None, lab: Path) -> int:
    """Say what a run's network reads in a test image, and draw why; returns 0.

    Raises:
        UserError: no such run or image, or the picture cannot be written.
    """
    tracking = open_tracking(compose("train", [])[0].config, lab)
    row = trained(tracking, run)
    config = recorded_config(tracking, row)
    digits = load_digits(lab, config.data.name, TEST, config.data.allow_unknown)
    count = len(digits.labels)
    require(0 <= index < count, f"explain {index}", f"an index of a test image, 0 to {count - 1}")
    network = build_network(config.model)
    weights = tracking.artifact(row.run_id, "weights.safetensors")
    network.load_state_dict(safetensors.torch.load(weights))
    network.eval()
    pixels = digits.images[index][None, None]
    image = standardise(to_unit(pixels), config.data)
    maps, logits = activations(network, image)
    probabilities = logits.softmax(1)[0]
    ranked = probabilities.argsort(descending=True).tolist()
    said, other = ranked[0], ranked[1] if against is None else against
    require(said != other, f"--against {other}", "a digit that the network did not say")
    reasons = attribution(network, image, said, other)
    told = ", ".join(f"{digit} {probabilities[digit]:.2%}" for digit in ranked[:3])
    print(f"test image {index}, a {int(digits.labels[index])}: {row.name} says {told}")
    target = out or lab / "explained" / f"{row.name}-{index}-{said}-not-{other}.png"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _draw(pixels[0, 0].numpy(), reasons.numpy(), maps, said, other).savefig(target, dpi=110)
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written: {error.strerror}") from error
    print(f"why {said} and not {other}, and what each layer sees: {target}")
    return 0


def activations(network: nn.Module, image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What each convolution gives for one image (1, 1, 28, 28): (C, h, w) by name; the logits."""
    maps: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name: maps.update({name: output[0].detach()})
        )
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        logits = network(image)
    for hook in hooks:
        hook.remove()
    return maps, logits


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
        shown = layer[layer.flatten(1).std(1).argsort(descending=True)[:_MAPS]].numpy()
        place.suptitle(f"layer {name}: {len(layer)} maps, the liveliest", fontsize=9)
        for axes, image in zip(place.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            axes.imshow(image, cmap="magma")
            axes.axis("off")
    for axes in (left, right):
        axes.axis("off")
    return figure
