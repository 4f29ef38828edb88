"""Train one configuration: the course of a run on one page."""

import ctypes
import logging
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from digitlab.config.types import Config, EvaluateOn
from digitlab.data.datamodule import DigitsData
from digitlab.training.module import (
    DigitModule,
    Diverged,
    count_flops,
    count_parameters,
    evaluate,
    measure,
)
from digitlab.training.observer import TrainingObserver

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # hardware and tips, at each fit


@dataclass(frozen=True)
class Frame:
    """What a network makes of ten validation images, one of each class, at one moment."""

    epoch: int
    probabilities: Tensor  # (10, 10), a row a digit
    filters: Tensor  # (C, k, k), of the first convolution


@dataclass(frozen=True)
class Fit:
    """What came out of a run.

    `logits` (M, 10) and `labels` (M,) are of the images that the run was measured on, validation or
    test set as `config.data.evaluate_on` says; `metrics` are the last epoch's.
    """

    weights: dict[str, Tensor]
    logits: Tensor
    labels: Tensor
    images: Tensor  # uint8 (M, 1, 28, 28)
    metrics: dict[str, float]
    data_sha256: dict[str, str]
    film: "list[Frame]"  # before the first epoch and after each, of a run with a validation set
    numerics: dict[str, Any]  # what torch computed with: all that may change bits


def fit(config: Config, lab: Path, watch: TrainingObserver, rungs: Sequence[float] = ()) -> Fit:
    """Train `config` from its seed and measure it.

    The same config on the same machine with the same thread count gives the same bits.

    Raises:
        Diverged: the loss is no longer finite.
        UserError: the data are not to be had, or are none of the known ones.
        Whatever `watch` raises, at once.
    """
    torch.set_num_threads(config.trainer.threads)
    torch.manual_seed(config.trainer.seed)
    if not torch.cuda.is_available():  # or torch's optimizers look for its library at every step
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _keep_pages()
    # Nothing here reads memory that it has not written, which is what filling it would guard.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    data = DigitsData(config, lab)
    steps = config.trainer.epochs * data.train_dataloader().steps
    module = DigitModule(config, steps)
    images = len(data.learned[1])
    flops = 3 * count_flops(module.network) * images * config.trainer.epochs  # back is twice forth
    parameters = count_parameters(module.network)
    watch.started({"model_parameters": parameters, "training_flops": flops})
    loop = _Loop(data, watch, list(rungs), steps)
    trainer = pl.Trainer(
        max_epochs=config.trainer.epochs,
        accelerator="cpu",
        devices=1,
        deterministic=True,
        callbacks=[loop],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders that are no DataLoader
        try:
            trainer.fit(module, datamodule=data)
        except SystemExit as end:  # what Lightning makes of Ctrl-C and, between batches, of SIGTERM
            if isinstance(end.__context__, KeyboardInterrupt):
                raise end.__context__ from None
            watch.batch(module.steps / steps)  # which has heard of it too, and ends the run
            raise KeyboardInterrupt from end
    measured, labels = data.measured()
    metrics = loop.metrics
    if config.data.evaluate_on is EvaluateOn.test:
        loop.logits = evaluate(module.learned, measured, config.data)
        metrics = metrics | measure(loop.logits, labels, "test")
    weights = {
        name: value.detach().contiguous().clone()
        for name, value in module.learned.state_dict().items()
    }
    return Fit(weights, loop.logits, labels, measured, metrics, data.sha256, loop.film, _numerics())


def _keep_pages() -> None:
    """Tell glibc's allocator to keep the pages of a step's tensors for the next step.

    It would hand them back and fault them in again, which makes a step of large tensors take twice
    as long. Other allocators have no such setting.
    """
    settings = {-1: 2**31 - 1, -2: 2**26, -3: 2**25}  # malloc.h: trim, top pad, mmap threshold; B
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in settings.items():
            mallopt(name, value)


def _numerics() -> dict[str, Any]:
    return {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "float32": torch.get_float32_matmul_precision(),
    }


def one_of_each(labels: Tensor) -> Tensor:
    """The place (10,) of the first image of each digit that is there at all."""
    places = [int((labels == digit).nonzero()[0]) for digit in range(10) if digit in labels]
    return torch.tensor(places)


class _Loop(pl.Callback):
    """Tells the watch of batches, rungs and epochs, and measures at the latter."""

    def __init__(self, data: DigitsData, watch: TrainingObserver, rungs: list[float], steps: int) -> None:
        self.data, self.watch = data, watch
        self.rungs = sorted(rungs)
        self.steps = steps
        self.metrics: dict[str, float] = {}
        self.logits = torch.empty(0, 10)
        self.film: list[Frame] = []
        self.started = time.perf_counter()

    def on_train_start(self, _: pl.Trainer, module: Any) -> None:
        if self.data.config.data.evaluate_on is EvaluateOn.validation:
            images = self.data.validation[0][one_of_each(self.data.validation[1])]
            self._frame(0, module.learned, evaluate(module.learned, images, self.data.config.data))

    def _frame(self, epoch: int, network: torch.nn.Module, logits: Tensor) -> None:
        filters = next((p for p in network.parameters() if p.ndim == 4), torch.empty(0, 1, 1, 1))
        probabilities = logits.softmax(1)
        self.film.append(Frame(epoch, probabilities, filters.detach().mean(1).clone()))

    def on_train_batch_end(self, _: pl.Trainer, module: Any, *__: Any) -> None:
        done = module.steps / self.steps
        self.watch.batch(done)
        while self.rungs and done >= self.rungs[0]:
            rung = self.rungs.pop(0)
            logits = evaluate(module.learned, self.data.validation[0], self.data.config.data)
            accuracy = measure(logits, self.data.validation[1], "val")["val_accuracy"]
            self.watch.rung(rung, accuracy)

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        images = len(self.data.learned[1])
        rate = images / (time.perf_counter() - self.started)
        self.metrics = module.train_metrics() | {"images_per_second": rate}
        if self.data.config.data.evaluate_on is EvaluateOn.validation:
            held, labels = self.data.validation
            self.logits = evaluate(module.learned, held, self.data.config.data)
            self.metrics |= measure(self.logits, labels, "val")
            digits = self.logits[one_of_each(labels)]
            self._frame(trainer.current_epoch + 1, module.learned, digits)
            if not math.isfinite(self.metrics["val_loss"]):
                raise Diverged(f"val_loss is not finite after epoch {trainer.current_epoch + 1}")
        self.watch.epoch(trainer.current_epoch + 1, self.metrics)
