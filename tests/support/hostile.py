"""Hostile inputs by number, each read in a process with limits of memory and time.

    PYTHONPATH=src:tests:tests/support python tests/support/hostile.py READER NUMBER [COUNT]

shows what becomes of one input, or of several. A number stands for the same input at each time: the
first ones are the corpus as it is, the others are drawn from it by a generator with that seed. An
input must be read or refused by a UserError of one line; anything else is a fault.
"""

import json
import os
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

MEMORY_BYTES = 2**30  # that an input may take beyond what is loaded before the first
LIMIT_S = 30.0  # for one input: a decoder is given ten, and the machine may be busy
LONGEST = 2100  # characters of a message
PART = 500  # inputs that one process reads

# Reader -> the module that holds its class.
READERS = {
    "Images": "hostile_images",
    "OwnFolders": "hostile_images",
    "OwnArrays": "hostile_data",
    "OwnNotes": "hostile_data",
    "Idx": "hostile_data",
    "Weights": "hostile_records",
    "Predictions": "hostile_records",
    "RunFiles": "hostile_records",
    "Spools": "hostile_records",
    "Bundles": "hostile_records",
    "Names": "hostile_records",
    "RecordedConfigs": "hostile_settings",
    "Recipes": "hostile_settings",
    "Overrides": "hostile_settings",
    "EnvFiles": "hostile_settings",
    "Variables": "hostile_settings",
    "Requests": "hostile_pages",
}


class Reader:
    """What reads, its corpus, and how inputs come of that."""

    def __init__(self, folder: Path) -> None:
        """Load what reads; `folder` is shared by the processes, which take turns."""
        self.folder = folder

    def corpus(self) -> Sequence[Any]:
        """Return inputs that are good, and known bad ones."""
        raise NotImplementedError

    def draw(self, chance: Random) -> Any:
        """Return a new input."""
        raise NotImplementedError

    def read(self, given: Any) -> None:
        """Read an input as the program does; raise UserError if it is refused."""
        raise NotImplementedError

    @cached_property
    def known(self) -> Sequence[Any]:
        return self.corpus()

    def input(self, number: int) -> Any:
        if number < len(self.known):
            return self.known[number]
        return self.draw(Random(f"{type(self).__name__} {number}"))


@dataclass
class Outcome:
    """What became of inputs."""

    read: int = 0
    refused: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)  # number, what happened
    slowest: tuple[float, int] = (0.0, 0)  # seconds, number
    peak_mb: int = 0  # of memory, beyond what was there before the first input

    @property
    def count(self) -> int:
        return self.read + self.refused + len(self.faults)


def read_all(name: str, first: int, count: int, folder: Path) -> Outcome:
    """Read so many inputs in processes of their own."""
    outcome, number, end = Outcome(), first, first + count
    while number < end:
        number = _read_part(name, number, min(end, number + PART), folder, outcome)
    return outcome


def _read_part(name: str, number: int, end: int, folder: Path, outcome: Outcome) -> int:
    """Read inputs until one ends the process; return the number of the next."""
    command = [sys.executable, __file__, "--serve", name, str(number), str(end), str(folder)]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        lines = _lines(process.stdout.fileno())
        try:
            assert next(lines, None) == ["ready"], _tail(errors)
            for kind, *facts in lines:
                if kind == "done":
                    outcome.peak_mb = max(outcome.peak_mb, facts[0])
                    return end
                _note(outcome, number, kind, *facts)
                number += 1
            process.wait(10)
            ending = f"the process ended with status {process.returncode}: {_tail(errors)}"
        except TimeoutError:
            ending = f"no answer within {LIMIT_S:.0f} s"
        finally:
            process.kill()
    outcome.faults.append((number, ending))
    return number + 1


def _note(outcome: Outcome, number: int, kind: str, seconds: float, text: str) -> None:
    outcome.slowest = max(outcome.slowest, (seconds, number))
    outcome.read += kind == "read"
    outcome.refused += kind == "refused"
    if kind == "fault":
        outcome.faults.append((number, text))


def _lines(descriptor: int) -> Iterator[list[Any]]:
    """Yield the lines of a process, until it ends; TimeoutError where one takes too long."""
    kept, limit = b"", 600.0  # what is read first has to be made
    waiting = select.poll()  # of a descriptor of any number, and select takes 1,024
    waiting.register(descriptor, select.POLLIN | select.POLLHUP)
    while True:
        if not waiting.poll(1000 * limit):
            raise TimeoutError
        part = os.read(descriptor, 1 << 16)
        *lines, kept = (kept + part).split(b"\n")
        for line in lines:
            yield json.loads(line)
        if not part:
            return
        limit = LIMIT_S


def _tail(errors: Any) -> str:
    errors.seek(0)
    return str(errors.read()[-2000:].decode(errors="replace"))


# ---- in the process ------------------------------------------------------------------------------


def _serve(name: str, number: int, end: int, folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed goes elsewhere
    # The package's own order, of tests too: this folder's modules import each other.
    sys.path.append(str(Path(__file__).parents[1]))
    reader: Reader = getattr(import_module(READERS[name]), name)(folder)
    assert reader.known  # made before what they take is measured
    before = _status("VmHWM")
    limit = _status("VmSize") * 2**20 + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print('["ready"]', file=answers)
    for place in range(number, end):
        print(json.dumps(_tried(reader, place)), file=answers)
    peaks = [_status("VmHWM") - before]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    peaks += [_status("VmHWM", child) for child in children]  # such as the one that decodes
    print(json.dumps(["done", max(peaks)]), file=answers)
    answers.flush()
    os._exit(0)  # whatever threads it has left


def _tried(reader: Reader, number: int) -> list[Any]:
    from digitlab.base.errors import UserError, visible

    given, started, text = reader.input(number), time.monotonic(), ""
    try:
        reader.read(given)
        kind = "read"
    except UserError as error:
        kind, text = "refused", str(error)
        if text != visible(text) or not text.strip() or len(text) > LONGEST:
            kind = "fault"
            text = f"not a message of one line: {len(text)} characters: {text[:300]!r}"
    except BaseException:  # noqa: BLE001
        kind, text = "fault", traceback.format_exc()[-3000:]
    return [kind, time.monotonic() - started, text]


def _status(key: str, process: str = "self") -> int:
    """Return what the system says of a process's memory, in megabytes."""
    text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int((re.findall(rf"{key}:\s+(\d+) kB", text) or [0])[0]) // 1024


def _show(name: str, first: int, count: int) -> int:
    """Print what becomes of inputs, and the input itself where it is one."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = read_all(name, first, count, Path(folder))
    print(f"{name}: {outcome.read} read, {outcome.refused} refused, {len(outcome.faults)} faults")
    print(f"slowest: {outcome.slowest[0]:.1f} s (number {outcome.slowest[1]})")
    print(f"memory: {outcome.peak_mb} MB more")
    for number, text in outcome.faults:
        print(f"\n{name} {number}: {text}")
    return bool(outcome.faults)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        if sys.argv[1] == "--serve":
            _serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
        numbers = [int(word) for word in sys.argv[2:]]
        sys.exit(_show(sys.argv[1], numbers[0], *numbers[1:] or [1]))
