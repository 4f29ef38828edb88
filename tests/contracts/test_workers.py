"""What every implementation of Workers does, and what each does alone."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import worker_faults
from conftest import DATA, SHARE
from parts import RayCluster, free_port

from digitlab.base import faults
from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.config.compose import compose
from digitlab.config.types import Config
from digitlab.data.datasets import TRAIN, load_digits
from digitlab.training.fit import fit
from digitlab.training.observer import TrainingObserver
from digitlab.training.outputs import output_files
from digitlab.workers.base import (
    Checkpoint,
    Decision,
    End,
    Epoch,
    Event,
    Failed,
    Finished,
    Job,
    Lost,
    Pool,
    Progress,
    Ready,
    Rung,
    Snapshot,
    Started,
    Stopped,
    WorkerSetup,
)
from digitlab.workers.inline import InlineWorkers
from digitlab.workers.processes import ProcessWorkers

pytestmark = pytest.mark.timeout(300)
WAIT_S = 90.0  # for an event that must come: only a failing test takes so long

inline = pytest.param("inline")
processes = pytest.param("processes")
ray = pytest.param("ray", marks=pytest.mark.cluster)
every_kind = pytest.mark.parametrize("kind", [inline, processes, ray])
that_can_die = pytest.mark.parametrize("kind", [processes, ray])

Make = Callable[..., Pool]


def tiny(*overrides: str) -> Config:
    network = ["model=convnet", "model.widths=[4]", "model.hidden=8"]
    data = ["data=sample", "data.batch_size=200", "data.images=1000", "data.validation_images=200"]
    return compose("train", [*data, *network, "trainer.epochs=2", *overrides])[0].config


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of orders, which workers find in the folder that they work in."""
    return tmp_path_factory.mktemp("workers") / "orders"


@pytest.fixture(scope="module")
def cluster(parts: Path, orders: Path) -> Iterator[RayCluster]:
    """A node with two logical CPUs, and one GPU that is none."""
    if importlib.util.find_spec("ray") is None:  # not imported yet: it reads its token then
        pytest.skip("Ray is missing: pip install -e '.[cluster]'")
    cluster = RayCluster(parts / "ray-contract")
    cluster.environment |= {"DIGITLAB_FAULTS": worker_faults.__file__}
    cluster.environment |= {"DIGITLAB_FAULT_ORDERS": str(orders)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        cluster.add(cpus=2, gpus=1)
        copy_data(cluster.labs[0])
        cluster.wait(1)
        yield cluster
    cluster.close()


def copy_data(lab: Path) -> None:
    ignore = shutil.ignore_patterns("*.md")
    shutil.copytree(DATA, lab / "data" / "sample", ignore=ignore, dirs_exist_ok=True)


@pytest.fixture
def order(orders: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that orders a fault."""
    orders.mkdir(exist_ok=True)
    monkeypatch.chdir(orders.parent)
    monkeypatch.setattr(faults, "hook", worker_faults.hook)
    yield lambda name: (orders / name).touch()
    shutil.rmtree(orders)  # ends what hangs


@pytest.fixture
def setup(lab: Path) -> WorkerSetup:
    config = tiny()
    return WorkerSetup(lab, config.data, load_digits(lab, config.data.name, TRAIN).sha256)


@pytest.fixture
def make(
    setup: WorkerSetup, order: Callable[[str], None], request: pytest.FixtureRequest
) -> Iterator[Make]:
    """Start workers of a kind, and close them."""
    made: list[Pool] = []

    def make(kind: str, count: int = 1, setup: WorkerSetup = setup, grace_s: float = 60.0) -> Pool:
        workers: Pool
        if kind == "inline":
            workers = InlineWorkers(setup)
        elif kind == "processes":
            workers = ProcessWorkers(setup, count)
        else:
            from digitlab.workers.ray import RayWorkers

            launcher = replace(tiny().launcher, address=address(request), workers=count)
            workers = RayWorkers(setup, launcher)
        workers.cancel_grace_s = grace_s
        made.append(workers)
        workers.start()
        return workers

    yield make
    for workers in made:
        workers.close()


def address(request: pytest.FixtureRequest) -> str:
    cluster = request.getfixturevalue("cluster")
    assert isinstance(cluster, RayCluster)
    return cluster.address


def until(
    workers: Pool, is_last: Callable[[Event], bool], answer: Decision = Decision.proceed
) -> list[Event]:
    """The events of worker 0 up to the one that is asked for; rungs are answered."""
    seen: list[Event] = []
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for worker, event in workers.events(1.0):
            if worker == 0:
                seen.append(event)
            if isinstance(event, Rung) and not is_last(event):
                workers.answer(worker, answer)
        if any(is_last(event) for event in seen):
            return seen
    raise AssertionError(f"no such event came after {seen}")


def first(workers: Pool, kind: type[Event]) -> list[Event]:
    return until(workers, lambda event: isinstance(event, kind))


def train(workers: Pool, job: Job, answer: Decision = Decision.proceed) -> list[Event]:
    workers.submit(0, job)
    return until(workers, lambda event: isinstance(event, End), answer)


def tensors(files: dict[str, bytes], name: str) -> bytes:
    content = files[name]
    is_safetensors = name.endswith(".safetensors")
    return content[8 + int.from_bytes(content[:8], "little") :] if is_safetensors else content


@every_kind
def test_events_of_a_job_come_in_order_and_its_result_is_that_of_a_fit(
    kind: str, make: Make, lab: Path
) -> None:
    workers = make(kind)
    assert workers.idle() == []
    machine = first(workers, Ready)[0].machine  # type: ignore[union-attr]
    assert machine["pid"] != os.getpid() or kind == "inline"
    assert workers.idle() == [0]
    # Five steps make an epoch.
    events = train(workers, Job(tiny(), (0.2, 0.7), (0, 3, 10)))
    assert events[0] == Progress(0.0)
    kinds = [type(event) for event in events if not isinstance(event, Progress)]
    assert kinds == [Started, Snapshot, Rung, Snapshot, Epoch, Rung, Snapshot, Epoch, Finished]
    snapshots = [event for event in events if isinstance(event, Snapshot)]
    assert [snapshot.step for snapshot in snapshots] == [0, 3, 10]
    assert [event.index for event in events if isinstance(event, Rung)] == [0, 1]
    assert [event.epoch for event in events if isinstance(event, Epoch)] == [1, 2]
    assert workers.idle() == [0]
    finished = events[-1]
    assert isinstance(finished, Finished)
    alone = fit(tiny(), lab, TrainingObserver())
    expected = output_files(alone)
    assert finished.files.keys() == expected.keys()
    for name in expected:  # of safetensors, the tensors: the order in their header is any
        assert tensors(finished.files, name) == tensors(expected, name)
    last = {"weights.safetensors": snapshots[-1].weights}
    assert tensors(last, "weights.safetensors") == tensors(expected, "weights.safetensors")
    assert finished.data_sha256 == alone.data_sha256
    assert finished.environment["numerics"] == alone.numerics
    assert finished.metrics["val_accuracy"] == alone.metrics["val_accuracy"]


@every_kind
def test_a_job_goes_on_from_the_checkpoint_of_another(kind: str, make: Make) -> None:
    workers = make(kind)
    first(workers, Ready)
    config = tiny("trainer.checkpoint_minutes=1e-9")
    events = train(workers, Job(config, (0.2, 0.7)))
    contents = [event.content for event in events if isinstance(event, Checkpoint)]
    assert len(contents) == 8  # all steps but the last one of an epoch
    again = train(workers, Job(config, (0.2, 0.7), checkpoint=contents[5]))
    rungs = [event for event in events if isinstance(event, Rung)]
    assert [event for event in again if isinstance(event, Rung)] == rungs
    started = next(event for event in again if isinstance(event, Started))
    assert started.facts["resumed_at_step"] == 7
    assert started.facts["resumed_at_seconds"] > 0
    whole, resumed = events[-1], again[-1]
    assert isinstance(whole, Finished)
    assert isinstance(resumed, Finished)
    assert resumed.files == whole.files


@every_kind
def test_a_job_is_stopped_at_a_rung_and_the_next_one_runs(kind: str, make: Make) -> None:
    workers = make(kind)
    first(workers, Ready)
    events = train(workers, Job(tiny(), (0.2, 0.7)), Decision.stop)
    assert [type(event) for event in events[-2:]] == [Rung, Stopped]
    workers.answer(0, Decision.stop)  # too late: the job has ended
    assert isinstance(train(workers, Job(tiny(), (0.2,)))[-1], Finished)


@pytest.mark.slow
@every_kind
def test_a_cancel_ends_a_job_at_its_next_batch(kind: str, make: Make) -> None:
    workers = make(kind)
    first(workers, Ready)
    long = tiny("trainer.epochs=1000")
    workers.submit(0, Job(long))
    first(workers, Epoch)
    workers.cancel(0)
    workers.cancel(0)
    assert isinstance(first(workers, End)[-1], Stopped)
    workers.submit(0, Job(long))  # a worker receives it before its job has started
    workers.cancel(0)
    assert isinstance(first(workers, End)[-1], Stopped)
    workers.submit(0, Job(long, (0.0001,)))  # and while it waits for an answer
    until(workers, lambda event: isinstance(event, Rung))
    workers.cancel(0)
    workers.answer(0, Decision.proceed)
    assert isinstance(first(workers, End)[-1], Stopped)
    assert isinstance(train(workers, Job(tiny()))[-1], Finished)


@pytest.mark.slow
@every_kind
def test_a_paused_job_reports_nothing_until_it_is_to_proceed(kind: str, make: Make) -> None:
    workers = make(kind)
    first(workers, Ready)
    workers.submit(0, Job(tiny("trainer.epochs=40")))
    workers.answer(0, Decision.pause)
    first(workers, Progress)  # it obeys at its next batch, which comes after this report
    while workers.events(1.0):
        continue
    workers.answer(0, Decision.proceed)
    epochs = [event for event in first(workers, End) if isinstance(event, Epoch)]
    assert [event.epoch for event in epochs] == list(range(1, 41))
    workers.submit(0, Job(tiny("trainer.epochs=1000")))
    workers.answer(0, Decision.pause)
    first(workers, Progress)
    workers.cancel(0)
    assert isinstance(first(workers, End)[-1], Stopped)


@pytest.mark.slow
@every_kind
def test_a_worker_that_does_not_answer_a_cancel_is_replaced(
    kind: str, make: Make, order: Callable[[str], None], orders: Path
) -> None:
    order("hang@job.batch")
    workers = make(kind, grace_s=0.2)
    first(workers, Ready)
    workers.submit(0, Job(tiny()))
    while list(orders.iterdir()):  # until it hangs
        workers.events(0.05)
    workers.cancel(0)
    lost = first(workers, Lost)[-1]
    assert lost == Lost("it did not stop within 0.2 s and was killed", is_charged=False)
    first(workers, Ready)
    assert isinstance(train(workers, Job(tiny()))[-1], Finished)


@pytest.mark.slow
@every_kind
def test_a_training_that_raises_says_whether_it_would_again(
    kind: str, make: Make, order: Callable[[str], None]
) -> None:
    order("raise@job.batch")
    workers = make(kind)
    first(workers, Ready)
    failed = train(workers, Job(tiny()))[-1]
    assert failed == Failed("RuntimeError: a fault at job.batch", is_deterministic=False)
    failed = train(workers, Job(tiny("data.images=100000")))[-1]
    assert isinstance(failed, Failed)
    assert failed.is_deterministic
    assert failed.reason.startswith("data.images=100000")
    diverging = tiny("optim.name=sgd", "optim.learning_rate=10", "optim.schedule=constant")
    failed = train(workers, Job(replace(diverging, data=replace(diverging.data, std=1e-30))))[-1]
    assert isinstance(failed, Failed)
    assert failed.is_deterministic
    assert isinstance(train(workers, Job(tiny()))[-1], Finished)


@pytest.mark.slow
@every_kind
def test_a_result_of_five_megabytes_arrives_whole(kind: str, make: Make) -> None:
    workers = make(kind)
    first(workers, Ready)
    wide = tiny("model.hidden=1600", "data.images=50", "trainer.epochs=1")
    finished = train(workers, Job(wide))[-1]
    assert isinstance(finished, Finished)
    assert len(finished.files["weights.safetensors"]) > 5_000_000


@every_kind
def test_workers_with_other_data_are_refused(kind: str, make: Make, setup: WorkerSetup) -> None:
    other = dict(setup.data_sha256) | {TRAIN[0]: "0" * 64}
    workers = make(kind, setup=replace(setup, data_sha256=other))
    with pytest.raises(UserError, match=f"No worker can serve: .*{TRAIN[0]} differ"):
        first(workers, Ready)


@every_kind
def test_workers_with_other_code_are_refused(kind: str, make: Make, setup: WorkerSetup) -> None:
    workers = make(kind, setup=replace(setup, source_digest="0" * 12))
    with pytest.raises(UserError, match=r"No worker can serve: .*source code"):
        first(workers, Ready)


@every_kind
def test_a_worker_without_the_data_of_its_job_is_refused(kind: str, make: Make) -> None:
    """Not the job's fault: on a machine that has them it would be trained."""
    workers = make(kind)
    first(workers, Ready)
    workers.submit(0, Job(tiny("data.name=elsewhere")))
    with pytest.raises(UserError, match=r"No worker can serve: .*no such data set"):
        first(workers, End)


@that_can_die
def test_a_process_that_dies_while_it_trains_is_charged_and_replaced(
    kind: str, make: Make, order: Callable[[str], None]
) -> None:
    order("kill@job.batch")
    workers = make(kind)
    first(workers, Ready)
    lost = train(workers, Job(tiny()))[-1]
    assert isinstance(lost, Lost)
    assert lost.is_charged
    assert "process" in lost.cause
    assert workers.idle() == []
    first(workers, Ready)
    assert isinstance(train(workers, Job(tiny()))[-1], Finished)


@that_can_die
def test_a_process_that_dies_without_a_job_is_not_charged(kind: str, make: Make) -> None:
    workers = make(kind)
    ready = first(workers, Ready)[-1]
    assert isinstance(ready, Ready)
    os.kill(ready.machine["pid"], signal.SIGKILL)
    lost = first(workers, Lost)[-1]
    assert isinstance(lost, Lost)
    assert not lost.is_charged
    first(workers, Ready)


@that_can_die
def test_a_worker_may_die_at_its_start_but_not_always(
    kind: str, make: Make, order: Callable[[str], None]
) -> None:
    order("kill@worker.started")
    workers = make(kind)
    assert [type(event) for event in first(workers, Ready)] == [Lost, Ready]
    workers.close()
    order("always-kill@worker.started")
    workers = make(kind)
    with pytest.raises(UserError, match="died 3 times before it was ready"):
        first(workers, Ready)


@that_can_die
def test_two_workers_train_beside_each_other(kind: str, make: Make) -> None:
    workers = make(kind, count=2)
    ready: set[int] = set()
    while len(ready) < 2:
        ready |= {worker for worker, event in workers.events(1.0) if isinstance(event, Ready)}
    workers.submit(0, Job(tiny(), (0.2,)))
    until(workers, lambda event: isinstance(event, Rung))
    workers.submit(1, Job(tiny()))  # while the first waits for its answer
    ended: list[tuple[int, Event]] = []
    while not ended:
        ended = [found for found in workers.events(1.0) if isinstance(found[1], End)]
    assert [worker for worker, _ in ended] == [1]
    workers.answer(0, Decision.proceed)
    assert isinstance(first(workers, End)[-1], Finished)


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.long
@pytest.mark.timeout(900)
@every_kind
def test_memory_does_not_grow_over_five_hundred_jobs(kind: str, make: Make) -> None:
    workers = make(kind)
    ready = first(workers, Ready)[-1]
    assert isinstance(ready, Ready)
    job = Job(tiny("trainer.epochs=1", "data.images=200", "data.validation_images=50"), (0.5,))
    sizes = []
    jobs = max(100, int(500 * SHARE))
    for _ in range(jobs):
        assert isinstance(train(workers, job)[-1], Finished)
        sizes.append((resident_mb(ready.machine["pid"]), resident_mb(os.getpid())))
    for size in zip(*sizes, strict=True):  # of the worker, of the driver
        assert max(size[jobs * 4 // 5 :]) < max(size[jobs // 10 : jobs * 3 // 10]) + 20, size[::50]


def test_process_leaves_signals_to_the_driver(make: Make) -> None:
    workers = make("processes")
    ready = first(workers, Ready)[-1]
    assert isinstance(ready, Ready)
    workers.submit(0, Job(tiny(), (0.3,)))
    until(workers, lambda event: isinstance(event, Rung))
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(ready.machine["pid"], name)
    workers.answer(0, Decision.proceed)
    assert isinstance(first(workers, End)[-1], Finished)


DRIVER = """
import pickle, sys
from pathlib import Path
from digitlab.workers.base import Epoch, Job, Ready
from digitlab.workers.processes import ProcessWorkers

if __name__ == "__main__":
    setup, config = pickle.loads(Path(sys.argv[1]).read_bytes())
    with ProcessWorkers(setup, 2) as workers:
        workers.start()
        while True:
            for worker, event in workers.events(1.0):
                if isinstance(event, Ready):
                    print(event.machine["pid"], flush=True)
                    if worker == 0:
                        workers.submit(worker, Job(config))
                elif isinstance(event, Epoch) and len(sys.argv) > 2:
                    sys.exit()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "ends"])
def test_processes_end_with_their_driver(setup: WorkerSetup, tmp_path: Path, how: str) -> None:
    import pickle

    (tmp_path / "setup").write_bytes(pickle.dumps((setup, tiny("trainer.epochs=100000"))))
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "setup")]
    driver = subprocess.Popen(
        [*command, "ends"] if how == "ends" else command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert driver.stdout is not None
    workers = [int(driver.stdout.readline()) for _ in range(2)]
    if how == "killed":
        driver.kill()
    driver.wait(WAIT_S)
    driver.stdout.close()
    deadline = time.monotonic() + WAIT_S
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Ray alone


@pytest.mark.cluster
def test_a_lost_node_is_not_charged_to_its_jobs(make: Make, cluster: RayCluster) -> None:
    second = cluster.add(cpus=2)
    copy_data(second.lab)
    cluster.wait(2)
    workers = make("ray", count=4)
    machines: dict[int, str] = {}
    while len(machines) < 4:
        for worker, event in workers.events(1.0):
            assert isinstance(event, Ready)
            machines[worker] = event.machine["node"]
    nodes = sorted(machines.values())
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    for worker in machines:
        workers.submit(worker, Job(tiny("trainer.epochs=100000")))
    started: set[int] = set()
    while len(started) < 4:
        started |= {worker for worker, event in workers.events(1.0) if isinstance(event, Epoch)}
    cluster.kill(1)
    lost: list[tuple[int, Event]] = []
    while len(lost) < 2:
        lost += [found for found in workers.events(1.0) if isinstance(found[1], Lost)]
    assert all(event == Lost("its node was lost", is_charged=False) for _, event in lost)
    assert len({machines[worker] for worker, _ in lost}) == 1


@pytest.mark.cluster
@pytest.mark.parametrize(("share", "count"), [(0.5, 2), (1.0, 1)])
def test_workers_share_a_gpu(
    setup: WorkerSetup, order: object, request: pytest.FixtureRequest, share: float, count: int
) -> None:
    where = address(request)
    import ray  # it reads the cluster's token

    from digitlab.workers.ray import RayWorkers

    launcher = replace(tiny().launcher, address=where, workers=0, gpus=share)
    with RayWorkers(setup, launcher) as workers:
        workers.start()
        assert workers.count == count
        ready: set[int] = set()
        while len(ready) < count:
            ready |= {worker for worker, event in workers.events(1.0) if isinstance(event, Ready)}
        assert ray.available_resources().get("GPU", 0) == 0


@pytest.mark.cluster
def test_sigterm_is_left_to_the_driver(make: Make) -> None:
    before = signal.getsignal(signal.SIGTERM)
    make("ray")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.cluster
def test_a_cluster_that_is_not_there_is_the_callers_mistake(setup: WorkerSetup) -> None:
    pytest.importorskip("ray")
    from digitlab.workers.ray import RayWorkers

    nowhere = f"127.0.0.1:{free_port()}"
    launcher = replace(tiny().launcher, address=nowhere)
    with pytest.raises(UserError, match=f"launcher.address={nowhere}: no Ray cluster is reached"):
        RayWorkers(setup, launcher).start()


def test_ray_that_is_not_installed_is_asked_for(
    setup: WorkerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    from digitlab.workers.ray import RayWorkers

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[cluster\]'"):
        RayWorkers(setup, tiny().launcher)
