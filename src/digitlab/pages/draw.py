"""Reading of drawings: what a page asks of trained networks, and of one that still learns."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, TypeVar

import torch
from fastapi import FastAPI, HTTPException, Query, Request

from digitlab.base.errors import UserError, first_line
from digitlab.data.datasets import class_names, known_classes
from digitlab.data.images import standardise, to_unit
from digitlab.digits.decode import decode
from digitlab.digits.explain import activations, attribution, most_varied
from digitlab.digits.likeness import FoolingImage, TrainingDigit, fool, nearest
from digitlab.digits.predict import ImageReader, read_picture
from digitlab.pages.server import SECONDS, page_app, problems, read_body
from digitlab.records.reader import accuracy_name
from digitlab.records.tracker import Tracker

_BODY = 8 * 2**20  # bytes of an image
_RULE = "it must be the file itself, as image/png and the like"
_AT_ONCE, _WAITING = 2, 64  # images that are computed, and that wait for it
_LOADED = 4  # networks that are kept
LIVE = "live:"  # live:RUN:STEP is a run of this server at a moment


@dataclass(frozen=True)
class ListedRun:
    """A network to choose."""

    run_id: str
    name: str
    kind: str  # champion, or as the tag digitlab.kind has it
    accuracy: float | None
    started: str  # date and time, as in 2026-11-25 14:05


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
    label: str | None
    labels: list[str]
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
class Likeness:
    """The training images most like a drawing, and a change that fools; none of an empty one."""

    nearest: list[TrainingDigit]
    fooling: FoolingImage | None  # None where no small change does


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
            f"{datetime.fromtimestamp(row.started_ms / 1000):%Y-%m-%d %H:%M}",
        )
        for row in reversed(tracker.find({"digitlab.state": "finished"}))
        if "digitlab.weights_sha256" in row.tags and row.tags["digitlab.kind"] != "champion"
    ]
    return sorted(runs, key=lambda run: (run.run_id != chosen, run.kind != "champion"))


def read(predictor: ImageReader, content: bytes) -> Reading:
    """Return the answer for an image file.

    Raises:
        UserError: it is no image that can be read.
    """
    answer, prepared = read_picture(predictor, "", decode(content, "the image"))
    return Reading(**asdict(answer), seen=prepared.image.tolist())


def explain(predictor: ImageReader, content: bytes) -> Explanation:
    """As `read`, with what each layer sees and why; without that where nothing was found."""
    answer = asdict(read(predictor, content))
    pixels = torch.tensor(answer["seen"], dtype=torch.uint8)[None, None]
    if not pixels.any():
        return Explanation(**answer, speaks_for=None, rather_than=None, attribution=[], layers=[])
    # The answer has none where it is no digit, and reasons speak for a class all the same.
    answer["labels"] = class_names(predictor.config.data.name, predictor.lab)
    network = predictor.network
    image = standardise(to_unit(pixels), predictor.config.data)
    maps, logits = activations(network, image)
    ranked, known = logits[0].argsort(descending=True).tolist(), known_classes(answer["labels"])
    best, next_best = sorted(ranked, key=lambda digit: digit not in known)[:2]
    reasons = attribution(network, image, best, next_best).numpy().astype(float).round(5)
    layers = [shown_layer(name, layer) for name, layer in maps.items()]
    return Explanation(**answer, speaks_for=best, rather_than=next_best,
                       attribution=reasons.tolist(), layers=layers)  # fmt: skip


def liken(predictor: ImageReader, content: bytes) -> Likeness:
    """Return what an image file is like; UserError if it is no image that can be read."""
    lab, data = predictor.lab, predictor.config.data
    seen = read_picture(predictor, "", decode(content, "the image"))[1].image
    if not seen.any():
        return Likeness([], None)
    return Likeness(nearest(seen, lab, data), fool(predictor.network, seen, lab, data))


def shown_layer(name: str, maps: torch.Tensor) -> Layer:
    """Return what a page shows of a layer's maps (C, h, w)."""
    varied = most_varied(maps)
    low, high = varied.min(), varied.max()
    levels = (varied - low) * (255 / (high - low).clamp(min=1e-9))
    return Layer(name, len(maps), levels.round().int().tolist())


_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_SENT = {"requestBody": {"required": True, "content": {
    "image/*": _IMAGE, "application/octet-stream": _IMAGE}}}  # fmt: skip
_REFUSED = problems(
    _400="No image that can be read",
    _404="No such run",
    _408=f"The image took longer than {SECONDS:.0f} s to arrive",
    _413=f"More than {_BODY // 2**20} MB",
    _415="Not sent as an image",
    _422="A run's id is too long",
    _503="Too many images at once, or a run that cannot be read",
)
_Asked = TypeVar("_Asked", Reading, Explanation, Likeness)
_RunId = Annotated[
    str | None, Query(max_length=64, description="an id that GET /runs lists; else its first")
]


_KINDS = ("image/", "application/octet-stream")


def application(runs: Callable[[], list[ListedRun]], load: Callable[[str], ImageReader]) -> FastAPI:
    """Build the page with its drawing alone, and the API for that; as `add_reading`."""
    app = page_app("draw")
    add_reading(app, runs, load)
    return app


def add_reading(
    app: FastAPI, runs: Callable[[], list[ListedRun]], load: Callable[[str], ImageReader]
) -> None:
    """Add the JSON API that reads drawings.

    Args:
        runs: lists the runs that can be chosen, the first choice first.
        load: returns the network of a run's id, or raises UserError; it alone knows those that
            begin with LIVE, of a run that still learns.
    """
    listed = [run.run_id for run in runs()]
    first, known = next(iter(listed), None), set(listed)
    # One thread loads, so that many requests for a network load it once; a failure is not kept.
    load, loader = functools.lru_cache(_LOADED)(load), ThreadPoolExecutor(1)
    threads, requests = ThreadPoolExecutor(_AT_ONCE), 0

    async def answer(
        request: Request, run: str | None, compute: Callable[[ImageReader, bytes], _Asked]
    ) -> _Asked:
        nonlocal requests
        run = first if run is None else run
        if run is None or not (run in known or run.startswith(LIVE)):
            raise HTTPException(404, "no such run: GET /runs lists them")
        if requests >= _AT_ONCE + _WAITING:
            raise HTTPException(503, "too many images at once: try again", {"Retry-After": "1"})
        requests += 1
        loop = asyncio.get_running_loop()
        try:
            content = await read_body(request, _KINDS, _BODY, "the image", _RULE)
            try:
                predictor = await loop.run_in_executor(loader, load, run)
            except Exception as error:
                raise HTTPException(503, first_line(error)) from error
            return await loop.run_in_executor(threads, compute, predictor, content)
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        finally:
            requests -= 1

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

    @app.post("/likeness", responses=_REFUSED, openapi_extra=_SENT)
    async def liken_image(request: Request, run: _RunId = None) -> Likeness:
        return await answer(request, run, liken)
