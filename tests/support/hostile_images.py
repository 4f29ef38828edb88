"""Hostile images, alone and in folders of a data set of one's own."""

import io
import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from bombs import png, tiff, zeros
from hostile import Reader
from mutate import TEXTS, damaged, with_sums
from PIL import Image

from digitlab.digits.decode import decode
from digitlab.digits.own import import_data
from digitlab.digits.prepare import prepare, scale


def picture() -> np.ndarray:
    """A ring on a sheet with some noise, uint8 (60, 60)."""
    y, x = np.mgrid[:60, :60] - 30
    paper = np.random.default_rng(0).normal(220, 4, (60, 60))
    return np.where(abs(np.hypot(x, y) - 15) < 4, 30, paper).clip(0, 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def good_images() -> list[bytes]:
    """Return small files of all the formats, in the ways that they can be written."""
    grey = Image.fromarray(picture())
    colour, alpha = grey.convert("RGB"), grey.convert("RGBA")
    deep = Image.fromarray(picture().astype(np.uint16) * 257)
    floats = Image.fromarray(picture().astype(np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    files = [saved(image, "PNG") for image in (grey, colour, alpha, deep, grey.convert("1"))]
    files += [saved(colour.convert("P"), "PNG", transparency=0), saved(colour, "PNG", exif=exif)]
    files += [saved(colour, "JPEG"), saved(grey, "JPEG", progressive=True)]
    files += [saved(colour.convert("CMYK"), "JPEG"), saved(colour, "JPEG", exif=exif)]
    files += [saved(colour, "WEBP"), saved(alpha, "WEBP", lossless=True)]
    files += [saved(grey, "BMP"), saved(alpha, "BMP"), saved(colour, "DIB")]
    ways = (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    files += [saved(colour, "TIFF", compression=way) for way in ways]
    files += [saved(deep, "TIFF"), saved(floats, "TIFF"), saved(grey.convert("1"), "TIFF",
              compression="group4")]  # fmt: skip
    frames = [grey, Image.fromarray(255 - picture())]
    return [*files, saved(grey, "GIF"), saved(frames[0], "GIF", save_all=True,
            append_images=frames[1:])]  # fmt: skip


@cache
def bombs() -> list[bytes]:
    """Return what takes much more memory or time than its size suggests."""
    grey = Image.fromarray(picture())
    scans = saved(grey, "JPEG", progressive=True)
    first = scans.index(b"\xff\xda")
    profile = (b"iCCP", b"a\0\0" + zeros(900))
    text = (b"zTXt", b"a\0\0" + zeros(900))
    few = zeros(1)
    return [
        tiff(100, 100, (46336, 46320), zeros(2048)),
        tiff(60000, 60000, (112, 112), few),
        scans[:-2] + 5000 * scans[first:-2] + scans[-2:],
        scans[:-2] + 8 * scans[first:-2] + scans[-2:],
        saved(Image.new("L", (7100, 7100), 200), "JPEG"),
        png(2**31 - 1, 2**31 - 1, 0, few),
        png(7000, 7000, 6, zeros(197)),
        png(2000, 2000, 6, zeros(17)),
        png(60, 60, 0, few, profile),
        png(60, 60, 0, few, text),
        png(60, 60, 0, few, *[(b"tEXt", b"a\0" + bytes(2**20))] * 40),
        saved(grey, "GIF").replace(b"GIF89a\x3c\0\x3c\0", b"GIF89a\xff\xff\xff\xff"),
        saved(grey, "BMP").replace(b"\x3c\0\0\0\x3c\0\0\0", b"\xff\xff\xff\x7f\xff\xff\xff\x7f"),
    ]


class Images(Reader):
    """Images as `predict` and the pages read them."""

    def corpus(self) -> Sequence[bytes]:
        return [*good_images(), *bombs()]

    def draw(self, chance: Random) -> bytes:
        files = good_images()
        content = damaged(chance.choice(files), files, chance)
        if chance.random() < 0.05:
            content = damaged(chance.choice(bombs()[5:]), files, chance)
        return (
            with_sums(content) if content[:4] == b"\x89PNG" and chance.random() < 0.7 else content
        )

    def read(self, given: bytes) -> None:
        grey = decode(given, "it")
        assert grey.dtype == np.float32
        assert grey.ndim == 2
        assert np.isfinite(grey).all()
        assert -1 <= grey.min() <= grey.max() <= 256
        for image in (prepare(grey).image, scale(grey)):
            assert (image.shape, image.dtype) == ((28, 28), np.uint8)


class OwnFolders(Reader):
    """Folders of images, as `digitlab data NAME --from FOLDER` reads them."""

    def corpus(self) -> Sequence[Any]:
        return [self.draw(Random(f"folder {number}")) for number in range(3)]

    def draw(self, chance: Random) -> Any:
        """Return the files of a folder by their path; a text is what a link points to."""
        files: dict[bytes, Any] = {}
        top = chance.choice((b"", b"", b"train/", b"test/"))
        names = [name.encode(errors="surrogateescape") for name in TEXTS if name != "\ud800"]
        names += [b"a", b"b", b"c", b"\xff", b"0", b"1"]
        for name in chance.sample((b"a", b"b", b"c", *names), chance.choice((1, 2, 2, 3, 12))):
            for number in range(chance.choice((0, 1, 12, 12, 12, 13))):
                files[top + name + b"/%d.png" % number] = good_images()[number % 3]
            if chance.random() < 0.3:
                images = Images(self.folder)
                files[top + name + b"/" + chance.choice(names)] = images.draw(chance)
            if chance.random() < 0.1:
                targets = ("/dev/zero", "..", "missing", "/proc/escaped", "0.png", "fifo")
                files[top + name + b"/l.png"] = chance.choice(targets)
        return files, chance.random() < 0.5

    def read(self, given: Any) -> None:
        files, is_prepared = given
        place, lab = self.folder / "images", self.folder / "own"
        for folder in (place, lab):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for name, content in files.items():
            path = Path(os.fsdecode(os.fsencode(place) + b"/" + name.lstrip(b"/")))
            if b"\0" in name or b".." in name or len(path.name) > 200:
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if content == "fifo":
                    os.mkfifo(path)
                elif isinstance(content, str):
                    path.symlink_to(content)
                else:
                    path.write_bytes(content)
            except OSError:  # a name that no file can have, or that a folder has
                continue
        import_data(place, "own", lab, is_prepared)
