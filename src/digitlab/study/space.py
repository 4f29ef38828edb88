"""The search space: Hydra's sweep grammar read into Optuna's distributions."""

import itertools
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
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
from optuna.trial import Trial, create_trial

from digitlab.base.errors import UserError, require
from digitlab.config.recorded import config_to_plain, flat, result_settings, with_values
from digitlab.config.schema import settings
from digitlab.config.suggestions import suggest
from digitlab.config.types import Config

# Keys that decide how a trial is measured, and groups that belong to the study as a whole.
_FIXED_KEYS = {
    "data",
    "data.name",
    "data.evaluate_on",
    "data.validation_images",
    "data.split_seed",
    "data.allow_unknown",
    "trainer",
    "trainer.seed",
    "trainer.threads",
    "trainer.device",
    "trainer.early_stopping",
    "trainer.checkpoint_minutes",
}
_FIXED_GROUPS = {"study", "tracking", "launcher"}
_NO_OPTION = "none of these"  # what the recipe's own settings are among options that are searched
_MOST_VALUES = 10**9  # of a range
_GRAMMAR = "interval(a,b), int(interval(a,b)), tag(log,...), range(a,b,step) or choice(a,b,...)"


@dataclass(frozen=True)
class Hyperparameter:
    """One searched key of the configuration and the values that it may take.

    The choice among a group's options is one, named after the group. A list cannot be a category
    of Optuna's, so a choice of lists is kept as JSON text.
    """

    name: str
    distribution: BaseDistribution
    as_json: bool = False
    only_with: tuple[str, ...] = ()  # options of its group, where others lack the setting

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether a trial whose groups have these options has this hyperparameter."""
        return not self.only_with or values[_group(self.name)] in self.only_with

    def suggest(self, trial: Trial) -> None:
        """Let the study's sampler draw the trial's value."""
        match self.distribution:
            case FloatDistribution() as of:
                trial.suggest_float(self.name, of.low, of.high, step=of.step, log=of.log)
            case IntDistribution() as of:
                trial.suggest_int(self.name, of.low, of.high, step=of.step, log=of.log)
            case CategoricalDistribution() as of:
                trial.suggest_categorical(self.name, of.choices)

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

    The choices among a group's options come first: which of the others a trial has depends on them.

    Raises:
        UserError: a key that does not exist or may not be searched, a text that is not in the
            grammar, a range that reaches outside the limits of its setting, or a setting that no
            option has among which the space chooses.
    """
    space, options = config.study.space, config.study.options
    groups = [
        Hyperparameter(name, CategoricalDistribution(list(options[name]))) for name in options
    ]
    others = [_read(name, space[name], config) for name in space if name not in options]
    return [_checked(one, config) for one in (*groups, *others)]


def _read(name: str, text: str, config: Config) -> Hyperparameter:
    given, group = f"study.space: {name}={text}", _group(name)
    if _is_fixed(name):
        raise UserError(
            f"{given} is invalid: {name} is the same for all trials. Give it one value instead."
        )
    own, options = flat(config_to_plain(config)), config.study.options.get(group)
    if name == "model.name" or (name == f"{group}.name" and options is not None):
        raise UserError(
            f"{given} is invalid: it must come with the settings of an option. Write "
            f"{group}={text}, which searches options."
        )
    # A setting may be one of some options only: `found` has its value in each that has it.
    cases = {"": own}
    if options is not None:
        cases = {option: flat({group: plain}) for option, plain in options.items()}
    found = {option: keys[name] for option, keys in cases.items() if name in keys}
    if not found and options is not None and name in settings():
        raise UserError(
            f"{given} with {group}={config.study.space[group]} is invalid: it must be a setting of "
            f"one of these options. Add an option that has it, or leave {name} out."
        )
    if not found:
        searched = {key for keys in (own, *cases.values()) for key in keys if not _is_fixed(key)}
        raise UserError(f"{given}: no such key, {suggest(name, searched)}")
    one = _parse(name, text, given, is_whole=isinstance(next(iter(found.values())), int))
    return replace(one, only_with=tuple(found) if len(found) < len(cases) else ())


def _parse(name: str, text: str, given: str, is_whole: bool) -> Hyperparameter:
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
    if is_whole and not whole:
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
    rule = f"a range of 2 to {_MOST_VALUES} values"
    require(all(number.is_finite() for number in (first, end, each)), given, rule)
    with localcontext(prec=700):  # digits: the count of any two floats takes up to 632
        count = math.ceil((end - first) / each)
    require(2 <= count <= _MOST_VALUES, given, rule)
    last = first + (count - 1) * each
    if all(isinstance(number, int) for number in (start, stop, step)):
        return IntDistribution(int(start), int(last), step=int(step))
    return FloatDistribution(float(start), float(last), step=float(step))


def _checked(one: Hyperparameter, config: Config) -> Hyperparameter:
    name, group, options = one.name, _group(one.name), config.study.options
    tried = [{name: value} for value in one.extremes()]
    if group in options and name != group:
        tried = [{group: o} | values for o in one.only_with or options[group] for values in tried]
    for values in tried:
        try:
            with_values(config, values)
        except UserError as error:
            option = f" with {group}={values[group]}" if group in values else ""
            given = f"study.space: {name}={config.study.space[name]}{option}"
            raise UserError(f"{given}: {error}") from error
    return one


def first_values(config: Config, space: list[Hyperparameter]) -> list[dict[str, Any]]:
    """Return the values of the first trials: the recipe's own, and those of `study.begin_with`.

    The recipe's own are missing where they lie outside of the space.

    Raises:
        UserError: values that are not in the space.
    """
    own = own_values(config, space)
    begin = [] if _outside(space, own) else [own]
    return begin + [_begin_values(config, space, given) for given in config.study.begin_with]


def _begin_values(
    config: Config, space: list[Hyperparameter], given: dict[str, Any]
) -> dict[str, Any]:
    """Complete values of `study.begin_with` by those of the options that they choose."""
    chosen = {name: value for name, value in given.items() if name in config.study.options}
    outside = _outside(space, chosen)
    own = own_values(config if outside else with_values(config, chosen), space)
    values = own | given
    outside += [name for name in given if name not in own] + _outside(space, values)
    if outside:
        name = outside[0]
        raise UserError(
            f"study.begin_with: {name}={values[name]} is invalid: it must be a "
            "hyperparameter of study.space that the trial has, and lie in its range."
        )
    return values


def _outside(space: list[Hyperparameter], values: Mapping[str, Any]) -> list[str]:
    """Return the hyperparameters whose values do not lie in their ranges."""
    known = [one for one in space if one.name in values]
    return [one.name for one in known if not one.holds(values[one.name])]


def draw_values(space: list[Hyperparameter], trial: Trial) -> None:
    """Let the sampler of the trial's study draw all values that the trial is to have."""
    for one in space:  # the options of groups first
        if one.applies(trial.params):
            one.suggest(trial)


def own_values(config: Config, space: list[Hyperparameter]) -> dict[str, Any]:
    """Return what the recipe itself sets the hyperparameters to; without those that it lacks.

    Of a group it is the option with just these settings.
    """
    plain = config_to_plain(config)
    keys, own = flat(plain), dict[str, Any]()
    for group, options in config.study.options.items():
        same = (option for option, found in options.items() if found == plain[group])
        own[group] = next(same, _NO_OPTION)
    return own | {one.name: keys[one.name] for one in space if one.name in keys}


def find_values(
    config: Config, space: list[Hyperparameter], wanted: Config
) -> dict[str, Any] | None:
    """Return the values of the trial that trains what `wanted` does; None if no trial can."""
    found, options = result_settings(wanted), config.study.options
    for chosen in itertools.product(*options.values()):
        values: dict[str, Any] = dict(zip(options, chosen, strict=True))
        others = [one for one in space if one.name not in options and one.applies(values)]
        values |= {one.name: found.get(one.name) for one in others}
        # Values that all lie in their ranges may contradict a setting that is fixed here.
        with suppress(UserError):
            if (
                not _outside(space, values)
                and result_settings(with_values(config, values)) == found
            ):
                return values
    return None


def is_widened(one: Hyperparameter, earlier: str | None, config: Config) -> bool:
    """Return whether a range holds all of an earlier one, on the same scale.

    A choice has none: Optuna keeps the categories that a study began with.
    """
    new = one.distribution
    if earlier is None or not isinstance(new, IntDistribution | FloatDistribution):
        return False
    old = _read(one.name, earlier, config)
    if type(old.distribution) is not type(new):
        return False
    same = all(getattr(old.distribution, key) == getattr(new, key) for key in ("log", "step"))
    return same and all(one.holds(value) for value in old.extremes())


def _is_fixed(key: str) -> bool:
    return key in _FIXED_KEYS or _group(key) in _FIXED_GROUPS


def _group(key: str) -> str:
    return key.partition(".")[0]
