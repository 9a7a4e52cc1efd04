"""The report of models side by side, for readers."""

from collections.abc import Iterator

from mergekit_bayes.compare.report import CompareReport
from mergekit_bayes.compare.wording import cell, changes_of, columns_of
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


def as_markdown(report: CompareReport) -> str:
    """The text of `report.md`; its first line of text is the first finding."""
    first = report.evaluations[0].label
    several = len(report.evaluations) > 1
    title = "Models side by side" if several else f"Evaluation of {text(first)}"
    parts = [f"# {title}"]
    if report.findings:
        parts += ["\n".join(f"- {text(finding)}" for finding in report.findings)]
    parts += [f"![What was measured, with 95 % intervals]({PICTURE})"]
    parts += ["## What each scored", _INTERVALS, _scores(report)]
    if report.differences:
        parts += ["## Differences", _PAIRED, _differences(report)]
    parts += ["## How it was made", "\n".join(f"- {line}" for line in _how(report))]
    return "\n\n".join(parts) + "\n"


def _scores(report: CompareReport) -> str:
    """One row a number, one column a model."""
    labels = [e.label for e in report.evaluations]
    rows = [
        [text(f"{c.measure}, {c.of}" if c.of else c.measure), *(cell(c, label) for label in labels)]
        for c in columns_of(report.evaluations)
    ]
    return table(["measure", *map(text, labels)], rows)


def _differences(report: CompareReport) -> str:
    """One row a measure, one column a model; a table for each model that is compared with."""
    tables = []
    for against, names, columns in changes_of(report.differences):
        rows = [[text(name), *row] for name, *row in zip(names, *columns.values(), strict=True)]
        tables.append(table([f"less {text(against)}", *map(text, columns)], rows))
    return "\n\n".join(tables)


def _how(report: CompareReport) -> Iterator[str]:
    for one in report.evaluations:
        weights = f"weights {one.report.model_identity[:12]}"
        changed = "" if one.variant == "as it is" else f", {one.variant}"
        yield f"{text(one.label)}: {code(one.model)}{changed}, {weights}, {one.report.dtype}."
    first = next(iter(report.evaluations)).report
    for spec, info in first.scorers.items():
        known = f" (SHA-256 {info.fingerprint[:12]})" if info.fingerprint else ""
        yield f"Scorer {code(spec)}{known}; toxic from {first.toxicity[spec].threshold:g} on."
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
    yield f"bmerge {text(report.version)}; all settings and numbers are in report.json."
