"""The command `digitlab`: what can be typed. What is then done stands in `commands`."""

import argparse
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from digitlab import __version__, commands
from digitlab.base.errors import UserError, first_line, nearest
from digitlab.base.files import disk_problem
from digitlab.base.invocation import split_stores
from digitlab.base.paths import CONF, recipe_folders

_GROUPS = ("data", "model", "optim", "trainer", "study", "tracking", "launcher")
_OVERRIDES = """\
name=NAME names the run. All settings, with their limits: digitlab config

groups and their options:
{groups}

ranges that `digitlab sweep` searches, in Hydra's sweep grammar:
  model.hidden=16,32,64                               one of these
  'model.widths=choice([16,32],[32,64])'              one of these lists
  'trainer.epochs=range(1,6)'                         1, 2, 3, 4 or 5
  'model.hidden=int(interval(16,64))'                 an integer between limits
  'optim.learning_rate=tag(log,interval(1e-3,0.1))'   a number, on a logarithmic scale

examples:
  digitlab train experiments=seed trainer.epochs=5
  digitlab train --multirun trainer.seed=1,2,3
  digitlab sweep experiments=smoke study.name=mine 'model.hidden=int(interval(8,64))'"""
_STORES = """\
tracking.uri=URI, tracking.experiment=NAME and study.storage=ADDRESS name the place of the
records, if it is not the lab"""
_MORE = """\
`digitlab help COMMAND` explains one. With --debug, each shows the traceback of an error."""
_RUN = "id, a unique beginning of one, name, STUDY/TRIAL, STUDY/champion, or champion"


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as all commands do."""

    def __init__(self, **how: Any) -> None:
        plain = partial(argparse.RawDescriptionHelpFormatter, max_help_position=26)
        super().__init__(**{"allow_abbrev": False, "formatter_class": plain, **how})

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{self.prog.removeprefix('digitlab ')}: {message}. See `{self.prog} --help`."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        try:
            status = _run(arguments)
        except SystemExit as end:  # argparse's, after --help or --version
            status = int(end.code or 0)
        if sys.stdout is not None:  # it was closed: `>&-`
            sys.stdout.flush()
        return status
    except UserError as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"digitlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        problem = disk_problem(error) or _database_problem(error)
        if debug or not problem:
            raise
        what = "the lab, or what the output goes to,"
        print(f"digitlab: {what} cannot be used: {problem}. Repair that first.", file=sys.stderr)
        with suppress(OSError, AttributeError):  # or the output is written again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


def _database_problem(error: Exception) -> str:
    """Return why Optuna's storage does not answer; empty if that is not the cause."""
    from digitlab.base.server import is_away  # and SQLAlchemy, which not every command needs

    return f"Optuna's storage: {first_line(error.__cause__ or error)}" if is_away(error) else ""


def _run(arguments: list[str]) -> int:
    parser, known = build_parser()
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if not arguments:
        parser.print_help()
        return 0
    name, *rest = arguments
    if "--" in rest:  # what follows are files and the like, never options
        at = rest.index("--")
        named = [f"./{word}" if re.match("-.", word) else word for word in rest[at + 1 :]]
        rest = [*rest[:at], *named]
    if name.startswith("-"):
        parser.parse_args(arguments)  # --help and --version end the process
    if name not in known:
        raise UserError(f"{name}: no such command, {nearest(name, known)}")
    stores: list[str] = []
    if known[name].get_default("stores") is not None:
        stores, rest = split_stores(rest)
    options, unknown = known[name].parse_known_intermixed_args(rest)
    if unknown and name != "bench":
        known[name].error(f"{' '.join(unknown)}: not known here")
    options.rest, options.stores = unknown, stores
    act: Callable[[argparse.Namespace], int] = options.act
    return act(options)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is invalid: it must be a whole number, 0 or more")
    return int(text)


def _shared(*names: str, **how: Any) -> argparse.ArgumentParser:
    """Return a parent of those commands that take this option."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(*names, **how)
    return parent


_JSON = _shared("--json", action="store_true", help="print one JSON document")
_CSV = _shared("--csv", action="store_true", help="print comma-separated values")
_OPEN = _shared("--open", action="store_true", help="open the page in the browser")
_WITH = _shared("--run", metavar="RUN", help=f"{_RUN} (default: champion, else the newest run)")
_STUDY = _shared("study", metavar="STUDY", help="name of a study")


def _out(what: str, metavar: str = "FILE") -> argparse.ArgumentParser:
    return _shared("--out", type=Path, metavar=metavar, help=what)


def _port(port: int) -> argparse.ArgumentParser:
    text = "port to listen on (default: %(default)s)"
    return _shared("--port", type=int, metavar="N", default=port, help=text)


class _Builder:
    """Adds commands to a parser; those that read records take the words for where they are."""

    def __init__(self, listed: str) -> None:
        self.parser = Parser(
            prog="digitlab",
            description="A tracked hyperparameter study of handwritten digits.",
            epilog="commands:\n",
        )
        version = f"digitlab {__version__}"
        self.parser.add_argument("--version", action="version", version=version)
        self.commands = self.parser.add_subparsers(metavar="COMMAND", help=listed)

    def add(
        self,
        name: str,
        act: Callable[[argparse.Namespace], int],
        text: str,
        *parents: argparse.ArgumentParser,
        more: str = "",
        **how: Any,
    ) -> argparse.ArgumentParser:
        self.parser.epilog = f"{self.parser.epilog}  {name:<11} {text}\n"
        about = f"{text[0].upper()}{text[1:]}.{more and ' '}{more}"
        how |= {"help": text, "description": about, "parents": parents}
        added: argparse.ArgumentParser = self.commands.add_parser(name, **how)
        added.set_defaults(act=act)
        return added

    def add_reader(
        self, name: str, act: Callable[[argparse.Namespace], int], text: str, *parents: Any,
        more: str = "",
    ) -> argparse.ArgumentParser:  # fmt: skip
        added = self.add(name, act, text, *parents, more=more, epilog=_STORES)
        added.set_defaults(stores=[])
        return added


def build_parser(
    listed: str = argparse.SUPPRESS,
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of `digitlab`, and those of its commands.

    Args:
        listed: the help of the list of commands, which the epilog prints. shtab leaves out commands
            without help.
    """
    builder = _Builder(listed)
    _add_training(builder)
    _add_studies(builder)
    _add_results(builder)
    _add_digits(builder)
    _add_pages(builder)
    shell = builder.add("completion", _complete, "print a script that completes commands")
    shell.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="the shell it is for")
    builder.parser.epilog = f"{builder.parser.epilog}\n{_MORE}"
    return builder.parser, dict(builder.commands.choices)


def _complete(options: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(build_parser("a command")[0], options.shell))
    return 0


def _add_training(builder: _Builder) -> None:
    data = builder.add("data", commands.data, "fetch and verify a data set")
    # Not %(default)s: argparse has no default of a positional while it parses.
    names = "mnist, fashion_mnist, kmnist, or one of your own (default: mnist)"
    data.add_argument("name", nargs="?", default="mnist", help=names)
    place = "make a data set of that name of a folder with a folder of images a class, or NPZ"
    data.add_argument("--from", dest="source", type=Path, metavar="PLACE", help=place)
    centre = "find the ink of each image and centre it, as predict does (default: scale alone)"
    data.add_argument("--prepare", action="store_true", help=centre)
    for name, run, text in (
        ("train", commands.train, "train one model; takes any override"),
        ("sweep", commands.sweep, "run a study, or continue it; takes any override"),
    ):
        lines = [f"  {group:<12} {', '.join(_options([CONF / group]))}" for group in _GROUPS]
        lines.append(f"  {'experiments':<12} {', '.join(_options(recipe_folders()))}")
        epilog = _OVERRIDES.format(groups="\n".join(lines))
        added = builder.add(name, run, text, epilog=epilog)
        override = "KEY=VALUE or GROUP=OPTION (default: experiments=default)"
        added.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=override)
        combine = "do so for every combination of values such as trainer.seed=1,2"
        added.add_argument("--multirun", "-m", action="store_true", help=combine)
        going = "with --multirun: go on after a job that is refused, as after one that fails"
        added.add_argument("--keep-going", action="store_true", help=going)
        place = "add a folder's groups, such as recipes in FOLDER/experiments"
        added.add_argument("--config-dir", "-cd", metavar="FOLDER", help=place)
        cfg = "print the configuration, and stop"
        added.add_argument("--cfg", "-c", choices=["job"], help=cfg)
        if name == "train":
            again = "start from a run's configuration instead of a recipe's"
            added.add_argument("--config-from", metavar="RUN", help=again)
    config = builder.add("config", commands.config, "list all settings, with their limits")
    config.add_argument("--schema", action="store_true", help="print a JSON schema instead")


def _options(folders: Sequence[Path]) -> list[str]:
    """Return the names that a group of the configuration can be given."""
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _add_studies(builder: _Builder) -> None:
    runs = builder.add_reader(
        "runs", commands.runs, "list runs", _JSON, _CSV,
        more="Those measured on test images come first, then by validation accuracy, then pruned "
        "ones by their last rung's; of each, the best first.",
    )  # fmt: skip
    runs.add_argument("--study", metavar="STUDY", help="those of a study")
    kinds = ["study", "trial", "unpruned", "confirm", "measure", "final", "champion"]
    kinds += ["train", "reproduction"]
    runs.add_argument("--kind", choices=kinds, help="those of a kind")
    states = ["running", "finished", "pruned", "failed", "interrupted"]
    runs.add_argument("--state", choices=states, help="those in a state")
    most = "runs to list; 0 lists all (default: %(default)s; all with --json and --csv)"
    runs.add_argument("--most", type=_count, metavar="N", default=20, help=most)
    studies = "list studies, the best first"
    listed = builder.add_reader("studies", commands.studies, studies, _JSON, _CSV)
    listed.add_argument("--deleted", action="store_true", help="list those that were deleted")
    show = "what a run or a study was: settings that are not the defaults, metrics, files"
    shown = builder.add_reader("show", commands.show, show, _JSON)
    shown.add_argument("name", metavar="RUN|STUDY", help=f"{_RUN}; or the name of a study")
    best = "print the settings of a study's champion as a recipe"
    builder.add_reader("best", commands.best, best, _STUDY)
    delete = builder.add_reader(
        "delete", commands.delete, "delete a study with its runs; asks first", _STUDY,
        more="`digitlab restore` brings it back.",
    )  # fmt: skip
    delete.add_argument("--yes", action="store_true", help="do not ask")
    builder.add_reader("restore", commands.restore, "bring a deleted study back", _STUDY)
    export = "write a study with its runs into a file that another lab can import"
    builder.add_reader("export", commands.export, export, _STUDY).add_argument(
        "file", type=Path, metavar="FILE", help="to be written"
    )
    bring = "verify a study that was exported, and record it here"
    builder.add_reader("import", commands.import_study, bring).add_argument(
        "file", type=Path, metavar="FILE", help="as `digitlab export` wrote it"
    )


def _add_results(builder: _Builder) -> None:
    audit = builder.add_reader("audit", commands.audit, "check that trials and runs agree", _JSON)
    audit.add_argument("study", nargs="*", metavar="STUDY", help="(default: all of the lab's)")
    audit.add_argument("--repair", action="store_true", help="repair what can be repaired")
    builder.add("bench", commands.bench, "measure what the machinery costs", add_help=False)
    again = builder.add_reader(
        "reproduce", commands.reproduce, "train a run or a study again, with a verdict", _JSON,
        more="Exit status: 0 identical or within tolerance, 1 not reproduced, 3 not comparable.",
    )  # fmt: skip
    again.add_argument("words", nargs="*", metavar="RUN", help=f"{_RUN}; and trainer.threads=N")
    again.add_argument("--study", metavar="STUDY", help="replay a study, by one worker")
    again.add_argument("--config", metavar="FILE", help="train the configuration of a file")
    at = "run the recorded code: trust it first"
    again.add_argument("--at-commit", action="store_true", help=at)
    unasked = "run the recorded code without asking"
    again.add_argument("--yes", action="store_true", help=unasked)
    page = "write it as an HTML page, too"
    compare = "what differs between runs, and whether that may be chance"
    runs = builder.add_reader("compare", commands.compare, compare, _JSON, _out(page))
    each = f"two or more, each: {_RUN}; STUDY/ is the study's best trials"
    runs.add_argument("runs", nargs="+", metavar="RUN", help=each)
    target = _out("file to write (default: reports/STUDY.html in the lab)")
    text = "write a study's report, one HTML file that works offline"
    report = builder.add_reader("report", commands.report, text, target, _OPEN)
    newest = "name of a study (default: the newest)"
    report.add_argument("study", nargs="?", metavar="STUDY", help=newest)


def _add_digits(builder: _Builder) -> None:
    predict = builder.add_reader(
        "predict", commands.predict, "which digit an image shows, and how sure that is",
        _WITH, _JSON, _out("folder for the images of 28x28 that the network sees", "FOLDER"),
        more="Probabilities are calibrated on validation images; the network's own stands beside. "
        "Exit status: 0, or 2 where one could not be read.",
    )  # fmt: skip
    files = "files, folders, - for standard input"
    predict.add_argument("image", nargs="+", metavar="IMAGE", help=files)
    deep = "read the sub-folders of folders, too"
    predict.add_argument("--recursive", action="store_true", help=deep)
    why = "draw why, in explained/ of the lab"
    predict.add_argument("--explain", action="store_true", help=why)
    picture = _out("file for the picture (default: in explained/ of the lab)")
    text = "what a network sees in a digit, and why it decides so"
    explain = builder.add_reader("explain", commands.explain, text, _WITH, picture)
    explain.add_argument("image", help="a file, or the index of a test image, from 0")
    other = "the other digit (default: the next likely)"
    explain.add_argument("--against", type=int, metavar="DIGIT", choices=range(10), help=other)
    shifted = "measure a run's network on images that are shifted, rotated or noisy"
    evaluate = builder.add_reader(
        "evaluate", commands.evaluate, shifted, _WITH, _JSON,
        more="With the default this takes several minutes; with `--prepared 100`, about one.",
    )  # fmt: skip
    count = "images of each change that are prepared, too (default: %(default)s)"
    evaluate.add_argument("--prepared", type=int, metavar="N", default=1000, help=count)


def _add_pages(builder: _Builder) -> None:
    draw = "a page to draw digits on and see them read"
    builder.add_reader("draw", commands.draw, draw, _WITH, _port(8000), _OPEN)
    play = "a page to change a network's layers, train it and watch it learn"
    added = builder.add("play", commands.play, play, _port(8000), _OPEN)
    override = "KEY=VALUE or GROUP=OPTION to start from (default: experiments=seed)"
    added.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=override)
    ui = "open MLflow's pages on the lab's records"
    builder.add("ui", commands.ui, ui, _port(5000), _OPEN)
    dashboard = "open Optuna's pages on the lab's studies"
    builder.add_reader("dashboard", commands.dashboard, dashboard, _port(8080), _OPEN)
