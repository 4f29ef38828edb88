"""Decode untrusted image files within bounds of memory and time."""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base

from digitlab.base.errors import UserError
from digitlab.base.files import require_file
from digitlab.digits.decoder_process import DecoderEnded, DecoderProcess, answer_files

Grey = NDArray[np.float32]

# What Pillow warns of in a file is either refused as damage or does not matter.
warnings.filterwarnings("ignore", module="PIL")
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20  # bytes of a colour profile, which Pillow unpacks

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")
_SAVE = "Save it as a PNG"
_RULE = f"it must be one of {', '.join(FORMATS)}. Save it as a JPEG or a PNG"
# Beginnings of those formats, and names of files that are reported if they are another.
_HEADS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
             ".heic", ".heif", ".avif", ".jxl", ".jp2", ".pdf", ".svg", ".dng", ".psd")  # fmt: skip
MAX_FILE_BYTES = 50 * 2**20  # bytes of a file at most
_MAX_PIXELS = 50_000_000  # of a picture at most: 200 MB while it is decoded
_MAX_WEBP_PIXELS = 16_000_000  # libwebp holds a picture four times
_MAX_SCANS = 100  # of a progressive JPEG: each of them goes through the whole picture again
_BOUNDED = _HEADS[:2]  # PNG, JPEG: what they take to decode is bounded by their size in pixels
_SMALL_PIXELS = 4_000_000  # pixels of those that are decoded in this process
_TIME_S = 10  # for any other
_MIN_SIDE_PIXELS = 5  # pixels of a side
_MAX_ASPECT_RATIO = 100  # times the shorter side
_WORKING_PIXELS = 512  # pixels of a side that a digit is looked for in
_STRIP_PIXELS = 2**20  # pixels that are reduced at once
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L")  # modes of 16 and 32 bits a pixel
_MAX_LEVELS = (1.0, 255.0, 1023.0, 4095.0, 65535.0)  # of floats, and of 8, 10, 12 and 16 bits
_ALPHA_MODES = ("P", "PA", "LA", "RGBA", "La", "RGBa")  # modes that may be transparent
_decoder = DecoderProcess()


class _RefusedError(Exception):
    """What is wrong with a file, to stand after its name."""


def read_image(path: Path) -> Grey:
    """Return the grey picture of a file, see `decode`.

    Raises:
        UserError: it cannot be read, or is no image that is allowed; one line.
    """
    require_file(path, str(path))
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        rule = "it must be a file that this user may read. Name another one"
        raise UserError(f"{path} cannot be read ({error.strerror}): {rule}.") from error
    return decode(content, str(path))


def is_image(path: Path) -> bool:
    """Whether a file is an image by its first bytes or, readable here or not, by its name."""
    if not path.is_file():
        return False
    if path.suffix.lower() in _SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return head.startswith(_HEADS) or head[4:8] == b"ftyp"


def decode(content: bytes, name: str) -> Grey:
    """Return grey levels 0 to 255, float32 (H, W): first frame, upright, on its background.

    Large pictures are reduced by means of whole blocks, to 512 to 1,023 pixels of the longer side;
    transparent ones stand on white, or on black where what is opaque is light.

    Raises:
        UserError: empty, too large, cut short or none of the formats.
    """
    if not content:
        raise UserError(f"{name}: empty: it must be an image. Copy or save it again.")
    if len(content) > MAX_FILE_BYTES:
        raise UserError(
            f"{name}: too large: it must have at most {MAX_FILE_BYTES // 2**20} MB. Scale it."
        )
    if content[4:8] == b"ftyp":  # what phones save
        raise UserError(f"{name}: HEIC, AVIF or a film: {_RULE}.")
    if content[:2] == b"\xff\xd8" and content.count(b"\xff\xda") > _MAX_SCANS:
        raise UserError(
            f"{name}: slow to decode: a JPEG must have at most {_MAX_SCANS} scans. {_SAVE}."
        )
    if content.startswith(_BOUNDED):
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if _is_bounded(image):
                    return _grey(image)
        except Exception as error:
            raise UserError(f"{name}: {_refusal(error)}") from error
    return _decode_apart(content, name)


def _is_bounded(image: Image.Image) -> bool:
    is_small = image.width * image.height <= _SMALL_PIXELS
    return image.format in ("PNG", "JPEG") and is_small and "progressive" not in image.info


def _refusal(error: Exception) -> str:
    """Return what is wrong with a file; decoders raise errors of every kind."""
    if isinstance(error, _RefusedError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return f"not an image: {_RULE}."
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return f"too many pixels: it must have at most {_MAX_PIXELS}. Scale it."
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"damaged or cut short: {reason[0][:200].rstrip('.')}. Copy or save it again."


def _decode_apart(content: bytes, name: str) -> Grey:
    """Decode in a process of its own, which may take so much memory and time."""
    try:
        answer = _decoder.ask(content, _TIME_S)
    except TimeoutError as error:
        rule = f"it must take at most {_TIME_S} s. Scale it, or save it as a PNG"
        raise UserError(f"{name}: slow to decode: {rule}.") from error
    except DecoderEnded as error:
        raise UserError(f"{name}: damaged: its decoder has failed. {_SAVE}.") from error
    if not answer.startswith(np.lib.format.MAGIC_PREFIX):
        raise UserError(f"{name}: {answer.decode()}")
    return np.load(io.BytesIO(answer), allow_pickle=False)  # type: ignore[no-any-return]


def serve() -> None:
    """Decode the files on standard input, each to an .npy file or to what is wrong with it."""
    answer_files(_answer)


def _answer(content: bytes) -> bytes:
    file = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            np.save(file, _grey(image))
    except Exception as error:  # noqa: BLE001
        return _refusal(error).encode(errors="replace")
    return file.getvalue()


def _check_size(image: Image.Image) -> None:
    """Refuse a picture that is too large or too thin; a JPEG is opened reduced."""
    width, height = image.size
    if min(width, height) < max(_MIN_SIDE_PIXELS, max(width, height) / _MAX_ASPECT_RATIO):
        sides = f"at least {_MIN_SIDE_PIXELS} a side"
        rule = f"it must have {sides}, and no side {_MAX_ASPECT_RATIO} times the other"
        raise _RefusedError(f"{width} x {height} pixels: {rule}. Cut or scale it.")
    image.draft(
        "RGB", (2 * _WORKING_PIXELS, 2 * _WORKING_PIXELS)
    )  # a JPEG decodes an eighth of it, if it may
    most = _MAX_WEBP_PIXELS if image.format == "WEBP" else _MAX_PIXELS
    if image.width * image.height > most:
        raise _RefusedError(f"{width} x {height} pixels: it must have at most {most}. Scale it.")


def _grey(image: Image.Image) -> Grey:
    _check_size(image)
    if image.mode == "LAB":
        raise _RefusedError(f"colours of LAB: they must be grey, RGB or CMYK. {_SAVE}.")
    image.load()
    if image.mode in _ALPHA_MODES and "A" in image.getbands() and image.getextrema()[-1] == (0, 0):
        image = image.convert("L" if image.mode == "LA" else "RGB")  # of an alpha never written
    width, height = image.size
    block = max(1, max(width, height) // _WORKING_PIXELS)  # pixels of a side
    rows = block * max(
        1, _STRIP_PIXELS // (width * block)
    )  # of a strip, so that memory stays bounded
    boxes = [(0, y, width, min(height, y + rows)) for y in range(0, height, rows)]
    strips = [_levels(image.crop(box), block) for box in boxes]
    light, alpha = (np.concatenate(part) for part in zip(*strips, strict=True))
    if image.mode in _DEEP_MODES:
        light = _scaled(light)
    else:
        opaque = float(light.sum() / max(float(alpha.sum()), 1e-6))
        paper = 255.0 if opaque < 128 or float(alpha.mean()) > 0.99 else 0.0
        light += paper * (1 - alpha)
    upright = Image.fromarray(light)
    with suppress(Exception):  # a damaged EXIF block does not spoil good pixels
        upright.getexif()[Base.Orientation] = image.getexif()[Base.Orientation]
        upright = ImageOps.exif_transpose(upright)
    return np.array(upright, np.float32)


def _levels(strip: Image.Image, block: int) -> tuple[Grey, Grey]:
    """Return means over blocks of a strip's levels, times its opacity; and of its opacity, 0 to 1.

    In floats, since Pillow rounds the means of whole numbers.
    """
    alpha = None
    if strip.mode in _DEEP_MODES:
        levels = Image.fromarray(np.asarray(strip).astype(np.float32))
    elif strip.mode in _ALPHA_MODES or "transparency" in strip.info:
        strip = strip.convert("RGBA")
        opacity = np.asarray(strip.getchannel("A"), np.float32) / 255
        levels = Image.fromarray(np.asarray(strip.convert("L")) * opacity)
        alpha = np.asarray(Image.fromarray(opacity).reduce(block))
    else:
        levels = strip.convert("L").convert("F")
    light = np.asarray(levels.reduce(block))
    return light, np.ones_like(light) if alpha is None else alpha


def _scaled(values: Grey) -> Grey:
    """Scale levels of 16 or 32 bits to 0 to 255.

    The range is that of the least number of bits that holds them, or 0 to 1.
    """
    if not np.isfinite(values).all():
        raise _RefusedError(f"not all finite: its levels must be finite numbers. {_SAVE}.")
    low, high = min(float(values.min()), 0.0), float(values.max())
    top = next((top for top in _MAX_LEVELS if high <= top), high)
    if top == low:
        return np.zeros_like(values)
    return ((values - low) * (255 / (top - low))).astype(np.float32)
