"""`digitlab reproduce`: train a run again from its record alone, and give a verdict."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError, first_line, refuse_damage
from digitlab.base.files import require_file
from digitlab.base.invocation import split_stores
from digitlab.config.compose import Composed, compose, override_values, split_name
from digitlab.config.recorded import config_from_yaml, config_to_plain, flat, with_values
from digitlab.config.types import Config, EvaluateOn
from digitlab.data.datasets import TEST, TRAIN, load_digits
from digitlab.records.reader import (
    damage,
    find_run,
    lab_records,
    lab_tracker,
    recorded_config,
    recorded_data,
    recorded_environment,
    trained,
)
from digitlab.records.record import Identity, Records
from digitlab.records.tracker import RunRow, Tracker
from digitlab.results.at_commit import confirm_code, train_at_commit
from digitlab.results.conclusion import conclude
from digitlab.results.verdict import (
    INCOMPARABLE,
    NOT_REPRODUCED,
    Change,
    Verdict,
    differences,
    reach_verdict,
)
from digitlab.study.run import run_once, train


def reproduce(
    name: str,
    overrides: Sequence[str],
    lab: Path,
    as_json: bool,
    at_commit: bool = False,
    is_trusted: bool = False,
) -> Verdict:
    """Train the run again and compare; the verdict is recorded and printed, too.

    Args:
        overrides: of `trainer.threads`, `trainer.device` and `tracking.*`; with anything else it
            would be another run.
        at_commit: the recorded code trains; it is shown, and run if the answer is yes.
        is_trusted: nobody is asked.

    Raises:
        UserError: there is no such run, or its record does not allow it.
    """
    stores, others = split_stores(overrides)
    values = override_values(others)
    if values.keys() - {"trainer.threads", "trainer.device"}:
        raise UserError(
            f"{', '.join(values)} would make it another run: a reproduction changes "
            "trainer.threads and trainer.device at most. Use "
            f"`digitlab train --config-from {name} ...` instead."
        )
    with lab_records(lab, stores) as records:
        tracker = records.tracker
        row = trained(tracker, name)
        damaged = damage(tracker, row)
        with redirect_stdout(sys.stderr if as_json else sys.stdout):
            if damaged:
                verdict = Verdict(NOT_REPRODUCED, damaged, None, row.run_id)
            elif at_commit:
                confirm_code(row, recorded_environment(tracker, row), is_trusted)
                config = with_values(recorded_config(tracker, row), values)
                verdict = _train_at_commit(tracker, row, overrides, config, lab)
            else:
                verdict = _train_again(records, row, values, lab)
        verdict.show(as_json, row.name)  # before it is noted: the tracker may be away by now
        _record(tracker, row, verdict)
    return verdict


def _record(tracker: Tracker, row: RunRow, verdict: Verdict) -> None:
    text = f"{verdict.verdict} {verdict.run_id or ''}".strip()
    tracker.tag(row.run_id, {"digitlab.reproduced": text})
    if verdict.run_id:
        tracker.tag(verdict.run_id, {"digitlab.verdict": verdict.verdict})


def _train_again(records: Records, row: RunRow, values: Mapping[str, Any], lab: Path) -> Verdict:
    tracker = records.tracker
    config = with_values(recorded_config(tracker, row), values)
    environment = describe_environment()
    then = recorded_environment(tracker, row)
    given = _given(tracker, row, config, lab)
    before = {key: value for key, value in then.items() if key != "numerics"}
    print(f"reproducing {row.name} ({row.run_id})")
    for difference in [*given, *differences(before, environment)]:
        print(f"  {difference}")
    if any(difference.name == "data" for difference in given):
        return Verdict(INCOMPARABLE, [str(given[0])], None, row.run_id)
    tags = {"digitlab.reproduction_of": row.run_id}
    identity = Identity(f"{row.name}-again", "reproduction", tags, None, (), environment)
    outcome = run_once(config, identity, records, lab)
    if outcome.state == "interrupted":
        raise KeyboardInterrupt
    if pending := records.outbox.pending():
        why = records.outbox.problem.rstrip(".") or "the tracker is slow"
        raise UserError(
            f"the reproduction of {row.name} {outcome.state}, and {pending} of its records wait in "
            f"{lab / 'outbox'} ({why}): a verdict must be on a whole record. Try again when the "
            "tracker answers."
        )
    if outcome.state != "finished" or outcome.run_id is None:
        failed = f"the reproduction {outcome.state}: {outcome.reason}"
        return Verdict(NOT_REPRODUCED, [failed], outcome.run_id, row.run_id)
    return _verdict(tracker, row, tracker.get(outcome.run_id), given)


def _train_at_commit(
    tracker: Tracker, row: RunRow, overrides: Sequence[str], config: Config, lab: Path
) -> Verdict:
    """Let the recorded code train; its record is checked here, whatever it prints."""
    given = _given(tracker, row, config, lab)
    if any(difference.name == "data" for difference in given):
        return Verdict(INCOMPARABLE, [str(given[0])], None, row.run_id)
    mine = {"digitlab.reproduction_of": row.run_id}
    before = {run.run_id for run in tracker.find(mine)}
    reason = train_at_commit(row, recorded_environment(tracker, row), overrides, lab)
    new = [run for run in tracker.find(mine) if run.run_id not in before]
    if not new:
        raise UserError(
            f"--at-commit: {row.name}: its code left no record of a run: {reason}. "
            f"Reproduce it without --at-commit."
        )
    again = new[-1]
    state = again.tags.get("digitlab.state")
    if state != "finished":
        failed = f"the reproduction {state}: {again.tags.get('digitlab.reason', reason)}"
        return Verdict(NOT_REPRODUCED, [failed], again.run_id, row.run_id)
    damaged = damage(tracker, again)
    if damaged:
        return Verdict(NOT_REPRODUCED, damaged, again.run_id, row.run_id)
    return _verdict(tracker, row, again, given)


def _given(tracker: Tracker, row: RunRow, config: Config, lab: Path) -> list[Change]:
    """Return what differs before anything is trained: the data first, threads and device."""
    then = recorded_config(tracker, row).trainer
    given = [
        Change("data", recorded_data(row), _data_sha256(config, lab)),
        Change("trainer.threads", then.threads, config.trainer.threads),
        Change("trainer.device", then.device, config.trainer.device),
    ]
    return [item for item in given if item.was != item.now]


def _verdict(tracker: Tracker, row: RunRow, again: RunRow, given: list[Change]) -> Verdict:
    then, now = (recorded_environment(tracker, run) for run in (row, again))
    found = given + differences(then, now)
    with refuse_damage(f"the record of {row.name} ({row.run_id})"):
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
    require_file(file, f"--config {file}")
    try:
        recorded = config_from_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"--config {file} cannot be read ({reason}): it must be a configuration. Name another "
            "file."
        ) from error
    stores, others = split_stores(overrides)
    config = with_values(recorded, override_values(others))
    leaves = flat(config_to_plain(config))
    for row in lab_tracker(lab, stores).find({"digitlab.state": "finished"}):
        same = all(str(leaves.get(key)) == value for key, value in row.params.items())
        if same and "digitlab.weights_sha256" in row.tags:
            return reproduce(row.run_id, stores, lab, as_json=False).exit_status
    print(f"{file}: no finished run has this configuration: there is nothing to compare with")
    config = with_values(config, _tracking_values(stores))
    composed = Composed(config, tuple(overrides))
    return train(composed, lab, {"digitlab.config_from": file.name}, conclude).exit_status


def train_from(name: str, overrides: Sequence[str], lab: Path) -> int:
    """Train a recorded run's configuration with overrides; returns its exit status."""
    given, overrides = split_name("train", overrides)
    stores, others = split_stores(overrides)
    with lab_records(lab, stores) as records:
        row = find_run(records.tracker, name)
        damaged = damage(records.tracker, row) if "digitlab.seal" in row.tags else []
        if damaged:
            raise UserError(f"--config-from {name}: {damaged[0]}. Name another run.")
        recorded = recorded_config(records.tracker, row)
    config = with_values(recorded, override_values(others) | _tracking_values(stores))
    composed = Composed(config, tuple(overrides), given)
    return train(composed, lab, {"digitlab.config_from": row.run_id}, conclude).exit_status


def _tracking_values(stores: Sequence[str]) -> dict[str, Any]:
    """Return where a new run is recorded: at the place of this call, not of the old run."""
    tracking = config_to_plain(compose("train", stores)[0].config)["tracking"]
    return {f"tracking.{key}": value for key, value in tracking.items()}
