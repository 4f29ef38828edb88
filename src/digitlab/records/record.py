"""What every run's record holds from its beginning, whoever begins it."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from digitlab.config.recorded import config_to_plain, config_to_yaml, flat
from digitlab.config.types import Config
from digitlab.records.mlflow import RunRecord, Start, Tracking


@dataclass(frozen=True)
class Identity:
    """What a run is, beside its configuration."""

    name: str
    kind: str  # a value of the tag digitlab.kind
    tags: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None  # run id of the study
    overrides: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)


def trial_tags(study: str, number: int) -> dict[str, str]:
    """The tags that tie a run to a study's trial."""
    return {"digitlab.study": study, "digitlab.trial": str(number)}


def row_params(config: Config, kind: str) -> dict[str, str]:
    """The parameters of a run of that kind: the settings of a study are the study's own alone."""
    hidden = () if kind == "study" else ("study.", "tracking.", "launcher.")
    leaves = flat(config_to_plain(config))
    return {key: str(value) for key, value in leaves.items() if not key.startswith(hidden)}


def begin_record(tracking: Tracking, config: Config, identity: Identity) -> RunRecord:
    """Begin the record of a run of `config`: names, tags, every parameter."""
    tags = {
        "digitlab.kind": identity.kind,
        "digitlab.state": "running",
        "digitlab.overrides": json.dumps(list(identity.overrides)),
        "mlflow.source.git.commit": str(identity.environment.get("commit", "")),
        **identity.tags,
    }
    return tracking.start(
        Start(
            identity.name,
            {key: value for key, value in tags.items() if value},
            row_params(config, identity.kind),
            identity.parent,
        )
    )


_LEFT = 86400  # s after which a folder of a run belongs to nobody any more


def stage(lab: Path, config: Config, identity: Identity) -> Path:
    """A new folder with the files that every run keeps; `RunRecord.keep` takes it over."""
    staging = lab / "staging"
    staging.mkdir(exist_ok=True)
    for left in staging.iterdir():  # by a process that was killed
        with suppress(FileNotFoundError):  # another process has just handed its own over
            if time.time() - left.stat().st_mtime > _LEFT:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=staging))  # not named by a name that a store may hold
    (folder / "config.yaml").write_text(config_to_yaml(config))
    environment = json.dumps(dict(identity.environment), indent=1)
    (folder / "environment.json").write_text(environment)
    return folder


SUMS = "SHA256SUMS"  # the artifact that lists the others, as `sha256sum -c` reads it
# The tags that a record's seal covers, beside its files and metrics.
_SEALED = ("kind", "study", "trial", "seed", "weights_sha256", "predictions_sha256", "data_sha256")


def sum_files(folder: Path) -> str:
    """Write the SHA-256 of every file of a run's folder into it; returns the list."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in paths
    ]
    (folder / SUMS).write_text("".join(lines))
    return "".join(lines)


def seal(sums: str, metrics: Iterable[tuple[str, int, float]], tags: Mapping[str, str]) -> str:
    """SHA-256 over what a finished run's record holds: files, every metric of every step, tags.

    A bit that changes in a store afterwards makes it another.
    """
    named = {name: tags.get(f"digitlab.{name}", "") for name in _SEALED}
    told = sorted({(name, step, float(value).hex()) for name, step, value in metrics})
    return hashlib.sha256(json.dumps([sums, told, named]).encode()).hexdigest()
