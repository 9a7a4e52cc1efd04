"""What a terminal may be sent: no text from a file, a folder or a server commands it.

A name or a message from outside may hold escape sequences, which move the cursor, set the title or
answer for the user, or characters that turn the direction of writing. Each is written as its
escape, such as `\\x1b`.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from mergekit_bayes.errors import CONTROLS, escape

# A bar of the Hub's client returns to the start of its line, and to the line above.
_IN_A_STREAM = re.compile(rf"(?!\x1b\[A)[{CONTROLS}]")


class GuardedStream:
    """A stream to a terminal, for what other libraries write to it: logs, warnings, bars.

    Args:
        stream: The stream. rich, which has written its own control characters on purpose, finds
            it under its own name for such a thing.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write the text in printable form; the length is that of the text as given."""
        self.rich_proxied_file.write(_IN_A_STREAM.sub(escape, text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of the lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Guard stderr, and stdout where it is a terminal; in a pipe its bytes are left as they are."""
    stdout, stderr = sys.stdout, sys.stderr
    if hasattr(stdout, "reconfigure"):
        # What the encoding cannot say is written as an escape, as Python does on stderr.
        stdout.reconfigure(errors="backslashreplace")
    if stdout.isatty():
        sys.stdout = cast(TextIO, GuardedStream(stdout))
    sys.stderr = cast(TextIO, GuardedStream(stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
