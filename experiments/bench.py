"""`digitlab bench`: what the machinery costs, most of it as ratios of two things run in turns.

Every part records in a temporary lab of its own. A person's stores are out of reach: neither the
environment nor the lab's .env names them to a part or to a process that it starts.
"""

import contextlib
import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from optuna.samplers import RandomSampler
from optuna.trial import create_trial
from PIL import Image

from digitlab.base.console import Board, table
from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError, require
from digitlab.base.limits import usable_cores
from digitlab.base.paths import ROOT, lab_folder
from digitlab.base.stop import StopSignal
from digitlab.cli import Parser
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.config.types import Config
from digitlab.data.datamodule import DigitsData
from digitlab.data.datasets import TEST, load_digits
from digitlab.networks.table import build_network
from digitlab.records.record import Identity, open_records
from digitlab.study.loop import JobLoop
from digitlab.study.progress import StudyProgress
from digitlab.study.run import run_once
from digitlab.study.search import TrialSearch
from digitlab.study.session import StudySession, open_session
from digitlab.study.trials import TrialStore
from digitlab.training.evaluate import evaluate
from digitlab.training.module import build_optimizer, build_schedule
from digitlab.workers.base import (
    Decision,
    End,
    Epoch,
    Event,
    Finished,
    Job,
    Started,
    Workers,
    WorkerSetup,
)
from digitlab.workers.processes import ProcessWorkers, preload

PROGRAM = str(Path(sys.executable).with_name("digitlab"))
# Over what a recipe or an environment may name: the stores of the lab.
OWN_STORES = ("study.storage=null", "tracking.uri=null")


@dataclass(frozen=True)
class Figure:
    """One line of the table: n values, and the bar that their median is compared with."""

    name: str
    unit: str
    values: list[float]
    least: float | None = None  # the bar: at least this
    most: float | None = None  # or at most this

    def row(self) -> list[str]:
        low, middle, high = (_quantile(self.values, share) for share in (0.25, 0.5, 0.75))
        spread = f"{min(self.values):.3g} to {max(self.values):.3g}"
        bar, verdict = "", ""
        if self.least is not None:
            bar, verdict = f">= {self.least:g}", _verdict(low >= self.least, high < self.least)
        if self.most is not None:
            bar, verdict = f"<= {self.most:g}", _verdict(high <= self.most, low > self.most)
        number = str(len(self.values))
        return [self.name, f"{middle:.3g}", spread, number, self.unit, bar, verdict]


def _quantile(values: list[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def _verdict(met: bool, missed: bool) -> str:
    """Name the side of the bar on which the middle half of the values lies."""
    return "met" if met else "not met" if missed else "not decided"


def main() -> None:
    """Measure, print a table and write it as JSON."""
    parser = Parser(prog="digitlab bench", description="Time things in turns.")
    parser.add_argument("--repeats", type=int, default=5, help="of each figure (default: 5)")
    text = f"parts whose name contains this (default: all): {' '.join(PARTS)}"
    parser.add_argument("--only", default="", help=text, metavar="PART")
    parser.add_argument("--out", type=Path, help="default: bench.json in the lab", metavar="FILE")
    options = parser.parse_args()
    require(options.repeats > 0, f"--repeats {options.repeats}", "an integer >= 1")
    chosen = [name for name in PARTS if options.only in name]
    require(bool(chosen), f"--only {options.only}", f"a part of {', '.join(PARTS)}")
    lab = leave_stores()
    preload()
    environment, load = describe_environment(), os.getloadavg()[0]
    machine = f"{environment['processor']}, {environment['cores']} cores, load {load:.1f} before"
    figures: list[Figure] = []
    with _own_lab(lab) as own:
        for name in chosen:
            figures += PARTS[name](own, options.repeats)
            document = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
            (options.out or lab / "bench.json").write_text(json.dumps(document, indent=1))
    columns = ["figure", "median", "spread", "n", "unit", "bar", "verdict"]
    Board().print(table(machine, columns, [figure.row() for figure in figures]))


def leave_stores() -> Path:
    """Return the lab, and drop what names a person's stores, which children would inherit."""
    before = dict(os.environ)
    lab = lab_folder()  # which reads its .env
    os.environ.clear()
    private = ("DIGITLAB_", "MLFLOW_")
    os.environ.update({k: v for k, v in before.items() if not k.startswith(private)})
    return lab


@contextmanager
def _own_lab(lab: Path) -> Iterator[Path]:
    """An empty lab on the same disk, with the same data."""
    (lab / "data").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=lab) as folder:
        (Path(folder) / "data").symlink_to((lab / "data").resolve())
        yield Path(folder)


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def run(command: list[str], lab: Path) -> str:
    """Return what a program prints that works in `lab`."""
    place = os.environ | {"DIGITLAB_HOME": str(lab), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise UserError(f"{' '.join(command)}: {reason}")
    return done.stdout


def start(lab: Path, repeats: int) -> list[Figure]:
    """From the command to its end, and from `digitlab sweep` in an empty lab to the first step."""
    helped, configured, stepped = [], [], []
    for _ in range(repeats):
        helped.append(1000 * _timed(partial(run, [PROGRAM, "--help"], lab)))
        configured.append(_timed(partial(run, [PROGRAM, "train", "--cfg", "job"], lab)))
        with _own_lab(lab) as empty:
            started = time.time()
            few = ["study.trials=1", "study.final_seeds=1", "study.confirm=1"]
            run([PROGRAM, "sweep", "experiments=smoke", *few, *OWN_STORES], empty)
            query = "SELECT min(timestamp) FROM metrics WHERE key = 'training_flops'"
            with closing(sqlite3.connect(empty / "mlflow.db")) as database:  # noted before step 1
                [[milliseconds]] = database.execute(query)
            stepped.append(milliseconds / 1000 - started)
    return [
        Figure("digitlab --help", "ms", helped, most=300),
        Figure("digitlab train --cfg job", "s", configured),
        Figure("sweep in an empty lab, to the first step", "s", stepped, most=8),
    ]


# What a training costs


def _epochs(count: int) -> Config:
    """The default recipe without EMA, which the bare loop has not, for some epochs."""
    config = compose("train", list(OWN_STORES))[0].config
    return with_values(config, {"optim.ema": 0.0, "trainer.epochs": count})


def bare_loop(config: Config, lab: Path) -> None:
    """The same network, batches, optimizer and validation set as a run, in torch alone."""
    torch.set_num_threads(config.trainer.threads)
    torch.manual_seed(config.trainer.seed)
    data = DigitsData(config, lab)
    data.setup("fit")
    assert data.validation is not None
    network = build_network(config.model)
    optimizer = build_optimizer(config.optim, network)
    batches = data.train_dataloader()
    schedule = build_schedule(config.optim, optimizer, config.trainer.epochs * len(batches))
    smoothing = config.optim.label_smoothing
    for _ in range(config.trainer.epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels, label_smoothing=smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        evaluate(network, data.validation[0], config.data)


def tracked(lab: Path, repeats: int) -> list[Figure]:
    """A run of the default recipe, recorded in MLflow, over the same loop bare in torch."""
    config = _epochs(4)  # as most of its trials
    identity = Identity("bench", "train", environment=describe_environment())
    ratios = []
    with open_records(config, lab) as records:
        for _ in range(repeats + 1):
            bare = _timed(lambda: bare_loop(config, lab))
            with contextlib.redirect_stdout(io.StringIO()):
                ratios.append(_timed(lambda: run_once(config, identity, records, lab)) / bare)
    del ratios[0]  # the warm-up
    return [Figure("a tracked run / the same loop bare, 4 epochs", "ratio", ratios, most=1.05)]


def two_workers(lab: Path, repeats: int) -> list[Figure]:
    """Runs of one epoch: the time that one worker takes for two, over that of two workers."""
    config = _epochs(1)
    setup = WorkerSetup(lab, config.data)
    ratios = []
    with ProcessWorkers(setup, 1) as one, ProcessWorkers(setup, 2) as two:
        for _ in range(repeats + 1):
            seconds = [_timed(partial(_jobs, workers, config, 2)) for workers in (one, two)]
            ratios.append(seconds[0] / seconds[1])
    del ratios[0]  # the warm-up
    return [Figure("two workers / one, images a second", "ratio", ratios)]


def _jobs(workers: Workers, config: Config, count: int) -> None:
    waiting, ended = count, 0
    while ended < count:
        for worker in workers.idle()[:waiting]:
            workers.submit(worker, Job(config))
            waiting -= 1
        for _, event in workers.events(10):
            if isinstance(event, End):
                require(isinstance(event, Finished), f"a training: {event}", "one that finishes")
                ended += 1


# What the driver costs


class ClockWorkers(Workers):
    """Workers that finish each job after some seconds and train nothing."""

    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds = count, seconds
        self.due: dict[int, float] = {}  # of busy workers; monotonic seconds
        metrics = {"val_accuracy": 0.98, "val_loss": 0.1}
        facts = {"model_parameters": 1.0, "training_flops": 1.0}
        self.course = (Started(facts), Epoch(1, metrics), Finished(metrics, {}, {}, {}))

    def start(self) -> None:
        self.due.clear()

    def idle(self) -> list[int]:
        return [worker for worker in range(self.count) if worker not in self.due]

    def submit(self, worker: int, job: Job) -> None:
        self.due[worker] = time.monotonic() + self.seconds

    def answer(self, worker: int, decision: Decision) -> None:
        """Nothing waits for it: there are no rungs."""

    def events(self, timeout_s: float) -> list[tuple[int, Event]]:
        wait = min(self.due.values(), default=0.0) - time.monotonic()
        time.sleep(max(0.0, min(timeout_s, wait)))
        now = time.monotonic()
        ended = [worker for worker, due in self.due.items() if due <= now]
        for worker in ended:
            del self.due[worker]
        return [(worker, event) for worker in ended for event in self.course]

    def cancel(self, worker: int) -> None:
        self.due[worker] = 0.0

    def close(self) -> None:
        self.due.clear()


@contextmanager
def open_study(lab: Path, *overrides: str) -> Iterator[StudySession]:
    """An open study of the default recipe without rungs, in an empty lab; it prints nothing."""
    plain = ["study.pruner=none", "study.rungs=[]", *OWN_STORES, *STUDY, *overrides]
    composed = compose("sweep", plain)[0]
    with (
        _own_lab(lab) as empty,
        contextlib.redirect_stdout(io.StringIO()),
        Board() as board,
        StopSignal() as stop,
        open_session(composed, empty, board, stop) as session,
    ):
        yield session


STUDY: list[str] = []  # more overrides of these studies


def fill(store: TrialStore, count: int) -> None:
    """Add finished trials with values drawn at random."""
    chance, blank = RandomSampler(seed=0), create_trial(value=0.0)
    draw = partial(chance.sample_independent, store.study, blank)
    for i in range(count):
        values = {one.name: one.decode(draw(one.name, one.distribution)) for one in store.space}
        store.add(values, 0.98 + 0.015 * (i % 101) / 101, {})


def lead(session: StudySession, workers: Workers, trials: int) -> float:
    """Return the seconds in which the driver gets so many more trials done."""
    total = len(session.store.rows()) + trials
    session.config = with_values(session.config, {"study.trials": total})
    tick = StudyProgress(session).ticker("trials", total)
    search, loop = TrialSearch(session, lambda: 0.0), JobLoop(workers, session.stop, tick)
    seconds = _timed(lambda: search.run(loop))
    if session.stop():
        raise KeyboardInterrupt
    return seconds


def driver(lab: Path, repeats: int) -> list[Figure]:
    """The driver with workers that train nothing and no tracker; the study is kept in sqlite."""
    drawn, modelled, shares = [], [], []
    for _ in range(repeats):
        with open_study(lab, "tracking=none", "study.sampler=random") as session:
            drawn.append(200 / lead(session, ClockWorkers(1, 0.0), 200))
        with open_study(lab, "tracking=none", "study.sampler=tpe") as session:
            fill(session.store, 300)
            modelled.append(50 / lead(session, ClockWorkers(1, 0.0), 50))
        with open_study(lab, "tracking=none", "study.sampler=random") as session:
            seconds = lead(session, ClockWorkers(64, _SLEEP_S), 64 * _TURNS)
            shares.append(100 * _TURNS * _SLEEP_S / seconds)
    return [
        Figure("driver alone, random values", "trials/s", drawn, least=100),
        Figure("driver alone, TPE after 300 trials", "trials/s", modelled, least=25),
        Figure(f"64 workers, trials of {_SLEEP_S:g} s, of ideal", "%", shares, least=95),
    ]


_SLEEP_S, _TURNS = 5.0, 4  # length of a trial of 64 workers, and trials of each


def trial(lab: Path, repeats: int) -> list[Figure]:
    """A trial that trains nothing: drawn, recorded in MLflow on sqlite, written to Optuna's study.

    A value is the mean of 20, until MLflow has all of them. The others are in Optuna's study alone.
    """
    figures = []
    for others in (100, 10_000):
        with open_study(lab, "tracking=mlflow", "study.sampler=tpe") as session:
            fill(session.store, others)
            workers = ClockWorkers(1, 0.0)
            took = [_timed(partial(_delivered, session, workers, 20)) for _ in range(repeats + 1)]
        values = [1000 * seconds / 20 for seconds in took[1:]]  # less the warm-up
        figures.append(Figure(f"an empty trial after {others} others", "ms", values))
    return figures


def _delivered(session: StudySession, workers: Workers, trials: int) -> None:
    lead(session, workers, trials)
    require(not session.records.outbox.flush(60), "MLflow", "reached within a minute")
    session.records.outbox.check()


# Against others


# Runs in a fresh process, as the article's program does; imports are counted for neither.
_FIT = """
import json, sys, time
from pathlib import Path
from digitlab.config.compose import compose
from digitlab.training.fit import fit
from digitlab.training.observer import TrainingObserver
config = compose("train", sys.argv[2:])[0].config
started = time.perf_counter()
accuracy = fit(config, Path(sys.argv[1]), TrainingObserver()).metrics["test_accuracy"]
print(json.dumps({"all": time.perf_counter() - started, "accuracy": accuracy}))
"""


def article(lab: Path, repeats: int) -> list[Figure]:
    """The article's program in Keras against its recipe and the fast ones, all cores for each.

    Times go from reading the data to the accuracy on the test set.
    """
    script = str(ROOT / "experiments/article.py")
    theirs = [str(_article_python(lab)), script, str(lab / "data/mnist")]
    threads = f"trainer.threads={usable_cores()}"
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("article", *_RECIPES)}
    wholes = []
    for seed in range(max(repeats, _SEEDS)):
        seconds = {}
        for name, results in runs.items():
            overrides = [f"experiments={name}", "data.evaluate_on=test", threads]
            overrides.append(f"trainer.seed={seed}")
            ours = [sys.executable, "-c", _FIT, str(lab), *overrides]
            started = time.perf_counter()
            results.append(json.loads(run(theirs if name == "article" else ours, lab)))
            seconds[name] = time.perf_counter() - started
        wholes.append(seconds["article"] / seconds["seed"])
    figures = [Figure("as whole processes: article / seed", "ratio", wholes)]
    for name, results in runs.items():
        share = [a["all"] / b["all"] for a, b in zip(runs["article"], results, strict=True)]
        figures += [
            Figure(f"{name}, test accuracy", "%", [100 * one["accuracy"] for one in results]),
            Figure(f"{name}, load to measured", "s", [one["all"] for one in results]),
        ]
        if name in _RECIPES:
            figures.append(Figure(f"article / {name}", "ratio", share, least=_RECIPES[name]))
    return figures


_RECIPES = {"seed": 2.0, "fast98": 25.0, "fast99": 10.0, "fast994": 1.0}  # times as fast, at least
_SEEDS = 10  # of a mean accuracy


def _article_python(lab: Path) -> Path:
    """Return the interpreter of an environment with Keras alone, installed once."""
    folder = lab.parent / "article"  # beside the part's own lab, so that it stays
    if not (folder / "installed").exists():
        uv, python = str(Path(sys.executable).with_name("uv")), str(folder / "bin/python")
        run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], lab)
        packages = ["keras==3.*", "tensorflow-cpu==2.*"]
        run([uv, "pip", "install", "--quiet", "--python", python, *packages], lab)
        (folder / "installed").touch()
    return folder / "bin/python"


def conventional(lab: Path, repeats: int) -> list[Figure]:
    """The default study against the same one on the usual stack, in turns.

    A turn of ours is eight trials, from the start of the first to the end of the last; of theirs
    it is two with a pruner and two without, which take most of the time of all that is measured.
    """
    ratios: dict[str, list[float]] = {"whole": [], "pruned": []}
    with _own_lab(lab) as ours, tempfile.TemporaryDirectory(dir=lab) as theirs:
        for kind in ratios:
            (Path(theirs) / kind / "MNIST").mkdir(parents=True)
            (Path(theirs) / kind / "MNIST/raw").symlink_to(lab / "data/mnist")
        for turn in range(repeats):
            seconds = _study_seconds(ours, 8 * turn, 8 * (turn + 1)) / 8
            for kind, values in ratios.items():
                values.append(_conventional_seconds(Path(theirs) / kind, 2, lab) / seconds)
    name = "trials an hour / the conventional stack"
    return [
        Figure(name, "ratio", ratios["whole"], least=6),
        Figure(f"{name}, pruned", "ratio", ratios["pruned"]),
    ]


def _study_seconds(lab: Path, first: int, total: int) -> float:
    """Return the seconds of the trials from `first` on, of the default study in its processes."""
    few = ["study.confirm=1", "study.final_seeds=1", *OWN_STORES]
    run([PROGRAM, "sweep", "experiments=default", f"study.trials={total}", *few], lab)
    span = "max(julianday(datetime_complete)) - min(julianday(datetime_start))"
    with closing(sqlite3.connect(lab / "optuna.db")) as database:
        [[days]] = database.execute(f"SELECT {span} FROM trials WHERE number >= {first}")  # noqa: S608
    return float(days) * 86400


def _conventional_seconds(folder: Path, trials: int, lab: Path) -> float:
    """Return the mean seconds of so many more trials of the study in the folder."""
    script = str(ROOT / "experiments/conventional.py")
    printed = run([sys.executable, script, str(folder), str(trials), folder.name], lab)
    return float(sum(json.loads(printed.splitlines()[-1])["seconds"])) / trials


# The page to draw on

_RATE, _LOAD_SECONDS = 50, 10  # drawings a second, and for how long


def draw(lab: Path, repeats: int) -> list[Figure]:
    """Drawings sent to the page's API at times that do not wait for its answers."""
    files = []
    for digit in load_digits(lab, "mnist", TEST).images[:100]:
        file = io.BytesIO()
        Image.fromarray(255 - digit.numpy()).resize((280, 280)).save(file, "PNG")
        files.append(file.getvalue())
    latencies: list[list[float]] = []
    lost = 0
    with _drawing_page(lab) as address, ThreadPoolExecutor(_RATE) as senders:
        [row, *_] = json.loads(urlopen(f"{address}/runs").read())  # noqa: S310
        where = f"{address}/predict?run={row['run_id']}"

        def send(due: float, file: bytes) -> float | None:
            time.sleep(max(0.0, due - time.perf_counter()))
            request = Request(where, file, {"Content-Type": "image/png"})  # noqa: S310
            try:
                with urlopen(request, timeout=10) as answer:  # noqa: S310
                    json.loads(answer.read())
            except OSError:
                return None
            return 1000 * (time.perf_counter() - due)

        for _ in range(repeats + 1):
            started = time.perf_counter() + 0.5
            due = [started + i / _RATE for i in range(_RATE * _LOAD_SECONDS)]
            answers = list(senders.map(send, due, [files[i % 100] for i in range(len(due))]))
            latencies.append([answer for answer in answers if answer is not None])
            lost += len(answers) - len(latencies[-1])
    kept = latencies[1:]  # less the warm-up
    return [
        Figure("50 drawings a second: median", "ms", [_quantile(v, 0.5) for v in kept]),
        Figure("50 drawings a second: p99", "ms", [_quantile(v, 0.99) for v in kept], most=150),
        Figure("50 drawings a second: lost, of all", "requests", [float(lost)], most=0),
    ]


@contextmanager
def _drawing_page(lab: Path) -> Iterator[str]:
    """The address of `digitlab draw` with a network that was trained a second ago."""
    with _own_lab(lab) as own:
        run([PROGRAM, "train", "experiments=fast98", *OWN_STORES], own)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [PROGRAM, "draw", "--run", "fast98", "--port", str(port)]
        place = os.environ | {"DIGITLAB_HOME": str(own)}
        with subprocess.Popen(command, env=place, stdout=subprocess.DEVNULL) as process:
            try:
                while True:
                    try:
                        urlopen(f"http://127.0.0.1:{port}/runs").close()
                        break
                    except URLError:
                        if process.poll() is not None:
                            raise
                        time.sleep(0.2)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()


PARTS: dict[str, Callable[[Path, int], list[Figure]]] = {
    "start": start,
    "tracked": tracked,
    "workers": two_workers,
    "driver": driver,
    "trial": trial,
    "article": article,
    "conventional": conventional,
    "draw": draw,
}

if __name__ == "__main__":
    main()
