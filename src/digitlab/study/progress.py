"""The time that a study takes, and what a person sees of it while it runs."""

import time
from collections.abc import Callable

from digitlab.base.console import Busy, View
from digitlab.config.types import Pruner, StudyConfig
from digitlab.study.loop import JobLoop, Task
from digitlab.study.session import StudySession
from digitlab.study.trials import TrialStore

_SHOW_INTERVAL_S = 0.2  # between two pictures of the board
_NOTE_INTERVAL_S = 10.0  # between two notes of the time spent, which a kill then loses at most


class StudyProgress:
    """Shows how far a study is, and notes its time."""

    def __init__(self, session: StudySession) -> None:
        self.session, self.store, self.board = session, session.store, session.board
        self.started = time.monotonic()
        self.spent = float(self.store.notes().get("seconds", 0.0))  # in earlier calls
        self.noted = self.shown = self.started

    def seconds(self) -> float:
        """Return the seconds spent on the study, in all calls."""
        return self.spent + time.monotonic() - self.started

    def ticker(self, phase: str, total: int) -> Callable[[JobLoop], None]:
        """Return what a phase's loop is to call again and again."""
        started, study = time.monotonic(), self.session.config.study
        before, whole = (whole_fits(study, phase, n) for n in (self._done(phase), total))

        def tick(loop: JobLoop) -> None:
            now = time.monotonic()
            if now - self.noted > _NOTE_INTERVAL_S:
                self.noted = now
                self.store.note("seconds", self.seconds())
            if now - self.shown > _SHOW_INTERVAL_S:
                self.shown = now
                done = self._done(phase)
                spent = whole_fits(study, phase, done)
                new = spent - before
                left = (now - started) / new * (whole - spent) if new > 0 else None
                busy = [_busy(worker, task) for worker, task in loop.running.items()]
                self.board.show(View(phase, done, total, _best_text(self.store), left, busy))

        return tick

    def _done(self, phase: str) -> int:
        if phase == "trials":
            return sum(row.is_ended for row in self.store.rows())
        return len(self.store.notes().get(phase, {}))


def whole_fits(study: StudyConfig, phase: str, count: int) -> float:
    """Return how many whole fits the first `count` of a phase come to: screening ends most soon."""
    if phase != "trials" or study.pruner is not Pruner.screening:
        return count
    screened = min(count, study.trials - study.finish)
    return screened * study.rungs[0] + (count - screened)


def _best_text(store: TrialStore) -> str:
    best = store.goal.best_first(store.rows())[:1]
    return f"best {store.goal.describe(best[0])} (trial {best[0].number})" if best else ""


def _busy(worker: int, task: Task) -> Busy:
    epochs = task.job.config.trainer.epochs
    epoch = min(epochs, int(task.fraction * epochs) + 1)
    return Busy(worker, task.title, task.fraction, epoch, epochs, task.accuracy)
