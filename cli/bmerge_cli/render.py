"""What every command shares: its output on stderr, one JSON document on stdout, one message per
failure.
"""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

from mergekit_bayes.errors import BmergeError, printable
from mergekit_bayes.records import FORCE, TRUST_REMOTE_CODE

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

# Characters of an error. What is said is far below, unless a file made a name or a list longer: a
# recipe with a value of a megabyte, or with ten thousand unknown keys.
_LONGEST_MESSAGE = 8000
GAP = 2  # spaces between columns
_NAMES = 30  # characters; longer names of measures go on in the next line where columns need room

NOTHING_WRITTEN = "nothing was written; the same line starts again"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Force = Annotated[bool, typer.Option("--force", help=FORCE)]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_REMOTE_CODE)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value: override a setting of the file; repeatable."),
]


class Screen:
    """What a command shows on stderr, so that stdout stays machine-readable.

    rich, which draws it, is loaded when something is shown: a quiet command starts without it.

    Attributes:
        quiet: Whether nothing is shown.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    @cached_property
    def rich(self) -> "Console":
        """rich's console.

        It prints text as it is, since a path may hold what would be markup or an emoji, but for
        characters that would command the terminal.
        """
        from bmerge_cli.guarded_console import GuardedConsole

        is_terminal = sys.stderr.isatty()  # a log file has no edge at which to cut lines and tables
        return GuardedConsole(
            stderr=True,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=not is_terminal,
            width=None if is_terminal else 160,
        )

    @property
    def is_interactive(self) -> bool:
        """Whether it is a terminal that is not quiet, so that bars make sense."""
        return not self.quiet and self.rich.is_terminal

    @property
    def width(self) -> int:
        """How many characters a line holds."""
        return self.rich.width

    def print(self, shown: "RenderableType", **options: Any) -> None:
        """Show text or a table, with the options of rich's `print`."""
        if not self.quiet:
            self.rich.print(shown, **options)


def console(*, quiet: bool = False) -> Screen:
    """The screen of a command."""
    return Screen(quiet=quiet)


def print_json(document: object) -> None:
    """Print the one document of `--json`."""
    typer.echo(json.dumps(document, indent=2))


def print_result(
    report: BaseModel, result: object, *, as_json: bool, quiet: bool, push: object = None
) -> None:
    """End a command: print its report as JSON, or where the result is unless `quiet`.

    Args:
        report: What the command did.
        result: Path or URL of the output.
        as_json: Whether `--json` was given.
        quiet: Whether `--quiet` was given.
        push: Report of the push that followed, if any: one more key of the document.
    """
    if as_json:
        print_json(report.model_dump(mode="json") | ({"push": push} if push is not None else {}))
    elif not quiet:
        typer.echo(str(result))


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
) -> "Table":
    """A plain table; the first column is text, the rest are numbers.

    Where the screen is too narrow, cells go on in the next line: a number must not lose its end.
    """
    from rich.table import Table

    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def show_beside(
    screen: Screen,
    title: str | None,
    head: str,
    names: Sequence[str],
    columns: Iterable[tuple[str, Sequence[str]]],
) -> None:
    """Print a row for each name, and beside each other as many columns as the screen holds.

    Args:
        screen: Where it is printed.
        title: Title of the first table.
        head: Head of the first column.
        names: The first column.
        columns: Head and cells of each other column, a cell for each name.
    """
    for beside in _fitting([head, *names], [[h, *c] for h, c in columns], screen.width):
        rows = zip(names, *(column[1:] for column in beside), strict=True)
        heads = [head, *(column[0] for column in beside)]
        screen.print(table(heads, [list(row) for row in rows], title=title))
        title = None


def _fitting(
    first: Sequence[str], columns: Sequence[Sequence[str]], width: int
) -> Iterator[list[Sequence[str]]]:
    """The columns in groups that fit beside the first one, at least one in each."""
    group: list[Sequence[str]] = []
    names = min(_widest(first), _NAMES)
    room = width - names
    for column in columns:
        need = _widest(column) + GAP
        if group and need > room:
            yield group
            group, room = [], width - names
        group.append(column)
        room -= need
    yield group


def _widest(cells: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, cells))


@contextmanager
def progress_bar(screen: Screen, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes that vanishes when done; yields a function of (done, total)."""
    if not screen.is_interactive:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen.rich, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def steps_bar(screen: Screen) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that names the step and vanishes when done; yields a function of (step, done, of)."""
    if not screen.is_interactive:
        yield lambda step, done, of: None
        return
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=screen.rich, transient=True) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda step, done, of: progress.update(
            task, description=escape(step), completed=done, total=of
        )


@contextmanager
def interrupts(stopped: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C into one line and exit code 130.

    Args:
        stopped: What it leaves behind, and how to go on; called only then.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(printable(f"stopped; {stopped()}"), err=True)
        raise typer.Exit(130) from None


@contextmanager
def failures(stopped: str = NOTHING_WRITTEN) -> Iterator[None]:
    """Turn errors that the user can correct into one message and exit code 2.

    Every command is decorated with it. A bug stays a traceback (exit code 1).

    Args:
        stopped: What an interrupt (Ctrl-C) leaves behind, and how to go on.
    """
    try:
        with interrupts(lambda: stopped):
            yield
    except BmergeError as error:
        text = f"{type(error).__name__}: {error}"
        if len(text) > _LONGEST_MESSAGE:
            text = f"{text[: _LONGEST_MESSAGE // 2]}\n...\n{text[-_LONGEST_MESSAGE // 4 :]}"
        typer.echo(printable(text), err=True)
        raise typer.Exit(2) from None
    except BrokenPipeError:  # stdout was closed, as `| head` does
        sys.stderr.close()
        raise typer.Exit(0) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or "standard output"
        typer.echo(f"CheckpointError: {where}: {error.strerror}. Make room there.", err=True)
        # What Python still holds for a full device must not be written at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(2) from None
