"""What is shipped fits the types and limits; what does not fit is refused in one line."""

from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.config import types as limits
from digitlab.config.compose import compose
from digitlab.config.recorded import (
    config_from_plain,
    config_from_yaml,
    config_to_plain,
    config_to_yaml,
    flat,
    with_values,
)
from digitlab.config.types import Config
from digitlab.networks.convnet import ConvnetConfig
from digitlab.networks.seed import SeedConfig

OPTIONS = sorted((ROOT / "conf").glob("*/*.yaml"))
RECIPES = sorted((ROOT / "experiments").glob("*.yaml"))
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def config() -> Config:
    """The root of all configurations, without a recipe: two convolutions of 16 and 32."""
    return compose("train", ["~experiments"])[0].config


def values_in(path: Path) -> dict[str, Any]:
    """What a YAML file sets by itself, with dotted keys."""
    plain = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(plain, dict)
    plain.pop("defaults", None)
    return flat(plain)


def refusal(config: Config, values: dict[str, Any]) -> str:
    """The message of the UserError that `values` lead to: one line."""
    with pytest.raises(UserError) as caught:
        with_values(config, values)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is shipped ---


def test_the_files_on_disk_are_found() -> None:
    assert {path.parent.name for path in OPTIONS} >= {"data", "model", "optim", "trainer", "study"}
    assert {path.stem for path in RECIPES} >= {"default", "seed", "smoke"}


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_option_composes_to_what_its_file_says(path: Path) -> None:
    group = path.parent.name
    config = compose("train", ["~experiments", f"{group}={path.stem}"])[0].config
    assert isinstance(config, Config)
    section = flat(config_to_plain(config)[group])
    assert {key: section[key] for key in values_in(path)} == values_in(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_composes_to_what_its_file_says(path: Path) -> None:
    config = compose("sweep", [f"experiments={path.stem}"])[0].config
    assert isinstance(config, Config)
    assert type(config.data.evaluate_on) is limits.EvaluateOn
    assert type(config.study.pruner) is limits.Pruner
    whole = flat(config_to_plain(config))
    assert {key: whole[key] for key in values_in(path)} == values_in(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_its_study_after_itself(path: Path) -> None:
    assert values_in(path)["study.name"] == path.stem


def test_the_default_recipe_is_what_is_composed_without_arguments() -> None:
    assert compose("train", [])[0].config == compose("train", ["experiments=default"])[0].config


# --- limits of single fields: (values at the edge that are allowed, values that are not) ---

LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "data.augment.shift": ([0.0, 14.0], [-0.5, 14.5, NAN]),
    "data.augment.rotate": ([0.0, 180.0], [-1.0, 180.5, NAN]),
    "data.augment.scale": ([0.0, 0.99], [-0.1, 1.0, NAN]),
    "data.augment.shear": ([0.0, 60.0], [-0.5, 60.5, NAN]),
    "data.augment.erase": ([0, 28], [-1, 29]),
    "data.augment.stroke": ([0.0, 1.0], [-0.1, 1.1, NAN]),
    "data.validation_images": ([10], [9, 0, -10]),
    "data.split_seed": ([0, 2**31 - 1], [-1]),
    "data.images": ([0, 60000], [-1]),
    "data.batch_size": ([1], [0, -32]),
    "data.mean": ([0.0, 1.0], [NAN, INF]),
    "data.std": ([1e-6, 1.0], [0.0, -1.0, NAN, INF]),
    "optim.learning_rate": ([1e-12, 10.0], [0.0, -0.1, 10.5, NAN]),
    "optim.weight_decay": ([0.0, 1.0], [-0.1, 1.1, NAN]),
    "optim.momentum": ([0.0, 0.999], [-0.1, 1.0, NAN]),
    "optim.beta2": ([0.0, 0.999], [-0.1, 1.0, NAN]),
    "optim.warmup": ([0.001, 0.999], [0.0, 1.0, NAN]),
    "optim.label_smoothing": ([0.0, 0.999], [-0.1, 1.0, NAN]),
    "optim.gradient_clip": ([0.0, 100.0], [-0.1, NAN]),
    "optim.ema": ([0.0, 0.9999], [-0.1, 1.0, NAN]),
    "trainer.epochs": ([1, 1000], [0, -1]),
    "trainer.seed": ([0, 2**31 - 1], [-1, 2**31]),
    "trainer.threads": ([1, 1024], [0, 1025]),
    "study.name": (["a", "A-b_c.9"], ["", "a/b", "a b", ".hidden", "..", "a:b"]),
    "study.trials": ([1], [0, -1]),
    "study.workers": ([0], [-1]),
    "study.minutes": ([0.0], [-1.0, NAN]),
    "study.patience": ([0], [-1]),
    "study.trial_minutes": ([0.0], [-1.0, NAN]),
    "study.retries": ([0], [-1]),
    "study.startup_trials": ([1], [0]),
    "study.seed": ([0, 2**31 - 1], [-1, 2**32]),
    "study.rungs": ([[], [0.5], [0.001, 0.999]], [[0.0], [1.0], [0.5, 0.5], [0.5, 0.2], [NAN]]),
    "study.audit_pruning": ([0], [-1]),
    "study.confirm": ([1], [0]),
    "study.confirm_seeds": ([1], [0]),
    "study.final_seeds": ([1], [0]),
    "launcher.workers": ([0, 10_000], [-1]),
    "launcher.cpus": ([0.1, 1024.0], [0.0, -1.0, 1025.0, NAN]),
    "model.widths": ([[1], [1, 256]], [[], [0], [16, -1]]),
    "model.kernel_sizes": ([[1], [27], [1, 3]], [[], [0], [-3], [2], [3, 4]]),
    "model.strides": ([[1], [7, 1]], [[], [0], [1, -1]]),
    "model.pools": ([[1], [1, 28]], [[], [0], [2, -1]]),
    "model.dropout": ([0.0, 0.99], [-0.1, 1.0, NAN]),
    "model.hidden": ([0, 1], [-1]),
}
ALLOWED = [(key, value) for key, (allowed, _) in LIMITS.items() for value in allowed]
REFUSED = [(key, value) for key, (_, refused) in LIMITS.items() for value in refused]


def test_every_number_of_the_configuration_has_limits_tested_here(config: Config) -> None:
    leaves = flat(config_to_plain(config)).items()
    numbers = {key for key, value in leaves if type(value) in (int, float, list)}
    assert numbers <= set(LIMITS)


@pytest.mark.parametrize(("key", "value"), ALLOWED)
def test_a_value_at_the_edge_is_allowed(config: Config, key: str, value: Any) -> None:
    assert flat(config_to_plain(with_values(config, {key: value})))[key] == value


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_value_out_of_range_is_refused_with_field_value_and_what_is_allowed(
    config: Config, key: str, value: Any
) -> None:
    message = refusal(config, {key: value})
    given, allowed = message.split(": allowed is ")
    assert given == f"{key}={value}"
    assert allowed


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("data.evaluate_on", limits.EvaluateOn),
        ("optim.name", limits.Optimizer),
        ("optim.schedule", limits.Schedule),
        ("study.sampler", limits.Sampler),
        ("study.pruner", limits.Pruner),
        ("tracking.name", limits.Tracker),
        ("launcher.name", limits.Launcher),
    ],
)
def test_an_unknown_word_is_refused_with_all_known_ones(
    config: Config, key: str, kind: type[Enum]
) -> None:
    message = refusal(config, {key: "sometimes"})
    for expected in (key, "sometimes", *(member.value for member in kind)):
        assert expected in message


def test_a_value_with_a_line_break_is_refused_in_one_line(config: Config) -> None:
    assert "study.name=" in refusal(config, {"study.name": "two\nlines"})


def test_a_list_within_a_list_is_refused_by_the_name_of_its_field(config: Config) -> None:
    assert "model.widths" in refusal(config, {"model.widths": [[8], [16]]})


# --- contradictions ---


@pytest.mark.parametrize("field", ["kernel_sizes", "strides", "pools"])
def test_lists_of_different_lengths_are_refused_by_both_names(config: Config, field: str) -> None:
    message = refusal(config, {f"model.{field}": [1, 1, 1]})
    assert f"model.{field}=[1, 1, 1]" in message
    assert "model.widths=[16, 32]" in message


@pytest.mark.parametrize(
    ("pools", "strides"), [([8], [1]), ([29], [1]), ([2], [8]), ([3, 2], [4, 2]), ([2, 15], [1])]
)
def test_pools_and_strides_that_leave_no_pixel_are_refused_by_both_names(
    config: Config, pools: list[int], strides: list[int]
) -> None:
    message = refusal(config, {"model.pools": pools, "model.strides": strides})
    assert f"model.pools={pools}" in message
    assert f"model.strides={strides}" in message


@pytest.mark.parametrize("pruner", [p.value for p in limits.Pruner if p is not limits.Pruner.none])
def test_a_pruner_without_rungs_is_refused_by_both_names(config: Config, pruner: str) -> None:
    message = refusal(config, {"study.pruner": pruner, "study.rungs": []})
    assert f"study.pruner={pruner}" in message
    assert "study.rungs=[]" in message


def test_values_of_another_network_are_refused_by_both_names(config: Config) -> None:
    message = refusal(config, {"model.name": "seed"})
    assert "model.name=seed" in message
    assert "model.widths" in message


# --- there and back ---


def fractions(low: float, high: float, **ends: bool) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **ends)


# A stored configuration holds neither interpolations nor OmegaConf's mark of a missing value;
# control characters such as U+0085 are what YAML folds.
WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12).filter(
    lambda word: "${" not in word and word != "???"
)
NAMES = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,11}", fullmatch=True)
COUNTS = st.integers(1, 10_000)


@st.composite
def convnets(draw: st.DrawFn) -> ConvnetConfig:
    n = draw(st.integers(1, 4))

    def each(values: st.SearchStrategy[int]) -> list[int]:
        return draw(
            st.lists(values, min_size=n, max_size=n) | st.lists(values, min_size=1, max_size=1)
        )

    # the side stays above 0: at most four halvings of 28
    halvings = [(1, 1), (2, 1), (1, 2)]
    steps = draw(st.lists(st.sampled_from(halvings), min_size=n, max_size=n))
    return ConvnetConfig(
        name="convnet",
        widths=draw(st.lists(COUNTS, min_size=n, max_size=n)),
        kernel_sizes=each(st.sampled_from([1, 3, 5, 7])),
        strides=[stride for stride, _ in steps],
        pools=[pool for _, pool in steps],
        batch_norm=draw(st.booleans()),
        dropout=draw(fractions(0, 1, exclude_max=True)),
        hidden=draw(st.integers(0, 10_000)),
    )


@st.composite
def studies(draw: st.DrawFn) -> limits.StudyConfig:
    rungs = sorted(draw(st.sets(fractions(0, 1, exclude_min=True, exclude_max=True), max_size=4)))
    return limits.StudyConfig(
        name=draw(NAMES),
        storage=draw(st.none() | WORDS),
        space=draw(st.dictionaries(NAMES, WORDS, max_size=3)),
        fork_from=draw(st.none() | NAMES),
        trials=draw(COUNTS),
        workers=draw(st.integers(0, 64)),
        minutes=draw(fractions(0, 1e6)),
        patience=draw(st.integers(0, 100)),
        trial_minutes=draw(fractions(0, 1e6)),
        retries=draw(st.integers(0, 9)),
        count_failed=draw(st.booleans()),
        sampler=draw(st.sampled_from(limits.Sampler)),
        startup_trials=draw(COUNTS),
        seed=draw(st.integers(0, 2**31)),
        pruner=draw(st.sampled_from(limits.Pruner)) if rungs else limits.Pruner.none,
        rungs=rungs,
        audit_pruning=draw(st.integers(0, 9)),
        confirm=draw(COUNTS),
        confirm_seeds=draw(COUNTS),
        final_seeds=draw(COUNTS),
    )


CONFIGS = st.builds(
    Config,
    data=st.builds(
        limits.DataConfig,
        name=WORDS,
        evaluate_on=st.sampled_from(limits.EvaluateOn),
        validation_images=st.integers(10, 60_000),
        split_seed=st.integers(0, 2**31 - 1),
        images=st.integers(0, 60000),
        batch_size=COUNTS,
        mean=fractions(0, 1),
        std=fractions(0, 1, exclude_min=True),
        augment=st.builds(
            limits.AugmentConfig,
            shift=fractions(0, 14),
            rotate=fractions(0, 180),
            scale=fractions(0, 1, exclude_max=True),
            shear=fractions(0, 60),
            erase=st.integers(0, 28),
            stroke=fractions(0, 1),
        ),
        allow_unknown=st.booleans(),
    ),
    model=convnets() | st.just(SeedConfig(name="seed")),
    optim=st.builds(
        limits.OptimConfig,
        name=st.sampled_from(limits.Optimizer),
        learning_rate=fractions(0, 10, exclude_min=True),
        weight_decay=fractions(0, 1),
        momentum=fractions(0, 1, exclude_max=True),
        beta2=fractions(0, 1, exclude_max=True),
        schedule=st.sampled_from(limits.Schedule),
        warmup=fractions(0, 1, exclude_min=True, exclude_max=True),
        label_smoothing=fractions(0, 1, exclude_max=True),
        gradient_clip=fractions(0, 1e6),
        ema=fractions(0, 1, exclude_max=True),
    ),
    trainer=st.builds(
        limits.TrainerConfig,
        epochs=COUNTS,
        seed=st.integers(0, 2**31 - 1),
        threads=st.integers(1, 1024),
    ),
    study=studies(),
    tracking=st.builds(
        limits.TrackingConfig,
        name=st.sampled_from(limits.Tracker),
        uri=st.none() | WORDS,
        experiment=WORDS,
    ),
    launcher=st.builds(
        limits.LauncherConfig,
        name=st.sampled_from(limits.Launcher),
        address=WORDS,
        workers=st.integers(0, 10_000),
        cpus=fractions(0, 1024, exclude_min=True),
    ),
)


@settings(deadline=None, max_examples=25)
@given(CONFIGS)
def test_a_configuration_comes_back_from_yaml_as_it_was(config: Config) -> None:
    text = config_to_yaml(config)
    back = config_from_yaml(text)
    assert back == config
    assert config_to_yaml(back) == text


@settings(deadline=None, max_examples=10)
@given(CONFIGS)
def test_plain_values_hold_no_types_of_ours_and_come_back(config: Config) -> None:
    plain = config_to_plain(config)
    plain_types = {type(value) for value in flat(plain).values()}
    assert plain_types <= {str, int, float, bool, list, dict, type(None)}
    assert config_from_plain(plain) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_value_anywhere_is_taken_or_refused_in_one_line(config: Config, data: Any) -> None:
    key = data.draw(st.sampled_from(sorted(flat(config_to_plain(config)))))
    value = data.draw(JSON)
    message = ""
    try:
        assert isinstance(with_values(config, {key: value}), Config)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
