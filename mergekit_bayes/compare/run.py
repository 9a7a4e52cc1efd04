"""Measure models side by side, one at a time in memory."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from mergekit_bayes.compare.differences import Measured, differences, toxicity_changes
from mergekit_bayes.compare.files import is_alone, of_one, write_compare
from mergekit_bayes.compare.findings import findings
from mergekit_bayes.compare.labels import folder_of, labels_of, variant_label
from mergekit_bayes.compare.report import CompareReport, Evaluated
from mergekit_bayes.compare.settings import CompareConfig
from mergekit_bayes.compare.variants import refuse_models, refuse_variants, variants_of
from mergekit_bayes.errors import BmergeError, ConfigError, NoDrawsError
from mergekit_bayes.evaluate.inputs import Inputs, read_inputs
from mergekit_bayes.evaluate.refusals import refuse_settings, refuse_task
from mergekit_bayes.evaluate.report import StepProgress
from mergekit_bayes.evaluate.run import evaluate_model
from mergekit_bayes.models.load import is_classifier
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.models.sampling import open_samplable
from mergekit_bayes.ranks import is_main, join, main_first, on_main


def run_compare(
    config: CompareConfig, *, quiet: bool = False, progress: StepProgress | None = None
) -> CompareReport:
    """Measure the models, and their variants, on the same texts, prompts and noise.

    Settings, the models' configs, data and scorers are read and tried before a model runs. The
    output appears under its name only when it is complete. Under a launcher every rank calls this
    and gets the same numbers, or the same error; rank 0 tells and writes.

    Args:
        config: What to measure of which models.
        quiet: Call no `progress`.
        progress: Called with (step, done, of).

    Returns:
        For one model as it is, its evaluation alone, whose settings are the report's.

    Raises:
        BmergeError: As `evaluate.run.run_evaluate`, of any of the models; or a model is named
            twice.
    """
    labels = labels_of(config.models)
    join(config.num_processes)
    tell = progress if progress is not None and not quiet and is_main() else _ignore
    with quiet_libraries(bars=False):  # `progress` tells
        main_first(lambda: _refuse(config))
        at_mean = main_first(lambda: _refuse_models(config))
        inputs = main_first(lambda: read_inputs(config))
        measured = list(_measure(config, labels, at_mean, inputs, tell))
    report = _report(config, measured, at_mean, inputs)
    if config.output is not None:
        output = Path(config.output)
        on_main(lambda: write_compare(output, report, measured, force=config.force))
    return report


def _refuse(config: CompareConfig) -> None:
    """Refuse settings before anything is read."""
    if config.precision is not None and len(config.models) > 1:
        raise ConfigError(
            f"--precision is of one model's weights, and {len(config.models)} are named. Leave it "
            "out, and each model's own posterior is read, or measure one model at a time."
        )
    for model in config.models:
        evaluation = config.evaluation(model)
        refuse_settings(evaluation.model_copy(update={"output": config.output}))
    refuse_variants(config)


def _refuse_models(config: CompareConfig) -> dict[str, str]:
    """Refuse what the models' files tell, before the first one is measured for long.

    Returns:
        The models that are measured at their mean alone, and why: others have draws, they have not.

    Raises:
        BmergeError: Also where draws are asked for and no model has any.
    """
    refuse_models(config)
    without: dict[str, NoDrawsError] = {}
    for model in config.models if len(config.models) > 1 else ():
        classifier = is_classifier(model, trust_remote_code=config.trust_remote_code)
        task = "classification" if classifier else "causal-lm"
        refuse_task(config.evaluation(model), task)
        if config.samples is not None:
            try:
                open_samplable(model, prior=config.prior).close()
            except NoDrawsError as error:
                without[model] = error
    if without and len(without) == len(config.models):
        raise next(iter(without.values()))
    return {model: error.reason for model, error in without.items()}


def _measure(
    config: CompareConfig,
    labels: list[str],
    at_mean: Mapping[str, str],
    inputs: Inputs,
    tell: StepProgress,
) -> Iterator[Measured]:
    taken = list(labels)
    for label, model in zip(labels, config.models, strict=True):
        with closing(variants_of(config, model, drawn=model not in at_mean)) as variants:
            for variant, settings, change in variants:
                name = variant_label(label, variant, taken)
                taken.append(name)
                several = len(config.models) > 1 or variant != "as it is"
                told = partial(_tell_of, tell, name) if several else tell
                with _named(name, model) if several else nullcontext():
                    evaluation = evaluate_model(settings, inputs, told, change)
                report = evaluation.report
                one = Evaluated(label=name, model=model, variant=variant, report=report)
                yield Measured(one, evaluation)


@contextmanager
def _named(label: str, model: str) -> Iterator[None]:
    """Say in an error which of the models it is about."""
    try:
        yield
    except BmergeError as error:
        if model in str(error):
            raise
        raise type(error)(f"{label}: {error}") from None


def _report(
    config: CompareConfig, measured: list[Measured], at_mean: Mapping[str, str], inputs: Inputs
) -> CompareReport:
    """The report, and into `measured` where each evaluation is written."""
    alone = is_alone([m.evaluated for m in measured])
    for i, one in enumerate(measured):
        measured[i] = _placed(config, one, alone=alone)
    if alone:
        return of_one(measured[0].evaluation.report)
    evaluations = tuple(m.evaluated for m in measured)
    changes = differences(config, measured, inputs)
    return CompareReport(
        settings=config.model_dump(mode="json"),
        evaluations=evaluations,
        differences=changes,
        findings=findings(evaluations, changes, toxicity_changes(config, measured), at_mean),
        path=config.output,
    )


def _placed(config: CompareConfig, one: Measured, *, alone: bool) -> Measured:
    if config.output is None:
        return one
    path = config.output if alone else str(Path(config.output) / folder_of(one.evaluated.label))
    report = one.evaluation.report
    update = {"path": path, "settings": report.settings | {"output": path}}
    report = report.model_copy(update=update)
    return Measured(
        one.evaluated.model_copy(update={"report": report}),
        one.evaluation._replace(report=report),
    )


def _tell_of(tell: StepProgress, label: str, step: str, done: int, of: int) -> None:
    tell(f"{label}: {step}", done, of)


def _ignore(step: str, done: int, of: int) -> None:
    pass
