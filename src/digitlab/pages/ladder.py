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
class LadderRow:
    """A run with its place on the ladder."""

    run_id: str
    name: str
    accuracy: float
    parameters: int
    seconds: float
    changed: str  # against the run before it of the same recipe, or the trial of the same study
    difference: str
    values: dict[str, Any]  # of the form's fields
    is_fixed: bool  # its network is the form's own, which cannot be changed, only replaced


class Ladder:
    """Reads the runs of a tracker that were measured on the same images as `config` asks for."""

    def __init__(self, tracker: Tracker, config: Config) -> None:
        self.tracker, self._model = tracker, config.model
        self._wanted = {key: value for key, value in row_params(config, "train").items()
                        if key in _SAME}  # fmt: skip
        self._known: dict[tuple[str, str], LadderRow] = {}  # a finished run does not change

    def rows(self) -> list[LadderRow]:
        """Return the best runs, the best first."""
        found = self._runs()
        last: dict[tuple[str, ...], RunRow] = {}
        before: dict[str, RunRow | None] = {}
        for row in found:
            before[row.run_id], last[_series(row)] = last.get(_series(row)), row
        best = sorted(found, key=lambda row: -row.metrics[_ACCURACY])[:_MOST]
        return [self._place(row, before[row.run_id]) for row in best]

    def conclude(self, run_id: str) -> str:
        """Say how much better a run is than the last one of the same recipe before it."""
        found = self._runs()
        place = next((i for i, row in enumerate(found) if row.run_id == run_id), 0)
        same = [row for row in found[:place] if _series(row) == _series(found[place])]
        return self._difference(same[-1], found[place]) if same else ""

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

    def _place(self, row: RunRow, before: RunRow | None) -> LadderRow:
        key = (row.run_id, before.run_id if before else "")
        if key not in self._known:
            config = recorded_config(self.tracker, row)
            values = values_of(config)
            is_fixed = "model.widths" not in values and config.model == self._model
            changed = _changes(before.params, row.params) if before else ""
            difference = self._difference(before, row) if before else ""
            self._known[key] = LadderRow(
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
        if before.params == row.params:
            text = f"with the same settings {text}"
            if all(before.tags.get(each) == row.tags.get(each) for each in _RESULT):
                return f"the same settings as {before.name}, and the same result"
        try:
            test = paired_test(self.tracker, before, row)
        except UserError as error:
            return f"{text} (not tested: {error})"
        return f"{text}: that {in_words(test['p'])}" if "p" in test else text


_SAME = ("data.name", "data.evaluate_on", "data.validation_images", "data.split_seed")
_RESULT = ("digitlab.weights_sha256", "digitlab.predictions_sha256", "digitlab.data_sha256")
_WORDS = {"model.name": "model", "optim.name": "optimizer"}
_VALUES = {"True": "true", "False": "false", "None": "none"}


def _series(row: RunRow) -> tuple[str, ...]:
    """Return what runs have in common of which each is compared with the one before it."""
    names = ("kind", "recipe", "study_id")
    return tuple(row.tags.get(f"digitlab.{name}", "") for name in names)


def _changes(before: dict[str, str], after: dict[str, str]) -> str:
    """Return the settings that differ as `epochs 3 -> 5`, and those that are new as `hidden 64`."""
    changed, new = [], []
    for key, value in sorted(after.items()):
        word = _WORDS.get(key, key.rpartition(".")[2])
        now = _VALUES.get(value, value)
        if key not in before:
            new.append(f"{word} {now}")
        elif before[key] != value:
            changed.append(f"{word} {_VALUES.get(before[key], before[key])} -> {now}")
    return ", ".join(changed + new)
