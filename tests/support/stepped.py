"""A study that a test leads event by event: the driver runs in a thread, and waits for each.

A kill is a copy of the lab, which is what a killed process leaves; the driver of the lab that was
copied is ended afterwards, and its lab is forgotten.
"""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from plain import PlainTracker

from digitlab.base.console import Board
from digitlab.base.errors import UserError
from digitlab.base.stop import StopSignal
from digitlab.config.compose import Composed
from digitlab.records.tracker import TrackerAway
from digitlab.results.publish import publish
from digitlab.study.driver import StudyDriver
from digitlab.study.session import StudySession, open_session
from digitlab.workers.base import Decision, End, Event, Job, Ready, Workers

_T = TypeVar("_T")


class Killed(BaseException):
    """The driver is to end, whatever becomes of its lab."""


class SteppedWorkers(Workers):
    """Workers that do nothing; a test sends what they report, and the driver waits for it."""

    def __init__(self, count: int) -> None:
        self.jobs: dict[int, Job | None] = dict.fromkeys(range(count))
        self.decisions: dict[int, Decision] = {}
        self.cancelled: set[int] = set()
        self.asked: queue.Queue[bool] = queue.Queue()  # whether the driver waits, or has ended
        self.given: queue.Queue[list[tuple[int, Event]] | None] = queue.Queue()
        self.first: list[tuple[int, Event]] = [(worker, Ready({})) for worker in self.jobs]

    def _start(self) -> None: ...
    def close(self) -> None: ...

    def idle(self) -> list[int]:
        return [] if self.first else [n for n, job in self.jobs.items() if job is None]

    def submit(self, worker: int, job: Job) -> None:
        self.jobs[worker] = job

    def answer(self, worker: int, decision: Decision) -> None:
        self.decisions[worker] = decision

    def cancel(self, worker: int) -> None:
        self.cancelled.add(worker)

    def events(self, timeout_s: float) -> list[tuple[int, Event]]:
        found, self.first = self.first, []
        if found:
            return found
        self.asked.put(True)
        given = self.given.get()
        if given is None:
            raise Killed
        for worker, event in given:
            if isinstance(event, End):
                self.jobs[worker] = None
                self.decisions.pop(worker, None)
                self.cancelled.discard(worker)
        return given


class SteppedDriver:
    """One call of `digitlab sweep`."""

    def __init__(self, composed: Composed, lab: Path, count: int) -> None:
        """Start it, and wait until it needs an event, or has ended."""
        self.composed, self.lab, self.workers = composed, lab, SteppedWorkers(count)
        self.stop = StopSignal()
        self.session: StudySession | None = None
        self.outcome: int | BaseException = 0  # exit status, or what was raised
        self.thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> None:
        self.thread.start()
        self.is_waiting = self.workers.asked.get()

    def step(self, *events: tuple[int, Event]) -> None:
        """Send events, and wait until the driver needs others, or has ended."""
        self.workers.given.put(list(events))
        self.is_waiting = self.workers.asked.get()

    def kill(self) -> None:
        while self.is_waiting:
            self.workers.given.put(None)
            self.is_waiting = self.workers.asked.get()
        self.thread.join()

    def _run(self) -> None:
        try:
            with Board() as board:
                board.mute()
                with open_session(self.composed, self.lab, board, self.stop) as session:
                    self.session = session
                    self.outcome = StudyDriver(session, self.workers, publish, None).run()
        except (UserError, Killed, Exception) as error:  # noqa: BLE001  the test looks at it
            self.outcome = error
        finally:
            self.workers.asked.put(False)


class ShakyTracker(PlainTracker):
    """A tracker that goes away after some writes, of which it may not answer the last."""

    def __init__(self, lab: Path, line: "Line") -> None:
        super().__init__(lab)
        self.line = line

    def create_run(self, *given: Any) -> str:
        return self.line.write(lambda: PlainTracker.create_run(self, *given))

    def log(self, *given: Any) -> None:
        self.line.write(lambda: PlainTracker.log(self, *given))

    def upload(self, *given: Any) -> None:
        self.line.write(lambda: PlainTracker.upload(self, *given))

    def end_run(self, *given: Any) -> None:
        self.line.write(lambda: PlainTracker.end_run(self, *given))

    def tag(self, *given: Any) -> None:
        self.line.write(lambda: PlainTracker.tag(self, *given))

    def register(self, *given: Any) -> None:
        self.line.write(lambda: PlainTracker.register(self, *given))

    def find(self, *given: Any) -> Any:
        return self.line.read(lambda: PlainTracker.find(self, *given))

    def artifact(self, *given: Any) -> bytes:
        return self.line.read(lambda: PlainTracker.artifact(self, *given))


class Line:
    """The way to a tracker."""

    def __init__(self) -> None:
        self.restore()

    def restore(self) -> None:
        self.left: float = float("inf")  # writes until it is cut
        self.is_answered = True  # the last of them

    @property
    def is_cut(self) -> bool:
        return self.left <= 0

    def read(self, call: Callable[[], _T]) -> _T:
        if self.is_cut:
            raise TrackerAway("The tracker is away: wait for it.")
        return call()

    def write(self, call: Callable[[], _T]) -> _T:
        result = self.read(call)
        self.left -= 1
        if self.is_cut and not self.is_answered:
            raise TrackerAway("The tracker is away: its answer was lost. Wait for it.")
        return result
