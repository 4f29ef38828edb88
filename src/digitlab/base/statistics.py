"""Means over seeds, shares of images, and how certain they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of n values with its 95 % confidence interval; a lone value has low = high = mean."""

    mean: float
    low: float
    high: float
    n: int

    def overlaps(self, other: "Interval") -> bool:
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        """Format as a percentage: '99.53 % (99.48 to 99.58, n=5)', or '99.53 % (n=1)'."""
        spread = f"{self.low:.2%} to {self.high:.2%}, ".replace("%", "") if self.n > 1 else ""
        return f"{self.mean:.2%} ({spread}n={self.n})".replace("%", " %")


def mean_interval(values: Sequence[float]) -> Interval:
    """Return Student's interval of the mean of one or more fractions, cut at 0 and 1."""
    return pooled_intervals([values])[0]


def pooled_intervals(groups: Sequence[Sequence[float]]) -> list[Interval]:
    """Return intervals of the means of several groups of fractions that share one variance.

    A handful of seeds says little about the spread of one configuration; good configurations
    spread alike, so the spread is estimated from all of them (as in a one-way analysis of
    variance), with as many degrees of freedom as there are values beyond one a group.

    Raises:
        ValueError: a group is empty.
    """
    from scipy.special import stdtrit

    if not groups or not all(len(group) for group in groups):
        raise ValueError("an interval needs one value or more in each group")
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.var(group)) * len(group) for group in groups)
    reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) if freedom else 0.0
    deviation = math.sqrt(squares / max(freedom, 1))
    intervals = []
    for group in groups:
        mean = math.fsum(group) / len(group)
        half = reach * deviation / math.sqrt(len(group))
        intervals.append(Interval(mean, max(0.0, mean - half), min(1.0, mean + half), len(group)))
    return intervals


def share_interval(share: float, n: int) -> Interval:
    """Return Wilson's interval (1927) of a share of n independent cases."""
    from scipy.stats import binomtest

    found = binomtest(round(share * n), n).proportion_ci(LEVEL, "wilson")
    return Interval(share, float(found.low), float(found.high), n)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test (1947): are two classifiers equally good?

    Args:
        only_first, only_second: images that one of them alone gets right.
    """
    from scipy.stats import binomtest

    both = only_first + only_second
    return float(binomtest(only_first, both).pvalue) if both else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method (1979), in the given order."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
