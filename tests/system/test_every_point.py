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
    stubs,
    undisturbed,
)
from leading import lead
from scripted import Losing

from digitlab.results import publish

COURSES = {f"{n}-{sent}": Course(n, sent) for n in VALUES for sent in SENT}
MLFLOW = {name: Course(it.workers, it.sent, "mlflow") for name, it in COURSES.items()}
MOST_POINTS = 1000  # of a study's driver
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


def kill_around_losses(
    course: Course, tmp_path: Path, is_wanted: Callable[[int, int], bool]
) -> tuple[int, int, list[str]]:
    """Lose a worker at each of its events, and kill the driver at each of its points besides.

    Returns:
        How many events there are, how many pairs were gone through, and what failed.
    """
    reference, _ = undisturbed(course, tmp_path / "undisturbed")
    events, pairs, wrong = count_events(course, tmp_path / "counted"), 0, []
    for event in range(1, events + 1):
        if not any(is_wanted(event, point) for point in range(1, MOST_POINTS)):
            continue
        lab = new_lab(tmp_path / "lab")
        lost = Clock(course, lab=lab, states=tmp_path / "states", write=Losing(event))
        for state in states_of(lost):
            if is_wanted(event, int(state.name)):
                pairs += 1
                if problem := resume(state, course, reference):
                    wrong.append(f"{event}/{int(state.name)}: {problem}")
        for folder in (lab, tmp_path / "states"):
            shutil.rmtree(folder)
    return events, pairs, wrong


def count_events(course: Course, lab: Path) -> int:
    """Return how many events the workers of an undisturbed study report."""
    write = Losing()
    with stubs(Clock(course, lab=new_lab(lab))):
        status, _ = lead(
            lab, write, *course.overrides, count=course.workers, publish=publish.publish
        )
    assert status == 0
    return write.count


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_goes_on_from_some_losses_of_a_worker(tmp_path: Path) -> None:
    some = lambda event, point: event % 6 == 2 and point % 20 == 5  # noqa: E731
    _, pairs, wrong = kill_around_losses(COURSES["1-late"], tmp_path, some)
    assert wrong == []
    assert pairs >= 6


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", COURSES)
def test_a_study_goes_on_from_every_loss_of_a_worker(
    name: str, tmp_path: Path, is_wanted: Wanted, record_property: Callable[[str, object], None]
) -> None:
    """A worker's death at each of its events, and the driver's at each point before and after."""
    events, pairs, wrong = kill_around_losses(COURSES[name], tmp_path, is_wanted)
    record_property("events of workers", events)
    record_property("pairs", pairs)
    assert wrong == []
