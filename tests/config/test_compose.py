"""The edge: what Hydra composes becomes typed objects, or one line that says what is wrong."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
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
from digitlab.networks.seed import SeedConfig

RECIPES = {path.stem for path in (ROOT / "experiments").glob("*.yaml")}


def refusal(command: str, *arguments: str) -> str:
    """The message of the UserError that the arguments lead to: one line."""
    with pytest.raises(UserError) as caught:
        compose(command, arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def stored_refusal(plain: dict[str, Any]) -> str:
    """The message of the UserError that a stored configuration leads to: one line."""
    with pytest.raises(UserError) as caught:
        config_from_plain(plain)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def smoke() -> Config:
    return compose("sweep", ["experiments=smoke"])[0].config


@pytest.fixture
def stored(smoke: Config) -> dict[str, Any]:
    """What a run's record holds."""
    return config_to_plain(smoke)


# --- overrides ---


def test_overrides_are_kept_as_they_were_given() -> None:
    (composed,) = compose("train", ["experiments=smoke", "trainer.seed=3", "optim.ema=0.5"])
    assert composed.overrides == ("experiments=smoke", "trainer.seed=3", "optim.ema=0.5")
    assert (composed.config.trainer.seed, composed.config.optim.ema) == (3, 0.5)


def test_an_override_wins_over_the_recipe() -> None:
    (composed,) = compose("train", ["model.widths=[4,5]", "experiments=smoke"])
    assert composed.config.model.widths == [4, 5]


def test_a_recipe_may_replace_a_whole_group() -> None:
    (composed,) = compose("train", ["experiments=seed"])
    assert composed.config.model == SeedConfig(name="seed")
    assert composed.config.optim.name == "adam"


def test_an_interpolation_on_the_command_line_is_resolved_before_it_is_kept() -> None:
    (composed,) = compose("train", ["trainer.seed=7", "trainer.epochs=${trainer.seed}"])
    assert composed.config.trainer.epochs == 7
    assert "${" not in config_to_yaml(composed.config)


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("model.hiden=3", "model.hiden", "model.hidden"),
        ("modle.hidden=3", "modle.hidden", "model.hidden"),
        ("epochs=3", "epochs", "trainer.epochs"),
        ("optim._target_=os.system", "optim._target_", "optim."),
    ],
)
def test_an_unknown_key_is_refused_with_its_nearest_matches(
    override: str, key: str, near: str
) -> None:
    message = refusal("train", override)
    assert message.startswith(f"{key}: no such key")
    suggested = message.split("did you mean ")[1]
    assert near in suggested
    assert "study.space." not in suggested  # the recipe's ranges are no keys to set


def test_a_wrong_type_on_the_command_line_is_refused_with_field_and_value() -> None:
    message = refusal("train", "trainer.epochs=1.5")
    assert "trainer.epochs" in message
    assert "1.5" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.hidden", "abc"),
        ("model.hidden", 1.5),
        ("model.hidden", True),
        ("model.hidden", None),
        ("model.widths", 3),
        ("model.widths", [8, "wide"]),
        ("model.widths", {"first": 8}),
        ("optim.learning_rate", "fast"),
        ("data.evaluate_on", "tset"),
        ("data.allow_unknown", "maybe"),
        ("data.augment", 3),
        ("study.rungs", 0.5),
    ],
)
def test_a_wrong_type_is_refused_with_field_and_value(
    stored: dict[str, Any], field: str, value: Any
) -> None:
    section, key = field.split(".")
    stored[section][key] = value
    message = stored_refusal(stored)
    assert field in message
    assert str(value[-1] if isinstance(value, list) else value) in message


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("+new.key=3", "new"),
        ("+model.depth=3", "model.depth"),
        ("+model._target_=os.system", "model._target_"),
    ],
)
def test_an_added_key_is_refused(override: str, name: str) -> None:
    assert name in refusal("train", override)


def test_an_unknown_recipe_is_refused_with_all_recipes() -> None:
    message = refusal("sweep", "experiments=smoky")
    assert "experiments/smoky" in message
    for recipe in RECIPES:
        assert recipe in message


def test_an_unknown_model_is_refused_with_all_models() -> None:
    message = refusal("train", "model=resnet")
    assert "model/resnet" in message
    assert "convnet, seed" in message
    assert refusal("train", "model.name=convnt") == (
        "model.name=convnt: no such network, did you mean convnet?"
    )


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("sweep", "trainer.epochs=["),
        ("train", "trainer.epochs"),
        ("sweep", "model.hidden=interval(1,"),
        ("train", "trainer.epochs=1\n2"),
        ("train", "=3"),
        ("sweep", "=1,2"),
        ("train", "model=3"),
        ("train", "experiments=null"),
        ("sweep", "study.space=3"),
        ("train", "study.space=null"),
        ("sweep", "~study.space"),
        ("train", "~trainer.epochs"),
        ("train", "trainer.seed=???"),
    ],
)
def test_what_cannot_be_composed_is_refused(command: str, override: str) -> None:
    assert refusal(command, override)


def test_a_training_of_several_values_needs_multirun() -> None:
    message = refusal("train", "trainer.seed=1,2")
    assert "trainer.seed=1,2" in message
    assert "--multirun" in message


def test_the_arguments_of_the_process_stay_as_they_were() -> None:
    before = list(sys.argv)
    compose("train", ["experiments=smoke"])
    refusal("train", "trainer.epochs=0")
    assert sys.argv == before


# --- Hydra's flags ---


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cfg", "job", "experiments=smoke", "trainer.seed=5"],
        ["experiments=smoke", "trainer.seed=5", "--cfg", "job"],
        ["~data.augment.erase", "--cfg", "job", "experiments=smoke", "trainer.seed=5"],
    ],
)
def test_cfg_job_prints_the_configuration_and_gives_no_jobs(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compose("train", arguments) == []
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.study.name == "smoke"
    assert printed.trainer.seed == 5


def test_cfg_job_of_a_sweep_shows_the_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert compose("sweep", ["--cfg", "job", "model.hidden=16,32"]) == []
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.study.space["model.hidden"] == "16,32"


def test_help_ends_well_and_lists_the_recipes_own_keys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        compose("train", ["--help"])
    assert not caught.value.code
    assert "learning_rate" in capsys.readouterr().out


def test_multirun_gives_a_configuration_for_each_combination_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = compose("train", ["--multirun", "trainer.seed=1,2", "trainer.epochs=range(3,4)"])
    assert [(job.config.trainer.seed, job.config.trainer.epochs) for job in jobs] == [
        (1, 3),
        (2, 3),
    ]
    assert jobs[1].overrides == ("trainer.seed=2", "trainer.epochs=3")
    assert list(tmp_path.iterdir()) == []


def test_composing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose("train", [])
    assert list(tmp_path.iterdir()) == []


# --- the search space of a sweep ---


def space(*arguments: str) -> dict[str, str]:
    (composed,) = compose("sweep", arguments)
    return composed.config.study.space


def test_a_recipe_brings_its_space(smoke: Config) -> None:
    assert smoke.study.space == {
        "model.hidden": "tag(log,int(interval(16,64)))",
        "optim.learning_rate": "tag(log,interval(0.003,0.03))",
    }


def test_a_range_on_the_command_line_wins_over_the_recipe_and_adds_to_it(smoke: Config) -> None:
    found = space("experiments=smoke", "model.hidden=16,32", "optim.ema=interval(0.5,0.9)")
    changed = {"model.hidden": "16,32", "optim.ema": "interval(0.5,0.9)"}
    assert found == smoke.study.space | changed


def test_a_range_on_the_command_line_leaves_the_fixed_value_alone(smoke: Config) -> None:
    (composed,) = compose("sweep", ["experiments=smoke", "model.hidden=16,32"])
    assert composed.config.model.hidden == smoke.model.hidden


@pytest.mark.parametrize("override", ["model.hidden=32", "++model.hidden=32"])
def test_a_plain_override_of_a_searched_key_takes_it_out_of_the_space(override: str) -> None:
    (composed,) = compose("sweep", ["experiments=smoke", override])
    assert composed.config.model.hidden == 32
    assert composed.config.study.space == {"optim.learning_rate": "tag(log,interval(0.003,0.03))"}


def test_train_keeps_the_space_of_its_recipe_in_the_record(smoke: Config) -> None:
    (composed,) = compose("train", ["experiments=smoke", "model.hidden=32"])
    assert composed.config.study.space == smoke.study.space


def test_a_range_reaches_the_space_letter_by_letter() -> None:
    texts = {
        "model.hidden": "tag(log,int(interval(32,512)))",
        "model.dropout": "tag(log, interval(0.1, 0.5))",
        "model.widths": "choice([8,16],[16,32])",
        "model.pools": "[2,2],[1,2]",
        "trainer.epochs": "range(1,9,2)",
        "optim.name": "choice('adam',\"sgd\")",
        "data.name": "choice('it\\'s','b')",
        "data.evaluate_on": r"choice(a\,b,c)",
        "optim.schedule": r"choice(a\\b,c)",
        "study.name": r"choice('a\\','b')",
        "model.batch_norm": "true,false",
    }
    assert space("~experiments", *(f"{knob}={text}" for knob, text in texts.items())) == texts


# --- stored configurations ---


@pytest.mark.parametrize("value", ["${trainer.epochs}", "${oc.env:HOME}", "a${b}c", r"\${b}"])
@pytest.mark.parametrize("key", ["trainer.seed", "tracking.uri", "study.rungs"])
def test_an_interpolation_in_a_stored_configuration_is_refused(
    stored: dict[str, Any], key: str, value: str
) -> None:
    section, field = key.split(".")
    stored[section][field] = [value] if field == "rungs" else value
    message = stored_refusal(stored)
    assert key in message
    assert value in message.replace("\\\\", "\\")
    assert "interpolation" in message


@pytest.mark.parametrize("path", [(), ("model",), ("optim",), ("data", "augment")])
def test_a_target_in_a_stored_configuration_is_refused(
    stored: dict[str, Any], path: tuple[str, ...]
) -> None:
    node = stored
    for name in path:
        node = node[name]
    node["_target_"] = "os.abort"
    assert "_target_" in stored_refusal(stored)


def test_an_unknown_model_in_a_stored_configuration_is_refused(stored: dict[str, Any]) -> None:
    stored["model"]["name"] = "os.abort"
    assert stored_refusal(stored) == (
        "model.name=os.abort: no such network, known are convnet, seed"
    )


@pytest.mark.parametrize("model", [None, 3, [], "convnet", {}])
def test_a_model_that_is_no_mapping_is_refused(stored: dict[str, Any], model: Any) -> None:
    stored["model"] = model
    assert "model" in stored_refusal(stored)


def test_a_stored_configuration_that_lacks_a_key_is_refused(stored: dict[str, Any]) -> None:
    del stored["optim"]["warmup"]
    assert "optim.warmup" in stored_refusal(stored)


def test_a_stored_configuration_with_a_key_too_many_is_refused(stored: dict[str, Any]) -> None:
    stored["optim"]["warm_up"] = 0.1
    assert "optim.warm_up" in stored_refusal(stored)


YAML_RUBBISH = [
    "",
    "null",
    "3",
    "text",
    "[1, 2]",
    "- a\n- b",
    "a: b: c",
    "{",
    "model: [",
    "\t",
    "\x00",
    "1: 2",
    "? [1, 2]\n: 3",
    "model: {name: convnet}",
    "model: {name: convnet}\nmodel: {name: seed}",
    "!!python/object/apply:os.abort []",
    "model: !!python/name:os.abort ''",
    "&a [*a]",
    "a: &a [*a]",
    "&a {b: *a}",
    "%YAML 9.9\n---\n",
]


@pytest.mark.parametrize("text", YAML_RUBBISH)
def test_yaml_rubbish_is_refused_in_a_line_that_can_be_read(text: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_yaml(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert message.removeprefix("not a configuration:").strip()  # says why


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=40))
@example("a: 1_0\nb: 0x")
def test_any_text_is_refused_or_read_as_a_configuration(text: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_yaml(text)
    assert "\n" not in str(caught.value)


# --- values at dotted keys ---


def test_values_are_replaced_in_a_copy(smoke: Config) -> None:
    before = config_to_plain(smoke)
    changed = with_values(smoke, {"model.widths": [4, 4], "data.augment.shift": 2})
    assert (changed.model.widths, changed.data.augment.shift) == ([4, 4], 2.0)
    assert config_to_plain(smoke) == before
    assert with_values(changed, {k: flat(before)[k] for k in ("model.widths",)}) != changed


@pytest.mark.parametrize(
    "key", ["model.hiden", "hidden", "model.widths.0", "model.name.x", "new.key", ""]
)
def test_a_value_at_a_key_that_is_not_there_is_refused(smoke: Config, key: str) -> None:
    with pytest.raises(UserError, match="no such key") as caught:
        with_values(smoke, {key: 3})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{key}: ")


def test_nested_keys_become_dotted_and_lists_stay_values() -> None:
    plain = {"a": {"b": [1, 2], "c": {"d": None}}, "e": {}, "f": {"g.h": 1}}
    assert flat(plain) == {"a.b": [1, 2], "a.c.d": None, "e": {}, "f.g.h": 1}
