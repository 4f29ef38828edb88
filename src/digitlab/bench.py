"""`digitlab bench`: what the machinery costs, as ratios of two things run in turns."""

import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from digitlab.compose import compose, with_values
from digitlab.config import Config
from digitlab.console import Board, table
from digitlab.datamodule import DigitsData
from digitlab.environment import describe_environment
from digitlab.errors import UserError, require
from digitlab.lab import ROOT
from digitlab.module import build_optimizer, build_schedule, evaluate
from digitlab.networks import build_network
from digitlab.record import Identity, begin_record, trial_tags
from digitlab.run import perform
from digitlab.search import Search, open_storage
from digitlab.space import Knob, read_space
from digitlab.tracking import Tracking, open_tracking
from digitlab.training import Watch, fit
from digitlab.workers import Job, Pool, Setup, preload


@dataclass(frozen=True)
class Figure:
    """One line of the table: the median of n values, and their extremes."""

    name: str
    unit: str
    values: list[float]

    def row(self) -> list[str]:
        numbers = (statistics.median(self.values), min(self.values), max(self.values))
        return [
            self.name,
            *(f"{number:.3g}" for number in numbers),
            str(len(self.values)),
            self.unit,
        ]


def bench(lab: Path, repeats: int, only: str, out: Path | None) -> int:
    """Measure, print a table and write it as JSON; returns the exit status.

    Args:
        repeats: of each figure.
        only: part of the names of the measurements to make; all if empty.
        out: the JSON file; `bench.json` in the lab if none is given.
    """
    preload()
    recipe = compose("train", ["trainer.epochs=1"])[0].config
    measurements: dict[str, Callable[[], list[Figure]]] = {
        "start": lambda: start(lab, repeats),
        "limit": lambda: [step_against_peak(recipe, lab, repeats)],
        "tracked": lambda: [tracked_against_bare(recipe, lab, repeats)],
        "workers": lambda: [two_workers_against_one(recipe, lab, repeats)],
        "article": lambda: against_the_article(lab, repeats),
        "conventional": lambda: [against_the_conventional_stack(recipe, lab, repeats)],
        "trial": lambda: [empty_trial(lab, n, 20 * repeats) for n in (100, 1000, 10000)],
    }
    chosen = [name for name in measurements if only in name]
    require(bool(chosen), f"--only {only}", f"a part of {', '.join(measurements)}")
    figures = [figure for name in chosen for figure in measurements[name]()]
    environment = describe_environment()
    machine = f"{environment['processor']}, {environment['cores']} cores"
    columns = ["figure", "median", "least", "most", "n", "unit"]
    Board().print(table(machine, columns, [figure.row() for figure in figures]))
    document = {"machine": machine, "figures": {f.name: f.values for f in figures}}
    (out or lab / "bench.json").write_text(json.dumps(document, indent=1))
    return 0


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
    schedule = build_schedule(config.optim, optimizer, config.trainer.epochs * len(batches))
    smoothing = config.optim.label_smoothing
    for _ in range(config.trainer.epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels, label_smoothing=smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        evaluate(network, data.holdout[0], config.data)


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
        Figure("digitlab --help", "ms", helped),
        Figure("digitlab train --cfg job", "s", configured),
        Figure("sweep in an empty lab, to the first step", "s", stepped),
    ]


def _run(command: list[str], lab: Path) -> str:
    place = os.environ | {"DIGITLAB_HOME": str(lab), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def step_against_peak(recipe: Config, lab: Path, repeats: int) -> Figure:
    """Floating-point operations a second of training over those of a matrix product, one thread."""
    torch.set_num_threads(1)
    matrix = torch.randn(2048, 2048)
    shares = []
    for _ in range(repeats):
        peak = 2 * 2048**3 / min(_timed(lambda: matrix @ matrix) for _ in range(5))
        watch = _Facts()
        fit(with_values(recipe, {"trainer.threads": 1}), lab, watch)
        shares.append(watch.flops / watch.seconds / peak)
    return Figure("operations a second of an epoch / of a matrix product", "ratio", shares)


class _Facts(Watch):
    """Keeps the operations and the seconds of a run of one epoch."""

    flops = seconds = 0.0

    def begin(self, facts: Mapping[str, float]) -> None:
        self.flops, self.begun = facts["training_flops"], time.perf_counter()

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.seconds = time.perf_counter() - self.begun


def against_the_article(lab: Path, repeats: int) -> list[Figure]:
    """The article's program in Keras against its recipe and the fast ones, all cores for each."""
    python = _article_python(lab)
    cores = os.cpu_count() or 1
    recipes = {
        name: compose("train", [f"experiments={name}", "data.fold=test", f"trainer.threads={n}"])
        for name, n in (("seed", cores), *((name, cores) for name in _FAST_RECIPES))
    }
    program = [sys.executable, "-c", "from digitlab.cli import main; main()", "train"]
    keras: list[dict[str, float]] = []
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    accuracies: dict[str, list[float]] = {name: [] for name in recipes}
    wholes: list[tuple[float, float]] = []
    for repeat in range(max(repeats, _SEEDS)):
        if repeat < repeats:
            article = [str(python), str(ROOT / "experiments/article.py"), str(lab / "data/mnist")]
            begun = time.perf_counter()
            keras.append(json.loads(_run(article, lab).splitlines()[-1]))
            theirs = time.perf_counter() - begun
            ours = [*program, "experiments=seed", "data.fold=test", f"trainer.threads={cores}"]
            wholes.append((theirs, _timed(partial(_run, [*ours, "tracking=none"], lab))))
        for name, composed in recipes.items():
            if repeat < (repeats if name == "seed" else _SEEDS):
                config = with_values(composed[0].config, {"trainer.seed": repeat})
                begun = time.perf_counter()
                fitted = fit(config, lab, Watch())
                seconds[name].append(time.perf_counter() - begun)
                accuracies[name].append(100 * fitted.metrics["test_accuracy"])
    article_fit = statistics.median(run["fit"] for run in keras)
    figures = [
        Figure("the article's program, 3 epochs", "s", [run["fit"] for run in keras]),
        Figure("the article's program, test accuracy", "%", [100 * r["accuracy"] for r in keras]),
        Figure("as whole processes: article / seed", "ratio", [a / b for a, b in wholes]),
    ]
    for name in recipes:
        figures += [
            Figure(f"{name}, test accuracy", "%", accuracies[name]),
            Figure(f"{name}, load to measured", "s", seconds[name]),
            Figure(f"article / {name}", "ratio", [article_fit / s for s in seconds[name]]),
        ]
    return figures


_FAST_RECIPES = ("fast98", "fast99", "fast994")
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


def against_the_conventional_stack(recipe: Config, lab: Path, repeats: int) -> Figure:
    """Trials an hour of one epoch: a worker a core, over one process of the usual stack."""
    config = with_values(recipe, {"study.name": "bench"})
    cores = os.cpu_count() or 1
    (lab / "locks").mkdir(exist_ok=True)
    pool = Pool(Setup(config, (), lab, None, {}), cores)
    ratios = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "MNIST").mkdir()
            (Path(folder) / "MNIST/raw").symlink_to(lab / "data/mnist")
            program = [sys.executable, str(ROOT / "experiments/conventional.py"), folder, "1", "1"]
            _runs(pool, config, cores)  # the warm-up
            for _ in range(repeats):
                theirs = json.loads(_run(program, lab).splitlines()[-1])["seconds"][0]
                ours = _timed(partial(_runs, pool, config, 2 * cores)) / (2 * cores)
                ratios.append(theirs / ours)
    finally:
        pool.close()
    return Figure("trials an hour / the conventional stack", "ratio", ratios)


def tracked_against_bare(recipe: Config, lab: Path, repeats: int) -> Figure:
    """A run of the default recipe, recorded in MLflow, over the same loop bare in torch."""
    config = with_values(recipe, {"optim.ema": 0.0, "trainer.epochs": 2})
    tracking = open_tracking(config, lab)
    identity = Identity("bench", "train", environment=describe_environment())
    ratios = []
    for _ in range(repeats + 1):
        bare = _timed(lambda: bare_loop(config, lab))
        ratios.append(_timed(lambda: perform(config, identity, tracking, lab, Watch())) / bare)
    return Figure(
        "a tracked run / the same loop bare, 2 epochs", "ratio", ratios[1:]
    )  # less the warm-up


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


def empty_trial(lab: Path, earlier: int, count: int) -> Figure:
    """Choose the values of a trial, record a run of it and tell the study; nothing is trained."""
    overrides = ["study.pruner=none", "study.rungs=[]", f"study.trials={earlier + count}"]
    config = compose("sweep", overrides)[0].config
    with tempfile.TemporaryDirectory(dir=lab) as folder:
        beside = Path(folder)
        search = Search(open_storage(beside), config.study, read_space(config))
        tracking = open_tracking(config, beside)
        chance = random.Random(0)  # noqa: S311  for numbers that only fill
        for _ in range(earlier):
            values = {knob.name: _value_of(knob, chance) for knob in search.knobs}
            search.add(values, chance.uniform(0.98, 0.995), {})
        seconds = [_timed(lambda: _empty(search, tracking, config)) for _ in range(count)]
    return Figure(f"an empty trial after {earlier} others", "ms", [1000 * s for s in seconds])


def _value_of(knob: Knob, chance: random.Random) -> object:
    values = knob.extremes()
    if len(values) > 2 or knob.as_json:
        return chance.choice(values)
    low, high = values
    return chance.randint(low, high) if isinstance(low, int) else chance.uniform(low, high)


def _empty(search: Search, tracking: Tracking, config: Config) -> None:
    number = search.claim(config.study.trials)
    assert number is not None
    _, values = search.ask(number)
    tags = trial_tags(config.study.name, number)
    record = begin_record(tracking, with_values(config, values), Identity("empty", "trial", tags))
    record.log({"val_accuracy": 0.5, "val_loss": 1.0}, step=1)
    record.end("finished")
    search.tell(number, "finished", 0.5, {"metrics": {"val_accuracy": 0.5}})
