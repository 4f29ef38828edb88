"""Open a study that a test has run, and say whether it is whole."""

from functools import cache
from pathlib import Path

from conftest import TINY

from digitlab.config.compose import compose
from digitlab.config.types import Config
from digitlab.records.record import open_records
from digitlab.records.tracker import RunRow
from digitlab.results.audit import Problem, find_all
from digitlab.study.goal import TrialRow
from digitlab.study.storage import open_storage
from digitlab.study.trials import TrialStore, load_study


def rows_of(lab: Path, name: str = "smoke", address: str | None = None) -> list[TrialRow]:
    """Return a study's trials; none where it does not exist yet."""
    try:
        return load_study(lab, name, address)[0].rows()
    except ValueError:
        return []


def states_of(lab: Path, name: str = "smoke") -> list[str]:
    return [row.state for row in rows_of(lab, name)]


def results_of(lab: Path, name: str = "smoke") -> list[tuple[object, ...]]:
    return [(row.number, row.state, row.value, row.values) for row in rows_of(lab, name)]


def runs_of(lab: Path, name: str = "smoke", **tags: str) -> list[RunRow]:
    """Return the runs of a study, with more tags such as kind="trial"; none where it is not yet."""
    try:
        store, config = load_study(lab, name)
    except ValueError:
        return []
    own = {f"digitlab.{key}": value for key, value in tags.items()}
    with open_records(config, lab) as records:
        return records.tracker.find({"digitlab.study_id": store.study_id} | own)


def problems_of(lab: Path, name: str = "smoke") -> list[Problem]:
    """Return what an audit finds, files included."""
    store, config = load_study(lab, name)
    with open_records(config, lab) as records:
        return find_all(store, config, records.tracker)


def assert_whole(lab: Path, total: int, name: str = "smoke") -> None:
    """Exactly `total` trials, all ended, each with its run, all records as they were written."""
    rows = rows_of(lab, name)
    assert [row.number for row in rows] == list(range(total))
    assert all(row.is_ended for row in rows)
    assert problems_of(lab, name) == []


@cache
def _config(overrides: tuple[str, ...]) -> Config:
    return compose("sweep", [*TINY, *overrides])[0].config


def open_store(lab: Path, *overrides: str, address: str | None = None) -> TrialStore:
    """Open or create a study of the smallest configuration, as its driver does."""
    return TrialStore(open_storage(lab, address), _config(overrides))
