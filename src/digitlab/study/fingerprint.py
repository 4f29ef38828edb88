"""What a study was begun with: a call that differs does not go on with it, but may fork it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from digitlab.base.environment import source_digest
from digitlab.base.errors import UserError, nearest
from digitlab.config.recorded import config_from_yaml, config_to_plain, config_to_yaml, flat
from digitlab.config.types import Config
from digitlab.study.storage import open_storage, study_names
from digitlab.study.trials import Search

# Settings of a study that its trials' values depend on; the others may change at any call.
_KEPT = ("sampler", "startup_trials", "seed", "pruner", "rungs")


def guard(search: Search, config: Config, data_sha256: Mapping[str, str]) -> None:
    """Note what the study is begun with, or compare with what it was begun with.

    Raises:
        UserError: something differs that the trials' results depend on; every difference is named.
    """
    now = _facts(config, data_sha256)
    then = search.notes().get("begun")
    if then is None:
        search.note("config", config_to_yaml(config))
        search.note("begun", now)
        return
    changed = [
        f"{key} was {then.get(key, 'not there')}, is {now.get(key, 'not there')}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if changed:
        name = config.study.name
        raise UserError(
            f"study.name={name}: it was begun differently ({'; '.join(changed)}): undo that, or "
            f"begin another with study.name=... (study.fork_from={name} takes over what still fits)"
        )


def _facts(config: Config, data_sha256: Mapping[str, str]) -> dict[str, Any]:
    """Everything that a trial's result depends on, beside the values of its knobs."""
    plain = config_to_plain(config)
    study = plain.pop("study")
    del plain["tracking"], plain["launcher"]
    return {
        **{key: value for key, value in flat(plain).items() if key not in config.study.space},
        **{f"study.{key}": study[key] for key in _KEPT},
        **{f"study.space.{knob}": text for knob, text in config.study.space.items()},
        **{f"SHA-256 of {file}": digest[:12] for file, digest in data_sha256.items()},
        "objective": "val_accuracy",
        "source code": source_digest(),
    }


def begun_config(notes: Mapping[str, Any]) -> Config:
    """The configuration that a study was begun with, from its notes."""
    return config_from_yaml(str(notes["config"]))


def begun_study(lab: Path, name: str) -> tuple[Search, Config]:
    """A study of the lab, and what it was begun with.

    Raises:
        UserError: there is none of the name, or its first call was refused before it began.
    """
    storage = open_storage(lab)
    known = study_names(storage)
    if name not in known:
        raise UserError(f"{name}: no such study, {nearest(name, known)}")
    notes = storage.get_study_user_attrs(storage.get_study_id_from_name(name))
    if "config" not in notes:
        raise UserError(f"{name}: it never began: run `make sweep` for it first")
    config = begun_config(notes)
    return Search(storage, config), config


def fitting_trials(search: Search, config: Config) -> list[dict[str, Any]]:
    """The finished trials of `study.fork_from` whose whole configuration lies in this study.

    A key that was fixed there may be searched here if its value lies in the range, and the other
    way round if the value is the one that is fixed here; data and objective must be the same.

    Returns:
        For each: `values` of this study's knobs, the validation accuracy `value`, and `notes`.

    Raises:
        UserError: there is no such study.
    """
    name = str(config.study.fork_from)
    if name not in search.names():
        raise UserError(f"study.fork_from={name}: no such study, {nearest(name, search.names())}")
    notes = search.notes(name)
    old = begun_config(notes)
    source = Search(search.storage, replace(old, study=replace(old.study, name=name)))
    ours, theirs = search.notes()["begun"], notes["begun"]
    fixed = {k: v for k, v in ours.items() if not k.startswith("study.") and k != "source code"}
    fitting = []
    for row in source.rows():
        whole = theirs | row.values
        if row.state != "finished" or any(whole.get(k) != v for k, v in fixed.items()):
            continue
        if all(knob.name in whole and knob.holds(whole[knob.name]) for knob in search.knobs):
            values = {knob.name: whole[knob.name] for knob in search.knobs}
            told = {"metrics": row.notes.get("metrics", {}), "taken_from": f"{name}/{row.number}"}
            fitting.append({"values": values, "value": row.value, "notes": told})
    return fitting
