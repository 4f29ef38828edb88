"""Hydra's sweep grammar becomes distributions that hold exactly the values that were written."""

import dataclasses
from decimal import Decimal
from typing import Any

import optuna
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.config.compose import compose
from digitlab.config.recorded import config_to_plain, flat, with_values
from digitlab.config.types import Config, Optimizer
from digitlab.study.space import (
    Hyperparameter,
    draw_values,
    find_values,
    first_values,
    own_values,
    read_space,
)

RECIPES = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))
RATES = st.floats(1e-9, 10, allow_nan=False)  # what optim.learning_rate allows


@pytest.fixture(scope="module")
def config() -> Config:
    return compose("train", ["~experiments"])[0].config


def with_space(config: Config, space: dict[str, str]) -> Config:
    return dataclasses.replace(config, study=dataclasses.replace(config.study, space=space))


def read(config: Config, name: str, text: str) -> Hyperparameter:
    (found,) = read_space(with_space(config, {name: text}))
    assert found.name == name
    return found


def refusal(config: Config, name: str, text: str) -> str:
    """The message of the UserError that a hyperparameter leads to: one line."""
    with pytest.raises(UserError) as caught:
        read_space(with_space(config, {name: text}))
    message = str(caught.value)
    assert "\n" not in message
    return message


def numbers(distribution: BaseDistribution) -> list[float]:
    """All values of a distribution with steps."""
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    assert distribution.step
    low, high, step = (
        Decimal(str(x)) for x in (distribution.low, distribution.high, distribution.step)
    )
    assert (high - low) % step == 0
    values = [low + step * k for k in range(int((high - low) / step) + 1)]
    return [type(distribution.low)(value) for value in values]


def assert_fits(config: Config, found: Hyperparameter, value: Any) -> None:
    """`value`, one of the distribution's, goes to the configuration and comes back."""
    of = found.distribution
    assert of.to_external_repr(of.to_internal_repr(value)) == value
    decoded = found.decode(value)
    assert found.encode(decoded) == value
    stored = flat(config_to_plain(with_values(config, {found.name: decoded})))[found.name]
    assert stored == decoded
    assert found.encode(stored) == value


# --- what is shipped ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_space_of_every_recipe_is_understood(recipe: str) -> None:
    config = compose("sweep", [f"experiments={recipe}"])[0].config
    hyperparameters = read_space(config)
    assert [found.name for found in hyperparameters] == list(config.study.space)
    for found in hyperparameters:
        for extreme in found.extremes():
            assert_fits(config, found, found.encode(extreme))


# --- intervals ---


@settings(deadline=None, max_examples=12)
@given(st.tuples(st.integers(0, 2**16), st.integers(0, 2**16)), st.booleans())
def test_an_interval_of_whole_numbers_includes_both_ends(
    config: Config, ends: tuple[int, int], log: bool
) -> None:
    low, high = sorted(ends)
    assume(low < high and (low > 0 or not log))
    text = f"int(interval({low},{high}))"
    found = read(config, "model.hidden", f"tag(log,{text})" if log else text)
    assert found.distribution == IntDistribution(low, high, log=log)
    assert found.extremes() == [low, high]
    assert_fits(config, found, low)
    assert_fits(config, found, high)


@settings(deadline=None, max_examples=12)
@given(st.tuples(RATES, RATES), st.booleans())
@example((1.0, 2.0), False)
@example((1e-9, 10.0), True)
def test_an_interval_includes_both_ends_to_the_last_digit(
    config: Config, ends: tuple[float, float], log: bool
) -> None:
    low, high = sorted(ends)
    assume(low < high)
    text = f"interval({low},{high})"
    found = read(config, "optim.learning_rate", f"tag(log,{text})" if log else text)
    assert found.distribution == FloatDistribution(low, high, log=log)
    assert_fits(config, found, low)
    assert_fits(config, found, high)


def test_an_interval_of_a_fraction_may_be_written_in_whole_numbers(config: Config) -> None:
    found = read(config, "optim.learning_rate", "interval(1,5)")
    assert found.distribution == FloatDistribution(1.0, 5.0)


# --- ranges ---


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(1, 50))
@example(1, 9, 1)  # start, what stop lies above it, step
@example(1, 8, 2)
@example(1, 9, 2)
def test_a_range_holds_what_python_s_range_holds(
    config: Config, start: int, more: int, step: int
) -> None:
    expected = range(start, start + more, step)
    assume(len(expected) > 1)
    found = read(config, "model.hidden", f"range({start},{start + more},{step})")
    assert numbers(found.distribution) == list(expected)
    assert_fits(config, found, expected[0])
    assert_fits(config, found, expected[-1])


def test_a_range_may_leave_out_start_and_step(config: Config) -> None:
    assert numbers(read(config, "model.hidden", "range(4)").distribution) == [0, 1, 2, 3]
    assert numbers(read(config, "model.hidden", "range(2,5)").distribution) == [2, 3, 4]


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 300),
    st.integers(1, 100),
    st.integers(2, 20),
    st.integers(0, 99),
    st.integers(2, 4),
)
@example(10, 10, 3, 0, 2)  # range(0.10,0.40,0.10)
@example(1, 3, 3, 0, 2)  # range(0.01,0.10,0.03)
@example(10, 10, 3, 5, 2)  # range(0.10,0.35,0.10)
def test_a_range_of_fractions_leaves_out_its_stop(
    config: Config, start: int, step: int, count: int, less: int, places: int
) -> None:
    low, by = Decimal(start).scaleb(-places), Decimal(step).scaleb(-places)
    stop = low + by * count - Decimal(less % step).scaleb(-places)
    expected = [float(low + by * k) for k in range(count)]
    assume(expected[-1] <= 10)
    found = read(config, "optim.learning_rate", f"range({low:f},{stop:f},{by:f})")
    assert numbers(found.distribution) == expected
    assert_fits(config, found, expected[0])
    assert_fits(config, found, expected[-1])


# --- choices ---


@settings(deadline=None, max_examples=12)
@given(st.lists(st.integers(0, 2**16), min_size=2, max_size=6, unique=True), st.booleans())
def test_a_choice_of_numbers_keeps_them_in_order(
    config: Config, choices: list[int], short: bool
) -> None:
    listed = ",".join(map(str, choices))
    found = read(config, "model.hidden", listed if short else f"choice({listed})")
    assert found.distribution == CategoricalDistribution(choices)
    for value in choices:
        assert_fits(config, found, value)


@settings(deadline=None, max_examples=8)
@given(st.lists(RATES, min_size=2, max_size=4, unique=True))
def test_a_choice_of_fractions_keeps_them_to_the_last_digit(
    config: Config, choices: list[float]
) -> None:
    found = read(config, "optim.learning_rate", f"choice({','.join(map(str, choices))})")
    assert found.distribution == CategoricalDistribution(choices)
    for value in choices:
        assert_fits(config, found, value)


@settings(deadline=None, max_examples=12)
@given(
    st.lists(
        st.lists(st.integers(1, 512), min_size=1, max_size=4),
        min_size=2,
        max_size=4,
        unique_by=tuple,
    )
)
def test_a_choice_of_lists_comes_back_as_lists(config: Config, choices: list[list[int]]) -> None:
    listed = ",".join(str(choice).replace(" ", "") for choice in choices)
    found = read(config, "model.widths", f"choice({listed})")
    assert found.extremes() == choices
    assert isinstance(found.distribution, CategoricalDistribution)
    assert [found.decode(value) for value in found.distribution.choices] == choices
    for value in found.distribution.choices:
        assert_fits(config, found, value)


@pytest.mark.parametrize("text", ["adam,sgd", "choice(adam,sgd)", "'adam',\"sgd\""])
def test_a_choice_of_words_may_be_quoted(config: Config, text: str) -> None:
    found = read(config, "optim.name", text)
    assert found.distribution == CategoricalDistribution(["adam", "sgd"])
    changed = with_values(config, {"optim.name": found.decode("sgd")})
    assert changed.optim.name is Optimizer.sgd


def test_a_choice_of_yes_and_no(config: Config) -> None:
    found = read(config, "model.batch_norm", "true,false")
    assert found.distribution == CategoricalDistribution([True, False])
    assert with_values(config, {"model.batch_norm": found.decode(False)}).model.batch_norm is False


# --- a trial's values ---

SPACE = {
    "model.widths": "[4,4],[8,8]",
    "model.hidden": "tag(log,int(interval(16,64)))",
    "trainer.epochs": "range(1,9,2)",
    "optim.learning_rate": "tag(log,interval(0.001,0.1))",
    "optim.ema": "range(0.1,0.5,0.1)",
    "optim.name": "adam,sgd",
}


def test_every_suggestion_is_a_configuration_and_a_value_that_was_written(config: Config) -> None:
    hyperparameters = read_space(with_space(config, SPACE))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    distributions = {one.name: one.distribution for one in hyperparameters}
    drawn = [study.ask(distributions).params for _ in range(30)]
    seen = [{one.name: one.decode(p[one.name]) for one in hyperparameters} for p in drawn]
    for values in seen:
        with_values(config, values)
        assert 16 <= values["model.hidden"] <= 64
        assert 0.001 <= values["optim.learning_rate"] <= 0.1
    assert {tuple(values["model.widths"]) for values in seen} == {(4, 4), (8, 8)}
    assert {values["trainer.epochs"] for values in seen} == {1, 3, 5, 7}
    assert {round(values["optim.ema"], 9) for values in seen} == {0.1, 0.2, 0.3, 0.4}
    assert {values["optim.name"] for values in seen} == {"adam", "sgd"}


def found_values(config: Config, space: dict[str, str], **changed: Any) -> dict[str, Any] | None:
    """The values of the trial that trains `config` with other model settings, if there is one."""
    mine = with_space(config, space)
    wanted = with_values(config, {f"model.{key}": value for key, value in changed.items()})
    return find_values(mine, read_space(mine), wanted)


def test_a_configuration_lies_in_a_space_where_a_trial_trains_the_same(config: Config) -> None:
    space = {"model.hidden": "int(interval(16,100))", "model.widths": "[16,32],[8,8]"}
    own = {"model.hidden": 64, "model.widths": [16, 32]}
    assert found_values(config, space) == own
    assert found_values(config, space, widths=[8, 8]) == own | {"model.widths": [8, 8]}
    assert found_values(config, space, widths=[8, 16]) is None
    assert found_values(config, space, hidden=101) is None
    assert found_values(config, space, dropout=0.5) is None  # which is fixed here
    article = compose("train", ["~experiments", "model=seed"])[0].config
    searched = with_space(config, space)
    assert find_values(searched, read_space(searched), article) is None
    often = with_values(config, {"trainer.checkpoint_minutes": 9})
    assert find_values(searched, read_space(searched), often) == own  # no result depends on it


# --- choices among the options of groups ---

MODELS = ["convnet", "seed", "strided"]
OPTIMIZERS = ["adamw", "sgd"]
RANGES = {
    "model.hidden": "int(interval(16,64))",
    "model.dropout": "0.0,0.25,0.5",
    "optim.momentum": "interval(0.5,0.95)",
    "trainer.epochs": "range(1,4)",
}


@pytest.fixture(scope="module")
def whole() -> Config:
    """A configuration with the settings of all options of both groups."""
    choices = (f"model={','.join(MODELS)}", f"optim={','.join(OPTIMIZERS)}")
    return compose("sweep", ["~experiments", *choices])[0].config


def with_choices(config: Config, space: dict[str, str], **chosen: list[str]) -> Config:
    """Search `space` and the choices among options of groups, without composing them anew."""
    known = config.study.options
    options = {
        group: {name: known[group][name] for name in names} for group, names in chosen.items()
    }
    choices = {group: f"choice({','.join(names)})" for group, names in chosen.items()}
    study = dataclasses.replace(config.study, space=space | choices, options=options)
    return dataclasses.replace(config, study=study)


def some(words: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(words), min_size=1, unique=True)


def drawn(space: list[Hyperparameter], seed: int) -> dict[str, Any]:
    """What a study draws for a trial, in the configuration's terms."""
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    draw_values(space, trial)
    return {
        one.name: one.decode(trial.params[one.name]) for one in space if one.name in trial.params
    }


@settings(deadline=None, max_examples=40)
@given(some(MODELS), some(OPTIMIZERS), some(list(RANGES)), st.integers(0, 2**32 - 1))
def test_a_trial_has_what_its_options_have_and_trains_them_with_its_values(
    whole: Config, models: list[str], optimizers: list[str], names: list[str], seed: int
) -> None:
    ranges = {name: RANGES[name] for name in names}
    config = with_choices(whole, ranges, model=models, optim=optimizers)
    lost = [name for name in names if name.startswith("model.")] if models == ["seed"] else []
    if lost:
        with pytest.raises(UserError) as caught:
            read_space(config)
        assert f"{lost[0]}={RANGES[lost[0]]} with model=choice(seed) is invalid" in str(
            caught.value
        )
        return
    space = read_space(config)
    assert [one.name for one in space] == ["model", "optim", *names]
    assert space[0].distribution == CategoricalDistribution(models)
    values = drawn(space, seed)
    expected = [name for name in names if not (values["model"] == "seed" and "model." in name)]
    assert list(values) == ["model", "optim", *expected]
    trained = config_to_plain(with_values(config, values))
    for group in ("model", "optim"):
        searched = {n.partition(".")[2]: v for n, v in values.items() if n.startswith(f"{group}.")}
        assert trained[group] == config.study.options[group][values[group]] | searched
    # What it trains is found again; two options may hold the same once a setting is searched.
    found = find_values(config, space, with_values(config, values))
    assert found is not None
    assert with_values(config, found) == with_values(config, values)


@settings(deadline=None, max_examples=12)
@given(some(MODELS), st.sampled_from(["dropout", "hidden"]))
def test_the_recipe_s_own_values_are_those_of_the_option_that_it_has(
    whole: Config, models: list[str], setting: str
) -> None:
    assume(models != ["seed"])
    name = f"model.{setting}"
    for own in MODELS:
        config = with_choices(
            with_values(whole, {"model": own}), {name: RANGES[name]}, model=models
        )
        space, begin = read_space(config), first_values(config, read_space(config))
        is_there = own in models and (own == "seed" or setting == "dropout" or own == "convnet")
        assert len(begin) == is_there  # strided has 128 hidden units: out of range
        if begin:
            value = whole.study.options["model"][own].get(setting)
            values = {"model": own} | ({} if own == "seed" else {name: value})
            assert begin == [values] == [own_values(config, space)]
            assert with_values(config, values) == config


def test_known_good_points_may_choose_an_option_and_are_completed_by_its_settings(
    whole: Config,
) -> None:
    def first(*points: dict[str, Any]) -> list[dict[str, Any]]:
        space = {"model.hidden": "int(interval(16,256))", "optim.ema": "interval(0,0.9)"}
        config = with_choices(whole, space, model=["convnet", "seed", "strided"])
        study = dataclasses.replace(config.study, begin_with=list(points))
        config = dataclasses.replace(config, study=study)
        return first_values(config, read_space(config))[1:]

    assert first(
        {"model": "strided"}, {"model": "seed", "optim.ema": 0.5}, {"model.hidden": 20}
    ) == [
        {"model": "strided", "model.hidden": 128, "optim.ema": 0.0},
        {"model": "seed", "optim.ema": 0.5},
        {"model": "convnet", "model.hidden": 20, "optim.ema": 0.0},
    ]
    for point in ({"model": "narrow"}, {"model": "seed", "model.hidden": 20}, {"model": ["seed"]}):
        name, value = list(point.items())[-1]
        with pytest.raises(UserError) as caught:
            first(point)
        assert f"study.begin_with: {name}={value} is invalid" in str(caught.value)


def test_an_option_that_contradicts_a_setting_is_named(whole: Config) -> None:
    batches = with_values(whole, {"data.batch_size": 1, "model.batch_norm": False})
    with pytest.raises(UserError) as caught:
        read_space(with_choices(batches, {}, model=["seed", "convnet"]))
    assert "study.space: model=choice(seed,convnet) with model=convnet: " in str(caught.value)
    assert "data.batch_size=1 with model.batch_norm=true" in str(caught.value)


def test_a_range_is_checked_with_each_option_that_has_the_setting(whole: Config) -> None:
    space = {"model.pools": "[2],[1,2]"}
    with pytest.raises(UserError) as caught:
        read_space(with_choices(whole, space, model=["seed", "convnet", "strided"]))
    message = "study.space: model.pools=[2],[1,2] with model=strided: model.pools=[1, 2] does not"
    assert message in str(caught.value)


def test_only_a_name_is_no_way_to_search_networks(config: Config) -> None:
    message = refusal(config, "model.name", "choice(seed,convnet)")
    assert "Write model=choice(seed,convnet)" in message


def test_a_name_and_the_options_that_have_it_are_not_searched_at_once(whole: Config) -> None:
    with pytest.raises(UserError) as caught:
        read_space(with_choices(whole, {"optim.name": "adam,sgd"}, optim=OPTIMIZERS))
    assert "Write optim=adam,sgd" in str(caught.value)


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # no such hyperparameter
        ("model.hiden", "range(1,5)"),
        ("hidden", "range(1,5)"),
        ("model.widths.0", "8,16"),
        ("model", "convnet,seed"),
        ("data.augment", "{shift:1},{shift:2}"),
        # not to be searched
        ("study.trials", "range(1,5)"),
        ("study.name", "a,b"),
        ("tracking.experiment", "a,b"),
        ("data", "mnist,sample"),
        ("data.name", "mnist,sample"),
        ("trainer", "default,default"),
        ("experiments", "smoke,seed"),
        ("data.evaluate_on", "validation,test"),
        ("data.validation_images", "range(10,50,10)"),
        ("data.split_seed", "range(1,5)"),
        # not in the grammar
        ("model.hidden", ""),
        ("model.hidden", "64"),
        ("model.hidden", "many"),
        ("model.hidden", "["),
        ("model.hidden", "interval(1,"),
        ("model.hidden", "interval(1)"),
        ("model.hidden", "interval(a,b)"),
        ("model.hidden", "glob(*)"),
        ("model.hidden", "uniform(1,5)"),
        ("model.hidden", "range(1,5) trainer.epochs=3"),
        # not of the hyperparameter's type
        ("model.hidden", "interval(16,64)"),
        ("model.hidden", "interval(16.5,64.5)"),
        ("model.hidden", "range(1.0,5.0)"),
        ("model.hidden", "16,many"),
        ("model.hidden", "16,2.5"),
        ("model.hidden", "16,null"),
        ("model.widths", "interval(1,3)"),
        ("model.widths", "[8],16"),
        ("model.widths", "[8],[wide]"),
        ("model.widths", "[[8]],[8]"),
        ("optim.name", "adam,lion"),
        ("model.hidden", "{a:1},{a:2}"),
        ("model.hidden", "${trainer.epochs},2"),
        # no range of two values or more
        ("model.hidden", "int(interval(64,16))"),
        ("model.hidden", "int(interval(64,64))"),
        ("optim.learning_rate", "interval(0.1,0.01)"),
        ("model.hidden", "range(1,2)"),
        ("model.hidden", "range(5,1)"),
        ("model.hidden", "range(5,1,-1)"),
        ("model.hidden", "range(1,5,0)"),
        ("optim.learning_rate", "range(0.1,0.5,0.0)"),
        ("optim.learning_rate", "range(0,1,1e-300)"),
        ("optim.learning_rate", "range(0,inf,1)"),
        ("optim.learning_rate", "range(0,1,nan)"),
        # log
        ("model.hidden", "tag(log,int(interval(0,64)))"),
        ("optim.ema", "tag(log,interval(0,0.9))"),
        ("data.mean", "tag(log,interval(-1,1))"),
        ("model.hidden", "tag(log,range(1,5))"),
        ("model.hidden", "tag(log,choice(1,5))"),
        # other tags
        ("model.hidden", "tag(loguniform,int(interval(1,5)))"),
        ("model.hidden", "tag(log,fast,int(interval(1,5)))"),
        ("model.hidden", "tag(fast,range(1,5))"),
        ("model.hidden", "tag(fast,choice(1,5))"),
        # out of the configuration's limits
        ("model.hidden", "int(interval(-1,64))"),
        ("model.hidden", "8,-8"),
        ("optim.learning_rate", "interval(0.1,20)"),
        ("optim.learning_rate", "interval(0,0.1)"),
        ("optim.learning_rate", "interval(0.1,inf)"),
        ("optim.learning_rate", "interval(nan,0.1)"),
        ("optim.momentum", "interval(0.5,1)"),
        ("data.augment.erase", "range(20,40,10)"),
        ("trainer.epochs", "range(0,3)"),
        ("model.kernel_sizes", "[3],[4]"),
        ("model.pools", "[2],[2,2,2]"),
        ("model.pools", "[2],[8]"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_hyperparameter_and_text(
    config: Config, name: str, text: str
) -> None:
    assert f"{name}={text}" in refusal(config, name, text)


@pytest.mark.parametrize(
    ("name", "near"),
    [("model.hiden", "model.hidden"), ("model.widths.0", "model.widths"), ("std", "data.std")],
)
def test_an_unknown_hyperparameter_is_refused_with_hyperparameters_that_can_be_searched(
    config: Config, name: str, near: str
) -> None:
    message = refusal(config, name, "1,2")
    suggested = message.split("no such key, ")[1]
    assert near in suggested
    for fixed in ("study.", "tracking.", "data.evaluate_on", "data.name"):
        assert fixed not in suggested


def test_fractions_for_a_whole_number_are_refused_with_what_to_write(config: Config) -> None:
    message = refusal(config, "model.hidden", "interval(16,64)")
    assert "is an integer" in message
    assert "int(...)" in message


def test_a_limit_of_the_configuration_is_named(config: Config) -> None:
    message = refusal(config, "optim.learning_rate", "interval(0.1,20)")
    assert "it must be a number > 0 and <= 10." in message


def test_one_bad_hyperparameter_among_good_ones_is_the_one_that_is_named(config: Config) -> None:
    with pytest.raises(UserError) as caught:
        read_space(with_space(config, SPACE | {"data.batch_size": "0,32"}))
    assert "data.batch_size=0,32" in str(caught.value)
