"""Data sets of one's own, from files to an answer with the names of its classes."""

import json
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import Call, CallIn
from PIL import Image

from digitlab.base.errors import UserError
from digitlab.data.datasets import TEST, TRAIN, load_digits
from digitlab.digits import own
from digitlab.digits.own import import_data

CLASSES = {"cross": 0, "ring": 1, "stripe": 2}
TINY = ["experiments=smoke", "model.widths=[4]", "model.hidden=8", "trainer.epochs=2"]


def shape(kind: str, chance: np.random.Generator, side: int = 40) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side / 2 + chance.normal(0, 1, 2)[:, None, None]
    drawn = {
        "cross": (abs(x) < 3) | (abs(y) < 3),
        "ring": abs(np.hypot(x, y) - side / 4) < 3,
        "stripe": abs(x) < 4,
    }[kind] & (np.hypot(x, y) < side / 2.6)
    return (255 * drawn).astype(np.uint8)


def write_folder(folder: Path, each: int = 24) -> Path:
    chance = np.random.default_rng(0)
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(shape(kind, chance)).save(folder / kind / f"{number:02d}.png")
    (folder / "ring" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve images of each class."""
    return write_folder(tmp_path_factory.mktemp("own") / "shapes", 12)


@pytest.fixture
def call(lab: Path, call_in: CallIn) -> Call:
    return call_in(lab)


@pytest.mark.slow
def test_a_folder_is_trained_on_and_read_by_the_names_of_its_classes(
    call: Call, lab: Path, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "shapes")
    status, out, _ = call("data", "shapes", "--from", str(source))
    assert status == 0
    assert "60 training and 12 test images of 3 classes (cross, ring, stripe)" in out
    [words] = re.findall("train on it: +digitlab train (.*)", out)
    words = words.split()
    assert call("data", "shapes")[1].count("\n") == 4  # verified again, by its digests
    assert call("train", *TINY[:-1], *words, "name=shapes")[0] == 0
    for kind in CLASSES:
        status, out, _ = call("predict", "--run", "shapes", "--json", str(source / kind / "00.png"))
        [answer] = json.loads(out)
        assert status == 0
        assert answer["label"] in answer["labels"][:3] == [*CLASSES]
        assert answer["labels"][answer["digit"]] == answer["label"]
    out = call("predict", "--run", "shapes", str(source / "ring" / "00.png"))[1]
    assert "ring" in out


def test_training_and_test_folders_stay_apart_and_bits_do_not_change(
    call: Call, lab: Path, tmp_path: Path
) -> None:
    for part, each in (("train", 12), ("test", 3)):
        write_folder(tmp_path / "parts" / part, each)
    for name in ("first", "second"):
        assert call("data", name, "--from", str(tmp_path / "parts"))[0] == 0
    first, second = (load_digits(lab, name, TRAIN) for name in ("first", "second"))
    assert first.sha256 == second.sha256
    assert np.bincount(first.labels).tolist() == [12, 12, 12]
    assert np.bincount(load_digits(lab, "first", TEST).labels).tolist() == [3, 3, 3]
    assert first.images.max() > 200


def test_images_can_be_centred_as_predict_does(call: Call, lab: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "shapes", 12)
    assert call("data", "centred", "--from", str(tmp_path / "shapes"), "--prepare")[0] == 0
    images = load_digits(lab, "centred", TRAIN).images / 255
    middle = (images.sum(1) @ np.arange(28)) / images.sum((1, 2))
    assert abs(middle - 14).max() < 1
    blank = tmp_path / "shapes" / "ring" / "blank.png"
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(blank)
    status, _, err = call("data", "other", "--from", str(tmp_path / "shapes"), "--prepare")
    assert (status, err.count("\n")) == (2, 1)
    assert str(blank) in err
    assert not (lab / "data" / "other").exists()


def test_arrays_of_an_npz_file_are_kept_as_they_are(call: Call, lab: Path, tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    arrays = {
        f"x_{part}": chance.integers(0, 256, (30, 28, 28), np.uint8) for part in ("train", "test")
    }
    labels = {f"y_{part}": np.arange(30) % 10 for part in ("train", "test")}
    np.savez(tmp_path / "mine.npz", **arrays, **labels)
    assert call("data", "mine", "--from", str(tmp_path / "mine.npz"))[0] == 0
    assert np.array_equal(load_digits(lab, "mine", TRAIN).images, arrays["x_train"])
    assert np.array_equal(load_digits(lab, "mine", TEST).labels, labels["y_test"])


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("mnist", "shapes", "data mnist is invalid"),
        ("../out", "shapes", "data ../out is invalid"),
        ("mine", "nothing", "must be a folder with a folder of images a class"),
        ("mine", "one", "with 1 folders is invalid"),
        ("mine", "empty", "with 0 images is invalid"),
        ("mine", "wrong.npz", "cannot be read"),
        ("mine", "pickled.npz", "cannot be read"),
        ("mine", "empty.npz", "cannot be read"),
        ("mine", "scalar.npz", "labels int64 () is invalid"),
        ("mine", "few", "with 1 image is invalid"),
        ("null", "shapes", "data null is invalid"),
        ("MNIST", "shapes", "data MNIST is invalid"),
        ("mine", "times.npz", "labels timedelta64"),
        ("mine", "unmarked.npz", "train: |S4 () and labels"),
        ("mine", "one-class.npz", "two classes or more to learn"),
        ("mine", "untaught.npz", "which hold all those of the test set"),
        ("mine", "bytes", "in printable characters"),
        ("mine", "parts", "parts/test: dot is invalid: it must be the same classes as train"),
        ("mine", "x" * 5000, "File name too long"),
        ("mine", "large.npz", "whole labels (N,) 0 to 9"),
        ("sample", "shapes", "data sample is invalid"),
    ],
)
def test_what_cannot_be_a_data_set_is_refused_and_leaves_nothing(
    call: Call, lab: Path, shapes: Path, tmp_path: Path, name: str, source: str, reason: str
) -> None:
    (tmp_path / "shapes").symlink_to(shapes)
    write_folder(tmp_path / "few", 1)
    (tmp_path / "one" / "ring").mkdir(parents=True)
    for kind in "ab":
        (tmp_path / "empty" / kind).mkdir(parents=True)
    (tmp_path / "wrong.npz").write_bytes(b"no zip")
    arrays = {part: np.zeros((3, 28, 28), np.uint8) for part in ("x_train", "x_test")}
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "scalar.npz", **arrays, y_train=np.array(3), y_test=np.zeros(3, int))
    np.savez(tmp_path / "large.npz", **arrays, y_train=np.full(3, 10), y_test=np.zeros(3, int))
    np.savez(tmp_path / "pickled.npz", x_train=np.array([{}], object))
    zeros = np.zeros((12, 28, 28), np.uint8)
    both = {"x_train": zeros, "x_test": zeros}
    two, three = np.arange(12) % 2, np.arange(12) % 3
    times = two.astype("m8[s]")
    np.savez(tmp_path / "times.npz", **both, y_train=times, y_test=times)
    with zipfile.ZipFile(tmp_path / "unmarked.npz", "w") as file:  # no member begins as an array
        for array in ("x_train", "y_train", "x_test", "y_test"):
            file.writestr(f"{array}.npy", b"0123")
    np.savez(tmp_path / "one-class.npz", **both, y_train=0 * two, y_test=0 * two)
    np.savez(tmp_path / "untaught.npz", **both, y_train=two, y_test=three)
    for kind in (b"a", b"\xff"):
        (tmp_path / "bytes" / os.fsdecode(kind)).mkdir(parents=True)
    for part, kinds in (("train", "cross ring"), ("test", "cross ring dot")):
        for kind in kinds.split():
            (tmp_path / "parts" / part / kind).mkdir(parents=True)
    before = sorted((lab / "data").rglob("*.*"))
    status, out, err = call("data", name, "--from", str(tmp_path / source))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert reason in err
    assert sorted(set((lab / "data").rglob("*.*")) - set((lab / "data").glob(".*.lock"))) == before
    assert len(list((lab / "data").glob("[!.]*"))) == 1  # the sample


def test_a_data_set_is_made_once(call: Call, shapes: Path) -> None:
    source = str(shapes)
    assert call("data", "shapes", "--from", source)[0] == 0
    status, _, err = call("data", "shapes", "--from", source)
    assert status == 2
    assert "a data set is made once" in err


@pytest.mark.slow
def test_of_several_calls_at_once_one_makes_the_data_set(lab: Path, tmp_path: Path) -> None:
    sources = [write_folder(tmp_path / str(number), 12 + number) for number in range(4)]

    def make(source: Path) -> str:
        try:
            return import_data(source, "raced", lab, is_prepared=False)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        said = list(threads.map(make, sources))
    made = [number for number, text in enumerate(said) if "train on it" in text]
    assert len(made) == 1
    assert sum("a data set is made once" in text for text in said) == 3
    count = sum(len(load_digits(lab, "raced", files).labels) for files in (TRAIN, TEST))
    assert count == 3 * (12 + made[0])


def test_arrays_are_neither_prepared_nor_larger_than_allowed(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "zeros.npz", x_train=np.zeros(10**6, np.uint8))
    status, _, err = call("data", "mine", "--from", str(tmp_path / "zeros.npz"), "--prepare")
    assert (status, "with --prepare is invalid" in err) == (2, True)
    monkeypatch.setattr(own, "_MOST_BYTES", 10**5)
    status, _, err = call("data", "mine", "--from", str(tmp_path / "zeros.npz"))
    assert (status, "bytes is invalid: it must be <= 100000" in err) == (2, True)
    status, _, err = call("data", "--prepare")
    assert (status, "--prepare without --from is invalid" in err) == (2, True)


def test_a_changed_file_of_ones_own_data_is_refused(call: Call, lab: Path, shapes: Path) -> None:
    assert call("data", "shapes", "--from", str(shapes))[0] == 0
    file = lab / "data" / "shapes" / TRAIN[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, _, err = call("data", "shapes")
    assert status == 2
    assert "is not the known file" in err
