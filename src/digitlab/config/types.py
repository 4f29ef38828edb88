"""Types, limits and descriptions of all settings. The values stand in `conf/`."""

import hashlib
import re
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from digitlab.base.errors import UserError, require, visible
from digitlab.networks.settings import STRICT, ModelConfig, Positive

Count = Annotated[int, Field(ge=0)]
SeedNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class EvaluateOn(StrEnum):
    """Which images a run learns from, and which it is measured on."""

    validation = "validation"  # learn from the rest of the training images
    test = "test"  # learn from all training images, measure once on the test images


Optimizer = StrEnum("Optimizer", "adamw adam sgd")
Schedule = StrEnum("Schedule", "onecycle cosine constant")
Sampler = StrEnum("Sampler", "tpe gp random grid")
Pruner = StrEnum("Pruner", "none median halving hyperband screening")
# Metrics of a trial that a study may look for. Seconds are none: they differ at each training.
Objective = StrEnum("Objective", "val_accuracy model_parameters training_flops")
TrackerName = StrEnum("TrackerName", "mlflow none")


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"  # products in 8 significant bits, sums and weights in float32


class Device(StrEnum):
    """What trains a network."""

    cpu = "cpu"  # the only one whose bits are repeated
    auto = "auto"  # the accelerator that torch finds, else the processor
    cuda = "cuda"
    mps = "mps"


class Launcher(StrEnum):
    """Who starts a study's workers."""

    processes = "processes"  # the study itself, on its machine
    ray = "ray"  # a Ray cluster


@dataclass(config=STRICT)
class AugmentConfig:
    """Random changes of training images, each image of a batch its own; 0 turns one off."""

    shift: float = Field(ge=0, le=14, description="Largest shift along each axis, pixels.")
    rotate: float = Field(ge=0, le=180, description="Largest rotation either way, degrees.")
    scale: Share = Field(description="Largest change of size: 0.1 is 0.9 to 1.1.")
    shear: float = Field(ge=0, le=60, description="Largest horizontal shear, degrees.")
    erase: int = Field(ge=0, le=28, description="Side of a square set to black, pixels.")
    stroke: float = Field(ge=0, le=1, description="Most that strokes grow or shrink, pixels.")


@dataclass(config=STRICT)
class DataConfig:
    """Which digits, how they are split, and how a batch is made of them."""

    name: str = Field(description="Name of the data set.")
    evaluate_on: EvaluateOn = Field(description="Images that a run is measured on.")
    validation_images: int = Field(ge=10, description="Training images kept for validation.")
    split_seed: SeedNumber = Field(description="Seed of the validation split alone.")
    images: Count = Field(description="Images to learn from, stratified; 0 is all.")
    batch_size: Positive = Field(description="Images in a training step.")
    mean: float = Field(description="Subtracted from pixels in [0, 1].")
    std: float = Field(gt=0, description="What the difference is divided by.")
    augment: AugmentConfig = Field(description="Random changes of training images.")
    allow_unknown: bool = Field(description="Train on files whose SHA-256 is not the known one.")


@dataclass(config=STRICT)
class OptimConfig:
    """The optimizer and the course of its learning rate."""

    name: Optimizer = Field(description="Name of the optimizer.")
    learning_rate: float = Field(gt=0, le=10, description="Peak of the schedule.")
    weight_decay: float = Field(ge=0, le=1, description="Decay of weights; biases have none.")
    momentum: Share = Field(description="Nesterov momentum of sgd; first beta of adam and adamw.")
    beta2: Share = Field(description="Second beta of adam and adamw.")
    schedule: Schedule = Field(description="Course of the learning rate.")
    warmup: float = Field(gt=0, lt=1, description="Fraction of onecycle's steps before its peak.")
    label_smoothing: Share = Field(description="Share of a label spread over all digits.")
    gradient_clip: float = Field(ge=0, description="Largest norm of the gradient; 0 clips none.")
    ema: Share = Field(description="Decay of the weights' moving average a step; 0 is off.")


@dataclass(config=STRICT)
class TrainerConfig:
    """How long, with which seed, on how much of the machine."""

    epochs: Positive = Field(description="Passes over the images to learn from.")
    seed: SeedNumber = Field(
        description="Seed of weights, order of images, augmentation and dropout."
    )
    threads: int = Field(
        ge=1, le=1024, description="Torch's threads; they can change floating-point rounding."
    )
    precision: Precision = Field(description="Number format of training.")
    early_stopping: Count = Field(
        description="Epochs without a better validation accuracy that end a run, whose best epoch "
        "is kept; 0 is off."
    )
    checkpoint_minutes: float = Field(
        ge=0,
        description="Time between checkpoints that a run can go on from; 0 makes and uses none.",
    )
    device: Device = Field(description="What trains; auto is the accelerator that torch finds.")


@dataclass(config=STRICT)
class RequireConfig:
    """What a champion must have, beside being best; null is no bound."""

    val_accuracy: Annotated[float, Field(gt=0, le=1)] | None = Field(
        description="Least validation accuracy."
    )
    model_parameters: Positive | None = Field(description="Most numbers that a network learns.")
    training_flops: Annotated[float, Field(gt=0)] | None = Field(
        description="Most floating-point operations of a training."
    )


_MOST_NAME_CHARACTERS = 100  # of a study's name
# Files are named after a study; a file system takes 255 bytes with what is added.
_MOST_NAME_BYTES = 200


def derived_name(study: str, ending: str) -> str:
    """Return the name of a study that comes of another one: its name and an ending.

    One that is too long is cut; a digest of the whole keeps two such names apart.
    """
    if _fits(study + ending):
        return study + ending
    ending = f"-{hashlib.sha256(study.encode()).hexdigest()[:8]}{ending}"
    lengths = range(len(study), -1, -1)
    return next(study[:n] + ending for n in lengths if _fits(study[:n] + ending))


def _fits(name: str) -> bool:
    return len(name) <= _MOST_NAME_CHARACTERS and len(name.encode()) <= _MOST_NAME_BYTES


@dataclass(config=STRICT)
class StudyConfig:
    """What a search does; `digitlab train` does not look at it."""

    name: str = Field(
        pattern=r"^[\p{L}\p{N}_][\p{L}\p{N}_.-]{0,99}$",
        description="Name of the study.",
        json_schema_extra={
            "rule": "1 to 100 letters, digits, '-', '_' or '.', beginning with neither '-' nor '.'"
        },
    )
    storage: str | None = Field(
        description="postgresql+psycopg://user@host/database; null is sqlite in the lab."
    )
    space: dict[str, str] = Field(description="Hyperparameters with their ranges.")
    options: dict[str, dict[str, dict[str, Any]]] = Field(
        description="Settings of each option that the space names; `sweep` writes them.",
        json_schema_extra={"rule": "a mapping from groups to options to their settings"},
    )
    fork_from: str | None = Field(description="Study whose trials are taken over where they fit.")
    begin_with: list[dict[str, Any]] = Field(
        description="Values of the first trials, after the recipe's own.",
        json_schema_extra={"rule": "a list of mappings from hyperparameters to values"},
    )
    objectives: list[Objective] = Field(
        description="What is searched for: high accuracy, low cost, or a front of both.",
        json_schema_extra={
            "rule": "a list of val_accuracy, model_parameters and training_flops, of one or two"
        },
    )
    require: RequireConfig = Field(description="What a champion must have.")
    trials: Positive = Field(description="Trials in all, however often the study is restarted.")
    workers: Count = Field(description="Processes; 0 is cores divided by trainer.threads.")
    minutes: float = Field(ge=0, description="Time after which no trial starts; 0 is no limit.")
    patience: Count = Field(description="Trials without a better one before it ends; 0 is off.")
    trial_minutes: float = Field(ge=0, description="Time after which a trial fails; 0 is never.")
    retries: Count = Field(description="Retries of a trial that raised or whose worker died.")
    count_failed: bool = Field(description="Whether a failed trial counts towards study.trials.")
    sampler: Sampler = Field(description="How values are drawn.")
    startup_trials: Positive = Field(description="Random trials before tpe and gp learn.")
    seed: int = Field(ge=0, le=2**32 - 1, description="Seed of the sampler.")
    pruner: Pruner = Field(description="How trials are stopped early.")
    rungs: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        description="Fractions of a trial's own schedule at which it may be pruned."
    )
    finish: Positive = Field(
        description="Best screened trials that are trained to the end, of study.trials."
    )
    audit_pruning: Count = Field(description="Pruned trials that are trained to the end after all.")
    confirm: Positive = Field(
        description="Best trials to train again on new seeds, beside the recipe's own; 1 is none."
    )
    confirm_fits: int = Field(ge=0, le=1000, description="Most fits on new seeds in all.")
    margin: Share = Field(description="Accuracy that may be given up for a less costly champion.")
    measure_seeds: int = Field(
        ge=0,
        le=1000,
        description="Fits, after the choice, of champion and recipe's own values each; 0 is none.",
    )
    final_seeds: int = Field(ge=1, le=1000, description="Fits of the champion, each tested once.")

    @model_validator(mode="after")
    def _check(self) -> "StudyConfig":
        short = len(self.name.encode()) <= _MOST_NAME_BYTES
        rule = f"at most {_MOST_NAME_BYTES} bytes long in UTF-8"
        require(short, f"study.name={self.name}", rule)
        rule = "another word than 'champion', which names a run"
        require(self.name != "champion", f"study.name={self.name}", rule)
        _refuse_password("study.storage", self.storage, "PGPASSWORD or ~/.pgpass")
        rule = "a list of fractions > 0 and < 1 in ascending order, a hundredth apart or more"
        # They are recorded as whole hundredths of the schedule.
        hundredths = [round(100 * rung) for rung in self.rungs]
        require(hundredths == sorted(set(hundredths)), f"study.rungs={self.rungs}", rule)
        if self.pruner is not Pruner.none and not self.rungs:
            raise UserError(
                f"study.pruner={self.pruner} with study.rungs=[] never prunes: give a rung, or "
                "study.pruner=none."
            )
        _check_objectives(self)
        if self.pruner is Pruner.screening:
            self._check_screening()
        if self.fork_from is not None and self.sampler is Sampler.grid:
            raise UserError(
                f"study.fork_from={self.fork_from} with study.sampler=grid is invalid: a grid "
                "visits its points by the numbers of its own trials. Use another sampler."
            )
        if self.begin_with and self.sampler is Sampler.grid:
            raise UserError(
                f"study.begin_with={self.begin_with} with study.sampler=grid is invalid: a grid "
                "has its own points. Leave study.begin_with=[], or use another sampler."
            )
        if 0 < self.confirm_fits < self.confirm:
            raise UserError(
                f"study.confirm_fits={self.confirm_fits} with study.confirm={self.confirm} is "
                "invalid: it must be 0 or >= study.confirm, so that each of the best has a fit. "
                "Raise it, or lower study.confirm."
            )
        if self.fork_from == self.name:
            raise UserError(
                f"study.fork_from={self.fork_from} with study.name={self.name} is invalid: a study "
                "takes trials from another one. Name that."
            )
        return self

    def _check_screening(self) -> None:
        if len(self.rungs) != 1:
            raise UserError(
                f"study.pruner=screening with study.rungs={self.rungs} is invalid: all screened "
                "trials end at the same rung. Give one, such as study.rungs=[0.1]."
            )
        if self.finish >= self.trials:
            raise UserError(
                f"study.finish={self.finish} with study.trials={self.trials} is invalid: with "
                "study.pruner=screening it must be < study.trials. Lower it, or raise study.trials."
            )
        if self.sampler is Sampler.grid:
            raise UserError(
                "study.pruner=screening with study.sampler=grid is invalid: a grid visits each of "
                "its points once, and the best are trained again. Use another sampler."
            )
        if self.patience:
            raise UserError(
                f"study.patience={self.patience} with study.pruner=screening is invalid: it would "
                "end the study before the best are trained to the end. Set study.patience=0."
            )


def _check_objectives(study: StudyConfig) -> None:
    given = f"study.objectives={[str(name) for name in study.objectives]}"
    accuracy = Objective.val_accuracy
    costs = [name for name in study.objectives if name is not accuracy]
    is_valid = [*dict.fromkeys(study.objectives)] == study.objectives != [] and len(costs) < 2
    rule = "val_accuracy, one cost (model_parameters or training_flops), or val_accuracy and a cost"
    require(is_valid, given, rule)
    least = study.require.val_accuracy
    if costs == study.objectives and least is None:
        raise UserError(
            f"{given} is invalid without a least accuracy: the smallest network reads nothing. "
            "Set study.require.val_accuracy, such as 0.99."
        )
    if not costs and least is not None:
        raise UserError(
            f"study.require.val_accuracy={least} with {given} is invalid: the most accurate "
            "is searched for already. Leave it null, or give a cost as the objective."
        )
    if costs and study.pruner is not Pruner.none:
        raise UserError(
            f"study.pruner={study.pruner} with {given} is invalid: trials are pruned by their "
            "accuracy alone. Set study.pruner=none."
        )
    bounds = [name for name in Objective if getattr(study.require, name) is not None]
    if bounds and study.pruner not in (Pruner.none, Pruner.screening):
        raise UserError(
            f"study.pruner={study.pruner} with study.require.{bounds[0]} is invalid: trials are "
            "pruned by their accuracy alone, whatever they cost. Set study.pruner=none."
        )


@dataclass(config=STRICT)
class TrackingConfig:
    """Where runs are recorded."""

    name: TrackerName = Field(description="Name of the tracker.")
    uri: str | None = Field(description="Address of MLflow's server; null is sqlite in the lab.")
    experiment: str = Field(description="MLflow experiment that runs belong to.")

    @model_validator(mode="after")
    def _check(self) -> "TrackingConfig":
        _refuse_password("tracking.uri", self.uri, "MLFLOW_TRACKING_PASSWORD")
        is_plain = bool(self.experiment.strip()) and visible(self.experiment) == self.experiment
        rule = "a name without control characters, and not spaces alone"
        require(is_plain, f"tracking.experiment={self.experiment}", rule)
        return self


def _refuse_password(key: str, address: str | None, place: str) -> None:
    """Refuse a password: a configuration is recorded with every run."""
    if address and ("password=" in address.lower() or re.search(r"//[^/?#]*:[^/?#]*@", address)):
        raise UserError(
            f"{key} holds a password, which would be recorded with every run: leave it out, and "
            f"give it in {place}, or in the file .env of the lab folder."
        )


@dataclass(config=STRICT)
class LauncherConfig:
    """Who starts a study's workers; all but the name is Ray's."""

    name: Launcher = Field(description="What starts the workers.")
    address: str = Field(description="Ray cluster; auto is the one this machine belongs to.")
    workers: Count = Field(description="Ray workers; 0 is as many as the cluster's CPUs allow.")
    cpus: float = Field(gt=0, le=1024, description="CPUs of each Ray worker.")
    gpus: float = Field(
        ge=0, le=1, description="Share of a GPU of each Ray worker, which sees none at 0."
    )


@dataclass(config=STRICT)
class Config:
    """One run, whole."""

    data: DataConfig = Field(description="Digits, split and batches.")
    model: ModelConfig = Field(discriminator="name", description="Network and its sizes.")
    optim: OptimConfig = Field(description="Optimizer and schedule.")
    trainer: TrainerConfig = Field(description="Length and seed of a run.")
    study: StudyConfig = Field(description="Search over hyperparameters.")
    tracking: TrackingConfig = Field(description="Where runs are recorded.")
    launcher: LauncherConfig = Field(description="Where a study's workers run.")

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.trainer.early_stopping and self.data.evaluate_on is EvaluateOn.test:
            raise UserError(
                f"trainer.early_stopping={self.trainer.early_stopping} with data.evaluate_on=test "
                "is invalid: it needs a validation set, and all training images are learned from. "
                "Give the number of epochs instead."
            )
        if getattr(self.model, "batch_norm", False):
            for key in ("batch_size", "images"):
                if getattr(self.data, key) == 1:
                    raise UserError(
                        f"data.{key}=1 with model.batch_norm=true cannot be trained: batch norm "
                        f"needs two images. Raise data.{key}, or set model.batch_norm=false."
                    )
        return self
