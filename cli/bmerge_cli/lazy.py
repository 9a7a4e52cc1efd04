"""Commands that are loaded when they are called, so that one does not wait for all the others."""

from collections.abc import Collection, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand


def load_named(words: Sequence[str], commands: Collection[str]) -> None:
    """Load the command that a line calls, while an interrupt still ends the process at once.

    Args:
        words: The line.
        commands: The names of all commands.
    """
    name = next((word for word in words if not word.startswith("-")), None)
    if name in commands:
        import_module(f"bmerge_cli.{name}")


class LazyCommand(TyperCommand):
    """Stands for the function `command` of the module of its name, until it is called.

    A list of commands shows the name and the summary that it is registered with.
    """

    @cached_property
    def loaded(self) -> Any:
        """The command itself, with its parameters and its help."""
        module = import_module(f"bmerge_cli.{self.name}")
        alone = typer.Typer(
            add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
        )
        alone.command(self.name, context_settings=dict(self.context_settings))(module.command)
        return typer.main.get_command(alone)

    def make_context(
        self, info_name: str | None, args: list[str], *given: Any, **extra: Any
    ) -> Any:
        """Load the command, and read its line; the context's command is the loaded one."""
        return self.loaded.make_context(info_name, args, *given, **extra)
