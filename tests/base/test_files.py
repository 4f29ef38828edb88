"""Files: what a disk's errors are, through the libraries between."""

import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from digitlab.base.errors import UserError
from digitlab.base.files import disk_problem, make_folder, open_output, write_output


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


# ---- what a person has written -------------------------------------------------------------------


PAGE, PICTURE = b"<!doctype html>\n<title>a</title>", b"\x89PNG\r\n\x1a\n rest"


def write(target: Path, content: bytes = PAGE) -> str:
    """Write it; return why it is refused, and an empty text if it is not."""
    try:
        write_output(target, content, "--out", target.parents[1] / "lab")
    except UserError as error:
        return str(error)
    return ""


def test_an_output_replaces_its_like_and_an_empty_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    assert write(target) == ""
    assert write(target, PAGE + b"more") == ""
    assert target.read_bytes() == PAGE + b"more"
    for content in (PICTURE, b"SQLite format 3\0", b"PK\3\4", b"my letters"):
        target.write_bytes(content)
        assert "exists and is another kind of file" in write(target)
        assert target.read_bytes() == content
    target.write_bytes(b"")
    assert write(target) == ""
    assert [*target.parent.iterdir()] == [target]


def test_an_export_replaces_no_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"PK\3\4")
    with (
        pytest.raises(UserError, match="exists and may be the only copy"),
        open_output(target, str(target), tmp_path / "lab"),
    ):
        pass
    assert target.read_bytes() == b"PK\3\4"


@pytest.mark.parametrize("name", ["mlflow.db", "new.html", "locks/page.html", "reports/../x.html"])
def test_an_output_among_the_lab_s_own_files_is_refused(tmp_path: Path, name: str) -> None:
    lab = tmp_path / "lab"
    (lab / "locks").mkdir(parents=True)
    (lab / "mlflow.db").write_bytes(PAGE)  # whatever it begins with
    (tmp_path / "link").symlink_to(lab / name)
    for target in (lab / name, tmp_path / "link"):
        with pytest.raises(UserError, match=r"is inside the lab: .*reports or explained"):
            write_output(target, PAGE + b"more", "--out", lab)
    assert (lab / "mlflow.db").read_bytes() == PAGE
    write_output(lab / "reports" / "page.html", PAGE, "--out", lab)
    assert (lab / "reports" / "page.html").read_bytes() == PAGE


def test_an_output_that_fails_leaves_the_file_of_before(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_bytes(PAGE)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (  # noqa: PT012
        pytest.raises(UserError, match=r"cannot be written \(No space"),
        open_output(target, "--out", tmp_path / "lab", PAGE[:8]) as file,
    ):
        file.write(b"half")
        raise full
    assert target.read_bytes() == PAGE
    assert [*tmp_path.iterdir()] == [target]


def test_a_file_that_cannot_be_read_for_an_output_is_not_said_to_be_the_output(
    tmp_path: Path,
) -> None:
    target, source = tmp_path / "page.html", tmp_path / "source"
    with (
        pytest.raises(UserError, match=r"source cannot be read \(No such file"),
        open_output(target, "--out", tmp_path / "lab") as file,
    ):
        file.write(source.read_bytes())
    assert [*tmp_path.iterdir()] == []


def test_an_output_keeps_the_mode_of_the_file_that_it_replaces(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    write_output(target, PAGE, "--out", tmp_path / "lab")
    target.chmod(0o600)
    write_output(target, PAGE + b"more", "--out", tmp_path / "lab")
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.read_bytes() == PAGE + b"more"


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be the name of a file"):
        write_output(tmp_path, PAGE, "--out", tmp_path / "lab")


def test_an_output_goes_into_a_pipe(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    write_output(Path(f"/dev/fd/{writing}"), PAGE, "--out", tmp_path)
    os.close(writing)
    with open(reading, "rb") as file:
        assert file.read() == PAGE
