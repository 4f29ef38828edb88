"""The driver's loop: tasks out to workers, events in, until there are none."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from digitlab.records.record import RunRecorder
from digitlab.workers.base import (
    Checkpoint,
    Decision,
    Epoch,
    Event,
    Failed,
    Finished,
    Job,
    Lost,
    Progress,
    Refused,
    Rung,
    Snapshot,
    Started,
    Stopped,
    Workers,
)

_TICK_S = 0.2  # between two looks at the clock and the screen


@dataclass
class Task:
    """One job with its record, and what is known of it while it runs."""

    title: str  # on the screen: trial 7, confirm 36 seed 2
    job: Job
    recorder: RunRecorder
    should_prune: Callable[[int, float], bool] = lambda _rung, _accuracy: False
    on_start: Callable[[Mapping[str, float]], None] = lambda _: None
    on_epoch: Callable[[int, Mapping[str, float]], None] = lambda _epoch, _metrics: None
    on_snapshot: Callable[[Snapshot], None] = lambda _: None
    time_limit_s: float = 0.0  # 0 is none
    about: Any = None  # of whoever submitted it
    submitted: float = 0.0  # monotonic seconds
    fraction: float = 0.0  # of its steps
    accuracy: float | None = None  # the last that was measured
    curve: list[float] = field(default_factory=list)  # validation accuracy after each epoch
    metrics: dict[str, float] = field(default_factory=dict)  # the last of each name
    files: Mapping[str, bytes] = field(default_factory=dict)  # of a finished one
    is_pruned: bool = False
    is_late: bool = False  # it was cancelled, since it took too long
    is_cancelled: bool = False


@dataclass(frozen=True)
class Ending:
    """How a task ended, and whether it counts as a failed attempt of its own."""

    state: str  # finished, pruned, failed, or interrupted
    reason: str = ""
    is_charged: bool = False
    is_final: bool = True  # another attempt would end the same


class JobLoop:
    """Gives tasks to workers as they become idle, until there are none or the user stops."""

    def __init__(
        self,
        workers: Workers,
        stop: Callable[[], bool],
        tick: Callable[["JobLoop"], None] = lambda _: None,
        refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Create a loop that runs nothing yet.

        Args:
            stop: whether the tasks that run are to end, and no other is to start.
            tick: called in each iteration of the loop, at least five times a second.
            refused: receives the reason why a worker cannot serve; the others go on.
        """
        self.workers, self.stop, self.tick, self.refused = workers, stop, tick, refused
        self.running: dict[int, Task] = {}  # by worker

    def run(
        self, next_task: Callable[[], Task | None], ended: Callable[[Task, Ending], None]
    ) -> None:
        """Run tasks to their ends.

        Args:
            next_task: gives a task, or None while there is nothing to do for an idle worker.
            ended: is called once a task. The record of a finished one is sealed by then; any
                other record is to be ended there.
        """
        self.workers.start()  # here, so that a study that is complete starts none
        while True:
            has_more = not self.stop()
            for worker in self.workers.idle() if has_more else []:
                task = next_task()
                if task is None:
                    has_more = False
                    break
                task.submitted = time.monotonic()
                self.running[worker] = task
                self.workers.submit(worker, task.job)
            if not self.running and not has_more:
                return
            self._cancel()
            for worker, event in self.workers.events(_TICK_S):
                ending = self._handle(worker, event)
                if ending is not None:
                    ended(self.running.pop(worker), ending)
            self.tick(self)

    def _cancel(self) -> None:
        for worker, task in self.running.items():
            late = 0 < task.time_limit_s < _seconds(task)["seconds"]
            if (late or self.stop()) and not task.is_cancelled:
                task.is_cancelled, task.is_late = True, not self.stop()
                self.workers.cancel(worker)

    def _handle(self, worker: int, event: Event) -> Ending | None:
        """Pass an event on; return how the worker's task ended, if it did."""
        if isinstance(event, Refused):
            self.refused(event.reason)
        task = self.running.get(worker)
        if task is None:  # a worker that became ready, or was lost without a job
            return None
        match event:
            case Started(facts):
                task.metrics |= facts
                task.recorder.started(facts)
                task.on_start(facts)
            case Progress(fraction):
                task.fraction = fraction
            case Rung(index, accuracy):
                self._answer(worker, task, index, accuracy)
            case Snapshot():
                task.on_snapshot(event)
            case Epoch(epoch, metrics):
                task.metrics |= metrics
                task.accuracy = metrics.get("val_accuracy", task.accuracy)
                task.curve += [metrics["val_accuracy"]] if "val_accuracy" in metrics else []
                task.recorder.epoch(epoch, metrics)
                task.on_epoch(epoch, metrics)
            case Checkpoint(content):
                task.recorder.checkpoints.add(content)
            case Finished():
                return self._finish(task, event)
            case Stopped() | Failed() | Lost() | Refused():
                return self._end(task, event)
        return None

    def _answer(self, worker: int, task: Task, index: int, accuracy: float) -> None:
        rung = task.job.rungs[index]
        task.accuracy = accuracy
        task.metrics |= {"rung": rung, "rung_accuracy": accuracy}
        task.recorder.rung(rung, accuracy)
        task.is_pruned = task.should_prune(index, accuracy)
        self.workers.answer(worker, Decision.stop if task.is_pruned else Decision.proceed)

    def _finish(self, task: Task, event: Finished) -> Ending:
        results = event.metrics | _seconds(task)
        task.metrics |= results
        task.files = event.files
        task.recorder.finish(results, event.files, event.environment, event.data_sha256)
        return Ending("finished")

    def _end(self, task: Task, event: Event) -> Ending:
        """How a task ended that has no result."""
        task.metrics |= _seconds(task)
        if task.is_late:
            return Ending("failed", "it took longer than study.trial_minutes")
        match event:
            case Stopped() if task.is_pruned:
                return Ending("pruned", f"val_accuracy {task.accuracy:.4f} at its last rung")
            case Failed(reason, is_deterministic):
                return Ending("failed", reason, is_charged=True, is_final=is_deterministic)
            case Refused(reason):
                return Ending("interrupted", reason, is_final=False)
            case Lost(cause, is_charged):
                return Ending("interrupted", cause, is_charged and not self.stop(), is_final=False)
        return Ending("interrupted", "it was stopped", is_final=False)


def _seconds(task: Task) -> dict[str, float]:
    """Return the seconds of a training, those before the checkpoint that it went on from too."""
    earlier = task.metrics.get("resumed_at_seconds", 0.0)
    return {"seconds": earlier + time.monotonic() - task.submitted}
