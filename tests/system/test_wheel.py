"""The package without a checkout: built, installed elsewhere, and used from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from digitlab.base.paths import ROOT

SAMPLE = ROOT / "tests/support/digits"
TINY = ["data=sample", "model.widths=[4]", "data.batch_size=200", "trainer.epochs=1"]


def run(*command: str | Path, cwd: Path) -> str:
    unset = ("PYTHONPATH", "DIGITLAB_HOME", "MLFLOW_TRACKING_URI")
    place = {key: value for key, value in os.environ.items() if key not in unset}
    done = subprocess.run(
        command, cwd=cwd, env=place, capture_output=True, text=True, timeout=160, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def uv(*arguments: str | Path, cwd: Path) -> str:
    return run(Path(sys.executable).parent / "uv", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout, so that nothing is written into the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("conf", "experiments", "src"):
        ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    how = ["--no-build-isolation", "--python", sys.executable, "--out-dir", "dist"]
    uv("build", "--wheel", "--offline", *how, cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_every_room_is_named_in_the_package_s_list() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    source = ROOT / "src"
    rooms = [path.parent.relative_to(source) for path in source.rglob("__init__.py")]
    assert sorted(listed) == sorted(
        [*(".".join(room.parts) for room in rooms), "digitlab.conf", "digitlab.experiments"]
    )


@pytest.mark.long
def test_a_wheel_holds_configurations_recipes_and_pages(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"digitlab/{path.relative_to(ROOT)}" in files
    for path in (ROOT / "experiments").glob("*.yaml"):
        assert f"digitlab/experiments/{path.name}" in files
    assert {"digitlab/py.typed", "digitlab/pages/page.html"} <= files
    for path in (ROOT / "src/digitlab").rglob("*.html"):
        assert str(path.relative_to(ROOT / "src")) in files


@pytest.mark.long
def test_a_wheel_trains_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    uv("venv", "--offline", "--python", sys.executable, environment, cwd=tmp_path)
    uv(
        *("pip", "install", "--offline", "--no-deps", "--python", environment / "bin/python"),
        wheel,
        cwd=tmp_path,
    )
    (packages,) = environment.glob("lib/python*/site-packages")
    # What the package depends on is seen, but not the checkout: its .pth is not read from here.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    folder = tmp_path / "it's elsewhere"
    shutil.copytree(SAMPLE, folder / "lab/data/sample")
    (folder / "experiments").mkdir()
    mine = "# @package _global_\ntrainer:\n  epochs: 7\n"
    (folder / "experiments/mine.yaml").write_text(mine)
    digitlab = environment / "bin/digitlab"

    where = "import digitlab; print(digitlab.__file__)"
    assert str(environment) in run(environment / "bin/python", "-c", where, cwd=folder)
    output = run(digitlab, "train", "experiments=smoke", *TINY, cwd=folder)
    assert "val_accuracy" in output
    assert (folder / "lab/mlflow.db").is_file()
    assert "epochs: 7" in run(digitlab, "train", "experiments=mine", "--cfg", "job", cwd=folder)
    assert {path.name for path in folder.iterdir()} == {"lab", "experiments"}
