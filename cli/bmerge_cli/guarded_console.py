"""rich's console, guarded as `terminal` says; rich takes time to load, so that it is apart."""

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mergekit_bayes.errors import printable


class GuardedConsole(Console):
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
