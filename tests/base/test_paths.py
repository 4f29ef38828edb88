"""Where the lab is, what its `.env` may set, and which checkout's code works there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from digitlab.base import paths
from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT, lab_folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, lab: Path) -> None:
    """What a test sets goes with it; no name of a store is set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "MLFLOW_TRACKING"))}
    monkeypatch.setattr(os, "environ", clean)


def write_env(lab: Path, content: str | bytes, mode: int = 0o600) -> None:
    (lab / ".env").write_bytes(content if isinstance(content, bytes) else content.encode())
    (lab / ".env").chmod(mode)


def test_env_file_sets_the_known_names_that_are_not_set(lab: Path) -> None:
    os.environ["PGUSER"] = "mine"
    write_env(
        lab, "PGUSER=other\n# a comment\nexport PGPASSWORD='pa$$word'\nMLFLOW_TRACKING_TOKEN=a$PATH"
    )
    assert lab_folder() == lab
    assert os.environ["PGUSER"] == "mine"
    assert os.environ["PGPASSWORD"] == "pa$$word"
    assert os.environ["MLFLOW_TRACKING_TOKEN"] == "a$PATH"  # as it was written


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("PATH=/tmp", "PATH does not belong there"),
        ("LD_PRELOAD=/tmp/x.so", "LD_PRELOAD does not belong there"),
        ("PYTHONPATH=/tmp", "PYTHONPATH does not belong there"),
        ("PGPASWORD=x", "did you mean PGPASSWORD"),
        ("PGPASSWORD", "PGPASSWORD has no value"),
        (b"PGPASSWORD=\xff", "cannot be read"),
        (b"PGPASSWORD=a\0b", "must hold no zero byte"),
    ],
)
def test_env_file_with_anything_else_is_refused_in_one_line(
    lab: Path, content: str | bytes, reason: str
) -> None:
    before = dict(os.environ)
    write_env(lab, content)
    with pytest.raises(UserError, match=reason) as raised:
        lab_folder()
    assert str(lab / ".env") in str(raised.value)
    assert os.environ == before


def test_env_file_that_is_a_pipe_is_refused_and_not_waited_for(lab: Path) -> None:
    os.mkfifo(lab / ".env")
    with pytest.raises(UserError, match=r"\.env is a pipe or a device: it must be a file"):
        lab_folder()


@pytest.mark.parametrize(("mode", "warns"), [(0o644, 1), (0o640, 1), (0o600, 0), (0o400, 0)])
def test_env_file_that_others_may_read_is_said_once(
    lab: Path, capsys: pytest.CaptureFixture[str], mode: int, warns: int
) -> None:
    write_env(lab, "PGPASSWORD=x", mode)
    lab_folder()
    lab_folder()
    err = capsys.readouterr().err
    assert (err.count("\n"), err.count(f"chmod 600 {lab}/.env")) == (warns, warns)


@pytest.mark.parametrize(
    ("place", "reason"),
    [("~nobody of this name/lab", "home directory"), ("x" * 300, "File name too long")],
)
def test_a_lab_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, place: str, reason: str
) -> None:
    monkeypatch.setenv("DIGITLAB_HOME", place)
    with pytest.raises(UserError, match=f"the lab {place} is invalid: it must be .*{reason}"):
        lab_folder()


def test_a_lab_with_a_zero_byte_in_its_name_is_refused() -> None:
    with pytest.raises(UserError, match="is invalid: it must be a folder"):
        lab_folder(Path("a\0b"))


# A checkout that was copied


def test_code_of_another_checkout_is_refused_where_a_copy_is_worked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "copy/src/digitlab").mkdir(parents=True)
    (tmp_path / "copy/inside").mkdir()
    for folder in ("copy", "copy/inside"):
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(UserError, match="Run `make setup` in the copy first"):
            lab_folder()
    monkeypatch.setattr(paths, "ROOT", tmp_path / "copy")
    lab_folder()


def make(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["make", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_copied_or_moved_checkout_is_installed_again(tmp_path: Path) -> None:
    one, copy, moved = (tmp_path / name for name in ("one", "a copy", "moved"))
    one.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, one)
    stamp = make(one, "-n", "setup").split("touch ")[1].split()[0]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls; test "$1" = -c\n')
    python.chmod(0o755)
    bin_folder = one / ".venv/bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "pip").write_text(f"#!{bin_folder}/python\n")
    (one / stamp).touch()
    shutil.copytree(one, copy)
    assert "Nothing to be done" in make(one, "setup")
    make(copy, "setup", f"PYTHON={python}")
    assert (
        "-m venv --clear .venv" in (tmp_path / "calls").read_text()
    )  # not its pip, the original's
    (tmp_path / "calls").unlink()
    one.rename(moved)
    make(moved, "setup", f"PYTHON={python}")
    assert "-m venv --clear .venv" in (tmp_path / "calls").read_text()
