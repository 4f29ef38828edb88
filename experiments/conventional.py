"""The default study's trials on the conventional stack: what `make bench` measures against.

    python experiments/conventional.py FOLDER TRIALS EPOCHS   # FOLDER/MNIST/raw holds the data

torchvision's MNIST through a DataLoader, Lightning with its defaults, its MLFlowLogger, Optuna's
own loop, one process: as their tutorials show it. Same network, batches, optimizer, augmentation
(torchvision's) and holdout. Prints the seconds of each trial as one JSON line.
"""

import json
import sys
import tempfile
import time

import optuna
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import MLFlowLogger
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from digitlab.compose import compose, with_values
from digitlab.networks import build_network

folder, trials, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
recipe = compose("train", ["experiments=default", f"trainer.epochs={epochs}"])[0].config
normalise = [transforms.ToTensor(), transforms.Normalize(recipe.data.mean, recipe.data.std)]
moved = transforms.RandomAffine(12, (0.054, 0.054), (0.88, 1.12), 6)  # shift: fraction of 28
learned = MNIST(folder, train=True, transform=transforms.Compose([moved, *normalise]))
held = MNIST(folder, train=True, transform=transforms.Compose(normalise))
batch = recipe.data.batch_size
learn = DataLoader(Subset(learned, range(50000)), batch, shuffle=True)
check = DataLoader(Subset(held, range(50000, 60000)), batch)


class Module(pl.LightningModule):
    def __init__(self, network: torch.nn.Module, rate: float) -> None:
        super().__init__()
        self.network, self.rate = network, rate

    def training_step(self, batch: tuple, _: int) -> torch.Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1], label_smoothing=0.05)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple, _: int) -> None:
        right = (self.network(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_accuracy", right)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def objective(trial: optuna.Trial) -> float:
    begun = time.perf_counter()
    hidden = trial.suggest_int("hidden", 64, 256, log=True)
    rate = trial.suggest_float("rate", 0.004, 0.025, log=True)
    module = Module(build_network(with_values(recipe, {"model.hidden": hidden}).model), rate)
    logger = MLFlowLogger("conventional", tracking_uri=f"sqlite:///{place}/mlflow.db")
    trainer = pl.Trainer(max_epochs=epochs, logger=logger, default_root_dir=place)
    trainer.fit(module, learn, check)
    seconds.append(time.perf_counter() - begun)
    return float(trainer.callback_metrics["val_accuracy"])


seconds: list[float] = []
with tempfile.TemporaryDirectory() as place:
    MLFlowLogger("conventional", tracking_uri=f"sqlite:///{place}/mlflow.db").experiment  # noqa: B018  makes the tables, once
    optuna.create_study(direction="maximize").optimize(objective, n_trials=trials)
print(json.dumps({"seconds": seconds}))
