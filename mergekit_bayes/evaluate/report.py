"""What `bmerge evaluate` reports."""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from mergekit_bayes import __version__
from mergekit_bayes.generation import Sampling
from mergekit_bayes.metrics.agreement import Agreement
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.metrics.classification import ClassificationChange, ClassificationReport
from mergekit_bayes.metrics.identity_terms import IdentityBias
from mergekit_bayes.metrics.perplexity import PerplexityReport
from mergekit_bayes.metrics.quality import JudgedReport, SamplesReport
from mergekit_bayes.metrics.toxicity import ToxicityReport
from mergekit_bayes.models.sampling import SamplingReport
from mergekit_bayes.records import Frozen, Record

StepProgress = Callable[[str, int, int], None]  # (step, done, of)
Variant = Literal["as it is", "in 4 bits", "relearnt"]


def _is_none(value: object) -> bool:
    return value is None


class Pin(Frozen):
    """What a panel's member was at its first use, and has to be ever since.

    Attributes:
        model: The model, as the panel names it.
        commit: The commit of a repository on the Hub; None for a folder.
        files: SHA-256 of all files that decide scores, by name: tensors, config, tokenizer, code.
    """

    model: str
    commit: str | None = None
    files: dict[str, str]


class ScorerInfo(Frozen):
    """Which scorer was used.

    Attributes:
        kind: A word list, a classifier, or a Python function.
        fingerprint: SHA-256 of the word list, of the classifier's tensors (by sampled blocks), or
            of the file that holds the function (not of what that file imports).
        label: The classifier's toxic label.
        reading: How the label's probability is read from the classifier's logits.
        reason: What decided the reading.
        threshold: From which score on a text is toxic, where a panel says it for this member; not
            in the JSON of other scorers.
        pin: Commit and hashes of a panel's member; likewise.
        commit: The commit of a classifier that is named by its Hub id; likewise.
    """

    kind: Literal["words", "model", "function"]
    fingerprint: str | None
    label: str | None = None
    reading: Literal["softmax", "sigmoid"] | None = None
    reason: str | None = None
    threshold: float | None = Field(default=None, exclude_if=_is_none)
    pin: Pin | None = Field(default=None, exclude_if=_is_none)
    commit: str | None = Field(default=None, exclude_if=_is_none)


class JudgeInfo(Frozen):
    """Under which model the continuations have a perplexity.

    Attributes:
        model: The model, as the config names it.
        fingerprint: SHA-256 of its tensors, by sampled blocks.
        context: Tokens that it reads at once.
        device: Where it ran.
        dtype: Type of its parameters.
    """

    model: str
    fingerprint: str
    context: int
    device: str
    dtype: str


class SampledReport(Frozen):
    """The predictions with probabilities averaged over weights drawn from the posterior.

    Attributes:
        draws: What was drawn.
        perplexity: Perplexities by the names of the texts.
        classification: Scores by the names of the labelled texts.
        loss_change: Nats per token minus those at the mean, documents resampled in pairs.
        classification_change: Scores minus those at the mean, examples resampled in pairs.
    """

    draws: SamplingReport
    perplexity: dict[str, PerplexityReport] = {}
    classification: dict[str, ClassificationReport] = {}
    loss_change: dict[str, Interval] = {}
    classification_change: dict[str, ClassificationChange] = {}


class TaskScore(Record):
    """One metric of a task of lm-eval.

    Attributes:
        metric: lm-eval's name of it.
        filter: The filter of the answers that were scored; `none` where they are as they came.
        score: The aggregated number, with a 95 % interval where lm-eval gives a standard error.
        higher_is_better: Whether a higher score is better; None where the task does not say.
        document_values: The number of each document, for paired comparisons; not in the JSON, and
            empty where documents have none.
    """

    metric: str
    filter: str
    score: Interval
    higher_is_better: bool | None = None
    document_values: tuple[float, ...] = Field(default=(), exclude=True, repr=False)

    @property
    def name(self) -> str:
        """The metric, with its filter where the answers were filtered."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"


class TaskReport(Frozen):
    """What a model scored on a task of lm-eval, or on a group of tasks.

    Attributes:
        scores: By metric and filter, joined by a comma, as lm-eval names them: `acc,none`.
        samples: Number of documents.
        shots: Number of examples before each question; None for groups whose tasks differ.
        task_version: The version that the task gives itself.
        lm_eval_version: The version of lm-eval.
    """

    scores: dict[str, TaskScore]
    samples: int
    shots: int | None = None
    task_version: str = ""
    lm_eval_version: str


class EvaluateReport(Frozen):
    """What a model scored.

    Attributes:
        version: Version of this package.
        model: The model, as the config names it.
        model_identity: SHA-256 by sampled blocks of the weights, `posterior.Identity.blocks`. Of a
            changed model it is a hash of that and the variant, so that no stored weights have it.
        variant: Whether the model was changed before it was measured.
        settings: The config as JSON.
        device: Where the model ran; None in reports from before it was kept.
        dtype: Type of its parameters; likewise.
        perplexity: Perplexities at the mean, by the names of the texts.
        classification: Scores at the mean, by the names of the labelled texts.
        label_reading: How the outputs of a classifier were read, and what says so.
        sampled: The same averaged over the posterior's samples, if the config asks for them.
        toxicity: Toxicity by each scorer, by the scorers' names in the config, or
            `panel:NAME/MEMBER`.
        agreement: Whether every two scorers agree on the continuations.
        bias: What each classifier among the scorers says of civil sentences that name a group.
        scored: Only the continuation is scored, not the prompt.
        sampling: How continuations were drawn.
        samples: What the continuations look like, independent of the scorers.
        judged: Their perplexity under the judge, if the config names one.
        judge: Which judge was used.
        scorers: Which scorers were used, by their names in the config.
        lm_eval: Scores on tasks of lm-eval, by their names.
        path: The folder written, if any.
    """

    version: str = __version__
    model: str
    model_identity: str
    variant: Variant = "as it is"
    settings: dict[str, Any]
    device: str | None = None
    dtype: str | None = None
    perplexity: dict[str, PerplexityReport] = {}
    classification: dict[str, ClassificationReport] = {}
    label_reading: str | None = None
    sampled: SampledReport | None = None
    toxicity: dict[str, ToxicityReport] = {}
    agreement: tuple[Agreement, ...] = ()
    bias: dict[str, IdentityBias] = {}
    scored: Literal["continuation"] = "continuation"
    sampling: Sampling | None = None
    samples: SamplesReport | None = None
    judged: JudgedReport | None = None
    judge: JudgeInfo | None = None
    scorers: dict[str, ScorerInfo] = {}
    lm_eval: dict[str, TaskReport] = {}
    path: str | None = None
