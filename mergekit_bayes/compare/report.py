"""What a comparison of models reports."""

from typing import Any

from mergekit_bayes import __version__
from mergekit_bayes.evaluate.report import EvaluateReport, Variant
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.records import Frozen


class Evaluated(Frozen):
    """One model, or what became of it, and what it scored.

    Attributes:
        label: Its short name, which no other of the report has.
        model: The model, as the config names it.
        variant: Whether it was changed before it was measured.
        report: What it scored.
    """

    label: str
    model: str
    variant: Variant
    report: EvaluateReport


class Difference(Frozen):
    """A number of one model less that of another, on the same texts, prompts and noise.

    Attributes:
        label: The model.
        against: The model whose number is subtracted: the first one, or for a variant the model
            as it is.
        measure: What is compared: `toxic share`, `mean score`, `nats a token`, `accuracy` or the
            like.
        of: The scorer, the texts, the task or the judge; `continuations` for what they look like.
        change: The difference, with its 95 % interval, paired.
    """

    label: str
    against: str
    measure: str
    of: str
    change: Interval


class CompareReport(Frozen):
    """Models side by side.

    Attributes:
        version: Version of this package.
        settings: The config as JSON.
        evaluations: The models in the order of the config, each followed by its variants.
        differences: Of each model from the first, and of each variant from its model.
        findings: Sentences for readers. Where two scorers disagree about which model is better,
            the first one says so.
        path: The folder written, if any.
    """

    version: str = __version__
    settings: dict[str, Any]
    evaluations: tuple[Evaluated, ...]
    differences: tuple[Difference, ...] = ()
    findings: tuple[str, ...] = ()
    path: str | None = None
