"""The section of a model card that we write: how the model was made, its recipe, its posterior."""

from collections.abc import Iterator

import yaml

from mergekit_bayes.checkpoint.side_files import ADAPT, EXTRACT, FINETUNE, MERGE_RECIPE
from mergekit_bayes.hub.adaptation import adaptation
from mergekit_bayes.hub.commands import further_section, posterior_code, use_section
from mergekit_bayes.hub.extraction import extraction
from mergekit_bayes.hub.facts import Facts
from mergekit_bayes.hub.folder import MergedModel, MergeRecord
from mergekit_bayes.hub.local_paths import published_recipe, without_paths
from mergekit_bayes.hub.markdown import block, code, one_line, table, text
from mergekit_bayes.hub.parents import TUNED
from mergekit_bayes.posterior import PosteriorInfo
from mergekit_bayes.posterior.wording import (
    anchor_in_words,
    edit_in_words,
    observations_in_words,
    prior_in_words,
)

_COLUMNS = (
    "model",
    "role",
    "scale",
    "share of the mixture",
    "commit",
    "observations",
    "sum H / sum H of the base",
)
_MIXED = (
    "The runs of a mixture have its scale together. The share of each is found in each tensor; the "
    "table has its mean over the entries."
)
_POOLED = {  # what a posterior holds the inverse variance of
    "tensor": "of each tensor (the mean of its entries)",
    "row": "of each row of a tensor (the mean of its entries)",
    "row-column": "of each entry as a product of two vectors",
    None: "of each entry",
}
_NOTES = 50  # of a merge; honest ones have a handful
_OPTIMIZERS = {"ivon": "IVON", "adamw": "AdamW"}


def card_section(facts: Facts) -> str:
    """The text between our two HTML comments."""
    section = "\n\n".join(_parts(facts))
    return section.replace("<!--", "&lt;!--")  # the two comments around it are the only ones


def _parts(facts: Facts) -> Iterator[str]:
    yield _how_it_was_made(facts)
    if facts.parents:
        yield _parents_table(facts)
        if any(p.run is not None for p in facts.parents):
            yield _MIXED
    report = facts.report
    if report is not None and report.models:
        summary = text(without_paths(report.summary, facts.places))
        lines = [*([summary] if summary else []), *_merge_numbers(report)]
        yield "\n".join(f"- {line}" for line in lines)
    elif report is not None:
        yield (
            f"Rank {report.rank}; the largest relative error of a layer is "
            f"{report.largest_error:.3g}."
        )
    if report is not None and report.notes:
        notes = [text(without_paths(note, facts.places)) for note in report.notes[:_NOTES]]
        if len(report.notes) > _NOTES:
            notes.append(f"... and {len(report.notes) - _NOTES} more")
        yield "Notes of the merge:\n\n" + "\n".join(f"- {note}" for note in notes)
    if facts.adapt:
        yield adaptation(facts)
    if facts.extract:
        yield extraction(facts)
    if facts.recipe or facts.finetune or facts.adapt or facts.extract:
        yield _recipe(facts)
    yield use_section(facts)
    if facts.has_posterior:
        yield _posterior(facts)
    if not facts.only_posterior:
        yield further_section(facts)


def _how_it_was_made(facts: Facts) -> str:
    title = "## How it was made\n\n"
    tool = "`bmerge` (mergekit-bayes)"
    report = facts.report
    if report is not None:
        if models := report.models:
            tasks = [m for m in models if m.role != "base"]
            mixtures = len({m.mixture for m in tasks} - {None})
            count = sum(m.mixture is None for m in tasks) + mixtures
            merged = f"{count} model{'s' * (count > 1)}{' on a base' * (len(tasks) < len(models))}"
            what = f"{merged} by {code(report.method)}"
        else:
            what = f"{len(report.adapters)} adapters"
        version = one_line(text(report.version), 40)
        return f"{title}{tool} {version} merged {what}:\n\n{block(report.formula)}"
    if facts.finetune:
        what = "an adapter (LoRA) " if facts.is_adapter else ""
        optimizer = _OPTIMIZERS.get(str(facts.finetune.get("optimizer", "ivon")), "?")
        return f"{title}{tool} fine-tuned {what}with {optimizer}."
    if facts.adapt:
        what = "an adapter (LoRA) " if facts.is_adapter else ""
        optimizer = _OPTIMIZERS.get(str(facts.adapt.get("optimizer", "adamw")), "?")
        return (
            f"{title}{tool} adapted {what}with {optimizer}: rows were removed or added in a few "
            "steps, and the rest was held where it was (a K-prior)."
        )
    if facts.extract:
        tuned = next((p.title for p in facts.parents if p.role == TUNED), "a tuned model")
        version = one_line(text(facts.extraction.version), 40)
        return (
            f"{title}{tool} {version} took the change of {code(tuned)} from its base as an adapter "
            "(LoRA): nothing was trained here."
        )
    if facts.only_posterior:
        return (
            f"{title}A precision for a model that lies elsewhere, made with {tool}; there are no "
            "weights here."
        )
    return f"{title}Nothing in the folder says how these weights were made; {tool} pushed them."


def _parents_table(facts: Facts) -> str:
    models = facts.report.models if facts.report is not None else []
    by_ref = {m.ref: m for m in models}
    of_mixtures: dict[str, float] = {}  # the scale that the runs of each have together
    for m in models:
        if m.mixture is not None:
            of_mixtures[m.mixture] = of_mixtures.get(m.mixture, 0.0) + (m.scale or 0.0)
    rows = []
    for i, p in enumerate(facts.parents):
        place = code(p.title) if p.repo else f"{code(p.title)} (local)"
        if p.repo and p.commit:
            place = f"[{text(p.title)}](https://huggingface.co/{p.repo}/tree/{p.commit})"
        # BASE+ADAPTER is one model of the merge and two parents.
        one_each = len(models) == len(facts.parents)
        numbers = models[i] if one_each else by_ref.get(p.repo or "", MergedModel())
        scale = p.scale if numbers.mixture is None else of_mixtures[numbers.mixture]
        rows.append(
            [
                place,
                text(p.role),
                "" if scale is None else f"{scale:g}{' together' * (numbers.mixture is not None)}",
                "" if numbers.share is None else f"{numbers.share:.1%}",
                code(p.commit) if p.commit else "",
                _number(numbers.observations),
                _number(numbers.ratio),
            ]
        )
    filled = [i for i in range(len(_COLUMNS)) if i < 2 or any(row[i] for row in rows)]
    return table([_COLUMNS[i] for i in filled], [[row[i] for i in filled] for row in rows])


def _merge_numbers(report: MergeRecord) -> Iterator[str]:
    yield (
        f"{report.merged_tensors} tensors merged, {len(report.copied)} copied, "
        f"{len(report.left_out)} left out"
    )
    if report.largest_multiplier > 0:  # only a removal in natural parameters is guarded
        share = report.guarded_share
        acted = "less than 0.01%" if 0 < share < 5e-5 else f"{share:.2%}"  # never 0 if it acted
        yield (
            f"guard {report.guard:g}: it acted on {acted} of the entries; "
            f"the largest multiplier of what was removed is {report.largest_multiplier:.3g}"
        )
    if (changed := report.changed_share) is not None:
        yield f"{changed:.2%} of the merged entries differ from the base in some model"
    if (lost := report.lost_share) is not None:
        yield f"{lost:.2%} of those have the base's value in the output"


def _recipe(facts: Facts) -> str:
    named = (
        (MERGE_RECIPE, facts.recipe),
        (FINETUNE, facts.finetune),
        (ADAPT, facts.adapt),
        (EXTRACT, facts.extract),
    )
    name, settings = next((name, content) for name, content in named if content)
    documents = (*facts.earlier_recipes, settings) if name == MERGE_RECIPE else (settings,)
    content = [published_recipe(document, facts.parents) for document in documents]
    lines = yaml.safe_dump_all(content, sort_keys=False, allow_unicode=True, width=10**6).rstrip()
    head = f"## Recipe\n\n`{name}` without what was left out, local paths by their last part:"
    return f"{head}\n\n{block(lines, 'yaml', backticks=4)}"


def _posterior(facts: Facts) -> str:
    parts = [
        "## Posterior",
        f"`posterior/precision.posterior` holds the inverse variance {_POOLED[facts.pool]}, "
        "1/weight^2, under the names of the weights' tensors. It belongs to these weights only, "
        "and readers check that.",
    ]
    if facts.has_matrices:
        parts.append(
            "For the weights of linear layers it holds matrices instead, under names that begin "
            "with `right:` or `left:`: the precision of a whole row, or column, of the weight. "
            "Beside a name that begins with `diagonal:` they are its factor of low rank."
        )
    if facts.info is not None:
        parts.append(table(["", ""], [row for row in _info_rows(facts.info) if row[1]]))
    if not facts.only_posterior:
        parts.append(posterior_code(facts))
    return "\n\n".join(parts)


def _info_rows(info: PosteriorInfo) -> Iterator[tuple[str, str]]:
    yield "estimator", text(info.estimator)
    yield "stands for", observations_in_words(info)
    if info.ess != info.observations:
        yield "scaled by (ess)", _number(info.ess)
    yield "prior", prior_in_words(info)
    yield "anchor", anchor_in_words(info)
    for edit in info.edits:
        yield "adaptation", text(edit_in_words(edit, info.unit))
    yield "weights, by sampled blocks", code(info.mean.blocks)
    for name, value in info.health.items():
        yield text(name), _number(value)


def _number(value: object) -> str:
    """A number for a table; empty for None and for a truth value."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, (int, float)):
        is_whole = float(value).is_integer() and abs(value) < 1e15
        return f"{value:,.0f}" if is_whole else f"{value:.4g}"
    return text(value)
