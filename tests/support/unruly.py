"""A proxy in front of an MLflow server that misbehaves for some requests; a pytest plugin."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from trackers import HOST, Server

HANG_S = 5.0  # longer than a client waits in these tests
# Answers with a status: MLflow's own JSON with its word for it, others as a proxy writes them.
CODES = {
    *("500 INTERNAL_ERROR", "400 INVALID_PARAMETER_VALUE", "403 PERMISSION_DENIED"),
    *("502", "503", "429", "408", "413"),
}
KINDS = (*sorted(CODES), "half", "cut", "hung", "late", "page")
LIES = ("empty", "lied")  # 200, and nothing in it or something else


class Unruly(ThreadingHTTPServer):
    """Passes requests on; `misbehave` says what happens to which of them.

    half: the answer breaks off; cut: the connection is closed while the request arrives; hung: no
    answer; late: the server has done it, and the answer comes too late; page: a page of another
    program; empty: an answer without a body; lied: JSON of another kind.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, server: Server) -> None:
        super().__init__((HOST, 0), _Handler)
        self.behind, self.uri = server.port, f"http://{HOST}:{self.server_address[1]}"
        self.kind, self.skipped, self.left, self.hits = "", 0, 0, 0
        self.turn = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def misbehave(self, kind: str, skipped: int = 0, count: int = 10**9) -> None:
        """Pass so many requests on, then treat so many wrongly."""
        with self.turn:
            self.kind, self.skipped, self.left, self.hits = kind, skipped, count, 0

    def behave(self) -> None:
        self.misbehave("", count=0)

    def next_kind(self) -> str:
        with self.turn:
            if self.skipped or not self.left:
                self.skipped = max(0, self.skipped - 1)
                return ""
            self.left -= 1
            self.hits += 1
            return self.kind

    def handle_error(self, *_: Any) -> None:
        """Say nothing of connections that the client has given up."""


class _Handler(BaseHTTPRequestHandler):
    server: Unruly
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _pass(self) -> None:
        kind, length = self.server.next_kind(), int(self.headers.get("Content-Length", 0))
        if kind == "cut":
            self.rfile.read(length // 2)
            self._close()
            return
        is_chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        body = b"".join(self._chunks()) if is_chunked else self.rfile.read(length)
        if kind in CODES:
            status, _, code = kind.partition(" ")
            text = json.dumps({"error_code": code, "message": "no"}) if code else "<h1>no</h1>"
            self._answer(int(status), text.encode(), "application/json" if code else "text/html")
        elif kind == "hung":
            time.sleep(HANG_S)
            self._close()
        elif kind == "page":
            self._answer(200, b"<!doctype html><title>Log in</title>", "text/html")
        elif kind == "empty":
            self._answer(200, b"")
        elif kind == "lied":
            self._answer(200, b'{"run": [], "runs": 5}')
        else:
            self._forward(kind, body)

    def _chunks(self) -> Iterator[bytes]:
        while length := int(self.rfile.readline(), 16):
            yield self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()

    def _forward(self, kind: str, body: bytes) -> None:
        behind = http.client.HTTPConnection(HOST, self.server.behind, timeout=60)
        other = ("Host", "Transfer-Encoding", "Content-Length")
        kept = {name: value for name, value in self.headers.items() if name not in other}
        behind.request(self.command, self.path, body, kept)
        answer = behind.getresponse()
        content = answer.read()
        behind.close()
        if kind == "late":
            time.sleep(HANG_S)
        self._answer(
            answer.status,
            content,
            answer.headers.get("Content-Type", "text/plain"),
            len(content) // 2 if kind == "half" else None,
        )

    def _answer(
        self, status: int, body: bytes, kind: str = "application/json", sent: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if sent is None else body[:sent])
        if sent is not None:
            self._close()

    def _close(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815


@pytest.fixture
def unruly(tracker_server: Server) -> Iterator[Unruly]:
    proxy = Unruly(tracker_server)
    yield proxy
    proxy.shutdown()
    proxy.server_close()
