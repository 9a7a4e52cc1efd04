"""The sections of a model card."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_bayes.hub.facts import Facts, named_parents
from mergekit_bayes.methods import METHODS

_FRAME = {
    "counts": "equal",
    "shrink": None,
    "pool": None,
    "anchor": "h0",
    "only": None,
    "on_missing": "error",
    "vocab": "error",
    "on_bad": "error",
}


def card_section(facts: Facts) -> str:
    parts = [_opening(facts)]
    if facts.parents:
        parts.append(_table_of_parents(facts))
    if facts.report.get("models"):
        parts.append(_merge_numbers(facts.report))
    elif facts.report:
        parts.append(
            f"Rank {facts.report['rank']}; the largest relative error of a layer is "
            f"{facts.report['largest_error']:.3g}."
        )
    if notes := [_published(n, facts) for n in facts.report.get("notes", ())]:
        parts.append("Notes of the merge:\n\n" + "\n".join(f"- {n}" for n in notes))
    if recipe := facts.recipe or facts.finetune:
        name = "merge_recipe.yaml" if facts.recipe else "finetune.yaml"
        text = yaml.safe_dump(
            _shortened(recipe), sort_keys=False, allow_unicode=True, width=10**6
        ).rstrip()
        parts.append(
            f"## Recipe\n\n`{name}`, local paths by their last part:\n\n````yaml\n{text}\n````"
        )
    parts.append(_loading(facts))
    if facts.has_posterior:
        parts.append(_posterior(facts))
    if further := _further(facts):
        parts.append(further)
    return "\n\n".join(parts).replace(
        "<!--", "&lt;!--"
    )  # the two comments around it are the only ones


def _opening(facts: Facts) -> str:
    title = "## How it was made\n\n"
    tool = "`bmerge` (mergekit-bayes)"
    if facts.report.get("models"):
        count = sum(m["role"] != "base" for m in facts.report["models"])
        what = f"{count} model{'s' * (count > 1)}" + (
            " on a base" if count < len(facts.report["models"]) else ""
        )
        text = (
            f"{tool} {facts.report.get('version', '')} merged {what} by `{facts.report['method']}`:"
        )
        return f"{title}{text}\n\n```\n{facts.report['formula']}\n```"
    if facts.report:
        text = f"{tool} {facts.report.get('version', '')} merged {len(facts.report['adapters'])} adapters:"
        return f"{title}{text}\n\n```\n{facts.report['formula']}\n```"
    if facts.finetune:
        lora = "an adapter (LoRA) " if facts.is_adapter else ""
        how = {"ivon": "IVON", "adamw": "AdamW"}.get(
            str(facts.finetune.get("optimizer", "ivon")), "?"
        )
        return f"{title}{tool} fine-tuned {lora}with {how}."
    if facts.only_posterior:
        return f"{title}A precision for a model that lies elsewhere, made with {tool}; there are no weights here."
    return f"{title}Nothing in the folder says how these weights were made; {tool} pushed them."


def _table_of_parents(facts: Facts) -> str:
    merged = facts.report.get("models") or []
    numbers = {m["ref"]: m for m in merged}
    rows = []
    for i, p in enumerate(facts.parents):
        where = (
            f"[{p.repo}](https://huggingface.co/{p.repo}/tree/{p.commit})"
            if p.repo and p.commit
            else f"`{p.name}`"
        )
        number = merged[i] if len(merged) == len(facts.parents) else numbers.get(p.repo, {})
        rows.append(
            [
                where,
                p.role,
                "" if p.scale is None else f"{p.scale:g}",
                f"`{p.commit}`" if p.commit else "",
                _number(number.get("observations")),
                _number(number.get("ratio")),
            ]
        )
    columns = ["model", "role", "scale", "commit", "observations", "sum H / sum H of the base"]
    keep = [i for i in range(len(columns)) if i < 2 or any(row[i] for row in rows)]
    lines = [
        [columns[i] for i in keep],
        ["---"] * len(keep),
        *([row[i] for i in keep] for row in rows),
    ]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _merge_numbers(report: Mapping[str, Any]) -> str:
    lines = [
        f"- {report['merged_tensors']} tensors merged, {len(report['copied'])} copied, "
        f"{len(report['left_out'])} left out"
    ]
    if any((m["scale"] or 0) < 0 for m in report["models"]):
        lines.append(
            f"- guard {report['guard']:g}: it acted on {report['guarded_share']:.2%} of the "
            "entries; the largest "
            f"multiplier of what was removed is {report['largest_multiplier']:.3g}"
        )
    if report.get("changed_share") is not None:
        lines.append(
            f"- {report['changed_share']:.2%} of the merged entries differ from the base in some "
            "model"
        )
    if report.get("lost_share") is not None:
        lines.append(f"- {report['lost_share']:.2%} of those were rounded back to the base's value")
    return "\n".join(lines)


def _loading(facts: Facts) -> str:
    if facts.only_posterior:
        model = facts.parents[0].name if facts.parents else "MODEL"
        return (
            "## Use\n\nWith the model that it belongs to, whose weights are checked:\n\n```bash\n"
            f"bmerge merge {model} OTHER --weights precision --precision {model}={facts.repo} -o "
            "merged\n```"
        )
    if facts.is_adapter:
        kind = "SequenceClassification" if facts.pipeline == "text-classification" else "CausalLM"
        code = f"from peft import AutoPeftModelFor{kind}\n\n"
        code += f'model = AutoPeftModelFor{kind}.from_pretrained("{facts.repo}")'
    else:
        kind = {
            "text-classification": "AutoModelForSequenceClassification",
            "fill-mask": "AutoModelForMaskedLM",
            "text-generation": "AutoModelForCausalLM",
        }.get(facts.pipeline or "", "AutoModel")
        code = f'from transformers import {kind}, AutoTokenizer\n\nmodel = {kind}.from_pretrained("{facts.repo}")\n'
        code += f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo}")'
    return f"## Use\n\n```python\n{code}\n```"


def _posterior(facts: Facts) -> str:
    text = [
        "## Posterior",
        "`posterior/precision.safetensors` holds the inverse variance of each entry, 1/weight^2, "
        "under the names "
        "of the weights' tensors. It belongs to these weights only, and readers check that.",
    ]
    if (info := facts.info) is not None:
        prior = (
            "none"
            if info.prior.kind == "none"
            else f"{info.prior.kind}, {info.prior.precision:.4g}"
        )
        pull: str = info.anchor.kind
        if info.anchor.precision is not None and pull != "none":
            pull += f", {info.anchor.precision:.4g}"
        rows = [
            ("estimator", info.estimator),
            (
                "observations",
                f"{_number(info.observations) or 'unknown'} (unit: {info.unit or 'unknown'})",
            ),
            ("scale (ess)", _number(info.ess)),
            ("prior inside it", prior),
            ("trained towards", pull),
            ("weights, by sampled blocks", f"`{info.mean.blocks}`"),
            *((str(k), _number(v)) for k, v in info.health.items()),
        ]
        text.append("| | |\n| --- | --- |\n" + "\n".join(f"| {k} | {v} |" for k, v in rows if v))
    if not facts.only_posterior:
        name = "open_adapter" if facts.is_adapter else "open_posterior"
        room = "lora" if facts.is_adapter else "posterior"
        opened = f'{name}("{facts.repo}")' + (".posterior" if facts.is_adapter else "")
        code = f"from mergekit_bayes.{room} import {name}\n\nposterior = {opened}"
        code += "  # posterior.mean, .precision, .info"
        text.append(f"```python\n{code}\n```")
    return "\n\n".join(text)


def _further(facts: Facts) -> str | None:
    if facts.only_posterior:
        return None
    report, lines = facts.report, []
    merged = report.get("models") or []
    if report:
        base = next(
            (_pinned(m["ref"], m.get("commit")) for m in merged if m["role"] == "base"), None
        )
    else:
        base = next((_pinned(p.name, p.commit) for p in facts.parents if p.role == "base"), None)
    weights = "precision" if facts.has_posterior else "uniform"
    on = f" --base {shlex.quote(base)}" if base and not facts.is_adapter else ""
    frame = (
        _frame(facts.recipe, [base]) if merged and weights == facts.recipe.get("weights") else ""
    )
    if merged or not on or weights == "uniform":
        lines.append(
            f"bmerge merge {facts.repo} OTHER{on} --weights {weights}{frame} -o merged       # "
            "merge it further"
        )
    else:  # a fine-tune's base has no posterior as a rule
        lines.append(
            f"bmerge merge {facts.repo} OTHER --weights precision -o merged       # the surer "
            "entry counts more"
        )
        lines.append(f"bmerge merge {facts.repo} OTHER{on} -o merged       # add what both learnt")
    for undo in _undoable(facts) if on else ():
        task = _pinned(undo["ref"], undo.get("commit"))
        lines.append(
            f"bmerge merge {facts.repo} {shlex.quote(task)}{on} --weights {report['weights']} "
            "--scale 1 "
            f"--scale {str(-undo['scale']).removesuffix('.0')}{_frame(facts.recipe, [base, task])} "
            "-o without       "
            f"# take {re.sub(r'@[0-9a-f]{40}', '', task)} out again"
        )
    if facts.recipe:
        lines.append(
            "bmerge merge merge_recipe.yaml -o again       # make it anew, with the same bytes"
        )
    width = max(line.index("       #") for line in lines)
    aligned = [
        f"{line.partition('       #')[0]:<{width}}   #{line.partition('       #')[2]}"
        for line in lines
    ]
    title = (
        "Merge it further, or undo it"
        if any("-o without" in line for line in lines)
        else "Merge it further"
    )
    return f"## {title}\n\n```bash\n" + "\n".join(aligned) + "\n```"


def _undoable(facts: Facts) -> list[Mapping[str, Any]]:
    """Up to three tasks that one scale takes out again; none where the precision to do it with is
    missing.
    """
    report = facts.report
    method = METHODS.get(report.get("method", ""))
    if method is None or not method.can_be_undone:
        return []
    if report["weights"] == "precision" and not facts.has_posterior:
        return []
    if any(
        isinstance(scale, str) for scale in facts.recipe.get("scale", ())
    ):  # other scales in some tensors
        return []
    return [m for m in report["models"] if m["role"] == "task" and m["scale"]][:3]


def _frame(recipe: Mapping[str, Any], refs: Sequence[str | None]) -> str:
    """The settings of a merge that one with its result must repeat, those of single models only for
    `refs`.
    """
    words = []
    for key in ("precision", "isotropic", "observations"):
        named = {_pinned(ref, None): value for ref, value in (recipe.get(key) or {}).items()}
        words += [f"--{key}={ref}={_shortened(named[ref])}" for ref in refs if ref in named]
    for key, usual in _FRAME.items():
        if (value := recipe.get(key, usual)) != usual:
            words.append(f"--{key.replace('_', '-')}={value}")
    return "".join(f" {shlex.quote(word)}" for word in words)


def _pinned(ref: str, commits: str | None) -> str:
    """What to type for a model: each Hub id at its commit, a local path by its last part;
    BASE+ADAPTER as a whole.
    """
    parts = []
    for p in named_parents(ref, "", None, commits):
        places = (p.path or "").split("+")
        parts += (
            [f"{p.repo}@{p.commit}"]
            if p.repo and p.commit
            else [Path(place).name for place in places]
        )
    return "+".join(parts)


def _shortened(value: Any) -> Any:
    """Local paths by their last part: where files lie on somebody's machine is no news."""
    if isinstance(value, dict):
        return {_shortened(k): _shortened(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortened(v) for v in value]
    return "+".join(_last(p) for p in value.split("+")) if isinstance(value, str) else value


def _last(text: str) -> str:
    return (
        Path(text).name
        if text.startswith(("/", "~", ".")) and len(text) > 2 and " " not in text
        else text
    )


def _published(note: str, facts: Facts) -> str:
    for p in facts.parents:
        if p.path and "/" in p.path:
            note = note.replace(p.path, p.name)
    return note


def _number(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, (int, float)):
        return (
            f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
        )
    return str(value)
