"""What a run's record holds, and that a change of any part of it is noticed."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from trackers import FILES, waiting

from digitlab.base.errors import UserError
from digitlab.config.compose import compose
from digitlab.config.types import Config
from digitlab.networks.table import build_network
from digitlab.records import spool
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.reader import (
    damage,
    find_run,
    load_network,
    load_run,
    over_seeds,
    recorded_config,
    recorded_environment,
    recorded_guesses,
    trained,
)
from digitlab.records.record import (
    Identity,
    Records,
    RunRecorder,
    open_records,
    row_params,
    trial_tags,
)

METADATA = {"layout": "channels_last", "format": "1"}


def configure(*overrides: str) -> Config:
    return compose("train", ["experiments=smoke", "trainer.epochs=2", *overrides])[0].config


def results(config: Config, metadata: dict[str, str] = METADATA) -> dict[str, bytes]:
    weights = {name: x.contiguous() for name, x in build_network(config.model).state_dict().items()}
    digits = torch.tensor([1, 2, 3], dtype=torch.uint8)
    return {
        "weights.safetensors": safetensors.torch.save(weights, metadata),
        "predictions.safetensors": safetensors.torch.save(
            {"predictions": digits, "labels": digits.flip(0)}
        ),
        "pictures/a.png": b"picture",
    }


def finish(records: Records, name: str = "run", *overrides: str, kind: str = "train") -> str:
    config = configure(*overrides)
    tags = trial_tags("id", "smoke", 7, 2) if kind == "trial" else {}
    recorder = RunRecorder(
        records.outbox, config, Identity(name, kind, tags, environment={"commit": "abc"})
    )
    recorder.started({"model_parameters": 9.0})
    recorder.rung(0.5, 0.75)
    recorder.epoch(1, {"val_accuracy": 0.5, "train_loss": 1.5})
    recorder.epoch(2, {"val_accuracy": 0.75, "train_loss": 0.5})
    recorder.finish(
        {"val_accuracy": 0.75, "seconds": 2.5},
        results(config),
        {"numerics": {"threads": 1}},
        {"t": "d"},
    )
    assert records.outbox.flush(60) == 0
    records.outbox.check()
    run_id = recorder.run_id()
    assert run_id
    return run_id


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return open_records(configure(), tmp_path)


def test_finished_run_holds_everything_and_nothing_twice(records: Records, tmp_path: Path) -> None:
    run_id = finish(records, "smoke-7", kind="trial")
    row = trained(records.tracker, "smoke/7")
    assert (row.run_id, row.status, row.params) == (
        run_id, "FINISHED", row_params(configure(), "trial"),
    )  # fmt: skip
    assert row.tags["digitlab.attempt"] == "2"
    assert json.loads(row.tags["digitlab.data_sha256"]) == {"t": "d"}
    assert records.tracker.history(run_id) == [
        ("model_parameters", 0, 9.0),
        ("rung", 50, 0.5),
        ("rung_accuracy", 50, 0.75),
        ("seconds", 2, 2.5),
        ("train_loss", 1, 1.5),
        ("train_loss", 2, 0.5),
        ("val_accuracy", 1, 0.5),
        ("val_accuracy", 2, 0.75),
    ]
    assert recorded_config(records.tracker, row) == configure()
    assert recorded_environment(records.tracker, row) == {
        "commit": "abc",
        "numerics": {"threads": 1},
    }
    guesses, labels = recorded_guesses(records.tracker, row)
    assert (guesses.tolist(), labels.tolist()) == ([1, 2, 3], [3, 2, 1])
    assert damage(records.tracker, row) == []
    with records:
        pass
    assert waiting(tmp_path) == []


@pytest.mark.parametrize("state", ["pruned", "failed", "interrupted"])
def test_run_without_results_keeps_config_environment_and_reason(
    records: Records, state: str
) -> None:
    with records:
        recorder = RunRecorder(records.outbox, configure(), Identity("run", "train"))
        recorder.end(state, "why", {"seconds": 1.5}, {"more": "1"})
        recorder.end("finished")  # too late
    [row] = records.tracker.find({"digitlab.state": state})
    assert row.name == ("run (pruned)" if state == "pruned" else "run")  # MLflow says KILLED of it
    assert row.tags["digitlab.reason"] == "why"
    assert (row.metrics, row.tags["more"]) == ({"seconds": 1.5}, "1")
    assert recorded_config(records.tracker, row) == configure()
    assert recorded_environment(records.tracker, row) == {}
    with pytest.raises(UserError, match=f"is {state}: it must be a finished run"):
        trained(records.tracker, row.name)


def _metric(tracker: MlflowTracker, run_id: str) -> None:
    tracker.client.log_metric(run_id, "val_accuracy", 0.9, step=2)


def _tag(tracker: MlflowTracker, run_id: str) -> None:
    tracker.tag(run_id, {"digitlab.weights_sha256": "0" * 64})


def _file(tracker: MlflowTracker, run_id: str) -> None:
    tracker.upload(run_id, {"pictures/a.png": b"other"})


def _sums(tracker: MlflowTracker, run_id: str) -> None:
    tracker.upload(run_id, {"SHA256SUMS": b""})


def _param(tracker: MlflowTracker, run_id: str) -> None:
    tracker.client.log_param(run_id, "trainer.more", "9")


@pytest.mark.parametrize("change", [_metric, _tag, _file, _sums, _param])
def test_change_of_a_finished_record_is_found(
    records: Records, change: Callable[[MlflowTracker, str], None]
) -> None:
    run_id = finish(records)
    assert isinstance(records.tracker, MlflowTracker)
    change(records.tracker, run_id)
    assert len(damage(records.tracker, records.tracker.get(run_id))) == 1


def test_weights_are_hashed_before_they_are_used(records: Records) -> None:
    run_id = finish(records)
    row, config, network = load_run(records.tracker, "run")
    assert not network.training
    other = results(configure("trainer.seed=9"))["weights.safetensors"]
    records.tracker.upload(run_id, {"weights.safetensors": other[:-1] + bytes([other[-1] ^ 1])})
    with pytest.raises(UserError, match="not the file that was recorded"):
        load_network(records.tracker, row, config)


@pytest.mark.parametrize("metadata", [{}, {"format": "1"}, {"format": "2", "layout": "x"}])
def test_weights_of_another_format_are_refused(records: Records, metadata: dict[str, str]) -> None:
    config = configure()
    recorder = RunRecorder(records.outbox, config, Identity("run", "train"))
    recorder.finish({}, results(config, metadata))
    records.outbox.flush(60)
    with pytest.raises(UserError, match=r"metadata must have format=1") as raised:
        load_run(records.tracker, "run")
    assert "\n" not in str(raised.value)


def test_trial_is_found_by_its_finished_attempt(records: Records) -> None:
    run_id = finish(records, "smoke-7", kind="trial")
    later = Identity("smoke-7", "trial", trial_tags("id", "smoke", 7, 3))
    RunRecorder(records.outbox, configure(), later).end("interrupted")
    records.outbox.flush(60)
    assert find_run(records.tracker, "smoke/7").run_id == run_id
    with pytest.raises(UserError, match=r"smoke/8: no such trial, did you mean smoke/7"):
        find_run(records.tracker, "smoke/8")
    with pytest.raises(UserError, match="no study has selected one yet"):
        find_run(records.tracker, "champion")


def test_runs_that_differ_in_the_seed_alone_are_compared(records: Records) -> None:
    for seed in (1, 2):
        finish(records, f"seed-{seed}", f"trainer.seed={seed}")
    finish(records, "other", "trainer.seed=3", "optim.learning_rate=0.02")
    trial = finish(records, "trial", "trainer.seed=1", kind="trial")
    for run_id in (trial, records.tracker.get("seed-1").run_id):
        found = over_seeds(records.tracker, records.tracker.get(run_id))
        assert {run.name for run in found} == {"seed-1", "seed-2"}
    first, second, other = (
        records.tracker.get(name).tags["digitlab.configuration"]
        for name in ("seed-1", "seed-2", "other")
    )
    assert first == second != other  # by which MLflow's pages group them


def test_a_finished_run_names_the_images_that_it_used(records: Records) -> None:
    finish(records, "first")
    finish(records, "other", "data.split_seed=1")
    finish(records, "final", "data.evaluate_on=test")
    assert isinstance(records.tracker, MlflowTracker)
    used = {}
    for name in ("first", "other", "final"):
        run = records.tracker.client.get_run(records.tracker.get(name).run_id)
        found = [(one.dataset.digest, one.tags[0].value) for one in run.inputs.dataset_inputs]
        used[name] = {context: digest for digest, context in found}
    assert used["first"].keys() == used["other"].keys() == {"training", "validation"}
    assert used["final"].keys() == {"training", "test"}
    digests = [digest for one in used.values() for digest in one.values()]
    assert len(set(digests)) == len(digests)


def test_folder_is_added_file_by_file(records: Records, tmp_path: Path) -> None:
    for path, content in FILES.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    with records:
        recorder = RunRecorder(records.outbox, configure(), Identity("run", "train"))
        recorder.add_files(tmp_path / "folder")
        recorder.end("finished")
    run_id = records.tracker.get("run").run_id
    assert {path: records.tracker.artifact(run_id, path) for path in FILES} == FILES


def test_nothing_is_recorded_with_tracking_none(tmp_path: Path) -> None:
    with open_records(configure("tracking=none"), tmp_path) as records:
        recorder = RunRecorder(records.outbox, configure(), Identity("run", "train"))
        recorder.finish({"seconds": 1.0}, results(configure()))
        assert recorder.run_id(60) is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_seal_meets_a_full_disk_is_ended_once(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is in the outbox: whoever sees the error may end it again, and changes nothing."""
    recorder = RunRecorder(records.outbox, configure(), Identity("run", "train"))

    def fill(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(spool, "sync", fill)
        with pytest.raises(OSError, match="No space left"):
            recorder.end("failed")
        recorder.end("interrupted")
    assert records.outbox.flush(30) == 0
    assert records.tracker.get("run").tags["digitlab.state"] == "failed"
