"""A study: trials until there are enough, then the champion."""

import dataclasses
import hashlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from digitlab.champion import (
    Choice,
    Results,
    candidates,
    choose,
    confirm_jobs,
    final_jobs,
    test_interval,
)
from digitlab.compose import Composed, config_to_plain, config_to_yaml, flat
from digitlab.config import Config, Fold
from digitlab.console import Board, Busy, View
from digitlab.datasets import TRAIN, load_digits
from digitlab.environment import describe_environment, source_digest
from digitlab.errors import UserError
from digitlab.reconcile import reconcile_trial
from digitlab.report import champion_text, sweep_command, trials_table
from digitlab.search import Search, TrialRow, open_storage
from digitlab.space import read_space
from digitlab.tracking import Start, open_tracking
from digitlab.workers import Done, Job, Pool, Setup, Worker, only_parent

_TICK = 0.2  # seconds between two looks at the clock and the board
_GRACE = 10.0  # seconds beyond study.trial_minutes after which a worker no longer answers


def sweep(composed: Composed, lab: Path) -> int:
    """Run or go on with a study; returns the exit status.

    Raises:
        UserError: the study cannot be run as it is asked for.
    """
    config = composed.config
    if config.data.fold is not Fold.holdout:
        raise UserError(
            "data.fold=test: a study chooses on the holdout, and tests its champion itself: "
            "leave data.fold=holdout"
        )
    if not config.study.space:
        raise UserError(
            f"study.space={{}}: study {config.study.name} has nothing to search: give a range such "
            "as 'model.hidden=tag(log,int(interval(32,512)))', or use `digitlab train`"
        )
    read_space(config)
    with only_parent(lab, config.study.name), Board() as board:
        return _Sweep(composed, lab, board).run()


class _Sweep:
    def __init__(self, composed: Composed, lab: Path, board: Board) -> None:
        self.config, self.lab, self.board = composed.config, lab, board
        self.study = composed.config.study
        self.search = Search(open_storage(lab), self.study, read_space(composed.config))
        self.tracking = open_tracking(composed.config, lab)
        data = composed.config.data
        self.data_sha256 = load_digits(lab, data.name, TRAIN, data.allow_unknown).sha256
        guard(self.search, composed.config, self.data_sha256)
        self.parent_run = self._parent_run(composed)
        self.setup = Setup(
            composed.config, composed.overrides, lab, self.parent_run, describe_environment()
        )
        self.pool: Pool | None = None
        self.stopping = 0
        self.begun = time.monotonic()
        self.spent = float(self.search.notes().get("seconds", 0.0))  # in earlier calls

    def _parent_run(self, composed: Composed) -> str | None:
        """The study's own MLflow run, begun by the first call and written on by the others."""
        known = self.search.notes().get("run_id")
        if known:
            return str(known)
        plain = flat(config_to_plain(self.config))
        tags = {
            "digitlab.kind": "study",
            "digitlab.study": self.study.name,
            "digitlab.state": "running",
            "digitlab.overrides": json.dumps(list(composed.overrides)),
            "digitlab.data_sha256": json.dumps(self.data_sha256),
        }
        for row in self.tracking.find({k: tags[k] for k in ("digitlab.kind", "digitlab.study")}):
            self.tracking.delete(row.run_id)  # of a call that was killed before it noted the run
        record = self.tracking.start(Start(self.study.name, tags, plain))
        folder = Path(tempfile.mkdtemp(dir=self._staging()))
        (folder / "config.yaml").write_text(config_to_yaml(self.config))
        record.keep(folder)
        self.search.note("run_id", record.run_id)
        return record.run_id

    def _staging(self) -> Path:
        folder = self.lab / "staging"
        folder.mkdir(exist_ok=True)
        return folder

    def run(self) -> int:
        before = {s: signal.signal(s, self._stop) for s in _SIGNALS}
        try:
            self._reconcile()
            self._trials()
            if self.stopping:
                return self._interrupted()
            return self._champion()
        finally:
            if self.pool is not None:
                self.pool.close()
            self.search.note("seconds", self._seconds())
            for name, handler in before.items():
                signal.signal(name, handler)

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.begun

    # Signals

    def _stop(self, number: int, _: FrameType | None) -> None:
        """Once: end what runs at its next batch. Twice: at once."""
        self.stopping += 1
        if number == signal.SIGHUP:
            self.board.mute()
        if self.stopping > 1:
            if self.pool is not None:
                self.pool.close()
            os._exit(130)
        if self.pool is not None:
            self.pool.stop()

    def _interrupted(self) -> int:
        rows = self.search.rows()
        ended = sum(row.ended for row in rows)
        self.board.say(
            f"stopped with {ended} of {self.study.trials} trials; "
            f"go on with: {sweep_command(self.setup.overrides)}"
        )
        self._end_parent("interrupted")
        return 130

    def _end_parent(self, state: str) -> None:
        if self.parent_run:
            self.tracking.resume(self.parent_run).end(state)

    # Trials

    def _reconcile(self) -> None:
        """Mend what a killed call left: deliver what it kept back, free its running trials."""
        self.tracking.deliver()
        for row in self.search.rows():
            if row.state == "running":
                reconcile_trial(self.search, self.tracking, row, None)

    def _trials(self) -> None:
        rows = self.search.rows()
        ended = sum(self._counts(row) for row in rows)
        total = self.study.trials
        if ended >= total:
            return
        name = self.study.name
        if ended:
            self.board.say(f"study {name}: going on from {ended} of {total} trials")
        else:
            self.board.say(f"study {name}: {total} trials over {', '.join(self.study.space)}")
        self._work_off("trials", self._next_trial, self._trial_ended, total)

    def _counts(self, row: TrialRow) -> bool:
        return row.ended and (self.study.count_failed or row.state != "failed")

    def _next_trial(self) -> Job | None:
        rows = self.search.rows()
        minutes, patience = self.study.minutes, self.study.patience
        if minutes and self._seconds() > 60 * minutes:
            return None
        if patience and _since_best(rows) >= patience:
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
            row = self.search.rows()[job.number]
            state = row.state
            if state == "running":
                state = reconcile_trial(
                    self.search, self.tracking, row, worker.killed or "its worker died"
                )
            self.board.say(f"trial {job.number}: {worker.killed or 'its worker died'}; {state}")
            return
        if done.state in ("waiting", "failed"):
            self.board.say(f"trial {job.number} {done.state}: {done.reason}")
        elif self.board.live is None and done.state in ("finished", "pruned"):
            accuracy = done.metrics.get(
                "val_accuracy" if done.state == "finished" else "rung_accuracy"
            )
            self.board.say(
                f"trial {job.number} {done.state}" + (f" {accuracy:.2%}" if accuracy else "")
            )

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
            self.pool = Pool(self.setup, self._count_workers(total))
        pool, begun, count = self.pool, time.monotonic(), 0
        while True:
            empty = bool(self.stopping)
            for worker in [] if empty else pool.idle():
                job = next_job()
                if job is None:
                    empty = True
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
        rows = self.search.rows()
        best = max((row for row in rows if row.state == "finished"), key=_value, default=None)
        done = (
            sum(self._counts(row) for row in rows) if phase == "trials" else len(self._noted(phase))
        )
        assert self.pool is not None
        busy = [_busy(worker, self.config) for worker in self.pool.busy()]
        left = None if pace is None else pace * (total - done)
        text = f"best {_value(best):.2%} (trial {best.number})" if best else ""
        self.board.show(View(phase, done, total, text, left, busy))

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
        for job in waiting:  # of a call that was killed
            same = {"digitlab.study": self.study.name, "digitlab.kind": job.kind, **job.tags}
            for row in self.tracking.find(same | {"digitlab.trial": str(job.number)}):
                self.tracking.delete(row.run_id)

        def ended(worker: Worker, job: Job, done: Done | None) -> None:
            key = keys[id(job)]
            if done is not None and done.state == "finished":
                metrics = done.metrics | {"run": done.run_id or ""}
                self.search.note(phase, self._noted(phase) | {key: metrics})
                return
            tries[key] += 1
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
            self._end_parent("failed")
            self.board.say(f"study {self.study.name}: no trial finished; {_last_reason(rows)}")
            return 1
        known = self.search.notes().get("champion", {})
        new = not known
        if new or known["trials"] != len(rows) or known["asked"] != self._asked():
            new = True
            confirmed = self._fits("confirm", confirm_jobs(self.config, best))
            if self.stopping:
                return self._interrupted()
            choice = choose(best, confirmed)
            finals = self._fits("final", final_jobs(self.config, choice.champion))
            if self.stopping:
                return self._interrupted()
            known = self._crown(choice, finals, len(rows))
        self._report(rows, known, new)
        return 0

    def _asked(self) -> list[int]:
        return [self.study.confirm, self.study.confirm_seeds, self.study.final_seeds]

    def _crown(self, choice: Choice, finals: Results, trials: int) -> dict[str, Any]:
        """Record the champion; returns what is noted of it."""
        interval = test_interval(finals)
        champion = choice.champion
        summary = {
            "trial": champion.number,
            "values": champion.values,
            "val_accuracy": {n: dataclasses.asdict(i) for n, i in choice.intervals.items()},
            "tied": choice.tied,
            "test_accuracy": dataclasses.asdict(interval),
            "trials": trials,
            "asked": self._asked(),
            "run_id": None,
        }
        first = next(iter(finals.values()))
        job = next(iter(final_jobs(self.config, champion).values()))
        assert job.config is not None
        for row in self.tracking.find(
            {"digitlab.study": self.study.name, "digitlab.kind": "champion"}
        ):
            self.tracking.delete(row.run_id)
        weights_run = str(first["run"])
        tags = {
            "digitlab.kind": "champion",
            "digitlab.study": self.study.name,
            "digitlab.trial": str(champion.number),
            "digitlab.state": "running",
            "digitlab.weights_run": weights_run,
        }
        plain = flat(config_to_plain(job.config))
        params = {k: v for k, v in plain.items() if not k.startswith(("study.", "tracking."))}
        start = Start(f"{self.study.name}-champion", tags, params, self.parent_run)
        record = self.tracking.start(start)
        folder = Path(tempfile.mkdtemp(dir=self._staging()))
        (folder / "config.yaml").write_text(config_to_yaml(job.config))
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        if record.run_id:
            weights = self.tracking.artifact(weights_run, "weights.safetensors")
            (folder / "weights.safetensors").write_bytes(weights)
            record.log(tags={"digitlab.weights_sha256": hashlib.sha256(weights).hexdigest()})
        record.keep(folder)
        metrics = {
            "test_accuracy_mean": interval.mean,
            "test_accuracy_low": interval.low,
            "test_accuracy_high": interval.high,
            "test_seeds": interval.n,
        }
        record.log(metrics)
        record.end("finished")
        if record.run_id:
            self.tracking.register(self.study.name, record.run_id, {"trial": str(champion.number)})
        summary["run_id"] = record.run_id
        self.search.note("champion", summary)
        if self.parent_run:
            parent = self.tracking.resume(self.parent_run)
            parent.log(metrics)
            parent.end("finished")
        return summary

    def _report(self, rows: list[TrialRow], known: Mapping[str, Any], new: bool) -> None:
        if not new:
            self.board.say(f"study {self.study.name} is complete: {len(rows)} trials")
        self.board.print(trials_table(rows, self.study))
        self.board.say(champion_text(self.config, rows, known, self.setup.overrides))


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _value(row: TrialRow) -> float:
    return row.value or 0.0


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


def _busy(worker: Worker, config: Config) -> Busy:
    assert worker.job is not None
    values = worker.progress.values or {}
    epochs = int(values.get("trainer.epochs", (worker.job.config or config).trainer.epochs))
    epoch = min(epochs, int(worker.progress.done * epochs) + 1)
    title = f"{worker.job.kind} {worker.job.number}"
    accuracy = worker.progress.metrics.get("val_accuracy")
    return Busy(worker.number, title, worker.progress.done, epoch, epochs, accuracy)


def guard(search: Search, config: Config, data_sha256: Mapping[str, str]) -> None:
    """Note what the study is begun with, or compare with what it was begun with.

    Raises:
        UserError: something differs that the trials' results depend on; every difference is named.
    """
    plain = flat({"study": {"space": {}}, **config_to_plain(config)})
    kept = ("sampler", "startup_trials", "seed", "pruner", "rungs")
    fixed = {k: v for k, v in plain.items() if not k.startswith(("study.", "tracking."))}
    fixed |= {f"study.{k}": plain[f"study.{k}"] for k in kept}
    now = {
        **{f"study.space.{knob}": text for knob, text in config.study.space.items()},
        **{k: v for k, v in fixed.items() if k not in config.study.space},
        **{f"SHA-256 of {file}": digest[:12] for file, digest in data_sha256.items()},
        "objective": "val_accuracy",
        "source code": source_digest(),
    }
    then = search.notes().get("begun")
    if then is None:
        search.note("begun", now)
        return
    changed = [
        f"{key} was {then.get(key, 'not there')}, is {now.get(key, 'not there')}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if changed:
        name = config.study.name
        raise UserError(
            f"study.name={name}: it was begun differently ({'; '.join(changed)}): undo that, or "
            f"begin another with study.name=... (study.fork_from={name} takes over what still fits)"
        )
