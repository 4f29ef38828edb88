"""`digitlab compare`: what differs between runs, and whether that may be chance."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from digitlab.base.console import Board, table
from digitlab.base.errors import UserError, counted, nearest, require
from digitlab.base.files import write_output
from digitlab.base.statistics import accuracy_interval, holm, mcnemar
from digitlab.config.recorded import flat
from digitlab.config.types import DataConfig, EvaluateOn
from digitlab.records.reader import (
    accuracy_name,
    find_run,
    lab_tracker,
    over_seeds,
    recorded_config,
    recorded_environment,
    recorded_guesses,
)
from digitlab.records.tracker import RunRow, Tracker

_BEST = 5  # trials that stand for a study
_MOST = 3  # runs of which each pair is tested; of more, the first one with each of the others
_ENDED = ("finished", "pruned")
_LISTED = 12  # images that are named on the terminal; --json has all
SIGNIFICANT = 0.05


def compare(
    names: Sequence[str], overrides: Sequence[str], lab: Path, as_json: bool, out: Path | None
) -> int:
    """Print what differs between two or more runs, or write it as JSON or a page; returns 0.

    Args:
        names: of runs; `STUDY/` is the study's best trials.

    Raises:
        UserError: a run is not found, or is neither finished nor pruned.
    """
    tracker = lab_tracker(lab, overrides)
    # Each once: a run that is named twice is not compared with itself.
    rows = list({row.run_id: row for name in names for row in _named(tracker, name)}.values())
    if len(rows) < 2:
        raise UserError(
            f"{' '.join(names)} names one run: a comparison needs two. Name another one."
        )
    pairs = list(itertools.combinations(rows, 2))
    pairs = pairs if len(rows) <= _MOST else pairs[: len(rows) - 1]
    tests = [paired_test(tracker, *pair) for pair in pairs]
    done = [test for test in tests if "p" in test]
    for test, p in zip(done, holm([test["p"] for test in done]), strict=True):
        test["p_holm"] = p
    document: dict[str, Any] = {
        "runs": [{"name": row.name, "run_id": row.run_id} for row in rows],
        "differences": {
            "parameters": _unlike([row.params for row in rows]),
            "environment": _environments(tracker, rows),
            "metrics": _metrics(tracker, rows),
        },
        "tests": tests,
    }
    are_named = len({row.name for row in rows}) == len(rows)
    columns = ["", *(row.name if are_named else f"{row.name} ({row.run_id[:8]})" for row in rows)]
    tables = {
        kind: [
            [key, *(_cell(kind, key, value) for value in values)] for key, values in found.items()
        ]
        for kind, found in document["differences"].items()
    }
    label = {row.run_id: name for row, name in zip(rows, columns[1:], strict=True)}
    sentences = [_sentence(test, [label[run] for run in test["runs"]], len(done)) for test in tests]
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        board = Board()
        for kind, lines in tables.items():
            board.print(table(kind, columns, lines) if lines else f"{kind}: no difference")
        board.say("\n".join(sentences))
    if out is not None:
        from digitlab.results.page import render

        content = {"columns": columns, "tables": tables, "sentences": sentences}
        page = render("compare.html", " against ".join(columns[1:]), **content)
        write_output(out, page, "--out", lab)
        if not as_json:
            print(f"written: {out}")
    return 0


def _named(tracker: Tracker, name: str) -> list[RunRow]:
    """Return the run of a name; of `STUDY/`, its best trials, the best first."""
    study = name.removesuffix("/")
    if study == name:
        row = find_run(tracker, name)
        state = row.tags.get("digitlab.state", "not one of digitlab's")
        if state not in _ENDED:
            raise UserError(
                f"{row.name} ({row.run_id}) is {state}: only runs that were finished or pruned can "
                "be compared. Name another run."
            )
        return [row]
    trials = tracker.find({"digitlab.kind": "trial"})
    rows = [row for row in trials if row.tags.get("digitlab.study") == study]
    ended = [row for row in rows if row.tags.get("digitlab.state") in _ENDED]
    if not ended:
        known = {row.tags.get("digitlab.study", "") for row in trials}
        raise UserError(f"{name}: no trial of such a study has ended, {nearest(study, known)}")
    return sorted(ended, key=_rank)[:_BEST]


def _rank(row: RunRow) -> tuple[bool, float]:
    accuracy = row.metrics.get("val_accuracy", row.metrics.get("rung_accuracy", 0.0))
    return row.tags["digitlab.state"] != "finished", -accuracy


def _unlike(sides: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys whose values differ between the sides, with the value on each."""
    keys = sorted({key for side in sides for key in side})
    values = {key: [side.get(key) for side in sides] for key in keys}
    return {key: found for key, found in values.items() if any(v != found[0] for v in found)}


def _environments(tracker: Tracker, rows: Sequence[RunRow]) -> dict[str, list[Any]]:
    """Return what differs between the runs' environments, key by key, None where it is missing.

    A run that lacks a whole group, as a pruned one lacks torch's numerics, differs in none of it.
    """
    sides = [recorded_environment(tracker, row) for row in rows]
    leaves = [flat({key: x for key, x in side.items() if x != {}}) for side in sides]
    found = {}
    for key in sorted({key for side in leaves for key in side}):
        values = [side.get(key) for side in leaves]
        pairs = zip(values, sides, strict=True)
        known = [value for value, side in pairs if key.partition(".")[0] in side]
        if any(value != known[0] for value in known):
            found[key] = values
    return found


def _cell(kind: str, key: str, value: Any) -> str:
    """Return a value in few characters; of a changed source what tells it from another."""
    if kind != "environment":
        return _short(value)
    if value is None:
        return "not recorded"
    if not key.startswith(("diff", "untracked")):
        return _short(value)
    digest = hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()
    return f"{counted(len(value.splitlines()), 'line')}, {digest[:8]}" if value else "none"


def _metrics(tracker: Tracker, rows: Sequence[RunRow]) -> dict[str, list[Any]]:
    """Return the last metrics that differ, and the mean accuracy over seeds where there are any.

    The intervals are those of a study, over seeds and images, of the fits of each configuration.
    """
    found: dict[str, list[Any]] = dict(_unlike([row.metrics for row in rows]))
    for name in sorted({accuracy_name(row) for row in rows}):
        seeds = [over_seeds(tracker, row) if accuracy_name(row) == name else [] for row in rows]
        if any(len(fits) > 1 for fits in seeds):
            found[f"{name}, mean over seeds (95 %)"] = [_over_fits(tracker, fits) for fits in seeds]
    return found


def _over_fits(tracker: Tracker, fits: Sequence[RunRow]) -> str | None:
    """Return the mean of the fits whose predictions can be read; None where none can."""
    right = []
    for fit in fits:
        with suppress(UserError):  # of a run that was not named: `audit` finds what it lacks
            guesses, labels = recorded_guesses(tracker, fit)
            right.append(guesses == labels)
    return str(accuracy_interval([np.stack(right)], 0)) if right else None


def paired_test(tracker: Tracker, first: RunRow, second: RunRow) -> dict[str, Any]:
    """Return McNemar's test on the images that both runs were measured on."""
    pair = (first, second)
    result: dict[str, Any] = {"runs": [row.run_id for row in pair]}
    for row in pair:
        if "digitlab.predictions_sha256" not in row.tags:  # pruned, or taken from another trial
            return result | {"reason": f"{row.name} keeps no predictions"}
    data = [recorded_config(tracker, row).data for row in pair]
    images = [_images_of(*one) for one in zip(data, pair, strict=True)]
    if images[0] != images[1] or images[0][0] is None:
        return result | {"reason": "they were measured on different images"}
    try:
        right = [g == y for g, y in (recorded_guesses(tracker, row) for row in pair)]
        require(len(right[0]) == len(right[1]), "predictions.safetensors", "of as many images each")
    except UserError as error:
        return result | {"reason": str(error)}
    only = [(right[i] & ~right[1 - i]).nonzero()[0].tolist() for i in (0, 1)]
    return result | {
        "test": "McNemar, exact, two-sided",
        "accuracy": accuracy_name(first),
        "images": len(right[0]),
        "only_first": only[0],
        "only_second": only[1],
        "p": mcnemar(len(only[0]), len(only[1])),
    }


def _images_of(data: DataConfig, row: RunRow) -> tuple[Any, ...]:
    """Return what decides on which images a run was measured."""
    of_all = (row.tags.get("digitlab.data_sha256"), data.name, data.evaluate_on)
    if data.evaluate_on is EvaluateOn.test:
        return of_all
    return *of_all, data.validation_images, data.split_seed


def in_words(p: float) -> str:
    """Return whether a difference with this p may be chance."""
    return "could well be chance" if p >= SIGNIFICANT else "is hardly chance"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sentence(test: Mapping[str, Any], names: Sequence[str], tests: int) -> str:
    if "p" not in test:
        return f"{names[0]} and {names[1]}: no paired test: {test['reason']}"
    sides = []
    for name, places in zip(names, (test["only_first"], test["only_second"]), strict=True):
        listed = ", ".join(map(str, places[:_LISTED])) + (", ..." if len(places) > _LISTED else "")
        sides.append(f"{len(places)} only by {name}" + (f" (images {listed})" if places else ""))
    chance = in_words(test["p_holm"])
    corrected = f", {test['p_holm']:.3g} after Holm's correction for {tests} tests" * (tests > 1)
    return (
        f"of {test['images']} images, right: {'; '.join(sides)}\n"
        f"  McNemar's exact test: p = {test['p']:.3g}{corrected}; "
        f"between these two networks the difference {chance}, of other seeds it says nothing"
    )
