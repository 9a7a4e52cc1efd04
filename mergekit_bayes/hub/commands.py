"""The code and commands that a card prints: how to load the model, merge it further, or undo it."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.side_files import MERGE_RECIPE
from mergekit_bayes.hub.facts import Facts
from mergekit_bayes.hub.folder import MergedModel, mapping, text_or_none, texts
from mergekit_bayes.hub.local_paths import last_parts
from mergekit_bayes.hub.markdown import block, code, one_line, word
from mergekit_bayes.hub.parents import named_parents
from mergekit_bayes.methods import METHODS
from mergekit_bayes.plan import MergeConfig

_MODEL_SETTINGS = ("precision", "isotropic", "observations")  # each of a single model
_MERGE_SETTINGS = ("counts", "shrink", "pool", "anchor", "only", "on_missing", "vocab", "on_bad")
_EXTRACT_SETTINGS = (
    *("rank", "tolerance", "weights", "precision", "sweeps"),
    *("embeddings", "rest", "dtype"),
)
_FLAG = re.compile(r"[a-z]+(-[a-z]+)*")
_LONGEST_LINE = 1000  # characters
_AUTO_MODELS = {
    "text-classification": "AutoModelForSequenceClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
}


def use_section(facts: Facts) -> str:
    """How to load the model, or how to merge with a posterior that has no model beside it."""
    if facts.only_posterior:
        model = facts.parents[0].name if facts.parents else "MODEL"
        line = (
            f"bmerge merge {word(model)} OTHER --weights precision --precision "
            f"{word(f'{model}={facts.repo}')} -o merged"
        )
        return (
            "## Use\n\nWith the model that it belongs to, whose weights are checked:\n\n"
            f"{block(line, 'bash')}"
        )
    name = _python_text(facts.repo)
    if facts.is_adapter:
        task = "SequenceClassification" if facts.pipeline == "text-classification" else "CausalLM"
        lines = (
            f"from peft import AutoPeftModelFor{task}\n\n"
            f"model = AutoPeftModelFor{task}.from_pretrained({name})"
        )
    else:
        auto = _AUTO_MODELS.get(facts.pipeline or "", "AutoModel")
        lines = (
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f"model = {auto}.from_pretrained({name})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})"
        )
    return f"## Use\n\n{block(lines, 'python')}"


def posterior_code(facts: Facts) -> str:
    """Python that opens the posterior beside the weights."""
    name = _python_text(facts.repo)
    if facts.is_adapter:
        source, opened = "lora import open_adapter", f"open_adapter({name}).posterior"
    else:
        source, opened = "posterior import open_posterior", f"open_posterior({name})"
    return block(
        f"from mergekit_bayes.{source}\n\n"
        f"posterior = {opened}  # posterior.mean, .precision, .info",
        "python",
    )


def _python_text(value: str) -> str:
    """A string literal of Python, in double quotes."""
    return json.dumps(one_line(value), ensure_ascii=False)


def further_section(facts: Facts) -> str:
    """Commands that merge the model further, take a task out of it, and repeat its merge."""
    base = _base(facts)
    on_base = f" --base {word(base)}" if base and not facts.is_adapter else ""
    undoing = [_undo(facts, task, base, on_base) for task in _undoable(facts)] if on_base else []
    commands = [*_merging(facts, base, on_base), *undoing]
    if facts.recipe:
        flags = {f: last_parts(v) for f, v in facts.flags.items() if _FLAG.fullmatch(f)}
        needed = "".join(f" --{flag} {word(value)}" for flag, value in flags.items())
        # Our own recipe has the models' hashes, and other models are refused.
        models = " from the same models" if "merge_method" in facts.recipe else ""
        line = f"bmerge merge {MERGE_RECIPE}{needed} -o again"
        commands.append(_Command(line, f"make it again, with the same bytes{models}"))
    if facts.extract:
        commands = [*_extracting(facts), *commands]
    # A name that had to be cut names something else.
    commands = [command for command in commands if len(command.line) <= _LONGEST_LINE]
    width = max(len(command.line) for command in commands) if commands else 0
    lines = (f"{command.line:<{width}}   # {one_line(command.comment)}" for command in commands)
    title = "Merge it further, or undo it" if undoing else "Merge it further"
    return f"## {title}\n\n{_needed(facts)}{block(chr(10).join(lines), 'bash')}"


def _needed(facts: Facts) -> str:
    """Say which models of the commands a reader of the card has not got."""
    local = list(dict.fromkeys(code(p.name) for p in facts.parents if p.repo is None))
    if not local:
        return ""
    are = "is a local model" if len(local) == 1 else "are local models"
    return f"{', '.join(local)} {are} of the author; commands that name one need it.\n\n"


class _Command(NamedTuple):
    line: str
    comment: str


def _extracting(facts: Facts) -> Iterator[_Command]:
    """How to fold an extracted adapter, and to make it again."""
    settings = facts.extract
    refs = (text_or_none(settings.get(name)) for name in ("model", "base"))
    tuned, base = (_typed(ref, None) if ref else "" for ref in refs)
    if base and "+" not in base:
        line = f"bmerge merge {word(f'{base}+{facts.repo}')} -o whole"
        yield _Command(line, "the base with the change, as one model")
    if base and tuned:
        line = (
            f"bmerge extract {word(tuned)} --base {word(base)}{_extract_flags(settings)} -o again"
        )
        yield _Command(line, "make the adapter again")


def _extract_flags(settings: Mapping[str, object]) -> str:
    flags = []
    for key in _EXTRACT_SETTINGS:
        value = settings.get(key)
        if value is True:
            flags.append(f"--{key}")
        elif isinstance(value, (str, int, float)) and value is not False:
            flags.append(f"--{key}={last_parts(value)}")
    return "".join(f" {shlex.quote(one_line(flag))}" for flag in flags)


def _base(facts: Facts) -> str | None:
    """The base of the merge, or of the fine-tune, as the user types it."""
    if facts.report is not None:
        merged = (m for m in facts.report.models if m.ref not in facts.report.stages)
        bases = (_typed(m.ref, m.commit) for m in merged if m.role == "base")
    else:
        bases = (_typed(p.name, p.commit) for p in facts.parents if p.role == "base")
    return next(bases, None)


def _merging(facts: Facts, base: str | None, on_base: str) -> list[_Command]:
    merged = facts.report is not None and bool(facts.report.models)
    weights = "precision" if facts.has_posterior else "uniform"
    start = f"bmerge merge {word(facts.repo)} OTHER"
    if merged or not on_base or weights == "uniform":
        repeated = merged and weights == facts.recipe.get("weights")
        settings = _settings(facts.recipe, [base]) if repeated else ""
        line = f"{start}{on_base} --weights {weights}{settings} -o merged"
        return [_Command(line, "merge it further")]
    # The base of a fine-tune has no posterior as a rule, so precisions are merged without it.
    return [
        _Command(f"{start} --weights precision -o merged", "the surer entry counts more"),
        _Command(f"{start}{on_base} -o merged", "add what both learnt"),
    ]


def _undoable(facts: Facts) -> list[MergedModel]:
    """Up to three tasks that a single scale takes out again.

    There are none if the merge weighed by a precision that is not here, or not as it was.
    """
    report = facts.report
    method = METHODS.get(report.method) if report is not None else None
    if report is None or method is None or not method.can_be_undone:
        return []
    if report.weights not in ("precision", "uniform"):
        return []
    if report.weights == "precision" and (not facts.has_posterior or facts.pool is not None):
        return []
    if texts(facts.recipe.get("scale")):  # other scales in some tensors
        return []
    if "merge_method" in facts.recipe:  # whose weights need not be scales of whole models
        return []
    if any(m.mixture is not None for m in report.models):  # shares that all models decide
        return []
    return [m for m in report.models if m.role == "task" and m.scale][:3]


def _undo(facts: Facts, model: MergedModel, base: str | None, on_base: str) -> _Command:
    task = _typed(model.ref, model.commit)
    scale = str(-(model.scale or 0)).removesuffix(".0")
    weights = facts.report.weights if facts.report is not None else "uniform"
    line = (
        f"bmerge merge {word(facts.repo)} {word(task)}{on_base} "
        f"--weights {word(weights)} --scale 1 --scale {scale}"
        f"{_settings(facts.recipe, [base, task])} -o without"
    )
    name = re.sub(r"@[0-9a-f]{40}", "", task)
    was_removed = (model.scale or 0) < 0
    return _Command(line, f"put {name} back" if was_removed else f"take {name} out again")


def _settings(recipe: Mapping[str, object], refs: Sequence[str | None]) -> str:
    """The flags that a merge with this one's result must repeat, those of single models for `refs`.

    Settings at their defaults are left out.
    """
    flags = []
    for key in _MODEL_SETTINGS:
        by_ref = mapping(recipe.get(key))
        by_typed = {_typed(ref, None): value for ref, value in by_ref.items()}
        flags += [f"--{key}={ref}={last_parts(by_typed[ref])}" for ref in refs if ref in by_typed]
    for key in _MERGE_SETTINGS:
        default = MergeConfig.model_fields[key].default
        value = recipe.get(key, default)
        if isinstance(value, (str, int, float)) and value != default:
            flags.append(f"--{key.replace('_', '-')}={value}")
    return "".join(f" {shlex.quote(one_line(flag))}" for flag in flags)


def _typed(ref: str, commits: str | None) -> str:
    """What to type for a model: a Hub id at its commit, a local path by its last part."""
    parts = []
    for parent in named_parents(ref, "", None, commits):
        if parent.repo and parent.commit:
            parts.append(f"{parent.repo}@{parent.commit}")
        else:
            parts += [Path(path).name for path in (parent.path or "").split("+")]
    return "+".join(parts)
