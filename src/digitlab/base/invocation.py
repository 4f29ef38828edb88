"""What is typed: the commands that a person is shown, and the words that name the place of records.

Commands are shown as `make` targets where make called, else as `digitlab` ones.
"""

import os
import re
import shlex
from collections.abc import Sequence

CALLER = "DIGITLAB_CALLER"  # which the Makefile sets to `make`
_UNSAFE = set('"$`\\!')  # inside double quotes, a shell or make changes these
SHORT_ID = 12  # characters of a run's id, which are enough to identify it
_RECIPE, _STORAGE = "experiments=", "study.storage="
_STORES = re.compile(rf"(tracking(\.\w+)?=|{re.escape(_STORAGE)})")
# What a target takes in a variable of its own, beside ARGS.
_VARIABLES = {"reproduce": "RUN", "compare": "RUNS", "predict": "IMAGE"}
_TARGETS = ("train", "sweep", "audit", "report", "draw", "play", "ui", "dashboard", *_VARIABLES)


def command(name: str, *words: str) -> str:
    """Return the command `digitlab NAME WORDS`, to be copied and run as it was printed.

    The target of make comes in its place where make called, if it can be quoted once.
    """
    kept = [word for word in words if word != f"{_RECIPE}default"]
    if os.environ.get(CALLER) != "make":
        return " ".join(["digitlab", name, *map(_quoted, kept)])
    target = _target(name, kept) if name in _TARGETS else None
    return target or " ".join([".venv/bin/digitlab", name, *map(_quoted, kept)])


def _target(name: str, words: list[str]) -> str | None:
    """Return `make NAME VARIABLE=...`; None where make takes no such words."""
    parts = ["make", name]
    variable = _VARIABLES.get(name)
    if variable:
        named = [word for word in words if "=" not in word and not word.startswith("-")]
        words = [word for word in words if word not in named]
        if not named:
            return None
        parts.append(f"{variable}={_quoted(' '.join(named))}")
    recipes = [word for word in words if word.startswith(_RECIPE)]
    if recipes and name in ("train", "sweep"):
        words = [word for word in words if word not in recipes]
        parts.append(f"EXPERIMENT={recipes[-1].removeprefix(_RECIPE)}")
    text = " ".join(map(_quoted, words))
    if _UNSAFE & set(text):
        return None
    if text:
        parts.append(f"ARGS={text}" if text == shlex.quote(text) else f'ARGS="{text}"')
    return " ".join(parts)


def _quoted(word: str) -> str:
    """Quote a word for a shell, if it must be; in double quotes where it holds single ones."""
    quoted = shlex.quote(word)
    return f'"{word}"' if "'" in word and not _UNSAFE & set(word) else quoted


def split_stores(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into those that name the place of runs and studies, and the others."""
    stores = [word for word in words if _STORES.match(word)]
    return stores, [word for word in words if word not in stores]


def storage_of(stores: Sequence[str]) -> str | None:
    """Return the address of Optuna's storage that the words give, if any: null and '' are none."""
    given = [word.removeprefix(_STORAGE) for word in stores if word.startswith(_STORAGE)]
    return given[-1] if given and given[-1].lower() not in ("", "null") else None
