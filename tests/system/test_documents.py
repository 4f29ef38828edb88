"""Every command that README and the experiments' pages print runs as it is printed.

They run in this process, on the sample of digits: make and a shell say which arguments it gets.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import CallIn
from PIL import Image
from samples import WHOLE, studies

from digitlab.base.paths import ROOT
from digitlab.config import compose as composing

PAGES = [ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.md"))]
COMMAND = re.compile(r"(?:make|digitlab) [a-z].*")
# What needs other machines, the network, or longer than a test may take; what serves until Ctrl-C.
NOT_RUN = {
    "make setup", "make test", "make check", "make bench", "make clean", "make data",
    "make draw", "make ui", "make dashboard", "make play", "digitlab draw", "digitlab ui",
    "digitlab dashboard", "digitlab bench", "digitlab data",
}  # fmt: skip
HEAVY = ("EXPERIMENT=robust", "evaluate_on=test trainer.seed=0,1,2,3,4")
SMALL = ["data=sample", "data.batch_size=200"]
FEW = ["study.trials=2", "study.final_seeds=1", "study.confirm=1"]


def commands(page: Path) -> list[str]:
    """Return the commands of a page: of its blocks, and between backticks."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^ {4}(.*)$", text, re.MULTILINE)
    found = [line for line in blocks if COMMAND.match(line)]
    found += [line for line in re.findall(r"`([^`\n]+)`", text) if COMMAND.fullmatch(line)]
    plain = [re.split(r"\s{2,}#|\s#\s", line)[0].strip() for line in found]
    return [line for line in dict.fromkeys(plain) if "..." not in line]


def arguments(command: str) -> list[str]:
    """Return what `digitlab` is called with, once make and the shell have read the command."""
    if command.startswith("make "):
        told = subprocess.run(
            ["bash", "-c", command.replace("make ", "make --dry-run --silent ", 1)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        command = next(line for line in told.splitlines() if "bin/digitlab" in line)
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.rpartition("/")[2] == "digitlab")
    return words[start + 1 :]


ALL = [
    pytest.param(page, command, id=f"{page.stem}: {command}")
    for page in PAGES
    for command in commands(page)
    if page.stem != "cluster"
]


def is_run(command: str) -> bool:
    first = " ".join(command.split()[:2])
    is_light = not any(word in command for word in HEAVY)
    return first not in NOT_RUN and is_light and "launcher=ray" not in command


def test_there_are_commands_to_run() -> None:
    assert len(ALL) > 30
    assert len([one for one in ALL if is_run(str(one.values[1]))]) > 20


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a lab with a finished study `smoke`, which the commands go on with."""
    return shutil.copytree(studies(tmp_path_factory), tmp_path_factory.mktemp("documents") / "lab")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("page", "command"), [one for one in ALL if is_run(str(one.values[1]))])
def test_a_printed_command_runs(
    page: Path, command: str, lab: Path, call_in: CallIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = composing.compose

    def compose(name: str, overrides: list[str]) -> list[composing.Composed]:
        if name == "sweep" and "experiments=smoke" in overrides:
            return whole(name, [*overrides, *WHOLE[1:]])  # the study that is there
        return whole(name, [*overrides, *SMALL, *(FEW if name == "sweep" else [])])

    monkeypatch.setattr(composing, "compose", compose)
    Image.open(ROOT / "experiments" / "draw.png").convert("L").save("photo.jpg")
    words = [word.replace("RUN", "champion") for word in arguments(command)]
    status, out, err = call_in(lab)(*words)
    assert status == 0, err
    assert out.splitlines()[0].strip()
    assert "Traceback" not in err
