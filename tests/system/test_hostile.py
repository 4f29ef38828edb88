"""Hostile inputs for everything that reads: read, or refused in one line, within the limits.

tests/support/hostile.py shows what becomes of one by its number.
"""

from pathlib import Path

import pytest
from hostile import READERS, read_all

MOST_MB = 1024  # that an input may take
COUNT = 200  # inputs of each reader, but for those that take the longest
COUNTS = {"Names": 40, "Variables": 60, "Bundles": 60, "Recipes": 120}
MANY = 10_000


def check(name: str, count: int, folder: Path) -> None:
    outcome = read_all(name, 0, count, folder)
    texts = [f"{name} {number}: {text}" for number, text in outcome.faults]
    assert not texts, f"{len(texts)} faults\n" + "\n\n".join(texts[:5])
    assert outcome.count == count
    assert outcome.refused > 0
    assert outcome.peak_mb < MOST_MB


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_hostile_inputs_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    check(name, COUNTS.get(name, COUNT), tmp_path)


@pytest.mark.exhaustive
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_hostile_inputs_are_read_or_refused(name: str, tmp_path: Path) -> None:
    check(name, MANY, tmp_path)
