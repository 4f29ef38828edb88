"""`digitlab reproduce`: train a run again from its record alone, and give a verdict."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError
from digitlab.config.compose import Composed, compose, override_values
from digitlab.config.recorded import config_from_yaml, config_to_plain, flat, with_values
from digitlab.config.types import Config, EvaluateOn
from digitlab.data.datasets import TEST, TRAIN, load_digits
from digitlab.records.mlflow import RunRow, Tracking
from digitlab.records.reader import (
    damage,
    find_run,
    lab_tracking,
    recorded_config,
    recorded_environment,
    trained,
)
from digitlab.records.record import Identity
from digitlab.results.at_commit import verdict_at_commit
from digitlab.results.verdict import (
    INCOMPARABLE,
    NOT,
    Difference,
    Verdict,
    differences,
    reach_verdict,
)
from digitlab.study.run import Spoken, perform, train


def reproduce(
    name: str, overrides: Sequence[str], lab: Path, as_json: bool, at_commit: bool
) -> int:
    """Train the run again and compare; returns the exit status of the verdict.

    Args:
        overrides: of `trainer.threads` and `tracking.*`; anything else is another run.

    Raises:
        UserError: there is no such run, or its record does not allow it.
    """
    stores, others = _stores(overrides)
    tracking = lab_tracking(lab, stores)
    values = override_values(others)
    if values.keys() - {"trainer.threads"}:
        raise UserError(
            f"{', '.join(values)} would make it another run: a reproduction changes "
            f"trainer.threads at most. Use `digitlab train --config-from {name} ...` instead"
        )
    row = trained(tracking, name)
    if at_commit and not damage(tracking, row):
        then = recorded_environment(tracking, row)
        return _conclude(tracking, row, verdict_at_commit(row, then, overrides, lab), as_json)
    return _reproduce(tracking, row, values, lab, as_json)


def _stores(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the overrides into those of where runs are recorded, and the others."""
    stores = [override for override in overrides if override.startswith("tracking.")]
    return stores, [override for override in overrides if override not in stores]


def _reproduce(
    tracking: Tracking, row: RunRow, values: Mapping[str, Any], lab: Path, as_json: bool
) -> int:
    damaged = damage(tracking, row)
    if damaged:
        return _conclude(tracking, row, Verdict(NOT, damaged, None, row.run_id), as_json)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        verdict = _train_again(tracking, row, values, lab)
    return _conclude(tracking, row, verdict, as_json)


def _conclude(tracking: Tracking, row: RunRow, verdict: Verdict, as_json: bool) -> int:
    text = f"{verdict.verdict} {verdict.run_id or ''}".strip()
    tracking.resume(row.run_id).log(tags={"digitlab.reproduced": text})
    if verdict.run_id:
        tracking.resume(verdict.run_id).log(tags={"digitlab.verdict": verdict.verdict})
    return verdict.report(as_json, row.name)


def _train_again(tracking: Tracking, row: RunRow, values: Mapping[str, Any], lab: Path) -> Verdict:
    recorded = recorded_config(tracking, row)
    config = with_values(recorded, values)
    environment = describe_environment()
    then = recorded_environment(tracking, row)
    digests = json.loads(row.tags.get("digitlab.data_sha256", "null"))
    data = Difference("data", digests, _data_sha256(config, lab))
    threads = Difference("trainer.threads", recorded.trainer.threads, config.trainer.threads)
    given = [item for item in (data, threads) if item.was != item.now]
    before = {key: value for key, value in then.items() if key != "numerics"}
    print(f"reproducing {row.name} ({row.run_id})")
    for difference in [*given, *differences(before, environment)]:
        print(f"  {difference}")
    if data in given:
        return Verdict(INCOMPARABLE, [str(data)], None, row.run_id)
    tags = {"digitlab.reproduction_of": row.run_id}
    identity = Identity(f"{row.name}-again", "reproduction", tags, None, (), environment)
    with Spoken(config) as watch:
        outcome = perform(config, identity, tracking, lab, watch)
    if outcome.state == "interrupted":
        raise KeyboardInterrupt
    if outcome.state != "finished" or outcome.run_id is None:
        failed = f"the reproduction {outcome.state}: {outcome.reason}"
        return Verdict(NOT, [failed], outcome.run_id, row.run_id)
    again = tracking.get(outcome.run_id)
    found = given + differences(then, recorded_environment(tracking, again))
    verdict, reasons = reach_verdict(tracking, row, again, found)
    return Verdict(verdict, [*map(str, found), *reasons], again.run_id, row.run_id)


def _data_sha256(config: Config, lab: Path) -> dict[str, str]:
    data = config.data
    files = [TRAIN, TEST] if data.evaluate_on is EvaluateOn.test else [TRAIN]
    loaded = [load_digits(lab, data.name, f, data.allow_unknown).sha256 for f in files]
    return {name: digest for digests in loaded for name, digest in digests.items()}


def reproduce_file(file: Path, overrides: Sequence[str], lab: Path) -> int:
    """Train the configuration of a `config.yaml`; returns its exit status.

    Where a finished run of the same configuration is recorded, this is its reproduction.

    Raises:
        UserError: the file cannot be read, or is not a configuration.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} cannot be read: {error}") from error
    stores, others = _stores(overrides)
    config = with_values(config_from_yaml(text), override_values(others))
    tracking = lab_tracking(lab, stores)
    leaves = flat(config_to_plain(config))
    for row in tracking.find({"digitlab.state": "finished"}):
        same = all(str(leaves.get(key)) == value for key, value in row.params.items())
        if same and "digitlab.weights_sha256" in row.tags:
            return _reproduce(tracking, row, {}, lab, as_json=False)
    print(f"{file}: no finished run has this configuration: there is nothing to compare with")
    config = with_values(config, _tracking_values(stores))
    return train(Composed(config, tuple(overrides)), lab, {"digitlab.config_from": file.name})


def train_from(name: str, overrides: Sequence[str], lab: Path) -> int:
    """Train a recorded run's configuration with overrides; returns its exit status."""
    stores, others = _stores(overrides)
    tracking = lab_tracking(lab, stores)
    row = find_run(tracking, name)
    damaged = damage(tracking, row) if "digitlab.seal" in row.tags else []
    if damaged:
        raise UserError(f"--config-from {name}: {damaged[0]}")
    values = override_values(others) | _tracking_values(stores)
    config = with_values(recorded_config(tracking, row), values)
    return train(Composed(config, tuple(overrides)), lab, {"digitlab.config_from": row.run_id})


def _tracking_values(stores: Sequence[str]) -> dict[str, Any]:
    """Return where a new run is recorded: where this call says, not where an old one was."""
    tracking = config_to_plain(compose("train", stores)[0].config)["tracking"]
    return {f"tracking.{key}": value for key, value in tracking.items()}
