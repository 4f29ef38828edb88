"""Means over seeds and how sure they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of n values with its 95 % confidence interval; n=1 has none: low = high = mean."""

    mean: float
    low: float
    high: float
    n: int

    def overlaps(self, other: "Interval") -> bool:
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        """As a percentage, such as '99.53 % (99.48 to 99.58, n=5)'."""
        spread = f"{self.low:.2%} to {self.high:.2%}, n={self.n}".replace("%", "")
        return f"{self.mean:.2%}".replace("%", " %") + f" ({spread})"


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of independent fractions, cut at 0 and 1.

    Raises:
        ValueError: there are no values.
    """
    return pooled_intervals([values])[0]


def pooled_intervals(groups: Sequence[Sequence[float]]) -> list[Interval]:
    """Intervals of the means of several groups of fractions that share one variance.

    A handful of seeds says little about the spread of one configuration; good configurations
    spread alike, so the spread is estimated from all of them (as in a one-way analysis of
    variance), with as many degrees of freedom as there are values beyond one a group.

    Raises:
        ValueError: a group is empty.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("an interval needs one value or more in each group")
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.var(group)) * len(group) for group in groups)
    intervals = []
    for group in groups:
        mean = math.fsum(group) / len(group)
        half = 0.0
        if freedom:
            deviation = math.sqrt(squares / freedom)
            half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * deviation / math.sqrt(len(group))
        low, high = max(0.0, mean - half), min(1.0, mean + half)
        intervals.append(Interval(mean, low, high, len(group)))
    return intervals


def share_interval(share: float, n: int) -> Interval:
    """Wilson's interval (1927) of a share of n independent cases."""
    z = 1.959964  # of the normal distribution, for 95 %
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half), n)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p of McNemar's test (1947): are two classifiers equally often right?

    Args:
        only_first, only_second: images that one of them alone gets right.
    """
    both = only_first + only_second
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), both, 0.5))) if both else 1.0
