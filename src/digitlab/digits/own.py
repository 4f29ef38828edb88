"""`digitlab data NAME --from PLACE`: a data set of one's own, read once into the lab."""

import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from digitlab.base.errors import UserError, counted, require, visible
from digitlab.base.files import write_synced
from digitlab.base.invocation import command
from digitlab.data.datasets import KNOWN, OWN, TEST, TRAIN, idx_bytes, sha256_of, stratified_split
from digitlab.digits.decode import is_image, read_image
from digitlab.digits.prepare import SIDE, prepare, scale

_TAKEN = (*KNOWN, "null", "true", "false", "nan", "inf")  # the latter mean more in Hydra
_MOST_BYTES = 500 * 2**20  # of an NPZ file's arrays
_MOST_CLASSES, _LEAST_IMAGES = 10, 12  # images of a class: some are for validation, some to test
_MANY = 5000  # training images, of which the default batches and epochs are enough
_TEST_SHARE = 1 / 6  # of the images, where no test set is given
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # of an NPZ file, as Keras names them


@dataclass(frozen=True)
class _Part:
    """Images uint8 (N, 28, 28) and labels (N,), from 0 on."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def import_data(source: Path, name: str, lab: Path, is_prepared: bool) -> str:
    """Read images from a folder with a folder a class, or an NPZ file; return what was made.

    A folder may hold `train` and `test` with a folder a class each; else a sixth of the images is
    set apart for testing, stratified. An NPZ file holds x_train, y_train, x_test and y_test.

    Args:
        is_prepared: find the ink of each image and centre it; else scale alone. `predict` prepares
            new images in the same way.

    Raises:
        UserError: the name is taken or no name of a folder, or the images cannot be read or used.
    """
    is_name = re.fullmatch(r"[A-Za-z][\w-]{0,60}", name, re.ASCII) and name.lower() not in _TAKEN
    rule = "up to 61 letters, digits, _ and -, beginning with a letter, and none of "
    require(bool(is_name), f"data {visible(name)}", rule + ", ".join(_TAKEN))
    folder = lab / "data" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):  # two calls at once make one data set
        if folder.exists():
            raise UserError(
                f"data {name}: {folder} exists, and runs may have used it: a data set is made "
                "once. Give another name, or remove that folder."
            )
        try:
            classes, training, test = _read(source, is_prepared)
        except OSError as error:
            rule = "it must be readable by this user. Name another place"
            where = visible(str(error.filename or source))
            raise UserError(f"--from {where} cannot be read ({error.strerror}): {rule}.") from error
        _write(folder, classes, training, test, is_prepared)
    return _summary(name, classes, training, test)


def _write(
    folder: Path, classes: Sequence[str], training: _Part, test: _Part, is_prepared: bool
) -> None:
    """Make the folder of a data set, whole or not at all."""
    made = folder.with_name(f".{folder.name}.new")  # perhaps of a call that was killed
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    contents: dict[str, bytes] = {}
    for files, part in ((TRAIN, training), (TEST, test)):
        contents |= dict(zip(files, map(idx_bytes, (part.images, part.labels)), strict=True))
    known = {"sha256": {file: sha256_of(content) for file, content in contents.items()},
             "classes": classes, "centred": is_prepared}  # fmt: skip
    for file, content in {**contents, OWN: json.dumps(known, indent=1).encode()}.items():
        write_synced(made / file, content)
    made.replace(folder)


def _summary(name: str, classes: Sequence[str], training: _Part, test: _Part) -> str:
    """Return what was made, and the commands that use it."""
    pixels, count = training.images / 255, len(training.labels)
    mean, std = round(pixels.mean(), 4), max(0.0001, round(pixels.std(), 4))
    held = max(10, count // 6)
    settings = {"name": name, "validation_images": held, "mean": mean, "std": std}
    words = [f"data.{key}={value}" for key, value in settings.items()]
    if count < _MANY:  # some hundred steps in all
        words += [f"data.batch_size={max(8, min(64, count // 20))}", "trainer.epochs=10"]
    return (
        f"{name}: {count} training and {len(test.labels)} test images of {len(classes)} classes "
        f"({', '.join(classes)})\ntrain on it:  {command('train', *words)}\n"
        f"read images:  {command('predict', '--run=RUN', 'IMAGE')}, with the run's id"
    )


def _read(source: Path, is_prepared: bool) -> tuple[list[str], _Part, _Part]:
    if source.suffix.lower() == ".npz":
        if is_prepared:
            raise UserError(
                f"--from {source} with --prepare is invalid: arrays are taken as they are. Leave "
                "--prepare out."
            )
        return _read_arrays(source)
    if not source.is_dir():
        raise UserError(
            f"--from {source} is invalid: it must be a folder with a folder of images a class, or "
            "an NPZ file. Name one."
        )
    if (source / "train").is_dir() and (source / "test").is_dir():
        classes = _classes(source / "train")
        others = sorted(set(_classes(source / "test")) ^ set(classes))
        rule = "the same classes as train"
        require(not others, f"--from {source / 'test'}: {', '.join(others)}", rule)
        training = _read_folder(source / "train", classes, is_prepared, _LEAST_IMAGES)
        return classes, training, _read_folder(source / "test", classes, is_prepared, 1)
    classes = _classes(source)
    whole = _read_folder(source, classes, is_prepared, _LEAST_IMAGES)
    count = max(len(classes), round(_TEST_SHARE * len(whole.labels)))
    rest, chosen = stratified_split(whole.labels.astype(np.int64), count, 0)
    parts = [_Part(whole.images[places], whole.labels[places]) for places in (rest, chosen)]
    return classes, parts[0], parts[1]


def _classes(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    rule = f"a folder with 2 to {_MOST_CLASSES} folders of images, one a class"
    require(2 <= len(found) <= _MOST_CLASSES, f"--from {folder} with {len(found)} folders", rule)
    for name in found:
        rule = "the name of a class, in printable characters"
        require(name.isprintable(), f"--from {folder}: {visible(name)}", rule)
    return found


def _read_folder(folder: Path, classes: Sequence[str], is_prepared: bool, least: int) -> _Part:
    images, labels = [], []
    for label, name in enumerate(classes):
        found = list(_images(folder / name, is_prepared))
        if len(found) < least:
            raise UserError(
                f"--from {folder / name} with {counted(len(found), 'image')} is invalid: it must "
                f"have {least} or more. Add images, or leave that class out."
            )
        images += found
        labels += [label] * len(found)
    return _Part(np.stack(images), np.array(labels, np.uint8))


def _images(folder: Path, is_prepared: bool) -> Iterator[NDArray[np.uint8]]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        if path.name.startswith(".") or not is_image(path):
            continue
        grey = read_image(path)
        if is_prepared:
            prepared = prepare(grey)
            if prepared.problem:
                raise UserError(
                    f"{path}: no digit found ({prepared.problem}): with --prepare each image must "
                    "show one. Remove it, or leave --prepare out."
                )
            yield prepared.image
        else:
            yield scale(grey)


def _read_arrays(source: Path) -> tuple[list[str], _Part, _Part]:
    try:
        with zipfile.ZipFile(source) as packed:  # a small file may unfold to gigabytes
            size = sum(part.file_size for part in packed.infolist())
        require(size <= _MOST_BYTES, f"--from {source} with {size} bytes", f"<= {_MOST_BYTES}")
        with np.load(source, allow_pickle=False) as file:
            # A member that does not begin as an array does comes as its bytes.
            arrays = {name: np.asanyarray(file[name]) for name in _ARRAYS}
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever numpy and zipfile raise on what is no such file
        raise UserError(
            f"--from {source} cannot be read: it must be an NPZ file with arrays of numbers "
            f"{', '.join(_ARRAYS)}. Write it with numpy.savez."
        ) from error
    _check_arrays(source, arrays)
    classes = [str(label) for label in range(int(arrays["y_train"].max()) + 1)]
    parts = [
        _Part(arrays[f"x_{part}"].astype(np.uint8), arrays[f"y_{part}"].astype(np.uint8))
        for part in ("train", "test")
    ]
    return classes, parts[0], parts[1]


def _check_arrays(source: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        is_labelled = labels.dtype.kind in "iu" and labels.ndim == 1 and len(labels) > 0
        is_labelled = is_labelled and bool(np.isin(labels, range(_MOST_CLASSES)).all())
        is_whole = images.dtype == np.uint8 and images.shape == (*labels.shape, SIDE, SIDE)
        found = f"--from {source}: {part}: {images.dtype} {images.shape} and labels "
        found += f"{labels.dtype} {labels.shape}"
        rule = f"uint8 images (N, 28, 28) and whole labels (N,) 0 to 9, N >= {_LEAST_IMAGES}"
        require(is_labelled and is_whole and len(labels) >= _LEAST_IMAGES, found, rule)
    learned, tested = (set(arrays[f"y_{part}"].tolist()) for part in ("train", "test"))
    rule = "two classes or more to learn, which hold all those of the test set"
    require(len(learned) > 1 and tested <= learned, f"--from {source}: classes", rule)
