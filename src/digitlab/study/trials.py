"""The Optuna study: its storage, its trials, who takes the next one."""

import functools
import hashlib
import json
import math
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import Engine, Result, TextClause, text

from digitlab.base.errors import UserError
from digitlab.config.types import Config, Pruner, Sampler, StudyConfig
from digitlab.study.space import Hyperparameter, read_space, suggest
from digitlab.study.storage import (
    BEAT,
    GRACE,
    PATIENCE,
    STORE_ERRORS,
    patiently,
    sessions_of,
    study_names,
    together,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

_ETA = 3  # successive halving keeps the best third at each rung
_STATES = {
    "waiting": TrialState.WAITING,
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_ON_THE_WAY = (TrialState.PRUNED, TrialState.RUNNING)
_NAMES = {state: name for name, state in _STATES.items()}
_SILENT = text(
    "SELECT t.trial_id FROM trials t LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id "
    "WHERE t.study_id = :study AND t.state = 'RUNNING' AND h.trial_id IS NULL"
)
# Locks the trial until the transaction ends, so that nobody gives it away in between.
_LOOK = text(
    "SELECT t.state, a.value_json FROM trials t "
    "LEFT JOIN trial_user_attributes a ON a.trial_id = t.trial_id AND a.key = 'owner' "
    "WHERE t.trial_id = :trial FOR NO KEY UPDATE OF t"
)
# Taken in one statement, since a trial may be given away between two; one put back has owner "".
_TAKE = text(
    "INSERT INTO trial_user_attributes (trial_id, key, value_json) "
    "SELECT trial_id, 'owner', :owner FROM trials "
    "WHERE trial_id = :trial AND state = 'RUNNING' "
    "ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json "
    "WHERE trial_user_attributes.value_json IN ('\"\"', excluded.value_json) RETURNING trial_id"
)
_TURN = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
_COUNTS = text("SELECT state, count(*) FROM trials WHERE study_id = :study GROUP BY state")
_NUMBER = text("SELECT number FROM trials WHERE trial_id = :trial")
_YOUNG = text("SELECT now() - pg_postmaster_start_time() < make_interval(secs => :grace)")


@dataclass(frozen=True)
class TrialRow:
    """A trial as the storage holds it; `values` are in the configuration's terms."""

    number: int
    state: str  # waiting, running, finished, pruned or failed
    value: float | None  # validation accuracy: the last of a finished trial, else of its last rung
    values: dict[str, Any]
    notes: dict[str, Any]
    rungs: int = 0  # that it has passed

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "pruned", "failed")


class GivenAway(Exception):
    """The trial was put back meanwhile, since no sign of life came through: it is another's now."""


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _patient(
    method: Callable[Concatenate["Search", _P], _T],
) -> Callable[Concatenate["Search", _P], _T]:
    """In a storage that many share: one transaction, tried again while the storage is away.

    Such a method calls no other.
    """

    @functools.wraps(method)
    def tried(self: "Search", *arguments: _P.args, **named: _P.kwargs) -> _T:
        sessions = self.sessions
        if sessions is None:
            return method(self, *arguments, **named)

        def attempt() -> _T:
            with together(sessions):
                return method(self, *arguments, **named)

        return patiently(attempt, PATIENCE)

    return tried  # type: ignore[return-value]  # it is called as the method is


class Search:
    """One study in a storage. Any number of processes may hold the same one, each for one thread.

    In a storage that many share, a running trial has an owner, a random name that its worker gave
    itself, and the worker gives a sign of life every few seconds. A trial whose worker has given
    none for long is put back; should that worker still live, it is told `GivenAway` at its next
    question about the trial, before anything of the trial is read or changed.
    """

    def __init__(self, storage: BaseStorage, config: Config) -> None:
        """Open the study of `config`, or make it.

        Raises:
            UserError: its space cannot be searched.
        """
        self.storage, self.config, self.knobs = storage, config.study, read_space(config)
        self.pruner = _build_pruner(self.config)
        _build_sampler(self.config, self.knobs, 0)  # which refuses a space that is not for it
        study = optuna.create_study(
            storage=storage,
            study_name=self.config.name,
            direction="maximize",
            load_if_exists=True,
        )
        self.id = storage.get_study_id_from_name(study.study_name)
        self.sessions = sessions_of(storage)
        self.owner = uuid.uuid4().hex
        self._mine: int | None = None  # the trial that is being run here
        self._ended: dict[int, TrialRow] = {}
        self._claimed: dict[int, int] = {}  # ids of trials that were claimed here, by number
        # Only where no knob is continuous can two trials have the same values.
        self._finite = not any(_continuous(knob.distribution) for knob in self.knobs)
        self._unbeaten: dict[int, float] = {}  # running trials without any sign, and since when

    @property
    def engine(self) -> Engine | None:
        """Of a storage that many share."""
        return None if self.sessions is None else self.sessions.get_bind().engine

    @_patient
    def rows(self) -> list[TrialRow]:
        """All trials by number."""
        return self._rows(self.storage.get_all_trials(self.id, deepcopy=False))

    def _rows(self, trials: list[FrozenTrial]) -> list[TrialRow]:
        for trial in trials:
            if trial.number not in self._ended and trial.state.is_finished():
                self._ended[trial.number] = self._row(trial)
        return [self._ended.get(trial.number) or self._row(trial) for trial in trials]

    def _row(self, trial: FrozenTrial) -> TrialRow:
        decode = {knob.name: knob.decode for knob in self.knobs}
        values = {k: decode[k](v) if k in decode else v for k, v in trial.params.items()}
        value = trial.values[0] if trial.values else None
        if trial.state in _ON_THE_WAY and trial.intermediate_values:
            value = trial.intermediate_values[max(trial.intermediate_values)]
        passed = len(trial.intermediate_values)
        return TrialRow(trial.number, _NAMES[trial.state], value, values, trial.user_attrs, passed)

    @_patient
    def claim(self, total: int) -> int | None:
        """The number of a trial to run now: one that waits, else a new one below `total`.

        Trials that failed count towards the total where the study says so.
        """
        if self.sessions is not None:
            self._execute(_TURN, name=f"digitlab/{self.config.name}/claim")
        counts = self._counts()
        if counts[TrialState.WAITING]:
            waiting = (TrialState.WAITING,)
            for trial in self.storage.get_all_trials(self.id, False, waiting):
                self._beat(trial._trial_id)  # or the sign of an earlier attempt has it put back
                if self._set(trial._trial_id, TrialState.RUNNING):
                    self._claimed[trial.number] = trial._trial_id
                    return trial.number
        if self._counted(counts) >= self._most(total):
            return None
        trial_id = self.storage.create_new_trial(self.id)
        if self.sessions is None:
            number = self.storage.get_trial_number_from_id(trial_id)
        else:  # one small question where the storage would ask for the whole trial
            number = int(self._execute(_NUMBER, trial=trial_id).scalar_one())
        self._claimed[number] = trial_id
        return number

    def _counts(self) -> Counter[TrialState]:
        """Trials by state; counted by the server where there is one, which is cheaper there."""
        if self.sessions is None:
            return Counter(trial.state for trial in self.storage.get_all_trials(self.id, False))
        counted = self._execute(_COUNTS, study=self.id).tuples()
        return Counter({TrialState[state]: count for state, count in counted})

    def _execute(self, statement: TextClause, **values: Any) -> Result[*tuple[Any, ...]]:
        """In the transaction of the method that is under way."""
        assert self.sessions is not None
        return self.sessions.execute(statement, values)

    def _counted(self, counts: Counter[TrialState]) -> int:
        return sum(counts.values()) - (0 if self.config.count_failed else counts[TrialState.FAIL])

    def _most(self, total: int) -> int:
        if self.config.sampler is not Sampler.grid:
            return total
        return min(total, math.prod(len(values) for values in _grid(self.knobs).values()))

    @_patient
    def complete(self, total: int) -> bool:
        """Whether no trial runs or waits, and none is left to be made."""
        counts = self._counts()
        busy = counts[TrialState.RUNNING] + counts[TrialState.WAITING]
        return not busy and self._counted(counts) >= self._most(total)

    def _beat(self, trial_id: int) -> None:
        if self.sessions is not None:
            self.storage.record_heartbeat(trial_id)  # type: ignore[attr-defined]

    @_patient
    def put_back(self, number: int, attempts: int) -> None:
        """Let a trial that did not end be taken again."""
        now = self._check(number)
        if now is not None and now.is_finished():  # it was told by one who was taken for lost
            return
        trial_id = self._id(number)
        self.storage.set_trial_user_attr(trial_id, "attempts", attempts)
        if self.sessions is not None:
            self.storage.set_trial_user_attr(trial_id, "owner", "")
        self._set(trial_id, TrialState.WAITING)

    def _set(self, trial_id: int, state: TrialState) -> bool:
        return self.storage.set_trial_state_values(trial_id, state)

    def _id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.id, number)

    @contextmanager
    def alive(self, number: int, seconds: float) -> Iterator[None]:
        """Give signs of life for a trial while it runs, for no longer than `seconds` if not 0.

        Raises:
            GivenAway: here, or by `ask`, `report`, `tell` and `put_back` inside.
        """
        if self.sessions is None:
            yield
            return
        trial_id = self._take(number)
        ended = threading.Event()
        until = time.monotonic() + seconds if seconds else math.inf

        def beat() -> None:
            while not ended.wait(BEAT) and time.monotonic() < until:
                try:
                    self._beat(trial_id)
                except STORE_ERRORS:  # it is away: the next sign may reach it
                    continue

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        self._mine = number
        try:
            yield
        finally:
            self._mine = None
            ended.set()
            thread.join()

    @_patient
    def _take(self, number: int) -> int:
        """Make a claimed trial this one's own; returns its id."""
        mine, trial_id = json.dumps(self.owner), self._id(number)
        if self._execute(_TAKE, trial=trial_id, owner=mine).scalar() is None:
            raise GivenAway
        return trial_id

    def _check(self, number: int) -> TrialState | None:
        """The state of a trial in a storage that many share, where it stays so until the call ends.

        Raises:
            GivenAway: the trial runs here, and is not this one's own any more. Each try of a call
                asks, since it may have waited long for the storage.
        """
        if self.sessions is None:
            return None
        state, owner = self._execute(_LOOK, trial=self._id(number)).one()
        if number == self._mine and (owner is None or json.loads(owner) != self.owner):
            raise GivenAway
        return TrialState[state]

    check = _patient(_check)

    @_patient
    def lost(self) -> set[int]:
        """Running trials whose workers have given no sign of life for long.

        A server that was itself away has heard nobody: it is given the time to hear them again.
        """
        if self.sessions is None:
            return set()
        stale = set(self.storage._get_stale_trial_ids(self.id))  # type: ignore[attr-defined]
        now = time.monotonic()
        silent = self._execute(_SILENT, study=self.id).scalars().all()
        young = self._execute(_YOUNG, grace=GRACE).scalar()
        self._unbeaten = {one: self._unbeaten.get(one, now) for one in silent}
        stale |= {one for one, since in self._unbeaten.items() if now - since > GRACE}
        if young or not stale:
            return set()
        running = self.storage.get_all_trials(self.id, False, (TrialState.RUNNING,))
        return {trial.number for trial in running if trial._trial_id in stale}

    @_patient
    def ask(self, number: int) -> tuple[Trial, dict[str, Any], TrialRow | None]:
        """The trial and its values, chosen now unless an earlier attempt has chosen them.

        The third is a finished trial with the same values, if any.
        """
        self._check(number)
        # Loaded anew, since a study object caches the trials that it has seen.
        study = optuna.load_study(
            study_name=self.config.name,
            storage=self.storage,
            sampler=_build_sampler(self.config, self.knobs, number),
            pruner=self.pruner,
        )
        # The storage's cache must have seen a trial before it can be changed: it has, if the trial
        # was claimed here; else all are read, among them whatever others run, which takes long.
        if number not in self._claimed or self._finite:
            for row in self.storage.get_all_trials(self.id, deepcopy=False):
                self._claimed[row.number] = row._trial_id
        trial = Trial(study, self._claimed[number])
        values = suggest(trial, self.knobs)
        trials = self.storage.get_all_trials(self.id, deepcopy=False) if self._finite else []
        rows = self._rows(trials)
        twins = (row for row in rows if row.state == "finished" and row.values == values)
        return trial, values, next(twins, None)

    @_patient
    def report(self, trial: Trial, rung: int, accuracy: float) -> bool:
        """Note the accuracy at the rung, counted from 0; whether to prune."""
        self._check(trial.number)
        # Not by `trial.report`, which takes what it has told for kept, rolled back or not.
        known = self.storage.get_trial(trial._trial_id)
        if rung not in known.intermediate_values:  # of an earlier attempt
            self.storage.set_trial_intermediate_value(trial._trial_id, rung, accuracy)
            known = self.storage.get_trial(trial._trial_id)
        return self.pruner.prune(trial.study, known)

    @_patient
    def tell(self, number: int, state: str, value: float | None, notes: dict[str, Any]) -> str:
        """End a trial; returns its state, which in a shared storage it may have had before.

        It was told then before the server went away, or by one who took this worker for lost.
        """
        now = self._check(number)
        if now is not None and now.is_finished():
            return _NAMES[now]
        trial_id = self._id(number)
        values = [value] if value is not None and state in ("finished", "pruned") else None
        for name, note in notes.items():
            self.storage.set_trial_user_attr(trial_id, name, note)
        self.storage.set_trial_state_values(trial_id, _STATES[state], values)
        return state

    @_patient
    def add(self, values: dict[str, Any], value: float, notes: dict[str, Any]) -> None:
        """A finished trial whose result comes from elsewhere."""
        study = optuna.load_study(study_name=self.config.name, storage=self.storage)
        study.add_trial(
            optuna.trial.create_trial(
                params={knob.name: knob.encode(values[knob.name]) for knob in self.knobs},
                distributions={knob.name: knob.distribution for knob in self.knobs},
                value=value,
                user_attrs=notes,
            )
        )

    @_patient
    def notes(self, study: str | None = None) -> dict[str, Any]:
        """What is noted of a study as a whole, this one unless another is named."""
        study_id = self.storage.get_study_id_from_name(study) if study else self.id
        return dict(self.storage.get_study_user_attrs(study_id))

    def names(self) -> list[str]:
        """The studies in the storage."""
        return study_names(self.storage)

    @_patient
    def note(self, name: str, value: Any) -> None:
        self.storage.set_study_user_attr(self.id, name, value)


def trial_value(state: str, metrics: Mapping[str, float]) -> float | None:
    """What a trial is judged by: the last validation accuracy, or that of its rung if pruned."""
    return metrics.get({"finished": "val_accuracy", "pruned": "rung_accuracy"}.get(state, ""))


def _build_sampler(config: StudyConfig, knobs: list[Hyperparameter], number: int) -> BaseSampler:
    """The configured sampler, for one trial, seeded by the study's seed and the trial's number.

    So a trial's values depend on the earlier trials and its number alone, and no random state has
    to survive a process: a study that was stopped goes on as if it had not been.
    """
    digest = hashlib.sha256(f"{config.seed}/{number}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    match config.sampler:
        case Sampler.tpe:
            return TPESampler(n_startup_trials=config.startup_trials, seed=seed)
        case Sampler.gp:
            return GPSampler(n_startup_trials=config.startup_trials, seed=seed)
        case Sampler.random:
            return RandomSampler(seed=seed)
        case Sampler.grid:  # which visits its points in an order of its own
            return GridSampler(_grid(knobs), seed=config.seed)


def _continuous(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, FloatDistribution) and distribution.step is None


def _grid(knobs: list[Hyperparameter]) -> dict[str, list[Any]]:
    grid = {}
    for knob in knobs:
        if not isinstance(knob.distribution, CategoricalDistribution):
            raise UserError(
                f"study.sampler=grid with study.space: {knob.name}: a grid takes choices only, "
                "write choice(a,b,...) or take another sampler"
            )
        grid[knob.name] = list(knob.distribution.choices)
    return grid


def _build_pruner(config: StudyConfig) -> BasePruner:
    if config.pruner is Pruner.median:
        return MedianPruner(n_startup_trials=config.startup_trials)
    if config.pruner is Pruner.halving:
        return _Halving(brackets=1)
    if config.pruner is Pruner.hyperband:
        return _Halving(brackets=len(config.rungs) + 1)
    return NopPruner()


class _Halving(BasePruner):
    """Asynchronous successive halving (Li et al. 2018): at each rung the best third goes on.

    With several brackets it is Hyperband's (Li et al. 2017): trials take turns in them by number,
    and those of bracket b compete with one another alone, from rung b on.

    Optuna's own keep in the trial which rungs it has passed, so that a trial whose worker was
    killed would be judged otherwise the second time; here the accuracies at the rung decide alone.
    """

    def __init__(self, brackets: int) -> None:
        self.brackets = brackets

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        rung = trial.last_step
        bracket = trial.number % self.brackets
        if rung is None or rung < bracket:
            return False
        reached = [
            other.intermediate_values[rung]
            for other in study.get_trials(deepcopy=False)
            if rung in other.intermediate_values and other.number % self.brackets == bracket
        ]
        kept = sorted(reached, reverse=True)[: max(1, len(reached) // _ETA)]
        return trial.intermediate_values[rung] < kept[-1]
