"""Train a small network on the answers of larger ones, and without them, and test both.

    python experiments/distill.py RUN RUN RUN --epochs 14 --seeds 5 --processes 10

The student is the default study's champion. It learns the mean of the teachers' probabilities for
each image as it is augmented, in place of the image's label (Hinton et al. 2015, temperature 1).
Everything else is the same; each fit reads the test images once.
"""

import argparse
import logging
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

import digitlab
from digitlab.base.paths import lab_folder
from digitlab.base.statistics import mean_interval
from digitlab.data.datamodule import DigitsData
from digitlab.training.blocks import BlockModule, Blocks
from digitlab.training.captured import CapturedModule
from digitlab.training.device import find_device
from digitlab.training.evaluate import evaluate, measure
from digitlab.training.module import Batch

# The default champion: experiments/default.md.
STUDENT = ["model=narrow", "model.widths=[16,32,48]", "optim.learning_rate=0.024"]
STUDENT += ["optim.label_smoothing=0.05", "optim.ema=0.98", "data.augment.shift=1.28"]
STUDENT += ["data.augment.rotate=0.92", "data.augment.scale=0.037", "data.evaluate_on=test"]


class Taught:
    """Learns what its teachers answer, where it has any; to be mixed into a module."""

    teachers: Sequence[nn.Module] = ()

    def loss(self, batch: Batch) -> Batch:
        if not self.teachers:
            return super().loss(batch)  # type: ignore[misc, no-any-return]
        images, _ = batch
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            answers = [teacher(images).float().softmax(1) for teacher in self.teachers]
        logits = self.network(images)  # type: ignore[attr-defined]
        return F.cross_entropy(logits, torch.stack(answers).mean(0)), logits.detach()


class TaughtBlocks(Taught, BlockModule):
    """On the processor."""


class TaughtCaptured(Taught, CapturedModule):
    """On CUDA."""


def train(words: Sequence[str], teachers: Sequence[str]) -> float:
    """Return the test accuracy of one fit."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    config, lab = digitlab.compose(*words), lab_folder()
    torch.manual_seed(config.trainer.seed)
    torch.set_num_threads(config.trainer.threads)
    device = find_device(config.trainer.device)
    data = DigitsData(config, lab)
    data.setup("fit")
    data.setup("test")
    data.move(device)
    batches = data.train_dataloader()
    kind = TaughtCaptured if device.type == "cuda" else TaughtBlocks
    module = kind(config, config.trainer.epochs * len(batches)).to(device)
    networks = [digitlab.load_run(run, lab).network() for run in teachers]
    module.teachers = [network.to(device).eval().requires_grad_(False) for network in networks]
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=config.trainer.epochs, accelerator=device.type, devices=1, **quiet
    )
    trainer.fit(module, Blocks(batches))
    assert data.test is not None
    images, labels = data.test
    logits = evaluate(module.to(device).learned, images, config.data)
    return measure(logits, labels, "test")["test_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("teachers", nargs="+", metavar="RUN", help="recorded runs that teach")
    parser.add_argument("--epochs", type=int, nargs="+", default=[7], help="of the student")
    parser.add_argument("--seeds", type=int, default=5, help="fits of each kind")
    parser.add_argument("--processes", type=int, default=1, help="fits at a time")
    parser.add_argument("--device", default="auto", help="trainer.device")
    options = parser.parse_args()
    kinds = [(epochs, runs) for epochs in options.epochs for runs in ([], options.teachers)]
    jobs, seeds = {}, range(1, options.seeds + 1)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for epochs, runs in kinds:
            words = [*STUDENT, f"trainer.epochs={epochs}", f"trainer.device={options.device}"]
            fits = [pool.submit(train, [*words, f"trainer.seed={seed}"], runs) for seed in seeds]
            jobs[epochs, len(runs)] = fits
        for (epochs, teachers), fits in jobs.items():
            accuracies = [fit.result() for fit in fits]
            print(f"| {epochs} | {teachers} | {mean_interval(accuracies)} |", flush=True)


if __name__ == "__main__":
    main()
