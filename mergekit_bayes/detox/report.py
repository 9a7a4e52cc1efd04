"""The report of a removal: all numbers, and in words what follows from them."""

from mergekit_bayes import __version__
from mergekit_bayes.detox.comparisons import Comparison, Finding, Payment
from mergekit_bayes.detox.evidence import remedy
from mergekit_bayes.detox.settings import HELD_OUT, Unit
from mergekit_bayes.metrics.perplexity import PerplexityReport
from mergekit_bayes.metrics.quality import JudgedReport, SamplesReport
from mergekit_bayes.metrics.toxicity import ToxicityReport
from mergekit_bayes.records import Record

_EFFECTS = {
    "there": "The effect is there",
    "reversed": "The effect is reversed",
    "mixed": "The effect is mixed",
    "not there": "The effect is not there",
    "too little data": "Too little data",
}


class Point(Record):
    """One model on a curve.

    Attributes:
        scale: How much was subtracted, or after how many steps of an adaptation; 0 is the base.
        unit: Which of both it is.
        toxicity: Toxicity by scorer.
        perplexity: Perplexity by text.
        samples: What the continuations look like.
        judged: Their perplexity under the judge of the evaluation, if it has one.
        guarded_share: Share of the merged entries where the guard acted; None without a guard.
        largest_multiplier: The merge's largest multiplier of a change; None without a guard.
        precision_ratio: Sum of the task's likelihood precision over the base's, with its count.
        seconds: Time that making it took, with what it is made of but without the evaluation; a
            look at an adaptation takes its share of the run. None if that is not known.
        passes: Examples that this sent through a model.
        command: The command that makes this model again; it lacks the output.
    """

    scale: float
    unit: Unit = "scale"
    toxicity: dict[str, ToxicityReport]
    perplexity: dict[str, PerplexityReport]
    samples: SamplesReport | None = None
    judged: JudgedReport | None = None
    guarded_share: float | None = None
    largest_multiplier: float | None = None
    precision_ratio: float | None = None
    seconds: float | None = None
    passes: int | None = None
    command: str | None = None


class KeptModel(Record):
    """The candidate that is kept.

    Attributes:
        path: Its folder.
        curve: The label of its curve.
        scale: As in `Point`.
        unit: As in `Point`.
        level: The toxic share by the first scorer that it had to reach.
        command: The command that makes it again.
    """

    path: str
    curve: str
    scale: float
    unit: Unit = "scale"
    level: float
    command: str


def in_words(unit: Unit, place: float) -> str:
    """Where a model lies on its curve."""
    return f"scale -{place:g}" if unit == "scale" else f"step {place:g}"


class DetoxReport(Record):
    """All numbers of a removal, with settings, versions and identities.

    Attributes:
        version: Version of this package.
        path: The output folder.
        settings: The config as JSON.
        versions: Versions of the libraries and of Python.
        identities: Content hashes of the base and of all data.
        toxic_model: The model fine-tuned on the toxic text; None if no method subtracts it.
        base_precision: Where the base's precision is; None if no method needs it.
        scorers: Which scorers were used.
        base: The base's numbers.
        curves: The candidates' numbers by curve, in the order of the scales or steps.
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
    toxic_model: str | None
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

    def level_of_most(self, scorer: str) -> float | None:
        """The toxic share by this scorer that most curves reach, and of several the lowest.

        If all curves reach one, it is `lowest_common_level`. None if no curve reaches any.
        """
        reached = {
            payment.level: sum(paid is not None for paid in payment.paid.values())
            for payment in self.matched
            if payment.axis == scorer
        }
        most = max(reached.values(), default=0)
        return min(level for level, count in reached.items() if count == most) if most else None

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
