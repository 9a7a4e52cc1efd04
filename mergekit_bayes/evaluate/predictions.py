"""Measure how well a model predicts texts and labels: at the mean, and over posterior samples."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from mergekit_bayes.evaluate.report import SampledReport, StepProgress
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.evaluate.texts import Examples
from mergekit_bayes.heads import head_of
from mergekit_bayes.metrics.base import Draws
from mergekit_bayes.metrics.classification import (
    ClassificationReport,
    classification_change,
    measure_classification,
)
from mergekit_bayes.metrics.perplexity import PerplexityReport, loss_change, measure_perplexity
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.mixed_draws import MixtureDraws
from mergekit_bayes.models.sampling import PosteriorDraws


class Predictions(NamedTuple):
    """The reports of all sets, by name."""

    perplexity: dict[str, PerplexityReport]
    classification: dict[str, ClassificationReport]


def predict(
    config: EvaluateConfig,
    loaded: Loaded,
    texts: Mapping[str, list[str]],
    examples: Mapping[str, Examples],
    draws: Draws,
    tell: StepProgress,
    *,
    suffix: str = "",
) -> Predictions:
    """Measure perplexity on all texts and classification on all labelled texts.

    Args:
        config: The settings of the metrics.
        loaded: The model; its tokenizer must be able to start a document if there are texts.
        texts: The documents of each set.
        examples: The labelled texts of each set.
        draws: Weights to average over.
        tell: Called with (step, done, of).
        suffix: Ends the names of the steps.
    """
    perplexity = {
        name: measure_perplexity(
            loaded.model,
            loaded.tokenizer,
            documents,
            start=loaded.start,
            window=config.window or loaded.context,
            stride=config.stride,
            concatenate=config.concatenate,
            batch_size=config.batch_size,
            bootstrap=config.bootstrap,
            seed=config.seed,
            draws=draws,
            progress=partial(tell, f"perplexity of {name}{suffix}"),
        )
        for name, documents in texts.items()
    }
    classification = {
        name: measure_classification(
            loaded.model,
            loaded.tokenizer,
            labelled.texts,
            labelled.classes,
            max_length=loaded.context,
            batch_size=config.batch_size,
            bins=config.bins,
            bootstrap=config.bootstrap,
            seed=config.seed,
            draws=draws,
            progress=partial(tell, f"classification of {name}{suffix}"),
        )
        for name, labelled in examples.items()
    }
    return Predictions(perplexity, classification)


def predict_sampled(
    config: EvaluateConfig,
    loaded: Loaded,
    texts: Mapping[str, list[str]],
    examples: Mapping[str, Examples],
    draws: PosteriorDraws | MixtureDraws,
    at_mean: Predictions,
    tell: StepProgress,
) -> SampledReport:
    """Measure the same over posterior samples, and the change from the mean.

    The arguments are those of `predict`, which gave `at_mean` without the draws. The model has its
    mean weights again afterwards.
    """
    with draws:
        averaged = predict(
            config, loaded, texts, examples, draws, tell, suffix=f", {len(draws)} samples"
        )
    resampling = {"bootstrap": config.bootstrap, "seed": config.seed}
    return SampledReport(
        draws=draws.report,
        perplexity=averaged.perplexity,
        classification=averaged.classification,
        loss_change={
            name: loss_change(at_mean.perplexity[name], report, **resampling)
            for name, report in averaged.perplexity.items()
        },
        classification_change={
            name: classification_change(at_mean.classification[name], report, **resampling)
            for name, report in averaged.classification.items()
        },
    )


def label_reading(loaded: Loaded) -> str:
    """How the outputs of a classifier of one label are read, and what says so."""
    head = head_of(loaded.model.config)
    reason = head.reason if head.likelihood else f"assumed: {head.reason}; each text has one"
    return f"softmax: {reason}"
