"""New images from files to answers: what is read, what is refused, and how sure an answer is."""

import contextlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from samples import readers, studies

from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.base.statistics import fit_temperature
from digitlab.digits.decode import decode
from digitlab.digits.predict import DigitReader
from digitlab.digits.prepare import prepare
from digitlab.digits.shift import CHANGES
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.reader import damage
from digitlab.records.tracker import TrackerAway

DIGITS = np.fromfile(DATA / "t10k-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
TRUE = np.fromfile(DATA / "t10k-labels-idx1-ubyte", np.uint8)[8:]
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def trained_lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return readers(tmp_path_factory)


@pytest.fixture(scope="module")
def predictor(trained_lab: Path) -> DigitReader:
    return DigitReader(MlflowTracker(None, "digitlab", trained_lab), "read-seed-0", trained_lab)


Predict = Callable[..., tuple[int, str, str]]


@pytest.fixture
def predict(trained_lab: Path, call_in: Any, tmp_path: Path) -> Predict:
    """`digitlab predict` on the trained run."""
    call = call_in(trained_lab)
    return lambda *arguments: call("predict", "--run", "read-seed-0", *arguments)


def picture(digit: np.ndarray, side: int = 140, dark_on_light: bool = True) -> Image.Image:
    image = Image.fromarray(np.pad(digit, 8)).resize((side, side), Image.Resampling.BICUBIC)
    return Image.fromarray(255 - np.asarray(image)) if dark_on_light else image


def content(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---- what is read --------------------------------------------------------------------------------


HELD = {
    "PNG": ["L", "RGB", "P", "1", "RGBA", "LA", "I;16"],
    "JPEG": ["L", "RGB", "1", "CMYK"],
    "WEBP": ["L", "RGB", "P", "RGBA", "LA"],
    "BMP": ["L", "RGB", "P", "1", "RGBA"],
    "TIFF": ["L", "RGB", "P", "1", "RGBA", "LA", "CMYK", "I;16", "F"],
    "GIF": ["L", "RGB", "P", "1", "RGBA", "LA"],
}


@pytest.mark.parametrize(
    ("kind", "mode"), [(kind, mode) for kind, modes in HELD.items() for mode in modes]
)
def test_every_format_and_mode_is_the_same_picture(kind: str, mode: str) -> None:
    plain = picture(DIGITS[0])
    grey = np.asarray(plain, np.float32)
    if mode == "I;16":
        image = Image.fromarray((grey * 257).astype(np.uint16))
    else:
        image = plain.convert(mode)
    read = decode(content(image, kind), "it")
    assert read.shape == grey.shape
    assert np.abs(read - grey).mean() < (12 if mode == "1" else 4)


def test_transparent_pictures_stand_on_a_background_that_shows_them() -> None:
    ink = picture(DIGITS[1], dark_on_light=False)
    for level in (0, 255):
        image = Image.new("RGBA", ink.size, (level, level, level, 0))
        image.putalpha(ink)
        prepared = prepare(decode(content(image, "PNG"), "it"))
        straight = prepare(np.asarray(ink, np.float32))
        assert prepared.problem == ""
        assert np.abs(prepared.image.astype(int) - straight.image).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [140, 1500])
def test_turned_by_exif_is_upright(orientation: int, side: int) -> None:
    image = picture(DIGITS[2], side).crop((0, 0, side, side // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = content(image, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).reduce(max(1, side // 512))
    assert np.abs(decode(file, "it") - np.asarray(upright, np.float32)).max() < 1


def test_first_frame_of_a_gif_is_read() -> None:
    frames = [picture(DIGITS[i]) for i in (3, 4)]
    film = content(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(decode(film, "it") - np.asarray(frames[0], np.float32)).mean() < 4


# ---- what is refused -----------------------------------------------------------------------------


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packed = zlib.compress(bytes(10**6))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "empty"),
        (b"no image at all", "not an image: it must be one of PNG, JPEG"),
        (content(picture(DIGITS[0]), "PNG")[:200], "damaged or cut short"),
        (content(picture(DIGITS[0]), "JPEG")[:300], "damaged or cut short"),
        (png_that_claims(100000, 100000), "it must have at most 50000000"),
        (png_that_claims(1000000, 1), "it must have at least 5 a side"),
        (png_that_claims(1000000, 5), "no side 100 times the other"),
        (b"%PDF-1.7\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
)
def test_what_is_no_image_is_reported_in_one_line(body: bytes, named: str) -> None:
    with pytest.raises(UserError) as reported:
        decode(body, "it.png")
    assert named in str(reported.value)
    assert str(reported.value).startswith("it.png: ")
    assert "\n" not in str(reported.value)


def test_files_that_cannot_be_read_do_not_stop_the_others(predict: Predict, tmp_path: Path) -> None:
    picture(DIGITS[0]).save(tmp_path / "good.png")
    (tmp_path / "good.jpg").write_bytes(content(picture(DIGITS[0]), "PNG"))  # by its content
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # which would be read for ever
    names = ["good.png", "empty.png", "gone.png", "folder", "good.jpg", "bad\0name", "pipe.png"]
    status, out, err = predict(*(str(tmp_path / name) for name in names))
    assert status == 2
    assert len(out.splitlines()) == 2
    assert f"good.png: {TRUE[0]}" in out
    assert len(err.splitlines()) == 5
    for named in (
        *(
            "empty.png: empty",
            "gone.png is missing: it must be a file",
            "folder: a folder without images",
        ),
        "pipe.png is a pipe or a device: it must be a file",
    ):
        assert named in err
    status, out, err = predict("--json", *(str(tmp_path / name) for name in names))
    document = json.loads(out)
    assert [answer["status"] for answer in document] == [
        "digit", "error", "error", "error", "digit", "error", "error"
    ]  # fmt: skip
    assert set(document[0]) == {
        *("path", "status", "digit", "label", "labels", "probability", "probabilities"),
        *("message", "raw_probability"),
    }  # fmt: skip
    assert sum(document[0]["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert err == ""


def test_folder_and_standard_input_are_read(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    for i in range(3):
        picture(DIGITS[i]).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("not an image")
    status, out, err = predict("--json", str(folder), "--out", str(tmp_path / "seen"))
    assert err == f"{folder}: 1 file is no image\n"
    assert status == 0
    assert [Path(answer["path"]).name for answer in json.loads(out)] == ["0.png", "1.png", "2.png"]
    with Image.open(tmp_path / "seen" / "1.28x28.png") as seen:
        assert (seen.size, seen.mode) == ((28, 28), "L")
    piped = io.TextIOWrapper(io.BytesIO((folder / "0.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", piped)
    status, out, _ = predict("-")
    assert (status, out.startswith(f"-: {TRUE[0]}")) == (0, True)


def test_pictures_of_files_with_one_name_are_all_kept(predict: Predict, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a/x.png", "b/x.png", "c/x-2.png")]
    for file in files:
        file.parent.mkdir()
        picture(DIGITS[0]).save(file)
    assert predict(*map(str, files), "--out", str(tmp_path / "seen"))[0] == 0
    assert len(list((tmp_path / "seen").iterdir())) == 3


def test_folders_hold_hidden_files_any_name_and_others_that_are_named(
    predict: Predict, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    (folder / "below").mkdir(parents=True)
    (folder / "._three.png").write_bytes(b"\0\5\x16\7")  # macOS leaves these on other disks
    (folder / "x.jfif").write_bytes(content(picture(DIGITS[0]), "JPEG"))
    (folder / "no suffix").write_bytes(content(picture(DIGITS[0]), "PNG"))
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    picture(DIGITS[1]).save(folder / "below" / "x.png")
    status, out, err = predict(str(folder))
    assert (status, out.count(f": {TRUE[0]} ")) == (2, 2)
    assert "IMG_1.HEIC: HEIC, AVIF or a film: it must be one of PNG" in err
    assert "1 sub-folder is not read: --recursive reads all" in err
    assert "three" not in out + err
    (folder / "IMG_1.HEIC").unlink()
    status, out, err = predict("--recursive", str(folder), "--out", str(tmp_path / "seen"))
    assert (status, len(out.splitlines()), err) == (0, 3, "")
    seen = {file.name for file in (tmp_path / "seen").iterdir()}
    assert seen == {"x.28x28.png", "x-2.28x28.png", "no suffix.28x28.png"}  # both are kept


def test_names_of_files_forge_no_lines(predict: Predict, tmp_path: Path) -> None:
    bad = tmp_path / "a\nb: 7   (7 100%)\x1b[2K.png"
    picture(DIGITS[0]).save(bad)
    status, out, err = predict(str(bad), str(bad) + "\n\x1b[31m")
    assert (status, len(out.splitlines()), len(err.splitlines())) == (2, 1, 1)
    assert "\x1b" not in out + err
    assert r"a\nb" in out


def test_make_predict_takes_names_that_a_shell_would_split(tmp_path: Path) -> None:
    """With a program in the place of digitlab that prints its arguments, in a folder of its own."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml", "installed"):  # the last is the newest
        (tmp_path / name).touch()
    program = tmp_path / "digitlab"
    program.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    program.chmod(0o755)
    for name in ("photo (1).jpg", "it's.png", "$(touch x)`touch y`.png", '"; echo z #.png'):
        settings = ["BIN=.", "STAMP=installed", f"IMAGE={name}", "ARGS=--json"]
        command = ["make", "--silent", "--old-file=installed", "predict", *settings]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.stdout, done.returncode) == (f"<predict><{name}><--json>", 0), done.stderr


def test_explain_draws_why(predict: Predict, trained_lab: Path, tmp_path: Path) -> None:
    picture(DIGITS[0]).save(tmp_path / "seven.png")
    status, out, _ = predict("--explain", str(tmp_path / "seven.png"))
    assert status == 0
    [drawn] = (trained_lab / "explained").glob("seven-*.png")
    assert str(drawn) in out
    assert drawn.stat().st_size > 10000


def test_unknown_run_is_one_line(trained_lab: Path, call_in: Any, tmp_path: Path) -> None:
    status, out, err = call_in(trained_lab)("predict", "--run", "smoek", "a.png")
    assert (status, out, err.count("\n")) == (2, "", 1)


# ---- how sure ------------------------------------------------------------------------------------


def test_most_digits_are_digits_and_right_about_as_often_as_said(predictor: DigitReader) -> None:
    prepared = [
        (str(i), prepare(np.pad(digit, 9).astype(np.float32))) for i, digit in enumerate(DIGITS)
    ]
    answers = predictor.answer(prepared)
    said = [answer.digit == true for answer, true in zip(answers, TRUE, strict=True)]
    sure = [answer.status == "digit" for answer in answers]
    assert np.mean(sure) > 0.93
    assert np.mean([right for right, is_sure in zip(said, sure, strict=True) if is_sure]) > 0.95
    reported = np.mean([answer.probability for answer in answers if answer.probability is not None])
    assert abs(reported - np.mean(said)) < 0.03


def test_what_is_no_digit_is_seldom_called_one(predictor: DigitReader) -> None:
    chance = np.random.default_rng(0)
    things = []
    for i in range(60):
        image = Image.new("L", (120, 120), 255)
        draw = ImageDraw.Draw(image)
        for _ in range(int(chance.integers(4, 12))):
            draw.line([tuple(p) for p in chance.integers(10, 110, (2, 2)).tolist()], 0, 5)
        things.append((f"scribble {i}", prepare(np.asarray(image, np.float32))))
    for i in range(20):
        noise = chance.normal(128, 60, (80, 80)).clip(0, 255).astype(np.float32)
        things.append((f"noise {i}", prepare(noise)))
        things.append(
            (f"blank {i}", prepare(np.full((50, 50), chance.integers(0, 255), np.float32)))
        )
    answers = predictor.answer(things)
    wrong = [answer.path for answer in answers if answer.status == "digit"]
    assert not [path for path in wrong if not path.startswith("scribble")]
    assert len(wrong) < 60  # known are 1,600 digits here; with MNIST's it is one in ten


@settings(deadline=None, max_examples=8)
@given(st.floats(0.2, 5), st.integers(0, 1000))
def test_temperature_is_found_again(temperature: float, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4000, 10, generator=chance)
    labels = torch.multinomial(logits.softmax(1), 1, generator=chance)[:, 0]
    found = fit_temperature((logits * temperature).numpy(), labels.numpy())
    assert found == pytest.approx(temperature, rel=0.15)


@pytest.fixture
def champion_lab(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of the lab with a finished study."""
    return shutil.copytree(studies(tmp_path_factory), tmp_path / "copied")


@pytest.mark.slow
def test_champion_is_calibrated_on_the_validation_images_of_its_trial(
    champion_lab: Path, call_in: Any, tmp_path: Path
) -> None:
    tracker = MlflowTracker(None, "digitlab", champion_lab)
    predictor = DigitReader(tracker, "champion", champion_lab)
    assert predictor.config.data.evaluate_on == "test"
    assert predictor.calibration.temperature != 1  # which stands for a run without a trial
    picture(DIGITS[0]).save(tmp_path / "new.png")
    status, out, _ = call_in(champion_lab)("predict", str(tmp_path / "new.png"))
    assert (status, out.count("\n")) == (0, 1)
    # It names both probabilities, calibrated and as the network has them.
    [answer] = predictor.answer([("", prepare(np.asarray(picture(DIGITS[0]), np.float32)))])
    own = np.array(answer.probabilities) ** predictor.calibration.temperature
    assert answer.raw_probability == pytest.approx(own[answer.digit] / own.sum(), abs=1e-4)
    assert f"{answer.probability:.1%}, " in out
    assert f"; uncalibrated {answer.raw_probability:.1%})" in out
    # The report names both the network's own probabilities, and these.
    page = tmp_path / "page.html"
    assert call_in(champion_lab)("report", "smoke", "--out", str(page))[0] == 0
    shown = f"`predict` gives, with temperature {predictor.calibration.temperature:.2f}"
    assert shown in page.read_text(encoding="utf-8")
    assert "own probabilities are" in page.read_text(encoding="utf-8")


def test_calibration_is_fitted_once_and_kept(predictor: DigitReader, trained_lab: Path) -> None:
    [kept] = (trained_lab / "calibrations").iterdir()
    before = kept.stat().st_mtime_ns
    tracker = MlflowTracker(None, "digitlab", trained_lab)
    again = DigitReader(tracker, "read-seed-0", trained_lab)
    assert again.calibration.temperature == predictor.calibration.temperature
    assert kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_calibration_that_is_damaged_or_cannot_be_kept_is_fitted_again(
    predictor: DigitReader, trained_lab: Path
) -> None:
    tracker = MlflowTracker(None, "digitlab", trained_lab)
    [kept] = (trained_lab / "calibrations").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:1000], whole[:-1] + bytes([whole[-1] ^ 1])):
        kept.write_bytes(damaged)
        again = DigitReader(tracker, "read-seed-0", trained_lab)
        assert again.calibration.temperature == predictor.calibration.temperature
        assert kept.read_bytes() == whole
    shutil.rmtree(kept.parent)
    kept.parent.touch()  # no folder can be made there
    try:
        again = DigitReader(tracker, "read-seed-0", trained_lab)
        assert torch.equal(again.calibration.limits, predictor.calibration.limits)
    finally:
        kept.parent.unlink()
        DigitReader(tracker, "read-seed-0", trained_lab)


@pytest.mark.slow
def test_reproduction_of_a_final_fit_has_the_calibration_of_its_trial(
    champion_lab: Path, call_in: Any
) -> None:
    """Whichever of the two is asked first: their weights are the same."""
    status, out, _ = call_in(champion_lab)("reproduce", "champion", "--json")
    assert (status, json.loads(out)["verdict"]) == (0, "identical")
    tracker = MlflowTracker(None, "digitlab", champion_lab)
    again = DigitReader(tracker, json.loads(out)["run_id"], champion_lab)
    first = DigitReader(tracker, "champion", champion_lab)
    assert again.calibration.temperature == first.calibration.temperature != 1


def test_prepared_must_be_a_number_of_images(trained_lab: Path, call_in: Any) -> None:
    for count in ("0", "-5"):
        status, out, err = call_in(trained_lab)(
            "evaluate", "--run", "read-seed-0", "--prepared", count
        )
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"--prepared {count}" in err


@pytest.mark.filterwarnings("ignore")  # of Pillow, which `decode` ignores too
def test_damaged_exif_does_not_spoil_good_pixels() -> None:
    file = content(picture(DIGITS[2]), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff" + bytes(40))
    assert prepare(decode(file, "it")).problem == ""


@pytest.mark.slow
def test_evaluate_measures_every_change_and_keeps_the_table(
    trained_lab: Path, call_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> NoReturn:
        raise TrackerAway("The tracker is away: wait for it.")

    call = call_in(trained_lab)
    some = ("--run", "read-seed-0", "--prepared", "60")
    status, out, _ = call("evaluate", *some, "--json")
    document = json.loads(out)
    assert status == 0
    accuracy = {entry["change"]: entry["accuracy"] for entry in document["table"]}
    prepared = {entry["change"]: entry["prepared"] for entry in document["table"]}
    assert list(accuracy) == [*CHANGES, "pictures of 40 to 800 pixels"]
    assert document["images"] == 400  # of the validation set, since this run was not tested
    assert accuracy["unchanged"] > 0.93
    assert accuracy["inverted"] < 0.5 < 0.9 < prepared["inverted"]
    assert prepared["pictures of 40 to 800 pixels"] > 0.9
    assert prepared["scaled to 70 %"] > accuracy["scaled to 70 %"]
    tracker = MlflowTracker(None, "digitlab", trained_lab)
    kept = json.loads(tracker.artifact(document["run_id"], "shift.json"))
    assert kept["table"] == document["table"]
    assert damage(tracker, tracker.get(document["run_id"])) == []
    with monkeypatch.context() as patch:
        patch.setattr(MlflowTracker, "upload", away)
        patch.setattr("digitlab.records.outbox._RUN_S", 0.1)
        patch.setattr("digitlab.records.outbox._CLOSE_S", 0.1)
        status, out, err = call("evaluate", "--run", "read-seed-0", "--prepared", "1")
    assert (status, "400 validation images" in out, "1 record still in" in err) == (0, True, True)


# ---- rubbish -------------------------------------------------------------------------------------


def mutated(chance: random.Random) -> tuple[bytes, bool]:
    """A file of some kind, damaged somehow; whether a digit was in it."""
    blank = chance.random() < 0.5
    digit = np.zeros((28, 28), np.uint8) if blank else DIGITS[chance.randrange(len(DIGITS))]
    kind = chance.choice(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
    body = bytearray(content(picture(digit, chance.choice([20, 45, 90])), kind))
    how = chance.randrange(4)
    if how == 0:
        del body[chance.randrange(len(body)) :]
    elif how == 1:
        body = bytearray(chance.randbytes(chance.randrange(400)))
        blank = True
    else:
        head = 60 if how == 2 else len(body)
        for _ in range(chance.randrange(1, 12)):
            body[chance.randrange(min(head, len(body)))] = chance.randrange(256)
    return bytes(body), not blank


def hammer(predictor: DigitReader, count: int, seed: int) -> tuple[int, int]:
    """Put malformed files through everything.

    Returns:
        How many were read at all, and how many of those without a digit were called one.
    """
    chance = random.Random(seed)
    read = made_up = 0
    for _ in range(count):
        body, has_digit = mutated(chance)
        started = time.process_time()
        with contextlib.suppress(UserError):
            prepared = prepare(decode(body, "it"))
            read += 1
            [answer] = predictor.answer([("it", prepared)])
            assert answer.status in ("digit", "unsure", "none")
            made_up += answer.status == "digit" and not has_digit
        assert time.process_time() - started < 5
    return read, made_up


def test_malformed_files_are_refused_or_read_and_nothing_is_a_confident_digit(
    predictor: DigitReader,
) -> None:
    read, made_up = hammer(predictor, 150, 1)
    assert 10 < read < 140
    assert made_up <= read // 25  # by a network and a calibration that know 1,600 digits


@pytest.mark.long
@pytest.mark.timeout(600)
def test_ten_thousand_malformed_files(predictor: DigitReader) -> None:
    read, made_up = hammer(predictor, 10000, 2)
    assert read > 1000
    assert made_up <= read // 25  # by a network and a calibration that know 1,600 digits


_DECODED = """
import sys
from pathlib import Path
import psutil
from digitlab.digits.decode import read_image
from digitlab.digits.prepare import prepare

def used():
    kilobytes = seconds = 0
    for process in [psutil.Process(), *psutil.Process().children()]:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        kilobytes += next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        seconds += sum(process.cpu_times()[:2])
    return kilobytes, seconds

before, started = used()
prepared = prepare(read_image(Path(sys.argv[1])))
after, ended = used()
print(after - before, ended - started, prepared.problem)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel reports the most memory on Linux")
@pytest.mark.parametrize(
    ("kind", "mode", "side"),
    [
        *[("PNG", "L", 7000), ("JPEG", "L", 7000)],
        *[pytest.param("PNG", mode, 7000, marks=LONG) for mode in ("P", "RGB", "RGBA", "I;16")],
        *[pytest.param(kind, "RGB", 4000, marks=LONG) for kind in ("TIFF", "WEBP")],
        pytest.param("GIF", "P", 7000, marks=LONG),
    ],
)
def test_large_pictures_are_read_within_bounds(
    tmp_path: Path, kind: str, mode: str, side: int
) -> None:
    levels = np.kron(255 - DIGITS[0], np.ones((side // 28,) * 2, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(levels.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(levels).convert(mode)
    path = tmp_path / f"large.{kind.lower()}"
    image.save(path, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    reported = subprocess.run(
        [sys.executable, "-c", _DECODED, str(path)], capture_output=True, text=True, check=True
    )
    memory, seconds, *problem = reported.stdout.split()
    assert problem == []
    assert int(memory) < 300 * 1024  # kB
    assert float(seconds) < 5  # of the processor; 1 s is the aim
