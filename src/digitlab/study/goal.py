"""What a study looks for: its trials as rows, and which of them are best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.study import StudyDirection

from digitlab.config.types import Objective, StudyConfig


@dataclass(frozen=True)
class TrialRow:
    """A trial; `values` are in the configuration's terms."""

    number: int
    state: str  # waiting, running, finished, pruned or failed
    value: float | None  # validation accuracy: the last of a finished trial, else of its last rung
    values: dict[str, Any]
    notes: dict[str, Any]  # metrics, curve, reason, attempt (from 1), charged (failed attempts)
    objectives: list[float] | None = None  # Optuna's values, where the trial has any

    @property
    def is_ended(self) -> bool:
        return self.state in ("finished", "pruned", "failed")

    @property
    def attempt(self) -> int:
        return int(self.notes.get("attempt", 1))

    @property
    def seconds(self) -> float:
        """What its training took; nothing where its result was taken from another trial."""
        metrics = {} if "taken_from" in self.notes else self.notes.get("metrics", {})
        return float(metrics.get("seconds", 0.0))

    def metric(self, name: Objective) -> float:
        """Return what an objective is for the trial; a cost that is not known is infinite."""
        if name is Objective.val_accuracy:
            return self.value or 0.0
        return float(self.notes.get("metrics", {}).get(name, math.inf))


@dataclass(frozen=True)
class Goal:
    """The objectives of a study, and what a trial must have to be its champion.

    Accuracy is to be high and everything else, a cost, low. Of two objectives neither comes first:
    the best trials are a Pareto front.
    """

    objectives: tuple[Objective, ...]  # accuracy before a cost
    require: Mapping[Objective, float]  # the least accuracy, the most of a cost

    @classmethod
    def of(cls, study: StudyConfig) -> "Goal":
        bounds = {name: getattr(study.require, name) for name in Objective}
        given = {name: bound for name, bound in bounds.items() if bound is not None}
        return cls(tuple(name for name in Objective if name in study.objectives), given)

    @property
    def is_front(self) -> bool:
        return len(self.objectives) > 1

    @property
    def has_cost(self) -> bool:
        return self.objectives[-1] is not Objective.val_accuracy

    @property
    def cost(self) -> Objective:
        """What decides between trials that are accurate enough."""
        return self.objectives[-1] if self.has_cost else Objective.training_flops

    @property
    def required_accuracy(self) -> float | None:
        """The accuracy that a cost is searched with; None where accuracy is an objective."""
        is_objective = Objective.val_accuracy in self.objectives
        return None if is_objective else self.require[Objective.val_accuracy]

    @property
    def directions(self) -> list[StudyDirection]:
        maximized, minimized = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
        return [maximized if _is_gain(name) else minimized for name in self.objectives]

    def values(self, row: TrialRow) -> list[float]:
        """Return what Optuna gets of a trial."""
        return [row.metric(name) for name in self.objectives]

    def violations(self, row: TrialRow) -> dict[str, float]:
        """Return by which share each bound is missed, as Optuna's constraints: > 0 where it is."""
        shares = {name: row.metric(name) / bound - 1 for name, bound in self.require.items()}
        return {str(name): -x if _is_gain(name) else x for name, x in shares.items()}

    def meets(self, row: TrialRow) -> bool:
        return all(share <= 0 for share in self.violations(row).values())

    def best_first(self, rows: Sequence[TrialRow], state: str = "finished") -> list[TrialRow]:
        """Return the trials of a state, best first; of equal ones the earlier first.

        Those that meet all bounds come first, and of two objectives those on the front of these.
        """
        ended = [row for row in rows if row.state == state and row.value is not None]
        front = {row.number for row in self.front(ended)} if self.is_front else set()
        first, sign = self.objectives[0], -1 if _is_gain(self.objectives[0]) else 1

        def key(row: TrialRow) -> tuple[float, bool, float, float, int]:
            # It is asked for often, of ten thousand trials.
            missed = sum(max(0.0, x) for x in self.violations(row).values()) if self.require else 0
            is_behind = self.is_front and row.number not in front
            accuracy = row.value or 0.0  # which decides between trials of equal cost
            return missed, is_behind, sign * row.metric(first), -accuracy, row.number

        return sorted(ended, key=key)

    def front(self, rows: Sequence[TrialRow]) -> list[TrialRow]:
        """Return the finished trials that meet all bounds and that no other such one dominates."""
        met = [row for row in rows if row.state == "finished" and self.meets(row)]
        kept: list[TrialRow] = []
        for row in sorted(met, key=self._losses):  # by the first loss: the last one must fall
            losses, best = self._losses(row), self._losses(kept[-1]) if kept else [math.inf]
            if losses[-1] < best[-1] or losses == best:
                kept.append(row)
        return sorted(kept, key=lambda row: row.number)

    def _losses(self, row: TrialRow) -> list[float]:
        return [(-1 if _is_gain(name) else 1) * row.metric(name) for name in self.objectives]

    def describe(self, row: TrialRow) -> str:
        """Return a trial's accuracy, and its cost where that is an objective."""
        accuracy = f"{row.metric(Objective.val_accuracy):.2%}"
        return f"{accuracy}, {self._cost_text(row)}" if self.has_cost else accuracy

    def _cost_text(self, row: TrialRow) -> str:
        cost = row.metric(self.cost)
        is_size = self.cost is Objective.model_parameters
        return f"{cost:,.0f} parameters" if is_size else f"{cost:.3g} operations"

    def aim(self) -> str:
        """Return what is searched for: `low model_parameters, val_accuracy >= 0.99`."""
        wanted = [f"{'high' if _is_gain(one) else 'low'} {one}" for one in self.objectives]
        bounds = [f"{k} {'>=' if _is_gain(k) else '<='} {v:g}" for k, v in self.require.items()]
        return ", ".join([" and ".join(wanted), *bounds])

    def notes(self, rows: Sequence[TrialRow], best: Sequence[TrialRow]) -> dict[str, Any]:
        """Return what is noted of a choice among the best of the trials, for the texts on it."""
        return {
            "cost": str(self.cost),
            "costs": {row.number: self._cost_text(row) for row in best if self.has_cost},
            "required": self.required_accuracy,
            "front": [row.number for row in distinct(self.front(rows))] if self.is_front else [],
            "meets_require": any(map(self.meets, best)),
        }


def distinct(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials with different values, of equal ones the first."""
    first: dict[str, TrialRow] = {}
    for row in rows:
        first.setdefault(repr(sorted(row.values.items())), row)
    return list(first.values())


def promotable(rows: Sequence[TrialRow], goal: Goal) -> list[TrialRow]:
    """Return the pruned trials whose values no trial has been given to train to the end."""
    others = [row.values for row in rows if row.state != "pruned"]
    return [row for row in goal.best_first(rows, "pruned") if row.values not in others]


def _is_gain(name: Objective) -> bool:
    return name is Objective.val_accuracy
