"""A study goes to another lab in one file, whole; a damaged file goes nowhere."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CallIn
from samples import recorded, studies
from studies import problems_of, results_of

from digitlab.config.recorded import config_to_yaml, with_values
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.reader import find_run, load_run
from digitlab.records.tracker import LogBatch, RunRow
from digitlab.results import exchange
from digitlab.results.exchange import export_study
from digitlab.study.storage import open_storage, study_names


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy: whoever leads, audits or exports a study locks it, and others use the shared lab.
    return shutil.copytree(studies(tmp_path_factory), tmp_path_factory.mktemp("exported") / "lab")


@pytest.fixture(scope="module")
def bundle(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "smoke.zip"
    assert export_study("smoke", path, lab, []) == 0
    return path


def datasets(tracker: Any, row: RunRow) -> list[tuple[str, str, str]]:
    inputs = tracker.client.get_run(row.run_id).inputs.dataset_inputs
    return sorted((one.dataset.name, one.dataset.digest, one.tags[0].value) for one in inputs)


def facts(lab: Path, name: str) -> list[tuple[Any, ...]]:
    """What is recorded of a study's runs, but for their ids."""
    tracker = recorded(lab, name).tracker
    own = ("digitlab.", "mlflow.note", "mlflow.source")
    links = ("digitlab.weights_run", "digitlab.superseded_by")
    return [
        (
            row.name, row.status, row.params, row.metrics, row.started_ms, row.ended_ms,
            {k: v for k, v in row.tags.items() if k.startswith(own) and k not in links},
            tracker.history(row.run_id),
            {path: tracker.artifact(row.run_id, path) for path in tracker.files(row.run_id)},
            datasets(tracker, row),
        )
        for row in recorded(lab, name).runs()
    ]  # fmt: skip


@pytest.mark.slow
def test_an_imported_study_is_the_exported_one(
    lab: Path, bundle: Path, tmp_path: Path, call_in: CallIn
) -> None:
    other = tmp_path / "other"
    call = call_in(other)
    status, out, err = call("import", str(bundle))
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "look at it: digitlab show smoke"
    assert results_of(other) == results_of(lab)
    assert facts(other, "smoke") == facts(lab, "smoke")
    assert problems_of(other) == []
    here, there = (recorded(place, "smoke") for place in (lab, other))
    assert {row.run_id for row in here.runs()} & {row.run_id for row in there.runs()} == set()
    parent = there.store.notes()["run_id"]
    assert {row.tags.get("mlflow.parentRunId") for row in there.runs()} == {None, parent}
    champion, config, _ = load_run(there.tracker, "champion")
    assert champion.tags["digitlab.kind"] == "final"
    assert config == load_run(here.tracker, "champion")[1]
    assert there.store.notes()["champion"]["run_id"] in {row.run_id for row in there.runs()}
    status, out, err = call("import", str(bundle))
    assert (status, out) == (2, "")
    assert "study smoke is here already" in err


def test_a_study_that_still_runs_goes_with_what_it_has(
    lab: Path, tmp_path: Path, call_in: CallIn
) -> None:
    assert call_in(lab)("export", "stopped", str(tmp_path / "file"))[0] == 0
    other = tmp_path / "other"
    assert call_in(other)("import", str(tmp_path / "file"))[0] == 0
    assert results_of(other, "stopped") == results_of(lab, "stopped")
    assert facts(other, "stopped") == facts(lab, "stopped")


@pytest.mark.slow
def test_an_import_that_was_killed_is_started_again(
    lab: Path, bundle: Path, tmp_path: Path, call_in: CallIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are recorded, and of the study the last note alone is missing."""
    other = tmp_path / "other"
    call = call_in(other)

    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exchange, "config_to_yaml", stop)
        assert call("import", str(bundle))[0] == 130
    assert json.loads(call("studies", "--json")[1]) == []
    assert call("import", str(bundle))[0] == 0
    assert problems_of(other) == []
    assert facts(other, "smoke") == facts(lab, "smoke")


def test_the_last_of_several_values_at_a_step_stays_the_last(
    lab: Path, tmp_path: Path, call_in: CallIn
) -> None:
    """A study that is extended publishes its figures again: MLflow shows those that came last."""
    mine = shutil.copytree(lab, tmp_path / "lab")
    study = recorded(mine, "smoke").runs(kind="study")[0]
    tracker = recorded(mine, "smoke").tracker
    for time_ms, value in ((study.ended_ms + 1, 0.9), (study.ended_ms + 2, 0.1)):
        tracker.log(study.run_id, LogBatch({}, [("test_accuracy_mean", value, 0, time_ms)]))
    assert call_in(mine)("export", "smoke", str(tmp_path / "file"))[0] == 0
    other = tmp_path / "other"
    assert call_in(other)("import", str(tmp_path / "file"))[0] == 0
    assert recorded(other, "smoke").runs(kind="study")[0].metrics["test_accuracy_mean"] == 0.1
    assert facts(other, "smoke") == facts(mine, "smoke")


def test_a_study_that_was_imported_goes_on_with_the_stores_of_its_lab(
    lab: Path, tmp_path: Path, call_in: CallIn
) -> None:
    mine = shutil.copytree(lab, tmp_path / "lab")
    store = recorded(mine, "smoke").store
    words = ["tracking.uri=http://old", "study.trials=6", "study.storage=old", "tracking=mlflow"]
    store.note("overrides", words)
    assert call_in(mine)("export", "smoke", str(tmp_path / "file"))[0] == 0
    call = call_in(tmp_path / "other")
    assert call("import", str(tmp_path / "file"))[0] == 0
    assert recorded(tmp_path / "other", "smoke").store.notes()["overrides"] == [words[1], words[3]]


def test_a_study_on_images_of_ones_own_says_that_they_go_apart(
    lab: Path, tmp_path: Path, call_in: CallIn
) -> None:
    mine = shutil.copytree(lab, tmp_path / "lab")
    study = recorded(mine, "stopped")
    own = with_values(study.config, {"data.name": "mine"})
    study.store.note("config", config_to_yaml(own))
    status, out, _ = call_in(mine)("export", "stopped", str(tmp_path / "file"))
    copied = f"the export holds no images: copy {mine / 'data' / 'mine'} into data/ of the other"
    assert (status, out.splitlines()[-1].startswith(copied)) == (0, True)
    missing = "its images are not here: copy data/mine of the other lab to "
    other = tmp_path / "other"
    out = call_in(other)("import", str(tmp_path / "file"))[1]
    assert f"{missing}{other / 'data' / 'mine'}\n" in out
    there = tmp_path / "there"
    (there / "data" / "mine").mkdir(parents=True)
    (there / "data" / "mine" / "dataset.json").touch()
    assert missing not in call_in(there)("import", str(tmp_path / "file"))[1]


# ---- what is refused -----------------------------------------------------------------------------


Change = Callable[[dict[str, bytes]], None]


def index_of(members: dict[str, bytes]) -> Any:
    return json.loads(members["bundle.json"])


def with_index(change: Callable[[Any], object]) -> Change:
    def changed(members: dict[str, bytes]) -> None:
        index = index_of(members)
        change(index)
        members["bundle.json"] = json.dumps(index).encode()

    return changed


def first(index: Any) -> Any:
    """A finished run with weights."""
    return next(run for run in index["runs"] if "weights.safetensors" in run["files"])


def escape(path: str) -> Change:
    return with_index(lambda index: first(index)["files"].update({path: "0" * 64}))


def replace_weights(members: dict[str, bytes]) -> None:
    name = next(name for name in members if name.endswith("/weights.safetensors"))
    members[name] = members[name][:-1] + b"!"


def forge(members: dict[str, bytes]) -> None:
    """A file with a digest to match: the seal does not."""
    replace_weights(members)
    name = next(name for name in members if name.endswith("/weights.safetensors"))
    run_id, _, path = name.partition("/")
    index = index_of(members)
    run = next(run for run in index["runs"] if run["run_id"] == run_id)
    run["files"][path] = hashlib.sha256(members[name]).hexdigest()
    members["bundle.json"] = json.dumps(index).encode()


def remove_weights(members: dict[str, bytes]) -> None:
    del members[next(name for name in members if name.endswith("/weights.safetensors"))]


CHANGES: dict[str, Change] = {
    "a path above": escape("../../escaped"),
    "an absolute path": escape("/tmp/escaped"),
    "a path of another system": escape("..\\escaped"),
    "a run id that is a path": with_index(lambda index: first(index).update(run_id="../x")),
    "other weights": replace_weights,
    "weights and their digest": forge,
    "no weights": remove_weights,
    "another metric": with_index(lambda index: first(index)["metrics"].update(val_accuracy=1.0)),
    "another history": with_index(lambda index: first(index)["history"].pop()),
    "another trial": with_index(lambda index: first(index)["tags"].update({"digitlab.trial": "9"})),
    "another parameter": with_index(lambda i: first(i)["params"].update({"model.hidden": "9"})),
    "no index": lambda members: members.pop("bundle.json") and None,
    "no JSON": lambda members: members.update({"bundle.json": b"{"}),
    "a list": lambda members: members.update({"bundle.json": b"[]"}),
    "another format": with_index(lambda index: index.update(format=2)),
    "an unknown state": with_index(lambda index: index["trials"][0].update(state="GONE")),
    "a trial without values": with_index(lambda index: index["trials"][0].update(values=[])),
    "a value too many": with_index(lambda index: index["trials"][0]["values"].append(0.5)),
    "distributions that are none": with_index(
        lambda index: index["trials"][0]["distributions"].update({"model.hidden": "1.5"})
    ),
    "a time that no store can hold": with_index(lambda i: first(i).update(started_ms=2**63)),
    "a step that no server can hold": with_index(
        lambda index: index["trials"][0]["intermediate_values"].update({str(2**31): 0.5})
    ),
    "a champion that is none": with_index(lambda i: i["notes"].update(champion=5)),
    "a run's id that is none": with_index(lambda i: i["notes"].update(run_id={})),
    "a fingerprint that is none": with_index(lambda i: i["notes"].update(fingerprint=[1])),
    "overrides that are none": with_index(lambda i: i["notes"].update(overrides=5)),
    "an override that is none": with_index(lambda i: i["notes"].update(overrides=[5])),
    "data that are none": with_index(
        lambda index: first(index)["tags"].update({"digitlab.data_sha256": "[1]"})
    ),
    "a run without the key of its record": with_index(
        lambda index: index["runs"][-1]["tags"].pop("digitlab.record")
    ),
    "no id of a study": with_index(lambda index: index["notes"].pop("study_id")),
    "no configuration": with_index(lambda index: index["notes"].pop("config")),
    "an unknown key": with_index(lambda index: index.update(more=1)),
}  # fmt: skip


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab that stays empty."""
    return tmp_path_factory.mktemp("nowhere") / "inside" / "lab"


def refused(nowhere: Path, call_in: CallIn, path: Path) -> str:
    status, out, err = call_in(nowhere)("import", str(path))
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert str(path) in err
    assert study_names(open_storage(nowhere)) == []
    assert MlflowTracker(None, "digitlab", nowhere).find({}) == []
    assert not list(nowhere.parent.parent.rglob("escaped"))
    return err


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_bundle_is_refused_and_leaves_nothing(
    nowhere: Path, bundle: Path, call_in: CallIn, tmp_path: Path, kind: str
) -> None:
    with zipfile.ZipFile(bundle) as file:
        members = {name: file.read(name) for name in file.namelist()}
    CHANGES[kind](members)
    path = tmp_path / "changed.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    refused(nowhere, call_in, path)


def test_runs_that_are_in_the_tracker_already_are_not_written_to(
    lab: Path, bundle: Path, tmp_path: Path, call_in: CallIn
) -> None:
    """Two labs share a tracker: what one has exported, the other must not record there again."""
    before = facts(lab, "smoke")
    shared = f"tracking.uri=sqlite:///{lab / 'mlflow.db'}"
    call = call_in(tmp_path / "other")
    status, out, err = call("import", str(bundle), shared)
    assert (status, out, "has its runs in this tracker already" in err) == (2, "", True)
    assert json.loads(call("studies", "--json")[1]) == []
    assert facts(lab, "smoke") == before


def test_a_study_whose_champion_has_no_run_is_imported(
    bundle: Path, call_in: CallIn, tmp_path: Path
) -> None:
    """As where no tracker has recorded it."""
    with zipfile.ZipFile(bundle) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with_index(lambda index: index["notes"]["champion"].update(run_id=None))(members)
    path = tmp_path / "without.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    status, out, err = call_in(tmp_path / "lab")("import", str(path))
    assert (status, err) == (0, "")
    assert out.startswith("imported: study ")


def test_a_fault_of_the_lab_is_not_blamed_on_the_file(
    bundle: Path, tmp_path: Path, call_in: CallIn
) -> None:
    """As where the folder of its locks is a file."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "locks").touch()
    status, out, err = call_in(other)("import", str(bundle))
    assert (status, out) == (2, "")
    assert err.startswith(f"digitlab: {other / 'locks'} is a file: it must be a folder")
    assert str(bundle) not in err


@pytest.mark.parametrize("name", ["lab/mlflow.db", "lab/optuna.db", "file"])
def test_an_export_replaces_neither_the_lab_s_records_nor_another_file(
    lab: Path, call_in: CallIn, tmp_path: Path, name: str
) -> None:
    mine = shutil.copytree(lab, tmp_path / "lab")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "file.part").write_text("mine, too")
    status, out, err = call_in(mine)("export", "smoke", str(tmp_path / name))
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert str(tmp_path / name) in err
    assert results_of(mine) == results_of(lab)
    assert recorded(mine, "smoke").runs() == recorded(lab, "smoke").runs()
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "file.part").read_text() == "mine, too"


def test_a_file_that_is_no_whole_bundle_is_refused(
    nowhere: Path, bundle: Path, call_in: CallIn, tmp_path: Path
) -> None:
    content = bundle.read_bytes()
    middle = len(content) // 3
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for text in (b"no archive", content[:-100], flipped):
        (tmp_path / "file").write_bytes(text)
        refused(nowhere, call_in, tmp_path / "file")
    for path in (tmp_path / "missing", tmp_path):
        refused(nowhere, call_in, path)
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bundle.json", b" " * 10_000_000)
    assert "compressed" in refused(nowhere, call_in, tmp_path / "packed")


@pytest.mark.slow
def test_a_damaged_study_and_a_file_that_cannot_be_written_are_refused(
    lab: Path, call_in: CallIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call_in(lab)
    status, _, err = call("export", "smoke", "/dev/null/file")
    assert (status, "/dev/null/file cannot be written" in err) == (2, True)
    assert call("export", "smokk", str(tmp_path / "file"))[0] == 2
    run = find_run(recorded(lab, "smoke").tracker, "smoke/0")
    artifact = MlflowTracker.artifact

    def damaged(tracker: MlflowTracker, run_id: str, path: str) -> bytes:
        content = artifact(tracker, run_id, path)
        return content + b"!" if (run_id, path) == (run.run_id, "weights.safetensors") else content

    monkeypatch.setattr(MlflowTracker, "artifact", damaged)
    status, _, err = call("export", "smoke", str(tmp_path / "file"))
    assert (status, "weights.safetensors" in err) == (2, True)
    assert not (tmp_path / "file").exists()
