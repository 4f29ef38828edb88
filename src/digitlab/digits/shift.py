"""`digitlab evaluate --shift`: how a run's network fares on images that are not quite MNIST's."""

import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as change

from digitlab.base.console import Board, table
from digitlab.base.statistics import share_interval
from digitlab.config.types import DataConfig, EvaluateOn
from digitlab.data.datasets import TEST, TRAIN, load_digits, stratified_split
from digitlab.digits.decode import decode
from digitlab.digits.prepare import Grey, prepare
from digitlab.records.reader import lab_tracking, load_run
from digitlab.training.evaluate import evaluate


def _moved(x: float = 0, degrees: float = 0, scale: float = 1) -> Callable[[Tensor], Tensor]:
    bilinear = change.InterpolationMode.BILINEAR
    return lambda images: change.affine(
        images, degrees, [x, x], scale, [0.0, 0.0], interpolation=bilinear
    )


def _noisy(deviation: float) -> Callable[[Tensor], Tensor]:
    def noisy(images: Tensor) -> Tensor:
        chance = torch.Generator().manual_seed(0)
        return images + deviation * torch.randn(images.shape, generator=chance)

    return noisy


def _thinned(images: Tensor) -> Tensor:
    return -F.max_pool2d(F.pad(-images, (0, 1, 0, 1)), 2, 1)


# Changes of grey levels 0 to 255, float (N, 1, 28, 28), light on dark.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda images: images,
    "shifted 2 pixels": _moved(x=2),
    "shifted 4 pixels": _moved(x=4),
    "turned 15 degrees": _moved(degrees=15),
    "turned 30 degrees": _moved(degrees=30),
    "turned -30 degrees": _moved(degrees=-30),
    "scaled to 70 %": _moved(scale=0.7),
    "scaled to 130 %": _moved(scale=1.3),
    "blurred, sigma 1": lambda images: change.gaussian_blur(images, [7, 7], [1.0, 1.0]),
    "noise, sd 30 levels": _noisy(30),
    "noise, sd 60 levels": _noisy(60),
    "half as bright": lambda images: images / 2,
    "on grey": lambda images: 80 + images * 175 / 255,
    "inverted": lambda images: 255 - images,
    "thick strokes": lambda images: F.max_pool2d(images, 3, 1, 1),
    "thin strokes": _thinned,
}


def as_picture(digit: Grey, chance: np.random.Generator) -> Grey:
    """A digit (28, 28) as a JPEG of 40 to 800 pixels a side, anywhere in it, of either polarity."""
    side = int(chance.integers(40, 801))
    size = max(20, int(side * chance.uniform(0.35, 0.95)))
    image = Image.new("L", (side, side), 0)
    corner = chance.integers(0, side - size + 1, 2)
    enlarged = Image.fromarray(digit.astype(np.uint8)).resize((size, size), Resampling.BICUBIC)
    image.paste(enlarged, (int(corner[0]), int(corner[1])))
    if chance.random() < 0.5:
        image = image.point(lambda level: 255 - level)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(chance.integers(50, 96)))
    return decode(file.getvalue(), "a picture")


def evaluate_shift(run: str, prepared: int, as_json: bool, lab: Path) -> int:
    """Measure a run's network on every change of images, print a table and keep it with the run.

    On the test images where the run was tested, else on its validation set; returns 0.

    Args:
        prepared: how many of each go through the preparation of new images too.

    Raises:
        UserError: no such run, or its data are not to be had.
    """
    tracking = lab_tracking(lab)
    row, config, network = load_run(tracking, run)
    tested = config.data.evaluate_on is EvaluateOn.test
    files = TEST if tested else TRAIN
    digits = load_digits(lab, config.data.name, files, config.data.allow_unknown)
    images, labels = digits.images[:, None], digits.labels
    if not tested:
        _, held = stratified_split(labels, config.data.validation_images, config.data.split_seed)
        images, labels = images[held], labels[held]
    found = []
    for name, changed in CHANGES.items():
        pixels = changed(images.float()).round().clamp(0, 255).byte()
        right = evaluate(network, pixels, config.data).argmax(1) == labels
        again = [image.float().numpy() for image in pixels[:prepared, 0]]
        known = _read(network, config.data, again) == labels[: len(again)]
        found.append((name, _share(right), _share(known)))
    chance = np.random.default_rng(0)
    pictures = [as_picture(image.numpy(), chance) for image in images[:prepared, 0]]
    known = _read(network, config.data, pictures) == labels[: len(pictures)]
    found.append(("pictures of 40 to 800 pixels", math.nan, _share(known)))
    folder = Path(tempfile.mkdtemp())
    keyed = [
        {"change": name, "accuracy": None if math.isnan(share) else share, "prepared": known_share}
        for name, share, known_share in found
    ]
    document = {"images": len(labels), "prepared_images": len(again), "table": keyed}
    (folder / "shift.json").write_text(json.dumps(document, indent=1))
    tracking.resume(row.run_id).keep(folder)
    if as_json:
        print(json.dumps(document | {"run_id": row.run_id}, indent=1))
        return 0
    rows = [
        [
            name,
            "" if math.isnan(share) else str(share_interval(share, len(labels))),
            str(share_interval(right_of, len(again))),
        ]
        for name, share, right_of in found
    ]
    which = "test" if tested else "validation"
    title = f"{row.name}: {len(labels)} {which} images, {len(again)} of them prepared as new ones"
    Board().print(table(title, ["images", "as given", "prepared first"], rows))
    return 0


def _read(network: nn.Module, data: DataConfig, pictures: list[Grey]) -> Tensor:
    """The digits that are read in pictures, each prepared; -1 where none was found."""
    prepared = [prepare(picture) for picture in pictures]
    images = torch.from_numpy(np.stack([p.image for p in prepared]))[:, None]
    refused = torch.tensor([bool(p.problem) for p in prepared])
    return evaluate(network, images, data).argmax(1).masked_fill(refused, -1)


def _share(right: Tensor) -> float:
    return float(right.double().mean())
