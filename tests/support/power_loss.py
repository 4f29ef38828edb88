"""What a power loss may leave of a lab, from the calls of a whole study, and what goes on from it.

A program of its own, as `io_faults` is: `power_loss.py TRACKER STEP N...` prints what is wrong with
the crash states N, else with every STEP-th of them.

A file's data is on the disk once the file was synced, a name once its folder was. Whatever was not
synced may be there or not.
"""

import copy
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from io_faults import place, sweep, warm_up

FOLDER = -1  # in place of a file's number


@dataclass(frozen=True)
class Call:
    """One call that changed the lab; paths are relative to it."""

    name: str
    path: str
    more: str
    data: bytes


def read_calls(record: Path, lab: Path) -> list[Call]:
    content, calls, at = record.read_bytes(), [], 0

    def inside(path: str) -> str:
        return os.path.relpath(path, lab) if path.startswith("/") else path

    while at < len(content):
        end = content.index(b"\n", at)
        name, path, more, size = content[at:end].decode().split("\t")
        at = end + 1 + int(size)
        calls.append(Call(name, inside(path), inside(more), content[end + 1 : at]))
    return calls


@dataclass
class Disk:
    """Files by number and names, as programs see them and as they are on the disk."""

    files: dict[int, bytes] = field(default_factory=dict)
    synced: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    synced_names: dict[str, int] = field(default_factory=dict)

    def apply(self, call: Call) -> None:
        name, path = call.name, call.path
        if path.endswith(" (deleted)"):
            return
        number = self.names.get(path, FOLDER)
        if name == "create":
            self.names[path] = len(self.files)
            self.synced[len(self.files)] = b""
            self.files[len(self.files)] = b""
        elif name == "mkdir":
            self.names[path] = FOLDER
        elif name == "write":
            at, old = int(call.more), self.files[number]
            old = old.ljust(at, b"\0")
            self.files[number] = old[:at] + call.data + old[at + len(call.data) :]
        elif name == "truncate":
            self.files[number] = self.files[number][: int(call.more)].ljust(int(call.more), b"\0")
        elif name in ("unlink", "rmdir"):
            self.names.pop(path, None)
        elif name == "rename":
            moved = [one for one in self.names if one == path or one.startswith(f"{path}/")]
            for one in moved:
                self.names[call.more + one[len(path) :]] = self.names.pop(one)
            # What was synced in a folder stays so, whatever the folder is called.
            for one in [one for one in self.synced_names if one.startswith(f"{path}/")]:
                self.synced_names[call.more + one[len(path) :]] = self.synced_names.pop(one)
        elif name == "syncfs":
            self.synced, self.synced_names = dict(self.files), dict(self.names)
        elif name == "sync" and number != FOLDER:
            self.synced[number] = self.files[number]
        elif name == "sync":
            self.synced_names = self.with_names_of(path)

    def with_names_of(self, folder: str, is_synced: bool = True) -> dict[str, int]:
        """Return the names on the disk, with those in one folder as programs see them; or else."""
        base, new = (self.synced_names, self.names)[:: 1 if is_synced else -1]
        others = {path: number for path, number in base.items() if parent(path) != folder}
        return others | {path: number for path, number in new.items() if parent(path) == folder}

    def changed(self) -> Iterator[tuple[str, int]]:
        """Yield the files whose data is not on the disk."""
        for path, number in self.names.items():
            if number != FOLDER and self.files[number] != self.synced[number]:
                yield path, number

    def changed_folders(self) -> set[str]:
        """Return the folders of which names are not on the disk."""
        changed = set(self.names.items()) ^ set(self.synced_names.items())
        return {parent(path) for path, _ in changed}


def parent(path: str) -> str:
    return str(PurePath(path).parent)


State = tuple[str, dict[str, int], dict[int, bytes]]  # what was lost; names; data


def crash_states(calls: list[Call]) -> Iterator[State]:
    """Yield the states that a power loss may leave, at each sync and at each write."""
    disk = Disk()
    for number, call in enumerate(calls):
        where = f"at call {number}, {call.name} {call.path}"
        if call.name in ("sync", "syncfs"):
            for path, file in disk.changed():
                yield f"{path} lost {where}", disk.names, disk.files | {file: disk.synced[file]}
            for folder in sorted(disk.changed_folders()):
                yield (
                    f"names of {folder} lost {where}",
                    disk.with_names_of(folder, False),
                    disk.files,
                )
        if call.name == "write":
            torn = copy.deepcopy(disk)
            half = Call(call.name, call.path, call.more, call.data[: len(call.data) // 2])
            torn.apply(half)
            yield f"torn {where}", torn.names, torn.files
        disk.apply(call)
        if call.name in ("sync", "syncfs"):
            yield f"all lost but what was synced {where}", disk.synced_names, disk.synced


def early_names(calls: list[Call]) -> list[str]:
    """Return the files that got their names before their data was on the disk.

    Artifacts may: the outbox keeps its own copy of them until all of them are synced.
    """
    disk, found = Disk(), []
    for call in calls:
        number = disk.names.get(call.path, FOLDER)
        is_early = number != FOLDER and disk.files[number] != disk.synced[number]
        if call.name == "rename" and is_early and "artifacts" not in PurePath(call.path).parts:
            found.append(f"{call.more} is renamed before it is synced")
        disk.apply(call)
    return found


def write_out(state: State, lab: Path) -> None:
    """Make a lab of what is left; a name in a folder that was lost is lost too."""
    _, names, files = state
    for path in sorted(names):  # a folder stands before what is in it
        if (lab / path).parent.is_dir():
            if names[path] == FOLDER:
                (lab / path).mkdir(exist_ok=True)
            else:
                (lab / path).write_bytes(files[names[path]])


def digest_of(state: State) -> str:
    found = hashlib.sha256()
    for path, number in sorted(state[1].items()):
        content = b"" if number == FOLDER else hashlib.sha256(state[2][number]).digest()
        found.update(f"{path}\0".encode() + content)
    return found.hexdigest()


def check(lab: Path, tracker: str, reference: Any) -> str:
    """Return what is wrong with the call that goes on in a lab."""
    from enumeration import Clock, Course, compare, facts, stubs

    status, errors, _, _ = sweep(lab, tracker)
    if status or errors:
        return f"status {status}: {errors[-1500:]}"
    try:
        with stubs(Clock(Course(1, "sealed", tracker), lab=lab)):
            compare(facts(lab), reference)
    except Exception:  # noqa: BLE001  whatever is wrong is reported
        return traceback.format_exc()[-1500:]
    return ""


def enumerate_states(tracker: str, numbers: list[int], step: int) -> dict[str, Any]:
    from enumeration import new_lab

    wrong, seen, kinds = [], set[str](), Counter[str]()
    with place() as folder:
        reference = warm_up(tracker, folder)
        lab = new_lab(folder / "recorded")
        with open(folder / "record", "wb") as record:
            status, errors, _, _ = sweep(lab, tracker, record=record.fileno())
        assert (status, errors) == (0, ""), errors
        calls = read_calls(folder / "record", lab)
        wrong += early_names(calls)
        for state in crash_states(calls):
            digest = digest_of(state)
            if digest in seen:
                continue
            seen.add(digest)
            if len(seen) not in numbers if numbers else len(seen) % step:
                continue
            left = new_lab(folder / f"left-{len(seen)}")  # MLflow remembers databases
            write_out(state, left)
            kinds[
                state[0].split()[0] if state[0].startswith(("torn", "all", "names")) else "file"
            ] += 1
            if problem := check(left, tracker, reference):
                wrong.append(f"{len(seen)} {state[0]}: {problem}")
                print(wrong[-1], file=sys.stderr, flush=True)
            shutil.rmtree(left)
            if len(seen) % 20 == 0:
                print(f"{len(seen)}: {dict(kinds)}", file=sys.stderr, flush=True)
    return {"count": len(seen), "checked": kinds, "wrong": wrong}


if __name__ == "__main__":
    kind, every, *given = sys.argv[1:]
    print(json.dumps(enumerate_states(kind, list(map(int, given)), int(every))))
