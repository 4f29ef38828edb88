"""Train a run again from its record alone, and say whether the same came out."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from digitlab.compose import compose, config_from_yaml
from digitlab.environment import describe_environment
from digitlab.errors import UserError
from digitlab.record import Identity
from digitlab.run import perform
from digitlab.single import Spoken
from digitlab.tracking import RunRow, Tracking, open_tracking
from digitlab.training import Watch

_COMPARED = ("train_", "val_", "test_")  # metrics; the others are times


def find_run(tracking: Tracking, name: str) -> RunRow:
    """The run that `name` means; a champion stands for the fit that its weights are of."""
    if name == "champion":
        rows = tracking.find({"digitlab.kind": "champion"})
        if not rows:
            raise UserError("champion: no study has one yet: run `make sweep`")
        row = rows[-1]
    else:
        row = tracking.get(name)
    weights_run = row.tags.get("digitlab.weights_run")
    return tracking.get(weights_run) if weights_run else row


def reproduce(name: str, lab: Path, as_json: bool) -> int:
    """Train the run again; returns 0 when every metric and weight is the same, else 1.

    Raises:
        UserError: there is no such run, or its record does not allow it.
    """
    tracking = open_tracking(compose("train", [])[0].config, lab)
    row = find_run(tracking, name)
    if row.tags.get("digitlab.state") != "finished":
        state = row.tags.get("digitlab.state", "not one of digitlab's")
        raise UserError(
            f"{row.name} ({row.run_id}) is {state}: only finished runs can be reproduced"
        )
    if "digitlab.weights_sha256" not in row.tags:
        raise UserError(
            f"{row.name} ({row.run_id}) is of kind {row.tags.get('digitlab.kind')}, "
            "which trains nothing: give a trial, a final fit or champion"
        )
    config = config_from_yaml(tracking.artifact(row.run_id, "config.yaml").decode())
    environment = describe_environment()
    then = json.loads(tracking.artifact(row.run_id, "environment.json"))
    differences = [
        f"{key} was {then.get(key)}, is {environment.get(key)}"
        for key in ("commit", "libraries", "python", "platform", "processor", "cores")
        if then.get(key) != environment.get(key)
    ]
    say = sys.stderr if as_json else sys.stdout
    print(f"reproducing {row.name} ({row.run_id})", file=say)
    for difference in differences:
        print(f"  {difference}", file=say)
    tags = {"digitlab.reproduction_of": row.run_id}
    identity = Identity(f"{row.name}-again", "reproduction", tags, None, (), environment)
    with Spoken(config) if not as_json else _Silent() as watch:
        outcome = perform(config, identity, tracking, lab, watch)
    if outcome.state != "finished":
        raise UserError(f"the reproduction {outcome.state}: {outcome.reason}")
    assert outcome.run_id is not None
    changed = compare_runs(tracking, row.run_id, outcome.run_id)
    verdict = "not reproduced" if changed else "identical"
    tracking.resume(outcome.run_id).log(tags={"digitlab.verdict": verdict})
    document: dict[str, Any] = {
        "verdict": verdict,
        "differences": differences + changed,
        "run_id": outcome.run_id,
        "original_run_id": row.run_id,
    }
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        for difference in changed:
            print(f"  {difference}")
        print(f"{verdict}: {row.name} ({row.run_id}) and its reproduction {outcome.run_id}")
    return 1 if changed else 0


def compare_runs(tracking: Tracking, original: str, again: str) -> list[str]:
    """What differs between two runs of one configuration: every metric of every epoch, the weights
    (as recorded and as they lie in the artifacts) and the data."""
    differences = []
    histories = [
        {(n, step): value for n, step, value in tracking.history(run) if n.startswith(_COMPARED)}
        for run in (original, again)
    ]
    for key in sorted(histories[0].keys() | histories[1].keys()):
        was, now = histories[0].get(key), histories[1].get(key)
        if was != now:
            differences.append(f"{key[0]} of epoch {key[1]} was {was}, is {now}")
    rows = [tracking.get(run) for run in (original, again)]
    for tag in ("digitlab.weights_sha256", "digitlab.predictions_sha256", "digitlab.data_sha256"):
        was_tag, now_tag = (row.tags.get(tag) for row in rows)
        if was_tag != now_tag:
            differences.append(f"{tag} was {was_tag}, is {now_tag}")
    for row in rows:
        weights = tracking.artifact(row.run_id, "weights.safetensors")
        if hashlib.sha256(weights).hexdigest() != row.tags.get("digitlab.weights_sha256"):
            differences.append(
                f"weights.safetensors of {row.run_id} is not the file that was recorded"
            )
    return differences


class _Silent(Watch):
    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None: ...
