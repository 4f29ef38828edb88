"""Every command that README and the experiments' pages print runs as it is printed.

They run in this process, on the sample of digits: make and a shell say which arguments it gets.
"""

import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CallIn
from PIL import Image
from samples import WHOLE, studies

from digitlab.base.paths import ROOT
from digitlab.cli import build_parser
from digitlab.config import compose as composing

PAGES = [ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.md"))]
COMMAND = re.compile(r"(?:make|digitlab) [a-z].*")
# What needs a cluster, the internet or many minutes, and what serves until Ctrl-C: parsed, not run.
NOT_RUN = ("setup", "test", "bench", "data", "draw", "play", "ui", "dashboard")
# So that a command takes a second or two; it prints the same lines.
SMALL = ["data=sample", "data.batch_size=200", "data.images=0"]
FEW = [
    "study.trials=2",
    "study.finish=1",
    "study.final_seeds=1",
    "study.confirm=1",
    "trainer.epochs=1",
]
FEW += ["model.widths=[4,4,4]"]
FIRST_LINE = {  # of what each command prints
    "audit": r"\d+ studies, 0 problems",
    "best": r"# @package _global_",
    "compare": r"parameters",
    "config": r"  data\.name +Name of the data set",
    "delete": r"delete study smoke with 6 trials and \d+ runs\?.*deleted: study smoke",
    "evaluate": r"\S+-final-\d+-\d+: \d+ test images",
    "explain": r"test image 0, a 7: ",
    "predict": r"photo.*\.jpg: ",
    "report": r"written: .+/reports/\w+\.html",
    "reproduce": r"reproducing \S+-final-\d+-\d+ \([0-9a-f]{32}\)|replaying study smoke as ",
    "restore": r"restored: study smoke with \d+ runs",
    "runs": r"[┏━┳┓]+",
    "show": r"run [0-9a-f]{32} \(\S+-final-\d+-\d+\): final, finished",
    "studies": r"[┏━┳┓]+",
    "sweep": r"study \S+: 2 trials over |study (smoke|default) is complete: ",
    "train": r"epoch 1/\d+  train_accuracy 0\.\d+",
}


# The same by how the command ends.
OTHER_LINE = {"--cfg job": "format: 1\n", "--csv": "run_id,name,"}


def commands(text: str) -> list[str]:
    """Return the commands of a page: of its blocks, and between backticks."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^ {4}(.*)$", text, re.MULTILINE)
    found = [line for line in blocks if COMMAND.match(line)]
    found += [line for line in re.findall(r"`([^`\n]+)`", text) if COMMAND.fullmatch(line)]
    plain = [re.split(r"\s{2,}#|\s#\s", line)[0].strip() for line in found]
    return [line for line in plain if "..." not in line]


def arguments(command: str) -> list[str]:
    """Return what `digitlab` is called with, once make and the shell have read the command.

    It is empty for a target of make that does not call digitlab.
    """
    if command.startswith("make "):
        lines = subprocess.run(
            ["bash", "-c", command.replace("make ", "make --dry-run --silent ", 1)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        picture = re.search(r'IMAGE=("[^"]+"|\S+)', command)
        command = next((line for line in lines if "bin/digitlab" in line), "digitlab")
        if picture:  # which make gives to the shell in a variable, so that any name is taken
            command = command.replace('"$PICTURE"', picture[1])
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.rpartition("/")[2] == "digitlab")
    return words[start + 1 :]


ALL = list(dict.fromkeys(command for page in PAGES for command in commands(page.read_text())))
# README's table for those who know another tool.
COMING = (ROOT / "README.md").read_text().partition("that you come from\n")[2].partition("##")[0]
IS_RUN = {line: line.split()[1] not in NOT_RUN and "launcher=ray" not in line for line in ALL}


@pytest.mark.parametrize("command", [line for line, is_run in IS_RUN.items() if not is_run])
def test_a_printed_command_that_is_not_run_is_known(command: str) -> None:
    words = arguments(command)
    if words and words[0] != "bench":
        _, parsers = build_parser()
        options = parsers[words[0]].parse_intermixed_args(words[1:])
        if words[0] == "sweep":
            assert composing.compose("sweep", options.overrides)


@pytest.fixture
def run_as_printed(
    tmp_path_factory: pytest.TempPathFactory, call_in: CallIn, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Run a command on the sample, in one lab with a finished study `smoke`."""
    lab = shutil.copytree(studies(tmp_path_factory), tmp_path_factory.mktemp("documents") / "lab")
    call = call_in(lab)
    assert call("delete", "stopped", "--yes")[0] == 0  # it was killed, which `audit` reports
    whole = composing.compose

    def compose(
        name: str, overrides: list[str], multirun: bool = False
    ) -> list[composing.Composed]:
        if name == "sweep" and "experiments=smoke" in overrides:
            return whole(name, [*overrides, *WHOLE[1:]])  # the study that is there
        few = FEW if name == "sweep" else []
        return whole(name, [*overrides, *SMALL, *few], multirun)[:2]

    monkeypatch.setattr(composing, "compose", compose)
    for name in ("photo.jpg", "photo (1).jpg"):
        Image.open(ROOT / "experiments" / "draw.png").convert("L").save(name)

    def run(command: str) -> None:
        words = [word.replace("RUN", "champion") for word in arguments(command)]
        words += ["--prepared=5"] if words[0] == "evaluate" else []
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
        status, out, err = call(*words)
        assert status == 0, f"{command}: {out}{err}"
        first_line = next((line for end, line in OTHER_LINE.items() if command.endswith(end)), "")
        assert re.match(first_line or FIRST_LINE[words[0]], out), f"{command}: {out}"

    return run


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_printed_command_runs(run_as_printed: Callable[[str], None]) -> None:
    """In the order of the pages."""
    assert sum(IS_RUN.values()) > 25
    for command in (line for line, is_run in IS_RUN.items() if is_run):
        run_as_printed(command)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_for_those_who_come_from_another_tool_runs(
    run_as_printed: Callable[[str], None],
) -> None:
    table = [line for line in COMING.splitlines() if line.startswith("|")]
    tools = [line.split(" | ")[0].strip("| ") for line in table[2:]]
    assert [tool for tool in tools if tool] == [
        *("lightning-hydra-template", "Optuna", "MLflow", "W&B"),
    ]
    lines = commands(COMING)
    assert len(lines) > 15
    for command in (line for line in lines if IS_RUN[line]):
        run_as_printed(command)


VALUES = {"name": "fast, accuracy", "unit": "%", "values": [98.0, 99.0], "least": None, "most": 9}
PAGE = """| fast | 98.50 % |

<!-- 98.50 % = speed.json: fast, accuracy, mean -->
<!-- {} -->
"""


@pytest.mark.parametrize(
    ("comment", "reason"),
    [
        ("98.5 % = speed.json: fast, accuracy, median", "98.5 % does not stand above its comment"),
        ("98.50 % = speed.json: fast, accuracy, sd", "98.50 % should be 0.71: speed.json"),
        ("98.50 % = speed.json: slow, accuracy, mean", "slow, accuracy is not"),
        ("98.50 % = speed.json: fast, accuracy, median", ""),
    ],
)
def test_a_printed_figure_is_compared_with_the_record(
    tmp_path: Path, comment: str, reason: str
) -> None:
    (tmp_path / "speed.json").write_text(json.dumps({"figures": [VALUES]}))
    problems = runpy.run_path(str(ROOT / "experiments/figures.py"))["problems"]
    found = list(problems(PAGE.format(comment), tmp_path))
    assert [reason in problem for problem in found] == [True] * bool(reason)


def test_a_table_of_figures_has_a_row_for_each_and_a_source(tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text(json.dumps({"figures": [VALUES]}))
    problems = runpy.run_path(str(ROOT / "experiments/figures.py"))["problems"]
    row = "| fast, accuracy | <= 9 | 98.5 % | 98 to 99 | 2 |"
    source = "<!-- table = speed.json -->\n"
    assert list(problems(f"{row}\n\n{source}", tmp_path)) == []
    assert list(problems(f"| slow |\n\n{source}", tmp_path)) == [f"no row {row}"]
    assert list(problems(f"{row}\n", tmp_path)) == [f"no source of the table with {row}"]
