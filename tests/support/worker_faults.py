"""Faults of workers under test, as a folder orders them: DIGITLAB_FAULT_ORDERS, or ./orders.

Part of `hooks` where workers are forked; DIGITLAB_FAULTS names this file for other processes. A
file `<action>@<point>` in the folder is obeyed by the first worker that comes to the point, and
removed; `always-<action>@<point>` stays. Actions: kill, hang (until the folder is gone), raise.
"""

import os
import signal
import time
from pathlib import Path


def hook(name: str) -> None:
    folder = Path(os.environ.get("DIGITLAB_FAULT_ORDERS", "orders")).absolute()
    if not folder.exists():
        return
    for action in ("kill", "hang", "raise"):
        once = folder / f"{action}@{name}"
        if not (folder / f"always-{action}@{name}").exists():
            try:
                once.unlink()
            except FileNotFoundError:
                continue
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "raise":
            raise RuntimeError(f"a fault at {name}")
        while folder.exists():
            time.sleep(0.05)
