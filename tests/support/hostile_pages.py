"""Hostile requests to the pages, by a socket, and whether the server goes on."""

import json
import logging
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from hostile import Reader
from hostile_images import good_images
from mutate import NUMBERS, TEXTS, damaged, damaged_json
from samples import copy_digits

from digitlab.base.errors import UserError
from digitlab.config.compose import compose
from digitlab.digits.predict import DigitReader
from digitlab.pages import server as serving
from digitlab.pages.form import Form
from digitlab.pages.play import Asked, Lesson, lesson_app
from digitlab.records.record import open_records
from digitlab.study.run import train

TINY = ["experiments=smoke", "data=sample", "model.widths=[4]", "name=tiny"]
VALUES = {"model.widths": [16, 32], "model.batch_norm": True, "trainer.epochs": 3,
          "optim.learning_rate": 0.01, "data.batch_size": 64, "optim.name": "adamw"}  # fmt: skip
ASKED = {
    "values": VALUES,
    "is_fixed": False,
    "action": "",
    "ticked": ["model.widths"],
    "minutes": 1,
}


# What may be answered; 0 is a connection that was closed.
DECLARED = {0, 200, 307, 400, 403, 404, 405, 408, 409, 411, 413, 415, 422, 431, 501, 503}


class Untrained(Lesson):
    """Everything but training itself, which would take minutes."""

    def train(self, asked: Asked) -> int:
        self.form.check(asked.values, asked.is_fixed)
        self.form.compose(asked.values, asked.is_fixed)
        return 1

    def start_search(self, asked: Asked) -> None:
        self.form.compose(asked.values, asked.is_fixed)


class Requests(Reader):
    """Bytes that a client sends to `digitlab play`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        lab = folder / "pages"
        if not lab.exists():
            train(compose("train", TINY)[0], copy_digits(lab))
        self.errors: list[str] = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self.errors.append(  # type: ignore[method-assign]
            f"{record.getMessage()} {record.exc_info}"
        )
        logging.getLogger("uvicorn.error").addHandler(handler)
        serving.SECONDS = 0.3
        form = Form(["data=sample"])
        records = open_records(form.base.config, lab)
        lesson = Untrained(form, lab, records, DigitReader(records.tracker, "tiny", lab))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        server = serving.PageServer(lesson_app(lesson, "play"), self.port)
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.01)

    def request(
        self, path: str, body: bytes = b"", kind: str = "application/json", method: str = "",
        more: bytes = b"", length: Any = None,
    ) -> bytes:  # fmt: skip
        method = method or ("POST" if body else "GET")
        given = len(body) if length is None else length
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n"
        head += f"Content-Type: {kind}\r\nContent-Length: {given}\r\n"
        return head.encode(errors="surrogatepass") + more + b"\r\n" + body

    def corpus(self) -> Sequence[bytes]:
        form, images = json.dumps(ASKED).encode(), good_images()
        good = [self.request(f"/{path}", form) for path in ("check", "train", "control", "search")]
        paths = (
            "",
            "runs",
            "form",
            "ladder",
            "look?run=1&step=1&place=0",
            "save?run=live:1:1",
            "save?run=x",
        )
        good += [self.request(f"/{path}") for path in paths]
        reads = ("predict", "explain", "likeness", "predict?run=live:1:1")
        good += [self.request(f"/{path}", images[0], "image/png") for path in reads]
        lengths = (-1, 0, 1, 10**9, 10**30, "x", "", "1, 1", "+5", "0x10")
        wrong = [self.request("/check", form, length=number) for number in lengths]
        chunked = b"Transfer-Encoding: chunked\r\n"
        wrong += [
            self.request("/predict", chunk, "image/png", more=chunked)
            for chunk in (
                b"0\r\n\r\n",
                b"zz\r\n",
                b"-1\r\n",
                b"ffffffffffffffff\r\nabc",
                b"5\r\nab",
            )
        ]
        wrong += [self.request("/" + "a" * 10**5), self.request("/?" + "a=b&" * 10**5)]
        wrong += [self.request("/form", more=b"X: " + b"y" * 10**6 + b"\r\n")]
        wrong += [
            self.request("/form", more=b"X: y\r\n" * 10**4),
            b"",
            b"\0" * 100,
            b"GET / HTTP/9.9\r\n\r\n",
        ]
        wrong += [
            self.request("/form", more=b"Host: evil\r\n"),
            self.request("/check", form, "text/plain"),
        ]
        bodies = (
            b"",
            b"null",
            b"[]",
            b"{",
            b"\xff",
            b"[" * 60_000,
            b'{"minutes": NaN}',
            b'{"minutes": 1e999}',
            b'{"values": {"trainer.epochs": 1' + b"0" * 60_000 + b"}}",
            bytes(2**17),
            b'{"values": {"\\ud800": 1}}',
            b'{"values": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001,
        )
        wrong += [self.request("/check", body, method="POST") for body in bodies]
        numbers = ("nan", "1e5", "-1", "9" * 30, "9" * 5000, "", "0", "%00", "\u0661")
        wrong += [self.request(f"/look?run={n}&step={n}&place={n}") for n in numbers]
        wrong += [self.request(f"/save?run=live:{n}:{n}") for n in numbers]
        wrong += [
            self.request(f"/predict?run=live:{n}:{n}", images[0], "image/png") for n in numbers[:5]
        ]
        return [*good, *wrong]

    def draw(self, chance: Random) -> bytes:
        kind = chance.randrange(6)
        if kind == 0:
            return damaged(chance.choice(self.known), self.known[:15], chance)
        if kind == 1:
            image = damaged(chance.choice(good_images()), good_images(), chance)[: 2**20]
            path = chance.choice(("predict", "explain", "likeness"))
            return self.request(f"/{path}", image, chance.choice(("image/png", "image/x", "a/b")))
        path = chance.choice(("check", "train", "control", "search", "predict", "x"))
        if kind == 2:
            body = json.dumps(ASKED).encode()
            more = chance.choice(TEXTS).encode(errors="surrogatepass") + b": 1\r\n"
            return self.request(f"/{path}", body, more=more, length=chance.choice((None, *NUMBERS)))
        if kind == 3:
            values = (*TEXTS, *map(str, NUMBERS))
            query = "&".join(
                f"{chance.choice(('run', 'step', 'place', 'x'))}={chance.choice(values)}"
                for _ in range(chance.choice((1, 2, 3)))
            )
            path = chance.choice(("look", "save", "predict", "explain", "runs", "ladder", "form"))
            return self.request(f"/{path}?{query}")
        return self.request(f"/{path}", damaged_json(ASKED, chance)[: 2**20] or b" ")

    def read(self, given: bytes) -> None:
        status, answer = self.ask(given)
        alive, _ = self.ask(self.request("/form"))
        assert alive == 200, f"the page does not go on: {alive}"
        if self.errors:
            found, self.errors = self.errors, []
            raise AssertionError("\n".join(found)[-2500:])
        assert status in DECLARED, (status, answer[:300])
        if status != 200:
            text = answer.partition(b"\r\n\r\n")[2].decode(errors="replace")
            raise UserError(text[:3000] or f"status {status}")

    def ask(self, given: bytes) -> tuple[int, bytes]:
        """Send it all, say that no more comes, and return status and answer; 0 without one."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as client:
            try:
                client.sendall(given)
                client.shutdown(socket.SHUT_WR)
                while part := client.recv(65536):
                    answer += part
                    if b"text/event-stream" in answer[:2000]:  # goes on for ever
                        break
            except TimeoutError:
                raise
            except OSError:  # it need not read what it refuses
                pass
        words = answer.split(b" ", 2)
        return (int(words[1]) if len(words) > 2 else 0), answer
