"""Measure how often networks misread corrupted digits of kinds that they were not trained on.

    python experiments/corruptions.py --processes 2

Trains ten seeds of the default study's champion, of the recipe `robust`, and of `robust` without
its shift, rotation, scaling and shear, on all training images, each recorded in the lab. Each reads
the test images in the corruptions of six families. Geometry is read by the third, so that no
network has learned from the family that it is measured on. Writes corruptions.json, after each run,
so that a call that was stopped goes on; prints how robust.md should show it.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ending import end_plainly
from figures import ROWS
from PIL import Image, ImageDraw
from records import STUDY_FILE, settings_digest, train
from torch import Tensor

from digitlab.base.paths import lab_folder
from digitlab.data.datasets import TEST, load_digits
from digitlab.data.images import as_tensors
from digitlab.digits.prepare import prepare
from digitlab.digits.shift import CHANGES
from digitlab.records.reader import lab_tracker, load_run
from digitlab.training.evaluate import evaluate

FILE = Path(__file__).with_name("corruptions.json")
STILL = [f"data.augment.{name}=0" for name in ("shift", "rotate", "scale", "shear")]
TARGET = 1 / 3  # of the default's errors


def with_lines(images: Tensor) -> Tensor:
    """A straight line of two pixels across each image, at random."""
    chance = np.random.default_rng(0)
    drawn = []
    for image in images[:, 0].byte().numpy():
        picture = Image.fromarray(image)
        begin, end = chance.integers(0, 28, 2).tolist()
        ends = [(0, begin), (27, end)] if chance.random() < 0.5 else [(begin, 0), (end, 27)]
        ImageDraw.Draw(picture).line(ends, 255, 2)
        drawn.append(np.asarray(picture))
    return torch.from_numpy(np.stack(drawn))[:, None].float()


def with_stripes(images: Tensor) -> Tensor:
    """Every fourth row as bright as ink."""
    striped = images.clone()
    striped[:, :, ::4] = 255
    return striped


def edges(images: Tensor) -> Tensor:
    """What differs within 3x3 pixels: the outlines of the strokes."""
    return F.max_pool2d(images, 3, 1, 1) + F.max_pool2d(-images, 3, 1, 1)


# Kinds of corruption, each with its changes; those by name are of `digitlab evaluate`.
FAMILIES: dict[str, list[str | Callable[[Tensor], Tensor]]] = {
    "noise": ["noise, sd 30 levels", "noise, sd 60 levels"],
    "blur": ["blurred, sigma 1"],
    "lines and stripes across": [with_lines, with_stripes],
    "brightness": ["half as bright", "on a grey background", "inverted"],
    "geometry": ["shifted 4 pixels", "rotated 30 degrees", "rotated -30 degrees",
                 "scaled to 70 %", "scaled to 130 %"],
    "edges only": [edges],
}  # fmt: skip


def recipes() -> dict[str, list[str]]:
    """Return what each network is trained with, but for its seed."""
    champion = json.loads(STUDY_FILE.read_text())["figures"][0]["champion"]
    values = [f"{name}={value}".replace(" ", "") for name, value in champion.items()]
    own = ["data.evaluate_on=test", "trainer.threads=1"]
    return {
        "default": ["experiments=default", *values, *own],
        "robust": ["experiments=robust", *own],
        "robust, no geometry": ["experiments=robust", *STILL, *own],
    }


def prepared(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 28, 28) as `predict` prepares them, and in which it finds no digit."""
    found = [prepare(image.float().numpy()) for image in images[:, 0]]
    ready = torch.from_numpy(np.stack([one.image for one in found]))[:, None]
    return ready, torch.tensor([bool(one.problem) for one in found])


def corrupted() -> dict[str, list[Tensor]]:
    """Return the test images in all changes, by family; uint8 (10000, 1, 28, 28) each."""
    images, _ = as_tensors(load_digits(lab_folder(), "mnist", TEST))
    changes = {
        family: [CHANGES[change] if isinstance(change, str) else change for change in some]
        for family, some in FAMILIES.items()
    }
    return {
        family: [change(images.float()).round().clamp(0, 255).byte() for change in some]
        for family, some in changes.items()
    }


def train_all(document: dict[str, Any], seeds: int, pool: ProcessPoolExecutor) -> None:
    """Train the seeds that the file lacks."""
    for name, words in recipes().items():
        digest = settings_digest(words)
        known = document["runs"].get(name, {})
        if known.get("settings_digest") != digest:
            known = document["runs"][name] = {"settings_digest": digest, "run_ids": []}
        missing = range(len(known["run_ids"]) + 1, seeds + 1)
        for run in pool.map(train, [[*words, f"trainer.seed={seed}"] for seed in missing]):
            known["run_ids"].append(run["run_id"])
            document |= {key: run[key] for key in ("processor", "commit", "date")}
            FILE.write_text(json.dumps(document, indent=1) + "\n")


def errors(runs: dict[str, Any], pool: ProcessPoolExecutor) -> dict[str, dict[str, list[float]]]:
    """Return the share of misread images by network and family, of each run."""
    tracker, lab = lab_tracker(lab_folder()), lab_folder()
    _, labels = as_tensors(load_digits(lab, "mnist", TEST))
    given = corrupted()
    ready = {family: list(pool.map(prepared, given[family])) for family in given}
    found: dict[str, dict[str, list[float]]] = {}
    for name, known in runs.items():
        for run_id in known["run_ids"]:
            row, config, network = load_run(tracker, run_id)
            for family in FAMILIES:
                wrong = {
                    "as given": [
                        evaluate(network, images, config.data).argmax(1) != labels
                        for images in given[family]
                    ],
                    "prepared": [
                        (evaluate(network, images, config.data).argmax(1) != labels) | lost
                        for images, lost in ready[family]
                    ],
                }
                for how, by_change in wrong.items():
                    share = fmean(float(misread.double().mean()) for misread in by_change)
                    found.setdefault(f"{name}, {how}", {}).setdefault(family, []).append(share)
            print("measured", name, row.run_id[:8], flush=True)
    return found


def figures(found: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Return what is shown: each family, the mean over the families, and what was asked for."""
    shown = {how: found[how] for how in ("default, as given", "default, prepared")}
    shown["robust, prepared"] = found["robust, prepared"] | {
        "geometry": found["robust, no geometry, prepared"]["geometry"]
    }
    means = {how: list(map(fmean, zip(*of.values(), strict=True))) for how, of in shown.items()}
    listed = [
        _figure(f"{family}: {how}", shown[how][family]) for family in FAMILIES for how in shown
    ]
    listed += [_figure(f"mean over families: {how}", mean) for how, mean in means.items()]
    whole = fmean(means["default, as given"])
    ratios = [mean / whole for mean in means["robust, prepared"]]
    ratio = _figure("robust, prepared / default, as given", ratios, "ratio", TARGET)
    return [*listed, ratio]


def _figure(
    name: str, values: Sequence[float], unit: str = "%", most: float | None = None
) -> dict[str, Any]:
    scale = 100 if unit == "%" else 1
    values = [round(scale * value, 4) for value in values]
    return {"name": name, "unit": unit, "least": None, "most": most, "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each network")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    document = json.loads(FILE.read_text()) if FILE.exists() else {"figures": [], "runs": {}}
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        train_all(document, options.seeds, pool)
        document["figures"] = figures(errors(document["runs"], pool))
    FILE.write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(map(ROWS["table"], document["figures"])))


if __name__ == "__main__":
    end_plainly(main)
