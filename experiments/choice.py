"""How often the choice of a champion errs: figures of experiments/choice.md, by simulation.

    python experiments/choice.py [DRAWS]     # 2,000 by default: some minutes on one core

A draw is a study's confirmation on 10,000 new validation images. Fits are as they were measured:
0.67 % errors, 0.05 points of standard deviation over seeds, all of it from images that are misread
now and then. The rule and the race are those of the study itself.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from digitlab.base.choice import Choice
from digitlab.base.statistics import Difference, accuracy_interval, estimate
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.study.champion import Results, confirm_fits, select_champion
from digitlab.study.goal import TrialRow

IMAGES, HARD, ERRORS = 10_000, 0.04, 0.0067
ALIKE = 0.9  # of an image's difficulty is the same for all candidates
MEASURED = 2  # fits each after the choice, which selected nothing
DEFICITS = (0.0, 0.0005, 0.001, 0.002)  # of the candidate with the lowest cost

Right = NDArray[np.bool_]


def draw(chance: np.random.Generator, n: int, errors: list[float], spread: float) -> list[Right]:
    """Draw n fits of each candidate: what they read right, by fit and image.

    Args:
        errors: true share of misread images of each candidate.
        spread: of what a seed adds for all images at once, where an image's own luck has 1.
    """
    hard = chance.binomial(IMAGES, HARD)
    difficulty = chance.normal(size=hard)
    made = []
    for share in errors:
        right = np.ones((n, IMAGES), bool)
        own = ALIKE**0.5 * difficulty + (1 - ALIKE) ** 0.5 * chance.normal(size=hard)
        luck = chance.normal(size=(n, hard)) + spread * chance.normal(size=(n, 1))
        right[:, :hard] = own + luck > norm.ppf(share / HARD) * (2 + spread**2) ** 0.5
        made.append(right)
    return made


def old_rule(groups: list[Right], fits: int) -> int:
    """Return the fastest whose interval over seeds overlaps the best one's, as until 0.3."""
    values = np.array([group[:fits].mean(1) for group in groups])
    freedom = values.size - len(values)
    half = t.ppf(0.975, freedom) * (values.var(1).sum() * fits / freedom / fits) ** 0.5
    means = values.mean(1)
    return int(np.flatnonzero(means + 2 * half >= means.max())[0])


def new_rule(
    budget: int, candidates: int, required: float | None = None
) -> Callable[[list[Right]], tuple[Choice, Results]]:
    """Return the study's own rule: what it chooses, and the fits it took.

    Args:
        required: accuracy of a champion whose cost is the objective.
    """
    changes: dict[str, Any] = {"study.confirm_fits": budget, "study.confirm": max(2, candidates)}
    if required is not None:
        changes |= {"study.objectives": ["training_flops"], "study.pruner": "none"}
        changes |= {"study.require.val_accuracy": required}
    config = with_values(compose("sweep", ["experiments=smoke"])[0].config, changes)
    rows = [
        TrialRow(n, "finished", 0.99, {"model.hidden": 16 + n}, {"metrics": {"training_flops": n}})
        for n in range(candidates)
    ]

    def choose(groups: list[Right]) -> tuple[Choice, Results]:
        results: Results = {}
        while fits := confirm_fits(config, rows, results):
            for fit in fits:
                misread = np.flatnonzero(~groups[fit.number][fit.seed - 1]).tolist()
                results[fit.key] = {"images": IMAGES, "misread": misread}
        choice = select_champion(config, rows, results)
        assert choice is not None
        return choice, results

    return choose


def worse_taken(chance: np.random.Generator, draws: int) -> Iterator[str]:
    yield "deficit | old rule | new, 4 fits | settled | fits | new, 8 fits | settled"
    four, eight = new_rule(4, 2), new_rule(8, 2)
    for deficit in DEFICITS:
        found = []
        for _ in range(draws):
            groups = draw(chance, 8, [ERRORS + deficit, ERRORS], 0.0)
            (first, results), (second, _) = four(groups), eight(groups)
            old = old_rule(groups, 2) == 0
            shown = (first.best == 0, first.is_settled, len(results))
            found.append((old, *shown, second.best == 0, second.is_settled))
        shares = np.mean(found, axis=0)
        shown = [f"{100 * share:.0f} %" for share in shares]
        shown[3] = f"{shares[3]:.1f}"
        yield f"{100 * deficit:.2f} | " + " | ".join(shown)


def coverage(chance: np.random.Generator, draws: int) -> Iterator[str]:
    yield "seeds | spread | difference | bound at 95 % | accuracy"
    for spread in (0.0, 0.06):
        for n in (2, 3, 5):
            found = []
            for _ in range(draws):
                groups = draw(chance, n, [ERRORS, ERRORS], spread)
                one = estimate(groups, 0, 1)
                interval = accuracy_interval(groups[:1], 0)
                assert one is not None
                assert interval.low is not None
                assert interval.high is not None
                found.append(
                    (
                        abs(one.value) <= one.reach(0.975),
                        one.value + one.reach(0.95) >= 0,
                        interval.low <= 1 - ERRORS <= interval.high,
                    )
                )
            shares = " | ".join(f"{100 * share:.1f} %" for share in np.mean(found, axis=0))
            yield f"{n} | {spread} | {shares}"


def gains(chance: np.random.Generator, draws: int) -> Iterator[str]:
    """The gain that is printed: the last of three candidates has the recipe's own values."""
    yield "true gain | printed | covered | printed less true | accuracy less true | worse by 0.1"
    rule = new_rule(6, 3)
    for gain in (-0.001, 0.0, 0.0005, 0.001, 0.002):
        found = []
        for _ in range(draws):
            errors = [ERRORS, ERRORS, ERRORS + gain]
            groups = draw(chance, 6 + MEASURED, errors, 0.0)
            choice, _ = rule(groups)
            best, covered, error = choice.best, np.nan, np.nan
            own = groups[2][-MEASURED:] if best != 2 else None
            noted = choice.measure(groups[best][-MEASURED:], own)
            true = errors[2] - errors[best]
            if best != 2:
                one = Difference(**noted["gain"])
                assert one.low is not None
                assert one.high is not None
                covered, error = float(one.low <= true <= one.high), one.value - true
            accuracy = noted["measured"]["mean"] - (1 - errors[best])
            found.append((best != 2, covered, 100 * error, 100 * accuracy, true < -0.0005))
        shares = np.nanmean(np.array(found, float), axis=0)
        yield (
            f"{100 * gain:.2f} | {100 * shares[0]:.0f} % | {100 * shares[1]:.1f} % | "
            f"{shares[2]:+.3f} | {shares[3]:+.3f} | {100 * shares[4]:.0f} %"
        )


def required(chance: np.random.Generator, draws: int) -> Iterator[str]:
    """An accuracy is required, and all candidates have it, or lack it, by the same points."""
    yield "over what is required | candidates | shown to have it | fits of 9"
    for candidates in (2, 3):
        rule = new_rule(9, candidates, 1 - ERRORS)
        for over in (-0.0005, 0.0, 0.001, 0.002):
            found = []
            for _ in range(draws):
                choice, results = rule(draw(chance, 9, [ERRORS - over] * candidates, 0.0))
                found.append((choice.is_settled, len(results)))
            shown, fits = np.mean(found, axis=0)
            yield f"{100 * over:+.2f} | {candidates} | {100 * shown:.1f} % | {fits:.1f}"


if __name__ == "__main__":
    many = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for table in (worse_taken, coverage, gains, required):
        for line in table(np.random.default_rng(0), many):
            print(f"| {line} |", flush=True)
        print()
