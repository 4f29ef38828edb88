"""The operations on one run, in a file of the lab's outbox until the tracker has all of them.

An operation is a line of JSON, followed by the bytes of the files that it adds. A file that a crash
cut off in the middle of an operation ends with the one before.
"""

import json
import os
import re
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from digitlab.base import faults
from digitlab.base.files import sync
from digitlab.records.tracker import Dataset, NewRun, Registration, StoredNumber, now_ms


class RunSpool:
    """The operations on one run; here, of a run that is not recorded."""

    def log(
        self, metrics: Mapping[str, float] = {}, step: int = 0, tags: Mapping[str, str] = {}
    ) -> None:
        """Record metrics of a step, and tags."""

    def add_datasets(self, datasets: Sequence[Dataset]) -> None:
        """Record which images the run used."""

    def add_files(self, files: Mapping[str, bytes]) -> None:
        """Record artifacts by their path."""

    def register(self, what: Registration) -> None:
        """Register the model among the artifacts, with the metrics so far."""

    def end(self, state: str) -> None:
        """Record the state that the run ended in, or `running` where it goes on."""

    def leave(self) -> None:
        """Record no more of it, and no end: another process goes on with the run."""

    def seal(self) -> None:
        """Return when everything so far is on the disk, where a power loss cannot undo it."""

    def run_id(self, timeout_s: float = 0.0) -> str | None:
        """Return the tracker's id of the run; None if it has not given one after `timeout_s`."""
        return None


# What it raises to read a line of JSON that is not what it should be.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

# What a line may hold. Another version, or a fault of the disk, can have left something else.
_Size = Annotated[int, Field(ge=0)]


@dataclass
class _Line:
    time_ms: StoredNumber
    sizes: dict[str, _Size]
    crc32: int


@dataclass
class _Create(_Line):
    do: Literal["create"]
    run: NewRun


@dataclass
class _Resume(_Line):
    do: Literal["resume"]
    run_id: str
    study_id: str


@dataclass
class _Log(_Line):
    do: Literal["log"]
    metrics: dict[str, float]
    step: StoredNumber
    tags: dict[str, str]


@dataclass
class _Datasets(_Line):
    do: Literal["datasets"]
    datasets: list[Dataset]


@dataclass
class _Files(_Line):
    do: Literal["files"]


@dataclass
class _Register(_Line):
    do: Literal["register"]
    registration: Registration


@dataclass
class _End(_Line):
    do: Literal["end"]
    state: Literal["running", "finished", "pruned", "failed", "interrupted"]
    tags: dict[str, str]


_KINDS = _Create | _Resume | _Log | _Datasets | _Files | _Register | _End
_SHAPE: TypeAdapter[_KINDS] = TypeAdapter(Annotated[_KINDS, Field(discriminator="do")])


_END = b'{"do": "end"'  # as `encode` writes it


class Operation(NamedTuple):
    what: dict[str, Any]
    files: dict[str, bytes]


def encode(what: Mapping[str, Any], files: Mapping[str, bytes] = {}) -> bytes:
    """Return an operation as it stands in the file."""
    content = b"".join(files.values())
    sizes = {path: len(value) for path, value in files.items()}
    head = {**what, "sizes": sizes, "crc32": zlib.crc32(content)}
    return json.dumps(head).encode() + b"\n" + content


def decode(content: bytes) -> tuple[list[Operation], int]:
    """Return the operations of a file up to the first that is not whole, and where they end."""
    operations: list[Operation] = []
    end = 0
    while at := content.find(b"\n", end) + 1:
        try:
            what = json.loads(content[end:at])
            sizes = what["sizes"].values()
            body_end = at + sum(sizes)
            is_whole = min(sizes, default=0) >= 0  # or it would be read again and again
            is_whole = is_whole and zlib.crc32(content[at:body_end]) == what["crc32"]
        except UNREADABLE:
            break
        if body_end > len(content) or not is_whole:
            break
        files = {}
        for path, size in what["sizes"].items():
            files[path] = content[at : at + size]
            at += size
        operations.append(Operation(what, files))
        end = body_end
    return operations, end


def _shape(operation: Operation) -> _KINDS:
    """Return what a line holds; ValueError if it is nothing that this version writes."""
    found = _SHAPE.validate_json(json.dumps(operation.what), strict=True)
    for name in ("run", "registration"):  # of which pydantic passes over what it does not know
        held = getattr(found, name, None)
        if held is not None and vars(held).keys() != operation.what[name].keys():
            raise ValueError(f"{name} must hold {', '.join(vars(held))}, and nothing else")
    return found


class Changes(threading.Condition):
    """Notified when an operation was appended, or sent."""

    is_urgent = False  # somebody waits for what was appended to be sent
    is_closing = False  # nothing more will be sent

    def hurry(self) -> None:
        self.is_urgent = True
        self.notify_all()

    def calm(self, goes_on: bool) -> None:
        """Hurry no more, unless what was asked for still goes on."""
        with self:
            self.is_urgent = self.is_urgent and goes_on

    def pause(self, longest_s: float) -> None:
        """Wait, unless something hurries."""
        with self:
            self.wait_for(lambda: self.is_urgent or self.is_closing, longest_s)


class FileSpool(RunSpool):
    """The operations on one run in a file, and how far they were sent.

    One thread appends, the outbox's own reads what was appended and notes what it sent.
    """

    def __init__(self, path: Path, changes: Changes) -> None:
        self.path, self.changes = path, changes
        self.size = self.sent = 0  # bytes that are whole in the file; that the tracker has
        self.name = ""
        self.study_id = ""  # of a run that belongs to a study
        self.known_id: str | None = None
        self.failure: Exception | None = None  # why nothing more of this run is sent
        self.may_exist = False  # whether the tracker may have the run, though its id is not known
        self.is_running = False  # whether the run goes on, and somebody has to end it
        self.is_closed = False  # whether no operation follows
        self.is_adopted = False  # whether another process has written it

    @classmethod
    def load(cls, path: Path, changes: Changes) -> "FileSpool":
        """Take over what another process left behind, without an operation that is not whole.

        Raises:
            ValueError: it is none of this version's files.
        """
        spool = cls(path, changes)
        content = path.read_bytes()
        operations, spool.size = decode(content)
        ends = (match.start() for match in re.finditer(re.escape(_END), content[spool.size :]))
        if any(decode(content[spool.size + end :])[0] for end in ends):  # a kill leaves none
            raise ValueError(f"it cannot be read from byte {spool.size} on")
        kinds = [type(_shape(operation)) for operation in operations]
        if kinds[:1] not in ([], [_Create], [_Resume]) or {*kinds[1:]} & {_Create, _Resume}:
            raise ValueError("it must begin, and go on, with one run")
        os.truncate(path, spool.size)
        spool.may_exist = spool.is_adopted = True
        for operation in operations:
            spool._note(operation.what)
        return spool

    @property
    def is_pending(self) -> bool:
        """Whether there is something to send, or the file is to be removed."""
        return self.sent < self.size or self.is_closed

    def create(self, run: NewRun, files: Mapping[str, bytes]) -> None:
        """Write the run and its first artifacts as one operation: a kill leaves all or nothing."""
        self._append({"do": "create", "run": asdict(run)}, files)
        faults.point("outbox.created")

    def resume(self, run_id: str, study_id: str) -> None:
        self._append({"do": "resume", "run_id": run_id, "study_id": study_id})

    def log(
        self, metrics: Mapping[str, float] = {}, step: int = 0, tags: Mapping[str, str] = {}
    ) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._append({"do": "log", "metrics": values, "step": step, "tags": dict(tags)})

    def add_datasets(self, datasets: Sequence[Dataset]) -> None:
        self._append({"do": "datasets", "datasets": datasets})

    def add_files(self, files: Mapping[str, bytes]) -> None:
        self._append({"do": "files"}, files)

    def register(self, what: Registration) -> None:
        self._append({"do": "register", "registration": asdict(what)})

    def end(self, state: str) -> None:
        self._append({"do": "end", "state": state, "tags": {"digitlab.state": state}})

    def leave(self) -> None:
        with self.changes:
            self.is_running, self.is_closed = False, True
            self.changes.notify_all()

    def seal(self) -> None:
        try:
            sync(self.path)
            sync(self.path.parent)
        except FileNotFoundError:  # the tracker has all of it
            return
        faults.point("outbox.sealed")

    def run_id(self, timeout_s: float = 0.0) -> str | None:
        with self.changes:
            if timeout_s > 0 and self.known_id is None:
                self.changes.hurry()
                self.changes.wait_for(lambda: self.known_id or self.failure, timeout_s)
            return self.known_id

    def finish_interrupted(self) -> bool:
        """End a run that nobody will end any more; return whether it was going on."""
        was_running = self.is_running
        if was_running:
            self.end("interrupted")
        with self.changes:
            self.is_closed = True
            self.changes.notify_all()
        return was_running

    def unsent(self) -> tuple[list[Operation], int]:
        """Return what the tracker does not have yet, and the size of the file with it."""
        with self.changes:
            size = self.size
        with open(self.path, "rb") as file:
            file.seek(self.sent)
            operations, end = decode(file.read(size - self.sent))
        if self.sent + end != size:  # else what follows would be taken for sent, and removed
            raise ValueError(f"{self.path} is damaged after {self.sent + end} bytes")
        return operations, size

    def _append(self, what: Mapping[str, Any], files: Mapping[str, bytes] = {}) -> None:
        """Write an operation as a whole, or leave the file as it was and raise."""
        left = memoryview(encode({**what, "time_ms": now_ms()}, files))
        length = len(left)
        with self.changes:
            if self.is_closed:
                raise RuntimeError(f"the run has ended: {what['do']} needs it resumed")
            # Opened each time, or a long outage would hold as many files open as there are runs.
            create = 0 if self.size else os.O_CREAT
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | create, 0o644)
            try:
                while left:
                    left = left[os.write(file, left) :]
            except BaseException:
                # Or the next operation would be appended to a part of this one.
                os.ftruncate(file, self.size)
                raise
            finally:
                os.close(file)
            self.size += length
            self._note(what)
            self.changes.notify_all()
        faults.point("outbox.appended")

    def _note(self, what: Mapping[str, Any]) -> None:
        if what["do"] == "create":
            self.name, self.is_running = what["run"]["name"], True
            self.study_id = what["run"]["tags"].get("digitlab.study_id", "")
        elif what["do"] == "resume":
            self.name = self.known_id = what["run_id"]
            self.study_id = what["study_id"]
        elif what["do"] == "end":
            self.is_running = what["state"] == "running"
            self.is_closed = not self.is_running
