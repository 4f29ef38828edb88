"""What a person sees of a study on a terminal, or in a log where there is none."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_MOST = 16  # workers that are shown one by one; of a thousand, the rest are counted
_PLAIN_SECONDS = 20.0  # between two lines about running trials, where there is no terminal


@dataclass(frozen=True)
class Busy:
    """One worker's line: what it runs and how far it is."""

    worker: int
    title: str
    done: float  # fraction
    epoch: int
    epochs: int
    accuracy: float | None


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
    """A table that changes in place on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.live: Live | None = None
        self.muted = False
        self.last = 0.0

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            # No thread of its own: it is refreshed by `show`.
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.live is not None and not self.muted:
            self.live.stop()

    def mute(self) -> None:
        """The terminal has gone away: nothing can be shown any more."""
        self.muted = True

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.muted:
            self.console.print(Text(text))

    def print(self, what: Any) -> None:
        if not self.muted:
            self.console.print(what)

    def show(self, view: View) -> None:
        """The state now; where there is no terminal, a line now and then."""
        if self.muted:
            return
        if self.live is not None:
            self.live.update(_draw(view), refresh=True)
        elif time.monotonic() - self.last > _PLAIN_SECONDS:
            self.last = time.monotonic()
            self.say(_line(view))


def _line(view: View) -> str:
    running = "; ".join(
        f"{busy.title} epoch {busy.epoch}/{busy.epochs}"
        + (f" {busy.accuracy:.2%}" if busy.accuracy is not None else "")
        for busy in view.busy[:_MOST]
    ) + _more(view)
    parts = [f"{view.phase} {view.done} of {view.total}", view.best, duration(view.seconds_left)]
    return " | ".join(part for part in [*parts, running] if part)


def _draw(view: View) -> Group:
    head = Text(f"{view.phase}  {view.done} of {view.total}", style="bold")
    for part in (view.best, duration(view.seconds_left)):
        if part:
            head.append(f"   {part}", style="default")
    table = Table.grid(padding=(0, 2))
    for busy in view.busy[:_MOST]:
        accuracy = f"{busy.accuracy:.2%}" if busy.accuracy is not None else ""
        epoch = f"epoch {busy.epoch}/{busy.epochs}"
        bar = ProgressBar(total=1.0, completed=busy.done, width=20)
        table.add_row(f"worker {busy.worker}", Text(busy.title), bar, epoch, accuracy)
    if _more(view):
        table.add_row(Text(_more(view)))
    whole = ProgressBar(total=max(1, view.total), completed=view.done, width=60)
    return Group(head, whole, table)


def _more(view: View) -> str:
    return f" and {len(view.busy) - _MOST} more" if len(view.busy) > _MOST else ""


def duration(seconds: float | None) -> str:
    """'about 3 min left' and the like; empty when it is not known."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f"about {minutes} min left" if minutes else "less than a minute left"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Rows of plain values; the first column to the left, numbers to the right."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        drawn.add_row(*(Text(str(value)) for value in row))
    return drawn
