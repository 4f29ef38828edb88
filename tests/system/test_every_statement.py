"""A study whose PostgreSQL restarts before its n-th statement or commit, for every n.

What a restart does to a driver is that all its connections end, and its lock with them. Here the
server ends them, which takes a millisecond; at some statements it is restarted in earnest.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from conftest import Wanted
from enumeration import Clock, Course, Facts, compare, facts, new_lab, stubs
from leading import lead
from scripted import stub

from digitlab.base import retry
from digitlab.base.errors import UserError, first_line
from digitlab.base.server import ServerLock
from digitlab.results import publish
from digitlab.study.storage import STORE_ERRORS, open_storage

COURSE = Course()
END_ALL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'digitlab'"


class Statements:
    """Counts what the driver sends to the server; before one of them the server is disturbed."""

    def __init__(self, disturb_at: int = 0, disturb: Callable[[], object] = lambda: None) -> None:
        self.disturb_at, self.disturb = disturb_at, disturb
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.disturb_at:
            self.disturb()

    @contextmanager
    def counted(self) -> Iterator[None]:
        events = ("before_cursor_execute", "commit")
        for name in events:
            sqlalchemy.event.listen(sqlalchemy.Engine, name, self)
        try:
            yield
        finally:
            for name in events:
                sqlalchemy.event.remove(sqlalchemy.Engine, name, self)


class Site:
    """A server with a database for each study, of which the tables are made once."""

    def __init__(self, folder: Path, postgres: Any, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.postgres, self.patch = folder, postgres, patch
        patch.setenv("PGPASSWORD", postgres.password)
        patch.setattr(retry, "_FIRST_WAIT_S", 0.01)
        patch.setattr(ServerLock, "_CHECK_INTERVAL_S", 0.0)  # the lock is asked for at each event
        self.tables = f"tables_{postgres.count}"
        open_storage(folder, postgres.create(self.tables)).engine.dispose()

    def new_lab(self, name: str) -> Path:
        self.patch.setenv("DIGITLAB_STORAGE", self.postgres.create(template=self.tables))
        return new_lab(self.folder / name)

    def drop(self) -> None:
        """Remove the last database: after a crash a server reads the files of all it has."""
        name = os.environ["DIGITLAB_STORAGE"].rpartition("/")[2]
        self.postgres.query(f'DROP DATABASE "{name}" WITH (FORCE)')

    def run(self, lab: Path, statements: Statements) -> int | str:
        """Run a study, or go on with it; return its exit status, or the line that it ends with."""
        with stubs(Clock(COURSE, lab=lab)), statements.counted():
            try:
                return lead(lab, stub, *COURSE.overrides, publish=publish.publish)[0]
            except (UserError, *STORE_ERRORS) as error:
                return first_line(error)


@pytest.fixture
def site(tmp_path: Path, postgres: Any, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, postgres, monkeypatch)


def problem_of(site: Site, lab: Path, statements: Statements, reference: Facts) -> str:
    """Return what is wrong with a study that is disturbed, or goes on after it; empty: nothing."""
    ended = site.run(lab, statements)
    if isinstance(ended, str):  # the command says it in one line, and the next one completes it
        ended = site.run(lab, Statements())
    if ended != 0:
        return f"it ended with {ended}"
    with stubs(Clock(COURSE, lab=lab)):
        try:
            compare(facts(lab), reference)
        except AssertionError as error:
            return str(error)
    return ""


def go_through(
    site: Site, is_wanted: Callable[[int], bool], disturb: Callable[[], object]
) -> tuple[int, list[str]]:
    """Disturb a study before each statement that is wanted; return their number and what failed."""
    lab, undisturbed = site.new_lab("undisturbed"), Statements()
    assert site.run(lab, undisturbed) == 0
    with stubs(Clock(COURSE, lab=lab)):
        reference = facts(lab)
    wrong = []
    for number in filter(is_wanted, range(1, undisturbed.count + 1)):
        lab = site.new_lab(f"lab{number}")
        statements = Statements(number, disturb)
        if problem := problem_of(site, lab, statements, reference):
            wrong.append(f"{number}: {problem}")
        assert statements.count >= number
        site.drop()
    return undisturbed.count, wrong


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_study_survives_the_end_of_its_connections_at_some_statements(site: Site) -> None:
    end_all = partial(site.postgres.query, END_ALL)
    assert go_through(site, lambda number: number % 20 == 7, end_all)[1] == []


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_study_survives_a_crash_of_the_server_at_some_statements(site: Site) -> None:
    crash = partial(site.postgres.restart, "immediate")
    assert go_through(site, lambda number: number % 90 == 31, crash)[1] == []


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("is_crash", [False, True], ids=["end", "crash"])
def test_a_study_survives_either_at_every_statement(
    site: Site, is_wanted: Wanted, is_crash: bool, record_property: Callable[[str, object], None]
) -> None:
    server = site.postgres
    disturb = partial(server.restart, "immediate") if is_crash else partial(server.query, END_ALL)
    count, wrong = go_through(site, is_wanted, disturb)
    record_property("statements", count)
    assert wrong == []
