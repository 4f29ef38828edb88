"""YAML and plain containers to the typed configuration, and back: what a run's record holds."""

import json
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf
from pydantic import ValidationError

from digitlab.base.errors import UserError, first_line, nearest
from digitlab.config.schema import ADAPTER, rule, settings
from digitlab.config.suggestions import suggest
from digitlab.config.types import Config

FORMAT = 1  # of `config.yaml`
_RULE = "it must be a YAML mapping of names to values."
_MOST_BYTES = 64_000  # of a configuration's text; the longest of ours has 2,000
_UNFOLDING = (yaml.AnchorToken, yaml.AliasToken)
_MOST_SHOWN = 100  # characters of a value in a message


def config_to_plain(config: Config) -> dict[str, Any]:
    """Return the configuration as dictionaries, lists, strings and numbers."""
    plain: dict[str, Any] = ADAPTER.dump_python(config, mode="json")
    return plain


def config_from_plain(plain: Mapping[str, Any]) -> Config:
    """Build the typed configuration from plain containers, such as a run's record holds.

    Raises:
        UserError: an unknown or missing key, a wrong type, a value out of its range, settings that
            contradict each other, or an interpolation, which is not allowed in a record.
    """
    for key, value in flat(plain).items():
        if "${" in str(value):
            raise UserError(f"{key}={shown(value)} is invalid: it must hold no interpolation.")
    try:
        # Strict types allow the names of enumerations and mappings for groups in JSON only.
        return ADAPTER.validate_json(json.dumps(plain, default=str))
    except ValidationError as error:
        raise _refusal(error, plain) from error
    except (TypeError, ValueError) as error:  # a key or a number that JSON cannot hold
        raise UserError(f"not a configuration: {first_line(error)}") from error


def config_to_yaml(config: Config) -> str:
    """Return the text of a run's `config.yaml`; its first line names the format."""
    return plain_to_yaml(config_to_plain(config))


def plain_to_yaml(plain: Mapping[str, Any]) -> str:
    """Return the text of a configuration that need not be valid."""
    whole = {"format": FORMAT, **plain}
    text: str = yaml.dump(whole, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes text that does not begin with a letter: a reader could take it for a number."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text[:1].isalpha() else '"'
    ),
)


def config_from_yaml(text: str) -> Config:
    """Read a run's `config.yaml`; UserError as `config_from_plain`, or if its format is unknown."""
    try:
        refuse_unfolding(text)
        plain = OmegaConf.to_container(OmegaConf.create(text))
    except UserError as error:
        raise UserError(f"not a configuration: {error}") from error
    except Exception as error:  # PyYAML's own errors reach here besides OmegaConf's
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise UserError(f"not a configuration: {reason}: {_RULE}") from error
    if not isinstance(plain, dict):
        raise UserError(f"not a configuration: {_RULE}")
    given = plain.pop("format", None)
    if given is None:
        raise UserError(f"not a configuration: it must start with `format: {FORMAT}`.")
    if given != FORMAT or isinstance(given, bool):
        raise UserError(f"format={shown(given)} is invalid: it must be {FORMAT}.")
    return config_from_plain({str(key): value for key, value in plain.items()})


def refuse_unfolding(text: str) -> None:
    """Raise UserError for a text of YAML that could take gigabytes once it is loaded.

    A few lines of anchors and aliases do.
    """
    if len(text.encode(errors="replace")) > _MOST_BYTES:
        raise UserError(f"it must have at most {_MOST_BYTES} bytes.")
    may_hold = "&" in text or "*" in text  # to scan a text takes as long as to load it
    if may_hold and any(isinstance(token, _UNFOLDING) for token in yaml.scan(text)):
        raise UserError("it must hold no YAML anchors or aliases.")


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a copy with the values at dotted keys replaced; UserError where one does not fit.

    At a group that the study searches, the name of an option replaces all settings of the group.
    """
    plain = config_to_plain(config)
    # Groups come first: the other values are of the options that replace them.
    for key, value in sorted(values.items(), key=lambda item: "." in item[0]):
        path, _, last = key.rpartition(".")
        node = _at(plain, path)
        if not isinstance(node, dict) or last not in node:
            known = settings(str(_at(plain, "model.name")))
            raise UserError(f"{key}: no such key, {suggest(key, known)}")
        options = config.study.options.get(key, {})
        is_option = isinstance(value, str) and value in options
        node[last] = dict(options[value]) if is_option else value
    return config_from_plain(plain)


def result_settings(config: Config) -> dict[str, Any]:
    """Return by dotted key the settings that the result of a run depends on."""
    hidden = ("study.", "tracking.", "launcher.", "trainer.checkpoint_minutes")
    leaves = flat(config_to_plain(config)).items()
    return {key: value for key, value in leaves if not key.startswith(hidden)}


def flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one with dotted keys; lists stay values."""
    leaves: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def written(value: Any) -> str:
    """Return a value as it is written in YAML and on the command line."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def shown(value: Any) -> str:
    """Return a value as `written`, cut where it is long, for a message."""
    text = written(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _refusal(error: ValidationError, plain: Mapping[str, Any]) -> UserError:
    """Return the message for the first error; an unknown key is named before a missing one."""
    unknown = "unexpected_keyword_argument"
    first = min(error.errors(include_url=False), key=lambda each: each["type"] != unknown)
    kind, context = first["type"], first.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, UserError):  # raised by a check of several settings
        return cause
    parts = [str(part) for part in first["loc"]]
    network = parts.pop(1) if parts[:1] == ["model"] and len(parts) > 1 else ""
    key, known = ".".join(parts), settings(network)
    if kind == "union_tag_invalid":
        networks = [name.strip("' ") for name in context["expected_tags"].split(",")]
        given = f"model.name={shown(context['tag'])}"
        return UserError(f"{given}: no such network, {nearest(context['tag'], networks)}")
    if kind == unknown:
        of = f" of model.name={network}" if network else ""
        words = known if "." in key else {name.partition(".")[0] for name in known}
        return UserError(f"{key}: no such key{of}, {suggest(key, words)}")
    while parts and ".".join(parts) not in known:  # an element of a list, or a group
        parts.pop()
    key = ".".join(parts) or key
    allowed = rule(known[key]) if key in known else "a group of settings"
    if kind == "finite_number":
        allowed = allowed.replace("a number", "a finite number")
    if kind == "union_tag_not_found":
        kind, key, allowed = "missing", "model.name", rule(known["model.name"])
    if not key:  # the whole is no mapping, or no JSON
        return UserError(f"not a configuration: {first['msg']}")
    given = (
        f"{key} is missing" if kind == "missing" else f"{key}={shown(_at(plain, key))} is invalid"
    )
    return UserError(f"{given}: it must be {allowed}.")


def _at(plain: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key, None where there is none; the whole at the empty key."""
    node: Any = plain
    for name in key.split(".") if key else []:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node
