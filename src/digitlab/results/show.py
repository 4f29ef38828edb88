"""`digitlab show` and `digitlab best`: what a run or a study was, and a champion as a recipe."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from digitlab.base.console import Board, print_table, table
from digitlab.base.errors import UserError, counted, refuse_damage, visible
from digitlab.base.invocation import storage_of
from digitlab.base.paths import CONF
from digitlab.base.statistics import Interval
from digitlab.config.compose import compose
from digitlab.config.recorded import config_to_plain, flat, shown, with_values
from digitlab.config.types import Config, derived_name
from digitlab.records.reader import find_run, lab_tracker, recorded_config
from digitlab.records.record import open_tracker, row_params
from digitlab.records.tracker import RunRow, Tracker
from digitlab.study.storage import open_storage, study_names
from digitlab.study.summary import champion_text, continue_command, short, trials_table
from digitlab.study.trials import load_study

_OPTIONS = ("data", "model", "optim")  # groups whose options a recipe names

_NO_RECIPE = "~experiments"


def show(name: str, lab: Path, stores: Sequence[str], as_json: bool) -> int:
    """Print settings that are not the defaults, results and files of a run or a study; return 0.

    Raises:
        UserError: there is neither a study nor a run of that name.
    """
    if name in study_names(open_storage(lab, storage_of(stores))):
        return _show_study(name, lab, stores, as_json)
    tracker = lab_tracker(lab, stores)
    row = find_run(tracker, name)
    document, champion = _describe_run(tracker, row), _named_champion(tracker, name, row)
    if champion is not None:
        known = {"run_id": champion.run_id, "name": champion.name, "metrics": champion.metrics}
        document = {"champion": known} | document
    if as_json:
        print(json.dumps(document, indent=1))
        return 0
    if champion is not None:
        print(visible(_champion_line(champion)))
    print(f"run {row.run_id} ({row.name}): {document['kind']}, {document['state']}")
    if document["reason"]:
        print(visible(f"reason: {document['reason']}"))
    _print_pairs("settings that are not the defaults", document["settings"])
    _print_pairs("metrics, the last of each", document["metrics"])
    folder = tracker.local_folder(row.run_id) if document["files"] else None
    place = f" in {folder}" if folder else ""
    print(visible(f"files{place}: " + (", ".join(document["files"]) or "none")))
    return 0


def _named_champion(tracker: Tracker, name: str, row: RunRow) -> RunRow | None:
    """Return the champion's run that was named, where `row`, whose weights it has, stands for it.

    None where `row` itself was named.
    """
    tags = {"digitlab.kind": "champion", "digitlab.weights_run": row.run_id}
    named = [
        champion
        for champion in tracker.find(tags)
        if name.rpartition("/")[2] == "champion"
        or champion.run_id.startswith(name)
        or champion.name == name
    ]
    return named[-1] if named else None


def _champion_line(champion: RunRow) -> str:
    """Return what was published of a champion: one of its fits alone says less."""
    metrics, study = champion.metrics, champion.tags.get("digitlab.study")
    low, high = (metrics.get(f"test_accuracy_{part}") for part in ("low", "high"))
    text = f"run {champion.run_id} ({champion.name}) is the champion of study {study}"
    if "test_accuracy_mean" in metrics:
        seeds = int(metrics.get("test_seeds", 1))
        test = Interval(metrics["test_accuracy_mean"], low, high, seeds)
        text += f": test accuracy {test}, the mean of its final fits"
    return f"{text}. Its weights are of the final fit that follows."


def _describe_run(tracker: Tracker, row: RunRow) -> dict[str, Any]:
    config = recorded_config(tracker, row)
    recorded = row_params(config, row.tags.get("digitlab.kind", ""))
    changed = {key: value for key, value in changed_settings(config).items() if key in recorded}
    tags = {name: row.tags.get(f"digitlab.{name}") for name in ("kind", "state", "reason")}
    return {
        "run_id": row.run_id,
        "name": row.name,
        **tags,
        "settings": changed,
        "metrics": dict(sorted(row.metrics.items())),
        "files": tracker.files(row.run_id),
    }


def _show_study(name: str, lab: Path, stores: Sequence[str], as_json: bool) -> int:
    store, config = load_study(lab, name, storage_of(stores))
    notes, rows = store.notes(), store.rows()
    tracker = open_tracker(config, lab)
    run_id, champion = notes.get("run_id"), notes.get("champion")
    changed = changed_settings(config)
    if as_json:
        trials = [vars(row) for row in rows]
        files = tracker.files(run_id) if run_id else []
        document = {"study": name, "study_id": store.study_id, "run_id": run_id}
        document |= {"settings": changed, "champion": champion, "trials": trials, "files": files}
        print(json.dumps(document, indent=1))
        return 0
    board = Board()
    _print_pairs("settings that are not the defaults", changed)
    board.print(trials_table(rows, config))
    if champion:
        overrides = None if "again" in notes else notes.get("overrides", [])
        with refuse_damage(f"what the storage holds of study {name!r}"):
            board.say(champion_text(config, champion, overrides))
        return 0
    ended = sum(row.is_ended for row in rows)
    board.say(f"no champion yet: {ended} of {counted(config.study.trials, 'trial')} ended")
    board.say(f"go on: {continue_command(notes)}")
    return 0


def changed_settings(config: Config) -> dict[str, Any]:
    """Return the settings by dotted key that differ from those in conf/, before any recipe.

    Those of searched options are left out: the space names the options.
    """
    usual = flat(config_to_plain(compose("train", [_NO_RECIPE])[0].config))
    leaves = flat(config_to_plain(config)).items()
    found = [leaf for leaf in leaves if not leaf[0].startswith("study.options.")]
    return {key: value for key, value in found if key not in usual or usual[key] != value}


def _print_pairs(title: str, pairs: Mapping[str, Any]) -> None:
    if not pairs:
        print(f"{title}: none")
        return
    lines = [
        [key, f"{value:.6g}" if isinstance(value, float) else shown(value)]
        for key, value in pairs.items()
    ]
    print_table(table(title, ["name", "value"], lines))


def print_recipe(study: str, lab: Path, stores: Sequence[str]) -> int:
    """Print the settings of a study's champion as a recipe, a YAML for experiments/; return 0.

    Raises:
        UserError: there is no such study, or it has no champion yet.
    """
    store, config = load_study(lab, study, storage_of(stores))
    notes = store.notes()
    champion = notes.get("champion")
    if not champion:
        raise UserError(
            f"study {study} has no champion yet: a finished study has one. Finish it "
            f"with `{continue_command(notes)}` first."
        )
    best = with_values(config, champion["values"])
    test = Interval(**champion["test_accuracy"])
    recipe = recipe_of(best, study)
    print("# @package _global_")
    print(f"# The champion of study {study}, trial {champion['trial']}: test accuracy {test}.")
    values = ", ".join(f"{name}={short(value)}" for name, value in champion["values"].items())
    print(visible(f"# Searched: {values}. What is not below is as in conf/."))
    how = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None}
    print(yaml.safe_dump(recipe, **how), end="")
    return 0


def recipe_of(config: Config, study: str) -> dict[str, Any]:
    """Return the recipe that trains `config`: the options of groups, and what they leave open."""
    plain = config_to_plain(config)
    options = {group: plain[group]["name"] for group in _OPTIONS}
    if not (CONF / "data" / f"{options['data']}.yaml").exists():  # a data set of one's own
        options["data"] = "mnist"
    choice = [f"{group}={option}" for group, option in options.items()]
    usual = config_to_plain(compose("train", [_NO_RECIPE, *choice])[0].config)
    overridden = [{f"override /{group}": option} for group, option in options.items()]
    recipe: dict[str, Any] = {"defaults": overridden}
    for group in (*_OPTIONS, "trainer"):
        changed = _unlike(plain[group], usual[group])
        recipe |= {group: changed} if changed else {}
    return recipe | {"study": {"name": derived_name(study, "-best")}}


def _unlike(values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of nested settings is not as usual, as nested."""
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = _unlike(value, usual[key])
            changed |= {key: inner} if inner else {}
        elif value != usual[key]:
            changed[key] = value
    return changed
