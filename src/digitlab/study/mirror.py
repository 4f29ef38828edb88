"""A study on disk and its copy in memory, written together."""

import copy
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import optuna
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from digitlab.base.retry import retry
from digitlab.base.server import OUTAGE_S, is_away
from digitlab.study.space import Hyperparameter
from digitlab.study.storage import study_names

RESULT = "result"  # the attribute of a trial that holds all that is noted of it, in one write

_T = TypeVar("_T")
Ranges = Sequence[Hyperparameter]


class MirroredStudy:
    """Optuna's study in a storage, and the same in memory.

    All reads are of the copy, which is fast; every write goes to the storage first. While
    the storage is away a write is repeated, and is done once, whether its answer was lost or not.
    """

    def __init__(
        self,
        storage: RDBStorage,
        name: str,
        stopped: Callable[[], bool],
        space: Ranges = (),
        directions: Sequence[StudyDirection] = (StudyDirection.MAXIMIZE,),
    ) -> None:
        """Open or create the study of that name; `stopped` ends the retries during an outage.

        In memory all trials have the ranges of now: a sampler learns from no trial of another one.
        """
        self.storage, self.stopped = storage, stopped
        self.id = self._open(name, directions)
        self._attributes = dict(storage.get_study_user_attrs(self.id))
        self._memory = InMemoryStorage()  # of one study, so that a trial's id is its number
        self.study = optuna.create_study(
            storage=self._memory, directions=storage.get_study_directions(self.id)
        )
        self._memory_id = self._memory.get_study_id_from_name(self.study.study_name)
        self._ids: dict[int, int] = {}  # of trials in the storage, by number
        for stored in storage.get_all_trials(self.id, deepcopy=False):
            trial = copy.copy(stored)
            trial.distributions = trial.distributions | {
                one.name: one.distribution
                for one in space
                if one.name in trial.params and one.holds(one.decode(trial.params[one.name]))
            }
            self._memory.create_new_trial(self._memory_id, template_trial=trial)

    def _open(self, name: str, directions: Sequence[StudyDirection]) -> int:
        if name in study_names(self.storage):
            study_id = self.storage.get_study_id_from_name(name)
        else:
            study_id = self.storage.create_new_study(directions, name)
        if "study_id" not in self.storage.get_study_user_attrs(study_id):
            self.storage.set_study_user_attr(study_id, "study_id", uuid.uuid4().hex)
        return study_id

    def _do(self, call: Callable[[], _T]) -> _T:
        return retry(call, is_away, OUTAGE_S, self.stopped)

    def attributes(self) -> dict[str, Any]:
        """Return the study's attributes; not to be changed."""
        return dict(self._attributes)

    def stored_attribute(self, name: str) -> Any:
        """Return an attribute as the storage has it now, whoever wrote it; None without it."""
        return self._do(lambda: self.storage.get_study_user_attrs(self.id)).get(name)

    def set_attribute(self, name: str, value: Any) -> None:
        self._do(lambda: self.storage.set_study_user_attr(self.id, name, value))
        self._attributes[name] = json.loads(json.dumps(value))  # as the storage returns it

    def trials(self) -> list[FrozenTrial]:
        """Return all trials by number; not to be changed."""
        return self.study.get_trials(deepcopy=False)

    def insert(self, trial: FrozenTrial, is_in_memory: bool = False) -> None:
        """Append a trial in one write; `is_in_memory`: the copy's sampler has made it there."""
        number = len(self.trials()) - is_in_memory
        attempts = 0

        def insert() -> int:
            nonlocal attempts
            attempts += 1
            # The answer to an earlier attempt may have been lost after the server had done it.
            if attempts > 1 and self.storage.get_n_trials(self.id) > number:
                return self._id(number)
            return self.storage.create_new_trial(self.id, template_trial=trial)

        self._ids[number] = self._do(insert)
        if not is_in_memory:
            self._memory.create_new_trial(self._memory_id, template_trial=trial)

    def set_rung(self, number: int, rung: int, accuracy: float) -> FrozenTrial:
        """Write the accuracy at a rung; return the trial with its values up to that rung."""
        trial_id = self._id(number)
        self._do(lambda: self.storage.set_trial_intermediate_value(trial_id, rung, accuracy))
        self._memory.set_trial_intermediate_value(number, rung, accuracy)
        trial = copy.copy(self.trials()[number])
        seen = trial.intermediate_values.items()
        trial.intermediate_values = {step: value for step, value in seen if step <= rung}
        return trial

    def set_state(
        self,
        number: int,
        state: TrialState,
        values: list[float] | None = None,
        result: Mapping[str, Any] | None = None,
        constraints: Mapping[str, float] = {},
    ) -> FrozenTrial:
        """Write result and constraints, then state and values: what has ended has all of them.

        Optuna's samplers and its dashboard read constraints, > 0 where a trial breaks one.
        """
        trial_id = self._id(number)
        if result is not None:
            whole = dict(result)
            self._do(lambda: self.storage.set_trial_user_attr(trial_id, RESULT, whole))
            self._memory.set_trial_user_attr(number, RESULT, whole)

        for name, share in constraints.items():
            key = f"constraints:{name}"  # where `FrozenTrial.constraints` finds them
            self._do(partial(self.storage.set_trial_system_attr, trial_id, key, share))
            self._memory.set_trial_system_attr(number, key, share)

        def write() -> None:
            try:
                self.storage.set_trial_state_values(trial_id, state, values)
            except optuna.exceptions.UpdateFinishedTrialError:
                # An earlier attempt was done, and its answer lost with the connection.
                if self.storage.get_trial(trial_id).state is not state:
                    raise

        self._do(write)
        self._memory.set_trial_state_values(number, state, values)
        return self.trials()[number]

    def _id(self, number: int) -> int:
        if number not in self._ids:
            find = self.storage.get_trial_id_from_study_id_trial_number
            self._ids[number] = self._do(lambda: find(self.id, number))
        return self._ids[number]
