"""`bmerge push`: a model with its posterior and a card to the Hugging Face Hub."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bmerge_cli.render import Json, Quiet, console, failures, print_json, table
from mergekit_bayes.errors import BmergeError, ConfigError

if TYPE_CHECKING:
    from mergekit_bayes.hub import PushPlan, PushReport

NAME = "push"
PushTo = Annotated[
    str | None,
    typer.Option("--push-to", help="org/name: push the result there, as `bmerge push` does."),
]


def command(
    folder: Annotated[
        Path, typer.Argument(help="A model's folder, or one with nothing but a precision.")
    ],
    repo: Annotated[str, typer.Argument(help="org/name; it is made if it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch; it is made if it is not there.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    posterior: Annotated[
        bool, typer.Option("--posterior/--no-posterior", help="Push the posterior with the model.")
    ] = True,
    posterior_only: Annotated[
        bool,
        typer.Option(
            "--posterior-only", help="Push the posterior without its model, to another repository."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and print the card; contact nobody.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Push a model, its posterior and a card to the Hugging Face Hub, in one commit.

    The card says where the model came from; a card of your own keeps its text. Log in once with `hf
    auth login`. The same line resumes a push that was stopped, and an unchanged folder makes no
    commit.
    """
    with failures():
        from mergekit_bayes.hub import plan_push

        screen = console(quiet=quiet)
        if dry_run:
            plan = plan_push(folder, repo, posterior=posterior, only_posterior=posterior_only)
            if as_json:
                print_json(_document(plan))
            else:
                show_plan(screen, plan)
            return
        options = {
            "private": private,
            "revision": revision,
            "create_pr": create_pr,
            "message": message,
            "posterior": posterior,
            "only_posterior": posterior_only,
        }
        report = push(folder, repo, screen, **options)
        if as_json:
            print_json(report.model_dump(mode="json"))
        elif not quiet:
            typer.echo(report.pull_request or report.url)


def push(folder: Path, repo: str, screen: Any, **options: Any) -> "PushReport":
    """Push, and say what was done; the client's bars show only where people read."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    from mergekit_bayes.hub import push_folder

    hidden = (screen.quiet or not screen.is_terminal) and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        report = push_folder(
            folder, repo, say=lambda line: screen.print(line, markup=False), **options
        )
    finally:
        if hidden:
            enable_progress_bars()
    if report.changed:
        what = [f"{len(report.sent)} files ({_size(report.bytes)})"]
        what += [f"{len(report.unchanged)} were there already"] * bool(report.unchanged)
        what += [f"{len(report.deleted)} deleted"] * bool(report.deleted)
        screen.print(
            f"pushed to {report.repo}: {', '.join(what)}; commit {report.commit}", markup=False
        )
    else:
        screen.print(f"{report.repo} has all of it already: no commit", markup=False)
    _show_rest(screen, report.left_out, report.notes)
    return report


def show_plan(screen: Any, plan: "PushPlan") -> None:
    """The files with their sizes, and the card on stdout."""
    rows = [[f.path, _size(f.size)] for f in plan.files]
    screen.print(table(["file", "size"], rows, title=f"{plan.folder} -> {plan.repo}"))
    _show_rest(screen, plan.left_out, plan.notes)
    screen.print(f"\n{plan.files[0].path}:", markup=False)
    if not screen.quiet:
        typer.echo(plan.card)


def _show_rest(screen: Any, left_out: Any, notes: Any) -> None:
    for name, reason in left_out.items():
        screen.print(f"  left out  {name}: {reason}", markup=False)
    for note in notes:
        screen.print(f"  note      {note}", markup=False)


def _document(plan: "PushPlan") -> dict[str, Any]:
    return {
        "repo": plan.repo,
        "files": [{"path": f.path, "size": f.size} for f in plan.files],
        "left_out": dict(plan.left_out),
        "notes": list(plan.notes),
        "card": plan.card,
    }


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


class Delivery:
    """Where a command writes what `--push-to` then pushes: the folder asked for, or a temporary
    one.
    """

    def __init__(self, repo: str | None, out: str | None) -> None:
        self.repo, self.out = repo, out
        self.url: str | None = None
        self.temporary: Path | None = None
        if repo is not None:
            from mergekit_bayes.hub import check_login

            if out is not None and out.endswith(".safetensors"):
                raise ConfigError(
                    f"--push-to pushes a folder, and -o {out} is a file. Name a folder, or leave "
                    "-o out."
                )
            check_login(repo)  # before hours of work, not after
            if out is None:
                self.temporary = Path(tempfile.mkdtemp(prefix="bmerge-"))
                self.out = str(self.temporary / repo.rpartition("/")[2])

    def push(self, screen: Any) -> dict[str, Any]:
        """Push what lies there, if that was asked for; what `--json` adds to the command's own
        report.
        """
        if self.repo is None or self.out is None:
            return {}
        try:
            report = push(Path(self.out), self.repo, screen)
        except BmergeError as error:
            self.temporary = None  # the work is not thrown away
            raise type(error)(
                f"{error} The model is in '{self.out}': `bmerge push {self.out} {self.repo}`."
            ) from None
        self.url = report.pull_request or report.url
        return {"push": report.model_dump(mode="json")}


@contextmanager
def delivering(repo: str | None, out: str | None) -> Iterator[Delivery]:
    """A `Delivery` whose temporary folder is gone afterwards, unless a push of it failed."""
    delivery = Delivery(repo, out)
    try:
        yield delivery
    finally:
        if delivery.temporary is not None:
            shutil.rmtree(delivery.temporary, ignore_errors=True)
