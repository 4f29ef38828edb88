"""Files of images that are small, and large once they are decoded."""

import struct
import zlib


def tiff(width: int, height: int, tile: tuple[int, int], packed: bytes) -> bytes:
    """A TIFF whose one tile may be larger than the picture: grey, 8 bits, deflate."""
    entries = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1)]
    entries += [(322, tile[0]), (323, tile[1]), (324, 0), (325, len(packed))]
    start = 8 + 2 + 12 * len(entries) + 4
    body = b"".join(
        struct.pack("<HHII", tag, 4, 1, start if tag == 324 else value) for tag, value in entries
    )
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + body + bytes(4) + packed


def zeros(megabytes: int) -> bytes:
    """So many, by deflate; a block that is flushed in full can be repeated as it is."""
    packer = zlib.compressobj()
    first = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + block * (megabytes - 1) + packer.flush()


def png(width: int, height: int, kind: int, packed: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8 bits, of a kind of colours, with more chunks before its pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
