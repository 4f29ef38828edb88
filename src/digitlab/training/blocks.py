"""The same training with many steps in one iteration of Lightning's loop.

Lightning's loop takes about 0.5 ms an iteration beside the step itself: hooks, progress, the
wrapped optimizer. That is a third of the step of a small network. Shared by a block of batches it
does not matter any more; the weights are the same, bit for bit.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from digitlab.config.types import Config
from digitlab.data.images import Batches
from digitlab.training.module import Batch, DigitModule

_BLOCKS_A_PASS = 20  # at least: how finely progress is reported and rungs are met
_LARGEST_BLOCK = 16  # batches: about a quarter of a second until a fit notices that it is to stop

_COUNTERS = ("steps_done", "steps_averaged", "loss_sum", "correct", "seen")


class Blocks:
    """The batches of a pass in lists of equal length, the last one of what is left."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.size = min(_LARGEST_BLOCK, max(1, len(batches) // _BLOCKS_A_PASS))  # batches

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.size)

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = iter(self.batches)
        while block := list(islice(batches, self.size)):
            yield block


class BlockModule(DigitModule):
    """A DigitModule that takes one optimizer step for each batch of a block."""

    def __init__(self, config: Config, steps: int) -> None:
        super().__init__(config, steps)
        self.automatic_optimization = False
        self.steps_done = 0
        self.after_step: Callable[[BlockModule], None] = lambda _: None
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.loss_sum = 0.0
        self.correct = self.seen = 0

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the state of this module holds beside weights."""
        return {name: getattr(self, name) for name in _COUNTERS}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        for name in _COUNTERS:
            setattr(self, name, state[name])

    def training_step(self, block: list[Batch], _: int) -> None:  # type: ignore[override]
        losses: list[Tensor] = []
        outputs: list[Tensor] = []
        for batch in block:
            loss, logits = self.take_step(batch)
            # Lightning's wrappers of schedule and optimizer would bring back what the block saves.
            self.trainer.lr_scheduler_configs[0].scheduler.step()  # type: ignore[call-arg]
            losses.append(loss * len(logits))
            outputs.append(logits)
            self.steps_done += 1
            self.after_step(self)
        labels = torch.cat([labels for _, labels in block])
        total = float(torch.stack(losses).sum())
        self.refuse_divergence(total)
        self.loss_sum += total
        self.correct += int((torch.cat(outputs).argmax(1) == labels).sum())
        self.seen += len(labels)

    def take_step(self, batch: Batch) -> Batch:
        """Change the weights by one batch; return its mean loss and its logits (N, 10)."""
        [optimizer] = self.trainer.optimizers
        loss, logits = self.loss(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.configure_gradient_clipping(optimizer)
        optimizer.step()
        return loss.detach(), logits

    def train_metrics(self) -> dict[str, float]:
        """Return mean loss and accuracy over the images since the last call."""
        loss, accuracy = self.loss_sum / self.seen, self.correct / self.seen
        self._start_epoch()
        return {"train_loss": loss, "train_accuracy": accuracy}
