"""Train a recipe on several seeds, and write what it reaches on the test images to records.json.

    python experiments/records.py small2000
    python experiments/records.py best --processes 5
    python experiments/records.py curve --seeds 10
    python experiments/records.py default

Each run learns from all training images, is recorded in the lab, and reads the test images once.
The file is written after each run, so that a call that was stopped goes on with the seeds that are
missing; a recipe or code that has changed since begins anew, and what was recorded before stays.
With several processes the file takes their runs in the order of the seeds: of a call that was
stopped, those after the first that is missing are trained again. Five runs of `best` vote, too.
The lines that `records.md` should have are printed. `curve` trains one recipe on more and more
images, each seed on another choice of them. `default` trains nothing: it writes what the final fits
of the lab's study `default` have reached to default.json.
"""

import argparse
import datetime
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from ending import end_plainly
from figures import curve_row, record_row, runs_row, votes_row

import digitlab
from digitlab.base.environment import training_digest
from digitlab.base.errors import UserError
from digitlab.base.paths import lab_folder
from digitlab.base.statistics import softmax
from digitlab.config.recorded import config_to_yaml
from digitlab.records.reader import (
    lab_tracker,
    recorded_environment,
    recorded_guesses,
    recorded_logits,
)
from digitlab.records.tracker import RunRow, Tracker

FILE = Path(__file__).with_name("records.json")
STUDY_FILE = Path(__file__).with_name("default.json")
# Mean test accuracy that a record must exceed with p < 0.01, and the parameters it must be below.
TARGETS: dict[str, tuple[float, int | None]] = {
    "best": (0.9975, None),
    "small500": (0.98, 500),
    "small2000": (0.99, 2000),
    "small5000": (0.994, 5000),
}
VOTERS = 5  # runs whose mean probabilities are one answer
# The recipe of the curve, `fast99` when it was recorded; of few images it takes as many steps as of
# its own, in whole epochs.
CURVE = ["experiments=fast99", "model.widths=[16,32]", "model.pools=[1,2]", "model.hidden=128"]
CURVE += ["optim.learning_rate=0.02", "optim.label_smoothing=0.15", "optim.momentum=0.85"]
CURVE += ["optim.beta2=0.9", "optim.warmup=0.25"]
CURVE_BATCH, CURVE_STEPS = 192, 188
ALL = 60_000
CURVE_IMAGES = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000, ALL)


def overrides(record: str, images: int, seed: int) -> list[str]:
    """Return what a run of a record is trained with."""
    words = [f"experiments={record}", "data.evaluate_on=test", f"trainer.seed={seed}"]
    if record != "curve":
        return words
    epochs = max(1, round(CURVE_STEPS / math.ceil(images / CURVE_BATCH)))
    words[:1] = CURVE
    words += [f"data.batch_size={min(CURVE_BATCH, images)}", f"trainer.epochs={epochs}"]
    # The split's seed chooses the images, so that the spread is over choices of images, too.
    words += [f"data.images={images % ALL}", f"data.split_seed={seed}"]  # 0 is all
    return words


def settings_digest(words: Sequence[str]) -> str:
    """Return what tells whether two runs differ in more than their seeds: 12 characters."""
    same = [*words, "trainer.seed=0", "data.split_seed=0"]
    text = training_digest() + config_to_yaml(digitlab.compose(*same))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def train(words: Sequence[str]) -> dict[str, Any]:
    """Train and record one run; return its part of a figure."""
    run = digitlab.train(*words)
    tracker = lab_tracker(run.lab)
    return {
        "accuracy": run.metrics["test_accuracy"],
        "run_id": run.run_id,
        "overrides": list(words),
        **made_by(tracker, tracker.get(run.run_id)),
    }


def made_by(tracker: Tracker, run: RunRow) -> dict[str, Any]:
    """Return what a run was made with, and how large its network is."""
    environment = recorded_environment(tracker, run)
    ended = datetime.datetime.fromtimestamp(run.ended_ms / 1000, datetime.UTC)
    return {
        "parameters": int(run.metrics["model_parameters"]),
        "device": environment["numerics"]["device"],
        "processor": environment["processor"],
        "commit": environment["commit"],
        "date": ended.date().isoformat(),
    }


def study_figure() -> dict[str, Any]:
    """Return the test accuracies of the study `default` of this lab, with its runs.

    Raises:
        UserError: it has not ended.
    """
    champion = digitlab.load_study("default").champion()
    tracker = lab_tracker(lab_folder())
    finals = tracker.find({"digitlab.study": "default", "digitlab.kind": "final"})
    finals = [run for run in finals if "digitlab.superseded_by" not in run.tags]
    if champion is None or not finals:
        raise UserError("study default has no champion: run `make sweep` first.")
    finals.sort(key=lambda run: int(run.tags["digitlab.seed"]))
    return {
        "name": "default, test accuracy",
        "unit": "fraction",
        "values": [run.metrics["test_accuracy"] for run in finals],
        "run_ids": [run.run_id for run in finals],
        "champion": champion["values"],
        **made_by(tracker, finals[-1]),
    }


def votes(run_ids: Sequence[str]) -> list[float]:
    """Return how accurate the mean probability of each five runs is; a rest does not vote."""
    tracker = lab_tracker(lab_folder())
    rows = [tracker.get(run_id) for run_id in run_ids]
    accuracies = []
    for first in range(0, len(rows) - VOTERS + 1, VOTERS):
        voters = rows[first : first + VOTERS]
        _, labels = recorded_guesses(tracker, voters[0])
        shares = sum(softmax(recorded_logits(tracker, row, len(labels))) for row in voters)
        accuracies.append(float((np.argmax(shares, axis=1) == labels).mean()))
    return accuracies


def measure(
    document: dict[str, Any],
    record: str,
    images: int,
    seeds: int,
    trained: Callable[..., Iterable[dict[str, Any]]] = map,
) -> dict[str, Any]:
    """Train the seeds that a figure lacks, writing the file after each; return the figure.

    Args: trained: calls a function with each of some arguments, and gives the results in turn.
    """
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
    missing = range(len(figure["values"]) + 1, seeds + 1)
    for run in trained(train, [overrides(record, images, seed) for seed in missing]):
        figure["values"].append(run.pop("accuracy"))
        figure["run_ids"].append(run.pop("run_id"))
        figure |= run  # of the last seed
        FILE.write_text(json.dumps(document, indent=1) + "\n")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("record", choices=[*TARGETS, "curve", "default"], help="what to train")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each configuration")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    if options.record == "curve" and options.processes > 1:
        parser.error("--processes: the curve trains one run at a time. Leave it out.")
    if options.record == "default":
        STUDY_FILE.write_text(json.dumps({"figures": [study_figure()]}, indent=1) + "\n")
        return
    document = json.loads(FILE.read_text()) if FILE.exists() else {"figures": []}
    is_curve = options.record == "curve"
    counts = CURVE_IMAGES if is_curve else (ALL,)
    # A curve that was stopped is a whole one, of fewer seeds.
    steps = range(1, options.seeds + 1) if is_curve else (options.seeds,)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        trained = pool.map if options.processes > 1 else map
        for seeds in steps:
            figures = [measure(document, options.record, it, seeds, trained) for it in counts]
    if options.record == "best":
        try:
            figures[0]["votes"] = votes(figures[0]["run_ids"])
        except UserError as error:
            parser.exit(2, f"records.py: the runs cannot vote: {error}\n")
        FILE.write_text(json.dumps(document, indent=1) + "\n")
    for figure in figures:
        rows = [curve_row] if is_curve else [record_row, runs_row, votes_row]
        print("\n".join(line for row in rows if (line := row(figure))))


if __name__ == "__main__":
    end_plainly(main)
