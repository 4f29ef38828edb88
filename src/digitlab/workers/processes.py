"""Workers in processes of this machine, forked from one that has imported what they need."""

import atexit
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from digitlab.base.errors import UserError
from digitlab.workers.base import Event, Lost, Order, Pool, WorkerSetup

_CONTEXT = multiprocessing.get_context("forkserver")
# Bytes of its path, of the 103 of a socket's on macOS; /pymp-xxxxxxxx/listener-xxxxxxxx is added.
_LONGEST_FOLDER = 70
_DEATH_S = 2.0  # from a closed pipe to the end of its process
_LEFT_TO_DRIVER = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def preload(*modules: str) -> None:
    """Start to import what workers need, in a process that they will be forked from.

    It has imported and not computed, so that a fork of it is ready in a moment.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's; each run sets torch's own
    _CONTEXT.set_forkserver_preload(["digitlab.workers.job", *modules])
    # It inherits what is ignored, and leaves Ctrl-C and a closed terminal to the driver.
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGHUP)}
    try:
        with _short_folder():
            multiprocessing.forkserver.ensure_running()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def _short_folder() -> Iterator[None]:
    """Let the socket that multiprocessing makes lie in a folder whose path is short enough."""
    own = tempfile.gettempdir()
    if len(os.fsencode(own)) > _LONGEST_FOLDER:
        short = "/tmp"  # noqa: S108  multiprocessing makes a folder of this user's own in it
        if not os.access(short, os.W_OK):
            raise UserError(
                f"TMPDIR={own} is too long for the socket of the workers: it must have at most "
                f"{_LONGEST_FOLDER} bytes where {short} cannot be written. Set another TMPDIR."
            )
        tempfile.tempdir = short
    try:
        yield
    finally:
        tempfile.tempdir = own


class PipePool(Pool):
    """Workers at the other end of a pipe each; a subclass decides what runs there."""

    def __init__(self, setup: WorkerSetup, count: int) -> None:
        super().__init__(setup, count)
        self._pipes: dict[int, Connection] = {}

    def _send(self, worker: int, message: tuple[int, Order]) -> None:
        with suppress(OSError):  # it died, which `_receive` reports
            self._pipes[worker].send(message)

    def _receive(self, timeout_s: float) -> Iterator[tuple[int, Event]]:
        workers = {pipe: worker for worker, pipe in self._pipes.items()}
        for pipe in multiprocessing.connection.wait(list(workers), timeout_s):
            assert isinstance(pipe, Connection)
            try:
                event: Event = pipe.recv()
            except (EOFError, OSError):
                event = Lost(self._cause(workers[pipe]), True)
            yield workers[pipe], event

    def _discard(self, worker: int) -> None:
        pipe = self._pipes.pop(worker, None)
        if pipe is not None:
            pipe.close()

    def _cause(self, _: int) -> str:
        return "it ended unexpectedly"


class ProcessWorkers(PipePool):
    """Worker processes of this machine."""

    def __init__(self, setup: WorkerSetup, count: int) -> None:
        super().__init__(setup, count)
        self._processes: dict[int, ForkServerProcess] = {}

    def _start(self) -> None:
        preload()
        # At exit multiprocessing waits for its processes, and these ignore its SIGTERM.
        atexit.register(self.close)
        super()._start()

    def close(self) -> None:
        super().close()
        atexit.unregister(self.close)

    def _launch(self, worker: int) -> None:
        self._pipes[worker], theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_main, args=(theirs, self.setup), daemon=True)
        process.start()
        self._processes[worker] = process
        theirs.close()

    def _discard(self, worker: int) -> None:
        super()._discard(worker)
        process = self._processes.pop(worker, None)
        if process is not None:
            process.kill()
            process.join()
            process.close()

    def _cause(self, worker: int) -> str:
        process = self._processes[worker]
        process.join(_DEATH_S)
        status = process.exitcode
        if status is not None and status < 0:
            return f"its process was killed by {signal.Signals(-status).name}"
        return f"its process ended with status {status}"


def _main(pipe: Connection, setup: WorkerSetup) -> None:
    # Blocked, not ignored: Lightning installs a handler of SIGTERM for each fit.
    signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_DRIVER)
    from digitlab.data.datasets import cache_training_digits
    from digitlab.workers.job import serve

    cache_training_digits()
    gc.freeze()  # imported modules are never garbage: a collection after each job skips them
    serve(setup, pipe)
