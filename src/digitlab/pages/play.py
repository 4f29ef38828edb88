"""`digitlab play` and `digitlab draw`: one page to change a network, watch it learn, and draw."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import TypeAdapter, ValidationError

from digitlab.base.errors import UserError
from digitlab.base.files import safe_name
from digitlab.digits.predict import DigitReader, ImageReader
from digitlab.pages.draw import LIVE, add_reading, finished_runs
from digitlab.pages.events import EventLog
from digitlab.pages.export import save_page
from digitlab.pages.form import Form
from digitlab.pages.ladder import Ladder, LadderRow
from digitlab.pages.moments import Look, Moments
from digitlab.pages.search import PageSearch
from digitlab.pages.server import PageServer, page_app, problems, read_body
from digitlab.pages.trainer import PageTrainer
from digitlab.pages.ui import require_free
from digitlab.records.reader import lab_tracker, load_run
from digitlab.records.record import Records, open_records
from digitlab.study.storage import open_storage, study_names

_MOST_BODY = 2**16  # bytes of a form
_JSON = ("application/json",)


@dataclass(frozen=True)
class Asked:
    """What a person asks for: the values of the form, and more for a search."""

    values: dict[str, Any] = field(default_factory=dict)
    is_fixed: bool = False  # the recipe's own network
    action: Literal["pause", "continue", "stop", ""] = ""
    ticked: list[str] = field(default_factory=list)
    minutes: float = 0


_ASKED = TypeAdapter(Asked)


def play(overrides: Sequence[str], lab: Path, port: int) -> int:
    """Serve the page on 127.0.0.1, its form as a recipe has it, until Ctrl-C; returns 130.

    Raises:
        UserError: an override is invalid, the data are not available, or the port is taken.
    """
    require_free(port)
    return _serve(Form(overrides), lab, port, "play", None)


def draw(run: str | None, lab: Path, port: int, stores: Sequence[str] = ()) -> int:
    """Serve the page at its drawing, with a run chosen at first, until Ctrl-C; returns 130.

    Raises:
        UserError: no such run, its data are not available, or the port is taken.
    """
    require_free(port)
    first = DigitReader(lab_tracker(lab, stores), run, lab)
    return _serve(Form(stores), lab, port, "draw", first)


def _serve(form: Form, lab: Path, port: int, view: str, first: DigitReader | None) -> int:
    torch.set_num_threads(1)  # two images are computed at once, and another core trains
    with open_records(form.base.config, lab) as records:
        for line in records.outbox.adopt():
            print(line)
        lesson = Lesson(form, lab, records, first)
        if view == "play":
            lesson.trainer()
        app = lesson_app(lesson, view)
        print(f"{view}: http://127.0.0.1:{port}   (Ctrl-C ends it)", flush=True)
        try:
            PageServer(app, port, lesson.log.close).run()
        finally:
            lesson.close()
    return 130  # it ends by a signal alone, which uvicorn does not always raise again


class Lesson:
    """What stands behind the page: its form, its trainer, its search, the lab's runs."""

    def __init__(
        self, form: Form, lab: Path, records: Records, first: DigitReader | None = None
    ) -> None:
        self.form, self.lab, self.records, self.first = form, lab, records, first
        self.log = EventLog()
        self.search = PageSearch(self.log)
        self.ladder = Ladder(records.tracker, form.recipe.config)
        self._trainer: PageTrainer | None = None

    def trainer(self) -> PageTrainer:
        """Return what trains; it is started where it is asked for first, by the main thread."""
        if self._trainer is None:
            config = self.form.base.config
            trainer = PageTrainer(self.lab, config.data, self.records, self.log, self.conclude)
            try:
                trainer.prepare(config)
            except UserError:
                trainer.close()
                raise
            self._trainer = trainer
        return self._trainer

    def moments(self) -> Moments:
        if self._trainer is None:
            raise UserError("No run has been trained on this page yet: it must have one. Train it.")
        return self._trainer.moments

    def close(self) -> None:
        self.log.close()
        self.search.close()
        if self._trainer is not None:
            self._trainer.close()

    def conclude(self, run_id: str) -> str:
        return self.ladder.conclude(run_id)

    def runs(self) -> Any:
        return finished_runs(self.records.tracker, self.first.row.run_id if self.first else "")

    def reader(self, run: str) -> ImageReader:
        """Return the network of a recorded run, or of live:RUN:STEP."""
        if run.startswith(LIVE):
            numbers = run.removeprefix(LIVE).split(":")
            if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
                raise UserError(f"{run}: no such moment: it must be live:RUN:STEP. Train first.")
            return self.moments().reader(int(numbers[0]), int(numbers[1]))
        if self.first is not None and run == self.first.row.run_id:
            return self.first
        return DigitReader(self.records.tracker, run, self.lab)

    def train(self, asked: Asked) -> int:
        """Start a run; return its number."""
        self._require_free()
        self.form.check(asked.values, asked.is_fixed)
        return self.trainer().train(self.form.compose(asked.values, asked.is_fixed)).number

    def control(self, asked: Asked) -> None:
        if asked.action == "stop":
            self.search.stop()
        if self._trainer is not None:
            if asked.action == "stop":
                self._trainer.stop()
            elif asked.action:
                self._trainer.set_paused(asked.action == "pause")

    def start_search(self, asked: Asked) -> None:
        self._require_free()
        if self._trainer is not None and self._trainer.running is not None:
            raise UserError(
                "A run is in training: a search needs the machine. Wait for its end, or stop it."
            )
        composed = self.form.compose(asked.values, asked.is_fixed)
        # A deleted study has no run that can be seen, and keeps its name in the storage.
        storage = open_storage(self.lab, composed.config.study.storage)
        tagged = {row.tags.get("digitlab.study") for row in self.records.tracker.find({})}
        taken = tagged | set(study_names(storage))
        names = (f"play-{number}" for number in range(1, len(taken) + 2))
        name = next(name for name in names if name not in taken)
        self.search.start(composed, asked.ticked, asked.minutes, name)

    def _require_free(self) -> None:
        if self.search.is_running:
            raise UserError(
                "A search is under way: one thing at a time is trained here. Wait, or stop it."
            )

    def save(self, run: str) -> tuple[str, str]:
        """Return the name and the text of a page that holds a run's network."""
        if run.startswith(LIVE):
            reader = self.reader(run)
            return run.replace(":", "-"), save_page(reader.network, reader.config, run, self.lab)
        row, config, network = load_run(self.records.tracker, run)
        return row.name, save_page(network, config, row.name, self.lab)


_REFUSED = problems(
    _400="Not what the form allows",
    _408="The form took too long to arrive",
    _409="Another training is under way",
    _413=f"More than {_MOST_BODY // 2**10} kB",
    _415="Not sent as JSON",
    _422="A number is missing or too large",
    _503="Too many tabs",
)
_SENT = {"requestBody": {"required": True, "content": {
    "application/json": {"schema": _ASKED.json_schema()}}}}  # fmt: skip


async def _asked(request: Request) -> Asked:
    rule = "it must be application/json"
    content = await read_body(request, _JSON, _MOST_BODY, "the form", rule)
    try:
        return _ASKED.validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the form"
        raise HTTPException(400, f"{place}: {first['msg']}") from error


def _refusing(status: int, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except UserError as error:
        raise HTTPException(status, str(error)) from error


def lesson_app(lesson: Lesson, view: str) -> FastAPI:
    """Build the page and its JSON API."""
    app = page_app(view)
    add_reading(app, lesson.runs, lesson.reader)
    how: dict[str, Any] = {"responses": _REFUSED}
    sent: dict[str, Any] = how | {"openapi_extra": _SENT}

    @app.get("/form")
    async def form() -> dict[str, Any]:
        return lesson.form.describe()

    @app.post("/check", **sent)
    async def check(request: Request) -> dict[str, Any]:
        asked = await _asked(request)
        try:
            return await asyncio.to_thread(lesson.form.check, asked.values, asked.is_fixed)
        except UserError as error:
            return {"problem": str(error)}

    @app.post("/train", **sent)
    async def train(request: Request) -> dict[str, int]:
        asked = await _asked(request)
        _refusing(400, lambda: lesson.form.compose(asked.values, asked.is_fixed))
        return {"run": _refusing(409, lambda: lesson.train(asked))}

    @app.post("/control", **sent)
    async def control(request: Request) -> dict[str, str]:
        asked = await _asked(request)
        lesson.control(asked)
        return {"action": asked.action}

    @app.post("/search", **sent)
    async def search(request: Request) -> dict[str, float]:
        asked = await _asked(request)
        _refusing(409, lambda: lesson.start_search(asked))
        return {"minutes": asked.minutes}

    @app.get("/events", response_class=StreamingResponse, **how)
    async def events() -> StreamingResponse:
        if lesson.log.is_full:
            raise HTTPException(503, "too many tabs: close one")
        return StreamingResponse(lesson.log.stream(), media_type="text/event-stream")

    @app.get("/look", **how)
    async def look(run: int, step: int, place: int | None = None) -> Look:
        act = lambda: lesson.moments().look(run, step, place)  # noqa: E731
        return await asyncio.to_thread(_refusing, 400, act)

    @app.get("/ladder")
    async def ladder() -> list[LadderRow]:
        return await asyncio.to_thread(lesson.ladder.rows)

    @app.get("/save", response_class=HTMLResponse, **how)
    async def save(run: str) -> HTMLResponse:
        name, text = await asyncio.to_thread(_refusing, 400, lambda: lesson.save(run))
        kept = {"content-disposition": f'attachment; filename="{safe_name(name)}.html"'}
        return HTMLResponse(text, headers=kept)

    return app
