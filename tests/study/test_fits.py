"""Confirmations and final fits, by scripted workers."""

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from leading import kind_of, lead, lead_until_killed, train_well
from samples import copy_digits
from scripted import Script, ScriptedWorkers, succeed
from studies import open_store, problems_of, rows_of, runs_of
from trackers import Gate

from digitlab.base.errors import UserError
from digitlab.base.stop import StopSignal
from digitlab.study.session import StudySession
from digitlab.workers.base import Failed, Job, Lost, Progress

PLAIN = ("tracking=none", "study.pruner=none")
DIVERGED = Failed("the loss is not finite", is_deterministic=True)


def is_final(job: Job) -> bool:
    return job.config.data.evaluate_on == "test"


def fail_where(condition: Callable[[Job], bool], event: Any = DIVERGED) -> Callable[[Job], Script]:
    def write(job: Job) -> Script:
        if condition(job):
            yield event
        else:
            yield from train_well(job)

    return write


def test_a_candidate_that_diverges_on_a_new_seed_drops_out(lab: Path) -> None:
    """Trial 0, the recipe's own values, has the widest network: the best as a trial."""

    def diverges(job: Job) -> bool:
        return kind_of(job) == "confirm" and job.config.model.hidden == 64

    status, jobs = lead(lab, fail_where(diverges), *PLAIN, "study.confirm=2")
    assert status == 0
    rows = sorted(rows_of(lab), key=lambda row: -(row.value or 0))
    assert rows[0].number == 0
    notes = open_store(lab).notes()
    assert notes["champion"]["trial"] == rows[1].number
    failed = {"failed": "the loss is not finite"}
    assert notes["confirm"]["0/1"] == failed
    assert [key for key, found in notes["confirm"].items() if found == failed] == ["0/1"]
    assert [kind_of(job) for job in jobs].count("confirm") == 2  # none is repeated


def scatter(job: Job) -> Script:
    """A job whose accuracy differs from seed to seed, and hardly between configurations."""
    step = {0: 0, 1: 3, 2: 1, 3: 4, 4: 2}.get(job.config.trainer.seed, 0)
    return succeed(0.90 + 0.01 * step + job.config.model.hidden / 10_000)


RACE = ("study.pruner=none", "study.confirm=2", "study.confirm_fits=8")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3], ids=["one worker", "three workers"])
def test_the_race_is_the_same_whoever_trains_and_wherever_it_was_killed(
    lab: Path, tmp_path: Path, count: int
) -> None:
    assert lead(lab, scatter, *RACE, count=count)[0] == 0
    whole = open_store(lab).notes()
    assert len(whole["confirm"]) == 8
    other = copy_digits(tmp_path / "other")
    for point in ("outbox.sealed", "outbox.appended"):
        lead_until_killed(other, scatter, *RACE, point=point, when="confirm")
    status, jobs = lead(other, scatter, *RACE)
    assert status == 0
    again = open_store(other).notes()
    assert again["confirm"].keys() == whole["confirm"].keys()
    assert {key: found["misread"] for key, found in again["confirm"].items()} == {
        key: found["misread"] for key, found in whole["confirm"].items()
    }
    kept = ("trial", "val_accuracy", "is_settled", "measured", "gain", "test_accuracy")
    assert {k: again["champion"][k] for k in kept} == {k: whole["champion"][k] for k in kept}
    assert len([job for job in jobs if kind_of(job) == "confirm"]) < 8  # some were taken over


LARGE = ("study.confirm=2", "study.confirm_fits=8", "study.measure_seeds=3", "study.final_seeds=3")
SMALL = ("study.confirm=1", "study.confirm_fits=2", "study.measure_seeds=0", "study.final_seeds=1")


def test_a_later_call_cannot_make_the_statement_weaker(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By fewer fits the champion could be another one, picked after the first was read."""
    published = []

    def publish(session: StudySession, summary: Mapping[str, Any]) -> dict[str, Any]:
        published.append((summary["trial"], session.config.study.final_seeds))
        return {}

    assert lead(lab, scatter, *PLAIN, *LARGE, publish=publish)[0] == 0
    before = open_store(lab).notes()
    assert len(before["confirm"]) == 8
    capsys.readouterr()
    status, jobs = lead(lab, scatter, *PLAIN, *SMALL, publish=publish)
    assert (status, jobs, len(published)) == (0, [], 1)
    assert open_store(lab).notes()["champion"] == before["champion"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"study smoke keeps {', '.join(LARGE)}, by which its champion was chosen" in said
    assert f"cannot lower that to {', '.join(SMALL)}; a new study can" in said
    # More trials are chosen among, measured and tested as thoroughly.
    more = (*PLAIN, *SMALL, "study.trials=4")
    assert lead(lab, scatter, *more, publish=publish)[0] == 0
    summary = open_store(lab).notes()["champion"]
    assert summary["asked"] == before["champion"]["asked"] | {"trials": 4}
    assert summary["confirm_fits"]["budget"] == 8
    assert (summary["measured"]["n"], summary["test_accuracy"]["n"]) == (3, 3)
    assert published[-1][1] == 3


def test_what_a_study_has_said_nothing_by_can_be_lowered(lab: Path) -> None:
    """A budget that was too large is no reason for a new study, as long as it has no champion."""
    stop = StopSignal()

    def stop_at_final(job: Job) -> Script:
        stop.count = is_final(job)
        yield Progress(0.0)
        yield from train_well(job)

    assert lead(lab, stop_at_final, *PLAIN, *LARGE, stop=stop)[0] == 130
    assert lead(lab, train_well, *PLAIN, *SMALL)[0] == 0
    assert open_store(lab).notes()["champion"]["test_accuracy"]["n"] == 1


def test_where_nothing_was_confirmed_fewer_candidates_can_be(lab: Path) -> None:
    none = ("study.confirm=8", "study.confirm_fits=0")
    assert lead(lab, scatter, *PLAIN, *none)[0] == 0
    assert lead(lab, scatter, *PLAIN, "study.confirm=2", "study.confirm_fits=3")[0] == 0
    assert open_store(lab).notes()["champion"]["asked"]["confirm"] == 2
    assert lead(lab, scatter, *PLAIN, *none)[0] == 0
    asked = open_store(lab).notes()["champion"]["asked"]
    assert (asked["confirm"], asked["confirm_fits"]) == (2, 3)


def test_every_look_at_the_test_set_is_kept_and_counted(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fits that were tested already are not tested again: that is no look."""
    one = (*PLAIN, "study.trials=1")
    assert lead(lab, train_well, *one)[0] == 0
    assert "look" not in capsys.readouterr().out
    assert lead(lab, train_well, *one, "study.margin=0.01")[0] == 0
    assert [look["fits"] for look in open_store(lab).notes()["tested"]] == [["0/1001"]]
    for seeds in (2, 4):
        assert lead(lab, train_well, *one, f"study.final_seeds={seeds}")[0] == 0
    looks = open_store(lab).notes()["tested"]
    assert [look["fits"] for look in looks] == [["0/1001"], ["0/1002"], ["0/1003", "0/1004"]]
    assert [look["n"] for look in looks] == [1, 1, 2]
    assert all(datetime.fromisoformat(look["when"]).tzinfo for look in looks)
    assert "this is look 3 of the study at the test set" in capsys.readouterr().out


def test_a_complete_study_starts_no_workers(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = (*PLAIN, "study.trials=1")
    assert lead(lab, train_well, *one)[0] == 0
    monkeypatch.setattr(ScriptedWorkers, "_start", lambda _: pytest.fail("they were started"))
    assert lead(lab, train_well, *one)[0] == 0


def test_all_final_fits_that_fail_end_the_study_with_the_reason_at_each_call(lab: Path) -> None:
    study = ("study.pruner=none", "study.trials=2", "study.final_seeds=2")
    with pytest.raises(UserError, match=r"all final fits .* have failed \(the loss is not finite"):
        lead(lab, fail_where(is_final), *study)
    began: list[Job] = []
    with pytest.raises(UserError, match=r"all final fits .* have failed \(the loss is not finite"):
        lead(lab, fail_where(lambda job: bool(began.append(job))), *study)
    assert began == []
    assert problems_of(lab) == []
    assert {run.tags["digitlab.state"] for run in runs_of(lab, kind="final")} == {"failed"}


def test_one_final_fit_that_fails_is_left_out_of_the_test_accuracy(lab: Path) -> None:
    study = (*PLAIN, "study.trials=1", "study.final_seeds=3")
    first = fail_where(lambda job: is_final(job) and job.config.trainer.seed == 1001)
    assert lead(lab, first, *study)[0] == 0
    champion = open_store(lab).notes()["champion"]
    assert champion["test_accuracy"]["n"] == 2
    assert champion["weights_of"] == "0/1002"


def test_a_fit_may_take_longer_than_a_trial_may(lab: Path) -> None:
    study = (*PLAIN, "study.trials=1")
    stop = StopSignal()

    def stop_at_final(job: Job) -> Script:
        stop.count = is_final(job)
        yield Progress(0.0)
        yield from train_well(job)

    assert lead(lab, stop_at_final, *study, stop=stop)[0] == 130

    def last(job: Job) -> Script:
        for _ in range(5):
            yield Progress(0.5)
        yield from train_well(job)

    status, jobs = lead(lab, last, *study, "study.trial_minutes=1e-9")
    assert (status, len(jobs)) == (0, 1)


@pytest.mark.parametrize("retries", [0, 2])
def test_a_fit_is_repeated_as_often_as_retries_say(lab: Path, retries: int) -> None:
    died = fail_where(is_final, Lost("its process died", is_charged=True))
    study = (*PLAIN, "study.trials=1", f"study.retries={retries}")
    with pytest.raises(UserError, match="its process died"):
        lead(lab, died, *study)
    assert open_store(lab).notes()["final"] == {"0/1001": {"failed": "its process died"}}


def test_a_fit_that_loses_its_node_is_run_again_without_a_charge(lab: Path) -> None:
    seen: list[Job] = []

    def lose(job: Job) -> bool:
        seen.extend([job] * is_final(job))
        return is_final(job) and len(seen) < 4

    study = (*PLAIN, "study.trials=1", "study.retries=0")
    assert lead(lab, fail_where(lose, Lost("its node was lost", False)), *study)[0] == 0
    assert len(seen) == 4


@pytest.mark.slow
def test_a_sealed_fit_of_a_killed_driver_is_taken_over(lab: Path) -> None:
    """Each final fit reads the test images once: it is not trained a second time."""
    study = ("study.trials=1", "study.pruner=none")
    lead_until_killed(lab, train_well, *study, point="outbox.sealed", when="final")
    known = open_store(lab).notes()
    assert "champion" not in known
    status, jobs = lead(lab, train_well, *study)
    assert (status, jobs) == (0, [])
    accuracy = rows_of(lab)[0].value
    assert open_store(lab).notes()["champion"]["test_accuracy"]["mean"] == accuracy
    assert len(runs_of(lab, kind="final")) == 1
    assert problems_of(lab) == []


@pytest.mark.slow
def test_a_tracker_that_is_away_between_two_phases_delays_nothing(lab: Path, gate: Gate) -> None:
    """What an earlier call recorded is asked for once, when the study is opened."""

    def write(job: Job) -> Script:
        if is_final(job):
            gate.open()
        elif job.config.trainer.seed == 0:
            gate.shut()
        yield from train_well(job)

    study = ("study.pruner=none", "study.trials=2", "study.confirm=2", f"tracking.uri={gate.uri}")
    assert lead(lab, write, *study)[0] == 0
    assert len(runs_of(lab, kind="confirm")) == 3
    assert problems_of(lab) == []


def test_a_champion_is_published_again_where_the_user_stopped_meanwhile(lab: Path) -> None:
    stop, published = StopSignal(), []

    def publish(session: StudySession, summary: Mapping[str, Any]) -> dict[str, Any]:
        published.append(summary["trial"])
        stop.count = len(published) == 1
        return {}

    study = (*PLAIN, "study.trials=1")
    assert lead(lab, train_well, *study, stop=stop, publish=publish)[0] == 130
    assert lead(lab, train_well, *study, publish=publish)[0] == 0
    assert lead(lab, train_well, *study, publish=publish)[0] == 0
    assert published == [0, 0]
