"""Hostile files of data sets: arrays, notes of a data set of one's own, IDX files, archives."""

import gzip
import io
import json
import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from bombs import zeros
from hostile import Reader
from mutate import NUMBERS, archive, damaged, damaged_archive, damaged_json

from digitlab.base.errors import UserError
from digitlab.data import datasets
from digitlab.data.datasets import OWN, TEST, TRAIN, class_names, find_known, idx_bytes, load_digits
from digitlab.digits.own import import_data

LABELS = np.arange(24) % 3
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 28, 28), np.uint8)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


@cache
def arrays() -> list[bytes]:
    """Return NPZ files, stored and packed."""
    labels = LABELS.astype(np.uint8)
    whole = {"x_train": PIXELS, "y_train": labels, "x_test": PIXELS, "y_test": LABELS}
    members = [(f"{name}.npy", npy(array)) for name, array in whole.items()]
    bomb = b"\x93NUMPY\1\0v\0" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (%s,)}"
    sizes = [
        ("x_train.npy", (bomb % number).ljust(127) + b"\n") for number in (b"9" * 9, b"9" * 18)
    ]
    return [archive(members), archive(members, 8), *[archive([one, *members[1:]]) for one in sizes],
            archive([("x_train.npy", bytes(600 * 2**20)), *members[1:]], 8)]  # fmt: skip


class OwnArrays(Reader):
    """NPZ files, as `digitlab data NAME --from FILE` reads them."""

    def corpus(self) -> Sequence[bytes]:
        return arrays()

    def draw(self, chance: Random) -> bytes:
        content = chance.choice(arrays()[:2])
        if chance.random() < 0.6:
            return damaged_archive(content, chance)
        return damaged(content, arrays()[:2], chance)

    def read(self, given: bytes) -> None:
        lab = self.folder / "arrays"
        shutil.rmtree(lab, ignore_errors=True)
        lab.mkdir()
        path = lab / "mine.npz"
        path.write_bytes(given)
        import_data(path, "mine", lab, is_prepared=False)


NOTES = {
    "sha256": dict.fromkeys((*TRAIN, *TEST), "0" * 64),
    "classes": ["ring", "cross", "dot"],
    "centred": True,
}


class OwnNotes(Reader):
    """`dataset.json` of a data set of one's own, beside files that it is wrong of or right."""

    def corpus(self) -> Sequence[bytes]:
        return [json.dumps(NOTES).encode(), b"", b"[]", b"null", b"[" * 100_000]

    def draw(self, chance: Random) -> bytes:
        return damaged_json(NOTES, chance)

    def read(self, given: bytes) -> None:
        place = self.folder / "notes" / "data" / "own"
        place.mkdir(parents=True, exist_ok=True)
        (place / OWN).write_bytes(given)
        lab = place.parents[1]
        names = class_names("own", lab)
        assert len(names) >= 10
        json.dumps(names)
        known = find_known("own", lab)
        "".join([*known.classes, *known.sha256])  # all of them are texts
        for name, content in zip(TRAIN, (PIXELS, LABELS.astype(np.uint8)), strict=True):
            (place / name).write_bytes(idx_bytes(content))
        load_digits(lab, "own", TRAIN, allow_unknown=False)


class Idx(Reader):
    """IDX files of a known data set, and how they are fetched: packed by gzip or in a TAR."""

    def corpus(self) -> Sequence[Any]:
        good = [idx_bytes(PIXELS), idx_bytes(LABELS.astype(np.uint8))]
        heads = [bytes([0, 0, 8, 3]) + 3 * number.to_bytes(8, "big")[-4:] for number in NUMBERS]
        return [good, *[[head, good[1]] for head in heads], [b"", b""], ["folder", good[1]],
                ["fifo", good[1]], ["sparse", good[1]], ["link", good[1]],
                ["packed", gzip.compress(good[0])], ["packed", zeros(2048)],
                ["packed", gzip.compress(bytes(2**26)) * 32]]  # fmt: skip

    def draw(self, chance: Random) -> Any:
        good = list(self.known[0])
        if chance.random() < 0.2:
            return ["packed", damaged(gzip.compress(good[0]), good, chance)]
        at = chance.randrange(2)
        good[at] = damaged(good[at], good, chance)
        return good

    def read(self, given: Any) -> None:
        lab = self.folder / "idx"
        shutil.rmtree(lab, ignore_errors=True)
        place = lab / "data" / "sample"
        place.mkdir(parents=True)
        if given[0] == "packed":
            self._fetch(given[1], lab)
            return
        for name, content in zip(TRAIN, given, strict=True):
            path = place / name
            if content == "folder":
                path.mkdir()
            elif content == "fifo":
                os.mkfifo(path)
            elif content == "link":
                path.symlink_to("/dev/zero")
            elif content == "sparse":
                path.touch()
                os.truncate(path, 2**42)
            else:
                path.write_bytes(content)
        digits = load_digits(lab, "sample", TRAIN, allow_unknown=True)
        assert digits.images.shape[1:] == (28, 28)
        assert len(digits.labels) == len(digits.images)

    def _fetch(self, content: bytes, lab: Path) -> None:
        """Let a mirror, and the system's package, give this file for each that is asked for."""
        folder = lab / "packages"
        folder.mkdir()
        known = datasets.Known(datasets.KNOWN["mnist"].sha256, "MNIST", "", str(folder))
        for name in known.sha256:
            (folder / f"{name}.gz").write_bytes(content)
        kept = datasets.download, datasets.KNOWN["mnist"]
        datasets.download = lambda _, names: dict.fromkeys(names, content)  # type: ignore[assignment]
        datasets.KNOWN["mnist"] = known
        try:
            load_digits(lab, "mnist", TRAIN)
        except UserError:
            raise
        finally:
            datasets.download, datasets.KNOWN["mnist"] = kept  # type: ignore[assignment]
