"""What tests make a process do at its fault points: orders stand in `faults.json` where it works.

Preloaded where workers are forked from, or named by DIGITLAB_FAULTS. A process that works in the
folder of a lab without orders does nothing. The orders:

    {"kill": {"probability": p, "left": n, "points": [...], "role": "driver" or "worker"}}
        kill itself with probability p at each point, at most n times in all; `killed` lists them
    {"kill_at": {"point": name, "count": n}}    kill itself once, at the n-th call of that point
    {"hang": {"point": name, "job": n}}         at that point, in the worker's n-th job
    {"raise": {"point": name, "job": n}}
"""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from digitlab.base import faults

_counts: dict[str, int] = {}
_chance = random.Random()


def hook(name: str) -> None:
    _counts[name] = _counts.get(name, 0) + 1
    if _counts.get("job.started", 0) and name.startswith("worker"):
        return
    orders = _orders()
    if not orders:
        return
    _kill(name, orders)
    jobs = _counts.get("job.started", 0)
    for what in ("hang", "raise"):
        order = orders.get(what, {})
        if order.get("point") == name and order.get("job", jobs) == jobs:
            if what == "raise":
                raise RuntimeError(f"raised at {name}")
            while True:
                time.sleep(3600)


def _orders() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(Path("faults.json").read_text())
        return found
    except (OSError, ValueError):
        return {}


def _kill(name: str, orders: dict[str, Any]) -> None:
    order = orders.get("kill", {})
    points = order.get("points")
    if order and (points is None or name in points) and _chance.random() < order["probability"]:
        killed = Path("killed")
        lines = killed.read_text().splitlines() if killed.exists() else []
        if len(lines) < order["left"]:
            _die(name)
    exact = orders.get("kill_at", {})
    if exact.get("point") == name and _counts[name] == exact.get("count", 1):
        if not Path("killed").exists():
            _die(name)


def _die(name: str) -> None:
    with open("killed", "a") as file:
        file.write(name + "\n")
    os.kill(os.getpid(), signal.SIGKILL)


faults.hook = hook
