"""Train a run again from its record alone, and give a verdict that can be believed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from digitlab.base.environment import describe_environment, source_digest
from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.config.compose import Composed, compose, override_values
from digitlab.config.recorded import config_from_yaml, config_to_plain, flat, with_values
from digitlab.config.types import Config, EvaluateOn
from digitlab.data.datasets import TEST, TRAIN, load_digits
from digitlab.records.mlflow import RunRow, Tracking
from digitlab.records.reader import (
    accuracy_name,
    damage,
    find_run,
    lab_tracking,
    over_seeds,
    recorded_config,
    recorded_environment,
    recorded_guesses,
    trained,
)
from digitlab.records.record import Identity
from digitlab.study.run import Spoken, perform, train

IDENTICAL, WITHIN, NOT, INCOMPARABLE = (
    *("identical", "within tolerance", "not reproduced", "not comparable"),
)
STATUS = {IDENTICAL: 0, WITHIN: 0, NOT: 1, INCOMPARABLE: 3}
_COMPARED = ("train_", "val_", "test_")  # metrics; the others are times

# What a difference is expected to do to a result.
_NOTHING, _ROUNDING, _ANYTHING = (
    "should change nothing",
    "may round otherwise, and so give other weights",
    "may change anything",
)
_EFFECTS = {
    "source": _ANYTHING,
    "data": _ANYTHING,
    "study.workers": "gives trials another history to learn from",
    "study.minutes": "ends the study at another trial",
    "trainer.threads": _ROUNDING,
    "python": _ROUNDING,
    "platform": _ROUNDING,
    "processor": _ROUNDING,
    **{f"libraries.{name}": _ROUNDING for name in ("torch", "torchvision", "numpy")},
    "libraries.pytorch-lightning": _ANYTHING,
    "libraries.optuna": _ANYTHING,
}


@dataclass(frozen=True)
class Difference:
    """One thing that was otherwise when the run was recorded, and what that is expected to do."""

    name: str
    was: Any
    now: Any

    @property
    def effect(self) -> str:
        if self.name.startswith(("numerics.", "libraries.nvidia", "libraries.cuda")):
            return _ROUNDING
        return _EFFECTS.get(self.name, _NOTHING)

    @property
    def harmless(self) -> bool:
        return self.effect == _NOTHING

    def __str__(self) -> str:
        if self.name in ("diff", "untracked"):
            return f"uncommitted changes ({self.name}) were others: {self.effect}"
        return f"{self.name} was {self.was}, is {self.now}: {self.effect}"


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What two environments say differently; libraries and numerics one by one."""
    found = []
    for key in sorted(then.keys() | now.keys()):
        was, is_now = then.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(is_now, Mapping) and key != "untracked":
            inner = differences(was, is_now)
            found += [replace(item, name=f"{key}.{item.name}") for item in inner]
        elif was != is_now:
            found.append(Difference(key, was, is_now))
    return found


@dataclass(frozen=True)
class Verdict:
    """What came of training a run again."""

    verdict: str
    differences: list[str]
    run_id: str | None
    original_run_id: str

    def tell(self, as_json: bool, name: str) -> int:
        """Print it; returns the exit status."""
        if as_json:
            print(json.dumps(self.__dict__, indent=1))
        else:
            for difference in self.differences:
                print(f"  {difference}")
            again = f" and its reproduction {self.run_id}" if self.run_id else ""
            print(f"{self.verdict}: {name} ({self.original_run_id}){again}")
        return STATUS[self.verdict]


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
            f"{', '.join(values)}: a reproduction changes trainer.threads at most: "
            f"use `digitlab train --config-from {name} ...` for another run"
        )
    row = trained(tracking, name)
    if at_commit and not damage(tracking, row):
        verdict = _at_commit(row, recorded_environment(tracking, row), overrides, lab)
        return _conclude(tracking, row, verdict, as_json)
    return _held_to(tracking, row, values, lab, as_json)


def _stores(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides that say where runs are recorded, and the others."""
    stores = [override for override in overrides if override.startswith("tracking.")]
    return stores, [override for override in overrides if override not in stores]


def _held_to(
    tracking: Tracking, row: RunRow, values: Mapping[str, Any], lab: Path, as_json: bool
) -> int:
    broken = damage(tracking, row)
    if broken:
        return _conclude(tracking, row, Verdict(NOT, broken, None, row.run_id), as_json)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        verdict = _again(tracking, row, values, lab)
    return _conclude(tracking, row, verdict, as_json)


def _conclude(tracking: Tracking, row: RunRow, verdict: Verdict, as_json: bool) -> int:
    said = f"{verdict.verdict} {verdict.run_id or ''}".strip()
    tracking.resume(row.run_id).log(tags={"digitlab.reproduced": said})
    if verdict.run_id:
        tracking.resume(verdict.run_id).log(tags={"digitlab.verdict": verdict.verdict})
    return verdict.tell(as_json, row.name)


def _again(tracking: Tracking, row: RunRow, values: Mapping[str, Any], lab: Path) -> Verdict:
    recorded = recorded_config(tracking, row)
    config = with_values(recorded, values)
    environment = describe_environment()
    then = recorded_environment(tracking, row)
    data = Difference(
        "data", json.loads(row.tags["digitlab.data_sha256"]), _data_sha256(config, lab)
    )
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
    verdict, changed = judge(tracking, row, again, found)
    return Verdict(verdict, [*map(str, found), *changed], again.run_id, row.run_id)


def _data_sha256(config: Config, lab: Path) -> dict[str, str]:
    data = config.data
    files = [TRAIN, TEST] if data.evaluate_on is EvaluateOn.test else [TRAIN]
    loaded = [load_digits(lab, data.name, f, data.allow_unknown).sha256 for f in files]
    return {name: digest for digests in loaded for name, digest in digests.items()}


def judge(
    tracking: Tracking, row: RunRow, again: RunRow, found: Sequence[Difference]
) -> tuple[str, list[str]]:
    """The verdict on two runs of one configuration, and what led to it.

    Where nothing differs that may change a bit, a changed bit means that the run is not reproduced.
    Where something does, accuracies may lie as far apart as those of two seeds; beyond that the two
    runs cannot be compared, since the difference may well be the cause.
    """
    changed = compare_runs(tracking, row.run_id, again.run_id)
    if not changed:
        return IDENTICAL, []
    if all(difference.harmless for difference in found):
        return NOT, changed
    name = accuracy_name(row)
    distance = abs(row.metrics[name] - again.metrics.get(name, 0.0))
    tolerance, reason = _tolerance(tracking, row, again)
    said = f"{name} is {distance:.4f} off; {tolerance:.4f} is tolerated: {reason}"
    return (WITHIN if distance <= tolerance else INCOMPARABLE), [*changed, said]


def _tolerance(tracking: Tracking, row: RunRow, again: RunRow) -> tuple[float, str]:
    """How far the accuracies of two runs may lie apart by chance, in 95 of 100 cases."""
    seeds = over_seeds(tracking, row)
    if len(seeds) >= 3:
        deviation = float(np.std(seeds, ddof=1))
        reason = f"two seeds differ so, from a deviation of {deviation:.5f} over {len(seeds)} seeds"
        return 1.96 * 2**0.5 * deviation, reason
    rights = []
    for run in (row, again):
        guesses, labels = recorded_guesses(tracking, run)
        rights.append(guesses == labels)
    disagree = int((rights[0] != rights[1]).sum())
    reason = f"{disagree} images are right in one alone, which is chance for each (McNemar)"
    return 1.96 * disagree**0.5 / len(rights[0]), reason


def compare_runs(tracking: Tracking, original: str, again: str) -> list[str]:
    """What differs in what came out: every metric of every epoch, weights, predictions, data."""
    found = []
    histories = [
        {(n, step): value for n, step, value in tracking.history(run) if n.startswith(_COMPARED)}
        for run in (original, again)
    ]
    for key in sorted(histories[0].keys() | histories[1].keys()):
        was, now = histories[0].get(key), histories[1].get(key)
        if was != now:
            found.append(f"{key[0]} of epoch {key[1]} was {was}, is {now}")
    tags = [tracking.get(run).tags for run in (original, again)]
    for name in ("weights", "predictions", "data"):
        was_tag, now_tag = (tag.get(f"digitlab.{name}_sha256") for tag in tags)
        if was_tag != now_tag:
            found.append(f"SHA-256 of the {name} was {was_tag}, is {now_tag}")
    return found


_COMMAND = "import sys; from digitlab.cli import main; sys.exit(main())"


def _at_commit(
    row: RunRow, then: Mapping[str, Any], overrides: Sequence[str], lab: Path
) -> Verdict:
    """The verdict of the recorded code on its own run, from a temporary work tree.

    Raises:
        UserError: the code cannot be had any more.
    """
    commit, name = str(then.get("commit") or ""), f"--at-commit: {row.name}"
    untracked = then.get("untracked") or {}
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise UserError(f"{name} was recorded outside a repository: its commit is not known")
    if isinstance(untracked, str) or None in untracked.values():
        raise UserError(f"{name} had untracked files that are not in its record")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        try:
            _git("worktree", "add", "--detach", str(tree), commit)
            if then.get("diff"):
                _git("-C", str(tree), "apply", "--whitespace=nowarn", "-", given=str(then["diff"]))
            for path, text in untracked.items():
                target = (tree / path).resolve()
                if not target.is_relative_to(tree):
                    raise UserError(f"{name}: its untracked file {path} lies outside the checkout")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(text.encode())
            package = tree / "src" / "digitlab"
            if not package.is_dir() or source_digest(package) != then.get("source"):
                raise UserError(f"{name} at {commit[:12]}: its code is not all in its record")
            command = [sys.executable, "-c", _COMMAND, "reproduce", row.run_id, "--json"]
            place = os.environ | {"PYTHONPATH": str(tree / "src"), "DIGITLAB_HOME": str(lab)}
            done = subprocess.run(
                [*command, *overrides], cwd=tree, env=place, capture_output=True, check=False
            )
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip().splitlines()
            raise UserError(
                f"{name} at {commit[:12]}: {reason[-1] if reason else error}"
            ) from error
        except OSError as error:
            raise UserError(f"{name} at {commit[:12]}: {error}") from error
        finally:
            shutil.rmtree(tree, ignore_errors=True)
            with suppress(OSError, subprocess.CalledProcessError):
                _git("worktree", "prune")
    try:
        told = json.loads(done.stdout)
        return Verdict(**{key: told[key] for key in Verdict.__annotations__})
    except (ValueError, KeyError, TypeError) as error:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        said = reason[-1] if reason else f"it ended with status {done.returncode}"
        raise UserError(f"{name} at {commit[:12]}: its code says: {said}") from error


def _git(*arguments: str, given: str = "") -> None:
    command = ["git", "-C", str(ROOT), *arguments]
    content = given.encode(errors="surrogateescape")
    subprocess.run(command, input=content, capture_output=True, check=True)


def reproduce_file(file: Path, overrides: Sequence[str], lab: Path) -> int:
    """Train the configuration of a `config.yaml`; its exit status.

    Where a finished run of the same configuration is recorded, this is its reproduction.

    Raises:
        UserError: the file cannot be read, or is not a configuration.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: cannot be read: {error}") from error
    stores, others = _stores(overrides)
    config = with_values(config_from_yaml(text), override_values(others))
    tracking = lab_tracking(lab, stores)
    leaves = flat(config_to_plain(config))
    for row in tracking.find({"digitlab.state": "finished"}):
        same = all(str(leaves.get(key)) == value for key, value in row.params.items())
        if same and "digitlab.weights_sha256" in row.tags:
            return _held_to(tracking, row, {}, lab, as_json=False)
    print(f"{file}: no finished run has this configuration: there is nothing to compare with")
    config = with_values(config, _tracking_values(stores))
    return train(Composed(config, tuple(overrides)), lab, {"digitlab.config_from": file.name})


def train_from(name: str, overrides: Sequence[str], lab: Path) -> int:
    """Train a recorded run's configuration with overrides; its exit status."""
    stores, others = _stores(overrides)
    tracking = lab_tracking(lab, stores)
    row = find_run(tracking, name)
    if "digitlab.seal" in row.tags:
        broken = damage(tracking, row)
        if broken:
            raise UserError(f"--config-from {name}: {broken[0]}")
    values = override_values(others) | _tracking_values(stores)
    config = with_values(recorded_config(tracking, row), values)
    composed = Composed(config, tuple(overrides))
    return train(composed, lab, {"digitlab.config_from": row.run_id})


def _tracking_values(stores: Sequence[str]) -> dict[str, Any]:
    """Where a new run is recorded: where this call says, not where an old one was."""
    tracking = config_to_plain(compose("train", stores)[0].config)["tracking"]
    return {f"tracking.{key}": value for key, value in tracking.items()}
