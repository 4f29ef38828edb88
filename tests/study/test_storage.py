"""Where studies are kept: how it is opened, who leads, and what an outage looks like."""

import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from digitlab.base.errors import UserError
from digitlab.base.server import is_away
from digitlab.config.compose import compose
from digitlab.study.driver import is_published
from digitlab.study.storage import has_storage, leader_lock, open_storage, study_names


def refusal(lab: Path, address: str | None = None) -> str:
    with pytest.raises(UserError) as raised:
        open_storage(lab, address)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_file_that_is_no_database_is_one_line_and_left_alone(lab: Path) -> None:
    path = lab / "optuna.db"
    path.write_bytes(b"no database" * 400)
    assert f"{path} cannot be used" in refusal(lab)
    assert path.read_bytes() == b"no database" * 400


@pytest.mark.parametrize("version", [999, 1])
def test_a_database_of_another_optuna_is_named(lab: Path, version: int) -> None:
    open_storage(lab)
    with closing(sqlite3.connect(lab / "optuna.db")) as database, database:
        database.execute("UPDATE version_info SET schema_version = ?", (version,))
        database.execute("UPDATE alembic_version SET version_num = ?", ("v9.9.0.a",))
    text = refusal(lab)
    assert f"was made by another version of Optuna than {optuna.__version__}" in text
    assert "pip" not in text


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("mysql://user@host/x", "is invalid: it must be postgresql+psycopg://"),
        ("sqlite:///x.db", "is invalid: it must be postgresql+psycopg://"),
        ("postgresql+psycopg://user@127.0.0.1:1/x", "cannot be used"),
    ],
)
def test_an_address_that_is_of_no_use_is_one_line(lab: Path, address: str, reason: str) -> None:
    text = refusal(lab, address)
    assert f"study.storage={address}" in text
    assert reason in text


def test_a_password_in_an_address_is_not_shown(lab: Path) -> None:
    assert "secret" not in refusal(lab, "postgresql+psycopg://user:secret@127.0.0.1:1/x")


def test_the_environment_names_a_storage(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGITLAB_STORAGE", "mysql://x")
    assert "study.storage=mysql://x" in refusal(lab)
    with pytest.raises(UserError, match=r"study\.storage=mysql"):  # which is asked
        is_published(compose("sweep", [])[0].config, lab)


def test_a_lab_has_a_storage_once_it_is_opened_or_where_one_is_named(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_storage(lab)
    assert has_storage(lab, "postgresql+psycopg://host/x")
    open_storage(lab)
    assert has_storage(lab)
    (lab / "optuna.db").unlink()
    monkeypatch.setenv("DIGITLAB_STORAGE", "postgresql+psycopg://host/x")
    assert has_storage(lab)


def test_one_process_leads_a_study_and_another_may_lead_another(lab: Path) -> None:
    storage = open_storage(lab)
    with leader_lock(storage, lab, "one"):
        with (
            pytest.raises(UserError, match=r"study\.name=one is in use"),
            leader_lock(storage, lab, "one"),
        ):
            pass
        with leader_lock(storage, lab, "two") as lock:
            lock.check()
    with leader_lock(storage, lab, "one"):
        pass


def test_studies_are_listed_oldest_first(lab: Path) -> None:
    storage = open_storage(lab)
    for name in ("b", "a"):
        optuna.create_study(storage=storage, study_name=name)
    assert study_names(open_storage(lab)) == ["b", "a"]


def caused(cause: Exception) -> Exception:
    error = optuna.exceptions.StorageInternalError("it failed")
    error.__cause__ = cause
    return error


LOST = OperationalError("select", {}, Exception("server closed the connection unexpectedly"))
PASSWORD = OperationalError("select", {}, Exception("password authentication failed"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LOST, True),
        (caused(LOST), True),
        (OperationalError("insert", {"reason": "x does not exist"}, LOST.orig), True),
        (PASSWORD, False),
        (caused(PASSWORD), False),
        (IntegrityError("insert", {}, Exception("duplicate")), False),
        (ProgrammingError("select", {}, Exception("syntax")), False),
        (ValueError("a mistake"), False),
    ],
)
def test_an_outage_is_no_mistake(error: Exception, expected: bool) -> None:
    assert is_away(error) is expected
