"""The merge that makes a candidate: its settings, its command line, and points on curves."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_bayes.detox.costs import Cost
from mergekit_bayes.detox.report import Point
from mergekit_bayes.detox.settings import KINDS, Curve, DetoxConfig, Unit
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.merge import MergeConfig, MergeReport
from mergekit_bayes.methods import METHODS


class Made(NamedTuple):
    """What candidates are made of, beside the base.

    Attributes:
        toxic: The model fine-tuned on the toxic text; None if no method subtracts it.
        precision: Where the base's precision is; None if no method needs it.
    """

    toxic: Path | None
    precision: str | None


def merge_config(config: DetoxConfig, curve: Curve, scale: float, made: Made) -> MergeConfig:
    """The settings of the merge that subtracts the toxic fine-tune.

    Args:
        config: The removal.
        curve: The method and its settings.
        scale: The amount to subtract, above zero.
        made: The fine-tuned model, and the place of the base's precision.
    """
    precision = made.precision
    common: dict[str, Any] = {
        "models": (str(made.toxic),),
        "base": config.base,
        "scale": (-scale,),
        "posterior": False,
    }
    if KINDS[curve.method].weighs and precision is not None and precision != config.base:
        common["precision"] = {config.base: precision}
    if curve.method == "task_arithmetic":
        return MergeConfig(**common)
    if curve.method == "fisher_negation":
        return MergeConfig(**common, method="fisher_negation")
    assert curve.base_count is not None  # of every curve in natural parameters,
    assert curve.guard is not None  # and its guard
    return MergeConfig(
        **common,
        weights="precision",
        anchor=config.anchor,
        guard=curve.guard,
        shrink=curve.shrink,
        pool="tensor" if curve.method == "control" else None,
        observations={config.base: f"{_exact(curve.base_count)}x"},
    )


def merge_command(merge: MergeConfig) -> str:
    """The `bmerge merge` line that makes a candidate; it lacks the output."""
    words = ["bmerge", "merge", *merge.models, "--base", str(merge.base)]
    words += ["--weights", merge.weights] if merge.method is None else ["--method", merge.method]
    words += ["--scale", _exact(merge.scale[0])]
    if merge.weights == "precision":
        words += ["--anchor", merge.anchor, "--guard", _exact(merge.guard)]
        words += ["--shrink", merge.shrink] if merge.shrink is not None else []
        words += ["--pool", merge.pool] if merge.pool is not None else []
        for model, count in merge.observations.items():
            words += ["--observations", f"{model}={count}"]
    for model, place in merge.precision.items():
        words += ["--precision", f"{model}={place}"]
    return shlex.join([*words, "--no-posterior"])


def _exact(number: float | str) -> str:
    """A number as short as it can be written without another value being read."""
    short = f"{float(number):g}"
    return short if float(short) == float(number) else repr(float(number))


def point_of(
    report: EvaluateReport,
    place: float,
    command: str | None = None,
    cost: Cost | None = None,
    *,
    unit: Unit = "scale",
    merged: MergeReport | None = None,
) -> Point:
    """One model on a curve.

    Args:
        report: Its evaluation.
        place: The amount that was subtracted, or the steps that were made; 0 for the base.
        command: The command line that repeats it, without its output.
        cost: What making it took; None if that is not known, and for the base.
        unit: What `place` is.
        merged: The report of its merge; None for the base and for an adaptation.
    """
    effects: dict[str, Any] = {}
    if merged is not None:
        tasks = [model for model in merged.models if model.role == "task"]
        effects["precision_ratio"] = tasks[0].ratio if tasks else None
        if METHODS[merged.method].unguarded_precision is not None:
            effects["guarded_share"] = merged.guarded_share
            effects["largest_multiplier"] = merged.largest_multiplier
    return Point(
        scale=place,
        unit=unit,
        toxicity=report.toxicity,
        perplexity=report.perplexity,
        samples=report.samples,
        judged=report.judged,
        seconds=cost.seconds if cost is not None else None,
        passes=cost.passes if cost is not None else None,
        command=command,
        **effects,
    )


def output_flag(unit: Unit, path: Path) -> str:
    """What names the output in the command line of a candidate."""
    words = ["-o", str(path)] if unit == "scale" else ["--set", f"output={path}"]
    return shlex.join(words)


def finetune_passes(config: FinetuneConfig, steps: int) -> int:
    """Examples that a fine-tune sends through its model, with the estimate of its precision."""
    flush = config.flush_batches if config.posterior == "flush" else 0
    passes = steps * config.gradient_accumulation * config.mc_samples + flush
    return config.batch_size * passes
