"""Operations on runs are written to the lab's outbox first, and sent to the tracker from there.

A tracker that is slow or away delays nobody, and a process may be killed at any point: another one
sends what it left behind.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from digitlab.base.errors import counted
from digitlab.records.delivery import Delivery, unreadable_spool
from digitlab.records.sessions import Sessions
from digitlab.records.spool import UNREADABLE, FileSpool, RunSpool
from digitlab.records.tracker import NewRun, NoTracker, Tracker

_RUN_S = 30.0  # to wait at the end of a run for a tracker that is slow or away
_CLOSE_S = 5.0  # for the last operations when the process ends


class Outbox(Delivery):
    """The records that this process writes, on their way to the tracker."""

    def __init__(self, lab: Path, tracker: Tracker) -> None:
        super().__init__(lab / "outbox", tracker)
        self.lab = lab
        self._sessions = Sessions(self.folder, tracker.identity)
        self._count = 0

    def open_run(self, run: NewRun, files: Mapping[str, bytes] = {}) -> RunSpool:
        """Start the record of a new run, with its first artifacts by their path."""
        return self._open(run.key, lambda spool: spool.create(run, files))

    def resume_run(self, run_id: str, study_id: str) -> RunSpool:
        """Go on with the record of a study's run that the tracker has."""
        # Two open spools of one run would each end it.
        known = [spool for spool in self._open_spools() if spool.known_id == run_id]
        if known:
            return known[0]
        return self._open("resumed", lambda spool: spool.resume(run_id, study_id))

    def adopt(self) -> list[str]:
        """Take over what processes that have ended left behind for the same tracker.

        Runs that they did not end are ended as interrupted.

        Returns:
            A line for each such run, and for each file that cannot be read.
        """
        lines = []
        for folder in self._sessions.take_over():
            for path in sorted(folder.glob("*.run")):
                try:
                    spool = FileSpool.load(path, self._changes)
                except ValueError as error:
                    self._failed.append(unreadable_spool(path, self._changes, error))
                    lines.append(str(self._failed[-1].failure))
                    continue
                if spool.finish_interrupted():
                    lines.append(
                        f"Run {spool.name} was left unfinished by a process that has ended: "
                        "it is recorded as interrupted."
                    )
                if spool.size:
                    self._add(spool)
                else:  # the process ended before it had written anything
                    path.unlink()
        self._sessions.remove_empty()
        return lines

    def leftovers(self, study_id: str = "") -> int:
        """Return the number of records, or of a study's, that `adopt` would take over."""
        paths = self._sessions.left_behind()
        return sum(not study_id or _belongs_to(path, study_id) for path in paths)

    def held_elsewhere(self, study_id: str) -> int:
        """Return the number of a study's records that another live process is to send."""
        return sum(_belongs_to(path, study_id) for path in self._sessions.held_elsewhere())

    def flush_run(self, spool: RunSpool) -> None:
        """Wait a while until the tracker has a run's record.

        Raises:
            TrackerRefused: the tracker refuses this record. Other runs are not looked at.
            OSError: the disk takes nothing.
        """
        self.flush(_RUN_S)
        if self._disk_error is not None:
            raise self._disk_error
        if isinstance(spool, FileSpool) and spool.failure is not None:
            raise spool.failure

    def pending_text(self) -> str:
        """Return how many records the tracker has yet to take, and where; empty if none."""
        if not (pending := self.pending()):
            return ""
        waiting = counted(pending, "record")
        return f"{waiting} still in {self.folder}, until the tracker answers again"

    def close(self) -> None:
        """Send for a few seconds more, then end the thread; what is left stays on the disk.

        Runs that are not ended are ended as interrupted.
        """
        for spool in self._open_spools():
            with suppress(OSError):  # a full disk: whoever adopts the run does it
                spool.finish_interrupted()
        self.flush(_CLOSE_S)
        if self._stop(_CLOSE_S):  # or a request has no answer: the locks go with the process
            self._sessions.close()

    def _open(self, name: str, begin: Callable[[FileSpool], None]) -> RunSpool:
        if isinstance(self.tracker, NoTracker):
            return RunSpool()
        self._count += 1
        path = self._sessions.own() / f"{self._count:06d}-{name}.run"
        spool = FileSpool(path, self._changes)
        begin(spool)
        self._add(spool)
        return spool

    def _open_spools(self) -> list[FileSpool]:
        with self._changes:
            return [spool for spool in self._spools if not spool.is_closed]


def _belongs_to(path: Path, study_id: str) -> bool:
    """Whether a record is of a study's run."""
    with suppress(OSError, *UNREADABLE):  # sent, or written, just now
        with open(path, "rb") as file:
            first = json.loads(file.readline())
        tags = first.get("run", {}).get("tags", {})
        return study_id in (first.get("study_id"), tags.get("digitlab.study_id"))
    return False
