"""Decode untrusted image files within bounds of memory and time."""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from digitlab.base.errors import UserError
from digitlab.digits.prepare import Grey

# What Pillow warns of in a file is either refused as damage or does not matter.
warnings.filterwarnings("ignore", module="PIL")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")
_FILE = 50 * 2**20  # bytes of a file at most
_PIXELS = 50_000_000  # of a picture at most: 200 MB while it is decoded
_WEBP_PIXELS = 16_000_000  # libwebp holds a picture four times
_LEAST = 5  # pixels of a side
_LONGEST = 100  # times the shorter side
_WORKING = 512  # pixels of a side that a digit is looked for in
_STRIP = 2**20  # pixels that are reduced at once
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L")  # modes of 16 and 32 bits a pixel
_CLEAR = ("P", "PA", "LA", "RGBA", "La", "RGBa")  # modes that may be transparent


def read_image(path: Path) -> Grey:
    """Return the grey picture of a file, see `decode`.

    Raises:
        UserError: it cannot be read, or is no image that is allowed; one line.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            raise OSError("it is not a file")
        with open(path, "rb") as file:
            content = file.read(_FILE + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # a null byte in a name is a ValueError
        raise UserError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    return decode(content, str(path))


def decode(content: bytes, name: str) -> Grey:
    """Return grey levels 0 to 255, float32 (H, W): first frame, upright, on its background.

    Large pictures are reduced by means of whole blocks, to 512 to 1,023 pixels of the longer side;
    transparent ones stand on white, or on black where what is opaque is light.

    Raises:
        UserError: empty, too large, cut short or none of the formats.
    """
    if not content:
        raise UserError(f"{name}: empty")
    if len(content) > _FILE:
        raise UserError(f"{name}: more than {_FILE // 2**20} MB: make it smaller")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _grey(image, name)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image: it must be one of {', '.join(FORMATS)}") from error
    except (MemoryError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: too many pixels: at most {_PIXELS} are read") from error
    except Exception as error:  # Pillow's decoders raise of every kind on files that are damaged
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}: damaged or cut short: {reason[0][:200]}") from error


def _grey(image: Image.Image, name: str) -> Grey:
    (width, height), most = image.size, _WEBP_PIXELS if image.format == "WEBP" else _PIXELS
    size = f"{name}: {width} x {height} pixels"
    if width * height > most:
        raise UserError(f"{size}: at most {most} are read")
    if min(width, height) < max(_LEAST, max(width, height) / _LONGEST):
        raise UserError(
            f"{size}: at least {_LEAST} a side are needed, and no side {_LONGEST} times the other"
        )
    image.draft("RGB", (2 * _WORKING, 2 * _WORKING))  # a JPEG decodes an eighth of it, if it may
    image.load()
    width, height = image.size
    block = max(1, max(width, height) // _WORKING)  # pixels of a side
    rows = block * max(1, _STRIP // (width * block))  # of a strip, so that memory stays bounded
    boxes = [(0, y, width, min(height, y + rows)) for y in range(0, height, rows)]
    strips = [_levels(image.crop(box), block) for box in boxes]
    light, alpha = (np.concatenate(part) for part in zip(*strips, strict=True))
    if image.mode in _DEEP:
        light = _scaled(light, name)
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
    if strip.mode in _DEEP:
        levels = Image.fromarray(np.asarray(strip).astype(np.float32))
    elif strip.mode in _CLEAR or "transparency" in strip.info:
        strip = strip.convert("RGBA")
        opacity = np.asarray(strip.getchannel("A"), np.float32) / 255
        levels = Image.fromarray(np.asarray(strip.convert("L")) * opacity)
        alpha = np.asarray(Image.fromarray(opacity).reduce(block))
    else:
        levels = strip.convert("L").convert("F")
    light = np.asarray(levels.reduce(block))
    return light, np.ones_like(light) if alpha is None else alpha


def _scaled(values: Grey, name: str) -> Grey:
    """Scale levels of 16 or 32 bits to 0 to 255.

    8 bits stay, 16 bits are divided by 257, others are scaled by their own range.
    """
    if not np.isfinite(values).all():
        raise UserError(f"{name}: contains values that are not finite numbers")
    low, high = min(float(values.min()), 0.0), float(values.max())
    top = 65535.0 if 255 < high <= 65535 else max(high, 255.0)
    return ((values - low) * (255 / (top - low))).astype(np.float32)
