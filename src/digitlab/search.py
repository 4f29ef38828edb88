"""The Optuna study: its storage, its trials, who takes the next one."""

import hashlib
import math
import sqlite3
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from digitlab.config import Pruner, Sampler, StudyConfig
from digitlab.errors import UserError
from digitlab.space import Knob, suggest

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

# What a storage raises that cannot be written or read: a full disk, a lost or locked database.
STORE_ERRORS = (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError)
_ETA = 3  # successive halving keeps the best third at each rung
_STATES = {
    "waiting": TrialState.WAITING,
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_NAMES = {state: name for name, state in _STATES.items()}


@dataclass(frozen=True)
class TrialRow:
    """A trial as the storage holds it; `values` are in the configuration's terms."""

    number: int
    state: str  # waiting, running, finished, pruned or failed
    value: float | None  # holdout accuracy: the last of a finished trial, at the rung of a pruned
    values: dict[str, Any]
    notes: dict[str, Any]

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "pruned", "failed")


def open_storage(lab: Path) -> BaseStorage:
    """Optuna's storage on sqlite in the lab folder, in WAL mode.

    Raises:
        UserError: the file cannot be read or written, or is no database.
    """
    path = lab / "optuna.db"
    try:
        with FileLock(lab / "optuna.lock"):  # two processes that make the tables at once collide
            with closing(sqlite3.connect(path, timeout=60)) as database:
                database.execute("PRAGMA journal_mode=WAL")
            options = {"connect_args": {"timeout": 60}}  # s, to wait for another writer
            return get_storage(RDBStorage(f"sqlite:///{path}", engine_kwargs=options))
    except Exception as error:  # sqlite's, sqlalchemy's, alembic's: one cause for the user
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: cannot be used ({reason}): mend it, or put it aside to begin anew"
        ) from error


class Search:
    """One study in a storage. Any number of processes may hold the same one."""

    def __init__(self, storage: BaseStorage, config: StudyConfig, knobs: list[Knob]) -> None:
        self.storage, self.config, self.knobs = storage, config, knobs
        self.sampler, self.pruner = _SeededSampler(config, knobs), _build_pruner(config)
        study = optuna.create_study(
            storage=storage, study_name=config.name, direction="maximize", load_if_exists=True
        )
        self.id = storage.get_study_id_from_name(study.study_name)

    def rows(self) -> list[TrialRow]:
        """All trials by number."""
        return [self._row(trial) for trial in self.storage.get_all_trials(self.id, deepcopy=False)]

    def _row(self, trial: FrozenTrial) -> TrialRow:
        decode = {knob.name: knob.decode for knob in self.knobs}
        values = {k: decode[k](v) if k in decode else v for k, v in trial.params.items()}
        value = trial.values[0] if trial.values else None
        if trial.state is TrialState.PRUNED and trial.intermediate_values:
            value = trial.intermediate_values[max(trial.intermediate_values)]
        return TrialRow(trial.number, _NAMES[trial.state], value, values, trial.user_attrs)

    def claim(self, total: int) -> int | None:
        """The number of a trial to run now: one that waits, else a new one below `total`.

        Trials that failed count towards the total where the study says so.
        """
        trials = self.storage.get_all_trials(self.id, deepcopy=False)
        for trial in trials:
            if trial.state is TrialState.WAITING and self._set(trial, TrialState.RUNNING):
                return trial.number
        if self.config.sampler is Sampler.grid:
            total = min(total, math.prod(len(values) for values in _grid(self.knobs).values()))
        failed = sum(trial.state is TrialState.FAIL for trial in trials)
        if len(trials) - (0 if self.config.count_failed else failed) >= total:
            return None
        trial_id = self.storage.create_new_trial(self.id)
        return self.storage.get_trial_number_from_id(trial_id)

    def put_back(self, number: int, attempts: int) -> None:
        """Let a trial that did not end be taken again."""
        trial = self._trial(number)
        self.storage.set_trial_user_attr(trial._trial_id, "attempts", attempts)
        self._set(trial, TrialState.WAITING)

    def _set(self, trial: FrozenTrial, state: TrialState) -> bool:
        return self.storage.set_trial_state_values(trial._trial_id, state)

    def _trial(self, number: int) -> FrozenTrial:
        # All of them, since the storage's cache must have seen a trial before it can be changed.
        return self.storage.get_all_trials(self.id, deepcopy=False)[number]

    def ask(self, number: int) -> tuple[Trial, dict[str, Any]]:
        """The trial and its values, chosen now unless an earlier attempt has chosen them."""
        # Loaded anew, since a study object caches the trials that it has seen.
        study = optuna.load_study(
            study_name=self.config.name,
            storage=self.storage,
            sampler=self.sampler,
            pruner=self.pruner,
        )
        trial = Trial(study, self._trial(number)._trial_id)
        return trial, suggest(trial, self.knobs)

    def report(self, trial: Trial, rung: int, accuracy: float) -> bool:
        """Note the accuracy at the rung, counted from 0; whether to prune."""
        if rung not in self._trial(trial.number).intermediate_values:  # of an earlier attempt
            trial.report(accuracy, rung)
        return trial.should_prune()

    def tell(self, number: int, state: str, value: float | None, notes: dict[str, Any]) -> None:
        """End a trial."""
        trial = self._trial(number)
        for name, note in notes.items():
            self.storage.set_trial_user_attr(trial._trial_id, name, note)
        values = [value] if value is not None and state in ("finished", "pruned") else None
        self.storage.set_trial_state_values(trial._trial_id, _STATES[state], values)

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

    def notes(self, study: str | None = None) -> dict[str, Any]:
        """What is noted of a study as a whole, this one unless another is named."""
        study_id = self.storage.get_study_id_from_name(study) if study else self.id
        return dict(self.storage.get_study_user_attrs(study_id))

    def names(self) -> list[str]:
        """The studies in the storage."""
        return study_names(self.storage)

    def note(self, name: str, value: Any) -> None:
        self.storage.set_study_user_attr(self.id, name, value)


def trial_value(state: str, metrics: Mapping[str, float]) -> float | None:
    """What a trial is judged by: the last holdout accuracy, or that of its rung if pruned."""
    return metrics.get({"finished": "val_accuracy", "pruned": "rung_accuracy"}.get(state, ""))


def study_names(storage: BaseStorage) -> list[str]:
    return [study.study_name for study in storage.get_all_studies()]


class _SeededSampler(BaseSampler):
    """The configured sampler, seeded anew for each trial from the study's seed and its number.

    So a trial's values depend on the earlier trials and its number alone, and no random state has
    to survive a process: a study that was stopped goes on as if it had not been.
    """

    def __init__(self, config: StudyConfig, knobs: list[Knob]) -> None:
        self.config, self.knobs = config, knobs
        self.inner = self._build(0)

    def _build(self, number: int) -> BaseSampler:
        digest = hashlib.sha256(f"{self.config.seed}/{number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        startup = self.config.startup_trials
        builders: dict[Sampler, Callable[[], BaseSampler]] = {
            Sampler.tpe: lambda: TPESampler(n_startup_trials=startup, seed=seed),
            Sampler.gp: lambda: GPSampler(n_startup_trials=startup, seed=seed),
            Sampler.random: lambda: RandomSampler(seed=seed),
            Sampler.grid: lambda: GridSampler(_grid(self.knobs), seed=self.config.seed),
        }
        return builders[self.config.sampler]()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.inner = self._build(trial.number)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)


def _grid(knobs: list[Knob]) -> dict[str, list[Any]]:
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
