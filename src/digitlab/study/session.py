"""An open study: what the driver holds while it leads one, and how it is opened."""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import TrialState

from digitlab.base.console import Board
from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError, counted, nearest, refuse_damage
from digitlab.base.server import LeaderLock
from digitlab.base.stop import StopSignal
from digitlab.config.compose import Composed
from digitlab.config.types import Config, TrackerName
from digitlab.data.datasets import TRAIN, load_digits, require_images, stratified_split
from digitlab.records.record import Identity, Records, RunRecorder, open_records, trial_tags
from digitlab.records.spool import RunSpool
from digitlab.records.views import view_tags
from digitlab.study.fingerprint import check_fingerprint
from digitlab.study.samplers import searched_space
from digitlab.study.storage import (
    leader_lock,
    listed_studies,
    open_storage,
    refuse_deleted,
    study_names,
    study_notes,
)
from digitlab.study.summary import describe_study
from digitlab.study.trials import TrialStore, is_own

# How much is trained to choose, measure and test a champion: what a study says of it rests on that.
GROWING = ("confirm", "confirm_fits", "measure_seeds", "final_seeds")

_DELIVERY_S = 300.0  # to wait for a tracker whose answer is needed before the study can go on
_SILENT_S = 5.0  # during which nothing is printed
_CREATION_S = 60.0  # for the study's own run
_POLL_S = 0.2


@dataclass
class StudySession:
    """An open study that this process leads."""

    config: Config
    overrides: tuple[str, ...]
    lab: Path
    store: TrialStore
    records: Records
    lock: LeaderLock
    board: Board
    stop: StopSignal
    data_sha256: dict[str, str]
    environment: dict[str, Any]
    leader: str = field(default_factory=lambda: uuid.uuid4().hex)  # this process, as one that leads
    # The study's own run; None where nothing is recorded.
    parent: RunSpool | None = None
    parent_run_id: str | None = None

    def start_record(
        self,
        kind: str,
        number: int,
        config: Config,
        attempt: int = 1,
        seed: int | None = None,
        tags: Mapping[str, str] = {},
    ) -> RunRecorder:
        """Start the record of a trial's run, or of a fit that came of a trial."""
        study = self.config.study.name
        name = f"{study}-{number}" if kind == "trial" else f"{study}-{kind}-{number}-{seed}"
        whole = trial_tags(self.store.study_id, study, number, attempt) | dict(tags)
        if seed is not None:
            whole["digitlab.seed"] = str(seed)
        return RunRecorder(self.records.outbox, config, self.identity(kind, name, whole))

    def identity(self, kind: str, name: str, tags: Mapping[str, str]) -> Identity:
        return Identity(name, kind, tags, self.parent_run_id, self.overrides, self.environment)

    def check_lock(self) -> None:
        """Make sure that this process leads the study, also after a server's restart.

        Raises:
            UserError: another process leads it, or has led it while the lock was lost.
        """
        is_new = self.lock.check(self.stop)
        if is_new and self.store.mirror.stored_attribute("leader") != self.leader:
            self.lock.is_lost = True
            raise UserError(
                f"study.name={self.config.study.name} is no longer led by this process: its server "
                "was away, and another process has gone on with it. Leave it to that one."
            )

    def flush_leftovers(self) -> None:
        """Send all that earlier calls have left of this study, or wait for who sends it.

        Raises:
            UserError: as `flush_records`; or another process of the lab still sends some of them.
        """
        deadline = time.monotonic() + _DELIVERY_S
        while not self.stop():
            for line in self.records.outbox.adopt():
                self.board.say(line)
            self.flush_records()
            left = self.records.outbox.held_elsewhere(self.store.study_id)
            if not left:
                return
            if time.monotonic() > deadline:
                raise UserError(
                    f"study {self.config.study.name}: {left} of its records are still sent by "
                    "another process of this lab, which took them over. Wait for it, or stop it."
                )
            time.sleep(_POLL_S)

    def flush_records(self) -> None:
        """Wait until the tracker has every record, as long as an outage may take.

        Raises:
            UserError: the tracker is still away, or has refused a record.
        """
        pending = self.records.outbox.flush(_SILENT_S, self.stop)
        if pending and not self.stop():
            self.board.say(
                f"waiting for the tracker, which has yet to take {counted(pending, 'record')}"
            )
            pending = self.records.outbox.flush(_DELIVERY_S, self.stop)
        self.records.outbox.check(self.store.study_id)
        if pending and not self.stop():
            why = self.records.outbox.problem.rstrip(".") or "the tracker is slow"
            raise UserError(
                f"{counted(pending, 'record')} still in {self.lab / 'outbox'}: the champion must "
                f"be chosen from complete records ({why}). Try again with the same command."
            )


@contextmanager
def open_session(
    composed: Composed, lab: Path, board: Board, stop: StopSignal
) -> Iterator[StudySession]:
    """Open a study to lead it, and create it where it does not exist.

    Raises:
        UserError: another process leads it, its name belongs to another study, it was created
            with other settings, or its stores cannot be used.
    """
    config = composed.config
    name, data = config.study.name, config.data
    storage = open_storage(lab, config.study.storage)
    with open_records(config, lab) as records, leader_lock(storage, lab, name) as lock:
        digits = load_digits(lab, data.name, TRAIN, data.allow_unknown)
        rest, _ = stratified_split(digits.labels, data.validation_images, data.split_seed)
        searched = {one.name: one.extremes() for one in searched_space(config)}
        for images in searched.get("data.images", [data.images]):
            require_images(images, len(rest))
        study_id = None
        if name in study_names(storage):
            notes = study_notes(storage, name)
            refuse_deleted(name, notes)
            study_id = notes.get("study_id")
            if study_id is None and storage.get_n_trials(storage.get_study_id_from_name(name)):
                raise UserError(
                    f"study.name={name} is taken: the storage holds another program's study of "
                    "that name, with trials. Start yours with study.name=NEW."
                )
            _refuse_source(config, storage, notes)
            config = _as_large_as_before(config, storage, board.say)
        else:
            _refuse_source(config, storage, {})
        _refuse_foreign_runs(records, name, study_id)
        store = TrialStore(storage, config, stop)
        check_fingerprint(store, config, digits.sha256, records.tracker.identity)
        store.note("overrides", list(composed.overrides))
        session = StudySession(
            config, composed.overrides, lab, store, records, lock, board, stop, digits.sha256,
            describe_environment(),
        )  # fmt: skip
        store.note("leader", session.leader)
        session.flush_leftovers()
        _open_parent_run(session)
        yield session


def choice_budget(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a choice as they count: where there is no fit, none is confirmed."""
    return {**asked, **({} if asked.get("confirm_fits") else {"confirm": 1})} if asked else {}


def _as_large_as_before(config: Config, storage: RDBStorage, say: Callable[[str], None]) -> Config:
    """Return the configuration with the totals that a study has reached, where it asks for less.

    Its trials are there, and what was said of its champion is known: chosen again by fewer fits,
    it would be another statement that shows less, picked after the first one was read. So the
    choice is made again by the same rule from its beginning, never with a smaller budget.
    """
    study, name = config.study, config.study.name
    notes = study_notes(storage, name)
    states = [state for state in TrialState if study.count_failed or state != TrialState.FAIL]
    count = storage.get_n_trials(storage.get_study_id_from_name(name), tuple(states))
    if count > study.trials:
        say(
            f"study {name} has {counted(count, 'trial')} already: study.trials={study.trials} "
            f"removes none of them, and it goes on with {count}"
        )
    with refuse_damage(f"what the storage holds of study {name!r}"):
        asked = notes.get("champion", {}).get("asked", {})
        then = choice_budget({key: int(asked[key]) for key in GROWING if asked})
    now = choice_budget({key: int(getattr(study, key)) for key in GROWING})
    kept = {key: value for key, value in then.items() if value > now[key]}
    if lower := [key for key in kept if kept[key] > getattr(study, key)]:
        more = ", ".join(f"study.{key}={kept[key]}" for key in lower)
        less = ", ".join(f"study.{key}={getattr(study, key)}" for key in lower)
        say(
            f"study {name} keeps {more}, by which its champion was chosen: a later call cannot "
            f"lower that to {less}; a new study can (study.name=NEW)"
        )
    grown: dict[str, Any] = kept | {"trials": max(count, study.trials)}
    return replace(config, study=replace(study, **grown))


def _refuse_source(config: Config, storage: RDBStorage, notes: Mapping[str, Any]) -> None:
    """Refuse a study.fork_from that names no study, or another one than that of an earlier call."""
    other, before = config.study.fork_from, notes.get("forked")
    if other is None or other == before:
        return
    if before:
        raise UserError(
            f"study.fork_from={other} is invalid: study {config.study.name} has taken over trials "
            f"of {before}, and may do so of one study alone. Leave it out, or start a new study "
            "with study.name=NEW."
        )
    if other not in study_names(storage):
        known = [name for name in listed_studies(storage) if name != config.study.name]
        raise UserError(
            f"study.fork_from={other} does not exist: it must be a study in the same storage; "
            f"{nearest(other, known)}"
        )
    source = study_notes(storage, other)
    refuse_deleted(other, source)
    if not is_own(source):
        raise UserError(
            f"study.fork_from={other} is invalid: it must be a study of this program that has "
            "started. Name another one."
        )


def _refuse_foreign_runs(records: Records, name: str, study_id: str | None) -> None:
    """Refuse a name under which the tracker holds another study: names are shown to people."""
    runs = records.tracker.find({"digitlab.study": name, "digitlab.kind": "study"})
    foreign = [run for run in runs if run.tags.get("digitlab.study_id") != study_id]
    if foreign:
        raise UserError(
            f"study.name={name} is taken: this tracker holds the runs of another study of that "
            f"name (run {foreign[-1].run_id}). Start yours with study.name=NEW; if that one is "
            "yours, give it its name back in Optuna, or restore the optuna.db that it was kept in."
        )
    if records.tracker.owner_of(name) not in (None, study_id):
        raise UserError(
            f"study.name={name} is taken: this tracker has a registered model of that name, which "
            "is not of this study. Start yours with study.name=NEW."
        )


def _open_parent_run(session: StudySession) -> None:
    """Open the study's own run: created by the first call, reopened by the others."""
    if session.config.tracking.name is TrackerName.none:
        return
    records, store, name = session.records, session.store, session.config.study.name
    known = store.notes().get("run_id")
    mine = {"digitlab.study_id": store.study_id, "digitlab.kind": "study"}
    if known is None:  # or a call that was killed has created it and not noted it
        known = next((run.run_id for run in records.tracker.find(mine)), None)
    if known is None:
        records.tracker.set_experiment_tags(view_tags(session.config.study))
        note = describe_study(session.config, session.overrides)
        tags = mine | {"digitlab.study": name, "mlflow.note.content": note}
        identity = session.identity("study", name, tags)
        session.parent = RunRecorder(records.outbox, session.config, identity).spool
        session.parent.seal()  # it is never made again: before the tracker has a part of it
        known = session.parent.run_id(_CREATION_S)
        if known is None:
            raise UserError(
                f"study {name}: the tracker did not create its run within {_CREATION_S:g} s. "
                "Every run of a study belongs to it: go on when the tracker answers."
            )
    elif records.tracker.is_deleted(known):
        raise UserError(
            f"study {name}: its own run {known} was deleted in the tracker, and its trials belong "
            f"to it. Restore it with `{records.tracker.command} runs restore --run-id {known}`, or "
            "start a new study with study.name=NEW."
        )
    else:
        session.parent = records.outbox.resume_run(known, store.study_id)
        session.parent.end("running")
    session.parent_run_id = known
    store.note("run_id", known)
