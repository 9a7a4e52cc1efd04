"""The picture of models side by side: a panel for each number, a row in it for each model."""

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.compare.report import CompareReport, Evaluated
from mergekit_bayes.compare.wording import PANELS, Column, joint, panels_of
from mergekit_bayes.evaluate.report import Variant
from mergekit_bayes.metrics.base import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By model; colours that readers with a colour vision deficiency can tell apart (Okabe and Ito,
# Color universal design, 2008). The rows have names for those who see no colours.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111")
_MARKERS: dict[Variant, str] = {"as it is": "o", "in 4 bits": "s", "relearnt": "D"}
_LABEL, _TITLE = 26, 30  # characters in a line
_ACROSS = 4  # panels beside each other at most
_PANEL, _LINE, _GAP = 2.7, 0.17, 1.15  # inches: a panel's width, a line of a label, title and axis
_LETTER = 0.085  # inches of a character, about
_FAR = 20.0  # from this ratio on an axis of losses is logarithmic


def draw(report: CompareReport, path: Path) -> None:
    """Draw a panel for each number: shares by scorer, perplexities, accuracies, quality.

    Of many numbers, as of a hundred tasks, the first `PANELS` have one.

    Args:
        report: What is drawn.
        path: The PNG file to write.
    """
    figure = make_figure(report)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        figure.savefig(path, format="png")  # a letter that the font lacks is drawn as a box


def make_figure(report: CompareReport) -> "Figure":
    """The picture, of which nothing is cut off: it is as large as its panels and labels need."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a name may hold "$", which opens a formula
        return _figure(report.evaluations)


def _figure(evaluations: Sequence[Evaluated]) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    rows = _rows_of_panels(panels_of(evaluations)[:PANELS])
    labels = [_wrapped(e.label, _LABEL) for e in evaluations]
    lines = [label.count("\n") + 2.0 for label in labels]
    across = max(len(row) for row in rows)
    names = max(len(line) for label in labels for line in label.split("\n")) * _LETTER
    height = len(rows) * (_GAP + _LINE * sum(lines))
    figure = Figure(figsize=(names + _PANEL * across, height), layout=layout, dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), across, squeeze=False)
    for row, places in zip(rows, panels, strict=True):
        for column, panel in zip(row, places[: len(row)], strict=True):
            _panel(panel, column, evaluations, lines)
            panel.set_yticklabels(labels if column is row[0] else [])
        for panel in places[len(row) :]:
            panel.remove()
    return figure


def _rows_of_panels(columns: Sequence[Column]) -> list[list[Column]]:
    """Panels in rows; those of all scorers, texts or the like in one row where they fit."""
    kinds: dict[str, list[Column]] = {}
    for column in columns:
        kinds.setdefault(column.measure if column.of else "", []).append(column)
    rows: list[list[Column]] = [[]]
    for group in kinds.values():
        if len(rows[-1]) + min(len(group), _ACROSS) > _ACROSS:
            rows.append([])
        for column in group:
            if len(rows[-1]) == _ACROSS:
                rows.append([])
            rows[-1].append(column)
    return rows


def _panel(
    panel: "Axes", column: Column, evaluations: Sequence[Evaluated], lines: Sequence[float]
) -> None:
    heights = [sum(lines[:i]) + lines[i] / 2 for i in range(len(lines))]
    colours: dict[str, str] = {}
    for one, height in zip(evaluations, heights, strict=True):
        colour = colours.setdefault(one.model, _COLOURS[len(colours) % len(_COLOURS)])
        _point(panel, column.values[one.label], height, colour, one.variant)
    panel.set_yticks(heights)
    panel.set_ylim(sum(lines), 0)
    panel.tick_params(axis="y", length=0, pad=8)  # a marker at the edge covers no name
    panel.tick_params(labelsize=8)
    unit = f" ({column.unit})" if column.unit else ""
    title = f"{column.measure}{unit}"
    if column.of:
        title += f"\n{_wrapped(joint(column.measure) + column.of, _TITLE)}"
    panel.set_title(title, fontsize=9, loc="left")
    _limits(panel, column)
    first = column.values[evaluations[0].label]
    if len(evaluations) > 1 and first is not None and math.isfinite(first.value):
        panel.axvline(first.value, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    panel.grid(axis="x", alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _point(
    panel: "Axes", value: Interval | None, height: float, colour: str, variant: Variant
) -> None:
    if value is None or not math.isfinite(value.value):
        shown = "none" if value is None else "NaN" if math.isnan(value.value) else "infinite"
        place = panel.get_yaxis_transform()
        panel.text(0.02, height, shown, transform=place, fontsize=8, color=colour, va="center")
        return
    if value.low is not None and value.high is not None and math.isfinite(value.high):
        panel.plot([value.low, value.high], [height, height], color=colour, linewidth=1.6)
    face = colour if variant == "as it is" else "white"
    panel.plot(
        [value.value],
        [height],
        _MARKERS[variant],
        color=colour,
        markerfacecolor=face,
        markersize=6,
        zorder=3,
        clip_on=False,  # a share of 0 lies on the edge
    )


def _limits(panel: "Axes", column: Column) -> None:
    """From 0 for a share; wide enough for a lone point; logarithmic if losses lie far apart."""
    from matplotlib.ticker import MaxNLocator

    ends = [
        end
        for value in column.values.values()
        if value is not None
        for end in (value.low, value.value, value.high)
        if end is not None and math.isfinite(end)
    ]
    if not ends:
        panel.set_xlim(0, 1)
        panel.set_xticks([])
        return
    low, high = min(ends), max(ends)
    if column.measure.startswith("perplexity") and low > 0 and high > _FAR * low:
        panel.set_xscale("log")
        return
    if column.unit:
        low = 0.0
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    panel.set_xlim(low if column.unit else low - margin, high + margin)
    panel.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))
