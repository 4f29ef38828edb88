"""Parts of the bench that time whole programs: this one's commands, and others'."""

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from bench_tools import OWN_STORES, PROGRAM, Figure, own_lab, quantile, run, timed
from PIL import Image

from digitlab.base.limits import usable_cores
from digitlab.base.paths import ROOT
from digitlab.data.datasets import TEST, load_digits


def start(lab: Path, repeats: int) -> list[Figure]:
    """From the command to its end, and from `digitlab sweep` in an empty lab to the first step."""
    helped, configured, stepped = [], [], []
    for _ in range(repeats):
        helped.append(1000 * timed(partial(run, [PROGRAM, "--help"], lab)))
        configured.append(timed(partial(run, [PROGRAM, "train", "--cfg", "job"], lab)))
        with own_lab(lab) as empty:
            started = time.time()
            few = ["study.trials=1", "study.final_seeds=1", "study.confirm=1"]
            run([PROGRAM, "sweep", "experiments=smoke", *few, *OWN_STORES], empty)
            query = "SELECT min(timestamp) FROM metrics WHERE key = 'training_flops'"
            with closing(sqlite3.connect(empty / "mlflow.db")) as database:  # noted before step 1
                [[milliseconds]] = database.execute(query)
            stepped.append(milliseconds / 1000 - started)
    return [
        Figure("digitlab --help", "ms", helped, most=150),
        Figure("digitlab train --cfg job", "s", configured),
        Figure("sweep in an empty lab, to the first step", "s", stepped, most=8),
    ]


def commands(lab: Path, repeats: int) -> list[Figure]:
    """Commands on a finished study as whole processes, in turns with `import torch` alone."""
    sweep = ["sweep", "experiments=smoke", "study.trials=2", *OWN_STORES]
    read_only = {
        **dict.fromkeys(("predict 8.png", "report", "compare smoke/", "show smoke"), 2.5),
        " ".join(sweep): 2.5,
        **dict.fromkeys(("audit", "runs", "studies"), 2.0),
    }
    ratios: dict[str, list[float]] = {words: [] for words in (*read_only, "train")}
    with own_lab(lab) as own, contextlib.chdir(own):
        run([PROGRAM, *sweep], own)
        digits = load_digits(own, "mnist", TEST)
        Image.fromarray(digits.images[(digits.labels == 8).argmax()]).save("8.png")
        run([PROGRAM, "predict", "8.png"], own)  # which fits the calibration, once for all
        for _ in range(repeats):
            torch_s = timed(partial(run, [sys.executable, "-c", "import torch"], own))
            for words in read_only:
                took = timed(partial(run, [PROGRAM, *words.split()], own))
                ratios[words].append(took / torch_s)
            started = time.perf_counter()
            text = run([PROGRAM, "train", "experiments=smoke", *OWN_STORES], own)
            training_s = float(text.split("_accuracy ")[-1].split(" in ")[1].split(" s")[0])
            ratios["train"].append((time.perf_counter() - started - training_s) / torch_s)
    bars = read_only | {"train": 4.5}
    return [
        Figure(f"{words.split()[0]}, of import torch", "x", values, most=bars[words])
        for words, values in ratios.items()
    ]


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


_RECIPES = {"seed": 2.0, "fast98": 30.0, "fast99": 10.0, "fast994": 2.5}  # times as fast, at least
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
    """The study of `halving` against the same one on the usual stack, in turns.

    A turn of ours is eight trials, from the start of the first to the end of the last; of theirs
    it is two with a pruner and two without, which take most of the time of all that is measured.
    """
    ratios: dict[str, list[float]] = {"whole": [], "pruned": []}
    with own_lab(lab) as ours, tempfile.TemporaryDirectory(dir=lab) as theirs:
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
    """Return the seconds of the trials of `halving` from `first` on, in its processes."""
    few = ["study.confirm=1", "study.final_seeds=1", *OWN_STORES]
    run([PROGRAM, "sweep", "experiments=halving", f"study.trials={total}", *few], lab)
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
        Image.fromarray(255 - digit).resize((280, 280)).save(file, "PNG")
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
        Figure("50 drawings a second: median", "ms", [quantile(v, 0.5) for v in kept]),
        Figure("50 drawings a second: p99", "ms", [quantile(v, 0.99) for v in kept], most=150),
        Figure("50 drawings a second: lost, of all", "requests", [float(lost)], most=0),
    ]


@contextmanager
def _drawing_page(lab: Path) -> Iterator[str]:
    """The address of `digitlab draw` with a network that was trained a second ago."""
    with own_lab(lab) as own:
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
