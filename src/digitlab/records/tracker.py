"""The interface to a tracker, where runs are recorded, and the tracker that records nothing."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from digitlab.base.errors import UserError

STATES = ("running", "finished", "pruned", "failed", "interrupted")  # of a run


class TrackerAway(UserError):
    """The tracker does not answer at the moment: a lost connection, a time-out, 5xx or 429."""


class TrackerUnwritable(TrackerAway):
    """The tracker is a store on this machine's disk, which is full, read-only or damaged."""


class TrackerRefused(UserError):
    """The tracker answered, and refused; the same request will be refused again."""


@dataclass(frozen=True)
class RunRow:
    """What the tracker holds of a run; `metrics` are the latest values."""

    run_id: str
    name: str
    status: str  # MLflow's: RUNNING, FINISHED, FAILED or KILLED
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    started_ms: int = 0
    ended_ms: int = 0  # 0 while it runs

    @property
    def is_ended(self) -> bool:
        return self.status in ("FINISHED", "FAILED", "KILLED")


def now_ms() -> int:
    return int(time.time() * 1000)


# A time in ms or a step. Stores take 63 bits, but it passes through JSON, whose numbers are doubles
# to many readers: these hold integers below 2**53 exactly.
StoredNumber = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class NewRun:
    """What is known of a run when it starts."""

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    parent_run_id: str | None = None  # run id of the study
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # the tag digitlab.record
    time_ms: StoredNumber = field(default_factory=now_ms)


class Dataset(NamedTuple):
    """Images that a run used."""

    name: str  # of the data set
    digest: str  # of the files, and of what was chosen of them
    context: str  # training, validation or test


@dataclass(frozen=True)
class Registration:
    """What the files below `model/` of a run are registered as."""

    model: str  # name of the registered model, whose alias `champion` moves to them
    tags: Mapping[str, str]
    card: str  # Markdown
    measured_on: Dataset  # of the run's metrics


@dataclass(frozen=True)
class LogBatch:
    """What is written to a run in one call."""

    params: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    """Name, value, step and time in milliseconds."""
    tags: dict[str, str] = field(default_factory=dict)
    datasets: list[Dataset] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.params or self.metrics or self.tags or self.datasets)


class Tracker(ABC):
    """Where runs are recorded. tests/contracts/test_tracker.py checks what each must do.

    Every method raises TrackerAway or TrackerRefused. The writes to a run are the outbox's alone;
    all of them can be repeated without changing what the first call did.
    """

    identity: str  # the address, without a password, and the experiment
    command = ""  # by which a shell calls the tracker's own program on this store

    @abstractmethod
    def create_run(self, run: NewRun, may_exist: bool = False) -> str:
        """Create a run, unless it `may_exist` and is found by its key; return its id."""

    @abstractmethod
    def log(self, run_id: str, batch: LogBatch) -> None:
        """Write parameters, metrics, tags and data sets."""

    @abstractmethod
    def upload(self, run_id: str, files: Mapping[str, bytes]) -> None:
        """Store artifacts by their path."""

    @abstractmethod
    def end_run(self, run_id: str, state: str, time_ms: int) -> None:
        """Set the status that belongs to one of STATES; `running` reopens a run that has ended."""

    @abstractmethod
    def register(self, run_id: str, what: Registration) -> None:
        """Register the run's model, with the metrics that were logged."""

    @abstractmethod
    def owner_of(self, model: str) -> str | None:
        """Return the study_id of who has registered models under a name; None if nobody has.

        It is empty of another program's. Names of models hold in all experiments.
        """

    @abstractmethod
    def find(self, tags: Mapping[str, str]) -> list[RunRow]:
        """Return the runs that carry all of the tags, oldest first, without deleted ones."""

    @abstractmethod
    def find_deleted(self, tags: Mapping[str, str]) -> list[RunRow]:
        """As `find`, of the runs that were deleted and can be restored."""

    @abstractmethod
    def get(self, run: str) -> RunRow:
        """Return the run of an id, a unique beginning of one, or a name."""

    @abstractmethod
    def is_deleted(self, run_id: str) -> bool:
        """Return whether somebody deleted the run in the tracker."""

    @abstractmethod
    def history(self, run_id: str) -> list[tuple[str, int, float]]:
        """Return every metric that was logged, sorted: (name, step, value)."""

    @abstractmethod
    def artifact(self, run_id: str, path: str) -> bytes:
        """Return the content of an artifact; UserError if there is none of this path."""

    @abstractmethod
    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run at once, past the outbox."""

    @abstractmethod
    def delete(self, run_id: str) -> None:
        """Hide a run; nothing of it is lost."""

    @abstractmethod
    def restore(self, run_id: str) -> None:
        """Show a run again that was deleted."""

    @abstractmethod
    def files(self, run_id: str) -> list[str]:
        """Return the paths of a run's artifacts, sorted."""

    def local_folder(self, run_id: str) -> Path | None:
        """Return the folder of a run's artifacts where they are files on this machine."""
        return None

    @abstractmethod
    def set_experiment_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the experiment, which is where MLflow keeps saved views."""

    @abstractmethod
    def runs_page(self) -> str:
        """Return the address of the page that lists the runs; empty where there is none."""


def restore_command(tracker: Tracker, run_id: str) -> str:
    """Return what a shell runs to bring back a run that was deleted in the tracker."""
    return f"{tracker.command} runs restore --run-id {run_id}"


class NoTracker(Tracker):
    """Records nothing, and has no runs."""

    identity = "none"

    def create_run(self, run: NewRun, may_exist: bool = False) -> str:
        return run.key

    def log(self, run_id: str, batch: LogBatch) -> None: ...
    def upload(self, run_id: str, files: Mapping[str, bytes]) -> None: ...
    def end_run(self, run_id: str, state: str, time_ms: int) -> None: ...
    def tag(self, run_id: str, tags: Mapping[str, str]) -> None: ...
    def delete(self, run_id: str) -> None: ...
    def restore(self, run_id: str) -> None: ...
    def register(self, run_id: str, what: Registration) -> None: ...
    def set_experiment_tags(self, tags: Mapping[str, str]) -> None: ...

    def owner_of(self, model: str) -> str | None:
        return None

    def find(self, tags: Mapping[str, str]) -> list[RunRow]:
        return []

    def find_deleted(self, tags: Mapping[str, str]) -> list[RunRow]:
        return []

    def get(self, run: str) -> RunRow:
        raise UserError(
            f"Run '{run}' is not recorded: with tracking=none no run is. Train with "
            f"tracking=mlflow."
        )

    def is_deleted(self, run_id: str) -> bool:
        return False

    def history(self, run_id: str) -> list[tuple[str, int, float]]:
        return []

    def files(self, run_id: str) -> list[str]:
        return []

    def artifact(self, run_id: str, path: str) -> bytes:
        raise UserError(
            f"Artifact {path} is not recorded: with tracking=none none is. Train with "
            f"tracking=mlflow."
        )

    def runs_page(self) -> str:
        return ""
