"""Run a whole study again from its record, by one worker, and say where the two part."""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError
from digitlab.config.compose import Composed
from digitlab.config.recorded import with_values
from digitlab.config.types import Config
from digitlab.records.mlflow import Tracking, open_tracking
from digitlab.records.reader import recorded_environment
from digitlab.records.record import Identity, begin_record
from digitlab.results.reproduce import (
    IDENTICAL,
    INCOMPARABLE,
    NOT,
    Difference,
    Verdict,
    differences,
)
from digitlab.study.driver import sweep
from digitlab.study.fingerprint import begun_study
from digitlab.study.trials import Search, TrialRow

_TIMES = ("seconds", "images_per_second", "done")  # metrics that no two runs share


def replay(study: str, lab: Path, as_json: bool) -> int:
    """Run the study anew under another name, unrecorded but for the verdict; its exit status.

    A replay that was stopped goes on when it is asked for again.

    Raises:
        UserError: there is no such study, or it has no champion yet.
    """
    original, recorded = begun_study(lab, study)
    known = original.names()
    notes = original.notes()
    if "champion" not in notes:
        raise UserError(f"{study} has no champion yet: go on with `make sweep` first")
    config = with_values(recorded, _as_it_ended(original, notes) | {"study.workers": 1})
    names = (f"{study}-replay{number or ''}" for number in range(len(known) + 1))
    name = next(n for n in names if n not in known or "champion" not in original.notes(n))
    # The total counts the trials that failed, as they are all run again.
    own = {"study.name": name, "study.count_failed": True}
    own |= {"tracking.name": "none", "launcher.name": "processes"}
    config = with_values(config, own)

    tracking = open_tracking(recorded, lab)
    row = tracking.get(str(notes["run_id"])) if notes.get("run_id") else None
    now = describe_environment()
    found = differences(recorded_environment(tracking, row) if row else {}, now) if row else []
    if notes.get("workers", 0) != 1:
        found.append(Difference("study.workers", notes.get("workers", "not recorded"), 1))
    if recorded.study.minutes:
        found.append(Difference("study.minutes", recorded.study.minutes, "another machine's time"))
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        print(f"replaying study {study} as {name}, by one worker")
        for difference in found:
            print(f"  {difference}")
        status = sweep(Composed(config, ()), lab, f"digitlab reproduce --study {study}")
    if status == 130:
        raise KeyboardInterrupt
    again = Search(original.storage, config)
    parted = where_they_part(original, again)
    harmless = all(difference.harmless for difference in found)
    verdict = IDENTICAL if not parted else NOT if harmless else INCOMPARABLE
    run_id = _record(tracking, config, row.run_id if row else "", verdict, parted, now)
    told = Verdict(verdict, [*map(str, found), *parted], run_id, row.run_id if row else study)
    return told.tell(as_json, f"study {study}")


def _as_it_ended(search: Search, notes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a study may change while it goes on, as its champion was chosen by them."""
    names = ("trials", "confirm", "confirm_seeds", "final_seeds")
    asked = dict(zip(names, notes["champion"]["asked"], strict=True))
    return {f"study.{name}": value for name, value in asked.items()}


def where_they_part(original: Search, again: Search) -> list[str]:
    """What two studies have otherwise, trial by trial and in their champions."""
    parted = []
    rows, others = original.rows(), again.rows()
    for number in range(max(len(rows), len(others))):
        pair = [
            _told(r[number]) if number < len(r) else {"state": "missing"} for r in (rows, others)
        ]
        keys = sorted(key for key in pair[0].keys() | pair[1].keys())
        changed = [
            f"{key} was {pair[0].get(key)}, is {pair[1].get(key)}"
            for key in keys
            if pair[0].get(key) != pair[1].get(key)
        ]
        if changed:
            parted.append(f"trial {number}: {'; '.join(changed)}")
    champions = [search.notes().get("champion", {}) for search in (original, again)]
    for key in ("trial", "values", "val_accuracy", "test_accuracy"):
        was, now = (champion.get(key) for champion in champions)
        if was != now:
            parted.append(f"champion: {key} was {was}, is {now}")
    return parted


def _told(row: TrialRow) -> dict[str, Any]:
    metrics = {k: v for k, v in row.notes.get("metrics", {}).items() if k not in _TIMES}
    return {"state": row.state, "value": row.value, **row.values, **metrics}


def _record(
    tracking: Tracking,
    config: Config,
    original: str,
    verdict: str,
    parted: Sequence[str],
    environment: Mapping[str, Any],
) -> str | None:
    """A run that keeps the verdict, and tags on it and on the study's own run."""
    tags = {"digitlab.reproduction_of": original, "digitlab.verdict": verdict}
    identity = Identity(config.study.name, "reproduction", tags, None, (), environment)
    record = begin_record(tracking, config, identity)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "replay"
        kept.mkdir()
        (kept / "replay.json").write_text(json.dumps(list(parted), indent=1))
        record.keep(kept)
    record.end("finished")
    if original:
        tracking.resume(original).log(tags={"digitlab.reproduced": verdict})
    return record.run_id
