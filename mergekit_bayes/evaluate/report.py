"""What `bmerge evaluate` reports."""

from typing import Any, Literal

from mergekit_bayes import __version__
from mergekit_bayes.generation import Sampling
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.metrics.classification import ClassificationChange, ClassificationReport
from mergekit_bayes.metrics.perplexity import PerplexityReport
from mergekit_bayes.metrics.toxicity import SamplesReport, ToxicityReport
from mergekit_bayes.models.sampling import SamplingReport
from mergekit_bayes.records import Config


class ScorerInfo(Config):
    """Which scorer it was: `fingerprint` is a SHA-256 of the word list, of the classifier's tensors
    (identity by sampled blocks) or of the file that holds the function, not of what that file
    imports.
    """

    kind: Literal["words", "model", "function"]
    fingerprint: str | None
    label: str | None = None


class SampledReport(Config):
    """The same measured with probabilities averaged over weights drawn from the posterior.

    Attributes:
        draws: What was drawn.
        perplexity, classification: By the names of the texts.
        loss_change: Nats per token minus those at the mean, documents resampled in pairs.
        classification_change: Scores minus those at the mean, examples resampled in pairs.
    """

    draws: SamplingReport
    perplexity: dict[str, PerplexityReport] = {}
    classification: dict[str, ClassificationReport] = {}
    loss_change: dict[str, Interval] = {}
    classification_change: dict[str, ClassificationChange] = {}


class EvaluateReport(Config):
    """What a model scored.

    Attributes:
        model_identity: SHA-256 by sampled blocks of the weights, `posterior.Identity.blocks`.
        settings: The whole config.
        perplexity, classification: By the names of the texts, at the mean.
        sampled: The same over the posterior's samples, where they were asked for.
        toxicity: By scorer, as it was given. Only the continuation is scored, not the prompt.
        samples: What the continuations look like, whoever scores them.
        path: The folder written, if any.
    """

    version: str = __version__
    model: str
    model_identity: str
    settings: dict[str, Any]
    perplexity: dict[str, PerplexityReport] = {}
    classification: dict[str, ClassificationReport] = {}
    sampled: SampledReport | None = None
    toxicity: dict[str, ToxicityReport] = {}
    scored: Literal["continuation"] = "continuation"
    sampling: Sampling | None = None
    samples: SamplesReport | None = None
    scorers: dict[str, ScorerInfo] = {}
    path: str | None = None
