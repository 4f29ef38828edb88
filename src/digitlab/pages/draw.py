"""`digitlab draw`: a page to draw digits on and its API, served to this machine alone."""

import asyncio
import base64
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.requests import ClientDisconnect

from digitlab.base.errors import UserError, first_line
from digitlab.data.images import standardise, to_unit
from digitlab.digits.decode import decode
from digitlab.digits.explain import activations, attribution, most_varied
from digitlab.digits.predict import DigitReader
from digitlab.digits.prepare import prepare
from digitlab.pages.guard import guarded
from digitlab.pages.ui import require_free
from digitlab.records.reader import accuracy_name, lab_tracker
from digitlab.records.tracker import Tracker

_BODY = 8 * 2**20  # bytes of an image
_DISCARDED = 4 * _BODY  # read of one that is too long, so that its sender gets the reason
_SECONDS = 5.0  # that a body may take to arrive
_AT_ONCE, _WAITING = 2, 64  # images that are computed, and that wait for it
_LOADED = 4  # networks that are kept


@dataclass(frozen=True)
class ListedRun:
    """A network to choose."""

    run_id: str
    name: str
    kind: str  # champion, or as the tag digitlab.kind has it
    accuracy: float | None


@dataclass(frozen=True)
class Reading:
    """An `Answer`, and the 28 rows of 28 pixels that the network sees: 0 is black, 255 white."""

    path: str
    status: str
    digit: int | None
    probability: float | None
    probabilities: list[float]
    message: str
    raw_probability: float | None
    seen: list[list[int]]


@dataclass(frozen=True)
class Layer:
    """The maps of a layer that vary most, 0 to 255 from the least to the greatest value."""

    name: str
    count: int  # of all its maps
    maps: list[list[list[int]]]


@dataclass(frozen=True)
class Explanation(Reading):
    """With reasons: how much each pixel adds to the evidence for one digit over another."""

    speaks_for: int | None
    rather_than: int | None
    attribution: list[list[float]]
    layers: list[Layer]


@dataclass(frozen=True)
class ErrorAnswer:
    """Why there is no answer, in one line."""

    detail: str


def draw(run: str | None, lab: Path, port: int, stores: Sequence[str] = ()) -> int:
    """Serve the page on 127.0.0.1, with a run chosen at first, until Ctrl-C; returns 130.

    Raises:
        UserError: no such run, its data are not available, or the port is taken.
    """
    require_free(port)
    tracker = lab_tracker(lab, stores)
    first = DigitReader(tracker, run, lab)
    chosen = first.row.run_id
    torch.set_num_threads(1)  # two images are computed at once
    app = application(
        lambda: finished_runs(tracker, chosen),
        lambda run_id: first if run_id == chosen else DigitReader(tracker, run_id, lab),
    )
    print(f"draw: http://127.0.0.1:{port}   (Ctrl-C ends it)", flush=True)
    uvicorn.Server(serving(app, port)).run()
    return 130  # it ends by a signal alone, which uvicorn does not always raise again


def serving(app: FastAPI, port: int) -> uvicorn.Config:
    """Configure a quiet server on this machine; on Ctrl-C it waits two seconds for answers."""
    quiet = {"log_level": "warning", "access_log": False, "server_header": False}
    narrow = {"ws": "none", "lifespan": "off", "timeout_graceful_shutdown": 2}
    return uvicorn.Config(app, "127.0.0.1", port, **quiet, **narrow)  # type: ignore[arg-type]


def finished_runs(tracker: Tracker, chosen: str) -> list[ListedRun]:
    """Return all runs that have weights: the chosen one, champions, the others newest first."""
    rows = tracker.find({"digitlab.kind": "champion"})
    champions = {row.tags.get("digitlab.weights_run") for row in rows}
    runs = [
        ListedRun(
            row.run_id,
            row.name,
            "champion" if row.run_id in champions else row.tags["digitlab.kind"],
            row.metrics.get(accuracy_name(row)),
        )
        for row in reversed(tracker.find({"digitlab.state": "finished"}))
        if "digitlab.weights_sha256" in row.tags and row.tags["digitlab.kind"] != "champion"
    ]
    return sorted(runs, key=lambda run: (run.run_id != chosen, run.kind != "champion"))


def read(predictor: DigitReader, content: bytes) -> Reading:
    """Return the answer for an image file.

    Raises:
        UserError: it is no image that can be read.
    """
    prepared = prepare(decode(content, "the image"))
    [answer] = predictor.answer([("", prepared)])
    return Reading(**asdict(answer), seen=prepared.image.tolist())


def explain(predictor: DigitReader, content: bytes) -> Explanation:
    """As `read`, with what each layer sees and why; without that where nothing was found."""
    answer = asdict(read(predictor, content))
    pixels = torch.tensor(answer["seen"], dtype=torch.uint8)[None, None]
    if not pixels.any():
        return Explanation(**answer, speaks_for=None, rather_than=None, attribution=[], layers=[])
    network = predictor.network
    image = standardise(to_unit(pixels), predictor.config.data)
    maps, logits = activations(network, image)
    best, next_best = logits[0].topk(2).indices.tolist()
    reasons = attribution(network, image, best, next_best).numpy().astype(float).round(5)
    layers = [_layer(name, layer) for name, layer in maps.items()]
    return Explanation(**answer, speaks_for=best, rather_than=next_best,
                     attribution=reasons.tolist(), layers=layers)  # fmt: skip


def _layer(name: str, maps: torch.Tensor) -> Layer:
    varied = most_varied(maps)
    low, high = varied.min(), varied.max()
    levels = (varied - low) * (255 / (high - low).clamp(min=1e-9))
    return Layer(name, len(maps), levels.round().int().tolist())


_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_SENT = {"requestBody": {"required": True, "content": {
    "image/*": _IMAGE, "application/octet-stream": _IMAGE}}}  # fmt: skip
_PROBLEMS = {
    400: "No image that can be read",
    404: "No such run",
    408: f"The image took longer than {_SECONDS:.0f} s to arrive",
    413: f"More than {_BODY // 2**20} MB",
    415: "Not sent as an image",
    422: "A run's id is too long",
    503: "Too many images at once, or a run that cannot be read",
}
_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in _PROBLEMS.items()
}
_Asked = TypeVar("_Asked", Reading, Explanation)
_RunId = Annotated[
    str | None, Query(max_length=64, description="an id that GET /runs lists; else its first")
]


def _guarded_app(page: str) -> FastAPI:
    app = FastAPI(
        title="digitlab draw",
        docs_url=None,  # FastAPI's page of the API is loaded from elsewhere
        redoc_url=None,
        responses={
            403: {"model": ErrorAnswer, "description": "The request comes from another site"}
        },
    )
    app.add_middleware(guarded, headers={
        "content-security-policy": _policy(page), "cache-control": "no-store"})  # fmt: skip
    app.add_exception_handler(RequestValidationError, _unasked)
    return app


def application(runs: Callable[[], list[ListedRun]], load: Callable[[str], DigitReader]) -> FastAPI:
    """Build the page and its JSON API.

    Args:
        runs: lists the runs that can be chosen, the first choice first.
        load: returns the network of a run's id, or raises UserError.
    """
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    app = _guarded_app(text)
    listed = [run.run_id for run in runs()]
    first, known = next(iter(listed), None), set(listed)
    # One thread loads, so that many requests for a network load it once; a failure is not kept.
    load, loader = functools.lru_cache(_LOADED)(load), ThreadPoolExecutor(1)
    threads, requests = ThreadPoolExecutor(_AT_ONCE), 0

    async def answer(
        request: Request, run: str | None, compute: Callable[[DigitReader, bytes], _Asked]
    ) -> _Asked:
        nonlocal requests
        run = first if run is None else run
        if run is None or run not in known:
            raise HTTPException(404, "no such run: GET /runs lists them")
        if requests >= _AT_ONCE + _WAITING:
            raise HTTPException(503, "too many images at once: try again", {"Retry-After": "1"})
        requests += 1
        loop = asyncio.get_running_loop()
        try:
            content = await _body(request)
            try:
                predictor = await loop.run_in_executor(loader, load, run)
            except Exception as error:
                raise HTTPException(503, first_line(error)) from error
            return await loop.run_in_executor(threads, compute, predictor, content)
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        finally:
            requests -= 1

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    @app.get("/runs")
    async def list_runs() -> list[ListedRun]:
        found = await asyncio.to_thread(runs)
        known.update(run.run_id for run in found)
        return found

    @app.post("/predict", responses=_REFUSED, openapi_extra=_SENT)
    async def predict(request: Request, run: _RunId = None) -> Reading:
        return await answer(request, run, read)

    @app.post("/explain", responses=_REFUSED, openapi_extra=_SENT)
    async def explain_image(request: Request, run: _RunId = None) -> Explanation:
        return await answer(request, run, explain)

    return app


async def _unasked(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    [first, *_rest] = error.errors()
    return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, 422)


async def _body(request: Request) -> bytes:
    """Return the image in the body, whatever Content-Length claims; else 408, 413 or 415."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        rule = "it must be the file itself, as image/png and the like"
        raise HTTPException(415, f"Content-Type {kind[:50] or 'missing'}: {rule}")
    close = {"Connection": "close"}  # the rest of the body is not waited for
    parts, size = [], 0
    try:
        async with asyncio.timeout(_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= _BODY:
                    parts.append(part)
                elif size > _DISCARDED:
                    break
    except ClientDisconnect as error:
        raise HTTPException(400, "the image: cut short") from error
    except TimeoutError as error:
        raise HTTPException(408, "the image took too long to arrive", close) from error
    if size > _BODY:
        raise HTTPException(413, f"the image: more than {_BODY // 2**20} MB", close)
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
