"""Which configuration a study chooses, and how well it does on the test images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from digitlab.compose import with_values
from digitlab.config import Config
from digitlab.search import TrialRow
from digitlab.statistics import Interval, mean_interval, pooled_intervals
from digitlab.workers import Job

# Seeds of the confirmation and of the final fits, counted from the trials' own seed, so that no
# fit that chooses shares a seed with one that is reported.
_CONFIRM_SEEDS = 1
_FINAL_SEEDS = 1001

Results = Mapping[str, Mapping[str, float]]  # key of a job -> the metrics that it ended with


def candidates(rows: Sequence[TrialRow], most: int) -> list[TrialRow]:
    """The best finished trials with different values, best first."""
    chosen: list[TrialRow] = []
    finished = [row for row in rows if row.state == "finished" and row.value is not None]
    for row in sorted(finished, key=lambda row: (-(row.value or 0), row.number)):
        if len(chosen) < most and all(row.values != other.values for other in chosen):
            chosen.append(row)
    return chosen


def confirm_jobs(config: Config, rows: Sequence[TrialRow]) -> dict[str, Job]:
    """Each candidate on each new seed; none where there is nothing to choose between."""
    seeds = range(config.study.confirm_seeds if len(rows) > 1 else 0)
    return _jobs(config, rows, "confirm", [_CONFIRM_SEEDS + seed for seed in seeds])


def unpruned_jobs(config: Config, rows: Sequence[TrialRow]) -> dict[str, Job]:
    """The pruned trials that were closest to going on, to be trained to the end, same seed."""
    pruned = [row for row in rows if row.state == "pruned"]
    best = sorted(pruned, key=lambda row: (-(row.value or 0), row.number))
    return _jobs(config, best[: config.study.audit_pruning], "confirm", [0])


def final_jobs(config: Config, row: TrialRow) -> dict[str, Job]:
    """The champion's fits on all training images, each to be tested once."""
    seeds = [_FINAL_SEEDS + seed for seed in range(config.study.final_seeds)]
    return _jobs(config, [row], "final", seeds)


def _jobs(
    config: Config, rows: Sequence[TrialRow], kind: str, offsets: Sequence[int]
) -> dict[str, Job]:
    jobs = {}
    for row in rows:
        for offset in offsets:
            seed = (config.trainer.seed + offset) % 2**31
            values = {"trainer.seed": seed, "data.fold": "test" if kind == "final" else "holdout"}
            key = f"{row.number}/{seed}"
            tags = {"digitlab.seed": str(seed)}
            jobs[key] = Job(kind, row.number, with_values(config, row.values | values), tags)
    return jobs


@dataclass(frozen=True)
class Choice:
    """The champion, the candidates it was chosen from and why."""

    champion: TrialRow
    intervals: dict[int, Interval]  # holdout accuracy over the new seeds, by trial number
    tied: list[int]  # numbers of the candidates that cannot be told from the best, itself included


def choose(rows: Sequence[TrialRow], confirmed: Results) -> Choice:
    """The best mean holdout accuracy over new seeds; of those that are tied, the cheapest.

    The accuracy that made a trial a candidate is left out: it was picked for being high. Cost is
    floating-point operations of training, which do not depend on the machine.
    """
    groups = {
        row.number: [m["val_accuracy"] for key, m in confirmed.items() if _of(key, row)]
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


def _of(key: str, row: TrialRow) -> bool:
    return key.split("/", maxsplit=1)[0] == str(row.number)


def _cost(row: TrialRow) -> float:
    return float(row.notes.get("metrics", {}).get("training_flops", 0.0))


def test_interval(finals: Results) -> Interval:
    """Test accuracy over the final fits."""
    return mean_interval([metrics["test_accuracy"] for metrics in finals.values()])
