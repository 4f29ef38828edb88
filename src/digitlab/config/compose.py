"""The edge where the configuration that Hydra composes becomes typed objects."""

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from digitlab.base.errors import UserError, first_line, require, visible
from digitlab.base.paths import CONF, recipe_folders
from digitlab.config.recorded import config_from_plain, flat, plain_to_yaml, refuse_unfolding, shown
from digitlab.config.schema import settings
from digitlab.config.suggestions import suggest, usual_key
from digitlab.config.types import Config

_GROUPS = ("data", "model", "optim", "trainer", "study", "tracking", "launcher", "experiments")
_SEARCHABLE = ("model", "optim")  # groups whose options a study may choose among
_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
_NAME = "name="
_BYTES = r"\ud800-\udfff"  # Python's own signs for bytes of an argument that are no UTF-8
CONFIG_DIR = "--config-dir="
_FILE = r"[\w.-]{1,100}"  # names of recipes
_KEY = re.compile(r"[+~]*\w[^=]{0,199}")
_RECIPE = "it must be a YAML mapping of names to values. Correct it"


@dataclass(frozen=True)
class Composed:
    """A configuration and the overrides that it was composed with, as they were typed."""

    config: Config
    overrides: tuple[str, ...]
    name: str | None = None  # of the run, where the person gave one


class _Recipes(SearchPathPlugin):
    """Make `experiments/` a group. A plugin takes any path: no grammar reads it."""

    own: ClassVar[Path | None] = None  # the folder of --config-dir, while something is composed

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in recipe_folders():
            search_path.append("digitlab", f"file://{folder.parent}")
        if self.own is not None:
            search_path.append("--config-dir", f"file://{self.own}")


def compose(command: str, overrides: Sequence[str], multirun: bool = False) -> list[Composed]:
    """Compose the configuration of `digitlab <command>`.

    Args:
        command: train or sweep; sweep takes ranges in Hydra's sweep grammar as its search space.
        overrides: Hydra's; also --config-dir=FOLDER, whose groups are added, as Hydra's own flag
            does, and for train name=NAME, the name of the run.
        multirun: whether to train every combination of values such as trainer.seed=1,2.

    Returns:
        One configuration; several with `multirun`.

    Raises:
        UserError: an override that does not parse, or does not fit the types and limits.
    """
    name, texts = split_name(command, overrides)
    jobs, plains = _plain(command, texts, multirun)
    given = [tuple(texts)] if command == "sweep" else jobs
    pairs = zip(plains, given, strict=True)
    return [Composed(config_from_plain(plain), job, name) for plain, job in pairs]


def composed_text(command: str, overrides: Sequence[str], multirun: bool = False) -> str:
    """Return the configuration (the first of several) as YAML, whether its values fit or not."""
    _, texts = split_name(command, overrides)
    return plain_to_yaml(_plain(command, texts, multirun)[1][0])


def store_words(config: Config) -> list[str]:
    """Return the overrides that a command needs to find what `config` records, if any."""
    usual, tracking = compose("train", ())[0].config.tracking, config.tracking
    found = [f"tracking={tracking.name}"] if tracking.name is not usual.name else []
    if tracking.uri != usual.uri:
        found.append(f"tracking.uri={tracking.uri}")
    if tracking.experiment != usual.experiment:
        found.append(f"tracking.experiment={tracking.experiment}")
    return found + ([f"study.storage={config.study.storage}"] if config.study.storage else [])


def split_name(command: str, overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take name=NAME out of the overrides: it is of the run, and no setting."""
    texts = [text for text in overrides if not text.startswith(_NAME)]
    names = [text.removeprefix(_NAME) for text in overrides if text.startswith(_NAME)]
    if not names:
        return None, texts
    if command == "sweep":
        raise UserError(
            f"name={names[-1]} is invalid here: it names one run. Name a study by "
            f"study.name={names[-1]}"
        )
    name = names[-1]
    is_plain = (
        re.fullmatch(rf"[^/{_BYTES}-][^/{_BYTES}]{{0,99}}", name)
        and name.strip()
        and visible(name) == name
    )
    rule = "1 to 100 characters without '/' and control characters, not spaces alone, not "
    rule += "beginning with '-', and not 'champion'"
    require(bool(is_plain) and name != "champion", f"name={name}", rule)
    return name, texts


def _plain(
    command: str, texts: Sequence[str], multirun: bool
) -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """Return the overrides of each job, and its configuration in plain containers.

    In a sweep a range joins the search space, and a key that is given one value leaves it.
    """
    own = [text for text in texts if text.startswith(CONFIG_DIR)]
    texts = [text for text in texts if text not in own]
    parsed = {text: _parse(text) for text in texts}
    swept = [text for text in texts if command == "sweep" and parsed[text].is_sweep_override()]
    kept = [text for text in texts if text not in swept]
    for text in swept:
        key = parsed[text].key_or_group
        again = next((other for other in kept if parsed[other].key_or_group == key), None)
        require(again is None, f"{text} with {again}", "one of them: a range, or a value")
        require(not parsed[text].is_delete(), text, "a range without '~'")
    space = {parsed[text].key_or_group: text.partition("=")[2] for text in swept}
    fixed = {parsed[text].key_or_group for text in kept if command == "sweep"}
    jobs = _product(kept, multirun)
    with _hydra(_own_folder(own[-1]) if own else None):
        plains = [_compose([_parse(text) for text in job]) for job in jobs]
        for plain, job in zip(plains, jobs, strict=True):
            study = plain.get("study")
            if isinstance(study, dict) and isinstance(study.get("space"), dict):
                searched = study["space"] | space
                study["space"] = {k: v for k, v in searched.items() if k not in fixed}
                if command == "sweep":
                    study["options"] = _searched_options(study["space"], job)
    return [(*own, *job) for job in jobs], plains


def _own_folder(text: str) -> Path:
    """Return the folder of --config-dir=FOLDER; UserError where a file in it would be hidden."""
    folder = Path(text.removeprefix(CONFIG_DIR)).resolve()
    require(
        folder.is_dir(), text, "a folder that holds GROUP/OPTION.yaml, as experiments/mine.yaml"
    )
    for path in folder.glob("*/*.yaml"):
        for known in (CONF, *(recipes.parent for recipes in recipe_folders())):
            shipped = known / path.relative_to(folder)
            if shipped.is_file() and not shipped.samefile(path):
                raise UserError(
                    f"{path} is invalid: its name must not be that of {shipped}, which Hydra would "
                    "read instead. Name it otherwise."
                )
    return folder


def _searched_options(
    space: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the settings of each option that a search space names, by group and option.

    They are composed as with `group=option`; values that the recipe or the overrides give for a
    setting of the group are left out where the option has no such setting.
    """
    found = {}
    for group in (group for group in _SEARCHABLE if group in space):
        given = f"{group}={space[group]}"
        sweep = _parse(given).value()
        rule = f"a choice among options, such as choice({','.join(_options(group)[:2])})"
        if not isinstance(sweep, ChoiceSweep) or sweep.tags:
            raise UserError(f"study.space: {given} is invalid: it must be {rule}.")
        names = [str(getattr(item, "text", item)) for item in sweep.list]
        are_names = not any(isinstance(item, list | dict) for item in sweep.list)
        is_plain = are_names and len(set(names)) == len(names)
        require(is_plain, f"study.space: {given}", f"{rule}, each once")
        # Hydra would refuse a value that was typed for a setting which the option lacks.
        texts = [f"++{text}" if text.startswith(f"{group}.") else text for text in overrides]
        found[group] = {name: _option(group, name, texts) for name in names}
    return found


def _option(group: str, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    plain = _compose([_parse(text) for text in (*overrides, f"{group}={name}")])[group]
    lacked = settings().keys() - settings(str(plain.get("name"))).keys()
    return {key: value for key, value in plain.items() if f"{group}.{key}" not in lacked}


def override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Return keys and values of overrides; UserError where one is more than a value for a key."""
    values = {}
    for text in overrides:
        override = _parse(text)
        if override.type is not OverrideType.CHANGE or override.is_sweep_override():
            raise UserError(
                f"{text} is invalid: a recorded configuration takes one value for a key that it "
                f"has. "
                "Give KEY=VALUE."
            )
        values[override.key_or_group] = override.value()
    return values


def _parse(text: str) -> Override:
    """Parse an override in Hydra's grammar; the value of a text setting stays as it was typed.

    Hydra reads 2026_11_25, 1.10 and 12e4 as numbers, and takes no '?', '#' or letters such as 'ü'
    outside quotes. The result's `input_line` is what Hydra is to be given.
    """
    key, equals, _ = text.partition("=")
    is_whole = bool(equals) or key.startswith("~")
    require(bool(_KEY.fullmatch(key)) and is_whole, text, "KEY=VALUE, of a key of 1 to 200 letters")
    if re.match(r"[+~]*hydra\b", key):
        raise UserError(
            f"{text} is invalid: Hydra's own settings have no effect here: it must be a setting "
            "that `digitlab config` lists. Use --cfg job to see the configuration, and --debug to "
            "see an error's traceback."
        )
    schema = settings().get(key.lstrip("+"), {"type": ""})
    kinds = [part.get("type") for part in schema.get("anyOf", [schema])]
    is_text = "string" in kinds and "enum" not in schema
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(text)
        if not is_text or override.is_sweep_override():
            return override
        if override.value() is None or isinstance(override.value(), str):
            return override
    except (HydraException, ValueError) as error:
        if not is_text:
            raise UserError(f"{text} is invalid: {_reason(error)}.") from error
    try:
        return parser.parse_override(_quoted(text))
    except (HydraException, ValueError) as error:
        hint = shlex.quote(_quoted(text))
        raise UserError(f"{text} is invalid: {_reason(error)}. Quote it: {hint}") from error


def _quoted(text: str) -> str:
    """Return `key=value` as `key="value"`, so that Hydra takes the value literally."""
    key, _, value = text.partition("=")
    # Hydra takes a backslash literally but before a quote, where it must be doubled.
    value = re.sub(r'(\\*)"', lambda found: found[1] * 2 + '\\"', value)
    value = re.sub(r"\\+$", lambda found: found[0] * 2, value)
    return f'{key}="{value}"'


def _product(texts: Sequence[str], multirun: bool) -> list[tuple[str, ...]]:
    """Return the overrides of each job: every combination of the values that are swept."""
    values = []
    for text in texts:
        override = _parse(text)
        if not override.is_sweep_override():
            values.append([text])
            continue
        if not multirun:
            raise UserError(
                f"{text} gives several values, and a run has one: train each with --multirun, or "
                f"search them with "
                f"`digitlab sweep`. One text with commas is written {shlex.quote(_quoted(text))}"
            )
        require(not override.is_interval_sweep(), text, "a list of values or a range")
        key = override.get_key_element()
        values.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return list(itertools.product(*values))


@contextmanager
def _hydra(own: Path | None) -> Iterator[None]:
    """Initialise Hydra on `conf/` and a folder of one's own, and leave it as it was."""
    Plugins.instance().register(_Recipes)
    _Recipes.own = own
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        _Recipes.own = None


def _compose(overrides: Sequence[Override]) -> dict[str, Any]:
    """Compose plain containers in Hydra; name the override that does not fit."""
    _check_recipe(overrides)
    try:
        composed = hydra.compose("config", [str(override.input_line) for override in overrides])
        plain = OmegaConf.to_container(composed, resolve=True)
    except _ERRORS as error:
        _name_culprit(overrides)
        raise UserError(_reason(error)) from error
    except (yaml.YAMLError, RecursionError, OSError) as error:  # of a recipe; YAML's names the line
        is_deep = isinstance(error, RecursionError)
        reason = "nested too deeply" if is_deep else getattr(error, "strerror", error)
        raise UserError(f"not a recipe ({reason}): {_RECIPE}.") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _check_recipe(overrides: Sequence[Override]) -> None:
    """Refuse the recipe that is asked for if it would unfold to gigabytes when Hydra loads it."""
    named = [override.value() for override in overrides if override.key_or_group == "experiments"]
    name = str(named[-1]) if named else "default"
    paths = [folder / f"{name}.yaml" for folder in recipe_folders() if re.fullmatch(_FILE, name)]
    own = _Recipes.own.glob("*/*.yaml") if _Recipes.own else ()
    for path in filter(Path.is_file, (*paths, *own)):
        try:
            refuse_unfolding(path.read_text(errors="replace"))
        except UserError as error:
            raise UserError(f"{path} is invalid: {error} Write its values out.") from error
        except yaml.YAMLError:  # reported with its line when it is loaded
            continue


def _name_culprit(overrides: Sequence[Override]) -> None:
    """Raise UserError for an override whose option or key does not exist, if there is one."""
    groups = [override for override in overrides if override.key_or_group in _GROUPS]
    for override in groups:
        group, options = override.key_or_group, _options(override.key_or_group)
        known = override.is_delete() or override.value() in options
        require(known, f"{group}={shown(override.value())}", f"one of {', '.join(options)}")
    if len(groups) == len(overrides):
        return
    found = flat(_compose(groups))  # the ranges of a space are no settings
    keys = {"study.space" if key.startswith("study.space.") else key for key in found}
    for override in overrides:
        key = override.key_or_group
        exists = any(name == key or name.startswith(f"{key}.") for name in keys)
        if override.type is OverrideType.CHANGE and override not in groups and not exists:
            _refuse_in_other_options(key, found, groups)
            # Without a dot it stands for a group, or for a key whose group was left out.
            words = suggest(key, keys if "." in key else {*_GROUPS, *keys})
            raise UserError(f"{key}: no such key in the configuration, {words}")


_NOUNS = {"data": "data set", "model": "network", "optim": "optimizer", "tracking": "tracker"}


def _refuse_in_other_options(
    key: str, plain: Mapping[str, Any], groups: Sequence[Override]
) -> None:
    """Raise UserError for a key that `plain` lacks where another option of its group has it."""
    ends = (name for name in settings() if "." not in key and name.endswith(f".{key}"))
    meant = usual_key(next(ends, key))
    group = meant.partition(".")[0]
    if group not in _GROUPS or group == "experiments" or meant in plain:
        return
    others = [override for override in groups if override.key_or_group != group]
    having = []
    for option in _options(group):
        with suppress(UserError):  # what the recipe sets may not fit the option
            if meant in flat(_compose([*others, _parse(f"{group}={option}")])):
                having.append(option)
    if having:
        chosen = f"the {_NOUNS.get(group, group)} {plain.get(f'{group}.name')}"
        lacked = "such setting" if key == meant else meant
        verb = "has" if len(having) == 1 else "have"
        raise UserError(
            f"{key}: {chosen} has no {lacked}; {', '.join(having)} {verb} it: "
            f"add {group}={having[0]}."
        )


def _options(group: str) -> list[str]:
    """Return the options of a group: the names of its files."""
    return GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)


def _reason(error: Exception) -> str:
    """Return what Hydra says; OmegaConf's reason names the key of a mapping that does not exist."""
    if isinstance(error.__cause__, OmegaConfBaseException):
        found = first_line(error.__cause__).rstrip(".")
        return f"{first_line(error).rstrip('.')}: {found}. `digitlab config` lists all keys"
    return first_line(error).rstrip(".")
