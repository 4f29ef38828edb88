"""One worker in a thread of this process: for a single training, and for tests."""

import threading
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from digitlab.training.observer import TrainingObserver
from digitlab.workers.base import WorkerSetup, share_main_heap
from digitlab.workers.processes import PipePool


class InlineWorkers(PipePool):
    """One worker thread. What does not answer a cancel is abandoned, since no thread is killed."""

    def __init__(self, setup: WorkerSetup, observers: Sequence[TrainingObserver] = ()) -> None:
        super().__init__(setup, 1)
        self.observers = observers
        self._thread = threading.Thread()

    def _launch(self, worker: int) -> None:
        share_main_heap()
        self._pipes[worker], theirs = Pipe()
        given = (theirs, self.setup, self.observers)
        self._thread = threading.Thread(target=_main, args=given, daemon=True)
        self._thread.start()

    def close(self) -> None:
        super().close()
        # The closed pipe ends the training at its next batch; torch must not compute at exit.
        if self._thread.ident is not None:
            self._thread.join(self.cancel_grace_s)


def _main(pipe: Connection, setup: WorkerSetup, observers: Sequence[TrainingObserver]) -> None:
    from digitlab.workers.job import serve

    with pipe:
        serve(setup, pipe, observers=observers)
