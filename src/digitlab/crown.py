"""Record a study's champion: its run, its weights, its place in the registry."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from digitlab.champion import Choice, Results, final_jobs, test_interval
from digitlab.config import Config, DataConfig
from digitlab.networks import build_network
from digitlab.record import Identity, begin_record, stage, trial_tags
from digitlab.statistics import Interval
from digitlab.tracking import Tracking, save_servable


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
