"""The driver's loop, with scripted workers in place of training."""

from collections.abc import Mapping
from typing import Any

import pytest
from scripted import Script, ScriptedWorkers, succeed

from digitlab.base.stop import StopSignal
from digitlab.config.compose import compose
from digitlab.study.loop import Ending, JobLoop, Task
from digitlab.workers.base import Epoch, Failed, Job, Lost, Progress, Refused, Rung, Started


class Recorder:
    """Notes what is recorded, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def started(self, facts: Mapping[str, float]) -> None:
        self.calls.append(("started", dict(facts)))

    def rung(self, rung: float, accuracy: float) -> None:
        self.calls.append(("rung", rung, accuracy))

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(("epoch", epoch, dict(metrics)))

    def finish(self, metrics, files, environment, data_sha256) -> None:
        self.calls.append(("finish", sorted(files)))


@pytest.fixture(scope="module")
def config():
    return compose("train", ["experiments=smoke", "data=sample"])[0].config


def run(
    scripts: list[Script], config, stop: StopSignal | None = None, **task: Any
) -> tuple[list[tuple[Task, Ending]], ScriptedWorkers]:
    left = list(scripts)
    endings: list[tuple[Task, Ending]] = []
    waiting = [
        Task(f"task {n}", Job(config, (0.2, 0.5)), Recorder(), **task)  # type: ignore[arg-type]
        for n in range(len(scripts))
    ]
    with ScriptedWorkers(lambda _: left.pop(0)) as workers:
        loop = JobLoop(workers, stop or StopSignal())
        loop.run(
            lambda: waiting.pop(0) if waiting else None,
            lambda task, end: endings.append((task, end)),
        )
    return endings, workers


def test_events_of_a_job_are_recorded_in_order(config) -> None:
    def script() -> Script:
        yield Started({"model_parameters": 5.0})
        yield Progress(0.1)
        yield Rung(0, 0.5)
        yield Epoch(1, {"val_accuracy": 0.6, "train_loss": 0.1})
        yield from succeed(0.7)

    [(task, ending)], _ = run([script()], config)
    names = [call[0] for call in task.recorder.calls]
    assert names == ["started", "rung", "epoch", "started", "finish"]
    assert task.recorder.calls[1] == ("rung", 0.2, 0.5)
    assert ending == Ending("finished")
    assert task.curve == [0.6]
    assert task.metrics["val_accuracy"] == 0.7
    assert task.metrics["rung_accuracy"] == 0.5
    assert task.metrics["seconds"] > 0


def test_a_rung_is_answered_by_the_pruner_and_ends_the_task_as_pruned(config) -> None:
    asked = []

    def should_prune(index: int, accuracy: float) -> bool:
        asked.append((index, accuracy))
        return index == 1

    [(_, ending)], _ = run([succeed(0.9, (0.1, 0.2))], config, should_prune=should_prune)
    assert asked == [(0, 0.1), (1, 0.2)]
    assert ending.state == "pruned"
    assert not ending.is_charged
    assert ending.is_final


@pytest.mark.parametrize(
    ("event", "state", "is_charged", "is_final"),
    [
        (Failed("Diverged: nan", is_deterministic=True), "failed", True, True),
        (Failed("RuntimeError: x", is_deterministic=False), "failed", True, False),
        (Lost("killed by SIGKILL", is_charged=True), "interrupted", True, False),
        (Lost("its node was lost", is_charged=False), "interrupted", False, False),
        (Refused("its test images are missing"), "interrupted", False, False),
    ],
)
def test_what_counts_as_a_failed_attempt(config, event, state, is_charged, is_final) -> None:
    def script() -> Script:
        yield event

    [(_, ending)], _ = run([script()], config)
    assert (ending.state, ending.is_charged, ending.is_final) == (state, is_charged, is_final)


def test_a_stop_cancels_what_runs_once_and_charges_nothing(config) -> None:
    stop = StopSignal()

    def script() -> Script:
        yield Started({})
        stop.count = 1
        while True:
            yield Progress(0.5)

    endings, workers = run([script(), succeed()], config, stop)
    assert [ending.state for _, ending in endings] == ["interrupted"]
    assert not endings[0][1].is_charged
    assert len(workers.submitted) == 1  # nothing more was started


def test_a_worker_that_cannot_serve_is_reported_and_the_others_go_on(config) -> None:
    reasons: list[str] = []

    class WithStranger(ScriptedWorkers):
        def _start(self) -> None:
            super()._start()
            self.ready.append((1, Refused("its source code is another")))

    task = Task("task", Job(config), Recorder())  # type: ignore[arg-type]
    waiting, ended = [task], []
    with WithStranger(lambda _: succeed()) as workers:
        loop = JobLoop(workers, StopSignal(), refused=reasons.append)
        loop.run(lambda: waiting.pop() if waiting else None, lambda _, end: ended.append(end))
    assert reasons == ["its source code is another"]
    assert ended == [Ending("finished")]


def test_a_task_that_takes_too_long_has_failed_for_good(config) -> None:
    def script() -> Script:
        while True:
            yield Progress(0.5)

    [(_, ending)], _ = run([script()], config, time_limit_s=1e-9)
    assert (ending.state, ending.is_charged, ending.is_final) == ("failed", False, True)
    assert "study.trial_minutes" in ending.reason
