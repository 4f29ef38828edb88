"""The board on a terminal, and in a log where there is none."""

import io
import sys

import pytest
from rich.console import Console

from digitlab.base import console
from digitlab.base.console import Board, Busy, View, duration, table

VIEW = View("trials", 3, 10, "best 99.00 % (trial 1)", 130.0, [
    Busy(0, "trial 4", 0.5, 2, 3, 0.9812), Busy(1, "trial 5", 0.0, 1, 3, None),
])  # fmt: skip


@pytest.mark.parametrize("forced", [True, False])
def test_file_gets_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, forced: bool) -> None:
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", file := io.StringIO())
    with Board() as board:
        board.say("begins")
        board.show(VIEW)
        board.show(VIEW)  # too soon
        board.print(table("numbers", ["name", "value"], [["x", 1]]))
    assert board.live is None
    assert "\x1b" not in file.getvalue()
    assert file.getvalue().splitlines()[:2] == [
        "begins",
        "trials 3 of 10 | best 99.00 % (trial 1) | about 2 min left | "
        "trial 4 epoch 2/3 98.12%; trial 5 epoch 1/3",
    ]
    assert file.getvalue().count("trial 4") == 1


def test_terminal_gets_a_display_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", file := Terminal())
    with Board() as board:
        assert board.live is not None
        board.show(VIEW)
        many = [Busy(i, f"trial {i}", 0.1, 1, 3, None) for i in range(console._MOST + 4)]
        board.show(View("trials", 3, 10, "", None, many))
        board.mute()
        board.say("nobody reads this")
    assert "worker 1" in file.getvalue()
    assert "and 4 more" in file.getvalue()
    assert "nobody" not in file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (10, "less than a minute left"), (150, "about 2 min left")]
)
def test_duration_is_in_words(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("width", "shown"), [(24, "smoke-final-0-1000"), (14, "smok…-1000"), (9, "sm…00")]
)
def test_a_name_that_does_not_fit_loses_its_middle(width: int, shown: str) -> None:
    drawn = table("", ["name"], [["smoke-final-0-1000"]], is_cut=True)
    file = io.StringIO()
    Console(file=file, width=width).print(drawn)
    assert shown in file.getvalue().replace(" ", "")
    assert len(file.getvalue().splitlines()) == 5
