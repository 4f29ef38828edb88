"""What is shown of one run or study, and a champion as a recipe."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import Call, CallIn
from samples import copy_digits, recorded, stop_in_the_middle, studies

from digitlab.base.statistics import Interval
from digitlab.config import compose as composing
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.results.show import recipe_of
from digitlab.study.storage import open_storage
from digitlab.study.summary import short


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return studies(tmp_path_factory)


@pytest.fixture
def call(lab: Path, call_in: CallIn) -> Call:
    return call_in(lab)


def test_a_run_is_shown_with_changed_settings_metrics_and_files(call: Call, lab: Path) -> None:
    row = recorded(lab, "smoke").runs(kind="final")[0]
    _, out, _ = call("show", row.run_id, "--json")
    shown = json.loads(out)
    assert (shown["kind"], shown["state"]) == ("final", "finished")
    assert shown["settings"]["data.evaluate_on"] == "test"
    assert shown["settings"]["model.widths"] == [4]
    assert {"trainer.threads", "optim.name", "study.name"} & shown["settings"].keys() == set()
    assert shown["metrics"] == row.metrics
    assert {"config.yaml", "weights.safetensors", "SHA256SUMS"} <= set(shown["files"])
    text = call("show", row.run_id)[1]
    assert "model.widths" in text
    assert "pictures/" in text


def test_a_champion_is_shown_with_its_own_figures_before_the_fit_that_it_has_the_weights_of(
    call: Call, lab: Path
) -> None:
    smoke = recorded(lab, "smoke")
    [champion] = smoke.runs(kind="champion")
    test = str(Interval(**smoke.store.notes()["champion"]["test_accuracy"]))
    weights_run = champion.tags["digitlab.weights_run"]
    for name in (champion.run_id[:12], champion.name, "champion", "smoke/champion"):
        first, second, *_ = call("show", name)[1].splitlines()
        assert first.startswith(f"run {champion.run_id} (smoke-champion) is the champion of")
        assert f"test accuracy {test}, the mean of its final fits" in first
        assert second.startswith(f"run {weights_run} (smoke-final-")
    shown = json.loads(call("show", champion.run_id, "--json")[1])
    assert shown["champion"]["metrics"] == champion.metrics
    assert shown["run_id"] == weights_run
    assert "champion" not in json.loads(call("show", weights_run, "--json")[1])
    assert call("show", weights_run)[1].startswith(f"run {weights_run} ")


def test_a_study_is_shown_with_its_trials_and_champion(call: Call, lab: Path) -> None:
    smoke = recorded(lab, "smoke").store
    shown = json.loads(call("show", "smoke", "--json")[1])
    assert [trial["number"] for trial in shown["trials"]] == list(range(6))
    assert shown["champion"] == smoke.notes()["champion"]
    assert shown["settings"]["study.name"] == "smoke"
    assert "report.html" in shown["files"]
    text = call("show", "smoke")[1]
    assert "champion: trial" in text
    assert "extend:    digitlab sweep experiments=smoke " in text
    assert "no champion yet: 1 of 3 trials ended" in call("show", "stopped")[1]


def test_what_there_is_not_is_one_line(call: Call) -> None:
    for words in (("show", "smokk"), ("best", "smokk"), ("best", "stopped"), ("show", "smoke/99")):
        status, out, err = call(*words)
        assert (status, out, len(err.splitlines())) == (2, "", 1)


def test_an_unfinished_study_has_no_best_and_is_gone_on_with_by_its_own_command(
    call: Call,
) -> None:
    _, _, err = call("best", "stopped")
    [command] = re.findall(r"Finish it with `digitlab (.+)` first", err)
    assert {"experiments=smoke", "study.name=stopped"} <= set(shlex.split(command)[1:])


def test_best_prints_a_recipe_that_trains_the_champions_configuration(
    call: Call, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = call("best", "smoke")
    assert status == 0
    champion = recorded(lab, "smoke").store.notes()["champion"]
    searched = ", ".join(f"{name}={short(value)}" for name, value in champion["values"].items())
    assert f"# Searched: {searched}." in out
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "mine.yaml").write_text(out)
    monkeypatch.setattr(composing, "recipe_folders", lambda: [folder])
    [job] = compose("train", ["experiments=mine"])
    smoke = recorded(lab, "smoke")
    wanted = with_values(smoke.config, smoke.store.notes()["champion"]["values"])
    for group in ("data", "model", "optim", "trainer"):
        assert getattr(job.config, group) == getattr(wanted, group)
    assert job.config.study.name == "smoke-best"


@pytest.mark.parametrize("study", ["own", "o" * 100])
def test_a_recipe_of_data_of_one_s_own_names_them(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose("train", ["experiments=smoke", "data.name=mine"])[0].config
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        f"# @package _global_\n{yaml.safe_dump(recipe_of(config, study))}"
    )
    monkeypatch.setattr(composing, "recipe_folders", lambda: [folder])
    [job] = compose("train", ["experiments=mine"])
    assert dataclasses.replace(job.config, study=config.study) == config


TEST = {"mean": 0.5, "low": None, "high": None, "n": 1}
CHAMPION = {"test_accuracy": TEST, "values": {"model.hidden": 16}, "trial": 0}


@pytest.mark.slow
def test_what_is_noted_of_a_champion_is_refused_in_one_line_if_it_is_damaged(
    tmp_path: Path, call_in: CallIn
) -> None:
    lab = copy_digits(tmp_path / "lab")
    stop_in_the_middle(lab)
    call, storage = call_in(lab), open_storage(lab)
    number = storage.get_study_id_from_name("stopped")
    storage.set_study_user_attr(number, "champion", CHAMPION)
    assert call("best", "stopped")[0] == 0
    damages = [({"test_accuracy": {"mean": 0.5}}, 0), ({"test_accuracy": 5}, 2)]
    damages += [({"test_accuracy": TEST | {"mean": "x"}}, 2), ({"values": []}, 0)]
    damages += [({"trial": None}, 0), ({"values": {"x": 1}}, 0)]
    for damage, listed in damages:
        storage.set_study_user_attr(number, "champion", CHAMPION | damage)
        for command in ("best", "show"):
            status, out, err = call(command, "stopped")
            assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert call("studies")[0] == listed
