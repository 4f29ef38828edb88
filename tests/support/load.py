"""The page under load: drawings at a fixed rate, slow and broken senders, and networks in training.

A program of its own: `load.py SECONDS` prints what it has counted as one line of JSON. `served`
runs the page in a process of its own, whose memory is read while nothing trains.
"""

import io
import json
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from digitlab.data.datasets import TEST, load_digits

RATE = 50  # drawings a second
SLOW = 4  # senders that take longer than a body may
BROKEN = (
    b"Content-Length: 90000\r\n\r\nshort",
    b"Content-Length: 4\r\n\r\nGIF8",
    b"Content-Length: -1\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
)


class Load:
    """Clients of one page, until `seconds` are over."""

    def __init__(self, address: str, drawings: list[bytes], seconds: float) -> None:
        self.address, self.drawings = address, drawings
        self.port = int(address.rpartition(":")[2])
        self.ends = time.monotonic() + seconds
        self.counts = Counter[str]()
        self.milliseconds: list[float] = []
        self.lock = threading.Lock()

    def count(self, name: str) -> None:
        with self.lock:
            self.counts[name] += 1

    def is_over(self) -> bool:
        return time.monotonic() >= self.ends

    def ask(self, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def train(self) -> str:
        """Train the article's network on the page; return its run's id."""
        with urllib.request.urlopen(f"{self.address}/events", timeout=120) as events:
            body = b'{"is_fixed": true, "values": {"trainer.epochs": 5}}'
            number, run_id = self.ask("/train", body)["run"], ""
            for line in events:  # those of earlier runs come first
                if line.startswith(b"data: "):
                    event = json.loads(line.removeprefix(b"data: "))
                    if event.get("run") == number:
                        run_id = event.get("run_id", run_id)
                    if event["kind"] == "free" and run_id:
                        break
        self.count("trained")
        return run_id

    def draw(self, run_id: str, number: int, due: float) -> None:
        time.sleep(max(0.0, due - time.monotonic()))
        drawing = self.drawings[number % len(self.drawings)]
        try:
            self.ask(f"/predict?run={run_id}", drawing, "image/png")
        except OSError as error:
            self.count(f"lost: {error}")
            return
        with self.lock:
            self.milliseconds.append(1000 * (time.monotonic() - due))
            self.counts["read"] += 1

    def send_slowly(self, run_id: str) -> None:
        while not self.is_over():
            with socket.create_connection(("127.0.0.1", self.port), 30) as sender:
                sender.sendall(_head(b"Content-Length: 50\r\n\r\n", run_id))
                try:
                    for _ in range(50):
                        sender.sendall(b"x")
                        time.sleep(0.5)
                except OSError:  # the page has closed it
                    self.count("slow")

    def send_broken(self) -> None:
        while not self.is_over():
            for end in BROKEN:
                with socket.create_connection(("127.0.0.1", self.port), 30) as sender:
                    sender.sendall(_head(end))
                    time.sleep(0.1)
                self.count("broken")


def _head(end: bytes, run_id: str = "x") -> bytes:
    first = f"POST /predict?run={run_id} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
    return first + b"Content-Type: image/png\r\n" + end


def drawings_of(lab: Path) -> list[bytes]:
    files = []
    for digit in load_digits(lab, "sample", TEST).images[:50]:
        file = io.BytesIO()
        Image.fromarray(255 - digit).resize((280, 280)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def megabytes_of(port: int) -> float:
    """Return the memory of the process that listens on a port."""
    inodes = [
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if int(line.split()[1].rpartition(":")[2], 16) == port and line.split()[3] == "0A"
    ]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [str(file.readlink()) for file in (process / "fd").iterdir()]
            if any(f"socket:[{inode}]" in files for inode in inodes):
                rollup = (process / "smaps_rollup").read_text()
                return int(rollup.partition("Pss:")[2].split()[0]) / 1024
        except OSError:  # it ended, or is another user's
            continue
    raise ProcessLookupError(port)


def put_under_load(address: str, drawings: list[bytes], seconds: float) -> dict[str, Any]:
    """Train, draw and disturb for so many seconds; return what was counted, and the memory."""
    load = Load(address, drawings, seconds)
    run_id = load.train()
    assert run_id in [run["run_id"] for run in load.ask("/runs")]
    memory = []
    with ThreadPoolExecutor(RATE + SLOW + 2) as clients:
        disturbing = [clients.submit(load.send_slowly, run_id) for _ in range(SLOW)]
        disturbing.append(clients.submit(load.send_broken))
        number = 0
        while not load.is_over():
            training = clients.submit(load.train)
            waiting = []
            started = time.monotonic()
            while not training.done() or time.monotonic() < started + 10:
                due = started + len(waiting) / RATE
                waiting.append(clients.submit(load.draw, run_id, number, due))
                number += 1
                time.sleep(max(0.0, due - time.monotonic()))
            for one in (*waiting, training):
                one.result()
            memory.append(megabytes_of(load.port))
        for one in disturbing:
            one.result()
    assert load.counts["read"], load.counts
    ordered = sorted(load.milliseconds)
    return {
        "counts": dict(load.counts),
        "p99_ms": ordered[int(0.99 * len(ordered))],
        "median_ms": ordered[len(ordered) // 2],
        "megabytes": [round(one, 1) for one in memory],
    }


if __name__ == "__main__":
    from enumeration import new_lab
    from serving import served

    folder = Path(tempfile.mkdtemp(prefix="digitlab-"))
    lab = new_lab(folder / "lab")
    with served("play", lab, "/form", folder / "log", "data=sample") as page:
        found = put_under_load(
            f"http://127.0.0.1:{page.port}", drawings_of(lab), float(sys.argv[1])
        )
        print(json.dumps(found | {"printed": (folder / "log").read_text()[-2500:]}))
