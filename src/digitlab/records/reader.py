"""What the record of a finished run holds, read back and compared with its own digests."""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from digitlab.base.errors import UserError, nearest, refuse_damage, visible
from digitlab.base.invocation import command
from digitlab.config.compose import compose
from digitlab.config.recorded import config_from_yaml
from digitlab.config.types import Config
from digitlab.records.record import SUMS, Records, open_records, open_tracker, row_params, seal
from digitlab.records.tracker import RunRow, Tracker, restore_command

if TYPE_CHECKING:  # torch is imported where a network is built: most readers need none
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn


def lab_tracker(lab: Path, overrides: Sequence[str] = ()) -> Tracker:
    """Open the records of a lab, at the place that the configuration names."""
    return open_tracker(compose("train", overrides)[0].config, lab)


def lab_records(lab: Path, overrides: Sequence[str] = ()) -> Records:
    """Open the records of a lab to write, too."""
    return open_records(compose("train", overrides)[0].config, lab)


def find_run(tracker: Tracker, name: str) -> RunRow:
    """Return the run that a person names.

    An id or its beginning, a name, `study/7`, `study/champion`, or `champion`: the one that was
    registered last, of the default recipe's data if any is. A champion stands for the fit that its
    weights are of.
    """
    study, _, number = name.rpartition("/")
    if number == "champion":
        row = _find_champion(tracker, study)
    elif study:
        row = _find_trial(tracker, study, number)
    else:
        row = tracker.get(name)
    weights_run = row.tags.get("digitlab.weights_run")
    return tracker.get(weights_run) if weights_run else row


def _find_champion(tracker: Tracker, study: str) -> RunRow:
    rows = tracker.find({"digitlab.kind": "champion"})
    if study:
        known = {row.tags.get("digitlab.study", "") for row in rows}
        rows = [row for row in rows if row.tags.get("digitlab.study") == study]
        if not rows:
            _refuse_deleted(tracker, f"{study}/champion", {"digitlab.study": study})
            raise UserError(f"{study}/champion: no such champion, {nearest(study, known)}")
    if not rows:
        _refuse_deleted(tracker, "champion", {})
        raise UserError(
            f"champion is not available: no study has selected one yet. Run `{command('sweep')}`."
        )
    if len({row.params.get("data.name") for row in rows}) > 1:
        name = compose("train", ())[0].config.data.name
        rows = [row for row in rows if row.params.get("data.name") == name] or rows
    return rows[-1]


def _refuse_deleted(tracker: Tracker, name: str, tags: Mapping[str, str]) -> None:
    """Raise UserError if a champion with these tags was deleted: it can be restored."""
    for champion in reversed(tracker.find_deleted({**tags, "digitlab.kind": "champion"})):
        study, run_id = champion.tags.get("digitlab.study", ""), champion.run_id
        mine = {"digitlab.study_id": champion.tags.get("digitlab.study_id", "")}
        if tracker.find({**mine, "digitlab.kind": "study"}):
            raise UserError(
                f"{name} is not available: the champion's run {run_id} of study {study} was "
                f"deleted in MLflow. Restore it with `{restore_command(tracker, run_id)}`."
            )
        raise UserError(
            f"{name} is not available: study {study}, which has selected one, was deleted. "
            f"Restore it with `{command('restore', study)}`, or, where its runs were deleted in "
            f"MLflow alone, with `{restore_command(tracker, run_id)}`."
        )


def _find_trial(tracker: Tracker, study: str, number: str) -> RunRow:
    """Return the run of a trial: of its attempts, the finished one, else the last."""
    rows = []
    if number.isdecimal() and re.fullmatch(r"[\w.-]+", study):
        wanted = {"digitlab.kind": "trial", "digitlab.study": study}
        rows = tracker.find({**wanted, "digitlab.trial": str(int(number))})
    if not rows:
        trials = [row.tags for row in tracker.find({"digitlab.kind": "trial"})]
        known = {f"{t.get('digitlab.study')}/{t.get('digitlab.trial')}" for t in trials}
        raise UserError(f"{study}/{number}: no such trial, {nearest(f'{study}/{number}', known)}")
    valid = [row for row in rows if "digitlab.superseded_by" not in row.tags] or rows
    return ([row for row in valid if row.status == "FINISHED"] or valid)[-1]


def trained(tracker: Tracker, name: str) -> RunRow:
    """As `find_run`; UserError unless the run was trained to its end, and has weights."""
    row = find_run(tracker, name)
    state = row.tags.get("digitlab.state", "not one of digitlab's")
    if state != "finished":
        raise UserError(
            f"{row.name} ({row.run_id}) is {state}: it must be a finished run. Name another run."
        )
    if "digitlab.weights_sha256" not in row.tags:
        source = row.tags.get("digitlab.taken_from")
        kind = row.tags.get("digitlab.kind")
        why = f"was taken from {source}" if source else f"is of kind {kind}"
        raise UserError(
            f"{row.name} ({row.run_id}) {why}, and trained nothing itself: it must be a run "
            "with weights. Name a trial, a final fit or champion."
        )
    return row


def damage(tracker: Tracker, row: RunRow) -> list[str]:
    """Return what of a finished run's record is not as it was written; nothing if all is."""
    name = f"of {row.name} ({row.run_id})"
    if "digitlab.seal" not in row.tags:
        return [f"the seal {name} is missing"]
    sums = tracker.artifact(row.run_id, SUMS).decode(errors="replace")
    history = tracker.history(row.run_id)
    last = {metric: value for metric, _, value in sorted(history, key=lambda point: point[1])}
    if seal(sums, history, row.tags) != row.tags["digitlab.seal"] or last != row.metrics:
        return [f"a metric, a tag or {SUMS} {name} is not what was recorded"]
    found = []
    for line in sums.splitlines():
        digest, _, path = line.partition("  ")
        if hashlib.sha256(tracker.artifact(row.run_id, path)).hexdigest() != digest:
            found.append(f"{path} {name} is not the file that was recorded")
    if not found:
        known = row_params(recorded_config(tracker, row), row.tags.get("digitlab.kind", ""))
        found += [
            f"parameter {key} {name} is {row.params.get(key)}, {known.get(key)} in its config.yaml"
            for key in sorted(known.keys() | row.params.keys())
            if row.params.get(key) != known.get(key)
        ]
    return found


def recorded_config(tracker: Tracker, row: RunRow) -> Config:
    """Return a run's configuration; UserError, with the writer's version, if it is unreadable."""
    text = tracker.artifact(row.run_id, "config.yaml").decode(errors="replace")
    try:
        return config_from_yaml(text)
    except UserError as error:
        version = recorded_environment(tracker, row).get("libraries", {}).get("digitlab")
        raise UserError(
            f"config.yaml of {row.name} ({row.run_id}), written by digitlab {version}: {error}"
        ) from error


def load_run(tracker: Tracker, name: str | None) -> tuple[RunRow, Config, "nn.Module"]:
    """Return a trained run and its network.

    Args:
        name: as for `find_run`; None for the champion or, where no study has one, the run that was
            trained last, which is then printed.
    """
    row = trained(tracker, name or _default_run(tracker))
    config = recorded_config(tracker, row)
    return row, config, load_network(tracker, row, config)


def _default_run(tracker: Tracker) -> str:
    if tracker.find({"digitlab.kind": "champion"}):
        return "champion"
    runs = tracker.find({"digitlab.kind": "train", "digitlab.state": "finished"})
    if not runs:
        return "champion"  # whose error names what is missing
    newest = runs[-1]
    name = visible(f"{newest.name} ({newest.run_id})")
    print(f"there is no record of a champion: using {name}", file=sys.stderr)
    return newest.run_id


def load_network(tracker: Tracker, row: RunRow, config: Config) -> "nn.Module":
    """Return the network of a run with its weights, for evaluation.

    Raises:
        UserError: the weights are not those that were recorded, or of another format.
    """
    content = verified(tracker, row, "weights")
    with refuse_damage(_of("weights.safetensors", row)):
        metadata = _metadata(content)
    if metadata.get("format") != "1" or metadata.get("layout") != "channels_last":
        raise UserError(
            f"{_of('weights.safetensors', row)} cannot be used: its metadata must "
            "have format=1 and layout=channels_last. Train the run again."
        )
    import safetensors.torch

    from digitlab.networks.table import build_network

    network = build_network(config.model)
    with refuse_damage(_of("weights.safetensors", row), SafetensorError):
        weights = safetensors.torch.load(content)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("weights must be finite")
        network.load_state_dict(weights)
    return network.eval()


def _of(file: str, row: RunRow) -> str:
    return f"{file} of {row.name} ({row.run_id})"


def verified(tracker: Tracker, row: RunRow, name: str) -> bytes:
    """Return an artifact whose digest is a tag of the run, once the two agree."""
    content = tracker.artifact(row.run_id, f"{name}.safetensors")
    if hashlib.sha256(content).hexdigest() != row.tags.get(f"digitlab.{name}_sha256"):
        raise UserError(
            f"{_of(f'{name}.safetensors', row)} is not the file that was recorded: "
            "its SHA-256 must be that of the run's tag. Reproduce the run."
        )
    return content


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file: its first 8 bytes are the header's length."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return dict(header.get("__metadata__", {}))


def recorded_environment(tracker: Tracker, row: RunRow) -> dict[str, Any]:
    """Return what `describe_environment` found when the run started, and torch's numerics."""
    content = tracker.artifact(row.run_id, "environment.json")
    with refuse_damage(_of("environment.json", row)):
        environment = dict(json.loads(content))
        for key in ("libraries", "numerics", "untracked"):
            if not isinstance(environment.get(key, {}), dict):
                raise TypeError(f"{key} must be a mapping")
    return environment


def recorded_guesses(
    tracker: Tracker, row: RunRow
) -> tuple["NDArray[np.integer]", "NDArray[np.integer]"]:
    """Return predicted and true digits (M,) of the images that the run was measured on."""
    guesses, labels = _recorded_answers(tracker, row, "predictions", "labels")
    if guesses.shape != labels.shape or guesses.ndim != 1:
        raise UserError(
            f"{_of('predictions.safetensors', row)} is damaged: its sizes must be as recorded. "
            f"Reproduce "
            "the run."
        )
    return guesses, labels


def recorded_logits(tracker: Tracker, row: RunRow, count: int) -> "NDArray[np.floating]":
    """Return the logits (count, 10) of the images that the run was measured on."""
    [logits] = _recorded_answers(tracker, row, "logits")
    if logits.shape != (count, 10):
        raise UserError(
            f"{_of('predictions.safetensors', row)} is damaged: it must be of {count} images. "
            f"Reproduce the run."
        )
    return logits


def _recorded_answers(tracker: Tracker, row: RunRow, *names: str) -> list["NDArray[Any]"]:
    import safetensors.numpy

    content = verified(tracker, row, "predictions")
    with refuse_damage(_of("predictions.safetensors", row), SafetensorError):
        tensors = safetensors.numpy.load(content)
        return [tensors[name] for name in names]


def recorded_data(row: RunRow) -> dict[str, str] | None:
    """Return the SHA-256 of the files that a run read, by name; None if it names none."""
    with refuse_damage(_of("the tag digitlab.data_sha256", row)):
        digests = json.loads(row.tags.get("digitlab.data_sha256", "null"))
        return None if digests is None else dict(digests)


def accuracy_name(row: RunRow) -> str:
    """Return the metric that a run is compared by."""
    return "test_accuracy" if "test_accuracy" in row.metrics else "val_accuracy"


def over_seeds(tracker: Tracker, row: RunRow) -> list[RunRow]:
    """Return the runs that differ from `row` in the seed alone, one of each seed.

    They have read the same files. A trial counts only where its configuration has no other run: a
    search selects what measures high, and new fits of it measure less.
    """
    same, data = _without_seed(row), row.tags.get("digitlab.data_sha256")
    trials: dict[str, RunRow] = {}
    others: dict[str, RunRow] = {}
    for other in [*tracker.find({"digitlab.state": "finished"}), row]:
        is_whole = "digitlab.weights_sha256" in other.tags and accuracy_name(row) in other.metrics
        is_whole = is_whole and other.tags.get("digitlab.data_sha256") == data
        if is_whole and "trainer.seed" in other.params and _without_seed(other) == same:
            found = trials if other.tags.get("digitlab.kind") == "trial" else others
            found[other.params["trainer.seed"]] = other
    return list((others or trials).values())


def _without_seed(row: RunRow) -> dict[str, str]:
    return {key: value for key, value in row.params.items() if key != "trainer.seed"}
