"""Records as a store gives them back: whole, damaged, or never digitlab's."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digitlab.base.errors import UserError
from digitlab.config.compose import compose
from digitlab.config.recorded import config_to_yaml
from digitlab.config.types import Config
from digitlab.networks.table import build_network
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.reader import (
    damage,
    find_run,
    load_network,
    over_seeds,
    recorded_config,
    recorded_data,
    recorded_environment,
    recorded_guesses,
    recorded_logits,
)
from digitlab.records.record import SUMS
from digitlab.records.tracker import NewRun, NoTracker, RunRow

METADATA = {"layout": "channels_last", "format": "1"}


@cache
def configure() -> Config:
    return compose("train", ["experiments=smoke", "model.widths=[2]", "model.hidden=4"])[0].config


def files() -> dict[str, bytes]:
    weights = build_network(configure().model).state_dict()
    answers = {
        "predictions": torch.zeros(5, dtype=torch.uint8),
        "labels": torch.zeros(5, dtype=torch.uint8),
        "logits": torch.zeros(5, 10),
    }
    return {
        "weights.safetensors": safetensors.torch.save(weights, METADATA),
        "predictions.safetensors": safetensors.torch.save(answers),
        "config.yaml": config_to_yaml(configure()).encode(),
        "environment.json": json.dumps({"libraries": {"torch": "1"}, "untracked": {}}).encode(),
    }


def filled(value: float) -> bytes:
    """Weights of the right names and shapes, each of them this number."""
    weights = build_network(configure().model).state_dict()
    filled = {name: torch.full(tensor.shape, value) for name, tensor in weights.items()}
    return safetensors.torch.save(filled, METADATA)


class Stored(NoTracker):
    """A tracker with one run, whatever is in it; the tags are those of the files it has."""

    def __init__(self, content: dict[str, bytes], **tags: str) -> None:
        self.content = content
        own = {
            f"digitlab.{name}_sha256": hashlib.sha256(content[f"{name}.safetensors"]).hexdigest()
            for name in ("weights", "predictions")
        }
        self.row = RunRow("0123", "run", "FINISHED", own | tags, {"a": "b"}, {"val_accuracy": 0.5})

    def artifact(self, run_id: str, path: str) -> bytes:
        return self.content[path]

    def history(self, run_id: str) -> list[tuple[str, int, float]]:
        return [("val_accuracy", 1, 0.5)]

    def find(self, tags: Any) -> list[RunRow]:
        return [self.row]


Read = Callable[[Stored], object]
READERS: dict[str, Read] = {
    "weights.safetensors": lambda held: load_network(held, held.row, configure()),
    "predictions.safetensors": lambda held: (
        recorded_guesses(held, held.row),
        recorded_logits(held, held.row, 5),
    ),
    "config.yaml": lambda held: recorded_config(held, held.row),
    "environment.json": lambda held: recorded_environment(held, held.row),
}


def refusal(read: Read, held: Stored) -> str:
    """Read it; return why it is refused, and an empty text if it is not."""
    reason = ""
    try:
        read(held)
    except UserError as error:
        reason = str(error)
    assert not reason or ("run (0123)" in reason and "\n" not in reason)
    return reason


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_damaged_file_whose_digest_is_right_is_read_or_refused(name: str, data: Any) -> None:
    whole = files()[name]
    at = data.draw(st.integers(0, len(whole)))
    damaged = data.draw(
        st.sampled_from(
            [whole[:at], whole[at:], whole[:at] + b"\0\xff{}[" + whole[at + 5 :], b"[1, 2]", b"7"]
        )
    )
    refusal(READERS[name], Stored(files() | {name: damaged}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", b'{"libraries": []}'),
        ("environment.json", b'{"untracked": 5}'),
        ("environment.json", b"[" * 100_000),
        ("weights.safetensors", safetensors.torch.save({"a": torch.zeros(2)}, METADATA)),
        ("weights.safetensors", filled(math.nan)),
        ("weights.safetensors", filled(-math.inf)),
        ("predictions.safetensors", safetensors.torch.save({"predictions": torch.zeros(5)})),
        (
            "predictions.safetensors",
            safetensors.torch.save(
                {
                    "predictions": torch.zeros(4),
                    "labels": torch.zeros(5),
                    "logits": torch.zeros(5, 9),
                }
            ),
        ),
    ],
)
def test_file_of_another_content_is_refused_in_one_line(name: str, content: bytes) -> None:
    assert not refusal(READERS[name], Stored(files()))
    assert refusal(READERS[name], Stored(files() | {name: content}))


@pytest.mark.parametrize("name", ["weights", "predictions"])
def test_file_of_another_digest_is_not_even_parsed(name: str) -> None:
    held = Stored(files(), **{f"digitlab.{name}_sha256": "0" * 64})
    with pytest.raises(UserError, match="is not the file that was recorded"):
        READERS[f"{name}.safetensors"](held)


@pytest.mark.parametrize("text", ["nonsense", "5", "[1]", "{"])
def test_tag_of_the_data_that_is_damaged_is_refused_in_one_line(text: str) -> None:
    row = Stored(files(), **{"digitlab.data_sha256": text}).row
    with pytest.raises(UserError, match=r"digitlab\.data_sha256 of run \(0123\) is damaged"):
        recorded_data(row)
    assert recorded_data(Stored(files()).row) is None


@pytest.mark.parametrize("tags", [{}, {"digitlab.seal": "nonsense"}])
def test_record_without_tags_is_damage_and_no_fault(tags: dict[str, str]) -> None:
    held = Stored(files() | {SUMS: b"\xff\n"}, **tags)
    assert len(damage(held, held.row)) == 1
    assert over_seeds(held, held.row) == []


# ---- the champion that a person means ------------------------------------------------------------


class Champions(NoTracker):
    """Champions of studies, by the data that they were selected on; the last is the newest."""

    def __init__(self, *champions: tuple[str, str]) -> None:
        self.rows = [
            RunRow(f"{study}-{number}", study, "FINISHED",
                   {"digitlab.kind": "champion", "digitlab.study": study}, {"data.name": data}, {})
            for number, (study, data) in enumerate(champions)
        ]  # fmt: skip

    def find(self, tags: Mapping[str, str]) -> list[RunRow]:
        return [row for row in self.rows if tags.items() <= row.tags.items()]


def test_champion_is_the_newest_of_the_default_recipes_data() -> None:
    tracker = Champions(("a", "mnist"), ("b", "mnist"), ("c", "fashion_mnist"))
    assert find_run(tracker, "champion").run_id == "b-1"
    only = Champions(("a", "fashion_mnist"), ("b", "sample"))
    assert find_run(only, "champion").run_id == "b-1"


def test_champion_of_a_study_is_its_newest() -> None:
    tracker = Champions(("a", "mnist"), ("a", "mnist"), ("b", "mnist"))
    assert find_run(tracker, "a/champion").run_id == "a-1"
    with pytest.raises(UserError, match="aa/champion: no such champion, did you mean a"):
        find_run(tracker, "aa/champion")
    with pytest.raises(
        UserError,
        match="champion is not available: no study has selected one yet",
    ):
        find_run(Champions(), "champion")


def test_a_champion_whose_run_was_deleted_is_named_with_what_restores_it(tmp_path: Path) -> None:
    tracker = MlflowTracker(None, "digitlab", tmp_path)
    tags = {"digitlab.study": "smoke", "digitlab.study_id": "1"}
    ids = {
        kind: tracker.create_run(NewRun(kind, {**tags, "digitlab.kind": kind}, {}))
        for kind in ("study", "champion")
    }
    tracker.delete(ids["champion"])
    for name in ("champion", "smoke/champion"):
        with pytest.raises(UserError, match="was deleted in MLflow") as raised:
            find_run(tracker, name)
        restore = f"`{tracker.command} runs restore --run-id {ids['champion']}`."
        assert str(raised.value).startswith(f"{name} is not available: ")
        assert str(raised.value).endswith(f"Restore it with {restore}")
    with pytest.raises(UserError, match="other/champion: no such champion"):
        find_run(tracker, "other/champion")
    tracker.delete(ids["study"])  # as `digitlab delete smoke` does
    for name in ("champion", "smoke/champion"):
        with pytest.raises(UserError, match=r"study smoke, .* was deleted\. .*restore smoke`, or"):
            find_run(tracker, name)
