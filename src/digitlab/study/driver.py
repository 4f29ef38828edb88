"""The driver: leads a study from its first trial to its champion, and keeps its books."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from digitlab.base.console import Board
from digitlab.base.environment import training_digest
from digitlab.base.errors import UserError, counted, first_line, refuse_damage
from digitlab.base.limits import usable_cores
from digitlab.base.stop import StopSignal
from digitlab.config.compose import Composed
from digitlab.config.types import Config, Device, EvaluateOn, Launcher
from digitlab.study.champion import Fit, Results, candidates, finished_results, unpruned_fits
from digitlab.study.fits import FitPhase
from digitlab.study.goal import TrialRow
from digitlab.study.loop import JobLoop
from digitlab.study.progress import StudyProgress
from digitlab.study.samplers import searched_space
from digitlab.study.search import TrialSearch
from digitlab.study.selection import select_and_test
from digitlab.study.session import GROWING, StudySession, choice_budget, open_session
from digitlab.study.settle import RecordedFits, recorded_fits, settle
from digitlab.study.storage import (
    STORE_ERRORS,
    has_storage,
    open_storage,
    study_names,
    study_notes,
)
from digitlab.study.summary import champion_text, pruning_text, sweep_command, trials_table
from digitlab.workers.base import Workers, WorkerSetup

# Settings that decide on the champion, beside the trials: with others it is chosen again.
_CHOICE_SETTINGS = (*GROWING, "margin")

# Registers and reports a study that has just selected its champion; returns what to note of it.
Publish = Callable[[StudySession, Mapping[str, Any]], Mapping[str, Any]]


def is_published(config: Config, lab: Path) -> bool:
    """Whether a study has published all that is asked for, so that it needs hardly any worker."""
    if not has_storage(lab, config.study.storage):
        return False
    storage, name = open_storage(lab, config.study.storage), config.study.name
    known = study_notes(storage, name) if name in study_names(storage) else {}
    published = choice_budget(known.get("published", {}))
    now = choice_budget({key: getattr(config.study, key) for key in ("trials", *GROWING)})
    is_large_enough = all(published.get(key, -1) >= value for key, value in now.items())
    return is_large_enough and bool(published["margin"] == config.study.margin)


def sweep(
    composed: Composed,
    lab: Path,
    publish: Publish = lambda _session, _summary: {},
    again: str | None = None,
    given: Sequence[TrialRow] = (),
) -> int:
    """Run a study, or go on with it; return the exit status.

    Args:
        publish: receives the study and its champion's summary, once for each champion.
        again: the command that goes on, where it is not `sweep`; such a study is not extended.
        given: trials that are not trained, but have these results.

    Raises:
        UserError: the study cannot be run as it is asked for.
    """
    config = composed.config
    if config.data.evaluate_on is not EvaluateOn.validation:
        raise UserError(
            "data.evaluate_on=test is invalid: a study selects on validation images, and tests "
            "its champion itself. Leave data.evaluate_on=validation."
        )
    if not config.study.space:
        raise UserError(
            f"study.space={{}} is invalid: study {config.study.name} needs something to search. "
            "Give a range such as 'model.hidden=tag(log,int(interval(32,512)))', or use "
            "`digitlab train`."
        )
    if config.trainer.early_stopping:
        raise UserError(
            f"trainer.early_stopping={config.trainer.early_stopping} is invalid in a study: it "
            "must be 0, since final fits have no validation set, and would train longer than what "
            "was selected. Leave it out, and search trainer.epochs."
        )
    searched_space(config)  # what it refuses is refused before data are fetched
    stop = StopSignal()
    try:
        if not is_published(config, lab):
            _refuse_missing_device(config)
        with Board() as board, stop, open_session(composed, lab, board, stop) as session:
            if again is not None:
                session.store.note("again", again)
            return StudyDriver(session, _build_workers(session), publish, again, given).run()
    except STORE_ERRORS as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"study {config.study.name}: its storage or the lab cannot be written ({reason}). "
            "Nothing recorded is lost. Repair that, and go on with the same command."
        ) from error


def _refuse_missing_device(config: Config) -> None:
    """Refuse a device that this machine's workers would lack; a Ray node may well have it."""
    is_named = config.trainer.device in (Device.cuda, Device.mps)
    if is_named and config.launcher.name is Launcher.processes:
        from digitlab.training.device import find_device  # which imports torch

        find_device(config.trainer.device)


class StudyDriver:
    """Leads an open study through its phases, by workers that are not started yet."""

    def __init__(
        self,
        session: StudySession,
        workers: Workers,
        publish: Publish,
        again: str | None,
        given: Sequence[TrialRow] = (),
    ) -> None:
        self.session, self.workers, self.publish, self.again = session, workers, publish, again
        self.given = given
        self.store, self.board, self.study = session.store, session.board, session.config.study
        self.progress = StudyProgress(session)
        self.recorded = RecordedFits({}, Counter())

    def run(self) -> int:
        """Run what is left of the study; return the exit status."""
        state = "interrupted"
        try:
            session = self.session
            if session.stop():  # records of an earlier call may be where `settle` does not look
                return 130
            settle(session.store, session.records, session.parent_run_id, self.board.say)
            self.recorded = recorded_fits(session.store, session.records.tracker)
            search = TrialSearch(session, self.progress.seconds, self.given)
            search.fork()
            with self.workers:
                session.stop.on_second = self.workers.close
                status = self._phases(search)
            state = {0: "finished", 1: "failed"}.get(status, "interrupted")
            return status
        finally:
            with suppress(*STORE_ERRORS):  # the first failure is raised already
                self._leave(state)

    def _phases(self, search: TrialSearch) -> int:
        stop = self.session.stop
        search.run(self._loop("trials", self.study.trials))
        rows = self.store.rows()
        best = candidates(rows, self.study.confirm, self.store.own, self.store.goal)
        if stop():
            return 130
        if not best:
            reasons = [row.notes["reason"] for row in rows if "reason" in row.notes]
            reason = reasons[-1] if reasons else "no reason is known"
            self.board.say(f"study {self.study.name}: no trial finished; {reason}")
            return 1
        # What is noted of a champion says what it was asked for, and so does what is noted of its
        # publication: where that is less than now, it is chosen again, and published again.
        asked = {"trials": len(rows)}
        asked |= {name: getattr(self.study, name) for name in _CHOICE_SETTINGS}
        summary = self.store.notes().get("champion", {})
        unpruned = self._fits("unpruned", unpruned_fits(self.session.config, rows))
        if choice_budget(summary.get("asked", {})) == choice_budget(asked):
            self.board.say(f"study {self.study.name} is complete: {counted(len(rows), 'trial')}")
        elif not stop():
            summary = select_and_test(self.session, best, self._fits) | {"asked": asked}
            if stop():
                return 130
            self.session.check_lock()
            self.store.note("champion", summary)
        if stop():
            return 130
        if choice_budget(self.store.notes().get("published", {})) != choice_budget(asked):
            self.session.flush_records()  # a champion is published from complete records
            self.session.check_lock()  # no loop has done so meanwhile
            if not stop():
                summary |= self.publish(self.session, summary)
            if stop():  # perhaps before the tracker had all of it: the next call publishes again
                return 130
            if self.session.parent is not None:
                self.session.parent.seal()  # on the disk before Optuna's study notes it
            self.store.note("champion", summary)
            self.store.note("published", asked)
        self.board.print(trials_table(rows, self.session.config))
        self.board.say(pruning_text(rows, finished_results(unpruned)))
        overrides = None if self.again else self.session.overrides
        with refuse_damage(f"what the storage holds of study {self.study.name!r}"):
            self.board.say(champion_text(self.session.config, summary, overrides))
        return 0

    def _fits(self, phase: str, fits: list[Fit]) -> Results:
        run = FitPhase(self.session, phase, self.recorded)
        loop = self._loop(phase, len({fit.key for fit in fits} | set(run.results())))
        return run.run(loop, fits)

    def _loop(self, phase: str, total: int) -> JobLoop:
        show = self.progress.ticker(phase, total)

        def tick(loop: JobLoop) -> None:
            self.session.check_lock()
            self.session.records.outbox.check(self.store.study_id)
            show(loop)

        def refused(reason: str) -> None:
            self.board.say(f"a worker cannot serve this study, which goes on without it: {reason}")

        return JobLoop(self.workers, self.session.stop, tick, refused)

    def _leave(self, state: str) -> None:
        if self.session.lock.is_lost:
            if self.session.parent is not None:
                self.session.parent.leave()
            return
        if not self.session.stop.has_terminal:
            self.board.mute()
        if self.session.parent is not None:
            self.session.parent.end(state)
        if self.session.stop():
            ended = sum(row.is_ended for row in self.store.rows())
            self.board.say(
                f"stopped with {ended} of {counted(self.study.trials, 'trial')}; "
                f"go on with: {self.again or sweep_command(self.session.overrides)}"
            )
        self.store.note("seconds", self.progress.seconds())


def _build_workers(session: StudySession) -> Workers:
    config, store = session.config, session.store
    setup = WorkerSetup(session.lab, config.data, session.data_sha256)
    if config.launcher.name is Launcher.ray:
        from digitlab.workers.ray import RayWorkers  # which imports Ray

        # Workers of this machine are forked from one process: their code is the driver's.
        return RayWorkers(replace(setup, source_digest=training_digest()), config.launcher)
    from digitlab.workers.processes import ProcessWorkers

    count = _count_workers(config, session.board)
    store.note("workers", max(count, store.notes().get("workers", 0)))
    return ProcessWorkers(setup, count)


def _count_workers(config: Config, board: Board) -> int:
    cores = usable_cores()
    most = max(1, cores // config.trainer.threads)
    if config.study.workers > most:
        board.say(
            f"study.workers={config.study.workers} with trainer.threads={config.trainer.threads} "
            f"asks for more threads than the {cores} cores"
        )
    return config.study.workers or min(most, config.study.trials)
