"""Files that lie about what is in them: read, or refused in one line, within the limits."""

import io
import re
import zlib
from pathlib import Path
from threading import Timer

import numpy as np
import psutil
import pytest
from bombs import tiff, zeros
from conftest import DATA
from PIL import Image

from digitlab.base.errors import UserError, visible
from digitlab.digits import decode as decoding
from digitlab.digits.decode import decode

DIGIT = np.fromfile(DATA / "t10k-images-idx3-ubyte", np.uint8)[16:800].reshape(28, 28)
LEVELS = np.kron(255 - DIGIT, np.ones((5, 5), np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_file_that_may_not_be_read_is_an_image_by_its_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(decoding, "open", refuse, raising=False)  # as root one may read all
    for name in ("a.png", "notes"):
        (tmp_path / name).touch()
    assert decoding.is_image(tmp_path / "a.png")
    assert not decoding.is_image(tmp_path / "notes")


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray((LEVELS / 255).astype(np.float32)),
        Image.fromarray(LEVELS.astype(np.uint16) * 4),  # 10 bits
        Image.fromarray(LEVELS.astype(np.uint16) * 16),  # 12 bits
        Image.fromarray(LEVELS.astype(np.uint16) * 257),
    ],
)
def test_floats_of_0_to_1_and_10_or_12_bits_are_the_picture_of_8_bits(image: Image.Image) -> None:
    assert np.abs(decode(saved(image, "TIFF"), "it") - LEVELS).max() < 2


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "BMP")])
def test_an_alpha_that_was_never_written_is_ignored(mode: str, kind: str) -> None:
    image = Image.fromarray(LEVELS).convert(mode)
    image.putalpha(0)
    assert np.abs(decode(saved(image, kind), "it") - LEVELS).max() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_do_not_spoil_good_pixels(kind: str) -> None:
    large = {"icc_profile": np.random.default_rng(0).bytes(2 * 2**20)}
    file = saved(Image.fromarray(LEVELS).convert("RGB"), kind, **large)
    assert np.abs(decode(file, "it") - LEVELS).mean() < 4


def decoder() -> psutil.Process:
    """The process that decodes what is not small and simple."""
    [process] = [p for p in psutil.Process().children() if "digits.decode" in " ".join(p.cmdline())]
    return process


def test_colours_of_lab_are_refused_by_their_name() -> None:
    with pytest.raises(UserError, match="colours of LAB: they must be grey, RGB or CMYK"):
        decode(saved(Image.new("LAB", (30, 30)), "TIFF"), "it.tif")


def test_tile_larger_than_its_picture_is_refused_within_the_limits() -> None:
    bomb = tiff(100, 100, (46336, 46320), zeros(2048))
    assert len(bomb) < 3 * 2**20
    with pytest.raises(UserError) as refused:
        decode(bomb, "it.tif")
    assert str(refused.value).startswith("it.tif: ")
    small = tiff(100, 100, (112, 112), zlib.compress(bytes(112 * 112)))
    assert decode(small, "it.tif").shape == (100, 100)  # and the next file is read
    status = Path(f"/proc/{decoder().pid}/status").read_text(encoding="ascii")
    assert int(re.findall(r"VmPeak:\s+(\d+) kB", status)[0]) <= 2**20


def test_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded() -> None:
    file = saved(Image.fromarray(LEVELS), "JPEG", progressive=True)
    assert decode(file, "it").shape == LEVELS.shape
    first = file.index(b"\xff\xda")
    with pytest.raises(UserError, match="must have at most 100 scans"):
        decode(file[:-2] + 5000 * file[first:-2] + file[-2:], "it")


def test_jpeg_above_the_limit_of_pixels_is_read_reduced() -> None:
    file = saved(Image.new("L", (7100, 7100), 200), "JPEG")
    assert decode(file, "it").shape[0] < 1024


def test_decoder_that_takes_too_long_or_ends_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    gif = saved(Image.fromarray(LEVELS), "GIF")

    def process() -> psutil.Process:
        assert decode(gif, "it").shape == LEVELS.shape
        return decoder()

    first = process()
    assert process() == first  # kept for the next file
    first.suspend()
    monkeypatch.setattr(decoding, "_TIME_S", 0.1)
    with pytest.raises(UserError, match=r"it: slow to decode: it must take at most 0.1 s"):
        decode(gif, "it")
    monkeypatch.undo()
    second = process()
    assert not first.is_running()
    second.kill()  # between two files
    second.wait()
    third = process()
    third.suspend()
    Timer(0.2, third.kill).start()  # while it decodes
    with pytest.raises(UserError, match="damaged: its decoder has failed"):
        decode(gif, "it")


def test_what_phones_save_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Save it as a JPEG or a PNG"):
        decode(b"\0\0\0\x18ftypheic" + bytes(40), "IMG_1.HEIC")


def test_control_characters_are_escaped() -> None:
    assert visible("a\n\x1b[31mb\u202e") == r"a\n\x1b[31mb\u202e"
    assert visible("prüfung 数.png") == "prüfung 数.png"
    assert "\x1b" not in str(UserError("x\x1b]0;y"))
