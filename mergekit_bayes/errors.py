"""The errors of the package, as a tree. Each message says which, expected, found, and what to do.

    BmergeError
    ├── CheckpointError   a file cannot be read, written or trusted
    ├── MismatchError     inputs do not belong together
    ├── PrecisionError    a precision is missing, of other weights, or invalid
    └── ConfigError       an option or a config key makes no sense

The command line turns these into one message and exit code 2; anything else is a bug.
"""


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
