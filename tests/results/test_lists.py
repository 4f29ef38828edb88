"""Lists of runs and studies: what is in them, in which order and form."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import Call, CallIn
from samples import recorded, studies


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return studies(tmp_path_factory)


@pytest.fixture
def call(lab: Path, call_in: CallIn) -> Call:
    return call_in(lab)


def test_runs_are_listed_best_first_and_measured_ones_before_the_others(call: Call) -> None:
    status, out, err = call("runs", "--json")
    rows = json.loads(out)
    assert (status, err) == (0, "")
    for name in ("test_accuracy", "val_accuracy", "rung_accuracy"):  # of those without an earlier
        found = [row[name] for row in rows if row[name] is not None]
        assert found == sorted(found, reverse=True)
        rows = [row for row in rows if row[name] is None]
    rows = json.loads(out)
    ranks = [
        0 if row["test_accuracy"] is not None else 1 if row["val_accuracy"] is not None else 2
        for row in rows
    ]
    assert ranks == sorted(ranks)
    assert ranks[-1] == 2


def test_runs_can_be_chosen_by_study_kind_and_state(call: Call, lab: Path) -> None:
    def ids(*words: str) -> set[str]:
        return {row["run_id"] for row in json.loads(call("runs", "--json", *words)[1])}

    smoke = recorded(lab, "smoke")
    trained = {row.run_id for row in smoke.runs() if row.tags["digitlab.kind"] != "study"}
    assert ids("--study", "smoke") == trained
    assert ids("--kind", "study", "--study", "smoke") == {smoke.store.notes()["run_id"]}
    assert ids("--kind", "final") == {row.run_id for row in smoke.runs(kind="final")}
    pruned = {row.run_id for row in smoke.runs(state="pruned")}
    assert pruned
    assert ids("--state", "pruned") == pruned
    assert ids("--study", "smoke", "--kind", "trial", "--state", "failed") == set()


def test_table_of_runs_fits_80_columns_and_says_how_many_it_leaves_out(call: Call) -> None:
    _, out, _ = call("runs", "--most=3")
    assert max(map(len, out.splitlines())) <= 80
    whole = len(json.loads(call("runs", "--json")[1]))
    assert f"3 of {whole} runs; all: digitlab runs --most=0" in out
    assert call("runs", "--study", "smoke", "--kind", "train")[1] == "there are none\n"
    refused = "digitlab: study smokk does not exist: did you mean smoke?\n"
    assert call("runs", "--study", "smokk") == (2, "", refused)
    assert "study '' does not exist" in call("runs", "--study", "")[2]


def test_runs_of_a_deleted_study_are_refused_with_how_it_comes_back(
    lab: Path, call_in: CallIn, tmp_path: Path
) -> None:
    call = call_in(shutil.copytree(lab, tmp_path / "lab"))
    assert call("delete", "smoke", "--yes")[0] == 0
    status, _, err = call("runs", "--study", "smoke")
    assert (status, "digitlab restore smoke" in err) == (2, True)


def test_the_command_that_lists_all_keeps_what_was_asked_for(call: Call) -> None:
    _, out, _ = call("runs", "--study=smoke", "--state=finished", "--most=1")
    [command] = re.findall(r"all: digitlab (.+)", out)
    assert command == "runs --most=0 --study=smoke --state=finished"


def test_table_keeps_its_numbers_where_the_terminal_is_too_narrow(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    [champion] = json.loads(call("runs", "--json", "--kind", "champion")[1])
    assert f"{champion['test_accuracy']:.2%}" in call("runs")[1]
    assert "smoke" in call("studies")[1]


def test_names_that_are_too_long_stay_different(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "76")
    names = [row["name"] for row in json.loads(call("runs", "--json", "--kind=final")[1])]
    table = call("runs", "--kind=final")[1]
    shown = re.findall(r"^│ (\S+)", table, re.MULTILINE)
    assert all("…" in name for name in shown)
    assert len(set(shown)) == len(names) > 1
    for name in shown:
        start, end = name.split("…")
        assert any(one.startswith(start) and one.endswith(end) for one in names)


def test_the_help_says_how_runs_are_sorted(call: Call) -> None:
    text = " ".join(call("runs", "--help")[1].split())
    assert "Those measured on test images come first, then by validation accuracy" in text


def test_an_earlier_champion_is_listed_where_champions_are_asked_for(
    lab: Path, call_in: CallIn, tmp_path: Path
) -> None:
    mine = shutil.copytree(lab, tmp_path / "lab")
    [champion] = recorded(mine, "smoke").runs(kind="champion")
    recorded(mine, "smoke").tracker.tag(champion.run_id, {"digitlab.superseded_by": "a later one"})
    call = call_in(mine)
    assert "champion" not in {row["kind"] for row in json.loads(call("runs", "--json")[1])}
    [row] = json.loads(call("runs", "--json", "--kind=champion")[1])
    assert (row["run_id"], row["superseded_by"]) == (champion.run_id, "a later one")


def test_csv_has_a_row_a_run_with_its_settings(call: Call) -> None:
    rows = list(csv.DictReader(io.StringIO(call("runs", "--study", "smoke", "--csv")[1])))
    listed = json.loads(call("runs", "--study", "smoke", "--json")[1])
    assert [row["run_id"] for row in rows] == [row["run_id"] for row in listed]
    assert rows[0]["model.hidden"] == listed[0]["params"]["model.hidden"]


def test_studies_are_listed_with_what_came_of_them(call: Call, lab: Path) -> None:
    _, out, _ = call("studies", "--json")
    smoke, stopped = json.loads(out)
    assert (smoke["study"], stopped["study"]) == ("smoke", "stopped")
    rows = recorded(lab, "smoke").store.rows()
    assert smoke["trials"] == len(rows) == 6
    assert smoke["finished"] + smoke["pruned"] == 6
    assert smoke["val_accuracy"] == max(r.value or 0 for r in rows if r.state == "finished")
    champion = recorded(lab, "smoke").store.notes()["champion"]
    assert smoke["test_accuracy"] == champion["test_accuracy"]["mean"]
    assert (stopped["test_accuracy"], stopped["val_accuracy"]) == (None, 0.5)
    table = call("studies")[1]
    assert f"{champion['test_accuracy']['mean']:.2%}" in table
    assert len(list(csv.DictReader(io.StringIO(call("studies", "--csv")[1])))) == 2


def test_two_forms_at_once_are_refused(call: Call) -> None:
    assert call("runs", "--json", "--csv")[0] == 2


def test_a_pruned_trial_is_marked_by_name_tag_and_description(lab: Path) -> None:
    for row in recorded(lab, "smoke").runs(kind="trial"):
        pruned = row.tags["digitlab.state"] == "pruned"
        number = row.tags["digitlab.trial"]
        assert row.name == f"smoke-{number}" + " (pruned)" * pruned
        assert ("stopped early on purpose" in row.tags.get("mlflow.note.content", "")) == pruned
