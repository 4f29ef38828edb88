"""What a fit reports while it trains: blocks of steps, rungs, epochs, and the film."""

import math
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from digitlab.data.datamodule import DigitsData
from digitlab.training.blocks import BlockModule
from digitlab.training.evaluate import evaluate, measure
from digitlab.training.film import FILM_IMAGES, Frame, make_frame, shown_steps
from digitlab.training.module import Diverged
from digitlab.training.observer import TrainingObserver
from digitlab.training.stopping import EarlyStopping


class Reporter(pl.Callback):
    """Reports blocks, rungs and epochs to the observer, and measures at the latter two."""

    def __init__(
        self,
        data: DigitsData,
        observer: TrainingObserver,
        stopping: EarlyStopping,
        rungs: Sequence[float],
        snapshots: Sequence[int],
        steps: tuple[int, int],
    ) -> None:
        """Args: steps: of the whole fit, and of an epoch."""
        self.validation, self.config = data.validation, data.config.data
        self.epoch_steps = steps[1]
        self.film_steps = frozenset(shown_steps(*steps) if data.validation else ())
        self.observer, self.stopping, self.rungs = observer, stopping, sorted(rungs)
        self.snapshots = frozenset(snapshots)
        self.metrics: dict[str, float] = {}
        self.logits = torch.empty(0, 10)
        self.film: list[Frame] = []
        self.started = 0.0
        self.sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, _: pl.Trainer, module: Any) -> None:
        # Lightning has just taken over SIGTERM: who calls decides about it, also to ignore it.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.sigterm)
        self.after_step(module)

    def after_step(self, module: BlockModule) -> None:
        step = module.steps_done
        if step in self.snapshots:
            self.observer.snapshot(step, module.learned)
        if step in self.film_steps and (step % self.epoch_steps or not step):
            assert self.validation is not None
            images = self.validation[0][:FILM_IMAGES]
            logits = evaluate(module.learned, images, self.config)
            self.film.append(make_frame(step, self.epoch_steps, module.learned, logits))

    def on_train_batch_end(self, _: pl.Trainer, module: Any, *__: Any) -> None:
        fraction = module.steps_done / module.steps
        self.observer.batch(fraction)
        while self.rungs and fraction >= self.rungs[0]:
            assert self.validation is not None
            rung, (images, labels) = self.rungs.pop(0), self.validation
            logits = evaluate(module.learned, images, self.config)
            self.observer.rung(rung, measure(logits, labels, "val")["val_accuracy"])

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        epoch, rate = trainer.current_epoch + 1, module.seen / (time.perf_counter() - self.started)
        self.metrics = module.train_metrics() | {"images_per_second": rate}
        if self.validation is not None:
            images, labels = self.validation
            self.logits = evaluate(module.learned, images, self.config)
            self.metrics |= measure(self.logits, labels, "val")
            step, shown = module.steps_done, self.logits[:FILM_IMAGES]
            self.film.append(make_frame(step, self.epoch_steps, module.learned, shown))
            if not math.isfinite(self.metrics["val_loss"]):
                raise Diverged(f"val_loss is not finite after epoch {epoch}")
            if self.stopping.epoch(epoch, self.metrics, self.logits, module.learned):
                trainer.should_stop = True
        self.observer.epoch(epoch, self.metrics)
