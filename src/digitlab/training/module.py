"""One network under training, as a Lightning module."""

import math
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from digitlab.config.types import Config, DataConfig, OptimConfig, Optimizer, Precision, Schedule
from digitlab.data.datamodule import standardise, to_unit
from digitlab.networks.table import build_network

_EVALUATION_BATCH = 500  # images: large enough to be fast, small enough to stay in the cache
_EMA_STEPS = 4  # the average takes the weights of every fourth step, which costs a quarter


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class DigitModule(pl.LightningModule):
    """Cross-entropy on a network of the table, with the optimizer and schedule of the config."""

    def __init__(self, config: Config, steps: int) -> None:
        """Args: steps: of the whole run."""
        super().__init__()
        self.automatic_optimization = False  # a call of training_step takes many steps
        self.config = config
        self.network = build_network(config.model)
        self.optimizer = build_optimizer(config.optim, self.network)
        self.schedule = build_schedule(config.optim, self.optimizer, steps)
        self.averaged = None
        if config.optim.ema:
            average = get_ema_multi_avg_fn(config.optim.ema**_EMA_STEPS)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self.loss_sum = self.correct = torch.zeros(())
        self.seen = self.steps = 0

    @property
    def learned(self) -> nn.Module:
        """The network to be measured and kept: the average where there is one."""
        if self.averaged is None or self.averaged.n_averaged == 0:  # a run of fewer steps
            return self.network
        network = self.averaged.module
        assert isinstance(network, nn.Module)
        return network

    def training_step(self, block: list[tuple[Tensor, Tensor]], _: int) -> None:
        """One optimizer step for each batch of images (N, 1, 28, 28) and labels (N,)."""
        optimizer, schedule = self.optimizer, self.schedule
        config, losses, guesses = self.config.optim, [], []
        half = self.config.trainer.precision is Precision.bfloat16
        precision = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
        for images, labels in block:
            with precision:
                logits = self.network(images).float()
                loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if config.gradient_clip:
                nn.utils.clip_grad_norm_(self.network.parameters(), config.gradient_clip)
            optimizer.step()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            self.steps += 1
            if self.averaged is not None and self.steps % _EMA_STEPS == 0:
                self.averaged.update_parameters(self.network)
            losses.append(loss.detach() * len(labels))
            guesses.append(logits.detach())
        labels = torch.cat([labels for _, labels in block])
        self.loss_sum = self.loss_sum + torch.stack(losses).sum()
        self.correct = self.correct + (torch.cat(guesses).argmax(1) == labels).sum()
        self.seen += len(labels)
        if not torch.isfinite(self.loss_sum):
            raise Diverged(
                f"the loss is {float(losses[-1]) / len(block[-1][1])} in epoch "
                f"{self.current_epoch + 1} at learning rate {rate:.3g}"
            )

    def train_metrics(self) -> dict[str, float]:
        """Mean loss and accuracy over the images since the last call."""
        metrics = {
            "train_loss": float(self.loss_sum) / self.seen,
            "train_accuracy": float(self.correct) / self.seen,
        }
        self.loss_sum = self.correct = torch.zeros(())
        self.seen = 0
        return metrics

    def configure_optimizers(self) -> Any:
        return self.optimizer


def build_optimizer(config: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` asks for; biases and norms do not decay."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if not config.weight_decay:  # one group takes half the time of two
        groups = [{"params": parameters, "weight_decay": 0.0}]
    rate, momentum = config.learning_rate, config.momentum
    if config.name is Optimizer.sgd:
        return torch.optim.SGD(groups, rate, momentum, nesterov=momentum > 0, fused=True)
    kind = torch.optim.AdamW if config.name is Optimizer.adamw else torch.optim.Adam
    return kind(groups, rate, (momentum, config.beta2), fused=True)


def build_schedule(
    config: OptimConfig, optimizer: torch.optim.Optimizer, steps: int
) -> lr_scheduler.LRScheduler:
    """The course of the learning rate over `steps` steps.

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


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, config: DataConfig) -> Tensor:
    """Logits (N, 10) of images uint8 (N, 1, 28, 28); leaves the network in the mode it had."""
    training = network.training
    network.eval()
    batches = torch.split(images, _EVALUATION_BATCH)
    logits = torch.cat([network(standardise(to_unit(batch), config)) for batch in batches])
    network.train(training)
    return logits


def measure(logits: Tensor, labels: Tensor, prefix: str) -> dict[str, float]:
    """Mean cross-entropy and accuracy, named `<prefix>_loss` and `<prefix>_accuracy`."""
    loss = float(F.cross_entropy(logits, labels))
    accuracy = float((logits.argmax(1) == labels).double().mean())
    return {f"{prefix}_loss": loss, f"{prefix}_accuracy": accuracy}


def count_parameters(network: nn.Module) -> int:
    """Numbers that training can change."""
    return sum(math.prod(parameter.shape) for parameter in network.parameters())


def count_flops(network: nn.Module) -> int:
    """Floating-point operations of one image's forward pass: a multiply-add is two."""
    training = network.training
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(torch.zeros(1, 1, 28, 28))
    network.train(training)
    return int(counter.get_total_flops())
