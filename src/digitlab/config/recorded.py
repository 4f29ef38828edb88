"""YAML and plain containers to the typed configuration, and back: what a run's record holds."""

import dataclasses
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from digitlab.base.errors import UserError, nearest
from digitlab.config.types import Config
from digitlab.networks import find_network

FORMAT = 1  # of `config.yaml`
_MOST_BYTES = 64_000  # of a configuration's text; the longest of ours has 2,000


def config_from_plain(plain: Mapping[str, Any]) -> Config:
    """A typed configuration from plain containers, such as a run's record holds.

    Raises:
        UserError: an unknown or missing key, a wrong type, a value out of its range, or an
            interpolation, which a record has no business to hold.
    """
    for key, value in flat(plain).items():
        if "${" in str(value):
            raise UserError(f"{key}={value}: an interpolation is not allowed in a configuration")
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
        raise UserError(": ".join(filter(None, [given, explain(error)])) + network) from error
    assert isinstance(config, Config)
    return config


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
    """The text of a run's `config.yaml`; its first line names the format."""
    return OmegaConf.to_yaml(OmegaConf.create({"format": FORMAT} | config_to_plain(config)))


def config_from_yaml(text: str) -> Config:
    """The configuration of a run's `config.yaml`.

    Raises:
        UserError: as `config_from_plain`, or the text is not a YAML mapping of a known format.
    """
    try:
        if len(text.encode(errors="replace")) > _MOST_BYTES:
            raise UserError(f"it is longer than {_MOST_BYTES} bytes")
        # A few lines of anchors and aliases unfold to gigabytes: look before anything is loaded.
        if any(isinstance(t, yaml.AnchorToken | yaml.AliasToken) for t in yaml.scan(text)):
            raise UserError("YAML's anchors and aliases are not allowed")
        plain = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # PyYAML's own errors reach here besides OmegaConf's
        raise UserError(f"not a configuration: {explain(error)}") from error
    if not isinstance(plain, dict):
        raise UserError("not a configuration: a YAML mapping is needed")
    given = plain.pop("format", None)
    if given is None:
        raise UserError(f"not a configuration: no format is named; format: {FORMAT} can be read")
    if given != FORMAT or isinstance(given, bool):
        raise UserError(f"format={given} of a configuration is unknown: only {FORMAT} can be read")
    return config_from_plain({str(key): value for key, value in plain.items()})


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


def explain(error: BaseException) -> str:
    """One line of an error of Hydra's, OmegaConf's or PyYAML's."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    if error.__cause__ is not None and not isinstance(error.__cause__, UserError):
        lines += [line.strip() for line in str(error.__cause__).split("\n")]
    kept = [line for line in lines if not re.match(r"(object_type|reference_type)=", line)]
    text = ", ".join(dict.fromkeys(kept)).split(", Config search path")[0]
    text = text.split(", See https://hydra.cc")[0]
    return text[:300] or type(error).__name__
