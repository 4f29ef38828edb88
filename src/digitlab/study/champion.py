"""From candidates to the champion: which fits are needed, and who is selected."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from digitlab.base.choice import NOTHING_CHOSEN, Choice, choose, choose_least_costly, read_right
from digitlab.base.statistics import accuracy_interval, estimate
from digitlab.config.recorded import with_values
from digitlab.config.types import Config
from digitlab.study.goal import Goal, TrialRow, distinct, promotable

# Seeds of the confirmation and of the final fits, counted from the trials' own seed, so that no
# fit that selects shares a seed with one that is reported.
_CONFIRM_SEEDS = 1
_FINAL_SEEDS = 1001
_MEASURE_SEEDS = 2001
_AT_ONCE = 2  # fits of a round, whoever trains them: how many workers there are decides nothing


Results = dict[str, dict[str, Any]]  # by key of a fit: its metrics, or {"failed": reason}


@dataclass(frozen=True)
class Fit:
    """One configuration to be trained, because of the trial that it came from."""

    kind: str  # confirm, measure, final or unpruned
    number: int  # of the trial
    seed: int
    config: Config

    @property
    def key(self) -> str:
        return f"{self.number}/{self.seed}"

    @property
    def tags(self) -> tuple[str, str, str]:
        """Kind, number of the trial, and seed, as its run is tagged."""
        return self.kind, str(self.number), str(self.seed)


def finished_results(results: Results) -> Results:
    """Return the results of the fits that did not fail."""
    return {key: metrics for key, metrics in results.items() if "failed" not in metrics}


def candidates(
    rows: Sequence[TrialRow], most: int, own: Mapping[str, Any] | None, goal: Goal
) -> list[TrialRow]:
    """Return the best finished trials with different values, best first.

    Those that meet all bounds; if none does, the one that comes nearest. Of a front with more than
    `most` trials, those that divide it evenly. Where one objective leaves a choice, a trial with
    the recipe's own values is one more: what the search was worth is measured from it.
    """
    best = distinct(goal.best_first(rows))
    met = [row for row in best if goal.meets(row)]
    if not met:
        return best[:1]
    if goal.is_front:
        on_front = {row.number for row in goal.front(rows)}
        front = [row for row in met if row.number in on_front]
        places = [round(i * (len(front) - 1) / max(1, most - 1)) for i in range(most)]
        return [front[place] for place in places] if len(front) > most else front
    chosen = met[:most]
    if most > 1:
        chosen += [row for row in met[most:] if row.values == own]
    return chosen


def confirm_fits(config: Config, rows: Sequence[TrialRow], results: Results) -> list[Fit]:
    """Return the next round of the candidates' fits on new seeds; none when all is decided.

    First each has one; then those between which it is undecided have one more, two at a time, the
    least trained first, since that lowers the variance of a difference most. A round depends on the
    results of the earlier rounds alone, so that a driver that was killed comes to the same ones,
    and one with a larger budget goes on behind them: it uses all fits of the same candidates.
    A single candidate is confirmed only where it must be shown to be accurate enough.
    """
    left = config.study.confirm_fits - len(results)
    is_chosen = len(rows) < 2 and Goal.of(config.study).required_accuracy is None
    if left <= 0 or is_chosen:
        return []
    counts = {row.number: len(_of(results, row.number)) for row in rows}
    numbers = [number for number, count in counts.items() if not count]
    if not numbers:
        choice = select_champion(config, rows, finished_results(results))
        numbers = list(choice.undecided) if choice else []
        numbers = sorted(numbers, key=counts.__getitem__)[:_AT_ONCE]
    values = {row.number: row for row in rows}
    chosen = [(values[number], _CONFIRM_SEEDS + counts[number]) for number in numbers[:left]]
    return [_fit(config, row, "confirm", seed) for row, seed in chosen]


def measure_fits(config: Config, champion: TrialRow, own: TrialRow | None) -> list[Fit]:
    """Return fits of the champion and of the recipe's own values on seeds that did not choose.

    The candidate that won the confirmation was lucky there: these say what it is worth.
    """
    rows = [champion] if own is None or own == champion else [champion, own]
    seeds = range(config.study.measure_seeds)
    return [_fit(config, row, "measure", _MEASURE_SEEDS + seed) for seed in seeds for row in rows]


def unpruned_fits(config: Config, rows: Sequence[TrialRow]) -> list[Fit]:
    """Return the pruned trials that were closest to going on, to be trained to the end.

    Those whose values another trial has trained to the end are left out.
    """
    best = promotable(rows, Goal.of(config.study))[: config.study.audit_pruning]
    return [_fit(config, row, "unpruned", 0) for row in best]


def final_fits(config: Config, row: TrialRow) -> list[Fit]:
    """Return the champion's fits on all training images, each to be tested once."""
    seeds = range(config.study.final_seeds)
    return [_fit(config, row, "final", _FINAL_SEEDS + seed) for seed in seeds]


def _fit(config: Config, row: TrialRow, kind: str, offset: int) -> Fit:
    seed = (config.trainer.seed + offset) % 2**31
    values = {
        "trainer.seed": seed,
        "data.evaluate_on": "test" if kind == "final" else "validation",
    }
    return Fit(kind, row.number, seed, with_values(config, row.values | values))


def select_champion(config: Config, rows: Sequence[TrialRow], confirmed: Results) -> Choice | None:
    """Choose among the candidates by their fits on new seeds; None where no fit finished.

    The accuracy that made a trial a candidate is left out: it was picked for being high. A
    candidate none of whose fits finished drops out. Cost is the objective that is one, else
    floating-point operations of training, which do not depend on the machine.
    """
    goal = Goal.of(config.study)
    found = {row.number: _of(confirmed, row.number) for row in rows}
    groups = {number: read_right(notes) for number, notes in found.items() if notes}
    costs = {row.number: (row.metric(goal.cost), row.number) for row in rows}
    if not groups:
        return None
    if goal.required_accuracy is None:
        return choose(groups, costs, config.study.margin)
    return choose_least_costly(groups, costs, goal.required_accuracy)


def _of(results: Results, number: int) -> list[dict[str, Any]]:
    """Return the results of the fits of one trial."""
    return [found for key, found in results.items() if key.split("/")[0] == str(number)]


def describe_selection(
    config: Config, choice: Choice | None, own: TrialRow | None, measured: Results
) -> dict[str, Any]:
    """Return what is noted of why a champion was selected, and what it is worth.

    Args:
        choice: None where there was nothing to choose between.
        own: the trial with the recipe's own values.
        measured: results of the fits that measure, but for those that failed.
    """
    if choice is None:
        return NOTHING_CHOSEN
    notes = choice.notes(config.study.margin) | {"own": own and own.number}
    best = _of(measured, choice.best)
    others = _of(measured, own.number) if own and own.number != choice.best else []
    if best:
        notes |= choice.measure(read_right(best), read_right(others) if others else None)
    return notes


def summarise(champion: TrialRow, selection: Mapping[str, Any], finals: Results) -> dict[str, Any]:
    """Return what the study notes of its champion.

    Args:
        selection: as `describe_selection` returns it.
        finals: results of the final fits that did not fail.
    """
    tested = read_right(list(finals.values()))
    found = estimate([tested], 0)
    return {
        "trial": champion.number,
        "values": champion.values,
        "accuracy": champion.value,  # which made it a candidate
        **selection,
        "test_accuracy": dataclasses.asdict(accuracy_interval([tested], 0)),
        # Standard errors: from the seeds, from the images.
        "test_errors": found and [found.over_seeds**0.5, found.over_images**0.5],
        "weights_of": next(iter(finals)),  # not the best one's, which the test set would select
    }


def test_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a champion's test accuracy; one seed has no low and high."""
    interval = summary["test_accuracy"]
    known = {part: interval[part] for part in ("mean", "low", "high") if interval[part] is not None}
    names = {f"test_accuracy_{part}": value for part, value in known.items()}
    return names | {"test_seeds": interval["n"]}
