"""What a run ran on: code, libraries and machine."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from digitlab.lab import ROOT

# What may change the bits of a result; the lock file names the rest.
_LIBRARIES = (
    *("digitlab", "torch", "torchvision", "pytorch-lightning", "optuna", "mlflow"),
    *("hydra-core", "omegaconf", "numpy", "safetensors"),
)


def describe_environment() -> dict[str, Any]:
    """Commit, uncommitted diff, library versions, Python and machine, as plain containers."""
    versions = {d.metadata["Name"].lower(): d.version for d in distributions()}
    return {
        "commit": _git("rev-parse", "HEAD"),
        "diff": _git("diff", "HEAD"),
        "untracked": _git(
            "ls-files", "--others", "--exclude-standard", "src", "conf", "experiments"
        ),
        "libraries": {name: versions.get(name, "") for name in _LIBRARIES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def source_digest() -> str:
    """SHA-256 of the package's source, the first 12 characters."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str:
    """What git prints; empty where there is no git or no repository."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip("\n") if done.returncode == 0 else ""


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            models = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return models[0]
    except (OSError, IndexError):
        return platform.processor()
