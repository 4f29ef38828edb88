"""What a person reads about a study, and the commands that are printed."""

import dataclasses
import io
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from digitlab.base.statistics import Interval
from digitlab.cli import build_parser
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.study.goal import TrialRow
from digitlab.study.summary import champion_text, pruning_text, sweep_command, trials_table

SUMMARY = {
    "trial": 4,
    "values": {"model.hidden": 32, "optim.learning_rate": 0.012345},
    "val_accuracy": {"4": {"mean": 0.97, "low": 0.96, "high": 0.98, "n": 3}},
    "test_accuracy": {"mean": 0.96, "low": 0.95, "high": 0.97, "n": 5},
    "run_id": "abc123",
}


def words_of(command: str) -> list[str]:
    words = shlex.split(command)
    assert words[:2] == ["digitlab", "sweep"]
    return words[2:]


def test_a_printed_command_composes_the_study_that_it_goes_on_with() -> None:
    overrides = ("experiments=smoke", "model.hidden=int(interval(8,16))", "study.name=a-b")
    command = sweep_command(overrides, "study.trials=9")
    study = compose("sweep", words_of(command))[0].config.study
    assert (study.name, study.trials) == ("a-b", 9)
    assert study.space["model.hidden"] == "int(interval(8,16))"


def test_a_printed_command_names_the_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    recipe = tmp_path / "experiments/mine.yaml"
    recipe.write_text("# @package _global_\nstudy: {name: mine, trials: 3}\n")
    _, parsers = build_parser()
    given = parsers["sweep"].parse_args(["--config-dir", str(tmp_path), "experiments=mine"])
    (composed,) = compose("sweep", [f"--config-dir={given.config_dir}", *given.overrides])
    again = parsers["sweep"].parse_args(words_of(sweep_command(composed.overrides)))
    assert again == given


def test_a_front_and_a_bound_that_no_trial_keeps_are_in_the_text() -> None:
    config = compose("sweep", ["experiments=smoke"])[0].config
    text = champion_text(config, SUMMARY | {"front": [4, 2], "meets_require": False}, None)
    assert "front: trials 4, 2; 1 confirmed (study.confirm=2 study.confirm_fits=4 confirms" in text
    assert "no trial meets study.require: it comes nearest" in text
    assert "Pareto" not in champion_text(config, SUMMARY | {"front": []}, None)


def test_the_default_recipe_is_not_named_and_a_later_override_replaces() -> None:
    assert sweep_command(()) == "digitlab sweep"
    assert sweep_command(("experiments=default",)) == "digitlab sweep"
    command = sweep_command(("study.trials=3", "study.seed=1"), "study.trials=6")
    assert words_of(command) == ["study.seed=1", "study.trials=6"]
    again = ("data.batch_size=200", "experiments=smoke", "data.batch_size=8")
    assert words_of(sweep_command(again)) == ["experiments=smoke", "data.batch_size=8"]


def test_the_champions_text_says_how_sure_it_is_and_what_to_do_next() -> None:
    config = compose("sweep", ["experiments=smoke"])[0].config
    text = champion_text(config, SUMMARY, ("experiments=smoke",))
    assert "champion: trial 4 (model.hidden=32, optim.learning_rate=0.0123)" in text
    assert f"test accuracy {Interval(**SUMMARY['test_accuracy'])}" in text
    assert "reproduce: digitlab reproduce abc123" in text
    assert "candidate" not in text
    assert "vote" not in text
    voted = {"vote": {"fits": 5, "test_accuracy": 0.9712}}
    line = "  the 5 fits voting together (mean probability): 97.12 %"
    assert line in champion_text(config, SUMMARY | voted, None).splitlines()
    assert "fits on all training images" in text
    few = with_values(config, {"data.images": 5000})
    assert "fits of 5,000 images" in champion_text(few, SUMMARY, ())
    assert "look" not in text
    found = re.search(r"extend: +(.+)", text)
    assert found
    assert "study.trials=4" in words_of(found[1])
    assert "extend" not in champion_text(config, SUMMARY, None)


def test_a_grid_is_extended_up_to_its_points_alone() -> None:
    grid = ["experiments=smoke", "study.sampler=grid", "study.pruner=none"]
    grid += ["model.hidden=choice(8,16,32)", "optim.learning_rate=0.01"]
    for total, tried, end in (
        (2, 2, "study.trials=3"),
        (3, 3, "the grid's 3 points are all tried"),
        (7, 3, "the grid's 3 points are all tried"),
        (7, 2, "digitlab reproduce abc123"),  # study.patience has ended it
    ):
        overrides = [*grid, f"study.trials={total}"]
        asked = SUMMARY | {"asked": {"trials": tried}}
        text = champion_text(compose("sweep", overrides)[0].config, asked, overrides)
        assert text.endswith(end)
        assert ("extend:" in text) == (total == 2)


def test_both_parts_of_the_error_and_every_further_look_are_said() -> None:
    config = compose("sweep", ["experiments=smoke"])[0].config
    more = {"test_errors": [0.0002, 0.00061], "looks": 3}
    text = champion_text(config, SUMMARY | more, ())
    assert "standard error: 0.020 points from the seeds, 0.061 from the images" in text
    assert "look 3 of the study at the test set" in text


def test_the_commands_of_a_study_with_servers_say_where_they_are() -> None:
    server = ("tracking.uri=http://host:5000", "study.storage=postgresql+psycopg://host/db")
    overrides = ("experiments=smoke", *server)
    text = champion_text(compose("sweep", overrides)[0].config, SUMMARY, overrides)
    reproduce, extend = (line.partition(":")[2].split() for line in text.splitlines()[-2:])
    assert reproduce == ["digitlab", "reproduce", "abc123", *server]
    assert set(server) < set(extend)


@pytest.mark.parametrize("hyperparameters", [1, 4, 12])
def test_a_table_of_trials_fits_80_columns(hyperparameters: int) -> None:
    keys = ["model.widths", "model.hidden", "trainer.epochs", "optim.learning_rate"]
    keys += [f"optim.learning_rate_{i}" for i in range(10)]
    keys = keys[:hyperparameters]
    config = compose("sweep", ["experiments=smoke"])[0].config
    config = with_values(config, {"tracking.experiment": "other"})
    study = dataclasses.replace(config.study, space=dict.fromkeys(keys, "interval(0,1)"))
    config = dataclasses.replace(config, study=study)
    metrics = {"metrics": {"model_parameters": 123456.0, "seconds": 12.34}}
    values = dict.fromkeys(keys, 0.00123456) | {"model.widths": [16, 32, 64]}
    values |= {"model.hidden": 256, "trainer.epochs": 5}
    rows = [TrialRow(0, "finished", 0.99, values, metrics)]
    out = io.StringIO()
    Console(file=out, width=500).print(trials_table(rows, config))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert ("12.3" in out.getvalue()) == (hyperparameters < 12)
    everything = "digitlab runs --study=smoke --csv tracking.experiment=other"
    assert (everything in " ".join(out.getvalue().split())) == (hyperparameters == 12)


def row(number: int, state: str, value: float, **metrics: float) -> TrialRow:
    return TrialRow(number, state, value, {}, {"metrics": metrics})


def test_what_pruning_saved_and_whether_it_cost_the_winner() -> None:
    rows = [row(0, "finished", 0.9, seconds=10.0), row(1, "pruned", 0.5, seconds=2.0, rung=0.25)]
    assert pruning_text(rows[:1], {}) == "no trial was pruned"
    assert pruning_text(rows, {}) == "pruning saved about 6 s of 18 s of training"
    better = pruning_text(rows, {"1/0": {"val_accuracy": 0.91}})
    assert better.endswith("1 pruned trial trained to the end: trial 1 would have won")
    worse = pruning_text(rows, {"1/0": {"val_accuracy": 0.8}})
    assert worse.endswith("none of them would have won")


def test_what_screening_saved_counts_promoted_trials_as_trained_twice() -> None:
    rows = [row(n, "pruned", 0.5, seconds=1.0, rung=0.1) for n in range(3)]
    assert pruning_text(rows, {}) == "pruning saved about 27 s of 30 s of training"
    promoted = row(3, "finished", 0.9, seconds=10.0)
    promoted.notes["promoted_from"] = 1
    assert pruning_text([*rows, promoted], {}) == (
        "pruning saved about 17 s of 30 s of training; the best 1 of 3 pruned trials were trained "
        "to the end"
    )
