"""What a study publishes of its champion, and what becomes of an earlier one."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY
from samples import WHOLE, copy_digits, studies

from digitlab.base.console import Board
from digitlab.base.errors import UserError
from digitlab.base.stop import StopSignal
from digitlab.config.compose import compose
from digitlab.data.datasets import TEST, load_digits
from digitlab.data.images import as_tensors
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.reader import damage, find_run, load_network, recorded_config, trained
from digitlab.records.tracker import RunRow
from digitlab.results.publish import publish, register_champion
from digitlab.study.session import StudySession, open_session
from digitlab.training.evaluate import evaluate

STUDY = {"digitlab.study": "smoke", "digitlab.kind": "study"}
CHAMPION = {"digitlab.study": "smoke", "digitlab.kind": "champion"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a lab with a study that has published its champion, which is published again."""
    lab = tmp_path_factory.mktemp("published") / "lab"
    return shutil.copytree(studies(tmp_path_factory), lab)


@pytest.fixture(scope="module")
def session(lab: Path) -> Iterator[StudySession]:
    with (
        Board() as board,
        open_session(compose("sweep", WHOLE)[0], lab, board, StopSignal()) as session,
    ):
        yield session


@pytest.fixture(scope="module")
def champions(session: StudySession) -> list[RunRow]:
    """The champion's runs after it was published again, the earlier first."""
    assert len(session.records.tracker.find(CHAMPION)) == 1
    noted = publish(session, session.store.notes()["champion"])
    session.flush_records()
    found = session.records.tracker.find(CHAMPION)
    assert noted["run_id"] == found[-1].run_id
    return found


@pytest.mark.slow
def test_earlier_champion_stays_whole_and_is_marked_as_superseded(
    session: StudySession, champions: list[RunRow]
) -> None:
    tracker = session.records.tracker
    earlier, now = champions
    assert earlier.tags["digitlab.superseded_by"] == now.run_id
    assert "digitlab.superseded_by" not in now.tags
    assert now.tags["digitlab.champion_of"] == "6 trials"
    for champion in champions:
        assert damage(tracker, champion) == []
    # `reproduce RUN=<id>`, which was printed for it, still finds what to train.
    assert trained(tracker, earlier.run_id).run_id == earlier.tags["digitlab.weights_run"]
    assert find_run(tracker, "champion").run_id == now.tags["digitlab.weights_run"]


def test_alias_moves_to_the_new_champion(session: StudySession, champions: list[RunRow]) -> None:
    tracker = session.records.tracker
    assert isinstance(tracker, MlflowTracker)
    client = tracker.client
    assert client.get_model_version_by_alias("smoke", "champion").run_id == champions[1].run_id
    versions = client.search_model_versions("name = 'smoke'")
    assert {version.run_id for version in versions} == {run.run_id for run in champions}


def test_champion_is_a_logged_model_with_its_metrics_and_what_they_were_measured_on(
    session: StudySession, champions: list[RunRow]
) -> None:
    tracker, champion = session.records.tracker, champions[1]
    assert isinstance(tracker, MlflowTracker)
    models = tracker.client.search_logged_models([tracker.experiment])
    assert sorted(model.source_run_id for model in models) == sorted(r.run_id for r in champions)
    [model] = [model for model in models if model.source_run_id == champion.run_id]
    assert {metric.key: metric.value for metric in model.metrics} == champion.metrics
    final = tracker.client.get_run(champion.tags["digitlab.weights_run"]).inputs.dataset_inputs
    [tested] = [used.dataset for used in final if used.tags[0].value == "test"]
    assert {(m.dataset_name, m.dataset_digest) for m in model.metrics} == {
        (tested.name, tested.digest)
    }
    [used] = tracker.client.get_run(champion.run_id).inputs.dataset_inputs
    assert used.dataset.digest == tested.digest


def test_champion_has_the_weights_of_the_first_final_fit_and_the_figures_of_all(
    session: StudySession, champions: list[RunRow]
) -> None:
    tracker, champion = session.records.tracker, champions[1]
    final = tracker.get(champion.tags["digitlab.weights_run"])
    assert final.tags["digitlab.kind"] == "final"
    assert final.tags["digitlab.weights_sha256"] == champion.tags["digitlab.weights_sha256"]
    summary = session.store.notes()["champion"]
    assert champion.metrics["test_accuracy_mean"] == summary["test_accuracy"]["mean"]
    assert champion.metrics["test_seeds"] == 2
    kept = json.loads(tracker.artifact(champion.run_id, "summary.json"))
    assert kept["trial"] == summary["trial"]


def test_the_vote_of_the_final_fits_is_that_of_their_networks_mean_probability(
    session: StudySession, champions: list[RunRow]
) -> None:
    tracker = session.records.tracker
    runs = tracker.find({**STUDY, "digitlab.kind": "final"})
    assert len(runs) == 2
    images, labels = as_tensors(load_digits(session.lab, "sample", TEST))
    shares = torch.zeros(len(labels), 10)
    for run in runs:
        config = recorded_config(tracker, run)
        logits = evaluate(load_network(tracker, run, config), images, config.data)
        shares += logits.softmax(1)
    right = (shares.argmax(1) == labels).double().mean().item()
    kept = json.loads(tracker.artifact(champions[1].run_id, "summary.json"))
    assert kept["vote"] == {"fits": 2, "test_accuracy": pytest.approx(right)}
    [study] = tracker.find(STUDY)
    text = f"the 2 fits voting together (mean probability): {right:.2%}".replace("%", " %")
    assert text in study.tags["mlflow.note.content"]
    assert text in tracker.artifact(study.run_id, "report.html").decode()


def test_a_final_fit_whose_run_was_deleted_is_named(
    session: StudySession, champions: list[RunRow]
) -> None:
    tracker = session.records.tracker
    runs = [run.run_id for run in tracker.find({**STUDY, "digitlab.kind": "final"})]
    for run_id in runs:
        tracker.delete(run_id)
    try:
        with pytest.raises(UserError, match=r"final fit of trial \d+ with seed \d+ was") as raised:
            register_champion(session, session.store.notes()["champion"])
        restore = f"{tracker.command} runs restore --run-id"
        assert any(f"`{restore} {run_id}`" in str(raised.value) for run_id in runs)
    finally:
        for run_id in runs:
            tracker.restore(run_id)


def test_studys_own_run_names_the_new_champion_in_text_figures_and_report(
    session: StudySession, champions: list[RunRow]
) -> None:
    [study] = session.records.tracker.find(STUDY)
    command = f"digitlab reproduce {champions[1].run_id[:12]}"
    assert command in study.tags["mlflow.note.content"]
    page = session.records.tracker.artifact(study.run_id, "report.html").decode()
    assert command in page
    assert study.metrics["test_accuracy_mean"] == champions[1].metrics["test_accuracy_mean"]


def test_nothing_is_published_without_a_tracker(tmp_path: Path) -> None:
    lab = copy_digits(tmp_path / "lab")
    composed = compose("sweep", [*TINY, "tracking=none"])[0]
    with Board() as board, open_session(composed, lab, board, StopSignal()) as session:
        assert publish(session, {"trial": 0}) == {}
    assert not (lab / "mlflow.db").exists()
    assert not (lab / "reports").exists()
