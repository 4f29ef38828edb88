"""A tracked hyperparameter study of handwritten digits; this module is its Python API.

    import digitlab

    run = digitlab.train("experiments=seed", "trainer.epochs=1")
    print(run.metrics["val_accuracy"])
    study = digitlab.sweep("experiments=smoke")
    print(study.trials())
    network = digitlab.load_run("champion").network()

Settings are Hydra overrides, as `digitlab train` and `digitlab sweep` take them. `lab` is the
folder with data and records; by default that of the command line: DIGITLAB_HOME, or `lab/`.
`stores` are the words for where records are if not in the lab, such as `tracking.uri=...`. A script
that calls `sweep` needs `if __name__ == "__main__":`, since workers import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from digitlab.base.errors import UserError
from digitlab.training.observer import StopTraining, TrainingObserver

if TYPE_CHECKING:
    import pandas
    from torch import Tensor, nn

    from digitlab.config.types import Config
    from digitlab.digits.predict import Answer
    from digitlab.study.trials import TrialStore

__version__ = version("digitlab")
__all__ = [
    "Predictor",
    "Run",
    "StopTraining",
    "Study",
    "TrainingObserver",
    "UserError",
    "compose",
    "load_run",
    "load_study",
    "reproduce",
    "sweep",
    "train",
]


@dataclass(frozen=True)
class Run:
    """A recorded run; `metrics` are the last of each name, accuracies fractions, times seconds."""

    run_id: str
    name: str
    kind: str  # trial, unpruned, confirm, measure, final, train, reproduction, study or champion
    state: str  # finished, pruned, failed, interrupted or running
    metrics: dict[str, float]
    lab: Path
    stores: tuple[str, ...] = ()

    def config(self) -> Config:
        """Return the configuration that the run was trained with."""
        from digitlab.records.reader import lab_tracker, recorded_config

        tracker = lab_tracker(self.lab, self.stores)
        return recorded_config(tracker, tracker.get(self.run_id))

    def network(self) -> nn.Module:
        """Return the trained network: normalised images (N, 1, 28, 28) to logits (N, 10).

        Raises:
            UserError: the run has no weights, or other ones than were recorded.
        """
        from digitlab.records.reader import lab_tracker, load_network, recorded_config, trained

        tracker = lab_tracker(self.lab, self.stores)
        row = trained(tracker, self.run_id)
        return load_network(tracker, row, recorded_config(tracker, row))

    def predictions(self) -> tuple[Tensor, Tensor]:
        """Return predicted and true digits (N,) of the images that the run was measured on."""
        import torch

        from digitlab.records.reader import lab_tracker, recorded_guesses

        tracker = lab_tracker(self.lab, self.stores)
        guesses, labels = recorded_guesses(tracker, tracker.get(self.run_id))
        return torch.from_numpy(guesses), torch.from_numpy(labels)


@dataclass(frozen=True)
class Study:
    """A recorded study."""

    name: str
    lab: Path
    stores: tuple[str, ...] = ()

    def trials(self) -> pandas.DataFrame:
        """Return a row for each trial.

        Columns: state, value (validation accuracy), model_parameters, training_flops, and the
        hyperparameters.
        """
        import pandas as pd

        rows, plain = self._store().rows(), []
        for row in rows:
            metrics = row.notes.get("metrics", {})
            costs = {name: metrics.get(name) for name in ("model_parameters", "training_flops")}
            plain.append({"state": row.state, "value": row.value, **costs, **row.values})
        return pd.DataFrame(plain, index=pd.Index([row.number for row in rows], name="trial"))

    def champion(self) -> dict[str, Any] | None:
        """Return what is known of the champion: trial, values, test_accuracy; None without one."""
        noted: dict[str, Any] | None = self._store().notes().get("champion")
        return noted

    def _store(self) -> TrialStore:
        from digitlab.base.invocation import storage_of
        from digitlab.study.trials import load_study

        return load_study(self.lab, self.name, storage_of(self.stores))[0]


class Predictor:
    """Reads images of digits with a trained network, and answers as `digitlab predict` does."""

    def __init__(
        self, run: str | None = None, lab: Path | None = None, stores: Sequence[str] = ()
    ) -> None:
        """Load a run named as for `load_run`; the champion, or else the newest, without a name."""
        from digitlab.digits.predict import DigitReader
        from digitlab.records.reader import lab_tracker

        lab = _lab(lab)
        self._predictor = DigitReader(lab_tracker(lab, stores), run, lab)

    def predict(self, *images: str | Path) -> list[Answer]:
        """Return an answer for each image file: status, digit, probability, probabilities.

        Raises:
            UserError: a file cannot be read, or is no image.
        """
        from digitlab.digits.decode import read_image
        from digitlab.digits.predict import read_picture

        pictures = [(str(path), read_image(Path(path))) for path in images]
        return [read_picture(self._predictor, *picture)[0] for picture in pictures]


def compose(*overrides: str) -> Config:
    """Return the configuration that `digitlab train` would use.

    Raises:
        UserError: an override is unknown or out of range.
    """
    from digitlab.config.compose import compose as _compose

    return _compose("train", overrides)[0].config


def train(
    *overrides: str, lab: Path | None = None, observers: Sequence[TrainingObserver] = ()
) -> Run:
    """Train one configuration in this process and record it.

    Args:
        observers: receive what happens while it trains, in the thread that trains. What one raises
            ends the run, whose record stays: as interrupted by StopTraining, else as failed.

    Raises:
        UserError: an override is invalid, the data are missing, the run did not finish, or nothing
            is recorded.
    """
    from digitlab.config.compose import compose as _compose
    from digitlab.config.compose import store_words
    from digitlab.study.run import train as _train

    lab = _lab(lab)
    for observer in observers:
        if not isinstance(observer, TrainingObserver):
            raise UserError(f"observers: {observer!r} is invalid: it must be a TrainingObserver.")
    [composed] = _compose("train", overrides)
    outcome = _train(composed, lab, observers=observers)
    if outcome.state != "finished":
        raise UserError(
            f"{' '.join(overrides)}: the run is {outcome.state} ({outcome.reason}): it must end by "
            "itself. Its record stays; remove the cause, and train again."
        )
    if outcome.run_id is None:
        raise UserError(
            f"{' '.join(overrides)}: the run finished, and its record is not there: a tracker must "
            "record it, and answer. Leave out tracking=none, or see what was printed."
        )
    return load_run(outcome.run_id, lab, store_words(composed.config))


def sweep(*overrides: str, lab: Path | None = None) -> Study:
    """Run a study to its end, or go on with it.

    Raises:
        UserError: an override is invalid, or no trial finished.
    """
    from digitlab.config.compose import compose as _compose
    from digitlab.config.compose import store_words
    from digitlab.results.publish import publish
    from digitlab.study.driver import sweep as _sweep

    lab = _lab(lab)
    [composed] = _compose("sweep", overrides)
    if _sweep(composed, lab, publish):
        raise UserError(
            f"study {composed.config.study.name} did not end: it was stopped, or no trial "
            "finished. Read what was printed, and call sweep again."
        )
    return load_study(composed.config.study.name, lab, store_words(composed.config))


def reproduce(run: str, lab: Path | None = None, stores: Sequence[str] = ()) -> str:
    """Train a run again from its record alone.

    Returns:
        The verdict: identical, within tolerance, not reproduced, or not comparable.

    Raises:
        UserError: there is no such run, or it did not finish.
    """
    from digitlab.results.reproduce import reproduce as _reproduce

    return _reproduce(run, stores, _lab(lab), as_json=False).verdict


def load_run(name: str, lab: Path | None = None, stores: Sequence[str] = ()) -> Run:
    """Return a run by its id, a beginning of it, its name, STUDY/TRIAL, or `champion`.

    Raises:
        UserError: there is no such run.
    """
    from digitlab.records.reader import find_run, lab_tracker

    lab = _lab(lab)
    row = find_run(lab_tracker(lab, stores), name)
    kind, state = (row.tags.get(f"digitlab.{key}", "") for key in ("kind", "state"))
    return Run(row.run_id, row.name, kind, state, dict(row.metrics), lab, tuple(stores))


def load_study(name: str, lab: Path | None = None, stores: Sequence[str] = ()) -> Study:
    """Return a study by its name; UserError where there is none."""
    from digitlab.base.invocation import storage_of
    from digitlab.study.trials import load_study as _load_study

    lab = _lab(lab)
    _load_study(lab, name, storage_of(stores))
    return Study(name, lab, tuple(stores))


def _lab(lab: Path | None) -> Path:
    from digitlab.base.paths import lab_folder

    return lab_folder(lab)
