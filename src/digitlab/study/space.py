"""The search space: Hydra's sweep grammar read into Optuna's distributions."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, QuotedString, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import create_trial

from digitlab.base.errors import UserError, nearest, require
from digitlab.config.recorded import config_to_plain, flat, result_settings, with_values
from digitlab.config.types import Config

# Keys that decide how a trial is measured, and groups that belong to the study as a whole.
_FIXED_KEYS = {
    "data.name",
    "data.evaluate_on",
    "data.validation_images",
    "data.split_seed",
    "data.allow_unknown",
    "trainer.seed",
    "trainer.threads",
    "trainer.device",
    "trainer.early_stopping",
    "trainer.checkpoint_minutes",
}
_FIXED_GROUPS = {"study", "tracking", "launcher"}
_GRAMMAR = "interval(a,b), int(interval(a,b)), tag(log,...), range(a,b,step) or choice(a,b,...)"


@dataclass(frozen=True)
class Hyperparameter:
    """One searched key of the configuration and the values that it may take.

    A list cannot be a category of Optuna's, so a choice of lists is kept as JSON text.
    """

    name: str
    distribution: BaseDistribution
    as_json: bool = False

    def decode(self, value: Any) -> Any:
        """Return the configuration's value for one of the distribution's."""
        return json.loads(value) if self.as_json else value

    def encode(self, value: Any) -> Any:
        """Return the distribution's value for one of the configuration's."""
        return json.dumps(value) if self.as_json else value

    def holds(self, value: Any) -> bool:
        """Return whether the configuration's value lies in the range."""
        try:
            create_trial(
                value=0.0,
                params={self.name: self.encode(value)},
                distributions={self.name: self.distribution},
            )
        except (TypeError, ValueError):  # Optuna's own check
            return False
        return True

    def extremes(self) -> list[Any]:
        """Return the values that decide whether the whole range is valid."""
        if isinstance(self.distribution, CategoricalDistribution):
            return [self.decode(choice) for choice in self.distribution.choices]
        assert isinstance(self.distribution, IntDistribution | FloatDistribution)
        return [self.distribution.low, self.distribution.high]


def read_space(config: Config) -> list[Hyperparameter]:
    """Read the hyperparameters of `config.study.space`, each checked against the configuration.

    Raises:
        UserError: a key that does not exist or may not be searched, a text that is not in the
            grammar, or a range that reaches outside the limits of its setting.
    """
    keys = flat(config_to_plain(config))
    return [_checked(_read(name, text, keys), config) for name, text in config.study.space.items()]


def _read(name: str, text: str, keys: Mapping[str, Any]) -> Hyperparameter:
    given = f"study.space: {name}={text}"
    if _is_fixed(name):
        raise UserError(
            f"{given} is invalid: {name} is the same for all trials. Give it one value instead."
        )
    if name not in keys:
        searched = [key for key in keys if not _is_fixed(key)]
        raise UserError(f"{given}: no such key, {nearest(name, searched)}")
    try:
        sweep = OverridesParser.create().parse_override(f"{name}={text}").value()
    except HydraException as error:
        raise UserError(f"{given} is invalid: it must be {_GRAMMAR}.") from error
    if isinstance(sweep, ChoiceSweep):
        require(not sweep.tags, given, "a choice without a tag")
        return _choice(name, sweep, given)
    if not isinstance(sweep, IntervalSweep | RangeSweep):
        raise UserError(f"{given} is invalid: it must be {_GRAMMAR}.")
    log = "log" in sweep.tags
    require(set(sweep.tags) <= {"log"}, given, "a range without a tag, or with tag(log,...)")
    if isinstance(sweep, RangeSweep):
        return Hyperparameter(name, _range(sweep, log, given))
    low, high = sweep.start, sweep.end
    whole = isinstance(low, int) and isinstance(high, int)
    if isinstance(keys[name], int) and not whole:
        raise UserError(f"{given} gives fractions, but {name} is an integer: write int(...).")
    if low is None or high is None or low >= high or (log and low <= 0):
        raise UserError(f"{given} is invalid: it must have low < high, and low > 0 if logarithmic.")
    if whole:
        return Hyperparameter(name, IntDistribution(int(low), int(high), log=log))
    return Hyperparameter(name, FloatDistribution(float(low), float(high), log=log))


def _choice(name: str, sweep: ChoiceSweep, given: str) -> Hyperparameter:
    values = [item.text if isinstance(item, QuotedString) else item for item in sweep.list]
    if all(isinstance(value, list) for value in values):
        texts = [json.dumps(value) for value in values]
        return Hyperparameter(name, CategoricalDistribution(texts), as_json=True)
    if not all(value is None or isinstance(value, bool | int | float | str) for value in values):
        raise UserError(f"{given} is invalid: it must be a choice of words and numbers, or lists.")
    return Hyperparameter(name, CategoricalDistribution(values))  # type: ignore[arg-type]


def _range(sweep: RangeSweep, log: bool, given: str) -> BaseDistribution:
    start, stop, step = sweep.start, sweep.stop, sweep.step
    if start is None or stop is None or not step or step <= 0 or log:
        raise UserError(f"{given} is invalid: it must be range(low,high,step), step > 0, no tag.")
    # In decimals, as written: in binary 0.1 + 3 * 0.1 is not the 0.4 to be left out.
    first, end, each = (Decimal(str(number)) for number in (start, stop, step))
    count = math.ceil((end - first) / each)
    require(count >= 2, given, "a range of two or more values")
    last = first + (count - 1) * each
    if all(isinstance(number, int) for number in (start, stop, step)):
        return IntDistribution(int(start), int(last), step=int(step))
    return FloatDistribution(float(start), float(last), step=float(step))


def _checked(hyperparameter: Hyperparameter, config: Config) -> Hyperparameter:
    name = hyperparameter.name
    for value in hyperparameter.extremes():
        try:
            with_values(config, {name: value})
        except UserError as error:
            raise UserError(f"study.space: {name}={config.study.space[name]}: {error}") from error
    return hyperparameter


def first_values(config: Config, space: list[Hyperparameter]) -> list[dict[str, Any]]:
    """Return the values of the first trials: the recipe's own, and those of `study.begin_with`.

    The recipe's own are missing where they lie outside of the space.

    Raises:
        UserError: values that are not in the space.
    """
    own = own_values(config, space)
    begin = [own] if all(one.holds(own[one.name]) for one in space) else []
    for given in config.study.begin_with:
        values = own | given
        outside = [name for name in given if name not in own]
        outside += [one.name for one in space if not one.holds(values[one.name])]
        if outside:
            name = outside[0]
            raise UserError(
                f"study.begin_with: {name}={values[name]} is invalid: it must be a "
                "hyperparameter of study.space, and lie in its range."
            )
        begin.append(values)
    return begin


def own_values(config: Config, space: list[Hyperparameter]) -> dict[str, Any]:
    """Return what the recipe itself sets the hyperparameters to."""
    keys = flat(config_to_plain(config))
    return {one.name: keys[one.name] for one in space}


def find_values(
    config: Config, space: list[Hyperparameter], wanted: Config
) -> dict[str, Any] | None:
    """Return the values of the trial that trains what `wanted` does; None if no trial can."""
    settings = result_settings(wanted)
    if not all(one.name in settings and one.holds(settings[one.name]) for one in space):
        return None
    values = {one.name: settings[one.name] for one in space}
    try:
        return values if result_settings(with_values(config, values)) == settings else None
    except UserError:  # they contradict a setting that is fixed here
        return None


def is_widened(one: Hyperparameter, earlier: str | None, config: Config) -> bool:
    """Return whether a range holds all of an earlier one, on the same scale.

    A choice has none: Optuna keeps the categories that a study began with.
    """
    new = one.distribution
    if earlier is None or not isinstance(new, IntDistribution | FloatDistribution):
        return False
    old = _read(one.name, earlier, flat(config_to_plain(config)))
    if type(old.distribution) is not type(new):
        return False
    same = all(getattr(old.distribution, key) == getattr(new, key) for key in ("log", "step"))
    return same and all(one.holds(value) for value in old.extremes())


def _is_fixed(key: str) -> bool:
    return key in _FIXED_KEYS or key.partition(".")[0] in _FIXED_GROUPS
