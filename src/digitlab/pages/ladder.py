"""The lab's runs as a ladder: the best first, each with what it changed and whether that helped."""

from dataclasses import dataclass
from typing import Any

from digitlab.base.errors import UserError
from digitlab.config.types import Config
from digitlab.pages.form import values_of
from digitlab.records.reader import recorded_config
from digitlab.records.record import row_params
from digitlab.records.tracker import RunRow, Tracker
from digitlab.results.compare import in_words, paired_test

_MOST = 30  # runs that are shown
_KINDS = ("train", "trial")
_ACCURACY = "val_accuracy"


@dataclass(frozen=True)
class RungOfLadder:
    """A run with its place on the ladder."""

    run_id: str
    name: str
    accuracy: float
    parameters: int
    seconds: float
    changed: str  # against the run that was trained before it
    difference: str
    values: dict[str, Any]  # of the form's fields
    is_fixed: bool  # its network is the form's own, which cannot be changed, only replaced


class Ladder:
    """Reads the runs of a tracker that were measured on the same images as `config` asks for."""

    def __init__(self, tracker: Tracker, config: Config) -> None:
        self.tracker, self._model = tracker, config.model
        self._wanted = {key: value for key, value in row_params(config, "train").items()
                        if key in _SAME}  # fmt: skip
        self._known: dict[tuple[str, str], RungOfLadder] = {}  # a finished run does not change

    def rows(self) -> list[RungOfLadder]:
        """Return the best runs, the best first."""
        found = self._runs()
        before = dict(zip((row.run_id for row in found), [None, *found], strict=False))
        best = sorted(found, key=lambda row: -row.metrics[_ACCURACY])[:_MOST]
        return [self._rung(row, before[row.run_id]) for row in best]

    def conclude(self, run_id: str) -> str:
        """Say how much better a run is than the one that was trained before it."""
        found = self._runs()
        place = next((i for i, row in enumerate(found) if row.run_id == run_id), 0)
        return self._difference(found[place - 1], found[place]) if place else ""

    def _runs(self) -> list[RunRow]:
        """Return the runs in the order of their start."""
        rows = self.tracker.find({"digitlab.state": "finished"})
        return [
            row
            for row in rows
            if row.tags.get("digitlab.kind") in _KINDS
            and "digitlab.weights_sha256" in row.tags
            and _ACCURACY in row.metrics
            and all(row.params.get(key) == value for key, value in self._wanted.items())
        ]

    def _rung(self, row: RunRow, before: RunRow | None) -> RungOfLadder:
        key = (row.run_id, before.run_id if before else "")
        if key not in self._known:
            config = recorded_config(self.tracker, row)
            values = values_of(config)
            is_fixed = "model.widths" not in values and config.model == self._model
            changed = _changes(before.params, row.params) if before else ""
            difference = self._difference(before, row) if before else ""
            self._known[key] = RungOfLadder(
                row.run_id, row.name, row.metrics[_ACCURACY],
                int(row.metrics.get("model_parameters", 0)), row.metrics.get("seconds", 0.0),
                changed, difference, values, is_fixed,
            )  # fmt: skip
        return self._known[key]

    def _difference(self, before: RunRow, row: RunRow) -> str:
        points = 100 * (row.metrics[_ACCURACY] - before.metrics[_ACCURACY])
        word = "better" if points > 0 else "worse"
        text = f"{word} by {abs(points):.2f} points than {before.name}" if points else (
            f"as good as {before.name}")  # fmt: skip
        try:
            test = paired_test(self.tracker, before, row)
        except UserError as error:
            return f"{text} (not tested: {error})"
        return f"{text}: that {in_words(test['p'])}" if "p" in test else text


_SAME = ("data.name", "data.evaluate_on", "data.validation_images", "data.split_seed")


def _changes(before: dict[str, str], after: dict[str, str]) -> str:
    """Return the settings that differ, as `epochs 3 -> 5`; of another network, its widths alone."""
    keys = [key for key in sorted(before.keys() & after.keys()) if before[key] != after[key]]
    texts = [f"{key.rpartition('.')[2]} {before[key]} -> {after[key]}" for key in keys]
    if "model.widths" in after and "model.widths" not in before:
        texts.append(f"widths {after['model.widths']}")
    return ", ".join(texts)
