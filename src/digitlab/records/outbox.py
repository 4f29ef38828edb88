"""Operations on runs are written to the lab's outbox first, and sent to the tracker from there.

The outbox has a folder for each session, which is a process that records: `session.json`, locked by
that process as long as it lives, and a file for each run that the tracker does not have in full.
A tracker that is slow or away delays nobody, and a process may be killed at any point: another one
sends what it left behind.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from digitlab.base.files import write_synced
from digitlab.records.delivery import Delivery
from digitlab.records.spool import FileSpool, RunSpool
from digitlab.records.store import NewRun, NoTracker, Tracker

_CLOSE_S = 5.0  # for the last operations when the process ends


class Outbox:
    """The records that this process writes, on their way to the tracker."""

    def __init__(self, lab: Path, tracker: Tracker) -> None:
        self.folder, self.tracker = lab / "outbox", tracker
        self._delivery = Delivery(tracker)
        self._sessions: dict[Path, int] = {}  # folders of this process: the file that locks each
        self._own: Path | None = None  # the one for new runs
        self._count = 0

    @property
    def problem(self) -> str:
        """Why the tracker does not answer at the moment; empty while it does."""
        return self._delivery.problem

    def open_run(self, run: NewRun) -> RunSpool:
        """Start the record of a new run."""
        if isinstance(self.tracker, NoTracker):
            return RunSpool()
        spool = self._new_spool(run.key)
        spool.create(run)
        self._delivery.add(spool)
        return spool

    def resume_run(self, run_id: str) -> RunSpool:
        """Go on with the record of a run that the tracker has."""
        if isinstance(self.tracker, NoTracker):
            return RunSpool()
        # Two open spools of one run would each end it.
        for spool in self._delivery.open_spools():
            if spool.known_id == run_id:
                return spool
        spool = self._new_spool("resumed")
        spool.resume(run_id)
        self._delivery.add(spool)
        return spool

    def adopt(self) -> list[str]:
        """Take over what processes that have ended left behind for the same tracker.

        Runs that they did not end are ended as interrupted.

        Returns:
            A line for each such run.
        """
        lines = []
        for folder in sorted(self.folder.glob("[!.]*/")):
            if folder in self._sessions or not self._lock(folder):
                continue
            for path in sorted(folder.glob("*.run")):
                spool = FileSpool.load(path, self._delivery.signals)
                if spool.finish_interrupted():
                    lines.append(
                        f"Run {spool.name} was left unfinished by a process that has ended: "
                        "it is recorded as interrupted."
                    )
                if spool.size:
                    self._delivery.add(spool)
                else:  # the process ended before it had written anything
                    path.unlink()
            self._remove_empty()
        return lines

    def leftovers(self) -> int:
        """Return the number of records that `adopt` would take over."""
        count = 0
        for folder in sorted(self.folder.glob("[!.]*/")):
            if folder not in self._sessions and self._lock(folder):
                count += len(list(folder.glob("*.run")))
                os.close(self._sessions.pop(folder))
        return count

    def flush(self, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> int:
        """Wait until the tracker has everything; return the number of runs still pending."""
        return self._delivery.flush(timeout_s, stopped)

    def pending(self) -> int:
        """Return the number of runs with operations that the tracker does not have yet."""
        return self._delivery.pending()

    def check(self) -> None:
        """Raise what the tracker refused, or what went wrong in the delivery itself."""
        self._delivery.check()

    def close(self) -> None:
        """Send for a few seconds more, then end the thread; what is left stays on the disk.

        Runs that are not ended are ended as interrupted.
        """
        for spool in self._delivery.open_spools():
            with suppress(OSError):  # a full disk: whoever adopts the run does it
                spool.finish_interrupted()
        self.flush(_CLOSE_S)
        if not self._delivery.stop(_CLOSE_S):
            return  # a request is without an answer: the locks go with the process, not before
        self._own = None
        self._remove_empty()
        for lock in self._sessions.values():
            os.close(lock)
        self._sessions.clear()

    def _new_spool(self, name: str) -> FileSpool:
        if self._own is None:
            self._own = self._new_session()
        self._count += 1
        path = self._own / f"{self._count:06d}-{name}.run"
        return FileSpool(path, self._delivery.signals)

    def _new_session(self) -> Path:
        """Make this process's folder, which has its name only once it is locked."""
        name = f"{time.time_ns():x}-{os.getpid()}"
        hidden = self.folder / f".{name}"
        hidden.mkdir(parents=True)
        content = json.dumps({"tracker": self.tracker.identity})
        write_synced(hidden / "session.json", content.encode())
        self._lock(hidden)
        folder = self.folder / name
        hidden.rename(folder)
        self._sessions[folder] = self._sessions.pop(hidden)
        return folder

    def _lock(self, folder: Path) -> bool:
        """Make a session this process's own; False if it is alive, or of another tracker."""
        with suppress(OSError, ValueError):  # it is locked, or was removed by who had locked it
            file = os.open(folder / "session.json", os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                session = json.loads((folder / "session.json").read_bytes())
                if session["tracker"] == self.tracker.identity:
                    self._sessions[folder], file = file, -1
                    return True
            finally:
                if file >= 0:
                    os.close(file)
        return False

    def _remove_empty(self) -> None:
        """Remove the sessions that have nothing left to send, but for the one of new runs."""
        for folder, lock in list(self._sessions.items()):
            if folder != self._own and not any(folder.glob("*.run")):
                shutil.rmtree(folder)
                os.close(lock)
                del self._sessions[folder]
