"""Fits beside the trials: candidates on new seeds, pruned trials to their end, the champion."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import safetensors.numpy

from digitlab.base.choice import note_predictions
from digitlab.study.champion import Fit, Results
from digitlab.study.loop import Ending, JobLoop, Task
from digitlab.study.session import StudySession
from digitlab.study.settle import RecordedFits
from digitlab.workers.base import Job


class FitPhase:
    """Runs the fits of one phase, each once over all calls of the study."""

    def __init__(self, session: StudySession, phase: str, recorded: RecordedFits) -> None:
        """Create a phase that has run nothing yet.

        Args:
            phase: confirm, measure, final or unpruned; its results stand in the study's notes.
            recorded: what earlier calls have recorded; the attempts of this one are added.
        """
        self.session, self.store = session, session.store
        self.phase, self.recorded = phase, recorded
        self.charged: Counter[str] = Counter()  # failed attempts of this call, by a fit's key

    def results(self) -> Results:
        noted: Results = self.store.notes().get(self.phase, {})
        return noted

    def run(self, loop: JobLoop, fits: list[Fit]) -> Results:
        """Return the results of the fits: from the notes, from sealed records, or trained now."""
        waiting = []
        for fit in fits:
            sealed = self.recorded.results.get(fit.tags)  # by a call that was killed
            if fit.key in self.results():
                continue
            if sealed is None:
                waiting.append(fit)
            else:
                self._note(fit, sealed)

        def ended(task: Task, ending: Ending) -> None:
            if not self._note_ending(task, ending):
                waiting.append(task.about)

        if waiting:
            loop.run(lambda: self._task(waiting.pop(0)) if waiting else None, ended)
        return {fit.key: self.results()[fit.key] for fit in fits if fit.key in self.results()}

    def _task(self, fit: Fit) -> Task:
        self.recorded.attempts[fit.tags] += 1
        attempt = self.recorded.attempts[fit.tags]
        recorder = self.session.start_record(fit.kind, fit.number, fit.config, attempt, fit.seed)
        title = f"{fit.kind} {fit.number} seed {fit.seed}"
        job = Job(fit.config, checkpoint=recorder.checkpoints.latest())
        return Task(title, job, recorder, about=fit)

    def _note_ending(self, task: Task, ending: Ending) -> bool:
        """Note how a fit ended; return whether this call is done with it.

        One that would fail again is noted as failed: the study goes on without it.
        """
        fit: Fit = task.about
        if ending.state == "finished":
            found = safetensors.numpy.load(task.files["predictions.safetensors"])
            self._note(fit, task.metrics | note_predictions(found["predictions"], found["labels"]))
            return True
        self.charged[fit.key] += ending.is_charged
        retries = self.session.config.study.retries
        if ending.is_final or self.charged[fit.key] > retries:
            task.recorder.end("failed", ending.reason)
            self._note(fit, {"failed": ending.reason})
            self.session.board.say(f"{task.title} failed: {ending.reason}")
            return True
        tags = {"digitlab.superseded_by": f"attempt {self.recorded.attempts[fit.tags] + 1}"}
        task.recorder.end(ending.state, ending.reason, tags=tags)
        if not self.session.stop():
            self.session.board.say(f"{task.title} is repeated: {ending.reason}")
        return bool(self.session.stop())

    def _note(self, fit: Fit, metrics: Mapping[str, Any]) -> None:
        self.store.note(self.phase, self.results() | {fit.key: dict(metrics)})
