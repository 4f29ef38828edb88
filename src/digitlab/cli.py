"""The command `digitlab`: parse, build, run, close."""

import argparse
import io
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from digitlab.base.errors import UserError, nearest
from digitlab.base.files import disk_problem
from digitlab.base.paths import RECIPES, lab_folder

if TYPE_CHECKING:
    from digitlab.config.compose import Composed


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as all commands do."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('digitlab ')}: {message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        if debug:
            raise
        print(f"digitlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        problem = disk_problem(error)
        if debug or not problem:
            raise
        print(f"digitlab: the lab cannot be used: {problem}. Repair that first", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: digitlab COMMAND [ARGUMENTS]   (--debug shows the traceback of an error)\n")
        for name, (text, _) in _COMMANDS.items():
            print(f"  {name:<10} {text}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in _COMMANDS:
        raise UserError(f"{command}: no such command, {nearest(command, _COMMANDS)}")
    return _COMMANDS[command][1](rest)


def _data(arguments: list[str]) -> int:
    parser = Parser("digitlab data", description="Fetch and verify a data set.")
    parser.add_argument("name", nargs="?", default="mnist", help="mnist, fashion_mnist")
    name = parser.parse_args(arguments).name
    from digitlab.data.datasets import TEST, TRAIN, load_digits

    for files in (TRAIN, TEST):
        digits = load_digits(lab_folder(), name, files)
        for file, digest in digits.sha256.items():
            print(f"{digest}  {file}")
    return 0


def _train(arguments: list[str]) -> int:
    from digitlab.config.compose import compose

    parser = Parser("digitlab train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config-from", metavar="RUN")
    options, arguments = parser.parse_known_args(arguments)
    if options.config_from:
        from digitlab.results.reproduce import train_from

        return train_from(options.config_from, arguments, lab_folder())
    jobs = compose("train", arguments)
    if not jobs:  # --help, --cfg and the like have printed what was asked for
        return 0
    from digitlab.study.run import train

    lab = lab_folder()
    return _run_all(jobs, lambda job: train(job, lab))


def _run_all(jobs: Sequence["Composed"], run: Callable[["Composed"], int]) -> int:
    """Run the jobs of --multirun in turn; one that is stopped ends them all."""
    statuses = []
    for job in jobs:
        statuses.append(run(job))
        if statuses[-1] == 130:
            left = len(jobs) - len(statuses)
            if left:
                print(f"{left} of {len(jobs)} jobs were not started")
            break
    return max(statuses)


def _sweep(arguments: list[str]) -> int:
    from digitlab.workers.processes import preload

    lab = lab_folder()  # whose .env the workers inherit
    if not any(argument.startswith("-") for argument in arguments):
        preload()  # beside the parent's own imports
    from digitlab.config.compose import compose

    jobs = compose("sweep", arguments)
    if not jobs:
        return 0
    from digitlab.results.publish import publish
    from digitlab.study.driver import sweep

    return _run_all(jobs, lambda job: sweep(job, lab, publish))


def _config(arguments: list[str]) -> int:
    parser = Parser("digitlab config", description="List all settings, with their limits.")
    parser.add_argument("--schema", action="store_true", help="print a JSON schema instead")
    options = parser.parse_args(arguments)
    from digitlab.config.schema import describe_settings, json_schema

    print(json.dumps(json_schema(), indent=2) if options.schema else describe_settings())
    return 0


def _audit(arguments: list[str]) -> int:
    parser = Parser(
        "digitlab audit", description="Check that each trial of a study and its run agree."
    )
    parser.add_argument("study", nargs="*", help="names of studies; all of the lab's if none")
    parser.add_argument("--repair", action="store_true", help="repair what can be repaired")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args(arguments)
    from digitlab.results.audit import inspect

    return inspect(options.study, lab_folder(), options.repair, options.json)


def _bench(arguments: list[str]) -> int:
    script = RECIPES / "bench.py"
    if not script.is_file():
        raise UserError("bench is not available here: it needs a checkout. Clone the repository")
    sys.argv[1:] = arguments
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _reproduce(arguments: list[str]) -> int:
    parser = Parser(
        "digitlab reproduce",
        description="Train again from a record alone. Exit status: 0 identical or within "
        "tolerance, 1 not reproduced, 3 not comparable.",
    )
    parser.add_argument(
        "run", nargs="?", help="id, a unique beginning of one, name, STUDY/TRIAL, or champion"
    )
    parser.add_argument(
        "overrides", nargs="*", help="trainer.threads=N, tracking.uri=...; any, with --config"
    )
    parser.add_argument("--study", help="replay a whole study, trial by trial, by one worker")
    parser.add_argument("--config", help="train the configuration of a file", metavar="FILE")
    parser.add_argument(
        "--at-commit", action="store_true", help="run the recorded code: trust it first"
    )
    parser.add_argument("--yes", action="store_true", help="run the recorded code without asking")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in (options.run, *options.overrides) if word and "=" in word]
    runs = [word for word in (options.run, *options.overrides) if word and "=" not in word]
    if len([*runs, *filter(None, (options.study, options.config))]) != 1:
        parser.error("give one of RUN, --study NAME and --config FILE")
    if options.at_commit and not runs:
        parser.error("--at-commit goes with RUN alone")
    if (options.json and options.config) or (overrides and options.study):
        parser.error("--config takes no --json, --study no overrides")

    lab = lab_folder()  # whose .env the workers inherit
    if options.study:
        from digitlab.workers.processes import preload

        preload()
        from digitlab.results.replay import replay

        return replay(options.study, lab, options.json)
    from digitlab.results.reproduce import reproduce, reproduce_file

    if options.config:
        return reproduce_file(Path(options.config), overrides, lab)
    return reproduce(runs[0], overrides, lab, options.json, options.at_commit, options.yes)


def _compare(arguments: list[str]) -> int:
    parser = Parser("digitlab compare", description="What differs between runs.")
    parser.add_argument("runs", nargs="+", help="two runs or more, named as for reproduce")
    parser.add_argument("--out", type=Path, help="write it as an HTML page, too", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args(arguments)
    overrides = [word for word in options.runs if "=" in word]
    runs = [word for word in options.runs if "=" not in word]
    from digitlab.results.compare import compare

    return compare(runs, overrides, lab_folder(), options.json, options.out)


def _report(arguments: list[str]) -> int:
    parser = Parser("digitlab report", description="A study on one page that needs no network.")
    parser.add_argument("study", nargs="?", help="its name; the one begun last if none is given")
    parser.add_argument("--out", type=Path, help="a file beside the recipe, say", metavar="FILE")
    options = parser.parse_args(arguments)
    from digitlab.results.report import write_report

    return write_report(options.study, options.out, lab_folder())


def _explain(arguments: list[str]) -> int:
    parser = Parser("digitlab explain", description="What a network sees in an image.")
    parser.add_argument("image", help="a file, or the index of a test image, from 0")
    parser.add_argument("--run", help="named as for reproduce (default: champion)")
    parser.add_argument("--against", type=int, choices=range(10), help="digit it did not say")
    parser.add_argument("--out", type=Path, help="the picture; lab/explained/...", metavar="FILE")
    options = parser.parse_args(arguments)
    from digitlab.digits.explain import explain

    return explain(options.image, options.run, options.against, options.out, lab_folder())


def _predict(arguments: list[str]) -> int:
    parser = Parser(
        "digitlab predict",
        description="Which digits images show. Exit status: 0, or 2 where one could not be read.",
    )
    parser.add_argument("image", nargs="+", help="files, folders, - for standard input")
    parser.add_argument("--run", help="named as for reproduce (default: champion)")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--explain", action="store_true", help="draw why, in lab/explained/")
    parser.add_argument("--save", type=Path, help="the 28x28 that are read", metavar="FOLDER")
    options = parser.parse_args(arguments)
    from digitlab.digits.predict import predict

    given = (options.image, options.run, options.json, options.explain, options.save)
    return predict(*given, lab_folder())


def _draw(arguments: list[str]) -> int:
    parser = Parser("digitlab draw", description="A page to draw digits on, on this machine.")
    parser.add_argument("--run", help="named as for reproduce (default: champion)")
    parser.add_argument("--port", type=int, default=8000, help="8000")
    options = parser.parse_args(arguments)
    from digitlab.pages.draw import draw

    return draw(options.run, lab_folder(), options.port)


def _evaluate(arguments: list[str]) -> int:
    parser = Parser("digitlab evaluate", description="A run's network on changed test images.")
    parser.add_argument("--run", help="named as for reproduce (default: champion)")
    parser.add_argument("--shift", action="store_true", required=True, help="every change there is")
    parser.add_argument("--prepared", type=int, default=1000, help="images of each, prepared; 1000")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args(arguments)
    from digitlab.digits.shift import evaluate_shift

    return evaluate_shift(options.run, options.prepared, options.json, lab_folder())


def _ui(arguments: list[str]) -> int:
    from digitlab.pages.ui import serve

    return _pages("ui", "MLflow's pages on this machine.", 5000, arguments, serve)


def _dashboard(arguments: list[str]) -> int:
    from digitlab.pages.ui import dashboard

    return _pages("dashboard", "Optuna's pages on this machine.", 8080, arguments, dashboard)


def _pages(
    command: str, text: str, port: int, arguments: list[str], serve: Callable[[Path, int], int]
) -> int:
    parser = Parser(f"digitlab {command}", description=text)
    parser.add_argument("--port", type=int, default=port)
    options = parser.parse_args(arguments)

    return serve(lab_folder(), options.port)


_COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "data": ("fetch and verify a data set", _data),
    "train": ("train one model; takes any override", _train),
    "sweep": ("run a study, or continue it; takes any override", _sweep),
    "config": ("list all settings; --schema prints their JSON schema", _config),
    "audit": ("check that trials and runs agree; --repair repairs", _audit),
    "bench": ("measure what the machinery costs", _bench),
    "reproduce": ("train a run or a study again from its record, with a verdict", _reproduce),
    "compare": ("what differs between runs, and whether that is chance", _compare),
    "report": ("a study on one page that needs no network", _report),
    "explain": ("what a network sees in a digit, and why it says so", _explain),
    "predict": ("which digit an image shows, and how sure that is", _predict),
    "draw": ("a page to draw digits on and see them read", _draw),
    "evaluate": ("a run's network on test images that are changed: --shift", _evaluate),
    "ui": ("open MLflow's pages on the lab's records", _ui),
    "dashboard": ("open Optuna's pages on the lab's studies", _dashboard),
}
