"""What is shipped fits the types and limits; what does not fit is refused in one line."""

import json
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from digitlab.base.errors import UserError, visible
from digitlab.base.paths import ROOT
from digitlab.config import types as limits
from digitlab.config.compose import compose
from digitlab.config.recorded import (
    config_to_plain,
    flat,
    with_values,
)
from digitlab.config.schema import json_schema, rule, settings
from digitlab.config.types import Config

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
    "data.split_seed": ([0, 2**31 - 1], [-1, 2**31]),
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
    "study.name": (
        ["a", "A-b_c.9", "prüfung", "_", "n" * 100],
        ["", "-", "-x", "champion", "a/b", "a b", ".hidden", "..", "a:b", "ab\x00", "字" * 100],
    ),
    "study.trials": ([1], [0, -1]),
    "study.workers": ([0], [-1]),
    "study.minutes": ([0.0], [-1.0, NAN, INF]),
    "study.patience": ([0], [-1]),
    "study.trial_minutes": ([0.0], [-1.0, NAN]),
    "study.retries": ([0], [-1]),
    "study.startup_trials": ([1], [0]),
    "study.seed": ([0, 2**32 - 1], [-1, 2**32]),
    "study.rungs": (
        [[], [0.5], [0.001, 0.999]],
        [[0.0], [1.0], [0.5, 0.5], [0.5, 0.2], [0.101, 0.104], [NAN]],
    ),
    "study.finish": ([1, 1000], [0, -1]),
    "study.audit_pruning": ([0], [-1]),
    "study.confirm": ([1], [0]),
    "study.confirm_fits": ([0, 1000], [-1, 1001]),
    "study.measure_seeds": ([0, 1000], [-1, 1001]),
    "trainer.early_stopping": ([0, 3], [-1]),
    "trainer.checkpoint_minutes": ([0, 0.5, 60], [-1]),
    "study.margin": ([0.0, 0.5], [-0.1, 1.0, NAN]),
    "study.begin_with": ([[], [{"model.hidden": 8}]], [[1], 1]),
    "study.objectives": (
        [["val_accuracy"], ["val_accuracy", "training_flops"]],
        [[], ["seconds"], ["val_accuracy"] * 2, ["model_parameters", "training_flops"]],
    ),
    "study.require.model_parameters": ([None, 1], [0, 1.5]),
    "study.require.training_flops": ([None, 0.1], [0, NAN]),
    "study.final_seeds": ([1, 1000], [0, 1001]),
    "launcher.workers": ([0, 10_000], [-1]),
    "launcher.gpus": ([0, 0.25, 1.0], [-0.1, 1.1, NAN]),
    "launcher.cpus": ([0.1, 1024.0], [0.0, -1.0, 1025.0, NAN]),
    "model.widths": ([[1], [1, 256], [2**16]], [[], [0], [16, -1], [2**16 + 1]]),
    "model.kernel_sizes": ([[1], [27], [1, 3]], [[], [0], [-3], [2], [3, 4]]),
    "model.strides": ([[1], [7, 1]], [[], [0], [1, -1]]),
    "model.pools": ([[1], [1, 28]], [[], [0], [2, -1]]),
    "model.dropout": ([0.0, 0.99], [-0.1, 1.0, NAN]),
    "model.hidden": ([0, 1, 2**16], [-1, 2**16 + 1]),
}
ALLOWED = [(key, value) for key, (allowed, _) in LIMITS.items() for value in allowed]
REFUSED = [(key, value) for key, (_, refused) in LIMITS.items() for value in refused]


def test_every_number_of_the_configuration_has_limits_tested_here(config: Config) -> None:
    leaves = flat(config_to_plain(config)).items()
    numbers = {key for key, value in leaves if type(value) in (int, float, list)}
    assert numbers <= set(LIMITS)


@pytest.mark.parametrize(("key", "value"), ALLOWED)
def test_a_value_at_the_edge_is_allowed(config: Config, key: str, value: Any) -> None:
    config = with_values(config, {"model.batch_norm": key != "data.batch_size"})
    assert flat(config_to_plain(with_values(config, {key: value})))[key] == value


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_value_out_of_range_is_refused_with_field_value_and_what_is_allowed(
    config: Config, key: str, value: Any
) -> None:
    message = refusal(config, {key: value})
    given, rule = message.split(" is invalid: it must be ")
    assert given == visible(f"{key}={value}")
    assert rule.endswith(".")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("data.evaluate_on", limits.EvaluateOn),
        ("optim.name", limits.Optimizer),
        ("optim.schedule", limits.Schedule),
        ("study.sampler", limits.Sampler),
        ("study.pruner", limits.Pruner),
        ("tracking.name", limits.TrackerName),
        ("launcher.name", limits.Launcher),
    ],
)
def test_an_unknown_word_is_refused_with_all_known_ones(
    config: Config, key: str, kind: type[Enum]
) -> None:
    message = refusal(config, {key: "sometimes"})
    for expected in (key, "sometimes", *(member.value for member in kind)):
        assert expected in message


@pytest.mark.parametrize("name", ["", " ", "a\x9b2J", "a\nb"])
def test_an_experiment_s_name_can_be_read_and_typed(config: Config, name: str) -> None:
    with pytest.raises(UserError, match=r"^tracking\.experiment=.* is invalid: it must be a name"):
        with_values(config, {"tracking.experiment": name})
    assert with_values(config, {"tracking.experiment": "my own"}).tracking.experiment == "my own"


@pytest.mark.parametrize("study", ["a" * 96, "a" * 100, "ü" * 98, "漢" * 66, "é" * 96])
def test_a_name_derived_from_any_allowed_one_is_allowed(config: Config, study: str) -> None:
    for ending in ("-best", "-replay", "-replay12"):
        name = limits.derived_name(study, ending)
        assert name.endswith(ending)
        assert with_values(config, {"study.name": name}).study.name == name
        assert limits.derived_name(f"{study[:-1]}b", ending) != name
    assert limits.derived_name("smoke", "-best") == "smoke-best"


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


def test_fits_too_few_for_all_candidates_are_refused_by_both_names(config: Config) -> None:
    message = refusal(config, {"study.confirm": 4, "study.confirm_fits": 3})
    assert message.startswith("study.confirm_fits=3 with study.confirm=4 is invalid: ")
    for fits in (0, 4):
        with_values(config, {"study.confirm": 4, "study.confirm_fits": fits})


SCREENING = {
    "study.pruner": "screening",
    "study.rungs": [0.1],
    "study.trials": 40,
    "study.finish": 39,
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"study.rungs": [0.1, 0.3]}, "study.pruner=screening with study.rungs=[0.1, 0.3]"),
        ({"study.finish": 40}, "study.finish=40 with study.trials=40"),
        ({"study.sampler": "grid"}, "study.pruner=screening with study.sampler=grid"),
        ({"study.patience": 5}, "study.patience=5 with study.pruner=screening"),
    ],
)
def test_what_contradicts_screening_is_refused_by_both_names(
    config: Config, given: dict[str, Any], expected: str
) -> None:
    assert with_values(config, SCREENING).study.finish == 39
    assert refusal(config, SCREENING | given).startswith(f"{expected} is invalid: ")
    with_values(config, SCREENING | given | {"study.pruner": "median"})


def test_values_of_another_network_are_refused_by_both_names(config: Config) -> None:
    message = refusal(config, {"model.name": "seed"})
    assert "model.name=seed" in message
    assert "model.widths" in message


@pytest.mark.parametrize("key", ["data.batch_size", "data.images"])
def test_a_batch_of_one_with_batch_norm_is_refused_by_both_names(config: Config, key: str) -> None:
    message = refusal(config, {key: 1})
    assert f"{key}=1" in message
    assert "model.batch_norm=true" in message
    for model in ({"model.batch_norm": False}, {"model": {"name": "seed"}}):
        assert with_values(config, model | {key: 1})


def test_a_grid_takes_over_no_trials(config: Config) -> None:
    message = refusal(config, {"study.fork_from": "other", "study.sampler": "grid"})
    assert "study.fork_from=other with study.sampler=grid" in message


def test_a_study_takes_over_trials_of_another_one_only(config: Config) -> None:
    message = refusal(config, {"study.name": "a", "study.fork_from": "a"})
    assert "study.name=a" in message
    assert "study.fork_from=a" in message


SMALLEST = {"study.objectives": ["model_parameters"], "study.require.val_accuracy": 0.99}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"study.require.val_accuracy": None}, "without a least accuracy"),
        ({"study.objectives": ["val_accuracy"]}, "study.require.val_accuracy=0.99"),
        ({"study.pruner": "median", "study.rungs": [0.5]}, "study.pruner=median with"),
        (
            {
                "study.objectives": ["val_accuracy"],
                "study.require.val_accuracy": None,
                "study.require.model_parameters": 9,
                "study.pruner": "median",
                "study.rungs": [0.5],
            },
            "study.pruner=median with study.require.model_parameters",
        ),
        ({"study.require.val_accuracy": 1.1}, "study.require.val_accuracy=1.1"),
        ({"study.require.val_accuracy": 0.0}, "study.require.val_accuracy=0.0"),
    ],
)
def test_objectives_that_contradict_other_settings_are_refused(
    config: Config, given: dict[str, Any], named: str
) -> None:
    assert with_values(config, SMALLEST).study.require.val_accuracy == 0.99
    assert named in refusal(config, SMALLEST | given)


@pytest.mark.parametrize("password", ["postgresql://u:secret@h/d", "http://h/?password=secret"])
@pytest.mark.parametrize("key", ["study.storage", "tracking.uri"])
def test_a_password_is_refused_and_not_shown(config: Config, key: str, password: str) -> None:
    message = refusal(config, {key: password})
    assert message.startswith(key)
    assert "secret" not in message


def test_a_name_that_is_too_long_is_refused_with_the_limit(config: Config) -> None:
    message = refusal(config, {"study.name": "n" * 300})
    assert "1 to 100 letters" in message
    assert len(message) < 300


# --- descriptions of the settings ---


def test_every_setting_has_a_description_and_a_rule(config: Config) -> None:
    for key, schema in settings().items():
        assert schema["description"].endswith("."), key
        assert rule(schema)
    assert set(settings()) >= set(flat(config_to_plain(config)))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("trainer.epochs", 0, "trainer.epochs=0 is invalid: it must be an integer >= 1."),
        ("trainer.epochs", True, "trainer.epochs=true is invalid: it must be an integer >= 1."),
        ("trainer.epochs", 1.0, "trainer.epochs=1.0 is invalid: it must be an integer >= 1."),
        ("data.std", INF, "data.std=inf is invalid: it must be a finite number > 0."),
        ("optim.name", "lion", "optim.name=lion is invalid: it must be one of adamw, adam, sgd."),
        ("data.augment", 3, "data.augment=3 is invalid: it must be a group of settings."),
        ("data.name", 3, "data.name=3 is invalid: it must be text."),
        ("tracking.uri", 3, "tracking.uri=3 is invalid: it must be text or null."),
        (
            "model.widths",
            [8, 0],
            "model.widths=[8, 0] is invalid: it must be a list of one or more values, each an "
            "integer >= 1 and <= 65536.",
        ),
    ],
)
def test_a_message_gives_value_and_rule(
    config: Config, key: str, value: Any, expected: str
) -> None:
    assert refusal(config, {key: value}) == expected


def test_the_json_schema_knows_limits_and_networks() -> None:
    schema = json_schema()
    known = {"convnet", "seed", "shared"}
    assert set(schema["properties"]["model"]["discriminator"]["mapping"]) == known
    assert schema["$defs"]["TrainerConfig"]["properties"]["epochs"]["minimum"] == 1
    json.dumps(schema)


def test_types_and_records_are_read_without_torch_and_hydra() -> None:
    code = "import sys, digitlab.config.recorded; print({'torch', 'hydra'} & set(sys.modules))"
    place = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=place, capture_output=True, check=True)
    assert done.stdout.strip() == b"set()"
