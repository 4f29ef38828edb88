"""Optuna's samplers and pruners, as the configuration names them."""

import hashlib
import math
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from digitlab.base.errors import UserError, require
from digitlab.config.types import Config, Pruner, Sampler, StudyConfig
from digitlab.study.mirror import RESULT
from digitlab.study.space import Hyperparameter, first_values, read_space

_MOST_POINTS = 100_000  # of a grid: Optuna lists them all for each trial


def searched_space(config: Config) -> list[Hyperparameter]:
    """Return the hyperparameters of `study.space`.

    Raises:
        UserError: it is not one, not one for the sampler, or without the values to begin with.
    """
    space = read_space(config)
    build_sampler(config.study, space, 0)
    first_values(config, space)
    return space


def build_sampler(config: StudyConfig, space: list[Hyperparameter], number: int) -> BaseSampler:
    """Build the configured sampler for one trial, seeded by the study's seed and its number.

    So a trial's values depend on the earlier trials and its number alone. No random state has to
    survive the driver: a study that was stopped goes on as if it had not been.

    Raises:
        UserError: the space is not one for this sampler.
    """
    digest = hashlib.sha256(f"{config.seed}/{number}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    match config.sampler:
        case Sampler.tpe:
            return TPESampler(n_startup_trials=config.startup_trials, seed=seed)
        case Sampler.gp:
            # It models what all trials have; a setting that only some have is drawn at random.
            startup = config.startup_trials
            return GPSampler(n_startup_trials=startup, seed=seed, warn_independent_sampling=False)
        case Sampler.random:
            return RandomSampler(seed=seed)
        case Sampler.grid:  # which visits its points in an order of its own
            points = count_points(config, space)
            given = f"study.sampler=grid with a study.space of {points:.0f} points"
            rule = f"one of at most {_MOST_POINTS}. Leave some choices out, or use another sampler"
            require(points <= _MOST_POINTS, given, rule)
            return GridSampler(_grid(space), seed=config.seed)


def count_points(config: StudyConfig, space: list[Hyperparameter]) -> float:
    """Return how many trials the sampler can draw: infinity unless it is the grid's."""
    if config.sampler is not Sampler.grid:
        return math.inf
    return math.prod(len(values) for values in _grid(space).values())


def _grid(space: list[Hyperparameter]) -> dict[str, list[Any]]:
    grid = {}
    for one in space:
        if not isinstance(one.distribution, CategoricalDistribution):
            raise UserError(
                f"study.sampler=grid with study.space: {one.name} is invalid: a grid takes "
                "choices only. Write choice(a,b,...), or use another sampler."
            )
        if one.only_with:
            group = one.name.partition(".")[0]
            raise UserError(
                f"study.sampler=grid with study.space: {one.name} is invalid: only "
                f"{group}={','.join(one.only_with)} has it, and a grid takes settings that all "
                "trials have. Use another sampler."
            )
        grid[one.name] = list(one.distribution.choices)
    return grid


def build_pruner(config: StudyConfig) -> BasePruner:
    """Build the configured pruner.

    Each compares trials at the last rung; the median one takes a trial's best value up to it.
    """
    if config.pruner is Pruner.median:
        return MedianPruner(n_startup_trials=config.startup_trials)
    if config.pruner is Pruner.halving:
        return HalvingPruner(brackets=1)
    if config.pruner is Pruner.hyperband:
        return HalvingPruner(brackets=len(config.rungs) + 1)
    if config.pruner is Pruner.screening:
        return ScreeningPruner(config.trials - config.finish, config.count_failed)
    return NopPruner()


class HalvingPruner(BasePruner):
    """Asynchronous successive halving (Li et al. 2018): at each rung the best third goes on.

    With several brackets trials take turns in them by number, and those of bracket b compete with
    one another alone, from rung b on (after Hyperband, Li et al. 2017).

    Optuna's own notes in the trial which rungs it has passed, so that a requeued trial would be
    treated differently the second time. Here the accuracies at the rung decide alone.
    """

    def __init__(self, brackets: int, eta: int = 3) -> None:
        """Args: eta: one of so many goes on."""
        self.brackets, self.eta = brackets, eta

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        rung = trial.last_step
        if rung is None or rung < trial.number % self.brackets:
            return False
        # The trial itself is among them as it is shown here, whatever the study holds of it.
        reached = [trial.intermediate_values[rung], *self.others(study, trial.number, rung)]
        kept = sorted(reached, reverse=True)[: max(1, len(reached) // self.eta)]
        return trial.intermediate_values[rung] < kept[-1]

    def others(self, study: optuna.Study, number: int, rung: int) -> list[float]:
        """Return what the trials had at a rung that the trial of that number competes with."""
        return [
            other.intermediate_values[rung]
            for other in study.get_trials(deepcopy=False)
            if other.number != number
            and rung in other.intermediate_values
            and other.number % self.brackets == number % self.brackets
        ]


PROMOTED_FROM = "promoted_from"  # noted of a trial: whose values it trains to the end


class ScreeningPruner(BasePruner):
    """Screening (after Egele et al. 2023): the first trials end at the rung, good or bad.

    The trials after them train the best of these to the end. A trial that was promoted stays so
    where the study is extended, whatever its number.
    """

    def __init__(self, screened: int, count_failed: bool) -> None:
        """Args: screened: trials; `count_failed`: whether those that failed are among them."""
        self.screened, self.count_failed = screened, count_failed

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        if trial.last_step is None or PROMOTED_FROM in trial.user_attrs.get(RESULT, {}):
            return False
        return self.is_screened(study, trial.number)

    def is_screened(self, study: optuna.Study, number: int) -> bool:
        """Return whether the trial of that number, which may not exist yet, is screened."""
        earlier = study.get_trials(deepcopy=False)[:number]
        failed = sum(one.state is TrialState.FAIL for one in earlier)
        return len(earlier) - (0 if self.count_failed else failed) < self.screened
