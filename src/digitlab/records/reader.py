"""What the record of a finished run holds, read back and held against its own digests."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from digitlab.base.errors import UserError, nearest
from digitlab.config.compose import compose
from digitlab.config.recorded import config_from_yaml
from digitlab.config.types import Config
from digitlab.networks.table import build_network
from digitlab.records.mlflow import RunRow, Tracking, open_tracking
from digitlab.records.record import SUMS, row_params, seal, trial_tags


def lab_tracking(lab: Path, overrides: Sequence[str] = ()) -> Tracking:
    """The records of a lab, as the configuration says where they are."""
    return open_tracking(compose("train", overrides)[0].config, lab)


def find_run(tracking: Tracking, name: str) -> RunRow:
    """The run that a person means: an id, a unique beginning of one, a name, `study/7`, champion.

    A champion stands for the fit that its weights are of.
    """
    study, _, number = name.rpartition("/")
    if name == "champion":
        rows = tracking.find({"digitlab.kind": "champion"})
        if not rows:
            raise UserError("champion: no study has one yet: run `make sweep`")
        row = rows[-1]
    elif study:
        rows = []
        if number.isdecimal() and re.fullmatch(r"[\w.-]+", study):
            rows = tracking.find({"digitlab.kind": "trial", **trial_tags(study, int(number))})
        if not rows:
            trials = tracking.find({"digitlab.kind": "trial"})
            known = {f"{r.tags['digitlab.study']}/{r.tags['digitlab.trial']}" for r in trials}
            raise UserError(f"{name}: no such trial, {nearest(name, known)}")
        row = rows[-1]
    else:
        row = tracking.get(name)
    weights_run = row.tags.get("digitlab.weights_run")
    return tracking.get(weights_run) if weights_run else row


def trained(tracking: Tracking, name: str) -> RunRow:
    """As `find_run`, of a run that was trained to its end.

    Raises:
        UserError: it was not, so that there is nothing to compare.
    """
    row = find_run(tracking, name)
    state = row.tags.get("digitlab.state", "not one of digitlab's")
    if state != "finished":
        raise UserError(f"{row.name} ({row.run_id}) is {state}: only finished runs can be compared")
    if "digitlab.weights_sha256" not in row.tags:
        taken = row.tags.get("digitlab.taken_from")
        why = f"was taken from {taken}" if taken else f"is of kind {row.tags.get('digitlab.kind')}"
        raise UserError(
            f"{row.name} ({row.run_id}) {why}, and trained nothing itself: give a trial, "
            "a final fit or champion"
        )
    return row


def damage(tracking: Tracking, row: RunRow) -> list[str]:
    """What of a finished run's record is no longer as it was written; nothing if all is."""
    name = f"of {row.name} ({row.run_id})"
    if "digitlab.seal" not in row.tags:  # a champion's, or from before 0.2: the weights alone
        try:
            tracking.artifact(row.run_id, SUMS)
            return [f"the seal {name} is missing"]
        except UserError:  # it has none; a tracker that is away is met again just below
            pass
        digest = hashlib.sha256(tracking.artifact(row.run_id, "weights.safetensors")).hexdigest()
        whole = digest == row.tags.get("digitlab.weights_sha256")
        return [] if whole else [f"weights.safetensors {name} is not the file that was recorded"]
    sums = tracking.artifact(row.run_id, SUMS).decode(errors="replace")
    history = tracking.history(row.run_id)
    last = {metric: value for metric, _, value in sorted(history, key=lambda told: told[1])}
    if seal(sums, history, row.tags) != row.tags["digitlab.seal"] or last != row.metrics:
        return [f"a metric, a tag or {SUMS} {name} is not what was recorded"]
    found = []
    for line in sums.splitlines():
        digest, _, path = line.partition("  ")
        if hashlib.sha256(tracking.artifact(row.run_id, path)).hexdigest() != digest:
            found.append(f"{path} {name} is not the file that was recorded")
    if not found:
        known = row_params(recorded_config(tracking, row), row.tags["digitlab.kind"])
        found += [
            f"parameter {key} {name} is {row.params.get(key)}, {known.get(key)} in its config.yaml"
            for key in sorted(known.keys() | row.params.keys())
            if row.params.get(key) != known.get(key)
        ]
    return found


def recorded_config(tracking: Tracking, row: RunRow) -> Config:
    """The configuration that a run was trained from.

    Raises:
        UserError: this version cannot read it; says which version wrote it.
    """
    text = tracking.artifact(row.run_id, "config.yaml").decode(errors="replace")
    try:
        return config_from_yaml(text)
    except UserError as error:
        version = recorded_environment(tracking, row).get("libraries", {}).get("digitlab")
        raise UserError(
            f"config.yaml of {row.name} ({row.run_id}), written by digitlab {version}: {error}"
        ) from error


def load_run(tracking: Tracking, name: str) -> tuple[RunRow, Config, nn.Module]:
    """A trained run that a person names as for `find_run`, with its network."""
    row = trained(tracking, name)
    config = recorded_config(tracking, row)
    return row, config, load_network(tracking, row, config)


def load_network(tracking: Tracking, row: RunRow, config: Config) -> nn.Module:
    """The network of a run with its weights, for evaluation."""
    network = build_network(config.model)
    weights = tracking.artifact(row.run_id, "weights.safetensors")
    libraries = recorded_environment(tracking, row).get("libraries", {})
    old = str(libraries.get("digitlab", "")).startswith(("0.1.", "0.2."))
    tensors = safetensors.torch.load(weights)
    network.load_state_dict(_flattened_last(tensors, network) if old else tensors)
    return network.eval()


def _flattened_last(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights from before 0.3, when features were flattened channels first."""
    shapes = {name: value.shape for name, value in network.named_parameters()}  # in their order
    channels = [shape[0] for shape in shapes.values() if len(shape) == 4][-1]
    name = next(name for name, shape in shapes.items() if len(shape) == 2)
    side = math.isqrt(shapes[name][1] // channels)
    columns = weights[name].reshape(-1, channels, side, side).permute(0, 2, 3, 1).flatten(1)
    return weights | {name: columns}


def recorded_environment(tracking: Tracking, row: RunRow) -> dict[str, Any]:
    """What `describe_environment` said when the run began, and what torch computed with."""
    try:
        environment: Any = json.loads(tracking.artifact(row.run_id, "environment.json"))
        return dict(environment)
    except (ValueError, TypeError) as error:
        raise UserError(f"environment.json of {row.name} ({row.run_id}) is damaged") from error


def recorded_guesses(tracking: Tracking, row: RunRow) -> tuple[Tensor, Tensor]:
    """Predicted and true digits (M,) of the images that the run was measured on, in their order.

    Raises:
        UserError: a run from before 0.2, which kept no labels.
    """
    tensors = safetensors.torch.load(tracking.artifact(row.run_id, "predictions.safetensors"))
    if "labels" not in tensors:
        raise UserError(f"{row.name} ({row.run_id}) has kept no labels: reproduce it first")
    return tensors["predictions"], tensors["labels"]


def accuracy_name(row: RunRow) -> str:
    """The metric that a run is judged by."""
    return "test_accuracy" if "test_accuracy" in row.metrics else "val_accuracy"


def over_seeds(tracking: Tracking, row: RunRow) -> list[float]:
    """Accuracies of the runs that differ from `row` in the seed alone, its own among them."""
    same = {key: value for key, value in row.params.items() if key != "trainer.seed"}
    accuracies: dict[str, float] = {}
    for other in [*tracking.find({"digitlab.state": "finished"}), row]:
        whole = "digitlab.weights_sha256" in other.tags and accuracy_name(row) in other.metrics
        alike = {key: value for key, value in other.params.items() if key != "trainer.seed"}
        if whole and alike == same:
            accuracies[other.params["trainer.seed"]] = other.metrics[accuracy_name(row)]
    return list(accuracies.values())
