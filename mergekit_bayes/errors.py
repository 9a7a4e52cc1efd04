"""The errors of the package, as a tree. Each message says which, expected, found, and what to do.

    BmergeError
    ├── CheckpointError   a file cannot be read, written or trusted
    ├── MismatchError     inputs do not belong together
    ├── PrecisionError    a precision is missing, of other weights, or invalid
    │   └── NoDrawsError  a model has no posterior that weights can be drawn from
    └── ConfigError       an option or a config key makes no sense

The command line turns these into one message and exit code 2; anything else is a bug.
"""

import difflib
import re
from collections.abc import Iterable

# Control characters but for a tab and the end of a line, marks of direction, Unicode's other ends
# of lines, and the halves of surrogate pairs that stand for bytes that are not UTF-8.
CONTROLS = (
    r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
    r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
)
_CONTROL = re.compile(rf"[{CONTROLS}]|\r(?!\n)")


class BmergeError(Exception):
    """An error that the user can correct."""


class CheckpointError(BmergeError):
    """A file cannot be read, written or trusted."""


class MismatchError(BmergeError):
    """Inputs do not belong together."""


class PrecisionError(BmergeError):
    """A precision is missing, belongs to other weights, or is invalid."""


class NoDrawsError(PrecisionError):
    """A model has no posterior that weights can be drawn from.

    Attributes:
        reason: Why not: a clause that follows "since".
    """

    def __init__(self, message: str, reason: str = "it has no posterior to draw from") -> None:
        super().__init__(message)
        self.reason = reason


class ConfigError(BmergeError):
    """An option or a config key makes no sense."""


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that is most like a misspelled word; None if none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return close[0] if close else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """The hint "did you mean 'x'?" for a misspelled word; empty if no candidate is close."""
    match = nearest(word, candidates)
    return "" if match is None else f"did you mean '{match}'?"


def shown(value: object) -> str:
    """A value from outside as a message shows it: quoted, escaped, and cut if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}...{text[-1]}"


def printable(text: str) -> str:
    """Text with an escape such as `\\x1b` in place of each character that commands a terminal."""
    return _CONTROL.sub(escape, text)


def escape(match: re.Match[str]) -> str:
    """The escape of a matched character."""
    return match[0].encode("unicode_escape").decode()
