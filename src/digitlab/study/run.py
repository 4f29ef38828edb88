"""One run outside a study: trained in this process, recorded, shown on the terminal."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from digitlab.base.console import print_table
from digitlab.base.environment import describe_environment
from digitlab.base.stop import StopSignal
from digitlab.config.compose import Composed
from digitlab.config.types import Config
from digitlab.data.datamodule import DigitsData
from digitlab.records.record import Identity, Records, RunRecorder, open_records
from digitlab.records.tracker import Tracker, TrackerAway
from digitlab.study.layers import layers_table
from digitlab.study.loop import Ending, JobLoop, Task
from digitlab.training.device import find_device
from digitlab.training.observer import TrainingObserver
from digitlab.workers.base import Job, WorkerSetup
from digitlab.workers.inline import InlineWorkers

_LONGEST_NAME = 100  # characters of a run's name
_MARKS = r"[\[\]'\"\s]"  # of Hydra's grammar, without which a value is still clear
# Groups of overrides that do not describe the run itself; its name starts with its recipe.
_NOT_OF_A_RUN = ("experiments", "study", "tracking", "launcher", "--config-dir")


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `metrics` are the last of each name."""

    state: str  # finished, interrupted or failed
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    run_id: str | None = None  # None where nothing is recorded, or the tracker is away
    epochs: int = 0  # that were trained and validated

    @property
    def exit_status(self) -> int:
        return {"finished": 0, "interrupted": 130}.get(self.state, 1)


def run_once(
    config: Config,
    identity: Identity,
    records: Records,
    lab: Path,
    observers: Sequence[TrainingObserver] = (),
) -> Outcome:
    """Train `config` in this process, record it, and print a line an epoch.

    Raises UserError, and records nothing, where the device or the data are missing, or the data are
    not what it asks for.
    """
    find_device(config.trainer.device)
    DigitsData(config, lab).setup("fit")
    recorder = RunRecorder(records.outbox, config, identity)

    def show(epoch: int, metrics: Mapping[str, float]) -> None:
        shown = (f"{k} {v:.4f}" for k, v in sorted(metrics.items()) if k != "images_per_second")
        print(f"epoch {epoch}/{config.trainer.epochs}  " + "  ".join(shown), flush=True)

    def say(facts: Mapping[str, float]) -> None:
        if step := facts.get("resumed_at_step"):
            print(f"goes on at step {step:.0f}, from a checkpoint of the same training", flush=True)

    # A reproduction shows that all of a training gives the same once more.
    is_new = identity.kind == "reproduction"
    job = Job(config, checkpoint=None if is_new else recorder.checkpoints.latest())
    task = Task(identity.name, job, recorder, on_start=say, on_epoch=show)
    setup = WorkerSetup(lab, config.data)
    with StopSignal() as stop, InlineWorkers(setup, observers) as workers:
        ending = run_task(JobLoop(workers, stop), task)
    records.outbox.flush_run(recorder.spool)
    reason, trained = ending.reason, len(task.curve)
    if ending.state == "interrupted" and not is_new and recorder.checkpoints.latest():
        reason += "; the same command goes on from there"
    return Outcome(ending.state, reason, task.metrics, recorder.run_id(), trained)


def run_task(loop: JobLoop, task: Task) -> Ending:
    """Run one task that belongs to no study to its end, and end its record."""
    tasks, endings = [task], []

    def ended(_: Task, ending: Ending) -> None:
        endings.append(ending)
        if ending.state != "finished":
            task.recorder.end(ending.state, ending.reason)

    try:
        loop.run(lambda: tasks.pop() if tasks else None, ended)
    except BaseException:
        with suppress(OSError):  # a full disk: the next process ends the run
            task.recorder.end("interrupted")
        raise
    if not endings:  # it was stopped before a worker took it
        ended(task, Ending("interrupted", "it was stopped"))
    return endings[0]


# Receives a run that finished, with where it is recorded.
Conclude = Callable[[Records, Config, Outcome], None]


def train(
    composed: Composed,
    lab: Path,
    tags: Mapping[str, str] = {},
    conclude: Conclude = lambda _records, _config, _outcome: None,
    observers: Sequence[TrainingObserver] = (),
) -> Outcome:
    """Train one configuration and record it, with tags beside, watched by `observers`, too."""
    config = composed.config
    tags = {**tags, "digitlab.recipe": config.study.name}
    with open_records(config, lab) as records:
        for line in records.outbox.adopt():
            print(line)
        name = name_of(composed, records.tracker)
        identity = Identity(name, "train", tags, None, composed.overrides, describe_environment())
        outcome = run_once(config, identity, records, lab, observers)
        run = f"run {outcome.run_id} ({name})" if outcome.run_id else f"run {name}"
        if pending := records.outbox.pending_text():
            print(pending)
        if outcome.state != "finished":
            print(f"{run} {outcome.state}: {outcome.reason}")
            return outcome
        print_table(layers_table(config.model))
        kind = "test" if "test_accuracy" in outcome.metrics else "val"
        accuracy = outcome.metrics[f"{kind}_accuracy"]
        best = outcome.metrics.get("best_epoch")
        kept = f" (epoch {best:.0f}, the best of {outcome.epochs})" if best else ""
        if outcome.epochs and outcome.epochs < config.trainer.epochs:
            patience = config.trainer.early_stopping
            print(f"stopped early: no better epoch in {patience} (trainer.early_stopping)")
        print(f"{run}: {kind}_accuracy {accuracy:.2%}{kept} in {outcome.metrics['seconds']:.1f} s")
        if outcome.run_id and not pending:
            with suppress(TrackerAway):  # the run is recorded all the same
                conclude(records, config, outcome)
    return outcome


def name_of(composed: Composed, tracker: Tracker) -> str:
    """Return a run's name: the one that was given, else its recipe with what was changed.

    A name that the tracker has already is numbered: `seed epochs=5 #2`.
    """
    changes: dict[str, str] = {}
    for text in composed.overrides:
        key, equals, value = text.partition("=")
        if key.split(".")[0] not in _NOT_OF_A_RUN:
            changes[key] = f"{key.rpartition('.')[2]}{equals}{re.sub(_MARKS, '', value)}"
    name = composed.name or " ".join([composed.config.study.name, *changes.values()])
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
    pattern = re.compile(rf"{re.escape(name)}(?: #(\d+))?")
    same = {"digitlab.kind": "train"}
    same |= {} if composed.name else {"digitlab.recipe": composed.config.study.name}
    found = (pattern.fullmatch(row.name) for row in tracker.find(same))
    numbers = [int(match[1] or 1) for match in found if match]
    return f"{name} #{max(numbers) + 1}" if numbers else name
