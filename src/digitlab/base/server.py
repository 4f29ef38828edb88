"""A database server that may go away: its errors, and a lock that it holds."""

import time
from collections.abc import Callable
from contextlib import suppress

from sqlalchemy import Connection, Engine, make_url, text
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError, SQLAlchemyError

from digitlab.base.errors import UserError
from digitlab.base.files import disk_problem
from digitlab.base.retry import retry

OUTAGE_S = 300.0  # for which a server that is away is tried again
# Of a connection to PostgreSQL: a server that does not answer must not be waited for for ever.
TIMEOUTS = {
    "connect_timeout": 10,  # s
    "tcp_user_timeout": 30_000,  # ms
    "keepalives_idle": 10,  # s
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
_LOCK_RELEASE_S = 3.0  # until a server has noticed that a connection is gone, and frees its lock

_PERMANENT = ("password", "pg_hba.conf", "does not exist")  # in refusals that waiting cannot change
_MISTAKES = (ProgrammingError, DataError, IntegrityError)  # of the call, not of the connection


def with_timeouts(address: str) -> str:
    """Return an address of PostgreSQL with TIMEOUTS, but for those that it sets itself.

    They are those of PostgreSQL's own library: another driver's address stays as it is.
    """
    url = make_url(address)
    if url.get_driver_name() not in ("psycopg", "psycopg2"):
        return address
    added = {name: str(value) for name, value in TIMEOUTS.items() if name not in url.query}
    return url.update_query_dict(added).render_as_string(hide_password=False)


def is_away(error: BaseException | None) -> bool:
    """Whether an error of a storage is a lost connection: it shows in many ways."""
    if disk_problem(error):  # of sqlite in the lab, which no server repairs
        return False
    while error is not None:
        if isinstance(error, SQLAlchemyError):
            # What the server said; the whole text has the statement's values in it, too.
            said = str(getattr(error, "orig", None) or error)
            permanent = any(word in said for word in _PERMANENT)
            return not isinstance(error, _MISTAKES) and not permanent
        error = error.__cause__
    return False


class LeaderLock:
    """A lock that lasts as long as this process."""

    is_lost = False  # another process leads the study: nothing more may be written

    def check(self, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Make sure that the lock is held; return whether it had to be acquired again."""
        return False


class ServerLock(LeaderLock):
    """An advisory lock of PostgreSQL, which goes when this process or its connection does."""

    _CHECK_INTERVAL_S = 10.0

    def __init__(self, engine: Engine, name: str, problem: str) -> None:
        self.engine, self.name, self.problem = engine, name, problem
        self.connection: Connection | None = None
        self.checked = 0.0
        self._acquire()

    def check(self, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Acquire the lock again where a restart of the server dropped it, or raise UserError.

        Args:
            stopped: ends the attempts while the server is away.

        Returns:
            Whether it was acquired again: another process may have held it meanwhile.
        """
        before = self.connection
        if time.monotonic() - self.checked > self._CHECK_INTERVAL_S:
            retry(self._acquire, is_away, OUTAGE_S, stopped)
        return self.connection is not before

    def _acquire(self) -> None:
        try:
            if self.connection is not None:
                self.connection.execute(text("SELECT 1"))
            else:
                self.connection = self._connect()
            self.checked = time.monotonic()
        except SQLAlchemyError:
            self.release()
            raise

    def _connect(self) -> Connection:
        connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        query = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
        deadline = time.monotonic() + _LOCK_RELEASE_S
        while not connection.execute(query, {"name": self.name}).scalar():
            if time.monotonic() > deadline:
                connection.close()
                self.is_lost = True
                raise UserError(self.problem)
            time.sleep(0.2)
        return connection

    def release(self) -> None:
        if self.connection is not None:
            with suppress(SQLAlchemyError):
                self.connection.invalidate()  # not given back to the pool with its lock
                self.connection.close()
            self.connection = None
