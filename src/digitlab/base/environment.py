"""What a run ran on: code, libraries and machine."""

import hashlib
import platform
import site
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from digitlab.base.limits import usable_cores, usable_memory
from digitlab.base.paths import ROOT

_SOURCES = ("src", "conf", "experiments")  # whose untracked files may have taken part
# Whatever a person's git is set to, the diff is one that `git apply` takes.
_DIFF = (
    *("--binary", "--no-color", "--no-ext-diff", "--no-textconv", "-U3"),
    *("--src-prefix=a/", "--dst-prefix=b/"),
)
_LARGEST = 2**20  # bytes of an untracked file that is kept whole


def describe_environment() -> dict[str, Any]:
    """What a run's code, libraries and machine are, as plain containers.

    `diff` and `untracked` (path -> text, None of a file too large or not text) are what a checkout
    of `commit` lacks. `source` is the package's own digest: the same code at another commit. They
    are those of the first call: a process goes on with the code that it has imported.
    """
    # Ray and others add folders of their own to sys.path when they are imported.
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    places = tuple(place for place in sys.path if place in installed)
    return {
        **_code(ROOT),
        "libraries": _libraries(places),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_bytes": usable_memory(),
    }


@cache
def _code(root: Path) -> dict[str, Any]:
    listed = _git("ls-files", "-z", "--others", "--exclude-standard", *_SOURCES)
    return {
        "commit": _git("rev-parse", "HEAD").strip(),
        "diff": _git("diff", *_DIFF, "HEAD"),
        "untracked": {path: _text(root / path) for path in listed.split("\0") if path},
        "source": source_digest(),
    }


@cache
def _libraries(places: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the libraries that are installed in the given folders."""
    libraries: dict[str, str] = {}
    # Of two of a name, the first is the one imported.
    for distribution in distributions(path=list(places)):
        try:
            name = distribution.metadata["Name"]
        except FileNotFoundError:  # what an uninstallation left behind
            continue
        if name:
            libraries.setdefault(name.lower(), distribution.version)
    return dict(sorted(libraries.items()))


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode() if path.stat().st_size <= _LARGEST else None
    except (OSError, UnicodeDecodeError):
        return None


_PACKAGE = Path(__file__).parent.parent
# What a fit's result depends on; a test compares this with what `training.fit` imports.
_TRAINING = ("networks", "config/types.py", "data", "training")


def source_digest(package: Path = _PACKAGE) -> str:
    """Return the SHA-256 of a package's source, this one's by default: 12 characters."""
    return _digest(package, package.rglob("*.py"))


@cache
def training_digest() -> str:
    """Return the SHA-256 of the source that training depends on: 12 characters.

    It is that of the first call, as in `describe_environment`. A change of the report's or a page's
    code does not change it.
    """
    paths = [_PACKAGE / name for name in _TRAINING]
    return _digest(_PACKAGE, [file for path in paths for file in (*path.rglob("*.py"), path)])


def _digest(package: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(file for file in files if file.is_file()):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str:
    """Return what git prints; empty where there is no git, or this is no checkout of its own.

    A release inside another repository must not record that repository's changes.
    """
    if not (ROOT / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # Names and changes need not be UTF-8; JSON takes the bytes that are not as surrogates.
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else ""


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            models = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return models[0]
    except (OSError, IndexError):
        return platform.processor()
