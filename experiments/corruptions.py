"""Measure how often networks misread corrupted digits of kinds that they were not trained on.

    python experiments/corruptions.py --processes 2

Trains ten seeds of the default study's champion, of the recipe `robust`, and of `robust` without
its shift, rotation, scaling and shear, on all training images, each recorded in the lab. They read
the test images in the corruptions of six families; the third reads geometry in the place of the
second, which has learned from it. Writes corruptions.json, after each run, so that a call that was
stopped goes on; prints how robust.md should show it.
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

from digitlab.base.environment import describe_environment
from digitlab.base.paths import lab_folder
from digitlab.data.datasets import TEST, load_digits
from digitlab.data.images import as_tensors
from digitlab.digits.predict import Answer, DigitReader, read_prepared
from digitlab.digits.prepare import Prepared, prepare
from digitlab.digits.shift import CHANGES
from digitlab.records.reader import lab_tracker
from digitlab.training.evaluate import evaluate

FILE = Path(__file__).with_name("corruptions.json")
STILL = "robust, no geometry"
TARGET = 1 / 3  # of the default's errors


def draw_lines(images: Tensor) -> Tensor:
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


def draw_stripes(images: Tensor) -> Tensor:
    """Every fourth row as bright as ink."""
    striped = images.clone()
    striped[:, :, ::4] = 255
    return striped


def keep_edges(images: Tensor) -> Tensor:
    """What differs within 3x3 pixels: the outlines of the strokes."""
    return F.max_pool2d(images, 3, 1, 1) + F.max_pool2d(-images, 3, 1, 1)


# Kinds of corruption, each with its changes; those by name are of `digitlab evaluate`.
FAMILIES: dict[str, list[str | Callable[[Tensor], Tensor]]] = {
    "noise": ["noise, sd 30 levels", "noise, sd 60 levels"],
    "blur": ["blurred, sigma 1"],
    "lines and stripes across": [draw_lines, draw_stripes],
    "brightness": ["half as bright", "on a grey background", "inverted"],
    "geometry": ["shifted 4 pixels", "rotated 30 degrees", "rotated -30 degrees",
                 "scaled to 70 %", "scaled to 130 %"],
    "edges only": [keep_edges],
}  # fmt: skip


def recipes() -> dict[str, list[str]]:
    """Return what each network is trained with, but for its seed."""
    champion = json.loads(STUDY_FILE.read_text())["figures"][0]["champion"]
    values = [f"{name}={value}".replace(" ", "") for name, value in champion.items()]
    still = [f"data.augment.{name}=0" for name in ("shift", "rotate", "scale", "shear")]
    own = ["data.evaluate_on=test", "trainer.threads=1"]
    return {
        "default": ["experiments=default", *values, *own],
        "robust": ["experiments=robust", *own],
        STILL: ["experiments=robust", *still, *own],
    }


def prepared(images: Tensor) -> list[tuple[Prepared, Prepared]]:
    """Return images (N, 1, 28, 28) as `predict` prepares them, with lines and without."""
    pictures = [image.float().numpy() for image in images[:, 0]]
    return [(prepare(picture), prepare(picture, keeps_lines=False)) for picture in pictures]


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
            FILE.write_text(json.dumps(document, indent=1) + "\n")


def measure(
    runs: dict[str, list[str]], pool: ProcessPoolExecutor
) -> dict[str, dict[str, list[float]]]:
    """Return the share of misread images by network and family, of each run."""
    tracker, lab = lab_tracker(lab_folder()), lab_folder()
    _, labels = as_tensors(load_digits(lab, "mnist", TEST))
    given = corrupted()
    ready = {family: list(pool.map(prepared, given[family])) for family in given}
    found: dict[str, dict[str, list[float]]] = {}
    for name, run_ids in runs.items():
        for run_id in run_ids:
            reader = DigitReader(tracker, run_id, lab)
            for family in ["geometry"] if name == STILL else FAMILIES:
                shares: dict[str, list[float]] = {"as given": [], "prepared": []}
                for images, pairs in zip(given[family], ready[family], strict=True):
                    logits = evaluate(reader.network, images, reader.config.data)
                    read = read_prepared(
                        reader,
                        [("", with_lines) for with_lines, _ in pairs],
                        [without for _, without in pairs].__getitem__,
                    )
                    digits = torch.tensor([_digit(answer) for answer, _ in read])
                    for how, guesses in (("as given", logits.argmax(1)), ("prepared", digits)):
                        shares[how].append(float((guesses != labels).double().mean()))
                for how, of_changes in shares.items():
                    by_family = found.setdefault(f"{name}, {how}", {})
                    by_family.setdefault(family, []).append(fmean(of_changes))
            print("measured", name, run_id[:8], flush=True)
    return found


def _digit(answer: Answer) -> int:
    return -1 if answer.digit is None else answer.digit


def figures(found: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Return what is shown: each family, the mean over the families, and what was asked for."""
    shown = {how: found[how] for how in ("default, as given", "default, prepared")}
    shown["robust, prepared"] = found["robust, prepared"] | {
        "geometry": found[f"{STILL}, prepared"]["geometry"]
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
        runs = {name: of["run_ids"][: options.seeds] for name, of in document["runs"].items()}
        document["figures"] = figures(measure(runs, pool))
    environment = describe_environment()
    document |= {key: environment[key] for key in ("commit", "processor")}
    FILE.write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(map(ROWS["table"], document["figures"])))


if __name__ == "__main__":
    end_plainly(main)
