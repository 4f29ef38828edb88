"""A lab of its own for each test, with the 2,500 digits that are committed beside the tests."""

import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from digitlab.base.errors import UserError
from digitlab.cli import main
from digitlab.data import datasets
from digitlab.workers import processes

# Of the counts of the longest tests; .ci/run, which has twenty minutes, asks for less than all.
SHARE = float(os.environ.get("DIGITLAB_SHARE", "1"))

pytest_plugins = ["parts", "browsing", "unruly"]  # PostgreSQL, MLflow, Ray; a browser
DATA = Path(__file__).parent / "support" / "digits"

# Processes that tests start receive Ctrl-C, though this one may run in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
# `make test` sets these; commands are shown as `digitlab` ones, and other calls of make are plain.
for name in ("DIGITLAB_CALLER", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS", "EXPERIMENT"):
    os.environ.pop(name, None)
os.environ["DIGITLAB_HOME"] = "/nonexistent"  # no test touches a person's lab
# Where processes that tests start find this checkout's code, and the fork server `hooks`.
HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = f"{HERE.parent / 'src'}:{HERE / 'support'}"


@pytest.hookimpl(tryfirst=True)  # before the markers select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave what needs a browser to `.ci/run`: it takes a minute."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--number", help="of what a test enumerates, as it prints it: that one alone")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests have counted by `record_property`."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {value} {name}")


Wanted = Callable[..., bool]


@pytest.fixture
def is_wanted(request: pytest.FixtureRequest) -> Wanted:
    """Whether numbers are asked for: all are, but where `--number N` or `N/M` names some."""
    only = request.config.getoption("--number")
    parts = [int(part) for part in only.split("/")] if only else []
    return lambda *numbers: all(a == b for a, b in zip(numbers, parts, strict=False))


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty lab but for the sample of digits; also what the command line takes for its lab.

    Studies that a failing test has left in it are killed.
    """
    folder = tmp_path / "lab"
    shutil.copytree(DATA, folder / "data" / "sample", ignore=shutil.ignore_patterns("*.md"))
    monkeypatch.setenv("DIGITLAB_HOME", str(folder))
    yield folder
    while Parent.started:
        Parent.started.pop().kill()


@pytest.fixture(autouse=True)
def uncached_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read training images anew, whatever an earlier test of this process has cached."""
    monkeypatch.setattr(datasets, "_load_training", datasets._load_digits)


Call = Callable[..., tuple[int, str, str]]
CallIn = Callable[[Path], Call]


@pytest.fixture
def call_in(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> CallIn:
    """`digitlab` in this process, in the lab that is given, from an empty folder.

    A call returns exit status, output and error output, those of its own processes among them.
    """
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call_in(lab: Path) -> Call:
        monkeypatch.setenv("DIGITLAB_HOME", str(lab))

        def call(*arguments: str) -> tuple[int, str, str]:
            capfd.readouterr()
            try:
                status = main(arguments)
            except SystemExit as end:
                status = int(end.code or 0)
            return status, *capfd.readouterr()

        return call

    return call_in


# What studies import late, at their end for the most part.
LATE = [
    *("mlflow.store.tracking.sqlalchemy_workspace_store", "mlflow.pytorch", "mlflow.pyfunc"),
    *("mlflow.store.model_registry.sqlalchemy_workspace_store", "torch.export", "torch._dynamo"),
    *("digitlab.results.report", "optuna.visualization", "optuna.importance", "networkx"),
    *("sklearn.ensemble", "plotly.express", "jinja2"),
]


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Start the process that studies are forked from, before a test can start one without hooks."""
    processes.preload("digitlab.study.driver", "digitlab.results.publish", *LATE, "hooks")


class Parent:
    """`digitlab sweep` in a process of its own, forked from one that has imported everything.

    It works in the folder of its lab, where `hooks` looks for orders. `command` may be train.
    A champion is registered and reported, which takes longer than all else, only if asked for.
    """

    started: ClassVar[list["Parent"]] = []

    def __init__(
        self,
        lab: Path,
        overrides: Sequence[str],
        command: str = "sweep",
        published: bool = False,
    ) -> None:
        self.log = lab / "log.txt"
        self.log.touch()
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_run, args=(lab, command, list(overrides), published))
        self.process.start()
        Parent.started.append(self)

    def wait(self, seconds: float = 120) -> int | None:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"no end after {seconds} s: {self.log.read_text()[-2000:]}")
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def until(condition: Callable[[], bool], parent: Parent) -> None:
    """Wait until something holds, for as long as the study runs."""
    while not condition():
        parent.process.join(0.05)
        if parent.process.exitcode is not None:
            assert condition(), parent.log.read_text()[-2000:]


def _run(lab: Path, command: str, overrides: list[str], published: bool) -> None:
    from digitlab.config.compose import compose
    from digitlab.results.publish import publish
    from digitlab.study.driver import sweep
    from digitlab.study.run import train

    # This process was forked from the fork server, and lets it fork the workers too.
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None
    multiprocessing.forkserver.ensure_running = lambda: None  # type: ignore[assignment]
    # It inherits from the fork server that these are ignored, which a study honours.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["DIGITLAB_HOME"] = str(lab)
    os.chdir(lab)
    with open("log.txt", "a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            composed = compose(command, overrides)[0]
            if command == "train":
                status = train(composed, lab).exit_status
            else:
                status = sweep(composed, lab, *([publish] if published else []))
        except UserError as error:
            print(error)
            status = 2
    sys.exit(status)


TINY = [
    "experiments=smoke",
    "data=sample",
    "data.batch_size=200",
    "model.widths=[4]",
    "study.confirm=1",
    "study.final_seeds=1",
]


@pytest.fixture
def run_sweep(lab: Path) -> Callable[..., Parent]:
    """Start a sweep of the smallest study there is, with more overrides."""
    return lambda *overrides, **how: Parent(lab, [*TINY, *overrides], **how)
