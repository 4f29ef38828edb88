"""The thread that sends what is in the outbox to the tracker, in order."""

import random
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from digitlab.base import faults
from digitlab.base.errors import first_line
from digitlab.base.files import sync_file_system
from digitlab.records.spool import Changes, FileSpool, Operation
from digitlab.records.tracker import (
    Dataset,
    LogBatch,
    NewRun,
    Registration,
    Tracker,
    TrackerAway,
    TrackerRefused,
    TrackerUnwritable,
)

_GATHER_S = 0.4  # operations that come within it are sent in as few calls as possible
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 15.0  # between two attempts to reach a tracker that is away
_WAITED_FOR_S = 2.0  # the same, while `flush` waits
_MOST_RUNS = 50  # that are sent before the first of them is removed from the outbox
_POLL_S = 0.1  # how long a stop request may go unheard


class Delivery:
    """Sends the operations of runs to a tracker, until it has all of them."""

    def __init__(self, folder: Path, tracker: Tracker) -> None:
        self.folder, self.tracker = folder, tracker
        self.problem = ""  # why the tracker does not answer at the moment; empty while it does
        self._disk_error: Exception | None = None  # of the last attempt; there will be others
        self._wait_s = _FIRST_WAIT_S
        self._changes = Changes()
        self._spools: list[FileSpool] = []  # of which the tracker may lack something, in order
        self._failed: list[FileSpool] = []
        self._thread: threading.Thread | None = None

    def flush(self, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> int:
        """Wait until the tracker has everything; return the number of runs still pending.

        A disk that takes nothing is not waited for: `check` raises its error.
        """
        deadline = time.monotonic() + timeout_s
        with self._changes:
            self._disk_error = None  # an attempt is made now, whatever became of the last one
            next_attempt = 0.0
            while self.pending() and self._disk_error is None and not stopped():
                now = time.monotonic()
                if now > deadline:
                    break
                if now >= next_attempt:  # sooner than the back-off alone: somebody waits
                    next_attempt = now + _WAITED_FOR_S
                    self._changes.hurry()
                self._changes.wait(_POLL_S)
            return self.pending()

    def pending(self) -> int:
        """Return the number of runs with operations that the tracker does not have yet."""
        with self._changes:
            return sum(spool.is_pending for spool in self._spools)

    def check(self, study_id: str | None = None) -> None:
        """Raise what the tracker refused, or what went wrong on this machine.

        Args:
            study_id: of what was adopted, only this study's counts, or nothing if it is empty.
        """
        if self._disk_error is not None:
            raise self._disk_error
        for spool in self._failed:
            assert spool.failure is not None
            if (
                study_id is None
                or not spool.is_adopted
                or (study_id and spool.study_id == study_id)
            ):
                raise spool.failure

    def failures(self) -> list[tuple[str, Exception]]:
        """Return why runs are not sent, each with its study's id if that is known."""
        return [(spool.study_id, spool.failure) for spool in self._failed if spool.failure]

    def _stop(self, timeout_s: float) -> bool:
        """End the thread; return False if it waits for an answer of the tracker for longer."""
        if self._thread is not None:
            with self._changes:
                self._changes.is_closing = True
                self._changes.hurry()
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
            self._thread, self._changes.is_closing = None, False
        return True

    def _add(self, spool: FileSpool) -> None:
        with self._changes:
            self._spools.append(spool)
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_until_closed, daemon=True)
                self._thread.start()
            self._changes.notify_all()

    def _send_until_closed(self) -> None:
        while True:
            with self._changes:
                self._changes.wait_for(lambda: self._changes.is_closing or self.pending())
                self._changes.pause(_GATHER_S)
            if self._changes.is_closing:
                return
            try:
                self._send_all()
                self.problem, self._disk_error = "", None
                self._changes.calm(self.pending() > 0)
            except (TrackerAway, OSError) as error:  # a disk that takes nothing may do so later
                self.problem = str(error)
                self._changes.calm(False)
                if isinstance(error, TrackerUnwritable | OSError):
                    with self._changes:
                        self._disk_error = error
                        self._changes.notify_all()
                # Jitter, so that many clients of one server do not all come back at once.
                time.sleep(_FIRST_WAIT_S * random.random())  # noqa: S311
                self._changes.pause(self._wait_s)
                self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)

    def _send_all(self) -> None:
        with self._changes:
            spools = [spool for spool in self._spools if spool.is_pending][:_MOST_RUNS]
        sent: list[tuple[FileSpool, int]] = []
        try:
            for spool in spools:
                if self._changes.is_closing:
                    break
                try:
                    sent.append((spool, _send(self.tracker, self._changes, spool)))
                except Exception as error:
                    # A file that cannot be read now may be readable later. One that is gone is not,
                    # and another process's is left to the next one: nobody else waits for it.
                    is_lasting = spool.is_adopted or isinstance(error, FileNotFoundError)
                    is_passing = isinstance(error, OSError) and not is_lasting
                    if isinstance(error, TrackerAway) or is_passing:
                        with self._changes:
                            self._spools = _postponed(self._spools, spool)
                        raise
                    self._fail(spool, error)  # of this run alone; `check` raises it
        finally:
            self._acknowledge(sent)

    def _acknowledge(self, sent: Sequence[tuple[FileSpool, int]]) -> None:
        """Note what was sent, and remove the files that the tracker has all of."""
        if sent:
            self._wait_s = _FIRST_WAIT_S
        with self._changes:
            for spool, size in sent:
                spool.sent = size
            done = [spool for spool, size in sent if spool.is_closed and size == spool.size]
            faults.point("outbox.acknowledged")
        if done:
            # Or a power loss would take artifacts of the lab that are not in the outbox any more.
            sync_file_system(self.folder)
        with self._changes:
            for spool in done:
                spool.path.unlink(missing_ok=True)
                self._spools.remove(spool)
                faults.point("outbox.removed")
            self._changes.notify_all()

    def _fail(self, spool: FileSpool, error: Exception) -> None:
        with self._changes:
            spool.failure = _refusal(spool, error) if isinstance(error, TrackerRefused) else error
            self._spools.remove(spool)
            self._failed.append(spool)
            self._changes.notify_all()


def unreadable_spool(path: Path, changes: Changes, error: ValueError) -> FileSpool:
    """Return a spool of a file that cannot be read, which stays as it is, with why."""
    spool = FileSpool(path, changes)
    reason = f"it is damaged, or of another version: {first_line(error)}"
    spool.name, spool.is_adopted = path.stem, True
    spool.failure = _refusal(spool, TrackerRefused(reason))
    return spool


def _postponed(spools: Sequence[FileSpool], failing: FileSpool) -> list[FileSpool]:
    """Return the spools with those of the failing run last: it may be away for that run alone.

    A run that was resumed has several, which stay in their order.
    """
    known = failing.known_id
    last = [s for s in spools if s is failing or (known is not None and s.known_id == known)]
    return [spool for spool in spools if spool not in last] + last


def _refusal(spool: FileSpool, error: TrackerRefused) -> TrackerRefused:
    return TrackerRefused(
        f"The record of run '{spool.name}' was refused ({error}). It is kept, and no other run "
        "waits for it. Remove the cause and start again, or give the record up with: "
        f"rm {shlex.quote(str(spool.path))}"
    )


def _send(tracker: Tracker, changes: Changes, spool: FileSpool) -> int:
    """Send what a run's file holds beyond what was sent; return how far that is."""
    operations, size = spool.unsent()
    try:
        if spool.known_id is None:
            may_exist, spool.may_exist = spool.may_exist, True
            run_id = tracker.create_run(NewRun(**operations[0].what["run"]), may_exist)
            faults.point("outbox.sent")
            with changes:
                spool.known_id = run_id
                changes.notify_all()
        _send_operations(tracker, spool.known_id, operations)
    except TrackerRefused:
        # What somebody deleted in the tracker meanwhile is not wanted any more.
        if spool.known_id is None or not tracker.is_deleted(spool.known_id):
            raise
    return size


def _send_operations(tracker: Tracker, run_id: str, operations: Sequence[Operation]) -> None:
    """Send operations on one run in as few calls as possible."""
    batch, registration, end = LogBatch(), None, None
    files: dict[str, bytes] = {}
    for what, added in operations:
        files |= added
        batch.tags.update(what.get("tags", {}))
        batch.datasets.extend(Dataset(*found) for found in what.get("datasets", []))
        if what["do"] == "create":
            batch.params.update(what["run"]["params"])
        elif what["do"] == "log":
            points = what["metrics"].items()
            batch.metrics.extend((name, x, what["step"], what["time_ms"]) for name, x in points)
        elif what["do"] == "register":
            given = what["registration"]
            measured_on = Dataset(*given["measured_on"])
            registration = Registration(**{**given, "measured_on": measured_on})
        elif what["do"] == "end":
            end = (what["state"], what["time_ms"])
    # Files before the state: a run that is finished in the tracker has all of them.
    if files:
        tracker.upload(run_id, files)
        faults.point("outbox.sent")
    if batch:
        tracker.log(run_id, batch)
        faults.point("outbox.sent")
    if registration:  # of the files and metrics that are there by now
        tracker.register(run_id, registration)
        faults.point("outbox.sent")
    if end:
        tracker.end_run(run_id, *end)
        faults.point("outbox.sent")
