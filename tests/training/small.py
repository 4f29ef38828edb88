"""Fits of a second: a small network on 1,600 images of the sample, and what they report."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import safetensors.torch
import torch
from torch import Tensor

from digitlab.config.compose import compose
from digitlab.config.types import Config, EvaluateOn
from digitlab.data.datamodule import DigitsData
from digitlab.training.fit import FitResult, fit
from digitlab.training.module import DigitModule
from digitlab.training.observer import TrainingObserver

DATA = Path(__file__).parents[1] / "support" / "digits"
IMAGES = 1600  # of the sample's 2,000 without the validation set
SMALL = ["experiments=smoke", "data=sample", "model.widths=[4,8]", "model.hidden=16"]
SMALL += ["trainer.epochs=2", "trainer.seed=7", "data.batch_size=128"]
STEPS = 13  # of an epoch: 1,600 images in batches of 128
# Everything that takes part in a fit: dropout, augmentation, the average, clipping.
ALL = ["model.dropout=0.2", "data.augment.shift=2", "data.augment.erase=4", "optim.ema=0.9"]
ALL += ["optim.gradient_clip=1", "optim.label_smoothing=0.1"]
ONE_STEP = ["trainer.epochs=1", "data.batch_size=1600", "optim.schedule=constant"]


@cache
def configure(*overrides: str) -> Config:
    return compose("train", [*SMALL, *overrides])[0].config


def train(lab: Path, *overrides: str, rungs: tuple[float, ...] = ()) -> FitResult:
    return fit(configure(*overrides), lab, TrainingObserver(), rungs)


def train_plainly(lab: Path, *overrides: str) -> tuple[DigitModule, pl.Trainer]:
    """Train as somebody who knows Lightning and nothing of this package's own loop."""
    config = configure(*overrides)
    torch.set_num_threads(config.trainer.threads)
    torch.manual_seed(config.trainer.seed)
    module = DigitModule(config)
    trainer = pl.Trainer(
        max_epochs=config.trainer.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        limit_val_batches=1.0 if config.data.evaluate_on is EvaluateOn.validation else 0,
    )
    trainer.fit(module, datamodule=DigitsData(config, lab))
    return module, trainer


def digest(weights: Mapping[str, Tensor]) -> str:
    whole = {name: value.detach().contiguous() for name, value in weights.items()}
    return hashlib.sha256(safetensors.torch.save(whole)).hexdigest()


class Listener(TrainingObserver):
    """Keeps all events of a fit: (method, first argument, second argument)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any, Any]] = []

    def started(self, facts: Mapping[str, float]) -> None:
        self.events.append(("started", 0, dict(facts)))

    def batch(self, fraction: float) -> None:
        self.events.append(("batch", fraction, None))

    def rung(self, rung: float, accuracy: float) -> None:
        self.events.append(("rung", rung, accuracy))

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.events.append(("epoch", epoch, dict(metrics)))

    def of(self, method: str) -> list[tuple[Any, Any]]:
        return [(first, second) for name, first, second in self.events if name == method]


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises in another thread than the main one."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()
