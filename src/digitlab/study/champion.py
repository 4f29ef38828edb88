"""From candidates to the champion: who is confirmed, who is chosen, and what is recorded of it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from digitlab.base.statistics import Interval, mean_interval, pooled_intervals
from digitlab.config.recorded import with_values
from digitlab.config.types import Config, DataConfig
from digitlab.networks.table import build_network
from digitlab.records.mlflow import Tracking, save_servable
from digitlab.records.record import Identity, begin_record, stage, trial_tags
from digitlab.study.trials import TrialRow
from digitlab.study.workers.processes import Job

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
            values = {
                "trainer.seed": seed,
                "data.evaluate_on": "test" if kind == "final" else "validation",
            }
            key = f"{row.number}/{seed}"
            tags = {"digitlab.seed": str(seed)}
            jobs[key] = Job(kind, row.number, with_values(config, row.values | values), tags)
    return jobs


@dataclass(frozen=True)
class Choice:
    """The champion, the candidates it was chosen from and why."""

    champion: TrialRow
    intervals: dict[int, Interval]  # validation accuracy over the new seeds, by trial number
    tied: list[int]  # numbers of the candidates that cannot be told from the best, itself included


def choose(rows: Sequence[TrialRow], confirmed: Results) -> Choice:
    """The best mean validation accuracy over new seeds; of those that are tied, the cheapest.

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


def crown(
    tracking: Tracking,
    config: Config,
    identity: Identity,
    lab: Path,
    choice: Choice,
    finals: Results,
) -> dict[str, Any]:
    """Record the champion and its test accuracy; returns the summary that the study notes.

    The weights are those of the first final fit: the best of them would be chosen by the test set.
    """
    interval = test_interval(finals)
    champion = choice.champion
    summary: dict[str, Any] = {
        "trial": champion.number,
        "values": champion.values,
        "val_accuracy": {n: dataclasses.asdict(i) for n, i in choice.intervals.items()},
        "tied": choice.tied,
        "test_accuracy": dataclasses.asdict(interval),
    }
    study = config.study.name
    mine = {"digitlab.study": study, "digitlab.kind": "champion"}
    for row in tracking.find(mine):  # of an earlier call with fewer trials
        tracking.delete(row.run_id)
    first = next(iter(final_jobs(config, champion).values())).config
    assert first is not None
    key, metrics = next(iter(finals.items()))
    weights_run = str(metrics["run"])
    if not weights_run:  # its record was kept back while the tracker was away
        same = {"digitlab.kind": "final", "digitlab.state": "finished"}
        same["digitlab.seed"] = key.split("/")[1]
        rows = tracking.find(same | trial_tags(study, champion.number))
        weights_run = rows[-1].run_id if rows else ""
    tags = trial_tags(study, champion.number) | {"digitlab.weights_run": weights_run}
    identity = dataclasses.replace(identity, name=f"{study}-champion", kind="champion", tags=tags)
    record = begin_record(tracking, first, identity)
    folder = stage(lab, first, identity)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    if weights_run:
        weights = tracking.artifact(weights_run, "weights.safetensors")
        (folder / "weights.safetensors").write_bytes(weights)
        record.log(tags={"digitlab.weights_sha256": hashlib.sha256(weights).hexdigest()})
        network = build_network(first.model)
        network.load_state_dict(safetensors.torch.load(weights))
        example = np.zeros((2, 1, 28, 28), np.float32)  # of one, the export makes a constant
        save_servable(_Served(network, first.data), example, folder / "model")
    record.keep(folder)
    record.log(test_metrics(summary))
    record.end("finished")
    if record.run_id:
        card = _card(config, summary, first)
        tracking.register(study, record.run_id, {"trial": str(champion.number)}, card)
    return summary | {"run_id": record.run_id}


class _Served(torch.nn.Module):
    """Pixels 0 to 255, light on dark (N, 1, 28, 28), to the probabilities of ten digits."""

    def __init__(self, network: torch.nn.Module, data: DataConfig) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, data.mean, data.std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network((pixels / 255 - self.mean) / self.std)
        return logits.softmax(1)


def _card(config: Config, summary: Mapping[str, Any], first: Config) -> str:
    """A model card (Mitchell et al. 2019): what it is, how good, what it is not for."""
    interval = Interval(**summary["test_accuracy"])
    values = ", ".join(f"`{key}={value}`" for key, value in summary["values"].items())
    return "\n".join(
        [
            f"**{first.model.name}**, champion of study `{config.study.name}`: trial "
            f"{summary['trial']} ({values}).",
            "",
            f"- Test accuracy on {config.data.name}: {interval}, 95 % interval over seeds.",
            "- Input: pixels 0 to 255 as float32 (N, 1, 28, 28), light digit on dark, centred as "
            "MNIST's are. Output: probabilities (N, 10).",
            f"- Trained on all training images of {config.data.name}; seed {first.trainer.seed}.",
            "- Not for letters, several digits, or photos that were not prepared as MNIST was.",
            "- Weights: the first final fit's; the best one's would be chosen by the test set.",
        ]
    )


def test_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The metrics by which other programs know a champion's test accuracy."""
    interval = summary["test_accuracy"]
    return {
        "test_accuracy_mean": interval["mean"],
        "test_accuracy_low": interval["low"],
        "test_accuracy_high": interval["high"],
        "test_seeds": interval["n"],
    }
