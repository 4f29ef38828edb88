"""What every run's record holds from its beginning, whoever begins it."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from digitlab.compose import config_to_plain, config_to_yaml, flat
from digitlab.config import Config
from digitlab.tracking import RunRecord, Start, Tracking


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


def begin_record(tracking: Tracking, config: Config, identity: Identity) -> RunRecord:
    """Begin the record of a run of `config`: names, tags, every parameter.

    The settings of a study are parameters of the study's own run alone.
    """
    leaves = flat(config_to_plain(config))
    whole = identity.kind == "study"
    hidden = () if whole else ("study.", "tracking.")
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
            {key: value for key, value in leaves.items() if not key.startswith(hidden)},
            identity.parent,
        )
    )


def stage(lab: Path, config: Config, identity: Identity) -> Path:
    """A new folder with the files that every run keeps; `RunRecord.keep` takes it over."""
    staging = lab / "staging"
    staging.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{identity.name}-", dir=staging))
    (folder / "config.yaml").write_text(config_to_yaml(config))
    environment = json.dumps(dict(identity.environment), indent=1)
    (folder / "environment.json").write_text(environment)
    return folder
