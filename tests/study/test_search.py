"""Which trials run, how often, and when a search ends; by scripted workers."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from leading import kind_of, lead, lead_until_killed, train_well
from scripted import Script, succeed
from studies import open_store, problems_of, results_of, rows_of, runs_of

from digitlab.base.errors import UserError
from digitlab.base.stop import StopSignal
from digitlab.networks.settings import ArticleConfig
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.sessions import Sessions
from digitlab.results.audit import audit_studies
from digitlab.study import progress
from digitlab.study.storage import open_storage
from digitlab.study.trials import TrialStore, load_study
from digitlab.workers.base import Failed, Job, Lost, Progress, Rung, Started, Stopped

PLAIN = ("tracking=none", "study.pruner=none")
DIVERGED = Failed("the loss is not finite", is_deterministic=True)


def is_final(job: Job) -> bool:
    return job.config.data.evaluate_on == "test"


def stop_at_trial(number: int) -> tuple[StopSignal, Callable[[Job], Script]]:
    """A stop signal, and jobs of which one sends it."""
    stop, started = StopSignal(), []

    def write(job: Job) -> Script:
        started.append(job)
        if len(started) - 1 != number:
            yield from train_well(job)
            return
        stop.count = 1
        while True:
            yield Progress(0.5)

    return stop, write


def test_the_study_ends_when_its_minutes_are_spent_while_a_trial_waits(lab: Path) -> None:
    stop, write = stop_at_trial(1)
    assert lead(lab, write, *PLAIN, stop=stop)[0] == 130
    assert [row.state for row in rows_of(lab)] == ["finished", "waiting"]
    open_store(lab).note("seconds", 61.0)
    status, jobs = lead(lab, train_well, *PLAIN, "study.minutes=1")
    assert status == 0
    assert [row.state for row in rows_of(lab)] == ["finished", "waiting"]
    assert [is_final(job) for job in jobs] == [True]


def test_the_study_ends_when_its_patience_is_spent_while_a_trial_waits(lab: Path) -> None:
    stop, ended = StopSignal(), []

    def write(job: Job) -> Script:
        ended.append(job)
        if len(ended) == 2:
            while True:
                yield Progress(0.5)
        elif len(ended) == 4:
            stop.count = 1
            yield Progress(0.5)
            yield Stopped()
        yield from succeed(1 / len(ended))

    many = (*PLAIN, "study.trials=9")
    assert lead(lab, write, *many, count=2, stop=stop)[0] == 130
    assert [row.state for row in rows_of(lab)] == ["finished", "waiting", "finished", "waiting"]
    status, jobs = lead(lab, train_well, *many, "study.patience=1")
    assert status == 0
    assert len(rows_of(lab)) == 4
    assert [is_final(job) for job in jobs] == [True]


def test_minutes_count_calls_that_were_killed(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_NOTE_INTERVAL_S", 0.0)

    def die(_: Job) -> Script:
        for _ in range(3):
            yield Progress(0.5)
        os._exit(9)

    lead_until_killed(lab, die, *PLAIN, point="")
    noted = open_store(lab).notes()["seconds"]
    assert noted > 0
    assert lead(lab, train_well, *PLAIN, f"study.minutes={noted / 60}")[0] == 1  # none has finished
    assert [row.state for row in rows_of(lab)] == ["waiting"]


def test_fewer_trials_than_there_are_end_none_and_that_is_said(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is planned, printed and recorded from then on is the number that there is."""
    assert lead(lab, train_well, *PLAIN)[0] == 0
    assert "already" not in capsys.readouterr().out
    status, jobs = lead(lab, train_well, *PLAIN, "study.trials=2", "study.margin=0.01")
    assert (status, jobs) == (0, [])
    said = " ".join(capsys.readouterr().out.split())
    assert "study smoke has 3 trials already: study.trials=2 removes none of them" in said
    assert "study.trials=4" in said  # by which it is extended
    assert load_study(lab, "smoke")[1].study.trials == 3


def test_trials_that_failed_and_do_not_count_are_not_too_many(lab: Path) -> None:
    """A total that they were not part of is still to be reached."""
    began: list[Job] = []

    def write(job: Job) -> Script:
        began.append(job)
        yield from [DIVERGED] if len(began) == 2 else train_well(job)

    uncounted = (*PLAIN, "study.count_failed=false")
    assert lead(lab, write, *uncounted)[0] == 0
    assert len(rows_of(lab)) == 4
    assert lead(lab, train_well, *uncounted)[0] == 0
    assert load_study(lab, "smoke")[1].study.trials == 3


def test_failures_that_do_not_count_end_the_study_with_their_reason(lab: Path) -> None:
    """Values that contradict each other fail without a worker, and would without end."""
    no_pixel = ("model.strides=choice([14])", "model.pools=choice([14])")  # each is valid alone
    study = (*no_pixel, "study.count_failed=false", "study.trials=2")
    reason = r"2 trials failed, the last: model.pools=\[14\] with model.strides=\[14\]"
    for _ in range(2):
        with pytest.raises(UserError, match=reason):
            lead(lab, train_well, *study)
        assert [row.state for row in rows_of(lab)] == ["failed", "failed"]
    assert problems_of(lab) == []


@pytest.mark.slow
def test_contradicting_values_count_where_failures_do(lab: Path) -> None:
    some = ("model.strides=choice([1],[14])", "model.pools=choice([2],[14])")
    some += ("model.hidden=choice(16)", "optim.learning_rate=choice(0.01)", "study.sampler=grid")
    status, jobs = lead(lab, train_well, *some, "study.trials=4", "study.pruner=none")
    assert status == 0
    rows = rows_of(lab)
    assert sorted(row.state for row in rows) == ["failed", *["finished"] * 3]
    for row in rows:
        contradicts = row.values["model.strides"] == row.values["model.pools"] == [14]
        assert contradicts == (row.state == "failed")
    assert len([job for job in jobs if not is_final(job)]) == 3
    assert problems_of(lab) == []


@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 1, 2])
@pytest.mark.parametrize(
    "event", [Failed("it raised", False), Lost("its process died", True)], ids=["raised", "died"]
)
def test_a_trial_is_repeated_as_often_as_retries_say(lab: Path, retries: int, event) -> None:
    def fail(_: Job) -> Script:
        yield Started({})
        yield event

    study = ("study.trials=1", f"study.retries={retries}", "study.pruner=none")
    status, jobs = lead(lab, fail, *study)
    assert status == 1
    assert len(jobs) == retries + 1
    [row] = rows_of(lab)
    assert (row.state, row.attempt) == ("failed", retries + 1)
    assert row.notes["reason"] in ("it raised", "its process died")
    assert problems_of(lab) == []
    attempts = [run.tags["digitlab.attempt"] for run in runs_of(lab, kind="trial")]
    assert attempts == [str(n) for n in range(1, retries + 2)]


def test_a_diverged_trial_is_not_repeated(lab: Path) -> None:
    def diverge(_: Job) -> Script:
        yield Failed("the loss is nan", is_deterministic=True)

    status, jobs = lead(lab, diverge, *PLAIN, "study.trials=2", "study.retries=2")
    assert (status, len(jobs)) == (1, 2)


def test_lost_nodes_are_never_charged(lab: Path) -> None:
    lost = []

    def write(job: Job) -> Script:
        lost.append(job)
        if len(lost) < 6:
            yield Lost("its node was lost", is_charged=False)
        else:
            yield from train_well(job)

    status, _ = lead(lab, write, *PLAIN, "study.trials=1", "study.retries=0")
    assert status == 0
    [row] = rows_of(lab)
    assert (row.state, row.attempt, row.notes["charged"]) == ("finished", 6, 0)


@pytest.mark.parametrize("point", ["trial.before_tell", "outbox.sealed"])
def test_a_sealed_trial_of_a_killed_driver_is_taken_over(lab: Path, point: str) -> None:
    study = ("study.trials=1", "study.pruner=none")
    lead_until_killed(lab, train_well, *study, point=point)
    assert [row.state for row in rows_of(lab)] == ["running"]
    status, jobs = lead(lab, train_well, *study)
    assert status == 0
    assert [is_final(job) for job in jobs] == [True]
    [row] = rows_of(lab)
    assert (row.state, row.value, row.attempt) == ("finished", row.values["model.hidden"] / 100, 1)
    assert problems_of(lab) == []


@pytest.mark.slow
def test_a_sealed_trial_that_another_process_is_to_send_is_waited_for(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Any command in the lab takes over the records of a killed driver."""
    study = ("study.trials=1", "study.pruner=none")
    lead_until_killed(lab, train_well, *study, point="outbox.sealed")
    other = Sessions(lab / "outbox", MlflowTracker(None, "digitlab", lab).identity)
    assert len(other.take_over()) == 1
    assert audit_studies(["smoke"], lab, is_repair=True, as_json=False) == 1
    assert "another process of this lab is still to send" in capfd.readouterr().out
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: other.close())
    monkeypatch.setattr("digitlab.study.session.time", clock)
    status, jobs = lead(lab, train_well, *study)
    assert (status, [is_final(job) for job in jobs]) == (0, [True])
    assert rows_of(lab)[0].attempt == 1
    assert problems_of(lab) == []


def test_a_stop_at_the_start_leaves_a_sealed_trial_to_the_next_call(lab: Path) -> None:
    """Its record may still be on its way to the tracker, where it would be missed."""
    study = ("study.trials=1", "study.pruner=none")
    lead_until_killed(lab, train_well, *study, point="trial.before_tell")
    stop = StopSignal()
    stop.count = 1
    assert lead(lab, train_well, *study, stop=stop) == (130, [])
    assert [row.state for row in rows_of(lab)] == ["running"]
    status, jobs = lead(lab, train_well, *study)
    assert (status, [is_final(job) for job in jobs]) == (0, [True])
    assert rows_of(lab)[0].attempt == 1
    assert problems_of(lab) == []


def test_a_complete_study_waits_for_no_worker(lab: Path) -> None:
    assert lead(lab, train_well, *PLAIN)[0] == 0
    assert lead(lab, train_well, *PLAIN, count=0) == (0, [])


def test_a_trial_that_finishes_in_the_end_has_no_reason(lab: Path) -> None:
    lead_until_killed(lab, train_well, *PLAIN, point="trial.before_tell")
    assert lead(lab, train_well, *PLAIN)[0] == 0
    assert [row.state for row in rows_of(lab)] == ["finished"] * 3
    assert all("reason" not in row.notes for row in rows_of(lab))


@pytest.mark.slow
def test_a_pruned_trial_of_a_killed_driver_stays_pruned(lab: Path) -> None:
    def get_worse(job: Job) -> Script:
        yield Rung(0, 0.5 / (1 + len(rows_of(lab))))
        yield Stopped()

    def write(job: Job) -> Script:
        return train_well(job) if len(rows_of(lab)) == 1 else get_worse(job)

    study = ("study.trials=2", "study.rungs=[0.3]", "study.sampler=random")
    assert lead(lab, train_well, *study, "study.trials=1")[0] == 0
    lead_until_killed(lab, write, *study, point="trial.before_tell")
    assert [row.state for row in rows_of(lab)] == ["finished", "running"]
    assert lead(lab, train_well, *study)[0] == 0
    assert [row.state for row in rows_of(lab)] == ["finished", "pruned"]
    assert rows_of(lab)[1].value == pytest.approx(0.5 / 3)
    assert problems_of(lab) == []


@pytest.mark.slow
def test_a_trial_without_a_seal_is_run_again_with_its_values(lab: Path) -> None:
    study = ("study.trials=1", "study.pruner=none", "study.retries=0")
    lead_until_killed(lab, train_well, *study, point="outbox.appended")
    before = rows_of(lab)[0].values
    assert lead(lab, train_well, *study)[0] == 0
    [row] = rows_of(lab)
    assert (row.state, row.values, row.attempt) == ("finished", before, 2)
    assert row.notes["charged"] == 0
    states = [run.tags["digitlab.state"] for run in runs_of(lab, kind="trial")]
    assert sorted(states) == ["finished", "interrupted"]
    assert problems_of(lab) == []


def test_trials_of_other_code_or_versions_say_who_made_them(lab: Path) -> None:
    plain = ("study.pruner=none", "study.trials=2")
    assert lead(lab, train_well, *plain)[0] == 0
    store = open_store(lab)
    then = store.notes()["fingerprint"]
    store.note("fingerprint", then | {"version of torch": "2.0", "code of training": "elsewhere"})
    fork = (*plain, "study.name=fork", "study.fork_from=smoke")
    status, jobs = lead(lab, train_well, *fork)
    assert status == 0
    assert [is_final(job) for job in jobs] == [True]
    made_by = ["code of training: elsewhere", "version of torch: 2.0"]
    assert [row.notes["made_by"] for row in rows_of(lab, "fork")] == [made_by, made_by]
    assert [row[2:] for row in results_of(lab, "fork")] == [row[2:] for row in results_of(lab)]
    tags = {run.tags["digitlab.made_by"] for run in runs_of(lab, "fork", kind="trial")}
    assert tags == {"; ".join(made_by)}
    assert problems_of(lab, "fork") == []


def test_no_more_trials_are_taken_over_than_the_study_asks_for(lab: Path) -> None:
    assert lead(lab, train_well, *PLAIN)[0] == 0
    fork = (*PLAIN, "study.name=fork", "study.fork_from=smoke", "study.trials=2")
    assert lead(lab, train_well, *fork)[0] == 0
    assert [row.state for row in rows_of(lab, "fork")] == ["finished"] * 2


def test_what_is_taken_over_into_a_study_with_trials_ends_at_its_total(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lead(lab, train_well, *PLAIN)[0] == 0
    own = (*PLAIN, "study.name=own", "study.seed=1", "study.begin_with=[{model.hidden: 20}]")
    assert lead(lab, train_well, *own, "study.trials=2")[0] == 0
    fork = (*own, "study.fork_from=smoke", "study.trials=3")
    capsys.readouterr()
    assert lead(lab, train_well, *fork)[0] == 0
    assert ["taken_from" in row.notes for row in rows_of(lab, "own")] == [False, False, True]
    said = " ".join(capsys.readouterr().out.split())
    assert "1 trial taken over from study smoke; 2 more fit, for which study.trials=3 has" in said


def test_a_full_study_takes_nothing_over_until_it_has_room(lab: Path) -> None:
    assert lead(lab, train_well, *PLAIN)[0] == 0
    own = (*PLAIN, "study.name=own", "study.trials=2")
    assert lead(lab, train_well, *own)[0] == 0
    for total, taken in ((2, 0), (3, 1)):
        fork = (*own, "study.fork_from=smoke", f"study.trials={total}")
        assert lead(lab, train_well, *fork)[0] == 0
        rows = rows_of(lab, "own")
        assert (len(rows), sum("taken_from" in row.notes for row in rows)) == (total, taken)


def test_trials_are_taken_over_from_one_study_alone(lab: Path) -> None:
    assert lead(lab, train_well, *PLAIN)[0] == 0
    fork = (*PLAIN, "study.name=fork")
    for _ in range(2):
        assert lead(lab, train_well, *fork, "study.fork_from=smoke")[0] == 0
    with pytest.raises(UserError, match="study fork has taken over trials of smoke"):
        lead(lab, train_well, *fork, "study.fork_from=another")


def test_a_trial_is_taken_over_once_by_a_call_that_was_killed_and_the_next(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ("study.pruner=none", "study.trials=2")
    assert lead(lab, train_well, *plain)[0] == 0
    fork = (*plain, "study.name=fork", "study.fork_from=smoke")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(TrialStore, "add", die)  # after the run was recorded
        with pytest.raises(KeyboardInterrupt):
            lead(lab, train_well, *fork)
    assert lead(lab, train_well, *fork)[0] == 0
    assert len(runs_of(lab, "fork", kind="trial")) == 2
    assert problems_of(lab, "fork") == []


def test_given_trials_keep_their_numbers_and_are_not_trained(lab: Path) -> None:
    """As a replay gives those that its original took over."""
    assert lead(lab, train_well, *PLAIN)[0] == 0
    rows = rows_of(lab)
    again = (*PLAIN, "study.name=again")
    for given in ([rows[0], rows[2]], [rows[1]]):
        status, jobs = lead(lab, train_well, *again, given=given)
        assert (status, results_of(lab, "again")) == (0, results_of(lab))
        assert sum(kind_of(job) == "trial" for job in jobs) == len(rows) - len(given)
        optuna.delete_study(study_name="again", storage=open_storage(lab))


OPTIONS = ("model=choice(seed,convnet)", "optim=choice(adamw,sgd)", "study.sampler=random")
OPTIONS += ("study.pruner=none", "study.measure_seeds=0", "study.trials=8")


def train_any(job: Job) -> Script:
    """A job of any network that finishes; the article's is the best."""
    return succeed(0.9 if job.config.model.name == "seed" else job.config.model.hidden / 100)


@pytest.mark.slow
def test_a_study_over_options_is_killed_goes_on_and_agrees_with_its_runs(lab: Path) -> None:
    lead_until_killed(lab, train_any, *OPTIONS, "study.trials=2", point="trial.before_tell")
    status, jobs = lead(lab, train_any, *OPTIONS)
    assert status == 0
    rows = rows_of(lab)
    own = {"model": "convnet", "optim": "adamw", "model.hidden": 64, "optim.learning_rate": 0.01}
    assert rows[0].values == own
    assert {row.values["model"] for row in rows} == {"seed", "convnet"}
    assert all(("model.hidden" in row.values) == (row.values["model"] == "convnet") for row in rows)
    assert problems_of(lab) == []
    final = jobs[-1].config
    assert is_final(jobs[-1])
    assert final.model == ArticleConfig(name="seed")  # the champion's network alone is fitted
    params = {run.tags["digitlab.trial"]: run.params for run in runs_of(lab, kind="trial")}
    for row in rows:
        assert params[str(row.number)]["model.name"] == row.values["model"]
        assert params[str(row.number)]["optim.name"] == row.values["optim"]
    assert lead(lab, train_any, *OPTIONS) == (0, [])  # all is in the record


@pytest.mark.slow
def test_trials_of_an_option_are_taken_over_where_it_is_searched_or_fixed(lab: Path) -> None:
    assert lead(lab, train_any, *OPTIONS)[0] == 0
    chosen = {row.number for row in rows_of(lab) if row.values["model"] == "convnet"}
    adam = {row.number for row in rows_of(lab) if row.values["optim"] == "adamw"}
    fork = ("study.fork_from=smoke", *OPTIONS[2:], "study.name=fixed")
    assert lead(lab, train_any, *fork)[0] == 0  # the recipe's own convnet, by adamw
    taken = [row for row in rows_of(lab, "fixed") if "taken_from" in row.notes]
    assert {int(row.notes["taken_from"].partition("/")[2]) for row in taken} == chosen & adam
    assert all(list(row.values) == ["model.hidden", "optim.learning_rate"] for row in taken)
    back = ("study.fork_from=fixed", *OPTIONS, "study.name=back")
    assert lead(lab, train_any, *back)[0] == 0
    assert all(row.values["model"] == "convnet" for row in rows_of(lab, "back"))
    for name in ("fixed", "back"):
        assert problems_of(lab, name) == []


def test_trial_0_is_the_recipe_s_own_values_and_known_good_points_follow(lab: Path) -> None:
    points = "study.begin_with=[{model.hidden:20},{model.hidden:50,optim.learning_rate:0.02}]"
    study = (*PLAIN, points, "study.trials=4")
    stop, write = stop_at_trial(1)
    assert lead(lab, write, *study, stop=stop)[0] == 130
    assert lead(lab, train_well, *study)[0] == 0
    own = {"model.hidden": 64, "optim.learning_rate": 0.01}
    given = {"model.hidden": 50, "optim.learning_rate": 0.02}
    assert [row.values for row in rows_of(lab)[:3]] == [own, own | {"model.hidden": 20}, given]
    drawn = rows_of(lab)[3].values
    assert drawn not in (own, given)


def test_points_outside_of_the_space_are_refused_and_own_values_are_then_left_out(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for point in ("{model.hidden:5}", "{optim.momentum:0.5}"):
        with pytest.raises(UserError, match=r"study.begin_with: .* is invalid: it must be a hyper"):
            lead(lab, train_well, *PLAIN, f"study.begin_with=[{point}]")
    narrow = (*PLAIN, "model.hidden=int(interval(16,32))", "study.trials=1")
    assert lead(lab, train_well, *narrow)[0] == 0
    assert rows_of(lab)[0].values["model.hidden"] <= 32
    assert "the recipe's own values are not in the space" in capsys.readouterr().out


def test_the_recipe_s_own_values_are_never_pruned(lab: Path) -> None:
    """Trials are trained side by side; the first is the slowest, and the worst."""
    started: list[Job] = []

    def write(job: Job) -> Script:
        started.append(job)
        accuracy = len(started) / 10
        for _ in range(10 if len(started) == 1 else 5 - len(started)):  # the best first
            yield Progress(0.1)
        yield from succeed(accuracy, tuple(accuracy for _ in job.rungs))

    assert lead(lab, write, "tracking=none", "study.trials=4", count=4)[0] == 0
    assert [row.state for row in rows_of(lab)] == ["finished", "pruned", "pruned", "finished"]


def test_a_trial_that_is_pruned_is_printed_with_the_best_that_had_come_so_far(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracies = iter((0.5, 0.6, 0.55))

    def write(job: Job) -> Script:
        accuracy = next(accuracies, 0.6)
        yield from succeed(accuracy, tuple(accuracy for _ in job.rungs))

    halving = ("study.pruner=halving", "study.rungs=[0.3]", "study.trials=3")
    assert lead(lab, write, "tracking=none", *halving)[0] == 0
    assert [row.state for row in rows_of(lab)] == ["finished", "finished", "pruned"]
    printed = capsys.readouterr().out
    assert "trial 1 finished 60.00%\n" in printed
    assert "trial 2 pruned: 55.00% at 0.3 of its steps (best so far there: 60.00%)\n" in printed


SCREENING = (
    "study.pruner=screening",
    "study.rungs=[0.1]",
    "study.sampler=random",
    "study.trials=7",
    "study.finish=2",
)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_first_trials_are_screened_and_the_best_trained_to_the_end(
    lab: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    assert lead(lab, train_well, "tracking=none", *SCREENING, count=count)[0] == 0
    rows = rows_of(lab)
    assert [row.state for row in rows] == ["finished", *["pruned"] * 4, *["finished"] * 2]
    for row in rows[5:]:
        assert row.values == rows[row.notes["promoted_from"]].values
    screened = sorted(row.values["model.hidden"] for row in rows[1:5])
    assert [row.values["model.hidden"] for row in rows[5:]] == screened[:-3:-1]
    printed = " ".join(capsys.readouterr().out.split())
    assert "the first 5 end at 0.1 of their schedule, but for the recipe's own values" in printed
    assert "then the best 2 of them are trained again to the end" in printed
    assert "the best 2 of 4 pruned trials were trained to the end" in printed
    assert " at 0.1 of its steps trial" in printed  # they are compared with no other one
    assert "best so far there" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("number", range(7))
def test_screening_that_is_stopped_and_killed_ends_as_without(lab: Path, number: int) -> None:
    beside = (*SCREENING, "study.name=beside")
    assert lead(lab, train_well, "tracking=none", *beside)[0] == 0
    stop, write = stop_at_trial(number)
    assert lead(lab, write, "tracking=none", *SCREENING, stop=stop)[0] == 130
    lead_until_killed(lab, train_well, "tracking=none", *SCREENING, point="trial.before_tell")
    assert lead(lab, train_well, "tracking=none", *SCREENING)[0] == 0
    assert results_of(lab) == results_of(lab, "beside")


@pytest.mark.slow
def test_a_screened_study_that_has_ended_is_extended(lab: Path) -> None:
    assert lead(lab, train_well, *SCREENING)[0] == 0
    before = results_of(lab)
    more = (*SCREENING, "study.trials=10", "study.audit_pruning=9")
    assert lead(lab, train_well, *more)[0] == 0
    assert results_of(lab)[:7] == before
    rows = rows_of(lab)
    assert [row.state for row in rows[7:]] == ["pruned", "finished", "finished"]
    promoted = [row.notes["promoted_from"] for row in rows if "promoted_from" in row.notes]
    assert len(set(promoted)) == 4
    # What was trained to the end is not audited.
    audited = {int(key.split("/")[0]) for key in open_store(lab).notes()["unpruned"]}
    assert audited == {row.number for row in rows if row.state == "pruned"} - set(promoted)
    assert problems_of(lab) == []
    notes = {run.tags["mlflow.note.content"] for run in runs_of(lab, state="pruned")}
    assert len(notes) == 1
    assert "as all trials are at first" in notes.pop()


@pytest.mark.slow
def test_equal_values_of_a_finished_trial_are_taken_and_not_screened(lab: Path) -> None:
    finite = ("model.hidden=choice(16,32,64)", "optim.learning_rate=choice(0.01)")
    status, jobs = lead(lab, train_well, "tracking=none", *SCREENING, *finite)
    assert status == 0
    rows = rows_of(lab)
    whole = [row.values["model.hidden"] for row in rows if "taken_from" not in row.notes]
    finished = [row for row in rows if row.state == "finished" and "taken_from" not in row.notes]
    assert sorted(row.values["model.hidden"] for row in finished) == [16, 32, 64]
    assert len([job for job in jobs if not is_final(job)]) == len(whole)


def test_a_range_may_be_widened_in_a_running_study_and_not_narrowed(lab: Path) -> None:
    study = (*PLAIN, "study.startup_trials=1")
    assert lead(lab, train_well, *study)[0] == 0
    before = results_of(lab)
    wider = "model.hidden=tag(log,int(interval(16,96)))"
    _, jobs = lead(lab, train_well, *study, wider, "study.trials=9")
    assert max(job.config.model.hidden for job in jobs) > 64
    assert results_of(lab)[:3] == before
    for other in ("tag(log,int(interval(16,64)))", "tag(log,int(interval(20,128)))"):
        with pytest.raises(UserError, match=r"study.space.model.hidden: .* a range may only grow"):
            lead(lab, train_well, *study, f"model.hidden={other}")
    # What a report or an audit opens is the study as it is now.
    assert [row.number for row in rows_of(lab)] == list(range(9))


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("tag(log,int(interval(16,64)))", "int(interval(16,64))"),
        ("choice(16,64)", "choice(16,32,64)"),
        ("range(16,65,16)", "range(16,65,8)"),
    ],
    ids=["another scale", "a choice", "another step"],
)
def test_what_is_no_wider_range_is_another_space(lab: Path, was: str, now: str) -> None:
    assert lead(lab, train_well, *PLAIN, "study.trials=1", f"model.hidden={was}")[0] == 0
    with pytest.raises(UserError, match=r"created with other settings \(study.space.model.hidden"):
        lead(lab, train_well, *PLAIN, "study.trials=1", f"model.hidden={now}")
