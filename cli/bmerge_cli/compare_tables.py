"""The tables of `bmerge evaluate` for several models."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from bmerge_cli.render import table

if TYPE_CHECKING:
    from mergekit_bayes.compare.report import CompareReport


def show_compare(screen: Console, report: "CompareReport") -> None:
    """Print the disagreement of scorers if there is one, all numbers, differences and findings."""
    from mergekit_bayes.compare.findings import is_disagreement
    from mergekit_bayes.compare.wording import cell, changes_of, columns_of

    first = [finding for finding in report.findings if is_disagreement(finding)]
    for finding in first:
        screen.print(finding)
    columns = columns_of(report.evaluations)
    names = [f"{c.measure}, {c.of}" if c.of else c.measure for c in columns]
    models = {e.label: [cell(c, e.label) for c in columns] for e in report.evaluations}
    _show(screen, "models side by side; [95 % interval]", names, models)
    for changes in changes_of(report.differences):
        title = f"less {changes.against}, paired; [95 % interval of each alone]"
        _show(screen, title, changes.names, changes.columns)
    for finding in report.findings:
        if finding not in first:
            screen.print(finding)


def _show(
    screen: Console, title: str, names: Sequence[str], columns: Mapping[str, Sequence[str]]
) -> None:
    """Print a row for each name and a column for each model, in tables that fit."""
    for labels in _blocks(columns, max(map(len, names)), screen.width):
        rows = [list(row) for row in zip(names, *(columns[label] for label in labels), strict=True)]
        screen.print(table(["", *labels], rows, title=title, wrap_first=True))


def _blocks(columns: Mapping[str, Sequence[str]], names: int, width: int) -> Iterator[list[str]]:
    """As many models beside each other as fit; the names are wrapped for the sake of a second."""
    block: list[str] = []
    names = min(names, width // 3)
    used = names
    for label, cells in columns.items():
        needed = 2 + max(map(len, (label, *cells)))
        if block and used + needed > width:
            yield block
            block, used = [], names
        block.append(label)
        used += needed
    yield block
