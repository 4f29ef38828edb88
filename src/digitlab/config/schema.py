"""Descriptions of the settings: a JSON schema, and each setting's rule in words."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from digitlab.config.types import Config

ADAPTER = TypeAdapter(Config)
_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "object": "a mapping of texts",
}
_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration, with limits and descriptions."""
    return ADAPTER.json_schema()


@cache
def settings(network: str = "") -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each dotted key: of all networks' keys, or of one's."""
    whole, found = json_schema(), {}

    def walk(group: Mapping[str, Any], prefix: str) -> None:
        for name, field in group["properties"].items():
            networks = field.get("discriminator", {}).get("mapping", {})
            references = networks.values() if network not in networks else [networks[network]]
            references = references or [field["$ref"]] if "$ref" in field else references
            definitions = [whole["$defs"][each.rpartition("/")[2]] for each in references]
            for definition in definitions or [field]:
                if "properties" in definition:
                    walk(definition, f"{prefix}{name}.")
                else:
                    found[prefix + name] = {**definition, **field}

    walk(whole, "")
    return found


def rule(schema: Mapping[str, Any]) -> str:
    """Return in words what the JSON schema of a setting allows: "an integer >= 1"."""
    if "rule" in schema:
        return str(schema["rule"])
    if "const" in schema:
        return "the name of a network"
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "anyOf" in schema:
        return " or ".join(rule(part) for part in schema["anyOf"])
    if schema["type"] == "array":
        some = "a list of one or more values" if schema.get("minItems") else "a list of values"
        return f"{some}, each {rule(schema['items'])}"
    limits = " and ".join(f"{sign} {schema[key]}" for key, sign in _SIGNS.items() if key in schema)
    return f"{_KINDS[schema['type']]} {limits}".rstrip()


def describe_settings() -> str:
    """Return a line for each setting: key, description and rule."""
    return "\n".join(
        f"  {key:<23} {schema['description']} ({rule(schema)})"
        for key, schema in settings().items()
    )
