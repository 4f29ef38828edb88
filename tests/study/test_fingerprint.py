"""What a study's results depend on, and what they do not."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from studies import open_store

from digitlab.base.environment import _TRAINING
from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.config.types import Config
from digitlab.study.fingerprint import check_fingerprint
from digitlab.study.trials import load_study

DATA = {"train-images": "a" * 64}


@pytest.fixture
def config() -> Config:
    return compose("sweep", ["experiments=smoke", "data=sample"])[0].config


def refusal(lab: Path, config: Config, tracker: str = "lab x", **data: str) -> str:
    with pytest.raises(UserError) as raised:
        check_fingerprint(open_store(lab), config, data or DATA, tracker)
    return str(raised.value)


def test_every_difference_is_named(lab: Path, config: Config) -> None:
    check_fingerprint(open_store(lab), config, DATA, "lab x")
    check_fingerprint(open_store(lab), config, DATA, "lab x")  # as it was
    study = replace(config.study, seed=7, space=config.study.space | {"optim.momentum": "1,2"})
    trainer = replace(config.trainer, epochs=9)
    text = refusal(lab, replace(config, study=study, trainer=trainer), "lab y", other="b" * 64)
    for difference in (
        "SHA-256 of other: none -> bbbbbbbbbbbb",
        "SHA-256 of train-images: aaaaaaaaaaaa -> none",
        "study.seed: 0 -> 7",
        "study.space.optim.momentum: none -> 1,2",
        "tracker: lab x -> lab y",
        "trainer.epochs: 1 -> 9",
    ):
        assert difference in text
    assert "Restore them, or start a new study with study.name=NEW" in text


def test_settings_of_options_that_are_searched_are_named_with_their_option(lab: Path) -> None:
    searched = ["experiments=smoke", "data=sample", "model=choice(seed,convnet)"]
    config = compose("sweep", searched)[0].config
    check_fingerprint(open_store(lab), config, DATA, "lab x")
    changed = compose("sweep", [*searched, "model.dropout=0.5"])[0].config
    difference = "(model.dropout with model=convnet: 0.0 -> 0.5)"
    assert difference in refusal(lab, changed)
    # What is searched may be anything in the recipe, and so may the recipe's own option.
    convnet = with_values(config, {"model": "convnet", "model.hidden": 32})
    for own in (convnet, with_values(config, {"model": "seed"})):
        check_fingerprint(open_store(lab), own, DATA, "lab x")


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch", "pytorch-lightning", "numpy", "optuna"])
def test_another_version_of_a_library_is_named(lab: Path, config: Config, library: str) -> None:
    store = open_store(lab)
    check_fingerprint(store, config, DATA, "lab x")
    then = store.notes()["fingerprint"]
    store.note("fingerprint", then | {f"version of {library}": "0.1"})
    assert f"(version of {library}: 0.1 -> {then[f'version of {library}']})" in refusal(lab, config)


def test_configuration_that_is_noted_is_the_last_one_that_was_accepted(
    lab: Path, config: Config
) -> None:
    extended = replace(config, study=replace(config.study, trials=50))
    for asked in (config, extended):
        check_fingerprint(open_store(lab), asked, DATA, "lab x")
    refusal(lab, replace(config, trainer=replace(config.trainer, epochs=9)))
    noted = load_study(lab, config.study.name)[1]
    assert noted.study.trials == 50
    assert noted.trainer.epochs == config.trainer.epochs


def test_settings_that_no_result_depends_on_may_change(lab: Path, config: Config) -> None:
    check_fingerprint(open_store(lab), config, DATA, "lab x")
    study = replace(
        config.study,
        trials=99,
        finish=9,
        workers=3,
        minutes=5,
        patience=4,
        retries=0,
        confirm=9,
        confirm_fits=9,
        final_seeds=8,
    )
    check_fingerprint(open_store(lab), replace(config, study=study), DATA, "lab x")


_DIGEST = "from digitlab.base.environment import training_digest; print(training_digest())"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "src" / "digitlab", tmp_path / "src" / "digitlab"))


def digest_with(source: Path, *changed: str) -> str:
    for name in changed:
        with open(source / name, "a") as file:
            file.write("# a comment\n")
    command = [sys.executable, "-c", _DIGEST]
    environment = {"PYTHONPATH": str(source.parent)}
    return subprocess.run(command, env=environment, capture_output=True, check=True).stdout.decode()


def test_code_that_trains_nothing_is_not_in_the_fingerprint(source: Path) -> None:
    rooms = [path for path in source.iterdir() if path.is_dir() and path.name != "__pycache__"]
    others = [path for room in rooms for path in room.rglob("*.py")]
    assert {"results", "pages", "digits", "records", "study"} <= {room.name for room in rooms}
    trained = [source / name for name in _TRAINING]
    names = [
        str(path.relative_to(source))
        for path in [*others, source / "cli.py"]
        if not any(path == one or one in path.parents for one in trained)
    ]
    assert "pages/draw.py" in names
    assert digest_with(source) == digest_with(source, *names)


@pytest.mark.parametrize("name", ["training/fit.py", "networks/convnet.py", "data/augment.py"])
def test_code_that_trains_is_in_the_fingerprint(source: Path, name: str) -> None:
    assert digest_with(source) != digest_with(source, name)


@pytest.mark.slow
def test_the_fingerprint_covers_what_training_imports() -> None:
    script = "import sys, digitlab.training.fit, digitlab.training.outputs; print(*sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = [name for name in done.stdout.split() if name.startswith("digitlab.")]
    assert "digitlab.training.module" in modules
    rooms = [name.removesuffix(".py").replace("/", ".") for name in _TRAINING]
    covered = [f"digitlab.{room}" for room in rooms]
    left = [
        name
        for name in modules
        if not any(name == room or name.startswith(f"{room}.") for room in covered)
    ]
    # How errors read, where files stand, how settings are read from YAML: not what is computed.
    assert {".".join(name.split(".")[:2]) for name in left} <= {"digitlab.base", "digitlab.config"}
