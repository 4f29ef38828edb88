"""What a fit reports while it trains."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


class StopTraining(Exception):
    """Raised by an observer to end the fit at once; `fit` passes it on to its caller."""


class TrainingObserver:
    """Receives the events of a fit; all methods do nothing here. Any of them may raise."""

    def started(self, facts: Mapping[str, float]) -> None:
        """Receive what is known before the first step: model_parameters, training_flops.

        A fit that goes on from a checkpoint adds resumed_at_step and resumed_at_seconds, then
        repeats the events of epochs and rungs before it.
        """

    def batch(self, fraction: float) -> None:
        """Receive, after each block of steps, the fraction of the training steps that is done."""

    def rung(self, rung: float, accuracy: float) -> None:
        """Receive the validation accuracy at a requested fraction of the schedule."""

    def snapshot(self, step: int, network: "nn.Module") -> None:
        """Receive the network after a number of steps that the fit was asked to show."""

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Receive the metrics of an epoch; epochs are counted from 1."""

    def checkpoint(self, content: bytes) -> None:
        """Receive, every `trainer.checkpoint_minutes`, a state that `fit` can go on from."""


class ObserverGroup(TrainingObserver):
    """Passes every event on to several observers, in their order."""

    def __init__(self, observers: Sequence[TrainingObserver]) -> None:
        self.observers = observers

    def started(self, facts: Mapping[str, float]) -> None:
        for observer in self.observers:
            observer.started(facts)

    def batch(self, fraction: float) -> None:
        for observer in self.observers:
            observer.batch(fraction)

    def rung(self, rung: float, accuracy: float) -> None:
        for observer in self.observers:
            observer.rung(rung, accuracy)

    def snapshot(self, step: int, network: "nn.Module") -> None:
        for observer in self.observers:
            observer.snapshot(step, network)

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        for observer in self.observers:
            observer.epoch(epoch, metrics)

    def checkpoint(self, content: bytes) -> None:
        for observer in self.observers:
            observer.checkpoint(content)
