"""The trials of a study: drawn, trained, pruned, retried, until there are enough."""

from collections.abc import Callable, Sequence
from typing import Any

from digitlab.base.errors import UserError, counted
from digitlab.base.usage import MACHINE_METRICS
from digitlab.config.recorded import with_values
from digitlab.config.types import Config, Pruner, StudyConfig
from digitlab.study.fingerprint import fitting_trials
from digitlab.study.goal import Goal, TrialRow
from digitlab.study.loop import Ending, JobLoop, Task
from digitlab.study.samplers import HalvingPruner
from digitlab.study.session import StudySession
from digitlab.study.settle import trial_value
from digitlab.study.trials import TrialStore, is_screening, load_study, twin
from digitlab.workers.base import Job


class TrialSearch:
    """Gives the loop one trial after the other, and writes down how each ended."""

    def __init__(
        self,
        session: StudySession,
        seconds: Callable[[], float],
        given: Sequence[TrialRow] = (),
    ) -> None:
        """Args: seconds: spent on the study so far, in all calls; `given`: as `sweep`'s."""
        self.given = {row.number: row for row in given}
        self.session, self.store, self.seconds = session, session.store, seconds
        self.study, self._say = session.config.study, session.board.say

    def run(self, loop: JobLoop) -> None:
        self._insert_given()
        rows = self.store.rows()
        ended = sum(row.is_ended for row in rows)
        total, name = self.study.trials, self.study.name
        if not ended:
            self._say(_plan_text(self.study))
            if self.store.own not in self.store.begin:
                self._say(f"the recipe's own values are not in the space: {self.store.own}")
        is_open = not self.store.is_full(total) or any(not row.is_ended for row in rows)
        if ended and is_open:
            self._say(f"study {name}: going on from {ended} of {counted(total, 'trial')}")
        if is_open and not self._is_exhausted():
            loop.run(self._next_task, self._ended)

    def _is_exhausted(self) -> bool:
        """Whether the study's limits of time or patience let no further trial start."""
        minutes, patience = self.study.minutes, self.study.patience
        late = bool(minutes) and self.seconds() > 60 * minutes
        return late or (bool(patience) and _since_best(self.store) >= patience)

    def _insert_given(self) -> None:
        """Insert the trials that are given whose numbers come next; no run is recorded of them."""
        while row := self.given.get(len(self.store.rows())):
            self.store.add(row.values, row.value or 0.0, row.notes)

    def _next_task(self) -> Task | None:
        while True:
            self._insert_given()
            if self._is_exhausted():
                return None
            self._refuse_failing_space()
            row = self.store.take_waiting()
            if row is None:
                if self.store.is_full(self.study.trials) or is_screening(self.store):
                    return None
                row = self.store.ask()
            task = self._task(row)
            if task is not None:
                return task

    def _refuse_failing_space(self) -> None:
        """Stop a study whose failures do not count: it could make failed trials without end."""
        failed = [row for row in self.store.rows() if row.state == "failed"]
        if not self.study.count_failed and len(failed) >= self.study.trials:
            raise UserError(
                f"study {self.study.name}: {counted(len(failed), 'trial')} failed, the last: "
                f"{failed[-1].notes.get('reason')}. A study that does not count failures ends "
                "after study.trials of them: narrow study.space."
            )

    def _task(self, row: TrialRow) -> Task | None:
        """Return the task of a trial; None where it ended without any training."""
        try:
            config = with_values(self.session.config, row.values)
        except UserError as error:  # the values contradict each other
            config = self.session.config
            recorder = self.session.start_record("trial", row.number, config, row.attempt)
            recorder.end("failed", str(error))
            self._tell(row, "failed", {"reason": str(error)})
            return None
        if same := twin(self.store, row):
            notes = {"metrics": same.notes.get("metrics", {}), "taken_from": str(same.number)}
            _record_taken(self.session, row.number, row.attempt, config, notes)
            self._tell(row, "finished", notes)
            return None
        rungs = tuple(self.study.rungs if self.study.pruner is not Pruner.none else ())

        def should_prune(rung: int, accuracy: float) -> bool:
            is_pruned = self.store.report(row.number, rung, accuracy)
            return is_pruned and row.values != self.store.own  # which the search is compared with

        recorder = self.session.start_record("trial", row.number, config, row.attempt)
        return Task(
            f"trial {row.number}",
            Job(config, rungs, checkpoint=recorder.checkpoints.latest()),
            recorder,
            should_prune,
            time_limit_s=60 * self.study.trial_minutes,
            about=row,
        )

    def _ended(self, task: Task, ending: Ending) -> None:
        row: TrialRow = task.about
        notes: dict[str, Any] = {"metrics": task.metrics, "curve": task.curve}
        notes |= {"reason": ending.reason} if ending.reason else {}
        if ending.state == "finished":
            self._tell(row, "finished", notes)
            return
        charged = int(row.notes.get("charged", 0)) + ending.is_charged
        is_final = ending.is_final or (ending.is_charged and charged > self.study.retries)
        state = "failed" if is_final and ending.state == "interrupted" else ending.state
        seconds = {"seconds": task.metrics["seconds"]}
        if is_final:
            task.recorder.end(state, ending.reason, seconds)
            self._tell(row, state, notes)
            return
        tags = {"digitlab.superseded_by": f"attempt {row.attempt + 1}"}
        task.recorder.end(ending.state, ending.reason, seconds, tags)
        self.store.requeue(row.number, ending.is_charged, ending.reason)
        if not self.session.stop():
            self._say(f"trial {row.number} requeued: {ending.reason}")

    def _tell(self, row: TrialRow, state: str, notes: dict[str, Any]) -> None:
        value = trial_value(state, notes.get("metrics", {}))
        self.store.tell(row.number, state, value, notes)
        if state == "failed":
            self._say(f"trial {row.number} failed: {notes.get('reason')}")
        elif self.session.board.live is None and value is not None:
            rung = notes["metrics"].get("rung")
            more = _at_rung(self.store, row.number, rung) if state == "pruned" and rung else ""
            self._say(f"trial {row.number} {state}{':' * bool(more)} {value:.2%}{more}")

    def fork(self) -> None:
        """Take over the finished trials of another study that fit this one, once."""
        other = self.study.fork_from
        if other is None or self.store.notes().get("forked") == other:
            return
        source, source_config = load_study(self.session.lab, other, self.study.storage)
        done = {row.notes.get("taken_from") for row in self.store.rows()}
        # A call that was killed may have recorded one more than it has inserted.
        own = {"digitlab.study_id": self.store.study_id, "digitlab.kind": "trial"}
        recorded = {run.tags["digitlab.trial"] for run in self.session.records.tracker.find(own)}
        fitting = fitting_trials(self.store, self.session.config, source, source_config)
        new = [trial for trial in fitting if trial.notes["taken_from"] not in done]
        while new and not self.store.is_full(self.study.trials):
            trial, number = new.pop(0), len(self.store.rows())
            config = with_values(self.session.config, trial.values)
            if str(number) not in recorded:
                _record_taken(self.session, number, 1, config, trial.notes)
            self.store.add(trial.values, trial.value or 0.0, trial.notes)
        total, taken = self.study.trials, len(fitting) - len(new)
        if taken or not new:  # else it has not happened, and can as soon as there is room
            self.store.note("forked", other)
        more = f"; {len(new)} more fit, for which study.trials={total} has no room" if new else ""
        self._say(f"{counted(taken, 'trial')} taken over from study {other}{more}")


def _record_taken(
    session: StudySession, number: int, attempt: int, config: Config, notes: dict[str, Any]
) -> None:
    """Record a trial whose result was not trained, but taken from an equal one."""
    tags = {"digitlab.taken_from": notes["taken_from"]}
    if notes.get("made_by"):  # other code, or other versions of libraries
        tags["digitlab.made_by"] = "; ".join(notes["made_by"])
    recorder = session.start_record("trial", number, config, attempt, tags=tags)
    metrics = {k: v for k, v in notes["metrics"].items() if k not in MACHINE_METRICS}
    recorder.end("finished", metrics=metrics)


def _plan_text(study: StudyConfig) -> str:
    text = f"study {study.name}: {counted(study.trials, 'trial')} over {', '.join(study.space)}"
    if (goal := Goal.of(study)).has_cost or goal.require:
        text += f", for {goal.aim()}"
    if study.pruner is Pruner.screening:
        text += (
            f"; the first {study.trials - study.finish} end at {study.rungs[0]:g} of their "
            f"schedule, but for the recipe's own values, then the best {study.finish} of them are "
            "trained again to the end"
        )
    return text


def _at_rung(store: TrialStore, number: int, rung: float) -> str:
    """Return where a trial was pruned, and the best there of those that it competes with."""
    text, pruner = f" at {rung:g} of its steps", store.pruner
    if isinstance(pruner, HalvingPruner):
        place = store.config.rungs.index(rung)
        best = max(pruner.others(store.study, number, place), default=None)
        text += "" if best is None else f" (best so far there: {best:.2%})"
    return text


def _since_best(store: TrialStore) -> int:
    """Return how many trials have ended since the best one, itself not counted."""
    rows, goal = store.rows(), store.goal
    best = goal.front(rows)[-1:] if goal.is_front else goal.best_first(rows)[:1]
    return sum(row.is_ended and row.number > one.number for one in best for row in rows)
