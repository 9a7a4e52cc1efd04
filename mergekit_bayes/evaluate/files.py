"""Write and read the files of an evaluation: report, documents, examples and continuations."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pydantic import ValidationError

from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.evaluate.continuations import Continuations
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.metrics.classification import ClassificationReport
from mergekit_bayes.metrics.perplexity import PerplexityReport
from mergekit_bayes.metrics.toxicity import ToxicityReport

Row: TypeAlias = dict[str, Any]  # a line of a JSONL file
_REPORT = "report.json"
_DOCUMENTS = "documents.jsonl"
_EXAMPLES = "examples.jsonl"
_CONTINUATIONS = "continuations.jsonl"


def write_report(
    folder: Path, report: EvaluateReport, continuations: Continuations | None, *, force: bool
) -> None:
    """Write `report.json`, and the numbers by document, example and continuation beside it.

    Args:
        folder: The output; it appears under its name only when it is complete.
        report: What was measured.
        continuations: What was scored, if anything.
        force: Replace a folder that exists.
    """
    with replacing(folder, force=force) as unfinished:
        unfinished.mkdir()
        (unfinished / _REPORT).write_text(report.model_dump_json(indent=2) + "\n")
        _write_lines(unfinished / _DOCUMENTS, _document_rows(report))
        if report.classification:
            _write_lines(unfinished / _EXAMPLES, _example_rows(report))
        if continuations is not None:
            rows = _continuation_rows(continuations, report.settings["seed"])
            _write_lines(unfinished / _CONTINUATIONS, rows)


def read_report(folder: str | Path) -> EvaluateReport:
    """A report as `run_evaluate` returned it, with the numbers that its JSON leaves out.

    Raises:
        CheckpointError: A file of the folder cannot be read.
    """
    folder = Path(folder)
    try:
        report = EvaluateReport.model_validate_json((folder / _REPORT).read_text())
        documents = _read_lines(folder / _DOCUMENTS)
        examples = _read_lines(folder / _EXAMPLES)
        continuations = _read_lines(folder / _CONTINUATIONS)
    except (OSError, ValidationError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its report cannot be read ({str(error).splitlines()[0]})."
        ) from None
    sampled = report.sampled
    if sampled is not None:
        update = {
            "perplexity": _with_documents(sampled.perplexity, documents, "sampled_"),
            "classification": _with_examples(sampled.classification, examples, "sampled_"),
        }
        sampled = sampled.model_copy(update=update)
    return report.model_copy(
        update={
            "perplexity": _with_documents(report.perplexity, documents, ""),
            "classification": _with_examples(report.classification, examples, ""),
            "sampled": sampled,
            "toxicity": _with_prompts(report.toxicity, continuations),
        }
    )


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
    prompts, samples, scores = continuations
    for i, (prompt, texts) in enumerate(zip(prompts, samples.texts, strict=True)):
        for j, text in enumerate(texts):
            yield {
                "prompt": prompt,
                "continuation": text,
                "seed": seed,
                "prompt_index": i,
                "continuation_index": j,
                "tokens": samples.tokens[i][j],
                "scores": {spec: float(values[i, j]) for spec, values in scores.items()},
            }


def _with_documents(
    reports: Mapping[str, PerplexityReport], documents: Sequence[Row], prefix: str
) -> dict[str, PerplexityReport]:
    result = {}
    for name, report in reports.items():
        rows = [row for row in documents if row["set"] == name]
        update = {
            "document_nats": tuple(row[f"{prefix}nats"] for row in rows),
            "document_tokens": tuple(row["tokens"] for row in rows),
        }
        result[name] = report.model_copy(update=update)
    return result


def _with_examples(
    reports: Mapping[str, ClassificationReport], examples: Sequence[Row], prefix: str
) -> dict[str, ClassificationReport]:
    result = {}
    for name, report in reports.items():
        rows = [row for row in examples if row["set"] == name]
        update = {
            "example_labels": tuple(row["label"] for row in rows),
            "example_nats": tuple(row[f"{prefix}nats"] for row in rows),
            "example_probabilities": tuple(tuple(row[f"{prefix}probabilities"]) for row in rows),
        }
        result[name] = report.model_copy(update=update)
    return result


def _with_prompts(
    reports: Mapping[str, ToxicityReport], continuations: Sequence[Row]
) -> dict[str, ToxicityReport]:
    result = {}
    for spec, report in reports.items():
        toxic = np.array([row["scores"][spec] for row in continuations]) >= report.threshold
        share = toxic.reshape(report.n_prompts, -1).mean(axis=1)
        result[spec] = report.model_copy(update={"prompt_share": tuple(share.tolist())})
    return result


def _write_lines(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_lines(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open() as file:
        return [json.loads(line) for line in file]
