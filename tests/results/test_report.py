"""A study's page, whatever became of the study, and what stands in MLflow of its champion."""

import dataclasses
import io
import json
import os
import pickletools
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pytest
import safetensors.torch
from browsing import Page, look
from conftest import Call, CallIn
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from playwright.sync_api import Browser
from samples import (
    METRICS,
    Study,
    add_trials,
    configure,
    fail,
    new_study,
    prune,
    recorded,
    studies,
)
from serving import HOST, free_port, served

from digitlab.base.statistics import Interval, accuracy_interval
from digitlab.config.recorded import config_to_yaml
from digitlab.data.datasets import TEST, load_digits
from digitlab.records.local import sqlite_uri
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.reader import recorded_guesses
from digitlab.records.tracker import NoTracker, TrackerRefused
from digitlab.results.charts import champion_charts, in_words, study_charts
from digitlab.results.report import report
from digitlab.study.storage import open_storage
from digitlab.study.summary import short
from digitlab.study.trials import TrialStore

CHARTS = {
    "History",
    "Learning curves",
    "Parallel coordinates",
    "What mattered",
    "Slices",
    "Contours",
    "Accuracy against time",
    "Accuracy against size",
    "Timeline",
}
CHAMPION = {"Confusion", "Calibration", "Every misread test digit"}
WORDS = {"Result", "Best trials", "What pruning saved", "How the champion learned", "Commands"}
WORDS |= {"Environment"}
UNKNOWN = {"What the champion gets wrong", "How the champion learned"}  # without a champion


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return studies(tmp_path_factory)


@pytest.fixture(scope="module")
def whole(lab: Path) -> Study:
    return recorded(lab, "smoke")


@pytest.fixture(scope="module")
def text(whole: Study) -> str:
    return whole.report()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_page_of_a_whole_study_lacks_nothing(page: Page) -> None:
    assert page.sections.keys() == WORDS | CHARTS | CHAMPION
    assert page.missing() == set()
    assert page.drawn.keys() == CHARTS | {"Confusion", "Calibration"}
    assert all(drawn["data"] for drawn in page.drawn.values())
    assert all(text.strip() for text in page.sections.values())


def test_every_section_has_one_heading_and_every_picture_says_what_it_shows(page: Page) -> None:
    assert set(page.headings) == {1}
    assert len(page.all("h1")) == 1
    assert [html["lang"] for html in page.all("html")] == ["en"]
    images = page.all("img")
    charts = [div for div in page.all("div") if div.get("class") == "chart"]
    assert images
    assert len(charts) == len(page.drawn)
    assert all((image["alt"] or "").strip() for image in images)
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    labels = [chart["aria-label"] or "" for chart in charts]
    assert {chart["role"] for chart in charts} == {"img"}
    assert [label.split(". ")[0] for label in labels] == list(page.drawn)
    regions = [div for div in page.all("div") if div.get("class") == "scroll"]
    assert len(page.all("details")) == len(page.drawn)  # each chart has its data as a table
    assert all(div["role"] == "region" and div["aria-label"] for div in regions)
    assert all(len(label.split(". ", 1)[1]) > 20 for label in labels)


def test_champions_figures_are_those_that_are_stored(whole: Study, page: Page) -> None:
    champion = whole.store.notes()["champion"]
    finals = whole.runs(kind="final")
    guesses = [recorded_guesses(whole.tracker, run) for run in finals]
    right = np.array([predictions == labels for predictions, labels in guesses])
    interval = accuracy_interval([right], 0)
    assert dataclasses.asdict(interval) == pytest.approx(champion["test_accuracy"])
    assert interval.n == 2
    mean = sum(run.metrics["test_accuracy"] for run in finals) / 2
    assert interval.mean == pytest.approx(mean)
    row = whole.store.rows()[champion["trial"]]
    reported = " ".join(page.sections["Result"].split())
    assert f"The champion, trial {row.number}, reads {interval} of the test images" in reported
    assert str(interval) in reported
    assert "points from the seeds" in reported
    assert "The test set was looked at 1 time" in reported
    assert f"{champion['trial']}/1001, {champion['trial']}/1002" in reported
    headline = whole.report().split("</header>")[0]
    assert str(interval).split(" (")[0] in headline
    for key, label in in_words(row.values).items():
        assert f"{label} {short(row.values[key])}" in headline
    metrics = row.notes["metrics"]
    assert f"It has {int(metrics['model_parameters']):,} parameters" in reported
    assert f"took {metrics['seconds']:.1f} s" in reported
    assert f"digitlab reproduce {champion['run_id'][:12]}" in page.sections["Commands"]
    states = [row.state for row in whole.store.rows()]
    assert f"6 of 6 trials: {states.count('finished')} finished" in reported
    assert f"{states.count('pruned')} pruned" in reported


def test_best_trials_stand_first_with_their_new_seeds(whole: Study, page: Page) -> None:
    finished = [row for row in whole.store.rows() if row.state == "finished"]
    best = sorted(finished, key=lambda row: -row.value)
    reported = page.sections["Best trials"]
    places = [reported.index(f"{row.value:.2%}") for row in best]
    assert places == sorted(places)
    champion = whole.store.notes()["champion"]
    assert f" {champion['trial']} (champion) " in reported
    assert reported.count("(champion)") == 1
    assert len(champion["val_accuracy"]) == 2
    for interval in champion["val_accuracy"].values():
        assert str(Interval(**interval)) in reported


def test_misread_digits_are_those_of_the_champions_predictions(whole: Study, page: Page) -> None:
    champion = whole.runs(kind="champion")[0]
    weights_run = champion.tags["digitlab.weights_run"]
    kept = safetensors.torch.load(whole.tracker.artifact(weights_run, "predictions.safetensors"))
    guesses, labels = kept["predictions"], kept["labels"]
    misread = {
        (place, int(labels[place]), int(guesses[place]))
        for place in (guesses != labels).nonzero().flatten().tolist()
    }
    reported = [
        re.match(
            r"test image (\d+), a (\d), read as (\d): [\d.]+%, \d: [\d.]+%, \d: ", image["alt"]
        )
        for image in page.all("img")
    ]
    assert {tuple(map(int, found.groups())) for found in reported if found} == misread
    assert sum(found is not None for found in reported) == len(misread) > 0
    assert len(reported) == len(misread) + 1  # the film
    assert f"{len(misread)} of {len(labels)} test images are misread" in page.sections["Confusion"]
    right = 1 - len(misread) / len(labels)
    assert right == pytest.approx(whole.tracker.get(weights_run).metrics["test_accuracy"])


def test_pruned_trials_are_counted_drawn_and_accounted_for(whole: Study, page: Page) -> None:
    rows = whole.store.rows()
    pruned = [row for row in rows if row.state == "pruned"]
    assert pruned
    assert len(pruned) < len(rows)
    names = [line["name"] for line in page.drawn["Learning curves"]["data"]]
    assert sorted(names) == ["finished", "pruned"]
    for row in rows:
        assert f"{row.number} {row.state} " in page.sections["Learning curves"]
    saved = sum(row.notes["metrics"]["seconds"] * (1 / 0.3 - 1) for row in pruned)
    spent = sum(row.notes["metrics"]["seconds"] for row in rows)
    reported = f"Pruning saved about {saved:.0f} s of {saved + spent:.0f} s"
    assert reported in page.sections["What pruning saved"]


def test_environment_and_commands_are_those_of_the_study(whole: Study, page: Page) -> None:
    reported = page.sections["Environment"]
    assert f"torch {__import__('torch').__version__}".split("+")[0] in reported
    assert re.search(r"commit [0-9a-f]{40}", reported)
    assert "None" not in reported
    commands = page.sections["Commands"]
    assert "digitlab sweep experiments=smoke " in commands
    assert "model.widths=[4]" in commands
    assert "digitlab report smoke" in commands


# ---- studies that lack something -----------------------------------------------------------------


def test_page_of_a_study_that_was_stopped_says_what_is_missing(lab: Path) -> None:
    page = Page(recorded(lab, "stopped").report())
    assert page.missing() == CHARTS | UNKNOWN
    assert "2 of 3 trials: 1 finished, 1 running." in page.sections["Result"]
    assert "no champion yet" in page.sections["Result"]
    assert "50.00%" in page.sections["Best trials"]
    assert "c0ffee" in page.sections["Environment"]
    assert "digitlab reproduce" not in page.sections["Commands"]


def test_charts_of_trials_that_were_all_taken_over_say_what_is_missing() -> None:
    """They have no accuracy at a rung, which trials of a study with pruning are compared by."""
    study = new_study("study.pruner=median")
    add_trials(study.store, [0.5, 0.6, 0.7])
    charts = {chart.title: chart for chart in study_charts(study.store, 1)}
    for title in ("Parallel coordinates", "Slices"):
        assert charts[title].message.startswith("Missing: no trial has an accuracy at "), title
    assert charts["History"].figure is not None


def test_page_of_a_study_of_one_trial_says_that_charts_need_two() -> None:
    study = new_study()
    add_trials(study.store, [0.75])
    page = Page(study.report())
    assert page.missing() == CHARTS | UNKNOWN | {"Environment"}
    assert "75.00%" in page.sections["Best trials"]
    assert "two trials with a result are needed, there are 1" in page.sections["History"]
    assert page.drawn == {}


def test_training_time_leaves_out_trials_that_were_taken_from_others() -> None:
    study = new_study()
    add_trials(study.store, [0.75])
    add_trials(study.store, [0.75], taken_from="0")  # a twin: nobody trained it
    assert "Training time of all trials</dt><dd>1 s<" in study.report()


def test_page_of_a_study_whose_trials_failed_says_why() -> None:
    study = new_study()
    for reason in ("Diverged: the loss is not finite", "RuntimeError: out of memory"):
        fail(study.store, reason)
    page = Page(study.report())
    assert page.missing() == CHARTS | UNKNOWN | {"Environment"}
    assert "2 of 3 trials: 2 failed." in page.sections["Result"]
    assert "No trial finished." in page.sections["Best trials"]
    assert "Diverged: the loss is not finite" in page.sections["Best trials"]
    assert "RuntimeError: out of memory" in page.sections["Best trials"]


def test_page_of_a_study_without_a_trial_comes_too() -> None:
    page = Page(new_study().report())
    assert page.missing() == CHARTS | UNKNOWN | {"Environment"}
    assert "0 of 3 trials: none yet." in page.sections["Result"]
    assert "No trial finished." in page.sections["Best trials"]


def test_page_of_a_study_that_was_not_recorded_lacks_what_runs_hold() -> None:
    study = new_study("study.pruner=none")
    add_trials(study.store, [0.5, 0.75, 0.625, 0.7])
    interval = {"mean": 0.875, "low": 0.8, "high": 0.95, "n": 2}
    champion = {"trial": 1, "values": {"model.hidden": 23, "optim.learning_rate": 0.018}}
    champion |= {"val_accuracy": {"1": interval}, "test_accuracy": interval}
    study.store.note("champion", champion | {"run_id": None})
    page = Page(study.report())
    assert page.missing() == UNKNOWN | {"Environment"}
    assert "87.50 % (80.00 to 95.00, n=2)" in page.sections["Result"]
    assert "No trial was pruned" in page.sections["What pruning saved"]
    assert page.drawn.keys() == CHARTS


def test_page_of_a_study_with_one_hyperparameter_comes_too() -> None:
    study = new_study("optim.learning_rate=0.01", "study.pruner=none")
    for hidden in (16, 20, 24, 32, 64):
        study.store.add({"model.hidden": hidden}, hidden / 100, {"metrics": METRICS})
    page = Page(study.report())
    assert "hidden 100 %" in page.sections["What mattered"]
    assert "Contours" in page.missing()


def test_charts_show_each_setting_of_the_trials_that_have_it() -> None:
    study = new_study("model=choice(seed,convnet)", "study.pruner=none")
    for number in range(12):
        convnet = {"model": "convnet", "model.hidden": 16 + number}
        values = convnet if number % 2 else {"model": "seed"}
        values |= {"optim.learning_rate": 0.003 + number / 1000}
        study.store.add(values, 0.5 + number / 100, {"metrics": METRICS})
    charts = {chart.title: chart for chart in study_charts(study.store, 1)}
    lines = [line for line in charts["Parallel coordinates"].figure.data if line.customdata]
    assert len(lines) == 12  # which need a value on each axis
    axes = {axis for line in lines for axis, _ in line.customdata}
    assert axes == {"validation accuracy (%)", "learning rate", "model"}
    assert [len(points.x) for points in charts["Slices"].figure.data] == [6, 12, 12]
    assert "Not every trial has hidden" in charts["What mattered"].message
    assert "hidden" not in list(charts["What mattered"].data["hyperparameter"])
    assert "hidden 25 to 27" in charts["Slices"].message  # of the best quarter: 11, 10 and 9
    cells = Page(study.report()).sections["Best trials"].split()
    assert "None" not in cells
    assert "nan" not in cells


def test_what_a_trial_says_is_text_in_the_page_and_never_markup() -> None:
    reason = "Bad: </script><script>document.title='owned'</script><!--<script> \"&' <img src=x>"
    study = new_study("study.pruner=none")
    fail(study.store, reason)
    page = Page(study.report())
    assert " ".join(reason.split()) in " ".join(page.sections["Best trials"].split())
    assert page.all("script") == page.all("img") == []
    add_trials(study.store, [0.5, 0.75])
    text = study.report()
    assert (
        "owned" not in text.split("</main>")[0]
    )  # two trials have finished: why the other failed is not shown
    assert len(Page(text).all("script")) == len(Page(text).drawn)
    assert "</script><script>doc" not in text
    assert "<!--" not in text.split("</main>")[0]


# ---- charts --------------------------------------------------------------------------------------

SOME = st.floats(0, 1, width=16)  # of few bits, so that equal ones come about


@pytest.mark.slow
@settings(deadline=None, max_examples=8)
@given(st.lists(st.tuples(SOME, SOME), min_size=2, max_size=12))
def test_nothing_dominates_the_front_and_all_else_is_dominated(points) -> None:
    study = new_study("study.pruner=none")
    for cost, accuracy in points:
        values = {"model.hidden": 16, "optim.learning_rate": 0.01}
        study.store.add(values, accuracy, {"metrics": METRICS | {"seconds": cost}})
    study.store.add(values, 1.0, {})  # taken over without its metrics
    chart = next(c for c in study_charts(study.store, 1) if c.title == "Accuracy against time")
    trials, line = chart.figure.data
    points = [(cost, 100 * accuracy) for cost, accuracy in points]
    assert sorted(zip(trials.x, trials.y, strict=True)) == sorted(points)
    front = list(zip(line.x, line.y, strict=True))
    assert list(line.x) == sorted(line.x)
    assert front
    for cost, accuracy in front:
        assert (cost, accuracy) in points
        assert not any(
            c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points
        )
    for cost, accuracy in points:
        assert any(c <= cost and a >= accuracy for c, a in front)


@pytest.mark.parametrize(
    ("misread", "message"),
    [
        (0, "There are no errors in 50 test images."),
        (2, "2 of 50 test images are misread, most often a 3 as a 4 (2 times)."),
    ],
)
def test_confusion_names_errors_where_there_are_any(misread: int, message: str) -> None:
    labels = np.arange(50) % 10
    logits = 9 * np.eye(10)[labels]
    for i in range(misread):
        logits[10 * i + 3, 4] = 10
    assert champion_charts(logits, labels, list("0123456789"), None)[0].message == message


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (["optim.learning_rate", "model.hidden"], ["learning rate", "hidden"]),
        (["data.augment.scale", "optim.scale"], ["data augment scale", "optim scale"]),
    ],
)
def test_labels_are_words_and_tell_all_keys_apart(keys: list[str], labels: list[str]) -> None:
    assert list(in_words(keys).values()) == labels


def test_importance_has_a_spread_and_finds_what_matters() -> None:
    study = new_study("study.pruner=none")
    chance = np.random.default_rng(3)
    for accuracy in chance.uniform(0, 1, 24):
        values = {"model.hidden": int(chance.integers(16, 64)), "optim.learning_rate": 0.003}
        values["optim.learning_rate"] += accuracy * 0.027
        study.store.add(values, float(accuracy), {"metrics": METRICS})
    chart = next(c for c in study_charts(study.store, 1) if c.title == "What mattered")
    bars = chart.figure.data[0]
    assert list(bars.y) == ["learning rate", "hidden"]
    assert bars.x[0] > 70 > 30 > bars.x[1] >= 0
    above, below = bars.error_x.array, bars.error_x.arrayminus
    assert all(extent >= 0 for extent in [*above, *below])
    assert max(above) > 0 < max(below)
    assert all(
        -1e-9 <= x - b <= x + a <= 100 + 1e-9 for x, a, b in zip(bars.x, above, below, strict=True)
    )
    assert f"learning rate {bars.x[0]:.0f} %, hidden {bars.x[1]:.0f} %" in chart.message
    again = next(c for c in study_charts(study.store, 1) if c.title == "What mattered")
    assert again.figure == chart.figure


def test_study_that_prunes_is_compared_where_all_its_trials_were() -> None:
    study = new_study("study.pruner=halving")
    for accuracy in (0.3, 0.4, 0.5, 0.6):
        prune(study.store, accuracy)
    number = study.store.ask().number
    study.store.report(number, 0, 0.7)
    study.store.tell(number, "finished", 0.9, {"metrics": METRICS, "curve": [0.9]})
    charts = {chart.title: chart for chart in study_charts(study.store, 1)}
    assert "accuracy at 0.3 of the steps" in charts["Parallel coordinates"].message
    shown = {round(y, 6) for line in charts["Slices"].figure.data for y in line.y}
    assert shown == {30, 40, 50, 60, 70}
    assert charts["Parallel coordinates"].figure.data


def test_screened_trials_are_shown_once_and_not_called_worse() -> None:
    screening = ("study.pruner=screening", "study.rungs=[0.3]")
    study = new_study(*screening, "study.trials=6", "study.finish=2")
    for accuracy in (0.3, 0.4, 0.5, 0.6):
        prune(study.store, accuracy)
    number = study.store.ask().number
    study.store.report(number, 0, 0.6)
    study.store.tell(number, "finished", 0.9, {"metrics": METRICS, "curve": [0.9]})
    charts = {chart.title: chart for chart in study_charts(study.store, 1)}
    assert sorted(round(y, 6) for y in charts["Slices"].figure.data[0].y) == [30, 40, 50, 60]
    message = charts["Learning curves"].message
    assert "4 of 5 trials were pruned (dotted lines), as they were screened" in message
    assert "behind" not in message


@pytest.mark.parametrize(
    ("pruner", "why"),
    [
        ("halving", "as they were not among the best third of the trials that had reached that"),
        ("hyperband", "as they were not among the best third of the trials of their bracket"),
        ("median", "as they had been less accurate than the median, at the same fraction"),
    ],
)
def test_pruned_trials_are_said_to_be_what_their_pruner_compares(pruner: str, why: str) -> None:
    study = new_study(f"study.pruner={pruner}", "study.rungs=[0.3]")
    for accuracy in (0.3, 0.4):
        prune(study.store, accuracy)
    charts = {chart.title: chart for chart in study_charts(study.store, 1)}
    message = charts["Learning curves"].message
    assert f"2 of 2 trials were pruned (dotted lines), {why}" in message
    assert ("early trials had fewer to beat" in message) == (pruner != "median")


def curves(study: Study) -> list[list[tuple[float, float]]]:
    """Each trial's points: an outcome's trials are one trace, with a gap after each."""
    charts = {
        chart.title: chart for chart in study_charts(study.store, study.config.trainer.epochs)
    }
    found: list[list[tuple[float, float]]] = [[]]
    for trace in charts["Learning curves"].figure.data:
        for x, y in zip(trace.x, trace.y, strict=True):
            if np.isnan(x):
                found.append([])
            else:
                found[-1].append((float(x), float(y)))
    return [curve for curve in found if curve]


def test_curve_of_a_pruned_trial_ends_where_it_was_pruned() -> None:
    study = new_study("study.pruner=halving", "trainer.epochs=5", "study.rungs=[0.2,0.5]")
    prune(study.store, 0.25, rung=0.2)
    prune(study.store, 0.75, rung=0.5, curve=[0.5, 0.625])
    assert curves(study) == [[(1, 25)], [(1, 50), (2, 62.5), (2.5, 75)]]
    # Where the epochs are searched too, it is the trial's own that count.
    study = new_study("study.pruner=halving", "trainer.epochs=choice(10,20)", "study.rungs=[0.2]")
    for accuracy in (0.25, 0.5, 0.75):
        prune(study.store, accuracy, rung=0.2)
    asked = [row.values["trainer.epochs"] for row in study.store.rows()]
    assert [curve[-1][0] for curve in curves(study)] == [epochs / 5 for epochs in asked]


# ---- in a browser --------------------------------------------------------------------------------


# Text of the charts of which a part lies outside of its picture.
CUT = """() => [...document.querySelectorAll('.chart')].flatMap(chart => {
  const frame = chart.getBoundingClientRect();
  return [...chart.querySelectorAll('.main-svg text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1);
  }).map(text => text.textContent);
})"""


def test_page_draws_every_chart_and_asks_the_network_for_nothing(
    browser: Browser, text: str, tmp_path: Path
) -> None:
    seen = look(browser, text, tmp_path)
    assert seen.requests == [(tmp_path / "page.html").as_uri()]
    assert seen.errors == []
    assert seen.page.locator(".chart").count() == len(CHARTS) + 2
    assert seen.page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")
    marks = ".chart :is(.trace, .heatmaplayer image, .contourlayer path, .bars)"
    marked = "c => [...document.querySelectorAll('.chart')].filter(p => !p.querySelector(c)).length"
    assert seen.page.evaluate(marked, marks.removeprefix(".chart ")) == 0
    assert seen.page.evaluate(CUT) == []
    seen.page.context.close()


def test_page_fits_a_telephone(browser: Browser, text: str, tmp_path: Path) -> None:
    seen = look(browser, text, tmp_path, width=390)
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
    assert seen.page.evaluate("Math.max(...[...document.querySelectorAll('.main-svg')]"
                              ".map(s => s.getBoundingClientRect().right))") <= 390  # fmt: skip
    assert seen.page.evaluate(CUT) == []
    assert seen.errors == []
    seen.page.context.close()


def test_what_a_trial_says_runs_nowhere_in_the_page(browser: Browser, tmp_path: Path) -> None:
    study = new_study("study.pruner=none")
    fail(study.store, "</script><script>document.title='owned'</script><img src=x onerror=x>")
    add_trials(study.store, [0.5, 0.75])
    seen = look(browser, study.report(), tmp_path)
    assert seen.page.title() == "Study smoke"
    assert seen.page.locator("img").count() == 0
    assert len(seen.requests) == 1
    assert seen.errors == []
    seen.page.context.close()


# ---- from the command line -----------------------------------------------------------------------


@pytest.fixture
def call(lab: Path, call_in: CallIn) -> Call:
    return call_in(lab)


def test_sweep_leaves_the_report_on_the_studys_own_run(whole: Study) -> None:
    run = whole.store.notes()["run_id"]
    kept = Page(whole.tracker.artifact(run, "report.html").decode())
    assert kept.missing() == set()
    assert "The champion, trial" in kept.sections["Result"]


def test_report_is_written_where_it_is_asked_for_and_kept_on_the_run(
    lab: Path, tmp_path: Path, call: Call
) -> None:
    target = tmp_path / "new" / "page.html"
    study = recorded(lab, "stopped")
    run = study.store.notes()["run_id"]
    study.tracker.tag(run, {"mark": "of the test"})
    assert call("report", "stopped", "--out", str(target)) == (0, f"written: {target}\n", "")
    assert "Study stopped" in target.read_text(encoding="utf-8")
    assert study.tracker.artifact(run, "report.html") == target.read_bytes()
    assert study.tracker.get(run).tags["digitlab.state"] == "interrupted"
    assert study.tracker.get(run).tags["mark"] == "of the test"
    # Without a name it is the study that was created last, and its place is in the lab.
    page = lab / "reports" / "stopped.html"
    assert call("report") == (0, f"written: {page}\n", "")


def test_report_whose_record_is_refused_says_so(
    lab: Path, call_in: CallIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise TrackerRefused("403")

    lab = shutil.copytree(lab, tmp_path / "lab")
    monkeypatch.setattr(MlflowTracker, "upload", refuse)
    status, out, err = call_in(lab)("report", "stopped")
    assert (status, out) == (2, f"written: {lab}/reports/stopped.html\n")
    assert "was refused (403). It is kept" in err
    assert err.count("\n") == 1


def test_report_is_of_the_study_that_was_created_last_and_is_nobody_elses(
    lab: Path, call_in: CallIn, tmp_path: Path
) -> None:
    lab = shutil.copytree(lab, tmp_path / "lab")
    storage = open_storage(lab)
    replay = TrialStore(storage, configure("study.name=smoke-replay"))
    replay.note("config", config_to_yaml(configure("study.name=smoke-replay")))
    replay.note("again", "digitlab reproduce --study smoke")
    optuna.create_study(storage=storage, study_name="made in the dashboard")
    assert call_in(lab)("report") == (0, f"written: {lab}/reports/stopped.html\n", "")
    page = Page(report(replay, configure("study.name=smoke-replay"), NoTracker(), lab))
    assert "digitlab reproduce --study smoke" in page.sections["Commands"]
    assert "digitlab sweep" not in page.sections["Commands"]


def test_report_of_an_unknown_study_is_refused_in_one_line(
    lab: Path, call: Call, call_in: CallIn, tmp_path: Path
) -> None:
    line = "digitlab: study smoek does not exist: did you mean smoke?\n"
    assert call("report", "smoek") == (2, "", line)
    (tmp_path / "file").touch()
    status, out, err = call("report", "stopped", "--out", str(tmp_path / "file" / "page"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--out" in err
    mine = shutil.copytree(lab, tmp_path / "lab", ignore=shutil.ignore_patterns("reports"))
    (mine / "reports").touch()
    status, out, err = call_in(mine)("report", "stopped")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"digitlab: {mine / 'reports' / 'stopped.html'} cannot be written")


def test_report_of_a_lab_without_a_study_is_refused_in_one_line(
    call_in: CallIn, tmp_path: Path
) -> None:
    status, out, err = call_in(tmp_path / "empty")("report")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "digitlab sweep" in err


def test_report_of_a_study_that_never_started_is_refused_in_one_line(
    call_in: CallIn, lab: Path, tmp_path: Path
) -> None:
    """Its first call was killed early: the storage knows its name and nothing else."""
    storage = open_storage(tmp_path)
    TrialStore(storage, recorded(lab, "stopped").config)
    status, out, err = call_in(tmp_path)("report")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "study stopped has not started yet" in err


# ---- the champion in the registry ----------------------------------------------------------------


@pytest.fixture
def registry(lab: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """MLflow as someone uses it who knows nothing of digitlab, with no leave to unpickle."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(lab))
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    return MlflowClient()


def pixels_and_probabilities(study: Study) -> tuple[np.ndarray, np.ndarray]:
    """The test images, and what the champion's network made of them when it was tested."""
    champion = study.runs(kind="champion")[0]
    kept = study.tracker.artifact(champion.tags["digitlab.weights_run"], "predictions.safetensors")
    logits = safetensors.torch.load(kept)["logits"]
    images = load_digits(study.lab, "sample", TEST, False).images
    return images[:, None].astype(np.float32), logits.softmax(1).numpy()


def test_registered_champion_tells_what_it_is(whole: Study, registry: MlflowClient) -> None:
    version = registry.get_model_version_by_alias("smoke", "champion")
    champion = whole.store.notes()["champion"]
    assert version.run_id == champion["run_id"]
    assert version.tags["trial"] == str(champion["trial"])
    assert str(Interval(**champion["test_accuracy"])) in version.description
    assert "convnet" in version.description
    assert "Not for" in version.description
    for name, value in champion["values"].items():
        assert f"`{name}={value}`" in version.description
    folder = whole.lab / "artifacts" / champion["run_id"] / "artifacts" / "model"
    signature = mlflow.models.get_model_info(str(folder)).signature
    assert [(s.shape, s.type) for s in signature.inputs.inputs] == [((-1, 1, 28, 28), np.float32)]
    assert [s.shape for s in signature.outputs.inputs] == [(-1, 10)]


def examples_of_card(registry: MlflowClient, **given: Any) -> dict[str, Any]:
    """Run the examples of the model card, by what they are of."""
    card = registry.get_model_version_by_alias("smoke", "champion").description
    return {name: eval(code, given) for name, code in re.findall(r"  - (.*?): .*`(.*)`", card)}


@pytest.mark.filterwarnings("ignore")  # of torch's export, when it is loaded
def test_registered_champion_predicts_as_the_tested_network_did(
    whole: Study, registry: MlflowClient
) -> None:
    pixels, probabilities = pixels_and_probabilities(whole)
    run = whole.store.notes()["champion"]["run_id"]
    folder = str(whole.lab / "artifacts" / run / "artifacts" / "model")
    model = mlflow.pyfunc.load_model(folder)
    for first, last in ((0, 1), (1, 4), (0, 500)):
        reported = model.predict(pixels[first:last])
        assert reported.shape == (last - first, 10)
        assert (reported.argmax(1) == probabilities[first:last].argmax(1)).all()
        np.testing.assert_allclose(reported, probabilities[first:last], atol=1e-5)
    # Each example of the model card answers alike, and what none of them gives is refused.
    images = pixels[:40, 0].astype(np.uint8)
    examples = examples_of_card(registry, model=model, images=images)
    assert examples.pop("served") == {"inputs": pixels[:40].tolist()}
    assert list(examples) == ["0 to 255", "0 to 1"]
    for reported in examples.values():
        np.testing.assert_allclose(reported, probabilities[:40], atol=1e-5)
    with pytest.raises(MlflowException, match="uint8"):
        model.predict(images[:, None])
    example = mlflow.models.Model.load(folder).load_input_example(folder)
    assert example.shape[1:] == (1, 28, 28)
    assert model.predict(example).sum() == pytest.approx(len(example))


def pickles(content: bytes, name: str) -> dict[str, bytes]:
    """Pickles, by what they are called or by how they begin, in zips and in zips in these too."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        found = {}
        with zipfile.ZipFile(io.BytesIO(content)) as folder:
            for part in folder.namelist():
                found |= pickles(folder.read(part), f"{name}/{part}")
        return found
    called = name.endswith((".pkl", ".pickle", ".pth", ".ckpt", ".joblib"))
    begins = re.match(rb"\x80[\x02-\x05]", content) and content.endswith(b".")
    return {name: content} if called or begins else {}


def test_registered_champion_holds_no_pickle_but_of_plain_tensors(whole: Study) -> None:
    """torch's export keeps the inputs that it was made with; MLflow refuses it without them."""
    run = whole.store.notes()["champion"]["run_id"]
    folder = whole.lab / "artifacts" / run / "artifacts" / "model"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"MLmodel", "model.pt2"} <= {path.name for path in files}
    found: dict[str, bytes] = {}
    for path in files:
        found |= pickles(path.read_bytes(), path.name)
    assert {name.rsplit("/archive/")[0] for name in found} <= {
        "model.pt2/model/data/sample_inputs/model.pt"
    }
    plain = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
    for content in found.values():
        operations = [
            (opcode.name, reported) for opcode, reported, _ in pickletools.genops(content)
        ]
        assert {reported for name, reported in operations if name == "GLOBAL"} <= plain
        assert not {"STACK_GLOBAL", "INST", "OBJ", "EXT1"} & {name for name, _ in operations}


@pytest.mark.long
@pytest.mark.timeout(300)
def test_registered_champion_can_be_served(lab: Path, whole: Study, tmp_path: Path) -> None:
    pixels, probabilities = pixels_and_probabilities(whole)
    port = str(free_port())
    place = ["--host", HOST, "--port", port, "--env-manager", "local", "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/smoke@champion"]
    request = urllib.request.Request(
        f"http://{HOST}:{port}/invocations",
        json.dumps({"inputs": [*pixels[:3].tolist(), *(pixels[:3] / 255).tolist()]}).encode(),
        {"Content-Type": "application/json"},
    )
    with served("ui", lab, "/health", tmp_path / "ui.log") as ui:
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"http://{HOST}:{ui.port}"}
        environment |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
        # `mlflow models serve` starts `uvicorn` by its name.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        with open(tmp_path / "log", "wb") as log:
            server = subprocess.Popen(
                [*command, *place],
                cwd=tmp_path,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            answer = answer_of(request, server, tmp_path / "log")
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    expected = np.concatenate([probabilities[:3], probabilities[:3]])
    np.testing.assert_allclose(answer["predictions"], expected, atol=1e-5)


def answer_of(request: urllib.request.Request, server: subprocess.Popen[bytes], log: Path) -> Any:
    """Ask a server that may still be starting."""
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            if server.poll() is not None:
                raise AssertionError(log.read_text()) from None
            time.sleep(0.2)
