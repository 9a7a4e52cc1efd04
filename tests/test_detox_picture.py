"""The picture of a removal: nothing of it is cut off or drawn over something else."""

import itertools

import pytest

from mergekit_bayes.detox.picture import make_figure
from tests.detox_pictures import picture_report


@pytest.mark.parametrize(
    ("texts", "curves", "scorers", "held_out"),
    [(1, 1, 1, False), *((t, c, 2, True) for t, c in ((1, 6), (2, 6), (4, 1), (4, 6)))],
)
def test_all_of_a_picture_is_in_it(texts, curves, scorers, held_out):
    figure = make_figure(picture_report(texts, curves, scorers, held_out))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(), *(a.get_tightbbox() for a in figure.axes)]
    for box in boxes:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= figure.bbox.width + 1
        assert box.y1 <= figure.bbox.height + 1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert len(legend.get_texts()) == curves + 1
    assert all(axes.get_window_extent().height > 200 for axes in figure.axes)  # of 465 pixels


def test_names_are_no_formulas():
    report = picture_report(1, 1, 1, held_out=False)
    name = next(iter(report.base.perplexity))
    points = [report.base, *(point for points in report.curves.values() for point in points)]
    for point in points:
        point.perplexity["$\\frac{$"] = point.perplexity.pop(name)
    make_figure(report).draw_without_rendering()
