"""Train a recipe on several seeds, and write what it reaches on the test images to records.json.

    python experiments/records.py small2000
    python experiments/records.py curve --seeds 10

Each run learns from all training images, is recorded in the lab, and reads the test images once.
The file is written after each run, so that a call that was stopped goes on with the seeds that are
missing; a recipe or code that has changed since begins anew, and what was recorded before stays.
The lines that `records.md` should have are printed. `curve` trains one recipe on more and more
images, each seed on another choice of them.
"""

import argparse
import datetime
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import curve_row, record_row, runs_row

import digitlab
from digitlab.base.environment import training_digest
from digitlab.config.recorded import config_to_yaml
from digitlab.records.reader import lab_tracker, recorded_environment

FILE = Path(__file__).with_name("records.json")
# Mean test accuracy that a record must exceed with p < 0.01, and the parameters it must be below.
TARGETS = {"small500": (0.98, 500), "small2000": (0.99, 2000), "small5000": (0.994, 5000)}
# The recipe of the curve; of few images it takes as many steps as of its own, in whole epochs.
CURVE, CURVE_BATCH, CURVE_STEPS = "fast99", 192, 188
ALL = 60_000
CURVE_IMAGES = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000, ALL)


def overrides(record: str, images: int, seed: int) -> list[str]:
    """Return what a run of a record is trained with."""
    words = [f"experiments={record}", "data.evaluate_on=test", f"trainer.seed={seed}"]
    if record != "curve":
        return words
    epochs = max(1, round(CURVE_STEPS / math.ceil(images / CURVE_BATCH)))
    words[0] = f"experiments={CURVE}"
    words += [f"data.batch_size={min(CURVE_BATCH, images)}", f"trainer.epochs={epochs}"]
    # The split's seed chooses the images, so that the spread is over choices of images, too.
    words += [f"data.images={images % ALL}", f"data.split_seed={seed}"]  # 0 is all
    return words


def settings_digest(words: Sequence[str]) -> str:
    """Return what tells whether two runs differ in more than their seeds: 12 characters."""
    same = [*words, "trainer.seed=0", "data.split_seed=0"]
    text = training_digest() + config_to_yaml(digitlab.compose(*same))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measure(document: dict[str, Any], record: str, images: int, seeds: int) -> dict[str, Any]:
    """Train the seeds that a figure lacks, writing the file after each; return the figure."""
    name = f"{record}, {images} images" if record == "curve" else record
    digest = settings_digest(overrides(record, images, 1))
    figures = document["figures"]
    figure = next((f for f in figures if f["name"] == name), None)
    if figure and figure["settings_digest"] != digest:
        figure["name"], figure = f"{name}, until {figure['commit'][:7]}", None
    if figure is None:
        target, largest = TARGETS.get(record, (None, None))
        figure = {
            "name": name,
            "unit": "fraction",
            "least": target,
            "most": None,
            "largest": largest,
        }
        figure |= {"settings_digest": digest, "values": [], "run_ids": []}
        figures.append(figure)
    for seed in range(len(figure["values"]) + 1, seeds + 1):
        run = digitlab.train(*overrides(record, images, seed))
        tracker = lab_tracker(run.lab)
        environment = recorded_environment(tracker, tracker.get(run.run_id))
        figure["values"].append(run.metrics["test_accuracy"])
        figure["run_ids"].append(run.run_id)
        figure |= {
            "overrides": overrides(record, images, seed),  # of the last seed
            "parameters": int(run.metrics["model_parameters"]),
            "processor": environment["processor"],
            "commit": environment["commit"],
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        FILE.write_text(json.dumps(document, indent=1) + "\n")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("record", choices=[*TARGETS, "curve"], help="what to train")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each configuration")
    options = parser.parse_args()
    document = json.loads(FILE.read_text()) if FILE.exists() else {"figures": []}
    is_curve = options.record == "curve"
    counts = CURVE_IMAGES if is_curve else (ALL,)
    for seeds in range(1, options.seeds + 1):  # so that a curve that was stopped is a whole one
        figures = [measure(document, options.record, images, seeds) for images in counts]
    for figure in figures:
        print(curve_row(figure) if is_curve else f"{record_row(figure)}\n{runs_row(figure)}")


if __name__ == "__main__":
    main()
