"""What a record holds comes back as it was, or is refused in one line that says why."""

import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from digitlab.base.errors import UserError, visible
from digitlab.config import types as limits
from digitlab.config.compose import compose
from digitlab.config.recorded import (
    config_from_plain,
    config_from_yaml,
    config_to_plain,
    config_to_yaml,
    flat,
    shown,
    with_values,
)
from digitlab.config.types import Config
from digitlab.networks.settings import ArticleConfig, ConvnetConfig, SharedConfig


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


@pytest.fixture(scope="module")
def config() -> Config:
    """The root of all configurations, without a recipe: two convolutions of 16 and 32."""
    return compose("train", ["~experiments"])[0].config


@pytest.fixture
def stored(smoke: Config) -> dict[str, Any]:
    """What a run's record holds."""
    return config_to_plain(smoke)


# --- stored configurations ---


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
    assert shown(value[-1] if isinstance(value, list) else value) in message


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
        "model.name=os.abort: no such network, known are convnet, seed, shared."
    )


@pytest.mark.parametrize("model", [None, 3, [], "convnet", {}])
def test_a_model_that_is_no_mapping_is_refused(stored: dict[str, Any], model: Any) -> None:
    stored["model"] = model
    assert "model" in stored_refusal(stored)


def test_a_model_without_a_name_is_refused(stored: dict[str, Any]) -> None:
    del stored["model"]["name"]
    assert stored_refusal(stored) == "model.name is missing: it must be the name of a network."


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
    "a: &-a [1, 2]\nb: [*-a, *-a]",
    "{'a':&a [1], 'b':*a}",
    "format: 1",
    "a: " + "[" * 3000 + "]" * 3000,
    "a: " + "9" * 5000,
    "? [1, 2]\n: 3",
]


@pytest.mark.parametrize("text", YAML_RUBBISH)
def test_yaml_rubbish_is_refused_in_a_line_that_can_be_read(text: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_yaml(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert message.removeprefix("not a configuration:").strip()  # says why
    assert "it must" in message


BOMB = "format: 1\na: &-a [x, x]\n" + "".join(
    f"{after}: &-{after} [{', '.join([f'*-{before}'] * 10)}]\n"
    for before, after in zip("abcdefg", "bcdefgh", strict=True)
)


def test_aliases_are_refused_before_they_unfold() -> None:
    tracemalloc.start()
    with pytest.raises(UserError, match="it must hold no YAML anchors or aliases"):
        config_from_yaml(BOMB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000  # bytes; unfolded it has ten million elements


def test_a_long_text_is_refused_with_the_limit(smoke: Config) -> None:
    text = config_to_yaml(smoke)
    assert config_from_yaml(f"{text}# {'x' * (63_000 - len(text))}") == smoke
    with pytest.raises(UserError, match="at most 64000 bytes"):
        config_from_yaml(f"{text}# {'x' * 64_000}")


def test_a_record_begins_with_its_format(smoke: Config) -> None:
    assert config_to_yaml(smoke).splitlines()[0] == "format: 1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not a configuration: it must start with `format: 1`."),
        ("format: 2", "format=2 is invalid: it must be 1."),
        ("format: true", "format=true is invalid: it must be 1."),
        ("format: one", "format=one is invalid: it must be 1."),
    ],
)
def test_another_format_is_refused_in_one_line(smoke: Config, line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_yaml(config_to_yaml(smoke).replace("format: 1", line))
    assert str(caught.value) == message


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


# --- there and back ---


def fractions(low: float, high: float, **ends: bool) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **ends)


# A stored configuration holds neither interpolations nor OmegaConf's mark of a missing value;
# control characters such as U+0085 are where YAML breaks lines.
WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12).filter(
    lambda word: "${" not in word and word != "???"
)
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,11}", fullmatch=True)
COUNTS = st.integers(1, 10_000)
OPTIONS = st.sampled_from([{}, {"model": {"seed": {"name": "seed"}}}])
BEGIN = st.sampled_from([[], [{"model.widths": [4, 8], "optim.learning_rate": 0.1}]])


SHARED = SharedConfig(
    name="shared", width=4, kernel_size=5, stride=2, repeat_pools=[2, 1], separable=True
)


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
    rungs = [n / 100 for n in sorted(draw(st.sets(st.integers(1, 99), max_size=4)))]
    sampler = draw(st.sampled_from(limits.Sampler))
    others = [None, "a-study-of-before"]
    pruner = draw(st.sampled_from(limits.Pruner)) if rungs else limits.Pruner.none
    is_screening = pruner is limits.Pruner.screening
    if is_screening:
        rungs = rungs[:1]
        sampler = draw(st.sampled_from([s for s in limits.Sampler if s != "grid"]))
    finish = draw(COUNTS)
    is_unpruned = pruner is limits.Pruner.none
    goals = [["val_accuracy"], ["val_accuracy", "model_parameters"], ["training_flops"]]
    goal = draw(st.sampled_from(goals[: 3 if is_unpruned else 1]))
    least = draw(st.none() | fractions(0.01, 1)) if len(goal) > 1 else 0.5
    return limits.StudyConfig(
        name=draw(NAMES),
        storage=draw(st.none() | NAMES),
        space=draw(st.dictionaries(NAMES, WORDS, max_size=3)),
        options=draw(OPTIONS),
        fork_from=draw(st.sampled_from(others[: 1 if sampler == "grid" else 2])),
        objectives=[limits.Objective(name) for name in goal],
        require=limits.RequireConfig(
            val_accuracy=None if goal == ["val_accuracy"] else least,
            model_parameters=draw(st.none() | COUNTS) if is_unpruned else None,
            training_flops=draw(st.none() | fractions(1, 1e15)) if is_unpruned else None,
        ),
        begin_with=draw(BEGIN) if sampler is not limits.Sampler.grid else [],
        trials=draw(COUNTS) + (finish if is_screening else 0),
        workers=draw(st.integers(0, 64)),
        minutes=draw(fractions(0, 1e6)),
        patience=0 if is_screening else draw(st.integers(0, 100)),
        trial_minutes=draw(fractions(0, 1e6)),
        retries=draw(st.integers(0, 9)),
        count_failed=draw(st.booleans()),
        sampler=sampler,
        startup_trials=draw(COUNTS),
        seed=draw(st.integers(0, 2**31)),
        pruner=pruner,
        rungs=rungs,
        finish=finish,
        audit_pruning=draw(st.integers(0, 9)),
        confirm=(confirm := draw(st.integers(1, 1000))),
        confirm_fits=draw(st.sampled_from([0, confirm, 1000])),
        measure_seeds=draw(st.integers(0, 1000)),
        margin=draw(fractions(0, 1, exclude_max=True)),
        final_seeds=draw(st.integers(1, 1000)),
    )


CONFIGS = st.builds(
    Config,
    data=st.builds(
        limits.DataConfig,
        name=WORDS,
        evaluate_on=st.sampled_from(limits.EvaluateOn),
        validation_images=st.integers(10, 60_000),
        split_seed=st.integers(0, 2**31 - 1),
        images=st.integers(2, 60000),
        batch_size=st.integers(2, 10_000),
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
    model=convnets() | st.just(ArticleConfig(name="seed")) | st.just(SHARED),
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
        precision=st.sampled_from(limits.Precision),
        early_stopping=st.just(0),  # the rest is refused with evaluate_on=test
        checkpoint_minutes=fractions(0, 1e6),
    ),
    study=studies(),
    tracking=st.builds(
        limits.TrackingConfig,
        name=st.sampled_from(limits.TrackerName),
        uri=st.none() | NAMES,
        experiment=WORDS.filter(lambda word: word.strip() and visible(word) == word),
    ),
    launcher=st.builds(
        limits.LauncherConfig,
        name=st.sampled_from(limits.Launcher),
        address=WORDS,
        workers=st.integers(0, 10_000),
        cpus=fractions(0, 1024, exclude_min=True),
        gpus=fractions(0, 1),
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
