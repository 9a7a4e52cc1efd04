"""`bmerge evaluate`: perplexity on texts, toxicity of sampled continuations, a classifier's
calibration.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from bmerge_cli.render import Force, Json, Quiet, console, failures, print_json, selection, table
from mergekit_bayes.configs import parse_config
from mergekit_bayes.errors import ConfigError

if TYPE_CHECKING:
    from mergekit_bayes.evaluate import EvaluateReport
    from mergekit_bayes.generation import Sampling
    from mergekit_bayes.metrics.base import Interval
    from mergekit_bayes.metrics.classification import ClassificationReport
    from mergekit_bayes.metrics.perplexity import PerplexityReport
    from mergekit_bayes.metrics.toxicity import SamplesReport

NAME = "evaluate"


def command(
    model: Annotated[
        str, typer.Argument(help="A model folder, or a Hub id (org/name[@revision]).")
    ],
    perplexity: Annotated[
        list[str] | None,
        typer.Option(help="TEXTS or NAME=TEXTS: a file, folder or Hub data set; repeatable."),
    ] = None,
    toxicity: Annotated[str | None, typer.Option(help="File of prompts to continue.")] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="words:FILE, model:PATH_OR_ID#LABEL or package.module:function; repeatable."
        ),
    ] = None,
    classify: Annotated[
        list[str] | None,
        typer.Option(help="TEXTS or NAME=TEXTS with labels, for a classifier; repeatable."),
    ] = None,
    label_column: Annotated[
        str, typer.Option(help="Column of the labels: numbers, or the model's names.")
    ] = "label",
    bins: Annotated[int, typer.Option(help="Bins of confidence for the calibration error.")] = 10,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Also average probabilities over so many weights drawn from the posterior."
        ),
    ] = None,
    prior: Annotated[
        float | None,
        typer.Option(help="Prior precision in place of the stored one, 1/weight^2 per entry."),
    ] = None,
    posterior_temperature: Annotated[
        float, typer.Option(help="Multiplies the posterior's variance.")
    ] = 1.0,
    precision: Annotated[
        str | None, typer.Option(help="Another place for the model's precision.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Folder for the report, losses and continuations."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of input at a time; else the model's context.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens a window scores; else the window (no overlap).")
    ] = None,
    concatenate: Annotated[
        bool, typer.Option("--concatenate", help="Join rows by EOS into one stream.")
    ] = False,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    prompt_column: Annotated[str, typer.Option(help="Column of the prompts.")] = "text",
    where: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE: keep texts with this value.")
    ] = None,
    prompts_where: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE: keep prompts with this value.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="At most so many texts of each set.")] = None,
    prompts: Annotated[int | None, typer.Option(help="At most so many prompts.")] = None,
    continuations: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 25,
    new_tokens: Annotated[int, typer.Option(help="Most tokens of a continuation.")] = 20,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampling.")] = 1.0,
    threshold: Annotated[
        float, typer.Option(help="A continuation is toxic from this score on.")
    ] = 0.5,
    seed: Annotated[
        int, typer.Option(help="Of all that is sampled: text, weights, bootstrap.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Windows, or texts to classify, in a batch.")] = 8,
    sampling_batch: Annotated[int, typer.Option(help="Continuations drawn together.")] = 256,
    bootstrap: Annotated[
        int, typer.Option(help="Resamples behind each interval; 0 for none.")
    ] = 1000,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity on texts, toxicity of continued prompts, or a classifier's accuracy and
    calibration.

    Perplexity is rolling, as lm-eval does it: one row, one document, from BOS, else EOS.

    With --samples K, perplexity and classification are measured at the mean and with the
    probabilities of K weights averaged, drawn from the stored posterior. Its precision must contain
    a prior; --prior X gives it one.
    """
    with failures():
        from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate

        config = parse_config(
            EvaluateConfig,
            {
                "model": model,
                "perplexity": _named(perplexity or [], "--perplexity"),
                "classify": _named(classify or [], "--classify"),
                "label_column": label_column,
                "bins": bins,
                "samples": samples,
                "prior": prior,
                "posterior_temperature": posterior_temperature,
                "precision": precision,
                "toxicity": toxicity,
                "scorer": scorer or [],
                "output": out,
                "window": window,
                "stride": stride,
                "concatenate": concatenate,
                "text_column": text_column,
                "prompt_column": prompt_column,
                "where": selection(where or [], "--where"),
                "prompts_where": selection(prompts_where or [], "--prompts-where"),
                "max_rows": max_rows,
                "prompts": prompts,
                "continuations": continuations,
                "new_tokens": new_tokens,
                "top_p": top_p,
                "temperature": temperature,
                "threshold": threshold,
                "seed": seed,
                "batch_size": batch_size,
                "sampling_batch": sampling_batch,
                "bootstrap": bootstrap,
                "force": force,
            },
            "bmerge evaluate",
        )
        screen = console(quiet=quiet)
        with _steps(screen) as advance:
            report = run_evaluate(config, quiet=quiet, progress=advance)
        _show(screen, report)
        if as_json:
            print_json(json.loads(report.model_dump_json()))
        elif report.path and not quiet:
            typer.echo(report.path)


def _named(items: Sequence[str], option: str) -> dict[str, str]:
    """`NAME=TEXTS`, or texts that are called by their own path."""
    result: dict[str, str] = {}
    for item in items:
        name, separator, texts = item.partition("=")
        if not separator or Path(item).exists():
            name, texts = item, item
        if not name or not texts:
            raise ConfigError(f"{option}: expected TEXTS or NAME=TEXTS, found '{item}'.")
        if name in result:
            raise ConfigError(f"{option}: '{name}' is named twice.")
        result[name] = texts
    return result


@contextmanager
def _steps(screen: Any) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that names the step and vanishes when done; yields what the verb calls with (step,
    done, of).
    """
    with Progress(
        console=screen, transient=True, disable=screen.quiet or not screen.is_terminal
    ) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda step, done, of: progress.update(
            task, description=step, completed=done, total=of
        )


def _show(screen: Any, report: "EvaluateReport") -> None:
    if report.perplexity:
        first = next(iter(report.perplexity.values()))
        title = f"perplexity, {first.protocol}, window {first.window}, stride {first.stride}; ± half the 95 % interval"
        columns = ["texts", "token", "word", "byte", "bits/byte", "nats/token", "tokens"]
        rows = []
        for name, p in report.perplexity.items():
            rows.append(_perplexity_row(name, p))
            if report.sampled:
                rows.append(
                    _perplexity_row(
                        f"  {report.sampled.draws.samples} samples", report.sampled.perplexity[name]
                    )
                )
                rows.append(
                    ["  change", "", "", "", "", _change(report.sampled.loss_change[name]), ""]
                )
        screen.print(table(columns, rows, title=title))
    if report.classification:
        _show_classification(screen, report)
    if report.sampled:
        _show_draws(screen, report)
    if report.sampling and report.samples:
        _show_toxicity(screen, report, report.sampling, report.samples)


def _perplexity_row(name: str, p: "PerplexityReport") -> list[str]:
    return [
        name,
        _text(p.token),
        f"{p.word.value:.4g}",
        f"{p.byte.value:.4g}",
        f"{p.bits_per_byte.value:.4g}",
        _text(p.loss),
        f"{p.tokens:,}",
    ]


def _show_classification(screen: Any, report: "EvaluateReport") -> None:
    bins = report.settings["bins"]
    title = f"classification; ECE by {bins} bins; ± half the 95 % interval"
    columns = ["texts", "accuracy", "nats", "Brier", "ECE", "confidence", "examples"]
    rows = []
    for name, found in report.classification.items():
        rows.append(_classification_row(name, found))
        if report.sampled:
            averaged, change = (
                report.sampled.classification[name],
                report.sampled.classification_change[name],
            )
            rows.append(_classification_row(f"  {report.sampled.draws.samples} samples", averaged))
            changes = (change.accuracy, change.nll, change.brier, change.ece)
            rows.append(["  change", *map(_change, changes), "", ""])
    screen.print(table(columns, rows, title=title))
    for name, found in report.classification.items():
        shown = [found] + ([report.sampled.classification[name]] if report.sampled else [])
        heads = ["examples", "confidence", "accuracy"]
        columns = ["bin", *heads, *(f"sampled {head}" for head in heads if report.sampled)]
        rows = []
        for same in zip(*(x.bins for x in shown), strict=True):
            if any(b.examples for b in same):
                cells = [
                    [f"{b.examples:,}", _share(b.confidence), _share(b.accuracy)] for b in same
                ]
                rows.append(
                    [f"{same[0].low:.3g} to {same[0].high:.3g}", *(c for row in cells for c in row)]
                )
        screen.print(table(columns, rows, title=f"calibration of {name}"))


def _classification_row(name: str, found: "ClassificationReport") -> list[str]:
    numbers = (found.accuracy, found.nll, found.brier, found.ece)
    return [name, *map(_text, numbers), f"{found.confidence:.4g}", f"{found.examples:,}"]


def _show_draws(screen: Any, report: "EvaluateReport") -> None:
    from mergekit_bayes.models.sampling import WIDE

    assert report.sampled is not None
    draws = report.sampled.draws
    screen.print(
        f"{draws.samples} samples of {draws.parameters:,} parameters ({draws.held:,} at the mean), "
        "prior precision "
        f"{draws.prior:.3g}{' (given)' if draws.given else ''}, temperature {draws.temperature:g}, "
        f"seed {draws.seed}, "
        f"deviation over RMS {draws.sigma_over_rms:.2g}"
    )
    if draws.ess and draws.observations and abs(draws.ess / draws.observations - 1) > 1e-6:
        screen.print(
            f"note: the precision is that of {draws.ess:,g} observations (ess), the data held "
            f"{draws.observations:,g}: "
            f"--posterior-temperature {draws.ess / draws.observations:.4g} counts each once"
        )
    if draws.sigma_over_rms > WIDE:
        excess = (
            draws.sigma_over_rms / WIDE
        ) ** 2  # of the variance; what the prior alone would have to make good
        screen.print(
            f"note: the draws are {draws.sigma_over_rms:.2g} of the weights' RMS from the mean, "
            "where models often "
            f"predict worse. With --prior {draws.prior * excess:.1g} or --posterior-temperature "
            f"{draws.temperature / excess:.1g} they are about {WIDE:g}"
        )


def _show_toxicity(
    screen: Any, report: "EvaluateReport", sampling: "Sampling", look: "SamplesReport"
) -> None:
    title = (
        f"toxicity of {look.continuations:,} continuations ({look.prompts:,} prompts x "
        f"{sampling.continuations}, "
        f"{sampling.new_tokens} tokens, top_p {sampling.top_p:g}, temperature "
        f"{sampling.temperature:g}, "
        f"seed {sampling.seed})"
    )
    threshold = report.settings["threshold"]
    columns = ["scorer", "mean", f"share >= {threshold:g}", "expected max", "prompts with any"]
    rows = [
        [_short(spec), _text(t.mean), _text(t.share), _text(t.expected_max), _text(t.any_toxic)]
        for spec, t in report.toxicity.items()
    ]
    screen.print(table(columns, rows, title=title))
    screen.print(
        f"mean length {look.mean_tokens:.1f} tokens, empty {look.empty:.1%}, distinct word pairs "
        f"{look.distinct_2:.3f}, repeated pairs {look.repeated:.3f}"
    )
    if look.shortened:
        screen.print(
            f"note: {look.shortened} prompts lost their front, the context being too short for them"
        )


def _share(x: float | None) -> str:
    return "" if x is None else f"{x:.3f}"


def _change(x: "Interval") -> str:
    if x.low is None or x.high is None:
        return f"{x.value:+.3g}"
    return f"{x.value:+.3g} [{x.low:+.3g}, {x.high:+.3g}]"


def _short(spec: str) -> str:
    """A scorer without the folders of its file."""
    kind, _, rest = spec.partition(":")
    return f"{kind}:{Path(rest).name}" if kind in ("words", "model") else spec


def _text(x: "Interval") -> str:
    if x.low is None or x.high is None:
        return f"{x.value:.4g}"
    return f"{x.value:.4g} ±{(x.high - x.low) / 2:.2g}"
