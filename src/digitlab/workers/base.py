"""The interface between a driver and its workers, and the bookkeeping that all pools share."""

import ctypes
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

from digitlab.base.errors import UserError
from digitlab.config.types import Config, DataConfig

CANCEL_GRACE_S = 5.0  # a block of batches takes a quarter of a second, an evaluation a few
PROGRESS_INTERVAL_S = 0.2  # between two messages of one worker
_DEATHS_AT_START = 2  # in a row that a worker may have: a third has the same cause


@dataclass(frozen=True)
class Job:
    """One training: a configuration, and the fractions of its schedule where the driver decides."""

    config: Config
    rungs: tuple[float, ...] = ()
    snapshots: tuple[int, ...] = ()  # steps after which the driver gets the weights
    checkpoint: bytes | None = None  # of the same training, to go on from


class Decision(StrEnum):
    """What the driver decides at a rung. A worker obeys `stop` at any other batch, too.

    `pause` holds a worker at a batch until the driver decides to proceed; at a rung it has no
    effect.
    """

    proceed = "proceed"
    stop = "stop"
    pause = "pause"


@dataclass(frozen=True)
class Ready:
    """The worker takes jobs; `machine` describes where it runs."""

    machine: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """The worker cannot serve: its data or its code are not those of the study."""

    reason: str


@dataclass(frozen=True)
class Started:
    """The training begins; `facts` are metrics that are known before the first step."""

    facts: dict[str, float]


@dataclass(frozen=True)
class Progress:
    """The fraction of the training's steps that is done."""

    fraction: float


@dataclass(frozen=True)
class Rung:
    """The validation accuracy at the job's rung number `index`; the worker waits for a Decision."""

    index: int
    accuracy: float


@dataclass(frozen=True)
class Snapshot:
    """The weights after a number of steps, as a safetensors file."""

    step: int
    weights: bytes


@dataclass(frozen=True)
class Epoch:
    """An epoch's metrics; epochs count from 1."""

    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Checkpoint:
    """The state of the training, from which another job can go on."""

    content: bytes


@dataclass(frozen=True)
class Finished:
    """The result of a job: its metrics, its files by path, and what it was computed with."""

    metrics: dict[str, float]
    files: dict[str, bytes]
    environment: dict[str, Any]
    data_sha256: dict[str, str]


@dataclass(frozen=True)
class Stopped:
    """The job ended because the driver asked for it."""


@dataclass(frozen=True)
class Failed:
    """The training raised; `is_deterministic`: another attempt would raise the same."""

    reason: str
    is_deterministic: bool


@dataclass(frozen=True)
class Lost:
    """The worker is gone, with its job; `is_charged`: its process died while it trained."""

    cause: str
    is_charged: bool


End = Finished | Stopped | Failed | Lost
Event = Ready | Refused | Started | Progress | Rung | Snapshot | Epoch | Checkpoint | End
Order = Job | Decision


class Channel(Protocol):
    """A worker's side of its connection to the driver; orders come with the number of their job."""

    def send(self, event: Event, /) -> None: ...

    def recv(self) -> tuple[int, Order]:
        """Wait for an order; raises EOFError or OSError when the driver has gone."""

    def poll(self) -> bool:
        """Whether `recv` returns or raises at once."""


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to know before its first job.

    `data_sha256` are the study's training files, `source_digest` its code; what is empty is not
    compared.
    """

    lab: Path
    data: DataConfig
    data_sha256: dict[str, str] = field(default_factory=dict)
    source_digest: str = ""


def share_main_heap() -> None:
    """Let threads that start from now on share glibc's main heap.

    A thread's own heap returns each step's pages to the system and faults them in again, which
    makes a training 7 % slower than in the main thread.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-8, 1)  # malloc.h: M_ARENA_MAX


class Workers(ABC):
    """Workers that train one job at a time each. Their ids count from 0."""

    is_started = False

    def start(self) -> None:
        """Start the workers, unless they are started; each reports Ready or Refused."""
        if not self.is_started:
            self.is_started = True
            self._start()

    @abstractmethod
    def _start(self) -> None:
        """Start the workers, once."""

    @abstractmethod
    def idle(self) -> list[int]:
        """Return the workers that are ready and have no job."""

    @abstractmethod
    def submit(self, worker: int, job: Job) -> None:
        """Give an idle worker a job. An event of type End, or Refused, is its last."""

    @abstractmethod
    def answer(self, worker: int, decision: Decision) -> None:
        """Send the decision at the rung that the worker waits at, or one for its next batch."""

    @abstractmethod
    def events(self, timeout_s: float) -> list[tuple[int, Event]]:
        """Wait for events and return them, in order for each worker; [] after `timeout_s`.

        A worker that is Lost has been replaced, and reports Ready again.

        Raises:
            UserError: workers die at start, or none is left.
        """

    @abstractmethod
    def cancel(self, worker: int) -> None:
        """Stop the worker's job within a batch; after a grace period the worker is killed."""

    @abstractmethod
    def close(self) -> None:
        """End all workers at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _State:
    """What the pool knows of one worker."""

    is_ready: bool = False
    job: int = 0  # number of its job, 0 without
    has_started: bool = False  # it has reported something of the job
    stop_by: float = math.inf  # monotonic seconds
    deaths: int = 0  # in a row, before it was ready
    refusal: str = ""


class Pool(Workers):
    """The bookkeeping of workers; a subclass starts and kills them, and carries messages."""

    def __init__(self, setup: WorkerSetup, count: int) -> None:
        self.setup, self.count = setup, count
        self.cancel_grace_s = CANCEL_GRACE_S
        self._states: list[_State] = []
        self._jobs = 0  # submitted so far
        self._problem = ""

    @abstractmethod
    def _launch(self, worker: int) -> None:
        """Start a worker."""

    @abstractmethod
    def _discard(self, worker: int) -> None:
        """Kill a worker, if it lives, and forget it; nothing comes from it any more."""

    @abstractmethod
    def _send(self, worker: int, message: tuple[int, Order]) -> None:
        """Send to a worker that may have died."""

    @abstractmethod
    def _receive(self, timeout_s: float) -> Iterable[tuple[int, Event]]:
        """Wait for messages; Lost(is_charged=True) is a process that died by itself."""

    def _start(self) -> None:
        self._states = [_State() for _ in range(self.count)]
        for worker in range(self.count):
            self._launch(worker)

    def idle(self) -> list[int]:
        return [n for n, state in enumerate(self._states) if state.is_ready and not state.job]

    def submit(self, worker: int, job: Job) -> None:
        assert worker in self.idle()
        self._jobs += 1
        self._states[worker] = _State(is_ready=True, job=self._jobs)
        self._send(worker, (self._jobs, job))

    def answer(self, worker: int, decision: Decision) -> None:
        # The number keeps a late decision away from the worker's next job.
        if self._states[worker].job:
            self._send(worker, (self._states[worker].job, decision))

    def cancel(self, worker: int) -> None:
        state = self._states[worker]
        if state.job and state.stop_by == math.inf:
            state.stop_by = time.monotonic() + self.cancel_grace_s
            self.answer(worker, Decision.stop)

    def events(self, timeout_s: float) -> list[tuple[int, Event]]:
        deadline = time.monotonic() + timeout_s
        while True:
            self._raise_problem()
            until = min([deadline, *(state.stop_by for state in self._states)])
            received = self._receive(max(0.0, until - time.monotonic()))
            found = [(worker, self._note(worker, event)) for worker, event in received]
            found += self._kill_unresponsive()
            if found or time.monotonic() >= deadline:
                return found

    def close(self) -> None:
        for worker in range(len(self._states)):
            self._discard(worker)
        self._states = []

    def _note(self, worker: int, event: Event) -> Event:
        state = self._states[worker]
        if isinstance(event, Lost):
            return self._replace(worker, event)
        if isinstance(event, Ready):
            self._states[worker] = _State(is_ready=True)
        elif isinstance(event, Refused):
            self._states[worker] = _State(refusal=event.reason)
            self._discard(worker)
        elif isinstance(event, End):
            self._states[worker] = _State(is_ready=True)
        else:
            state.has_started = True
        return event

    def _replace(self, worker: int, lost: Lost) -> Lost:
        state = self._states[worker]
        deaths = 0 if state.is_ready else state.deaths + 1
        self._states[worker] = _State(deaths=deaths)
        self._discard(worker)
        if deaths > _DEATHS_AT_START:
            self._problem = (
                f"A worker died {deaths} times before it was ready: {lost.cause}. Free memory, or "
                "see what `digitlab train` reports on its machine."
            )
        else:
            self._launch(worker)
        return Lost(lost.cause, lost.is_charged and state.has_started)

    def _kill_unresponsive(self) -> list[tuple[int, Event]]:
        now = time.monotonic()
        late = [worker for worker, state in enumerate(self._states) if state.stop_by <= now]
        cause = f"it did not stop within {self.cancel_grace_s:g} s and was killed"
        return [(worker, self._replace(worker, Lost(cause, False))) for worker in late]

    def _raise_problem(self) -> None:
        if self._problem:
            raise UserError(self._problem)
        if all(state.refusal for state in self._states):
            reasons = "; ".join(dict.fromkeys(state.refusal for state in self._states))
            raise UserError(
                f"No worker can serve: {reasons}. Give each machine the study's code and data."
            )
