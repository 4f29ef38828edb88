"""A study of which a call that changes the lab fails, and what a power loss may leave of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from io_faults import start

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="a C compiler is needed")
# Of the program that enumerates them
PROGRAMS = {"io_faults.py": "calls", "power_loss.py": "crash states"}
Count = Callable[[str, object], None]


def enumerate_by(program: str, folder: Path, *arguments: str) -> dict[str, Any]:
    ended = start(program, folder, *arguments)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(json.loads(ended.stdout))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_study_goes_on_from_some(program: str, tmp_path: Path) -> None:
    assert enumerate_by(program, tmp_path, "plain", "60")["wrong"] == []


@pytest.mark.exhaustive
@pytest.mark.timeout(36000)
@pytest.mark.parametrize("tracker", ["plain", "mlflow"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_study_goes_on_from_all(
    program: str,
    tracker: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Count,
) -> None:
    only = request.config.getoption("--number")
    found = enumerate_by(program, tmp_path, tracker, "1", *([only] if only else []))
    record_property(f"{PROGRAMS[program]} {found['checked']}", found["count"])
    assert found["wrong"] == []
