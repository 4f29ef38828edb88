"""Studies to look at: two in a lab that all tests share, and any number in memory."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, TINY, Parent
from filelock import FileLock
from optuna.storages import InMemoryStorage

from digitlab.config.compose import compose
from digitlab.config.recorded import config_to_yaml, with_values
from digitlab.config.types import Config
from digitlab.records.record import Identity, RunRecorder, open_records, open_tracker, trial_tags
from digitlab.records.tracker import NoTracker, RunRow, Tracker
from digitlab.results.report import report
from digitlab.study.run import train
from digitlab.study.storage import open_storage
from digitlab.study.trials import TrialStore, load_study

HALF = ["study.pruner=median", "study.startup_trials=2", "study.workers=1"]  # so the same each time
WHOLE = [*TINY, *HALF, "study.trials=6", "trainer.epochs=2", "study.confirm=2"]
WHOLE += ["study.final_seeds=2", "study.retries=1"]
METRICS = {"model_parameters": 1234.0, "seconds": 2.5, "val_accuracy": 0.5, "training_flops": 1e9}


# A network that reads drawn digits, and one that learned little.
LEARNED = [
    "experiments=smoke",
    "data=sample",
    "study.name=read",
    "name=read-seed-0",
    "trainer.epochs=30",
]
LEARNED += ["model.widths=[16,32]", "data.batch_size=64", "data.augment.shift=2"]
LEARNED += ["data.augment.rotate=15", "data.augment.scale=0.2", "data.augment.shear=10"]
HASTY = [
    "experiments=smoke",
    "data=sample",
    "study.name=hasty",
    "name=hasty-seed-0",
    "model.widths=[3,4,5]",
]


def studies(factory: pytest.TempPathFactory) -> Path:
    """A lab with a study that was run to its end, `smoke`, and one that was not, `stopped`.

    Nobody may change it but for reports.
    """
    return _made_once(factory, "studies", _run_studies)


def readers(factory: pytest.TempPathFactory) -> Path:
    """A copy of a lab with two trained networks, the runs `read-seed-0` and `hasty-seed-0`."""
    lab = _made_once(factory, "readers", _train_readers)
    return shutil.copytree(lab, factory.mktemp("copied") / "lab")


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A lab that the test process makes that needs it first."""
    mine = factory.getbasetemp()
    place = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine
    lab = place / name
    with FileLock(place / f"{name}.lock"):
        if not lab.exists():
            make(copy_digits(lab))
            (lab / "made").touch()
    assert (lab / "made").exists(), f"{lab} was not made: another test process has failed to"
    return lab


def _run_studies(lab: Path) -> None:
    parent = Parent(lab, WHOLE, published=True)
    assert parent.wait() == 0, parent.log.read_text()
    with open_records(compose("sweep", WHOLE)[0].config, lab) as records:
        records.outbox.adopt()  # where the machine was too slow for the study's last seconds
        assert records.outbox.flush(60) == 0
    stop_in_the_middle(lab)


def _train_readers(lab: Path) -> None:
    for overrides in (LEARNED, HASTY):
        assert train(compose("train", overrides)[0], lab).state == "finished"


def copy_digits(lab: Path) -> Path:
    """Put the sample of digits into a lab; return the lab."""
    ignore = shutil.ignore_patterns("*.md")
    shutil.copytree(DATA, lab / "data" / "sample", ignore=ignore)
    return lab


def stop_in_the_middle(lab: Path) -> None:
    """Make a study of which one trial has finished, one still runs, and no champion is known."""
    composed = compose("sweep", [*TINY, "study.name=stopped", "study.pruner=none"])[0]
    config = composed.config
    store = TrialStore(open_storage(lab), config)
    own = {"digitlab.study_id": store.study_id, "digitlab.study": "stopped"}
    environment = {"commit": "c0ffee", "libraries": {"torch": "1"}}
    whole = Identity("stopped", "study", own, None, composed.overrides, environment)
    with open_records(config, lab) as records:
        study = RunRecorder(records.outbox, config, whole)
        run_id = study.run_id(60)
        store.note("run_id", run_id)
        store.note("config", config_to_yaml(config))
        store.note("overrides", list(composed.overrides))
        for number in range(2):
            row = store.ask()
            tags = trial_tags(store.study_id, "stopped", number, 1)
            identity = Identity(f"stopped-{number}", "trial", tags, run_id)
            run = RunRecorder(records.outbox, with_values(config, row.values), identity)
            if number == 0:
                run.epoch(1, {"val_accuracy": 0.5})
                run.end("finished", metrics=METRICS)
                store.tell(number, "finished", 0.5, {"metrics": METRICS, "curve": [0.5]})
        study.end("interrupted")


@dataclasses.dataclass(frozen=True)
class Study:
    """What a report is made from."""

    store: TrialStore
    config: Config
    tracker: Tracker
    lab: Path

    def report(self) -> str:
        return report(self.store, self.config, self.tracker, self.lab)

    def runs(self, **tags: str) -> list[RunRow]:
        """Its runs with tags such as kind="final"."""
        own = {f"digitlab.{key}": value for key, value in tags.items()}
        return self.tracker.find({"digitlab.study_id": self.store.study_id} | own)

    def trial_run(self, number: int) -> RunRow:
        return self.runs(kind="trial", trial=str(number))[-1]


def recorded(lab: Path, name: str) -> Study:
    """A study of a lab, as `digitlab report` opens it."""
    store, config = load_study(lab, name)
    return Study(store, config, open_tracker(config, lab), lab)


@cache
def configure(*overrides: str) -> Config:
    return compose("sweep", [*TINY, "tracking=none", *overrides])[0].config


def new_study(*overrides: str) -> Study:
    """A study that nothing is known of yet, in memory, its runs recorded nowhere."""
    config = configure(*overrides)
    storage: Any = InMemoryStorage()
    return Study(TrialStore(storage, config), config, NoTracker(), Path("/nonexistent"))


def add_trials(store: TrialStore, accuracies: Sequence[float], **notes: Any) -> None:
    """Add finished trials, the better the larger the learning rate, whatever the hidden layer."""
    for number, accuracy in enumerate(accuracies):
        values = {
            "model.hidden": 16 + 7 * number % 40,
            "optim.learning_rate": 0.003 + accuracy / 50,
        }
        metrics = METRICS | {"seconds": 1.0 + number, "model_parameters": 100 + number}
        store.add(
            values, accuracy, {"metrics": metrics, "curve": [accuracy / 2, accuracy], **notes}
        )


def fail(store: TrialStore, reason: str) -> None:
    store.tell(store.ask().number, "failed", None, {"reason": reason})


def prune(
    store: TrialStore, accuracy: float, rung: float = 0.5, curve: Sequence[float] = ()
) -> None:
    """Add a trial that ended at a rung; the curve is of the epochs before."""
    number = store.ask().number
    store.report(number, 0, accuracy)
    notes = {"metrics": METRICS | {"rung": rung}, "curve": list(curve)}
    store.tell(number, "pruned", accuracy, notes)
