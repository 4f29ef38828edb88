"""Reproduction: what is found before training, the verdict after it, and whose code trains."""

import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import pytest
import safetensors.torch
import torch
from conftest import Call, CallIn
from samples import copy_digits, studies
from serving import COMMAND, environment_of
from studies import states_of

from digitlab.base import environment, faults
from digitlab.base.environment import describe_environment, source_digest
from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.config.compose import compose
from digitlab.data.datasets import TRAIN
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.reader import damage, find_run, over_seeds, recorded_config, trained
from digitlab.records.record import SUMS, Identity, open_records, seal, trial_tags
from digitlab.records.tracker import LogBatch, NewRun, RunRow, TrackerAway, TrackerRefused, now_ms
from digitlab.results import at_commit
from digitlab.results import reproduce as reproduction
from digitlab.results.at_commit import confirm_code, train_at_commit
from digitlab.results.replay import compare_studies, replay
from digitlab.results.reproduce import reproduce
from digitlab.results.verdict import Change, Verdict, differences, reach_verdict
from digitlab.study.run import run_once, train
from digitlab.study.storage import open_storage
from digitlab.study.trials import load_study
from digitlab.training.fit import FitResult
from digitlab.training.observer import TrainingObserver
from digitlab.workers import job

SMALL = ["experiments=smoke", "data=sample", "model.widths=[4]", "data.batch_size=200"]
SMALL += ["trainer.epochs=1", "name=smoke-seed-0"]
IMAGES = 400  # of the sample's validation set


# ---- a recorded run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """A run of one epoch, the lab that it is recorded in, and that lab's tracker."""

    lab: Path
    run_id: str
    tracker: MlflowTracker

    @property
    def row(self) -> RunRow:
        return self.tracker.get(self.run_id)

    def file(self, name: str) -> Path:
        """An artifact of the run, or a file of the data that it was trained on."""
        if name in TRAIN:
            return self.lab / "data" / "sample" / name
        return self.lab / "artifacts" / self.run_id / "artifacts" / name

    def execute(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Read or write the tracker's database behind its back."""
        with closing(sqlite3.connect(self.lab / "mlflow.db", timeout=60)) as database, database:
            return list(database.execute(statement, values))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    lab = copy_digits(tmp_path_factory.mktemp("recorded") / "lab")
    assert train(compose("train", SMALL)[0], lab).state == "finished"
    tracker = MlflowTracker(None, "digitlab", lab)
    return Recorded(lab, tracker.get("smoke-seed-0").run_id, tracker)


@pytest.fixture
def call(recorded: Recorded, call_in: CallIn) -> Call:
    """`digitlab` in this process, in the lab of the run: exit status, output, error output."""
    return call_in(recorded.lab)


def test_a_reproduction_whose_record_waits_has_no_verdict(
    recorded: Recorded, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of artifacts that is down, while the tracker answers all else."""
    tracker = recorded.tracker

    def away(*_: object) -> None:
        raise TrackerAway("the artifacts cannot be stored")

    before = tracker.get(recorded.run_id).tags
    with monkeypatch.context() as patch:
        patch.setattr(MlflowTracker, "upload", away)
        patch.setattr("digitlab.records.outbox._RUN_S", 0.1)
        patch.setattr("digitlab.records.outbox._CLOSE_S", 0.1)
        status, _, err = call("reproduce", recorded.run_id)
    assert (status, "1 of its records wait in" in err, err.count("\n")) == (2, True, 1)
    assert tracker.get(recorded.run_id).tags == before
    assert call("audit", "--repair")[0] == 0


def runs(recorded: Recorded) -> set[str]:
    return {run_id for (run_id,) in recorded.execute("SELECT run_uuid FROM runs")}


def changes(document: Mapping[str, Any]) -> list[str]:
    """The differences of a verdict, but for those of a checkout that is edited meanwhile."""
    edited = ("uncommitted changes", "commit was")
    return [text for text in document["differences"] if not text.startswith(edited)]


@contextmanager
def rewritten(path: Path, content: bytes) -> Iterator[None]:
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


# ---- the verdict, its document and its tags ------------------------------------------------------


def test_reproduction_is_identical_in_one_json_document(call: Call, recorded: Recorded) -> None:
    status, out, _ = call("reproduce", recorded.run_id[:12], "--json")
    assert status == 0
    document = json.loads(out)
    assert document.keys() == {"verdict", "differences", "run_id", "original_run_id"}
    assert (document["verdict"], changes(document)) == ("identical", [])
    assert document["original_run_id"] == recorded.run_id
    again = recorded.tracker.get(document["run_id"])
    assert again.tags["digitlab.kind"] == "reproduction"
    assert again.tags["digitlab.verdict"] == "identical"
    assert again.tags["digitlab.reproduction_of"] == recorded.run_id
    assert recorded.row.tags["digitlab.reproduced"] == f"identical {again.run_id}"
    original = recorded.tracker.history(recorded.run_id)
    of_training = [x for x in original if x[0].startswith(("train_", "val_"))]
    assert len(of_training) == 4
    assert set(of_training) <= set(recorded.tracker.history(again.run_id))
    assert damage(recorded.tracker, again) == []
    status, out, _ = call("reproduce", again.run_id, "--json")
    assert (status, json.loads(out)["original_run_id"]) == (0, again.run_id)


def test_other_number_of_threads_is_named_before_and_after_training(
    call: Call, recorded: Recorded
) -> None:
    named = "trainer.threads was 1, is 2: can change floating-point rounding, and so the weights"
    status, out, _ = call("reproduce", recorded.run_id, "trainer.threads=2")
    before, after = out.split("epoch 1/1")
    assert named in before
    assert named in after
    verdict = out.splitlines()[-1].split(":")[0]
    assert status == {"identical": 0, "within tolerance": 0, "not comparable": 3}[verdict]
    changed = "SHA-256 of the weights was" in after
    assert (verdict == "identical") is not changed


def test_another_device_is_named(call: Call, recorded: Recorded) -> None:
    named = (
        "trainer.device was cpu, is auto: can change floating-point rounding, and so the weights"
    )
    status, out, _ = call("reproduce", recorded.run_id, "trainer.device=auto")
    assert named in out.split("epoch 1/1")[0]
    verdict = out.splitlines()[-1].split(":")[0]
    assert status == {"identical": 0, "within tolerance": 0, "not comparable": 3}[verdict]


def test_other_version_of_a_library_is_named_in_words_before_and_after_training(
    call: Call, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = describe_environment()
    libraries = now["libraries"] | {"torch": "99.0"}
    monkeypatch.setattr(
        reproduction, "describe_environment", lambda: now | {"libraries": libraries}
    )
    status, out, err = call("reproduce", recorded.run_id)
    assert (status, err) == (0, "")  # it was the same version after all
    before, after = out.split("epoch 1/1")
    named = f"libraries.torch was {version('torch')}, is 99.0: can change floating-point rounding"
    assert named in before
    assert named in after
    assert before.splitlines()[0] == f"reproducing smoke-seed-0 ({recorded.run_id})"
    assert after.splitlines()[-1].startswith(f"identical: smoke-seed-0 ({recorded.run_id})")


@contextmanager
def other_label(recorded: Recorded) -> Iterator[None]:
    """A data set in which the last training digit has another label."""
    path = recorded.file(TRAIN[1])
    whole = path.read_bytes()
    with rewritten(path, whole[:-1] + bytes([(whole[-1] + 1) % 10])):
        yield


@pytest.mark.slow
def test_run_on_other_data_is_not_comparable_and_not_trained(
    call: Call, recorded: Recorded
) -> None:
    known = recorded.file(TRAIN[1]).read_bytes()
    with other_label(recorded):
        unknown = recorded.file(TRAIN[1]).read_bytes()
        _, out, _ = call("train", *SMALL, "data.allow_unknown=true", "trainer.seed=50")
        run_id = out.split("run ")[1].split()[0]
        assert call("reproduce", run_id)[0] == 0
    before = runs(recorded)
    status, out, _ = call("reproduce", run_id, "--json")
    assert status == 3
    document = json.loads(out)
    assert (document["verdict"], document["run_id"]) == ("not comparable", None)
    [difference] = changes(document)
    for content in (known, unknown):
        assert hashlib.sha256(content).hexdigest() in difference
    assert runs(recorded) == before
    assert recorded.tracker.get(run_id).tags["digitlab.reproduced"] == "not comparable"


def test_data_that_are_none_of_the_known_ones_are_refused_before_training(
    call: Call, recorded: Recorded
) -> None:
    before = runs(recorded)
    with other_label(recorded):
        status, out, err = call("reproduce", recorded.run_id)
    assert status == 2
    assert "epoch" not in out
    assert "is not the known file" in err
    assert runs(recorded) == before


def next_weight(fitted: FitResult) -> FitResult:
    """The same fit with one weight one step of its precision larger."""
    name, weight = next((n, w) for n, w in fitted.weights.items() if w.is_floating_point())
    weight = weight.clone()
    weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(math.inf))
    return replace(fitted, weights=fitted.weights | {name: weight})


def test_one_bit_of_one_weight_is_not_reproduced(
    call: Call, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "fit", lambda *given: next_weight(fit(*given)))
    status, out, _ = call("reproduce", recorded.run_id, "--json")
    assert status == 1
    document = json.loads(out)
    assert document["verdict"] == "not reproduced"
    [difference] = changes(document)
    assert difference.startswith("SHA-256 of the weights was")
    assert recorded.tracker.get(document["run_id"]).tags["digitlab.verdict"] == "not reproduced"
    assert recorded.row.tags["digitlab.reproduced"] == f"not reproduced {document['run_id']}"


fit = job.fit  # as it is before a test replaces it


class Nudged(TrainingObserver):
    """Passes on what it receives, with one loss one step of its precision larger."""

    def __init__(self, observer: TrainingObserver) -> None:
        self.observer = observer
        self.started, self.batch = observer.started, observer.batch  # type: ignore[method-assign]

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        loss = math.nextafter(metrics["train_loss"], math.inf)
        self.observer.epoch(epoch, {**metrics, "train_loss": loss})


def test_one_bit_of_one_metric_of_one_epoch_is_not_reproduced(
    call: Call, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        job, "fit", lambda config, lab, observer, *more: fit(config, lab, Nudged(observer), *more)
    )
    status, out, _ = call("reproduce", recorded.run_id, "--json")
    assert status == 1
    assert any(one.startswith("train_loss of epoch 1 was ") for one in changes(json.loads(out)))


@pytest.mark.slow
def test_reproduction_that_fails_is_not_reproduced_for_that_reason(
    call: Call, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        if name == "job.started":
            raise ZeroDivisionError("nothing is left")

    monkeypatch.setattr(faults, "hook", fail)
    status, out, _ = call("reproduce", recorded.run_id)
    assert status == 1
    assert "the reproduction failed: ZeroDivisionError: nothing is left" in out


@pytest.mark.slow
def test_reproduction_that_is_stopped_gives_no_verdict(
    call: Call, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def stop(name: str) -> None:
        if name == "job.batch":
            if not asked:
                os.kill(os.getpid(), signal.SIGINT)
            asked.append(name)
            time.sleep(0.5)  # a batch: the signal arrives long before the training ends

    before = recorded.row.tags.get("digitlab.reproduced")
    monkeypatch.setattr(faults, "hook", stop)
    status, out, _ = call("reproduce", recorded.run_id)
    assert status == 130
    assert "reproduced:" not in out
    assert recorded.row.tags.get("digitlab.reproduced") == before


@pytest.mark.slow
def test_run_that_did_not_finish_is_not_trained_again(call: Call, recorded: Recorded) -> None:
    row = written(recorded, "unfinished", state="interrupted")
    before = runs(recorded)
    status, out, err = call("reproduce", row.run_id)
    assert (status, out) == (2, "")
    assert "interrupted: it must be a finished run" in err
    assert len(err.splitlines()) == 1
    assert runs(recorded) == before


def test_a_run_is_not_looked_for_where_nothing_is_recorded(call: Call, recorded: Recorded) -> None:
    before = runs(recorded)
    status, out, err = call("reproduce", recorded.run_id, "tracking=none")
    assert (status, out) == (2, "")
    assert "with tracking=none no run is" in err
    assert len(err.splitlines()) == 1
    assert runs(recorded) == before


@pytest.mark.parametrize("override", ["trainer.seed=1", "model.hidden=8"])
def test_override_that_makes_another_run_is_refused(
    call: Call, recorded: Recorded, override: str
) -> None:
    before = runs(recorded)
    status, out, err = call("reproduce", recorded.run_id, override)
    assert (status, out) == (2, "")
    assert "digitlab train --config-from" in err
    assert len(err.splitlines()) == 1
    assert runs(recorded) == before


# ---- comparing two runs --------------------------------------------------------------------------


def written(
    recorded: Recorded,
    name: str,
    *,
    state: str = "finished",
    seed: int = 0,
    accuracy: float = 0.9,
    wrong: Sequence[int] = (),
    weights: str = "same",
    tags: Mapping[str, str] | None = None,
) -> RunRow:
    """A run that was not trained but written by hand; `name` is a parameter, too.

    Args:
        wrong: places of the images that it guesses wrong.
    """
    guesses = torch.zeros(IMAGES, dtype=torch.uint8)
    guesses[list(wrong)] = 1
    tensors = {"predictions": guesses, "labels": torch.zeros(IMAGES, dtype=torch.uint8)}
    predictions = safetensors.torch.save(tensors)
    own = {
        "digitlab.kind": "train",
        "digitlab.state": state,
        "digitlab.weights_sha256": weights,
        "digitlab.predictions_sha256": hashlib.sha256(predictions).hexdigest(),
    } | dict(tags or {})
    own = {key: value for key, value in own.items() if value}
    params = {"written": name.split("/", maxsplit=1)[0], "trainer.seed": str(seed)}
    tracker = recorded.tracker
    run_id = tracker.create_run(NewRun(name, own, params))
    tracker.upload(run_id, {"predictions.safetensors": predictions})
    tracker.log(run_id, LogBatch(params, [("val_accuracy", accuracy, 1, now_ms())]))
    tracker.end_run(run_id, state, now_ms())
    return tracker.get(run_id)


_LINUX = "Linux-{}-x86_64-with-glibc2.36"
HARMLESS = Change("libraries.mlflow", "3", "4")
ROUNDING = Change("libraries.torch", "1", "2")


@pytest.mark.parametrize("found", [[], [HARMLESS], [HARMLESS, ROUNDING]])
def test_runs_with_the_same_bits_are_identical_whatever_else_differs(
    recorded: Recorded, found: list[Change]
) -> None:
    row = written(recorded, f"same {len(found)}")
    assert reach_verdict(recorded.tracker, row, row, found) == ("identical", [])


@pytest.mark.parametrize("found", [[], [HARMLESS]])
def test_other_bits_without_a_cause_are_not_reproduced(
    recorded: Recorded, found: list[Change]
) -> None:
    row = written(recorded, f"causeless {len(found)}")
    again = written(recorded, f"causeless {len(found)}/again", weights="other")
    verdict = reach_verdict(recorded.tracker, row, again, found)
    assert verdict == ("not reproduced", ["SHA-256 of the weights was same, is other"])


# Accuracies 0.90, 0.91, 0.92 deviate by 0.01: two of them may lie t(2) * sqrt(2) * 0.01 apart.
@pytest.mark.parametrize(
    ("distance", "verdict"), [(0.0608, "within tolerance"), (0.0609, "not comparable")]
)
def test_tolerance_is_the_distance_of_two_seeds_where_three_are_known(
    recorded: Recorded, distance: float, verdict: str
) -> None:
    accuracies = (0.90, 0.91, 0.92)
    name = f"seeds {distance}"
    rows = [
        written(recorded, f"{name}/{seed}", seed=seed, accuracy=accuracy)
        for seed, accuracy in enumerate(accuracies)
    ]
    assert {run.name for run in over_seeds(recorded.tracker, rows[0])} == {r.name for r in rows}
    again = written(recorded, f"{name}/again", accuracy=0.90 - distance, wrong=range(99))
    reported, (*_, reason) = reach_verdict(recorded.tracker, rows[0], again, [ROUNDING])
    assert reported == verdict
    tolerance = 4.3027 * math.sqrt(2) * statistics.stdev(accuracies)
    assert reason.startswith(
        f"val_accuracy is {distance:.4f} off; {tolerance:.4f} is tolerated: two seeds differ so"
    )
    assert "over 3 seeds" in reason


# d images that are right in one run alone fall all to one side by chance with p = 2 / 2**d.
@pytest.mark.parametrize(("wrong", "verdict"), [(5, "within tolerance"), (6, "not comparable")])
def test_tolerance_is_that_of_mcnemar_s_exact_test_where_no_three_seeds_are_known(
    recorded: Recorded, wrong: int, verdict: str
) -> None:
    name = f"paired {wrong}"
    row = written(recorded, name, accuracy=1.0)
    written(recorded, f"{name}/seed", seed=1, accuracy=0.5)
    again = written(
        recorded, f"{name}/again", accuracy=1 - wrong / IMAGES, wrong=range(wrong), weights="other"
    )
    reported, (*_, reason) = reach_verdict(recorded.tracker, row, again, [ROUNDING])
    assert reported == verdict
    assert f"{wrong} images are right in one alone" in reason
    assert f"p = {2 / 2**wrong:.3g} by McNemar's exact test" in reason


@pytest.mark.parametrize("name", ["source", "data"])
def test_other_bits_of_other_code_are_not_comparable_however_near(
    recorded: Recorded, name: str
) -> None:
    row = written(recorded, f"code {name}")
    again = written(recorded, f"code {name}/again", weights="other")
    found = [Change(name, "a", "b"), HARMLESS]
    assert reach_verdict(recorded.tracker, row, again, found)[0] == "not comparable"
    assert reach_verdict(recorded.tracker, row, row, found)[0] == "identical"


@pytest.mark.parametrize(
    ("name", "was", "now", "is_harmless"),
    [
        ("platform", _LINUX.format("6.1.0-18-amd64"), _LINUX.format("6.8.0-rc1"), True),
        ("platform", _LINUX.format("6.1.0"), "Linux-6.1.0-x86_64-with-glibc2.39", False),
        ("platform", _LINUX.format("6.1.0"), "Linux-6.1.0-aarch64-with-glibc2.36", False),
        ("platform", "macOS-14.5-arm64-arm-64bit", "macOS-15.0-arm64-arm-64bit", False),
        ("libraries.mlflow", "3", "4", True),
        ("libraries.some-plugin", "1", "2", False),
        ("libraries.some-plugin", None, "2", False),
        ("libraries.pytorch-lightning", "2.6.6", "2.6.7", False),
        ("commit", "a", "b", True),
    ],
)
def test_what_can_explain_another_result(name: str, was: Any, now: Any, is_harmless: bool) -> None:
    assert Change(name, was, now).is_harmless is is_harmless


def test_run_of_another_configuration_is_no_seed_of_this_one(recorded: Recorded) -> None:
    row = written(recorded, "alone")
    written(recorded, "another", seed=1)
    assert [run.name for run in over_seeds(recorded.tracker, row)] == ["alone"]


def test_differences_of_two_environments_are_named_one_by_one() -> None:
    then = {
        "commit": "a",
        "libraries": {"torch": "1", "numpy": "2", "nvidia-cublas": "12", "rich": "1"},
        "numerics": {"mkldnn": True},
        "untracked": {},
        "diff": "",
        "source": "1",
        "gone": 1,
    }
    now = {
        "commit": "b",
        "libraries": {"torch": "2", "numpy": "2", "nvidia-cublas": "13", "rich": "2"},
        "numerics": {"mkldnn": False},
        "untracked": {"src/x.py": "a long text"},
        "diff": "a long text",
        "source": "2",
    }
    found = {item.name: item for item in differences(then, now)}
    assert {name for name, item in found.items() if not item.is_harmless} == {
        *("libraries.torch", "libraries.nvidia-cublas", "numerics.mkldnn", "source"),
    }
    harmless = {"commit", "diff", "gone", "libraries.rich", "untracked"}
    assert {name for name, item in found.items() if item.is_harmless} == harmless
    assert str(found["gone"]) == "gone was 1, is None: should change nothing"
    assert "can change anything" in str(found["source"])
    assert not any("a long text" in str(item) for item in found.values())
    assert differences(then, then) == []


# ---- damage --------------------------------------------------------------------------------------

# Where a bit is flipped, and how often: a hundred times in all.
FLIPS = {
    "weights.safetensors": 14,
    "predictions.safetensors": 14,
    "config.yaml": 10,
    "environment.json": 10,
    SUMS: 10,
    "metrics": 12,
    "params": 12,
    "digitlab.weights_sha256": 4,
    "digitlab.data_sha256": 4,
    "digitlab.seal": 3,
    TRAIN[0]: 4,
    TRAIN[1]: 3,
}
assert sum(FLIPS.values()) == 100


def flipped(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(8 * len(content))
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def flipped_number(number: float, chance: random.Random) -> float:
    changed = math.nan
    while math.isnan(changed):  # which sqlite does not hold
        [changed] = struct.unpack("<d", flipped(struct.pack("<d", number), chance))
    return float(changed)


@contextmanager
def one_bit_flipped(recorded: Recorded, where: str, chance: random.Random) -> Iterator[str]:
    """Somewhere in a file, in any metric of any step, in any parameter or in a tag."""
    if where == "metrics":
        key, step, value = chance.choice(
            recorded.execute(
                "SELECT key, step, value FROM metrics WHERE run_uuid = ?", recorded.run_id
            )
        )
        change = "UPDATE metrics SET value = ? WHERE run_uuid = ? AND key = ? AND step = ?"
        changed: object = flipped_number(value, chance)
        recorded.execute(change, changed, recorded.run_id, key, step)
        yield f"{key} of step {step}: {value}, {changed}"
        recorded.execute(change, value, recorded.run_id, key, step)
    elif where == "params" or where.startswith("digitlab."):
        table = "params" if where == "params" else "tags"
        rows = recorded.execute(
            f"SELECT key, CAST(value AS BLOB) FROM {table} WHERE run_uuid = ?", recorded.run_id
        )
        key, value = chance.choice([row for row in rows if table == "params" or row[0] == where])
        change = f"UPDATE {table} SET value = CAST(? AS TEXT) WHERE run_uuid = ? AND key = ?"
        changed = flipped(value, chance)
        recorded.execute(change, changed, recorded.run_id, key)
        yield f"{key}: {value!r}, {changed!r}"
        recorded.execute(change, value, recorded.run_id, key)
    else:
        path = recorded.file(where)
        changed = flipped(path.read_bytes(), chance)
        with rewritten(path, changed):
            yield f"{where}: now {hashlib.sha256(changed).hexdigest()}"


@pytest.mark.slow
@pytest.mark.parametrize("where", FLIPS)
def test_no_flipped_bit_goes_unnoticed(recorded: Recorded, where: str) -> None:
    assert damage(recorded.tracker, recorded.row) == []
    before = runs(recorded)
    for number in range(FLIPS[where]):
        chance = random.Random(f"{where} {number}")
        with one_bit_flipped(recorded, where, chance) as what:
            if where in TRAIN:
                with pytest.raises(UserError):
                    reproduce(recorded.run_id, [], recorded.lab, False, False)
            else:
                assert damaged(recorded), what
    assert runs(recorded) == before
    assert damage(recorded.tracker, recorded.row) == []


def damaged(recorded: Recorded) -> list[str]:
    try:
        return damage(recorded.tracker, recorded.row)
    except UserError as error:
        return [str(error)]


def test_metric_that_is_shown_otherwise_than_it_was_recorded_is_damage(recorded: Recorded) -> None:
    change = "UPDATE latest_metrics SET value = value {} 1 WHERE run_uuid = ? AND key = ?"
    recorded.execute(change.format("+"), recorded.run_id, "val_accuracy")
    found = damage(recorded.tracker, recorded.row)
    recorded.execute(change.format("-"), recorded.run_id, "val_accuracy")
    assert found != []


def test_damage_is_reported_with_the_file_and_tagged_without_a_run(
    call: Call, recorded: Recorded
) -> None:
    path = recorded.file("weights.safetensors")
    with rewritten(path, flipped(path.read_bytes(), random.Random(1))):
        status, out, _ = call("reproduce", recorded.run_id, "--json")
    assert status == 1
    name = f"of smoke-seed-0 ({recorded.run_id})"
    assert json.loads(out) == {
        "verdict": "not reproduced",
        "differences": [f"weights.safetensors {name} is not the file that was recorded"],
        "run_id": None,
        "original_run_id": recorded.run_id,
    }
    assert recorded.row.tags["digitlab.reproduced"] == "not reproduced"


@pytest.mark.parametrize("name", ["weights.safetensors", "pictures/confusion.png", SUMS])
def test_missing_file_of_a_record_is_refused_by_name(
    call: Call, recorded: Recorded, name: str
) -> None:
    path = recorded.file(name)
    path.rename(aside := path.with_name("aside"))
    status, out, err = call("reproduce", recorded.run_id)
    aside.rename(path)
    assert (status, out) == (2, "")
    assert f"has no artifact {name}:" in err
    assert len(err.splitlines()) == 1


def test_record_without_a_seal_is_not_reproduced(call: Call, recorded: Recorded) -> None:
    change = "UPDATE tags SET key = ? WHERE run_uuid = ? AND key = ?"
    recorded.execute(change, "aside", recorded.run_id, "digitlab.seal")
    status, out, _ = call("reproduce", recorded.run_id)
    recorded.execute(change, "digitlab.seal", recorded.run_id, "aside")
    assert status == 1
    assert f"the seal of smoke-seed-0 ({recorded.run_id}) is missing" in out
    assert "epoch" not in out


# ---- which run a person means --------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(recorded: Recorded) -> dict[str, RunRow]:
    """Runs of a study `wavelet` with a champion, written by hand, by how they are called."""
    trial = {"digitlab.kind": "trial"}
    first = written(recorded, "wavelet-7", tags=trial | trial_tags("id", "wavelet", 7, 1))
    second = written(recorded, "wavelet-7b", tags=trial | trial_tags("id", "wavelet", 7, 1))
    other = written(recorded, "wavelet-8", tags=trial | trial_tags("id", "wavelet", 8, 1))
    taken = {"digitlab.weights_sha256": "", "digitlab.taken_from": "7"}
    copy = written(recorded, "wavelet-9", tags=trial | trial_tags("id", "wavelet", 9, 1) | taken)
    final = written(recorded, "wavelet-final-8", tags={"digitlab.kind": "final"})
    of_final = {"digitlab.kind": "champion", "digitlab.weights_run": final.run_id}
    champion = written(recorded, "wavelet-champion", tags=of_final)
    study = {"digitlab.kind": "study", "digitlab.weights_sha256": ""}
    return {
        "wavelet-7": first,
        "wavelet/7": second,
        "wavelet/8": other,
        "wavelet/9": copy,
        "champion": final,
        "wavelet-champion": final,
        champion.run_id: final,
        "wavelet": written(recorded, "wavelet", tags=study),
    }


def test_run_is_found_by_id_beginning_name_trial_and_champion(
    recorded: Recorded, named: dict[str, RunRow]
) -> None:
    for name, row in named.items():
        assert find_run(recorded.tracker, name).run_id == row.run_id, name
        assert find_run(recorded.tracker, row.run_id).run_id == row.run_id
        assert find_run(recorded.tracker, row.run_id[:8]).run_id == row.run_id
    assert find_run(recorded.tracker, "wavelet/07").run_id == named["wavelet/7"].run_id


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("wavlet-final-8", "did you mean wavelet-final-8"),
        ("wavelet-champoin", "did you mean wavelet-champion"),
        ("wavlet/7", "did you mean wavelet/7"),
        ("wavelet/70", "wavelet/7"),
        ("wavelet/seven", "wavelet/7"),
        ("wavelet/", "wavelet/7"),
        ("wavelet/-7", "wavelet/7"),
        ("0000", "no such run"),
    ],
)
def test_run_that_is_not_there_is_refused_with_the_nearest(
    recorded: Recorded, named: dict[str, RunRow], typed: str, meant: str
) -> None:
    with pytest.raises(UserError, match=re.escape(meant)) as raised:
        find_run(recorded.tracker, typed)
    assert str(raised.value).startswith(f"{typed}: no such ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("wavelet/9", "was taken from 7, and trained nothing"), ("wavelet", "is of kind study")],
)
def test_run_that_trained_nothing_is_refused_with_the_reason(
    recorded: Recorded, named: dict[str, RunRow], name: str, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        trained(recorded.tracker, name)


def test_study_with_a_quote_in_its_name_is_no_fault_of_the_tracker(recorded: Recorded) -> None:
    with pytest.raises(UserError, match="no such trial"):
        find_run(recorded.tracker, "it's/7")


# ---- another run of a recorded configuration -----------------------------------------------------


@pytest.mark.slow
def test_config_from_a_run_is_its_own_with_the_overrides(call: Call, recorded: Recorded) -> None:
    before = runs(recorded)
    status, _, err = call("train", "--config-from", recorded.run_id, "model.hidden=24")
    assert (status, err) == (0, "")
    [run_id] = runs(recorded) - before
    row = recorded.tracker.get(run_id)
    assert row.tags["digitlab.config_from"] == recorded.run_id
    assert row.tags["digitlab.kind"] == "train"
    assert json.loads(row.tags["digitlab.overrides"]) == ["model.hidden=24"]
    assert row.params == recorded.row.params | {"model.hidden": "24"}
    config = recorded_config(recorded.tracker, row)
    assert config.model.hidden == 24


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.hiden=24", "did you mean model.hidden"),
        ("model.hidden=-1", "model.hidden=-1"),
        ("model=seed", "a group of settings"),
        ("experiments=smoke", "no such key"),
        ("model.hidden=choice(8,16)", "takes one value"),
        ("+model.more=1", "takes one value"),
        ("~model.hidden", "takes one value"),
        ("model.hidden", "it must be KEY=VALUE"),
    ],
)
def test_override_that_does_not_fit_the_recorded_configuration_is_refused(
    call: Call, recorded: Recorded, override: str, reason: str
) -> None:
    status, out, err = call("train", "--config-from", recorded.run_id, override)
    assert (status, out) == (2, "")
    assert reason in err
    assert len(err.splitlines()) == 1


def test_file_of_a_recorded_configuration_is_a_reproduction(
    call: Call, recorded: Recorded, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    shutil.copy(recorded.file("config.yaml"), file)
    status, out, _ = call("reproduce", "--config", str(file))
    assert status == 0
    assert out.splitlines()[-1].startswith(f"identical: smoke-seed-0 ({recorded.run_id})")


@pytest.mark.slow
def test_file_of_a_new_configuration_is_trained_and_said_to_be_new(
    call: Call, recorded: Recorded, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    shutil.copy(recorded.file("config.yaml"), file)
    before = runs(recorded)
    status, out, _ = call("reproduce", "--config", str(file), "trainer.seed=123")
    assert status == 0
    assert "no finished run has this configuration" in out.splitlines()[0]
    [run_id] = runs(recorded) - before
    row = recorded.tracker.get(run_id)
    assert (row.params["trainer.seed"], row.tags["digitlab.kind"]) == ("123", "train")
    assert row.tags["digitlab.config_from"] == "mine.yaml"
    status, out, _ = call("reproduce", "--config", str(file), "trainer.seed=123")
    assert status == 0
    assert out.splitlines()[-1].startswith(f"identical: smoke seed=123 ({run_id})")


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"", b"[1]", b"trainer: {epochs: 1}", b"{"])
def test_file_that_is_no_configuration_is_one_line(
    call: Call, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_bytes(content)
    status, out, err = call("reproduce", "--config", str(file))
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_words_that_do_not_go_together_are_refused(call: Call, recorded: Recorded) -> None:
    file = str(recorded.file("config.yaml"))
    for words in (
        ["--config", file, "--json"],
        ["--config", file, "--at-commit"],
        ["--study", "smoke", "--at-commit"],
        ["--study", "smoke", "trainer.threads=2"],
        ["--study", "smoke", "--config", file],
    ):
        status, out, err = call("reproduce", *words)
        assert (status, out, len(err.splitlines())) == (2, "", 1)


@pytest.fixture(scope="module")
def elsewhere(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A run in another store of the same lab: its id, and the override that names the store."""
    folder = tmp_path_factory.mktemp("store")
    store = f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"
    [composed] = compose("train", [*SMALL, "name=elsewhere", "trainer.seed=4", store])
    assert train(composed, recorded.lab).state == "finished"
    uri = composed.config.tracking.uri
    return MlflowTracker(uri, "digitlab", recorded.lab).get("elsewhere").run_id, store


@pytest.mark.slow
def test_run_in_another_store_is_reproduced_there(call: Call, elsewhere: tuple[str, str]) -> None:
    status, out, _ = call("reproduce", *elsewhere)
    assert status == 0
    assert out.splitlines()[-1].startswith(f"identical: elsewhere ({elsewhere[0]})")


@pytest.mark.slow
def test_file_of_a_run_in_another_store_is_held_to_that_run(
    call: Call, recorded: Recorded, elsewhere: tuple[str, str]
) -> None:
    run_id, store = elsewhere
    file = str(recorded.file("config.yaml"))
    status, out, _ = call("reproduce", "--config", file, "trainer.seed=4", store)
    assert status == 0
    assert out.splitlines()[-1].startswith(f"identical: elsewhere ({run_id})")


@pytest.mark.slow
def test_config_from_a_run_in_another_store_is_found_there(
    call: Call, elsewhere: tuple[str, str]
) -> None:
    run_id, store = elsewhere
    status, out, _ = call("train", "--config-from", run_id, store, "model.hidden=8")
    assert status == 0
    [printed] = re.findall("train it again: +digitlab (.+)", out)
    assert store in printed
    status, out, _ = call(*shlex.split(printed))
    assert (status, out.splitlines()[-1].startswith("identical: smoke hidden=8 (")) == (0, True)


# ---- stored configurations are data --------------------------------------------------------------


@contextmanager
def sealed_with(recorded: Recorded, change: Callable[[str], str]) -> Iterator[None]:
    """The record with another config.yaml, as if it had been written so."""
    text = recorded.file("config.yaml").read_text()
    changed = change(text)
    assert changed != text
    digests = [hashlib.sha256(t.encode()).hexdigest() for t in (text, changed)]
    sums = recorded.file(SUMS).read_text().replace(*digests)
    tags = recorded.row.tags
    sealed = seal(sums, recorded.tracker.history(recorded.run_id), tags)
    update = "UPDATE tags SET value = ? WHERE run_uuid = ? AND key = 'digitlab.seal'"
    recorded.execute(update, sealed, recorded.run_id)
    with (
        rewritten(recorded.file("config.yaml"), changed.encode()),
        rewritten(recorded.file(SUMS), sums.encode()),
    ):
        yield
    recorded.execute(update, tags["digitlab.seal"], recorded.run_id)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("format: 1\n", "", "format"),
        ("  epochs: 1\n", "  epochs: 1\n  pace: 3\n", "pace"),
        ("  epochs: 1\n", "", "trainer.epochs"),
        ("  epochs: 1\n", "  epochs: many\n", "trainer.epochs=many"),
        ("  epochs: 1\n", "  epochs: 0\n", "trainer.epochs=0"),
        ("  epochs: 1\n", "  epochs: [1]\n", "trainer.epochs"),
        ("  name: convnet\n", "  name: convnet\n  _target_: os.getcwd\n", "_target_"),
        ("  name: convnet\n", "  name: os.path\n", "model.name=os.path"),
        ("  name: sample\n", "  name: ${oc.env:HOME}\n", "interpolation"),
        ("data:\n", "x: !!python/object/apply:os.getcwd []\ndata:\n", "not a configuration"),
        ("  name: smoke\n", "  name: ../../smoke\n", "study.name=../../smoke"),
    ],
)
def test_stored_configuration_is_refused_with_the_version_that_wrote_it(
    call: Call,
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    old: str,
    new: str,
    named: str,
) -> None:
    monkeypatch.setenv("HOME", "/home/of/nobody")
    before = runs(recorded)
    with sealed_with(recorded, lambda text: text.replace(old, new)):
        reported = [
            call("reproduce", recorded.run_id),
            call("train", "--config-from", recorded.run_id),
        ]
    for status, out, err in reported:
        assert (status, out) == (2, "")
        assert named in err
        assert f"config.yaml of smoke-seed-0 ({recorded.run_id})" in err
        assert f"written by digitlab {version('digitlab')}" in err
        assert len(err.splitlines()) == 1
        assert "/home/of/nobody" not in err
    assert runs(recorded) == before


def test_stored_name_of_data_is_no_path(call: Call, recorded: Recorded) -> None:
    name = "../../etc/passwd"
    with sealed_with(recorded, lambda text: text.replace("name: sample", f"name: {name}")):
        status, out, _ = call("reproduce", recorded.run_id)
        assert status == 1
        assert f"parameter data.name of smoke-seed-0 ({recorded.run_id}) is sample, {name}" in out
        status, out, err = call("train", "--config-from", recorded.run_id)
        assert (status, out) == (2, "")
        assert f"is sample, {name} in its config.yaml" in err
        change = "UPDATE params SET value = ? WHERE run_uuid = ? AND key = 'data.name'"
        recorded.execute(change, name, recorded.run_id)
        status, out, err = call("reproduce", recorded.run_id)
        recorded.execute(change, "sample", recorded.run_id)
    assert (status, out) == (2, "")
    assert f"data.name={name}: no such data set" in err


def test_name_of_a_run_is_no_path(call: Call, recorded: Recorded) -> None:
    identity = Identity("../../escaped/here", "train")
    config = recorded_config(recorded.tracker, recorded.row)
    with open_records(config, recorded.lab) as records:
        outcome = run_once(config, identity, records, recorded.lab)
    status, out, _ = call("reproduce", str(outcome.run_id))
    assert status == 0
    assert f"reproducing {identity.name} ({outcome.run_id})" in out.splitlines()
    assert list(Path.cwd().iterdir()) == []
    assert list(recorded.lab.parent.rglob("*escaped*")) == []


# ---- the recorded code ---------------------------------------------------------------------------


def git(folder: Path, *arguments: str, given: bytes | None = None) -> bytes:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a", *arguments]
    return subprocess.run(command, input=given, capture_output=True, check=True).stdout


def commit(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "more")
    return git(folder, "rev-parse", "HEAD").decode().strip()


def work_trees(folder: Path) -> int:
    return len(git(folder, "worktree", "list").splitlines())


@pytest.fixture(autouse=True)
def _no_settings_of_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one commit that stands for the project's own."""
    folder = tmp_path / "repository"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "x.py").write_text("x = 1\n" * 9)
    (folder / "src" / "crlf.txt").write_bytes(b"one\r\ntwo\r\n")
    (folder / "src" / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "src" / "bits").write_bytes(bytes(range(256)))
    git(folder, "init", "--quiet")
    commit(folder)
    monkeypatch.setattr(at_commit, "ROOT", folder)
    monkeypatch.setattr(environment, "ROOT", folder)
    return folder


# A project whose command says what code it is, and that all is well; it trains nothing.
STUB = """import json, os, sys
from digitlab import kept
from digitlab import version

def main():
    assert sys.argv[1] == "reproduce"
    reported = [version.NAME, kept.NAME, os.environ["DIGITLAB_HOME"], *sys.argv[2:]]
    print(json.dumps(dict(verdict="identical", differences=[], run_id="0", original_run_id="0")))
    print(json.dumps(reported), file=sys.stderr)
    return 0
"""


def test_recorded_code_is_run_when_the_checkout_has_moved_on(
    recorded: Recorded, repository: Path
) -> None:
    package = repository / "src" / "digitlab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(STUB)
    (package / "version.py").write_text("NAME = 'committed'\n")
    commit(repository)
    (package / "version.py").write_text("NAME = 'changed'\n")
    (package / "kept.py").write_text("NAME = 'untracked'\n")
    then = describe_environment() | {"source": source_digest(package)}

    (package / "version.py").write_text("NAME = 'later'\n")
    commit(repository)
    (package / "version.py").write_text("NAME = 'now'\n")
    (package / "kept.py").unlink()
    line = train_at_commit(recorded.row, then, ["trainer.threads=2"], recorded.lab)
    reported = ["changed", "untracked", str(recorded.lab), recorded.run_id, "trainer.threads=2"]
    assert json.loads(line) == reported
    assert work_trees(repository) == 1
    assert (package / "version.py").read_text() == "NAME = 'now'\n"
    assert not (package / "kept.py").exists()


def verdict_of(
    recorded: Recorded, trained: Callable[[], str], patch: pytest.MonkeyPatch
) -> Verdict:
    """The verdict on recorded code that does `trained`, and says what that returns."""
    patch.setattr(reproduction, "train_at_commit", lambda *_: trained())
    config = compose("train", SMALL)[0].config
    return reproduction._train_at_commit(recorded.tracker, recorded.row, [], config, recorded.lab)


def test_recorded_code_is_checked_by_the_record_that_it_leaves_and_not_by_its_words(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {"digitlab.reproduction_of": recorded.run_id}

    def say() -> str:
        return '{"verdict": "identical"}'

    def train_otherwise() -> str:
        train(compose("train", [*SMALL, "trainer.seed=7"])[0], recorded.lab, tags)
        return say()

    def forge() -> str:
        same = recorded.row.tags["digitlab.weights_sha256"]
        written(recorded, "forged", weights=same, tags=tags)
        return say()

    def fail() -> str:
        written(recorded, "failed", state="failed", tags=tags | {"digitlab.reason": "broken"})
        return say()

    with pytest.raises(UserError, match="left no record of a run") as raised:
        verdict_of(recorded, say, monkeypatch)
    assert "\n" not in str(raised.value)
    verdict = verdict_of(recorded, train_otherwise, monkeypatch)
    assert verdict.verdict == "not reproduced"
    assert any(text.startswith("SHA-256 of the weights was") for text in verdict.differences)
    for act, reason in ((forge, "seal"), (fail, "failed: broken")):
        verdict = verdict_of(recorded, act, monkeypatch)
        assert verdict.verdict == "not reproduced"
        assert reason in verdict.differences[0]


class Answering(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stdin", "is_trusted", "reason"),
    [
        (io.StringIO("y\n"), False, "give --yes"),  # nobody has seen it
        (None, False, "give --yes"),
        (Answering("\n"), False, "was not run"),
        (Answering("no\n"), False, "was not run"),
        (Answering("y\n"), False, ""),
        (None, True, ""),
    ],
)
def test_recorded_code_is_shown_and_run_only_if_a_person_says_so(
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stdin: io.StringIO | None,
    is_trusted: bool,
    reason: str,
) -> None:
    then = {"commit": "c0ffee", "diff": "+import os\x1b[2J\n", "untracked": {"src/x.py": "evil()"}}
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(UserError, match=reason) if reason else nullcontext():
        confirm_code(recorded.row, then, is_trusted)
    out = capsys.readouterr().out
    for shown in ("commit c0ffee", "+import os\\x1b[2J\n", "src/x.py", "evil()"):
        assert shown in out


OTHER_DIFF = "--- a/src/x.py\n+++ b/src/x.py\n@@ -1 +1 @@\n-never\n+there\n"
OUTSIDE_DIFF = "--- /dev/null\n+++ b/src/../../x\n@@ -0,0 +1 @@\n+x\n"


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ({"commit": ""}, "recorded outside a repository"),
        ({"commit": "0" * 40}, "invalid reference"),
        ({"diff": OTHER_DIFF}, "patch does not apply|patch failed"),
        ({"diff": OUTSIDE_DIFF}, "invalid path"),
        ({"untracked": {"../x": "x"}}, r"\.\./x lies outside the checkout"),
        ({"untracked": {"src/../../x": "x"}}, "lies outside the checkout"),
        ({"untracked": {"/nonexistent/x": "x"}}, "/nonexistent/x lies outside the checkout"),
        ({"untracked": {"src/large.bin": None}}, "untracked files that are not in its record"),
    ],
)
def test_code_that_cannot_be_had_any_more_is_refused(
    recorded: Recorded, repository: Path, then: dict[str, Any], reason: str
) -> None:
    head = git(repository, "rev-parse", "HEAD").decode().strip()
    before = set(repository.parent.rglob("*"))
    with pytest.raises(UserError, match=reason) as reported:
        train_at_commit(recorded.row, {"commit": head} | then, [], recorded.lab)
    assert "\n" not in str(reported.value)
    assert str(reported.value).startswith("--at-commit: smoke-seed-0")
    assert work_trees(repository) == 1
    after = {path for path in repository.parent.rglob("*") if ".git" not in path.parts}
    assert after <= before


def test_commit_that_is_not_there_is_one_line(
    call: Call, recorded: Recorded, repository: Path
) -> None:
    status, out, err = call("reproduce", recorded.run_id, "--at-commit", "--yes")
    assert status == 2
    assert out.startswith("the code of smoke-seed-0")
    assert len(err.splitlines()) == 1
    assert "--at-commit: smoke-seed-0" in err


def test_recorded_code_that_breaks_is_refused(recorded: Recorded, repository: Path) -> None:
    package = repository / "src" / "digitlab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="--at-commit"):
        train_at_commit(recorded.row, {"commit": commit(repository)}, [], recorded.lab)


def test_commit_without_the_code_is_refused(recorded: Recorded, repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD").decode().strip()
    with pytest.raises(UserError, match="--at-commit") as reported:
        train_at_commit(recorded.row, {"commit": head}, ["--nonsense"], recorded.lab)
    assert "its code ended with status" not in str(reported.value)


def test_code_outside_a_repository_is_refused(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_commit, "ROOT", tmp_path)
    with pytest.raises(UserError, match="not a git repository"):
        train_at_commit(recorded.row, {"commit": "0" * 40}, [], recorded.lab)


def test_recorded_code_without_git_is_refused(
    recorded: Recorded, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="git"):
        train_at_commit(recorded.row, {"commit": "0" * 40}, [], recorded.lab)


@pytest.mark.parametrize("path", ["", "src", "src/x.py/y"])
def test_untracked_path_that_cannot_be_written_is_refused(
    recorded: Recorded, repository: Path, path: str
) -> None:
    head = git(repository, "rev-parse", "HEAD").decode().strip()
    with pytest.raises(UserError, match="--at-commit"):
        train_at_commit(recorded.row, {"commit": head, "untracked": {path: "x"}}, [], recorded.lab)


@pytest.mark.parametrize(
    ("file", "content", "setting"),
    [
        ("x.py", b"x = 2\n" + b"x = 1\n" * 8, None),
        ("x.py", b"", None),
        ("x.py", None, None),
        ("bits", bytes(range(255, -1, -1)), None),
        ("x.py", b"x = 2 \n\n" + b"x = 1\n" * 8, "diff.mnemonicPrefix=true"),
        ("crlf.txt", b"one\r\ntwo\r\nthree\r\n", None),
        ("latin.txt", b"caf\xe9 cr\xe8me\n", None),
        ("x.py", b"x = 2\n", "diff.noprefix=true"),
        ("x.py", b"x = 2\n", "color.ui=always"),
        ("x.py", b"x = 2\n", "diff.external=true"),
    ],
)
def test_recorded_change_can_be_applied_byte_for_byte(
    repository: Path, tmp_path: Path, file: str, content: bytes | None, setting: str | None
) -> None:
    path = repository / "src" / file
    if setting:
        git(repository, "config", *setting.split("="))
    path.unlink() if content is None else path.write_bytes(content)
    diff = describe_environment()["diff"]
    tree = tmp_path / "tree"
    git(repository, "worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
    git(tree, "apply", "--whitespace=nowarn", "-", given=os.fsencode(diff))
    kept = tree / "src" / file
    assert (kept.read_bytes() if kept.exists() else None) == content


def test_untracked_file_is_recorded_byte_for_byte(repository: Path) -> None:
    (repository / "src" / "new.py").write_bytes(b"x = 1\r\n")
    kept = describe_environment()["untracked"]["src/new.py"]
    assert kept is None or kept.encode() == b"x = 1\r\n"


def test_untracked_file_that_is_no_text_or_too_large_is_named_alone(repository: Path) -> None:
    (repository / "src" / "new.py").write_text("x = 1\n")
    (repository / "src" / "bytes.py").write_bytes(b"\xff\xfe")
    (repository / "src" / "large.py").write_text("#" * (2**20 + 1))
    (repository / "notes.txt").write_text("takes no part")
    assert describe_environment()["untracked"] == {
        "src/new.py": "x = 1\n",
        "src/bytes.py": None,
        "src/large.py": None,
    }


def test_remains_of_a_library_do_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "torch" in describe_environment()["libraries"]


# Trains from another seed, which an untracked file says.
CHANGE = """

from dataclasses import replace as _replace  # noqa: E402

from digitlab.offset import OFFSET  # noqa: E402

_fit = fit


def fit(config, *rest):  # noqa: F811
    trainer = _replace(config.trainer, seed=config.trainer.seed + OFFSET)
    return _fit(_replace(config, trainer=trainer), *rest)
"""


@pytest.mark.long
def test_uncommitted_code_trains_the_same_again_when_the_checkout_has_moved_on(
    lab: Path, call_in: CallIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, package = tmp_path / "clone", tmp_path / "clone" / "src" / "digitlab"
    for name in ("src", "conf", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.png")
        shutil.copytree(ROOT / name, clone / name, ignore=ignored)
    shutil.copy(ROOT / ".gitignore", clone)
    git(clone, "init", "--quiet")
    commit(clone)
    whole = (package / "workers" / "job.py").read_text()
    (package / "workers" / "job.py").write_text(whole + CHANGE)
    (package / "offset.py").write_text("OFFSET = 41\n")
    command = [*COMMAND, "train", *SMALL]
    place = environment_of(lab) | {"PYTHONPATH": str(clone / "src")}
    subprocess.run(command, cwd=clone, env=place, check=True)

    (package / "workers" / "job.py").write_text(whole)
    (package / "offset.py").unlink()
    (package / "extra.py").write_text("EXTRA = 1\n")
    commit(clone)
    (package / "workers" / "job.py").write_text("raise SystemExit('the present code is broken')")
    monkeypatch.setattr(at_commit, "ROOT", clone)
    call = call_in(lab)
    status, out, _ = call("reproduce", "smoke-seed-0", "--at-commit", "--yes", "--json")
    document = json.loads(out)
    assert (status, document["verdict"], document["differences"]) == (0, "identical", [])
    assert work_trees(clone) == 1
    tracker = MlflowTracker(None, "digitlab", lab)
    assert tracker.get(document["run_id"]).tags["digitlab.verdict"] == "identical"
    # The code of this process trains from the seed as it stands.
    status, out, _ = call("reproduce", document["original_run_id"])
    assert re.search(r"  source was \w{12}, is \w{12}: can change anything\n", out)
    assert "SHA-256 of the weights was" in out
    assert out.splitlines()[-1].startswith(("within tolerance", "not comparable"))


# ---- a whole study -------------------------------------------------------------------------------


def parted(lab: Path, study: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = replay(study, lab, as_json=True)
    return status, json.loads(capsys.readouterr().out)


def alter(lab: Path, number: int, value: str) -> None:
    with closing(sqlite3.connect(lab / "optuna.db", timeout=60)) as database, database:
        trial = "SELECT trial_id FROM trials WHERE number = ? AND study_id = 1"
        change = f"UPDATE trial_values SET value = {value} WHERE trial_id = ({trial})"
        assert database.execute(change, [number]).rowcount == 1


@pytest.fixture
def copied(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of the lab with a finished study, made by one worker."""
    return shutil.copytree(studies(tmp_path_factory), tmp_path / "copied")


@pytest.mark.long
def test_study_is_replayed_trial_by_trial(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = parted(copied, "smoke", capsys)
    assert (status, document["verdict"], changes(document)) == (0, "identical", [])
    tracker = MlflowTracker(None, "digitlab", copied)
    kept = tracker.get(document["run_id"])
    study = tracker.get("smoke")
    assert (kept.name, kept.tags["digitlab.kind"]) == ("smoke-replay", "reproduction")
    assert kept.tags["digitlab.verdict"] == "identical"
    assert kept.tags["digitlab.reproduction_of"] == document["original_run_id"] == study.run_id
    assert study.tags["digitlab.reproduced"] == "identical"
    assert json.loads(tracker.artifact(kept.run_id, "replay.json")) == []
    # The trials of the replay are in Optuna's storage alone.
    assert tracker.find({"digitlab.study": "smoke-replay"}) == []

    alter(copied, 0, "value + 1e-9")
    original, again = (load_study(copied, name)[0] for name in ("smoke", kept.name))
    [difference] = compare_studies(original, again)
    assert re.match(r"trial 0: value was 0\.\d+, is 0\.\d+$", difference)


@pytest.mark.long
def test_study_of_one_worker_that_was_altered_is_not_reproduced(
    lab: Path, run_sweep: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep("study.workers=1").wait() == 0
    alter(lab, 0, "value + 1e-9")
    for name in ("smoke-replay", "smoke-replay1"):
        status, document = parted(lab, "smoke", capsys)
        assert (status, document["verdict"]) == (1, "not reproduced")
        [difference] = changes(document)
        assert re.match(r"trial 0: value was 0\.\d+, is 0\.\d+$", difference)
        tracker = MlflowTracker(None, "digitlab", lab)
        kept = tracker.get(document["run_id"])
        assert kept.name == name
        assert json.loads(tracker.artifact(kept.run_id, "replay.json")) == [difference]


@pytest.mark.long
def test_study_of_two_workers_that_parts_is_not_comparable(
    lab: Path, run_sweep: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep("study.workers=2").wait() == 0
    alter(lab, 0, "0.5")  # as another history may make it
    status, document = parted(lab, "smoke", capsys)
    assert (status, document["verdict"]) == (3, "not comparable")
    workers, *trials = changes(document)
    assert workers.startswith("study.workers was 2, is 1: gives trials another history")
    assert any(trial.startswith("trial 0: value was 0.5, is ") for trial in trials)


def test_replay_whose_record_is_refused_says_so_after_its_verdict(
    copied: Path, call_in: CallIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise TrackerRefused("403")

    monkeypatch.setattr(MlflowTracker, "upload", refuse)
    monkeypatch.setattr("digitlab.results.replay.sweep", lambda *_, **__: 0)
    status, out, err = call_in(copied)("reproduce", "--study", "smoke", "--json")
    assert (status, json.loads(out)["differences"][-1][:9]) == (2, "champion:")
    assert re.fullmatch(
        r"digitlab: The record of run 'smoke-replay' was refused \(403\).*", err.splitlines()[-1]
    )
    assert "digitlab.reproduced" not in MlflowTracker(None, "digitlab", copied).get("smoke").tags


def test_study_that_cannot_be_replayed_is_one_line(call: Call, recorded: Recorded) -> None:
    status, out, err = call("reproduce", "--study", "smoek")
    assert (status, out) == (2, "")
    assert "study smoek does not exist" in err
    assert len(err.splitlines()) == 1


@pytest.mark.long
def test_study_that_does_not_count_failed_trials_is_replayed(
    lab: Path, run_sweep: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["data.mean=choice(0.13,1e39)", "model.batch_norm=false"]
    study = ["study.count_failed=false", "study.sampler=random", "study.pruner=none"]
    assert run_sweep("study.workers=1", "study.trials=2", *wild, *study).wait() == 0
    assert parted(lab, "smoke", capsys)[1]["verdict"] == "identical"


@pytest.mark.slow
def test_forked_study_is_replayed_from_its_own_record(
    lab: Path, run_sweep: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The study whose trials it took has grown since, and is then gone."""
    study = ["study.workers=1", "study.pruner=none", "study.measure_seeds=0", "data.images=100"]
    source = [*study, "study.name=source", "study.seed=5"]
    assert run_sweep(*source, "study.trials=1").wait() == 0
    own = [*study, "study.name=own", "study.begin_with=[{model.hidden: 20}]"]
    assert run_sweep(*own, "study.trials=1").wait() == 0
    assert run_sweep(*own, "study.fork_from=source", "study.trials=3").wait() == 0
    assert run_sweep(*source, "study.trials=2").wait() == 0
    taken = [row.notes.get("taken_from") for row in load_study(lab, "own")[0].rows()]
    assert taken == [None, "source/0", None]
    assert replay("own", lab, as_json=False) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 trial that it took over from another study: as recorded, not trained" in said
    optuna.delete_study(study_name="source", storage=open_storage(lab))
    status, document = parted(lab, "own", capsys)
    assert (status, document["verdict"], changes(document)) == (0, "identical", [])


@pytest.mark.long
def test_replay_that_is_stopped_says_so_without_a_traceback(
    lab: Path, run_sweep: Callable[..., Any]
) -> None:
    longer = ("trainer.epochs=50", "study.trials=1", "study.pruner=none")
    assert run_sweep("study.workers=1", *longer).wait() == 0
    command = [*COMMAND, "reproduce", "--study", "smoke"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        command, start_new_session=True, env=environment_of(lab), **pipes
    ) as process:
        while states_of(lab, "smoke-replay") != ["running"]:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


@pytest.mark.long
def test_study_of_twelve_trials_with_pruning_is_replayed_identically(
    lab: Path, run_sweep: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    study = ["study.trials=12", "study.startup_trials=3", "study.rungs=[0.3,0.6]"]
    more = ["study.confirm=3", "study.confirm_fits=6", "study.final_seeds=2", "trainer.epochs=2"]
    assert run_sweep("study.workers=1", *study, *more).wait() == 0
    status, document = parted(lab, "smoke", capsys)
    assert (status, document["verdict"], changes(document)) == (0, "identical", [])
    for name in ("smoke", "smoke-replay"):
        assert len(states_of(lab, name)) == 12
        assert states_of(lab, name).count("pruned") >= 3


# ---- many configurations -------------------------------------------------------------------------

SMOKE = ["experiments=smoke", "model.widths=[4]"]
MODELS = {
    "convnet": [*SMOKE, "model.hidden=8"],
    "deep": [*SMOKE, "model.widths=[4,8]", "model.hidden=0", "model.kernel_sizes=[5,3]"],
    "dropout": [*SMOKE, "model.dropout=0.4"],
    "plain": [*SMOKE, "model.batch_norm=false"],
    "seed": ["experiments=seed"],
    "strided": ["experiments=smoke", "model=strided", "model.widths=[4,8,8]"],
}
AUGMENT = [f"data.augment.{key}" for key in ("shift=2", "rotate=10", "scale=0.1", "shear=5")]
AUGMENT += ["data.augment.erase=6"]
TWENTY = [
    ("convnet", ["optim=adamw"]),
    ("convnet", ["optim=adam"]),
    ("convnet", ["optim=sgd"]),
    ("convnet", ["optim=sgd", "optim.momentum=0", "optim.gradient_clip=1"]),
    ("convnet", ["optim.schedule=cosine", "optim.ema=0.99"]),
    ("convnet", ["optim.schedule=constant", "optim.label_smoothing=0.1"]),
    ("convnet", [*AUGMENT, "optim.ema=0.9"]),
    ("convnet", ["data.evaluate_on=test", *AUGMENT]),
    ("deep", ["optim=adamw", *AUGMENT]),
    ("deep", ["optim=adam", "optim.schedule=cosine"]),
    ("deep", ["optim=sgd", "optim.ema=0.95"]),
    ("dropout", ["optim=adamw", "optim.ema=0.99", *AUGMENT]),
    ("dropout", ["optim=sgd", "optim.schedule=constant"]),
    ("plain", ["optim=adam", "data.augment.shift=1"]),
    ("plain", ["optim=adamw", "data.batch_size=77"]),
    ("seed", ["optim=adam"]),
    ("seed", ["optim=sgd", "optim.learning_rate=0.01", *AUGMENT]),
    ("strided", ["optim=adamw", "optim.ema=0.99"]),
    ("strided", ["optim=adam", "data.augment.erase=8"]),
    ("strided", ["optim=sgd", "data.evaluate_on=test"]),
]


@pytest.mark.long
@pytest.mark.parametrize("number", range(20))
def test_every_kind_of_configuration_is_reproduced(
    call: Call, recorded: Recorded, number: int
) -> None:
    model, overrides = TWENTY[number]
    small = ["data=sample", "data.batch_size=200", "trainer.epochs=2"]
    seed = f"trainer.seed={1000 + number}"
    status, out, err = call("train", *MODELS[model], *small, *overrides, seed)
    assert (status, err) == (0, "")
    run_id = out.split("run ")[1].split()[0]
    status, out, _ = call("reproduce", run_id, "--json")
    document = json.loads(out)
    assert (status, document["verdict"], changes(document)) == (0, "identical", [])
