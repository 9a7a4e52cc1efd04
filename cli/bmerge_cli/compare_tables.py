"""The tables of `bmerge evaluate` for several models."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len

from bmerge_cli.render import Screen, table

if TYPE_CHECKING:
    from mergekit_bayes.compare.report import CompareReport

_GAP = 2  # spaces between columns
_NAMES = 30  # characters; longer names of measures go on in the next line where models need room


def show_compare(screen: Screen, report: "CompareReport") -> None:
    """Print the disagreement of scorers if there is one, all numbers, differences and findings."""
    from mergekit_bayes.compare.findings import is_disagreement
    from mergekit_bayes.compare.wording import bias_in_words, cuts, readings

    first = [finding for finding in report.findings if is_disagreement(finding)]
    for finding in first:
        screen.print(finding)
    _show_scores(screen, report)
    _show_agreement(screen, report)
    scorers = report.evaluations[0].report  # which are the same for all models
    for reading in readings(scorers):
        screen.print(reading)
    for spec, bias in scorers.bias.items():
        screen.print(bias_in_words(spec, bias))
    for one in report.evaluations:
        for cut in cuts(one.report):
            screen.print(f"note: {one.label}: {cut}")
    for finding in report.findings:
        if finding not in first:
            screen.print(finding)


def _show_scores(screen: Screen, report: "CompareReport") -> None:
    from mergekit_bayes.compare.wording import cell, changes_of, columns_of, named

    columns = columns_of(report.evaluations)
    names = [named(c.measure, c.of) for c in columns]
    models = {e.label: [cell(c, e.label) for c in columns] for e in report.evaluations}
    _show(screen, "models side by side; [95 % interval]", "measure", names, models)
    for against, names, changes in changes_of(report.differences):
        title = "differences, paired; [95 % interval of each difference alone]"
        _show(screen, title, f"less {against}", names, changes)


def _show(
    screen: Screen,
    title: str | None,
    head: str,
    names: Sequence[str],
    columns: Mapping[str, Sequence[str]],
) -> None:
    """Print a row for each name, and beside each other as many columns as the screen holds."""
    for beside in _fitting([head, *names], [[h, *c] for h, c in columns.items()], screen.width):
        rows = zip(names, *(column[1:] for column in beside), strict=True)
        heads = [head, *(column[0] for column in beside)]
        screen.print(table(heads, [list(row) for row in rows], title=title))
        title = None


def _fitting(
    first: Sequence[str], columns: Sequence[Sequence[str]], width: int
) -> Iterator[list[Sequence[str]]]:
    """The columns in groups that fit beside the first one, at least one in each."""
    group: list[Sequence[str]] = []
    names = min(_widest(first), _NAMES)
    room = width - names
    for column in columns:
        need = _widest(column) + _GAP
        if group and need > room:
            yield group
            group, room = [], width - names
        group.append(column)
        room -= need
    yield group


def _widest(cells: Sequence[str]) -> int:
    return max(map(cell_len, cells))


def _show_agreement(screen: Screen, report: "CompareReport") -> None:
    from mergekit_bayes.compare.wording import AGREEMENT, agreement_rows, agreement_title

    for one in report.evaluations:
        if one.report.agreement:
            title = agreement_title(f" on {one.label}")
            screen.print(table(AGREEMENT, agreement_rows(one.report), title=title))
