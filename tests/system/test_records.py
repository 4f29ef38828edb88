"""The board of records: its recipes are small enough, and its lines say what was recorded."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import figures
import pytest
import records
import torch

from digitlab.base.paths import ROOT
from digitlab.config.compose import compose
from digitlab.networks.table import build_network
from digitlab.records.reader import lab_tracker, recorded_guesses, recorded_logits
from digitlab.training.evaluate import count_parameters

BOARD = (ROOT / "experiments" / "records.md").read_text()
RECORDED = json.loads(records.FILE.read_text())["figures"]


@pytest.mark.parametrize("record", records.TARGETS)
def test_a_record_s_recipe_composes_and_is_below_its_limit(record: str) -> None:
    config = compose("train", records.overrides(record, records.ALL, 3))[0].config
    assert (config.data.evaluate_on, config.data.images, config.trainer.seed) == ("test", 0, 3)
    largest = records.TARGETS[record][1]
    assert largest is None or count_parameters(build_network(config.model)) < largest


@pytest.mark.parametrize("words", ["records.py best", "robust.py champion"])
def test_a_program_that_cannot_use_the_lab_says_so_in_one_line(tmp_path: Path, words: str) -> None:
    (tmp_path / "file").touch()
    environment = {**os.environ, "DIGITLAB_HOME": str(tmp_path / "file" / "lab")}
    name, argument = words.split()
    command = [sys.executable, str(ROOT / "experiments" / name), argument]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}: ")
    assert str(tmp_path / "file" / "lab") in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("images", records.CURVE_IMAGES)
def test_every_point_of_the_curve_composes(images: int) -> None:
    data = compose("train", records.overrides("curve", images, 3))[0].config.data
    assert (data.images or records.ALL, data.split_seed) == (images, 3)
    assert data.batch_size <= images


def test_the_board_prints_what_was_recorded() -> None:
    assert list(figures.problems(BOARD)) == []
    kinds = {printed for printed, *_ in figures.COMMENT.findall(BOARD)}
    assert kinds >= {"records", "runs", "curve", "votes"}


@pytest.mark.parametrize("figure", RECORDED, ids=lambda figure: figure["name"])
def test_what_was_recorded_is_of_different_runs_of_a_small_network(figure: dict[str, Any]) -> None:
    assert len(figure["values"]) == len(set(figure["run_ids"])) == len(figure["run_ids"])
    assert figure["largest"] is None or figure["parameters"] < figure["largest"]


ROW = {"name": "small500", "least": 0.98, "parameters": 454, "commit": "0123456789"}
ROW |= {"date": "2026-11-26", "values": [0.981, 0.982, 0.983], "run_ids": ["a" * 32] * 3}


def test_a_record_is_met_where_its_mean_is_shown_to_exceed_the_target() -> None:
    line = (
        "| `small500` | 98.00 % | 98.20 % (97.95 to 98.45, n=3) | 0.037 | not met | 454 | 0123456 "
    )
    assert figures.record_row(ROW) == f"{line}| 2026-11-26 |"
    assert "| 0.0065 | met |" in figures.record_row({**ROW, "values": [0.985, 0.986, 0.984]})
    assert "98.50 % (n=1) | 1 | not met" in figures.record_row({**ROW, "values": [0.985]})


@pytest.mark.parametrize("change", ["98.20", "454", "n=3", "not met", "0123456", "aaaaaaaa"])
def test_a_line_of_the_board_that_differs_from_the_record_is_found(
    tmp_path: Path, change: str
) -> None:
    (tmp_path / "records.json").write_text(json.dumps({"figures": [ROW]}))
    rows = f"{figures.record_row(ROW)}\n\n<!-- records = records.json -->\n\n"
    rows += f"{figures.runs_row(ROW)}\n\n<!-- runs = records.json -->\n"
    sources = f"{rows}\nSource: a test."
    assert list(figures.problems(sources, tmp_path)) == []
    assert len(list(figures.problems(sources.replace(change, "x"), tmp_path))) == 1


@pytest.mark.slow
def test_a_stopped_measurement_goes_on_and_a_changed_recipe_begins_anew(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["experiments=debug", "data=sample", "data.images=0", "data.evaluate_on=test"]
    more: list[str] = []
    monkeypatch.setattr(records, "FILE", tmp_path / "records.json")
    monkeypatch.setattr(records, "overrides", lambda *a: [*words, *more, f"trainer.seed={a[2]}"])
    first = records.measure({"figures": []}, "small500", records.ALL, 1)
    assert json.loads((tmp_path / "records.json").read_text())["figures"] == [first]
    second = records.measure({"figures": [deepcopy(first)]}, "small500", records.ALL, 2)
    assert second["values"][:1] == first["values"]
    assert second["run_ids"][:1] == first["run_ids"]
    assert len(set(second["run_ids"])) == 2
    more.append("optim.learning_rate=0.002")
    document = {"figures": [second]}
    third = records.measure(document, "small500", records.ALL, 1)
    assert [figure["name"] for figure in document["figures"]] == [
        f"small500, until {second['commit'][:7]}",
        "small500",
    ]
    assert len(third["values"]) == 1
    one, other = second["run_ids"]
    tracker = lab_tracker(lab)
    _, labels = recorded_guesses(tracker, tracker.get(one))
    logits = [recorded_logits(tracker, tracker.get(run), len(labels)) for run in (one, other)]
    shares = [torch.from_numpy(each).double().softmax(1).numpy() for each in logits]
    right = ((3 * shares[0] + 2 * shares[1]).argmax(1) == labels).mean()
    assert records.votes([one, other, one, other, one, *[other] * 4]) == [right]
    assert records.votes([other] * 5 + [one] * 5) == second["values"][::-1]
