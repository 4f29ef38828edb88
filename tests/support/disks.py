"""Disks that are full, and labs that may only be read."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine


@contextmanager
def full_databases() -> Iterator[None]:
    """Let no sqlite database grow that sqlalchemy opens, as on a full disk."""

    def limit(connection: Any, *_: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # sqlite makes it the present size

    def unlimit(connection: Any, *_: Any) -> None:  # a pool may keep it
        connection.execute("PRAGMA max_page_count = 1073741823")

    hooks = {"checkout": limit, "checkin": unlimit}
    for name, hook in hooks.items():
        event.listen(Engine, name, hook)
    try:
        yield
    finally:
        for name, hook in hooks.items():
            event.remove(Engine, name, hook)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write into a folder; root, who may write everywhere, needs a mount for it."""
    if os.geteuid():
        paths = [folder, *folder.rglob("*")]
        modes = {path: path.stat().st_mode for path in paths}
        for path in paths:
            path.chmod(modes[path] & 0o555)
        yield
        for path, mode in modes.items():
            path.chmod(mode)
        return
    if subprocess.run(["mount", "--bind", folder, folder], check=False).returncode:
        pytest.skip("root needs to mount a folder to protect it from itself")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
