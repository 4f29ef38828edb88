"""The command line: exit statuses, one line for a mistake, and runs from end to end."""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import Call, CallIn
from disks import read_only
from optuna.study import StudyDirection
from PIL import Image
from samples import WHOLE, copy_digits, studies
from serving import COMMAND, environment_of

from digitlab.cli import build_parser, main
from digitlab.config.compose import compose
from digitlab.config.recorded import config_from_yaml
from digitlab.data.datasets import TEST, load_digits
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.tracker import NewRun
from digitlab.study.storage import open_storage, study_notes

COMMANDS = ("data", "train", "sweep", "audit", "reproduce", "compare", "ui")
SMALL = ["experiments=smoke", "data=sample", "model.widths=[4]", "data.batch_size=200"]


def digitlab(
    *arguments: str, lab: Path | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = environment_of(lab or Path(os.environ["DIGITLAB_HOME"]))
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
        cwd=cwd,
    )


# ---- before anything heavy is imported -----------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments: list[str]) -> None:
    done = digitlab(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^ +{command} +\w+", done.stdout, re.MULTILINE), command


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_framework(option: str) -> None:
    command = [sys.executable, "-X", "importtime", *COMMAND[1:], option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "digitlab" in imported
    heavy = {"torch", "numpy", "hydra", "omegaconf", "mlflow", "optuna", "pytorch_lightning"}
    assert imported & (heavy | {"rich", "pydantic", "shtab"}) == set()


# What a command does without: torch takes longer to import than most commands take.
UNUSED = {
    "predict": "pytorch_lightning torchvision triton matplotlib plotly scipy.stats",
    "report": "torch pytorch_lightning",
    "compare": "torch optuna scipy.stats",
    "sweep": "torch pytorch_lightning plotly scipy.stats",
    "audit": "torch scipy.stats",
    "runs": "torch scipy.stats",
    "show": "torch scipy.stats",
    "studies": "torch scipy.stats mlflow",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a lab with a study that was run to its end, and an image."""
    lab = shutil.copytree(studies(tmp_path_factory), tmp_path_factory.mktemp("finished") / "lab")
    digit = load_digits(lab, "sample", TEST).images[0]
    Image.fromarray(digit).save(lab / "digit.png")
    return lab


@pytest.mark.slow
@pytest.mark.parametrize("command", UNUSED)
def test_commands_import_no_more_than_they_need(command: str, finished: Path) -> None:
    given = {
        "predict": ["digit.png"],
        "report": ["smoke"],
        "compare": ["smoke/0", "smoke/champion"],
        "sweep": WHOLE,
        "audit": ["smoke"],
        "show": ["smoke"],
    }
    code = (
        "import sys; from digitlab.cli import main; from digitlab.workers import processes; "
        "processes.preload = None; status = main(sys.argv[1:]); print(); print(*sys.modules); "
        "sys.exit(status)"  # no process is there to fork workers from: none is needed
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, *given.get(command, [])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment_of(finished),
        cwd=finished,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(UNUSED[command].split()) & set(done.stdout.splitlines()[-1].split()) == set()


def test_garbage_is_searched_for_seldom_and_not_at_the_end() -> None:
    """Both take a good part of the time of a short command."""
    code = "import gc, sys; from digitlab.__main__ import main; usual = gc.get_threshold()[0]; "
    code += "main(); print(gc.get_threshold()[0] > usual, gc.get_freeze_count() > 0)"
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "True True"


@pytest.mark.slow
def test_training_prints_nothing_of_what_it_leaves_in_memory(tmp_path: Path) -> None:
    done = digitlab("train", *SMALL, "trainer.epochs=1", lab=copy_digits(tmp_path / "lab"))
    assert (done.returncode, done.stderr) == (0, "")


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"digitlab {version('digitlab')}\n"


def test_help_of_a_command_is_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for words in (["help", "predict"], ["predict", "--help"]):
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("usage: digitlab predict ")


def test_every_option_explains_itself_with_its_default() -> None:
    _, commands = build_parser()
    for name, command in commands.items():
        for action in command._actions:
            assert action.help, (name, action.dest)
            if action.default not in (None, False, argparse.SUPPRESS, []):
                shown = action.help % {"default": action.default}
                assert f"(default: {action.default}" in shown, (name, action.dest)


def test_one_thing_has_one_name() -> None:
    _, commands = build_parser()
    options = {name: set(command._option_string_actions) for name, command in commands.items()}
    for name in ("audit", "compare", "evaluate", "predict", "reproduce", "runs", "show", "studies"):
        assert "--json" in options[name], name
    for name in ("compare", "explain", "predict", "report"):
        assert "--out" in options[name], name
    for name in ("dashboard", "draw", "report", "ui"):
        assert "--open" in options[name], name
    for name in ("draw", "evaluate", "explain", "predict"):
        assert "--run" in options[name], name


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("digitlab", *COMMANDS, "--config-from"):
        assert word in script


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tr", ["train"]),
        ("train --con", ["--config-dir", "--config-from"]),
        ("runs --kind c", ["confirm", "champion"]),
    ],
)
def test_completion_completes_in_bash(
    typed: str, offered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    words = f"COMP_WORDS=(digitlab {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))"
    ask = f'source ./script; {words}; _shtab_digitlab; printf "%s " "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == offered


def test_misspelt_command_is_one_line_with_the_nearest() -> None:
    done = digitlab("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "digitlab: trian: no such command, did you mean train?\n"


def test_the_package_is_the_command_too() -> None:
    command = [sys.executable, "-m", "digitlab", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"digitlab {version('digitlab')}\n"


def test_interrupt_during_an_import_ends_the_process_even_if_a_library_would_go_on(
    tmp_path: Path,
) -> None:
    (tmp_path / "stubborn.py").write_text(
        "import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept BaseException: pass"
    )
    start = "from digitlab.base.stop import end_imports_quietly; end_imports_quietly();"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"}
    for code, status in (
        ("import stubborn; print('went on')", 130),
        ("import signal\ntry: signal.raise_signal(2)\nexcept KeyboardInterrupt: exit(7)", 7),
    ):
        # A process that runs in the background may ignore Ctrl-C, and hands that on.
        reset = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        command = [sys.executable, "-c", f"{reset}{start}\n{code}"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_debug_shows_where_a_mistake_was_found() -> None:
    done = digitlab("trian", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "did you mean train?" in done.stderr


def test_lab_that_may_only_be_read_is_one_line_whatever_is_asked(
    lab: Path, call_in: CallIn
) -> None:
    MlflowTracker(None, "digitlab", lab)
    call = call_in(lab)
    with read_only(lab):
        assert call("data", "sample")[0] == 0
        for command in (
            ("train", *SMALL),
            ("train", *SMALL, "tracking.uri=http://127.0.0.1:1"),
            ("audit",),
            ("compare", "a", "b"),
            ("predict", "a.png"),
            ("ui",),
            ("data", "fashion_mnist"),
        ):
            status, _, err = call(*command)
            assert status == 2, command
            assert re.fullmatch(r"digitlab: .*cannot be used.*\n", err), command


def test_storage_that_does_not_answer_as_it_must_is_one_line(lab: Path, call_in: CallIn) -> None:
    call = call_in(lab)
    open_storage(lab).create_new_study([StudyDirection.MAXIMIZE], "a")
    with closing(sqlite3.connect(lab / "optuna.db")) as database:
        database.execute("ALTER TABLE studies RENAME COLUMN study_name TO other")
    for command in (("studies",), ("sweep", *SMALL, "study.name=a"), ("delete", "a", "--yes")):
        status, _, err = call(*command)
        assert status == 2, command
        assert re.fullmatch(r"digitlab: .*no such column.*\n", err), command


def into_closed_pipe(*arguments: str, lab: Path | None = None) -> tuple[int, bytes]:
    """Run a command whose reader has gone; return its exit status and its error output."""
    environment = environment_of(lab) if lab else os.environ
    buffered = {k: v for k, v in environment.items() if k != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    command, both = [*COMMAND, *arguments], {"stdout": writing, "stderr": subprocess.PIPE}
    done = subprocess.run(command, **both, env=buffered, timeout=120, check=False)
    os.close(writing)
    return done.returncode, done.stderr


def test_reader_of_the_output_may_leave() -> None:
    assert into_closed_pipe("--help") == (0, b"")


def test_output_that_is_closed_or_full_is_no_fault_of_the_lab(tmp_path: Path) -> None:
    environment = environment_of(tmp_path)
    for place, status, reason in (
        (">&-", 0, ""),
        (">/dev/full", 2, "what the output goes to"),
    ):
        command = f"{shlex.join(COMMAND)} config {place}"
        done = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
        assert reason in done.stderr


# ---- one run, from the command line to its record ------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A run of `digitlab train`, and the lab that it is recorded in."""

    lab: Path
    cwd: Path
    done: subprocess.CompletedProcess[str]

    @property
    def run_id(self) -> str:
        found = re.search(r"^run ([0-9a-f]{32}) ", self.done.stdout, re.MULTILINE)
        assert found, self.done.stdout + self.done.stderr
        return found[1]

    @property
    def tracker(self) -> MlflowTracker:
        return MlflowTracker(None, "digitlab", self.lab)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    lab = copy_digits(tmp_path_factory.mktemp("trained") / "lab")
    cwd = tmp_path_factory.mktemp("cwd")
    return Trained(lab, cwd, digitlab("train", *SMALL, "trainer.epochs=1", lab=lab, cwd=cwd))


@pytest.fixture
def call(trained: Trained, call_in: CallIn) -> Call:
    """`digitlab` in this process, in the lab of the run: exit status, output, error output."""
    return call_in(trained.lab)


def test_train_tells_each_epoch_the_layers_the_run_and_what_can_follow(trained: Trained) -> None:
    done = trained.done
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(
        r"epoch 1/1  train_accuracy 0\.\d{4}  train_loss \d+\.\d{4}"
        r"  val_accuracy 0\.\d{4}  val_loss \d+\.\d{4}",
        lines[0],
    )
    layers = [re.split(r" *[│┃] *", line)[1:-1] for line in lines if line[0] in "│┃"]
    assert layers[0] == ["layer", "output", "parameters"]
    assert layers[1] == ["Conv2d", "4x28x28", "36"]
    [parameters] = (count for layer, _, count in layers if layer == "all")
    row = trained.tracker.get(trained.run_id)
    assert int(parameters.replace(",", "")) == row.metrics["model_parameters"]
    text = r"run [0-9a-f]{32} \(smoke .+\): val_accuracy \d+\.\d\d% in \d+\.\d s"
    assert re.fullmatch(text, lines[-4])
    assert Path(lines[-3].split(":")[1].strip()).is_file()
    assert lines[-2].split(":")[1].split() == ["digitlab", "draw", f"--run={row.run_id[:12]}"]
    assert lines[-1].split(":")[1].split() == ["digitlab", "reproduce", row.run_id[:12]]


def test_trained_run_is_recorded_whole(trained: Trained) -> None:
    row = trained.tracker.get(trained.run_id)
    name = "smoke data=sample widths=4 batch_size=200 epochs=1"
    assert (row.name, row.status) == (name, "FINISHED")
    assert (row.tags["digitlab.kind"], row.tags["digitlab.state"]) == ("train", "finished")
    assert json.loads(row.tags["digitlab.overrides"]) == [*SMALL, "trainer.epochs=1"]
    reported = trained.done.stdout
    assert f"val_accuracy {row.metrics['val_accuracy']:.4f}" in reported
    kept = trained.tracker.artifact(row.run_id, "config.yaml").decode()
    assert config_from_yaml(kept) == compose("train", [*SMALL, "trainer.epochs=1"])[0].config


def test_train_and_show_name_the_files_of_a_run(call: Call, trained: Trained) -> None:
    [film] = re.findall(r"how it learned: +(.+)", trained.done.stdout)
    assert Path(film).read_bytes()[:4] == b"GIF8"
    folder = Path(film).parents[1]
    shown = call("show", trained.run_id)[1]
    assert f"\nfiles in {folder}: SHA256SUMS, config.yaml, " in shown


def test_train_writes_nothing_outside_the_lab(trained: Trained) -> None:
    assert list(trained.cwd.iterdir()) == []
    assert {path.name for path in trained.lab.iterdir()} >= {"data", "mlflow.db", "artifacts"}


def test_next_run_is_numbered_and_compared_with_the_one_before(
    call: Call, trained: Trained
) -> None:
    status, out, _ = call("train", *SMALL, "trainer.epochs=1")
    assert status == 0
    name = trained.tracker.get(trained.run_id).name
    assert f"({name} #2): val_accuracy " in out
    assert f"+0.00 percentage points against the run before ({name}):" in out
    assert "0 images gained, 0 lost; between these two networks this could well be chance (" in out
    [compare] = re.findall(r"see what differs: +digitlab (.+)", out)
    status, out, _ = call(*shlex.split(compare))
    assert status == 0
    assert "parameters: no difference" in out


@pytest.mark.slow
def test_several_runs_at_once_write_nothing_outside_the_lab(call: Call) -> None:
    several = ["--multirun", "trainer.seed=1,2", "tracking=none", "trainer.epochs=1"]
    status, out, _ = call("train", *SMALL, *several)
    assert (status, out.count("epoch 1/1")) == (0, 2)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.slow
def test_keep_going_trains_what_is_left_after_a_job_that_is_refused(call: Call) -> None:
    several = ["-m", "data.validation_images=9999,400", "tracking=none", "trainer.epochs=1"]
    status, out, err = call("train", *SMALL, *several)
    assert (status, out.count("epoch 1/1")) == (2, 0)
    refusal = err
    assert refusal.startswith("digitlab: data.validation_images=9999 is invalid")
    status, out, err = call("train", *SMALL, *several, "--keep-going")
    assert (status, err, out.count("epoch 1/1")) == (2, refusal, 1)
    assert out.endswith("\n1 of 2 jobs finished\n")


def test_options_that_would_have_no_effect_are_refused(call: Call) -> None:
    others = (["--config-dir", "."], ["--cfg", "job"], ["--multirun"], ["--keep-going"])
    for options in (["--keep-going"], *(["--config-from", "x", *other] for other in others)):
        status, out, err = call("train", *options)
        assert (status, out) == (2, "")
        assert re.match(r"digitlab: --[a-z-]+ with(out)? --[a-z-]+ is invalid: ", err)


def test_reader_of_a_table_may_leave(trained: Trained) -> None:
    assert into_closed_pipe("show", trained.run_id, lab=trained.lab) == (0, b"")


def test_what_was_measured_is_recorded_when_its_reader_has_left(trained: Trained) -> None:
    some = ("--run", trained.run_id, "--prepared", "1")
    assert into_closed_pipe("evaluate", *some, lab=trained.lab) == (0, b"")
    assert "shift.json" in trained.tracker.files(trained.run_id)


def test_an_audit_that_nobody_reads_has_its_status(trained: Trained) -> None:
    lost = trained.tracker.create_run(NewRun("lost", {"digitlab.kind": "study"}, {}))
    assert into_closed_pipe("audit", lab=trained.lab) == (1, b"")
    trained.tracker.delete(lost)


def test_training_goes_on_when_its_reader_has_left(trained: Trained) -> None:
    train = ("train", *SMALL, "trainer.epochs=1", "name=unread")
    assert into_closed_pipe(*train, lab=trained.lab) == (0, b"")
    assert trained.tracker.get("unread").tags["digitlab.state"] == "finished"


@pytest.mark.slow
def test_study_goes_on_to_its_champion_when_its_reader_has_left(tmp_path: Path) -> None:
    lab = copy_digits(tmp_path / "lab")
    study = ("study.trials=1", "study.confirm=1", "study.final_seeds=1", "study.measure_seeds=0")
    assert into_closed_pipe("sweep", *SMALL, *study, lab=lab) == (0, b"")
    assert "champion" in study_notes(open_storage(lab), "smoke")


def test_run_that_diverges_exits_with_1_and_the_reason(call: Call, trained: Trained) -> None:
    wild = ["optim=sgd", "optim.schedule=constant", "optim.learning_rate=10"]
    wild += ["optim.weight_decay=1", "model.batch_norm=false", "name=wild"]
    status, out, err = call("train", *SMALL, *wild)
    assert (status, err) == (1, "")
    assert re.search(r"failed: the loss is (nan|inf) in epoch \d", out)
    assert trained.tracker.get("wild").tags["digitlab.state"] == "failed"


@pytest.mark.slow
def test_interrupt_ends_a_run_and_is_recorded(trained: Trained) -> None:
    command = [*COMMAND, "train", *SMALL, "trainer.epochs=5000", "name=long"]
    process = subprocess.Popen(
        command,
        env=environment_of(trained.lab),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("epoch 1/5000")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()  # the epochs that are left take minutes
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (130, "")
    assert "interrupted" in out.splitlines()[-1]
    row = trained.tracker.get("long")
    assert (row.status, row.tags["digitlab.state"]) == ("KILLED", "interrupted")


# ---- mistakes: exit status 2, one line -----------------------------------------------------------


def no_server(*_: object) -> None:
    """In place of os.execv, by which `digitlab ui` would replace this process."""
    raise AssertionError("a server was started")


def test_misspelt_key_is_one_line_in_a_process_of_its_own(trained: Trained) -> None:
    done = digitlab("train", "optim.learning_rat=0.1", lab=trained.lab)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("digitlab: optim.learning_rat: no such key")
    assert "did you mean optim.learning_rate" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "experiments=smok"], "smok"),
        (["train", "model=convnot"], "convnot"),
        (["train", "experiments=null"], "experiments"),
        (["train", "trainer.epochs=0"], "trainer.epochs=0"),
        (["train", "trainer.epochs=many"], "many"),
        (["train", "trainer.epochs"], "trainer.epochs"),
        (["train", "trainer.epochs=[1"], "trainer.epochs=[1"),
        (["train", "optim.learning_rate=choice(0.1,0.2)"], "choice(0.1,0.2)"),
        (["train", "--nonsense"], "--nonsense"),
        (["train", *SMALL, "data.validation_images=2000"], "data.validation_images=2000"),
        (["train", *SMALL, "tracking.uri=http://127.0.0.1:1"], "127.0.0.1:1"),
        (["reproduce", "smoke data=samlpe"], "smoke data=sample"),
        (["reproduce", "champion"], "champion"),
        (["reproduce"], "RUN"),
        (["data", "mnits"], "mnist"),
        (["ui", "--port", "x"], "--port"),
        (["ui", "--port", "99999"], "99999"),
        (["runs", "--most", "-3"], "0 or more"),
        (["predict", ""], "predict ''"),
        (["import", "--", "-gone.zip"], "-gone.zip is missing"),
        (["train", "name=-x"], "name=-x"),
        (["sweep", "study.name=-x"], "study.name=-x"),
        (["sweep", "study.name=champion"], "study.name=champion"),
        (["sweep", *SMALL, "data=mnist", "model.hidden=choice(a,b)"], "model.hidden"),
        (["import", "/dev/zero"], "/dev/zero is a pipe or a device"),
        (["reproduce", "--config", "/dev/zero"], "--config /dev/zero is a pipe or a device"),
        (["reproduce", "--config", "/"], "--config / is a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_mistake_is_one_line(
    call: Call, arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execv", no_server)
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert named in err


def test_mistake_is_shown_with_its_traceback_with_debug(call: Call) -> None:
    status, out, err = call("train", "--debug", "trainer.epochs=0")
    assert (status, out) == (2, "")
    assert err.startswith("Traceback")
    assert "UserError: trainer.epochs=0 is invalid" in err.splitlines()[-1]


def test_lab_that_is_a_file_is_one_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIGITLAB_HOME", str(tmp_path / "file"))
    status, out, err = call("data", "sample")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert str(tmp_path / "file") in err


def test_port_that_is_taken_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execv", no_server)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, out, err = call("ui", "--port", port)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert port in err


# ---- Hydra's flags -------------------------------------------------------------------------------


def test_cfg_job_prints_the_configuration_and_trains_nothing(call: Call, trained: Trained) -> None:
    before = len(trained.tracker.find({}))
    status, out, err = call("train", *SMALL, "--cfg", "job")
    assert (status, err) == (0, "")
    assert config_from_yaml(out) == compose("train", SMALL)[0].config
    assert len(trained.tracker.find({})) == before


def test_help_of_train_names_what_can_be_chosen(call: Call) -> None:
    status, out, err = call("train", "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: digitlab train ")
    for group in ("model        convnet, narrow, seed, shared, strided",
                  "optim        adam, adamw, sgd", "digitlab sweep experiments=smoke",
                  "tag(log,interval"):  # fmt: skip
        assert group in out


# ---- settings ------------------------------------------------------------------------------------


def test_config_lists_every_setting_with_its_rule(call: Call) -> None:
    status, out, _ = call("config")
    assert status == 0
    assert re.search(r"^  trainer\.epochs +\w.*\. \(an integer >= 1\)$", out, re.MULTILINE)


def test_config_prints_a_json_schema(call: Call) -> None:
    status, out, _ = call("config", "--schema")
    assert status == 0
    assert json.loads(out)["$defs"]["TrainerConfig"]["properties"]["epochs"]["minimum"] == 1


def test_every_command_explains_itself(call_in: CallIn, tmp_path: Path) -> None:
    call = call_in(tmp_path)
    for command in sorted(set(build_parser()[1]) - {"bench"}):
        status, out, err = call(command, "--help")
        assert (status, err) == (0, ""), command
        assert out.startswith(f"usage: digitlab {command} ")
