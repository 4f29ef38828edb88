"""Record whole tables of configurations, on which `experiments/search.py` compares searches.

    python experiments/search_record.py default fast99 [trainer.device=cuda] [--processes 16]
    python experiments/search_record.py default fast99 --time   # seconds on one thread of this CPU

A table is every combination of a space, each trained with several seeds and never stopped. Kept in
`experiments/search/TABLE.npz`, C configurations in the order of `itertools.product`, S seeds:

    right      packed bits of (C, S, 10000): whether each validation image is read right at the end
    counts     uint16 (C, S, 10, 2): images read right at each tenth of the schedule, of the even
               and of the odd ones
    done       bool (C, S): what was trained, if the time did not suffice for all

and in `experiments/search/TABLE.seconds.npz`, since a table may be trained elsewhere:

    training   float (C,): processor seconds of training on one thread, without measuring
    measuring  float (C,): processor seconds of measuring all validation images once
"""

import argparse
import functools
import itertools
import logging
import time
import warnings
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from ending import end_plainly
from numpy.typing import NDArray

from digitlab.base.paths import lab_folder
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.config.types import Config
from digitlab.data.datamodule import DigitsData
from digitlab.data.datasets import cache_training_digits
from digitlab.networks.table import build_network
from digitlab.training.blocks import BlockModule, Blocks
from digitlab.training.captured import CapturedModule
from digitlab.training.device import find_device
from digitlab.training.evaluate import evaluate
from digitlab.training.module import Diverged

FOLDER = Path(__file__).parent / "search"
TENTHS = 10


@dataclass(frozen=True)
class Table:
    """A space of which every combination is trained, from a recipe."""

    words: tuple[str, ...]  # the recipe, and what is changed for all
    space: dict[str, list[Any]]
    seeds: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Values of each configuration."""
        combinations = itertools.product(*self.space.values())
        return [dict(zip(self.space, values, strict=True)) for values in combinations]

    def config(self, values: dict[str, Any], words: list[str]) -> Config:
        """Return one configuration with further overrides."""
        return with_values(_composed((*self.words, *words)), values)


@functools.cache
def _composed(words: tuple[str, ...]) -> Config:
    return compose("train", words)[0].config


_NEAR_FAST99: dict[str, list[Any]] = {
    "model.widths": [[8, 16], [16, 32], [24, 48], [32, 64]],
    "model.hidden": [32, 64, 128, 256],
    "optim.learning_rate": [0.005, 0.01, 0.02, 0.04],
    "optim.label_smoothing": [0.0, 0.05, 0.15, 0.3],
}
# The recipe fast99 when the tables were recorded.
_FAST99 = ("experiments=fast99", "model.pools=[1,2]", "data.images=36000", "data.batch_size=192")
_FAST99 += ("optim.momentum=0.85", "optim.beta2=0.9", "optim.weight_decay=0.03")
_FAST99 += ("optim.warmup=0.25",)
TABLES = {
    "fast99": Table(_FAST99, _NEAR_FAST99, 5),
    "few": Table((*_FAST99, "data.images=6000", "trainer.epochs=6"), _NEAR_FAST99, 5),
    "default": Table(
        ("model=strided", "optim.label_smoothing=0.05", "optim.ema=0.98"),
        {
            "model.widths": [[16, 32, 64], [24, 48, 96]],
            "trainer.epochs": [4, 8],
            "data.augment.shift": [0.0, 1.5],
            "data.augment.rotate": [0.0, 12.0],
            "data.augment.scale": [0.0, 0.12],
            "optim.learning_rate": [0.003, 0.006, 0.012, 0.024],
        },
        4,
    ),
}


class Tenths(pl.Callback):
    """Keeps which validation images are read right at each tenth of the schedule."""

    def __init__(self, data: DigitsData) -> None:
        assert data.validation is not None
        self.data, self.labels = data, data.validation[1]
        self.right: list[NDArray[np.bool_]] = []

    def on_train_batch_end(self, _: pl.Trainer, module: Any, *__: Any) -> None:
        while len(self.right) < int(TENTHS * module.steps_done / module.steps + 1e-6):
            assert self.data.validation is not None
            images, labels = self.data.validation
            guesses = evaluate(module.learned, images, self.data.config.data).argmax(1)
            self.right.append((guesses == labels).cpu().numpy())


def train(config: Config, lab: Path) -> list[NDArray[np.bool_]]:
    """Return what is read right at each tenth; nothing more once the loss is not finite."""
    torch.manual_seed(config.trainer.seed)
    torch.set_num_threads(config.trainer.threads)
    device = find_device(config.trainer.device)
    data = DigitsData(config, lab)
    data.setup("fit")
    data.move(device)
    batches = data.train_dataloader()
    kind = CapturedModule if device.type == "cuda" else BlockModule
    module = kind(config, config.trainer.epochs * len(batches)).to(device)
    tenths = Tenths(data)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(
        max_epochs=config.trainer.epochs,
        accelerator=device.type,
        devices=1,
        callbacks=[tenths],
        limit_val_batches=0,
        **quiet,  # type: ignore[arg-type]
    )
    try:
        trainer.fit(module, Blocks(batches))
    except Diverged:
        nothing = np.zeros(len(tenths.labels), bool)
        tenths.right += [nothing] * (TENTHS - len(tenths.right))
    return tenths.right


_words: list[str] = []


def _start(words: list[str]) -> None:
    _words.extend(words)
    cache_training_digits()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


Place = tuple[str, int, int]  # table, configuration, seed


def _record(place: Place) -> tuple[Place, NDArray[Any], NDArray[Any]]:
    name, row, seed = place
    table = TABLES[name]
    config = table.config(table.rows[row], [*_words, f"trainer.seed={seed}"])
    right = np.stack(train(config, lab_folder()))
    counts = np.stack([right[:, ::2].sum(1), right[:, 1::2].sum(1)], axis=1).astype(np.uint16)
    return place, counts, np.packbits(right[-1])


def record(names: list[str], words: list[str], processes: int, minutes: float, out: Path) -> None:
    """Train tables, seed by seed, until they are whole or the time is over; then write them."""
    end = time.monotonic() + 60 * minutes
    places = [
        (name, row, seed)
        for name in names
        for seed in range(TABLES[name].seeds)
        for row in range(len(TABLES[name].rows))
    ]
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for name in names:
        shape = (len(TABLES[name].rows), TABLES[name].seeds)
        counts, right = np.zeros((*shape, TENTHS, 2), np.uint16), np.zeros((*shape, 1250), np.uint8)
        found[name] = {"counts": counts, "right": right, "done": np.zeros(shape, bool)}
    with get_context("spawn").Pool(processes, _start, (words,)) as pool:
        for (name, row, seed), counts, right in pool.imap_unordered(_record, places):
            table = found[name]
            table["counts"][row, seed], table["right"][row, seed] = counts, right
            table["done"][row, seed] = True
            if time.monotonic() > end:
                break
        pool.terminate()
    for name, table in found.items():
        print(f"{name}: {table['done'].sum()} of {table['done'].size} fits", flush=True)
        np.savez_compressed(out / f"{name}.npz", **table)  # type: ignore[arg-type]


def time_all(name: str) -> None:
    """Measure what each configuration of a table takes, from a pass over 6,400 images."""
    table = TABLES[name]
    seconds: dict[tuple[Any, ...], tuple[float, float]] = {}
    found = []
    for values in table.rows:
        config = table.config(values, [])
        is_moved = any(vars(config.data.augment).values())
        shape = (*config.model.widths, config.model.hidden, is_moved)  # type: ignore[union-attr]
        if shape not in seconds:
            few = {"data.images": 6400, "trainer.epochs": 1, "data.validation_images": 1000}
            short = with_values(config, few)
            data = DigitsData(short, lab_folder())
            data.setup("fit")
            assert data.validation is not None
            train(short, lab_folder())  # warms up
            start = time.process_time()
            train(short, lab_folder())
            whole, network = time.process_time() - start, build_network(config.model)
            start = time.process_time()
            evaluate(network, data.validation[0], config.data)
            measuring = time.process_time() - start
            seconds[shape] = ((whole - TENTHS * measuring) / 6400, 10 * measuring)
        image, measuring = seconds[shape]
        images = config.data.images or 50_000
        found.append((image * images * config.trainer.epochs, measuring))
    training, measured = np.array(found).T
    least, most = training.min(), training.max()
    print(
        f"{name}: {least:.2f} to {most:.2f} s, and {measured.mean():.2f} s to measure", flush=True
    )
    np.savez_compressed(FOLDER / f"{name}.seconds.npz", training=training, measuring=measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=TABLES, nargs="+")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments, words = parser.parse_known_args()
    if arguments.time:
        cache_training_digits()
        for name in arguments.name:
            time_all(name)
        return
    record(arguments.name, words, arguments.processes, arguments.minutes, arguments.out)


if __name__ == "__main__":
    end_plainly(main)
