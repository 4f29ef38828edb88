"""What differs between runs, and whether one is right more often than another."""

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from digitlab.base.console import table
from digitlab.base.errors import UserError
from digitlab.base.statistics import mcnemar, mean_interval
from digitlab.records.mlflow import RunRow, Tracking
from digitlab.records.reader import (
    accuracy_name,
    lab_tracking,
    over_seeds,
    recorded_config,
    recorded_environment,
    recorded_guesses,
    trained,
)
from digitlab.results.reproduce import differences

_LISTED = 12  # images that are named on the terminal; --json has all


def compare(
    names: Sequence[str], overrides: Sequence[str], lab: Path, as_json: bool, page: Path | None
) -> int:
    """Print what differs between two or more runs, or write it as JSON or a page; returns 0.

    Raises:
        UserError: a run is not found or did not finish.
    """
    tracking = lab_tracking(lab, overrides)
    rows = [trained(tracking, name) for name in names]
    if len({row.run_id for row in rows}) < 2:
        raise UserError(f"{' '.join(names)}: two different runs or more are needed")
    document = {
        "runs": [{"name": row.name, "run_id": row.run_id} for row in rows],
        "differences": {
            "parameters": _unlike([row.params for row in rows]),
            "environment": _environments(tracking, rows),
            "metrics": _metrics(tracking, rows),
        },
        "tests": [_test(tracking, first, second) for first, second in _pairs(rows)],
    }
    if as_json:
        print(json.dumps(document, indent=1))
        return 0
    group = Group(*_tables(document))
    Console(highlight=False, soft_wrap=True).print(group)
    if page is not None:
        recorded = Console(record=True, file=io.StringIO(), width=40 + 40 * len(rows))
        recorded.print(group)
        try:
            recorded.save_html(str(page))
        except OSError as error:
            raise UserError(f"--page {page}: cannot be written: {error.strerror}") from error
        print(f"written: {page}")
    return 0


def _pairs(rows: Sequence[RunRow]) -> list[tuple[RunRow, RunRow]]:
    return list(itertools.combinations(rows, 2))


def _unlike(sides: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys that have not one value on all sides, with the value on each."""
    keys = sorted({key for side in sides for key in side})
    values = {key: [side.get(key) for side in sides] for key in keys}
    return {key: told for key, told in values.items() if any(v != told[0] for v in told)}


def _environments(tracking: Tracking, rows: Sequence[RunRow]) -> dict[str, list[Any]]:
    """What the first run's environment and the others' say differently."""
    first, *others = (recorded_environment(tracking, row) for row in rows)
    found: dict[str, list[Any]] = {}
    for place, other in enumerate(others, 1):
        for item in differences(first, other):
            told = found.setdefault(item.name, [item.was] * len(rows))
            told[place] = item.now
    return found


def _metrics(tracking: Tracking, rows: Sequence[RunRow]) -> dict[str, list[Any]]:
    """The last metrics that differ; where seeds were tried, also the mean accuracy over them."""
    found: dict[str, list[Any]] = dict(_unlike([row.metrics for row in rows]))
    seeds = [over_seeds(tracking, row) for row in rows]
    if any(len(values) > 1 for values in seeds):
        found["accuracy over seeds"] = [str(mean_interval(values)) for values in seeds]
    return found


def _test(tracking: Tracking, first: RunRow, second: RunRow) -> dict[str, Any]:
    """McNemar's test on the images that both were measured on."""
    told: dict[str, Any] = {"runs": [first.run_id, second.run_id]}
    data = [recorded_config(tracking, row).data for row in (first, second)]
    same = [(d.name, d.evaluate_on, d.validation_images, d.split_seed) for d in data]
    digests = [row.tags["digitlab.data_sha256"] for row in (first, second)]
    if same[0] != same[1] or digests[0] != digests[1]:
        return told | {"none": "they were measured on different images"}
    try:
        rights = [g == y for g, y in (recorded_guesses(tracking, row) for row in (first, second))]
    except UserError as error:
        return told | {"none": str(error)}
    only = [(rights[i] & ~rights[1 - i]).nonzero().flatten().tolist() for i in (0, 1)]
    p = mcnemar(len(only[0]), len(only[1]))
    return told | {
        "test": "McNemar, exact, two-sided",
        "accuracy": accuracy_name(first),
        "images": len(rights[0]),
        "only_first": only[0],
        "only_second": only[1],
        "p": p,
    }


def _tables(document: Mapping[str, Any]) -> list[Table | Text]:
    names = [f"{run['name']} ({run['run_id'][:8]})" for run in document["runs"]]
    shown: list[Table | Text] = []
    for kind, found in document["differences"].items():
        if found:
            lines = [[key, *(_short(value) for value in told)] for key, told in found.items()]
            shown.append(table(kind, ["", *names], lines))
        else:
            shown.append(Text(f"{kind}: no difference"))
    known = {run["run_id"]: name for run, name in zip(document["runs"], names, strict=True)}
    shown += [_sentence(test, [known[run] for run in test["runs"]]) for test in document["tests"]]
    return shown


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sentence(test: Mapping[str, Any], names: Sequence[str]) -> Text:
    if "none" in test:
        return Text(f"{names[0]} and {names[1]}: no paired test: {test['none']}")
    sides = []
    for name, places in zip(names, (test["only_first"], test["only_second"]), strict=True):
        listed = ", ".join(map(str, places[:_LISTED])) + (", ..." if len(places) > _LISTED else "")
        sides.append(f"{len(places)} only by {name}" + (f" (images {listed})" if places else ""))
    judged = "could well be chance" if test["p"] >= 0.05 else "is hardly chance"
    return Text(
        f"of {test['images']} images, right: {'; '.join(sides)}\n"
        f"  McNemar's exact test: p = {test['p']:.3g}, the difference {judged}"
    )
