"""The inside of a worker: takes jobs, one after the other, until there are none."""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from digitlab.base.errors import UserError, first_line
from digitlab.config.recorded import with_values
from digitlab.config.types import Config, Pruner
from digitlab.records.mlflow import RunRecord, Tracking, open_tracking
from digitlab.records.record import Identity, begin_record, trial_tags
from digitlab.study.audit import record_taken, trial_runs
from digitlab.study.run import Broken, Ended, Outcome, perform
from digitlab.study.storage import GRACE, PATIENCE, open_storage, patiently, sessions_of
from digitlab.study.trials import GivenAway, Search, TrialRow, trial_value
from digitlab.study.workers.processes import Done, Job, Progress, Setup, one_worker
from digitlab.training.fit import Watch
from digitlab.training.module import Diverged

_TELL_SECONDS = 0.2  # between two messages about progress


def work(connection: Connection, setup: Setup) -> None:
    """Run jobs from the connection until it closes or says None."""
    with one_worker(setup.lab, setup.config.study.name):
        storage = open_storage(setup.lab, setup.config.study.storage, PATIENCE)
        patience = PATIENCE if sessions_of(storage) else 0.0  # servers that others keep come back
        search = patiently(lambda: Search(storage, setup.config), patience)
        tracking = open_tracking(setup.config, setup.lab, PATIENCE)
        worker = Work(connection, setup, search, tracking)
        with suppress(EOFError, OSError):  # the parent has died
            connection.send("ready")
            while (job := connection.recv()) is not None:
                try:
                    done = worker.run(job)
                except Exception as error:  # noqa: BLE001  a store that fails: the parent decides
                    done = Done("waiting", fatal=f"{type(error).__name__}: {error}")
                connection.send(done)
                gc.collect()  # Lightning's objects hold one another


class Ear(Protocol):
    """Who a worker tells how far it is, and hears when to end: a connection to its parent, say."""

    def send(self, told: Any, /) -> None: ...

    def poll(self) -> bool:
        """Whether to end what runs at the next batch."""


class Work:
    """What a worker does with each job."""

    def __init__(self, connection: Ear, setup: Setup, search: Search, tracking: Tracking) -> None:
        self.connection, self.setup, self.config = connection, setup, setup.config
        self.search, self.tracking = search, tracking

    def run(self, job: Job) -> Done:
        if job.config is not None:
            outcome = self._perform(job, job.config, _Told(self))
            return Done(outcome.state, outcome.reason, outcome.metrics, outcome.run_id)
        return self._trial(job)

    def _identity(self, job: Job) -> Identity:
        study = self.config.study.name
        name = f"{study}-{job.number}" if job.config is None else f"{study}-{job.kind}-{job.number}"
        tags = trial_tags(study, job.number) | job.tags
        setup = self.setup
        return Identity(name, job.kind, tags, setup.parent_run, setup.overrides, setup.environment)

    def _perform(self, job: Job, config: Config, watch: Watch) -> Outcome:
        study = self.config.study
        rungs = study.rungs if job.config is None and study.pruner is not Pruner.none else []
        return perform(config, self._identity(job), self.tracking, self.setup.lab, watch, rungs)

    def _trial(self, job: Job) -> Done:
        """Choose values, train, record, and only then tell the study."""
        limit = 60 * self.config.study.trial_minutes
        try:
            with self.search.alive(job.number, limit + GRACE if limit else 0):
                return self._living_trial(job)
        except GivenAway:
            return Done("waiting", "it was taken for lost, and belongs to another worker")

    def _living_trial(self, job: Job) -> Done:
        trial, values, twin = self.search.ask(job.number)
        self.connection.send(Progress(0.0, {}, values))
        attempts = trial.user_attrs.get("attempts")
        if attempts is not None:  # an earlier attempt did not end
            with suppress(UserError):  # while the tracker is away; the audit finds them later
                runs = trial_runs(self.tracking, self.config.study.name, job.number)
                self.search.check(job.number)  # or they may be those of its next owner
                for run in runs:
                    self.tracking.delete(run.run_id)
        try:
            config = with_values(self.config, values)
        except UserError as error:
            return self._refuse(job, str(error))
        if twin is not None:
            return self._take_over(job, config, twin)
        watch = _TrialWatch(self, trial, values)
        outcome = self._perform(job, config, watch)
        with _void_if_given_away(outcome.record):
            return self._settle(job, outcome, watch.curve, int(attempts or 0))

    def _settle(self, job: Job, outcome: Outcome, curve: list[float], attempts: int) -> Done:
        """Tell the study how a trial ended, or put it back."""
        if outcome.state == "interrupted":
            self.search.put_back(job.number, attempts)
            return Done("interrupted", outcome.reason)
        again = outcome.error is not None and not isinstance(outcome.error, Diverged)
        if again and attempts < self.config.study.retries:
            self.search.put_back(job.number, attempts + 1)
            return Done("waiting", outcome.reason)
        value = trial_value(outcome.state, outcome.metrics)
        notes: dict[str, Any] = {"metrics": outcome.metrics, "curve": curve}
        if outcome.reason:
            notes["reason"] = outcome.reason
        state = self.search.tell(job.number, outcome.state, value, notes)
        if state != outcome.state and outcome.record is not None:
            outcome.record.end(state)
        return Done(state, outcome.reason, outcome.metrics, outcome.run_id)

    def _refuse(self, job: Job, reason: str) -> Done:
        """A trial whose values contradict each other has failed, and is recorded as such."""
        record = begin_record(self.tracking, self.config, self._identity(job))
        record.log(tags={"digitlab.reason": reason})
        record.end("failed")
        with _void_if_given_away(record):
            self.search.tell(job.number, "failed", None, {"reason": reason})
        return Done("failed", reason)

    def _take_over(self, job: Job, config: Config, twin: TrialRow) -> Done:
        """The result of an earlier trial with the same values and so the same bits."""
        metrics = dict(twin.notes.get("metrics", {}))
        notes = {"metrics": metrics, "taken_from": str(twin.number)}
        record = record_taken(self.tracking, config, self._identity(job), notes)
        with _void_if_given_away(record):
            self.search.tell(job.number, "finished", twin.value, notes)
        return Done("finished", f"as trial {twin.number}", metrics)


@contextmanager
def _void_if_given_away(record: RunRecord | None) -> Iterator[None]:
    """The run of a trial that turns out to be another worker's is dropped."""
    try:
        yield
    except GivenAway:
        if record is not None:
            record.drop()
        raise


class _Told(Watch):
    """Tells the parent how far the run is; ends it when the parent says so, or has died."""

    def __init__(self, work: Work, values: dict[str, Any] | None = None) -> None:
        self.connection, self.values = work.connection, values
        self.metrics: dict[str, float] = {}
        self.curve: list[float] = []  # validation accuracy after each epoch
        self.told = 0.0

    def batch(self, done: float) -> None:
        if self.connection.poll():
            raise Ended("interrupted", "the study was stopped")
        if time.monotonic() - self.told > _TELL_SECONDS:
            self._tell(done)

    def _tell(self, done: float) -> None:
        self.told = time.monotonic()
        try:
            self.connection.send(Progress(done, self.metrics, self.values))
        except OSError as error:
            raise Ended("interrupted", "the study was killed") from error

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.metrics = dict(metrics)
        self.curve.append(metrics.get("val_accuracy", 0.0))


class _TrialWatch(_Told):
    """A trial's watch: also asks the pruner at each rung, and looks at the clock."""

    def __init__(self, work: Work, trial: Any, values: dict[str, Any]) -> None:
        super().__init__(work, values)
        self.search, self.trial, self.study = work.search, trial, work.config.study
        self.begun = time.monotonic()

    def batch(self, done: float) -> None:
        super().batch(done)
        minutes = self.study.trial_minutes
        if minutes and time.monotonic() - self.begun > 60 * minutes:
            raise Ended("failed", f"it took longer than study.trial_minutes={minutes:g}")

    def rung(self, rung: float, accuracy: float) -> None:
        self.metrics = {"val_accuracy": accuracy}
        try:
            prune = self.search.report(self.trial, self.study.rungs.index(rung), accuracy)
        except GivenAway as error:
            raise Ended("interrupted", "it belongs to another worker") from error
        except Exception as error:
            raise Broken(f"optuna's storage: {first_line(error.__cause__ or error)}") from error
        if prune:
            raise Ended("pruned", f"val_accuracy {accuracy:.4f} at {rung:g} of its steps")
