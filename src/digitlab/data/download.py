"""Files from the first of several servers that gives them, within limits of time and size."""

import http.client
import sys
import time
import urllib.request
from collections.abc import Iterable

_SILENT_S = 20.0  # for a connection, and between two parts of an answer
_LONGEST_S = 600.0  # for one file
_SHOW_INTERVAL_S = 5.0  # between two lines on the progress
_MOST_BYTES = 100 * 2**20
_PART_BYTES = 2**16


def download(mirrors: Iterable[str], names: Iterable[str]) -> dict[str, bytes]:
    """Return files by name, each from the first mirror that gives it, and print the progress.

    Raises:
        OSError: no mirror gives one of them; the reasons, one for each mirror.
    """
    missing, reasons = list(names), []
    content: dict[str, bytes] = {}
    for mirror in mirrors:
        try:
            while missing:
                print(f"fetching {mirror}{missing[0]}", file=sys.stderr)
                content[missing[0]] = _read(f"{mirror}{missing[0]}")
                del missing[0]
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{mirror}{missing[0]}: {str(error) or type(error).__name__}")
            print(reasons[-1], file=sys.stderr)
    if missing:
        raise OSError(", ".join(reasons))
    return content


def _read(url: str) -> bytes:
    content = bytearray()
    started = shown = time.monotonic()
    with urllib.request.urlopen(url, timeout=_SILENT_S) as answer:  # noqa: S310  from our table
        # Not `read`: a server that sends a byte a minute would never time out.
        while part := answer.read1(_PART_BYTES):
            content += part
            now = time.monotonic()
            if len(content) > _MOST_BYTES or now - started > _LONGEST_S:
                raise OSError(f"it is too large or too slow, after {len(content)} bytes")
            if now - shown > _SHOW_INTERVAL_S:
                shown = now
                whole = f" of {int(answer.headers['Content-Length']) / 1e6:.1f}" * (
                    "Content-Length" in answer.headers
                )
                print(f"fetched {len(content) / 1e6:.1f}{whole} MB", file=sys.stderr)
        if answer.length:  # what is missing, where the server has sent the size
            raise OSError(f"it broke off after {len(content)} bytes")
    return bytes(content)
