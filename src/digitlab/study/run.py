"""One run outside a study: trained in this process, recorded, shown on the terminal."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from digitlab.base.environment import describe_environment
from digitlab.base.stop import StopSignal
from digitlab.config.compose import Composed
from digitlab.config.types import Config
from digitlab.data.datamodule import DigitsData
from digitlab.records.record import Identity, Records, RunRecorder, open_records
from digitlab.study.loop import Ending, JobLoop, Task
from digitlab.workers.base import Job, WorkerSetup
from digitlab.workers.inline import InlineWorkers

_DELIVERY_S = 30.0  # to wait at the end for a tracker that is slow or away


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `metrics` are the last of each name."""

    state: str  # finished, interrupted or failed
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    run_id: str | None = None  # None where nothing is recorded, or the tracker is away


def run_once(config: Config, identity: Identity, records: Records, lab: Path) -> Outcome:
    """Train `config` in this process, record it, and print a line an epoch.

    Raises UserError, and records nothing, where the data are missing, or not what it asks for.
    """
    DigitsData(config, lab).setup("fit")
    recorder = RunRecorder(records.outbox, config, identity)
    endings: list[Ending] = []

    def ended(_: Task, ending: Ending) -> None:
        endings.append(ending)
        if ending.state != "finished":
            recorder.end(ending.state, ending.reason)

    def show(epoch: int, metrics: Mapping[str, float]) -> None:
        shown = (f"{k} {v:.4f}" for k, v in sorted(metrics.items()) if k != "images_per_second")
        print(f"epoch {epoch}/{config.trainer.epochs}  " + "  ".join(shown), flush=True)

    task = Task(identity.name, Job(config), recorder, on_epoch=show)
    tasks = [task]
    try:
        with StopSignal() as stop, InlineWorkers(WorkerSetup(lab, config.data)) as workers:
            JobLoop(workers, stop).run(lambda: tasks.pop() if tasks else None, ended)
    except BaseException:
        with suppress(OSError):  # a full disk: the next process ends the run
            recorder.end("interrupted")
        raise
    records.outbox.flush(_DELIVERY_S)
    records.outbox.check()
    ending = endings[0] if endings else Ending("interrupted")
    return Outcome(ending.state, ending.reason, task.metrics, recorder.run_id())


def train(composed: Composed, lab: Path, tags: Mapping[str, str] | None = None) -> int:
    """Train one configuration and record it, with tags beside; return the exit status."""
    config = composed.config
    name = f"{config.study.name}-seed-{config.trainer.seed}"
    identity = Identity(name, "train", tags or {}, None, composed.overrides, describe_environment())
    with open_records(config, lab) as records:
        for line in records.outbox.adopt():
            print(line)
        outcome = run_once(config, identity, records, lab)
        pending = records.outbox.pending()
    run = f"run {outcome.run_id} ({name})" if outcome.run_id else f"run {name}"
    if pending:
        print(f"{pending} records wait in {lab / 'outbox'} until the tracker answers again")
    if outcome.state != "finished":
        print(f"{run} {outcome.state}: {outcome.reason}")
        return 130 if outcome.state == "interrupted" else 1
    kind = "test" if "test_accuracy" in outcome.metrics else "val"
    accuracy = outcome.metrics[f"{kind}_accuracy"]
    print(f"{run}: {kind}_accuracy {accuracy:.2%} in {outcome.metrics['seconds']:.1f} s")
    return 0
