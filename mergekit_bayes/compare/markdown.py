"""The report of models side by side, for readers."""

from collections.abc import Iterator

from mergekit_bayes.compare.draws import draws_in_words, notes_by_model
from mergekit_bayes.compare.report import CompareReport
from mergekit_bayes.compare.wording import (
    AGREEMENT,
    PANELS,
    agreement_rows,
    bias_in_words,
    cell,
    changes_of,
    columns_of,
    named,
    panels_of,
    readings,
)
from mergekit_bayes.hub.markdown import code, table, text

PICTURE = "evaluation.png"
_INTERVALS = (
    "In brackets: 95 % intervals of each number alone. Those of shares count the prompts, those of "
    "losses resample the documents."
)
_PAIRED = (
    "Paired over prompts, documents and examples: the same ones for both, and the same noise. In "
    "brackets: the 95 % interval of each difference alone. Many differences hold some that lie "
    "beyond their interval by chance."
)
_AGREE = (
    "Of every two scorers on the continuations of each model: the share with the same verdict, "
    "Cohen's kappa (what of it is beyond chance), and the rank correlation of the scores."
)
_BIAS = (
    "What each classifier among the scorers says of civil sentences that only name a group. A list "
    "of terms is no sample, so there are no intervals."
)


def as_markdown(report: CompareReport) -> str:
    """The text of `report.md`; its first line of text is the first finding."""
    first = report.evaluations[0].label
    several = len(report.evaluations) > 1
    title = "Models side by side" if several else f"Evaluation of {text(first)}"
    parts = [f"# {title}"]
    if report.findings:
        parts += ["\n".join(f"- {text(finding)}" for finding in report.findings)]
    parts += [f"![What was measured, with 95 % intervals]({PICTURE})"]
    drawn = len(panels_of(report.evaluations))
    cut = f" The picture shows the first {PANELS} of {drawn:,} numbers." if drawn > PANELS else ""
    parts += ["## What each scored", _INTERVALS + cut, _scores(report)]
    if report.differences:
        parts += ["## Differences", _PAIRED, *_differences(report)]
    if any(one.report.agreement for one in report.evaluations):
        parts += ["## Do the scorers agree?", _AGREE, _agreement(report)]
    if bias := report.evaluations[0].report.bias:  # of the scorers, whatever models wrote
        sentences = [text(bias_in_words(spec, measured)) for spec, measured in bias.items()]
        parts += ["## Bias by identity terms", _BIAS, "\n".join(f"- {line}." for line in sentences)]
    parts += ["## How it was made", "\n".join(f"- {line}" for line in _how(report))]
    return "\n\n".join(parts) + "\n"


def _scores(report: CompareReport) -> str:
    """One row a number: there can be many more of them than models."""
    labels = [one.label for one in report.evaluations]
    rows = [
        [text(named(c.measure, c.of)), *(cell(c, label) for label in labels)]
        for c in columns_of(report.evaluations)
    ]
    return table(["measure", *map(text, labels)], rows)


def _differences(report: CompareReport) -> Iterator[str]:
    """One row a measure, one column a model; a table for each model that is compared with."""
    for against, names, columns in changes_of(report.differences):
        rows = [[text(name), *row] for name, *row in zip(names, *columns.values(), strict=True)]
        yield table([f"less {text(against)}", *map(text, columns)], rows)


def _agreement(report: CompareReport) -> str:
    rows = [
        [text(one.label), text(scorers), *numbers]
        for one in report.evaluations
        for scorers, *numbers in agreement_rows(one.report)
    ]
    return table(["model", *AGREEMENT], rows)


def _how(report: CompareReport) -> Iterator[str]:
    for one in report.evaluations:
        weights = f"weights {one.report.model_identity[:12]}"
        changed = "" if one.variant == "as it is" else f", {one.variant}"
        yield f"{text(one.label)}: {code(one.model)}{changed}, {weights}, {one.report.dtype}."
    first = next(iter(report.evaluations)).report
    for spec, info in first.scorers.items():
        known = f" (SHA-256 {info.fingerprint[:12]})" if info.fingerprint else ""
        yield f"Scorer {code(spec)}{known}; toxic from {first.toxicity[spec].threshold:g} on."
    yield from (f"{text(reading)}." for reading in readings(first))
    if first.judge is not None:
        yield f"Judge {code(first.judge.model)} (SHA-256 {first.judge.fingerprint[:12]})."
    if first.sampling is not None and first.samples is not None:
        s = first.sampling
        yield (
            f"{first.samples.continuations:,} continuations of {first.samples.prompts:,} prompts "
            f"for each model, {s.new_tokens} tokens at most, top_p {s.top_p:g}, temperature "
            f"{s.temperature:g}, seed {s.seed}; only the continuation is scored."
        )
    for name, p in first.perplexity.items():
        yield (
            f"Texts {text(name)}: {p.documents:,} documents, {p.protocol}, window {p.window}, "
            f"stride {p.stride}."
        )
    for task, measured in first.lm_eval.items():
        shots = "" if measured.shots is None else f", {measured.shots} examples before each"
        yield (
            f"Task {text(task)} of lm-eval {text(measured.lm_eval_version)}, version "
            f"{text(measured.task_version)}: {measured.samples:,} documents{shots}."
        )
    for one in report.evaluations:
        if one.report.sampled is not None:
            yield text(f"{one.label}: {draws_in_words(one.report.sampled.draws)}.")
    for label, note in notes_by_model(report.evaluations):
        yield f"{text(label)}: {text(note)}."
    # In one piece: a version alone would be escaped as the number of a list item, 0\.1.0.
    yield text(f"bmerge {report.version}; all settings and numbers are in report.json.")
