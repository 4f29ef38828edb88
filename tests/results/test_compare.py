"""What differs between runs, and whether that may be chance: against scipy, as JSON, as a page."""

import json
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from browsing import Page
from conftest import CallIn
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser
from samples import copy_digits, recorded, studies

from digitlab.base.statistics import Interval, holm, mcnemar, share_interval
from digitlab.cli import main
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.reader import recorded_guesses
from digitlab.results import compare as comparison
from digitlab.results.page import render

RUN = ["experiments=smoke", "data=sample", "model.widths=[4]", "data.batch_size=200"]
RUN += ["trainer.epochs=1"]
RUNS = {
    "one-seed-0": ["name=one-seed-0", "study.name=one"],
    "two-seed-1": ["name=two-seed-1", "study.name=two", "trainer.seed=1"],
    "long-seed-0": ["name=long-seed-0", "study.name=long", "trainer.epochs=4"],
    "tested-seed-0": ["name=tested-seed-0", "study.name=tested", "data.evaluate_on=test"],
}


# ---- statistics ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    both = only_first + only_second
    tails = scipy.stats.binom.cdf(min(only_first, only_second), both, 0.5)
    expected = min(1.0, 2 * float(tails)) if both else 1.0
    assert mcnemar(only_first, only_second) == pytest.approx(expected, abs=1e-12)
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first)


def test_mcnemar_gives_a_textbook_s_number() -> None:
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 2**12)  # by counting


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 10000), st.data())
def test_share_has_wilson_s_interval(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    interval = share_interval(hits / n, n)
    z, share = float(scipy.stats.norm.ppf(0.975)), hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert (interval.low, interval.high) == pytest.approx(
        (max(0, middle - half), min(1, middle + half)), abs=1e-9
    )
    assert (interval.mean, interval.n) == (share, n)


def test_holm_corrects_by_rank_and_never_turns_the_order_round() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


# ---- recorded runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = copy_digits(tmp_path_factory.mktemp("compared") / "lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIGITLAB_HOME", str(folder))
        for overrides in RUNS.values():
            assert main(["train", *RUN, *overrides]) == 0
        yield folder


Compare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def compare(trained: Path, call_in: Any) -> Compare:
    call = call_in(trained)
    return lambda *arguments: call("compare", *arguments)


def right(lab: Path, name: str) -> np.ndarray:
    tracker = MlflowTracker(None, "digitlab", lab)
    guesses, labels = recorded_guesses(tracker, tracker.get(name))
    return np.asarray(guesses == labels)


def test_json_has_what_differs_and_the_test_on_the_same_images(
    compare: Compare, trained: Path
) -> None:
    status, out, err = compare("one-seed-0", "long-seed-0", "--json")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert [run["name"] for run in document["runs"]] == ["one-seed-0", "long-seed-0"]
    parameters = document["differences"]["parameters"]
    assert parameters["trainer.epochs"] == ["1", "4"]
    assert not any(values[0] == values[1] for values in parameters.values())
    assert "val_accuracy" in document["differences"]["metrics"]
    first, second = (right(trained, name) for name in ("one-seed-0", "long-seed-0"))
    [test] = document["tests"]
    assert test["only_first"] == np.flatnonzero(first & ~second).tolist()
    assert test["only_second"] == np.flatnonzero(second & ~first).tolist()
    assert test["images"] == len(first)
    counts = sorted((len(test["only_first"]), len(test["only_second"])))
    assert test["p"] == pytest.approx(scipy.stats.binomtest(counts[0], sum(counts)).pvalue)
    assert test["p_holm"] == test["p"]  # a single test needs no correction


def test_a_run_that_is_named_twice_is_compared_once(compare: Compare) -> None:
    _, once, _ = compare("one-seed-0", "long-seed-0", "--json")
    assert compare("one-seed-0", "long-seed-0", "one-seed-0", "--json")[1] == once


def test_several_pairs_are_corrected_for_their_number(compare: Compare) -> None:
    names = ["one-seed-0", "two-seed-1", "long-seed-0"]
    _, out, _ = compare(*names, "--json")
    document = json.loads(out)
    runs = {run["run_id"]: run["name"] for run in document["runs"]}
    pairs = [tuple(runs[run] for run in test["runs"]) for test in document["tests"]]
    assert pairs == list(combinations(names, 2))
    assert [test["p_holm"] for test in document["tests"]] == pytest.approx(
        holm([test["p"] for test in document["tests"]])
    )
    _, text, _ = compare(*names)
    assert text.count("after Holm's correction for 3 tests") == 3


def test_text_names_the_runs_what_differs_and_the_verdict(compare: Compare) -> None:
    status, out, _ = compare("one-seed-0", "long-seed-0")
    assert status == 0
    assert "trainer.epochs" in out
    assert "McNemar's exact test: p = " in out
    assert "Holm" not in out
    assert ("is hardly chance" in out) != ("could well be chance" in out)


def test_runs_on_other_images_are_not_tested(compare: Compare) -> None:
    _, out, _ = compare("one-seed-0", "tested-seed-0")
    assert "no paired test: they were measured on different images" in out
    _, out, _ = compare("one-seed-0", "tested-seed-0", "--json")
    assert json.loads(out)["tests"][0]["reason"] == "they were measured on different images"


def test_a_study_stands_for_its_best_trials_each_tested_against_the_first(
    tmp_path_factory: pytest.TempPathFactory, call_in: CallIn
) -> None:
    lab = studies(tmp_path_factory)
    call, smoke = call_in(lab), recorded(lab, "smoke")
    status, out, err = call("compare", "smoke/", "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    goal, rows = smoke.store.goal, smoke.store.rows()
    best = [f"smoke-{row.number}" for row in goal.best_first(rows)]
    pruned = [f"smoke-{row.number} (pruned)" for row in goal.best_first(rows, "pruned")]
    names = [*best, *pruned][:5]
    assert len(best) < 5 <= len(best + pruned)
    assert [run["name"] for run in document["runs"]] == names
    runs = {run["run_id"]: run["name"] for run in document["runs"]}
    pairs = [[runs[run] for run in test["runs"]] for test in document["tests"]]
    assert pairs == [[names[0], name] for name in names[1:]]
    whole = [name for name in names[1:] if name in best]
    for (_, name), test in zip(pairs, document["tests"], strict=True):
        assert ("p_holm" in test) == (name in whole)
    _, text, _ = call("compare", "smoke/")
    assert f"{pruned[0]}: no paired test: {pruned[0]} keeps no predictions" in text


ENVIRONMENT = {
    "python": "3.12.1",
    "diff": "",
    "libraries": {"torch": "2.9.0", "numpy": "2.0.0"},
    "untracked": {},
    "numerics": {"threads": 1, "deterministic": True},
}


def test_environments_are_compared_key_by_key(
    compare: Compare, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of an environment is sealed, and this machine has one: others are read."""
    pruned = {key: value for key, value in ENVIRONMENT.items() if key != "numerics"}
    other = ENVIRONMENT | {
        "libraries": {"torch": "2.9.1"},
        "diff": "a\nb\n",
        "untracked": {"src/new.py": "c\n"},
        "numerics": {"threads": 2, "deterministic": True},
    }
    names = ["one-seed-0", "long-seed-0", "two-seed-1"]
    found = dict(zip(names, (ENVIRONMENT, other, pruned), strict=True))
    monkeypatch.setattr(comparison, "recorded_environment", lambda _, row: found[row.name])
    text = compare(*names)[1].split("environment")[1].split("metrics")[0]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert [row for row in rows if row] == [
        ["diff", "none", "2 lines, 911169dd", "none"],
        ["libraries.numpy", "2.0.0", "not recorded", "2.0.0"],
        ["libraries.torch", "2.9.0", "2.9.1", "2.9.0"],
        ["numerics.threads", "1", "2", "not recorded"],
        ["untracked.src/new.py", "not recorded", "1 line, a3a5e715", "not recorded"],
    ]
    values = json.loads(compare(*names, "--json")[1])["differences"]["environment"]
    assert values["numerics.threads"] == [1, 2, None]
    assert json.loads(compare(*names[::2], "--json")[1])["differences"]["environment"] == {}
    assert "environment: no difference" in compare(*names[::2])[1]


def test_an_accuracy_over_seeds_has_the_interval_that_the_study_printed(
    tmp_path_factory: pytest.TempPathFactory, call_in: CallIn
) -> None:
    lab = studies(tmp_path_factory)
    _, out, _ = call_in(lab)("compare", "champion", "smoke/0", "--json")
    metrics = json.loads(out)["differences"]["metrics"]
    champion = recorded(lab, "smoke").store.notes()["champion"]
    tested = metrics["test_accuracy, mean over seeds (95 %)"]
    assert tested == [str(Interval(**champion["test_accuracy"])), None]
    assert all(row[0] is None for name, row in metrics.items() if name.startswith("val_accuracy,"))


def test_same_weights_are_equally_often_right(compare: Compare, trained: Path) -> None:
    assert main(["train", *RUN, "name=twin-seed-0"]) == 0
    _, out, _ = compare("one-seed-0", "twin-seed-0", "--json")
    [test] = json.loads(out)["tests"]
    assert (test["only_first"], test["only_second"], test["p"]) == ([], [], 1.0)


def test_page_is_written_with_the_look_of_the_report(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new" / "page.html"
    monkeypatch.setenv("LC_ALL", "en_US.ISO-8859-1")
    status, out, _ = compare("one-seed-0", "long-seed-0", "--out", str(target))
    assert status == 0
    assert out.endswith(f"written: {target}\n")
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert list(page.sections) == ["Tests", "Parameters", "Environment", "Metrics"]
    assert "trainer.epochs" in page.sections["Parameters"]
    assert "No difference." in page.sections["Environment"]
    assert "McNemar" in page.sections["Tests"]
    assert [html["lang"] for html in page.all("html")] == ["en"]
    assert "one-seed-0" in text.split("<title>")[1].split("</title>")[0]
    # With --json the document stands alone on standard output; the page is written all the same.
    target.unlink()
    status, out, _ = compare("one-seed-0", "long-seed-0", "--json", "--out", str(target))
    assert (status, json.loads(out)["runs"][0]["name"]) == (0, "one-seed-0")
    assert target.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["one-seed-0"], "a comparison needs two"),
        (["one-seed-0", "one-seed-0"], "a comparison needs two"),
        (["smoke/"], "smoke/: no trial of such a study has ended"),
        (["one-seed-0", "noe-seed-0"], "noe-seed-0: no such run, did you mean"),
        (["one-seed-0", "two-seed-1", "--out", "/dev/null/page"], "--out /dev/null/page"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    compare: Compare, arguments: list[str], named: str
) -> None:
    status, _, err = compare(*arguments)
    assert status == 2
    assert named in err
    assert err.count("\n") == 1


def test_names_are_text_in_the_page_and_never_markup() -> None:
    evil = "<script>alert(1)</script>"
    content = {"columns": ["", evil, "b"], "tables": {"parameters": [[evil, "1", "2"]]}}
    page = render("compare.html", evil, sentences=[evil], **content)
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4


def test_page_fits_a_telephone_and_asks_the_network_for_nothing(
    browser: Browser, compare: Compare, tmp_path: Path
) -> None:
    target = tmp_path / "page.html"
    assert compare("one-seed-0", "two-seed-1", "long-seed-0", "--out", str(target))[0] == 0
    page = browser.new_page(viewport={"width": 390, "height": 800})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(target.as_uri())
    assert asked == [target.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("nav a").count() == page.locator("section").count()
    page.close()
