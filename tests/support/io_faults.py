"""A study of which the n-th call that changes a file of its lab fails, or kills the process.

A program of its own, since `io_shim` is preloaded into it. `io_faults.py TRACKER STEP N...` prints
what is wrong after each call N (else every STEP-th), at the end as one line of JSON.
"""

import contextlib
import ctypes
import errno
import faulthandler
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
_LIMIT_S = 150  # of a call, which takes two
FAULTS = {"KILL": -1, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC}


def build_shim(folder: Path) -> Path:
    """Compile the library; CalledProcessError where there is no compiler."""
    made = folder / "io_shim.so"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", made]
    subprocess.run([*command, SUPPORT / "io_shim.c", "-ldl"], check=True)
    return made


def start(program: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that stands beside this one, with the library preloaded."""
    paths = [SUPPORT.parents[1] / "src", SUPPORT.parent, SUPPORT]
    known = {"PYTHONPATH": ":".join(map(str, paths)), "LD_PRELOAD": str(build_shim(folder))}
    known["OMP_NUM_THREADS"] = "1"  # torch's other threads would not live in a fork, which waits
    command = [sys.executable, str(SUPPORT / program), *arguments]
    return subprocess.run(
        command, env=os.environ | known, capture_output=True, text=True, check=False
    )


def shim() -> Any:
    library = ctypes.CDLL(None)
    library.io_count.restype = ctypes.c_long
    library.io_failed.restype = ctypes.c_char_p
    return library


def sweep(lab: Path, tracker: str, at: int = 0, fault: int = 0, record: int = -1) -> Any:
    """Call `digitlab sweep` in a fork; return its status, its errors, its calls, which failed."""
    from enumeration import Clock, Course, stubs
    from scripted import ScriptedWorkers, stub

    from digitlab.cli import main
    from digitlab.study import driver
    from digitlab.workers import processes

    course = Course(1, "sealed", tracker)
    result = lab.with_suffix(".result")
    child = os.fork()
    if not child:
        status = 70
        try:
            for stream, name in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(lab.with_suffix(name), os.O_WRONLY | os.O_CREAT), stream)
                os.ftruncate(stream, 0)
            faulthandler.dump_traceback_later(_LIMIT_S, exit=True)  # what hangs says where
            os.environ["DIGITLAB_HOME"] = str(lab)
            with stubs(Clock(course, lab=lab)) as patch:
                patch.setattr(driver, "_build_workers", lambda _: ScriptedWorkers(stub, 1))
                patch.setattr(processes, "preload", lambda *_: None)
                shim().io_arm(os.fsencode(lab), at, fault, record)
                status = main(["sweep", *_tiny(), *course.overrides])
        except BaseException:  # noqa: BLE001  it ends with this process
            traceback.print_exc()
        finally:
            count, failed = shim().io_count(), shim().io_failed().decode()
            shim().io_arm(b"", 0, 0, -1)
            result.write_text(json.dumps([count, failed]))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count, failed = json.loads(result.read_text()) if result.exists() else (0, "")
    result.unlink(missing_ok=True)
    return status, lab.with_suffix(".err").read_text(), count, failed


def _tiny() -> list[str]:
    from conftest import TINY

    return TINY


def check(lab: Path, tracker: str, at: int, name: str, reference: Any) -> tuple[str, str]:
    """Let a call fail; return which one, and what is wrong then, or with the call that goes on."""
    from enumeration import Clock, Course, compare, facts, new_lab, stubs

    status, errors, _, failed = sweep(new_lab(lab), tracker, at, FAULTS[name])
    lines = errors.splitlines()
    if name == "KILL":
        is_right = status == -9
    else:
        is_reported = status == 2 and len(lines) == 1 and lines[0].startswith("digitlab: ")
        is_right = is_reported or (status == 0 and not lines)
    if not is_right:
        return failed, f"status {status}, {failed}: {errors[-1500:]}"
    status, errors, _, _ = sweep(lab, tracker)
    if status or errors:
        return failed, f"the next call: {status}, {failed}: {errors[-1500:]}"
    try:
        with stubs(Clock(Course(1, "sealed", tracker), lab=lab)):
            compare(facts(lab), reference)
    except Exception:  # noqa: BLE001  whatever is wrong is reported
        return failed, f"{failed}: {traceback.format_exc()[-1500:]}"
    return failed, ""


@contextlib.contextmanager
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="digitlab-"))
    yield folder
    shutil.rmtree(folder)


def warm_up(tracker: str, folder: Path) -> Any:
    """Return what an undisturbed study comes to; forks of this process know all it needs then."""
    from enumeration import Clock, Course, stubs, undisturbed

    from digitlab.config import compose as composing

    course = Course(1, "sealed", tracker)
    with contextlib.redirect_stdout(io.StringIO()):
        reference, _ = undisturbed(course, folder / "reference")
    with stubs(Clock(course)):
        composing.compose("sweep", [*_tiny(), *course.overrides], False)
    return reference


def enumerate_calls(tracker: str, numbers: list[int], step: int) -> dict[str, Any]:
    from enumeration import new_lab

    wrong, calls = [], Counter[str]()
    with place() as folder:
        reference = warm_up(tracker, folder)
        status, errors, count, _ = sweep(new_lab(folder / "counted"), tracker)
        assert (status, errors) == (0, ""), errors
        for at in numbers or range(1, count + 1, step):
            for name in FAULTS:
                lab = folder / f"{at}-{name}"  # another each time: MLflow remembers databases
                call, problem = check(lab, tracker, at, name, reference)
                if name == "EIO":
                    calls[call] += 1
                if problem:
                    wrong.append(f"{at} {name}: {problem}")
                    print(wrong[-1], file=sys.stderr, flush=True)
                shutil.rmtree(lab)
            print(f"{at} of {count}: {dict(calls)}", file=sys.stderr, flush=True)
    return {"count": count, "checked": calls, "wrong": wrong}


if __name__ == "__main__":
    kind, every, *given = sys.argv[1:]
    print(json.dumps(enumerate_calls(kind, list(map(int, given)), int(every))))
