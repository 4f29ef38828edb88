"""From candidates to the champion: which fits are needed, and who is selected."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from digitlab.base.statistics import Interval, mean_interval, pooled_intervals
from digitlab.config.recorded import with_values
from digitlab.config.types import Config
from digitlab.study.trials import TrialRow, best_first

# Seeds of the confirmation and of the final fits, counted from the trials' own seed, so that no
# fit that selects shares a seed with one that is reported.
_CONFIRM_SEEDS = 1
_FINAL_SEEDS = 1001


Results = dict[str, dict[str, Any]]  # by key of a fit: its metrics, or {"failed": reason}


@dataclass(frozen=True)
class Fit:
    """One configuration to be trained, because of the trial that it came from."""

    kind: str  # confirm or final
    number: int  # of the trial
    seed: int
    config: Config

    @property
    def key(self) -> str:
        return f"{self.number}/{self.seed}"


def finished_results(results: Results) -> Results:
    """Return the results of the fits that did not fail."""
    return {key: metrics for key, metrics in results.items() if "failed" not in metrics}


def candidates(rows: list[TrialRow], most: int) -> list[TrialRow]:
    """Return the best finished trials with different values, best first."""
    chosen: list[TrialRow] = []
    for row in best_first(rows):
        if len(chosen) < most and all(row.values != other.values for other in chosen):
            chosen.append(row)
    return chosen


def confirm_fits(config: Config, rows: Sequence[TrialRow]) -> list[Fit]:
    """Return each candidate on each new seed; none where there is nothing to choose between."""
    seeds = range(config.study.confirm_seeds if len(rows) > 1 else 0)
    return _fits(config, rows, "confirm", [_CONFIRM_SEEDS + seed for seed in seeds])


def unpruned_fits(config: Config, rows: list[TrialRow]) -> list[Fit]:
    """Return the pruned trials that were closest to going on, to be trained to the end."""
    best = best_first(rows, "pruned")[: config.study.audit_pruning]
    return _fits(config, best, "confirm", [0])


def final_fits(config: Config, row: TrialRow) -> list[Fit]:
    """Return the champion's fits on all training images, each to be tested once."""
    seeds = [_FINAL_SEEDS + seed for seed in range(config.study.final_seeds)]
    return _fits(config, [row], "final", seeds)


def _fits(config: Config, rows: Sequence[TrialRow], kind: str, offsets: Sequence[int]) -> list[Fit]:
    fits = []
    for row in rows:
        for offset in offsets:
            seed = (config.trainer.seed + offset) % 2**31
            values = {
                "trainer.seed": seed,
                "data.evaluate_on": "test" if kind == "final" else "validation",
            }
            fits.append(Fit(kind, row.number, seed, with_values(config, row.values | values)))
    return fits


@dataclass(frozen=True)
class Choice:
    """The champion, the candidates it was selected from and why."""

    champion: TrialRow
    intervals: dict[int, Interval]  # validation accuracy over the new seeds, by trial number
    tied: list[int]  # numbers of the candidates whose interval overlaps the best one's


def select_champion(rows: Sequence[TrialRow], confirmed: Results) -> Choice:
    """Select the best mean validation accuracy over new seeds; of those tied, the cheapest.

    The accuracy that made a trial a candidate is left out: it was picked for being high. A
    candidate without any result has failed on every new seed, and drops out. Cost is
    floating-point operations of training, which do not depend on the machine.
    """
    groups = {
        row.number: [m["val_accuracy"] for key, m in confirmed.items() if _is_of(key, row)]
        for row in rows
    }
    rows = [row for row in rows if groups[row.number]] or rows[:1]
    if not groups[rows[0].number]:
        return Choice(rows[0], {}, [rows[0].number])
    pooled = pooled_intervals([groups[row.number] for row in rows])
    intervals = dict(zip((row.number for row in rows), pooled, strict=True))
    best = max(intervals.values(), key=lambda interval: interval.mean)
    tied = [row for row in rows if intervals[row.number].overlaps(best)]
    champion = min(tied, key=lambda row: (_cost(row), row.number))
    return Choice(champion, intervals, [row.number for row in tied])


def _is_of(key: str, row: TrialRow) -> bool:
    return key.split("/", maxsplit=1)[0] == str(row.number)


def _cost(row: TrialRow) -> float:
    """A trial whose cost is not known is no cheap one."""
    return float(row.notes.get("metrics", {}).get("training_flops", float("inf")))


def summarise(choice: Choice, finals: Results) -> dict[str, Any]:
    """Return what the study notes of its champion."""
    tested = [metrics["test_accuracy"] for metrics in finals.values()]
    return {
        "trial": choice.champion.number,
        "values": choice.champion.values,
        "val_accuracy": {n: dataclasses.asdict(i) for n, i in choice.intervals.items()},
        "tied": choice.tied,
        "test_accuracy": dataclasses.asdict(mean_interval(tested)),
        "weights_of": next(iter(finals)),  # not the best one's, which the test set would select
    }


def test_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics by which other programs know a champion's test accuracy."""
    interval = summary["test_accuracy"]
    return {
        "test_accuracy_mean": interval["mean"],
        "test_accuracy_low": interval["low"],
        "test_accuracy_high": interval["high"],
        "test_seeds": interval["n"],
    }
