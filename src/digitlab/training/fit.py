"""Train one configuration: the course of a fit on one page."""

import ctypes
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]
from torch import Tensor

from digitlab.config.types import Config, EvaluateOn
from digitlab.data.datamodule import DigitsData, Labelled
from digitlab.data.datasets import class_names
from digitlab.training.blocks import BlockModule, Blocks
from digitlab.training.captured import CapturedModule
from digitlab.training.checkpoint import Checkpoints, Earlier, describe_training
from digitlab.training.device import find_device, numerics
from digitlab.training.evaluate import count_flops, count_parameters, evaluate, measure
from digitlab.training.film import Frame
from digitlab.training.observer import TrainingObserver
from digitlab.training.reporter import Reporter
from digitlab.training.stopping import EarlyStopping


@dataclass(frozen=True)
class FitResult:
    """The result of a fit.

    `logits` (M, 10) and `labels` (M,) are of the images that it was measured on, the set that
    `config.data.evaluate_on` names; `metrics` are of the epoch whose weights were kept.
    """

    weights: dict[str, Tensor]
    logits: Tensor
    labels: Tensor
    images: Tensor  # uint8 (M, 1, 28, 28)
    metrics: dict[str, float]
    data_sha256: dict[str, str]
    film: list[Frame]  # of the first of `images`; empty without a validation set
    numerics: dict[str, Any]  # what torch computed with: all that may change bits
    classes: list[str]  # names of labels 0 to 9
    earlier: Earlier  # before the checkpoint that it went on from


def fit(
    config: Config,
    lab: Path,
    observer: TrainingObserver,
    rungs: Sequence[float] = (),
    snapshots: Sequence[int] = (),
    checkpoint: bytes | None = None,
) -> FitResult:
    """Train a configuration from its seed and measure it.

    The same configuration on the same machine with the same thread count gives the same bits, in
    whichever thread of the process it is called; so it does whatever is observed.

    Args:
        rungs: fractions of the schedule at which the observer receives the validation accuracy.
        snapshots: steps after which it receives the network; 0 is before the first one. A fit that
            is to show any makes no checkpoints.
        checkpoint: what an observer received of such a fit, which this one then goes on with.
            One made with anything else that bits depend on is ignored.

    Raises:
        Diverged: the loss is no longer finite.
        UserError: the data are not available, or not the known ones.
        StopTraining, or whatever else the observer raises: at once.
    """
    device = _prepare_torch(config)
    data = DigitsData(config, lab)
    data.setup("fit")
    data.move(device)
    batches = data.train_dataloader()
    kind = CapturedModule if device.type == "cuda" else BlockModule
    steps = config.trainer.epochs * len(batches)
    module = kind(config, steps)
    made_with = describe_training(config, rungs, data.sha256, numerics(device))
    checkpoints = Checkpoints(config, made_with, batches, checkpoint)
    passes = 3 * len(batches.labels) * config.trainer.epochs  # a backward pass costs two
    flops = passes * count_flops(module.network)
    parameters = count_parameters(module.network)
    facts: dict[str, float] = {"model_parameters": parameters, "training_flops": flops}
    if checkpoints.state:
        earlier = checkpoints.earlier
        facts |= {"resumed_at_step": earlier.steps, "resumed_at_seconds": earlier.seconds}
        module.earlier_epochs = earlier.steps // len(batches)
    observer.started(facts)
    stopping = EarlyStopping(config.trainer.early_stopping)
    shown = (steps, len(batches))
    reporter = Reporter(data, observer, stopping, rungs, snapshots, shown, checkpoints)
    module.after_step = reporter.after_step
    _train(config, device, module.to(device), Blocks(batches), reporter)
    logits, (images, labels), metrics = _measure(data, device, module, reporter)
    learned = module.learned.state_dict()
    if best := stopping.best:
        logits, metrics, learned = best.logits, dict(best.metrics), dict(best.weights)
        metrics["training_flops"] = flops * module.steps_done / steps
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in learned.items()}
    measured = (logits.cpu(), labels.cpu(), images.cpu())
    film, classes = reporter.film, class_names(config.data.name, lab)
    used, before = numerics(device), checkpoints.earlier
    return FitResult(weights, *measured, metrics, data.sha256, film, used, classes, before)


def _measure(
    data: DigitsData, device: torch.device, module: BlockModule, reporter: Reporter
) -> tuple[Tensor, Labelled, dict[str, float]]:
    """Return logits, images with labels, and metrics of the set that the fit is measured on."""
    if data.config.data.evaluate_on is EvaluateOn.validation:
        assert data.validation is not None
        return reporter.logits, data.validation, reporter.metrics
    data.setup("test")
    data.move(device)
    assert data.test is not None
    images, labels = data.test
    # Lightning has taken the network back to the processor.
    logits = evaluate(module.to(device).learned, images, data.config.data)
    return logits, data.test, reporter.metrics | measure(logits, labels, "test")


def _train(
    config: Config,
    device: torch.device,
    module: BlockModule,
    blocks: Blocks,
    reporter: Reporter,
) -> None:
    # At each fit Lightning reports the hardware and gives advice: noise in a study. A context that
    # restores the filters would do so under other threads too.
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    trainer = pl.Trainer(
        max_epochs=config.trainer.epochs - module.earlier_epochs,
        accelerator=device.type,
        devices=1,
        # Lightning would find an allocation of Slurm by itself, and wait for its other tasks.
        plugins=[LightningEnvironment()],
        # The gradients of pooling are summed in any order by CUDA, which has no other way.
        deterministic=True if device.type == "cpu" else "warn",
        callbacks=[reporter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,  # the reporter measures, at rungs too
    )
    try:
        trainer.fit(module, blocks)
    except SystemExit as end:  # what Lightning makes of Ctrl-C
        if isinstance(end.__context__, KeyboardInterrupt):
            raise end.__context__ from None
        raise


def _prepare_torch(config: Config) -> torch.device:
    """Set up torch for a fit, and return the device that trains.

    Raises:
        UserError: this machine has no such device.
    """
    torch.set_num_threads(config.trainer.threads)
    torch.manual_seed(config.trainer.seed)
    if not torch.cuda.is_available():
        # Else torch's optimizers look for CUDA's library at every step.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Nothing here reads memory that it has not written, which is what filling it would guard.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # glibc would return the pages of a step's tensors and fault them in again at the next step,
    # which doubles the time of a step with large tensors. Other allocators have no such setting.
    settings = {-1: 2**31 - 1, -2: 2**26, -3: 2**25}  # malloc.h: trim, top pad, mmap threshold; B
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in settings.items():
            mallopt(name, value)
    return find_device(config.trainer.device)
