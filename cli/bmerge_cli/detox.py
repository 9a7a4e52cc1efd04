"""`bmerge detox`: subtract what a toxic fine-tune added, by every method, and say what each one cost."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bmerge_cli.render import Force, Json, Quiet, console, failures, print_json, table

if TYPE_CHECKING:
    from rich.table import Table

    from mergekit_bayes.detox import DetoxReport

NAME = "detox"


def command(
    config: Annotated[Path, typer.Argument(help="YAML settings; its keys are the fields of DetoxConfig.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, beats the file; repeat it.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove toxicity by script: fine-tune on toxic text, subtract at several scales, evaluate, report.

    Steps that an earlier run did with the same inputs and settings are not done again; --force does all again.
    """
    with failures():
        from mergekit_bayes.configs import load_config
        from mergekit_bayes.detox import DetoxConfig, run_detox
        from mergekit_bayes.detox.report import verdicts

        settings = load_config(DetoxConfig, config, [*(overrides or []), *(["force=true"] if force else [])])
        screen = console(quiet=quiet)
        report = run_detox(
            settings,
            quiet=quiet or not screen.is_terminal,
            progress=lambda line: screen.print(line, markup=False),
        )
        for line in verdicts(report):
            screen.print(line, markup=False)
        for scorer in report.base.toxicity:
            screen.print(_summary(report, scorer))
        if as_json:
            print_json(json.loads(report.model_dump_json()))
        elif not quiet:
            typer.echo(str(Path(report.path) / "report.md"))


def _summary(report: "DetoxReport", scorer: str) -> "Table":
    """The base, and of each curve the first candidate at the lowest toxicity that all of them reach."""
    level, chosen = report.chosen(scorer)
    names = list(report.base.perplexity)
    rows = [
        [label, f"{p.scale:g}", f"{p.toxicity[scorer].share.value:.1%}"]
        + [f"{p.perplexity[n].token.value:.4g}" for n in names]
        for label, p in {"base": report.base, **chosen}.items()
    ]
    where = "at their last scale" if level is None else f"at the first scale with {level:.1%} toxic or less"
    title = f"perplexity, and toxic share by {scorer} {where}"
    return table(["model", "scale", "toxic", *names], rows, title=title)
