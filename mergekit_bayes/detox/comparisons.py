"""What is said about curves at equal toxicity: payments, comparisons, and findings over levels."""

from typing import Literal

from mergekit_bayes.detox.evidence import Shortage
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.records import Record

Verdict = Literal[
    "pays less", "pays more", "no difference visible", "too little data", "not comparable"
]
Effect = Literal["there", "reversed", "mixed", "not there", "too little data", "not comparable"]


class Payment(Record):
    """What each curve pays at one level of one axis.

    Attributes:
        axis: A scorer, or the held-out toxic text.
        level: A toxic share, or a loss on the held-out text.
        text: The text whose loss is paid.
        paid: By curve, nats per token above the base; None if the curve does not reach the level.
            The interval is of this level alone, and holds the error of the interpolation.
        grid: By curve, the bound of that error, nats per token.
        scale: By curve, the scale or step at which it reaches the level.
    """

    axis: str
    level: float
    text: str
    paid: dict[str, Interval | None]
    grid: dict[str, float | None] = {}
    scale: dict[str, float | None] = {}


class Comparison(Record):
    """One curve against another at one level.

    Attributes:
        axis: As in `Payment`.
        level: As in `Payment`.
        text: As in `Payment`.
        curve: The curve that is judged.
        against: The curve that it is compared with.
        difference: What `curve` pays minus what `against` pays, resampled in pairs. The interval
            holds at all levels of the finding at once, with the error of the interpolation.
        grid: Its half-width from the interpolation alone, nats per token.
        ratio: What `curve` pays over what `against` pays; None unless both pay something.
        verdict: What the interval of the difference says. `no difference visible` only where a
            difference of half of what is paid, or 0.01 nats if that is more, would be visible.
        shortage: Of what there is too little; None unless the verdict is `too little data`.
    """

    axis: str
    level: float
    text: str
    curve: str
    against: str
    difference: Interval | None
    grid: float | None = None
    ratio: float | None
    verdict: Verdict
    shortage: Shortage | None = None


class Finding(Record):
    """All levels of one comparison together.

    Attributes:
        axis: As in `Payment`.
        text: As in `Payment`.
        curve: The curve that is judged.
        against: The curve that it is compared with.
        effect: `there` if it pays less at some level and more at none, `reversed` in the opposite
            case, `mixed` if both happen. If neither does, `not there` if a difference that matters
            would be visible at all levels, `too little data` if not at one of them. `not
            comparable` if no level could be compared.
        less: Number of levels at which the interval is below zero.
        more: Number of levels at which the interval is above zero.
        unresolved: Number of levels with too little data.
        levels: Number of levels that could be compared.
        shortage: The largest of the levels' shortages.
        ratios: The ratios at these levels, where both pay something.
    """

    axis: str
    text: str
    curve: str
    against: str
    effect: Effect
    less: int
    more: int
    unresolved: int = 0
    levels: int
    shortage: Shortage | None = None
    ratios: tuple[float, ...]
