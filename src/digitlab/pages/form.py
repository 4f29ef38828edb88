"""The form of a network: its fields from the configuration's schema, and what they compose."""

from collections.abc import Mapping, Sequence
from typing import Any

from digitlab.base.errors import UserError, nearest
from digitlab.base.invocation import command
from digitlab.config.compose import Composed, compose
from digitlab.config.recorded import config_to_plain, flat, with_values, written
from digitlab.config.schema import rule, settings
from digitlab.config.types import Config
from digitlab.networks.settings import ConvnetConfig
from digitlab.study.layers import layer_rows

LAYERS = ("model.widths", "model.kernel_sizes", "model.strides", "model.pools")
_FIELDS = (
    *("model.batch_norm", "model.dropout", "model.hidden"),
    *("trainer.epochs", "optim.learning_rate", "data.batch_size", "optim.name", "trainer.seed"),
    *(f"data.augment.{name}" for name in ("shift", "rotate", "scale", "shear", "erase", "stroke")),
)
# The article's network as far as layers that can be changed go: those pad their images.
_CHANGEABLE = ("model=convnet", "model.widths=[32]", "model.batch_norm=false", "model.hidden=0")
_MOST_PARAMETERS = 5_000_000  # whose weights at each moment fit into memory


class Form:
    """What a person can set on the page, from a recipe on."""

    def __init__(self, overrides: Sequence[str]) -> None:
        """Start from `digitlab train OVERRIDES`, the article's recipe if they name none."""
        is_named = any(text.startswith("experiments=") for text in overrides)
        self.overrides = (*([] if is_named else ["experiments=seed"]), *overrides)
        self.recipe = compose("train", self.overrides)[0]
        self.is_fixed = not isinstance(self.recipe.config.model, ConvnetConfig)
        changeable = _CHANGEABLE if self.is_fixed else ()
        self.base = compose("train", [*self.overrides, *changeable])[0]

    def describe(self) -> dict[str, Any]:
        """Return the fields with their limits, units, a sentence each, and the first values."""
        known = settings("convnet")
        fields = [_field(key, known[key]) for key in (*LAYERS, *_FIELDS)]
        return {"fields": fields, "values": values_of(self.base.config), "is_fixed": self.is_fixed}

    def compose(self, values: Mapping[str, Any], is_fixed: bool) -> Composed:
        """Return what the values of the form configure; the recipe's own network if asked for.

        Raises:
            UserError: a value is unknown or does not fit.
        """
        base = self.recipe if is_fixed else self.base
        usual, known = flat(config_to_plain(base.config)), (*LAYERS, *_FIELDS)
        for key in values:
            if key not in known:
                raise UserError(f"{key}: no such field of the form, {nearest(key, known)}")
        short = {key: _short(key, value) for key, value in values.items() if key in usual}
        changed = {key: v for key, v in short.items() if v != _short(key, usual[key])}
        config = with_values(base.config, changed)
        words = (f"{key}={_word(value)}" for key, value in changed.items())
        kept = (text for text in base.overrides if text.partition("=")[0] not in changed)
        return Composed(config, (*kept, *words))

    def check(self, values: Mapping[str, Any], is_fixed: bool) -> dict[str, Any]:
        """Return the layers of what is configured, and the command that trains it.

        Raises:
            UserError: as `compose`, or the network is too large for a page.
        """
        composed = self.compose(values, is_fixed)
        rows = layer_rows(composed.config.model, "meta")
        parameters = sum(count for _, _, count in rows)
        if parameters > _MOST_PARAMETERS:
            raise UserError(
                f"This network has {parameters:,} parameters: it must have at most "
                f"{_MOST_PARAMETERS:,} to be shown while it learns. Make a layer narrower, or use "
                "`digitlab train`."
            )
        layers = [{"kind": kind, "shape": shape, "parameters": count}
                  for kind, shape, count in rows]  # fmt: skip
        text = command("train", *composed.overrides)
        return {"layers": layers, "parameters": parameters, "command": text}


def values_of(config: Config) -> dict[str, Any]:
    """Return the values of the form's fields that a configuration has."""
    leaves = flat(config_to_plain(config))
    values = {key: leaves[key] for key in (*LAYERS, *_FIELDS) if key in leaves}
    if isinstance(config.model, ConvnetConfig):  # the form has a line for each layer
        for key, column in zip(LAYERS, zip(*config.model.layers(), strict=True), strict=True):
            values[key] = list(column)
    return values


def _field(key: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    item = schema.get("items", schema)
    names = {"minimum": "min", "exclusiveMinimum": "min", "maximum": "max"}
    limits = {names[limit]: item[limit] for limit in names if limit in item}
    kind = "enum" if "enum" in item else item["type"]
    about = {"key": key, "kind": kind, "about": schema["description"], "rule": rule(schema)}
    return about | limits | ({"options": item["enum"]} if kind == "enum" else {})


def _short(key: str, value: Any) -> Any:
    """Return a list of equal values as one, which holds for every layer."""
    is_alike = key in LAYERS[1:] and isinstance(value, list) and len(set(map(str, value))) == 1
    return value[:1] if is_alike else value


def _word(value: Any) -> str:
    return written(value).replace(" ", "")
