"""The picture and the text of models side by side: nothing cut off, overlapping or broken."""

import itertools

import pytest

from mergekit_bayes.compare.markdown import as_markdown
from mergekit_bayes.compare.picture import make_figure
from tests.comparisons import MODELS, compare_report

ALL = ("as it is", "in 4 bits", "relearnt")


@pytest.mark.parametrize(
    ("models", "texts", "variants"),
    [
        (1, 1, ALL[:1]),
        (2, 2, ALL),
        (6, 4, ALL[:1]),
        pytest.param(1, 4, ALL, marks=pytest.mark.slow),
        pytest.param(6, 1, ALL[:2], marks=pytest.mark.slow),
        pytest.param(6, 4, ALL, marks=pytest.mark.slow),
    ],
)
def test_all_of_a_picture_is_in_it(models, texts, variants):
    figure = make_figure(compare_report(models, texts, 2, variants))
    figure.draw_without_rendering()
    assert len(figure.axes) == 2 + texts + 4  # scorers, texts, and what tells text from garble
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for box in boxes:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= figure.bbox.width + 1
        assert box.y1 <= figure.bbox.height + 1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    rows = models * len(variants)
    for axes in figure.axes:
        assert axes.get_window_extent().width > 200  # of 405 pixels
        labels = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(labels))
        assert len(axes.get_yticks()) == rows
    named = [axes for axes in figure.axes if any(t.get_text() for t in axes.get_yticklabels())]
    assert len(named) == len({round(axes.get_position().y0, 2) for axes in figure.axes})


def test_names_are_no_formulas_and_a_ruined_model_is_drawn():
    report = compare_report(2, 1)
    ruined = report.evaluations[1].report.perplexity
    name = next(iter(ruined))
    infinite = ruined[name].token.model_copy(
        update=dict.fromkeys(("value", "low", "high"), float("inf"))
    )
    ruined[name] = ruined[name].model_copy(update={"token": infinite})
    for one in report.evaluations:
        one.report.perplexity["$\\frac{$"] = one.report.perplexity.pop(name)
    figure = make_figure(report)
    figure.draw_without_rendering()
    assert "infinite" in [text.get_text() for axes in figure.axes for text in axes.texts]


def test_names_break_no_table():
    content = as_markdown(compare_report(3, 2))
    table = [line for line in content.splitlines() if line.startswith("|")]
    cells = {line.replace("\\|", "").count("|") for line in table}
    assert len(table) == 2 + 2 + 2 + 5  # head, scorers, texts, quality
    assert cells == {1 + 3 + 1}  # measure, models, and the end
    assert "`precision`" in MODELS[2]
    assert "\\`precision\\`" in table[0]


def test_findings_come_first():
    report = compare_report(2, 1).model_copy(update={"findings": ("Scorers disagree | here.",)})
    lines = [line for line in as_markdown(report).splitlines() if line]
    assert lines[1] == "- Scorers disagree | here."
