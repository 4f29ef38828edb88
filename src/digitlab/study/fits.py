"""Fits beside the trials: candidates on new seeds, pruned trials to their end, the champion."""

from collections.abc import Mapping
from typing import Any

import safetensors.numpy

from digitlab.base.choice import note_predictions
from digitlab.study.champion import Fit, Results
from digitlab.study.loop import Ending, JobLoop, Task
from digitlab.study.session import StudySession
from digitlab.study.settle import SealedFits
from digitlab.workers.base import Job


class FitPhase:
    """Runs the fits of one phase, each once over all calls of the study."""

    def __init__(self, session: StudySession, phase: str, sealed: SealedFits) -> None:
        """Create a phase that has run nothing yet.

        Args:
            phase: confirm, final or unpruned; the name of its results in the study's notes.
            sealed: what earlier calls have recorded.
        """
        self.session, self.store, self.phase, self.sealed = session, session.store, phase, sealed
        self.charged: dict[str, int] = {}  # failed attempts of this call

    def results(self) -> Results:
        noted: Results = self.store.notes().get(self.phase, {})
        return noted

    def run(self, loop: JobLoop, fits: list[Fit]) -> Results:
        """Return the results of the fits: from the notes, from sealed records, or trained now."""
        todo = [fit for fit in fits if fit.key not in self.results()]
        waiting = [fit for fit in todo if not self._is_recorded(fit)]

        def ended(task: Task, ending: Ending) -> None:
            if not self._is_over(task, ending):
                waiting.append(task.about)

        if waiting:
            loop.run(lambda: self._task(waiting.pop(0)) if waiting else None, ended)
        return {fit.key: self.results()[fit.key] for fit in fits if fit.key in self.results()}

    def _is_recorded(self, fit: Fit) -> bool:
        """Note the result of a fit whose record a killed call has sealed."""
        metrics = self.sealed.get((fit.kind, str(fit.number), str(fit.seed)))
        if metrics is not None:
            self._note(fit, metrics)
        return metrics is not None

    def _task(self, fit: Fit) -> Task:
        attempt = 1 + self.charged.get(fit.key, 0)
        recorder = self.session.recorder(fit.kind, fit.number, fit.config, attempt, fit.seed)
        title = f"{fit.kind} {fit.number} seed {fit.seed}"
        return Task(title, Job(fit.config), recorder, about=fit)

    def _is_over(self, task: Task, ending: Ending) -> bool:
        """Note how a fit ended; return whether it is over for good.

        One that would fail again is noted as failed: the study goes on without it.
        """
        fit: Fit = task.about
        if ending.state == "finished":
            found = safetensors.numpy.load(task.files["predictions.safetensors"])
            self._note(fit, task.metrics | note_predictions(found["predictions"], found["labels"]))
            return True
        self.charged[fit.key] = self.charged.get(fit.key, 0) + ending.is_charged
        retries = self.session.config.study.retries
        if ending.is_final or self.charged[fit.key] > retries:
            task.recorder.end("failed", ending.reason)
            self._note(fit, {"failed": ending.reason})
            self.session.board.say(f"{task.title} failed: {ending.reason}")
            return True
        task.recorder.end(ending.state, ending.reason)
        if not self.session.stop():
            self.session.board.say(f"{task.title} is repeated: {ending.reason}")
        return bool(self.session.stop())

    def _note(self, fit: Fit, metrics: Mapping[str, Any]) -> None:
        self.store.note(self.phase, self.results() | {fit.key: dict(metrics)})
