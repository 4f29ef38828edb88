"""Kill anything at any moment: a study ends with exactly its trials, each with its own value."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SHARE, TINY, Parent
from digitlab.study.audit import audit

from digitlab.config.compose import compose
from digitlab.records.mlflow import open_tracking
from digitlab.study.fingerprint import begun_config
from digitlab.study.storage import open_storage
from digitlab.study.trials import Search


def open_study(lab: Path, *overrides: str) -> Search:
    config = compose("sweep", [*TINY, *overrides])[0].config
    return Search(open_storage(lab), config)


def results(lab: Path) -> list[tuple[object, ...]]:
    rows = open_study(lab).rows()
    return [(row.number, row.state, row.value, row.values) for row in rows]


def problems(lab: Path, search: Search) -> list[object]:
    config = begun_config(search.notes())
    return list(audit(search, open_tracking(config, lab), config, repair=False))


def assert_whole(lab: Path, total: int) -> None:
    search = open_study(lab)
    rows = search.rows()
    assert [row.number for row in rows] == list(range(total))
    assert all(row.ended for row in rows)
    assert problems(lab, search) == []


def undisturbed(lab: Path, start: Callable[..., Parent], *overrides: str) -> list[object]:
    """The same study, uninterrupted, in a lab beside."""
    beside = lab.parent / "beside"
    beside.mkdir()
    (beside / "data").symlink_to(lab / "data")
    assert Parent(beside, [*TINY, *overrides]).wait(900) == 0
    return results(beside)


def kill_at_random(lab: Path, start: Callable[[], Parent], kills: int, seed: int) -> int:
    """Run a study to its end while workers kill themselves and the parent is killed.

    Returns the number of kills, about half of them the parent's.
    """
    chance = random.Random(seed)
    orders = {"probability": 0.04, "left": (kills + 1) // 2}
    (lab / "killer.json").write_text(json.dumps(orders))
    parents = 0
    while True:
        parent = start()
        if parents < kills // 2:
            parent.process.join(chance.uniform(0.3, 3.0))
            if parent.process.exitcode is None:
                parent.kill()
                parents += 1
                continue
        assert parent.wait(600) == 0, parent.log.read_text()[-2000:]
        killed = lab / "killed"
        return parents + (len(killed.read_text().splitlines()) if killed.exists() else 0)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_nothing_is_lost_or_doubled_over_a_hundred_kills(lab, run_sweep) -> None:
    trials, kills = int(150 * SHARE), int(100 * SHARE)
    study = ("study.sampler=random", "study.pruner=none", "study.workers=2")
    study += (f"study.trials={trials}",)
    assert kill_at_random(lab, lambda: run_sweep(*study), kills, seed=2) >= kills
    assert_whole(lab, trials)
    assert results(lab) == undisturbed(lab, run_sweep, *study)


@pytest.mark.parametrize("kind", ["confirm", "final"])
def test_worker_that_dies_in_a_fit_leaves_no_run(lab, run_sweep, kind) -> None:
    orders = {"probability": 1, "left": 1, "only": [kind, "before batch"]}
    (lab / "killer.json").write_text(json.dumps(orders))
    assert run_sweep("study.pruner=none", "study.confirm=2").wait() == 0
    assert (lab / "killed").read_text() == "before batch\n"
    assert_whole(lab, 3)


@pytest.mark.long
def test_one_worker_killed_five_times_gives_the_same_trials(lab, run_sweep) -> None:
    study = (
        "study.trials=8",
        "study.startup_trials=3",
        "study.workers=1",
        "study.rungs=[0.3,0.6]",
    )
    kills = 0
    while kills < 5:
        before = len(open_study(lab).rows()) if kills else 0
        parent = run_sweep(*study)
        deadline = time.monotonic() + 60
        while len(open_study(lab).rows()) < min(8, before + 1) and time.monotonic() < deadline:
            time.sleep(0.05)
        parent.kill()
        kills += 1
    assert run_sweep(*study).wait() == 0
    assert_whole(lab, 8)
    assert results(lab) == undisturbed(lab, run_sweep, *study)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_eight_workers_share_two_hundred_trials(lab, run_sweep) -> None:
    trials = int(200 * SHARE)
    study = ("study.sampler=random", "study.pruner=none", "study.workers=8")
    parent = run_sweep(*study, f"study.trials={trials}")
    assert parent.wait(800) == 0
    assert_whole(lab, trials)
    log = parent.log.read_text()
    assert "locked" not in log
    assert log.count(" finished ") == trials


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_threads_and_memory_stay_as_they_are_over_five_hundred_trials(lab, run_sweep) -> None:
    trials = int(500 * SHARE)
    study = ("study.sampler=random", "study.pruner=none", "study.workers=2")
    parent = run_sweep(*study, f"study.trials={trials}")
    early: list[tuple[int, int]] = []
    late: list[tuple[int, int]] = []
    while parent.process.exitcode is None:
        ended = sum(row.ended for row in open_study(lab).rows()) if late or early else 0
        sizes = worker_sizes(lab)
        if len(sizes) == 2 and (50 <= ended < 100 or not early):  # one of them may be ending
            early = sizes
        if len(sizes) == 2 and ended >= 0.8 * trials:
            late = sizes
        parent.process.join(1)
    assert parent.process.exitcode == 0
    assert_whole(lab, trials)
    assert len(early) == len(late) == 2
    for before, after in zip(early, late, strict=True):
        assert after[0] <= before[0] * 1.1, "threads"
        assert after[1] <= before[1] * 1.1, "memory"


def worker_sizes(lab: Path) -> list[tuple[int, int]]:
    """(threads, resident kB) of each process that holds the sign of the study's workers."""
    sizes = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = [str(fd.readlink()) for fd in (process / "fd").iterdir()]
            lines = (process / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        if (
            str(lab / "locks" / "smoke.workers") in held
            and str(lab / "locks" / "smoke.parent") not in held
        ):
            facts = dict(line.split(":\t", 1) for line in lines)
            if "VmRSS" in facts:  # one that is ending has given its memory back
                sizes.append((int(facts["Threads"]), int(facts["VmRSS"].split()[0])))
    return sorted(sizes)
