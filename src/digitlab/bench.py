"""`digitlab bench`: what the machinery costs, as ratios of two things run in turns."""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
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
from digitlab.module import build_optimizer, build_schedule, evaluate
from digitlab.networks import build_network
from digitlab.record import Identity, begin_record, trial_tags
from digitlab.run import perform
from digitlab.search import Search, open_storage
from digitlab.space import Knob, read_space
from digitlab.tracking import Tracking, open_tracking
from digitlab.training import Watch
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


def bench(lab: Path, repeats: int) -> int:
    """Measure, print a table and write `bench.json` into the lab; returns the exit status."""
    preload()
    recipe = compose("train", ["trainer.epochs=1"])[0].config
    figures = [
        tracked_against_bare(recipe, lab, repeats),
        two_workers_against_one(recipe, lab, repeats),
        *(empty_trial(lab, earlier, 20 * repeats) for earlier in (100, 5000)),
    ]
    environment = describe_environment()
    machine = f"{environment['processor']}, {environment['cores']} cores"
    columns = ["figure", "median", "least", "most", "n", "unit"]
    Board().print(table(machine, columns, [figure.row() for figure in figures]))
    document = {"machine": machine, "figures": {f.name: f.values for f in figures}}
    (lab / "bench.json").write_text(json.dumps(document, indent=1))
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
            seconds = [_timed(partial(_two_runs, pool, config)) for pool in pools]
            ratios.append(seconds[0] / seconds[1])
    finally:
        for pool in pools:
            pool.close()
    return Figure("two workers / one, images a second", "ratio", ratios[1:])  # less the warm-up


def _two_runs(pool: Pool, config: Config) -> None:
    jobs, ended = 2, 0
    while ended < 2:
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
