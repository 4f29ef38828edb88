"""What a record says of the code and libraries that made it."""

from importlib.metadata import version
from pathlib import Path

import pytest

from digitlab.base import environment
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


def test_code_is_that_of_the_first_call_since_a_process_goes_on_with_what_it_has_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    before = describe_environment()
    monkeypatch.setattr(environment, "source_digest", lambda: "changed")
    assert describe_environment() == before
