"""Hostile settings: recorded configurations, recipes, overrides, environment variables."""

import contextlib
import io
import os
import subprocess
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from hostile import Reader
from mutate import NUMBERS, TEXTS, damaged, damaged_text

from digitlab import cli
from digitlab.base.env_file import _KNOWN, load_env_file
from digitlab.base.errors import UserError
from digitlab.base.paths import RECIPES, lab_folder
from digitlab.config import compose as composing
from digitlab.config.compose import compose
from digitlab.config.recorded import config_from_yaml, config_to_yaml
from digitlab.config.schema import settings
from digitlab.study.space import first_values, read_space

BOMB = "format: 1\na: &-a [x, x]\n" + "".join(
    f"{after}: &-{after} [{', '.join([f'*-{before}'] * 10)}]\n"
    for before, after in zip("abcdefg", "bcdefgh", strict=True)
)
NESTED = ("[" * 3000, "a: " + "[" * 3000 + "]" * 3000, "{a: " * 3000, "- " * 3000, "? " * 3000)
RUBBISH = [BOMB, BOMB.replace("-", ""), *NESTED, "a: &a {<<: *a}", "<<: {format: 1}", "a: !!int x"]
RUBBISH += ["!!python/object/apply:os.abort []", "a: !!binary x", "a: " + "9" * 5000, "%YAML 9.9"]
RUBBISH += [
    "a: 2001-02-30",
    "a: 1:2:3",
    "\ufeffformat: 1",
    "--- a\n--- b",
    "a: |\n" + " x\n" * 9999,
]
RUBBISH += ["format: 1\nmodel: {name: ${model.name}}", "a: '${oc.env:HOME}'", "a: ${a}", "a: ???"]
RUBBISH += ["a: &a\n  <<: [" + "*a, " * 999 + "*a]"]


def yaml_damaged(text: str, chance: Random) -> str:
    if chance.random() < 0.15:
        content = damaged(text.encode(), [line.encode() for line in RUBBISH], chance)
        return content.decode(errors="replace")
    return damaged_text(text, chance)


class RecordedConfigs(Reader):
    """`config.yaml` of a run, as a store gives it back."""

    def corpus(self) -> Sequence[str]:
        good = [config_to_yaml(compose("train", [f"experiments={name}"])[0].config)
                for name in ("default", "seed", "smoke", "robust")]  # fmt: skip
        return [*good, *RUBBISH]

    def draw(self, chance: Random) -> str:
        return yaml_damaged(chance.choice(self.known[:4]), chance)

    def read(self, given: str) -> None:
        config = config_from_yaml(given)
        assert config_from_yaml(config_to_yaml(config)) == config


class Recipes(Reader):
    """A recipe of one's own, with the search space that it asks for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.place = folder / "experiments"
        self.place.mkdir(exist_ok=True)
        composing.recipe_folders = lambda: [self.place]  # type: ignore[attr-defined]

    def corpus(self) -> Sequence[str]:
        good = [path.read_text() for path in sorted(RECIPES.glob("*.yaml"))]
        head = "# @package _global_\n"
        return [*good, *(head + text for text in RUBBISH)]

    def draw(self, chance: Random) -> str:
        files = [text for text in self.known if "defaults" in text or "study" in text]
        return yaml_damaged(chance.choice(files), chance)

    def read(self, given: str) -> None:
        (self.place / "default.yaml").write_text(given, errors="replace")
        config = compose("sweep", [])[0].config
        first_values(config, read_space(config))


class Overrides(Reader):
    """Words of the command line of `sweep` and `train`."""

    def corpus(self) -> Sequence[list[str]]:
        words = [
            f"{key}={value}"
            for key in ("study.name", "name", "trainer.epochs", "model.widths")
            for value in TEXTS
        ]
        return [["experiments=smoke"], *([word] for word in (*TEXTS, *words))]

    def draw(self, chance: Random) -> list[str]:
        keys = ["experiments", "model", "name", "study.space.x", *settings("convnet"), *TEXTS]
        values = [*TEXTS, *map(str, NUMBERS), "choice(1,2)", "range(1,3)", "interval(0,1)", "[1,2]"]
        values += ["tag(log,interval(1e-3,1))", "int(interval(1,9))", "shuffle(1,2)", "glob(*)"]
        values += [
            "range(0,1e300)",
            "range(1,10000000000)",
            "interval(nan,inf)",
            "{a:1}",
            "sort(1,2)",
        ]
        values += ["choice([16],[32])", "int(1.5)", "range(0,1,1e-300)", "seed", "smoke", "1,2"]
        words = []
        for _ in range(chance.choice((1, 1, 2, 4))):
            word = chance.choice(("", "", "", "+", "~", "++")) + chance.choice(keys)
            word += chance.choice(("=", "=", "=", "@a=", "")) + chance.choice(values)
            if chance.random() < 0.2:
                word = damaged(word.encode(errors="surrogatepass"), [b"="], chance).decode(
                    errors="surrogateescape"
                )
            words.append(word)
        return words

    def read(self, given: list[str]) -> None:
        composed = compose("sweep", given)[0]
        first_values(composed.config, read_space(composed.config))
        compose("train", given, multirun=True)


@contextlib.contextmanager
def kept_environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class EnvFiles(Reader):
    """The lab's file `.env`."""

    def corpus(self) -> Sequence[bytes]:
        good = b"\n".join(name.encode() + b"=a 'b' #c" for name in sorted(_KNOWN))
        quoted = b"export PGUSER=\"a\\n${HOME}\"\nPGPASSWORD='x\n y'\n# PG\n\nPGSSLMODE=\n"
        return [
            good,
            quoted,
            b"",
            b"\xff\xfe",
            b"PGUSER=a\0b",
            b"PGUSER",
            b"=",
            b"PGUSER==" * 9999,
            b"PGUSER='" + b"\\" * 50_000,
            b'PGUSER="' + b"\\'" * 50_000,
            b"\n" * 100_000,
        ]

    def draw(self, chance: Random) -> bytes:
        good = chance.choice(self.known[:2])
        if chance.random() < 0.5:
            text = damaged_text(good.decode(), chance)
            return text.encode(errors="surrogatepass")
        return damaged(good, self.known[:2], chance)

    def read(self, given: bytes) -> None:
        path = self.folder / ".env"
        path.write_bytes(given)
        path.chmod(0o600)
        with kept_environment():
            load_env_file(path)


class Variables(Reader):
    """Environment variables that name places, read by a command from its beginning to its end."""

    def corpus(self) -> Sequence[dict[str, str]]:
        # It sets how often MLflow tries again, which a command that imports it would take back.
        import_module("digitlab.records.mlflow")
        return [
            {},
            *(
                {name: text}
                for name in self.names
                for text in TEXTS
                if text.isprintable() and text != "\ud800"
            ),
        ]

    names = ("DIGITLAB_HOME", "MLFLOW_TRACKING_URI", "DIGITLAB_STORAGE", "DIGITLAB_CALLER", "HOME")
    places = (
        "lab",
        "./lab/",
        "~nobody-here/lab",
        "~",
        "file:lab",
        "sqlite:///a.db",
        "sqlite:///b/c.db",
    )
    places += (
        "http://127.0.0.1:1",
        "http://[",
        "http://a b/",
        "https://",
        "databricks",
        "uc:x",
        "s3://a",
    )
    places += (
        "postgresql+psycopg://u:p@127.0.0.1:1/x",
        "postgresql+psycopg://",
        "make",
        "sqlite://",
    )
    places += (
        "postgresql+psycopg://u:p@127.0.0.1:x/x",
        "mysql://a",
        "x://",
        "a.db",
        "file",
        "file/x",
    )

    def draw(self, chance: Random) -> dict[str, str]:
        found = {}
        for name in chance.sample(self.names, chance.choice((1, 1, 2, 3))):
            text = chance.choice((*TEXTS, *self.places))
            if chance.random() < 0.4:
                text = damaged(text.encode(errors="surrogatepass"), [b"/"], chance)[:9000].decode(
                    errors="surrogateescape"
                )
            found[name] = text.replace("\0", "").replace("\ud800", "")
        return found

    def read(self, given: dict[str, Any]) -> None:
        """Stay below the folder: a lab is made where it is named."""
        inside = self.folder / "a" / "b" / "c"
        inside.mkdir(parents=True, exist_ok=True)
        (inside / "file").touch()
        os.chdir(inside)
        with kept_environment():
            os.environ |= {"HOME": str(inside), "DIGITLAB_HOME": "lab"}
            for name, word in given.items():
                is_place = name in ("DIGITLAB_HOME", "HOME")
                text = word.replace("root", "r").replace("..", ".") if is_place else word
                text = f"{inside}{text}" if is_place and text.startswith("/") else text
                os.environ[name] = text.encode(errors="surrogateescape").decode(
                    errors="surrogateescape"
                )
            lab = lab_folder()
            try:
                called("runs")
                called("studies")
            finally:
                if len(lab.parts) > 200:  # too deep for what removes the test's folder
                    subprocess.run(["rm", "-r", lab], check=True)
                    os.removedirs(lab.parent)


def called(*words: str) -> str:
    """Call a command as the command line does; return what it prints, or raise its refusal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(words)
    if status == 2:
        message = err.getvalue()
        assert message.startswith("digitlab: "), message
        assert message.count("\n") == 1, message
        raise UserError(message)
    assert status in (0, 1, 3), status
    return out.getvalue()
