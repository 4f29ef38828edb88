"""The thread that sends what is in the outbox to the tracker, in order."""

import random
import shlex
import threading
import time
from collections.abc import Callable
from typing import Any

from digitlab.base import faults
from digitlab.records.spool import FileSpool, Signals
from digitlab.records.store import Batch, NewRun, Tracker, TrackerAway, TrackerRefused

_GATHER_S = 0.4  # operations that come within it are sent in as few calls as possible
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 15.0  # between two attempts to reach a tracker that is away
_POLL_S = 0.1  # how long a stop request may go unheard


class Delivery:
    """Sends the operations of runs to a tracker, until it has all of them."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.signals = Signals()
        self.problem = ""  # why the tracker does not answer at the moment; empty while it does
        self._spools: list[FileSpool] = []  # of which the tracker may lack something, in order
        self._failed: list[FileSpool] = []
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def add(self, spool: FileSpool) -> None:
        with self.signals.changed:
            self._spools.append(spool)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
                self._thread.start()
            self.signals.changed.notify_all()

    def open_spools(self) -> list[FileSpool]:
        with self.signals.changed:
            return [spool for spool in self._spools if not spool.is_closed]

    def pending(self) -> int:
        with self.signals.changed:
            return sum(spool.has_unsent for spool in self._spools)

    def check(self) -> None:
        for spool in self._failed:
            assert spool.failure is not None
            raise spool.failure

    def flush(self, timeout_s: float, stopped: Callable[[], bool]) -> int:
        deadline = time.monotonic() + timeout_s
        with self.signals.changed:
            while self.pending() and not stopped():
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self.signals.urgent.set()
                self.signals.changed.wait(min(_POLL_S, left))
            return self.pending()

    def stop(self, timeout_s: float) -> bool:
        """End the thread; return False if it waits for an answer of the tracker for longer."""
        if self._thread is not None:
            with self.signals.changed:
                self._is_closing = True
                self.signals.changed.notify_all()
                self.signals.urgent.set()
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
            self._thread, self._is_closing = None, False
        return True

    def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            with self.signals.changed:
                self.signals.changed.wait_for(lambda: self._is_closing or self.pending())
            self.signals.urgent.wait(_GATHER_S)
            self.signals.urgent.clear()
            if self._is_closing:
                return
            try:
                self._send_all()
                self.problem, wait_s = "", _FIRST_WAIT_S
            except TrackerAway as error:
                self.problem = str(error)
                # Jitter, so that many clients of one server do not all come back at once.
                time.sleep(_FIRST_WAIT_S * random.random())  # noqa: S311
                self.signals.urgent.wait(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _send_all(self) -> None:
        with self.signals.changed:
            spools = [spool for spool in self._spools if spool.has_unsent or spool.is_closed]
        for spool in spools:
            if self._is_closing:
                return
            try:
                size = self._send(spool)
            except TrackerAway:
                raise
            except Exception as error:  # noqa: BLE001  of this run alone; `check` raises it
                self._fail(spool, error)
                continue
            self._acknowledge(spool, size)

    def _acknowledge(self, spool: FileSpool, size: int) -> None:
        with self.signals.changed:
            spool.sent = size
            faults.point("outbox.acknowledged")
            if spool.is_closed and not spool.has_unsent:
                spool.close()
                spool.path.unlink(missing_ok=True)
                self._spools.remove(spool)
                faults.point("outbox.removed")
            self.signals.changed.notify_all()

    def _fail(self, spool: FileSpool, error: Exception) -> None:
        if isinstance(error, TrackerRefused):
            error = TrackerRefused(
                f"The record of run '{spool.name}' was refused ({error}). It is kept, and no other "
                "run waits for it. Remove the cause and start again, or give the record up: "
                f"rm {shlex.quote(str(spool.path))}"
            )
        with self.signals.changed:
            spool.failure = error
            self._spools.remove(spool)
            self._failed.append(spool)
            self.signals.changed.notify_all()

    def _send(self, spool: FileSpool) -> int:
        """Send what a run's file holds beyond what was sent; return how far that is."""
        operations, size = spool.unsent()
        plan = _Plan()
        for operation in operations:
            plan.add(operation.what, operation.files)
        if plan.is_discarded and spool.known_id is None and not spool.may_exist:
            return size
        try:
            self._send_plan(spool, plan)
        except TrackerRefused:
            # What somebody deleted in the tracker meanwhile is not wanted any more.
            if spool.known_id is None or not self.tracker.is_deleted(spool.known_id):
                raise
        return size

    def _send_plan(self, spool: FileSpool, plan: "_Plan") -> None:
        if spool.known_id is None:
            assert plan.new is not None
            may_exist, spool.may_exist = spool.may_exist, True
            run_id = self.tracker.create_run(plan.new, may_exist)
            faults.point("outbox.sent")
            with self.signals.changed:
                spool.known_id = run_id
                self.signals.changed.notify_all()
        run_id = spool.known_id
        if plan.is_discarded:
            self.tracker.delete(run_id)
            return
        # Files before the state: a run that is finished in the tracker has all of them.
        if plan.files:
            self.tracker.upload(run_id, plan.files)
            faults.point("outbox.sent")
        if plan.batch:
            self.tracker.log(run_id, plan.batch)
            faults.point("outbox.sent")
        if plan.end:
            self.tracker.end_run(run_id, *plan.end)
            faults.point("outbox.sent")


class _Plan:
    """Operations on one run, brought together into as few calls as possible."""

    def __init__(self) -> None:
        self.new: NewRun | None = None
        self.batch = Batch()
        self.files: dict[str, bytes] = {}
        self.end: tuple[str, int] | None = None  # state, time in milliseconds
        self.is_discarded = False

    def add(self, what: dict[str, Any], files: dict[str, bytes]) -> None:
        if what["do"] == "create":
            self.new = NewRun(**what["run"])
            self.batch.params.update(self.new.params)
        elif what["do"] == "log":
            step, time_ms = what["step"], what["time_ms"]
            points = what["metrics"].items()
            self.batch.metrics.extend((name, value, step, time_ms) for name, value in points)
            self.batch.tags.update(what["tags"])
        elif what["do"] == "files":
            self.files |= files
        elif what["do"] == "end":
            self.end = (what["state"], what["time_ms"])
            self.batch.tags["digitlab.state"] = what["state"]
        elif what["do"] == "discard":
            self.is_discarded = True
