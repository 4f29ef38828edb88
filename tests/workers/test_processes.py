"""Worker processes: what the contract suite cannot say for all kinds of workers."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from trackers import CODE

from digitlab.base.errors import UserError
from digitlab.workers import processes

_PRELOAD = """
import tempfile
from digitlab.workers import processes
processes._CONTEXT.set_forkserver_preload = lambda _: None
processes.preload()
process = processes._CONTEXT.Process(target=print, args=("forked",))
process.start()
process.join()
print(tempfile.gettempdir())
"""


def test_workers_start_where_the_temporary_folder_has_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 90)
    folder.mkdir()
    place = os.environ | CODE | {"TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", _PRELOAD], env=place, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["forked", str(folder)]


def test_long_temporary_folder_without_another_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "/nonexistent/" + "d" * 90
    monkeypatch.setattr(tempfile, "tempdir", long)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"TMPDIR={long} is too long"), processes._short_folder():
        pass
