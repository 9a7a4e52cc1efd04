"""The picture of a removal: toxicity against what it costs, one column of panels for each text."""

from pathlib import Path
from typing import Any

from mergekit_bayes.detox.report import DetoxReport, Point
from mergekit_bayes.detox.settings import HELD_OUT

_COLOURS = {"task arithmetic": "#6b6b6b", "gradient matching": "#1f6fb4", "control": "#e07b1a"}
_MARKERS = {"task arithmetic": "s", "gradient matching": "o", "control": "^"}
_STYLES = ("-", "--", ":", "-.")
_FAR = 1.5  # panels end where a perplexity is so many times the base's


def draw(report: DetoxReport, path: Path) -> None:
    """Draw `toxicity_vs_perplexity.png`: a row of panels for each scorer's share, one for the
    held-out loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = [name for name in report.base.perplexity if name != HELD_OUT]
    axes = [*report.base.toxicity, *([HELD_OUT] if HELD_OUT in report.base.perplexity else [])]
    figure = Figure(
        figsize=(1.2 + 4.2 * len(texts), 0.9 + 3.1 * len(axes)), layout="constrained", dpi=150
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(axes), len(texts), squeeze=False, sharey="row", sharex="col")
    for i, axis in enumerate(axes):
        for j, text in enumerate(texts):
            _panel(panels[i][j], report, axis, text)
            if i == len(axes) - 1:
                panels[i][j].set_xlabel(f"perplexity, {text}")
            panels[i][j].set_ylim(*_heights(report, axis, texts))
            if j == 0:
                panels[i][j].set_ylabel(_name(axis))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False
    )
    figure.savefig(path, format="png")


def _panel(panel: Any, report: DetoxReport, axis: str, text: str) -> None:
    seen: dict[str, int] = {}
    far = _FAR * report.base.perplexity[text].token.value
    for label, points in report.curves.items():
        method = label.split(",")[0]
        style = _STYLES[seen.get(method, 0) % len(_STYLES)]
        seen[method] = seen.get(method, 0) + 1
        line = [(p.perplexity[text].token.value, _height(p, axis)) for p in (report.base, *points)]
        panel.plot(
            [x for x, _ in line],
            [y for _, y in line],
            linestyle=style,
            marker=_MARKERS[method],
            color=_COLOURS[method],
            markersize=4,
            linewidth=1.5,
            markevery=slice(1, None),
            label=label,
        )
    start = report.base.perplexity[text].token.value
    panel.plot(
        [start],
        [_height(report.base, axis)],
        "*",
        color="black",
        markersize=12,
        label="base",
        zorder=5,
    )
    shown = [p.perplexity[text].token.value for points in report.curves.values() for p in points]
    shown = [x for x in (start, *shown) if x <= far]
    margin = 0.05 * (max(shown) - min(shown)) or 0.05 * start
    panel.set_xlim(min(shown) - margin, max(shown) + margin)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _heights(report: DetoxReport, axis: str, texts: list[str]) -> tuple[float, float]:
    """Limits of a row: what its panels show, from 0 for a share."""
    every = [report.base, *[p for points in report.curves.values() for p in points]]
    far = {t: _FAR * report.base.perplexity[t].token.value for t in texts}
    heights = [
        _height(p, axis) for p in every if any(p.perplexity[t].token.value <= far[t] for t in texts)
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
    kind, _, rest = axis.partition(":")
    short = (
        "word list"
        if kind == "words"
        else rest.rsplit("/", 1)[-1]
        if kind == "model"
        else kind.rsplit(".", 1)[-1]
    )
    return f"toxic continuations (%)\nby {short}"
