"""The YAML front matter of a model card: how it is read, made of a folder's facts, and written.

Our own fields are made by the Hub client (`ModelCardData`, `EvalResult`), which knows their names
and the form of a model-index. Fields that a user wrote are read and written by PyYAML, since the
client's `ModelCard` (huggingface_hub 2.4) does not keep all of them. It drops empty fields,
repeated tags and, in a model-index, unknown keys and every name but the last. It refuses a
malformed model-index and keys that are not strings. It logs a warning for a card without front
matter.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import yaml

from mergekit_bayes.documents import parse_yaml
from mergekit_bayes.hub.facts import Facts
from mergekit_bayes.hub.folder import mapping
from mergekit_bayes.hub.markdown import one_line
from mergekit_bayes.hub.parents import TUNED, adapter_base

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

Fields = dict[str, object]
_BLOCK = re.compile(r"\A---[ \t]*\r?\n(?P<yaml>.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.S)


def split_card(card: str) -> tuple[Fields, str]:
    """The fields of a card's front matter, and the text below it.

    Raises:
        ValueError: The front matter is not a YAML mapping.
    """
    block = _BLOCK.match(card)
    if block is None:
        return {}, card
    fields = parse_yaml(block["yaml"]) or {}
    if not isinstance(fields, dict):
        raise ValueError("it is not a mapping")
    return fields, card[block.end() :]


def join_card(fields: Mapping[str, object], text: str) -> str:
    """A card with these fields in its front matter and this text below."""
    block = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{block}---\n\n{text}"


def front_matter(facts: Facts) -> tuple[Fields, tuple[str, ...]]:
    """The fields that a folder's facts give, without the licence, and notes for the user."""
    from huggingface_hub import ModelCardData

    found = (p.repo for p in facts.parents if p.repo is not None and p.role != TUNED)
    bases = list(dict.fromkeys(found))
    if facts.is_adapter and facts.report is not None:
        base = adapter_base(facts.adapter)
        if base is not None and base.repo and base.repo not in bases:
            bases = [base.repo, *bases]
    results = [result for report in facts.evaluations for result in _eval_results(report)]
    data = ModelCardData(
        base_model=bases or None,
        base_model_relation=_relation(facts) if bases else None,
        library_name=_library(facts),
        pipeline_tag=facts.pipeline,
        tags=[
            "mergekit-bayes",
            *(["merge"] if facts.report is not None else []),
            *(["posterior"] if facts.has_posterior else []),
        ],
        model_name=facts.repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    fields = cast(Fields, data.to_dict())  # type: ignore[no-untyped-call]
    return fields, tuple(_unnamed_parents(facts))


def _relation(facts: Facts) -> str | None:
    if facts.report is not None:
        return "merge"
    if facts.only_posterior:  # the Hub has no word for the relation of a posterior to its model
        return None
    return "adapter" if facts.is_adapter else "finetune"


def _library(facts: Facts) -> str | None:
    if facts.only_posterior:
        return None
    return "peft" if facts.is_adapter else "transformers"


def _unnamed_parents(facts: Facts) -> Iterator[str]:
    if local := list(dict.fromkeys(p.name for p in facts.parents if p.repo is None)):
        verb = "is a local folder" if len(local) == 1 else "are local folders"
        yield (
            f"{', '.join(local)} {verb}, which base_model cannot name; merge by Hub ids to have "
            "them linked"
        )


class _Score(NamedTuple):
    task: str
    data: str
    metric: str
    title: str
    value: float


def _eval_results(report: Mapping[str, object]) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=score.task,
            dataset_type=score.data,
            dataset_name=score.data,
            metric_type=score.metric,
            metric_name=score.title,
            metric_value=float(f"{score.value:.6g}"),
        )
        for score in _scores(report)
    ]


def _scores(report: Mapping[str, object]) -> Iterator[_Score]:
    """The results of an evaluation that the Hub's model-index has a place for."""
    tasks = "text-generation", "text-classification"
    yield from _of(report, "perplexity", "token", tasks[0], "perplexity", "perplexity per token")
    yield from _of(report, "classification", "accuracy", tasks[1], "accuracy", "accuracy")
    error = "expected calibration error"
    yield from _of(report, "classification", "ece", tasks[1], "ece", error)
    for scorer, values in mapping(report.get("toxicity")).items():
        title = f"toxic share by {Path(scorer.partition(':')[2] or scorer).name}"
        if (share := _number(mapping(values).get("share"))) is not None:
            yield _Score(tasks[0], "prompts", "toxicity", one_line(title, 200), share)
    for data, measured in mapping(report.get("lm_eval")).items():
        yield from _of_task(data, mapping(measured))


def _of_task(data: str, report: Mapping[str, object]) -> Iterator[_Score]:
    """The scores on one task of lm-eval, whose name stands for its data."""
    shots = report.get("shots")
    how = f"{shots} shots, " if isinstance(shots, int) else ""
    how += f"lm-eval {report.get('lm_eval_version')}, task version {report.get('task_version')}"
    for key, values in mapping(report.get("scores")).items():
        score = mapping(values)
        if (number := _number(score.get("score"))) is None:
            continue
        metric = one_line(str(score.get("metric", key)), 200)
        rule = score.get("filter")
        title = f"{metric} ({'' if rule in (None, 'none') else f'{rule}, '}{how})"
        yield _Score("text-generation", one_line(data, 200), metric, one_line(title, 200), number)


def _of(
    report: Mapping[str, object], part: str, key: str, task: str, metric: str, title: str
) -> Iterator[_Score]:
    """One number of each data set in a part of an evaluation."""
    for data, values in mapping(report.get(part)).items():
        if (number := _number(mapping(values).get(key))) is not None:
            yield _Score(task, one_line(data, 200), metric, title, number)


def _number(value: object) -> float | None:
    """A finite number, or that of an interval with its `value`; None for anything else."""
    number = value.get("value") if isinstance(value, dict) else value
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return None
    return float(number) if math.isfinite(number) else None
