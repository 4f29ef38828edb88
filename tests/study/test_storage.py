"""The storage of studies: one suite for sqlite and for a real PostgreSQL server."""

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from optuna.pruners import NopPruner
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from digitlab.base.errors import UserError, first_line
from digitlab.config.compose import compose
from digitlab.records.mlflow import open_tracking
from digitlab.study import storage
from digitlab.study.audit import audit
from digitlab.study.storage import Hold, open_storage, patiently, turn
from digitlab.study.trials import GivenAway, Search
from digitlab.study.workers.processes import Job, Setup
from digitlab.study.workers.worker import Work

SMOKE = ["experiments=smoke", "data=sample"]
Open = Callable[..., Search]


def opener(lab: Path, address: str | None) -> Iterator[Open]:
    """A function that opens the same study anew, as another process would."""
    opened = []

    def open_search(*overrides: str) -> Search:
        config = compose("sweep", [*SMOKE, *overrides])[0].config
        opened.append(Search(open_storage(lab, address), config))
        return opened[-1]

    yield open_search
    for search in opened:
        if search.engine is not None:
            search.engine.dispose()
    gc.collect()  # connections of threads that have ended


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.cluster)])
def open_search(
    request: pytest.FixtureRequest, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Open]:
    address = None
    if request.param == "postgresql":
        postgres = request.getfixturevalue("postgres")
        address = postgres.create()
        monkeypatch.setenv("PGPASSWORD", postgres.password)
    yield from opener(lab, address)


@pytest.fixture
def shared(postgres: Any, lab: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """As `open_search`, on PostgreSQL alone."""
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    yield from opener(lab, postgres.create())


def run(search: Search, total: int, accuracy: float = 0.5) -> int | None:
    number = search.claim(total)
    if number is not None:
        with search.alive(number, 0):
            search.ask(number)
            search.check(number)
            search.tell(number, "finished", accuracy, {"metrics": {"val_accuracy": accuracy}})
    return number


def test_trials_are_made_up_to_the_total_and_read_elsewhere(open_search: Open) -> None:
    search = open_search()
    assert [run(search, 3) for _ in range(4)] == [0, 1, 2, None]
    rows = open_search().rows()
    assert [(row.number, row.state, row.value) for row in rows] == [
        (number, "finished", 0.5) for number in range(3)
    ]
    assert rows == search.rows()
    assert search.complete(3)
    assert not search.complete(4)


def test_trial_that_was_put_back_is_taken_first_with_the_same_values(open_search: Open) -> None:
    search, other = open_search(), open_search()
    number = search.claim(5)
    assert number == 0
    with search.alive(number, 0):
        trial, values, _ = search.ask(number)
        search.report(trial, 0, 0.25)
        search.put_back(number, 1)
    assert not search.complete(1)
    assert other.claim(5) == 0
    with other.alive(0, 0):
        assert other.ask(0)[1] == values
        row = other.rows()[0]
        assert (row.state, row.notes["attempts"], row.rungs) == ("running", 1, 1)


def test_failed_trials_count_only_where_the_study_says_so(open_search: Open) -> None:
    for counted, expected in (("true", None), ("false", 2)):
        search = open_search(f"study.name=count-{counted}", f"study.count_failed={counted}")
        for state in ("failed", "finished"):
            number = search.claim(2)
            assert number is not None
            search.ask(number)
            search.tell(number, state, 0.5, {})
        assert search.claim(2) == expected


def test_notes_of_a_study_are_read_elsewhere(open_search: Open) -> None:
    open_search().note("champion", {"trial": 3})
    assert open_search().notes()["champion"] == {"trial": 3}


def test_what_the_storage_refuses_for_good_is_not_tried_again() -> None:
    tries = []

    def full() -> None:
        tries.append(1)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        patiently(full, 60)
    assert len(tries) == 1


@pytest.mark.parametrize(
    "address",
    [
        "postgresql+psycopg://digitlab:geheim@host/db",
        "postgresql+psycopg://digitlab@host/db?password=geheim",
        "http://me:geheim@host:5000",
    ],
)
def test_password_in_an_address_is_refused_and_not_repeated(address: str) -> None:
    key = "tracking.uri" if address.startswith("http") else "study.storage"
    with pytest.raises(UserError, match=f"{key}.*holds a password") as told:
        compose("sweep", [*SMOKE, f"{key}='{address}'"])
    assert "geheim" not in str(told.value)
    assert "geheim" not in first_line(address)


@pytest.mark.parametrize("address", ["mysql://host/db", "postgresql://host/db", "/tmp/x.db"])
def test_other_storages_are_one_line(lab: Path, address: str) -> None:
    with pytest.raises(UserError, match=r"allowed is postgresql\+psycopg"):
        open_storage(lab, address)


def test_address_of_the_environment_may_hold_a_password_that_no_error_repeats(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "postgresql+psycopg://digitlab:ge:he@im@127.0.0.1:9/db"
    monkeypatch.setenv("DIGITLAB_STORAGE", address)
    with pytest.raises(UserError, match=r"digitlab@127\.0\.0\.1:9/db.*cannot be used") as told:
        open_storage(lab)
    assert not any(part in str(told.value) for part in ("ge:he", "he@im"))


@pytest.mark.cluster
def test_many_workers_at_once_make_exactly_the_total(shared: Open) -> None:
    searches = [shared("study.sampler=random") for _ in range(8)]
    taken: list[int] = []

    def work(search: Search) -> None:
        while (number := run(search, 40)) is not None:
            taken.append(number)

    threads = [threading.Thread(target=work, args=(search,)) for search in searches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(40))
    assert searches[0].complete(40)


@pytest.mark.cluster
def test_waiting_trial_goes_to_one_of_many(shared: Open) -> None:
    searches = [shared() for _ in range(8)]
    number = searches[0].claim(1)
    assert number == 0
    searches[0].put_back(0, 0)
    taken: list[int | None] = []
    threads = [
        threading.Thread(target=lambda s=search: taken.append(s.claim(1))) for search in searches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken, key=str) == [0, *[None] * 7]


@pytest.mark.cluster
def test_trial_without_signs_of_life_is_lost_and_no_longer_its_workers(
    shared: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("digitlab.study.trials.GRACE", 1)
    silent, other = shared(), shared()
    for search in (silent, other):
        search.storage._backend.grace_period = 1  # type: ignore[attr-defined]
    number = silent.claim(2)
    assert number == 0
    silent._take(0)
    assert other.lost() == set()  # it may just have begun
    time.sleep(2)
    assert other.lost() == {0}
    other.put_back(0, 1)
    other.storage._backend.grace_period = 30  # type: ignore[attr-defined]  # its sign is new
    assert other.claim(2) == 0
    with other.alive(0, 0):
        assert other.lost() == set()
        other.check(0)


@pytest.mark.cluster
def test_worker_whose_trial_was_given_away_neither_reads_nor_changes_it(shared: Open) -> None:
    late, slow, other = shared(), shared(), shared()
    assert slow.claim(1) == 0
    with slow.alive(0, 0):
        trial, values, _ = slow.ask(0)
        calls: list[Callable[[], Any]] = [
            lambda: slow.ask(0),
            lambda: slow.report(trial, 0, 0.1),
            lambda: slow.tell(0, "finished", 0.1, {"metrics": {}}),
            lambda: slow.put_back(0, 7),
            lambda: slow.check(0),
            lambda: late._take(0),  # which had claimed it before, and was cut off
        ]
        other.put_back(0, 1)
        assert other.claim(1) == 0
        with other.alive(0, 0):
            assert other.ask(0)[1] == values
            for call in calls:
                with pytest.raises(GivenAway):
                    call()
            assert other.rows()[0].rungs == 0
            other.tell(0, "pruned", 0.5, {"metrics": {"rung_accuracy": 0.5}})
        for call in calls:
            with pytest.raises(GivenAway):
                call()
    row = other.rows()[0]
    assert (row.state, row.value, row.notes["attempts"]) == ("pruned", 0.5, 1)
    assert row.notes["metrics"] == {"rung_accuracy": 0.5}


@pytest.mark.cluster
def test_worker_that_is_told_failed_while_it_runs_hears_so(shared: Open) -> None:
    slow, other = shared(), shared()
    assert slow.claim(1) == 0
    with slow.alive(0, 0):
        slow.ask(0)
        other.tell(0, "failed", None, {"reason": "its worker was lost"})
        assert slow.tell(0, "finished", 0.9, {}) == "failed"
    assert other.rows()[0].state == "failed"


@pytest.mark.cluster
def test_run_of_the_next_owner_stays_when_the_former_comes_back(shared: Open, lab: Path) -> None:
    config = compose("sweep", TINY)[0].config
    tracking = open_tracking(config, lab)

    def worker(search: Search) -> Work:
        return Work(Deaf(), Setup(config, (), lab, None, {}), search, tracking)

    slow, other = shared(*TINY), shared(*TINY)
    assert slow.claim(1) == 0
    ask = slow.ask

    def ask_late(number: int) -> Any:
        """Cut off before it asks, while another is given the trial and ends it."""
        other.put_back(number, 1)
        assert other.claim(1) == number
        assert worker(other).run(Job("trial", number)).state == "finished"
        return ask(number)

    slow.ask = ask_late  # type: ignore[method-assign]
    assert worker(slow).run(Job("trial", 0)).state == "waiting"
    assert audit(other, tracking, config, repair=False) == []


class Deaf:
    def send(self, told: Any, /) -> None: ...

    def poll(self) -> bool:
        return False


@pytest.mark.cluster
def test_worker_that_beats_is_not_lost_and_stops_beating_when_its_time_is_over(
    shared: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("digitlab.study.trials.BEAT", 0.5)
    monkeypatch.setattr("digitlab.study.trials.GRACE", 5)
    search, other = shared(), shared()
    other.storage._backend.grace_period = 5  # type: ignore[attr-defined]
    number = search.claim(1)
    assert number == 0
    with search.alive(0, 8.0):
        time.sleep(7)
        assert other.lost() == set()
        time.sleep(10)
        assert other.lost() == {0}


@pytest.mark.cluster
def test_lock_is_one_machines_and_taken_again_after_a_restart(
    shared: Open, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [shared().engine, shared().engine]
    monkeypatch.setattr(storage, "BEAT", 0)
    first = Hold(engines[0], "study", "taken")
    with pytest.raises(UserError, match="taken"):
        Hold(engines[1], "study", "taken")
    postgres.restart()
    first.keep()
    with pytest.raises(UserError, match="taken"):
        Hold(engines[1], "study", "taken")
    first.close()
    Hold(engines[1], "study", "taken").close()


@pytest.mark.cluster
def test_what_is_told_of_a_trial_holds_as_a_whole_or_not_at_all(
    shared: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = shared()
    assert search.claim(1) == 0

    def broken(*_: Any) -> None:
        raise RuntimeError("half-way")

    with monkeypatch.context() as patch:
        patch.setattr(search.storage, "set_trial_state_values", broken)
        with pytest.raises(RuntimeError, match="half-way"):
            search.tell(0, "finished", 0.9, {"metrics": {"val_accuracy": 0.9}})
    assert [(row.state, row.notes) for row in search.rows()] == [("running", {})]
    assert search.tell(0, "finished", 0.9, {"metrics": {"val_accuracy": 0.9}}) == "finished"
    assert search.tell(0, "failed", None, {"reason": "later"}) == "finished"
    [row] = shared().rows()
    assert (row.state, row.value, row.notes) == (
        "finished",
        0.9,
        {"metrics": {"val_accuracy": 0.9}},
    )


@pytest.mark.cluster
def test_call_whose_transaction_was_lost_half_way_is_made_again_as_a_whole(
    shared: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = shared()
    count, tries = search._counts, []

    def lose_first() -> Any:
        counts = count()
        tries.append(1)
        if len(tries) == 1:  # Optuna does so where a connection breaks, and goes on
            search.sessions().rollback()  # type: ignore[misc]
        return counts

    monkeypatch.setattr(search, "_counts", lose_first)
    assert (search.claim(1), len(tries)) == (0, 2)
    assert [row.number for row in shared().rows()] == [0]


@pytest.mark.cluster
def test_accuracy_at_a_rung_is_kept_though_the_first_try_was_rolled_back(shared: Open) -> None:
    search, tries = shared(), []
    assert search.claim(1) == 0
    trial = search.ask(0)[0]

    class Pruner(NopPruner):
        def prune(self, study: Any, trial: Any) -> bool:
            tries.append(trial.intermediate_values)
            if len(tries) == 1:
                raise SQLAlchemyError("the connection broke")
            return False

    search.pruner = Pruner()
    assert not search.report(trial, 0, 0.5)
    assert tries == [{0: 0.5}, {0: 0.5}]
    [row] = shared().rows()
    assert (row.rungs, row.value) == (1, 0.5)


@pytest.mark.cluster
def test_only_a_whole_audit_makes_a_run_for_a_trial_that_others_may_still_deliver(
    shared: Open, lab: Path
) -> None:
    config = compose("sweep", TINY)[0].config
    search, tracking = shared(*TINY), open_tracking(config, lab)
    run(search, 1)
    [problem] = audit(search, tracking, config, repair=True, deep=False)
    assert (problem.kind, problem.mended) == ("no run", False)
    assert tracking.find({}) == []
    [problem] = audit(search, tracking, config, repair=True)
    assert (problem.kind, problem.mended) == ("no run", True)
    assert audit(search, tracking, config, repair=False) == []


@pytest.mark.cluster
def test_trial_that_a_machine_had_locked_as_it_was_cut_off_is_soon_free(
    network: Any, near_postgres: Any, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", near_postgres.password)
    address = near_postgres.create()
    places = opener(lab, address)
    search = next(places)()
    number = search.claim(1)
    code = (
        "import sys, time; from pathlib import Path; from digitlab.storage import *; "
        "from digitlab.compose import compose; from digitlab.search import Search; "
        "config = compose('sweep', ['experiments=smoke', 'data=sample'])[0].config; "
        "search = Search(open_storage(Path(sys.argv[1]), sys.argv[2]), config)\n"
        "with together(search.sessions): "
        "search._check(int(sys.argv[3])); print('locked', flush=True); "
        "search._execute(text('SELECT pg_sleep(2)'))"  # whose answer finds no way any more
    )
    arguments = [sys.executable, "-c", code, str(lab), address, str(number)]
    with subprocess.Popen(network.far(*arguments), stdout=subprocess.PIPE, text=True) as far:
        try:
            assert far.stdout is not None
            assert far.stdout.readline() == "locked\n"
            network.cut()
            begun = time.monotonic()
            search.put_back(number, 1)
            assert time.monotonic() - begun < storage.GRACE
        finally:
            far.kill()
    next(places, None)


@pytest.mark.cluster
def test_turn_is_one_at_a_time(shared: Open) -> None:
    engine = shared().engine
    assert engine is not None
    with turn(engine, "x") as mine, turn(engine, "x") as other:
        assert (mine, other) == (True, False)


@pytest.mark.cluster
def test_calls_go_on_over_a_restart_of_the_server(shared: Open, postgres: Any) -> None:
    search = shared("study.sampler=random")
    assert run(search, 10) == 0
    postgres.stop("immediate")
    later = threading.Timer(3, postgres.start)
    later.start()
    begun = time.monotonic()
    assert run(search, 10) in (1, 2)  # the first answer may have been lost with the server
    assert time.monotonic() - begun > 2
    later.join()


@pytest.mark.cluster
def test_no_reap_right_after_a_restart(shared: Open, postgres: Any) -> None:
    search = shared()
    search.storage._backend.grace_period = 1  # type: ignore[attr-defined]
    assert search.claim(1) == 0
    search._take(0)
    search._beat(0 if search.engine is None else search._id(0))
    postgres.restart()
    time.sleep(2)
    assert search.lost() == set()


@pytest.mark.cluster
def test_connections_of_a_worker_are_bounded(shared: Open) -> None:
    search = shared()
    assert search.engine is not None
    ask = search.storage.get_study_user_attrs
    threads = [threading.Thread(target=ask, args=(search.id,)) for _ in range(30)]
    for thread in threads:
        thread.start()
    counts: list[int] = []
    while not counts or any(thread.is_alive() for thread in threads):
        with search.engine.connect() as connection:
            query = text(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND backend_type = 'client backend'"
            )
            counts.append(int(connection.execute(query).scalar() or 0))
    assert max(counts) <= 3
