"""The tables of `bmerge preview`."""

from typing import TYPE_CHECKING

from bmerge_cli.render import Screen, table

if TYPE_CHECKING:
    from mergekit_bayes.preview.report import PreviewReport

_ROWS = 12  # of the best merges; the report has all


def show_preview(screen: Screen, report: "PreviewReport") -> None:
    """Print the best merges, the recipe's own among them, and what was found."""
    from mergekit_bayes.preview.wording import by_mean, columns_of, names_of, row_of, sentences

    order = by_mean(report)
    first = [i for i in order[:_ROWS] if i != 0]
    rows = sorted({*first, report.chosen, 0}, key=order.index)
    columns = columns_of(report)
    columns[0] = f"scales of {', '.join(names_of(report))}"
    cut = f", the best {len(rows)} of {len(order):,}" if len(rows) < len(order) else ""
    screen.print(table(columns, [row_of(report, i) for i in rows], title=f"merges{cut}"))
    for sentence in sentences(report):
        screen.print(sentence)
