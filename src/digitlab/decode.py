"""Image files of strangers read within bounds of memory and time."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from digitlab.errors import UserError
from digitlab.prepare import Grey

# What Pillow warns of in a file is either told as damage or does not matter.
warnings.filterwarnings("ignore", module="PIL")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")
_FILE = 50 * 2**20  # bytes of a file at most
_PIXELS = 40_000_000  # of a picture at most: 160 MB while it is decoded
_LEAST = 5  # pixels of a side
_WORKING = 512  # pixels of a side that a digit is looked for in


def read_image(path: Path) -> Grey:
    """The grey picture of a file, see `decode`.

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
    """Grey levels 0 to 255, float32 (H, W), of an image: first frame, upright, on its background.

    Large pictures come reduced to some 512 pixels a side; transparent ones on white, or on black
    where what is opaque is light.

    Raises:
        UserError: empty, too large, cut short or none of the formats; says which.
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
        raise UserError(f"{name}: no image: allowed are {', '.join(FORMATS)}") from error
    except (MemoryError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: too many pixels: at most {_PIXELS} are read") from error
    except Exception as error:  # Pillow's decoders raise of every kind on files that are damaged
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}: damaged or cut short: {reason[0][:200]}") from error


def _grey(image: Image.Image, name: str) -> Grey:
    width, height = image.size
    if width * height > _PIXELS:
        raise UserError(f"{name}: {width} x {height} pixels: at most {_PIXELS} are read")
    if min(width, height) < _LEAST:
        raise UserError(f"{name}: {width} x {height} pixels: at least {_LEAST} a side are needed")
    if image.format == "JPEG":
        image.draft("RGB", (2 * _WORKING, 2 * _WORKING))  # decodes an eighth of it, if it may
    image.load()
    factor = max(image.size) // _WORKING
    if factor > 1 and image.mode not in ("I", "F", "I;16", "I;16B", "I;16L", "P", "1", "PA"):
        image = image.reduce(min(factor, *image.size))
    upright = ImageOps.exif_transpose(image)
    picture = upright if upright is not None else image
    if picture.mode in ("I", "F", "I;16", "I;16B", "I;16L"):
        return _deep(picture, name)
    if picture.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        return _reduced(_on_background(picture.convert("RGBA")))
    return _reduced(np.asarray(picture.convert("L"), np.float32))


def _deep(picture: Image.Image, name: str) -> Grey:
    """Of 16 and 32 bits a pixel: from the darkest to the lightest."""
    values = _reduced(np.asarray(picture).astype(np.float32))
    if not np.isfinite(values).all():
        raise UserError(f"{name}: holds values that are no numbers")
    low, high = float(values.min()), float(values.max())
    top = 65535.0 if 255 < high <= 65535 else max(high, 255.0)
    return ((values - min(low, 0.0)) * (255 / (top - min(low, 0.0)))).astype(np.float32)


def _on_background(picture: Image.Image) -> Grey:
    alpha = np.asarray(picture.getchannel("A"), np.float32) / 255
    light = np.asarray(picture.convert("RGB").convert("L"), np.float32)
    opaque = float((light * alpha).sum() / max(float(alpha.sum()), 1e-6))
    paper = 255.0 if opaque < 128 or float(alpha.mean()) > 0.99 else 0.0
    return (light * alpha + paper * (1 - alpha)).astype(np.float32)


def _reduced(grey: Grey) -> Grey:
    """To at most twice the working size, by means of whole blocks."""
    rows, columns = (max(1, side // _WORKING) for side in grey.shape)
    factor = min(max(rows, columns), *grey.shape)
    if factor == 1:
        return grey
    height, width = (side // factor * factor for side in grey.shape)
    blocks = grey[:height, :width].reshape(height // factor, factor, width // factor, factor)
    means: Grey = blocks.mean((1, 3), dtype=np.float32)
    return means
