"""The picture of a removal: toxicity against its cost, one column of panels for each text."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.detox.report import DetoxReport, Point
from mergekit_bayes.detox.settings import HELD_OUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By method; colours that readers with a colour vision deficiency can tell apart (Okabe and Ito,
# Color universal design, 2008), and markers for those who see no colours.
_LOOKS = {
    "task arithmetic": ("#6b6b6b", "s"),
    "gradient matching": ("#0072b2", "o"),
    "control": ("#e69f00", "^"),
    "Fisher negation": ("#cc79a7", "D"),
    "adaptation": ("#d55e00", "P"),
    "adaptation by precision": ("#009e73", "v"),
    "adaptation control": ("#56b4e9", "X"),
    "NPO": ("#111111", "<"),
}
_STYLES = ("-", "--", ":", "-.")
_X_LABEL, _Y_LABEL, _LEGEND = 44, 32, 48  # characters in a line
_FAR = 1.5  # a panel ends at this multiple of the base's perplexity


def draw(report: DetoxReport, path: Path) -> None:
    """Draw a row of panels for each scorer's toxic share, and one for the held-out loss.

    Args:
        report: What is drawn.
        path: The PNG file to write.
    """
    make_figure(report).savefig(path, format="png")


def make_figure(report: DetoxReport) -> "Figure":
    """The picture, of which nothing is cut off: it is as large as its panels and legend need."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a name may hold "$", which opens a formula
        return _figure(report)


def _figure(report: DetoxReport) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = [name for name in report.base.perplexity if name != HELD_OUT]
    axes = [*report.base.toxicity, *([HELD_OUT] if HELD_OUT in report.base.perplexity else [])]
    figure = Figure(
        figsize=(1.2 + 4.2 * len(texts), 0.4 + 3.1 * len(axes)), layout="constrained", dpi=150
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(axes), len(texts), squeeze=False, sharey="row", sharex="col")
    for i, axis in enumerate(axes):
        for j, text in enumerate(texts):
            _panel(panels[i][j], report, axis, text)
            if i == len(axes) - 1:
                panels[i][j].set_xlabel(_wrapped(f"perplexity, {text}", _X_LABEL))
            panels[i][j].set_ylim(*_heights(report, axis, texts))
            if j == 0:
                panels[i][j].set_ylabel(_name(axis))
    _add_legend(figure, panels[0][0])
    return figure


def _add_legend(figure: "Figure", panel: "Axes") -> None:
    """Put the legend above the panels, in as many columns as fit, and make room for its rows."""
    handles, labels = panel.get_legend_handles_labels()
    labels = [_wrapped(label, _LEGEND) for label in labels]
    for columns in range(min(4, len(labels)), 0, -1):
        legend = figure.legend(
            handles, labels, loc="outside upper center", ncols=columns, frameon=False
        )
        extent = legend.get_window_extent()
        if extent.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(
        max(width, extent.width / figure.dpi), height + extent.height / figure.dpi
    )


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _panel(panel: "Axes", report: DetoxReport, axis: str, text: str) -> None:
    start = report.base.perplexity[text].token.value
    curves: dict[str, int] = {}  # already drawn, by method
    for label, points in report.curves.items():
        method = label.split(",")[0]
        colour, marker = _LOOKS[method]
        style = _STYLES[curves.get(method, 0) % len(_STYLES)]
        curves[method] = curves.get(method, 0) + 1
        line = [(p.perplexity[text].token.value, _height(p, axis)) for p in (report.base, *points)]
        panel.plot(
            [x for x, _ in line],
            [y for _, y in line],
            linestyle=style,
            marker=marker,
            color=colour,
            markersize=5,
            linewidth=1.5,
            markevery=slice(1, None),
            label=label,
        )
    height = _height(report.base, axis)
    panel.plot([start], [height], "*", color="black", markersize=12, label="base", zorder=5)
    costs = [p.perplexity[text].token.value for points in report.curves.values() for p in points]
    shown = [x for x in (start, *costs) if x <= _FAR * start]
    margin = 0.05 * (max(shown) - min(shown)) or 0.05 * start
    panel.set_xlim(min(shown) - margin, max(shown) + margin)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _heights(report: DetoxReport, axis: str, texts: list[str]) -> tuple[float, float]:
    """Limits of a row: what its panels show, from 0 for a share."""
    far = {t: _FAR * report.base.perplexity[t].token.value for t in texts}
    heights = [
        _height(point, axis)
        for point in (report.base, *(p for points in report.curves.values() for p in points))
        if any(point.perplexity[t].token.value <= far[t] for t in texts)
    ]
    low, high = (min(heights) if axis == HELD_OUT else 0.0), max(heights)
    margin = 0.08 * (high - low) or 1.0
    return (low - margin if axis == HELD_OUT else 0.0), high + margin


def _height(point: Point, axis: str) -> float:
    if axis == HELD_OUT:
        return point.perplexity[HELD_OUT].loss.value
    return 100 * point.toxicity[axis].share.value


def _name(axis: str) -> str:
    if axis == HELD_OUT:
        return "loss on held-out toxic text\n(nats a token)"
    prefix, _, rest = axis.partition(":")
    if prefix == "words":
        scorer = "word list"
    elif prefix in ("model", "panel"):
        scorer = rest.rsplit("/", 1)[-1]
    else:
        scorer = prefix.rsplit(".", 1)[-1]
    return "toxic continuations (%)\n" + _wrapped(f"by {scorer}", _Y_LABEL)
