"""Worker processes: started in a moment, told what to run, replaced when they die."""

import fcntl
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from digitlab.base.errors import UserError
from digitlab.config.types import Config

_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Setup:
    """What every worker of a study is given when it starts."""

    config: Config
    overrides: tuple[str, ...]
    lab: Path
    parent_run: str | None
    environment: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One thing to run: a trial of the search, or a given configuration."""

    kind: str  # trial, or the kind of run that is made of `config`
    number: int  # of the trial that it is, or that it came from
    config: Config | None = None
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """How far the job is: a fraction of its steps, and the last accuracy that was measured."""

    done: float
    metrics: dict[str, float]
    values: dict[str, Any] | None = None  # of a trial, once they are chosen


@dataclass(frozen=True)
class Done:
    """The job has ended; `fatal` is set when the study cannot go on either."""

    state: str  # finished, pruned, failed, interrupted, or waiting: to be run again
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    run_id: str | None = None
    fatal: str = ""


@dataclass
class Worker:
    """The parent's view of one worker process."""

    number: int
    process: ForkServerProcess
    connection: Connection
    ready: bool = False
    job: Job | None = None
    begun: float = 0.0  # of the job, monotonic seconds
    progress: Progress = field(default_factory=lambda: Progress(0.0, {}))
    killed: str = ""  # why the parent killed it


def preload(*modules: str) -> None:
    """Begin to import what workers need, in a process that they will be forked from.

    It has imported and not computed, so that a fork of it is ready in a moment. It and the workers
    leave Ctrl-C and a closed terminal to the parent, which tells them what to do.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's; each run sets torch's own
    _CONTEXT.set_forkserver_preload(["digitlab.study.workers.worker", *modules])
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGHUP)}
    multiprocessing.forkserver.ensure_running()
    for name, handler in before.items():
        signal.signal(name, handler)


def _main(connection: Connection, setup: Setup) -> None:
    from digitlab.study.workers.worker import work

    work(connection, setup)


class Pool:
    """The workers of one study on this machine."""

    def __init__(self, setup: Setup, count: int) -> None:
        self.setup = setup
        self.workers = [self._start(number) for number in range(count)]
        self.stillborn = 0  # workers that died before they were ready, one after another

    def _start(self, number: int) -> Worker:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_main, args=(theirs, self.setup), daemon=True)
        process.start()
        theirs.close()
        return Worker(number, process, ours)

    def idle(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.ready and worker.job is None]

    def busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.job is not None]

    def give(self, worker: Worker, job: Job) -> None:
        worker.job, worker.begun, worker.progress = job, time.monotonic(), Progress(0.0, {})
        try:
            worker.connection.send(job)
        except OSError:  # it died; `events` will say so
            return

    def events(self, timeout: float) -> Iterator[tuple[Worker, Done | None]]:
        """Jobs that ended, and workers that died (None), within `timeout` seconds.

        A worker that died has been replaced; its job is still on the one that is yielded.
        """
        connections = {worker.connection: worker for worker in self.workers}
        for connection in multiprocessing.connection.wait(list(connections), timeout):
            worker = connections[connection]  # type: ignore[index]
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                self._replace(worker)
                yield worker, None
                continue
            if isinstance(message, Progress):
                worker.progress = message
            elif isinstance(message, Done):
                yield worker, message
            else:
                worker.ready, self.stillborn = True, 0

    def _replace(self, worker: Worker) -> None:
        worker.connection.close()
        worker.process.kill()
        worker.process.join()
        self.stillborn += not worker.ready
        if self.stillborn > 2 * len(self.workers):
            raise UserError(
                "study.workers: the workers die before they are ready; see what "
                "`digitlab train` says, or free memory"
            )
        self.workers[self.workers.index(worker)] = self._start(worker.number)

    def kill(self, worker: Worker, why: str) -> None:
        """End a worker that no longer answers; `events` will yield it."""
        worker.killed = why
        worker.process.kill()

    def stop(self) -> None:
        """Ask all workers to end what they do at the next batch."""
        for worker in self.workers:
            try:
                worker.connection.send(None)
            except OSError:  # it has gone already
                continue

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


@contextmanager
def only_parent(lab: Path, study: str) -> Iterator[None]:
    """Hold the study: no other parent runs it, and no worker of a killed one is left.

    Locks of the operating system go when their process goes, however it ends.

    Raises:
        UserError: another process runs the study.
    """
    folder = lab / "locks"
    folder.mkdir(exist_ok=True)
    with (
        open(folder / f"{study}.parent", "w") as parent,
        open(folder / f"{study}.workers", "w") as w,
    ):
        try:
            fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"study.name={study}: it is running already: wait for it, "
                "or give another study.name"
            ) from error
        deadline = time.monotonic() + 30  # s; a worker whose parent has died ends at its next batch
        while True:
            try:
                fcntl.flock(w, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"study.name={study}: a worker of an earlier run does not end: kill it"
                    ) from error
                time.sleep(0.1)
        fcntl.flock(w, fcntl.LOCK_UN)
        yield


@contextmanager
def one_worker(lab: Path, study: str) -> Iterator[None]:
    """Hold the sign that a worker of the study is alive."""
    with open(lab / "locks" / f"{study}.workers", "w") as sign:
        fcntl.flock(sign, fcntl.LOCK_SH)
        yield
