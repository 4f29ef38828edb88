"""The inside of a worker, wherever it runs: check the setup, then train job after job."""

import gc
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import safetensors.torch
from torch import nn

from digitlab.base import faults
from digitlab.base.environment import training_digest
from digitlab.base.errors import UserError, first_line
from digitlab.base.usage import ProcessUsage
from digitlab.data.datasets import TRAIN, DataUnavailable, load_digits
from digitlab.training.fit import fit
from digitlab.training.module import Diverged
from digitlab.training.observer import ObserverGroup, StopTraining, TrainingObserver
from digitlab.training.outputs import output_files
from digitlab.workers.base import (
    PROGRESS_INTERVAL_S,
    Channel,
    Checkpoint,
    Decision,
    Epoch,
    Event,
    Failed,
    Finished,
    Job,
    Order,
    Progress,
    Ready,
    Refused,
    Rung,
    Snapshot,
    Started,
    Stopped,
    WorkerSetup,
)


def serve(
    setup: WorkerSetup,
    channel: Channel,
    machine: Mapping[str, Any] = {},
    environment: Mapping[str, Any] = {},
    observers: Sequence[TrainingObserver] = (),
) -> None:
    """Train what comes from the channel, until the driver closes it or dies.

    Args:
        machine: goes into Ready, beside host and process.
        environment: goes into the record of each job.
        observers: of whoever calls, for each job beside the driver's.
    """
    faults.point("worker.started")
    with suppress(EOFError, OSError):  # the driver has gone
        reason = _mismatch(setup)
        if reason:
            channel.send(Refused(reason))
            return
        channel.send(Ready({"host": socket.gethostname(), "pid": os.getpid(), **machine}))
        jobs = 0
        while True:
            number, order = channel.recv()
            if isinstance(order, Job):  # else it is an answer to a job that has ended meanwhile
                if jobs:  # Lightning's objects of the job before refer to one another
                    gc.collect()
                jobs += 1
                mine = _JobObserver(channel, number)
                end = _run(order, setup, mine, environment, observers)
                channel.send(end)
                if isinstance(end, Refused):
                    return


def _mismatch(setup: WorkerSetup) -> str:
    """Return why this worker's results would not be the study's; fetches data that is missing."""
    if setup.source_digest and setup.source_digest != training_digest():
        return f"its source code is {training_digest()}, the study's is {setup.source_digest}"
    if not setup.data_sha256:
        return ""
    try:
        found = load_digits(setup.lab, setup.data.name, TRAIN, setup.data.allow_unknown).sha256
    except (UserError, OSError) as error:
        return first_line(error)
    wrong = sorted(name for name in found if found[name] != setup.data_sha256.get(name))
    return f"its {', '.join(wrong)} differ from the study's" if wrong else ""


def _run(
    job: Job,
    setup: WorkerSetup,
    observer: "_JobObserver",
    environment: Mapping[str, Any],
    observers: Sequence[TrainingObserver],
) -> Event:
    try:
        observer.report(0.0)  # from here on, a death of this process counts against the job
        faults.point("job.started")
        usage = ProcessUsage()
        group = ObserverGroup([observer, *observers])
        result = fit(job.config, setup.lab, group, job.rungs, job.snapshots, job.checkpoint)
        used = usage.metrics()
        used["cpu_seconds"] += result.earlier.cpu_seconds
        files = output_files(result)
        faults.point("job.finished")
    except StopTraining:
        return Stopped()
    except DataUnavailable as error:  # the machine's fault, not the job's
        return Refused(first_line(error))
    except (UserError, Diverged) as error:
        return Failed(str(error), is_deterministic=True)
    except Exception as error:  # noqa: BLE001  the driver decides whether to try again
        return Failed(f"{type(error).__name__}: {error}", is_deterministic=False)
    known = {**environment, "numerics": result.numerics}
    return Finished(result.metrics | used, files, known, dict(result.data_sha256))


class _JobObserver(TrainingObserver):
    """Sends the driver what the training reports, and ends it when the driver asks for it."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel, self.number = channel, number
        self.rungs = 0  # reached so far
        self.next_report = 0.0  # monotonic seconds

    def report(self, fraction: float) -> None:
        if time.monotonic() >= self.next_report:
            self.next_report = time.monotonic() + PROGRESS_INTERVAL_S
            self.channel.send(Progress(fraction))

    def started(self, facts: Mapping[str, float]) -> None:
        self.channel.send(Started(dict(facts)))

    def batch(self, fraction: float) -> None:
        faults.point("job.batch")
        while self.channel.poll():
            if self._decision() is Decision.pause:
                self._wait()
        self.report(fraction)

    def rung(self, rung: float, accuracy: float) -> None:
        faults.point("job.rung")
        self.channel.send(Rung(self.rungs, accuracy))
        self.rungs += 1
        self._wait()

    def snapshot(self, step: int, network: nn.Module) -> None:
        weights = {name: value.contiguous() for name, value in network.state_dict().items()}
        self.channel.send(Snapshot(step, safetensors.torch.save(weights)))

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.channel.send(Epoch(epoch, dict(metrics)))

    def checkpoint(self, content: bytes) -> None:
        self.channel.send(Checkpoint(content))
        faults.point("job.checkpoint")

    def _wait(self) -> None:
        while self._decision() is not Decision.proceed:
            continue

    def _decision(self) -> Order | None:
        """Return the next order, None if it is of an earlier job; end this job if it is to stop."""
        number, order = self.channel.recv()
        if number == self.number and order is Decision.stop:
            raise StopTraining
        return order if number == self.number else None
