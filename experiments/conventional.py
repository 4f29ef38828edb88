"""The study of the recipe `halving` on the conventional stack: what `make bench` compares with.

    python experiments/conventional.py FOLDER TRIALS whole|pruned   # data: FOLDER/MNIST/raw

torchvision's MNIST through a DataLoader, Lightning with its defaults and its MLFlowLogger, Optuna's
own loop on sqlite, one process: as their tutorials show it. The space, network, batches,
augmentation, optimizer, schedule and validation set are those of `experiments/halving.yaml`.
`pruned` adds Optuna's default pruner after every epoch. A study in FOLDER is continued. Prints the
seconds of each of the TRIALS as one JSON line.
"""

import json
import sys
import time

import optuna
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import MLFlowLogger
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

folder, trials, prune = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "pruned"
runs = f"sqlite:///{folder}/mlflow.db"
normalise = [transforms.ToTensor(), transforms.Normalize(0.1307, 0.3081)]
# Shift is a fraction of 28 pixels: 1.5 of them.
moved = transforms.RandomAffine(12, (0.054, 0.054), (0.88, 1.12), 6)
learned = MNIST(folder, train=True, transform=transforms.Compose([moved, *normalise]))
kept = MNIST(folder, train=True, transform=transforms.Compose(normalise))
learn = DataLoader(Subset(learned, range(50000)), 128, shuffle=True)
check = DataLoader(Subset(kept, range(50000, 60000)), 128)


def network(widths: list[int], hidden: int) -> nn.Sequential:
    first, second, third = widths
    return nn.Sequential(
        nn.Conv2d(1, first, 5, stride=2, padding=2),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(second, third, 3, padding=1),
        nn.BatchNorm2d(third),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9 * third, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


class Module(pl.LightningModule):
    def __init__(self, trial: optuna.Trial) -> None:
        super().__init__()
        widths = trial.suggest_categorical("widths", ["16,24,48", "16,32,48", "16,32,64"])
        hidden = trial.suggest_int("hidden", 64, 256, log=True)
        self.rate = trial.suggest_float("rate", 0.004, 0.025, log=True)
        self.network = network([int(width) for width in widths.split(",")], hidden)
        self.trial = trial

    def training_step(self, batch: tuple, _: int) -> torch.Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1], label_smoothing=0.05)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple, _: int) -> None:
        right = (self.network(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_accuracy", right)

    def on_validation_end(self) -> None:
        if prune and not self.trainer.sanity_checking:
            accuracy = float(self.trainer.callback_metrics["val_accuracy"])
            self.trial.report(accuracy, self.current_epoch)
            self.trainer.should_stop = self.trial.should_prune()

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def objective(trial: optuna.Trial) -> float:
    started = time.perf_counter()
    epochs = trial.suggest_int("epochs", 3, 5)
    logger = MLFlowLogger("conventional", tracking_uri=runs)
    trainer = pl.Trainer(max_epochs=epochs, logger=logger, default_root_dir=folder)
    trainer.fit(Module(trial), learn, check)
    seconds.append(time.perf_counter() - started)
    if trainer.current_epoch < epochs:
        raise optuna.TrialPruned
    return float(trainer.callback_metrics["val_accuracy"])


seconds: list[float] = []
MLFlowLogger("conventional", tracking_uri=runs).experiment  # noqa: B018  makes the tables, once
study = optuna.create_study(
    study_name="conventional",
    storage=f"sqlite:///{folder}/optuna.db",
    direction="maximize",
    load_if_exists=True,
)
study.optimize(objective, n_trials=trials)
print(json.dumps({"seconds": seconds}))
