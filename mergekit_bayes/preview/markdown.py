"""The report of a preview, for readers."""

from collections.abc import Iterator

from mergekit_bayes.hub.markdown import code, table, text
from mergekit_bayes.preview.report import PreviewReport
from mergekit_bayes.preview.wording import by_mean, columns_of, names_of, row_of, sentences

PICTURE = "preview.png"


def as_markdown(report: PreviewReport) -> str:
    """The text of `report.md`."""
    parts = ["# Preview of a merge", "\n".join(f"- {text(s)}" for s in sentences(report))]
    parts += [f"![Losses of all merges]({PICTURE})"]
    heads = [text(head) for head in columns_of(report)]
    if len(report.observations) > 1:
        parts += [
            "## Pareto set",
            "No other merge of this preview is as good on all data sets and better on one.",
            table(heads, [row_of(report, i) for i in report.pareto]),
        ]
    parts += [
        "## All merges",
        f"Scales of {', '.join(code(name) for name in names_of(report))}, in this order.",
        table(heads, [row_of(report, i) for i in by_mean(report)]),
        "## How it was made",
        "\n".join(f"- {line}" for line in _how(report)),
    ]
    return "\n\n".join(parts) + "\n"


def _how(report: PreviewReport) -> Iterator[str]:
    recipe = report.settings["recipe"]
    yield f"Recipe {code(recipe)}; the recommended merge is {text(report.summary)}."
    yield f"Method: {text(report.formula)}."
    for name, count in report.observations.items():
        source = report.settings["data"][name]
        yield f"Texts {text(name)}: {code(source)}, {count:,} {report.unit}s."
    forming = sum(point.form_seconds for point in report.points)
    measuring = sum(point.measure_seconds for point in report.points)
    yield (
        f"{len(report.points):,} merges formed in {forming:.1f} s and measured in {measuring:.1f} "
        f"s; the inputs took {report.held_bytes / 2**20:,.0f} MiB of memory."
    )
    yield (
        f"{code('chosen.yaml')} is the recipe of the recommended merge: "
        f"{code(f'bmerge merge {report.path}/chosen.yaml -o OUT')} gives these parameters."
    )
    # In one piece: a version alone would be escaped as the number of a list item, 0\.1.0.
    yield text(f"bmerge {report.version}; all settings and numbers are in preview.json.")
