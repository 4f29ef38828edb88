"""The operations on one run, in a file of the lab's outbox until the tracker has all of them.

An operation is a line of JSON; one that adds files is followed by their bytes. A file that a crash
cut off in the middle of an operation ends with the one before.
"""

import json
import os
import threading
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from digitlab.base import faults
from digitlab.base.files import sync_folder
from digitlab.records.store import NewRun, now_ms


class RunSpool:
    """The operations on one run; here, of a run that is not recorded."""

    def log(
        self, metrics: Mapping[str, float] = {}, step: int = 0, tags: Mapping[str, str] = {}
    ) -> None:
        """Record metrics of a step, and tags."""

    def add_files(self, files: Mapping[str, bytes] | Path) -> None:
        """Record artifacts: their contents by path, or all files below a folder."""

    def end(self, state: str) -> None:
        """Record the state that the run ended in, or `running` where it goes on."""

    def seal(self) -> None:
        """Return when everything so far is on the disk, where a power loss cannot undo it."""

    def discard(self) -> None:
        """Take the run back: it is deleted where the tracker has it already."""

    def run_id(self, timeout_s: float = 0.0) -> str | None:
        """Return the tracker's id of the run; None if it has not given one after `timeout_s`."""
        return None


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder, by their path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@dataclass(frozen=True)
class Operation:
    """One operation, and the files that belong to it."""

    what: dict[str, Any]
    files: dict[str, bytes]


def encode(what: Mapping[str, Any], files: Mapping[str, bytes] = {}) -> bytes:
    """Return an operation as it stands in the file."""
    if not files:
        return json.dumps(what).encode() + b"\n"
    content = b"".join(files.values())
    sizes = {path: len(value) for path, value in files.items()}
    head = {**what, "sizes": sizes, "crc32": zlib.crc32(content)}
    return json.dumps(head).encode() + b"\n" + content + b"\n"


def decode(content: bytes) -> tuple[list[Operation], int]:
    """Return the operations of a file up to the first that is not whole, and where they end."""
    operations: list[Operation] = []
    end = 0
    while (line_end := content.find(b"\n", end)) >= 0:
        try:
            what = json.loads(content[end:line_end])
            sizes = what.get("sizes", {})
        except (ValueError, AttributeError):
            break
        at = line_end + 1
        files = {}
        for path, size in sizes.items():
            files[path] = content[at : at + size]
            at += size
        if sizes:
            body = content[line_end + 1 : at]
            if content[at : at + 1] != b"\n" or zlib.crc32(body) != what["crc32"]:
                break
            at += 1
        operations.append(Operation(what, files))
        end = at
    return operations, end


class Signals:
    """What those who write and the thread that sends wait for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # an operation was appended, or sent
        self.urgent = threading.Event()  # somebody waits for what was appended to be sent


class FileSpool(RunSpool):
    """The operations on one run in a file, and how far they were sent.

    One thread appends, the outbox's delivery thread reads what was appended and notes what it sent.
    """

    def __init__(self, path: Path, signals: Signals) -> None:
        self.path, self.changed, self.urgent = path, signals.changed, signals.urgent
        self.file: int | None = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self.size = self.sent = 0  # bytes that are whole in the file; that the tracker has
        self.name = ""
        self.known_id: str | None = None
        self.failure: Exception | None = None  # why nothing more of this run is sent
        self.may_exist = False  # whether the tracker may have the run, though its id is not known
        self.is_running = False  # whether the run goes on, and somebody has to end it
        self.is_closed = False  # whether no operation follows

    @classmethod
    def load(cls, path: Path, signals: Signals) -> "FileSpool":
        """Take over what another process left behind, without an operation that is not whole."""
        spool = cls(path, signals)
        operations, spool.size = decode(path.read_bytes())
        assert spool.file is not None
        os.ftruncate(spool.file, spool.size)
        spool.may_exist = True
        for operation in operations:
            spool._note(operation.what)
        return spool

    @property
    def has_unsent(self) -> bool:
        return self.sent < self.size

    def create(self, run: NewRun) -> None:
        self._append({"do": "create", "run": asdict(run)})
        faults.point("outbox.created")

    def resume(self, run_id: str) -> None:
        self._append({"do": "resume", "run_id": run_id})

    def log(
        self, metrics: Mapping[str, float] = {}, step: int = 0, tags: Mapping[str, str] = {}
    ) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._append(
            {"do": "log", "metrics": values, "step": step, "tags": dict(tags), "time_ms": now_ms()}
        )

    def add_files(self, files: Mapping[str, bytes] | Path) -> None:
        files = read_folder(files) if isinstance(files, Path) else files
        if files:
            self._append({"do": "files"}, files)

    def end(self, state: str) -> None:
        self._append({"do": "end", "state": state, "time_ms": now_ms()})

    def discard(self) -> None:
        self._append({"do": "discard"})

    def seal(self) -> None:
        with self.changed:
            if self.file is None:  # the tracker has all of it, or it was sealed before
                return
            file = os.dup(self.file)
        try:
            os.fsync(file)
        finally:
            os.close(file)
        sync_folder(self.path.parent)
        faults.point("outbox.sealed")
        if self.is_closed:  # or a long outage would hold as many files open as there are runs
            self.close()

    def run_id(self, timeout_s: float = 0.0) -> str | None:
        with self.changed:
            if timeout_s > 0 and self.known_id is None:
                self.urgent.set()
                self.changed.wait_for(lambda: self.known_id or self.failure, timeout_s)
            return self.known_id

    def finish_interrupted(self) -> bool:
        """End a run that nobody will end any more; return whether it was going on."""
        was_running = self.is_running
        if was_running:
            self.end("interrupted")
        self.is_closed = True
        self.close()
        return was_running

    def unsent(self) -> tuple[list[Operation], int]:
        """Return what the tracker does not have yet, and the size of the file with it."""
        with self.changed:
            size = self.size
        with open(self.path, "rb") as file:
            file.seek(self.sent)
            return decode(file.read(size - self.sent))[0], size

    def close(self) -> None:
        with self.changed:
            if self.file is not None:
                os.close(self.file)
                self.file = None

    def _append(self, what: Mapping[str, Any], files: Mapping[str, bytes] = {}) -> None:
        """Write an operation as a whole, or leave the file as it was and raise."""
        left = memoryview(encode(what, files))
        length = len(left)
        with self.changed:
            if self.file is None or self.is_closed:
                raise RuntimeError(f"the run has ended: {what['do']} needs it resumed")
            try:
                while left:
                    left = left[os.write(self.file, left) :]
            except BaseException:
                # Or the next operation would be appended to a part of this one.
                os.ftruncate(self.file, self.size)
                raise
            self.size += length
            self._note(what)
            self.changed.notify_all()
        faults.point("outbox.appended")

    def _note(self, what: Mapping[str, Any]) -> None:
        if what["do"] == "create":
            self.name, self.is_running = what["run"]["name"], True
        elif what["do"] == "resume":
            self.name = self.known_id = what["run_id"]
        elif what["do"] == "end":
            self.is_running = what["state"] == "running"
            self.is_closed = not self.is_running
        elif what["do"] == "discard":
            self.is_running, self.is_closed = False, True
