"""What a training reports while it runs, and how it is ended early."""

from collections.abc import Mapping


class StopTraining(Exception):
    """Raised by an observer to end the training."""


class TrainingObserver:
    """Receives what a training reports; each method may raise StopTraining."""

    def started(self, facts: Mapping[str, float]) -> None:
        """Receive what is known before the first step."""

    def batch(self, fraction: float) -> None:
        """Receive the fraction of the schedule that is done, after each block of steps."""

    def rung(self, rung: float, accuracy: float) -> None:
        """Receive the validation accuracy at a fraction of the schedule."""

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Receive an epoch's metrics; epochs count from 1."""
