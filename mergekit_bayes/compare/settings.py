"""Settings and report of models measured side by side: the contract of this package."""

from typing import Any

from pydantic import Field

from mergekit_bayes import __version__
from mergekit_bayes.evaluate.report import EvaluateReport, Variant
from mergekit_bayes.evaluate.settings import EvaluateConfig, Measures
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.records import Frozen


class CompareConfig(Measures):
    """What to measure of which models, and how: the flags of `bmerge evaluate`.

    The differences are those from the first model.
    """

    models: tuple[str, ...] = Field(
        min_length=1,
        description="Model folders, or Hub ids (org/name[@revision]). Several are measured on the "
        "same texts, prompts and noise, and compared with the first in pairs.",
    )
    four_bits: bool = Field(
        False,
        description="Also measure each model after its matrices are rounded to 4 bits, in groups "
        "of 64.",
    )
    relearn: str | None = Field(
        None,
        description="Rows of removed text: also measure each model after relearn_steps steps of "
        "training on them.",
    )
    relearn_where: dict[str, Any] = Field(
        {}, description="COLUMN=VALUE: keep the rows to relearn with this value; repeatable."
    )
    relearn_rows: int = Field(100, ge=1, description="Rows to relearn at most, from the front.")
    relearn_steps: int = Field(50, ge=1, description="Steps of relearning.")
    relearn_rate: float = Field(
        1e-4, gt=0, description="Learning rate of relearning, which AdamW does."
    )

    def evaluation(self, model: str) -> EvaluateConfig:
        """The evaluation of one of the models, without an output."""
        shared = {name: getattr(self, name) for name in Measures.model_fields}
        return EvaluateConfig(**{**shared, "model": model, "output": None})


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
        of: The scorer or the texts.
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
