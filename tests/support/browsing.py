"""Pages of ours, parsed, and in a real browser. A pytest plugin."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright
from playwright.sync_api import Page as BrowserPage


class Page(HTMLParser):
    """The text of each section by its heading, and the attributes of all that is in the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.headings: list[int] = []  # in each section
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.drawn: dict[str, Any] = {}  # what the charts are drawn from
        self.title = ""
        self.feed(page.split("</main>", maxsplit=1)[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "br", "meta", "link"):
            self.inside.append(tag)
        if tag == "section":
            self.headings.append(0)
        if tag == "h2":
            self.headings[-1] += 1
            self.title = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.inside[-1:] == ["h2"]:
            self.title += data
            self.sections[self.title] = ""
        elif self.inside[-1:] == ["script"]:
            self.drawn[self.title] = json.loads(data)
        elif self.title:
            self.sections[self.title] += data + " "

    def missing(self) -> set[str]:
        """The sections that say so."""
        return {title for title, text in self.sections.items() if "Missing:" in text}

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real one; without it the tests that need one are skipped, by name."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"NO BROWSER, SO NO PAGE WAS LOOKED AT: install one of {', '.join(names)}")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=options, timeout=90_000)
        yield browser
        browser.close()


DRAWN = (
    """() => [...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))"""
)


@dataclasses.dataclass
class Seen:
    """A page of ours in the browser, and what it did."""

    page: BrowserPage
    requests: list[str]
    errors: list[str]


def look(browser: Browser, text: str, folder: Path, width: int = 1200) -> Seen:
    """Open a page from a file, offline, until its charts are drawn."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    context = browser.new_context(offline=True, viewport={"width": width, "height": 900})
    page = context.new_page()
    seen = Seen(page, [], [])
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda line: seen.errors.extend([line.text] * (line.type == "error")))
    page.goto(file.as_uri())
    page.wait_for_function(DRAWN, timeout=90_000)
    return seen
