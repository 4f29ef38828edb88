"""What MLflow raises, as the errors of a tracker: it is away, it refuses, or it cannot write."""

import functools
import re
import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar, cast

import requests
import sqlalchemy.exc
from mlflow.exceptions import ERROR_CODE_TO_HTTP_STATUS, MlflowException, RestException

from digitlab.base.errors import UserError, first_line
from digitlab.base.files import disk_problem
from digitlab.records.tracker import TrackerAway, TrackerRefused, TrackerUnwritable

# A locked database is an operational error.
_AWAY = (requests.RequestException, ConnectionError, TimeoutError, sqlalchemy.exc.OperationalError)

_Method = TypeVar("_Method", bound=Callable[..., Any])


def translated(method: _Method) -> _Method:
    """Make a method of a tracker raise the tracker's errors, for MLflow's and what it uses."""

    @functools.wraps(method)
    def call(tracker: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return method(tracker, *arguments, **named)
        except Exception as error:
            if isinstance(error, UserError):
                raise
            if problem := disk_problem(error):
                raise TrackerUnwritable(
                    f"The tracker {tracker.where} cannot be used ({problem}). What was recorded "
                    "is kept in the outbox; repair that, and go on with the same command."
                ) from error
            status = http_status(error)
            if status is None:
                raise
            if status >= 500 or status in (408, 429):
                raise TrackerAway(
                    f"The tracker {tracker.where} does not answer ({first_line(error)}). What was "
                    "recorded is kept; try again when it is back."
                ) from error
            raise TrackerRefused(
                f"The tracker {tracker.where} refused ({first_line(error)}), and will refuse the "
                "same again. Remove the cause."
            ) from error

    return cast(_Method, call)


def http_status(error: Exception) -> int | None:
    """Return the HTTP status that an error amounts to; None if it is a mistake in a program."""
    status: int | None = None
    if isinstance(error, MlflowException):
        status = ERROR_CODE_TO_HTTP_STATUS.get(error.error_code, 500)
        # MLflow reports a status that it has no code for, such as 413, as an internal error, and
        # so it does what it finds wrong itself.
        found = re.search(r"failed with error code (\d{3}) != 200", str(error))
        if found:
            status = int(found[1])
        elif status == 500 and not isinstance(error, RestException):
            status = 503 if str(error).startswith("API request to ") else None
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
    elif isinstance(error, _AWAY) or type(error).__module__ == "google.protobuf.json_format":
        status = 503  # the latter: the answer is none of MLflow's
    elif isinstance(error, (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError)):
        status = 400
    return status
