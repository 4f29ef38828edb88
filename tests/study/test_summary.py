"""What a person reads about a study, and the commands that are printed."""

import re
import shlex

from digitlab.base.statistics import Interval
from digitlab.config.compose import compose
from digitlab.study.summary import champion_text, pruning_text, sweep_command
from digitlab.study.trials import TrialRow

SUMMARY = {
    "trial": 4,
    "values": {"model.hidden": 32, "optim.learning_rate": 0.012345},
    "val_accuracy": {"4": {"mean": 0.97, "low": 0.96, "high": 0.98, "n": 3}},
    "tied": [4],
    "test_accuracy": {"mean": 0.96, "low": 0.95, "high": 0.97, "n": 5},
    "run_id": "abc123",
}


def words_of(command: str) -> list[str]:
    """What make passes to `digitlab sweep`: ARGS is split by a shell once more."""
    values = dict(word.split("=", 1) for word in shlex.split(command)[2:])
    recipe = values.get("EXPERIMENT", "default")
    return [f"experiments={recipe}", *shlex.split(values.get("ARGS", ""))]


def test_a_printed_command_composes_the_study_that_it_goes_on_with() -> None:
    overrides = ("experiments=smoke", "model.hidden=int(interval(8,16))", "study.name=a-b")
    command = sweep_command(overrides, "study.trials=9")
    study = compose("sweep", words_of(command))[0].config.study
    assert (study.name, study.trials) == ("a-b", 9)
    assert study.space["model.hidden"] == "int(interval(8,16))"


def test_the_default_recipe_is_not_named_and_a_later_override_replaces() -> None:
    assert sweep_command(()) == "make sweep"
    assert sweep_command(("experiments=default",)) == "make sweep"
    command = sweep_command(("study.trials=3", "study.seed=1"), "study.trials=6")
    assert words_of(command) == ["experiments=default", "study.seed=1", "study.trials=6"]


def test_the_champions_text_says_how_sure_it_is_and_what_to_do_next() -> None:
    config = compose("sweep", ["experiments=smoke"])[0].config
    text = champion_text(config, SUMMARY, ("experiments=smoke",))
    assert "champion: trial 4 (model.hidden=32, optim.learning_rate=0.0123)" in text
    assert f"test accuracy {Interval(**SUMMARY['test_accuracy'])}" in text
    assert "reproduce: make reproduce RUN=abc123" in text
    assert "tied" not in text
    found = re.search(r"extend: +(.+)", text)
    assert found
    assert "study.trials=4" in words_of(found[1])
    assert "extend" not in champion_text(config, SUMMARY, None)


def test_a_tied_champion_is_said_to_be_the_cheapest_of_them() -> None:
    other = {"mean": 0.971, "low": 0.96, "high": 0.98, "n": 3}
    tied = SUMMARY | {"tied": [4, 7], "val_accuracy": SUMMARY["val_accuracy"] | {"7": other}}
    text = champion_text(compose("sweep", ["experiments=smoke"])[0].config, tied, ())
    assert "tied: [4, 7]; trial 4 is the cheapest of them to train" in text
    assert "candidate 7" in text


def row(number: int, state: str, value: float, **metrics: float) -> TrialRow:
    return TrialRow(number, state, value, {}, {"metrics": metrics})


def test_what_pruning_saved_and_whether_it_cost_the_winner() -> None:
    rows = [row(0, "finished", 0.9, seconds=10.0), row(1, "pruned", 0.5, seconds=2.0, rung=0.25)]
    assert pruning_text(rows[:1], {}) == "no trial was pruned"
    assert pruning_text(rows, {}) == "pruning saved about 6 s of 18 s of training"
    better = pruning_text(rows, {"1/0": {"val_accuracy": 0.91}})
    assert better.endswith("1 pruned trials trained to the end: trial 1 would have won")
    worse = pruning_text(rows, {"1/0": {"val_accuracy": 0.8}})
    assert worse.endswith("none of them would have won")
