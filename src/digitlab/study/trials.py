"""One study's trials: drawn, reported, ended, requeued."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from digitlab.base import faults
from digitlab.base.errors import UserError, refuse_damage
from digitlab.base.invocation import command
from digitlab.base.statistics import Interval
from digitlab.config.recorded import config_from_yaml, with_values
from digitlab.config.types import Config, Objective, Pruner, Sampler
from digitlab.study.goal import Goal, TrialRow, promotable
from digitlab.study.mirror import RESULT, MirroredStudy
from digitlab.study.samplers import (
    PROMOTED_FROM,
    ScreeningPruner,
    build_pruner,
    build_sampler,
    count_points,
    searched_space,
)
from digitlab.study.space import Hyperparameter, draw_values, first_values, own_values
from digitlab.study.storage import open_storage, refuse_deleted, require_study, study_notes

_STATES = {
    "waiting": TrialState.WAITING,
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_NAMES = {state: name for name, state in _STATES.items()}


def _row_of(space: Sequence[Hyperparameter], goal: Goal, trial: FrozenTrial) -> TrialRow:
    decode = {one.name: one.decode for one in space}
    values = {k: decode[k](v) if k in decode else v for k, v in trial.params.items()}
    notes = trial.user_attrs.get(RESULT, {})
    value = None
    if trial.values and Objective.val_accuracy in goal.objectives:
        value = trial.values[0]
    elif trial.values:
        value = notes["metrics"]["val_accuracy"]
    elif trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return TrialRow(trial.number, _NAMES[trial.state], value, values, notes, trial.values)


class TrialStore:
    """The trials of one study. The driver alone writes to it."""

    def __init__(
        self, storage: RDBStorage, config: Config, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Open or create `config.study`; UserError if its space cannot be searched."""
        self.storage, self.config = storage, config.study
        self.goal = Goal.of(config.study)
        self.space = searched_space(config)
        self.pruner = build_pruner(self.config)
        self.begin = first_values(config, self.space)
        self.own = own_values(config, self.space)  # the recipe's
        self.mirror = MirroredStudy(
            storage, self.config.name, stopped, self.space, self.goal.directions
        )
        self.study_id = str(self.notes()["study_id"])  # its identity; its name is not one
        self._rows = [_row_of(self.space, self.goal, trial) for trial in self.mirror.trials()]

    @property
    def study(self) -> optuna.Study:
        """Optuna's study, in memory: for its charts."""
        return self.mirror.study

    def notes(self) -> dict[str, Any]:
        """Return what is noted of the study as a whole."""
        return self.mirror.attributes()

    def note(self, name: str, value: Any) -> None:
        self.mirror.set_attribute(name, value)

    def rows(self) -> list[TrialRow]:
        """Return all trials by number."""
        return list(self._rows)

    def is_full(self, total: int) -> bool:
        """Whether `total` trials, or all points of a grid, are drawn.

        Failed trials count if study.count_failed is set.
        """
        counted = [row for row in self._rows if self.config.count_failed or row.state != "failed"]
        # A grid's sampler would begin to repeat its points, in place of those that failed.
        points = count_points(self.config, self.space)
        return len(counted) >= total or len(self._rows) >= points

    # The life of a trial

    def ask(self) -> TrialRow:
        """Insert the next trial, running, with all its values in one write.

        The sampler draws those that are not given.
        """
        given = _given_values(self)
        if given is not None:
            faults.point("trial.drawn")
            values, attributes = given
            return self._insert(TrialState.RUNNING, values, attributes)
        study = self.mirror.study
        study.sampler = build_sampler(self.config, self.space, len(self._rows))
        draw_values(self.space, study.ask())
        drawn = self.mirror.trials()[-1]
        faults.point("trial.drawn")
        trial = create_trial(
            state=TrialState.RUNNING,
            params=drawn.params,
            distributions=drawn.distributions,
            system_attrs=drawn.system_attrs,  # a grid's sampler keeps its place there
        )
        self.mirror.insert(trial, is_in_memory=True)
        faults.point("trial.inserted")
        self._rows.append(_row_of(self.space, self.goal, drawn))
        return self._rows[-1]

    def add(self, values: Mapping[str, Any], value: float, notes: dict[str, Any]) -> None:
        """Insert a finished trial whose result comes from elsewhere."""
        row = TrialRow(len(self._rows), "finished", value, dict(values), notes)
        self._insert(TrialState.COMPLETE, values, {RESULT: notes}, row)

    def _insert(
        self,
        state: TrialState,
        values: Mapping[str, Any],
        attributes: dict[str, Any],
        ended: TrialRow | None = None,
    ) -> TrialRow:
        present = [one for one in self.space if one.name in values]
        trial = create_trial(
            state=state,
            params={one.name: one.encode(values[one.name]) for one in present},
            distributions={one.name: one.distribution for one in present},
            values=self.goal.values(ended) if ended else None,
            constraints=self.goal.violations(ended) if ended else None,
            user_attrs=attributes,
        )
        self.mirror.insert(trial)
        self._rows.append(_row_of(self.space, self.goal, self.mirror.trials()[-1]))
        return self._rows[-1]

    def take_waiting(self) -> TrialRow | None:
        """Return a trial that waits to be run again, now running; None if there is none."""
        waiting = (row for row in self._rows if row.state == "waiting")
        row = next(waiting, None)
        return self._write(row.number, TrialState.RUNNING) if row else None

    def report(self, number: int, rung: int, accuracy: float) -> bool:
        """Note the accuracy at a rung, counted from 0; return whether to prune the trial.

        The pruner sees the trial's values up to that rung only: a requeued trial keeps those of
        its earlier attempt, and later ones must not decide.
        """
        trial = self.mirror.set_rung(number, rung, accuracy)
        self._rows[number] = _row_of(self.space, self.goal, trial)
        faults.point("trial.reported")
        return self.config.pruner is not Pruner.none and self.pruner.prune(self.study, trial)

    def tell(
        self, number: int, state: str, value: float | None, notes: Mapping[str, Any]
    ) -> TrialRow:
        """End a trial as finished, pruned or failed; `value` is its validation accuracy."""
        faults.point("trial.before_tell")
        ended = replace(self._rows[number], value=value, notes=dict(notes))
        has_value = value is not None and state != "failed"
        row = self._write(number, _STATES[state], notes, ended if has_value else None)
        faults.point("trial.ended")
        return row

    def requeue(self, number: int, is_charged: bool, reason: str) -> TrialRow:
        """Let a trial be run again with the same values."""
        row = self._rows[number]
        charged = int(row.notes.get("charged", 0)) + is_charged
        notes = {"attempt": row.attempt + 1, "charged": charged, "reason": reason}
        return self._write(number, TrialState.WAITING, notes)

    def _write(
        self,
        number: int,
        state: TrialState,
        notes: Mapping[str, Any] | None = None,
        ended: TrialRow | None = None,
    ) -> TrialRow:
        earlier = {key: x for key, x in self._rows[number].notes.items() if key != "reason"}
        result = None if notes is None else earlier | dict(notes)
        values = self.goal.values(ended) if ended else None
        violations = self.goal.violations(ended) if ended else {}
        trial = self.mirror.set_state(number, state, values, result, violations)
        self._rows[number] = _row_of(self.space, self.goal, trial)
        return self._rows[number]


def is_screening(store: TrialStore) -> bool:
    """Whether the next trial is the best of those screened, of which some have not ended."""
    pruner, rows = store.pruner, store.rows()
    if not isinstance(pruner, ScreeningPruner) or pruner.is_screened(store.study, len(rows)):
        return False
    # The recipe's own is trained to the end in any case.
    unended = (row for row in rows if not row.is_ended and row.values != store.own)
    return any(pruner.is_screened(store.study, row.number) for row in unended)


def twin(store: TrialStore, row: TrialRow) -> TrialRow | None:
    """Return a finished trial with the same values, and so the same bits, if there is one.

    Only where no hyperparameter is continuous can the sampler draw the same values twice.
    """
    for one in store.space:
        if isinstance(one.distribution, FloatDistribution) and one.distribution.step is None:
            return None
    same = (other for other in store.rows() if other.values == row.values)
    return next((other for other in same if other.state == "finished"), None)


def _given_values(store: TrialStore) -> tuple[Mapping[str, Any], dict[str, Any]] | None:
    """Return the values of the next trial, and its attributes; None where a sampler draws them.

    After the screened trials they are those of the best of these that no trial has been given to
    train to the end. Else they are the first of `begin` that no trial has.
    """
    rows, pruner = store.rows(), store.pruner
    if isinstance(pruner, ScreeningPruner) and not pruner.is_screened(store.study, len(rows)):
        for best in promotable(rows, store.goal):
            return best.values, {RESULT: {PROMOTED_FROM: best.number}}
    if store.config.sampler is not Sampler.grid:
        for values in store.begin:
            if all(row.values != values for row in rows):
                return values, {}
    return None


def load_study(lab: Path, name: str, address: str | None = None) -> tuple[TrialStore, Config]:
    """Open a study that exists, and return it with the configuration that it was last led with."""
    storage = open_storage(lab, address)
    require_study(storage, name)
    notes = study_notes(storage, name)
    refuse_deleted(name, notes)
    if not is_own(notes):
        raise UserError(
            f"study {name} has not started yet: it has no trials. Run `{command('sweep')}` for it "
            "first."
        )
    with refuse_damage(f"what the storage holds of study {name!r}"):
        config = config_from_yaml(str(notes["config"]))
        config = with_values(config, {"study.name": name})  # it may have been renamed
        dict(notes.get("fingerprint", {}))
        if champion := notes.get("champion"):  # shown by many: refused here if it cannot be
            str(Interval(**champion["test_accuracy"])), int(champion["trial"])
            with_values(config, champion["values"])
        return TrialStore(storage, config), config


def is_own(notes: Mapping[str, Any]) -> bool:
    """Whether a study is digitlab's and has started, by what is noted of it."""
    return "config" in notes and "study_id" in notes
