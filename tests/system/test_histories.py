"""Histories of a study that hypothesis makes up, compared with a model of what it must come to."""

import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from enumeration import SENT, Clock, Course, facts, new_lab, stubs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kept import InMemory, OnDisk
from leading import compose_tiny, kind_of
from plain import PlainTracker
from scripted import finished
from stepped import Line, ShakyTracker, SteppedDriver

from digitlab.base.errors import UserError
from digitlab.records import delivery, record
from digitlab.records.outbox import Outbox
from digitlab.study import fingerprint
from digitlab.study.storage import open_storage
from digitlab.workers.base import Decision, Event, Failed, Job, Lost, Rung, Stopped

RETRIES = 1
ENDED = ("finished", "pruned", "failed")


class Model:
    """What a study must come to: what each trial is, and what may have become of it."""

    def __init__(self) -> None:
        self.total = 3
        self.states: list[str] = []  # of the trials: running, waiting, finished, pruned, failed
        self.charged: Counter[int] = Counter()
        self.values: dict[int, Any] = {}  # what each is given, and measured at

    def claim(self) -> int:
        """The trial that an idle worker gets: one that waits, else a new one, while there are."""
        if "waiting" in self.states:
            number = self.states.index("waiting")
            self.states[number] = "running"
            return number
        assert len(self.states) < self.total
        self.states.append("running")
        return len(self.states) - 1

    def end(self, number: int, state: str) -> None:
        self.states[number] = state

    def interrupt(self, number: int, is_charged: bool) -> None:
        """It is run again, unless that was its last attempt."""
        self.charged[number] += is_charged
        is_over = is_charged and self.charged[number] > RETRIES
        self.states[number] = "failed" if is_over else "waiting"

    def restart(self) -> None:
        """Nothing runs what a driver has left, and nothing is charged for it."""
        self.states = ["waiting" if state == "running" else state for state in self.states]

    @property
    def has_champion(self) -> bool:
        return "finished" in self.states


@cache
def template() -> Path:
    """A lab whose databases have their tables, which takes longer than a study in it."""
    lab = new_lab(Path(tempfile.mkdtemp(prefix="digitlab-")) / "lab")
    storage = open_storage(lab)
    storage.remove_session()
    storage.engine.dispose()  # or it would end while the lab is copied
    PlainTracker(lab).database.close()
    return lab


class FusedClock(Clock):
    """Copies the lab at a point that is still to come: this is what a kill there leaves."""

    fuse = 0  # points until then; 0 is never
    left: Path | None = None  # the copy, once it is made

    def __init__(self, course: Course, line: Line, storage: OnDisk) -> None:
        super().__init__(course)
        self.line, self.storage = line, storage
        self.gate = threading.RLock()  # whoever copies holds it: others stop at their next point

    def __call__(self, name: str) -> None:
        with self.gate:
            if self.fuse:
                self.fuse -= 1
                if not self.fuse:
                    self.copy_lab()
        super().__call__(name)

    def copy_lab(self) -> None:
        with self.gate:
            self.fuse = 0
            left = self.lab.with_name(f"{self.lab.name}x")
            # A kill takes a moment, and a copy longer: what another thread has written meanwhile
            # may be in a part of it.
            while not self.is_copied(left):
                self.storage.forget(left)
            self.left = left

    def is_copied(self, left: Path) -> bool:
        before = self.storage.digest(self.lab)
        try:
            self.storage.copy(self.lab, left)
            return self.storage.digest(self.lab) == before
        except (OSError, shutil.Error, RuntimeError):  # something was removed meanwhile
            return False

    def take_left(self) -> Path | None:
        """Return the copy, if there is one, which is whole then."""
        with self.gate:
            left, self.left = self.left, None
            return left

    def opened(self, outbox: Outbox) -> None:
        """Let nobody wait for a tracker that is away: nothing but the test brings it back."""
        flush = outbox.flush

        def flush_while_there(timeout_s: float, stopped: Any = lambda: False) -> int:
            return flush(timeout_s, lambda: stopped() or self.line.is_cut)

        outbox.flush = flush_while_there
        self.outbox = outbox


class Histories(RuleBasedStateMachine):
    """A driver, its workers and its tracker, and what may become of them."""

    count = 0  # of those that came to their end
    storage = OnDisk()

    def __init__(self) -> None:
        super().__init__()
        self.model, self.line, self.stack = Model(), Line(), ExitStack()
        self.driver: SteppedDriver | None = None
        self.numbers: dict[int, int] = {}  # of the trials that workers train
        self.rungs: set[int] = set()  # workers that have passed theirs
        self.doubts: dict[int, str] = {}  # states of trials whose record may be whole
        self.lab = Path(tempfile.mkdtemp(prefix="digitlab-")) / "lab"
        self.storage.copy(template(), self.lab)

    @initialize(workers=st.sampled_from([1, 2]), sent=st.sampled_from(sorted(SENT)))
    def set_up(self, workers: int, sent: str) -> None:
        self.course = Course(workers, sent)
        self.clock = FusedClock(self.course, self.line, self.storage)
        patch = self.stack.enter_context(stubs(self.clock))
        patch.setattr(record, "open_tracker", lambda _, lab: ShakyTracker(lab, self.line))
        patch.setattr(delivery, "_FIRST_WAIT_S", 0.001)
        self.storage.install(patch)
        self.patch = patch

    # What a person does

    @precondition(lambda self: self.driver is None)
    @rule()
    def start(self) -> None:
        before = deepcopy(self.model)
        self.driver = self.call()
        if isinstance(self.driver.outcome, UserError) and "is away" in str(self.driver.outcome):
            self.give_up()
            return
        self.model.restart()
        for number, state in self.doubts.items():
            if self.states_of(self.lab)[number] == state:
                self.model.end(number, state)
        self.settle(before)

    def give_up(self) -> None:
        """Go on after a call that ended because the tracker was away: it may have come some way."""
        assert self.line.is_cut
        self.driver = None
        self.lab = self.clock.take_left() or self.lab
        after = deepcopy(self.model)
        after.restart()
        found = self.states_of(self.lab)
        for number, state in enumerate(found):
            possible = (self.model.states[number], after.states[number], self.doubts.get(number))
            assert state in possible, (number, state, possible)
        self.model.states = found

    def call(self, *overrides: str) -> SteppedDriver:
        more = (f"study.trials={self.model.total}", f"study.retries={RETRIES}", *overrides)
        self.clock.lab = self.lab
        composed = compose_tiny((*self.course.overrides, *more))
        driver = SteppedDriver(composed, self.lab, self.course.workers)
        driver.begin()
        return driver

    @precondition(lambda self: self.driver is None and self.model.states)
    @rule()
    def start_with_another_version(self) -> None:
        """It is refused, and changes nothing."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fingerprint, "training_digest", lambda: "another")
            driver = self.call()
        assert isinstance(driver.outcome, UserError), driver.outcome
        assert self.line.is_cut or "code of training" in str(driver.outcome)
        self.lab = self.clock.take_left() or self.lab
        self.compare()

    @precondition(lambda self: self.driver is None)
    @rule()
    def extend(self) -> None:
        self.model.total += 1

    @precondition(lambda self: self.driver is not None and not self.driver.stop())
    @rule()
    def cancel(self) -> None:
        assert self.driver is not None
        self.driver.stop.count = 1
        self.step()

    @precondition(lambda self: self.driver is not None)
    @rule()
    def kill(self) -> None:
        self.clock.copy_lab()
        self.settle(deepcopy(self.model))

    @rule(points=st.integers(1, 12))
    def kill_after(self, points: int) -> None:
        self.clock.fuse = points

    # What becomes of the tracker

    @rule(writes=st.integers(0, 6), is_answered=st.booleans())
    def lose_the_tracker(self, writes: int, is_answered: bool) -> None:
        # Without a driver: as it starts it waits for the answer that creates the study's run.
        self.line.left = writes if self.driver else 0
        self.line.is_answered = is_answered

    @rule()
    def restore_the_tracker(self) -> None:
        self.line.restore()

    # What workers report

    def busy(self, is_trial: bool | None = None) -> list[int]:
        """Return the workers that train, a trial or something else, and are not to stop."""
        if self.driver is None:
            return []
        workers = self.driver.workers
        stopped = {n for n, answer in workers.decisions.items() if answer is Decision.stop}
        jobs = [n for n, job in workers.jobs.items() if job is not None and n not in stopped]
        return [n for n in jobs if is_trial is None or (n in self.numbers) == is_trial]

    def stopping(self) -> list[int]:
        assert self.driver is not None
        workers = self.driver.workers
        stopped = {n for n, answer in workers.decisions.items() if answer is Decision.stop}
        return sorted(stopped | workers.cancelled)

    @precondition(lambda self: set(self.busy(True)) - self.rungs)
    @rule(accuracy=st.integers(10, 99), which=st.integers(0, 1))
    def pass_a_rung(self, accuracy: int, which: int) -> None:
        waiting = sorted(set(self.busy(True)) - self.rungs)
        worker = waiting[which % len(waiting)]
        assert self.driver is not None
        job = self.driver.workers.jobs[worker]
        self.rungs.add(worker)
        if job is not None and job.rungs:
            self.step((worker, Rung(0, accuracy / 100)))

    @precondition(lambda self: self.busy())
    @rule(accuracy=st.integers(10, 99), which=st.integers(0, 1))
    def finish(self, accuracy: int, which: int) -> None:
        worker = self.busy()[which % len(self.busy())]
        assert self.driver is not None
        job = self.driver.workers.jobs[worker]
        assert job is not None
        number = self.numbers.get(worker)
        before = deepcopy(self.model)
        if number is not None:
            self.model.end(number, "finished")
            self.model.values[number, "finished"] = accuracy / 100
        self.step((worker, finished(job, accuracy / 100)), before=before)

    @precondition(lambda self: self.driver is not None and self.stopping())
    @rule(which=st.integers(0, 1))
    def obey(self, which: int) -> None:
        assert self.driver is not None
        worker = self.stopping()[which % len(self.stopping())]
        number, before = self.numbers.get(worker), deepcopy(self.model)
        is_pruned = self.driver.workers.decisions.get(worker) is Decision.stop
        if number is not None and is_pruned:
            self.model.end(number, "pruned")
        elif number is not None:
            self.model.interrupt(number, is_charged=False)
        self.step((worker, Stopped()), before=before)

    @precondition(lambda self: self.busy(True))
    @rule(is_final=st.booleans(), which=st.integers(0, 1))
    def fail(self, is_final: bool, which: int) -> None:
        worker = self.busy(True)[which % len(self.busy(True))]
        number, before = self.numbers[worker], deepcopy(self.model)
        self.model.interrupt(number, is_charged=True)
        if is_final:
            self.model.end(number, "failed")
        self.step((worker, Failed("it failed", is_final)), before=before)

    @precondition(lambda self: self.busy())
    @rule(is_charged=st.booleans(), which=st.integers(0, 1))
    def lose(self, is_charged: bool, which: int) -> None:
        worker = self.busy()[which % len(self.busy())]
        number, before = self.numbers.get(worker), deepcopy(self.model)
        assert self.driver is not None
        is_charged = is_charged and number is not None and not self.driver.stop()
        if number is not None:
            self.model.interrupt(number, is_charged)
        self.step((worker, Lost("it was lost", is_charged)), before=before)

    # What follows of it

    def step(self, *events: tuple[int, Event], before: Model | None = None) -> None:
        assert self.driver is not None
        for worker, event in events:
            if not isinstance(event, Rung):
                self.rungs.discard(worker)
                self.numbers.pop(worker, None)
        before = before or deepcopy(self.model)
        self.driver.step(*events)
        self.settle(before)

    def settle(self, before: Model) -> None:
        """See what the driver has made of it, and go on without it if it was killed meanwhile."""
        assert self.driver is not None
        left = self.clock.take_left()
        if left is not None:
            self.bury(left, before)
            return
        self.doubts.clear()
        for worker, job in self.driver.workers.jobs.items():
            if job is not None and worker not in self.numbers and kind_of(job) == "trial":
                self.numbers[worker] = self.claim(job)
        if not self.driver.is_waiting:
            self.check_outcome(self.driver)
            self.driver = None
        self.compare()

    def claim(self, job: Job) -> int:
        number = self.model.claim()
        given = (job.config.model.hidden, job.config.optim.learning_rate)
        assert self.model.values.setdefault(number, given) == given
        return number

    def check_outcome(self, driver: SteppedDriver) -> None:
        if driver.stop():
            assert driver.outcome == 130
        elif isinstance(driver.outcome, UserError):
            assert self.line.is_cut, driver.outcome
        else:
            assert driver.outcome == (0 if self.model.has_champion else 1), driver.outcome
            assert len(self.model.states) == self.model.total
            assert set(self.model.states) <= set(ENDED)

    def bury(self, left: Path, before: Model) -> None:
        """Go on with what a kill has left: each trial as it was before the last event or after."""
        assert self.driver is not None
        after, states = self.model, self.states_of(left)
        self.driver.kill()
        self.driver, self.lab = None, left
        self.numbers.clear()
        self.rungs.clear()
        assert len(before.states) <= len(states) <= self.model.total
        for number, state in enumerate(states):
            known = [model.states[number : number + 1] for model in (before, after)]
            possible = {one for found in known for one in found} or {"running"}
            if {"running", "waiting"} & possible:
                possible |= {"running", "waiting"}
            possible |= {self.doubts.get(number, state)} & set(ENDED)
            assert state in possible, (number, state, possible)
            if number < len(after.states) and state == "running" and after.states[number] in ENDED:
                self.doubts[number] = after.states[number]
        charged = self.charges_of(self.lab)
        for number in (n for n, state in enumerate(states) if state not in ENDED):
            known = (before.charged[number], after.charged[number])
            assert charged.get(number, 0) in known, (number, charged, known)
        after.states, after.charged = states, Counter(charged)

    def compare(self) -> None:
        assert self.states_of(self.lab) == self.model.states

    def teardown(self) -> None:
        """Whatever has happened, the study can be brought to its end, and its books are whole."""
        try:
            self.line.restore()
            self.clock.fuse = 0
            self.go_on()
            while self.driver is not None:
                if self.driver.workers.cancelled or not self.busy():
                    self.obey(0)
                else:
                    self.finish(90, 0)
                self.go_on()
            self.check_books()
            Histories.count += 1
        finally:
            self.stack.close()
            self.storage.forget(self.lab.parent)

    def go_on(self) -> None:
        """Start again what was stopped or killed; a study that is complete ends at once."""
        if self.driver is None:
            self.start()

    def states_of(self, lab: Path) -> list[str]:
        """Return the states of the trials, as they stand in the storage."""
        names = {"COMPLETE": "finished", "FAIL": "failed"}
        return [names.get(state, state.lower()) for state, _ in self.storage.trials(lab)]

    def charges_of(self, lab: Path) -> dict[int, int]:
        """Return how many attempts are charged to each trial that was run again."""
        results = enumerate(result for _, result in self.storage.trials(lab))
        return {number: result.get("charged", 0) for number, result in results if result}

    def check_books(self) -> None:
        found = facts(self.lab, self.model.has_champion)
        assert [state for _, state, _, _ in found["trials"]] == self.model.states
        for number, state, value, values in found["trials"]:
            given = (values["model.hidden"], values["optim.learning_rate"])
            assert given == self.model.values[number]
            if state == "finished":
                assert value == self.model.values[number, "finished"]


class HistoriesInMemory(Histories):
    """The same; Optuna's part of a kill's leavings is a copy of its storage in memory."""

    storage = InMemory()


def run_histories(machine: type[Histories], count: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    few = settings(
        max_examples=count, stateful_step_count=25, deadline=None, suppress_health_check=checks
    )
    run_state_machine_as_test(machine, settings=few)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_comes_to_what_the_model_does() -> None:
    run_histories(Histories, 20)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Histories, HistoriesInMemory])
def test_a_call_may_begin_with_the_last_answer_of_a_tracker(machine: type[Histories]) -> None:
    history = machine()
    history.set_up(workers=2, sent="sealed")
    history.start()
    history.cancel()
    history.finish(accuracy=10, which=0)
    history.lose_the_tracker(is_answered=False, writes=6)
    history.finish(accuracy=10, which=0)
    history.start()
    history.teardown()


@pytest.mark.exhaustive
@pytest.mark.timeout(36000)
@pytest.mark.parametrize("part", range(100))
def test_ten_thousand_histories(part: int, record_property: Callable[[str, object], None]) -> None:
    """Each part begins with other histories, as `--hypothesis-seed` numbers them."""
    before = Histories.count
    run_histories(HistoriesInMemory if part % 10 else Histories, 100)
    record_property("histories", Histories.count - before)
