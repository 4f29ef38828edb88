"""Record a study's champion: its run, its weights, its place in the registry."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from digitlab.champion import Choice, Results, final_jobs, test_interval
from digitlab.config import Config
from digitlab.record import Identity, begin_record, stage, trial_tags
from digitlab.tracking import Tracking


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
    weights_run = str(next(iter(finals.values()))["run"])
    tags = trial_tags(study, champion.number) | {"digitlab.weights_run": weights_run}
    identity = dataclasses.replace(identity, name=f"{study}-champion", kind="champion", tags=tags)
    record = begin_record(tracking, first, identity)
    folder = stage(lab, first, identity)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    if weights_run:
        weights = tracking.artifact(weights_run, "weights.safetensors")
        (folder / "weights.safetensors").write_bytes(weights)
        record.log(tags={"digitlab.weights_sha256": hashlib.sha256(weights).hexdigest()})
    record.keep(folder)
    record.log(test_metrics(summary))
    record.end("finished")
    if record.run_id:
        tracking.register(study, record.run_id, {"trial": str(champion.number)})
    return summary | {"run_id": record.run_id}


def test_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The metrics by which other programs know a champion's test accuracy."""
    interval = summary["test_accuracy"]
    return {
        "test_accuracy_mean": interval["mean"],
        "test_accuracy_low": interval["low"],
        "test_accuracy_high": interval["high"],
        "test_seeds": interval["n"],
    }
