"""Means over seeds, shares of images, probabilities, and how certain they are.

Of scipy it takes `special` alone: `scipy.stats` takes a third of a second to import.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of n values with its 95 % confidence interval; a lone value has none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        """Format as a percentage: '99.53 % (99.48 to 99.58, n=5)', or '99.53 % (n=1)'."""
        spread = ""
        if self.low is not None and self.high is not None:
            spread = f"{self.low:.2%} to {self.high:.2%}, ".replace("%", "")
        return f"{self.mean:.2%} ({spread}n={self.n})".replace("%", " %")


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies with its confidence interval, which single fits lack."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """Format in points: '+0.12 points (0.05 to 0.19)', or '+0.12 points (n=1)'."""
        spread = "n=1"
        if self.low is not None and self.high is not None:
            spread = f"{100 * self.low:.2f} to {100 * self.high:.2f}"
        return f"{100 * self.value:+.2f} points ({spread})"


def mean_interval(values: Sequence[float]) -> Interval:
    """Return Student's interval of the mean of one or more fractions, cut at 0 and 1.

    Raises:
        ValueError: there is no value.
    """
    n = len(values)
    if not n:
        raise ValueError("an interval needs one value or more")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    half = quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def quantile(freedom: float, level: float = (1 + LEVEL) / 2) -> float:
    """Return the quantile of Student's t; the default is that of a two-sided interval."""
    from scipy.special import stdtrit

    return float(stdtrit(min(freedom, _MOST_FREEDOM), level))


_MOST_FREEDOM = 1e9  # beyond which Student's t is the normal distribution to all digits


@dataclass(frozen=True)
class Estimate:
    """A mean accuracy over seeds and images, or a difference of two, and how certain it is."""

    value: float
    over_seeds: float  # variance of the value: of training again on other seeds
    over_images: float  # variance of the value: of other images, beside
    freedom: float  # degrees of freedom of the sum of both

    @property
    def error(self) -> float:
        """The standard error."""
        return math.sqrt(self.over_seeds + self.over_images)

    def reach(self, level: float) -> float:
        """Return how far the bound of that one-sided level lies from the value."""
        return quantile(self.freedom, level) * self.error


@dataclass(frozen=True)
class Spread:
    """Sums of squares over all groups of fits, which each of their estimates needs."""

    freedom: int
    between: float  # of fits in their group
    residual: float  # of fits x images

    @classmethod
    def of(cls, groups: Sequence[NDArray[np.bool_]]) -> "Spread":
        """Return the sums over all groups (fits, images) of whether a fit reads an image right."""
        images, between, residual = groups[0].shape[1], 0.0, 0.0
        for group in groups:
            fits, single = group.mean(1), group.mean(0)
            of_fits = float(np.square(fits - fits.mean()).sum())
            whole = float(group.sum()) - len(group) * float(np.square(single).sum())
            between += of_fits
            residual += whole - images * of_fits
        return cls(sum(len(group) - 1 for group in groups), between, residual)


def estimate(
    groups: Sequence[NDArray[np.bool_]],
    first: int,
    second: int | None = None,
    spread: Spread | None = None,
) -> Estimate | None:
    """Estimate the accuracy of a group of fits, or how much more it is than another group's.

    All fits were measured on the same images, and differ in their seeds: a random model with two
    ways, fits crossed with images and nested in their group, as in studies of many readers and many
    cases (Gallas, Pennello and Myers 2007). The difference is taken image by image. Seeds are not
    paired: two configurations have nothing of a seed in common but its number (the correlation of
    their accuracies was -0.1 over six seeds). So the spread over seeds is estimated from all groups
    together, as in an analysis of variance; it is hardly less than fits spread that differ at
    single images alone, which the images tell precisely. Degrees of freedom: Satterthwaite (1946)
    in the form of Hillis (2007). Coverage: experiments/choice.md.

    Args:
        groups: of each group, whether each fit reads each image right: (fits, images).
        spread: `Spread.of(groups)`, for a caller who needs many estimates.

    Returns:
        The estimate; None where no group has two fits, so that nothing is known of the spread.
    """
    images, sums = groups[0].shape[1], spread or Spread.of(groups)
    freedom = sums.freedom
    if not freedom:
        return None
    difference, weight = groups[first].mean(0), 1 / len(groups[first])
    if second is not None:
        difference = difference - groups[second].mean(0)
        weight += 1 / len(groups[second])
    of_seeds = weight * sums.between / freedom
    explained = weight * sums.residual / (freedom * (images - 1) * images)
    of_images = float(np.var(difference, ddof=1)) / images
    if second is not None:  # as if they differed at one image at least: no difference is certain
        of_images = max(of_images, 1 / images**2)
    over_seeds = max(of_seeds, _LEAST_SPREAD * explained)
    over_images = max(0.0, of_images - explained)
    is_known = of_seeds < over_seeds or not of_seeds
    known = math.inf if is_known else freedom * ((over_seeds + over_images) / of_seeds) ** 2
    return Estimate(float(difference.mean()), over_seeds, over_images, known)


# By how much fewer seeds than needed may understate their spread: the coverage of intervals, as
# simulated in experiments/choice.py, is between 93 and 97 % at two to five seeds.
_LEAST_SPREAD = 0.8  # of what fits that differ at single images alone would spread


def accuracy_interval(
    groups: Sequence[NDArray[np.bool_]], place: int, level: float = (1 + LEVEL) / 2
) -> Interval:
    """Return the interval of a group's accuracy over seeds and images; none of a single fit.

    It is Wilson's (1927), for as many independent images as would make it as certain as it is
    (Franco et al. 2019): near 100 % it stays below, and has a width where nothing is misread.
    """
    n, images = groups[place].shape
    found, mean = estimate(groups, place), float(groups[place].mean())
    if found is None or n < 2:
        return Interval(mean, None, None, n)
    # The square of the quantile, divided by the effective number of images.
    error = max(found.error, 1 / images)
    square = (quantile(found.freedom, level) * error) ** 2 / max(mean * (1 - mean), 1 / images)
    return Interval(mean, *_wilson(mean, square), n)


def accuracy_difference(groups: Sequence[NDArray[np.bool_]], first: int, second: int) -> Difference:
    """Return how much more accurate a group is than another; a single fit has no interval."""
    value = float(groups[first].mean() - groups[second].mean())
    found = estimate(groups, first, second)
    if found is None or min(len(groups[first]), len(groups[second])) < 2:
        return Difference(value, None, None)
    half = found.reach((1 + LEVEL) / 2)
    return Difference(value, value - half, value + half)


def _wilson(share: float, square: float) -> tuple[float, float]:
    """Return the ends of Wilson's interval; `square` is of the quantile, over the cases' number."""
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def share_interval(share: float, n: int) -> Interval:
    """Return Wilson's interval (1927) of a share of n independent cases."""
    return Interval(share, *_wilson(share, quantile(math.inf) ** 2 / n), n)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test (1947): are two classifiers equally good?

    Args:
        only_first, only_second: images that one of them alone gets right.
    """
    from scipy.special import bdtr  # the binomial distribution

    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method (1979), in the given order."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the probabilities (N, 10) that logits (N, 10) stand for."""
    risen = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(risen / risen.sum(1, keepdims=True))


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Return the number above 0 by which to divide logits (N, 10) for the least cross-entropy.

    Divided by it, a network's probabilities match how often they are right (Guo et al. 2017).
    """
    from scipy.optimize import minimize_scalar

    below = logits.astype(np.float64) - logits.max(1, keepdims=True)
    true = np.take_along_axis(below, labels[:, None].astype(np.int64), 1)[:, 0]

    def loss(logarithm: float) -> float:
        temperature = math.exp(logarithm)
        sums = np.log(np.exp(below / temperature).sum(1))
        return float((sums - true / temperature).mean())

    return float(math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))
