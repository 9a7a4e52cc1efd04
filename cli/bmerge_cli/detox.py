"""`bmerge detox`: subtract what a toxic fine-tune added, by every method, and say what each one cost."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bmerge_cli.render import Force, Json, Quiet, console, failures, print_json, table

if TYPE_CHECKING:
    from rich.table import Table

    from mergekit_bayes.detox import DetoxReport
    from mergekit_bayes.metrics.base import Interval

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
    """Perplexities where all curves are equally toxic, at the lowest share that all of them reach."""
    from mergekit_bayes.detox.settings import HELD_OUT

    names = [name for name in report.base.perplexity if name != HELD_OUT]
    reached = [m.level for m in report.matched if m.axis == scorer and all(m.paid.values())]
    base = [f"{report.base.perplexity[n].token.value:.4g}" for n in names]
    rows = [["base", f"{report.base.toxicity[scorer].share.value:.1%}", *base]]
    if not reached:
        return table(
            ["model", "toxic", *names], rows, title=f"by {scorer}: no share below the base's that all curves reach"
        )
    level = min(reached)
    paid = {m.text: m.paid for m in report.matched if (m.axis, m.level) == (scorer, level)}
    for curve in report.curves:
        rows.append([curve, f"{level:.1%}", *[_perplexity(report, n, paid[n][curve]) for n in names]])
    title = f"perplexity at an equal toxic share by {scorer}, with 95 % intervals of what was paid"
    return table(["model", "toxic", *names], rows, title=title)


def _perplexity(report: "DetoxReport", text: str, paid: "Interval | None") -> str:
    if paid is None:
        return "not reached"
    start = report.base.perplexity[text].token.value
    value = f"{start * math.exp(paid.value):.4g}"
    if paid.low is None or paid.high is None:
        return value
    return f"{value} [{start * math.exp(paid.low):.4g}, {start * math.exp(paid.high):.4g}]"
