"""The report of the experiment on addition: tables, differences with intervals, and goals."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
from posterior_quality import processor
from sentiment_columns import BASELINE, COLUMNS, Column
from sentiment_corrected import CORRECTIONS, EACH
from sentiment_errors import error_table
from sentiment_looks import Name
from sentiment_mixed import MIXED, RUNS
from sentiment_predicted import prediction_table
from sentiment_resampled import POINTS, REFERENCES, Resampled
from sentiment_world import SCORES, World

from mergekit_bayes.metrics.base import Interval

TUNED = Name(BASELINE, "tuned")
JOINT = Name("joint")
CLOSE, HALF, KEPT = 0.01, 0.5, 0.95  # the goals
LABELS = {"base": "base", "specialists": "specialists, each on its own", "joint": "joint training"}
STRUCTURED = ("gm_inputs", "gm_kronecker")


def make_report(world: World, failed: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The report of what is there, as Markdown and as JSON."""
    found, size = Resampled(world), world.size
    lacking = {c.name: why for c in COLUMNS if (why := c.lacking()) is not None}
    text = [
        "# Adding sentiment tasks to one base\n",
        f"{date.today()}, {processor()}, one thread, Python {platform.python_version()}, torch "
        f"{version('torch')}, transformers {version('transformers')}; seeds "
        f"{' '.join(map(str, size.seeds))}; {size.tokens} tokens; {size.base_steps} steps for the "
        f"base, {size.task_steps} a task; {size.examples} rows a precision, {size.valid_rows} a "
        f"look and at most {size.test_rows} a test of each task. Means over the tasks "
        f"{', '.join(size.tasks)}. Intervals are 95 %, over rows"
        f"{' and seeds' if len(size.seeds) > 1 else ' of one seed'}.\n",
        "## Averages: accuracy / NLL / ECE / Brier\n",
        averages(found),
        "\n## NLL against controls and task arithmetic\n",
        differences(found),
    ]
    text += ["\n## After a correction: accuracy / NLL / ECE / Brier\n", corrections(found)]
    if any(Name(mixed.name) in found.looks for mixed in MIXED):
        text += [f"\n## {RUNS} runs of each task: accuracy / NLL / ECE / Brier\n", mixtures(found)]
    for point in POINTS[:2]:
        text += [f"\n## By task, {point}: accuracy / NLL / ECE / Brier\n", by_task(found, point)]
    text += ["\n## The predicted increase against the real one\n", prediction_table(found)]
    text += [
        "\n## What merges miss: rank correlation with the task's loss, over untuned merges\n",
        error_table(found),
    ]
    text += ["\n## Goals\n", *goals(found)]
    if lacking or failed:
        text += ["\n## What is missing\n"]
        text += [f"- {name} is left out: {why}" for name, why in lacking.items()]
        text += [f"- {name} failed: {error}" for name, error in failed.items()]
    return "\n".join(text) + "\n", as_json(found) | {"lacking": lacking, "failed": failed}


def averages(found: Resampled) -> str:
    """Every column at its points, with its cost."""
    lines = table_head(
        "way|seeds|untuned|least of specialist|distance|CPU s|tuned|scale|CPU s|"
        "at the distance|scale"
    )
    for name in REFERENCES:
        if Name(name) in found.looks:
            cells = [LABELS[name], seeds(found, Name(name)), _scores(found, Name(name))]
            lines.append(row([*cells, f"{found.least_kept(Name(name)):.3f}", *[""] * 7]))
    for column in measured(found):
        points = {point: Name(column.name, point) for point in POINTS}
        untuned = points["untuned"]
        cells = [column.label, seeds(found, untuned), _scores(found, untuned)]
        away = np.mean([float(look["distance"]) for look in found.looks[untuned].values()])
        cells += [f"{found.least_kept(untuned):.3f}", f"{away:.3g}"]
        cells.append(f"{found.seconds(column, 'untuned'):.0f}")
        tuned = [_scores(found, points["tuned"]), scales(found, points["tuned"])]
        cells += [*tuned, f"{found.seconds(column, 'tuned'):.0f}"] if tuned[0] else [""] * 3
        matched = points["matched"]
        cells += [_scores(found, matched), scales(found, matched)]
        lines.append(row(cells))
    return "\n".join(lines)


def differences(found: Resampled) -> str:
    """Every column untuned against the best control and task arithmetic, and at its distance."""
    control = best_control(found)
    named = found.columns[control.column].label if control is not None else "none"
    lines = [
        f"The best control is the one of the least NLL on these very rows, {named}, which favours "
        "it. The share is of the gap between tuned task arithmetic and joint training.\n",
        *table_head(
            "way|untuned - best control|untuned - tuned task arithmetic|share of the gap|"
            "untuned - joint|matched - tuned task arithmetic"
        ),
    ]
    for column in measured(found):
        untuned, matched = Name(column.name), Name(column.name, "matched")
        cells = [
            signed(found.difference(untuned, control)) if control is not None else "",
            signed(found.difference(untuned, TUNED)),
            percent(found.share(untuned, TUNED, JOINT)),
            signed(found.difference(untuned, JOINT)),
            signed(found.difference(matched, TUNED)) if matched.column != BASELINE else "",
        ]
        lines.append(row([column.label, *cells]))
    return "\n".join(lines)


def corrections(found: Resampled) -> str:
    """Every correction, against the merge that it started from and against joint training."""
    lines = [
        f"{found.world.size.correction_steps} steps on {EACH} rows of each task. The share is of "
        "the gap between tuned task arithmetic and joint training.\n",
        *table_head(
            "start|seeds|corrected|least of specialist|distance|corrected - start|"
            "share of the gap|corrected - joint|CPU s"
        ),
    ]
    for correction in CORRECTIONS:
        name = Name(correction.name)
        if name in found.looks:
            looks, start = found.looks[name], Name(correction.column or "base")
            away = np.mean([float(look["distance"]) for look in looks.values()])
            cost = np.mean([correction.step(found.world, seed).seconds for seed in looks])
            cells = [correction.label, seeds(found, name), _scores(found, name)]
            cells += [f"{found.least_kept(name):.3f}", f"{away:.3g}"]
            cells += [signed(found.difference(name, start))]
            cells += [percent(found.share(name, TUNED, JOINT))]
            cells += [signed(found.difference(name, JOINT)), f"{cost:.0f}"]
            lines.append(row(cells))
    return "\n".join(lines)


def mixtures(found: Resampled) -> str:
    """Several runs of each task, against the same way with one and against each other."""
    one, named = Name("gm"), Name("named")
    lines = table_head(
        "way|seeds|untuned|least of specialist|distance|NLL - one run a task|NLL - runs by name"
    )
    for mixed in MIXED:
        name = Name(mixed.name)
        if name in found.looks:
            away = np.mean([float(look["distance"]) for look in found.looks[name].values()])
            cells = [mixed.label, seeds(found, name), _scores(found, name)]
            cells += [f"{found.least_kept(name):.3f}", f"{away:.3g}"]
            cells += [signed(found.difference(name, one))]
            cells += [signed(found.difference(name, named)) if name != named else ""]
            lines.append(row(cells))
    return "\n".join(lines)


def by_task(found: Resampled, point: str) -> str:
    """All scores of every task."""
    tasks = found.world.size.tasks
    lines = table_head("|".join(["way", *tasks]))
    names = [Name(name) for name in REFERENCES if point == "untuned"]
    names += [Name(column.name, point) for column in measured(found)]
    for name in names:
        if name in found.looks:
            label = LABELS.get(name.column) or found.columns[name.column].label
            cells = [_four(found.scores(name, task)) for task in tasks]
            lines.append(row([label, *cells]))
    return "\n".join(lines)


def goals(found: Resampled) -> list[str]:
    """What counts, with its numbers."""
    if JOINT not in found.looks or TUNED not in found.looks:
        return ["- NOT RUN: task arithmetic or joint training is missing."]
    gap = found.difference(TUNED, JOINT)
    assert gap is not None
    allowed = min(CLOSE, HALF * gap.value)
    lines = [f"- Tuned task arithmetic is {signed(gap)} from joint training."]
    for name in STRUCTURED:
        untuned = Name(name)
        if untuned not in found.looks:
            lines.append(f"- {name}: **NOT RUN**")
            continue
        label = found.columns[name].label
        far = found.difference(untuned, JOINT)
        assert far is not None
        lines.append(
            f"- {label} untuned: {signed(far)} from joint training, at most {allowed:+.4f}: "
            f"**{_verdict(far, allowed)}**"
        )
        kept = found.least_kept(untuned)
        met = "met" if kept >= KEPT else "MISSED"
        lines.append(f"- {label}: least accuracy {kept:.3f} of a specialist's, {KEPT}: **{met}**")
        for rival in ("ace", "regmean"):
            better = found.difference(untuned, Name(rival))
            lines.append(
                f"- {label} minus {rival}: "
                + (f"{signed(better)}: **{_verdict(better, 0.0)}**" if better else "**NOT RUN**")
            )
    return lines


def best_control(found: Resampled) -> Name | None:
    """The control of the least untuned loss, among those of AdamW's models."""
    known = found.columns.values()
    names = [Name(c.name) for c in known if c.is_control and c.optimizer == "adamw"]
    names = [name for name in names if name in found.looks]
    nats = {name: found.losses(name, found.seeds(name))[0] for name in names}
    return min(names, key=nats.__getitem__) if names else None


def as_json(found: Resampled) -> dict[str, Any]:
    """All numbers."""
    tasks = found.world.size.tasks
    return {
        "size": asdict(found.world.size),
        "scores": {
            " ".join(name): {task: found.scores(name, task) for task in tasks}
            for name in found.looks
        },
        "scales": {" ".join(name): by_seed for name, by_seed in found.scales.items()},
        "seconds": {
            column.name: {
                p: found.seconds(column, p)
                for p in POINTS[:2]
                if Name(column.name, p) in found.looks
            }
            for column in measured(found)
        },
    }


def table_head(columns: str) -> list[str]:
    """The first two lines of a table."""
    names = columns.split("|")
    return [row(names), row(["---"] * len(names))]


def row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def measured(found: Resampled) -> list[Column]:
    """The ways that were looked at, untuned at least."""
    return [column for column in found.columns.values() if Name(column.name) in found.looks]


def _verdict(gap: Interval, most: float) -> str:
    if gap.value > most:
        return "MISSED"
    sure = gap.high is None or gap.high <= most
    return "met" if sure else "met, but not by the whole interval"


def _four(scores: dict[str, float]) -> str:
    return " / ".join(f"{scores[score]:.3f}" for score in SCORES)


def _scores(found: Resampled, name: Name) -> str:
    return _four(found.averages(name)) if name in found.looks else ""


def seeds(found: Resampled, name: Name) -> str:
    """How many seeds there are."""
    return str(len(found.looks[name]))


def scales(found: Resampled, name: Name) -> str:
    """The scale of every seed."""
    chosen = found.scales.get(name, {}).values()
    return ", ".join(f"{scale:.3g}" for scale in chosen)


def signed(x: Interval | None) -> str:
    """A difference with its interval."""
    if x is None or not np.isfinite(x.value):
        return ""
    ends = "" if x.low is None or x.high is None else f" [{x.low:+.4f}, {x.high:+.4f}]"
    return f"{x.value:+.4f}{ends}"


def percent(x: Interval | None) -> str:
    """A share with its interval."""
    if x is None or not np.isfinite(x.value):
        return ""
    ends = "" if x.low is None or x.high is None else f" [{x.low:.0%}, {x.high:.0%}]"
    return f"{x.value:.0%}{ends}"
