"""Repeated attempts: what is repeated, until when, and what is raised."""

import time

import pytest

from digitlab.base.retry import retry


class Away(Exception):
    pass


def is_away(error: Exception) -> bool:
    return isinstance(error, Away)


def failing(times: int, error: type[Exception] = Away):
    left = [times]

    def attempt() -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise error(f"{left[0]} left")
        return 7

    return attempt


def test_an_error_that_passes_is_repeated() -> None:
    assert retry(failing(1), is_away, 60) == 7
    assert retry(failing(2), is_away, 60) == 7


def test_a_mistake_is_not_repeated() -> None:
    attempt = failing(1, ValueError)
    with pytest.raises(ValueError, match="0 left"):
        retry(attempt, is_away, 60)
    assert attempt() == 7


def test_the_last_error_is_raised_when_the_time_is_over() -> None:
    with pytest.raises(Away, match="98 left"):
        retry(failing(99), is_away, 0)


def test_a_stop_is_noticed_while_it_waits() -> None:
    started = time.monotonic()
    received: list[float] = []

    def stopped() -> bool:
        received.append(time.monotonic() - started)
        return len(received) > 2

    with pytest.raises(KeyboardInterrupt):
        retry(failing(99), is_away, 1e9, stopped)
    assert len(received) == 3
