"""What a study's results depend on: noted when it is created, compared whenever it goes on."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from digitlab.base.environment import training_digest
from digitlab.base.errors import UserError
from digitlab.config.recorded import (
    config_to_plain,
    config_to_yaml,
    flat,
    result_settings,
    with_values,
)
from digitlab.config.types import Config
from digitlab.study.goal import TrialRow
from digitlab.study.space import find_values, is_widened
from digitlab.study.trials import TrialStore

# Settings of a study that its trials' values depend on; the others may change at any call.
_FIXED = ("sampler", "startup_trials", "seed", "pruner", "rungs", "objectives", "require")
_DATA = "SHA-256 of "
_LIBRARIES = ("torch", "pytorch-lightning", "numpy", "optuna")
# What made a result, as opposed to what it is a result of: another study may take it over.
_MAKERS = ("code of training", "tracker", *(f"version of {name}" for name in _LIBRARIES))


def check_fingerprint(
    store: TrialStore, config: Config, data_sha256: Mapping[str, str], tracker: str
) -> None:
    """Note what the study is created with, or name each difference from it in a UserError.

    The configuration that is noted is the last call's: it may ask for more trials than the first.
    """
    now = _facts(config, data_sha256, tracker)
    then = store.notes().get("fingerprint", now)
    widened = {
        f"study.space.{one.name}"
        for one in store.space
        if is_widened(one, then.get(f"study.space.{one.name}"), config)
    }
    keys = {key for key in then.keys() | now.keys() if then.get(key) != now.get(key)}
    changed = [
        f"{key}: {then.get(key, 'none')} -> {now.get(key, 'none')}"
        for key in sorted(keys - widened)
    ]
    if changed:
        name = config.study.name
        raise UserError(
            f"study '{name}' was created with other settings ({'; '.join(changed)}): a study "
            "keeps those that its results depend on, and a range may only grow. Restore them, or "
            f"start a new study with study.name=NEW "
            f"(study.fork_from={name} reuses its finished trials where they fit)."
        )
    store.note("config", config_to_yaml(config))
    if store.notes().get("fingerprint") != now:  # it is new, or a range has grown
        store.note("fingerprint", now)


def _facts(config: Config, data_sha256: Mapping[str, str], tracker: str) -> dict[str, Any]:
    """Everything that a trial's result depends on, beside the values that are searched."""
    study = config_to_plain(config)["study"]
    space, options = config.study.space, config.study.options
    fixed = {k: v for k, v in result_settings(config).items() if k.partition(".")[0] not in options}
    for group, found in options.items():
        for option, plain in found.items():
            keys = flat({group: plain}).items()
            fixed |= {f"{key} with {group}={option}": value for key, value in keys}
    return {
        **{key: value for key, value in fixed.items() if key.partition(" ")[0] not in space},
        **flat({"study": {key: study[key] for key in _FIXED}}),
        **{f"study.space.{name}": text for name, text in space.items()},
        **{f"{_DATA}{file}": digest[:12] for file, digest in data_sha256.items()},
        **{f"version of {name}": version(name) for name in _LIBRARIES},
        "code of training": training_digest(),
        "tracker": tracker,
    }


def fitting_trials(
    store: TrialStore, config: Config, other: TrialStore, other_config: Config
) -> list[TrialRow]:
    """Return the finished trials of another study whose whole configuration lies in this one.

    Their values are in this study's terms.

    A setting that was fixed there may be searched here if its value lies in the range, and the
    other way round if the value is the one that is fixed here; the data must be the same. Where
    other code or versions made them, `notes["made_by"]` names them.
    """
    ours, theirs = store.notes()["fingerprint"], other.notes()["fingerprint"]
    if any(ours[key] != theirs.get(key) for key in ours if key.startswith(_DATA)):
        return []
    made_by = [f"{k}: {theirs.get(k)}" for k in _MAKERS if theirs.get(k) != ours[k]]
    found = []
    for row in other.rows():
        if row.state != "finished":
            continue
        values = find_values(config, store.space, with_values(other_config, row.values))
        if values is not None:
            notes = {
                "metrics": row.notes.get("metrics", {}),
                "taken_from": f"{other.config.name}/{row.number}",
                "made_by": made_by,
            }
            found.append(replace(row, values=values, notes=notes))
    return found
