"""`digitlab reproduce --at-commit`: the recorded code trains its run again, in a work tree."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from digitlab.base.environment import source_digest
from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.records.tracker import RunRow

_WITHOUT = "Reproduce it without --at-commit."
_COMMAND = "import sys; from digitlab.cli import main; sys.exit(main())"


def confirm_code(row: RunRow, then: Mapping[str, Any], is_trusted: bool) -> None:
    """Show the recorded code that is to be run, and ask, unless it `is_trusted` already.

    Raises:
        UserError: nobody can be asked, or the answer is no.
    """
    print(f"the code of {row.name} ({row.run_id}): commit {_printable(str(then.get('commit')))}")
    if then.get("diff"):
        print(f"changed after the commit:\n{_printable(str(then['diff']))}")
    for path, text in (then.get("untracked") or {}).items():
        print(f"beside the commit, {_printable(str(path))}:\n{_printable(str(text))}")
    if is_trusted:
        return
    if not (sys.stdin and sys.stdin.isatty()):
        raise UserError(
            f"--at-commit runs the recorded code of {row.name} on this machine: look at it, and "
            "give --yes to run it."
        )
    print("run this code on this machine? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError(
            f"--at-commit: the recorded code of {row.name} was not run: it needs a yes."
        )


def _printable(text: str) -> str:
    """Return a text without what controls a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def train_at_commit(
    row: RunRow, then: Mapping[str, Any], overrides: Sequence[str], lab: Path
) -> str:
    """Let the recorded code reproduce its run; the record is in the lab's tracker afterwards.

    Returns:
        The last line that the code wrote: why there is no record, if there is none.

    Raises:
        UserError: the code is not available any more.
    """
    commit, name = str(then.get("commit") or ""), f"--at-commit: {row.name}"
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise UserError(
            f"{name} was recorded outside a repository: its commit is not known. {_WITHOUT}"
        )
    untracked = then.get("untracked") or {}
    if not isinstance(untracked, dict) or not all(isinstance(t, str) for t in untracked.values()):
        raise UserError(
            f"{name} had untracked files that are not in its record: they must be. {_WITHOUT}"
        )
    name = f"{name} at {commit[:12]}"
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        try:
            _restore(tree, commit, str(then.get("diff") or ""), untracked, name)
            package = tree / "src" / "digitlab"
            if not package.is_dir() or source_digest(package) != then.get("source"):
                raise UserError(f"{name}: its code is not all in its record. {_WITHOUT}")
            command = [sys.executable, "-c", _COMMAND, "reproduce", row.run_id, *overrides]
            place = os.environ | {"PYTHONPATH": str(tree / "src"), "DIGITLAB_HOME": str(lab)}
            done = subprocess.run(command, cwd=tree, env=place, capture_output=True, check=False)
        except subprocess.CalledProcessError as error:
            raise UserError(f"{name}: {_last_line(error.stderr) or error}. {_WITHOUT}") from error
        except OSError as error:
            raise UserError(f"{name}: {error}. {_WITHOUT}") from error
        finally:
            shutil.rmtree(tree, ignore_errors=True)
            with suppress(OSError, subprocess.CalledProcessError):
                _git("worktree", "prune")
    return _last_line(done.stderr) or f"it ended with status {done.returncode}"


def _restore(tree: Path, commit: str, diff: str, untracked: Mapping[str, str], name: str) -> None:
    """Check out a commit with the uncommitted changes of its time."""
    _git("worktree", "add", "--detach", str(tree), commit)
    if diff:
        _git("-C", str(tree), "apply", "--whitespace=nowarn", "-", given=diff)
    for path, text in untracked.items():
        target = (tree / path).resolve()
        if not target.is_relative_to(tree):
            raise UserError(
                f"{name}: its untracked file {path} lies outside the checkout. {_WITHOUT}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode())


def _git(*arguments: str, given: str = "") -> None:
    command = ["git", "-C", str(ROOT), *arguments]
    content = given.encode(errors="surrogateescape")
    subprocess.run(command, input=content, capture_output=True, check=True)


def _last_line(output: bytes) -> str:
    return _printable((output.decode(errors="replace").strip().splitlines() or [""])[-1])
