"""What serves a page of ours: its text, its guards, the bodies that it takes, its end."""

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from h11 import LocalProtocolError
from starlette.requests import ClientDisconnect

from digitlab.pages.guard import guarded

SECONDS = 5.0  # that a body may take to arrive
_DISCARDED = (
    4  # times the most of a body: read of one that is too long, so that its sender gets the reason
)
_PARTS = {
    "/*style*/": ("page.css",),
    "/*script*/": ("draw.js", "network.js", "watch.js", "runs.js"),
}


@dataclass(frozen=True)
class ErrorAnswer:
    """Why there is no answer, in one line."""

    detail: str


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether an error is none of a sender of no HTTP: uvicorn's 400 came before our answer."""
    return not (record.exc_info and isinstance(record.exc_info[1], LocalProtocolError))


class PageServer(uvicorn.Server):
    """A quiet server on this machine; on Ctrl-C it waits two seconds for answers."""

    def __init__(self, app: FastAPI, port: int, ending: Callable[[], None] = lambda: None) -> None:
        quiet = {"log_level": "error", "access_log": False, "server_header": False}
        narrow = {"ws": "none", "lifespan": "off", "timeout_graceful_shutdown": 2}
        super().__init__(uvicorn.Config(app, "127.0.0.1", port, **quiet, **narrow))  # type: ignore[arg-type]
        logging.getLogger("uvicorn.error").addFilter(_is_ours)
        self.ending = ending  # ends answers that would go on for ever

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.ending()
        super().handle_exit(sig, frame)


def page_text(view: str) -> str:
    """Return the whole page; `view` is what it shows at first, draw or play."""
    folder = Path(__file__).parent
    text = (folder / "page.html").read_text(encoding="utf-8").replace("{view}", view)
    for place, names in _PARTS.items():
        parts = [(folder / name).read_text(encoding="utf-8") for name in names]
        text = text.replace(place, "\n".join(parts))
    return text


def page_app(view: str) -> FastAPI:
    """Build an application that serves the page, answers our own requests alone, and no other."""
    text = page_text(view)
    app = FastAPI(
        title="digitlab",
        docs_url=None,  # FastAPI's page of the API is loaded from elsewhere
        redoc_url=None,
        responses={
            403: {"model": ErrorAnswer, "description": "The request comes from another site"}
        },
    )
    app.add_middleware(guarded, headers={
        "content-security-policy": _policy(text), "cache-control": "no-store"})  # fmt: skip
    app.add_exception_handler(RequestValidationError, _unasked)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    return app


def problems(**texts: str) -> dict[int | str, dict[str, Any]]:
    """Return how the API describes the answers of a status: problems(_404="No such run")."""
    return {
        int(status[1:]): {"model": ErrorAnswer, "description": text}
        for status, text in texts.items()
    }


async def _unasked(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    [first, *_rest] = error.errors()
    return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, 422)


async def read_body(
    request: Request, kinds: Collection[str], most: int, what: str, rule: str
) -> bytes:
    """Return the body, whatever Content-Length claims; else 408, 413 or 415.

    Args:
        kinds: content types that are taken; `image/` is all of its kind.
        most: bytes.
        what: what is sent, for messages; `rule` is what the content type must be.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in kinds and f"{kind.partition('/')[0]}/" not in kinds:
        raise HTTPException(415, f"Content-Type {kind[:50] or 'missing'}: {rule}")
    close = {"Connection": "close"}  # the rest of the body is not waited for
    parts, size = [], 0
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > _DISCARDED * most:
                    break
    except ClientDisconnect as error:
        raise HTTPException(400, f"{what}: cut short") from error
    except TimeoutError as error:
        raise HTTPException(408, f"{what} took too long to arrive", close) from error
    if size > most:
        limit = f"{most // 2**20} MB" if most >= 2**20 else f"{most // 2**10} kB"
        raise HTTPException(413, f"{what}: more than {limit}", close)
    return b"".join(parts)


def _policy(page: str) -> str:
    """Return a Content-Security-Policy that runs the page's own script and style alone."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src 'self' blob: data:"]
    rules += ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    for kind in ("script", "style"):
        [text] = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rules.append(f"{kind}-src 'sha256-{digest}'")
    return "; ".join(rules)
