"""`--push-to`: where a command writes its model, and the push that follows."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel

from bmerge_cli.push import push
from bmerge_cli.render import Screen, print_result
from mergekit_bayes.errors import BmergeError, ConfigError

if TYPE_CHECKING:
    from mergekit_bayes.checkpoint.scratch import Scratch

PushTo = Annotated[
    str | None,
    typer.Option("--push-to", help="org/name: push the result there, as `bmerge push` does."),
]


class Delivery:
    """Where a command writes its output, and the repository to which it is then pushed.

    Attributes:
        repo: `org/name`, or None for no push.
        out: The output: as given, or in a temporary folder where it is only pushed.
        temporary: The temporary folder, if there is one; a killed command's is removed by the next.
    """

    def __init__(self, repo: str | None, out: str | None) -> None:
        self.repo = repo
        self.out = out
        self.temporary: Scratch | None = None
        if repo is None:
            return
        from mergekit_bayes.checkpoint import scratch
        from mergekit_bayes.hub import check_login

        if out is not None and out.endswith(".safetensors"):
            raise ConfigError(
                f"--push-to pushes a folder, and -o {out} is a file. Name a folder, or leave -o "
                "out."
            )
        check_login(repo)  # before hours of work, not after
        if out is None:
            self.temporary = scratch.Scratch(Path(tempfile.gettempdir()), "bmerge-")
            self.out = str(self.temporary.new / repo.rpartition("/")[2])

    def finish(
        self, report: BaseModel, path: str | Path, screen: Screen, *, as_json: bool, quiet: bool
    ) -> None:
        """Push the output if that was asked for, and print the command's result.

        Args:
            report: What the command did.
            path: Where its output is.
            screen: For the lines of the push.
            as_json: Whether `--json` was given.
            quiet: Whether `--quiet` was given.

        Raises:
            BmergeError: The push failed; the output is kept and the message says where.
        """
        if self.repo is None or self.out is None:
            print_result(report, path, as_json=as_json, quiet=quiet)
            return
        try:
            pushed = push(Path(self.out), self.repo, screen)
        except BmergeError as error:
            if self.temporary is not None:
                self.temporary.keep()
            raise type(error)(
                f"{error} The model is in '{self.out}': `bmerge push {self.out} {self.repo}`."
            ) from None
        url = pushed.pull_request or pushed.url
        print_result(report, url, as_json=as_json, quiet=quiet, push=pushed.model_dump(mode="json"))


@contextmanager
def delivering(repo: str | None, out: str | None) -> Iterator[Delivery]:
    """A `Delivery` whose temporary folder is removed afterwards, unless a push of it failed."""
    delivery = Delivery(repo, out)
    try:
        yield delivery
    finally:
        if delivery.temporary is not None:
            delivery.temporary.close()
