"""Words, names, sizes and the map in CONTRIBUTING.md: what people read is plain and true."""

import ast
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from words import COINED

from digitlab.base.paths import ROOT

# Where such a word is right: a line that holds this text may have it.
EXCEPTIONS = {
    '"trial.told"': "a fault point, named after Optuna's `tell`",
    "replace `data.fold` and `data.holdout`": "the changelog names keys as they were",
}
WRITTEN = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")),
    *(ROOT / ".ci").iterdir(),
    *(
        path
        for folder in ("src", "tests", "conf", "experiments")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".md", ".yaml", ".html", ".js", ".sh", ".ipynb")
        and path.name != "words.py"
    ),
]


def test_no_coined_word_is_left() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in WRITTEN
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if COINED.search(line) and not any(text in line for text in EXCEPTIONS)
    ]
    assert found == []


def test_every_exception_is_needed() -> None:
    lines = [line for path in WRITTEN for line in path.read_text().splitlines()]
    for text in EXCEPTIONS:
        assert any(text in line and COINED.search(line) for line in lines), text


def modules() -> Iterator[ast.Module]:
    for path in (ROOT / "src").rglob("*.py"):
        yield ast.parse(path.read_text())


def test_no_two_classes_or_types_share_a_name() -> None:
    names: Counter[str] = Counter()
    for module in modules():
        for node in module.body:
            if isinstance(node, ast.ClassDef):
                names[node.name] += 1
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id  # of a type, such as Results = dict[str, ...]
                names[name] += re.fullmatch(r"[A-Z][a-z]\w*", name) is not None
    # The public one wraps the other: `digitlab.Predictor`.
    assert {name for name, count in names.items() if count > 1} == set()


def test_a_class_a_function_and_a_file_can_be_read_at_a_time() -> None:
    most = {ast.ClassDef: 150, ast.FunctionDef: 60}  # lines
    assert [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for module in modules()
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > most[type(node)]
    ] == []
    files = (ROOT / "src").rglob("*.py")
    assert [path for path in files if len(path.read_text().splitlines()) > 400] == []


def test_the_map_of_rooms_lists_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\w, ]+) \|$", text, re.MULTILINE)
    listed = {room: sorted(modules.split(", ")) for room, modules in rows}
    folders = (path.parent for path in (ROOT / "src/digitlab").glob("*/__init__.py"))
    present = {
        folder.name: sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
        for folder in folders
    }
    assert listed == present


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_every_file_of_the_project_that_is_named_exists(page: str) -> None:
    named = re.findall(r"`(\w[\w/]+\.(?:py|md|yaml|json))`", (ROOT / page).read_text())
    assert len(named) > 5
    for path in named:
        places = (ROOT, ROOT / "src/digitlab", ROOT / "src/digitlab/networks", ROOT / "experiments")
        assert any((place / path).exists() for place in places) or path in OF_A_LAB, path


OF_A_LAB = {"faults.json"}


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 110] == []
