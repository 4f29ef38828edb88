"""Locks between processes on one machine. They go when their process goes, however it ends."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from digitlab.base.errors import UserError


@contextmanager
def file_lock(path: Path, problem: str) -> Iterator[None]:
    """Hold a file's lock, made where missing; UserError(problem) if another process does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(
            f"{path.parent} is a file: it must be a folder, for locks. Move it elsewhere."
        ) from error
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(problem) from error
        yield
