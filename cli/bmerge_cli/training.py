"""What the commands that train share: one process or several, their one report, and the push."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bmerge_cli.delivery import Delivery
from bmerge_cli.flags import Settings
from bmerge_cli.processes import start_processes
from bmerge_cli.render import Screen, console
from mergekit_bayes.configs import Config, load_config


class TrainingConfig(Protocol):
    """What this module reads of the settings of a training run."""

    @property
    def output(self) -> str:
        """Folder to write."""
        ...

    @property
    def num_processes(self) -> int | None:
        """Number of processes."""
        ...


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Line:
    """The line of a command that trains, as it was typed.

    Attributes:
        command: Name of the command.
        config: The file of settings.
        overrides: What `--set` gave.
        settings: What flags gave, by field.
        push_to: Repository to which the output is pushed.
        as_json: Whether `--json` was given.
        quiet: Whether `--quiet` was given.
    """

    command: str
    config: Path
    overrides: list[str] | None
    settings: Settings
    push_to: str | None
    as_json: bool
    quiet: bool

    @property
    def words(self) -> list[str]:
        """All settings beside the file's, as text, so that they can start other processes."""
        words = list(self.overrides or [])
        return words + [f"{key}={str(value).lower()}" for key, value in self.settings.items()]

    def load(self, kind: type[C]) -> C:
        """The settings.

        Raises:
            ConfigError: A value is missing or invalid.
        """
        return load_config(kind, self.config, self.words)

    def repeated(self) -> list[str]:
        """The line that every process runs."""
        line = [str(self.config), *(f"--set={word}" for word in self.words)]
        flags = (("--json", self.as_json), ("--quiet", self.quiet))
        line += [flag for flag, given in flags if given]
        if self.push_to is not None:  # the first process pushes and prints
            line += ["--push-to", self.push_to]
        return [self.command, *line]


def train(
    line: Line,
    config: TrainingConfig,
    run: Callable[[], Any],
    describe: Callable[[Any, Screen], None],
) -> None:
    """Train in this process, or start as many as the settings name; print and push the result.

    Args:
        line: The command's line.
        config: Its settings.
        run: Trains; called in each of several processes. What it imports is not imported by a
            process that only starts others.
        describe: Prints the report for people.

    Raises:
        BmergeError: The training or the push failed.
        Exit: Other processes were started, and have ended.
    """
    from mergekit_bayes import launcher, ranks

    screen = console(quiet=line.quiet)
    delivery = Delivery(line.push_to, str(config.output))
    start_processes(config.num_processes, line.repeated())
    if (gpus := launcher.idle_gpus()) > 0:
        screen.print(
            f"one GPU of {gpus + 1} is used; --num-processes {gpus + 1} trains on all of them",
            markup=False,
        )
    report = run()
    if ranks.is_main():
        describe(report, screen)
        delivery.finish(report, report.path, screen, as_json=line.as_json, quiet=line.quiet)
