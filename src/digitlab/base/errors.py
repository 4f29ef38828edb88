"""The exception for a caller's mistakes, and the words of its messages."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

# Of terminals, of lines, and of the direction of writing: they forge what is printed.
_CODES = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


_LONGEST = 2000  # characters of a message
_ENDING = 500  # of them for its end, which says what to do


def visible(text: str) -> str:
    """Return a text from outside, such as a name, on one line, its control characters escaped."""
    return _CODES.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def counted(n: int, noun: str, plural: str = "") -> str:
    """Return a number of things in words: `1 trial`, `2 trials`.

    Args:
        plural: of a noun, or of a noun and its verb, where it is not the noun with an s.
    """
    return f"{n} {noun}" if n == 1 else f"{n} {plural or f'{noun}s'}"


class UserError(ValueError):
    """A mistake of the caller; the text names what was given, the rule and what to do.

    The command line prints it as one line and exits with status 2. What is named in it, such as a
    key of a file, can be as long as the file: the middle of a long text is left out.
    """

    def __init__(self, text: str) -> None:
        line = visible(" ".join(line.strip() for line in text.splitlines()))
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST - _ENDING]} ... {line[-_ENDING:]}"
        super().__init__(line)


def require(holds: bool, given: str, rule: str) -> None:
    """Raise UserError unless `holds`; `given` names the setting and its value."""
    if not holds:
        raise UserError(f"{given} is invalid: it must be {rule}.")


# What it raises to read something that is not what it should be.
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


@contextmanager
def refuse_damage(what: str, *more: type[Exception]) -> Iterator[None]:
    """Read what a store holds: what damage raises becomes a UserError that names `what`.

    Args:
        more: errors of the library that reads it.
    """
    damage: tuple[type[Exception], ...] = (*_DAMAGE, *more)
    try:
        yield
    except UserError:
        raise
    except damage as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{what} is damaged ({reason}): it must be as it was recorded. Restore it from a copy."
        ) from error


def nearest(word: str, words: Iterable[str], otherwise: str = "") -> str:
    """Return "did you mean a or b?" for a misspelt word; if none is near, all or `otherwise`."""
    known = sorted(words)
    matches = get_close_matches(word, known, n=3, cutoff=0.6)
    if matches:
        return f"did you mean {' or '.join(matches)}?"
    if otherwise:
        return otherwise
    return f"known are {', '.join(known)}." if known else "there are none yet."


def first_line(error: object) -> str:
    """Return the first line of an error, or an address, without the password that it may hold."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = re.sub(r"(?i)(password=)[^&\s]*", r"\1...", line)
    return re.sub(r"//([^:/@\s]*):\S*@", r"//\1@", line)
