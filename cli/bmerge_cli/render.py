"""What every command shares: one console on stderr, one JSON document on stdout, one message per
failure.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mergekit_bayes.errors import BmergeError, ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace an existing output, a folder with all that is in it."),
]


def console(*, quiet: bool = False) -> Console:
    """Where people read: stderr, so that stdout stays machine-readable."""
    width = None if sys.stderr.isatty() else 160  # a log file has no edge at which to cut tables
    return Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, width=width)


def print_json(document: Any) -> None:
    """The one document of `--json`."""
    typer.echo(json.dumps(document, indent=2))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A plain table; the first column is text, the rest are numbers."""
    result = Table(
        title=escape(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*(escape(cell) for cell in row))
    return result


def number(text: str, option: str) -> float:
    """A number given to an option, or a `ConfigError` that names both."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option}: '{text}' is not a number.") from None


def assignments(items: Sequence[str], option: str, what: str = "MODEL") -> dict[str, str]:
    """`MODEL=VALUE` options as a mapping; the last '=' separates, since paths may hold one."""
    result = {}
    for item in items:
        name, separator, value = item.rpartition("=")
        if not separator or not name or not value:
            raise ConfigError(f"{option}: expected {what}=VALUE, found '{item}'.")
        result[name] = value
    return result


def selection(items: Sequence[str], option: str) -> dict[str, Any]:
    """`COLUMN=VALUE` options as a row filter; values are read as YAML, so that `label=1` is a
    number.
    """
    result: dict[str, Any] = {}
    for item in items:
        column, separator, value = item.partition("=")
        if not separator or not column or not value:
            raise ConfigError(f"{option}: expected COLUMN=VALUE, found '{item}'.")
        try:
            result[column] = yaml.safe_load(value)
        except yaml.YAMLError:
            result[column] = value
    return result


@contextmanager
def progress_bar(screen: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes that vanishes when done; yields what a verb calls with (done, total)."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=screen, transient=True, disable=screen.quiet or not screen.is_terminal
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def failures() -> Iterator[None]:
    """Turn what the user can mend into one message and exit code 2; a bug stays a traceback (exit
    code 1).
    """
    try:
        yield
    except BmergeError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from None
    except BrokenPipeError:  # somebody closed our stdout, as `| head` does
        sys.stderr.close()
        raise typer.Exit(0) from None
