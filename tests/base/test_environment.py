"""What a record says of the code and libraries that made it."""

from importlib.metadata import version
from pathlib import Path

import pytest

from digitlab.base.environment import describe_environment


def test_libraries_are_those_installed_and_not_those_that_another_brings_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = tmp_path / "brought-1.0.dist-info"
    brought.mkdir()
    (brought / "METADATA").write_text("Name: brought\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)  # as Ray does with its own
    libraries = describe_environment()["libraries"]
    assert "brought" not in libraries
    assert libraries["torch"] == version("torch")
