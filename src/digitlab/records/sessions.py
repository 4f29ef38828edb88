"""The outbox's folders, one for each process that records: `session.json` and a file for each run.

The process locks `session.json` as long as it lives.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from digitlab.base.errors import UserError
from digitlab.base.files import make_folder, sync, write_synced
from digitlab.records.spool import UNREADABLE


class Sessions:
    """The folders that this process has locked: its own, and those of processes that ended."""

    def __init__(self, outbox: Path, tracker: str) -> None:
        self.outbox, self.tracker = outbox, tracker
        self._locks: dict[Path, int] = {}  # the open session.json by folder
        self._own: Path | None = None

    def own(self) -> Path:
        """Return this process's folder; it has its name only once it is locked."""
        if self._own is None:
            name = f"{time.time_ns():x}-{os.getpid()}"
            hidden = self.outbox / f".{name}"
            make_folder(self.outbox)
            with FileLock(self.outbox.with_suffix(".lock")):
                for left in self.outbox.glob(".*/"):  # by a process that was killed here
                    shutil.rmtree(left)
                for left in self.outbox.glob("[!.]*/"):  # empty: its removal was broken off
                    with suppress(OSError):
                        left.rmdir()
                hidden.mkdir()
                content = json.dumps({"tracker": self.tracker})
                write_synced(hidden / "session.json", content.encode())
                if not self._lock(hidden):
                    raise UserError(
                        f"the lab {self.outbox.parent} is invalid: it must be on a file system "
                        "that locks files (flock). Name another folder with DIGITLAB_HOME=FOLDER."
                    )
                self._own = hidden.rename(self.outbox / name)
            sync(self.outbox)
            self._locks[self._own] = self._locks.pop(hidden)
        return self._own

    def take_over(self) -> list[Path]:
        """Lock and return the folders of processes that have ended and had the same tracker."""
        with _alone(self.outbox):
            others = [folder for folder in _folders(self.outbox) if folder not in self._locks]
            return [folder for folder in others if self._lock(folder)]

    def left_behind(self) -> list[Path]:
        """Return the files of processes that have ended and had the same tracker."""
        others = [folder for folder in unlocked(self.outbox) if folder not in self._locks]
        ours = [folder for folder in others if tracker_of(folder) == self.tracker]
        return [path for folder in ours for path in folder.glob("*.run")]

    def held_elsewhere(self) -> list[Path]:
        """Return the files of folders that other live processes have locked."""
        known = {*self._locks, *unlocked(self.outbox)}
        others = [folder for folder in _folders(self.outbox) if folder not in known]
        return [path for folder in others for path in folder.glob("*.run")]

    def _release(self, folder: Path) -> None:
        os.close(self._locks.pop(folder))

    def remove_empty(self) -> None:
        """Remove the folders that have nothing left to send, but for this process's own."""
        for folder in list(self._locks):
            if folder != self._own and not any(folder.glob("*.run")):
                with suppress(FileNotFoundError):  # another process has removed it, too
                    shutil.rmtree(folder)
                self._release(folder)

    def close(self) -> None:
        self._own = None
        self.remove_empty()
        for folder in list(self._locks):
            self._release(folder)

    def _lock(self, folder: Path) -> bool:
        """Lock a folder unless its process is alive, or has recorded for another tracker."""
        # Or it was removed meanwhile.
        with suppress(OSError, *UNREADABLE), ExitStack() as opened:
            file = os.open(folder / "session.json", os.O_RDWR)
            opened.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if tracker_of(folder) == self.tracker:
                self._locks[folder] = file
                opened.pop_all()
                return True
        return False


def unlocked(outbox: Path) -> list[Path]:
    """Return the folders of processes that have ended."""
    with _alone(outbox):
        return [folder for folder in _folders(outbox) if not _is_locked(folder)]


def tracker_of(folder: Path) -> str:
    """Return the identity of the tracker that a folder's process recorded for, empty if unknown."""
    with suppress(OSError, *UNREADABLE):  # or it was just removed
        return str(json.loads((folder / "session.json").read_bytes())["tracker"])
    return ""


def _folders(outbox: Path) -> list[Path]:
    return sorted(outbox.glob("[!.]*/"))


@contextmanager
def _alone(outbox: Path) -> Iterator[None]:
    """Look for locks, which takes them: others would see a live process in whoever looks."""
    with ExitStack() as held:
        if outbox.is_dir():
            with suppress(OSError, NotImplementedError):  # of a lab that can only be read
                held.enter_context(FileLock(outbox.with_suffix(".lock")))
        yield


def _is_locked(folder: Path) -> bool:
    """Whether a live process has locked a folder."""
    with suppress(OSError), open(folder / "session.json", "rb") as file:  # or it was just removed
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
