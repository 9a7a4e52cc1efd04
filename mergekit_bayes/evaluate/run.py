"""Evaluate a model: perplexity, toxicity of continuations, and calibration, in one JSON report.

The protocols are in `metrics/`. Several scorers score the same continuations, and everything needed
to score them again (prompts, continuations, seed, scorers) is kept. With `samples`, perplexity and
classification are measured twice: at the mean, and with probabilities averaged over weights drawn
from the stored posterior.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.identity import checkpoint_identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.stamps import refuse_changed, stamps_of
from mergekit_bayes.evaluate.continuations import score_continuations, toxicity_by_scorer
from mergekit_bayes.evaluate.files import write_report
from mergekit_bayes.evaluate.predictions import label_reading, predict, predict_sampled
from mergekit_bayes.evaluate.refusals import refuse_model, refuse_settings
from mergekit_bayes.evaluate.report import EvaluateReport, StepProgress
from mergekit_bayes.evaluate.scorers import open_scorers
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.evaluate.texts import (
    number_classes,
    read_labelled,
    read_prompts,
    read_texts,
)
from mergekit_bayes.metrics.base import PRESENT
from mergekit_bayes.metrics.toxicity import describe_samples
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.models.sampling import PosteriorDraws, open_samplable

if TYPE_CHECKING:
    import torch


def run_evaluate(
    config: EvaluateConfig, *, quiet: bool = False, progress: StepProgress | None = None
) -> EvaluateReport:
    """Measure what the config asks for.

    Data and scorers are read and tried before the model runs. The output appears under its name
    only when it is complete.

    Args:
        config: What to measure, and how.
        quiet: Call no `progress`.
        progress: Called with (step, done, of).

    Raises:
        ConfigError: There is nothing to measure, no scorer for toxicity, or a scorer fails.
        CheckpointError: A model or file cannot be read, the model is written to meanwhile, or the
            output exists without `force`.
        MismatchError: A column is missing, or the model is a classifier where a language model is
            needed, or the reverse.
        PrecisionError: The model's posterior cannot be drawn from.
    """
    refuse_settings(config)
    tell = progress if progress is not None and not quiet else _ignore
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries(bars=False))  # `progress` tells
        posterior = None
        if config.samples is not None:
            posterior = stack.enter_context(
                open_samplable(config.model, precision=config.precision, prior=config.prior)
            )
        texts = read_texts(config)
        labelled = read_labelled(config)
        prompts = read_prompts(config)
        scorers = open_scorers(
            config.scorer, config.device, trust_remote_code=config.trust_remote_code
        )
        loaded = load_model(
            config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
        refuse_model(config, loaded)
        if config.samples is not None:
            _keep_draws(loaded.model)
        read = stamps_of(checkpoint_files(loaded.path))
        if posterior is not None:
            read |= posterior.inputs
        loaded.move_to(config.device)
        examples = number_classes(config, labelled, loaded)
        draws = None
        if posterior is not None and config.samples is not None:
            draws = PosteriorDraws(
                loaded.model,
                posterior,
                config.samples,
                prior=config.prior,
                temperature=config.posterior_temperature,
                seed=config.seed,
            )

        at_mean = predict(config, loaded, texts, examples, PRESENT, tell)
        sampled = None
        if draws is not None:
            sampled = predict_sampled(config, loaded, texts, examples, draws, at_mean, tell)
        continuations = score_continuations(config, loaded, prompts, scorers, tell)
        model_identity = checkpoint_identity(loaded.path)
        # The libraries map the file into memory, so that what is written to it is in the model.
        refuse_changed(read)

    report = EvaluateReport(
        model=config.model,
        model_identity=model_identity,
        settings=config.model_dump(mode="json"),
        device=str(loaded.device),
        dtype=loaded.dtype,
        perplexity=at_mean.perplexity,
        classification=at_mean.classification,
        label_reading=label_reading(loaded) if config.classify else None,
        sampled=sampled,
        toxicity=toxicity_by_scorer(config, continuations) if continuations else {},
        sampling=config.sampling if continuations else None,
        samples=describe_samples(continuations.samples) if continuations else None,
        scorers={scorer.spec: scorer.info for scorer in scorers},
        path=config.output,
    )
    if config.output is not None:
        write_report(Path(config.output), report, continuations, force=config.force)
    return report


def _keep_draws(model: "torch.nn.Module") -> None:
    """Give the parameters a dtype that does not round the draws away: float32, or wider."""
    if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters()):
        model.float()


def _ignore(step: str, done: int, of: int) -> None:
    pass
