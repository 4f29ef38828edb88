"""Damage done by chance: to bytes, to values of JSON, to texts, to archives."""

import copy
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 4096, 32767, 32768, 65535, 65536)
NUMBERS += (10**6, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**64 - 1)
TEXTS = (
    "",
    " ",
    "x" * 5000,
    "a\nb",
    "\x00",
    "\x1b[31m",
    "\u202eabc",
    "数",
    "\ud800",
    "/proc/escaped",
)
TEXTS += ("../../x", "..", ".", "~", "-x", "--help", "'", '"', "`", "a'b", "%s%n", "${oc.env:HOME}")
TEXTS += ("${a", "{}", "null", "true", "1e999", "nan", "inf", "0x10", "1_000", "<script>", "a=b")
TEXTS += ("\\", "a\\b", "C:\\x", "con", "%00", "%2e%2e%2f", "__import__('os')", "!!python/name:os")
VALUES: tuple[Any, ...] = (None, True, False, -1, 0, 1, 0.5, -0.0, 1e308, 5e-324, 2**63, -(2**63))
VALUES += (10**30, float("nan"), float("inf"), float("-inf"), [], {}, [[]], {"": None}, [None] * 3)
VALUES += (["a", 1, None], {"a": {"b": {"c": [1, 2]}}}, {"_target_": "os.system"}, *TEXTS)


def damaged(content: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """Return bytes after one to eight changes; `others` lend parts of themselves."""
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        content = chance.choice(_CHANGES)(content, others, chance)
    return content


def _flipped(content: bytes, _: Sequence[bytes], chance: Random) -> bytes:
    if not content:
        return b"\0"
    at = _place(content, chance)
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def _overwritten(content: bytes, _: Sequence[bytes], chance: Random) -> bytes:
    """A number of one to eight bytes that a reader could take for a size."""
    code = chance.choice("BHIQ")
    number = chance.choice(NUMBERS) % (1 << 8 * struct.calcsize(code))
    packed = struct.pack(chance.choice("<>") + code, number)
    at = _place(content, chance)
    return content[:at] + packed + content[at + len(packed) :]


def _cut(content: bytes, _: Sequence[bytes], chance: Random) -> bytes:
    start, end = _span(content, chance)
    return chance.choice((content[:start], content[start:], content[:start] + content[end:]))


def _repeated(content: bytes, _: Sequence[bytes], chance: Random) -> bytes:
    start, end = _span(content, chance)
    times = chance.choice((1, 1, 2, 10, 1000))
    return content[:end] + content[start:end][: 10**6 // times] * times + content[end:]


def _inserted(content: bytes, _: Sequence[bytes], chance: Random) -> bytes:
    at = _place(content, chance)
    texts = (chance.choice(TEXTS).encode(errors="surrogatepass"), chance.randbytes(8), bytes(64))
    return content[:at] + chance.choice(texts) + content[at:]


def _spliced(content: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    other = chance.choice(others)
    start, end = _span(other, chance)
    at = _place(content, chance)
    return content[:at] + other[start:end] + content[at + chance.choice((0, end - start)) :]


_CHANGES: tuple[Callable[[bytes, Sequence[bytes], Random], bytes], ...] = (
    *(_flipped, _flipped, _overwritten, _overwritten, _overwritten),
    *(_cut, _repeated, _inserted, _spliced),
)


def _place(content: bytes, chance: Random) -> int:
    """Return an index, as often as not among the first hundred: there the header is."""
    most = min(len(content), chance.choice((100, len(content)))) if content else 1
    return chance.randrange(max(1, most))


def _span(content: bytes, chance: Random) -> tuple[int, int]:
    start = _place(content, chance)
    length = chance.choice((1, 4, chance.randrange(64), chance.randrange(len(content) + 1)))
    return start, min(len(content), start + length)


def damaged_json(value: Any, chance: Random) -> bytes:
    """Return the JSON of a value after one to four changes, seldom damaged as text, too."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 4))):
        value = _changed(value, chance)
    text = json.dumps(value)
    kind = chance.randrange(40)
    if kind == 0:  # deeper than any parser follows
        text = text.replace("{", '{"a":' * 50_000, 1)
    elif kind == 1:
        text = text.replace("1", "1" * 5000, 1)
    elif kind == 2:  # one key twice
        text = text.replace("{", '{"' + chance.choice(("format", "study", "do")) + '": 1, ', 1)
    content = text.encode(errors="surrogatepass")
    return damaged(content, [content], chance) if kind in (3, 4, 5, 6) else content


def _changed(value: Any, chance: Random) -> Any:
    """Return a value with one of its parts replaced, removed, doubled or renamed."""
    holders = [*_holders(value)]
    if not holders or chance.random() < 0.03:
        return chance.choice(VALUES)
    holder = chance.choice(holders)
    key = chance.choice([*holder] if isinstance(holder, dict) else range(len(holder)))
    kind = chance.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(TEXTS)] = holder.pop(key)
    elif kind == 1:
        holder.extend(holder[key : key + 1] * chance.choice((1, 1000)))
    elif kind == 2:
        holder[key] = chance.choice(([holder[key]], {"": holder[key]}, str(holder[key])))
    elif kind == 3 and type(holder[key]) in (int, float):
        holder[key] = chance.choice((-holder[key], holder[key] + 1, chance.choice(NUMBERS)))
    else:
        holder[key] = copy.deepcopy(chance.choice(VALUES))
    return value


def _holders(value: Any) -> list[Any]:
    """Return the lists and dictionaries in a value that hold something."""
    found = []
    if isinstance(value, dict | list) and value:
        found.append(value)
        for part in value.values() if isinstance(value, dict) else value:
            found += _holders(part)
    return found


def damaged_text(text: str, chance: Random) -> str:
    """Return a text of lines after one to five changes to its words and lines."""
    for _ in range(chance.choice((1, 1, 2, 3, 5))):
        lines = text.split("\n")
        at = chance.randrange(len(lines))
        line = lines[at]
        head, colon, _ = line.partition(":" if ":" in line else "=")
        value = chance.choice((*TEXTS, *map(str, NUMBERS), "[1, 2]", "{a: b}", "&a [*a]", "*a"))
        lines[at : at + 1] = chance.choice((
            [head + colon + " " + value], [head + colon + value], [value], [], [line, line],
            ["  " + line], [line.lstrip()], [line + " " + value], [value + ": 1", line],
        ))  # fmt: skip
        text = "\n".join(lines)
    return text


def damaged_archive(content: bytes, chance: Random) -> bytes:
    """Return a ZIP with a member renamed, removed, doubled, packed or damaged."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    for _ in range(chance.choice((1, 1, 2))):
        if not members:
            break
        at = chance.randrange(len(members))
        name, inside = members[at]
        kind = chance.randrange(5)
        if kind == 0:
            del members[at]
        elif kind == 1:
            members[at] = (chance.choice(TEXTS).encode(errors="replace").decode() or "a", inside)
        elif kind == 2:
            members.append((name, damaged(inside, [inside], chance)))
        else:
            members[at] = (name, damaged(inside, [inside], chance))
    return archive(members, chance.choice((zipfile.ZIP_STORED,) * 3 + (zipfile.ZIP_DEFLATED,)))


def archive(members: Sequence[tuple[str, bytes]], packing: int = zipfile.ZIP_STORED) -> bytes:
    kept = io.BytesIO()
    with zipfile.ZipFile(kept, "w", packing) as file:
        for name, inside in members:
            file.writestr(zipfile.ZipInfo(name), inside, packing)
    return kept.getvalue()


def with_sums(content: bytes) -> bytes:
    """Return a damaged PNG whose chunks have their checksums again, as far as it can be read."""
    fixed, at = bytearray(content[:8]), 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        body = content[at + 4 : at + 8 + length]
        fixed += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(fixed + content[at:])
