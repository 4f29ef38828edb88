"""Parts of the bench that time the driver, with workers that train nothing."""

import contextlib
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench_tools import OWN_STORES, Figure, own_lab, timed
from optuna.samplers import RandomSampler
from optuna.trial import create_trial

from digitlab.base.console import Board
from digitlab.base.errors import require
from digitlab.base.stop import StopSignal
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.study.loop import JobLoop
from digitlab.study.progress import StudyProgress
from digitlab.study.search import TrialSearch
from digitlab.study.session import StudySession, open_session
from digitlab.study.trials import TrialStore
from digitlab.workers.base import (
    Decision,
    Epoch,
    Event,
    Finished,
    Job,
    Started,
    Workers,
)


class ClockWorkers(Workers):
    """Workers that finish each job after some seconds and train nothing."""

    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds = count, seconds
        self.due: dict[int, float] = {}  # of busy workers; monotonic seconds
        metrics = {"val_accuracy": 0.98, "val_loss": 0.1}
        facts = {"model_parameters": 1.0, "training_flops": 1.0}
        self.course = (Started(facts), Epoch(1, metrics), Finished(metrics, {}, {}, {}))

    def _start(self) -> None:
        """There is nothing to start."""

    def idle(self) -> list[int]:
        return [worker for worker in range(self.count) if worker not in self.due]

    def submit(self, worker: int, job: Job) -> None:
        self.due[worker] = time.monotonic() + self.seconds

    def answer(self, worker: int, decision: Decision) -> None:
        """Nothing waits for it: there are no rungs."""

    def events(self, timeout_s: float) -> list[tuple[int, Event]]:
        wait = min(self.due.values(), default=0.0) - time.monotonic()
        time.sleep(max(0.0, min(timeout_s, wait)))
        now = time.monotonic()
        ended = [worker for worker, due in self.due.items() if due <= now]
        for worker in ended:
            del self.due[worker]
        return [(worker, event) for worker in ended for event in self.course]

    def cancel(self, worker: int) -> None:
        self.due[worker] = 0.0

    def close(self) -> None:
        self.due.clear()


@contextmanager
def open_study(lab: Path, *overrides: str) -> Iterator[StudySession]:
    """An open study of the default recipe without rungs, in an empty lab; it prints nothing."""
    plain = ["study.pruner=none", "study.rungs=[]", *OWN_STORES, *STUDY, *overrides]
    composed = compose("sweep", plain)[0]
    with (
        own_lab(lab) as empty,
        contextlib.redirect_stdout(io.StringIO()),
        Board() as board,
        StopSignal() as stop,
        open_session(composed, empty, board, stop) as session,
    ):
        yield session


STUDY: list[str] = []  # more overrides of these studies


def fill(store: TrialStore, count: int) -> None:
    """Add finished trials with values drawn at random."""
    chance, blank = RandomSampler(seed=0), create_trial(value=0.0)
    draw = partial(chance.sample_independent, store.study, blank)
    for i in range(count):
        values = {one.name: one.decode(draw(one.name, one.distribution)) for one in store.space}
        store.add(values, 0.98 + 0.015 * (i % 101) / 101, {})


def lead(session: StudySession, workers: Workers, trials: int) -> float:
    """Return the seconds in which the driver gets so many more trials done."""
    total = len(session.store.rows()) + trials
    session.config = with_values(session.config, {"study.trials": total})
    tick = StudyProgress(session).ticker("trials", total)
    search, loop = TrialSearch(session, lambda: 0.0), JobLoop(workers, session.stop, tick)
    seconds = timed(lambda: search.run(loop))
    if session.stop():
        raise KeyboardInterrupt
    return seconds


def driver(lab: Path, repeats: int) -> list[Figure]:
    """The driver with workers that train nothing and no tracker; the study is kept in sqlite."""
    drawn, modelled, shares = [], [], []
    for _ in range(repeats):
        with open_study(lab, "tracking=none", "study.sampler=random") as session:
            drawn.append(200 / lead(session, ClockWorkers(1, 0.0), 200))
        with open_study(lab, "tracking=none", "study.sampler=tpe") as session:
            fill(session.store, 300)
            modelled.append(50 / lead(session, ClockWorkers(1, 0.0), 50))
        with open_study(lab, "tracking=none", "study.sampler=random") as session:
            seconds = lead(session, ClockWorkers(64, _SLEEP_S), 64 * _TURNS)
            shares.append(100 * _TURNS * _SLEEP_S / seconds)
    return [
        Figure("driver alone, random values", "trials/s", drawn, least=100),
        Figure("driver alone, TPE after 300 trials", "trials/s", modelled, least=25),
        Figure(f"64 workers, trials of {_SLEEP_S:g} s, of ideal", "%", shares, least=95),
    ]


_SLEEP_S, _TURNS = 5.0, 4  # length of a trial of 64 workers, and trials of each


def trial(lab: Path, repeats: int) -> list[Figure]:
    """A trial that trains nothing: drawn, recorded in MLflow on sqlite, written to Optuna's study.

    A value is the mean of 20, until MLflow has all of them. The others are in Optuna's study alone.
    """
    figures = []
    for others in (100, 10_000):
        with open_study(lab, "tracking=mlflow", "study.sampler=tpe") as session:
            fill(session.store, others)
            workers = ClockWorkers(1, 0.0)
            took = [timed(partial(_delivered, session, workers, 20)) for _ in range(repeats + 1)]
        values = [1000 * seconds / 20 for seconds in took[1:]]  # less the warm-up
        figures.append(Figure(f"an empty trial after {others} others", "ms", values))
    return figures


def _delivered(session: StudySession, workers: Workers, trials: int) -> None:
    lead(session, workers, trials)
    require(not session.records.outbox.flush(60), "MLflow", "reached within a minute")
    session.records.outbox.check()
