"""A process of its own that decodes files, within limits of memory and time."""

import atexit
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock, Timer
from typing import IO

_MEMORY = 2**30  # bytes of address space
_LENGTH = struct.Struct("<q")  # bytes of a message, in front of it
_SERVE = "import sys; sys.path[:] = sys.argv[1:]; from digitlab.digits.decode import serve; serve()"


class DecoderEnded(Exception):
    """The process ended before it answered: its decoder crashed."""


class DecoderProcess:
    """Starts the process for the first file, and keeps it for those that follow.

    It ends with this process, or with a file that is too slow. Threads take turns.
    """

    def __init__(self) -> None:
        self._turn = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self._close)

    def _close(self) -> None:
        if self._process is not None:
            _end(self._process)

    def ask(self, content: bytes, seconds: float) -> bytes:
        """Return the process's answer to a file.

        Raises:
            TimeoutError: it took longer than so many seconds.
            DecoderEnded: there was no answer.
        """
        with self._turn:
            kept, self._process = self._process, None
            if kept is not None and kept.poll() is not None:  # something has killed it
                _end(kept)
                kept = None
            process = kept or _start()
            timer = Timer(seconds, process.kill)
            started = time.monotonic()
            try:
                if process is not kept:
                    _receive(process.stdout)  # it is ready: its start does not count
                started = time.monotonic()
                timer.start()
                _send(process.stdin, content)
                answer = _receive(process.stdout)
            except BaseException as error:
                _end(process)
                if not isinstance(error, EOFError | OSError):
                    raise
                is_slow = time.monotonic() - started >= seconds
                raise (TimeoutError if is_slow else DecoderEnded) from error
            finally:
                timer.cancel()
            self._process = process
            return answer


def _start() -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # each thread would take memory
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _SERVE, *sys.path],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    with suppress(OSError), process:  # closes the pipes, and waits for its end
        pass


def answer_files(answer: Callable[[bytes], bytes]) -> None:
    """Answer the files on standard input, until it ends, as `DecoderProcess` asks."""
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    _send(sys.stdout.buffer, b"")
    with suppress(EOFError):
        while True:
            _send(sys.stdout.buffer, answer(_receive(sys.stdin.buffer)))


def _send(stream: IO[bytes] | None, message: bytes) -> None:
    assert stream is not None
    stream.write(_LENGTH.pack(len(message)))
    stream.write(message)
    stream.flush()


def _receive(stream: IO[bytes] | None) -> bytes:
    """Return the next message, or raise EOFError where the other side has ended."""
    assert stream is not None
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    [length] = _LENGTH.unpack(head)
    message = stream.read(length)
    if len(message) < length:
        raise EOFError
    return message
