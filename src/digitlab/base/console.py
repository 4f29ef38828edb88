"""What a person sees of a study on a terminal, or in a log where there is none."""

import io
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from digitlab.base.errors import visible

_MOST = 16  # workers that are shown one by one; of a thousand, the rest are counted
_LEAST_WIDTH, _LEAST_TABLE = 60, 76  # characters of a line, and of one of a table
_PLAIN_INTERVAL_S = 20.0  # between two lines about running trials, where there is no terminal


@dataclass(frozen=True)
class Busy:
    """One worker's line: what it runs and how far it is."""

    worker: int
    title: str
    done: float  # fraction
    epoch: int
    epochs: int
    accuracy: float | None

    def text(self) -> str:
        accuracy = "" if self.accuracy is None else f" {self.accuracy:.2%}"
        return f"{self.title} epoch {self.epoch}/{self.epochs}{accuracy}"


@dataclass(frozen=True)
class View:
    """The state of a phase of a study."""

    phase: str
    done: int
    total: int
    best: str
    seconds_left: float | None
    busy: Sequence[Busy]


class Board:
    """A display that changes in place on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        # FORCE_COLOR must not turn a file into a terminal: escape codes would fill the log.
        terminal = None if sys.stdout.isatty() else False
        self.console = _console(force_terminal=terminal)
        self.live: Live | None = None
        self.muted = False
        self.last = 0.0

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            # No thread of its own: `show` refreshes it.
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None and not self.muted:
            self.live.stop()

    def mute(self) -> None:
        """Print nothing any more: the terminal has gone away."""
        self.muted = True

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.print(Text("\n".join(map(visible, text.split("\n")))))

    def print(self, what: Any) -> None:
        if not self.muted:
            self.console.print(what)

    def show(self, view: View) -> None:
        """Show the present state; where there is no terminal, print a line now and then."""
        if self.muted:
            return
        more = f" and {len(view.busy) - _MOST} more" if len(view.busy) > _MOST else ""
        head = [f"{view.phase} {view.done} of {view.total}", view.best, duration(view.seconds_left)]
        if self.live is not None:
            whole = ProgressBar(total=max(1, view.total), completed=view.done, width=60)
            lines = Table.grid(padding=(0, 2))
            for busy in view.busy[:_MOST]:
                bar = ProgressBar(total=1.0, completed=busy.done, width=20)
                lines.add_row(f"worker {busy.worker}", bar, Text(busy.text()))
            title = Text("   ".join(filter(None, head)), style="bold")
            self.live.update(Group(title, whole, lines, Text(more)), refresh=True)
        elif time.monotonic() - self.last > _PLAIN_INTERVAL_S:
            self.last = time.monotonic()
            running = "; ".join(busy.text() for busy in view.busy[:_MOST]) + more
            self.say(" | ".join(filter(None, [*head, running])))


@dataclass(frozen=True)
class _Cut:
    """A text on one line, without its middle where it does not fit: names differ at their ends."""

    text: str

    def __rich_measure__(self, _console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, cell_len(self.text)).with_maximum(options.max_width)

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[Text]:
        text, width = self.text, options.max_width
        if cell_len(text) > width:
            end = text[max(0, len(text) - width // 2) :]
            while cell_len(end) > width // 2:
                end = end[1:]
            text = set_cell_size(text, max(0, width - cell_len(end) - 1)) + f"…{end}"
        yield Text(text, no_wrap=True, overflow="ellipsis")


def duration(seconds: float | None) -> str:
    """Return 'about 3 min left' and the like; empty when it is not known."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f"about {minutes} min left" if minutes else "less than a minute left"


def print_table(drawn: Table) -> None:
    console = _console()
    console.width = max(console.width, _LEAST_TABLE)  # or the first column, the names, would go
    console.print(drawn)


class _Console(Console):
    """Raises the BrokenPipeError that Rich turns into an end of the process with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(**how: Any) -> Console:
    """Return a console; a terminal that is too narrow for a table wraps its lines."""
    console = _Console(highlight=False, soft_wrap=True, **how)
    console.width = max(console.width, _LEAST_WIDTH)
    return console


class _Outlet(io.FileIO):
    """A pipe whose writer outlives its reader: what is written after that goes nowhere."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            _mute(self.fileno())
            return memoryview(data).nbytes


def _mute(descriptor: int) -> None:
    """Let what is written there go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def outlive_reader() -> Iterator[None]:
    """Let what is printed here never end the work, as of `digitlab sweep | head`."""
    before = sys.stdout
    if not isinstance(before, io.TextIOWrapper) or not _is_pipe(before):
        yield
        return
    try:
        before.flush()
    except BrokenPipeError:
        _mute(before.fileno())
    outlet = io.BufferedWriter(_Outlet(before.fileno(), "w", closefd=False))
    is_by_line = before.line_buffering
    sys.stdout = io.TextIOWrapper(outlet, before.encoding, before.errors, line_buffering=is_by_line)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before


def _is_pipe(stream: io.TextIOWrapper) -> bool:
    with suppress(OSError):  # it has no descriptor, or a closed one
        return stat.S_ISFIFO(mode := os.fstat(stream.fileno()).st_mode) or stat.S_ISSOCK(mode)
    return False


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], is_cut: bool = False
) -> Table:
    """Return a table of plain values: the first column to the left, numbers to the right.

    Args:
        is_cut: whether texts of the first column lose their middle where a line would not fit.
    """
    drawn = Table(title=title or None, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", no_wrap=is_cut and i > 0)
    for first, *others in rows:
        name = visible(str(first))
        drawn.add_row(
            _Cut(name) if is_cut else Text(name), *(Text(visible(str(value))) for value in others)
        )
    return drawn
