"""Early stopping: a fit ends once it no longer gets better, and keeps its best epoch."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class BestEpoch:
    """The epoch with the highest validation accuracy so far; of equal ones the earlier."""

    metrics: Mapping[str, float]  # with `best_epoch`, counted from 1
    logits: Tensor
    weights: Mapping[str, Tensor]


class EarlyStopping:
    """Keeps the best epoch, and ends the fit after `patience` further ones without a better."""

    def __init__(self, patience: int) -> None:
        """Create one that has seen nothing; a patience of 0 keeps nothing and never ends a fit."""
        self.patience = patience
        self.best: BestEpoch | None = None

    def epoch(
        self, epoch: int, metrics: Mapping[str, float], logits: Tensor, network: nn.Module
    ) -> bool:
        """Receive what an epoch came to; return whether the fit is to end."""
        if not self.patience:
            return False
        if self.best is None or metrics["val_accuracy"] > self.best.metrics["val_accuracy"]:
            weights = {name: value.clone() for name, value in network.state_dict().items()}
            self.best = BestEpoch({**metrics, "best_epoch": epoch}, logits, weights)
        return epoch - self.best.metrics["best_epoch"] >= self.patience
