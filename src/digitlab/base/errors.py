"""The one exception that is a person's to mend, and the words that go with it."""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake of the caller: says what was given, what is allowed and what to do.

    The command line prints it as one line and exits with status 2.
    """

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(line.strip() for line in text.splitlines()))


def require(holds: bool, given: str, allowed: str) -> None:
    """Raise UserError unless `holds`; `given` names the field and its value."""
    if not holds:
        raise UserError(f"{given}: allowed is {allowed}")


def nearest(word: str, words: Iterable[str]) -> str:
    """': did you mean a or b?' for a misspelt word, or the list of all words when none is near."""
    known = sorted(words)
    matches = get_close_matches(word, known, n=3, cutoff=0.6)
    if matches:
        return f"did you mean {' or '.join(matches)}?"
    return f"known are {', '.join(known)}" if known else "there are none yet"


def first_line(told: object) -> str:
    """The first line of an error, or an address, without the password that it may hold."""
    line = (str(told).strip() or type(told).__name__).splitlines()[0]
    line = re.sub(r"(?i)(password=)[^&\s]*", r"\1...", line)
    return re.sub(r"//([^:/@\s]*):\S*@", r"//\1@", line)
