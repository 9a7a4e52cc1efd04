"""The tables of `bmerge evaluate`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bmerge_cli.render import Screen, show_beside, table

if TYPE_CHECKING:
    from mergekit_bayes.evaluate.report import EvaluateReport, TaskReport
    from mergekit_bayes.generation import Sampling
    from mergekit_bayes.metrics.base import Interval
    from mergekit_bayes.metrics.classification import ClassificationReport
    from mergekit_bayes.metrics.perplexity import PerplexityReport
    from mergekit_bayes.metrics.quality import SamplesReport


_CLASSIFICATION = ("accuracy", "nats", "Brier", "reliability", "ECE", "confidence", "examples")


def show_report(screen: Screen, report: "EvaluateReport") -> None:
    """Print one table for each thing that was measured."""
    if report.perplexity:
        _show_perplexity(screen, report)
    if report.classification:
        _show_classification(screen, report)
        for name, measured in report.classification.items():
            sampled = report.sampled.classification[name] if report.sampled else None
            _show_calibration(screen, name, measured, sampled)
    _show_draws(screen, report)
    if report.sampling and report.samples:
        _show_toxicity(screen, report, report.sampling, report.samples)
        _show_quality(screen, report, report.samples)
    if report.lm_eval:
        _show_tasks(screen, report.lm_eval)


def _show_perplexity(screen: Screen, report: "EvaluateReport") -> None:
    first = next(iter(report.perplexity.values()))
    title = (
        f"perplexity, {first.protocol}, window {first.window}, stride {first.stride}; ± half the "
        "95 % interval"
    )
    columns = ["texts", "token", "word", "byte", "bits/byte", "nats/token", "tokens"]
    rows, changes = [], []
    for name, measured in report.perplexity.items():
        rows.append(_perplexity_row(name, measured))
        if report.sampled:
            draws = f"  {report.sampled.draws.samples} samples"
            rows.append(_perplexity_row(draws, report.sampled.perplexity[name]))
            change = _change(report.sampled.loss_change[name])
            changes.append(f"change on {name} by samples: {change} nats a token")
    screen.print(table(columns, rows, title=title))
    for change in changes:
        screen.print(change)
    if first.special_tokens and first.protocol == "rolling":
        screen.print(
            "note: the tokenizer adds special tokens to a text. They are not scored here; lm-eval "
            "scores them, and gives other numbers, unless it runs with add_bos_token=False"
        )


def _perplexity_row(name: str, measured: "PerplexityReport") -> list[str]:
    return [
        name,
        _interval(measured.token),
        f"{measured.word.value:.4g}",
        f"{measured.byte.value:.4g}",
        f"{measured.bits_per_byte.value:.4g}",
        _interval(measured.loss),
        f"{measured.tokens:,}",
    ]


def _show_classification(screen: Screen, report: "EvaluateReport") -> None:
    bins = report.settings["bins"]
    title: str | None = f"classification; ECE and reliability by {bins} bins; [95 % interval]"
    columns: list[tuple[str, list[str]]] = []
    for name, measured in report.classification.items():
        columns.append((name, _classification_cells(measured)))
        if report.sampled:
            draws = f"{report.sampled.draws.samples} samples"
            columns.append((draws, _classification_cells(report.sampled.classification[name])))
            change = report.sampled.classification_change[name]
            changes = (change.accuracy, change.nll, change.brier, change.reliability, change.ece)
            columns.append(("change", [*map(_change, changes), "", ""]))
            show_beside(screen, title, "measure", _CLASSIFICATION, columns)
            columns, title = [], None
    if columns:
        show_beside(screen, title, "measure", _CLASSIFICATION, columns)
    if report.label_reading:
        screen.print(f"labels are read by {report.label_reading}")
    screen.print(
        "reliability: squared calibration error, without the bias of finite samples; no error is "
        "visible where its interval holds zero. ECE is above zero for calibrated models too"
    )


def _classification_cells(measured: "ClassificationReport") -> list[str]:
    from mergekit_bayes.compare.wording import with_ends

    numbers = (
        *(measured.accuracy, measured.nll, measured.brier),
        *(measured.reliability, measured.ece),
    )
    return [*map(with_ends, numbers), f"{measured.confidence:.4g}", f"{measured.examples:,}"]


def _show_calibration(
    screen: Screen,
    name: str,
    measured: "ClassificationReport",
    sampled: "ClassificationReport | None",
) -> None:
    """Print confidence and accuracy by bin, of the mean and beside it of the samples."""
    reports = [measured] if sampled is None else [measured, sampled]
    columns = ["bin", "examples", "confidence", "accuracy"]
    if sampled is not None:
        columns += ["of samples", "confidence", "accuracy"]
    rows = []
    for bins in zip(*(r.bins for r in reports), strict=True):
        if any(b.examples for b in bins):
            row = [f"{bins[0].low:.3g} to {bins[0].high:.3g}"]
            for b in bins:
                row += [f"{b.examples:,}", _share(b.confidence), _share(b.accuracy)]
            rows.append(row)
    screen.print(table(columns, rows, title=f"calibration of {name}"))


def _show_draws(screen: Screen, report: "EvaluateReport") -> None:
    from mergekit_bayes.compare.draws import draw_notes, draws_in_words

    if report.sampled:
        screen.print(draws_in_words(report.sampled.draws))
    for note in draw_notes(report):
        screen.print(f"note: {note}")


def _show_toxicity(
    screen: Screen, report: "EvaluateReport", sampling: "Sampling", samples: "SamplesReport"
) -> None:
    from mergekit_bayes.compare.wording import (
        AGREEMENT,
        agreement_rows,
        agreement_title,
        bias_in_words,
        cuts,
        readings,
        short_name,
        with_ends,
    )

    title = (
        f"toxicity of {samples.continuations:,} continuations ({samples.prompts:,} prompts x "
        f"{sampling.continuations}, {sampling.new_tokens} tokens, top_p {sampling.top_p:g}, "
        f"temperature {sampling.temperature:g}, seed {sampling.seed}); [95 % interval]"
    )
    thresholds = {toxicity.threshold for toxicity in report.toxicity.values()}
    share = f"share >= {thresholds.pop():g}" if len(thresholds) == 1 else "toxic share"
    columns = ["scorer", "mean", share, "expected max", "prompts with any"]
    rows = []
    for spec, toxicity in report.toxicity.items():
        numbers = (toxicity.mean, toxicity.share, toxicity.expected_max, toxicity.any_toxic)
        rows.append([short_name(spec), *map(with_ends, numbers)])
    screen.print(table(columns, rows, title=title))
    for reading in readings(report):
        screen.print(reading)
    for cut in cuts(report):
        screen.print(f"note: {cut}")
    if report.agreement:
        screen.print(table(AGREEMENT, agreement_rows(report), title=agreement_title()))
    for spec, bias in report.bias.items():
        screen.print(bias_in_words(spec, bias))


def _show_quality(screen: Screen, report: "EvaluateReport", samples: "SamplesReport") -> None:
    """Print whether the continuations are still text: a row of numbers over their intervals."""

    of_samples = {
        "tokens": ("mean_tokens", "{:.1f}"),
        "empty": ("empty", "{:.1%}"),
        "dist-1": ("distinct_1", "{:.3g}"),
        "dist-2": ("distinct_2", "{:.3g}"),
        "dist-3": ("distinct_3", "{:.3g}"),
        "repeated": ("repeated", "{:.1%}"),
        "looping": ("looping", "{:.1%}"),
    }
    columns = {
        head: _ends(samples.intervals.get(name), form, getattr(samples, name))
        for head, (name, form) in of_samples.items()
    }
    judged = report.judged
    if judged is not None and judged.token is not None:
        columns["perplexity"] = _ends(judged.token, "{:.4g}")
        columns["bits/byte"] = _ends(judged.bits_per_byte, "{:.3f}")
    rows = [list(row) for row in zip(*columns.values(), strict=True) if any(row)]
    title = "are the continuations still text?"
    title += " below each number the ends of its 95 % interval" if len(rows) > 1 else ""
    screen.print(table(list(columns), rows, title=title))
    screen.print(
        "dist-n: distinct word n-grams, which fall with the number of texts; repeated: word pairs "
        "said before; looping: ends in one phrase three times"
    )
    if judged is not None and report.judge is not None:
        without = f", without {judged.left_out:,} empty continuations" if judged.left_out else ""
        screen.print(
            f"perplexity under {report.judge.model}, given the prompts{without}; text that repeats "
            "itself has the lowest"
        )


def _ends(x: "Interval | None", form: str, value: float | None = None) -> tuple[str, str, str]:
    """A number and both ends of its interval, each as far as there is one."""
    found = (value, None, None) if x is None else (x.value, x.low, x.high)
    number, low, high = ("" if end is None else form.format(end) for end in found)
    return number, low, high


def _show_tasks(screen: Screen, reports: "Mapping[str, TaskReport]") -> None:
    from mergekit_bayes.compare.wording import with_ends

    version = next(iter(reports.values())).lm_eval_version
    columns = ["task", "metric", "score", "better", "documents", "shots", "version"]
    rows = []
    for task, report in reports.items():
        for score in report.scores.values():
            rows.append(
                [
                    task,
                    score.name,
                    with_ends(score.score),
                    {True: "higher", False: "lower", None: ""}[score.higher_is_better],
                    f"{report.samples:,}",
                    "" if report.shots is None else str(report.shots),
                    report.task_version,
                ]
            )
    screen.print(table(columns, rows, title=f"tasks of lm-eval {version}; [95 % interval]"))


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.3f}"


def _change(x: "Interval | None") -> str:
    if x is None:
        return ""
    if x.low is None or x.high is None:
        return f"{x.value:+.3g}"
    return f"{x.value:+.3g} [{x.low:+.3g}, {x.high:+.3g}]"


def _interval(x: "Interval") -> str:
    if x.low is None or x.high is None:
        return f"{x.value:.4g}"
    return f"{x.value:.4g} ±{(x.high - x.low) / 2:.2g}"
