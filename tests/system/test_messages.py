"""Messages name what was given and what is wrong with it, the rule, and what to do."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CallIn
from words import COINED

from digitlab.base.errors import UserError, refuse_damage, require
from digitlab.base.files import write_output
from digitlab.base.locks import file_lock
from digitlab.base.paths import ROOT
from digitlab.config.recorded import config_from_yaml
from digitlab.data.datasets import TEST, load_digits
from digitlab.records.tracker import NoTracker

ERRORS = ("UserError", "TrackerAway", "TrackerRefused", "TrackerUnwritable")
# Messages of one part or two, by the module that raises them.
SHORT = {
    "digits/predict.py": "one line for each image of many",
    "config/recorded.py": "its caller adds the file, which is what was given",
    "results/bundle.py": "its caller adds the file",
}


# What a message may end with, beside a full stop: suggestions, a command, a text to be copied.
END = re.compile(r"([.?]|\{nearest\}|\{_[A-Z]+\}|(: |: rm |written |study\.name=)\{\})$")
VERBS = (
    "add answer bring build call clone correct fetch finish give go import install leave look "
    "lower name narrow open put quote raise read remove repair replace reproduce restore run see "
    "set start stop take train try use wait write"
).replace(" ", "|")
ADVICE = re.compile(rf"\{{(nearest|_[A-Z]+)\}}|it (must|needs)|[.:;,] ({VERBS})\b", re.IGNORECASE)


def messages() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each message, its placeholders as `{}`."""
    package = ROOT / "src/digitlab"
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS:
                text = plain(node.args[0])
                words = re.findall(r"\w\w+", re.sub(r"\{\}", "", text))
                if len(words) > 6:  # else it passes on another one's reason
                    yield f"{path.relative_to(package)}:{node.lineno}", text


def plain(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(plain, node.values))
    if isinstance(node, ast.Constant):
        return str(node.value)
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    name = getattr(inner, "id", "") or getattr(getattr(inner, "func", None), "id", "")
    return f"{{{name}}}" if name == "nearest" or re.fullmatch("_[A-Z]+", name) else "{}"


ALL = list(messages())
LONG = [(place, text) for place, text in ALL if place.split(":")[0] not in SHORT]


def test_every_message_ends_as_a_sentence_does() -> None:
    assert len(ALL) > 100
    assert [(place, text) for place, text in LONG if not END.search(text)] == []


def test_every_message_gives_a_rule_or_advice() -> None:
    assert [(place, text) for place, text in LONG if not ADVICE.search(text)] == []


COMMANDS = [
    ("trane",),
    ("train", "trainer.epochs=0"),
    ("train", "trainer.epoch=1"),
    ("train", "model=resnet"),
    ("train", "trainer.seed=1,2"),
    ("train", "--config-from", "nothing"),
    ("sweep", "data.evaluate_on=test"),
    ("sweep", "data=sample", "model.hidden=tag(exp,interval(1,2))"),
    ("sweep", "data=sample", "study.sampler=grid"),
    ("sweep", "study.storage=mysql://localhost/optuna"),
    ("sweep", "study.storage=postgresql+psycopg://me:secret@localhost/optuna"),
    ("runs", "--json", "--csv"),
    ("show", "nothing"),
    ("best", "nothing"),
    ("delete", "nothing"),
    ("restore", "nothing"),
    ("export", "nothing", "file.zip"),
    ("import", "file.zip"),
    ("reproduce",),
    ("reproduce", "--at-commit", "--study", "nothing"),
    ("compare", "nothing", "nothing"),
    ("report",),
    ("predict", "nothing.png"),
    ("explain", "0"),
    ("ui", "--port", "0"),
    ("data", "cifar"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_mistake_is_answered_in_one_plain_line(
    lab: Path, call_in: CallIn, words: tuple[str, ...]
) -> None:
    """In an empty lab: what was given comes first, then what to do."""
    status, out, err = call_in(lab)(*words)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"digitlab: [^\n]+[.?)\w`']\n", err), err
    assert not COINED.search(err)
    assert "secret" not in err
    assert len(re.split(r"[.:;,?] ", err)) > 2, err


def raise_by_writing(folder: Path) -> None:
    write_output(folder / "file" / "page.html", "text", "--out", folder / "lab")


def raise_by_reading(folder: Path) -> None:
    with refuse_damage(f"{folder / 'file'}"):
        raise KeyError("config")


def raise_by_locking(folder: Path) -> None:
    with (
        file_lock(folder / "lock", ""),
        file_lock(folder / "lock", "X is busy: it must be free. Wait."),
    ):
        pass


@pytest.mark.parametrize(
    "act",
    [
        raise_by_writing,
        raise_by_reading,
        raise_by_locking,
        lambda _: require(False, "--repeats 0", "an integer >= 1"),
        lambda _: config_from_yaml("format: 1\nmodel: {name: os.abort}"),
        lambda folder: load_digits(folder, "nothing", TEST),
        lambda _: NoTracker().get("seed"),
        lambda _: NoTracker().artifact("seed", "config.yaml"),
    ],
)
def test_an_error_of_a_library_call_has_the_same_form(
    tmp_path: Path, act: Callable[[Path], None]
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError) as raised:
        act(tmp_path)
    text = str(raised.value)
    assert re.search(r"[.?]$", text), text
    assert len(re.split(r"[.:;,?] ", text)) > 1, text
    assert not COINED.search(text)
