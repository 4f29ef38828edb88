"""A lab of its own for each test, with the 2,500 digits that are committed beside the tests."""

import os
import shutil
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"

os.environ["DIGITLAB_HOME"] = "/nonexistent"  # no test touches a person's lab


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty lab but for the sample of digits; also what the command line takes for its lab."""
    folder = tmp_path / "lab"
    shutil.copytree(DATA, folder / "data" / "sample", ignore=shutil.ignore_patterns("*.md"))
    monkeypatch.setenv("DIGITLAB_HOME", str(folder))
    return folder
