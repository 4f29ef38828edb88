"""What differs between two trainings of one configuration, and the verdict on a reproduction."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from digitlab.base.errors import visible
from digitlab.base.statistics import LEVEL, mcnemar, quantile
from digitlab.records.reader import accuracy_name, over_seeds, recorded_guesses
from digitlab.records.tracker import RunRow, Tracker

IDENTICAL, WITHIN = "identical", "within tolerance"
NOT_REPRODUCED, INCOMPARABLE = "not reproduced", "not comparable"
EXIT_STATUS = {IDENTICAL: 0, WITHIN: 0, NOT_REPRODUCED: 1, INCOMPARABLE: 3}
_COMPARED = ("train_", "val_", "test_")  # metrics; the others are times

# What a difference is expected to do to a result.
_NOTHING = "should change nothing"
_ROUNDING = "can change floating-point rounding, and so the weights"
_RESULT = "can change the result"
_ANYTHING = "can change anything"  # so that other results are of something else
# Libraries that no number of a training passes through; any other one can change the result.
_APART = (
    *("digitlab", "alembic", "fastapi", "filelock", "jinja2", "markupsafe", "matplotlib", "mlflow"),
    *("mlflow-skinny", "mlflow-tracing", "optuna-dashboard", "pandas", "pillow", "plotly"),
    *("python-dotenv", "requests", "rich", "sqlalchemy", "starlette", "uvicorn"),
    *("hypothesis", "mypy", "pip", "playwright", "pytest", "ruff", "setuptools", "uv"),
)
_EFFECTS = {
    "source": _ANYTHING,
    "data": _ANYTHING,
    "study.workers": "gives trials another history to learn from",
    "study.minutes": "ends the study at another trial",
    "trainer.threads": _ROUNDING,
    "trainer.device": _ROUNDING,
    "python": _ROUNDING,
    "platform": _ROUNDING,
    "processor": _ROUNDING,
    **{f"libraries.{name}": _ROUNDING for name in ("torch", "torchvision", "numpy")},
    **{f"libraries.{name}": _NOTHING for name in _APART},
}


@dataclass(frozen=True)
class Change:
    """One thing that has changed since the run was recorded, and its expected effect."""

    name: str
    was: Any
    now: Any

    @property
    def effect(self) -> str:
        if self.name.startswith(("numerics.", "libraries.nvidia", "libraries.cuda")):
            return _ROUNDING
        if self.name == "platform" and _without_kernel(self.was) == _without_kernel(self.now):
            return _NOTHING
        unknown = _RESULT if self.name.startswith("libraries.") else _NOTHING
        return _EFFECTS.get(self.name, unknown)

    @property
    def is_harmless(self) -> bool:
        return self.effect == _NOTHING

    def __str__(self) -> str:
        if self.name in ("diff", "untracked"):
            return f"uncommitted changes ({self.name}) differ: {self.effect}"
        return visible(f"{self.name} was {self.was}, is {self.now}: {self.effect}")


def _without_kernel(platform: Any) -> str:
    """Return machine and C library of `platform.platform()` on Linux: training calls no kernel."""
    return re.sub(r"^Linux-.*-(\w+-with-)", r"Linux-\1", str(platform))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return what differs between two environments; libraries and numerics one by one."""
    found = []
    for key in sorted(then.keys() | now.keys()):
        was, is_now = then.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(is_now, Mapping) and key != "untracked":
            inner = differences(was, is_now)
            found += [replace(item, name=f"{key}.{item.name}") for item in inner]
        elif was != is_now:
            found.append(Change(key, was, is_now))
    return found


@dataclass(frozen=True)
class Verdict:
    """The outcome of training a run again."""

    verdict: str
    differences: list[str]
    run_id: str | None
    original_run_id: str

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.verdict]

    def show(self, as_json: bool, name: str) -> None:
        """Print it."""
        if as_json:
            print(json.dumps(asdict(self), indent=1))
        else:
            for difference in self.differences:
                print(f"  {difference}")
            again = f" and its reproduction {self.run_id}" if self.run_id else ""
            print(f"{self.verdict}: {name} ({self.original_run_id}){again}")


def reach_verdict(
    tracker: Tracker, row: RunRow, again: RunRow, found: Sequence[Change]
) -> tuple[str, list[str]]:
    """Return the verdict on two runs of one configuration, and the reasons for it.

    Where nothing differs that can change a bit, a changed bit means that the run is not reproduced.
    Where code or data do, the runs cannot be compared unless all bits are equal. Where anything
    else does, accuracies may lie as far apart as chance would have them; beyond that the two runs
    cannot be compared, since the difference may well be the cause.
    """
    changed = compare_runs(tracker, row.run_id, again.run_id)
    if not changed:
        return IDENTICAL, []
    if all(difference.is_harmless for difference in found):
        return NOT_REPRODUCED, changed
    if any(difference.effect == _ANYTHING for difference in found):
        return INCOMPARABLE, changed
    is_chance, reason = _may_be_chance(tracker, row, again)
    return (WITHIN if is_chance else INCOMPARABLE), [*changed, reason]


def _may_be_chance(tracker: Tracker, row: RunRow, again: RunRow) -> tuple[bool, str]:
    """Return whether the accuracies lie no further apart than by chance in 95 of 100 cases."""
    name = accuracy_name(row)
    seeds = [one.metrics[name] for one in over_seeds(tracker, row)]
    distance = abs(row.metrics[name] - again.metrics.get(name, 0.0))
    if len(seeds) >= 3:
        # Of a difference of two runs, from a deviation that so few seeds tell: Student's t.
        deviation = float(np.std(seeds, ddof=1))
        tolerance = quantile(len(seeds) - 1) * 2**0.5 * deviation
        return distance <= tolerance, (
            f"{name} is {distance:.4f} off; {tolerance:.4f} is tolerated: two seeds differ so, "
            f"from a deviation of {deviation:.5f} over {len(seeds)} seeds"
        )
    first, second = (g == y for g, y in (recorded_guesses(tracker, run) for run in (row, again)))
    only = int((first & ~second).sum()), int((second & ~first).sum())
    p = mcnemar(*only)
    return p >= 1 - LEVEL, (
        f"{name} is {distance:.4f} off: {sum(only)} images are right in one alone, {only[0]} of "
        f"them in the first; p = {p:.3g} by McNemar's exact test, {1 - LEVEL:.2f} is tolerated"
    )


def compare_runs(tracker: Tracker, original: str, again: str) -> list[str]:
    """Return what differs in the results: metrics of every epoch, weights, predictions, data."""
    found = []
    was, now = (
        {(n, step): value for n, step, value in tracker.history(run) if n.startswith(_COMPARED)}
        for run in (original, again)
    )
    for name, step in sorted(was.keys() | now.keys()):
        before, after = was.get((name, step)), now.get((name, step))
        if before != after:
            found.append(f"{name} of epoch {step} was {before}, is {after}")
    tags = [tracker.get(run).tags for run in (original, again)]
    for name in ("weights", "predictions", "data"):
        digests = [tag.get(f"digitlab.{name}_sha256") for tag in tags]
        if digests[0] != digests[1]:
            found.append(f"SHA-256 of the {name} was {digests[0]}, is {digests[1]}")
    return found
