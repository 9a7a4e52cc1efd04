"""The `bmerge` command: one module per subcommand, which is loaded when it is called."""

import logging
import os
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

import typer

from bmerge_cli.lazy import LazyCommand, load_named
from bmerge_cli.render import failures
from bmerge_cli.terminal import guarded_streams
from mergekit_bayes import __version__
from mergekit_bayes.errors import ConfigError

app = typer.Typer(
    name="bmerge",
    help="Merge and edit language models with uncertainty.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts hold brackets and colons
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order of a user's work. Each line fits a terminal of 80 columns uncut.
COMMANDS = {
    "merge": "Add, average or subtract models, by precision or not.",
    "mix": "Join several runs of one task into one posterior.",
    "preview": "Measure many scales of a merge without writing it.",
    "methods": "List the merging rules and their settings.",
    "finetune": "Fine-tune by IVON; its precision comes with it.",
    "adapt": "Remove and add in a few steps; keep the rest.",
    "extract": "Turn a tuned or edited model into a LoRA adapter.",
    "precision": "Give an existing checkpoint a precision.",
    "evaluate": "Measure perplexity, toxicity and calibration.",
    "inspect": "Show a model, its precision, and what changed.",
    "convert": "Turn PyTorch's pickles into safetensors.",
    "detox": "Remove toxicity by script, and report the cost.",
    "push": "Push a model, its posterior and a card to the Hub.",
}
for name, summary in COMMANDS.items():
    app.command(name, short_help=summary, cls=LazyCommand)(lambda: None)


def _version(given: bool) -> None:
    if given:
        typer.echo(f"bmerge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(ready: Callable[[], object] | None = None) -> None:
    """Run the command line, as `python -m bmerge_cli.main` and the `bmerge` script do.

    Args:
        ready: Called once an interrupt has its message.
    """
    if {"-q", "--quiet"} & set(sys.argv):
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        logging.getLogger("mergekit_bayes.checkpoint.hub_client").setLevel(logging.ERROR)
    if {"-q", "--quiet"} & set(sys.argv) or not sys.stderr.isatty():
        # The Hub's client reads it once, when it is imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    load_named(sys.argv[1:], COMMANDS)
    try:
        with guarded_streams(), failures():
            if ready is not None:
                ready()
            _refuse_undecodable(sys.argv[1:])
            _refuse_bare_numbers(sys.argv[1:])
            app()
    except typer.Exit as stop:
        sys.exit(stop.exit_code)


def _refuse_undecodable(words: list[str]) -> None:
    """Refuse names that are not UTF-8: reports, recipes and cards, which name them, are."""
    for word in words:
        if not word.isascii() and any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(f"{os.fsencode(word)!r} is not UTF-8. Rename the file or folder.")


def _refuse_bare_numbers(words: list[str]) -> None:
    """Explain `--scale 1 -0.5`, whose second number the parser would call an unknown option."""
    for before, word in pairwise(words):
        if re.fullmatch(r"-\d*\.?\d+([eE][-+]?\d+)?", word) and not before.startswith("-"):
            raise ConfigError(
                f"'{word}' follows no flag. Repeat the flag for each model: --scale {before} "
                f"--scale {word}."
            )


if __name__ == "__main__":
    main()
