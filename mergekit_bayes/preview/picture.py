"""The picture of a preview: losses against each other, and against each scale."""

import math
import textwrap
import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.preview.report import Point, PreviewReport
from mergekit_bayes.preview.settings import Vector
from mergekit_bayes.preview.wording import names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By data set; colours that readers with a colour vision deficiency can tell apart (Okabe and Ito,
# Color universal design, 2008).
_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#111111")
_BEST, _FRONT, _OTHER = "#d55e00", "#111111", "#a0a0a0"
_PAIRS, _TASKS, _SETS = 6, 12, 7  # panels, and lines of a panel, at most
_ACROSS = 3  # panels beside each other
_WIDTH, _HEIGHT = 3.6, 3.1  # inches of a panel
_NAME = 24  # characters of a name
_BEYOND = "merges at the edge lie beyond the axis"
_FAR = 4.0  # losses further above the smallest than this multiple of the middle rise are cut
_FEW = 8  # of fewer merges nothing is cut


def draw(report: PreviewReport, path: Path) -> None:
    """Draw a panel for each pair of data sets, with the Pareto set, and one for each scale.

    Args:
        report: What is drawn.
        path: The PNG file to write.
    """
    figure = make_figure(report)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        figure.savefig(path, format="png")  # a letter that the font lacks is drawn as a box


def make_figure(report: PreviewReport) -> "Figure":
    """The picture, as large as its panels need."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a name may hold "$", which opens a formula
        return _figure(report)


def _figure(report: PreviewReport) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sets = list(report.observations)
    pairs = list(combinations(sets, 2))[:_PAIRS]
    tasks = range(min(len(report.tasks), _TASKS))
    count = len(pairs) + len(tasks)
    rows = math.ceil(count / _ACROSS)
    across = math.ceil(count / rows)  # one row after the other, so that the last alone has gaps
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(_WIDTH * across, _HEIGHT * rows + 0.3), layout=layout, dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, across, squeeze=False).flatten()
    cut = set[Vector]()
    for panel, pair in zip(panels, pairs, strict=False):
        cut |= _pair(panel, report, *pair)
    for panel, task in zip(panels[len(pairs) :], tasks, strict=False):
        cut |= _scale(panel, report, task, sets[:_SETS])
    for panel in panels[count:]:
        panel.remove()
    handles = {
        f"{len(cut)} of {len(report.points)} {label}" if label == _BEYOND else label: handle
        for panel in figure.axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=across,
        fontsize=8,
        frameon=False,
    )
    return figure


def _pair(panel: "Axes", report: PreviewReport, across: str, up: str) -> set[Vector]:
    """Losses on two data sets against each other; returns the scales whose losses lie outside."""
    points = [p for p in report.points if math.isfinite(p.loss[across] + p.loss[up])]
    places = [(p.loss[across], p.loss[up]) for p in points]
    panel.plot(*zip(*places, strict=True), "o", color=_OTHER, markersize=3.5, label="merge")
    front = [report.points[i] for i in report.pareto]
    line = sorted((p.loss[across], p.loss[up]) for p in front)
    panel.plot(*zip(*line, strict=True), "o", color=_FRONT, markersize=5, label="in the Pareto set")
    own, best = report.points[0], report.best
    if own.failure is None:
        panel.plot(
            [own.loss[across]],
            [own.loss[up]],
            "s",
            color="black",
            markerfacecolor="none",
            markersize=9,
            label="recipe",
        )
    panel.plot(
        [best.loss[across]], [best.loss[up]], "*", color=_BEST, markersize=13, label="recommended"
    )
    panel.set_xlim(*_window(report, [across]))
    panel.set_ylim(*_window(report, [up]))
    panel.set_xlabel(f"{_short(across)}, {report.unit_of_losses}", fontsize=8)
    panel.set_ylabel(f"{_short(up)}, {report.unit_of_losses}", fontsize=8)
    _plain(panel)
    return _mark_beyond(panel, [(p.scales, p.loss[across], p.loss[up]) for p in points])


def _scale(panel: "Axes", report: PreviewReport, task: int, sets: Sequence[str]) -> set[Vector]:
    """Losses against one scale; returns the scales whose losses lie outside.

    A line joins the merges that differ from the recipe in it alone; of a common scale all merges.
    """
    own = report.points[0]
    are_common = all(len(set(point.scales)) == 1 for point in report.points)
    for name, colour in zip(sets, _COLOURS, strict=False):
        points = [p for p in report.points if math.isfinite(p.loss[name])]
        alone = [p for p in points if are_common or _differs_in(p, own, task)]
        alone.sort(key=lambda p: p.scales[task])
        others = [p for p in points if p not in alone]
        panel.plot(
            [p.scales[task] for p in others],
            [p.loss[name] for p in others],
            ".",
            color=colour,
            alpha=0.35,
            markersize=4,
            label="pale: other scales differ, too" if others and name == sets[0] else None,
        )
        panel.plot(
            [p.scales[task] for p in alone],
            [p.loss[name] for p in alone],
            ".-",
            color=colour,
            linewidth=1.4,
            markersize=6,
            label=f"loss on {_short(name)}",
        )
    best, recipe = report.best.scales[task], own.scales[task]
    panel.axvline(
        best, color=_BEST, linewidth=1, linestyle="--", zorder=1, label="recommended scale"
    )
    panel.axvline(
        recipe, color="0.5", linewidth=1, linestyle=":", zorder=1, label="the recipe's scale"
    )
    panel.set_ylim(*_window(report, sets))
    panel.set_xlabel(f"scale of {_short(names_of(report)[task])}", fontsize=8)
    panel.set_ylabel(report.unit_of_losses, fontsize=8)
    _plain(panel)
    places = [(p.scales, p.scales[task], p.loss[name]) for p in report.points for name in sets]
    return _mark_beyond(panel, [place for place in places if math.isfinite(place[-1])])


def _mark_beyond(panel: "Axes", places: Sequence[tuple[Vector, float, float]]) -> set[Vector]:
    """Mark at the edge what lies above the axes, and return its scales."""
    right, top = panel.get_xlim()[1], panel.get_ylim()[1]
    outside = [place for place in places if place[1] > right or place[2] > top]
    for marker, is_above in (("^", True), (">", False)):
        marks = [(min(x, right), min(y, top)) for _, x, y in outside if (y > top) == is_above]
        if marks:
            panel.plot(
                *zip(*marks, strict=True),
                marker,
                color=_OTHER,
                markersize=5,
                clip_on=False,
                label=_BEYOND,
            )
    return {scales for scales, *_ in outside}


def _differs_in(point: Point, own: Point, task: int) -> bool:
    """Whether a point has the recipe's scales but for one."""
    pairs = zip(point.scales, own.scales, strict=True)
    return all(a == b for i, (a, b) in enumerate(pairs) if i != task)


def _window(report: PreviewReport, sets: Sequence[str]) -> tuple[float, float]:
    """From the smallest loss on these sets on; of many merges, a few that lie far above are cut.

    The recipe's own merge and the recommended one never are.
    """

    def losses(points: Sequence[Point]) -> list[float]:
        return sorted(p.loss[name] for p in points for name in sets if math.isfinite(p.loss[name]))

    ordered = losses(report.points)
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    if len(report.points) >= _FEW and middle > low:
        named = losses([report.points[0], report.best])
        high = min(high, max(low + _FAR * (middle - low), named[-1]))
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _plain(panel: "Axes") -> None:
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    return textwrap.shorten(name, _NAME, placeholder="...") if " " in name else name[-_NAME:]
