"""`digitlab bench` measures in labs of its own: a person's stores are out of its reach."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import bench
import bench_driver
import pytest
from bench_driver import ClockWorkers, lead, open_study
from bench_tools import Figure, run
from conftest import TINY

from digitlab.workers.base import Finished

STORES = {
    "DIGITLAB_STORAGE": "postgresql+psycopg://digitlab@production.example.org/optuna",
    "MLFLOW_TRACKING_URI": "http://production.example.org:5000",
    "MLFLOW_TRACKING_USERNAME": "digitlab",
}
PRINT = "import json, os; print(json.dumps(dict(os.environ)))"


Measure = Callable[[Callable[[Path, int], list[Figure]]], None]


@pytest.fixture
def measure(lab: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measure]:
    """Run the bench with one part, in place of its own."""
    monkeypatch.setattr(sys, "argv", ["bench", "--repeats", "1"])
    before = dict(os.environ)

    def measure(part: Callable[[Path, int], list[Figure]]) -> None:
        monkeypatch.setattr(bench, "PARTS", {"stub": part})
        bench.main()

    yield measure
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("place", ["environment", ".env", "both"])
def test_no_process_of_the_bench_gets_a_persons_stores(measure, lab, monkeypatch, place) -> None:
    if place != ".env":
        for name, value in STORES.items():
            monkeypatch.setenv(name, value)
    if place != "environment":
        lines = [f"{name}={value}" for name, value in STORES.items()]
        (lab / ".env").write_text("\n".join([*lines, "PGPASSWORD=secret"]))
        (lab / ".env").chmod(0o600)
    seen: dict[str, str] = {}
    homes: list[Path] = []

    def part(own: Path, repeats: int) -> list[Figure]:
        homes.append(own)
        seen.update(json.loads(run([sys.executable, "-c", PRINT], own)))
        return [Figure("stub", "ms", [1.0] * repeats, most=2)]

    measure(part)
    assert not STORES.keys() & seen.keys()
    assert not any(name.startswith("MLFLOW_") for name in seen)
    assert seen.get("PGPASSWORD") != "secret"
    # The lab that it is given has the data, no .env, and is gone afterwards.
    assert Path(seen["DIGITLAB_HOME"]) == homes[0] != lab
    assert not homes[0].exists()
    [figure] = json.loads((lab / "bench.json").read_text())["figures"]
    assert figure["values"] == [1.0]


def test_trials_of_the_bench_are_recorded_in_its_own_lab(measure, lab, monkeypatch) -> None:
    for name, value in STORES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bench_driver, "STUDY", [o for o in TINY if not o.startswith("study.")])
    found: list[list[str]] = []

    def part(own: Path, _: int) -> list[Figure]:
        with open_study(own, "tracking=mlflow", "study.sampler=random") as session:
            seconds = lead(session, ClockWorkers(2, 0.0), 3)
            found.append([row.state for row in session.store.rows()])
            assert session.records.outbox.flush(60) == 0
            runs = session.records.tracker.find({"digitlab.kind": "trial"})
            found.append([run.tags["digitlab.state"] for run in runs])
            assert session.records.tracker.identity.startswith("lab ")
            assert session.lab.is_relative_to(own)
        return [Figure("seconds", "s", [seconds])]

    measure(part)
    assert found == [["finished"] * 3] * 2
    assert {path.name for path in lab.iterdir()} == {"data", "bench.json"}


def test_workers_on_a_clock_take_their_time_at_once() -> None:
    workers = ClockWorkers(64, 0.2)
    for worker in workers.idle():
        workers.submit(worker, None)
    assert workers.idle() == []
    ended: list[int] = []
    while workers.due:
        events = workers.events(10)
        ended += [worker for worker, event in events if isinstance(event, Finished)]
    assert sorted(ended) == list(range(64))


def test_a_part_that_does_not_exist_is_refused_in_one_line(call_in, lab) -> None:
    status, _, text = call_in(lab)("bench", "--only", "nothing")
    assert status == 2
    assert text.startswith("digitlab: --only nothing is invalid: it must be a part of start, ")
