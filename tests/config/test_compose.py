"""The edge: what Hydra composes becomes typed objects, or one line that says what is wrong."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.config import compose as composing
from digitlab.config.compose import compose, composed_text, override_values, store_words
from digitlab.config.recorded import config_to_plain, config_to_yaml, flat
from digitlab.config.types import Config
from digitlab.networks.settings import ArticleConfig

RECIPES = {path.stem for path in (ROOT / "experiments").glob("*.yaml")}


def refusal(command: str, *arguments: str) -> str:
    """The message of the UserError that the arguments lead to: one line."""
    with pytest.raises(UserError) as caught:
        compose(command, arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def smoke() -> Config:
    return compose("sweep", ["experiments=smoke"])[0].config


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
    assert composed.config.model == ArticleConfig(name="seed")
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
        ("hidden=3", "hidden", "model.hidden"),
        ("modle=seed", "modle", "model?"),
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


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ("optim.lr=0.1", "optim.learning_rate"),
        ("trainer.lr=0.1", "optim.learning_rate"),
        ("lr=0.1", "optim.learning_rate"),
        ("optim.wd=0.1", "optim.weight_decay"),
        ("bs=64", "data.batch_size"),
        ("trainer.batch=64", "data.batch_size"),
        ("model.filters=[4]", "model.widths"),
        ("model.channels=[4]", "model.widths"),
        ("device=cuda", "trainer.device"),
        ("trainer.gpus=1", "trainer.device"),
        ("trainer.max_epochs=3", "trainer.epochs"),
        ("model.seed=1", "trainer.seed"),
        ("trainer.learning_rate=0.1", "optim.learning_rate"),
        ("epoch=3", "trainer.epochs"),
    ],
)
def test_a_usual_name_is_answered_with_the_setting_that_it_stands_for(
    override: str, setting: str
) -> None:
    key = override.partition("=")[0]
    message = refusal("train", override)
    assert message == f"{key}: no such key in the configuration, did you mean {setting}?"


@pytest.mark.parametrize("override", ["model.zzzzqq=3", "zzzzqq=3"])
def test_a_key_that_is_near_no_setting_is_answered_with_the_list_of_all(override: str) -> None:
    key = override.partition("=")[0]
    listed = "`digitlab config` lists all settings."
    assert refusal("train", override) == f"{key}: no such key in the configuration, {listed}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["experiments=seed", "model.widths=[64]"],
            "model.widths: the network seed has no such setting; convnet, narrow, strided have it: "
            "add model=convnet.",
        ),
        (
            ["experiments=seed", "model.filters=[64]"],
            "model.filters: the network seed has no model.widths; convnet, narrow, strided have "
            "it: add model=convnet.",
        ),
        (
            ["model=shared", "hidden=64"],
            "hidden: the network shared has no model.hidden; convnet, narrow, strided have it: "
            "add model=convnet.",
        ),
        (
            ["model.separable=true"],
            "model.separable: the network convnet has no such setting; shared has it: "
            "add model=shared.",
        ),
    ],
)
def test_a_setting_of_another_option_is_refused_with_the_options_that_have_it(
    given: list[str], message: str
) -> None:
    assert refusal("train", *given) == message


def test_the_option_that_is_advised_has_the_setting() -> None:
    words = ["experiments=seed", "model.widths=[64]", "model=convnet"]
    assert compose("train", words)[0].config.model == compose("train", words[1:])[0].config.model


def test_a_setting_of_an_option_of_one_s_own_is_found(own: Path) -> None:
    (own / "optim").mkdir()
    (own / "optim/lion.yaml").write_text("defaults:\n  - adamw\n\nsharpness: 2\n")
    message = refusal("train", f"--config-dir={own}", "optim.sharpness=3")
    assert message == (
        "optim.sharpness: the optimizer adamw has no such setting; lion has it: add optim=lion."
    )


def test_a_wrong_type_on_the_command_line_is_refused_with_field_and_value() -> None:
    message = refusal("train", "trainer.epochs=1.5")
    assert "trainer.epochs" in message
    assert "1.5" in message


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
    assert message.startswith("experiments=smoky is invalid: it must be one of ")
    for recipe in RECIPES:
        assert recipe in message


def test_an_unknown_model_is_refused_with_all_models() -> None:
    message = refusal("train", "model=resnet")
    known = "convnet, narrow, seed, shared, strided"
    assert message == f"model=resnet is invalid: it must be one of {known}."
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


# --- names, text, several at once ---


@pytest.mark.parametrize(
    "overrides",
    [["experiments=smoke", "trainer.seed=5"], ["~data.augment.erase", "trainer.seed=5"]],
)
def test_the_text_of_a_configuration_need_not_be_valid(overrides: list[str]) -> None:
    assert OmegaConf.create(composed_text("train", overrides)).trainer.seed == 5


def test_the_text_of_a_sweep_shows_the_space() -> None:
    printed = OmegaConf.create(composed_text("sweep", ["model.hidden=16,32"]))
    assert printed.study.space["model.hidden"] == "16,32"


def test_a_name_is_of_the_run_and_no_setting() -> None:
    [job] = compose("train", ["experiments=smoke", "name=wide & deep=2", "trainer.seed=5"])
    assert (job.name, job.overrides) == ("wide & deep=2", ("experiments=smoke", "trainer.seed=5"))
    assert compose("train", [])[0].name is None
    assert "study.name=mine" in refusal("sweep", "name=mine")
    assert compose("train", ["name=zwölf Ziffern"])[0].name == "zwölf Ziffern"
    marks = (" ", "  ", "a\x9b2J", "\x85", "a\u2028b", "\u202eb", "a\udc9b")
    for name in ("", "smoke/7", "champion", "x" * 101, *marks):
        assert re.match("name=.* is invalid: it must be 1 to", refusal("train", f"name={name}"))


def test_where_things_are_recorded_is_said_only_where_it_is_not_the_lab() -> None:
    assert store_words(compose("train", ["experiments=smoke"])[0].config) == []
    address = "study.storage=postgresql+psycopg://me@host/db"
    words = ["tracking.uri=http://host:5000", "tracking.experiment=mine", address]
    config = compose("sweep", [*words, "model.hidden=8,16"])[0].config
    assert store_words(config) == words
    assert store_words(compose("train", store_words(config))[0].config) == words


def test_multirun_gives_a_configuration_for_each_combination_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = compose("train", ["trainer.seed=1,2", "trainer.epochs=range(3,4)"], multirun=True)
    assert [(job.config.trainer.seed, job.config.trainer.epochs) for job in jobs] == [
        (1, 3),
        (2, 3),
    ]
    assert jobs[1].overrides == ("trainer.seed=2", "trainer.epochs=3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["+@a=[1,2]", "~" + "x" * 5000, "a." * 2000 + "b=1", "=1"])
def test_a_key_that_can_be_none_is_refused_by_its_rule(override: str) -> None:
    with pytest.raises(UserError, match="it must be KEY=VALUE, of a key of 1 to 200 letters"):
        compose("train", [override])


def test_composing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose("train", [])
    assert list(tmp_path.iterdir()) == []


# --- a folder of one's own ---


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a recipe and an option of a group; its path is none that a grammar reads."""
    folder = tmp_path / "it's {mine}, 100%"
    for name, text in (
        ("experiments/mine", "# @package _global_\ndefaults:\n  - override /model: tiny\n"),
        ("model/tiny", "defaults:\n  - narrow\n\nhidden: 7\n"),
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_folder_of_ones_own_adds_recipes_and_options(own: Path, command: str) -> None:
    words = (f"--config-dir={own}", "experiments=mine", "trainer.epochs=3")
    (composed,) = compose(command, words)
    assert (composed.config.model.hidden, composed.config.trainer.epochs) == (7, 3)
    assert composed.overrides == words  # so that a printed command finds the recipe
    (composed,) = compose(command, [words[0], "experiments=overfit", "model=tiny"])
    assert (composed.config.study.name, composed.config.model.hidden) == ("overfit", 7)
    assert ", mine, " in refusal(command, words[0], "experiments=other")
    assert refusal(command, "experiments=mine").startswith("experiments=mine is invalid")


def test_each_of_several_runs_keeps_the_folder(own: Path) -> None:
    words = [f"--config-dir={own}", "experiments=mine,smoke"]
    jobs = compose("train", words, multirun=True)
    assert [job.overrides for job in jobs] == [
        (words[0], "experiments=mine"),
        (words[0], "experiments=smoke"),
    ]


def test_a_folder_that_is_none_or_whose_file_would_be_hidden_is_refused(own: Path) -> None:
    assert refusal("train", "--config-dir=nowhere").startswith("--config-dir=nowhere is invalid")
    (own / "experiments/smoke.yaml").write_text("# @package _global_\n")
    message = refusal("train", f"--config-dir={own}", "experiments=mine")
    assert message.startswith(f"{own}/experiments/smoke.yaml is invalid")
    assert f"{ROOT}/experiments/smoke.yaml" in message


@pytest.mark.parametrize(
    "text", ["hydra.verbose=true", "hydra.run.dir=x", "hydra/launcher=basic", "+hydra.verbose=1"]
)
def test_a_setting_of_hydra_itself_is_refused(text: str) -> None:
    message = refusal("train", text)
    assert message.startswith(f"{text} is invalid: Hydra's own settings have no effect here")
    assert "--debug" in message


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
    assert space("~experiments", *(f"{name}={text}" for name, text in texts.items())) == texts


# --- groups whose options are searched ---

GIVEN = ("experiments=smoke", "model.dropout=0.5", "optim.ema=0.5")


@pytest.fixture(scope="module")
def options() -> dict[str, dict[str, dict[str, Any]]]:
    searched = ("model=choice(seed,convnet)", "optim=sgd,adamw")
    return compose("sweep", [*GIVEN, *searched])[0].config.study.options


def test_an_option_has_what_its_group_has_in_a_training_with_it(
    options: dict[str, dict[str, dict[str, Any]]],
) -> None:
    trained = compose("train", [*GIVEN, "model=convnet", "optim=sgd"])[0].config
    assert options["model"]["convnet"] == config_to_plain(trained)["model"]
    assert options["optim"]["sgd"] == config_to_plain(trained)["optim"]
    assert options["model"]["convnet"]["widths"] == [8, 16]  # the recipe's
    assert options["optim"]["sgd"]["learning_rate"] == 0.1  # the option's
    assert list(options["optim"]) == ["sgd", "adamw"]


def test_an_option_is_without_the_given_values_that_it_has_no_setting_for(
    options: dict[str, dict[str, dict[str, Any]]],
) -> None:
    assert options["model"]["seed"] == {"name": "seed"}  # widths and dropout are given


def test_a_training_has_no_options_to_choose() -> None:
    assert compose("train", ["experiments=smoke"])[0].config.study.options == {}


@pytest.mark.parametrize("key", ["model", "data", "optim.ema"])
def test_a_range_and_a_value_of_one_key_are_refused_by_both_texts(key: str) -> None:
    given, value = f"{key}=choice(sample,convnet)", f"{key}=0.5"
    assert refusal("sweep", given, value).startswith(f"{given} with {value} is invalid: ")
    assert refusal("sweep", f"~{given}").startswith(f"~{given} is invalid: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("choice(seed,resnet)", "model=resnet is invalid: it must be one of convnet, narrow, seed"),
        ("choice(seed,[convnet])", "study.space: model=choice(seed,[convnet]) is invalid: it"),
        (
            "choice(seed,seed)",
            "study.space: model=choice(seed,seed) is invalid: it must be a choice",
        ),
        ("interval(1,2)", "study.space: model=interval(1,2) is invalid: it must be a choice"),
        ("range(1,3)", "study.space: model=range(1,3) is invalid: it must be a choice"),
        ("tag(log,choice(seed,convnet))", "study.space: model=tag(log,choice(seed,convnet)) is"),
    ],
)
def test_what_is_no_choice_among_options_is_refused(text: str, message: str) -> None:
    assert refusal("sweep", f"model={text}").startswith(message)


# --- text as it was typed, paths of any name ---


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("study.name", text) for text in ("2026_11_25", "1.10", "12e4", "true", "1e5", "nan")),
        ("study.name", "prüfung"),
        ("study.fork_from", "1_000"),
        ("data.name", "0x10"),
        ("study.storage", "postgresql+psycopg://u@h/d?sslmode=require&connect_timeout=3"),
        ("tracking.uri", "http://host:5000/ä?a=1#b"),
        ("tracking.experiment", "Lab #2 (new)"),
        ("tracking.experiment", 'it\'s "new"'),
        ("tracking.experiment", "ends with \\"),
        ("tracking.experiment", "a {b} [c] $d 100%"),
        ("launcher.address", "ray://[::1]:10001"),
    ],
)
def test_a_text_setting_is_taken_as_it_was_typed(key: str, text: str) -> None:
    for command in ("train", "sweep"):
        (composed,) = compose(command, ["experiments=smoke", f"{key}={text}"])
        assert flat(config_to_plain(composed.config))[key] == text
        assert composed.overrides == ("experiments=smoke", f"{key}={text}")
    assert override_values([f"{key}={text}"]) == {key: text}


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_text_that_is_quoted_for_hydra_loses_its_quotes(quote: str) -> None:
    (composed,) = compose("train", [f"tracking.experiment={quote}Lab, two{quote}"])
    assert composed.config.tracking.experiment == "Lab, two"


def test_a_text_with_commas_is_refused_with_its_quoted_form() -> None:
    message = refusal("train", "tracking.experiment=Lab, two")
    assert message.startswith("tracking.experiment=Lab, two ")
    (argument,) = shlex.split(message.split(" is written ")[1])
    (composed,) = compose("train", [argument])
    assert composed.config.tracking.experiment == "Lab, two"


def test_null_is_no_text() -> None:
    (composed,) = compose("train", ["study.storage=null", "tracking.uri=null"])
    assert (composed.config.study.storage, composed.config.tracking.uri) == (None, None)
    assert refusal("train", "study.name=null").startswith("study.name=null is invalid")


def test_a_range_is_kept_among_the_overrides_as_it_was_typed() -> None:
    typed = ("experiments=smoke", "model.widths=[4],[8]", "optim.ema=tag(log, interval(0.1,0.9))")
    (composed,) = compose("sweep", typed)
    assert composed.overrides == typed
    assert compose("sweep", composed.overrides) == [composed]


FOLDERS = ["anna's lab #1, {x}", 'a "b" = c', "$HOME ${x} ü", "a,b", "feature%2Fx", "a?b", "~c\\"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkout_in_any_folder_composes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / name
    for folder in ("conf", "experiments", "src"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("*.png"))
    monkeypatch.setenv("TMPDIR", str(checkout))
    monkeypatch.delenv("DIGITLAB_HOME")
    code = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(checkout / 'src')!r})\n"
        "from digitlab.base.paths import lab_folder\n"
        "from digitlab.config.compose import compose\n"
        "jobs = compose('train', ['experiments=smoke', 'trainer.seed=1,2'], multirun=True)\n"
        "jobs += compose('sweep', ['experiments=robust'])\n"
        "print(json.dumps([str(lab_folder()), *(job.config.study.name for job in jobs)]))\n"
    )
    place = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=place, cwd=checkout, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [str(checkout / "lab"), "smoke", "smoke", "robust"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("study: {name: a\n", "default.yaml"),
        ("study:\n  name: a\n bad\n", "line 3"),
        ("a: \x01", "special characters are not allowed"),
        ("a: !!python/name:os.abort ''", "could not determine a constructor"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        (
            f"# @package _global_\ndefaults:\n  - override /model: {'x' * 5000}",
            "File name too long",
        ),
        ("a: &-a [x, x]\nb: &-b [*-a, *-a]\n", "it must hold no YAML anchors or aliases"),
        ("# " + "x" * 64_000, "it must have at most 64000 bytes"),
    ],
)
def test_recipe_that_is_no_yaml_is_refused_with_its_file_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "default.yaml").write_text(text)
    monkeypatch.setattr(composing, "recipe_folders", lambda: [folder])
    with pytest.raises(UserError) as raised:
        compose("sweep", [])
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
