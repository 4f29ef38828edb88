"""Checkpoints in a lab: the last two are kept, a damaged one is passed over."""

from pathlib import Path

import pytest

from digitlab.base import files
from digitlab.records.checkpoints import CheckpointFolder


def test_the_last_two_are_kept_and_the_last_one_is_given(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "key")
    assert folder.latest() is None
    for number in range(12):
        folder.add(f"{number}".encode())
    assert folder.latest() == b"11"
    assert len(list(folder.folder.iterdir())) == 2
    assert CheckpointFolder(tmp_path, "key").latest() == b"11"
    assert CheckpointFolder(tmp_path, "other").latest() is None


def test_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "key")
    for content in (b"one", b"two"):
        folder.add(content)
    older, newer = sorted(folder.folder.iterdir())
    (folder.folder / "notes-old.txt").write_text("not ours")
    newer.write_bytes(b"twp")
    assert folder.latest() == b"one"
    older.write_bytes(b"")
    assert folder.latest() is None
    folder.add(b"three")
    assert folder.latest() == b"three"


def test_a_write_that_was_cut_off_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path, "key")
    folder.add(b"one")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fail)
        folder.add(b"two")
    assert len(list(folder.folder.iterdir())) == 2  # with what the write has left
    assert folder.latest() == b"one"
    folder.add(b"three")
    assert folder.latest() == b"three"


def test_all_go_at_the_end(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "key")
    folder.remove()  # where there is none
    folder.add(b"one")
    folder.remove()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_who_has_used_none_removes_none(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "key")
    folder.add(b"one")
    other = CheckpointFolder(tmp_path, "key")
    other.remove()
    assert other.latest() == b"one"
    other.remove()
    assert folder.latest() is None


def test_another_process_that_trains_the_same_keeps_its_newer_checkpoints(tmp_path: Path) -> None:
    mine, others = CheckpointFolder(tmp_path, "key"), CheckpointFolder(tmp_path, "key")
    mine.add(b"1")
    others.add(b"2")
    mine.remove()
    assert CheckpointFolder(tmp_path, "key").latest() == b"2"
    others.remove()
    assert list((tmp_path / "checkpoints").iterdir()) == []
