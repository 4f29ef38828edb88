"""What `digitlab train` prints at its end: what changed since the last run, and what to do next."""

from digitlab.base.errors import UserError, counted
from digitlab.base.invocation import SHORT_ID, command
from digitlab.config.compose import store_words
from digitlab.config.types import Config
from digitlab.records.reader import accuracy_name
from digitlab.records.record import Records
from digitlab.records.tracker import RunRow, Tracker
from digitlab.results.compare import in_words, paired_test
from digitlab.study.run import Outcome


def conclude(records: Records, config: Config, outcome: Outcome) -> None:
    """Compare a run that has just finished with the one before, and print what can follow."""
    tracker = records.tracker
    row = tracker.get(str(outcome.run_id))
    stores = store_words(config)
    name = row.run_id[:SHORT_ID]
    before = _run_before(tracker, row)
    lines = [
        ("draw a digit", command("draw", f"--run={name}", *stores)),
        ("train it again", command("reproduce", name, *stores)),
    ]
    folder, film = tracker.local_folder(row.run_id), "pictures/evolution.gif"
    if folder is not None and film in tracker.files(row.run_id):
        lines.insert(0, ("how it learned", str(folder / film)))
    if before is not None:
        print(_difference(tracker, before, row))
        pair = (before.run_id[:SHORT_ID], name)
        lines.insert(0, ("see what differs", command("compare", *pair, *stores)))
    for what, text in lines:
        print(f"{what + ':':<17} {text}")


def _run_before(tracker: Tracker, row: RunRow) -> RunRow | None:
    """Return the last run of the same recipe and data that finished before this one did."""
    same = {"digitlab.kind": "train", "digitlab.state": "finished"}
    same["digitlab.recipe"] = row.tags["digitlab.recipe"]
    same["digitlab.data_sha256"] = row.tags.get("digitlab.data_sha256", "")
    earlier = [other for other in tracker.find(same) if other.run_id != row.run_id]
    return earlier[-1] if earlier else None


def _difference(tracker: Tracker, before: RunRow, row: RunRow) -> str:
    name = accuracy_name(row)
    if name not in before.metrics:
        return f"the run before, {before.name}, was measured on other images"
    points = 100 * (row.metrics[name] - before.metrics[name])
    text = f"{points:+.2f} percentage points against the run before ({before.name})"
    try:
        test = paired_test(tracker, before, row)
    except UserError as error:
        return f"{text}: no paired test: {error}"
    if "p" not in test:
        return f"{text}: no paired test: {test['reason']}"
    gained, lost = len(test["only_second"]), len(test["only_first"])
    images = f"{counted(gained, 'image')} gained, {lost} lost"
    chance = f"between these two networks this {in_words(test['p'])}"
    return f"{text}:\n  {images}; {chance} (McNemar, p = {test['p']:.2g})"
