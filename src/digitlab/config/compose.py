"""The edge where Hydra's configuration becomes typed objects, and back again for the record."""

import contextlib
import copy
import dataclasses
import io
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, get_origin

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from digitlab.base.errors import UserError, nearest
from digitlab.base.paths import ROOT
from digitlab.config.types import Config
from digitlab.networks import find_network


@dataclasses.dataclass(frozen=True)
class Composed:
    """A configuration and the overrides that it was composed with."""

    config: Config
    overrides: tuple[str, ...]


def compose(command: str, arguments: Sequence[str]) -> list[Composed]:
    """Run `digitlab <command>` as a Hydra application up to its configuration.

    Args:
        command: train or sweep; sweep takes ranges in Hydra's sweep grammar as its search space.
        arguments: Hydra's flags and overrides.

    Returns:
        One configuration; several with --multirun; none where a flag such as --cfg only prints.

    Raises:
        UserError: an override that does not parse, or does not fit the types and limits.
    """
    arguments = list(arguments)
    fixed: list[str] = []
    if command == "sweep":
        arguments, fixed = _split_space(arguments)
    jobs: list[tuple[Any, tuple[str, ...]]] = []

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
    def application(config: DictConfig) -> None:
        plain = OmegaConf.to_container(config, resolve=True)
        jobs.append((plain, tuple(HydraConfig.get().overrides.task)))

    overrides = [a for a in arguments if a[:1] == "~" or ("=" in a and a[:1] != "-")]
    flags = [a for a in arguments if a not in overrides]  # first, or argparse takes offence
    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except HydraException as error:
            raise UserError(f"{override}: not understood ({_explain(error)})") from error
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise here what Hydra would print with a traceback
    before = sys.argv
    try:
        with tempfile.TemporaryDirectory() as folder:  # for the file that --multirun writes
            own = [_SEARCH_PATH, f"hydra.sweep.dir='{folder}'"]
            sys.argv = [f"digitlab {command}", *flags, *overrides, *own]
            with contextlib.redirect_stderr(io.StringIO()):  # argparse's usage, many lines
                application()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    except ValueError as error:  # of Hydra's, and names no key
        raise UserError(f"{' '.join(overrides)}: {_explain(error)}") from error
    except SystemExit as end:
        if end.code:
            told = f"{' '.join(flags)}: Hydra does not take this: see digitlab {command} --help"
            raise UserError(told) from end
        raise
    finally:
        sys.argv = before
    composed = []
    for plain, used in jobs:
        space = plain["study"].get("space")
        if isinstance(space, dict):
            plain["study"]["space"] = {k: v for k, v in space.items() if k not in fixed}
        composed.append(Composed(config_from_plain(plain), used))
    return composed


_SEARCH_PATH = f"hydra.searchpath=['file://{ROOT}']"  # makes experiments/ a group


def _split_space(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Turn sweep overrides into entries of study.space; also name the keys that are fixed."""
    parser = OverridesParser.create()
    kept, fixed = [], []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            kept.append(argument)
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise UserError(_explain(error)) from error
        knob = override.key_or_group
        if override.is_sweep_override():
            text = argument.split("=", 1)[1]
            # Hydra takes a backslash literally but before a quote, where it must be doubled.
            text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
            text = re.sub(r"\\+$", lambda found: found[0] * 2, text)
            kept.append(f"++study.space={{{knob}:'{text}'}}")
        else:
            kept.append(argument)
            fixed.append(knob)
    return kept, fixed


def config_from_plain(plain: Mapping[str, Any]) -> Config:
    """A typed configuration from plain containers, such as a run's record holds.

    Raises:
        UserError: an unknown or missing key, a wrong type, a value out of its range, or an
            interpolation, which a record has no business to hold.
    """
    for key, value in flat(plain).items():
        if "${" in str(value):
            raise UserError(f"{key}={value}: an interpolation is not allowed in a configuration")
    plain = _migrated(plain)
    model = plain.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    try:
        schema = OmegaConf.structured(Config)
        model_type = find_network(str(name)).config
        schema.model = OmegaConf.structured(model_type)
        _refuse_mappings(plain, model_type)
        config = OmegaConf.to_object(OmegaConf.merge(schema, dict(plain)))
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        given = f"{key}={_at(plain, key)}" if key else ""
        network = f" (model.name={name})" if key.startswith("model.") else ""
        raise UserError(": ".join(filter(None, [given, _explain(error)])) + network) from error
    assert isinstance(config, Config)
    return config


# Keys that came after 0.1.0, with the value that stands for what was done before.
ADDED: dict[str, Any] = {
    "data.images": 0,
    "data.augment.stroke": 0.0,
    "trainer.precision": "float32",
    "study.storage": None,
    "launcher.name": "processes",
    "launcher.address": "auto",
    "launcher.workers": 0,
    "launcher.cpus": 1.0,
    "launcher.gpus": 0.0,
}


def _migrated(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of an older version, with the keys that it did not know."""
    new: dict[str, Any] = {"launcher": {}, **copy.deepcopy(dict(plain))}
    for key, value in ADDED.items():
        path, _, name = key.rpartition(".")
        section = _at(new, path)
        if isinstance(section, dict):
            section.setdefault(name, value)
    return new


def _refuse_mappings(plain: Mapping[str, Any], model_type: type) -> None:
    """Name a key that has a mapping for a value, which OmegaConf refuses without its name."""
    for section in dataclasses.fields(Config):
        kind = model_type if section.name == "model" else section.type
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            value = _at(plain, f"{section.name}.{field.name}")
            nests = dataclasses.is_dataclass(field.type) or get_origin(field.type) is dict
            if isinstance(value, Mapping) and not nests:
                raise UserError(f"{section.name}.{field.name}={dict(value)}: no mapping is allowed")


def config_to_plain(config: Config) -> dict[str, Any]:
    """The configuration as dictionaries, lists, strings and numbers."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value


def config_to_yaml(config: Config) -> str:
    """The text of a run's `config.yaml`."""
    return OmegaConf.to_yaml(OmegaConf.create(config_to_plain(config)))


def config_from_yaml(text: str) -> Config:
    """The configuration of a run's `config.yaml`.

    Raises:
        UserError: as `config_from_plain`, or the text is not a YAML mapping.
    """
    if re.search(r"(?m)(^|[\s\[{,])[&*]\w", text):  # a few lines of them unfold to gigabytes
        raise UserError("not a configuration: YAML's anchors and aliases are not allowed")
    try:
        plain = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # PyYAML's own errors reach here besides OmegaConf's
        raise UserError(f"not a configuration: {_explain(error)}") from error
    if not isinstance(plain, dict):
        raise UserError("not a configuration: a YAML mapping is needed")
    return config_from_plain({str(key): value for key, value in plain.items()})


def override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted keys and values of overrides in Hydra's grammar, for `with_values`.

    Raises:
        UserError: one does not parse, or is more than a value for a key.
    """
    values = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise UserError(f"{text}: not understood ({_explain(error)})") from error
        if override.type is not OverrideType.CHANGE or override.is_sweep_override():
            raise UserError(f"{text}: a recorded configuration takes one value for a key it has")
        values[override.key_or_group] = override.value()
    return values


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` with the values at dotted keys replaced.

    Raises:
        UserError: a key that is not there, or a value that does not fit.
    """
    plain = config_to_plain(config)
    for key, value in values.items():
        path, _, last = key.rpartition(".")
        node = _at(plain, path)
        if not isinstance(node, dict) or last not in node:
            raise UserError(f"{key}: no such key, {nearest(key, flat(plain))}")
        if isinstance(node[last], dict) and not isinstance(value, Mapping):
            inner = ", ".join(f"{key}.{name}" for name in node[last])
            raise UserError(f"{key}={value}: a group of settings: give {inner}")
        node[last] = value
    return config_from_plain(plain)


def _at(plain: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None where there is none; the whole at the empty key."""
    node: Any = plain
    for name in key.split(".") if key else []:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys; lists stay values."""
    leaves: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _explain(error: BaseException) -> str:
    """One line of an error of Hydra's, OmegaConf's or PyYAML's."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    if error.__cause__ is not None and not isinstance(error.__cause__, UserError):
        lines += [line.strip() for line in str(error.__cause__).split("\n")]
    kept = [line for line in lines if not re.match(r"(object_type|reference_type)=", line)]
    text = ", ".join(dict.fromkeys(kept)).split(", Config search path")[0]
    text = text.split(", See https://hydra.cc")[0]
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown[1]
        default = with_values(compose("train", [])[0].config, {"study.space": {}})
        known = flat(config_to_plain(default))
        return f"{key}: no such key in the configuration, {nearest(key, known)}"
    return text[:300] or type(error).__name__
