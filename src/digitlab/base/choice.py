"""Which of several candidates to take, whose fits were all measured on the same images."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from digitlab.base.errors import counted
from digitlab.base.statistics import (
    LEVEL,
    Difference,
    Interval,
    Spread,
    accuracy_difference,
    accuracy_interval,
    estimate,
)

Right = NDArray[np.bool_]  # (fits, images): whether each fit reads each image right


@dataclass(frozen=True)
class Choice:
    """The candidate that was taken, and why."""

    groups: Mapping[int, Right]  # by the number of a candidate
    best: int
    is_settled: bool  # the best is shown to be as good as it must be
    undecided: list[int]  # on whom more fits could decide, in their order; none if all is decided

    def interval(self, number: int) -> Interval:
        """Return the accuracy of a candidate over seeds and images."""
        return accuracy_interval(list(self.groups.values()), list(self.groups).index(number))

    def notes(self, margin: float) -> dict[str, Any]:
        """Return what is noted of the choice, as `describe_choice` reads it."""
        return {
            "val_accuracy": {n: asdict(self.interval(n)) for n in self.groups},
            "is_settled": self.is_settled,
            "is_decided": not self.undecided,
            "margin": margin,
        }

    def measure(self, best: Right, own: Right | None) -> dict[str, Any]:
        """Return what fits on further seeds say of the best, which no choice has made lucky.

        The spread over seeds is estimated from the candidates' fits, too.

        Args:
            best: of the best candidate.
            own: of the recipe's own values; None where these are the best, or were not fitted.
        """
        groups, place = [*self.groups.values(), best], len(self.groups)
        gain = None
        if own is not None:
            groups.append(own)
            gain = asdict(accuracy_difference(groups, place, place + 1))
        return {"measured": asdict(accuracy_interval(groups, place)), "gain": gain}


NOTHING_CHOSEN: dict[str, Any] = {"val_accuracy": {}}  # notes where there was nothing to choose


def choose(
    groups: Mapping[int, Right], costs: Mapping[int, tuple[float, int]], margin: float
) -> Choice:
    """Take the fastest to train of the candidates shown to be at most `margin` worse than the best.

    That is a test of non-inferiority: the upper bounds of its differences to all other candidates
    are at most the margin, each at 5 % divided by the number of the others (Bonferroni), since the
    fastest that passes is taken. Where none passes, the best mean is taken, and the choice is
    settled only if all others are out. A candidate is out where another one is shown to be better,
    by more than the margin if that one costs more.

    Args:
        groups: of each candidate, one fit or more.
        costs: of each candidate, and what decides between equal ones.
    """
    by_mean = sorted(groups, key=lambda n: (-groups[n].mean(), costs[n]))
    by_cost = sorted(groups, key=lambda n: costs[n])
    bounds = _bounds(groups, 1 - (1 - LEVEL) / max(1, len(groups) - 1))

    def is_shown(number: int) -> bool:
        return all(bounds[other, number][1] <= margin for other in groups if other != number)

    def is_out(number: int) -> bool:
        return any(
            bounds[other, number][0] > (margin if costs[other] > costs[number] else 0)
            for other in groups
            if other != number
        )

    shown = next(filter(is_shown, by_cost), None)
    best = by_mean[0] if shown is None else shown
    rivals = by_cost if shown is None else by_cost[: by_cost.index(shown)]
    rivals = [number for number in rivals if number != best and not is_out(number)]
    undecided = [number for number in by_mean if number in (best, *rivals)] if rivals else []
    return Choice(groups, best, shown is not None or not rivals, undecided)


def choose_least_costly(
    groups: Mapping[int, Right], costs: Mapping[int, tuple[float, int]], required: float
) -> Choice:
    """Take the least costly of the candidates whose accuracy is shown to be at least `required`.

    Their intervals over seeds and images must lie above it, each at 5 % divided by the number of
    candidates (Bonferroni). Where none does, the least costly is taken whose mean does, else the
    best mean, and nothing is shown. A candidate is out where its interval lies below.

    Args:
        groups: of each candidate, one fit or more; a single one shows nothing.
        costs: of each candidate, and what decides between equal ones.
    """
    by_cost = sorted(groups, key=lambda n: costs[n])
    level = 1 - (1 - LEVEL) / len(groups)
    found = {n: accuracy_interval(list(groups.values()), i, level) for i, n in enumerate(groups)}
    lows = {n: 0.0 if one.low is None else one.low for n, one in found.items()}
    highs = {n: 1.0 if one.high is None else one.high for n, one in found.items()}
    means = {number: one.mean for number, one in found.items()}
    shown = next((number for number in by_cost if lows[number] >= required), None)
    likely = [number for number in by_cost if means[number] >= required]
    best = shown if shown is not None else [*likely, max(by_cost, key=means.__getitem__)][0]
    rivals = by_cost if shown is None else by_cost[: by_cost.index(shown)]
    rivals = [number for number in rivals if highs[number] >= required]
    return Choice(groups, best, shown is not None, rivals)


def _bounds(
    groups: Mapping[int, Right], level: float
) -> dict[tuple[int, int], tuple[float, float]]:
    """Return the bounds, each one-sided, of how much better the first of two is than the second."""
    found, given, numbers = {}, list(groups.values()), list(groups)
    spread = Spread.of(given)
    for first, second in itertools.permutations(range(len(given)), 2):
        one = estimate(given, first, second, spread)
        value, half = (one.value, one.reach(level)) if one else (0.0, math.inf)
        found[numbers[first], numbers[second]] = (value - half, value + half)
    return found


def describe_choice(notes: Mapping[str, Any]) -> list[str]:
    """Return why the best was taken, and what the search was worth, from what is noted."""
    found = notes["val_accuracy"].items()
    is_lone = len(found) < (2 if notes.get("required") is None else 1)
    if is_lone and "measured" not in notes:
        return []
    costs = {str(n): f", {cost}" for n, cost in notes["costs"].items()}
    lines = [
        f"  candidate {n}: validation {Interval(**i)} on new seeds{costs.get(str(n), '')}"
        for n, i in found
    ]
    alone = "it is the only candidate that has a finished fit on new seeds"
    lines.append(f"  {alone if is_lone else _describe_verdict(notes)}")
    return [*lines, *_describe_measure(notes)]


def _describe_verdict(notes: Mapping[str, Any]) -> str:
    """Return what the fits on new seeds show of the best of several candidates."""
    spent, budget = (notes["confirm_fits"][key] for key in ("spent", "budget"))
    fits, undecided = counted(spent, "fit"), "does not decide" if spent == 1 else "do not decide"
    best, more = f"candidate {notes['trial']}", f"More fits: study.confirm_fits={2 * budget}"
    least, less = _LEAST[notes["cost"]]
    points, required = f"{100 * notes['margin']:g} points", notes["required"]
    aim = f"at least {100 * required:g} % accurate" if required else f"within {points} of the best"
    if notes["is_settled"] and not notes["is_decided"]:
        whether = f"{fits} {undecided} whether a {less} one is, too"
        return f"{best} is shown to be {aim}; {whether}. {more}"
    if notes["is_settled"]:
        saved = f"; {budget - spent} of {budget} fits saved" if spent < budget else ""
        least = f"{least} that is" if required else least
        return f"it is the {least} {aim}, as shown{saved}"
    if notes["is_decided"]:
        return f"it has the best mean; no candidate is {aim}, as shown by {fits}"
    why = f"has the best mean, but another may truly be more than {points} better"
    if required:
        why = f"is not shown to be {aim}"
    return f"{fits} {undecided}: {best} {why}. {more}"


# What a candidate is called that costs least, or less than another.
_LEAST = {
    "training_flops": ("fastest to train", "faster"),
    "model_parameters": ("smallest", "smaller"),
}


def _describe_measure(notes: Mapping[str, Any]) -> list[str]:
    """Return the champion's accuracy on seeds that did not choose it, and the search's worth."""
    own, lines = notes["own"], list[str]()
    if "measured" in notes:
        measured = Interval(**notes["measured"])
        trial = notes["accuracy"] or 0.0
        shown = f"{trial:.2%}".replace("%", " %")
        excess = round(100 * (trial - measured.mean), 2)
        off = "neither too high nor too low"
        if excess:
            off = f"{abs(excess):.2f} points too {'high' if excess > 0 else 'low'}"
        lines.append(f"  validation {measured} on new seeds again, which did not choose it")
        lines.append(f"    its trial's {shown} was {off}")
    if notes["costs"]:  # the accuracy that it gains is not all that was searched for
        costs = {str(number): cost for number, cost in notes["costs"].items()}
        if str(own) in costs:
            lines.append(f"  the recipe's own values (trial {own}): {costs[str(own)]}")
    elif own == notes["trial"]:
        lines.append(
            f"  the search found nothing better than the recipe's own values (trial {own})"
        )
    elif notes.get("gain"):
        gain = Difference(**notes["gain"])
        verdict, more = "found nothing shown to be better:", ""
        if gain.low is None:
            verdict = "is not shown to be worth anything, by a single seed:"
            more = "; a larger study.measure_seeds may show it"
        elif gain.low > 0:
            verdict = "was worth"
        over = f"over the recipe's own values (trial {own})"
        lines.append(f"  the search {verdict} {gain} {over}{more}")
    return lines


def note_predictions(predictions: NDArray[Any], labels: NDArray[Any]) -> dict[str, Any]:
    """Return what is noted of a fit's predictions: which images it misreads."""
    return {"images": len(labels), "misread": np.flatnonzero(predictions != labels).tolist()}


def read_right(notes: Sequence[Mapping[str, Any]]) -> Right:
    """Return whether each of one fit or more reads each image right, from what is noted."""
    right = np.ones((len(notes), notes[0]["images"]), bool)
    for place, fit in enumerate(notes):
        right[place, fit["misread"]] = False
    return right
