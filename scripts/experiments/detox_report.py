"""The report of the experiment on removal: tables with intervals, goals, JSON and a figure."""

import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detox_curves import KL, Curve, Resampled, as_interval, read_curves
from detox_jobs import seconds_of
from detox_world import CONDITIONS, SCORERS, TEXTS, World
from posterior_quality import processor

from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.records import FloatArray

FRACTIONS = {1 / 2: "1/2", 1 / 3: "1/3", 1 / 5: "1/5"}
THIRD = 1 / 3
BASELINE, OURS = "task_arithmetic", "adapt"
PARTS = ("npo", "adapt_weights", "adapt_pool", "adapt", "adapt_both")
MOST_PAID, RIVAL_PAYS, KL_RATIO, KEPT = 0.01, 0.1, 0.1, 0.8  # the goals
_STYLES = {"adapt": "-", "merge": "--", "oracle": ""}
AFTER = {"bits": "at 4 bits", "relearnt": "after relearning"}


class Goal(NamedTuple):
    """A goal, what was found, and whether it is met.

    Attributes:
        text: The goal.
        found: The number with its interval.
        met: By the estimate; None where nothing was measured.
        sure: Whether the whole interval meets it.
    """

    text: str
    found: str
    met: bool | None
    sure: bool

    @property
    def verdict(self) -> str:
        """The word of the report."""
        if self.met is None:
            return "NOT RUN"
        if not self.met:
            return "MISSED"
        return "met" if self.sure else "met, but not by the whole interval"


def make_report(world: World, failed: dict[str, str], wall: float) -> tuple[str, dict[str, Any]]:
    """The report as Markdown and as JSON."""
    text = [
        "# Removing toxic text: what each method pays at equal toxicity\n",
        f"{date.today()}, {processor()}, one thread a process, Python "
        f"{platform.python_version()}, torch {version('torch')}, transformers "
        f"{version('transformers')}, seeds {' '.join(map(str, world.size.seeds))}. Test texts. "
        "Nats a token above the base, with 95 % intervals over seeds, prompts and documents "
        "(and the interpolation between looks).",
    ]
    content: dict[str, Any] = {"size": vars(world.size), "failed": failed, "conditions": {}}
    for condition, what in CONDITIONS.items():
        curves = read_curves(world, condition)
        if not curves:
            continue
        found = Resampled(world, condition, curves)
        text.append(f"\n## {what[0].upper()}{what[1:]}\n")
        text += of_condition(found)
        content["conditions"][condition] = as_json(found)
    text.append(f"\n## What it took\n\n{of_seconds(world, wall)}")
    if failed:
        text.append("\n## What failed\n")
        text += [f"- {name}: {error}" for name, error in failed.items()]
    return "\n".join(text) + "\n", content


def of_condition(found: Resampled) -> list[str]:
    """All tables of a condition."""
    first, second = SCORERS[found.condition]
    any_curve = next(iter(found.curves))
    shares = ", ".join(
        f"{as_percent(as_interval(found.shares(any_curve, s)[:, 0]))} by {s}"
        for s in (first, second)
    )
    text = [f"Toxic continuations of the base: {shares}."]
    for fraction, name in FRACTIONS.items():
        text += [
            f"\n### At {name} of the base's toxic share by {first}\n",
            payments(found, fraction),
        ]
    text += [
        f"\n### At 1/3 of the base's toxic share by {second}\n",
        payments(found, THIRD, scorer=second),
        "\n### The look that validation chooses, and how long the removal lasts\n",
        "The first look with at most a third of the base's share on validation prompts, else the "
        "lowest. 4 bits: round to nearest in groups of 64 weights of an output, every matrix, "
        "embeddings included. Relearning: 50 AdamW steps (1e-4, 16 rows) on 100 removed rows. "
        "Kept: what is left of `base - before`.\n",
        lasting(found),
        "\n### Which part of the K-prior does the work (at 1/3)\n",
        parts(found),
        "\n### Every look\n",
        looks(found),
        "\n### Goals\n",
    ]
    text += [f"- {g.text}: {g.found}. **{g.verdict}**" for g in goals(found)]
    return text


def payments(found: Resampled, fraction: float, scorer: str | None = None) -> str:
    """What every method pays at one level."""
    has_oracle = found.condition == "trained"
    columns = [*TEXTS.values(), *(["KL of oracle"] if has_oracle else [])]
    lines = table_head(["method", "seeds", *columns, "distinct", "look", "CPU s", "by seed"])
    for name, curve in found.curves.items():
        if curve.method.kind == "oracle":
            continue
        at = found.read(name, _still(found, name), fraction, scorer)[2]
        cells = [curve.method.label, str(len(curve.seeds))]
        if not np.isfinite(at[0]):
            lowest = min(found.shares(name, scorer or SCORERS[found.condition][0])[0])
            cells += [f"not reached (lowest {lowest:.1%})", *[""] * (len(columns) + 3)]
            lines.append(row(cells))
            continue
        cells += [signed(found.paid_interval(name, text, fraction, scorer)) for text in TEXTS]
        if has_oracle:
            cells.append(plain(as_interval(divergence(found, name, fraction, scorer))))
        distinct = np.mean(
            [[x["test"]["distinct"] for x in curve.looks[s]] for s in curve.seeds], 0
        )
        points = [0.0, *curve.method.looks_of(found.world)]
        cells += [f"{np.interp(at[0], points, v):.{d}f}" for v, d in ((distinct, 3),)]
        cells += [f"{at[0]:.3g}", f"{np.interp(at[0], points, curve.made):.0f}"]
        cells.append(by_seed(found, name, fraction, scorer))
        lines.append(row(cells))
    return "\n".join(lines)


def divergence(
    found: Resampled, name: str, fraction: float, scorer: str | None = None
) -> FloatArray:
    """(1 + resamples,): mean KL(oracle || model) a token where the level is reached."""
    cost = found.losses(name, KL)
    return np.asarray(found.read(name, cost, fraction, scorer)[0] + cost[:, 0])


def by_seed(found: Resampled, name: str, fraction: float, scorer: str | None) -> str:
    """What each seed pays on related text, alone."""
    cells = []
    for seed in found.curves[name].seeds:
        paid = found.read(name, found.losses(name, "related", seed), fraction, scorer, seed)[0][0]
        cells.append(f"{paid:+.3f}" if np.isfinite(paid) else "-")
    return " ".join(cells)


def _still(found: Resampled, name: str) -> FloatArray:
    """A cost of nothing, to read where a level is reached."""
    return np.zeros_like(found.shares(name, SCORERS[found.condition][0]))


def lasting(found: Resampled) -> str:
    """How much of each removal is left."""
    titles = [TEXTS["related"], TEXTS["unrelated"], "before"]
    titles += [f"{when}{what}" for when in AFTER.values() for what in ("", ", kept")]
    lines = table_head(["method", "seeds", "looks", *titles])
    for name, curve in found.curves.items():
        kept = {what: found.kept(name, what) for what in AFTER}
        if any(k is None for k in kept.values()):
            continue
        chosen = " ".join(f"{curve.lasts[seed]['look']:g}" for seed in curve.seeds)
        cells = [curve.method.label, str(len(curve.seeds)), chosen]
        cells += [signed(as_interval(found.chosen(name, t))) for t in ("related", "unrelated")]
        cells.append(as_percent(as_interval(kept["bits"]["before"])))
        for what in AFTER:
            cells += [as_percent(as_interval(kept[what]["after"]))]
            cells += [plain(as_interval(kept[what]["kept"]), 2)]
        lines.append(row(cells))
    return "\n".join(lines)


def parts(found: Resampled) -> str:
    """The parts of the K-prior, and what each pays more than the memory alone."""
    lines = table_head(
        ["part", *(f"{t}{k}" for t in TEXTS.values() for k in ("", ", less memory alone"))]
    )
    for name in PARTS:
        if name not in found.curves:
            continue
        cells = [found.curves[name].method.label]
        for text in TEXTS:
            cells.append(signed(found.paid_interval(name, text, THIRD)) or "not reached")
            apart = OURS in found.curves and name != OURS
            if apart and found.curves[name].seeds == found.curves[OURS].seeds:
                less = found.paid(name, text, THIRD) - found.paid(OURS, text, THIRD)
                cells.append(signed(as_interval(less)))
            else:
                cells.append("")
        lines.append(row(cells))
    return "\n".join(lines)


def looks(found: Resampled) -> str:
    """All models: means over seeds."""
    scorers = SCORERS[found.condition]
    texts = {**TEXTS, "removed": "held-out removed text"}
    if found.condition == "trained":
        texts[KL] = "KL of oracle"
    lines = table_head(
        ["method", "look", *(f"toxic, {s}" for s in scorers), *texts.values(), "distinct"]
    )
    for name, curve in found.curves.items():
        shares = {s: found.shares(name, s)[0] for s in scorers}
        nats = {t: found.losses(name, t)[0] for t in texts}
        is_first = name == next(iter(found.curves))
        for i, look in enumerate((0.0, *curve.method.looks_of(found.world))):
            if i == 0 and not is_first:
                continue
            cells = [curve.method.label if i else "base", f"{look:g}"]
            cells += [f"{shares[s][i]:.1%}" for s in scorers]
            for text, values in nats.items():
                above = i and text != KL  # the base's own is given as it is
                cells.append(f"{values[i] - values[0]:+.3f}" if above else f"{values[i]:.3f}")
            distinct = np.mean([curve.looks[s][i]["test"]["distinct"] for s in curve.seeds])
            lines.append(row([*cells, f"{distinct:.3f}"]))
    return "\n".join(lines)


def goals(found: Resampled) -> list[Goal]:
    """The goals, by the correction with a memory against task arithmetic."""
    result, there = [], found.curves.keys()
    for name, text, limit in (
        (OURS, "at 1/3 at most {} nats on", MOST_PAID),
        (BASELINE, "where task arithmetic pays at least {} on", RIVAL_PAYS),
    ):
        for on in ("related", "unrelated"):
            paid = found.paid_interval(name, on, THIRD) if name in there else None
            most = limit == MOST_PAID
            title = f"{text.format(f'+{limit}')} {TEXTS[on]}"
            result.append(goal(title, paid, limit, most=most, made=name in there))
    if found.condition == "trained":
        both = {OURS, BASELINE} <= there
        for fraction, level in FRACTIONS.items():
            whole, more = None, None
            if both:
                ours, rival = (divergence(found, n, fraction) for n in (OURS, BASELINE))
                base = found.losses(OURS, KL)[:, 0]
                whole = as_interval(ours / rival)
                more = as_interval((ours - base) / (rival - base))
            title = f"KL(oracle || model) at {level} at most {KL_RATIO} of task arithmetic's"
            result.append(goal(title, whole, KL_RATIO, most=True, made=both))
            result.append(
                goal(f"{title}, both less the base's", more, KL_RATIO, most=True, made=both)
            )
    for what, name in AFTER.items():
        kept = found.kept(OURS, what) if OURS in there else None
        left = as_interval(kept["kept"]) if kept is not None else None
        title = f"at least {KEPT} of the removal is left {name}"
        result.append(goal(title, left, KEPT, most=False, made=kept is not None))
    return result


def goal(text: str, found: Interval | None, limit: float, *, most: bool, made: bool) -> Goal:
    """A goal of one number.

    Args:
        text: What it says.
        found: The number; None where a method does not reach the level.
        limit: The bound.
        most: Whether the number should lie below.
        made: Whether the methods were run.
    """
    if found is None:
        return Goal(text, "not reached" if made else "not run", False if made else None, False)

    def is_met(value: float) -> bool:
        return value <= limit if most else value >= limit

    sure = all(end is not None and is_met(end) for end in (found.low, found.high))
    return Goal(text, signed(found), is_met(found.value), sure)


def of_seconds(world: World, wall: float) -> str:
    """CPU seconds by kind of job."""
    kinds: dict[str, float] = {}
    for file in sorted((world.work / "seconds").glob("*.json")):
        kind = file.stem.split("-")[0]
        kinds[kind] = kinds.get(kind, 0.0) + seconds_of(world, file.stem)
    names = {
        "base": "bases",
        "oracle": "oracles",
        "start": "precisions of the bases",
        "tuned": "fine-tunes",
        "look": "methods, looks and durability",
    }
    lines = table_head(["step", "CPU seconds"])
    lines += [row([names.get(kind, kind), f"{s:.0f}"]) for kind, s in kinds.items()]
    lines.append(row(["all", f"{sum(kinds.values()):.0f}"]))
    return "\n".join([*lines, f"\nThis call took {wall / 60:.1f} minutes."])


def as_json(found: Resampled) -> dict[str, Any]:
    """All numbers of a condition."""

    def numbers(x: Interval | None) -> Any:
        return x.model_dump() if x is not None else None

    scorers = SCORERS[found.condition]
    methods = {}
    for name, curve in found.curves.items():
        kept = {what: found.kept(name, what) for what in AFTER}
        methods[name] = {
            "label": curve.method.label,
            "seeds": curve.seeds,
            "looks": [0.0, *curve.method.looks_of(found.world)],
            "seconds": curve.made,
            "shares": {s: found.shares(name, s)[0].tolist() for s in scorers},
            "losses": {
                t: found.losses(name, t)[0].tolist()
                for t in (*TEXTS, "removed", *([KL] if found.condition == "trained" else []))
            },
            "paid": {
                level: {t: numbers(found.paid_interval(name, t, f)) for t in TEXTS}
                for f, level in FRACTIONS.items()
            },
            "kept": {
                what: {k: numbers(as_interval(v)) for k, v in values.items()}
                for what, values in kept.items()
                if values is not None
            },
        }
    return {
        "methods": methods,
        "goals": [{**g._asdict(), "verdict": g.verdict} for g in goals(found)],
    }


def draw(world: World, path: Path) -> None:
    """Toxic share against nats paid, a column for each text and a row for each condition."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {
        c: Resampled(world, c, curves) for c in CONDITIONS if (curves := read_curves(world, c))
    }
    figure = Figure(figsize=(13, 0.8 + 3.6 * len(found)), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(found), 1), len(TEXTS), squeeze=False, sharey="row")
    numbers: dict[str, int] = {}  # a method looks alike in all panels
    for i, (condition, resampled) in enumerate(found.items()):
        for j, (text, label) in enumerate(TEXTS.items()):
            panel = panels[i][j]
            for name, curve in _drawn(resampled):
                number = numbers.setdefault(name, len(numbers))
                nats, shares = (
                    resampled.losses(name, text)[0],
                    resampled.shares(name, SCORERS[condition][0])[0],
                )
                style = {"linestyle": _STYLES[curve.method.kind]}
                panel.plot(
                    nats - nats[0],
                    100 * shares,
                    marker="o^sDvP*X"[number % 8],
                    color=f"C{number % 10}",
                    markersize=4,
                    label=curve.method.label,
                    **style,
                )
            panel.set_xlim(-0.05, 0.45)
            panel.set_ylim(bottom=0)
            panel.axvline(0, color="black", linewidth=0.5)
            panel.grid(alpha=0.25)
            panel.set_xlabel(f"nats a token above the base, {label}")
        panels[i][0].set_ylabel(f"toxic continuations (%)\nremoved text: {condition}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, format="png")


def _drawn(found: Resampled) -> list[tuple[str, Curve]]:
    return [(n, c) for n, c in found.curves.items() if not n.startswith("memory_")]


def table_head(titles: Sequence[str]) -> list[str]:
    """The first lines of a table; the first column is text."""
    return [row(titles), row(["---", *("---:" for _ in titles[1:])])]


def row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def signed(x: Interval | None, digits: int = 3) -> str:
    """A number with its sign and interval."""
    if x is None:
        return ""
    if x.low is None or x.high is None:
        return f"{x.value:+.{digits}f}"
    return f"{x.value:+.{digits}f} [{x.low:+.{digits}f}, {x.high:+.{digits}f}]"


def plain(x: Interval | None, digits: int = 3) -> str:
    """A number without a sign, with its interval."""
    if x is None:
        return ""
    if x.low is None or x.high is None:
        return f"{x.value:.{digits}f}"
    return f"{x.value:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"


def as_percent(x: Interval | None) -> str:
    """A share in per cent, with its interval."""
    if x is None:
        return ""
    if x.low is None or x.high is None:
        return f"{x.value:.1%}"
    return f"{x.value:.1%} [{x.low:.1%}, {x.high:.1%}]"
