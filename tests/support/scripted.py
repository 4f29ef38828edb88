"""Workers without training: each job is a script that yields its events."""

import zlib
from collections.abc import Callable, Generator

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from digitlab.networks.settings import ModelConfig
from digitlab.networks.table import build_network
from digitlab.workers.base import (
    Decision,
    End,
    Epoch,
    Event,
    Finished,
    Job,
    Lost,
    Ready,
    Refused,
    Rung,
    Started,
    Stopped,
    Workers,
)

Script = Generator[Event, Decision | None, None]


def succeed(accuracy: float = 0.9, rungs: tuple[float, ...] = ()) -> Script:
    """A job that reports the accuracies at its rungs, and finishes unless it is stopped there."""
    yield Started({"model_parameters": 100.0, "training_flops": 1000.0})
    for index, value in enumerate(rungs):
        if (yield Rung(index, value)) is Decision.stop:
            yield Stopped()
            return
    metrics = {"val_accuracy": accuracy, "test_accuracy": accuracy}
    files = {"weights.safetensors": b"weights", "predictions.safetensors": predictions(accuracy)}
    yield Finished(metrics, files, {}, {"train": "0" * 64})


def predictions(accuracy: float, images: int = 100) -> bytes:
    """Return what a fit of that accuracy records: it misreads the first images."""
    labels = np.zeros(images, np.uint8)
    wrong = np.arange(images) < round(images * (1 - accuracy))
    return safetensors.numpy.save({"predictions": wrong.astype(np.uint8), "labels": labels})


def accuracy_of(job: Job) -> float:
    """Return an accuracy that follows from a job's configuration."""
    config = job.config
    known = f"{config.model.hidden} {config.optim.learning_rate} {config.trainer.seed}"
    return 0.5 + zlib.crc32(known.encode()) % 50 / 100


def stub(job: Job) -> Script:
    """A job whose accuracies follow from its configuration, with weights that can be loaded."""
    accuracy = accuracy_of(job)
    yield Started({"model_parameters": 100.0, "training_flops": 1000.0})
    for index, rung in enumerate(job.rungs):
        if (yield Rung(index, accuracy * (0.5 + rung / 2))) is Decision.stop:
            yield Stopped()
            return
    yield Epoch(1, {"train_loss": 1 - accuracy, "val_accuracy": accuracy})
    yield finished(job, accuracy)


class Losing:
    """Jobs as of `stub`; the worker of one is lost in place of the n-th event of all jobs."""

    def __init__(self, lost_at: int = 0) -> None:
        self.lost_at, self.count = lost_at, 0

    def __call__(self, job: Job) -> Script:
        script, answer = stub(job), None
        while True:
            event = script.send(answer)
            self.count += 1
            if self.count == self.lost_at:
                yield Lost("it was lost", is_charged=True)
                return
            answer = yield event
            if isinstance(event, End):
                return


def finished(job: Job, accuracy: float) -> Finished:
    """Return a result of that accuracy, with weights that the job's network can load."""
    files = {
        "weights.safetensors": _weights(job.config.model, job.config.trainer.seed),
        "predictions.safetensors": predictions(accuracy),
    }
    metrics = {"val_accuracy": accuracy, "test_accuracy": accuracy}
    return Finished(metrics, files, {}, {"train": "0" * 64})


_KNOWN: dict[str, bytes] = {}  # weights, of which one study after the other has the same


def _weights(model: ModelConfig, seed: int) -> bytes:
    key = f"{seed} {model}"
    if key not in _KNOWN:
        torch.manual_seed(seed)
        _KNOWN[key] = safetensors.torch.save(build_network(model).state_dict())
    return _KNOWN[key]


class ScriptedWorkers(Workers):
    """Runs scripts; `write` gives the script of a job. A cancelled job is Stopped."""

    def __init__(self, write: Callable[[Job], Script], count: int = 1) -> None:
        self.write, self.count = write, count
        self.scripts: dict[int, Script] = {}
        self.answers: dict[int, Decision | None] = {}  # of workers whose script may go on
        self.cancelled: set[int] = set()
        self.submitted: list[Job] = []
        self.ready: list[tuple[int, Event]] = []

    def _start(self) -> None:
        self.ready = [(worker, Ready({})) for worker in range(self.count)]

    def idle(self) -> list[int]:
        waiting = {worker for worker, _ in self.ready}
        return [n for n in range(self.count) if n not in self.scripts and n not in waiting]

    def submit(self, worker: int, job: Job) -> None:
        assert worker not in self.scripts
        self.submitted.append(job)
        self.scripts[worker] = self.write(job)
        self.answers[worker] = None

    def answer(self, worker: int, decision: Decision) -> None:
        self.answers[worker] = decision

    def events(self, timeout_s: float) -> list[tuple[int, Event]]:
        found, self.ready = self.ready, []
        for worker in list(self.answers):
            if worker in self.cancelled:
                self.cancelled.discard(worker)
                event: Event = Stopped()
            else:
                answer = self.answers.pop(worker)
                script = self.scripts[worker]
                event = next(script) if answer is None else script.send(answer)
            if isinstance(event, End | Refused):
                self.scripts.pop(worker)
                self.answers.pop(worker, None)
            elif not isinstance(event, Rung):  # which waits for its answer
                self.answers[worker] = None
            found.append((worker, event))
        return found

    def cancel(self, worker: int) -> None:
        self.cancelled.add(worker)
        self.answers.setdefault(worker, None)

    def close(self) -> None:
        self.scripts.clear()
