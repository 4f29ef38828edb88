"""A study killed at its n-th fault point for every n, and again at the m-th after the restart."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Wanted
from enumeration import (
    KILLED,
    SENT,
    VALUES,
    Clock,
    Course,
    new_lab,
    resume,
    run_study,
    states_of,
    undisturbed,
)

COURSES = {f"{n}-{sent}": Course(n, sent) for n in VALUES for sent in SENT}
MLFLOW = {name: Course(it.workers, it.sent, "mlflow") for name, it in COURSES.items()}
SHARDS = 8  # of the pairs of a course, each a test of its own


def kill_at_points(course: Course, tmp_path: Path, is_wanted: Wanted) -> tuple[int, list[str]]:
    """Kill a study at each point that is wanted; return how many points it has, and what failed."""
    reference, count = undisturbed(course, tmp_path / "undisturbed")
    wrong = []
    for number in filter(is_wanted, range(1, count + 1)):
        lab = new_lab(tmp_path / "lab")
        assert run_study(Clock(course, number, lab=lab)) == KILLED
        if problem := resume(lab, course, reference):
            wrong.append(f"{number}: {problem}")
        shutil.rmtree(lab)
    return count, wrong


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["1-late", "2-sealed"])
def test_a_study_goes_on_from_some_points(name: str, tmp_path: Path) -> None:
    assert kill_at_points(MLFLOW[name], tmp_path, lambda number: number % 25 == 3)[1] == []


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", MLFLOW)
def test_a_study_goes_on_from_every_point(
    name: str, tmp_path: Path, is_wanted: Wanted, record_property: Callable[[str, object], None]
) -> None:
    """Killed in earnest, with the real MLflow."""
    count, wrong = kill_at_points(MLFLOW[name], tmp_path, is_wanted)
    record_property("points", count)
    assert wrong == []


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("name", COURSES)
def test_a_study_goes_on_from_every_pair_of_points(
    name: str,
    shard: int,
    tmp_path: Path,
    is_wanted: Wanted,
    record_property: Callable[[str, object], None],
) -> None:
    """At each point the lab is copied: that is what a kill there leaves, and what goes on."""
    course = COURSES[name]
    reference, _ = undisturbed(course, tmp_path / "undisturbed")
    first = states_of(Clock(course, lab=new_lab(tmp_path / "lab"), states=tmp_path / "first"))
    pairs, wrong = 0, []
    for state in (one for i, one in enumerate(first) if i % SHARDS == shard):
        number = int(state.name)
        if not is_wanted(number):
            continue
        for again in states_of(Clock(course, lab=state, states=tmp_path / "second")):
            if is_wanted(number, int(again.name)):
                pairs += 1
                if problem := resume(again, course, reference):
                    wrong.append(f"{number}/{int(again.name)}: {problem}")
        shutil.rmtree(tmp_path / "second")
    record_property("states of the first kill", len(first))
    record_property("pairs", pairs)
    assert wrong == []
