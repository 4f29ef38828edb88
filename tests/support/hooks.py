"""What tests make a process do at its fault points: orders stand in `faults.json` where it works.

Preloaded where workers are forked from, or named by DIGITLAB_FAULTS. A process that works in the
folder of a lab without orders does nothing. Jobs are numbered from 1 over all workers of a lab.

    {"kill": {"probability": {role: p}, "left": n, "seed": s}}
        kill itself with its role's probability at each point, n times in all; `killed` lists them
    {"kill_at": {"point": name, "count": n}}    kill itself once, at the n-th call of that point
    {"hang": {"point": name, "jobs": [n, ...]}, "raise": {the same}, "die": {the same}}
    {"stub": true}    train nothing: a job's result follows from its configuration
    {"kill_nth": n}    kill a worker once, at the n-th point that workers pass in this lab
    {"record": true}    note each point that the driver passes in `points`

A role is driver or worker. Every opening of a test file is noted in `opened`, with the role of the
process, and every worker's process in `workers`.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from digitlab.base import faults

sys.path.append(str(Path(__file__).parent))  # where DIGITLAB_FAULTS names this file

import worker_faults

_counts: dict[str, int] = {}
_state: dict[str, Any] = {"role": "driver", "job": 0}


def hook(name: str) -> None:
    worker_faults.hook(name)
    _counts[name] = _counts.get(name, 0) + 1
    if name == "worker.started":
        _state["role"] = "worker"
        if Path("log.txt").exists():  # in a lab, and not where the tests themselves run
            _append("workers", str(os.getpid()))
        if Path("faults.json").exists() and json.loads(Path("faults.json").read_text()).get("stub"):
            import stub_fit

            stub_fit.install()
        return  # three deaths before a worker is ready end a study
    if not Path("faults.json").exists():
        return
    if name == "job.started":
        _state["job"] = _next_job()
    orders = json.loads(Path("faults.json").read_text())
    if orders.get("record") and _state["role"] == "driver":
        _append("points", name)
    _kill(name, orders)
    for what in ("hang", "raise", "die"):
        order = orders.get(what, {})
        if order.get("point") == name and _state["job"] in order["jobs"]:
            if what == "raise":
                raise RuntimeError(f"raised at {name}")
            if what == "die":
                _die(name)
            while True:
                time.sleep(3600)


def _next_job() -> int:
    return _next("jobs")


def _next(path: str) -> int:
    """Return how often this was asked for in a lab, by all of its processes."""
    with open(path, "a+") as file:
        file.write("x")
        return file.tell()


def _kill(name: str, orders: dict[str, Any]) -> None:
    killed = Path("killed")
    lines = killed.read_text().splitlines() if killed.exists() else []
    if "kill" in orders:
        order = orders["kill"]
        if "chance" not in _state:  # another in each process, the same in each repetition
            _state["chance"] = random.Random(f"{order['seed']}/{len(lines)}/{_state['role']}")
        struck = _state["chance"].random() < order["probability"][_state["role"]]
        if struck and len(lines) < order["left"]:
            _die(name)
    is_counted = _state["role"] == "worker" and "kill_nth" in orders
    if is_counted and _next("passed") == orders["kill_nth"]:
        _die(name)
    exact = orders.get("kill_at", {})
    if exact.get("point") == name and _counts[name] == exact.get("count", 1) and not lines:
        _die(name)


def _die(name: str) -> None:
    _append("killed", f"{_state['role']} {name}")
    os.kill(os.getpid(), signal.SIGKILL)


def _note_test_files(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and "t10k" in str(arguments[0]) and Path("log.txt").exists():
        _append("opened", f"{_state['role']} {Path(str(arguments[0])).name}")


def _append(path: str, line: str) -> None:
    with open(path, "a") as file:
        file.write(f"{line}\n")


if __name__ == "hooks":  # preloaded
    faults.hook = hook
    sys.addaudithook(_note_test_files)
