"""--open: the program that BROWSER names gets the address, once something serves it."""

import socket
from pathlib import Path

import pytest

from digitlab.pages.browser import open_page, open_when_served


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the browser writes the address into."""
    program, file = tmp_path / "browser", tmp_path / "opened"
    program.write_text(f'#!/bin/sh\nprintf %s "$1" > {file}\n')
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{program} %s")
    return file


def test_page_is_opened_as_soon_as_it_is_served(opened: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert open_when_served(port).wait(30) == 0
    assert opened.read_text() == f"http://127.0.0.1:{port}"


def test_file_is_opened_at_once(opened: Path, tmp_path: Path) -> None:
    open_page((tmp_path / "a page.html").as_uri())
    assert opened.read_text().endswith("/a%20page.html")
