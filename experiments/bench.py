"""`digitlab bench`: what the machinery costs, as ratios of two things run in turns."""

import io
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from digitlab.base.console import Board, table
from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError, require
from digitlab.base.paths import ROOT, lab_folder
from digitlab.cli import Parser
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.config.types import Config
from digitlab.data.datamodule import DigitsData
from digitlab.data.datasets import TEST, load_digits
from digitlab.networks.table import build_network
from digitlab.records.mlflow import Tracking, open_tracking
from digitlab.records.record import Identity, begin_record, trial_tags
from digitlab.study.run import perform
from digitlab.study.space import Hyperparameter, suggest
from digitlab.study.storage import open_storage
from digitlab.study.trials import Search
from digitlab.workers.processes import Job, Pool, Setup, preload
from digitlab.training.evaluate import evaluate
from digitlab.training.fit import Watch, fit
from digitlab.training.module import DigitModule, build_optimizer, build_schedule


@dataclass(frozen=True)
class Figure:
    """One line of the table: n values, and the bar that their median is held against."""

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
    """Told by the middle half of the values: it lies on one side of the bar, or across it."""
    return "met" if met else "not met" if missed else "too wide to tell"


def main() -> None:
    """Measure, print a table and write it as JSON."""
    parser = Parser("digitlab bench", description="Time things in turns.")
    parser.add_argument("--repeats", type=int, default=5, help="of each figure; 5")
    parser.add_argument("--only", default="", help="a part of a name: start limit tracked workers "
                        "article conventional draw trial")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON; lab/bench.json", metavar="FILE")
    asked = parser.parse_args()
    lab, repeats = lab_folder(), asked.repeats
    preload()
    recipe = compose("train", ["trainer.epochs=1"])[0].config
    measurements: dict[str, Callable[[], list[Figure]]] = {
        "start": lambda: start(lab, repeats),
        "limit": lambda: step_against_limits(recipe, lab, repeats),
        "tracked": lambda: [tracked_against_bare(recipe, lab, repeats)],
        "workers": lambda: [two_workers_against_one(recipe, lab, repeats)],
        "article": lambda: against_the_article(lab, repeats),
        "conventional": lambda: against_the_conventional_stack(lab, repeats),
        "draw": lambda: drawings_under_load(lab, repeats),
        "trial": lambda: [f for n in (100, 1000, 10000) for f in empty_trial(lab, n, repeats)],
    }
    chosen = [name for name in measurements if asked.only in name]
    require(bool(chosen), f"--only {asked.only}", f"a part of {', '.join(measurements)}")
    environment = describe_environment()
    machine = f"{environment['processor']}, {environment['cores']} cores"
    figures: list[Figure] = []
    for name in chosen:
        figures += measurements[name]()
        document = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
        (asked.out or lab / "bench.json").write_text(json.dumps(document, indent=1))
    columns = ["figure", "median", "spread", "n", "unit", "bar", "verdict"]
    Board().print(table(machine, columns, [figure.row() for figure in figures]))


def _timed(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def bare_loop(config: Config, lab: Path) -> None:
    """The same network, batches, optimizer and holdout as a run, in torch alone."""
    torch.set_num_threads(config.trainer.threads)
    torch.manual_seed(config.trainer.seed)
    data = DigitsData(config, lab)
    network = build_network(config.model)
    optimizer = build_optimizer(config.optim, network)
    batches = data.train_dataloader()
    schedule = build_schedule(config.optim, optimizer, config.trainer.epochs * batches.steps)
    smoothing = config.optim.label_smoothing
    for _ in range(config.trainer.epochs):
        for images, labels in chain.from_iterable(batches):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels, label_smoothing=smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        evaluate(network, data.validation[0], config.data)


def start(lab: Path, repeats: int) -> list[Figure]:
    """From the command to its end, and from `digitlab sweep` in an empty lab to the first step."""
    program = str(Path(sys.executable).with_name("digitlab"))
    helped, configured, stepped = [], [], []
    for _ in range(repeats):
        helped.append(1000 * _timed(partial(_run, [program, "--help"], lab)))
        configured.append(_timed(partial(_run, [program, "train", "--cfg", "job"], lab)))
        with tempfile.TemporaryDirectory() as folder:
            empty = Path(folder)
            (empty / "data").symlink_to(lab / "data")
            begun = time.time()
            sweep = ["sweep", "experiments=smoke", "study.trials=1", "study.final_seeds=1"]
            _run([program, *sweep, "study.confirm=1"], empty)
            query = "SELECT min(timestamp) FROM metrics WHERE key = 'training_flops'"
            with closing(sqlite3.connect(empty / "mlflow.db")) as database:  # logged before step 1
                [[milliseconds]] = database.execute(query)
            stepped.append(milliseconds / 1000 - begun)
    return [
        Figure("digitlab --help", "ms", helped, most=300),
        Figure("digitlab train --cfg job", "s", configured),
        Figure("sweep in an empty lab, to the first step", "s", stepped, most=8),
    ]


def _run(command: list[str], lab: Path) -> str:
    place = os.environ | {"DIGITLAB_HOME": str(lab), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def step_against_limits(recipe: Config, lab: Path, repeats: int) -> list[Figure]:
    """An epoch on one thread against what the processor can multiply and copy; where it goes."""
    config = with_values(recipe, {"trainer.threads": 1})
    torch.set_num_threads(1)
    matrix, memory = torch.randn(2048, 2048), torch.zeros(2**26)
    data = DigitsData(config, lab)
    moved = _bytes_of_a_step(config, data) * data.train_dataloader().steps
    multiplied, copied = [], []
    for _ in range(repeats):
        peak = 2 * 2048**3 / min(_timed(lambda: matrix @ matrix) for _ in range(5))
        width = 8 * 2**26 / min(_timed(memory.clone) for _ in range(5))  # read and written
        watch = _Facts()
        fit(config, lab, watch)
        multiplied.append(watch.flops / watch.seconds / peak)
        copied.append(moved / watch.seconds / width)
    with torch.profiler.profile() as profile:
        fit(config, lab, Watch())
    spent: dict[str, float] = dict.fromkeys(_PARTS.values(), 0.0)
    for event in profile.key_averages():
        part = next((p for word, p in _PARTS.items() if word in event.key.lower()), "the rest")
        spent[part] += event.self_cpu_time_total
    whole = sum(spent.values())
    return [
        Figure("operations a second of an epoch / of a matrix product", "ratio", multiplied),
        Figure("bytes a second of an epoch's operators / of a copy", "ratio", copied),
        *(Figure(f"share of a run: {part}", "ratio", [t / whole]) for part, t in spent.items()),
    ]


# Parts of a step by a word in the names of torch's operators; the first that fits.
_PARTS = {
    "convolution": "convolutions",
    "batch_norm": "batch norm",
    "max_pool": "pooling",
    "optimizer": "optimizer",
    "fused": "optimizer",
    "foreach": "optimizer",
    "grid_sampler": "augmentation",
    "aten::mm": "linear layers and the grid of augmentation",
    "addmm": "linear layers and the grid of augmentation",
    "": "the rest",
}


def _bytes_of_a_step(config: Config, data: DigitsData) -> float:
    """Read and written by the operators of one step, each as if nothing were cached."""
    module = DigitModule(config, 1)
    block = next(iter(data.train_dataloader()))[:1]
    with _Traffic() as traffic:  # type: ignore[no-untyped-call]
        module.training_step(block, 0)
    return float(traffic.bytes)


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the sizes of what each operator takes and gives; views cost nothing."""

    bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, given)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return given


class _Facts(Watch):
    """Keeps the operations and the seconds of a run of one epoch."""

    flops = seconds = 0.0

    def begin(self, facts: Mapping[str, float]) -> None:
        self.flops, self.begun = facts["training_flops"], time.perf_counter()

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.seconds = time.perf_counter() - self.begun


# Runs in a fresh process, as the article's program does; imports are counted for neither.
_FIT = """
import json, sys, time
from pathlib import Path
from digitlab.config.compose import compose
from digitlab.training.fit import Watch, fit
config = compose("train", sys.argv[2:])[0].config
begun = time.perf_counter()
accuracy = fit(config, Path(sys.argv[1]), Watch()).metrics["test_accuracy"]
print(json.dumps({"all": time.perf_counter() - begun, "accuracy": accuracy}))
"""


def against_the_article(lab: Path, repeats: int) -> list[Figure]:
    """The article's program in Keras against its recipe and the fast ones, all cores for each.

    Times go from reading the data to the accuracy on the test set.
    """
    python = _article_python(lab)
    article = [str(python), str(ROOT / "experiments/article.py"), str(lab / "data/mnist")]
    threads = f"trainer.threads={os.cpu_count() or 1}"
    told: dict[str, list[dict[str, float]]] = {name: [] for name in ("article", *_RECIPES)}
    wholes = []
    for seed in range(max(repeats, _SEEDS)):
        seconds = {}
        for name, runs in told.items():
            asked = [f"experiments={name}", "data.evaluate_on=test", threads]
            asked.append(f"trainer.seed={seed}")
            ours = [sys.executable, "-c", _FIT, str(lab), *asked]
            begun = time.perf_counter()
            runs.append(json.loads(_run(article if name == "article" else ours, lab)))
            seconds[name] = time.perf_counter() - begun
        wholes.append(seconds["article"] / seconds["seed"])
    figures = [Figure("as whole processes: article / seed", "ratio", wholes)]
    for name, runs in told.items():
        share = [a["all"] / run["all"] for a, run in zip(told["article"], runs, strict=True)]
        figures += [
            Figure(f"{name}, test accuracy", "%", [100 * run["accuracy"] for run in runs]),
            Figure(f"{name}, load to measured", "s", [run["all"] for run in runs]),
        ]
        if name in _RECIPES:
            figures.append(Figure(f"article / {name}", "ratio", share, least=_RECIPES[name]))
    return figures


_RECIPES = {"seed": 2.0, "fast98": 25.0, "fast99": 10.0, "fast994": 1.0}  # times as fast, at least
_SEEDS = 10  # of a mean accuracy


def _article_python(lab: Path) -> Path:
    """The interpreter of an environment with Keras alone, installed once."""
    folder = lab / "article"
    if not (folder / "installed").exists():
        uv = str(Path(sys.executable).with_name("uv"))
        _run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], lab)
        packages = ["keras==3.*", "tensorflow-cpu==2.*"]
        python = str(folder / "bin/python")
        _run([uv, "pip", "install", "--quiet", "--python", python, *packages], lab)
        (folder / "installed").touch()
    return folder / "bin/python"


def against_the_conventional_stack(lab: Path, repeats: int) -> list[Figure]:
    """The default study against the same one on the usual stack, in turns.

    A turn of ours is eight trials, from the start of the first to the end of the last; of theirs
    it is two with a pruner and two without, which take most of the time of all that is measured.
    """
    whole, pruned = [], []
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        (Path(ours) / "data").symlink_to(lab / "data")
        for kind in ("whole", "pruned"):
            (Path(theirs) / kind / "MNIST").mkdir(parents=True)
            (Path(theirs) / kind / "MNIST/raw").symlink_to(lab / "data/mnist")
        for turn in range(repeats):
            seconds = _study_seconds(Path(ours), 8 * turn, 8 * (turn + 1)) / 8
            pruned.append(_conventional_seconds(Path(theirs) / "pruned", 2, lab) / seconds)
            whole.append(_conventional_seconds(Path(theirs) / "whole", 2, lab) / seconds)
    return [
        Figure("trials an hour / the conventional stack", "ratio", whole, least=6),
        Figure("trials an hour / the conventional stack, pruned", "ratio", pruned),
    ]


def _study_seconds(lab: Path, first: int, total: int) -> float:
    """Of the trials from `first` on, of the default study in its own processes."""
    program = str(Path(sys.executable).with_name("digitlab"))
    few = ["study.confirm=1", "study.confirm_seeds=1", "study.final_seeds=1"]
    _run([program, "sweep", "experiments=default", f"study.trials={total}", *few], lab)
    span = "max(julianday(datetime_complete)) - min(julianday(datetime_start))"
    with closing(sqlite3.connect(lab / "optuna.db")) as database:
        [[days]] = database.execute(f"SELECT {span} FROM trials WHERE number >= {first}")  # noqa: S608
    return float(days) * 86400


def _conventional_seconds(folder: Path, trials: int, lab: Path) -> float:
    """The mean of so many more trials of the study in the folder."""
    how = [str(folder), str(trials), folder.name]
    told = _run([sys.executable, str(ROOT / "experiments/conventional.py"), *how], lab)
    return float(sum(json.loads(told.splitlines()[-1])["seconds"])) / trials


def tracked_against_bare(recipe: Config, lab: Path, repeats: int) -> Figure:
    """A run of the default recipe, recorded in MLflow, over the same loop bare in torch."""
    config = with_values(recipe, {"optim.ema": 0.0, "trainer.epochs": 4})  # as most of its trials
    tracking = open_tracking(config, lab)
    identity = Identity("bench", "train", environment=describe_environment())
    ratios = []
    for _ in range(repeats + 1):
        bare = _timed(lambda: bare_loop(config, lab))
        ratios.append(_timed(lambda: perform(config, identity, tracking, lab, Watch())) / bare)
    del ratios[0]  # the warm-up
    return Figure("a tracked run / the same loop bare, 4 epochs", "ratio", ratios, most=1.05)


def two_workers_against_one(recipe: Config, lab: Path, repeats: int) -> Figure:
    """Runs of one epoch: time that one worker takes for two over the time that two workers take."""
    config = with_values(recipe, {"tracking.name": "none", "study.name": "bench"})
    (lab / "locks").mkdir(exist_ok=True)
    setup = Setup(config, (), lab, None, {})
    pools = [Pool(setup, count) for count in (1, 2)]
    try:
        ratios = []
        for _ in range(repeats + 1):
            seconds = [_timed(partial(_runs, pool, config, 2)) for pool in pools]
            ratios.append(seconds[0] / seconds[1])
    finally:
        for pool in pools:
            pool.close()
    return Figure("two workers / one, images a second", "ratio", ratios[1:])  # less the warm-up


def _runs(pool: Pool, config: Config, count: int) -> None:
    jobs, ended = count, 0
    while ended < count:
        for worker in pool.idle():
            if jobs:
                pool.give(worker, Job("confirm", 0, config))
                jobs -= 1
        for worker, _ in pool.events(0.1):
            worker.job = None
            ended += 1


_RATE, _LOAD_SECONDS = 50, 10  # drawings a second, and for how long


def drawings_under_load(lab: Path, repeats: int) -> list[Figure]:
    """Drawings sent to the page's API at times that do not wait for its answers."""
    digits = load_digits(lab, "mnist", TEST).images[:100]
    files = []
    for digit in digits:
        file = io.BytesIO()
        Image.fromarray(255 - digit.numpy()).resize((280, 280)).save(file, "PNG")
        files.append(file.getvalue())
    latencies: list[list[float]] = []
    lost = 0
    with _drawing_page(lab) as address, ThreadPoolExecutor(_RATE) as senders:
        [run, *_] = json.loads(urlopen(f"{address}/runs").read())  # noqa: S310
        where = f"{address}/predict?run={run['run_id']}"

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
            begun = time.perf_counter() + 0.5
            due = [begun + i / _RATE for i in range(_RATE * _LOAD_SECONDS)]
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
    program = str(Path(sys.executable).with_name("digitlab"))
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        (own / "data").symlink_to(lab / "data")
        _run([program, "train", "experiments=fast98"], own)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [program, "draw", "--run", "fast98-seed-0", "--port", str(port)]
        place = os.environ | {"DIGITLAB_HOME": folder}
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


def empty_trial(lab: Path, earlier: int, repeats: int) -> list[Figure]:
    """Choose the values of a trial, record a run of it and tell the study; nothing is trained.

    In turns with Optuna's own ask and tell on the same storage.
    """
    overrides = ["study.pruner=none", "study.rungs=[]", "study.trials=100000"]
    config = compose("sweep", overrides)[0].config
    with tempfile.TemporaryDirectory(dir=lab) as folder:
        beside = Path(folder)
        search = Search(open_storage(beside), config)
        tracking = open_tracking(config, beside)
        chance = random.Random(0)  # noqa: S311  for numbers that only fill
        for _ in range(earlier):
            values = {knob.name: _value_of(knob, chance) for knob in search.knobs}
            search.add(values, chance.uniform(0.98, 0.995), {})
        first = search.claim(config.study.trials)
        assert first is not None
        study = search.ask(first)[0].study
        pairs = [
            (
                _timed(lambda: _empty(search, tracking, config)),
                _timed(lambda: _bare(study, search.knobs)),
            )
            for _ in range(4 * repeats)
        ]
    return [
        Figure(f"an empty trial after {earlier} others", "ms", [1000 * ours for ours, _ in pairs]),
        Figure("the same / ask and tell of bare Optuna", "ratio", [a / b for a, b in pairs]),
    ]


def _value_of(knob: Hyperparameter, chance: random.Random) -> object:
    values = knob.extremes()
    if len(values) > 2 or knob.as_json:
        return chance.choice(values)
    low, high = values
    return chance.randint(low, high) if isinstance(low, int) else chance.uniform(low, high)


def _bare(study: Any, knobs: list[Hyperparameter]) -> None:
    trial = study.ask()
    suggest(trial, knobs)
    study.tell(trial, 0.5)


def _empty(search: Search, tracking: Tracking, config: Config) -> None:
    number = search.claim(config.study.trials)
    assert number is not None
    _, values, _ = search.ask(number)
    tags = trial_tags(config.study.name, number)
    record = begin_record(tracking, with_values(config, values), Identity("empty", "trial", tags))
    record.log({"val_accuracy": 0.5, "val_loss": 1.0}, step=1)
    record.end("finished")
    search.tell(number, "finished", 0.5, {"metrics": {"val_accuracy": 0.5}})


if __name__ == "__main__":
    main()
