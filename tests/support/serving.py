"""`digitlab ui` and its relatives in a process of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trackers import CODE

HOST = "127.0.0.1"
COMMAND = [sys.executable, "-c", "import sys; from digitlab.cli import main; sys.exit(main())"]


def environment_of(lab: Path) -> dict[str, str]:
    """For a process that works in a lab, with the code of this checkout."""
    return os.environ | CODE | {"DIGITLAB_HOME": str(lab)}


def free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])


@dataclass(frozen=True)
class Server:
    port: int
    printed: str  # when it started

    def get(self, path: str, host: str = HOST, **headers: str) -> bytes:
        request = urllib.request.Request(f"http://{host}:{self.port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())


@contextmanager
def served(command: str, lab: Path, path: str, log: Path, *more: str) -> Iterator[Server]:
    """`digitlab ui` or its like, as a person starts it, from when it answers on a path."""
    port = free_port()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*COMMAND, command, "--port", str(port), *more],
            env=environment_of(lab),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            server = Server(port, log.read_text())
            try:
                server.get(path)
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{error}: {server.printed}") from error
                time.sleep(0.1)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
