"""What happens in a page's server, for every tab: also for one that is opened in the middle."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

_MOST_TABS = 20  # that listen at once


class EventLog:
    """The events since the server started; any thread publishes, tabs read all of them."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = [{"kind": "session"}]  # a tab forgets what it knew
        self._changed = asyncio.Event()  # set and replaced at each event
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tabs = 0
        self.is_closed = False

    def publish(self, kind: str, **content: Any) -> None:
        self._events.append({"kind": kind, **content})
        self._wake()

    def close(self) -> None:
        """End all streams."""
        self.is_closed = True
        self._wake()

    @property
    def is_full(self) -> bool:
        return self._tabs >= _MOST_TABS

    def _wake(self) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the server has ended
                self._loop.call_soon_threadsafe(self._replace)

    def _replace(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def stream(self) -> AsyncIterator[str]:
        """Yield server-sent events: all so far, and each that comes, until the log is closed."""
        self._loop = asyncio.get_running_loop()
        self._tabs += 1
        place = 0
        try:
            while not self.is_closed:
                changed = self._changed
                while place < len(self._events):
                    event, place = self._events[place], place + 1
                    is_old = event["kind"] == "progress" and place < len(self._events)
                    if not is_old:
                        yield f"data: {json.dumps(event)}\n\n"
                await changed.wait()
        finally:
            self._tabs -= 1
