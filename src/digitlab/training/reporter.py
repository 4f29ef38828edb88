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
from digitlab.training.checkpoint import Checkpoints
from digitlab.training.evaluate import evaluate, measure
from digitlab.training.film import FILM_IMAGES, Frame, make_frame, shown_steps
from digitlab.training.module import Diverged
from digitlab.training.observer import StopTraining, TrainingObserver
from digitlab.training.stopping import BestEpoch, EarlyStopping


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
        checkpoints: Checkpoints,
    ) -> None:
        """Args: steps: of the whole fit, and of an epoch."""
        self.checkpoints = checkpoints
        self.events: list[
            tuple[str, float, Any]
        ] = []  # reported so far: epoch or rung, which, what
        self.validation, self.config = data.validation, data.config.data
        self.epoch_steps = steps[1]
        self.film_steps = frozenset(shown_steps(*steps) if data.validation else ())
        self.observer, self.stopping, self.rungs = observer, stopping, sorted(rungs)
        self.snapshots = frozenset(snapshots)
        self.metrics: dict[str, float] = {}
        self.logits = torch.empty(0, 10)
        self.film: list[Frame] = []
        self.started = 0.0  # the present epoch
        self.spent = 0.0  # seconds on it, in an earlier process
        self.sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, _: pl.Trainer, module: Any) -> None:
        # Lightning has just taken over SIGTERM: who calls decides about it, also to ignore it.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.sigterm)
        if self.checkpoints.state:
            self._go_on(module)
        else:
            self.after_step(module)

    def _go_on(self, module: BlockModule) -> None:
        self.load_state_dict(self.checkpoints.restore(module))
        for kind, which, what in self.events:
            if kind == "epoch":
                self.observer.epoch(int(which), what)
            else:
                self.observer.rung(which, what)
        self._meet_rungs(module)

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
        try:
            self.observer.batch(self._fraction(module))
        except StopTraining:
            self._take_checkpoint(module)
            raise
        self._meet_rungs(module)
        if self.checkpoints.is_due():
            self._take_checkpoint(module)

    def _meet_rungs(self, module: BlockModule) -> None:
        while self.rungs and self._fraction(module) >= self.rungs[0]:
            assert self.validation is not None
            rung, (images, labels) = self.rungs.pop(0), self.validation
            logits = evaluate(module.learned, images, self.config)
            accuracy = measure(logits, labels, "val")["val_accuracy"]
            self.events.append(("rung", rung, accuracy))
            self.observer.rung(rung, accuracy)

    def _fraction(self, module: BlockModule) -> float:
        assert module.steps is not None
        return module.steps_done / module.steps

    def _take_checkpoint(self, module: BlockModule) -> None:
        # What an epoch's end adds is not there yet at its last block: the next one is soon enough.
        is_within = module.steps_done % self.epoch_steps > 0
        if is_within and not self.snapshots and self.checkpoints.interval_s < math.inf:
            self.observer.checkpoint(self.checkpoints.take(module, self.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        best = self.stopping.best
        return {
            "events": self.events,
            "film": [vars(frame) for frame in self.film],
            "best": vars(best) if best else None,
            "epoch_seconds": time.perf_counter() - self.started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.events = [tuple(event) for event in state["events"]]
        self.rungs = self.rungs[sum(kind == "rung" for kind, _, _ in self.events) :]
        self.film = [Frame(**frame) for frame in state["film"]]
        self.stopping.best = BestEpoch(**state["best"]) if state["best"] else None
        self.spent = state["epoch_seconds"]

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started, self.spent = time.perf_counter() - self.spent, 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        epoch = module.earlier_epochs + trainer.current_epoch + 1
        rate = module.seen / (time.perf_counter() - self.started)
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
        self.events.append(("epoch", epoch, self.metrics))
        self.observer.epoch(epoch, self.metrics)
