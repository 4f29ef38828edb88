"""Repeated attempts at what a server may refuse for a while."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 15.0
_STOP_POLL_S = 0.1  # how long a stop request may go unheard while waiting


def retry(
    attempt: Callable[[], _T],
    is_transient: Callable[[Exception], bool],
    timeout_s: float,
    stopped: Callable[[], bool] = lambda: False,
) -> _T:
    """Return what `attempt` returns; repeat it with exponential back-off while its error passes.

    Args:
        is_transient: whether waiting can help against an error.
        stopped: whether a person asked to stop.

    Raises:
        The last error: it is not transient, or `timeout_s` have passed.
        KeyboardInterrupt: `stopped` became true while waiting.
    """
    deadline, wait = time.monotonic() + timeout_s, _FIRST_WAIT_S
    while True:
        try:
            return attempt()
        except Exception as error:
            if not is_transient(error) or time.monotonic() + wait > deadline:
                raise
        # Jitter, so that many clients of one server do not all come back at once.
        until = time.monotonic() + random.uniform(wait / 2, wait)  # noqa: S311
        while time.monotonic() < until:
            if stopped():
                raise KeyboardInterrupt
            time.sleep(min(_STOP_POLL_S, max(0.0, until - time.monotonic())))
        wait = min(2 * wait, _LONGEST_WAIT_S)
