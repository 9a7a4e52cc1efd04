"""The tables of `bmerge evaluate` for several models."""

from typing import TYPE_CHECKING

from rich.console import Console

from bmerge_cli.render import table

if TYPE_CHECKING:
    from mergekit_bayes.compare.report import CompareReport


def show_compare(screen: Console, report: "CompareReport") -> None:
    """Print the disagreement of scorers if there is one, all numbers, differences and findings."""
    from mergekit_bayes.compare.findings import is_disagreement
    from mergekit_bayes.compare.wording import cell, change_in_short, columns_of, scorer_name

    first = [finding for finding in report.findings if is_disagreement(finding)]
    for finding in first:
        screen.print(finding)
    columns = columns_of(report.evaluations)
    heads = ["model", *(f"{c.measure}\n{c.of}" if c.of else c.measure for c in columns)]
    rows = [[e.label, *(cell(c, e.label) for c in columns)] for e in report.evaluations]
    screen.print(table(heads, rows, title="models side by side; [95 % interval]"))
    changes = [
        [
            f"{d.label} less {d.against}",
            d.measure,
            scorer_name(d.of),
            change_in_short(d),
        ]
        for d in report.differences
    ]
    title = "differences, paired; [95 % interval of each alone]"
    screen.print(table(["models", "measure", "of", "difference"], changes, title=title))
    for finding in report.findings:
        if finding not in first:
            screen.print(finding)
