"""Where the driver keeps Optuna's studies: sqlite in the lab, or a PostgreSQL server."""

import os
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from digitlab.base.errors import UserError, first_line, nearest
from digitlab.base.files import safe_name
from digitlab.base.invocation import command
from digitlab.base.locks import file_lock
from digitlab.base.paths import sqlite_address
from digitlab.base.server import TIMEOUTS, LeaderLock, ServerLock

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

# What a storage raises that cannot be written or read: a full disk, a lost or locked database.
STORE_ERRORS = (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError)

# Of each connection: a server that does not answer must not hold the driver for ever, and one
# that was cut off must be noticed on both sides, or it keeps the leader's lock.
_SERVER = {
    "statement_timeout": "60s",
    "tcp_user_timeout": "20s",
    "tcp_keepalives_idle": "10s",
    "tcp_keepalives_interval": "5s",
    "tcp_keepalives_count": "3",
}
_CONNECTION = {
    **TIMEOUTS,
    "options": " ".join(f"-c {name}={value}" for name, value in _SERVER.items()),
    "application_name": "digitlab",
}


def open_storage(lab: Path, address: str | None = None) -> RDBStorage:
    """Open `address`, else DIGITLAB_STORAGE, else the lab's sqlite, or raise UserError."""
    server = _server_address(address)
    return _open_server(server) if server else _open_sqlite(_sqlite_file(lab))


def has_storage(lab: Path, address: str | None = None) -> bool:
    """Whether `open_storage` would open a server, or a database that is in the lab already."""
    return bool(_server_address(address)) or _sqlite_file(lab).is_file()


def _server_address(address: str | None) -> str | None:
    return address or os.environ.get("DIGITLAB_STORAGE")


def _sqlite_file(lab: Path) -> Path:
    return lab / "optuna.db"


def _open_sqlite(path: Path) -> RDBStorage:
    try:
        # Two processes that create the tables at once collide.
        with FileLock(path.with_suffix(".lock")):
            # In WAL mode readers, such as Optuna's dashboard, and the writer do not wait.
            with closing(sqlite3.connect(path, timeout=60)) as database:
                database.execute("PRAGMA journal_mode=WAL")
            options = {"connect_args": {"timeout": 60}}  # s, to wait for another writer
            return RDBStorage(sqlite_address(path), engine_kwargs=options)
    except Exception as error:  # sqlite's, sqlalchemy's, alembic's: one cause for the user
        raise UserError(
            f"{path} cannot be used ({_reason(error)}): it must be a readable and writable "
            "Optuna database. Repair it, or restore it from a copy."
        ) from error


def _open_server(address: str) -> RDBStorage:
    shown = f"study.storage={first_line(address)}"
    if not address.startswith("postgresql+psycopg://"):
        raise UserError(
            f"{shown} is invalid: it must be postgresql+psycopg://user@host/database, or null for "
            "sqlite in the lab."
        )
    try:
        import psycopg  # noqa: F401  only here, since only a server needs it
    except ImportError as error:
        raise UserError(
            f"{shown} needs psycopg, which is not installed: run `make setup`, or "
            "`pip install -e '.[cluster]'` in the checkout."
        ) from error
    # No connection is asked first whether it still works: what fails is tried again.
    options: dict[str, Any] = {"pool_size": 2, "connect_args": _CONNECTION}
    try:
        with suppress(SQLAlchemyError):  # two that create the tables of an empty database collide
            return RDBStorage(address, engine_kwargs=options)
        return RDBStorage(address, engine_kwargs=options)
    except Exception as error:  # psycopg's, sqlalchemy's, alembic's: one cause for the user
        raise UserError(
            f"{shown} cannot be used ({_reason(error)}): it must be a PostgreSQL database that "
            "answers. The password comes from PGPASSWORD, ~/.pgpass, or .env in the lab."
        ) from error


def _reason(error: Exception) -> str:
    """Return why a storage does not open; Optuna's own text on versions advises to change it."""
    if isinstance(error, RuntimeError):
        return f"it was made by another version of Optuna than {optuna.__version__}, or by none"
    return first_line(error.__cause__ or error)  # Optuna's own text hides the database's


def study_names(storage: RDBStorage) -> list[str]:
    """Return the names of all studies in a storage, the oldest first; of deleted ones, too."""
    return [study.study_name for study in storage.get_all_studies()]


def require_study(storage: RDBStorage, name: str) -> None:
    """Raise UserError unless a study of this name exists, if only as a deleted one."""
    known = study_names(storage)
    if name not in known:
        shown = name or "''"
        raise UserError(f"study {shown} does not exist: {nearest(name, known)}")


def study_notes(storage: RDBStorage, name: str) -> dict[str, Any]:
    """Return what is noted of a study that exists."""
    return dict(storage.get_study_user_attrs(storage.get_study_id_from_name(name)))


DELETED = "deleted"  # the attribute that hides a study: when, and its runs that went with it


def listed_studies(storage: RDBStorage) -> list[str]:
    """Return the names of the studies that were not deleted, the oldest first."""
    studies = storage.get_all_studies()
    return [study.study_name for study in studies if not study.user_attrs.get(DELETED)]


def refuse_deleted(name: str, notes: Mapping[str, Any]) -> None:
    """Raise UserError for a study that was deleted: it stays as it was until it is restored."""
    if notes.get(DELETED):
        raise UserError(
            f"study {name} was deleted: its name stays taken. Bring it back with "
            f"`{command('restore', name)}`, or take another name."
        )


@contextmanager
def leader_lock(storage: RDBStorage, lab: Path, study: str) -> Iterator[LeaderLock]:
    """Hold a study, so that one driver alone writes to it; UserError if another one does."""
    problem = (
        f"study.name={study} is in use: one process at a time may lead a study. Wait for it, "
        "or choose another study.name"
    )
    if storage.engine.dialect.name == "sqlite":
        with file_lock(lab / "locks" / f"{safe_name(study)}.leader", problem):
            yield LeaderLock()
        return
    lock = ServerLock(storage.engine, f"digitlab/{study}", problem)
    try:
        yield lock
    finally:
        lock.release()
