"""The notebook `experiments/tour.ipynb`: one that Jupyter opens, whose cells run in order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from digitlab.base.paths import ROOT

TOUR = ROOT / "experiments/tour.ipynb"
# As a kernel does, in a process whose main module is no file.
KERNEL = """
import json, sys
space = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), space)
found = {name: space[name] for name in ("verdict", "champion")}
found["answer"] = [space["answer"].status, space["answer"].digit]
found["trials"] = len(space["study"].trials())
found["accuracy"] = space["first"].metrics["val_accuracy"]
print("\\n" + json.dumps(found))
"""


def test_it_is_a_notebook_without_outputs() -> None:
    notebook = json.loads(TOUR.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        kind = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        assert set(cell) == {"cell_type", "id", "metadata", "source", *kind}
        assert {key: cell[key] for key in kind} == kind
        assert cell["cell_type"] in ("code", "markdown")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_cells_run_in_order(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KERNEL, str(TOUR)],
        cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["verdict"], found["trials"]) == ("identical", 3)
    assert found["answer"] == ["digit", 7]
    assert found["accuracy"] > 0.8
    assert found["champion"]["test_accuracy"]["n"] == 2
