"""The drawing page in a real browser, and its API, on a network that reads."""

import base64
import http.client
import io
import json
import logging
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser, Page
from samples import readers
from serving import COMMAND, HOST, environment_of, free_port

from digitlab.config.compose import compose
from digitlab.data.datasets import TEST, load_digits
from digitlab.digits import predict
from digitlab.digits.predict import DigitReader
from digitlab.pages import draw, play
from digitlab.pages import server as serving_page
from digitlab.pages.server import PageServer
from digitlab.records.record import open_tracker
from digitlab.records.tracker import NewRun, Tracker, now_ms

# ---- a lab with two networks, and a server ------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    folder: Path
    tracker: Tracker
    read: str  # run id of a network that reads drawn digits, the champion
    hasty: str  # of one that learned little


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder, threads = readers(tmp_path_factory), torch.get_num_threads()
    tracker = open_tracker(compose("train", [])[0].config, folder)
    read, hasty = (tracker.get(f"{name}-seed-0").run_id for name in ("read", "hasty"))
    tags = {"digitlab.kind": "champion", "digitlab.weights_run": read}
    champion = tracker.create_run(NewRun("read-champion", tags, {}))
    tracker.end_run(champion, "finished", now_ms())
    yield Lab(folder, tracker, read, hasty)
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Server:
    port: int
    lab: Lab

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and the JSON that came back."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        try:
            sent = {key.replace("_", "-"): value for key, value in headers.items()}
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), reported(answer.read())
        finally:
            connection.close()

    def predict(self, body: bytes, way: str = "predict", kind: str = "image/png") -> Any:
        path = f"/{way}?run={self.lab.read}"
        status, _, answer = self.ask("POST", path, body, Content_Type=kind)
        assert status == 200, answer
        return answer


def reported(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


@contextmanager
def served(app: FastAPI, port: int) -> Iterator[None]:
    server = PageServer(app, port)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()


def of(lab: Lab, load: Callable[[str], DigitReader] | None = None) -> FastAPI:
    load = load or (lambda run: DigitReader(lab.tracker, run, lab.folder))
    return draw.application(lambda: draw.finished_runs(lab.tracker, lab.read), load)


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Server]:
    port = free_port()
    with served(of(lab), port):
        yield Server(port, lab)


def png(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, kind, **options)
    return file.getvalue()


def large(digit: int, lab: Lab, nth: int = 0) -> np.ndarray:
    """A test image of a digit as a person would draw it: dark on light, 280 pixels a side."""
    digits = load_digits(lab.folder, "sample", TEST)
    image = digits.images[(digits.labels == digit).nonzero()[0][nth]]
    return np.asarray(Image.fromarray(255 - image).resize((280, 280), Image.Resampling.BICUBIC))


# ---- strokes -------------------------------------------------------------------------------------

Stroke = list[tuple[float, float]]  # places on a paper of side 1, from its upper left corner


def arc(x: float, y: float, wide: float, high: float, begin: float, end: float) -> Stroke:
    """Part of an ellipse; degrees from the right, clockwise."""
    angles = [math.radians(begin + (end - begin) * i / 14) for i in range(15)]
    return [(x + wide * math.cos(angle), y + high * math.sin(angle)) for angle in angles]


DIGITS: list[list[Stroke]] = [
    [arc(0.5, 0.5, 0.2, 0.3, -90, 270)],
    [[(0.53, 0.18), (0.48, 0.82)]],
    [[*arc(0.49, 0.36, 0.18, 0.16, 190, 400), (0.3, 0.8), (0.72, 0.78)]],
    [[*arc(0.47, 0.34, 0.17, 0.14, 200, 440), *arc(0.47, 0.64, 0.2, 0.17, 280, 510)]],
    [[(0.36, 0.2), (0.3, 0.53), (0.7, 0.52)], [(0.63, 0.25), (0.58, 0.84)]],
    [[(0.68, 0.2), (0.4, 0.21), (0.36, 0.46), *arc(0.48, 0.61, 0.2, 0.18, 240, 500)]],
    [[(0.6, 0.18), (0.47, 0.32), (0.39, 0.48), *arc(0.5, 0.66, 0.15, 0.16, 180, -180)]],
    [[(0.3, 0.23), (0.69, 0.23), (0.45, 0.82)]],
    [[*arc(0.5, 0.34, 0.14, 0.15, 90, 450), *arc(0.5, 0.65, 0.17, 0.16, 270, 630)]],
    [[*arc(0.49, 0.36, 0.15, 0.16, 0, -360), (0.63, 0.55), (0.57, 0.83)]],
]


@dataclass(frozen=True)
class Paper:
    """The page in a browser."""

    page: Page
    asked: list[str] = field(default_factory=list)  # addresses
    errors: list[str] = field(default_factory=list)
    under_way: list[int] = field(default_factory=list)  # requests for reasons, at each change

    def stroke(self, places: Stroke) -> None:
        box = self.page.locator("#paper").bounding_box()
        assert box
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*point, steps=2)
        self.page.mouse.up()

    def draw(self, strokes: Sequence[Stroke]) -> None:
        for places in strokes:
            self.stroke(places)
        self.settle()

    def settle(self) -> None:
        """Until the newest drawing has been answered."""
        deadline = time.monotonic() + 30
        self.page.wait_for_timeout(30)
        while self.page.evaluate("busy || again"):
            assert time.monotonic() < deadline
            self.page.wait_for_timeout(20)

    @property
    def answer(self) -> str:
        return self.page.locator("#answer").inner_text()

    @property
    def digit(self) -> str:
        """The digit that is read, surely or not."""
        found = re.search(r"\d$", self.answer)
        return found[0] if found else self.answer

    def ink(self) -> int:
        """Dark pixels of the paper."""
        return int(
            self.page.evaluate(
                "ink.getImageData(0, 0, SIDE, SIDE).data.filter((v, i) => i % 4 == 0 && v < 128)"
                ".length"
            )
        )

    def seen(self) -> list[int]:
        return list(
            self.page.evaluate(
                "[...$('seen').getContext('2d').getImageData(0, 0, 28, 28).data]"
                ".filter((v, i) => i % 4 == 0)"
            )
        )

    def explained(self) -> int:
        return sum("/explain" in address for address in self.asked)

    def clear(self) -> None:
        self.page.get_by_role("button", name="Clear").click()
        self.settle()


@contextmanager
def opened(browser: Browser, server: Server, **options: Any) -> Iterator[Paper]:
    page = browser.new_page(**({"viewport": {"width": 1000, "height": 900}} | options))
    page.set_default_timeout(60_000)
    paper = Paper(page)
    count = 0

    def change(by: int, url: str) -> None:
        nonlocal count
        if "/explain" in url:
            count += by
            paper.under_way.append(count)

    page.on("request", lambda request: paper.asked.append(request.url))
    page.on("request", lambda request: change(1, request.url))
    page.on("requestfinished", lambda request: change(-1, request.url))
    page.on("requestfailed", lambda request: change(-1, request.url))
    page.on("pageerror", lambda error: paper.errors.append(str(error)))
    page.on("console", lambda line: paper.errors.extend([line.text] * (line.type == "error")))
    page.goto(f"http://{HOST}:{server.port}/")
    page.locator("#run option").first.wait_for(state="attached")
    yield paper
    page.close()


@pytest.fixture
def paper(browser: Browser, server: Server) -> Iterator[Paper]:
    with opened(browser, server) as paper:
        yield paper
        own = (f"http://{HOST}:{server.port}/", "data:", "blob:")
        assert [url for url in paper.asked if not url.startswith(own)] == []
        assert paper.errors == []
        assert max(paper.under_way, default=0) <= 1


# ---- a person draws ------------------------------------------------------------------------------


def test_ten_drawn_digits_are_read(paper: Paper, server: Server, tmp_path: Path) -> None:
    answers = []
    for digit, strokes in enumerate(DIGITS):
        paper.draw(strokes)
        paper.page.screenshot(path=tmp_path / f"{digit}.png", full_page=True)
        answers.append((paper.digit, paper.answer))
        drawn = paper.page.evaluate("paper.toDataURL().split(',')[1]")
        newest = server.predict(base64.b64decode(drawn))  # what stands there is of the whole digit
        assert paper.seen() == np.ravel(newest["seen"]).tolist()
        paper.clear()
    assert [said for said, _ in answers] == list("0123456789"), answers
    assert sum(answer == said for said, answer in answers) >= 8, answers


def test_page_tells_while_drawing_what_the_network_sees_and_why(paper: Paper) -> None:
    page = paper.page
    assert paper.explained() == 0  # an empty paper asks nothing
    box = page.locator("#paper").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 0.8 * box["height"], steps=10)
    paper.settle()
    assert paper.digit == "1"  # the button is still down
    page.mouse.up()
    shares = page.locator("#bars progress").evaluate_all("bars => bars.map(bar => bar.value)")
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert shares.index(max(shares)) == 1
    assert max(paper.seen()) > 200
    assert re.fullmatch(r"blue: evidence for 1, red: for \d", page.locator("#why").inner_text())
    page.locator("#nearest figcaption", has_text="a 1").nth(2).wait_for()
    assert page.locator("#nearest figure").count() == 5
    fooled = r"changed a little, it is read as [02-9]: no pixel by more than [\d.]+ %"
    assert re.fullmatch(fooled, page.locator("#fooled").inner_text())
    coloured = "$('reasons').getContext('2d').getImageData(0, 0, 28, 28).data.some(v => v)"
    assert page.evaluate(coloured)
    heads = page.locator("#layers h2").all_inner_texts()
    reported = [
        "convolution 1 (16 filters): the 8",
        "convolution 2 (32 filters): the 8",
        "dense 1 (",
    ]
    assert [what in head for what, head in zip(reported, heads, strict=True)] == [True] * 3
    assert page.locator("#layers canvas").count() == 17
    paper.clear()
    assert (paper.answer, max(paper.seen())) == ("Draw a digit, or drop an image.", 0)
    assert not page.locator("#layers").is_visible()
    assert page.locator("#bars progress").evaluate_all("bars => bars.every(bar => bar.value === 0)")


def test_undo_takes_one_stroke_back_and_clear_takes_all(paper: Paper) -> None:
    page = paper.page
    undo, clear = (page.get_by_role("button", name=name) for name in ("Undo", "Clear"))
    assert undo.is_disabled()
    assert clear.is_disabled()
    inks = [paper.ink()]
    for strokes in ([(0.3, 0.2), (0.3, 0.8)], [(0.7, 0.2), (0.7, 0.8)], [(0.3, 0.5), (0.7, 0.5)]):
        paper.stroke(strokes)
        inks.append(paper.ink())
    assert inks == sorted(set(inks))
    undo.click()
    assert paper.ink() == inks[2]
    page.keyboard.press("Control+z")
    assert paper.ink() == inks[1]
    paper.stroke([(0.5, 0.5), (0.5, 0.5)])  # a dot
    assert paper.ink() > inks[1] + 100
    page.keyboard.press("Delete")
    paper.settle()
    assert paper.ink() == 0
    asked = paper.explained()
    page.keyboard.press("Control+z")  # there is nothing left
    paper.settle()
    assert (paper.explained(), undo.is_disabled()) == (asked, True)


def test_strokes_are_as_wide_as_they_are_set(paper: Paper) -> None:
    widths, inks = (6, 24, 48), []
    for width in widths:
        paper.page.get_by_label("Stroke width").fill(str(width))
        paper.draw([[(0.5, 0.2), (0.5, 0.8)]])
        inks.append(paper.ink())
        assert paper.digit == "1", width
        paper.clear()
    for width, ink in zip(widths, inks, strict=True):  # a bar with two round ends
        assert ink == pytest.approx(width * 0.6 * 280 + math.pi * width**2 / 4, rel=0.1)


DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d"


def test_another_run_can_be_chosen(paper: Paper) -> None:
    runs = paper.page.get_by_role("combobox", name="Network")
    names = runs.locator("option").all_inner_texts()
    assert re.fullmatch(rf"read-seed-0, \d\d\.\d %, {DATE}", names[0]), names
    assert re.fullmatch(rf"hasty-seed-0, \d\d\.\d %, {DATE}", names[1]), names
    groups = runs.locator("optgroup").evaluate_all("all => all.map(one => one.label)")
    assert groups == ["champions", "single runs"]
    paper.draw(DIGITS[3])
    assert paper.page.locator("#layers h2").count() == 3
    runs.select_option(index=1)
    paper.settle()
    assert paper.page.locator("#layers h2").count() == 4
    assert paper.asked[-1].endswith(runs.input_value())


GIVE = """([way, text, type, name]) => {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type }));
  const options = { bubbles: true, cancelable: true };
  $('paper').dispatchEvent(way === 'paste'
    ? new ClipboardEvent('paste', { clipboardData: data, ...options })
    : new DragEvent('drop', { dataTransfer: data, ...options }));
}"""


@pytest.mark.parametrize("way", ["paste", "drop", "choose"])
def test_images_of_ones_own_are_read(paper: Paper, lab: Lab, way: str) -> None:
    def give(content: bytes, kind: str, name: str) -> None:
        asked = paper.explained()
        if way == "choose":
            file = {"name": name, "mimeType": kind, "buffer": content}
            paper.page.locator("#file").set_input_files(file)  # type: ignore[arg-type]
        else:
            text = base64.b64encode(content).decode()
            paper.page.evaluate(GIVE, [way, text, kind, name])
        deadline = time.monotonic() + 30
        while paper.explained() == asked:
            assert time.monotonic() < deadline
            paper.page.wait_for_timeout(20)
        paper.settle()

    for digit in (2, 7):
        give(png(large(digit, lab), "JPEG"), "image/jpeg", "digit.jpg")
        assert paper.digit == str(digit)
        assert paper.ink() > 500
    give(png(large(3, lab), "TIFF"), "image/tiff", "scan.tif")  # no browser shows it
    assert paper.digit == "3"
    give(b"no image at all", "text/plain", "notes.txt")
    error = paper.page.get_by_role("alert")
    assert "not an image: it must be one of PNG" in error.inner_text()
    assert "\n" not in error.inner_text()
    paper.errors.clear()  # the browser's own line about status 400
    paper.page.keyboard.press("Control+z")  # the scan; the notes were not kept
    paper.settle()
    assert paper.digit == "7"
    assert not error.is_visible()


def choose(paper: Paper, content: bytes, kind: str) -> None:
    """Give a picture as a file, and wait for its answer."""
    asked = paper.explained()
    file = {"name": "digit", "mimeType": kind, "buffer": content}
    paper.page.locator("#file").set_input_files(file)  # type: ignore[arg-type]
    deadline = time.monotonic() + 30
    while paper.explained() == asked:
        assert time.monotonic() < deadline
        paper.page.wait_for_timeout(20)
    paper.settle()


def test_a_picture_that_only_the_browser_reads_is_sent_as_it_sees_it(
    paper: Paper, server: Server, lab: Lab
) -> None:
    photo = png(large(2, lab), "AVIF", quality=90)
    status, _, _ = server.ask("POST", "/predict", photo, Content_Type="image/avif")
    assert status == 400
    choose(paper, photo, "image/avif")
    assert paper.digit == "2"
    assert not paper.page.get_by_role("alert").is_visible()


def test_a_network_that_cannot_be_loaded_leaves_the_picture(browser: Browser, lab: Lab) -> None:
    def load(run: str) -> DigitReader:
        if not is_back:
            raise draw.UserError("its data are gone: they must be there. Fetch them.")
        return DigitReader(lab.tracker, run, lab.folder)

    is_back = False
    server = Server(free_port(), lab)
    with served(of(lab, load), server.port), opened(browser, server) as paper:
        choose(paper, png(large(7, lab)), "image/png")
        assert "its data are gone" in paper.page.get_by_role("alert").inner_text()
        assert paper.ink() > 500
        is_back = True
        paper.page.get_by_role("combobox", name="Network").select_option(index=1)
        paper.page.get_by_role("combobox", name="Network").select_option(index=0)
        paper.settle()
        assert paper.digit == "7"


def test_what_is_not_sure_has_no_probability_that_says_otherwise(paper: Paper) -> None:
    paper.draw(DIGITS[0])
    assert re.match(r"probability (> )?\d", paper.page.locator("#sure").inner_text())
    odd = "show({...last, status: 'unsure', message: 'not sure: perhaps 0', probability: 0.9997})"
    answer = {"digit": 0, "probabilities": [1, *[0] * 9], "attribution": [], "layers": [],
              "labels": list("0123456789")}  # fmt: skip
    paper.page.evaluate(f"(last) => {odd}", answer)
    assert paper.answer == "not sure: perhaps 0"
    assert paper.page.locator("#sure").inner_text() == (
        "unlike the digits that the network learned from"
    )


def test_backspace_clears_too_and_an_answer_is_read_aloud_when_the_pen_is_lifted(
    paper: Paper,
) -> None:
    page, live = paper.page, "document.getElementById('answer').ariaLive"
    box = page.locator("#paper").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 0.8 * box["height"], steps=5)
    assert page.evaluate(live) == "off"
    page.mouse.up()
    paper.settle()
    assert page.evaluate(live) == "polite"
    page.keyboard.press("Backspace")
    paper.settle()
    assert paper.ink() == 0


@pytest.mark.long
def test_large_photo_is_sent_smaller(paper: Paper, lab: Lab) -> None:
    rng = np.random.default_rng(0)
    pixels = np.asarray(Image.fromarray(large(5, lab)).resize((3000, 3000)), np.float64)
    photo = png(np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255), compress_level=0)
    assert len(photo) > draw._BODY
    paper.page.locator("#file").set_input_files(
        {"name": "photo.png", "mimeType": "image/png", "buffer": photo}
    )
    paper.page.locator("#answer:is(.digit, .unsure)").wait_for()
    paper.settle()
    assert paper.digit == "5"


def test_digit_is_drawn_by_keys_alone(paper: Paper) -> None:
    page = paper.page
    page.keyboard.press("Tab")  # the run
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "paper"
    assert page.locator("#pen").is_visible()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    for key, times in (("ArrowRight", 14), ("Shift+ArrowDown", 2)):
        for _ in range(times):
            page.keyboard.press(key)
    page.keyboard.down("ArrowLeft")
    for _ in range(9):  # both arrows: aslant
        page.keyboard.press("ArrowDown")
    page.keyboard.up("ArrowLeft")
    page.keyboard.press("Space")
    paper.settle()
    assert paper.digit == "7"
    ink = paper.ink()
    page.keyboard.press("ArrowUp")  # the pen is up
    assert paper.ink() == ink
    names = []
    for _ in range(4):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id"))
    assert names == ["undo", "clear", "file", "width"]
    assert not page.locator("#pen").is_visible()
    page.keyboard.press("Delete")
    assert paper.ink() == 0


def test_every_control_has_a_name_and_the_answer_is_announced(paper: Paper) -> None:
    for role, name in (
        ("combobox", "Network"),
        ("button", "Undo"),
        ("button", "Clear"),
        ("slider", "Stroke width"),
        ("application", "Paper: draw one digit here"),
        ("status", ""),
    ):
        assert paper.page.get_by_role(role, name=name).count() == 1, (role, name)  # type: ignore[arg-type]
    assert paper.page.get_by_label("Image…").count() == 1
    assert paper.page.get_by_role("progressbar").count() == 10
    assert paper.page.locator("#answer").get_attribute("aria-live") == "polite"


def test_phone_shows_all_of_it_and_a_finger_draws(
    browser: Browser, server: Server, tmp_path: Path
) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    with opened(browser, server, color_scheme="dark", **phone) as paper:
        page = paper.page
        touch = page.context.new_cdp_session(page)
        box = page.locator("#paper").bounding_box()
        assert box
        assert box["y"] + box["height"] < 740
        points = [
            (box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in DIGITS[0][0]
        ]
        for i, (x, y) in enumerate(points):
            kind = "touchMove" if i else "touchStart"
            at = [{"x": x, "y": y}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        paper.settle()
        page.screenshot(path=tmp_path / "phone.png", full_page=True)
        assert paper.digit == "0"
        assert page.evaluate("scrollY") == 0  # the page stayed where it was
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        cut = "e => [...e].filter(c => c.getBoundingClientRect().right > 360).map(c => c.id)"
        assert page.locator("button, select, input, canvas, p").evaluate_all(cut) == []
        assert page.evaluate("getComputedStyle($('paper')).touchAction") == "none"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark == "rgb(15, 19, 23)"
        assert paper.errors == []


def test_page_tells_that_the_server_has_gone_and_goes_on_when_it_is_back(
    browser: Browser, lab: Lab
) -> None:
    port, app = free_port(), of(lab)
    with ExitStack() as stack:
        with served(app, port):
            paper = stack.enter_context(opened(browser, Server(port, lab)))
        paper.draw(DIGITS[7])
        error = paper.page.get_by_role("alert")
        assert "does not answer" in error.inner_text()
        stack.enter_context(served(app, port))
        error.wait_for(state="hidden")
        assert paper.digit == "7"


# ---- untrusted programs ask ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(server: Server) -> dict[str, Any]:
    status, headers, document = server.ask("GET", "/openapi.json")
    assert (status, headers["cache-control"]) == (200, "no-store")
    return dict(document)


def misfits(schema: dict[str, Any], value: Any, api: dict[str, Any], at: str = "") -> list[str]:
    """Where a value is not as its schema says."""
    if "$ref" in schema:
        schema = api["components"]["schemas"][schema["$ref"].split("/")[-1]]
    if "anyOf" in schema:
        found = [misfits(one, value, api, at) for one in schema["anyOf"]]
        return min(found, key=len)
    kinds = {"object": dict, "array": list, "string": str, "null": type(None)}
    kinds |= {"integer": int, "number": (int, float)}  # type: ignore[dict-item]
    if not isinstance(value, kinds[schema["type"]]):
        return [f"{at}: {value!r:.80}"]
    if isinstance(value, dict):
        keys = set(schema["properties"])
        wrong = [f"{at}.{key}" for key in set(schema["required"]) ^ keys | set(value) ^ keys]
        return wrong + [
            misfit
            for key in keys & set(value)
            for misfit in misfits(schema["properties"][key], value[key], api, f"{at}.{key}")
        ]
    if isinstance(value, list):
        return [
            m
            for i, one in enumerate(value)
            for m in misfits(schema["items"], one, api, f"{at}[{i}]")
        ]
    return []


def keeps_its_word(
    server: Server, api: dict[str, Any], path: str, query: str, body: bytes, kind: str
) -> int:
    """A request is answered as the API's own document says; its status."""
    status, headers, answer = server.ask("POST", f"{path}?{query}", body, Content_Type=kind)
    declared = api["paths"][path]["post"]["responses"]
    assert str(status) in declared, (status, answer)
    assert status < 500 or status == 503, answer
    schema = declared[str(status)]["content"]["application/json"]["schema"]
    assert headers["content-type"] == "application/json"
    assert misfits(schema, answer, api) == []
    if status != 200:
        assert "\n" not in answer["detail"]
        assert 0 < len(answer["detail"]) < 500
    return status


def whole_files() -> list[bytes]:
    shade = np.tile(np.linspace(255, 0, 40), (40, 1)).astype(np.uint8)
    files = [png(shade, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "DIB")]
    for pixels in (shade.astype(np.int32) * 70000, shade.astype(np.uint16), shade / 9.0):
        file = io.BytesIO()
        image = Image.fromarray(pixels.astype(np.float32) if pixels.dtype == float else pixels)
        image.save(file, "TIFF")
        files.append(file.getvalue())
    alpha = np.dstack([shade, shade, shade, 255 - shade])
    return [*files, png(alpha), png(shade > 99, "PNG", bits=1)]


FILES = whole_files()


@st.composite
def damaged(draw_from: st.DrawFn) -> bytes:
    """An image file with some bytes changed, and perhaps cut short."""
    file = bytearray(draw_from(st.sampled_from(FILES)))
    places = st.integers(0, min(len(file) - 1, draw_from(st.sampled_from([60, 10**6]))))
    for place, byte in draw_from(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        file[place] = byte
    cut = draw_from(st.none() | st.integers(0, len(file)))
    return bytes(file[:cut])


BODIES = damaged() | st.binary(max_size=300) | st.sampled_from(FILES)
KINDS = st.sampled_from(["image/png", "image/anything", "application/octet-stream"])
FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@settings(FUZZ, max_examples=100)
@given(st.sampled_from(["/predict", "/explain", "/likeness"]), BODIES, KINDS)
def test_any_bytes_are_answered_as_declared(
    server: Server, api: dict[str, Any], path: str, body: bytes, kind: str
) -> None:
    assert keeps_its_word(server, api, path, f"run={server.lab.read}", body, kind) in (200, 400)


@settings(FUZZ, max_examples=60)
@given(
    st.sampled_from(["/predict", "/explain", "/likeness"]),
    st.dictionaries(
        st.sampled_from(["run", "runs", "x"]) | st.text(max_size=5), st.text(), max_size=3
    ).map(urllib.parse.urlencode)
    | st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#")),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1) | KINDS,
)
def test_any_query_and_type_is_answered_as_declared(
    server: Server, api: dict[str, Any], path: str, query: str, kind: str
) -> None:
    answered = keeps_its_word(server, api, path, query, FILES[0], kind)
    named = "run" in urllib.parse.parse_qs(query, keep_blank_values=True)
    assert answered in ((404, 415, 422) if named else (200, 400, 415))


def test_api_tells_of_every_answer_it_gives(server: Server, api: dict[str, Any], lab: Lab) -> None:
    assert set(api["paths"]) == {"/", "/runs", "/predict", "/explain", "/likeness"}
    file = png(large(4, lab))
    kinds = {"/predict": "Reading", "/explain": "Explanation", "/likeness": "Likeness"}
    for path, kind in kinds.items():
        reported = api["paths"][path]["post"]
        assert set(reported["requestBody"]["content"]) == {"image/*", "application/octet-stream"}
        problems = {"400", "403", "404", "408", "413", "415", "422", "503"}
        assert set(reported["responses"]) == {"200", *problems}
        assert reported["responses"]["200"]["content"]["application/json"]["schema"] == {
            "$ref": f"#/components/schemas/{kind}"
        }
        query = f"run={lab.read}"
        assert keeps_its_word(server, api, path, query, file, "image/png") == 200
        assert keeps_its_word(server, api, path, query, b"", "image/png") == 400
        assert keeps_its_word(server, api, path, "run=no", file, "image/png") == 404
        assert keeps_its_word(server, api, path, query, file, "text/html") == 415
        assert keeps_its_word(server, api, path, "", file, "image/png") == 200  # by the first
        assert keeps_its_word(server, api, path, f"run={'x' * 65}", file, "image/png") == 422
    status, _, runs = server.ask("GET", "/runs")
    assert (status, [run["run_id"] for run in runs]) == (200, [lab.read, lab.hasty])


def test_likeness_holds_training_images_and_a_change_that_fools(server: Server, lab: Lab) -> None:
    found = server.predict(png(large(4, lab)), "likeness")
    assert [one["label"] for one in found["nearest"]].count("4") >= 3
    assert found["fooling"]["label"] != "4"
    assert server.predict(png(np.full((50, 50), 255)), "likeness") == {
        "nearest": [],
        "fooling": None,
    }


def test_explanation_holds_the_answer_and_its_reasons(server: Server, lab: Lab) -> None:
    file = png(large(4, lab))
    short, whole = server.predict(file), server.predict(file, "explain")
    assert {key: whole[key] for key in short} == short
    assert (short["path"], short["digit"], whole["speaks_for"]) == ("", 4, 4)
    assert whole["rather_than"] != 4
    assert np.shape(whole["seen"]) == np.shape(whole["attribution"]) == (28, 28)
    assert np.abs(whole["attribution"]).max() > 0
    for layer, count in zip(whole["layers"], (16, 32, 1), strict=True):
        maps = np.array(layer["maps"])
        assert (layer["count"], len(maps)) == (count, min(8, count))
        assert (maps.min(), maps.max()) == (0, 255)


def test_what_is_no_digit_has_reasons_with_names(
    server: Server, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "_FAR", 0)  # all images are unlike those of the training
    whole = server.predict(png(large(4, lab)), "explain")
    assert (whole["status"], whole["speaks_for"]) == ("none", 4)
    assert whole["labels"] == list("0123456789")


@pytest.mark.slow
def test_reasons_of_many_at_once_are_not_mixed_up(server: Server, lab: Lab) -> None:
    files = [png(large(digit, lab)) for digit in range(10)]
    alone = [server.predict(file, "explain") for file in files]
    together: dict[int, Any] = {}

    def ask(i: int) -> None:
        together[i] = server.predict(files[i % 10], "explain" if i < 40 else "predict")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(60):
        assert together[i] == {key: alone[i % 10][key] for key in together[i]}


@pytest.mark.slow
def test_no_digit_is_claimed_where_there_is_none(server: Server) -> None:
    rng = np.random.default_rng(3)
    blank = [np.full((280, 280), grey, np.uint8) for grey in (0, 7, 128, 255)]
    noise = [rng.integers(0, 256, (side, side)) for side in (28, 60, 280) for _ in range(8)]
    grain = [np.clip(rng.normal(128, spread, (280, 280)), 0, 255) for spread in (2, 9, 40)]
    specks = [np.where(rng.random((280, 280)) < share, 0, 255) for share in (0.001, 0.01, 0.1)]
    for pixels in (*blank, *noise, *grain, *specks):
        answer = server.predict(png(pixels))
        assert answer["status"] != "digit", answer


# ---- what the server refuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost@evil.example"},
        {"Host": "127.0.0.2"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost:{port}"},  # not the same name as Host
    ],
)
def test_other_sites_are_refused(server: Server, headers: dict[str, str], lab: Lab) -> None:
    headers = {key: value.format(port=server.port) for key, value in headers.items()}
    for method, path in (("GET", "/"), ("GET", "/runs"), ("POST", f"/predict?run={lab.read}")):
        status, _, answer = server.ask(method, path, FILES[0], Content_Type="image/png", **headers)
        assert (status, set(answer)) == (403, {"detail"})


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_own_page_and_programs_are_let_in(server: Server, name: str) -> None:
    host = f"{name}:{server.port}"
    for headers in ({}, {"Origin": f"http://{host}"}):
        status, _, page = server.ask("GET", "/", Host=host, **headers)
        assert (status, page[:15]) == (200, "<!doctype html>")


def test_headers_let_nothing_else_run(server: Server) -> None:
    for path in ("/", "/runs", "/nowhere"):
        _, headers, _ = server.ask("GET", path)
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; connect-src 'self'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


def test_bodies_that_are_too_long_are_refused(server: Server, lab: Lab) -> None:
    path = f"/predict?run={lab.read}"
    for size, status in ((draw._BODY, 400), (draw._BODY + 1, 413), (3 * draw._BODY, 413)):
        reported, _, answer = server.ask("POST", path, bytes(size), Content_Type="image/png")
        assert reported == status, answer
    chunks = (bytes(2**16) for _ in range(200))  # of unknown length
    status, _, answer = server.ask("POST", path, chunks, Content_Type="image/png")
    assert (status, answer) == (413, {"detail": "the image: more than 8 MB"})


def test_body_that_does_not_come_is_given_up(
    server: Server, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_page, "SECONDS", 0.5)
    head = (
        f"POST /predict?run={lab.read} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    )
    for length in ("Content-Length: 1000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n"):
        with socket.create_connection((HOST, server.port), timeout=60) as slow:
            slow.sendall((head + length).encode())
            answer = b""
            while part := slow.recv(65536):  # until the server ends it
                answer += part
            assert answer.startswith(b"HTTP/1.1 408 ")
    assert server.predict(FILES[0])["status"]


def test_a_sender_of_no_http_leaves_no_traceback_on_the_terminal(
    server: Server, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    head = (
        f"POST /predict?run={lab.read} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    )
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)  # it does not propagate
    with socket.create_connection((HOST, server.port), timeout=60) as broken:
        broken.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode())
        answer = b""
        while part := broken.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert server.predict(FILES[0])["status"]
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert caplog.records == []


OPENED: list[list[str]] = []  # the innermost list takes names while there is one
sys.addaudithook(
    lambda event, given: OPENED[-1].append(str(given[0])) if OPENED and event == "open" else None
)


def test_names_that_look_like_paths_open_nothing(server: Server) -> None:
    names = [
        "/etc/passwd",
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "file:///etc/passwd",
        "%00",
    ]
    names += [f"{server.lab.read}/../{server.lab.read}", "read-seed-0", "champion", "*", "."]
    OPENED.append([])
    try:
        for name in names:
            for path in ("predict", "explain"):
                answer = server.ask(
                    "POST", f"/{path}?run={name}", FILES[0], Content_Type="image/png"
                )
                assert answer[0] in (404, 422)  # the latter where it is too long
                assert set(answer[2]) == {"detail"}
        for path in ("/etc/passwd", "/../../etc/passwd", "/%2e%2e/draw.py", "/page.html", "/docs"):
            assert server.ask("GET", path)[0] == 404
        assert OPENED[-1] == []
    finally:
        OPENED.pop()


@pytest.mark.slow
def test_more_than_can_wait_are_sent_away_and_the_others_answered(lab: Lab) -> None:
    may_load = threading.Event()
    loads: list[str] = []

    def load(run: str) -> DigitReader:
        loads.append(run)
        may_load.wait(60)
        return DigitReader(lab.tracker, run, lab.folder)

    server = Server(free_port(), lab)
    file, path = png(large(6, lab)), f"/predict?run={lab.read}"
    answers: list[tuple[int, dict[str, str], Any]] = []
    with served(of(lab, load), server.port):
        ask = lambda: answers.append(server.ask("POST", path, file, Content_Type="image/png"))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(80)]
        for thread in threads:
            thread.start()
        while len(answers) < 14:  # of 66 nobody is answered before the network is loaded
            time.sleep(0.02)
        assert [(status, headers["retry-after"]) for status, headers, _ in answers] == [
            (503, "1")
        ] * 14
        may_load.set()
        for thread in threads:
            thread.join()
    assert [answer["digit"] for status, _, answer in answers[14:] if status == 200] == [6] * 66
    assert loads == [lab.read]  # once for all


def test_network_that_cannot_be_loaded_is_reported_and_tried_again(
    lab: Lab, api: dict[str, Any]
) -> None:
    def load(run: str) -> DigitReader:
        if not is_back:
            raise draw.UserError("its data\nare gone")
        return DigitReader(lab.tracker, run, lab.folder)

    is_back = False
    server = Server(free_port(), lab)
    with served(of(lab, load), server.port):
        query = f"run={lab.read}"
        assert keeps_its_word(server, api, "/explain", query, FILES[0], "image/png") == 503
        is_back = True
        assert keeps_its_word(server, api, "/explain", query, FILES[0], "image/png") == 200


def test_few_networks_are_kept_and_the_last_used_among_them(lab: Lab) -> None:
    loads: list[str] = []
    names = [f"run{i}" for i in range(6)]

    def load(run: str) -> DigitReader:
        loads.append(run)
        return kept

    kept = DigitReader(lab.tracker, lab.hasty, lab.folder)
    runs = [draw.ListedRun(name, name, "train", None, "") for name in names]
    server = Server(free_port(), lab)
    with served(draw.application(lambda: runs, load), server.port):
        for i in (0, 1, 2, 3, 0, 4, 0, 1):
            path = f"/predict?run={names[i]}"
            assert server.ask("POST", path, FILES[0], Content_Type="image/png")[0] == 200
    assert [int(name[-1]) for name in loads] == [0, 1, 2, 3, 4, 1]


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_serves_the_champion_until_ctrl_c(lab: Lab, tmp_path: Path) -> None:
    port = free_port()
    command = [*COMMAND, "draw", "--port", str(port)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment_of(lab.folder), stdout=log, stderr=log)
    try:
        server, deadline = Server(port, lab), time.monotonic() + 60
        while True:
            try:
                assert server.predict(png(large(8, lab)))["digit"] == 8
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        with pytest.raises(draw.UserError, match=f"--port={port} is taken"):
            play.draw("champion", lab.folder, port)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "log").read_text() == f"draw: http://127.0.0.1:{port}   (Ctrl-C ends it)\n"


def test_unknown_run_is_reported_in_a_line(lab: Lab) -> None:
    with pytest.raises(draw.UserError, match=r"raed-seed-0: no such run, did you mean read-seed-0"):
        play.draw("raed-seed-0", lab.folder, free_port())
