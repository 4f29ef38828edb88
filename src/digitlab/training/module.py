"""A network under training as a Lightning module, for any Trainer."""

import math
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from digitlab.config.types import Config, OptimConfig, Optimizer, Precision, Schedule
from digitlab.networks.table import build_network
from digitlab.training.evaluate import measure

_EMA_STEPS = 4  # the average takes the weights of every fourth step, which costs a quarter

Batch = tuple[Tensor, Tensor]  # standardised images (N, 1, 28, 28) and labels (N,)


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class DigitModule(pl.LightningModule):
    """A network of the table, trained with the loss, optimizer and schedule of a configuration.

    `pl.Trainer(max_epochs=...).fit(DigitModule(config), DigitsData(config, lab))` trains it; `fit`
    of this package gives the same weights sooner.
    """

    def __init__(self, config: Config, steps: int | None = None) -> None:
        """Build the network from torch's global seed; a schedule of no `steps` asks the Trainer."""
        super().__init__()
        self.config, self.steps = config, steps
        self.network = build_network(config.model)
        self.averaged: AveragedModel | None = None
        if config.optim.ema:
            average = get_ema_multi_avg_fn(config.optim.ema**_EMA_STEPS)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
            self.averaged.requires_grad_(False)  # else Lightning counts it as trainable
        self.steps_averaged = 0
        self.earlier_epochs = 0  # that another process has trained

    @property
    def learned(self) -> nn.Module:
        """The network to measure and to keep: the average, once it has taken any weights."""
        if self.averaged is None or self.averaged.n_averaged == 0:
            return self.network
        network = self.averaged.module
        assert isinstance(network, nn.Module)
        return network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) of what was learned so far."""
        logits: Tensor = self.learned(images)
        return logits

    def loss(self, batch: Batch) -> Batch:
        """Return the mean loss of a batch and its logits (N, 10)."""
        images, labels = batch
        # Of training alone: a network is always measured in float32.
        is_half = self.config.trainer.precision is Precision.bfloat16
        with torch.autocast(images.device.type, torch.bfloat16) if is_half else nullcontext():
            logits = self.network(images).float()
            smoothing = self.config.optim.label_smoothing
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return loss, logits.detach()

    def refuse_divergence(self, loss: float) -> None:
        """Raise Diverged unless a loss is finite. To read it, one waits for an accelerator."""
        if not math.isfinite(loss):
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            epoch = self.earlier_epochs + self.current_epoch + 1
            where = f"in epoch {epoch} at learning rate {rate:.3g}"
            raise Diverged(f"the loss is {loss} {where}")

    def average_weights(self) -> None:
        """Let the average, if there is one, follow a step of the optimizer."""
        self.steps_averaged += 1
        if self.averaged is not None and self.steps_averaged % _EMA_STEPS == 0:
            self.averaged.update_parameters(self.network)

    def training_step(self, batch: Batch, _: int) -> Tensor | None:
        loss, logits = self.loss(batch)
        self.refuse_divergence(loss.item())
        accuracy = (logits.argmax(1) == batch[1]).float().mean()
        metrics = {"train_loss": loss.detach(), "train_accuracy": accuracy}
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(logits))
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        metrics = measure(self(batch[0]), batch[1], "val")
        self.log_dict(metrics, prog_bar=True, batch_size=len(batch[1]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_dict(measure(self(batch[0]), batch[1], "test"), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.config.optim, self.network)
        steps = self.steps or int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(self.config.optim, optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer was asked to, or else to the configuration's largest norm."""
        if gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self.config.optim.gradient_clip:
            largest = self.config.optim.gradient_clip
            nn.utils.clip_grad_norm_(self.network.parameters(), largest)

    def configure_callbacks(self) -> list[pl.Callback]:
        return [] if self.averaged is None else [WeightAverage()]


class WeightAverage(pl.Callback):
    """Keeps a DigitModule's exponential moving average, and leaves it in the network at the end.

    It follows the optimizer's steps rather than Lightning's batches, since a batch of `BlockModule`
    holds many steps. Lightning's own EMA callback counts batches.
    """

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DigitModule)
        assert module.averaged is not None
        # It is read at every step: on an accelerator each reading would wait for the step's end.
        module.averaged.n_averaged = module.averaged.n_averaged.cpu()
        hook = trainer.optimizers[0].register_step_post_hook
        self.hook = hook(lambda *_: module.average_weights())

    def on_train_end(self, _: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DigitModule)
        self.hook.remove()
        module.network.load_state_dict(module.learned.state_dict())


def build_optimizer(config: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that `optim.name` names; biases and norms do not decay."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if not config.weight_decay:  # one group takes half the time of two
        groups = [{"params": parameters, "weight_decay": 0.0}]
    momentum, device = config.momentum, parameters[0].device
    rate: float | Tensor = config.learning_rate
    if is_cuda := device.type == "cuda":  # a captured step reads the rate from where it stands
        rate = torch.tensor(rate, device=device)
    if config.name is Optimizer.sgd:
        return torch.optim.SGD(groups, rate, momentum, nesterov=momentum > 0, fused=True)
    kind = torch.optim.AdamW if config.name is Optimizer.adamw else torch.optim.Adam
    return kind(groups, rate, (momentum, config.beta2), fused=True, capturable=is_cuda)


def build_schedule(
    config: OptimConfig, optimizer: torch.optim.Optimizer, steps: int
) -> lr_scheduler.LRScheduler:
    """Build the schedule of the learning rate over `steps` steps.

    onecycle: Smith & Topin 2018, as torch has it; cosine: half a cosine down to 0.
    """
    if config.schedule is Schedule.onecycle:
        peak = config.learning_rate
        # torch divides by zero where the warm-up is exactly one step.
        warmup = config.warmup + 1e-6 * (config.warmup * steps == 1)
        return lr_scheduler.OneCycleLR(
            optimizer, peak, steps, pct_start=warmup, cycle_momentum=False
        )
    if config.schedule is Schedule.cosine:
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
