"""Where studies are kept: sqlite in the lab folder, or a PostgreSQL server that many share."""

import math
import os
import random
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from digitlab.base.errors import UserError, first_line

# What a storage raises that cannot be written or read: a full disk, a lost or locked database.
STORE_ERRORS = (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError)
BEAT = 10  # s between two signs of life of a trial's worker, in a storage that many share
GRACE = 45  # s without one, after which the worker is taken for lost
PATIENCE = 300.0  # s for which a server that is away is tried again
_LONGEST_WAIT = 15.0  # s between two tries
_ENDING = 3.0  # s until the server has noticed that a connection was closed, and frees its locks

_T = TypeVar("_T")


def open_storage(lab: Path, address: str | None = None, patience: float = 0.0) -> BaseStorage:
    """Optuna's storage: of `address`, else of DIGITLAB_STORAGE, else sqlite in the lab folder.

    Args:
        patience: seconds for which a server that is away is tried again.

    Raises:
        UserError: it cannot be read or written, or is no database.
    """
    address = address or os.environ.get("DIGITLAB_STORAGE")
    return _open_server(address, patience) if address else _open_sqlite(lab / "optuna.db")


def _open_sqlite(path: Path) -> BaseStorage:
    """In WAL mode, so that readers and a writer go on side by side."""
    try:
        # Two processes that make the tables at once collide.
        with FileLock(path.with_suffix(".lock")):
            with closing(sqlite3.connect(path, timeout=60)) as database:
                database.execute("PRAGMA journal_mode=WAL")
            options = {"connect_args": {"timeout": 60}}  # s, to wait for another writer
            return get_storage(RDBStorage(f"sqlite:///{path}", engine_kwargs=options))
    except Exception as error:  # sqlite's, sqlalchemy's, alembic's: one cause for the user
        raise UserError(
            f"{path}: cannot be used ({first_line(error)}): mend it, or put it aside to begin anew"
        ) from error


# Of each connection: a server that does not answer must not hold a worker for ever, and one that
# was cut off must be noticed on both sides, else it keeps the trial that it had locked. A worker
# that is stopped but connected keeps it no longer than others try for it.
_SERVER = {
    "statement_timeout": "60s",
    "idle_in_transaction_session_timeout": "240s",
    "tcp_user_timeout": "20s",  # after which an answer that was not received is given up
    "tcp_keepalives_idle": "10s",
    "tcp_keepalives_interval": "5s",
    "tcp_keepalives_count": "3",
}
_CONNECTION = {
    "connect_timeout": 10,  # s
    "tcp_user_timeout": 30_000,  # ms
    "keepalives_idle": 10,  # s
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "options": " ".join(f"-c {name}={value}" for name, value in _SERVER.items()),
    "application_name": "digitlab",
}
# One connection is kept; a turn and a sign of life take one each for a moment. None is asked first
# whether it still works: what fails is tried again.
_POOL = {"pool_size": 2, "max_overflow": 1, "pool_timeout": 60}


def _open_server(address: str, patience: float) -> BaseStorage:
    shown = f"study.storage={first_line(address)}"
    if not address.startswith("postgresql+psycopg://"):
        raise UserError(
            f"{shown}: allowed is postgresql+psycopg://user@host/database, or null for sqlite in "
            "the lab folder"
        )
    try:
        import psycopg  # noqa: F401  only here, since only a shared storage needs it
    except ImportError as error:
        raise UserError(f"{shown}: needs psycopg: pip install 'digitlab[cluster]'") from error
    options: dict[str, Any] = {**_POOL, "connect_args": _CONNECTION}

    def connect() -> RDBStorage:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = RDBStorage(
                address, engine_kwargs=options, heartbeat_interval=BEAT, grace_period=GRACE
            )
        storage.scoped_session = scoped_session(sessionmaker(storage.engine, class_=_JointSession))
        return storage

    try:
        with suppress(SQLAlchemyError):  # two that make the tables of an empty database collide
            return get_storage(patiently(connect, patience))
        return get_storage(connect())
    except Exception as error:  # psycopg's, sqlalchemy's, alembic's: one cause for the user
        raise UserError(
            f"{shown}: cannot be used ({first_line(error)}): mend it, or give another; the "
            "password comes from PGPASSWORD, ~/.pgpass, or .env in the lab folder"
        ) from error


def study_names(storage: BaseStorage) -> list[str]:
    return [study.study_name for study in storage.get_all_studies()]


Sessions = scoped_session[Session]  # one for each thread


def sessions_of(storage: BaseStorage) -> Sessions | None:
    """Of a storage that many share; None of one that is this lab's alone."""
    backend = getattr(storage, "_backend", None)  # of the cache that Optuna wraps around it
    if isinstance(backend, RDBStorage) and backend.heartbeat_interval is not None:
        sessions: Sessions = backend.scoped_session
        return sessions
    return None


class _Lost(SQLAlchemyError):
    """Optuna has tried again by itself after a rollback: the whole has to be."""


class _JointSession(Session):
    """Optuna commits after each small thing that it is asked; in `together` that waits."""

    joint = lost = False

    def commit(self) -> None:
        if self.lost:  # what comes later must not be kept without what was lost
            raise _Lost("a part of the transaction was lost")
        if self.joint:
            self.flush()
        else:
            super().commit()

    def rollback(self) -> None:
        self.lost = self.joint
        super().rollback()

    def close(self) -> None:
        if not self.joint:
            super().close()


@contextmanager
def together(sessions: Sessions) -> Iterator[None]:
    """One transaction for all that this thread asks of the storage: all of it holds, or nothing.

    It costs server and worker about half of what many small ones do.
    """
    session = sessions()
    assert isinstance(session, _JointSession)
    session.joint = True
    try:
        yield
        session.joint = False
        session.commit()
    except BaseException:
        session.joint = False
        session.rollback()
        raise
    finally:
        session.close()


def patiently(attempt: Callable[[], _T], patience: float) -> _T:
    """What `attempt` gives. While its server is away it is tried again, ever less often.

    Raises:
        STORE_ERRORS: after `patience` seconds, or at once where it is no matter of a server.
    """
    deadline, wait = time.monotonic() + patience, 0.5
    while True:
        try:
            return attempt()
        except STORE_ERRORS as error:
            if not _is_away(error) or time.monotonic() + wait > deadline:
                raise
            if 1.0 <= wait < 2.0:  # the second time: a restart that is over at once is no news
                reason = first_line(error.__cause__ or error)
                print(f"storage: not reached ({reason}); tried again", file=sys.stderr, flush=True)
        time.sleep(random.uniform(wait / 2, wait))  # noqa: S311  so that not all come at once
        wait = min(2 * wait, _LONGEST_WAIT)


_FOR_GOOD = ("password", "pg_hba.conf", "does not exist")  # in refusals that no waiting changes
_MISTAKES = (ProgrammingError, DataError, IntegrityError)  # of the call, not of the connection


def _is_away(error: BaseException | None) -> bool:
    """A lost connection shows in many ways, in the call after the one that lost it as well."""
    while error is not None:
        if isinstance(error, SQLAlchemyError):
            lasting = any(word in str(error) for word in _FOR_GOOD)
            return not isinstance(error, _MISTAKES) and not lasting
        error = error.__cause__
    return False


@contextmanager
def turn(engine: Engine, name: str) -> Iterator[bool]:
    """Hold a lock of that name, on whatever machine, for a moment; gives whether it was free.

    It belongs to a transaction of the server, and goes with it.
    """
    take = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:name, 0))")
    with engine.begin() as connection:
        yield bool(connection.execute(take, {"name": name}).scalar())


class Hold:
    """A lock of that name that lasts: it goes when this process, or its connection, does."""

    def __init__(self, engine: Engine, name: str, problem: str) -> None:
        self.engine, self.name, self.problem = engine, name, problem
        self.connection: Connection | None = None
        self.looked = -math.inf
        self.keep()

    def keep(self) -> None:
        """Take the lock again where a restart of the server has taken it away.

        Raises:
            UserError: another process holds it; its text is `problem`.
        """
        if time.monotonic() - self.looked < BEAT:
            return
        patiently(self._keep, PATIENCE)
        self.looked = time.monotonic()

    def _keep(self) -> None:
        try:
            if self.connection is not None:
                self.connection.execute(text("SELECT 1"))
                return
            connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            query = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
            deadline = time.monotonic() + _ENDING
            while not connection.execute(query, {"name": self.name}).scalar():
                if time.monotonic() > deadline:
                    connection.close()
                    raise UserError(self.problem)
                time.sleep(0.2)
            self.connection = connection
        except SQLAlchemyError:
            self.close()
            raise

    def close(self) -> None:
        if self.connection is not None:
            with suppress(SQLAlchemyError):
                self.connection.invalidate()  # not given back to the pool with its lock
                self.connection.close()
            self.connection = None
