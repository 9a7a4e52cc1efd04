"""The YAML front matter of a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bayes.hub.facts import Facts, License, Parent, adapter_base


def front_matter(
    facts: Facts, licenses: Mapping[Parent, License | None], notes: list[str], *, has_license: bool
) -> dict[str, Any]:
    from huggingface_hub import ModelCardData

    bases = list(dict.fromkeys(p.repo for p in facts.parents if p.repo is not None))
    if facts.is_adapter and facts.report:
        base = adapter_base(facts.adapter)
        bases = [*([base.repo] if base.repo and base.repo not in bases else []), *bases]
    local = list(dict.fromkeys(p.name for p in facts.parents if p.repo is None))
    if local:
        what = "is a local folder" if len(local) == 1 else "are local folders"
        notes.append(
            f"{', '.join(local)} {what}, which base_model cannot name; merge by Hub ids to have "
            "them linked"
        )
    relation: str | None = None  # the Hub has no word for a posterior's
    if facts.report:
        relation = "merge"
    elif facts.only_posterior:
        pass
    elif facts.is_adapter:
        relation = "adapter"
    else:
        relation = "finetune"
    tags = [
        "mergekit-bayes",
        *(["merge"] if facts.report else []),
        *(["posterior"] if facts.has_posterior else []),
    ]
    options: dict[str, Any] = {}
    if results := [r for report in facts.evaluations for r in _results(report)]:
        options = {"model_name": facts.repo.rpartition("/")[2], "eval_results": results}
    data = ModelCardData(
        base_model=bases or None,
        base_model_relation=relation if bases else None,
        library_name=None
        if facts.only_posterior
        else "peft"
        if facts.is_adapter
        else "transformers",
        pipeline_tag=facts.pipeline,
        tags=tags,
        **options,
    )
    written: Any = data  # the client's method has no types
    found = json.loads(json.dumps(written.to_dict())) | (
        dict(_license(facts.parents, licenses, notes)) if not has_license else {}
    )
    return {k: v for k, v in found.items() if v is not None}


def _license(
    found: Sequence[Parent], licenses: Mapping[Parent, License | None], notes: list[str]
) -> License:
    """The licence of all parents, if they agree."""
    if not found:
        notes.append(
            "no licence: nothing in the folder says what it was made from; name one in the front "
            "matter"
        )
        return {}
    known = {p: licenses.get(p) for p in found}
    if missing := list(dict.fromkeys(p.name for p, value in known.items() if not value)):
        notes.append(
            f"no licence: the cards of {', '.join(missing)} name none, or are not known here"
        )
        return {}
    values = [value for value in known.values() if value]
    if any(value != values[0] for value in values):
        said = ", ".join(f"{p.name}: {value['license']}" for p, value in known.items() if value)
        notes.append(
            f"no licence: the parents disagree ({said}); name one in the front matter yourself"
        )
        return {}
    return values[0]


def _results(report: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    rows: list[tuple[str, str, str, str, float]] = []  # task, data, metric, its name, value
    for name, found in (report.get("perplexity") or {}).items():
        rows.append(
            ("text-generation", name, "perplexity", "perplexity per token", _value(found["token"]))
        )
    for name, found in (report.get("classification") or {}).items():
        rows.append(
            ("text-classification", name, "accuracy", "accuracy", _value(found["accuracy"]))
        )
        rows.append(
            ("text-classification", name, "ece", "expected calibration error", _value(found["ece"]))
        )
    for scorer, found in (report.get("toxicity") or {}).items():
        name = Path(scorer.partition(":")[2] or scorer).name
        rows.append(
            (
                "text-generation",
                "prompts",
                "toxicity",
                f"toxic share by {name}",
                _value(found["share"]),
            )
        )
    return [
        EvalResult(
            task_type=task,
            dataset_type=data,
            dataset_name=data,
            metric_type=metric,
            metric_name=title,
            metric_value=value,
        )
        for task, data, metric, title, value in rows
    ]


def _value(interval: Any) -> float:
    return float(f"{interval['value'] if isinstance(interval, dict) else interval:.6g}")
