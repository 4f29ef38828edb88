"""Makes workers die at chosen moments: preloaded where they are forked from, idle without orders.

A worker whose lab holds `killer.json`, {"probability": p, "left": n}, kills itself with
probability p before and after each step of a trial's life, as long as the file
`killed` beside it has fewer than n lines; each line names the step. "only" names the kind of run
and the step at which alone it does. "hang" and "raise" list numbers of trials that do so. Every
opening of a test file is noted in `opened`, with the kind of run that did it.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digitlab.study.workers.worker
from digitlab.records.mlflow import _MlflowRecord
from digitlab.study.trials import Search
from digitlab.study.workers.processes import Setup

_orders: dict[str, Any] = {}


def _maybe_die(step: str) -> None:
    if random.random() >= _orders.get("probability", 0):
        return
    if "only" in _orders and [*_kind, step] != _orders["only"]:
        return
    killed: Path = _orders["lab"] / "killed"
    lines = killed.read_text().splitlines() if killed.exists() else []
    if len(lines) < _orders["left"]:
        with open(killed, "a") as file:
            file.write(step + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


def _deadly(owner: Any, name: str, step: Callable[..., str]) -> None:
    whole = getattr(owner, name)

    def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
        what = step(*arguments)
        _maybe_die(f"before {what}")
        result = whole(self, *arguments, **named)
        _maybe_die(f"after {what}")
        return result

    setattr(owner, name, wrapped)


def _misbehave(self: Any, done: float) -> None:
    """In a trial's first batch: hang or raise, if the trial was chosen for it."""
    number = self.trial.number
    if number in _orders.get("hang", []):
        time.sleep(3600)
    if number in _orders.get("raise", []):
        raise RuntimeError("the trial was told to raise")
    _batch(self, done)


_batch = digitlab.study.workers.worker._TrialWatch.batch
digitlab.study.workers.worker._TrialWatch.batch = _misbehave

_deadly(Search, "ask", lambda *_: "ask")
_deadly(Search, "tell", lambda *_: "tell")
_deadly(Search, "report", lambda *_: "report")
_deadly(Search, "put_back", lambda *_: "put back")
_deadly(_MlflowRecord, "_deliver", lambda operation: operation["do"])
_deadly(digitlab.study.workers.worker._Told, "batch", lambda *_: "batch")

_work = digitlab.study.workers.worker.work


def _work_under_orders(connection: Any, setup: Setup) -> None:
    _lab.append(setup.lab)
    orders = setup.lab / "killer.json"
    if orders.exists():
        random.seed(os.getpid())
        _orders.update(json.loads(orders.read_text()), lab=setup.lab)
    _work(connection, setup)


digitlab.study.workers.worker.work = _work_under_orders

_lab: list[Path] = []
_kind: list[str] = []
_run = digitlab.study.workers.worker.Work.run


def _run_noted(self: Any, job: Any) -> Any:
    _kind[:] = [job.kind]
    return _run(self, job)


def _note_test_files(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and "t10k" in str(arguments[0]) and _lab:
        with open(_lab[0] / "opened", "a") as file:
            file.write(f"{_kind[0]} {Path(str(arguments[0])).name}\n")


digitlab.study.workers.worker.Work.run = _run_noted
sys.addaudithook(_note_test_files)
