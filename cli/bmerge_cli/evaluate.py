"""`bmerge evaluate`: perplexity on texts, and toxicity of sampled continuations."""

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
    from mergekit_bayes.metrics.base import Interval
    from mergekit_bayes.metrics.toxicity import SamplesReport, Sampling

NAME = "evaluate"


def command(
    model: Annotated[str, typer.Argument(help="A model folder, or a Hub id (org/name[@revision]).")],
    perplexity: Annotated[
        list[str] | None, typer.Option(help="TEXTS or NAME=TEXTS: a file, folder or Hub data set; repeatable.")
    ] = None,
    toxicity: Annotated[str | None, typer.Option(help="File of prompts to continue.")] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="words:FILE, model:PATH_OR_ID#LABEL or package.module:function; repeatable."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder for the report, losses and continuations.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of input at a time; else the model's context.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a window scores; else the window (no overlap).")] = None,
    concatenate: Annotated[bool, typer.Option("--concatenate", help="Join rows by EOS into one stream.")] = False,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    prompt_column: Annotated[str, typer.Option(help="Column of the prompts.")] = "text",
    where: Annotated[list[str] | None, typer.Option(help="KEY=VALUE: keep texts with this value.")] = None,
    prompts_where: Annotated[list[str] | None, typer.Option(help="KEY=VALUE: keep prompts with this value.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="At most so many texts of each set.")] = None,
    prompts: Annotated[int | None, typer.Option(help="At most so many prompts.")] = None,
    continuations: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 25,
    new_tokens: Annotated[int, typer.Option(help="Most tokens of a continuation.")] = 20,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampling.")] = 1.0,
    threshold: Annotated[float, typer.Option(help="A continuation is toxic from this score on.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the sampling and the bootstrap.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Windows in a batch.")] = 8,
    sampling_batch: Annotated[int, typer.Option(help="Continuations drawn together.")] = 256,
    bootstrap: Annotated[int, typer.Option(help="Resamples behind each interval; 0 for none.")] = 1000,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity on texts, and toxicity by continuing prompts and scoring each continuation.

    Perplexity is rolling, as lm-eval does it: one row, one document, from BOS, else EOS.
    """
    with failures():
        from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate

        config = parse_config(
            EvaluateConfig,
            {
                "model": model,
                "perplexity": _named(perplexity or []),
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


def _named(items: Sequence[str]) -> dict[str, str]:
    """`NAME=TEXTS`, or texts that are called by their own path."""
    result: dict[str, str] = {}
    for item in items:
        name, separator, texts = item.partition("=")
        if not separator or Path(item).exists():
            name, texts = item, item
        if not name or not texts:
            raise ConfigError(f"--perplexity: expected TEXTS or NAME=TEXTS, found '{item}'.")
        if name in result:
            raise ConfigError(f"--perplexity: '{name}' is named twice.")
        result[name] = texts
    return result


@contextmanager
def _steps(screen: Any) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that names the step and vanishes when done; yields what the verb calls with (step, done, of)."""
    with Progress(console=screen, transient=True, disable=screen.quiet or not screen.is_terminal) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda step, done, of: progress.update(task, description=step, completed=done, total=of)


def _show(screen: Any, report: "EvaluateReport") -> None:
    if report.perplexity:
        first = next(iter(report.perplexity.values()))
        title = f"perplexity, {first.protocol}, window {first.window}, stride {first.stride}; ± half the 95 % interval"
        columns = ["texts", "token", "word", "byte", "bits/byte", "nats/token", "tokens"]
        rows = [
            [
                name,
                _text(p.token),
                f"{p.word.value:.4g}",
                f"{p.byte.value:.4g}",
                f"{p.bits_per_byte.value:.4g}",
                _text(p.loss),
                f"{p.tokens:,}",
            ]
            for name, p in report.perplexity.items()
        ]
        screen.print(table(columns, rows, title=title))
    if report.sampling and report.samples:
        _show_toxicity(screen, report, report.sampling, report.samples)


def _show_toxicity(screen: Any, report: "EvaluateReport", sampling: "Sampling", look: "SamplesReport") -> None:
    title = (
        f"toxicity of {look.continuations:,} continuations ({look.prompts:,} prompts x {sampling.continuations}, "
        f"{sampling.new_tokens} tokens, top_p {sampling.top_p:g}, temperature {sampling.temperature:g}, "
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
        screen.print(f"note: {look.shortened} prompts lost their front, the context being too short for them")


def _short(spec: str) -> str:
    """A scorer without the folders of its file."""
    kind, _, rest = spec.partition(":")
    return f"{kind}:{Path(rest).name}" if kind in ("words", "model") else spec


def _text(x: "Interval") -> str:
    if x.low is None or x.high is None:
        return f"{x.value:.4g}"
    return f"{x.value:.4g} ±{(x.high - x.low) / 2:.2g}"
