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
from digitlab.records.reader import (
    damage,
    find_run,
    lab_records,
    recorded_config,
    recorded_environment,
    trained,
)
from digitlab.records.record import Identity, Records
from digitlab.records.store import RunRow, Tracker
from digitlab.results.at_commit import verdict_at_commit
from digitlab.results.verdict import (
    INCOMPARABLE,
    NOT,
    Difference,
    Verdict,
    differences,
    reach_verdict,
)
from digitlab.study.run import run_once, train


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
    values = override_values(others)
    if values.keys() - {"trainer.threads"}:
        raise UserError(
            f"{', '.join(values)} would make it another run: a reproduction changes "
            f"trainer.threads at most. Use `digitlab train --config-from {name} ...` instead"
        )
    with lab_records(lab, stores) as records:
        tracker = records.tracker
        row = trained(tracker, name)
        if at_commit and not damage(tracker, row):
            then = recorded_environment(tracker, row)
            return _conclude(tracker, row, verdict_at_commit(row, then, overrides, lab), as_json)
        return _reproduce(records, row, values, lab, as_json)


def _stores(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the overrides into those of where runs are recorded, and the others."""
    stores = [override for override in overrides if override.startswith("tracking.")]
    return stores, [override for override in overrides if override not in stores]


def _reproduce(
    records: Records, row: RunRow, values: Mapping[str, Any], lab: Path, as_json: bool
) -> int:
    tracker = records.tracker
    damaged = damage(tracker, row)
    if damaged:
        return _conclude(tracker, row, Verdict(NOT, damaged, None, row.run_id), as_json)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        verdict = _train_again(records, row, values, lab)
    return _conclude(tracker, row, verdict, as_json)


def _conclude(tracker: Tracker, row: RunRow, verdict: Verdict, as_json: bool) -> int:
    text = f"{verdict.verdict} {verdict.run_id or ''}".strip()
    tracker.tag(row.run_id, {"digitlab.reproduced": text})
    if verdict.run_id:
        tracker.tag(verdict.run_id, {"digitlab.verdict": verdict.verdict})
    return verdict.report(as_json, row.name)


def _train_again(records: Records, row: RunRow, values: Mapping[str, Any], lab: Path) -> Verdict:
    tracker = records.tracker
    recorded = recorded_config(tracker, row)
    config = with_values(recorded, values)
    environment = describe_environment()
    then = recorded_environment(tracker, row)
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
    outcome = run_once(config, identity, records, lab)
    if outcome.state == "interrupted":
        raise KeyboardInterrupt
    if outcome.state != "finished" or outcome.run_id is None:
        failed = f"the reproduction {outcome.state}: {outcome.reason}"
        return Verdict(NOT, [failed], outcome.run_id, row.run_id)
    again = tracker.get(outcome.run_id)
    found = given + differences(then, recorded_environment(tracker, again))
    verdict, reasons = reach_verdict(tracker, row, again, found)
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
    leaves = flat(config_to_plain(config))
    with lab_records(lab, stores) as records:
        for row in records.tracker.find({"digitlab.state": "finished"}):
            same = all(str(leaves.get(key)) == value for key, value in row.params.items())
            if same and "digitlab.weights_sha256" in row.tags:
                return _reproduce(records, row, {}, lab, as_json=False)
    print(f"{file}: no finished run has this configuration: there is nothing to compare with")
    config = with_values(config, _tracking_values(stores))
    return train(Composed(config, tuple(overrides)), lab, {"digitlab.config_from": file.name})


def train_from(name: str, overrides: Sequence[str], lab: Path) -> int:
    """Train a recorded run's configuration with overrides; returns its exit status."""
    stores, others = _stores(overrides)
    with lab_records(lab, stores) as records:
        row = find_run(records.tracker, name)
        damaged = damage(records.tracker, row) if "digitlab.seal" in row.tags else []
        if damaged:
            raise UserError(f"--config-from {name}: {damaged[0]}")
        recorded = recorded_config(records.tracker, row)
    config = with_values(recorded, override_values(others) | _tracking_values(stores))
    return train(Composed(config, tuple(overrides)), lab, {"digitlab.config_from": row.run_id})


def _tracking_values(stores: Sequence[str]) -> dict[str, Any]:
    """Return where a new run is recorded: where this call says, not where an old one was."""
    tracking = config_to_plain(compose("train", stores)[0].config)["tracking"]
    return {f"tracking.{key}": value for key, value in tracking.items()}
