"""Compare ways to search on recorded tables: figures of experiments/search.md.

    python experiments/search.py [--slow] [--only=TEXT] [REPLICATIONS [TABLE...]]    # 200, on all

`--slow` adds GP, which takes most of the time; `--only` leaves those whose name holds a text, and
the reference.

A replication is a study on a virtual clock: two workers, each trial as long as it was measured to
take. The study sees one seed and one half of the validation images; the best are confirmed and the
champion is chosen by the study's own rules, on other seeds and the same half, and measured on those
that are left. The truth is the mean of the other seeds on the other half.
"""

import heapq
import itertools
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import TrialState
from search_record import FOLDER, TABLES, TENTHS, Table

from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.config.types import Objective, Sampler
from digitlab.study.champion import Results, candidates, confirm_fits, select_champion
from digitlab.study.goal import Goal, TrialRow
from digitlab.study.samplers import HalvingPruner, build_sampler, searched_space

WORKERS, FITS = 2, 10  # the budget is as many mean fits of the table
MOST_TRIALS = 200  # where a sampler draws the same point for ever
NEAR_FAST99 = {
    "model.widths": "choice([8,16],[16,32],[24,48],[32,64])",
    "model.hidden": "tag(log,int(interval(32,256)))",
    "optim.learning_rate": "tag(log,interval(0.005,0.04))",
    "optim.label_smoothing": "interval(0.0,0.3)",
}
FAST99 = {
    "model.widths": [16, 32],
    "model.hidden": 128,
    "optim.learning_rate": 0.02,
    "optim.label_smoothing": 0.15,
}
# What is searched, and the values to begin with: a newcomer's in `default`, else those that
# `fast99` had when the tables were recorded.
SPACES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "fast99": (NEAR_FAST99, FAST99),
    "few": (NEAR_FAST99, FAST99),
    "default": (
        {
            "model.widths": "choice([16,32,64],[24,48,96])",
            "trainer.epochs": "int(interval(4,8))",
            "data.augment.shift": "interval(0.0,1.5)",
            "data.augment.rotate": "interval(0.0,12.0)",
            "data.augment.scale": "interval(0.0,0.12)",
            "optim.learning_rate": "tag(log,interval(0.003,0.024))",
        },
        {
            "model.widths": [16, 32, 64],
            "trainer.epochs": 4,
            "data.augment.shift": 0.0,
            "data.augment.rotate": 0.0,
            "data.augment.scale": 0.0,
            "optim.learning_rate": 0.006,
        },
    ),
}


@dataclass(frozen=True)
class Policy:
    """A way to search; rungs are tenths of the schedule."""

    name: str
    sampler: str = "random"
    rungs: tuple[int, ...] = ()
    eta: int = 3
    brackets: int = 1
    budget: float = 1.0
    is_own: bool = False  # trains the values to begin with, and nothing else
    first: int = 0  # tenths of the schedule that half of the budget is spent on; then the best
    slow: bool = False  # a fifth of the replications


HALVING = (2, 4, 7)  # those of the recipe `halving`
POLICIES = (
    Policy("recipe's own values", is_own=True),
    Policy("every configuration", budget=1e9),
    Policy("random"),
    Policy("random, twice the budget", budget=2),
    Policy("first tenth of all, then the best", first=1),
    Policy("first fifth of all, then the best", first=2),
    Policy("random, halving, eta 2", rungs=HALVING, eta=2),
    Policy("random, halving, eta 3", rungs=HALVING),
    Policy("random, halving, eta 4", rungs=HALVING, eta=4),
    Policy("random, halving at 1/10 and 3/10, eta 4", rungs=(1, 3), eta=4),
    Policy("random, hyperband, eta 3", rungs=HALVING, brackets=4),
    Policy("tpe", sampler="tpe"),
    Policy("tpe, halving, eta 3 (recipe halving)", sampler="tpe", rungs=HALVING),
    Policy("tpe, halving, eta 4", sampler="tpe", rungs=HALVING, eta=4),
    Policy("tpe, halving at 1/10 and 3/10, eta 4", sampler="tpe", rungs=(1, 3), eta=4),
    Policy("gp", sampler="gp", slow=True),
    Policy("gp, halving, eta 3", sampler="gp", rungs=HALVING, slow=True),
)
REFERENCE = "random, twice the budget"


class Recorded:
    """A table that was trained, and what is searched of it."""

    def __init__(self, name: str) -> None:
        self.table: Table = TABLES[name]
        data, seconds = np.load(FOLDER / f"{name}.npz"), np.load(FOLDER / f"{name}.seconds.npz")
        whole = data["done"].all(axis=0)
        self.counts = data["counts"][:, whole].astype(int)  # (C, S, 10, 2)
        bits = np.unpackbits(data["right"][:, whole], axis=-1).astype(bool)
        self.right = np.stack([bits[..., ::2], bits[..., 1::2]])  # (2, C, S, M / 2)
        self.training, self.measuring = seconds["training"], seconds["measuring"]
        self.rows, self.seeds = self.table.rows, int(whole.sum())
        space, own = SPACES[name]
        words = [*self.table.words, "study.confirm=2", "study.confirm_fits=6"]
        config = with_values(compose("sweep", words)[0].config, {"study.space": space, **own})
        self.config, self.own = config, self.rows.index(own)
        self.space = searched_space(config)

    def row(self, values: dict[str, Any]) -> int:
        """Return the configuration nearest to values; a learning rate by its logarithm."""
        place = []
        for key, known in self.table.space.items():
            given = values[key]
            if given in known:
                place.append(known.index(given))
                continue
            scale = np.log if ("rate" in key or "hidden" in key) else np.asarray
            distance = np.abs(scale(np.array(known, float)) - scale(float(given)))
            place.append(int(distance.argmin()))
        return int(np.ravel_multi_index(place, [len(v) for v in self.table.space.values()]))


class Replication:
    """What one study sees of a table, and the truth that it does not see."""

    def __init__(self, recorded: Recorded, number: int) -> None:
        chance = np.random.default_rng(number)
        self.recorded, self.number = recorded, number
        self.seed, self.half = int(chance.integers(recorded.seeds)), int(chance.integers(2))
        self.others = [seed for seed in range(recorded.seeds) if seed != self.seed]

    def accuracy(self, row: int, tenth: int) -> float:
        images = self.recorded.right.shape[-1]
        return float(self.recorded.counts[row, self.seed, tenth - 1, self.half] / images)

    def seconds(self, row: int, tenth: int, measured: int) -> float:
        """Return the time from a trial's start to a tenth of its schedule."""
        recorded = self.recorded
        return float(recorded.training[row] * tenth / 10 + recorded.measuring[row] * measured)

    @cached_property
    def truth(self) -> NDArray[np.float64]:
        images = self.recorded.right.shape[-1]
        counts = self.recorded.counts[:, self.others, -1, 1 - self.half]
        return np.asarray(counts.mean(axis=1) / images)

    @property
    def budget(self) -> float:
        recorded = self.recorded
        return float(FITS * (recorded.training.mean() + recorded.measuring.mean()))


class VirtualStudy:
    """A study on a virtual clock, which begins with the recipe's own values."""

    def __init__(self, replication: Replication, policy: Policy) -> None:
        self.replication, self.recorded = replication, replication.recorded
        config = replace(self.recorded.config.study, seed=replication.number)
        self.config = replace(config, sampler=Sampler(policy.sampler))
        self.study = optuna.create_study(direction="maximize")
        self.pruner = HalvingPruner(policy.brackets, policy.eta)
        self.stops = (*policy.rungs, TENTHS)
        self.end = replication.budget * policy.budget / WORKERS
        self.trials: list[optuna.Trial] = []
        self.rows: list[int] = []
        self.starts: list[float] = []
        self.finished: dict[int, float] = {}
        # What happens when: time, order of equal times, and the trial that reaches a stop, or none
        # where a worker is free.
        self.events: list[tuple[float, int, int | None, int]] = []
        self.order = itertools.count()

    def run(self) -> list[TrialRow]:
        """Return the trials that finished."""
        for _ in range(WORKERS):
            self._at(0.0, None)
        while self.events:
            now, _, number, stop = heapq.heappop(self.events)
            if number is not None:
                self._reach(number, stop, now)
            elif now < self.end and len(self.trials) < MOST_TRIALS:
                self._start(now)
        return [
            _trial(self.replication, number, self.rows[number], trial.value or 0.0)
            for number, trial in enumerate(self.study.get_trials(deepcopy=False))
            if trial.state is TrialState.COMPLETE
        ]

    def _at(self, time: float, number: int | None, stop: int = 0) -> None:
        heapq.heappush(self.events, (time, next(self.order), number, stop))

    def _start(self, now: float) -> None:
        space, own = self.recorded.space, self.recorded.rows[self.recorded.own]
        self.study.sampler = build_sampler(self.config, space, len(self.trials))
        if not self.trials:
            self.study.enqueue_trial({one.name: one.encode(own[one.name]) for one in space})
        trial = self.study.ask({one.name: one.distribution for one in space})
        row = self.recorded.row({one.name: one.decode(trial.params[one.name]) for one in space})
        self.trials.append(trial)
        self.rows.append(row)
        self.starts.append(now)
        if row in self.finished:  # a study takes the result of an equal trial
            self.study.tell(trial, self.finished[row])
            self._at(now, None)
        else:
            self._go_on(len(self.trials) - 1, 0)

    def _go_on(self, number: int, stop: int) -> None:
        taken = self.replication.seconds(self.rows[number], self.stops[stop], stop + 1)
        self._at(self.starts[number] + taken, number, stop)

    def _reach(self, number: int, stop: int, now: float) -> None:
        trial, row = self.trials[number], self.rows[number]
        accuracy = self.replication.accuracy(row, self.stops[stop])
        if self.stops[stop] == TENTHS:
            self.study.tell(trial, accuracy)
            self.finished[row] = accuracy
            self._at(now, None)
            return
        trial.report(accuracy, stop)
        frozen = self.study.get_trials(deepcopy=False)[number]
        if number and self.pruner.prune(self.study, frozen):  # the first is never pruned
            self.study.tell(trial, state=TrialState.PRUNED)
            self._at(now, None)
        else:
            self._go_on(number, stop + 1)


def _trial(replication: Replication, number: int, row: int, value: float) -> TrialRow:
    cost = {"metrics": {"training_flops": float(replication.recorded.training[row])}}
    return TrialRow(number, "finished", value, replication.recorded.rows[row], cost)


def first_then_best(replication: Replication, policy: Policy) -> list[TrialRow]:
    """Spend half of the budget on beginnings, drawn at random, and half on the best of them."""
    recorded = replication.recorded
    chance = np.random.default_rng((replication.number, zlib.crc32(policy.name.encode())))
    drawn = [recorded.own, *chance.permutation(len(recorded.rows))]
    spent, started = 0.0, []
    for row in map(int, drawn):
        if spent < replication.budget / 2 and row not in started:
            spent += replication.seconds(row, policy.first, 1)
            started.append(row)
    started.sort(key=lambda row: -replication.accuracy(row, policy.first))
    chosen = []
    for row in started:
        if spent < replication.budget:
            spent += replication.seconds(row, 10, 1)
            chosen.append(row)
    chosen += [recorded.own] * (recorded.own not in chosen)
    return [
        _trial(replication, number, row, replication.accuracy(row, 10))
        for number, row in enumerate(chosen)
    ]


def search(replication: Replication, policy: Policy) -> list[TrialRow]:
    return VirtualStudy(replication, policy).run()


def every(replication: Replication, _: Policy) -> list[TrialRow]:
    """Train all to the end: no way of searching that sees one seed and these images knows more."""
    rows = range(len(replication.recorded.rows))
    return [_trial(replication, row, row, replication.accuracy(row, TENTHS)) for row in rows]


@dataclass(frozen=True)
class Outcome:
    """Of one study, in points: of accuracy where nothing else is said."""

    regret: float
    gain: float  # over the values to begin with, in truth
    printed: float  # gain as the study prints it, less the truth of the same fits; nan if none
    optimism: float  # of the accuracy printed for the champion, likewise
    trials: int  # that finished


def run(replication: Replication, policy: Policy) -> Outcome:
    """Search, confirm and choose."""
    recorded = replication.recorded
    if policy.is_own:
        trials = [_trial(replication, 0, recorded.own, replication.accuracy(recorded.own, 10))]
    else:
        find = every if policy.budget > 1e6 else first_then_best if policy.first else search
        trials = find(replication, policy)
    own = recorded.rows[recorded.own]
    chosen = candidates(trials, 2, own, Goal((Objective.val_accuracy,), {}))
    results: Results = {}
    places = {trial.number: recorded.rows.index(trial.values) for trial in chosen}
    config = with_values(recorded.config, {"trainer.seed": 0})
    while fits := _possible(confirm_fits(config, chosen, results), replication):
        for fit in fits:
            seed = replication.others[fit.seed - 1]
            right = recorded.right[replication.half, places[fit.number], seed]
            misread = np.flatnonzero(~right).tolist()
            results[fit.key] = {"images": len(right), "misread": misread}
    choice = select_champion(config, chosen, results)
    best = places[choice.best] if choice else recorded.own
    truth, printed, optimism = replication.truth, float("nan"), float("nan")
    left = replication.others[max((int(key.split("/")[1]) for key in results), default=0) :]
    if choice and left:  # as the study measures what it has chosen
        # Other seeds were those of the choice, and say more of its luck than of the truth.
        seen, other = replication.half, 1 - replication.half
        halves = [recorded.right[half][:, left].mean(axis=(1, 2)) for half in (seen, other)]
        excess = halves[0] - halves[1]
        if best != recorded.own:
            printed = excess[best] - excess[recorded.own]
        optimism = excess[best] - float(excess.mean())
    gain = truth[best] - truth[recorded.own]
    found = (truth.max() - truth[best], gain, printed, optimism)
    return Outcome(*(100 * float(value) for value in found), len(trials))


def _possible(fits: list[Any], replication: Replication) -> list[Any]:
    """A table holds so many seeds and no more."""
    return [fit for fit in fits if fit.seed <= len(replication.others)]


def compare(
    name: str, replications: int, is_slow: bool, only: str, say: Callable[[str], None]
) -> None:
    """Print a table's rows: policies, by mean regret."""
    recorded = Recorded(name)
    lots = [Replication(recorded, number) for number in range(replications)]
    found = {}
    chosen = [one for one in POLICIES if only in one.name or one.name == REFERENCE]
    for policy in (one for one in chosen if is_slow or not one.slow):
        some = lots[: max(10, replications // 5)] if policy.slow else lots
        found[policy.name] = [run(lot, policy) for lot in some]
    reference = [one.regret for one in found[REFERENCE]]
    say(f"{name}: {len(recorded.rows)} configurations, {recorded.seeds} seeds, n={replications}")
    say("policy | regret | beats twice random | worse than own | gain | printed - true | optimism")
    for policy, outcomes in sorted(found.items(), key=lambda p: np.mean([o.regret for o in p[1]])):
        say(f"{policy} | " + " | ".join(_figures(outcomes, reference)))


def _figures(outcomes: list[Outcome], reference: list[float]) -> Iterator[str]:
    regrets = np.array([one.regret for one in outcomes])
    error = regrets.std(ddof=1) / len(regrets) ** 0.5
    yield f"{regrets.mean():.3f} (±{1.96 * error:.3f}, n={len(regrets)})"
    pairs = zip(regrets, reference, strict=False)
    wins = [float(one < other) + 0.5 * float(one == other) for one, other in pairs]
    yield f"{np.mean(wins):.2f}"
    yield f"{100 * np.mean([one.gain < 0 for one in outcomes]):.0f} %"
    yield f"{np.mean([one.gain for one in outcomes]):+.3f}"
    errors = [one.printed for one in outcomes if not np.isnan(one.printed)]
    yield f"{np.mean(errors):+.3f}" if errors else ""
    yield f"{np.nanmean([one.optimism for one in outcomes]):+.3f}"


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    only = next((w.partition("=")[2] for w in sys.argv if w.startswith("--only=")), "")
    count = int(words[0]) if words else 200
    for name in words[1:] or SPACES:
        is_slow = "--slow" in sys.argv
        compare(name, count, is_slow, only, lambda line: print(f"| {line} |", flush=True))
        print()


if __name__ == "__main__":
    main()
