"""Types and limits of everything that a run can be told. The values stand in `conf/`."""

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from digitlab.base.errors import UserError, require


class EvaluateOn(StrEnum):
    """Which images a run learns from, and which it is measured on."""

    validation = "validation"  # learn from the rest of the training images
    test = "test"  # learn from all training images, measure once on the test images


class Optimizer(StrEnum):
    adamw = "adamw"
    adam = "adam"
    sgd = "sgd"


class Schedule(StrEnum):
    onecycle = "onecycle"
    cosine = "cosine"
    constant = "constant"


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"  # products in 8 significant bits, sums and weights in float32


class Sampler(StrEnum):
    tpe = "tpe"
    gp = "gp"
    random = "random"
    grid = "grid"


class Pruner(StrEnum):
    none = "none"
    median = "median"
    halving = "halving"
    hyperband = "hyperband"


class Tracker(StrEnum):
    mlflow = "mlflow"
    none = "none"


class Launcher(StrEnum):
    """Who starts the workers that take a study's trials."""

    processes = "processes"  # the study itself, on its machine
    ray = "ray"  # a Ray cluster


@dataclass
class AugmentConfig:
    """Random changes of training images, each image of a batch its own; 0 turns one off."""

    shift: float  # largest shift along each axis, pixels
    rotate: float  # largest rotation either way, degrees
    scale: float  # largest change of size, fraction: 0.1 is 0.9 to 1.1
    shear: float  # largest horizontal shear, degrees
    erase: int  # side of a square set to black, pixels
    stroke: float  # how far strokes go towards a pixel thicker or thinner, fraction

    def __post_init__(self) -> None:
        require(0 <= self.shift <= 14, f"data.augment.shift={self.shift}", "0 to 14 pixels")
        require(0 <= self.rotate <= 180, f"data.augment.rotate={self.rotate}", "0 to 180 degrees")
        require(0 <= self.scale < 1, f"data.augment.scale={self.scale}", "0 <= scale < 1")
        require(0 <= self.shear <= 60, f"data.augment.shear={self.shear}", "0 to 60 degrees")
        require(0 <= self.erase <= 28, f"data.augment.erase={self.erase}", "0 to 28 pixels")
        require(0 <= self.stroke <= 1, f"data.augment.stroke={self.stroke}", "0 to 1")


@dataclass
class DataConfig:
    """Which digits, how they are split, and how a batch is made of them."""

    name: str  # a key of datasets.KNOWN
    evaluate_on: EvaluateOn
    validation_images: int  # images of the training set kept for validation
    split_seed: int  # of the validation set alone, so that a new training seed keeps the split
    images: int  # to learn from, stratified; 0 is all
    batch_size: int
    mean: float  # of the pixels in [0, 1]; subtracted
    std: float  # of the pixels in [0, 1]; divided by
    augment: AugmentConfig
    allow_unknown: bool  # train on files whose SHA-256 is not the known one

    def __post_init__(self) -> None:
        require(
            self.validation_images >= 10,
            f"data.validation_images={self.validation_images}",
            "an integer >= 10",
        )
        require(self.images >= 0, f"data.images={self.images}", "an integer >= 0, 0 for all")
        require(self.batch_size >= 1, f"data.batch_size={self.batch_size}", "an integer >= 1")
        seed = f"data.split_seed={self.split_seed}"
        require(0 <= self.split_seed < 2**31, seed, "0 to 2147483647")
        require(math.isfinite(self.mean), f"data.mean={self.mean}", "a finite number")
        require(0 < self.std < math.inf, f"data.std={self.std}", "a finite number > 0")


@dataclass
class OptimConfig:
    """The optimizer and the course of its learning rate."""

    name: Optimizer
    learning_rate: float  # the peak of the schedule
    weight_decay: float  # of weights; biases and norms have none
    momentum: float  # of sgd, Nesterov's; the first beta of adam and adamw
    beta2: float  # the second beta of adam and adamw
    schedule: Schedule
    warmup: float  # fraction of all steps until the peak; of onecycle
    label_smoothing: float
    gradient_clip: float  # largest norm of the gradient; 0 is off
    ema: float  # decay of an exponential moving average of the weights, a step; 0 is off

    def __post_init__(self) -> None:
        rate = f"optim.learning_rate={self.learning_rate}"
        require(0 < self.learning_rate <= 10, rate, "0 < learning_rate <= 10")
        decay = f"optim.weight_decay={self.weight_decay}"
        require(0 <= self.weight_decay <= 1, decay, "0 to 1")
        require(0 <= self.momentum < 1, f"optim.momentum={self.momentum}", "0 <= momentum < 1")
        require(0 <= self.beta2 < 1, f"optim.beta2={self.beta2}", "0 <= beta2 < 1")
        require(0 < self.warmup < 1, f"optim.warmup={self.warmup}", "0 < warmup < 1")
        smoothing = f"optim.label_smoothing={self.label_smoothing}"
        require(0 <= self.label_smoothing < 1, smoothing, "0 <= label_smoothing < 1")
        clip = f"optim.gradient_clip={self.gradient_clip}"
        require(self.gradient_clip >= 0, clip, "a number >= 0, 0 for none")
        require(0 <= self.ema < 1, f"optim.ema={self.ema}", "0 <= ema < 1")


@dataclass
class TrainerConfig:
    """How long, with which seed, on how much of the machine."""

    epochs: int
    seed: int  # of the weights, the order of the images, augmentation and dropout
    threads: int  # of torch; another number may give other bits
    precision: Precision  # of training; bfloat16 pays where the processor has it

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"trainer.epochs={self.epochs}", "an integer >= 1")
        require(0 <= self.seed < 2**31, f"trainer.seed={self.seed}", "0 to 2147483647")
        require(1 <= self.threads <= 1024, f"trainer.threads={self.threads}", "1 to 1024")


@dataclass
class StudyConfig:
    """What a search does; `digitlab train` does not look at it."""

    name: str
    storage: str | None  # postgresql+psycopg://user@host/database; null is sqlite in the lab folder
    space: dict[str, str]  # knob -> its range in Hydra's sweep grammar
    fork_from: str | None  # another study, whose trials are taken over where they still fit
    trials: int  # in all, however often the study is stopped and started
    workers: int  # processes; 0 is the machine's cores divided by trainer.threads
    minutes: float  # no trial starts after so long in all; 0 is no limit
    patience: int  # no trial starts after so many without a better one; 0 is no limit
    trial_minutes: float  # a trial that takes longer has failed; 0 is no limit
    retries: int  # of a trial whose worker died or that raised
    count_failed: bool  # whether a trial that failed for good counts towards `trials`
    sampler: Sampler
    startup_trials: int  # drawn at random before tpe and gp begin to learn
    seed: int  # of the sampler
    pruner: Pruner
    rungs: list[float]  # where a trial may be pruned: fractions of its own training steps
    audit_pruning: int  # pruned trials trained to the end after all: would one have won?
    confirm: int  # best configurations trained again on new seeds
    confirm_seeds: int  # new seeds for each of them
    final_seeds: int  # fits of the champion, each tested once

    def __post_init__(self) -> None:
        named = bool(self.name) and all(c.isalnum() or c in "-_." for c in self.name)
        named = named and not self.name.startswith(".")
        require(named, f"study.name={self.name}", "letters, digits, '-', '_' and '.'")
        _refuse_password("study.storage", self.storage, "PGPASSWORD or ~/.pgpass")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            require(value >= least, f"study.{name}={value}", f"a number >= {least}")
        require(self.seed < 2**32, f"study.seed={self.seed}", "0 to 4294967295")
        between = all(0 < rung < 1 for rung in self.rungs)
        ascending = self.rungs == sorted(set(self.rungs))
        allowed = "fractions of the schedule, ascending, 0 < rung < 1"
        require(between and ascending, f"study.rungs={self.rungs}", allowed)
        if self.pruner is not Pruner.none and not self.rungs:
            raise UserError(
                f"study.pruner={self.pruner} with study.rungs=[] has nowhere to prune: "
                "give a rung, or study.pruner=none"
            )


_LEAST = {
    "trials": 1,
    "workers": 0,
    "minutes": 0,
    "patience": 0,
    "trial_minutes": 0,
    "retries": 0,
    "startup_trials": 1,
    "seed": 0,
    "audit_pruning": 0,
    "confirm": 1,
    "confirm_seeds": 1,
    "final_seeds": 1,
}


@dataclass
class TrackingConfig:
    """Where runs are recorded."""

    name: Tracker
    uri: str | None  # of an MLflow server or store; null is sqlite in the lab folder
    experiment: str  # MLflow's word for the group of runs that stand together

    def __post_init__(self) -> None:
        _refuse_password("tracking.uri", self.uri, "MLFLOW_TRACKING_PASSWORD")


def _refuse_password(key: str, address: str | None, place: str) -> None:
    """A configuration is recorded with every run, so that no secret may stand in it."""
    if address and ("password=" in address.lower() or re.search(r"//[^/?#]*:[^/?#]*@", address)):
        raise UserError(
            f"{key}: the address holds a password, and would be recorded with every run: leave it "
            f"out, and give it in {place}, or in the file .env of the lab folder"
        )


@dataclass
class LauncherConfig:
    """Who starts a study's workers; all but the name is Ray's."""

    name: Launcher
    address: str  # of the cluster: auto is the one that this machine belongs to
    workers: int  # 0 is as many as the cluster has CPUs for
    cpus: float  # of each worker

    def __post_init__(self) -> None:
        require(self.workers >= 0, f"launcher.workers={self.workers}", "an integer >= 0")
        require(0 < self.cpus <= 1024, f"launcher.cpus={self.cpus}", "0 < cpus <= 1024")


@dataclass
class Config:
    """One run, whole."""

    data: DataConfig
    model: Any  # a type of networks.NETWORKS, chosen by model.name
    optim: OptimConfig
    trainer: TrainerConfig
    study: StudyConfig
    tracking: TrackingConfig
    launcher: LauncherConfig
