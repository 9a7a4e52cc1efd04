"""How the numbers of a preview are written on the screen and in the report."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mergekit_bayes.correlation import rank_correlation
from mergekit_bayes.preview.choosing import cost, edge
from mergekit_bayes.preview.report import Point, PreviewReport

_ORIGINS = {"recipe": "recipe", "scales": "given", "grid": "grid", "search": "search"}


def columns_of(report: PreviewReport) -> list[str]:
    """The heads of the table of points."""
    losses = [f"{name}, {report.unit_of_losses}" for name in report.observations]
    accuracies = [f"{name}, accuracy" for name in report.best.accuracy]
    mean = ["mean"] if len(report.observations) > 1 else []
    predicted = ["predicted rise"] if _is_predicted(report) else []
    return ["scales", *losses, *mean, *accuracies, *predicted, "from", "note"]


def row_of(report: PreviewReport, index: int) -> list[str]:
    """A point's row in that table."""
    point = report.points[index]
    losses = [_loss(point.loss[name]) for name in report.observations]
    mean = [_loss(point.mean)] if len(report.observations) > 1 else []
    accuracies = [
        f"{point.accuracy[name]:.1%}" if name in point.accuracy else ""
        for name in report.best.accuracy
    ]
    notes = ["recommended"] if index == report.chosen else []
    is_front = len(report.observations) > 1 and index in report.pareto
    notes += ["Pareto"] if is_front else []
    notes += ["failed"] if point.failure is not None else []
    predicted = [_prediction(point)] if _is_predicted(report) else []
    origin = _ORIGINS[point.origin]
    return [scales_of(point), *losses, *mean, *accuracies, *predicted, origin, ", ".join(notes)]


def scales_of(point: Point) -> str:
    """The scales in short, in the order of the recipe's models."""
    return ", ".join(f"{scale:.4g}" for scale in point.scales)


def by_mean(report: PreviewReport) -> list[int]:
    """Indices of all points, the smallest mean loss first."""
    return sorted(range(len(report.points)), key=lambda i: report.points[i].mean)


def names_of(report: PreviewReport) -> list[str]:
    """Short names of the tasks: the last part of each path, with more of it where two are alike."""
    paths = [Path(task).parts for task in report.tasks]
    longest = max(map(len, paths))
    for parts in range(1, longest + 1):
        names = ["/".join(path[-parts:]) for path in paths]
        if len(set(names)) == len(set(report.tasks)):
            break
    return names


def sentences(report: PreviewReport) -> Iterator[str]:
    """What the preview found, in sentences; the first one is the recommendation."""
    best, own = report.best, report.points[0]
    if len(report.points) == 1:
        yield f"Only the recipe's own scales were measured, {scales_of(own)}."
        return
    what = "mean loss" if len(report.observations) > 1 else "loss"
    if report.settings["choose"] == "worst":
        what = "largest rise over the recipe's loss"
    yield (
        f"Recommended: scales {scales_of(best)} for {', '.join(names_of(report))}, of the smallest "
        f"{what} of {len(report.points)} merges."
    )
    if best is own:
        yield "These are the recipe's own scales."
    elif own.failure is None:
        changes = [f"{best.loss[n] - own.loss[n]:+.4f} on {n}" for n in report.observations]
        yield f"Against the recipe's scales {scales_of(own)}: {', '.join(changes)} nats."
    for name, change in report.held_out.items():
        interval = ""
        if change.low is not None and change.high is not None:
            interval = f" [{change.low:+.4f}, {change.high:+.4f}]"
        yield (
            f"On {name}, which decided nothing, the recommended merge has {change.value:+.4f}"
            f"{interval} {report.unit_of_losses} against the recipe's."
        )
    choice = report.settings["choose"]
    measured = [point for point in report.points if point.failure is None]
    costs = {point.scales: cost(point.loss, own.loss, choice) for point in measured}
    for position, name in enumerate(names_of(report)):
        scale = best.scales[position]
        if report.base is None and (scale <= 0 or scale >= 1):
            continue  # there is no share beyond
        which = edge(costs, best.scales, position)
        if which is not None:
            kind = "share" if report.base is None else "scale"
            yield f"The {kind} {scale:.4g} of {name} is the {which} measured: look beyond it."
    if report.skipped:
        yield (
            f"{_merges(report.skipped)} of a larger predicted rise {_were(report.skipped)} not "
            "measured. The prediction is of the models' own data."
        )
    known = [p for p in report.points if p.predicted is not None and p.failure is None]
    rises = np.array([p.predicted for p in known], np.float64)
    rank = rank_correlation(rises, np.array([p.mean for p in known])) if len(known) > 2 else None
    if rank is not None:
        doubtful = sum(p.trusted is False for p in known)
        yield (
            f"Rank correlation of the predicted rise and the measured mean loss: {rank:.2f} over "
            f"{len(known)} merges; {doubtful} lie farther from a task than the base does, where "
            "the prediction is not trusted."
        )
    failed = sum(point.failure is not None for point in report.points)
    if failed:
        first = next(point for point in report.points if point.failure is not None)
        yield (
            f"{_merges(failed)} could not be measured; the first, {scales_of(first)}: "
            f"{first.failure}"
        )
    if not report.held_out:
        yield (
            "The scales were chosen on these texts, so that the recommended merge looks better on "
            "them than on others. Name others by --test."
        )


def ranges(values: Sequence[float]) -> tuple[float, float] | None:
    """The smallest and the largest finite value; None where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else None


def _merges(count: int) -> str:
    return f"{count} merge{'s' * (count != 1)}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _is_predicted(report: PreviewReport) -> bool:
    return any(point.predicted is not None for point in report.points)


def _prediction(point: Point) -> str:
    if point.predicted is None:
        return ""
    return f"{point.predicted:.4f}{'' if point.trusted else ' ?'}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "infinite"
