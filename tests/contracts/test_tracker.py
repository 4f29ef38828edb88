"""What every tracker must do: one suite, for each that there is."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from plain import PlainTracker
from trackers import FILES, LONG, Server

from digitlab.base.errors import UserError
from digitlab.records.local import list_artifacts, place_of
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.tracker import (
    Dataset,
    LogBatch,
    NewRun,
    NoTracker,
    Registration,
    Tracker,
    TrackerRefused,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test on every tracker that records, or on those that it is annotated with."""
    kinds = ["sqlite", pytest.param("server", marks=pytest.mark.slow)]
    if metafunc.function.__annotations__.get("tracker") is Tracker:
        kinds.append("plain")  # which tests use that run studies by the thousand
    if "tracker" in metafunc.fixturenames:
        metafunc.parametrize("tracker", kinds, indirect=True)


@pytest.fixture
def tracker(request: pytest.FixtureRequest, tmp_path: Path) -> Tracker:
    """A tracker without runs."""
    if request.param == "plain":
        return PlainTracker(tmp_path)
    if request.param == "sqlite":
        return MlflowTracker(None, request.node.name, tmp_path)
    server: Server = request.getfixturevalue("tracker_server")
    return MlflowTracker(server.uri, request.node.name, tmp_path)


def create(tracker: Tracker, name: str, **tags: str) -> str:
    return tracker.create_run(NewRun(name, tags, {}))


def registration(number: int, model: str = "digits") -> Registration:
    measured_on = Dataset("mnist", "0123abcd", "test")
    return Registration(model, {"trial": str(number)}, f"**the {number}th**\n\n- x", measured_on)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("finished", "FINISHED"),
        ("failed", "FAILED"),
        ("pruned", "KILLED"),
        ("interrupted", "KILLED"),
    ],
)
def test_run_has_the_status_of_the_state_that_it_ended_in(
    tracker: Tracker, state: str, status: str
) -> None:
    run_id = create(tracker, "first", kind="train")
    row = tracker.get(run_id)
    assert (row.status, row.is_ended) == ("RUNNING", False)
    tracker.end_run(run_id, state, 1_700_000_000_000)
    [row] = tracker.find({"kind": "train"})
    assert (row.run_id, row.name, row.status, row.is_ended) == (run_id, "first", status, True)


def test_run_that_ended_can_go_on(tracker: Tracker) -> None:
    run_id = create(tracker, "study")
    tracker.end_run(run_id, "interrupted", 1_700_000_000_000)
    tracker.end_run(run_id, "running", 1_700_000_000_001)
    assert tracker.get("study").status == "RUNNING"
    tracker.end_run(run_id, "finished", 1_700_000_000_002)
    assert tracker.get("study").status == "FINISHED"


def test_run_is_created_once_for_a_key(tracker: Tracker) -> None:
    new = NewRun("once", {"a": "b"}, {})
    run_id = tracker.create_run(new)
    assert tracker.create_run(new, may_exist=True) == run_id
    other = tracker.create_run(NewRun("other", {}, {}), may_exist=True)
    assert {row.run_id for row in tracker.find({})} == {run_id, other}
    assert tracker.get(run_id).tags["digitlab.record"] == new.key


def test_every_write_can_be_repeated(tracker: MlflowTracker) -> None:
    run_id = create(tracker, "twice")
    points = [("loss", 0.5, 1, 1000), ("loss", 0.25, 2, 2000)]
    used = [Dataset("mnist", "0123abcd", "training"), Dataset("mnist", "4567cdef", "validation")]
    batch = LogBatch({"seed": "3"}, points, {"a": "b"}, used)
    for _ in range(2):
        tracker.log(run_id, batch)
        tracker.upload(run_id, FILES)
        tracker.end_run(run_id, "finished", 3000)
    assert tracker.history(run_id) == [("loss", 1, 0.5), ("loss", 2, 0.25)]
    inputs = tracker.client.get_run(run_id).inputs.dataset_inputs
    listed = [(one.dataset.name, one.dataset.digest, one.tags[0].value) for one in inputs]
    assert sorted(listed) == sorted(map(tuple, used))
    row = tracker.get("twice")
    assert (row.params, row.status, row.tags["a"]) == ({"seed": "3"}, "FINISHED", "b")


def test_parameters_are_kept_whole_however_long_or_many(tracker: Tracker) -> None:
    many = {f"setting.{i}": str(i / 7) for i in range(250)}
    run_id = create(tracker, "long")
    tracker.log(run_id, LogBatch({"long": LONG, "empty": "", **many}))
    params = tracker.get("long").params
    pieces = sorted(key for key in params if key.startswith("long"))
    assert "".join(params[key] for key in pieces) == LONG
    assert params["empty"] == ""
    assert {key: params[key] for key in many} == many


def test_metrics_are_kept_exactly_by_step_however_many(tracker: Tracker) -> None:
    logged = [("loss", 1, 0.1 + 0.2), ("loss", 2, 1 / 3), ("loss", 3, 1e-300)]
    logged += [("rate", 1, 123456789.12345679), ("rate", 3, -0.0), ("zero", 0, 5e-324)]
    logged += [("many", step, step / 7) for step in range(1500)]
    run_id = create(tracker, "exact")
    points = [(name, value, step, 1000 + step) for name, step, value in reversed(logged)]
    tracker.log(run_id, LogBatch(metrics=points))
    assert tracker.history(run_id) == sorted(logged)
    metrics = tracker.get("exact").metrics
    assert metrics == {"loss": 1e-300, "rate": 0.0, "zero": 5e-324, "many": 1499 / 7}


def test_later_tag_replaces_an_earlier_one(tracker: Tracker) -> None:
    run_id = create(tracker, "tagged", colour="red")
    tracker.tag(run_id, {"colour": "blue", "size": "9"})
    tags = tracker.get("tagged").tags
    assert (tags["colour"], tags["size"]) == ("blue", "9")


def test_files_come_back_byte_for_byte_and_later_ones_replace_them(tracker: Tracker) -> None:
    run_id = create(tracker, "files")
    tracker.upload(run_id, FILES)
    assert {path: tracker.artifact(run_id, path) for path in FILES} == FILES
    tracker.upload(run_id, {"config.yaml": b"other"})
    assert tracker.artifact(run_id, "config.yaml") == b"other"
    assert tracker.artifact(run_id, "pictures/a.png") == FILES["pictures/a.png"]


@pytest.mark.parametrize("path", ["config.yaml", "pictures", "../../mlflow.db", "/etc/passwd"])
def test_missing_artifact_is_reported_in_one_line(tracker: Tracker, path: str) -> None:
    run_id = create(tracker, "files")
    tracker.upload(run_id, {"pictures/a.png": b"1"})
    with pytest.raises(UserError) as raised:
        tracker.artifact(run_id, path)
    assert path in str(raised.value)


@pytest.mark.parametrize("path", ["../escaped", "/proc/escaped", "a/../../escaped", "", "."])
def test_file_that_would_leave_its_run_is_refused(tracker: MlflowTracker, path: str) -> None:
    run_id = create(tracker, "files")
    with pytest.raises(TrackerRefused, match="must be the path of a file within its run") as raised:
        tracker.upload(run_id, {path: b"1"})
    assert "\n" not in str(raised.value)
    assert not list(tracker.lab.rglob("escaped"))


def test_runs_are_found_by_all_their_tags_oldest_first(tracker: Tracker) -> None:
    for name in ("c", "a", "b"):
        create(tracker, name, study="s", kind="trial")
        time.sleep(0.002)  # MLflow's times are in milliseconds
    create(tracker, "d", study="s", kind="final")
    create(tracker, "e", study="other", kind="trial")
    found = tracker.find({"study": "s", "kind": "trial"})
    assert [row.name for row in found] == ["c", "a", "b"]
    assert tracker.find({"study": "none"}) == []
    assert len(tracker.find({})) == 5


def test_deleted_run_is_found_no_more_and_known_as_deleted(tracker: Tracker) -> None:
    gone, left = (create(tracker, name, study="s") for name in ("gone", "left"))
    tracker.delete(gone)
    assert [row.run_id for row in tracker.find({"study": "s"})] == [left]
    assert [row.run_id for row in tracker.find_deleted({"study": "s"})] == [gone]
    assert tracker.find_deleted({"study": "other"}) == []
    assert (tracker.is_deleted(gone), tracker.is_deleted(left)) == (True, False)
    assert tracker.is_deleted("0" * 32)  # removed for good
    with pytest.raises(UserError, match="gone: no such run"):
        tracker.get("gone")
    with pytest.raises(TrackerRefused):
        tracker.log(gone, LogBatch(tags={"a": "b"}))


def test_run_is_returned_for_an_id_the_beginning_of_an_id_and_a_name(tracker: Tracker) -> None:
    run_id = create(tracker, "mine")
    create(tracker, "yours")
    assert [tracker.get(run).run_id for run in (run_id, run_id[:12], "mine")] == [run_id] * 3


def test_name_of_several_runs_is_refused_with_their_ids(tracker: Tracker) -> None:
    ids = [create(tracker, "twin") for _ in range(2)]
    with pytest.raises(UserError, match="twin: 2 runs") as raised:
        tracker.get("twin")
    beginnings = str(raised.value).rsplit(": ", 1)[1].split(", ")
    assert sorted(tracker.get(beginning).run_id for beginning in beginnings) == sorted(ids)


def test_misspelt_name_is_refused_with_the_nearest(tracker: Tracker) -> None:
    for name in ("default-seed-0", "default-seed-1", "smoke"):
        create(tracker, name)
    with pytest.raises(UserError) as raised:
        tracker.get("defualt-seed-0")
    message = str(raised.value)
    assert message.startswith("defualt-seed-0: no such run")
    assert "default-seed-0" in message.removeprefix("defualt-seed-0")
    assert "smoke" not in message


def test_child_names_its_parent(tracker: Tracker) -> None:
    parent = create(tracker, "study")
    tracker.create_run(NewRun("study-0", {}, {}, parent))
    assert tracker.get("study-0").tags["mlflow.parentRunId"] == parent
    assert "mlflow.parentRunId" not in tracker.get("study").tags


def test_a_registered_model_names_its_study(tracker: Tracker) -> None:
    assert tracker.owner_of("digits") is None
    run_id = create(tracker, "best")
    tracker.upload(run_id, {"model/MLmodel": b""})
    owned = registration(1)
    owned.tags["digitlab.study_id"] = "mine"
    tracker.register(run_id, owned)
    by_hand = create(tracker, "by hand")
    tracker.upload(by_hand, {"model/MLmodel": b""})
    tracker.register(by_hand, registration(2))
    assert tracker.owner_of("digits") == "mine"
    assert tracker.owner_of("others") is None


def test_latest_registered_version_is_the_champion(tracker: MlflowTracker) -> None:
    runs = [create(tracker, name) for name in ("first", "second")]
    for number, run_id in enumerate(runs):
        tracker.upload(run_id, {"model/MLmodel": b""})
        tracker.register(run_id, registration(number))
    champion = tracker.client.get_model_version_by_alias("digits", "champion")
    assert (champion.run_id, champion.tags["trial"]) == (runs[1], "1")
    assert champion.description == "**the 1th**\n\n- x"
    models = tracker.client.search_logged_models([tracker.experiment])
    [source] = [model.artifact_location for model in models if model.source_run_id == runs[1]]
    assert champion.source == source


def test_registered_model_is_listed_once_with_the_runs_metrics_and_their_data_set(
    tracker: MlflowTracker,
) -> None:
    run_id, client = create(tracker, "best"), tracker.client
    tracker.upload(run_id, {"model/MLmodel": b"a: b", "model/data/x": b"1", "weights": b"2"})
    batch = LogBatch({"seed": "3", "long": LONG}, [("loss", 0.5, 1, 1000), ("test", 0.25, 2, 2000)])
    tracker.log(run_id, batch)
    for _ in range(2):
        tracker.register(run_id, registration(7, model="v1.2 digits"))
    [model] = client.search_logged_models([tracker.experiment])
    assert (model.source_run_id, str(model.status), model.name) == (run_id, "READY", "v1-2 digits")
    assert (model.params, model.tags["trial"]) == ({"seed": "3"}, "7")
    assert sorted((m.key, m.step, m.value, m.dataset_name) for m in model.metrics) == [
        ("loss", 1, 0.5, "mnist"),
        ("test", 2, 0.25, "mnist"),
    ]
    assert {metric.dataset_digest for metric in model.metrics} == {"0123abcd"}
    assert tracker.history(run_id) == [("loss", 1, 0.5), ("test", 2, 0.25)]
    [output] = client.get_run(run_id).outputs.model_outputs
    assert output.model_id == model.model_id
    [version] = client.search_model_versions("name = 'v1.2 digits'")
    assert (version.run_id, version.source) == (run_id, model.artifact_location)
    if tracker.is_local:
        folder = place_of(tracker.lab, model.artifact_location)
        assert sorted(list_artifacts(folder)) == ["MLmodel", "data/x"]
    else:
        listed = client.list_logged_model_artifacts(model.model_id)
        assert {file.path for file in listed} == {"MLmodel", "data"}


def test_deleted_run_is_hidden_and_comes_back_whole(tracker: Tracker) -> None:
    run_id = create(tracker, "hidden", a="b")
    tracker.upload(run_id, FILES)
    for _ in range(2):
        tracker.delete(run_id)
        assert tracker.find({"a": "b"}) == []
        assert tracker.is_deleted(run_id)
    for _ in range(2):
        tracker.restore(run_id)
        assert [row.run_id for row in tracker.find({"a": "b"})] == [run_id]
    assert tracker.files(run_id) == sorted(FILES)
    folder = tracker.local_folder(run_id)  # where they are files on this machine
    assert (folder is None) == (not isinstance(tracker, MlflowTracker) or tracker.is_server)
    if folder is not None:
        assert all((folder / path).read_bytes() == content for path, content in FILES.items())


def test_row_says_when_its_run_started_and_ended(tracker: Tracker) -> None:
    run_id = tracker.create_run(NewRun("timed", {}, {}, time_ms=1_700_000_000_000))
    assert (tracker.get(run_id).started_ms, tracker.get(run_id).ended_ms) == (1_700_000_000_000, 0)
    tracker.end_run(run_id, "finished", 1_700_000_009_000)
    assert tracker.get(run_id).ended_ms == 1_700_000_009_000


def test_tags_of_the_experiment_are_set_and_replaced(tracker: MlflowTracker) -> None:
    for value in ("{}", LONG[:4999]):  # as long as a view may be
        tracker.set_experiment_tags({"mlflow.sharedViewState.mine": value, "plain": "1"})
    tags = tracker.client.get_experiment(tracker.experiment).tags
    assert (tags["mlflow.sharedViewState.mine"], tags["plain"]) == (LONG[:4999], "1")


def test_runs_page_is_that_of_the_experiment(tracker: MlflowTracker) -> None:
    page, _, place = tracker.runs_page().partition("/#")
    # `digitlab ui` serves what is in the lab.
    assert page == (tracker.uri if tracker.is_server else "http://127.0.0.1:5000")
    assert place.startswith(f"/experiments/{tracker.experiment}/runs?")


def test_recording_prints_nothing(tracker: Tracker, capfd: pytest.CaptureFixture[str]) -> None:
    run_id = create(tracker, "silent")
    tracker.upload(run_id, FILES)
    tracker.log(run_id, LogBatch({"a": "b"}, [("loss", 0.5, 1, 1)], {"c": "d"}))
    tracker.end_run(run_id, "finished", 1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_deleted_experiment_is_refused_with_the_command_that_restores_it(
    tracker: MlflowTracker, request: pytest.FixtureRequest
) -> None:
    name, lab = request.node.name, tracker.lab
    run_id = create(tracker, "before")
    tracker.client.delete_experiment(tracker.experiment)
    uri = tracker.uri if tracker.is_server else None
    with pytest.raises(UserError, match=r"was deleted") as raised:
        MlflowTracker(uri, name, lab)
    assert name in str(raised.value)
    with pytest.raises(UserError, match="was deleted"):
        tracker.is_deleted(run_id)
    found = re.search(r"`(.+)`", str(raised.value))
    assert found
    subprocess.run(found[1], shell=True, check=True, capture_output=True, env=os.environ)
    assert MlflowTracker(uri, name, lab).get("before").run_id == run_id


def test_no_tracker_takes_everything_and_holds_nothing() -> None:
    tracker = NoTracker()
    run_id = create(tracker, "nobody", study="s")
    tracker.log(run_id, LogBatch({"a": "b"}))
    tracker.upload(run_id, FILES)
    tracker.end_run(run_id, "finished", 1)
    tracker.tag(run_id, {"a": "b"})
    tracker.delete(run_id)
    tracker.restore(run_id)
    assert tracker.files(run_id) == []
    assert tracker.local_folder(run_id) is None
    tracker.register(run_id, registration(0))
    tracker.set_experiment_tags({"a": "b"})
    assert tracker.runs_page() == ""
    assert tracker.find({}) == tracker.history(run_id) == []
    assert not tracker.is_deleted(run_id)
    with pytest.raises(UserError, match="tracking=none"):
        tracker.get("nobody")
    with pytest.raises(UserError, match="tracking=none"):
        tracker.artifact(run_id, "config.yaml")
