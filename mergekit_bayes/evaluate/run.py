"""Evaluate a model: perplexity, toxicity of continuations, and calibration, in one JSON report.

The protocols are in `metrics/`. Several scorers score the same continuations, and everything needed
to score them again (prompts, continuations, seed, scorers) is kept. With `samples`, perplexity and
classification are measured twice: at the mean, and with probabilities averaged over weights drawn
from the stored posterior.

Under a launcher all ranks share the batches, and each number is that of one process.
"""

from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.checkpoint.identity import checkpoint_identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.stamps import Stamp, refuse_changed, stamps_of
from mergekit_bayes.evaluate.continuations import (
    Continuations,
    agreement_of_scorers,
    score_continuations,
    toxicity_by_scorer,
)
from mergekit_bayes.evaluate.files import write_report
from mergekit_bayes.evaluate.inputs import Inputs, read_inputs
from mergekit_bayes.evaluate.lm_eval import measure_tasks
from mergekit_bayes.evaluate.predictions import label_reading, predict, predict_sampled
from mergekit_bayes.evaluate.refusals import refuse_model, refuse_settings
from mergekit_bayes.evaluate.report import EvaluateReport, StepProgress, Variant
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.evaluate.texts import Examples, number_classes
from mergekit_bayes.metrics.base import PRESENT
from mergekit_bayes.metrics.quality import describe_judged, describe_samples
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.models.mixed_draws import MixtureDraws, open_samplable_components
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.models.sampling import PosteriorDraws, open_samplable
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.mixture import OpenComponent
from mergekit_bayes.ranks import is_main, join, main_first, on_main

if TYPE_CHECKING:
    import torch


def run_evaluate(
    config: EvaluateConfig, *, quiet: bool = False, progress: StepProgress | None = None
) -> EvaluateReport:
    """Measure what the config asks for.

    Data and scorers are read and tried before the model runs. The output appears under its name
    only when it is complete. Under a launcher every rank calls this and gets the same numbers, or
    the same error; rank 0 tells and writes.

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
    join(config.num_processes)
    main_first(lambda: refuse_settings(config))
    tell = progress if progress is not None and not quiet and is_main() else _ignore
    with quiet_libraries(bars=False):  # `progress` tells
        evaluation = evaluate_model(config, main_first(lambda: read_inputs(config)), tell)
    if config.output is not None:
        output = Path(config.output)
        on_main(lambda: write_report(output, *evaluation, force=config.force))
    return evaluation.report


class Evaluation(NamedTuple):
    """What was measured of a model, and what it wrote, if it was asked to."""

    report: EvaluateReport
    continuations: Continuations | None


class Change(NamedTuple):
    """What is made of a loaded model before it is measured.

    Attributes:
        variant: What the report calls the result.
        make: Changes the model in place; of a model as it is, only refuses it.
    """

    variant: Variant
    make: Callable[[Loaded], None]


def evaluate_model(
    config: EvaluateConfig,
    inputs: Inputs,
    tell: StepProgress,
    change: Change | None = None,
) -> Evaluation:
    """Measure one model, and write nothing.

    Args:
        config: The model, and what to measure; checked by `refuse_settings`.
        inputs: What `read_inputs` read by the same settings.
        tell: Called with (step, done, of).
        change: What to make of the loaded model first, if anything. Every rank of a launcher makes
            it, and must get the same weights.

    Raises:
        BmergeError: As `run_evaluate`.
    """
    variant: Variant = "as it is" if change is None else change.variant
    with ExitStack() as stack:
        opened = main_first(lambda: _open(config, inputs, stack))
        loaded, examples = opened.loaded, opened.examples
        if change is not None:
            change.make(loaded)
        draws = main_first(lambda: _draws(config, opened))

        at_mean = predict(config, loaded, inputs.texts, examples, PRESENT, tell)
        sampled = None
        if draws is not None:
            sampled = predict_sampled(config, loaded, inputs.texts, examples, draws, at_mean, tell)
        continuations = score_continuations(
            config, loaded, inputs.prompts, inputs.scorers, inputs.judge, tell
        )
        task_reports = measure_tasks(config, loaded, inputs.tasks, tell)
        model_identity = on_main(lambda: _identity(opened))
        if variant != "as it is":
            model_identity = sha256(f"{model_identity} {variant}".encode()).hexdigest()

    judged = continuations.judged if continuations else None
    resampling = {"bootstrap": config.bootstrap, "seed": config.seed}
    report = EvaluateReport(
        model=config.model,
        variant=variant,
        model_identity=model_identity,
        settings=config.model_dump(mode="json"),
        device=str(loaded.device),
        dtype=loaded.dtype,
        perplexity=at_mean.perplexity,
        classification=at_mean.classification,
        label_reading=label_reading(loaded) if config.classify else None,
        sampled=sampled,
        toxicity=toxicity_by_scorer(config, inputs.scorers, continuations) if continuations else {},
        agreement=agreement_of_scorers(config, inputs.scorers, continuations)
        if continuations
        else (),
        bias=inputs.bias if continuations else {},
        sampling=config.sampling if continuations else None,
        samples=describe_samples(continuations.samples, **resampling) if continuations else None,
        judged=describe_judged(judged, **resampling) if judged else None,
        judge=inputs.judge.info if judged and inputs.judge else None,
        scorers={scorer.spec: scorer.info for scorer in inputs.scorers},
        lm_eval=task_reports,
        path=config.output,
    )
    return Evaluation(report, continuations)


class _Opened(NamedTuple):
    """A model at its device, and what is read beside it.

    Attributes:
        loaded: The model.
        posterior: Its posterior, to draw weights from; None without `samples`.
        components: Those of a mixture, to draw from instead; else none.
        examples: The labelled texts with the model's numbers of their classes.
        read: Stamps of the files that were read.
    """

    loaded: Loaded
    posterior: Posterior | None
    components: tuple[OpenComponent, ...]
    examples: dict[str, Examples]
    read: dict[Path, Stamp]


def _open(config: EvaluateConfig, inputs: Inputs, stack: ExitStack) -> _Opened:
    """Load the model; the stack keeps its posterior open."""
    posterior: Posterior | None = None
    components: tuple[OpenComponent, ...] = ()
    if config.samples is not None:
        precision, prior = config.precision, config.prior
        posterior = stack.enter_context(
            open_samplable(config.model, precision=precision, prior=prior)
        )
        components = open_samplable_components(posterior, stack, precision=precision, prior=prior)
    loaded = load_model(
        config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    refuse_model(config, loaded)
    if config.samples is not None:
        _keep_draws(loaded.model)
    read = stamps_of(checkpoint_files(loaded.path))
    if posterior is not None:
        read |= posterior.inputs
    for component in components:
        read |= component.posterior.inputs
    loaded.move_to(config.device)
    examples = number_classes(config, inputs.labelled, loaded)
    return _Opened(loaded, posterior, components, examples, read)


def _draws(config: EvaluateConfig, opened: _Opened) -> PosteriorDraws | MixtureDraws | None:
    """The draws around the model's present weights, where any are asked for.

    Those of a mixture are around the weights of its components.
    """
    if opened.posterior is None or config.samples is None:
        return None
    if opened.components:
        return MixtureDraws(
            opened.loaded.model,
            opened.components,
            config.samples,
            prior=config.prior,
            temperature=config.posterior_temperature,
            seed=config.seed,
        )
    return PosteriorDraws(
        opened.loaded.model,
        opened.posterior,
        config.samples,
        prior=config.prior,
        temperature=config.posterior_temperature,
        seed=config.seed,
    )


def _identity(opened: _Opened) -> str:
    """The checkpoint's identity, where no file of it has changed since it was loaded."""
    identity = checkpoint_identity(opened.loaded.path)
    # The libraries map the file into memory, so that what is written to it is in the model.
    refuse_changed(opened.read)
    return identity


def _keep_draws(model: "torch.nn.Module") -> None:
    """Give the parameters a dtype that does not round the draws away: float32, or wider."""
    if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters()):
        model.float()


def _ignore(step: str, done: int, of: int) -> None:
    pass
