"""What the page costs that shows a network learn, and how soon it shows anything."""

import http.client
import io
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from bench_tools import OWN_STORES, PROGRAM, Figure, quantile, run
from PIL import Image

from digitlab.data.datasets import TEST, load_digits
from digitlab.records.reader import lab_tracker

_LEARNED = 50_000  # images of an epoch


class _OpenPage:
    """A page in the middle of its work, as a tab of the browser uses it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.events = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self.events.request("GET", "/events")
        self.stream = self.events.getresponse()

    def ask(self, path: str, body: bytes, kind: str = "application/json") -> Any:
        address = f"http://127.0.0.1:{self.port}{path}"
        request = Request(address, body, {"Content-Type": kind})
        with urlopen(request, timeout=60) as answer:  # noqa: S310
            return json.loads(answer.read())

    def explain(self, which: str, drawing: bytes) -> float:
        """Return the milliseconds that the answer to a drawing takes, with its reasons."""
        asked = time.perf_counter()
        self.ask(f"/explain?{which}", drawing, "image/png")
        return 1000 * (time.perf_counter() - asked)

    def event(self) -> dict[str, Any]:
        while True:
            line = self.stream.readline()
            if line.startswith(b"data: "):
                found: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                return found

    def train(self, drawings: list[bytes]) -> tuple[str, float, list[float]]:
        """Train the article's network; return run id, seconds to the first moment, latencies.

        Each moment is looked at; in between one drawing after another is explained, if there are.
        """
        started = time.perf_counter()
        self.ask("/train", b'{"is_fixed": true}')
        first, latencies = 0.0, []
        while True:
            event = self.event()
            if event["kind"] == "moment":
                first = first or time.perf_counter() - started
                where = f"run={event['run']}&step={event['step']}"
                urlopen(f"http://127.0.0.1:{self.port}/look?{where}").close()
                live = f"run=live:{event['run']}:{event['step']}"
                latencies += [self.explain(live, drawing) for drawing in drawings]
            if event.get("state") == "finished":
                run_id = event["run_id"]
            if event["kind"] == "free":
                return run_id, first, latencies


def play(lab: Path, repeats: int) -> list[Figure]:
    """The article's network: by the command and by the page in turns, then with drawings."""
    drawings = []
    for digit in load_digits(lab, "mnist", TEST).images[:25]:
        file = io.BytesIO()
        Image.fromarray(255 - digit).resize((280, 280)).save(file, "PNG")
        drawings.append(file.getvalue())
    ratios, firsts = [], []
    with _played(lab) as page:
        for _ in range(repeats + 1):
            run([PROGRAM, "train", "experiments=seed", *OWN_STORES], lab)
            newest = lab_tracker(lab).find({"digitlab.kind": "train"})[-1].run_id
            mine, first, _ = page.train([])
            ratios.append(_seconds(lab, mine) / _seconds(lab, newest))
            firsts.append(first)
        newest, _, latencies = page.train(drawings)
        urlopen(f"http://127.0.0.1:{page.port}/runs").close()  # so that the page knows it
        alone = [page.explain(f"run={newest}", drawing) for drawing in [*drawings, *8 * drawings]]
    return [
        Figure("watched on the page / not, training seconds", "ratio", ratios[1:], most=1.05),
        Figure("from Train to the first moment", "s", firsts[1:], most=1),
        Figure("a drawing explained while a run trains: p99", "ms", [quantile(latencies, 0.99)],
               most=150),
        Figure("the same while none does: p99", "ms", [quantile(alone[25:], 0.99)]),
    ]  # fmt: skip


def _seconds(lab: Path, run_id: str) -> float:
    """Return the seconds that a run trained, as its images a second have it."""
    history = lab_tracker(lab).history(run_id)
    return sum(_LEARNED / value for name, _, value in history if name == "images_per_second")


@contextmanager
def _played(lab: Path) -> Iterator[_OpenPage]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = os.environ | {"DIGITLAB_HOME": str(lab)}
    command = [PROGRAM, "play", "--port", str(port)]
    with subprocess.Popen(command, env=place, stdout=subprocess.DEVNULL) as process:
        try:
            while True:
                try:
                    urlopen(f"http://127.0.0.1:{port}/form").close()
                    break
                except URLError:
                    if process.poll() is not None:
                        raise
                    time.sleep(0.2)
            yield _OpenPage(port)
        finally:
            process.terminate()
