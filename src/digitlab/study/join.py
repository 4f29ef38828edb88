"""`digitlab worker STUDY`: take trials of a study that many machines share, until none are left."""

import gc
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError, first_line, nearest
from digitlab.config.recorded import config_from_yaml, config_to_yaml
from digitlab.config.types import Config
from digitlab.data.datasets import TRAIN, load_digits
from digitlab.records.mlflow import Tracking, open_tracking
from digitlab.study.audit import reconcile_trial
from digitlab.study.fingerprint import guard
from digitlab.study.run import Broken
from digitlab.study.storage import (
    PATIENCE,
    STORE_ERRORS,
    open_storage,
    patiently,
    study_names,
    turn,
)
from digitlab.study.trials import Search
from digitlab.study.workers.processes import Job, Setup
from digitlab.study.workers.worker import Work

_LOOK = (2.0, 4.0)  # s between two looks for a trial that was put back; at random, not all at once
_DELIVER = 30.0  # s between two tries to hand over what was kept while the tracker was away
_NOTE = "joining"  # what the study notes for those who join


def invite(search: Search, config: Config, overrides: tuple[str, ...], total: int) -> None:
    """Note what workers from elsewhere need to know, at every call of the study."""
    invitation = {"config": config_to_yaml(config), "overrides": list(overrides), "total": total}
    search.note(_NOTE, invitation)


def join(study: str, address: str | None, lab: Path, stopped: Callable[[], bool]) -> int:
    """Take trials until none are left, or `stopped` says so; returns how many.

    Raises:
        UserError: there is no such study, or this machine has other code or data than it.
    """
    return _take_trials(_admitted(study, address, lab, stopped), stopped)


def _take_trials(work: Work, stopped: Callable[[], bool]) -> int:
    try:
        return _until_none_is_left(work, stopped)
    except (Broken, *STORE_ERRORS) as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"{work.config.study.name}: storage or lab cannot be used ({reason}): mend that and "
            "start the worker again; its trial is put back"
        ) from error


def _until_none_is_left(work: Work, stopped: Callable[[], bool]) -> int:
    search, tracking = work.search, work.tracking
    count, delivered = 0, time.monotonic()
    while not stopped():
        number = search.claim(int(search.notes()[_NOTE]["total"]))
        if number is not None:
            done = work.run(Job("trial", number))
            count += done.state not in ("waiting", "interrupted")
            gc.collect()  # Lightning's objects hold one another
        elif all(row.ended for row in search.rows()):
            break
        else:
            reap(search, tracking)
            time.sleep(random.uniform(*_LOOK))  # noqa: S311
        if tracking.kept_back() and time.monotonic() - delivered > _DELIVER:
            tracking.deliver()
            delivered = time.monotonic()
    _deliver_all(tracking, stopped)
    return count


def _admitted(study: str, address: str | None, lab: Path, stopped: Callable[[], bool]) -> Work:
    """A worker whose code and data are those that the study was begun with."""
    storage = open_storage(lab, address, PATIENCE)
    known = patiently(lambda: study_names(storage), PATIENCE)
    if study not in known:
        raise UserError(f"{study}: no such study in the storage, {nearest(study, known)}")
    number = storage.get_study_id_from_name(study)
    notes = patiently(lambda: storage.get_study_user_attrs(number), PATIENCE)
    if _NOTE not in notes:
        raise UserError(
            f"{study}: it takes no workers from elsewhere: begin it with `digitlab sweep "
            "study.storage=postgresql+psycopg://...`"
        )
    config = config_from_yaml(notes[_NOTE]["config"])
    search = patiently(lambda: Search(storage, config), PATIENCE)
    if search.engine is None:
        raise UserError(
            f"{study}: sqlite is not shared between workers that nobody leads: give --storage "
            "postgresql+psycopg://..., or let `digitlab sweep` start the workers"
        )
    sums = load_digits(lab, config.data.name, TRAIN, config.data.allow_unknown).sha256
    try:
        guard(search, config, sums)
    except UserError as error:
        raise UserError(f"{socket.gethostname()} is refused as a worker: {error}") from error
    tracking = open_tracking(config, lab, PATIENCE)
    setup = Setup(
        config, tuple(notes[_NOTE]["overrides"]), lab, notes.get("run_id"), describe_environment()
    )
    return Work(_Alone(stopped), setup, search, tracking)


def _deliver_all(tracking: Tracking, stopped: Callable[[], bool]) -> None:
    """Do not leave with records that only this machine has."""
    deadline = time.monotonic() + PATIENCE
    while tracking.kept_back() > tracking.deliver() and time.monotonic() < deadline:
        if stopped():
            return
        time.sleep(random.uniform(5, 10))  # noqa: S311  s


class _Alone:
    """The connection of a worker that has no parent."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.poll = stopped

    def send(self, told: Any, /) -> None: ...


def reap(search: Search, tracking: Tracking) -> list[str]:
    """Put back the trials whose workers were lost, one process at a time; what was done."""
    if search.engine is None or not search.lost():
        return []
    told: list[str] = []
    try:
        with turn(search.engine, f"digitlab/{search.config.name}/reap") as mine:
            lost = search.lost() if mine else set()  # once more: another may have been faster
            for row in search.rows() if lost else []:
                if row.number in lost and row.state == "running":
                    state = reconcile_trial(search, tracking, row, "its worker was lost")
                    told.append(f"trial {row.number}: its worker was lost; {state}")
    except (UserError, *STORE_ERRORS) as error:  # tracker or storage away: at the next look
        told.append(f"trials of lost workers: {first_line(error.__cause__ or error)}")
    return told


def worker(study: str, address: str | None, lab: Path) -> int:
    """As `join` until a signal says to stop, and tell a person; returns the exit status."""
    stopping = threading.Event()
    who = f"worker {os.getpid()} on {socket.gethostname()}"
    print(f"{who}: joins {study}", flush=True)
    # Until it has joined it holds nothing: a signal ends it at once, a server's absence or not.
    work = _admitted(study, address, lab, stopping.is_set)

    def stop(*_: Any) -> None:
        """Once: end what runs at its next batch. Twice: at once."""
        if stopping.is_set():
            os._exit(130)
        stopping.set()

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Slurm and Kubernetes send TERM
        signal.signal(name, stop)
    count = _take_trials(work, stopping.is_set)
    print(f"{who}: {count} trials of {study}", flush=True)
    return 130 if stopping.is_set() else 0
