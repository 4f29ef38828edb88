"""Ctrl-C and its relatives: once, what runs ends at its next batch; twice, at once."""

import os
import signal
from collections.abc import Callable
from types import FrameType

_IMPORT = "<frozen importlib"  # what Python calls the files of its import system


def end_imports_quietly() -> None:
    """Let Ctrl-C end the process at once, without a traceback, while it imports.

    Some libraries catch what is raised in the middle of their import, and go on without a part.
    """

    def interrupt(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith(_IMPORT):
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, interrupt)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """Whether a person, a scheduler or a closed terminal asked this process to stop."""

    def __init__(self) -> None:
        # Called before a second signal ends the process.
        self.on_second: Callable[[], None] = lambda: None
        self.count = 0
        self.has_terminal = True  # until SIGHUP reports that it has gone

    def __call__(self) -> bool:
        return self.count > 0

    def __enter__(self) -> "StopSignal":
        # A signal that is ignored at the start stays ignored: that is what nohup asks for.
        handled = [name for name in _SIGNALS if signal.getsignal(name) is not signal.SIG_IGN]
        self.before = {name: signal.signal(name, self._count) for name in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _count(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        if number == signal.SIGHUP:
            self.has_terminal = False
        if self.count > 1:
            self.on_second()
            os._exit(130)
