"""Lead whole studies in this process, by workers that follow scripts."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from conftest import TINY
from scripted import Script, ScriptedWorkers, succeed

from digitlab.base import faults
from digitlab.base.console import Board
from digitlab.base.stop import StopSignal
from digitlab.config.compose import Composed, compose
from digitlab.study.driver import Publish, StudyDriver
from digitlab.study.goal import TrialRow
from digitlab.study.session import open_session
from digitlab.workers.base import Job


def kind_of(job: Job) -> str:
    """Return trial, confirm, measure or final: what a study trains the job for."""
    if job.config.data.evaluate_on == "test":
        return "final"
    seed = job.config.trainer.seed
    return "measure" if seed > 2000 else "confirm" if seed else "trial"


def train_well(job: Job) -> Script:
    """A job that finishes; wider is better, and all rungs are passed."""
    accuracy = job.config.model.hidden / 100
    return succeed(accuracy, tuple(accuracy for _ in job.rungs))


@cache
def compose_tiny(overrides: tuple[str, ...]) -> Composed:
    return compose("sweep", [*TINY, *overrides])[0]


def lead(
    lab: Path,
    write: Callable[[Job], Script],
    *overrides: str,
    count: int = 1,
    stop: StopSignal | None = None,
    publish: Publish = lambda _session, _summary: {},
    given: Sequence[TrialRow] = (),
) -> tuple[int, list[Job]]:
    """Run a study, or go on with it; return the exit status and the jobs that were submitted."""
    composed = compose_tiny(overrides)
    stop = stop or StopSignal()
    with Board() as board, open_session(composed, lab, board, stop) as session:
        workers = ScriptedWorkers(write, count)
        status = StudyDriver(session, workers, publish, None, given).run()
    return status, workers.submitted


def lead_until_killed(
    lab: Path, write: Callable[[Job], Script], *overrides: str, point: str, when: str = "trial"
) -> None:
    """Run a study in a process of its own that dies at a point of a job's end.

    Args:
        when: trial, confirm or final; the kind of the first job after whose script the point
            counts.
    """
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        return
    try:
        armed = []

        def hook(name: str) -> None:
            if armed and name == point:
                os._exit(9)

        def arm(job: Job) -> Script:
            if kind_of(job) == when:
                armed.append(job)
            return write(job)

        faults.hook = hook
        lead(lab, arm, *overrides)
    finally:
        os._exit(1)
