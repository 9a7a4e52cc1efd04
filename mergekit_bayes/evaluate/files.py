"""Write and read the files of an evaluation: report, documents, examples and continuations."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.documents import DocumentError, as_record, parse_lines, read_record
from mergekit_bayes.errors import CheckpointError, shown
from mergekit_bayes.evaluate.continuations import Continuations
from mergekit_bayes.evaluate.report import EvaluateReport, TaskReport
from mergekit_bayes.metrics.classification import ClassificationReport
from mergekit_bayes.metrics.perplexity import PerplexityReport
from mergekit_bayes.metrics.quality import JudgedReport
from mergekit_bayes.metrics.toxicity import ToxicityReport
from mergekit_bayes.records import Frozen

Row: TypeAlias = dict[str, Any]  # a line of a JSONL file
T = TypeVar("T")
R = TypeVar("R", bound=Frozen)
_REPORT = "report.json"
_DOCUMENTS = "documents.jsonl"
_EXAMPLES = "examples.jsonl"
_CONTINUATIONS = "continuations.jsonl"
_TASKS = "lm_eval.jsonl"
_AGAIN = "Remove the folder, and measure again."


class _Line(Frozen):
    """What is read back of a line; the rest is for readers of the file."""

    model_config = ConfigDict(extra="ignore")


class _DocumentRow(_Line):
    set: str
    nats: float
    tokens: int
    sampled_nats: float | None = None


class _ExampleRow(_Line):
    set: str
    label: int
    nats: float
    probabilities: tuple[float, ...]
    sampled_nats: float | None = None
    sampled_probabilities: tuple[float, ...] | None = None


class _Judgement(_Line):
    nats: float
    tokens: int
    bytes: int


class _ContinuationRow(_Line):
    scores: dict[str, float]
    judge: _Judgement | None = None


class _TaskRow(_Line):
    task: str
    metric: str
    value: float


def write_report(
    folder: Path, report: EvaluateReport, continuations: Continuations | None, *, force: bool
) -> None:
    """Write the files of an evaluation.

    Args:
        folder: The output; it appears under its name only when it is complete.
        report: What was measured.
        continuations: What was scored, if anything.
        force: Replace a folder that exists.
    """
    with replacing(folder, force=force) as unfinished:
        write_files(unfinished, report, continuations)


def write_files(folder: Path, report: EvaluateReport, continuations: Continuations | None) -> None:
    """Write `report.json`, and the numbers by document, example and continuation beside it.

    Args:
        folder: A new folder, inside of one that is not finished.
        report: What was measured.
        continuations: What was scored, if anything.
    """
    folder.mkdir()
    (folder / _REPORT).write_text(report.model_dump_json(indent=2) + "\n")
    _write_lines(folder / _DOCUMENTS, _document_rows(report))
    if report.classification:
        _write_lines(folder / _EXAMPLES, _example_rows(report))
    if any(_task_rows(report)):
        _write_lines(folder / _TASKS, _task_rows(report))
    if continuations is not None:
        rows = _continuation_rows(continuations, report.settings["seed"])
        _write_lines(folder / _CONTINUATIONS, rows)


def read_report(folder: str | Path) -> EvaluateReport:
    """A report as `run_evaluate` returned it, with the numbers that its JSON leaves out.

    Raises:
        CheckpointError: A file of the folder cannot be read.
    """
    folder = Path(folder)
    report = read_record(EvaluateReport, folder / _REPORT, _AGAIN)
    try:
        documents = _read_lines(folder / _DOCUMENTS, _DocumentRow)
        examples = _read_lines(folder / _EXAMPLES, _ExampleRow)
        continuations = _read_lines(folder / _CONTINUATIONS, _ContinuationRow)
        task_rows = _read_lines(folder / _TASKS, _TaskRow)
        sampled = report.sampled
        if sampled is not None:
            update = {
                "perplexity": _with_documents(sampled.perplexity, documents, sampled=True),
                "classification": _with_examples(sampled.classification, examples, sampled=True),
            }
            sampled = sampled.model_copy(update=update)
        return report.model_copy(
            update={
                "perplexity": _with_documents(report.perplexity, documents, sampled=False),
                "classification": _with_examples(report.classification, examples, sampled=False),
                "sampled": sampled,
                "toxicity": _with_prompts(report.toxicity, continuations),
                "judged": _with_judgements(report, continuations),
                "lm_eval": _with_values(report.lm_eval, task_rows),
            }
        )
    except (OSError, DocumentError) as error:
        raise CheckpointError(f"{folder}: its report cannot be read ({error}). {_AGAIN}") from None


def _document_rows(report: EvaluateReport) -> Iterator[Row]:
    for name, at_mean in report.perplexity.items():
        averaged = report.sampled.perplexity[name] if report.sampled else None
        numbers = zip(at_mean.document_nats, at_mean.document_tokens, strict=True)
        for i, (nats, tokens) in enumerate(numbers):
            row = {"set": name, "document": i, "nats": nats, "tokens": tokens}
            if averaged is not None:
                row["sampled_nats"] = averaged.document_nats[i]
            yield row


def _example_rows(report: EvaluateReport) -> Iterator[Row]:
    for name, at_mean in report.classification.items():
        averaged = report.sampled.classification[name] if report.sampled else None
        for i, label in enumerate(at_mean.example_labels):
            row: Row = {"set": name, "example": i, "label": label}
            for prefix, predictions in (("", at_mean), ("sampled_", averaged)):
                if predictions is not None:
                    row[f"{prefix}nats"] = predictions.example_nats[i]
                    row[f"{prefix}probabilities"] = predictions.example_probabilities[i]
            yield row


def _continuation_rows(continuations: Continuations, seed: int) -> Iterator[Row]:
    prompts, samples, scores, judged = continuations
    for i, (prompt, texts) in enumerate(zip(prompts, samples.texts, strict=True)):
        for j, text in enumerate(texts):
            row: Row = {
                "prompt": prompt,
                "continuation": text,
                "seed": seed,
                "prompt_index": i,
                "continuation_index": j,
                "tokens": samples.tokens[i][j],
                "scores": {spec: float(values[i, j]) for spec, values in scores.items()},
            }
            if judged is not None:  # zeros where nothing was scored
                row["judge"] = {
                    "nats": float(judged.nats[i, j]),
                    "tokens": int(judged.tokens[i, j]),
                    "bytes": int(judged.bytes[i, j]),
                }
            yield row


def _task_rows(report: EvaluateReport) -> Iterator[Row]:
    for task, measured in report.lm_eval.items():
        for metric, score in measured.scores.items():
            for i, value in enumerate(score.document_values):
                yield {"task": task, "metric": metric, "document": i, "value": value}


def _with_documents(
    reports: Mapping[str, PerplexityReport], documents: Sequence[_DocumentRow], *, sampled: bool
) -> dict[str, PerplexityReport]:
    result = {}
    for name, report in reports.items():
        rows = [row for row in documents if row.set == name]
        _check_count(len(rows), report.documents, f"documents of {shown(name)}")
        update = {
            "document_nats": tuple(
                _given(row.sampled_nats if sampled else row.nats) for row in rows
            ),
            "document_tokens": tuple(row.tokens for row in rows),
        }
        result[name] = report.model_copy(update=update)
    return result


def _with_examples(
    reports: Mapping[str, ClassificationReport], examples: Sequence[_ExampleRow], *, sampled: bool
) -> dict[str, ClassificationReport]:
    result = {}
    for name, report in reports.items():
        rows = [row for row in examples if row.set == name]
        _check_count(len(rows), report.examples, f"examples of {shown(name)}")
        update = {
            "example_labels": tuple(row.label for row in rows),
            "example_nats": tuple(
                _given(row.sampled_nats if sampled else row.nats) for row in rows
            ),
            "example_probabilities": tuple(
                _given(row.sampled_probabilities if sampled else row.probabilities) for row in rows
            ),
        }
        result[name] = report.model_copy(update=update)
    return result


def _with_prompts(
    reports: Mapping[str, ToxicityReport], continuations: Sequence[_ContinuationRow]
) -> dict[str, ToxicityReport]:
    result = {}
    for spec, report in reports.items():
        scores = [_given(row.scores.get(spec)) for row in continuations]
        _check_count(len(scores), report.n_continuations, "continuations")
        toxic = np.array(scores) >= report.threshold
        share = _by_prompt(toxic, report.n_prompts).mean(axis=1)
        result[spec] = report.model_copy(update={"prompt_share": tuple(share.tolist())})
    return result


def _with_judgements(
    report: EvaluateReport, continuations: Sequence[_ContinuationRow]
) -> JudgedReport | None:
    judged, samples = report.judged, report.samples
    if judged is None or samples is None:
        return judged
    rows = [_given(row.judge) for row in continuations]
    _check_count(len(rows), samples.continuations, "continuations")

    def sums(name: str) -> list[Any]:
        numbers = np.array([getattr(row, name) for row in rows])
        return list(_by_prompt(numbers, samples.prompts).sum(axis=1).tolist())

    update = {f"prompt_{name}": tuple(sums(name)) for name in _Judgement.model_fields}
    return judged.model_copy(update=update)


def _by_prompt(numbers: NDArray[Any], prompts: int) -> NDArray[Any]:
    """Numbers of all continuations, (prompts, continuations)."""
    if prompts < 1 or len(numbers) % prompts:
        raise DocumentError(f"{len(numbers)} continuations are not of {prompts} prompts")
    return numbers.reshape(prompts, -1)


def _with_values(
    reports: Mapping[str, TaskReport], rows: Sequence[_TaskRow]
) -> dict[str, TaskReport]:
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row.task, row.metric), []).append(row.value)
    result = {}
    for task, report in reports.items():
        scores = {}
        for metric, score in report.scores.items():
            of_documents = values.get((task, metric), [])
            if of_documents:  # some metrics have none
                _check_count(len(of_documents), report.samples, f"documents of {shown(task)}")
            update = {"document_values": tuple(of_documents)}
            scores[metric] = score.model_copy(update=update)
        result[task] = report.model_copy(update={"scores": scores})
    return result


def _given(value: T | None) -> T:
    if value is None:
        raise DocumentError("a line lacks a number that the report has")
    return value


def _check_count(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise DocumentError(f"{found:,} {what}, where {expected:,} were measured")


def _write_lines(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_lines(path: Path, row: type[R]) -> list[R]:
    """The lines of a JSONL file that may be absent."""
    return [as_record(row, line) for line in parse_lines(path)] if path.exists() else []
