"""The errors of the package, as a tree. Each message says which, expected, found, and what to do.

    BmergeError
    ├── CheckpointError   a file cannot be read, written or trusted
    ├── MismatchError     inputs do not belong together
    ├── PrecisionError    a precision is missing, of other weights, or invalid
    └── ConfigError       an option or a config key makes no sense

The command line turns these into one message and exit code 2; anything else is a bug.
"""

import difflib
from collections.abc import Iterable


class BmergeError(Exception):
    """An error that the user can correct."""


class CheckpointError(BmergeError):
    """A file cannot be read, written or trusted."""


class MismatchError(BmergeError):
    """Inputs do not belong together."""


class PrecisionError(BmergeError):
    """A precision is missing, belongs to other weights, or is invalid."""


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
