"""Kill anything at any moment: a study ends with exactly its trials, each with its own value."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DATA, SHARE, TINY, Parent
from studies import assert_whole, results_of, rows_of, runs_of

# Each trial passes some thirty points in the driver, and some six in its worker.
ODDS = {"driver": 0.012, "worker": 0.06}
# A death of its worker is charged to a trial: none may fail for it here.
STUDY = ("study.retries=1000", "study.rungs=[0.2,0.4,0.7]", "study.startup_trials=2")


def order(lab: Path, **orders: object) -> None:
    (lab / "faults.json").write_text(json.dumps(orders))


def lines_of(lab: Path, name: str) -> list[str]:
    path = lab / name
    return path.read_text().splitlines() if path.exists() else []


def run_to_the_end(start: Callable[[], Parent]) -> int:
    """Start a study again until its driver is not killed; return how often it was."""
    killed = 0
    while True:
        parent = start()
        status = parent.wait(600)
        if status == 0:
            return killed
        assert status == -9, parent.log.read_text()[-3000:]
        killed += 1


def undisturbed(lab: Path, *overrides: str) -> list[tuple[object, ...]]:
    """Return the results of the same study, without kills, in a lab beside."""
    beside = lab.parent / "beside"
    beside.mkdir()
    (beside / "data").symlink_to(lab / "data")
    assert Parent(beside, [*TINY, *overrides]).wait(900) == 0
    return results_of(beside)


def disturb(
    lab: Path, run_sweep: Callable[..., Parent], kills: int, seed: int, *study: str
) -> Counter[str]:
    """Run a study to its end while its driver and its workers kill themselves at random.

    The same seed makes each process die at the same of its points again.
    """
    order(lab, kill={"probability": ODDS, "left": kills, "seed": seed})
    drivers = run_to_the_end(lambda: run_sweep(*STUDY, *study))
    roles = Counter(line.split()[0] for line in lines_of(lab, "killed"))
    assert roles["driver"] == drivers
    return roles


@pytest.mark.slow
def test_a_study_with_two_workers_is_whole_after_some_kills(lab, run_sweep) -> None:
    study = ("study.workers=2", "study.trials=6")
    assert disturb(lab, run_sweep, 4, 1, *study).total() >= 4
    assert_whole(lab, 6)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_study_with_two_workers_and_three_rungs_is_whole_after_a_hundred_kills(
    lab, run_sweep
) -> None:
    trials, kills = int(120 * SHARE), int(100 * SHARE)
    killed = disturb(lab, run_sweep, kills, 2, "study.workers=2", f"study.trials={trials}")
    assert killed.total() >= kills
    assert min(killed["driver"], killed["worker"]) >= kills / 5
    assert_whole(lab, trials)
    assert {row.state for row in rows_of(lab)} == {"finished", "pruned"}


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("seed", "study"),
    [
        (3, ("study.workers=1",)),
        (4, ("study.workers=2", "study.sampler=random", "study.pruner=none")),
    ],
    ids=["one-worker", "random-values"],
)
def test_kills_do_not_change_the_values_of_a_study(lab, run_sweep, seed, study) -> None:
    trials, kills = int(60 * SHARE), int(40 * SHARE)
    study = (*study, f"study.trials={trials}")
    assert disturb(lab, run_sweep, kills, seed, *study).total() >= kills
    assert_whole(lab, trials)
    assert results_of(lab) == undisturbed(lab, *STUDY, *study)


# In the order in which a trial first meets them; `test_every_point...` says whether all are here.
POINTS = [
    *("outbox.created", "outbox.appended", "outbox.sent", "outbox.acknowledged"),
    *("trial.drawn", "trial.inserted", "trial.reported", "outbox.sealed"),
    *("trial.before_tell", "trial.ended", "outbox.removed"),
]
TIMES = ("first", "middle", "last") if SHARE == 1 else ("first",)
TWO = ("study.trials=2", "study.workers=1", "study.confirm=2", "study.startup_trials=1")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[object]]:
    """The points that a driver passes, and the results of its study."""
    lab = tmp_path_factory.mktemp("recorded")
    (lab / "data").mkdir()
    (lab / "data" / "sample").symlink_to(DATA)
    order(lab, record=True)
    assert Parent(lab, [*TINY, *TWO], published=True).wait() == 0
    return lines_of(lab, "points"), results_of(lab)


@pytest.mark.long
@pytest.mark.parametrize(
    ("point", "when"),
    [(point, when) for point in POINTS for when in TIMES],
)
def test_a_driver_killed_at_a_point_loses_nothing(
    lab, run_sweep, recorded, point: str, when: str
) -> None:
    passed = recorded[0].count(point)
    count = {"first": 1, "middle": max(1, passed // 2), "last": passed}[when]
    order(lab, kill_at={"point": point, "count": count})
    killed = run_to_the_end(lambda: run_sweep(*TWO, published=True))
    # How many operations go out in one delivery depends on time, so the last may not come.
    assert killed == 1 or when == "last"
    assert_whole(lab, 2)
    assert results_of(lab) == recorded[1]
    kinds = Counter(
        run.tags["digitlab.kind"]
        for run in runs_of(lab)
        if run.tags["digitlab.state"] == "finished"
    )
    assert kinds["study"] == kinds["final"] == 1
    assert 1 <= kinds["champion"] <= 2  # a driver may die after it, and before it is noted


@pytest.mark.long
def test_every_point_of_the_driver_is_one_to_be_killed_at(recorded) -> None:
    assert set(recorded[0]) == set(POINTS)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "study",
    [("study.workers=1",), ("study.workers=2", "study.sampler=random", "study.pruner=none")],
    ids=["one-worker", "two-workers"],
)
def test_a_worker_killed_at_every_point_changes_nothing(
    lab, study, record_property, is_wanted
) -> None:
    """Nothing is trained in these workers; they and the driver are real processes."""
    study = (*STUDY, *study, "study.trials=3")
    orders = {"stub": True, "kill_nth": 0}
    order(lab, **orders)
    assert Parent(lab, [*TINY, *study]).wait() == 0
    results, count = results_of(lab), len((lab / "passed").read_text())
    record_property("points of workers", count)
    for number in filter(is_wanted, range(1, count + 1)):
        beside = lab.parent / f"killed-{number}"
        beside.mkdir()
        (beside / "data").symlink_to(lab / "data")
        order(beside, **orders | {"kill_nth": number})
        parent = Parent(beside, [*TINY, *study])
        assert parent.wait() == 0, (number, parent.log.read_text()[-2000:])
        assert len(lines_of(beside, "killed")) == 1, number
        assert_whole(beside, 3)
        assert results_of(beside) == results, number


@pytest.mark.parametrize("role", ["confirm", "final"])
@pytest.mark.long
def test_a_worker_that_dies_in_a_fit_is_replaced(lab, run_sweep, role: str) -> None:
    study = ("study.trials=2", "study.pruner=none", "study.confirm=2", "study.workers=1")
    study += ("study.confirm_fits=2",)
    jobs = {"confirm": 3, "final": 5}  # after two trials, and two confirmations
    order(lab, die={"point": "job.batch", "jobs": [jobs[role]]})
    assert run_sweep(*study).wait() == 0
    assert lines_of(lab, "killed") == ["worker job.batch"]
    assert_whole(lab, 2)
    states = Counter(run.tags["digitlab.state"] for run in runs_of(lab, kind=role))
    assert states == {"interrupted": 1, "finished": {"confirm": 2, "final": 1}[role]}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_eight_workers_share_two_hundred_trials(lab, run_sweep) -> None:
    trials = int(200 * SHARE)
    study = ("study.sampler=random", "study.pruner=none", "study.workers=8")
    parent = run_sweep(*study, f"study.trials={trials}")
    assert parent.wait(800) == 0
    assert_whole(lab, trials)
    assert "locked" not in parent.log.read_text()
    assert parent.log.read_text().count(" finished ") == trials
    assert len(lines_of(lab, "workers")) == 8


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_threads_and_memory_stay_as_they_are_over_five_hundred_trials(lab, run_sweep) -> None:
    trials = int(500 * SHARE)
    study = ("study.sampler=random", "study.pruner=none", "study.workers=2")
    parent = run_sweep(*study, f"study.trials={trials}")
    early: dict[int, tuple[int, int]] = {}
    late: dict[int, tuple[int, int]] = {}
    while parent.process.exitcode is None:
        parent.process.join(0.5)
        ended = sum(row.is_ended for row in rows_of(lab))
        sizes = {int(pid): size_of(int(pid)) for pid in lines_of(lab, "workers")}
        sizes[parent.process.pid] = size_of(parent.process.pid)
        if len(sizes) == 3 and all(threads for threads, _ in sizes.values()):
            if not early and ended >= 0.2 * trials:
                early = sizes
            if 0.8 * trials <= ended < trials:
                late = sizes
    assert parent.process.exitcode == 0
    assert_whole(lab, trials)
    assert len(early) == 3
    assert early.keys() == late.keys()
    for pid in early:
        assert late[pid][0] <= early[pid][0] + 1, "threads"
        assert late[pid][1] <= early[pid][1] * 1.1, "memory"


def size_of(pid: int | None) -> tuple[int, int]:
    """Return the threads of a process and its memory (kB); zeros when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    facts = dict(line.split(":\t", 1) for line in lines)
    return int(facts["Threads"]), int(facts.get("VmRSS", "0 kB").split()[0])
