"""A study: trials until there are enough, then the champion."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from digitlab.base.console import Board, Busy, View
from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError, first_line, require
from digitlab.config.compose import Composed
from digitlab.config.recorded import with_values
from digitlab.config.types import Config, EvaluateOn, Launcher, Tracker
from digitlab.data.datasets import TRAIN, load_digits
from digitlab.pages.views import describe_study, view_addresses, view_tags
from digitlab.records.mlflow import open_tracking
from digitlab.records.record import Identity, begin_record, stage, trial_tags
from digitlab.study.audit import audit, reconcile_trial, record_taken
from digitlab.study.champion import (
    Results,
    candidates,
    choose,
    confirm_jobs,
    crown,
    final_jobs,
    test_metrics,
    unpruned_jobs,
)
from digitlab.study.fingerprint import fitting_trials, guard
from digitlab.study.join import invite, reap
from digitlab.study.storage import PATIENCE, STORE_ERRORS, Hold, open_storage
from digitlab.study.summary import champion_text, pruning_text, sweep_command, trials_table
from digitlab.study.trials import Search, TrialRow
from digitlab.study.workers.processes import Done, Job, Pool, Setup, Worker, only_parent

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TICK = 0.2  # seconds between two looks at the clock and the board
_LOOK = 1.0  # seconds between two looks at trials that workers elsewhere run
_GRACE = 5.0  # seconds beyond study.trial_minutes after which a worker no longer answers


def sweep(composed: Composed, lab: Path, again: str | None = None) -> int:
    """Run or go on with a study; returns the exit status.

    Args:
        again: the command that goes on, where it is not `make sweep`; such a study is not extended.

    Raises:
        UserError: the study cannot be run as it is asked for.
    """
    config = composed.config
    if config.data.evaluate_on is not EvaluateOn.validation:
        raise UserError(
            "data.evaluate_on=test: a study chooses on validation images, and tests its champion: "
            "leave data.evaluate_on=validation"
        )
    if not config.study.space:
        raise UserError(
            f"study.space={{}}: study {config.study.name} has nothing to search: give a range such "
            "as 'model.hidden=tag(log,int(interval(32,512)))', or use `digitlab train`"
        )
    _require_shared(config)
    storage = open_storage(lab, config.study.storage)
    search = Search(storage, config)
    with only_parent(lab, config.study.name), _held(search) as hold, Board() as board:
        return _Sweep(composed, lab, search, hold, board, again).run()


def _require_shared(config: Config) -> None:
    """Workers elsewhere need a storage and records that they reach."""
    if config.launcher.name is Launcher.processes:
        return
    given = f"launcher={config.launcher.name}"
    storage = config.study.storage or os.environ.get("DIGITLAB_STORAGE")
    rule = "a storage that all workers reach: study.storage=postgresql+psycopg://..."
    require(bool(storage), f"study.storage=null with {given}", rule)
    records = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    rule = "records that all workers reach: tracking.uri=http://..., or tracking=none"
    none = config.tracking.name is Tracker.none
    require(none or bool(records), f"tracking.uri=null with {given}", rule)


@contextmanager
def _held(search: Search) -> Iterator[Hold | None]:
    """Hold the study in a storage that many share, so that no other machine leads it."""
    if search.engine is None:
        yield None
        return
    study = search.config.name
    problem = f"study.name={study}: another machine leads it already: wait, or join it with "
    hold = Hold(search.engine, f"digitlab/{study}", f"{problem}`digitlab worker {study}`")
    try:
        yield hold
    finally:
        hold.close()


class _Sweep:
    def __init__(
        self,
        composed: Composed,
        lab: Path,
        search: Search,
        hold: Hold | None,
        board: Board,
        again: str | None,
    ) -> None:
        self.hold, self.again = hold, again
        self.config, self.lab, self.board = composed.config, lab, board
        self.overrides = composed.overrides
        self.study = composed.config.study
        self.search = search
        self.tracking = open_tracking(composed.config, lab)
        data = composed.config.data
        self.data_sha256 = load_digits(lab, data.name, TRAIN, data.allow_unknown).sha256
        guard(self.search, composed.config, self.data_sha256)
        self.environment = describe_environment()
        self._mend()
        self.parent_run = self._parent_run()
        self.pool: Pool | None = None
        self.stopping = 0
        self.shown = 0.0
        self.invited = -1  # trials in all that workers from elsewhere were told of
        self.begun = time.monotonic()
        self.spent = float(self.search.notes().get("seconds", 0.0))  # in earlier calls

    def run(self) -> int:
        before = {s: signal.signal(s, self._stop) for s in _SIGNALS}
        state = "interrupted"
        try:
            self._fork()
            self._trials()
            if not self.stopping:
                self._await_tracker()
            status = 130 if self.stopping else self._champion()
            state = {0: "finished", 1: "failed"}.get(status, "interrupted")
            return status
        except STORE_ERRORS as error:
            reason = first_line(error.__cause__ or error)
            raise UserError(
                f"study {self.study.name}: the lab cannot be written ({reason}): mend that and go "
                "on with the same command; what is recorded stays"
            ) from error
        finally:
            if self.pool is not None:
                self.pool.close()
            with suppress(*STORE_ERRORS):  # of which the caller is being told already
                self._leave(state)
            for name, handler in before.items():
                signal.signal(name, handler)

    def _leave(self, state: str) -> None:
        self.search.note("seconds", self._seconds())
        if self.parent_run:
            self.tracking.resume(self.parent_run).end(state)
        if self.stopping:
            ended = sum(row.ended for row in self.search.rows())
            self.board.say(
                f"stopped with {ended} of {self.study.trials} trials; "
                f"go on with: {self.again or sweep_command(self.overrides)}"
            )

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.begun

    def _stop(self, number: int, _: FrameType | None) -> None:
        """A signal. Once: end what runs at its next batch. Twice: at once."""
        self.stopping += 1
        if number == signal.SIGHUP:
            self.board.mute()
        if self.stopping > 1:
            if self.pool is not None:
                self.pool.close()
            os._exit(130)
        if self.pool is not None:
            self.pool.stop()

    # Before the first trial

    def _identity(self, kind: str, name: str, tags: Mapping[str, str]) -> Identity:
        return Identity(name, kind, tags, self.parent_run, self.overrides, self.environment)

    def _parent_run(self) -> str | None:
        """The study's own run, begun by the first call and taken up again by the others."""
        if self.config.tracking.name is Tracker.none:
            return None
        known = self.search.notes().get("run_id")
        self.tracking.lay_out(view_tags(self.study))
        if known:
            self.tracking.resume(known).end("running")
            return str(known)
        mine = {"digitlab.study": self.study.name, "digitlab.kind": "study"}
        for row in self.tracking.find(mine):  # of a call that was killed before it noted the run
            self.tracking.delete(row.run_id)
        tags = {
            "digitlab.study": self.study.name,
            "digitlab.data_sha256": json.dumps(self.data_sha256),
            "mlflow.note.content": describe_study(self.config, self.overrides),
        }
        identity = Identity(self.study.name, "study", tags, None, self.overrides, self.environment)
        record = begin_record(self.tracking, self.config, identity)
        record.keep(stage(self.lab, self.config, identity))
        self.search.note("run_id", record.run_id)
        return record.run_id

    def _mend(self) -> None:
        """Mend what a killed call left behind."""
        problems = audit(self.search, self.tracking, self.config, repair=True, deep=False)
        for problem in problems:
            verb = "mended" if problem.mended else "found"
            self.board.say(f"{verb}: {problem.detail}")

    def _fork(self) -> None:
        """Take over the trials of another study that fit this one, once."""
        if self.study.fork_from is None or self.search.notes().get("forked"):
            return
        taken = {row.notes.get("taken_from") for row in self.search.rows()}
        fitting = fitting_trials(self.search, self.config)
        for trial in fitting:
            if trial["notes"]["taken_from"] in taken:
                continue
            number = len(self.search.rows())
            name, tags = f"{self.study.name}-{number}", trial_tags(self.study.name, number)
            config = with_values(self.config, trial["values"])
            identity = self._identity("trial", name, tags)
            record_taken(self.tracking, config, identity, trial["notes"])
            self.search.add(**trial)
        self.search.note("forked", True)
        self.board.say(f"{len(fitting)} trials taken over from study {self.study.fork_from}")

    # Trials

    def _trials(self) -> None:
        ended = sum(self._counts(row) for row in self.search.rows())
        total, name = self.study.trials, self.study.name
        if ended >= total or self.stopping:
            return
        if ended:
            self.board.say(f"study {name}: going on from {ended} of {total} trials")
        else:
            self.board.say(f"study {name}: {total} trials over {', '.join(self.study.space)}")
        self._invite(total)
        if self.config.launcher.name is not Launcher.processes:
            self._watch(total)
            return
        self._work_off("trials", self._next_trial, self._trial_ended, total)
        while self.hold and not self.stopping and not self._complete(total):  # others run the rest
            self.hold.keep()
            self._reap()
            time.sleep(_LOOK)
            self._work_off("trials", self._next_trial, self._trial_ended, total)

    def _complete(self, total: int) -> bool:
        rows = self.search.rows()
        if self._enough(rows):
            return all(row.ended for row in rows)
        return self.search.complete(total)

    def _enough(self, rows: list[TrialRow]) -> bool:
        """Whether the study's limits of time or patience let no further trial start."""
        minutes, patience = self.study.minutes, self.study.patience
        late = bool(minutes) and self._seconds() > 60 * minutes
        enough = late or (bool(patience) and _since_best(rows) >= patience)
        if enough:
            self._invite(0)
        return enough

    def _invite(self, total: int) -> None:
        if self.hold and total != self.invited:
            invite(self.search, self.config, self.overrides, total)
            self.invited = total

    def _reap(self) -> None:
        for told in reap(self.search, self.tracking):
            self.board.say(told)

    def _watch(self, total: int) -> None:
        """Wait for workers that Ray or other people start, until no trial is left."""
        crew = None
        if self.config.launcher.name is Launcher.ray:
            from digitlab.study.workers.ray import RayWorkers  # which imports Ray

            crew = RayWorkers(self.config, self.lab)
            self.board.say(f"{crew.count} workers asked of the Ray cluster")
        else:
            self.board.say(f"waiting for workers: digitlab worker {self.study.name}")
        begun, before = time.monotonic(), {row.number for row in self.search.rows() if row.ended}
        known = len(before)
        try:
            while True:
                looked = time.monotonic()
                complete, rows = self._complete(total), self.search.rows()
                for row in rows:
                    if row.ended and row.number not in before:
                        before.add(row.number)
                        self._say_ended(row)
                if complete or self.stopping:
                    return
                for problem in crew.problems() if crew else []:
                    self.board.say(problem)
                if crew and not crew.working and not self._complete(total):
                    raise UserError(
                        f"study {self.study.name}: no worker is left on the Ray cluster, and not "
                        "all trials have ended: mend what they said and go on"
                    )
                assert self.hold is not None
                self.hold.keep()
                self._reap()
                count = len(before) - known
                self._show_rows(rows, (time.monotonic() - begun) / count if count else None, total)
                time.sleep(max(_LOOK, 2 * (time.monotonic() - looked)))  # a look may take long
        finally:
            if crew:
                crew.close(now=bool(self.stopping))

    def _say_ended(self, row: TrialRow) -> None:
        if self.board.live is None:
            value = f" {row.value:.2%}" if row.value else ""
            self.board.say(f"trial {row.number} {row.state}{value}")

    def _show_rows(self, rows: list[TrialRow], pace: float | None, total: int) -> None:
        done = sum(self._counts(row) for row in rows)
        busy = [_running(row, self.config) for row in rows if row.state == "running"]
        left = None if pace is None else pace * (total - done)
        self.board.show(View("trials", done, total, _best_text(rows), left, busy))

    def _counts(self, row: TrialRow) -> bool:
        return row.ended and (self.study.count_failed or row.state != "failed")

    def _next_trial(self) -> Job | None:
        rows = self.search.rows()
        if self._enough(rows):
            return None
        failed = sum(row.state == "failed" for row in rows)
        if not self.study.count_failed and failed >= self.study.trials:
            raise UserError(
                f"study {self.study.name}: {failed} trials have failed, the last: "
                f"{_last_reason(rows)}; narrow study.space"
            )
        number = self.search.claim(self.study.trials)
        return None if number is None else Job("trial", number)

    def _trial_ended(self, worker: Worker, job: Job, done: Done | None) -> None:
        if done is None:
            row, why = self.search.rows()[job.number], worker.killed or "its worker died"
            state = row.state
            if state == "running":
                try:
                    state = reconcile_trial(self.search, self.tracking, row, why)
                except UserError:  # the tracker is away: the next attempt voids what this one left
                    attempts = int(row.notes.get("attempts", 0)) + 1
                    if attempts > self.study.retries or worker.killed:
                        raise
                    self.search.put_back(row.number, attempts)
                    state = "waiting"
            self.board.say(f"trial {job.number}: {why}; {state}")
        elif done.state in ("waiting", "failed"):
            self.board.say(f"trial {job.number} {done.state}: {done.reason}")
        elif self.board.live is None and done.state in ("finished", "pruned"):
            name = "val_accuracy" if done.state == "finished" else "rung_accuracy"
            accuracy = done.metrics.get(name)
            self.board.say(
                f"trial {job.number} {done.state}" + (f" {accuracy:.2%}" if accuracy else "")
            )

    def _await_tracker(self) -> None:
        """The champion is chosen from records: a tracker that is away for a while is waited for."""
        deadline = time.monotonic() + (PATIENCE if self.hold else 0.0)
        while not self.stopping:
            try:
                self.tracking.deliver()
                self.tracking.find({"digitlab.study": self.study.name, "digitlab.kind": "study"})
                return
            except UserError as error:
                if time.monotonic() > deadline:
                    raise
                self.board.say(str(error))
            time.sleep(5)

    # Working off jobs of any kind

    def _work_off(
        self,
        phase: str,
        next_job: Callable[[], Job | None],
        ended: Callable[[Worker, Job, Done | None], None],
        total: int,
    ) -> None:
        """Give jobs to workers as they become free, until there are none or the study stops."""
        if self.pool is None:
            setup = (self.config, self.overrides, self.lab, self.parent_run, self.environment)
            workers = self._count_workers(total)
            self.search.note("workers", max(workers, self.search.notes().get("workers", 0)))
            self.pool = Pool(Setup(*setup), workers)
        pool, begun, count = self.pool, time.monotonic(), 0
        resting = 0.0  # until then a storage that many share is not asked for trials again
        while True:
            empty = bool(self.stopping) or time.monotonic() < resting
            for worker in [] if empty else pool.idle():
                job = next_job()
                if job is None:
                    empty = True
                    resting = time.monotonic() + _LOOK if self.hold and phase == "trials" else 0.0
                    break
                pool.give(worker, job)
            if empty and not pool.busy():
                return
            for worker, done in pool.events(_TICK):
                job, worker.job = worker.job, None
                if done is not None and done.fatal:
                    raise UserError(f"study {self.study.name}: {done.fatal}; mend it and go on")
                if job is not None:
                    ended(worker, job, done)
                    count += done is not None and done.state not in ("waiting", "interrupted")
            self._watch_clock(pool)
            if self.hold:
                self.hold.keep()
            pace = (time.monotonic() - begun) / count if count else None
            self._show(phase, pace, total)

    def _count_workers(self, jobs: int) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        most = max(1, (cores or 1) // self.config.trainer.threads)
        if self.study.workers > most:
            self.board.say(
                f"study.workers={self.study.workers} with trainer.threads="
                f"{self.config.trainer.threads} asks for more threads than the {cores} cores"
            )
        return self.study.workers or min(most, jobs)

    def _watch_clock(self, pool: Pool) -> None:
        limit = 60 * self.study.trial_minutes
        for worker in pool.busy() if limit else []:
            if time.monotonic() - worker.begun > limit + _GRACE and not worker.killed:
                pool.kill(worker, f"it took longer than study.trial_minutes={limit / 60:g}")

    def _show(self, phase: str, pace: float | None, total: int) -> None:
        if self.hold and time.monotonic() - self.shown < _LOOK:
            return
        self.shown = time.monotonic()
        rows = self.search.rows()
        done = (
            sum(self._counts(row) for row in rows) if phase == "trials" else len(self._noted(phase))
        )
        assert self.pool is not None
        busy = [_busy(worker, self.config) for worker in self.pool.busy()]
        left = None if pace is None else pace * (total - done)
        self.board.show(View(phase, done, total, _best_text(rows), left, busy))

    # The champion

    def _noted(self, phase: str) -> dict[str, dict[str, float]]:
        noted: dict[str, dict[str, float]] = self.search.notes().get(phase, {})
        return noted

    def _fits(self, phase: str, jobs: Mapping[str, Job]) -> Results:
        """The results of jobs, from the study's notes or from running them now."""
        todo = {key: job for key, job in jobs.items() if key not in self._noted(phase)}
        waiting = list(todo.values())
        keys = {id(job): key for key, job in todo.items()}
        tries = dict.fromkeys(todo, 0)

        def clear(job: Job) -> None:
            """What a call or a worker that was killed has left of it is void."""
            same = {"digitlab.kind": job.kind, **trial_tags(self.study.name, job.number)}
            for row in self.tracking.find(same | job.tags):
                self.tracking.delete(row.run_id)

        for job in waiting:
            clear(job)

        def ended(_: Worker, job: Job, done: Done | None) -> None:
            key = keys[id(job)]
            if done is not None and done.state == "finished":
                metrics = done.metrics | {"run": done.run_id or ""}
                self.search.note(phase, self._noted(phase) | {key: metrics})
                return
            tries[key] += 1
            if done is None:
                with suppress(UserError):  # the tracker is away: the audit finds what is left
                    clear(job)
            reason = "its worker died" if done is None else done.reason
            if tries[key] > self.study.retries:
                raise UserError(f"{phase} {key}: {reason}, {tries[key]} times")
            if not self.stopping:
                waiting.append(job)

        if todo:
            self._work_off(phase, lambda: waiting.pop(0) if waiting else None, ended, len(jobs))
        noted = self._noted(phase)
        return {key: noted[key] for key in jobs if key in noted}

    def _champion(self) -> int:
        rows = self.search.rows()
        best = candidates(rows, self.study.confirm)
        if not best:
            self.board.say(f"study {self.study.name}: no trial finished; {_last_reason(rows)}")
            return 1
        asked = [len(rows), self.study.confirm, self.study.confirm_seeds, self.study.final_seeds]
        summary = self.search.notes().get("champion", {})
        complete = summary.get("asked") == asked
        unpruned = self._fits("unpruned", unpruned_jobs(self.config, rows))
        if not complete and not self.stopping:
            confirmed = self._fits("confirm", confirm_jobs(self.config, best))
        if not complete and not self.stopping:
            choice = choose(best, confirmed)
            finals = self._fits("final", final_jobs(self.config, choice.champion))
        if self.stopping:
            return 130
        if complete:
            self.board.say(f"study {self.study.name} is complete: {len(rows)} trials")
        else:
            self._await_tracker()  # which is given what the final fits kept back
            if self.stopping:
                return 130
            identity = self._identity("champion", "", {})
            summary = crown(self.tracking, self.config, identity, self.lab, choice, finals)
            self.search.note("champion", summary | {"asked": asked})
        if self.search.notes().get("published") != asked:
            self._publish(summary)
            self.search.note("published", asked)
        self.board.print(trials_table(rows, self.study))
        self.board.say(pruning_text(rows, unpruned))
        overrides = None if self.again else self.overrides
        self.board.say(champion_text(self.config, summary, overrides))
        if self.parent_run:
            addresses = view_addresses(self.tracking.runs_page(), self.study.name)
            self.board.say(f"look:      make ui   and open {addresses['table']}")
        return 0

    def _publish(self, summary: Mapping[str, Any]) -> None:
        """The champion's figures and the report, on the study's own run."""
        if not self.parent_run:
            return
        text = champion_text(self.config, summary, self.overrides)
        note = describe_study(self.config, self.overrides, text)
        record = self.tracking.resume(self.parent_run)
        record.log(test_metrics(summary), tags={"mlflow.note.content": note})
        from digitlab.results.report import keep_report, report  # plotly, after all else has run

        page = report(self.search, self.config, self.tracking, self.lab)
        keep_report(page, self.search, self.tracking, self.lab)


def _value(row: TrialRow) -> float:
    return row.value or 0.0


def _best_text(rows: list[TrialRow]) -> str:
    best = max((row for row in rows if row.state == "finished"), key=_value, default=None)
    return f"best {_value(best):.2%} (trial {best.number})" if best else ""


def _last_reason(rows: list[TrialRow]) -> str:
    reasons = [str(row.notes["reason"]) for row in rows if "reason" in row.notes]
    return reasons[-1] if reasons else "no reason is known"


def _since_best(rows: list[TrialRow]) -> int:
    """Ended trials since the best one, itself not counted."""
    ended = [row for row in rows if row.ended]
    finished = [row for row in ended if row.state == "finished"]
    if not finished:
        return 0
    best = max(finished, key=lambda row: (_value(row), -row.number))
    return sum(row.number > best.number for row in ended)


def _running(row: TrialRow, config: Config) -> Busy:
    """A trial of a worker elsewhere: all that is known of it is the last rung it has passed."""
    epochs = int(row.values.get("trainer.epochs", config.trainer.epochs))
    rungs = [0.0, *config.study.rungs]
    done = rungs[min(row.rungs, len(rungs) - 1)]
    epoch = min(epochs, int(done * epochs) + 1)
    return Busy(row.number, f"trial {row.number}", done, epoch, epochs, row.value)


def _busy(worker: Worker, config: Config) -> Busy:
    assert worker.job is not None
    values = worker.progress.values or {}
    epochs = int(values.get("trainer.epochs", (worker.job.config or config).trainer.epochs))
    epoch = min(epochs, int(worker.progress.done * epochs) + 1)
    title = f"{worker.job.kind} {worker.job.number}"
    accuracy = worker.progress.metrics.get("val_accuracy")
    return Busy(worker.number, title, worker.progress.done, epoch, epochs, accuracy)
