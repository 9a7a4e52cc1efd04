"""A command as several processes, which it or a launcher has started: one of them speaks."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from mergekit_bayes.errors import BmergeError


def start_processes(count: int | None, words: Sequence[str] | None = None) -> None:
    """Run this command's line as several processes, and end with their status.

    Do nothing where one is enough, or where a launcher has started this one of several.

    Args:
        count: Number of processes that the settings name, if they do.
        words: The line after the program's name; None takes it as it was typed.

    Raises:
        ConfigError: More processes than GPUs.
        Exit: All processes have ended.
    """
    if (count or 1) < 2:
        return
    from mergekit_bayes import launcher, ranks

    if not ranks.launched():
        line = sys.argv[1:] if words is None else words
        command = [sys.executable, "-m", "bmerge_cli.main", *line]
        raise typer.Exit(launcher.launch(command, count or 1))


def one_voice(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command that every process of a launcher runs: only the first prints and pushes.

    The others are quiet, and an error, which is the same on all, ends them without its message.
    The command has parameters `as_json` and `quiet`, and `push_to` if it pushes.
    """

    @functools.wraps(command)
    def run(**values: Any) -> None:
        if _speaks():
            command(**values)
            return
        silent = {"as_json": False, "quiet": True, "push_to": None}
        values |= {name: value for name, value in silent.items() if name in values}
        try:
            command(**values)
        except BmergeError:
            raise typer.Exit(2) from None

    return run


def _speaks() -> bool:
    """Whether this is the only process, or the first; one alone loads no torch for it."""
    if "RANK" not in os.environ:
        return True
    from mergekit_bayes.ranks import is_main

    return is_main()
