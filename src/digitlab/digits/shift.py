"""`digitlab evaluate`: how accurate a network is on images unlike its training data."""

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as change

from digitlab.base import console
from digitlab.base.console import Board
from digitlab.base.errors import require
from digitlab.base.statistics import share_interval
from digitlab.config.types import DataConfig, EvaluateOn
from digitlab.data.datasets import TEST, TRAIN, load_digits, stratified_split
from digitlab.data.images import as_tensors
from digitlab.digits.decode import Grey, decode
from digitlab.digits.prepare import prepare_as
from digitlab.records.reader import lab_records, lab_tracker, load_run
from digitlab.records.tracker import RunRow
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
    "unchanged": lambda images: images,
    "shifted 2 pixels": _moved(x=2),
    "shifted 4 pixels": _moved(x=4),
    "rotated 15 degrees": _moved(degrees=15),
    "rotated 30 degrees": _moved(degrees=30),
    "rotated -30 degrees": _moved(degrees=-30),
    "scaled to 70 %": _moved(scale=0.7),
    "scaled to 130 %": _moved(scale=1.3),
    "blurred, sigma 1": lambda images: change.gaussian_blur(images, [7, 7], [1.0, 1.0]),
    "noise, sd 30 levels": _noisy(30),
    "noise, sd 60 levels": _noisy(60),
    "half as bright": lambda images: images / 2,
    "on a grey background": lambda images: 80 + images * 175 / 255,
    "inverted": lambda images: 255 - images,
    "thick strokes": lambda images: F.max_pool2d(images, 3, 1, 1),
    "thin strokes": _thinned,
}


def as_picture(digit: Grey, chance: np.random.Generator) -> Grey:
    """Draw a digit (28, 28) as a JPEG of 40 to 800 pixels a side, somewhere in it."""
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


def evaluate_shift(
    run: str | None, prepared: int, as_json: bool, lab: Path, stores: Sequence[str] = ()
) -> int:
    """Measure a run's network on every change of images, print a table, save it with the run.

    On the test images where the run was tested, else on its validation set; returns 0.

    Args:
        prepared: how many of each go through the preparation of new images too.

    Raises:
        UserError: no such run, or its data are not available.
    """
    require(prepared > 0, f"--prepared {prepared}", "an integer >= 1")
    tracker = lab_tracker(lab, stores)
    row, config, network = load_run(tracker, run)
    tested = config.data.evaluate_on is EvaluateOn.test
    files = TEST if tested else TRAIN
    digits = load_digits(lab, config.data.name, files, config.data.allow_unknown)
    images, labels = as_tensors(digits)
    if not tested:
        split = (config.data.validation_images, config.data.split_seed)
        _, held = stratified_split(digits.labels, *split)
        images, labels = images[held], labels[held]
    prepared = min(prepared, len(labels))

    def share(guesses: Tensor) -> float:
        return float((guesses == labels[: len(guesses)]).double().mean())

    table: list[dict[str, Any]] = []
    for name, changed in CHANGES.items():
        pixels = changed(images.float()).round().clamp(0, 255).byte()
        given = share(evaluate(network, pixels, config.data).argmax(1))
        pictures = [image.float().numpy() for image in pixels[:prepared, 0]]
        read = share(_read(network, config.data, pictures, lab))
        table.append({"change": name, "accuracy": given, "prepared": read})
    chance = np.random.default_rng(0)
    pictures = [as_picture(image.numpy(), chance) for image in images[:prepared, 0]]
    read = share(_read(network, config.data, pictures, lab))
    table.append({"change": "pictures of 40 to 800 pixels", "accuracy": None, "prepared": read})
    document = {"images": len(labels), "prepared_images": prepared, "table": table}
    which = "test" if tested else "validation"
    _print(document, row, which, as_json)
    _record(document, row, lab, stores)
    return 0


def _record(document: dict[str, Any], run: RunRow, lab: Path, stores: Sequence[str]) -> None:
    """Save what was measured with the run; it waits in the outbox while the tracker is away."""
    with lab_records(lab, stores) as records:
        spool = records.outbox.resume_run(run.run_id, run.tags.get("digitlab.study_id", ""))
        spool.add_files({"shift.json": json.dumps(document, indent=1).encode()})
        records.outbox.flush_run(spool)
        if pending := records.outbox.pending_text():
            print(pending, file=sys.stderr)


def _print(document: dict[str, Any], run: RunRow, which: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(document | {"run_id": run.run_id}, indent=1))
        return
    count, prepared = document["images"], document["prepared_images"]
    lines = [
        [
            entry["change"],
            "" if entry["accuracy"] is None else share_interval(entry["accuracy"], count),
            share_interval(entry["prepared"], prepared),
        ]
        for entry in document["table"]
    ]
    title = f"{run.name}: {count} {which} images, {prepared} of them prepared as new ones"
    Board().print(console.table(title, ["images", "as given", "prepared first"], lines))


def _read(network: nn.Module, data: DataConfig, pictures: list[Grey], lab: Path) -> Tensor:
    """Return the digits that are read in pictures, each prepared; -1 where none was found."""
    prepared = [prepare_as(picture, data.name, lab) for picture in pictures]
    images = torch.from_numpy(np.stack([p.image for p in prepared]))[:, None]
    empty = torch.tensor([bool(p.problem) for p in prepared])
    return evaluate(network, images, data).argmax(1).masked_fill(empty, -1)
