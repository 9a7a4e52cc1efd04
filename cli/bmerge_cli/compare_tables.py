"""The tables of `bmerge evaluate` for several models."""

from typing import TYPE_CHECKING

from bmerge_cli.render import Screen, show_beside, table

if TYPE_CHECKING:
    from mergekit_bayes.compare.report import CompareReport


def show_compare(screen: Screen, report: "CompareReport") -> None:
    """Print the disagreement of scorers if there is one, all numbers, differences and findings."""
    from mergekit_bayes.compare.draws import draws_in_words, notes_by_model
    from mergekit_bayes.compare.findings import is_disagreement
    from mergekit_bayes.compare.wording import bias_in_words, readings

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
        if one.report.sampled is not None:
            screen.print(f"{one.label}: {draws_in_words(one.report.sampled.draws)}")
    for label, note in notes_by_model(report.evaluations):
        screen.print(f"note: {label}: {note}")
    for finding in report.findings:
        if finding not in first:
            screen.print(finding)


def _show_scores(screen: Screen, report: "CompareReport") -> None:
    from mergekit_bayes.compare.wording import cell, changes_of, columns_of, named

    columns = columns_of(report.evaluations)
    names = [named(c.measure, c.of) for c in columns]
    models = {e.label: [cell(c, e.label) for c in columns] for e in report.evaluations}
    show_beside(screen, "models side by side; [95 % interval]", "measure", names, models.items())
    for against, names, changes in changes_of(report.differences):
        title = "differences, paired; [95 % interval of each difference alone]"
        show_beside(screen, title, f"less {against}", names, changes.items())


def _show_agreement(screen: Screen, report: "CompareReport") -> None:
    from mergekit_bayes.compare.wording import AGREEMENT, agreement_rows, agreement_title

    for one in report.evaluations:
        if one.report.agreement:
            title = agreement_title(f" on {one.label}")
            screen.print(table(AGREEMENT, agreement_rows(one.report), title=title))
