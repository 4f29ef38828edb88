"""Writes that are whole on disk, or not there at all."""

import ctypes
import errno
import hashlib
import os
import re
import sqlite3
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from digitlab.base.errors import UserError, require

# What waiting does not repair: a disk that is full, read-only, closed to this user, or broken.
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
}
_SQLITE_ERRORS = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB),
}

_OPEN = ("reports", "explained")  # folders of the lab that hold what anybody can make again
_KIND_BYTES = 8  # of a PNG's signature; a page and a database differ before


def disk_problem(error: BaseException | None) -> str:
    """Return why the disk, or a database on it, cannot be used; empty if that is not the cause.

    The cause may be hidden in the errors of the libraries between.
    """
    while error is not None:
        code = getattr(error, "sqlite_errorcode", None) or 0
        if code & 0xFF in _SQLITE_ERRORS:  # the other bits give details
            return str(error)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            name = f": {error.filename}" if error.filename else ""
            return f"{error.strerror}{name}"
        error = error.__cause__
    return ""


def require_file(path: Path, given: str) -> None:
    """Raise UserError unless a path that a person gave is a file: a pipe or a device may never end.

    Args:
        given: what names it in the message.
    """
    if not path.is_file():
        found = "a pipe or a device" if path.exists() else "missing"
        found = "a folder" if path.is_dir() else found
        raise UserError(f"{given} is {found}: it must be a file. Name another one.")


def write_synced(path: Path, content: bytes) -> None:
    """Replace a file's content such that a crash or a power loss leaves the old or the new one."""
    temporary = path.with_name(f"{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably: a power loss takes a name that was not synced.

    All that is below the name goes with it, synced or not.
    """
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        with suppress(PermissionError):  # it may be written and not read
            sync(folder.parent)


def sync(path: Path) -> None:
    """Make a file's data durable, or the names in a folder, which a file's own sync leaves out."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_output(target: Path, content: bytes | str, option: str, lab: Path) -> None:
    """Write a file that a person asked for, text as UTF-8; it may replace its like.

    Args:
        option: by which the person named the file; empty where it has its place in the lab.

    Raises:
        UserError: as `open_output`.
    """
    encoded = content.encode() if isinstance(content, str) else content
    given, kind = f"{option} {target}".lstrip(), encoded[:_KIND_BYTES]
    remedy = "Name another file" if option else "Repair that folder"
    with open_output(target, given, lab, kind, remedy) as file:
        file.write(encoded)


@contextmanager
def open_output(
    target: Path, given: str, lab: Path, kind: bytes = b"", remedy: str = "Name another file"
) -> Iterator[IO[bytes]]:
    """Open a file that a person named, which is then there as a whole or not at all.

    Args:
        given: what names it in a message.
        kind: the first bytes of a file that may be replaced; without them none may be.
        remedy: what to do where it cannot be written.

    Raises:
        UserError: it is among the lab's own files, it would replace another kind of file, it cannot
            be written, or what it is made of cannot be read.
    """
    place, home = (Path(os.path.realpath(path)) for path in (target, lab))
    if place.is_relative_to(home) and not {home / name for name in _OPEN} & {*place.parents}:
        raise UserError(
            f"{given} is inside the lab: it must be outside, or in its folder {' or '.join(_OPEN)}."
            " Name another file."
        )
    new = place.with_name(f".{uuid.uuid4().hex}.new") if place.name else place
    try:
        require(not target.is_dir(), f"{given}, a folder,", "the name of a file")
        if target.exists() and not target.is_file():  # a pipe or a device loses nothing
            with open(target, "wb") as file:
                yield file
            return
        if target.is_file() and not _may_replace(target, kind):
            is_other = "is another kind of file" if kind else "may be the only copy of something"
            raise UserError(
                f"{given} exists and {is_other}: it must not be replaced. Remove it first, or name "
                "another file."
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if place.exists():
            new.chmod(stat.S_IMODE(place.stat().st_mode))
        new.replace(place)
    except OSError as error:
        own = {*map(str, (target, new, place, *place.parents))}
        if error.filename is not None and str(error.filename) not in own:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}): {given} must hold what is "
                "there. Repair that first."
            ) from error
        raise UserError(
            f"{given} cannot be written ({error.strerror or error}): it must be in a folder that "
            f"can be written. {remedy}."
        ) from error
    finally:
        with suppress(OSError):  # as a rule it is not there any more
            new.unlink()


def _may_replace(path: Path, kind: bytes) -> bool:
    with open(path, "r+b") as file:  # to write, too, or a file that is protected would be replaced
        found = file.read(_KIND_BYTES)
    return not found or found == kind


def safe_name(name: str) -> str:
    """Return a name from a store or a person as a part of a file's name: no folders, no codes.

    Two names that differ stay different.
    """
    safe = re.sub(r"[^\w.=,-]+", "_", name).lstrip(".")[:100]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def sync_file_system(path: Path) -> None:
    """Write all that the file system of `path` holds to the disk, in one call for many files."""
    try:
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except AttributeError:  # it is Linux's
        os.sync()
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(descriptor)
