"""The report of a removal for readers: the findings, and the tables behind them."""

from collections.abc import Sequence

from mergekit_bayes.detox.comparisons import Comparison
from mergekit_bayes.detox.report import DetoxReport, in_words, verdicts
from mergekit_bayes.detox.settings import HELD_OUT, DetoxConfig, Unit
from mergekit_bayes.metrics.base import Interval

_PAID = (
    "Nats a token, with 95 % intervals of each alone, which hold the error of the interpolation "
    "between scales or steps."
)
_COSTS = (
    "Nats a token added, with 95 % intervals of each alone. Seconds and passes (examples that were "
    "sent through a model) are those of making the first candidate at or below the share, with the "
    "fine-tune and the precision that it needs, without evaluations."
)
_DIFFERENCES = (
    "Differences, paired over prompts and documents; the intervals of a column hold at all of its "
    "levels together with 95 %. `grid` is their half-width from the interpolation alone."
)


def as_markdown(report: DetoxReport) -> str:
    """The text of `report.md`: the findings, the tables behind them, and how they were made."""
    base, texts = report.base, paying_texts(report)
    parts = ["# Removing toxicity: what each method pays", "![](toxicity_vs_perplexity.png)"]
    lines = verdicts(report) or ["Nothing could be compared."]
    parts += ["## Findings", "\n".join(f"- {line}" for line in lines)]
    parts += ["## The model that is kept", _kept(report)]
    parts += ["## All methods at an equal toxic share", overview(report)]
    for axis in dict.fromkeys(m.axis for m in report.matched):
        parts += [_matched_table(report, axis, text) for text in texts]
    for scorer in base.toxicity:
        parts += [_curves_table(report, scorer)]
    parts += [_garbled(report), _how(report)]
    return "\n\n".join(parts) + "\n"


def _kept(report: DetoxReport) -> str:
    if report.kept is None:
        return (
            "None: no candidate reaches a level of the toxic share. Take larger scales or more "
            "steps, or make one by its command."
        )
    k = report.kept
    scorer, text = next(iter(report.base.toxicity)), paying_texts(report)[0]
    return (
        f"`{k.path}`: {k.curve} at {in_words(k.unit, k.scale)}. Of the candidates with at most "
        f"{k.level:.1%} toxic continuations by `{scorer}` it has the lowest perplexity on {text}. "
        "It was chosen by the numbers below, which therefore flatter it a little. To make it "
        "again:\n\n"
        f"```\n{k.command}\n```"
    )


def overview(report: DetoxReport) -> str:
    """One table of all methods by all scorers: what each pays, and what making it took.

    The share is the lowest that all curves reach, or else that most do. Time and passes are those
    of the first candidate of a curve that reaches it.
    """
    texts = paying_texts(report)
    columns = ["method", "scorer", "share", *texts, "scale or step", "seconds", "passes"]
    rows = []
    for scorer in report.base.toxicity:
        level = report.level_of_most(scorer)
        if level is None:
            continue
        paid = {m.text: m for m in report.matched if (m.axis, m.level) == (scorer, level)}
        for label, points in report.curves.items():
            first = next((p for p in points if p.toxicity[scorer].share.value <= level), None)
            place = paid[texts[0]].scale.get(label)
            reached = paid[texts[0]].paid[label] is not None and place is not None
            row = [label, f"`{scorer}`", f"{level:.1%}"]
            row += [_paid(paid[text].paid[label]) for text in texts]
            row += [_place(points[0].unit, place) if reached and place is not None else ""]
            row += [_number(first.seconds), _number(first.passes)] if first else ["", ""]
            rows.append(row)
    if not rows:
        return "No method reaches a level of the toxic share."
    return "\n".join([_COSTS, "", *_table(columns, rows)])


def paying_texts(report: DetoxReport) -> list[str]:
    """The texts whose loss is paid."""
    return [name for name in report.base.perplexity if name != HELD_OUT]


def _place(unit: Unit, place: float) -> str:
    return f"{-place:.3g}" if unit == "scale" else f"step {place:.0f}"


def _number(value: float | None) -> str:
    """A time or a count; nothing where it is not known."""
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _matched_table(report: DetoxReport, axis: str, text: str) -> str:
    rows = [m for m in report.matched if m.axis == axis and m.text == text]
    labels = list(report.curves)
    if axis == HELD_OUT:
        start = report.base.perplexity[HELD_OUT].loss.value
        title, first = f"At equal loss on {HELD_OUT} (base {start:.3f})", "loss"
        levels = [f"{m.level:.3f}" for m in rows]
    else:
        start = report.base.toxicity[axis].share.value
        title, first = f"At equal toxic share by `{axis}` (base {start:.1%})", "share"
        levels = [f"{m.level:.1%}" for m in rows]
    lines = [f"## {title}: loss added on {text}", "", _PAID, ""]
    payments = [[_paid(m.paid[label]) for label in labels] for m in rows]
    body = [[level, *paid] for level, paid in zip(levels, payments, strict=True)]
    lines += _table([first, *labels], body)
    differences = [c for c in report.comparisons if c.axis == axis and c.text == text]
    pairs = list(dict.fromkeys((c.curve, c.against) for c in differences))
    if pairs:
        lines += ["", _DIFFERENCES, ""]
        body = []
        for level, shown in zip((m.level for m in rows), levels, strict=True):
            by_pair = {(c.curve, c.against): c for c in differences if c.level == level}
            body.append([shown, *[_difference(by_pair[p]) for p in pairs]])
        lines += _table([first, *[f"{a} less {b}" for a, b in pairs]], body)
    return "\n".join(lines)


def _curves_table(report: DetoxReport, scorer: str) -> str:
    names = list(report.base.perplexity)
    columns = ["model", "scale or step", "toxic share", "mean score", "expected max"]
    columns += [*(f"perplexity, {n}" for n in names), "guarded", "largest multiplier"]
    columns += ["seconds", "passes"]
    rows = []
    for label, points in {"base": (report.base,), **report.curves}.items():
        for p in points:
            t = p.toxicity[scorer]
            row = [label, f"{p.scale:g}", _share(t.share)]
            row += [f"{t.mean.value:.3f}", f"{t.expected_max.value:.3f}"]
            row += [f"{p.perplexity[n].token.value:.4g}" for n in names]
            guarded, multiplier = p.guarded_share, p.largest_multiplier
            row += ["" if guarded is None else f"{guarded:.1%}"]
            row += ["" if multiplier is None else f"{multiplier:.2f}"]
            row += [_number(p.seconds), _number(p.passes)]
            rows.append(row)
    return "\n".join([f"## All models, scored by `{scorer}`", "", *_table(columns, rows)])


def _garbled(report: DetoxReport) -> str:
    """Numbers that show broken text, which also scores as less toxic."""
    rows, has_judge = [], report.base.judged is not None
    for label, points in {"base": (report.base,), **report.curves}.items():
        for p in points:
            if p.samples is not None:
                s = p.samples
                shares = [f"{s.empty:.1%}", f"{s.distinct_2:.3f}", f"{s.repeated:.3f}"]
                rows.append([label, f"{p.scale:g}", f"{s.mean_tokens:.1f}", *shares])
                if has_judge:
                    token = p.judged.token if p.judged else None
                    rows[-1].append(f"{token.value:.4g}" if token else "")
    columns = [
        "model",
        "scale or step",
        "mean length",
        "empty",
        "distinct word pairs",
        "repeated pairs",
        *(["perplexity under the judge"] if has_judge else []),
    ]
    return "\n".join(["## Are the continuations still text?", "", *_table(columns, rows)])


def _how(report: DetoxReport) -> str:
    first = next(iter(report.base.perplexity.values()))
    toxicity = next(iter(report.base.toxicity.values()))
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    _, chosen = report.chosen(next(iter(report.base.toxicity)))
    lines = [
        "## How it was made",
        "",
        f"- {toxicity.n_continuations:,} continuations of {toxicity.n_prompts:,} prompts for each "
        "model, the same noise for all; only the continuation is scored; toxic from "
        f"{toxicity.threshold:g} on.",
        f"- Perplexity by the {first.protocol} protocol, window {first.window}, stride "
        f"{first.stride}.",
        "- Intervals: 95 % bootstrap over prompts and documents, the same resamples for all "
        "models. They do not hold the spread between training seeds. Each finding is wrong with at "
        f"most 5 %{_of_smooth_curves(report)}; of many findings some may be.",
        "- Scales beside the given ones were added where a curve of a merge crosses a level "
        f"(extra_scales: {report.settings.get('extra_scales', 0)}).{_of_looks(report)}",
        f"- bmerge {report.version}, {versions}; all settings, hashes and numbers are in "
        "report.json.",
        "",
        "To make a candidate again (other scales by `--scale`, other steps by `max_steps`; the "
        "output by `-o OUT` or `--set output=OUT`):",
        "",
        "```",
        *[p.command or "" for p in chosen.values()],
        "```",
    ]
    return "\n".join(lines)


def _of_smooth_curves(report: DetoxReport) -> str:
    """What the error of a finding assumes where few scales could be added, as the rest of a clause.

    Simulated curves with kinks and steps were told apart falsely in a quarter of findings without
    added scales, and in 1 of 192 with the default number.
    """
    extra = int(str(report.settings.get("extra_scales", 0)))
    if extra >= DetoxConfig.model_fields["extra_scales"].default:
        if not _is_adapted(report):
            return ""
        return " if the curves of adaptations are smooth between their steps"
    return (
        f" if all curves are smooth between the scales: with extra_scales {extra} a bend between "
        "two scales can go unseen, and make a finding wrong more often"
    )


def _of_looks(report: DetoxReport) -> str:
    """A sentence on the steps of adaptations, of which there are no others."""
    if not _is_adapted(report):
        return ""
    return " An adaptation was looked at after the given steps alone, all of them of one run."


def _is_adapted(report: DetoxReport) -> bool:
    return any(p.unit == "step" for points in report.curves.values() for p in points)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" + " ---: |" * (len(columns) - 1)]
    return head + ["| " + " | ".join(row) + " |" for row in rows]


def _paid(x: Interval | None) -> str:
    if x is None:
        return "not reached"
    if x.low is None or x.high is None:
        return f"{x.value:+.3f}"
    return f"{x.value:+.3f} [{x.low:+.3f}, {x.high:+.3f}]"


def _difference(c: Comparison) -> str:
    if c.difference is None:
        return "not comparable"
    ratio = f", ratio {c.ratio:.2f}" if c.ratio is not None else ""
    grid = f", grid {c.grid:.3f}" if c.grid is not None else ""
    unresolved = ", too little data" if c.verdict == "too little data" else ""
    return f"{_paid(c.difference)}{ratio}{grid}{unresolved}"


def _share(x: Interval) -> str:
    if x.low is None or x.high is None:
        return f"{x.value:.1%}"
    return f"{x.value:.1%} [{x.low:.1%}, {x.high:.1%}]"
