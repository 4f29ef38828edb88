"""Files: what a disk's errors are, through the libraries between."""

import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from digitlab.base.files import disk_problem, make_folder


@pytest.mark.parametrize(
    ("number", "is_disk"),
    [
        *((number, True) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)),
        *((number, False) for number in (errno.ENOENT, errno.EPIPE, errno.ECONNRESET)),
    ],
)
def test_disk_problem_names_the_file_whatever_was_raised_from_it(
    number: int, is_disk: bool
) -> None:
    error = ValueError("wrapped")
    error.__cause__ = OSError(number, os.strerror(number), "/lab/x")
    assert disk_problem(error) == (f"{os.strerror(number)}: /lab/x" if is_disk else "")


@pytest.mark.parametrize(
    ("content", "statement", "problem"),
    [
        (b"", "PRAGMA max_page_count = 1; CREATE TABLE a (b)", "database or disk is full"),
        (b"", "PRAGMA query_only = 1; CREATE TABLE a (b)", "attempt to write a readonly database"),
        (b"no database" * 400, "SELECT * FROM a", "file is not a database"),
        (None, "SELECT 1", "unable to open database file"),
        (b"", "SELECT * FROM a", ""),  # a mistake of the program
    ],
)
def test_disk_problem_of_a_database_is_known_from_other_errors(
    tmp_path: Path, content: bytes | None, statement: str, problem: str
) -> None:
    path = tmp_path / "no folder" / "x.db"
    if content is not None:
        path = tmp_path / "x.db"
        path.write_bytes(content)
    with pytest.raises(Exception) as raised, create_engine(f"sqlite:///{path}").begin() as database:  # noqa: PT011, PT012
        for part in statement.split(";"):
            database.execute(text(part))
    assert disk_problem(raised.value) == problem


def test_locked_database_is_no_disk_problem(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "x.db")) as one:
        one.execute("BEGIN EXCLUSIVE")
        with (
            pytest.raises(sqlite3.OperationalError) as raised,
            closing(sqlite3.connect(tmp_path / "x.db", timeout=0)) as other,
        ):
            other.execute("CREATE TABLE a (b)")
    assert disk_problem(raised.value) == ""


def test_a_folder_may_lie_deep(tmp_path: Path) -> None:
    folder = tmp_path / "/".join(["a"] * 1500)
    make_folder(folder)
    assert folder.is_dir()
    (tmp_path / "kept").touch()
    os.removedirs(folder)  # shutil's and pytest's own way to remove it is recursive


def test_each_folder_that_is_made_is_synced_in_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr("digitlab.base.files.sync", synced.append)
    make_folder(tmp_path / "lab" / "outbox")
    make_folder(tmp_path / "lab" / "outbox")
    assert synced == [tmp_path, tmp_path / "lab"]
    assert (tmp_path / "lab/outbox").is_dir()
