"""`bmerge push`: a model with its posterior and a card to the Hugging Face Hub."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bmerge_cli.render import (
    Json,
    Quiet,
    Screen,
    console,
    failures,
    print_json,
    print_result,
    table,
)

if TYPE_CHECKING:
    from mergekit_bayes.hub import PushPlan, PushReport

PosteriorForm = Literal["row", "row-column", "entries"]  # of mergekit_bayes.hub, loaded when used


@failures("nothing was committed, unless a line above says so; the same line goes on")
def command(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a model, or one that holds only a precision.")
    ],
    repo: Annotated[str, typer.Argument(help="org/name; created if it does not exist.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; created if it does not exist.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    posterior: Annotated[
        bool, typer.Option("--posterior/--no-posterior", help="Push the posterior with the model.")
    ] = True,
    posterior_only: Annotated[
        bool,
        typer.Option(
            "--posterior-only", help="Push the posterior without its model, to another repository."
        ),
    ] = False,
    posterior_form: Annotated[
        PosteriorForm,
        typer.Option(
            help="row: one number a row of each tensor. row-column: two vectors a matrix. entries: "
            "all of the posterior."
        ),
    ] = "row",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the files and print the card without going online."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Push a model, its posterior and a card to the Hugging Face Hub, in one commit.

    The card says where the model came from; your own text in a card is kept. Log in once with `hf
    auth login`. The same line resumes a push that was stopped, and an unchanged folder makes no
    commit.
    """
    from mergekit_bayes.hub import plan_push

    screen = console(quiet=quiet)
    if dry_run:
        plan = plan_push(
            folder,
            repo,
            posterior=posterior,
            only_posterior=posterior_only,
            posterior_form=posterior_form,
        )
        if as_json:
            print_json(_document(plan))
        else:
            _show_plan(screen, plan)
        return
    report = push(
        folder,
        repo,
        screen,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=message,
        posterior=posterior,
        only_posterior=posterior_only,
        posterior_form=posterior_form,
    )
    print_result(report, report.pull_request or report.url, as_json=as_json, quiet=quiet)


def push(folder: Path, repo: str, screen: Screen, **options: Any) -> "PushReport":
    """Push a folder and say what was done.

    Args:
        folder: The folder.
        repo: `org/name`.
        screen: Where the result is said.
        options: Those of `mergekit_bayes.hub.push_folder`.
    """
    from mergekit_bayes.hub import push_folder

    with _client_bars(screen):
        report = push_folder(
            folder, repo, say=lambda line: screen.print(line, markup=False), **options
        )
    if report.changed:
        counts = [f"{len(report.sent)} files ({_size(report.bytes)})"]
        if report.unchanged:
            counts.append(f"{len(report.unchanged)} were there already")
        if report.deleted:
            counts.append(f"{len(report.deleted)} deleted")
        screen.print(
            f"pushed to {report.repo}: {', '.join(counts)}; commit {report.commit}", markup=False
        )
    else:
        screen.print(f"{report.repo} has all of it already: no commit", markup=False)
    _show_rest(screen, report.left_out, report.notes)
    return report


@contextmanager
def _client_bars(screen: Screen) -> Iterator[None]:
    """Show the progress bars of the Hub's client only on a terminal."""
    from mergekit_bayes.checkpoint.hub_client import prepare

    prepare()  # raises what is wrong with the client's settings
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hide = not screen.is_interactive and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _show_plan(screen: Screen, plan: "PushPlan") -> None:
    """The files with their sizes on the screen, and the card on stdout."""
    rows = [[f.path, _size(f.size)] for f in plan.files]
    screen.print(table(["file", "size"], rows, title=f"{plan.folder} -> {plan.repo}"))
    _show_rest(screen, plan.left_out, plan.notes)
    screen.print(f"\n{plan.files[0].path}:", markup=False)
    if not screen.quiet:
        typer.echo(plan.card)


def _show_rest(screen: Screen, left_out: Mapping[str, str], notes: Sequence[str]) -> None:
    for name, reason in left_out.items():
        screen.print(f"  left out  {name}: {reason}", markup=False)
    for note in notes:
        screen.print(f"  note      {note}", markup=False)


def _document(plan: "PushPlan") -> dict[str, object]:
    return {
        "repo": plan.repo,
        "files": [{"path": f.path, "size": f.size} for f in plan.files],
        "left_out": dict(plan.left_out),
        "notes": list(plan.notes),
        "card": plan.card,
    }


def _size(count: float) -> str:
    if count < 1000:
        return f"{count} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} GB"
