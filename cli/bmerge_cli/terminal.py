"""What a terminal may be sent: no text from a file, a folder or a server commands it.

A name or a message from outside may hold escape sequences, which move the cursor, set the title or
answer for the user, or characters that turn the direction of writing. Each is written as its
escape, such as `\\x1b`.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mergekit_bayes.errors import CONTROLS, escape, printable

# A bar of the Hub's client returns to the start of its line, and to the line above.
_IN_A_STREAM = re.compile(rf"(?!\x1b\[A)[{CONTROLS}]")


class Screen(Console):
    """A console for text from outside: what is printed cannot command the terminal."""

    @property
    def file(self) -> IO[str]:
        """The stream itself, below all that stand in for it.

        While a bar is shown a proxy of rich's lies over the guarded stream. rich takes off one
        layer, and the guard would turn the bar's own control characters into text.
        """
        stream = super().file
        while inner := getattr(stream, "rich_proxied_file", None):
            stream = inner
        return stream

    @file.setter
    def file(self, stream: IO[str]) -> None:
        self._file = stream

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, with the text made printable before it is measured."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As rich's; only segments of rich's own hold control characters."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


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
