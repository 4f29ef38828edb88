"""A study of three trials, killed at its n-th fault point for each n, and resumed.

Nothing is trained: a job's result follows from its configuration. Optuna's storage, the outbox,
MLflow, the driver and the audit are the real ones. Each study runs in a fork of this process, which
has imported everything. What the thread that sends records does between two points of the driver
depends on time; here the driver waits for it at the points that a `Course` names, and nothing is
sent between them, so that the n-th point is the same at each repetition.
"""

import hashlib
import os
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import alembic.util
import pytest
import torch
from conftest import DATA
from leading import lead
from plain import PlainTracker
from scripted import Script, stub

from digitlab.base import faults
from digitlab.base.usage import MACHINE_METRICS
from digitlab.config import compose as composing
from digitlab.config.compose import compose
from digitlab.config.recorded import config_from_yaml
from digitlab.records import delivery, reader, record
from digitlab.records.outbox import Outbox
from digitlab.records.record import Records, open_records
from digitlab.records.tracker import RunRow
from digitlab.results import publish, report
from digitlab.results.audit import find_damage, find_problems
from digitlab.study import fingerprint, session, space, trials
from digitlab.study.trials import load_study
from digitlab.workers.base import Job

TRIALS = 3
KILLED = -signal.SIGKILL
COUNTED = ("finished", "pruned")  # states of a run that holds a result
OURS = ("log.txt",)  # what the harness writes in a lab
# What two studies of the same settings never share.
PRIVATE = {*MACHINE_METRICS, "digitlab.seal", "digitlab.study_id", "digitlab.record"}

STUDY = (f"study.trials={TRIALS}", "study.confirm=2", "study.confirm_fits=2", "study.final_seeds=1")
STUDY += ("study.measure_seeds=0",)
# With two workers a trial may be drawn before an earlier one has ended, or after it: only values
# that are drawn at random, and not pruned by the others, are the same either way.
VALUES = {1: ("study.pruner=halving",), 2: ("study.pruner=none", "study.sampler=random")}


@dataclass(frozen=True)
class Course:
    """How a study runs: by how many workers, and when its records are sent to which tracker."""

    workers: int = 1
    sent: str = "late"  # by name in SENT
    tracker: str = "plain"  # or mlflow

    @property
    def overrides(self) -> tuple[str, ...]:
        return *STUDY, *VALUES[self.workers], f"study.workers={self.workers}"


# The points at which the driver waits until the tracker has everything: all of them, so that each
# operation is sent alone; those where a record is whole; only where the driver waits by itself.
SENT = {"at-once": ("outbox.appended",), "sealed": ("outbox.sealed",), "late": ()}


def new_lab(lab: Path) -> Path:
    """Make a lab with the sample of digits and no study."""
    (lab / "data").mkdir(parents=True)
    (lab / "data" / "sample").symlink_to(DATA)
    return lab


@dataclass
class Clock:
    """Counts the fault points of a process; kills it at one, or keeps what a kill would leave."""

    course: Course
    kill_at: int = 0  # 0 is never
    states: Path | None = None  # where a copy of the lab is kept, if it differs from the last one
    lab: Path = Path()
    write: Callable[[Job], Script] = stub  # what a worker reports of a job
    count: int = 0
    digest: str = ""
    outbox: Outbox | None = None
    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, name: str) -> None:
        with self.lock:
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.states is not None:
                self._keep(self.states / f"{self.count:04d}")
        is_driver = "_send_until_closed" not in threading.current_thread().name
        # The study's own run is waited for anyway, and the rest of it sent in the meantime.
        is_first = name == "trial.drawn"
        if is_driver and self.outbox is not None and (name in SENT[self.course.sent] or is_first):
            self.outbox.flush(60)

    def opened(self, outbox: Outbox) -> None:
        self.outbox = outbox

    def _keep(self, state: Path) -> None:
        digest = digest_of(self.lab)
        if digest != self.digest:
            self.digest = digest
            shutil.copytree(self.lab, state, symlinks=True)


def digest_of(lab: Path) -> str:
    """Return a digest of all that a lab holds, but for what the harness writes."""
    found = hashlib.sha256()
    for path in sorted(lab.rglob("*")):
        found.update(f"{path.relative_to(lab)}\0".encode())
        if path.is_file() and path.name not in OURS:
            found.update(path.read_bytes())
    return found.hexdigest()


def run_study(clock: Clock, then: Callable[[], None] = lambda: None) -> int:
    """Run a study in a fork of this process, or go on with it; return the exit status.

    Args:
        then: called after a study that has ended well.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        with open(clock.lab / "log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        with stubs(clock):
            status = lead(
                clock.lab, clock.write, *clock.course.overrides,
                count=clock.course.workers, publish=publish.publish,
            )[0]  # fmt: skip
            faults.hook = None
            if status == 0:
                status = 1
                then()
                status = 0
    except BaseException:  # noqa: BLE001  it ends with this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


@cache
def _composed(command: str, overrides: tuple[str, ...], multirun: bool) -> list[composing.Composed]:
    return compose(command, overrides, multirun)


def _compose(
    command: str, overrides: Sequence[str], multirun: bool = False
) -> list[composing.Composed]:
    return _composed(command, tuple(overrides), multirun)


_load_migration = cache(alembic.util.load_python_file)
_read_config = cache(config_from_yaml)
_version = cache(fingerprint.version)
_parse = cache(space._parse)


@contextmanager
def stubs(clock: Clock) -> Iterator[pytest.MonkeyPatch]:
    """Install the clock; the model that MLflow serves and the report, which take seconds, go."""

    def open_box(*given: Any) -> Records:
        records = open_records(*given)
        clock.opened(records.outbox)
        return records

    def save_servable(_network: Any, _example: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "MLmodel").write_text("stub")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "save_servable", save_servable)
        patch.setattr(report, "report", lambda *_: "<html>")
        patch.setattr(session, "open_records", open_box)
        patch.setattr(delivery, "_GATHER_S", 1e6)
        patch.setattr(faults, "hook", clock)
        # What takes most of the time of so small a study, and is the same each time.
        patch.setattr(composing, "compose", _compose)
        patch.setattr(alembic.util, "load_python_file", _load_migration)
        patch.setattr(fingerprint, "version", _version)
        patch.setattr(space, "_parse", _parse)
        for room in (reader, trials):
            patch.setattr(room, "config_from_yaml", _read_config)
        if clock.course.tracker == "plain":
            patch.setattr(record, "open_tracker", lambda _, lab: PlainTracker(lab))
        yield patch


# What a study comes to

Facts = dict[str, Any]


def facts(lab: Path, is_won: bool = True) -> Facts:
    """Return what a finished study holds, but for what no two studies share.

    Fails where its books are not whole: a trial without its run, a run that is left open or
    damaged, a record that waits in the outbox.

    Args:
        is_won: whether it has a champion, which needs a trial that finished.
    """
    store, config = load_study(lab, "smoke")
    with open_records(config, lab) as records:
        tracker = records.tracker
        runs = tracker.find({"digitlab.study_id": store.study_id})
        assert find_problems(config, store.rows(), runs) == []
        assert find_damage(tracker, runs) == []
        assert records.outbox.leftovers() == 0
        counted = [run for run in runs if run.tags["digitlab.state"] in COUNTED]
        current = [run for run in counted if "digitlab.superseded_by" not in run.tags]
        held = {_title(run): _content(run, tracker.history(run.run_id)) for run in current}
        # No run twice, whatever became of earlier attempts.
        assert max(Counter(map(_title, current)).values(), default=1) == 1
        others = Counter(run.tags["digitlab.state"] for run in runs if run not in counted)
        assert set(others) <= {"interrupted", "failed"}
    notes = store.notes()
    found = {
        "trials": [(row.number, row.state, row.value, row.values) for row in store.rows()],
        **{"/".join(title): content for title, content in held.items()},
        "failed": others["failed"],
        "outbox": sorted(path.name for path in (lab / "outbox").iterdir()),
    }
    if not is_won:
        return found
    return found | {
        "champion": {k: v for k, v in notes["champion"].items() if k != "run_id"},
        "published": notes["published"],
        "looks": [look["fits"] for look in notes["tested"]],
    }


def _title(run: RunRow) -> tuple[str, ...]:
    return tuple(run.tags.get(f"digitlab.{name}", "") for name in ("kind", "trial", "seed"))


def _content(run: RunRow, history: list[tuple[str, int, float]]) -> Mapping[str, Any]:
    # A publication that was broken off is repeated, and logs the study's figures again.
    metrics = sorted({point for point in history if point[0] not in PRIVATE})
    tags = {key: run.tags.get(f"digitlab.{key}") for key in ("state", "weights_sha256")}
    return {"name": run.name, "params": run.params, "metrics": metrics, "tags": tags}


def resume(lab: Path, course: Course, reference: Facts) -> str:
    """Go on with a study that was killed, to its end; return what is wrong then."""

    status = run_study(Clock(course, lab=lab), lambda: compare(facts(lab), reference))
    log = (lab / "log.txt").read_text()
    return log[-2000:] if status or "Traceback" in log else ""


def compare(found: Facts, reference: Facts) -> None:
    assert found.keys() == reference.keys(), set(found) ^ set(reference)
    for key, value in reference.items():
        if isinstance(value, dict):
            compare(found[key], value)
        else:
            assert found[key] == value, f"{key}: {found[key]} is not {value}"


def undisturbed(course: Course, lab: Path) -> tuple[Facts, int]:
    """Return what a study comes to that nobody kills, and how many points its driver passes.

    It is run in this process, which then knows all that the forks of it need.
    """
    clock = Clock(course, lab=new_lab(lab))
    torch.set_num_threads(1)  # its others would not live in a fork, which would wait for them
    with stubs(clock):
        assert (
            lead(lab, stub, *course.overrides, count=course.workers, publish=publish.publish)[0]
            == 0
        )
        count = clock.count
        return facts(lab), count


def states_of(clock: Clock) -> list[Path]:
    """Run a study, or go on with it; return the labs that a kill at each of its points leaves.

    They are named after the points; of equal ones the first is kept.
    """
    assert clock.states is not None
    clock.states.mkdir(parents=True)
    assert run_study(clock) == 0, (clock.lab / "log.txt").read_text()[-2000:]
    return sorted(clock.states.iterdir())
