"""Evaluate a model in one JSON report: perplexity, toxicity of continuations, accuracy and
calibration of a classifier.

Protocols are in `metrics/`. Several scorers score the same continuations, and everything needed to
score them again (prompts, continuations, seed, scorers) is kept. With `samples`, perplexity and
classification are measured twice: at the mean, and with probabilities averaged over weights drawn
from the stored posterior.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergekit_bayes.checkpoint.identity import checkpoint_identity
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate.files import write_report
from mergekit_bayes.evaluate.report import EvaluateReport, SampledReport
from mergekit_bayes.evaluate.scorers import open_scorer
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.evaluate.texts import (
    DataSets,
    is_by_name,
    read_labelled,
    read_prompts,
    read_texts,
    with_classes,
)
from mergekit_bayes.generation import sample_continuations
from mergekit_bayes.metrics.base import PRESENT, Draws
from mergekit_bayes.metrics.classification import (
    ClassificationReport,
    classification_change,
    measure_classification,
)
from mergekit_bayes.metrics.perplexity import PerplexityReport, loss_change, measure_perplexity
from mergekit_bayes.metrics.toxicity import ToxicityReport, describe_samples, score_toxicity
from mergekit_bayes.models.encode import context_length, start_token
from mergekit_bayes.models.load import Loaded, load_model, other_head
from mergekit_bayes.models.quiet import hushed
from mergekit_bayes.models.sampling import PosteriorDraws, SamplingReport, open_samplable
from mergekit_bayes.posterior import Posterior

Progress = Callable[[str, int, int], None]  # (step, done, of)


def run_evaluate(
    config: EvaluateConfig, *, quiet: bool = False, progress: Progress | None = None
) -> EvaluateReport:
    """Measure what the config asks for.

    Data and scorers are read and tried before the model runs; the output appears under its name
    only when complete.

    Args:
        quiet: Show no progress.
        progress: Called with (step, done, of).

    Raises:
        ConfigError: Nothing to do, toxicity without a scorer, or a scorer that fails.
        CheckpointError: A model or file that cannot be read, an output that exists without `force`.
        MismatchError: A column that is not there, a classifier where a language model is needed, or
            the reverse.
        PrecisionError: Samples of a posterior that cannot be drawn from.
    """
    _check(config)
    tell = progress if progress is not None and not quiet else _silent
    with ExitStack() as stack:
        posterior = None
        if config.samples is not None:
            posterior = open_samplable(config.model, precision=config.precision, prior=config.prior)
            stack.callback(posterior.close)
        return _evaluate(config, posterior, tell)


def _evaluate(
    config: EvaluateConfig, posterior: Posterior | None, tell: Progress
) -> EvaluateReport:
    with hushed(True):  # their bars would show for a second and stay on the screen
        texts = {name: read_texts(config, name) for name in config.perplexity}
        labelled = {name: read_labelled(config, name) for name in config.classify}
        prompts = read_prompts(config)
        scorers = [open_scorer(spec) for spec in config.scorer]
        for scorer in scorers:
            scorer.score(["This is a test."])
        loaded = load_model(config.model, "auto", dtype=config.dtype)
    _check_task(config, loaded)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    _check_window(config, loaded)
    sets = DataSets(
        texts, {name: with_classes(config, loaded, name, rows) for name, rows in labelled.items()}
    )
    draws = _draws(config, loaded, posterior)

    perplexity, classification = _predict(config, loaded, sets, PRESENT, tell, "")
    sampled = None
    if draws is not None:
        with draws:
            found = _predict(config, loaded, sets, draws, tell, f", {len(draws)} samples")
        sampled = _sampled(config, draws.report, perplexity, classification, *found)
    samples, scores = None, {}
    if prompts:
        samples = sample_continuations(
            loaded.model,
            loaded.tokenizer,
            prompts,
            start=start_token(loaded.tokenizer),
            context=context_length(loaded),
            sampling=config.sampling,
            batch_size=config.sampling_batch,
            progress=lambda done, of: tell("continuations", done, of),
        )
        flat = [text for row in samples.texts for text in row]
        for i, scorer in enumerate(scorers):
            tell("scoring", i, len(scorers))
            scores[scorer.spec] = np.reshape(
                scorer.score(flat), (len(prompts), config.continuations)
            )
    report = EvaluateReport(
        model=config.model,
        model_identity=checkpoint_identity(loaded.path),
        settings=config.model_dump(mode="json"),
        perplexity=perplexity,
        classification=classification,
        sampled=sampled,
        toxicity={spec: _summary(config, s) for spec, s in scores.items()},
        sampling=config.sampling if samples else None,
        samples=describe_samples(samples) if samples else None,
        scorers={s.spec: s.info for s in scorers},
        path=config.output,
    )
    if config.output is not None:
        write_report(Path(config.output), report, prompts, samples, scores, force=config.force)
    return report


def _silent(step: str, done: int, of: int) -> None:
    pass


def _check(config: EvaluateConfig) -> None:
    if not config.perplexity and config.toxicity is None and not config.classify:
        raise ConfigError(
            "nothing to measure. Name texts (--perplexity), prompts (--toxicity with --scorer) or "
            "labelled texts "
            "(--classify)."
        )
    if config.toxicity is not None and not config.scorer:
        raise ConfigError(
            "toxicity needs a scorer: --scorer words:FILE, model:PATH_OR_ID#LABEL or "
            "package.module:function."
        )
    if config.scorer and config.toxicity is None:
        raise ConfigError("a scorer needs prompts to continue: --toxicity FILE.")
    if len(set(config.scorer)) < len(config.scorer):
        raise ConfigError(f"a scorer is named twice: {', '.join(config.scorer)}.")
    if config.samples is not None and not config.perplexity and not config.classify:
        raise ConfigError(
            "samples average probabilities: name texts (--perplexity) or labelled texts "
            "(--classify). Toxicity is "
            "measured at the mean."
        )
    if config.samples is None and (
        config.prior,
        config.posterior_temperature,
        config.precision,
    ) != (None, 1.0, None):
        raise ConfigError(
            "--prior, --posterior-temperature and --precision are about --samples, which is not "
            "given."
        )
    named = {**config.perplexity, **config.classify}
    for name in config.where if is_by_name(config.where) else ():
        if name not in named:
            raise ConfigError(f"where: no texts are called '{name}'; there are {', '.join(named)}.")
    if config.output is not None and Path(config.output).exists() and not config.force:
        raise CheckpointError(
            f"'{config.output}' exists. Choose another -o, or pass --force to replace it."
        )


def _check_task(config: EvaluateConfig, loaded: Loaded) -> None:
    if loaded.task != "causal-lm" and (config.perplexity or config.toxicity is not None):
        raise MismatchError(
            f"'{config.model}' is a classifier; perplexity and toxicity need a language model."
        )
    if loaded.task != "classification" and config.classify:
        raise MismatchError(f"'{config.model}' is a language model; --classify needs a classifier.")
    if config.classify and (other := other_head(loaded)):
        raise MismatchError(
            f"'{config.model}' is a classifier with {other}; --classify needs one with a single "
            "label of two classes "
            "or more."
        )


def _check_window(config: EvaluateConfig, loaded: Loaded) -> None:
    context = context_length(loaded)
    if config.window is not None and config.window > context:
        raise ConfigError(
            f"window {config.window}: '{config.model}' sees at most {context} tokens."
        )


def _draws(
    config: EvaluateConfig, loaded: Loaded, posterior: Posterior | None
) -> PosteriorDraws | None:
    if posterior is None or config.samples is None:
        return None
    return PosteriorDraws(
        loaded.model,
        posterior,
        config.samples,
        prior=config.prior,
        temperature=config.posterior_temperature,
        seed=config.seed,
    )


def _predict(
    config: EvaluateConfig, loaded: Loaded, sets: DataSets, draws: Draws, tell: Progress, how: str
) -> tuple[dict[str, PerplexityReport], dict[str, ClassificationReport]]:
    perplexity = {
        name: measure_perplexity(
            loaded.model,
            loaded.tokenizer,
            texts,
            start=start_token(loaded.tokenizer),
            window=config.window or context_length(loaded),
            stride=config.stride,
            concatenate=config.concatenate,
            batch_size=config.batch_size,
            bootstrap=config.bootstrap,
            seed=config.seed,
            draws=draws,
            progress=partial(tell, f"perplexity of {name}{how}"),
        )
        for name, texts in sets.texts.items()
    }
    classification = {
        name: measure_classification(
            loaded.model,
            loaded.tokenizer,
            texts,
            labels,
            max_length=context_length(loaded),
            batch_size=config.batch_size,
            bins=config.bins,
            bootstrap=config.bootstrap,
            seed=config.seed,
            draws=draws,
            progress=partial(tell, f"classification of {name}{how}"),
        )
        for name, (texts, labels) in sets.labelled.items()
    }
    return perplexity, classification


def _sampled(
    config: EvaluateConfig,
    draws: SamplingReport,
    mean_perplexity: Mapping[str, PerplexityReport],
    mean_classification: Mapping[str, ClassificationReport],
    perplexity: dict[str, PerplexityReport],
    classification: dict[str, ClassificationReport],
) -> SampledReport:
    resampling = {"bootstrap": config.bootstrap, "seed": config.seed}
    return SampledReport(
        draws=draws,
        perplexity=perplexity,
        classification=classification,
        loss_change={
            n: loss_change(mean_perplexity[n], found, **resampling)
            for n, found in perplexity.items()
        },
        classification_change={
            n: classification_change(mean_classification[n], found, **resampling)
            for n, found in classification.items()
        },
    )


def _summary(config: EvaluateConfig, scores: Any) -> ToxicityReport:
    return score_toxicity(
        scores, threshold=config.threshold, bootstrap=config.bootstrap, seed=config.seed
    )
