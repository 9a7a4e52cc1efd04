"""The report of a removal: one document for programs (JSON) and one for readers (Markdown)."""

from collections.abc import Sequence

from mergekit_bayes import __version__
from mergekit_bayes.detox.analysis import Comparison, Finding, Payment
from mergekit_bayes.detox.evidence import remedy
from mergekit_bayes.detox.settings import HELD_OUT, DetoxConfig
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.metrics.perplexity import PerplexityReport
from mergekit_bayes.metrics.toxicity import SamplesReport, ToxicityReport
from mergekit_bayes.records import Record

_EFFECTS = {
    "there": "The effect is there",
    "reversed": "The effect is reversed",
    "mixed": "The effect is mixed",
    "not there": "The effect is not there",
    "too little data": "Too little data",
}
_PAID = (
    "Nats a token, with 95 % intervals of each alone, which hold the error of the interpolation "
    "between scales."
)
_DIFFERENCES = (
    "Differences, paired over prompts and documents; the intervals of a column hold at all of its "
    "levels together with 95 %. `grid` is their half-width from the interpolation alone."
)


class Point(Record):
    """One model on a curve.

    Attributes:
        scale: How much was subtracted; 0 is the base.
        toxicity: Toxicity by scorer.
        perplexity: Perplexity by text.
        samples: What the continuations look like.
        guarded_share: Share of the merged entries where the guard acted; None without a guard.
        largest_multiplier: The merge's largest multiplier of a change; None without a guard.
        precision_ratio: Sum of the task's likelihood precision over the base's, with its count.
        command: The command that makes this model again.
    """

    scale: float
    toxicity: dict[str, ToxicityReport]
    perplexity: dict[str, PerplexityReport]
    samples: SamplesReport | None = None
    guarded_share: float | None = None
    largest_multiplier: float | None = None
    precision_ratio: float | None = None
    command: str | None = None


class KeptModel(Record):
    """The candidate that is kept.

    Attributes:
        path: Its folder.
        curve: The label of its curve.
        scale: How much was subtracted.
        level: The toxic share by the first scorer that it had to reach.
        command: The command that makes it again.
    """

    path: str
    curve: str
    scale: float
    level: float
    command: str


class DetoxReport(Record):
    """All numbers of a removal, with settings, versions and identities.

    Attributes:
        version: Version of this package.
        path: The output folder.
        settings: The config as JSON.
        versions: Versions of the libraries and of Python.
        identities: Content hashes of the base and of all data.
        toxic_model: The model fine-tuned on the toxic text.
        base_precision: Where the base's precision is; None if no method needs it.
        scorers: Which scorers were used.
        base: The base's numbers.
        curves: The candidates' numbers by curve, in the order of the scales.
        matched: What each curve pays at each level.
        comparisons: Pairs of curves at each level.
        findings: Pairs of curves over all levels.
        kept: The chosen candidate, whose model is kept; None if no candidate reaches a level.
    """

    version: str = __version__
    path: str
    settings: dict[str, object]
    versions: dict[str, str]
    identities: dict[str, object]
    toxic_model: str
    base_precision: str | None
    scorers: dict[str, dict[str, object]]
    base: Point
    curves: dict[str, tuple[Point, ...]]
    matched: tuple[Payment, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    findings: tuple[Finding, ...] = ()
    kept: KeptModel | None = None

    def lowest_common_level(self, scorer: str) -> float | None:
        """The lowest toxic share by this scorer that all curves reach, if there is one."""
        levels = [
            payment.level
            for payment in self.matched
            if payment.axis == scorer and all(paid is not None for paid in payment.paid.values())
        ]
        return min(levels, default=None)

    def chosen(self, scorer: str) -> tuple[float | None, dict[str, Point]]:
        """The candidate of each curve that is compared in short summaries.

        Args:
            scorer: The scorer whose toxic shares are compared.

        Returns:
            The lowest level that all curves reach, and the first candidate of each curve there.
            Without such a level, None and the last candidate of each curve.
        """
        level = self.lowest_common_level(scorer)
        if level is None:
            return None, {label: points[-1] for label, points in self.curves.items()}
        return level, {
            label: next(p for p in points if p.toxicity[scorer].share.value <= level)
            for label, points in self.curves.items()
        }

    def best(self) -> tuple[str, Point, float] | None:
        """The candidate to keep.

        By the first scorer, among the candidates that are at most as toxic as the lowest level that
        all curves reach (else the lowest that any candidate reaches), it is the one of lowest
        perplexity on the first text.

        Returns:
            The label of its curve, the candidate and the level; None if no level is reached.
        """
        scorer = next(iter(self.base.toxicity), None)
        text = next((name for name in self.base.perplexity if name != HELD_OUT), None)
        if scorer is None or text is None:
            return None
        points = [(label, p) for label, points in self.curves.items() for p in points]
        common = self.lowest_common_level(scorer)
        levels = sorted({m.level for m in self.matched if m.axis == scorer})
        for level in levels if common is None else [common]:
            reaching = [x for x in points if x[1].toxicity[scorer].share.value <= level]
            if reaching:
                label, point = min(reaching, key=lambda x: x[1].perplexity[text].token.value)
                return label, point, level
        return None


def as_markdown(report: DetoxReport) -> str:
    """The text of `report.md`: the findings, the tables behind them, and how they were made."""
    base, texts = report.base, _texts(report)
    parts = ["# Removing toxicity: what each method pays", "![](toxicity_vs_perplexity.png)"]
    lines = verdicts(report) or ["Nothing could be compared."]
    parts += ["## Findings", "\n".join(f"- {line}" for line in lines)]
    parts += ["## The model that is kept", _kept(report)]
    for axis in dict.fromkeys(m.axis for m in report.matched):
        parts += [_matched_table(report, axis, text) for text in texts]
    for scorer in base.toxicity:
        parts += [_curves_table(report, scorer)]
    parts += [_garbled(report), _how(report)]
    return "\n\n".join(parts) + "\n"


def verdicts(report: DetoxReport) -> list[str]:
    """One sentence or two for each finding; what they say follows from the intervals."""
    return [*_without_toxic(report), *(_verdict(report, f) for f in report.findings)]


def _verdict(report: DetoxReport, f: Finding) -> str:
    axis = f"loss on {f.axis}" if f.axis == HELD_OUT else f"toxic share by {f.axis}"
    what = f"{f.curve} against {f.against}, {f.text}, at equal {axis}"
    if not f.levels:
        missing = [label for label in (f.curve, f.against) if not _reaches(report, f, label)]
        why = f"{' and '.join(missing)} reaches none of them" if missing else "no interval"
        return f"{what}: not comparable at any level ({why})."
    clear = (
        f"less at {f.less}, more at {f.more} of {f.levels} levels (95 % interval for all levels "
        f"together clear of zero)."
    )
    if f.effect == "too little data":
        return (
            f"{_EFFECTS[f.effect]}: {what}: no difference is visible, but at {f.unresolved} of "
            f"{f.levels} levels one that matters would not be.{remedy(f.shortage)}"
        )
    rest = ""
    if f.effect == "not there":
        rest = " A difference of half of what is paid (or 0.01 nats) would be visible at each."
    elif f.unresolved:
        rest = f" Too little data at {f.unresolved}.{remedy(f.shortage)}"
    return f"{_EFFECTS[f.effect]}: {what}: {clear}{rest}{_ratios(f)}{_gains(report, f)}"


def _without_toxic(report: DetoxReport) -> list[str]:
    """A sentence for each scorer that finds nothing toxic in what the base writes."""
    lines = []
    for scorer, toxicity in report.base.toxicity.items():
        if toxicity.share.value > 0:
            continue
        count = toxicity.n_continuations
        most = toxicity.share.high or min(3 / count, 1)
        lines.append(
            f"{_EFFECTS['too little data']}: {scorer} calls none of the base's {count:,} "
            f"continuations toxic, so nothing can be compared at an equal toxic share. The true "
            f"share may be up to {most:.1%} (95 %); take prompts "
            "that make it toxic, or a finer scorer."
        )
    return lines


def _kept(report: DetoxReport) -> str:
    if report.kept is None:
        return (
            "None: no candidate reaches a level of the toxic share. Take larger scales, or make "
            "one by its command."
        )
    k = report.kept
    scorer, text = next(iter(report.base.toxicity)), _texts(report)[0]
    return (
        f"`{k.path}`: {k.curve} at scale -{k.scale:g}. Of the candidates with at most "
        f"{k.level:.1%} toxic continuations by `{scorer}` it has the lowest perplexity on {text}. "
        "It was chosen by the numbers below, which therefore flatter it a little. To make it "
        "again:\n\n"
        f"```\n{k.command}\n```"
    )


def _texts(report: DetoxReport) -> list[str]:
    return [name for name in report.base.perplexity if name != HELD_OUT]


def _reaches(report: DetoxReport, f: Finding, label: str) -> bool:
    return any(
        m.paid[label] is not None for m in report.matched if (m.axis, m.text) == (f.axis, f.text)
    )


def _ratios(f: Finding) -> str:
    if not f.ratios:
        return ""
    low, high = min(f.ratios), max(f.ratios)
    shown = f"{low:.2f} to {high:.2f}" if low < high else f"{low:.2f}"
    return f" It pays {shown} of the other's loss."


def _gains(report: DetoxReport, f: Finding) -> str:
    """A sentence for the case that the loss on the text falls for both.

    A smaller gain then counts as paying more.
    """
    rows = [m.paid for m in report.matched if (m.axis, m.text) == (f.axis, f.text)]
    paid = [p[label] for p in rows for label in (f.curve, f.against)]
    return " Both gain here." if all(x.value < 0 for x in paid if x is not None) else ""


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
    columns = ["model", "scale", "toxic share", "mean score", "expected max"]
    columns += [*(f"perplexity, {n}" for n in names), "guarded", "largest multiplier"]
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
            rows.append(row)
    return "\n".join([f"## All models, scored by `{scorer}`", "", *_table(columns, rows)])


def _garbled(report: DetoxReport) -> str:
    """Numbers that show broken text, which also scores as less toxic."""
    rows = []
    for label, points in {"base": (report.base,), **report.curves}.items():
        for p in points:
            if p.samples is not None:
                s = p.samples
                shares = [f"{s.empty:.1%}", f"{s.distinct_2:.3f}", f"{s.repeated:.3f}"]
                rows.append([label, f"{p.scale:g}", f"{s.mean_tokens:.1f}", *shares])
    columns = ["model", "scale", "mean length", "empty", "distinct word pairs", "repeated pairs"]
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
        "- Scales beside the given ones were added where a curve crosses a level "
        f"(extra_scales: {report.settings.get('extra_scales', 0)}).",
        f"- bmerge {report.version}, {versions}; all settings, hashes and numbers are in "
        "report.json.",
        "",
        "To make a candidate again (other scales by `--scale`):",
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
        return ""
    return (
        f" if all curves are smooth between the scales: with extra_scales {extra} a bend between "
        "two scales can go unseen, and make a finding wrong more often"
    )


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
