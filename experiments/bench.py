"""`digitlab bench`: what the machinery costs, most of it as ratios of two things run in turns.

Every part records in a temporary lab of its own. A person's stores are out of reach: neither the
environment nor the lab's .env names them to a part or to a process that it starts.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_driver import driver, trial
from bench_play import play
from bench_programs import article, commands, conventional, draw, start
from bench_tools import OWN_STORES, Figure, leave_stores, own_lab, timed

from digitlab.base.console import Board, table
from digitlab.base.environment import describe_environment
from digitlab.base.errors import require
from digitlab.cli import Parser
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.config.types import Config
from digitlab.data.datamodule import DigitsData
from digitlab.networks.table import build_network
from digitlab.records.record import Identity, open_records
from digitlab.study.run import run_once
from digitlab.training.evaluate import evaluate
from digitlab.training.module import build_optimizer, build_schedule
from digitlab.workers.base import End, Finished, Job, Workers, WorkerSetup
from digitlab.workers.processes import ProcessWorkers, preload


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
            bare = timed(lambda: bare_loop(config, lab))
            with contextlib.redirect_stdout(io.StringIO()):
                ratios.append(timed(lambda: run_once(config, identity, records, lab)) / bare)
    del ratios[0]  # the warm-up
    return [Figure("a tracked run / the same loop bare, 4 epochs", "ratio", ratios, most=1.03)]


def checkpoints(lab: Path, repeats: int) -> list[Figure]:
    """Runs of the default recipe that keep a checkpoint six times a minute, over ones without."""
    identity = Identity("bench", "train", environment=describe_environment())
    ratios = []
    setting = "trainer.checkpoint_minutes"
    every = {minutes: with_values(_epochs(4), {setting: minutes}) for minutes in (0.0, 1 / 6)}
    with open_records(every[0.0], lab) as records:
        for _ in range(repeats + 1):
            with contextlib.redirect_stdout(io.StringIO()):
                without, kept = (
                    timed(partial(run_once, config, identity, records, lab))
                    for config in every.values()
                )
            ratios.append(kept / without)
    del ratios[0]  # the warm-up
    return [Figure("a run with six checkpoints a minute / with none", "ratio", ratios, most=1.01)]


def two_workers(lab: Path, repeats: int) -> list[Figure]:
    """Runs of one epoch: the time that one worker takes for two, over that of two workers."""
    config = _epochs(1)
    setup = WorkerSetup(lab, config.data)
    ratios = []
    with ProcessWorkers(setup, 1) as one, ProcessWorkers(setup, 2) as two:
        for _ in range(repeats + 1):
            seconds = [timed(partial(_jobs, workers, config, 2)) for workers in (one, two)]
            ratios.append(seconds[0] / seconds[1])
    del ratios[0]  # the warm-up
    return [Figure("two workers / one, images a second", "ratio", ratios)]


def _jobs(workers: Workers, config: Config, count: int) -> None:
    waiting, ended = count, 0
    workers.start()
    while ended < count:
        for worker in workers.idle()[:waiting]:
            workers.submit(worker, Job(config))
            waiting -= 1
        for _, event in workers.events(10):
            if isinstance(event, End):
                require(isinstance(event, Finished), f"a training: {event}", "one that finishes")
                ended += 1


PARTS: dict[str, Callable[[Path, int], list[Figure]]] = {
    "start": start,
    "commands": commands,
    "tracked": tracked,
    "checkpoints": checkpoints,
    "workers": two_workers,
    "driver": driver,
    "trial": trial,
    "article": article,
    "conventional": conventional,
    "draw": draw,
    "play": play,
}


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
    with own_lab(lab) as own:
        for name in chosen:
            figures += PARTS[name](own, options.repeats)
            document = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
            (options.out or lab / "bench.json").write_text(json.dumps(document, indent=1))
    columns = ["figure", "median", "spread", "n", "unit", "bar", "verdict"]
    Board().print(table(machine, columns, [figure.row() for figure in figures]))


if __name__ == "__main__":
    main()
