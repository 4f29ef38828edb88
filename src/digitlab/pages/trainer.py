"""Training beside the page: one run at a time, in a worker, recorded as any run."""

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError, first_line
from digitlab.config.compose import Composed
from digitlab.config.types import Config, DataConfig
from digitlab.data.datamodule import DigitsData, Labelled
from digitlab.data.datasets import cache_training_digits
from digitlab.pages.events import EventLog
from digitlab.pages.moments import SHOWN_IMAGES, Moments
from digitlab.records.record import Identity, Records, RunRecorder
from digitlab.study.loop import JobLoop, Task
from digitlab.study.run import name_of, run_task
from digitlab.training.device import find_device
from digitlab.training.film import shown_steps
from digitlab.workers.base import Decision, Job, Workers, WorkerSetup
from digitlab.workers.processes import ProcessWorkers

_PROGRESS_S = 1.0  # between two reports


@dataclass
class PageRun:
    """A run of this page, by its number since the server started."""

    number: int
    composed: Composed
    name: str
    is_paused: bool = False
    is_stopping: bool = False


class PageTrainer:
    """Trains what the page asks for; what happens goes to the log.

    A thread of its own leads the worker: it alone sends orders and writes records.
    """

    def __init__(
        self, lab: Path, data: DataConfig, records: Records, log: EventLog,
        conclude: Callable[[str], str] = lambda _: "",
    ) -> None:  # fmt: skip
        """Start the worker, which imports and reads the data meanwhile.

        Args:
            conclude: returns what is to be said of a run that finished, by its run id.

        Raises:
            UserError: the data are not available.
        """
        self.lab, self.records, self.log, self.conclude = lab, records, log, conclude
        self.moments = Moments(lab, log.publish)
        self.environment = describe_environment()
        self._running: PageRun | None = None
        self._count = 0
        self._wanted: queue.Queue[PageRun | None] = queue.Queue()
        self._is_pause_sent = False
        self._next_report = 0.0
        self._paused_at = 0.0  # monotonic seconds
        cache_training_digits()
        self.workers: Workers = ProcessWorkers(WorkerSetup(lab, data), 1)
        self.workers.start()  # in the main thread, which alone can set signals aside
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def running(self) -> PageRun | None:
        return self._running

    def train(self, composed: Composed) -> PageRun:
        """Start a run; UserError while another one trains."""
        if self._running is not None:
            raise UserError(
                f"{self._running.name} is in training: one run at a time is trained here. Wait for "
                "its end, or stop it."
            )
        self._count += 1
        name = name_of(composed, self.records.tracker)
        run = self._running = PageRun(self._count, composed, name)
        self._publish(run, "waiting")
        self._wanted.put(run)
        return run

    def set_paused(self, is_paused: bool) -> None:
        if self._running is not None:
            self._running.is_paused = is_paused

    def stop(self) -> None:
        if self._running is not None:
            self._running.is_stopping = True

    def close(self) -> None:
        """Stop what trains, record that, and end the worker."""
        self.stop()
        self._wanted.put(None)
        self._thread.join()
        self.workers.close()

    def _publish(self, run: PageRun, state: str, **more: Any) -> None:
        self.log.publish("run", run=run.number, name=run.name, state=state, **more)

    def prepare(self, config: Config) -> tuple[Labelled, int]:
        """Return the images that moments are measured on, and the steps of an epoch.

        Raises:
            UserError: the device or the data are not available, or they are fewer than asked for.
        """
        find_device(config.trainer.device)
        digits = DigitsData(config, self.lab)
        digits.setup("fit")
        shown = digits.validation or digits.training
        assert shown is not None
        images, labels = shown
        return (images[:SHOWN_IMAGES], labels[:SHOWN_IMAGES]), len(digits.train_dataloader())

    def _serve(self) -> None:
        loop = JobLoop(self.workers, self._is_stopping, self._tick)
        while (run := self._wanted.get()) is not None:
            try:
                self._train(loop, run)
            except Exception as error:  # noqa: BLE001  the page goes on, and shows the reason
                self._publish(run, "failed", text=first_line(error))
            finally:
                self._running = None
                self.log.publish("free")

    def _is_stopping(self) -> bool:
        return self._running is not None and self._running.is_stopping

    def _tick(self, loop: JobLoop) -> None:
        """Send a wish to pause or to go on, and report how far the run is."""
        run = self._running
        for worker, task in loop.running.items() if run else ():
            assert run is not None
            if run.is_paused != self._is_pause_sent:
                self._is_pause_sent = run.is_paused
                loop.workers.answer(worker, Decision.pause if run.is_paused else Decision.proceed)
                self._publish(run, "paused" if run.is_paused else "training")
                if run.is_paused:
                    self._paused_at = time.monotonic()
                else:  # a run's seconds are those that it trains
                    task.submitted += time.monotonic() - self._paused_at
            if time.monotonic() > self._next_report:
                self._next_report = time.monotonic() + _PROGRESS_S
                self.log.publish("progress", run=run.number, fraction=task.fraction)

    def _train(self, loop: JobLoop, run: PageRun) -> None:
        config = run.composed.config
        images, epoch = self.prepare(config)
        steps = epoch * config.trainer.epochs
        tags = {"digitlab.recipe": config.study.name}
        identity = Identity(run.name, "train", tags, None, run.composed.overrides, self.environment)
        recorder = RunRecorder(self.records.outbox, config, identity)
        job = Job(config, (), shown_steps(steps, epoch))
        self._is_pause_sent = False
        task = Task(run.name, job, recorder)
        task.on_snapshot = lambda shot: self.moments.add(
            run.number, shot.step, config, shot.weights, images
        )
        # A validation loss that is not finite is no JSON.
        task.on_epoch = lambda number, metrics: self.log.publish(
            "epoch", run=run.number, epoch=number, step=number * epoch,
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        )  # fmt: skip
        self._publish(run, "training", steps=steps, epoch=epoch, epochs=config.trainer.epochs)
        ending = run_task(loop, task)
        problem = self._flush(recorder)
        self.moments.join()
        run_id, seconds = recorder.run_id(), task.metrics.get("seconds", 0.0)
        said = [ending.reason, problem]
        if ending.state == "finished" and run_id and not problem:
            said.append(self.conclude(run_id))
        about = {"text": ". ".join(filter(None, said)), "run_id": run_id, "seconds": seconds}
        self._publish(run, ending.state, **about)

    def _flush(self, recorder: RunRecorder) -> str:
        """Wait a while for a run's record to be sent; return why it was not, if so."""
        try:
            self.records.outbox.flush_run(recorder.spool)
        except (UserError, OSError) as error:
            return first_line(error)
        return self.records.outbox.pending_text()
