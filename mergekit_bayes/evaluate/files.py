"""Write and read the files of an evaluation: report, documents, examples, continuations."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.generation import Samples
from mergekit_bayes.metrics.classification import ClassificationReport
from mergekit_bayes.metrics.perplexity import PerplexityReport


def read_report(folder: str | Path) -> EvaluateReport:
    """A report as `run_evaluate` returned it, with the numbers by text and by prompt that its JSON
    leaves out.
    """
    folder = Path(folder)
    try:
        report = EvaluateReport.model_validate_json((folder / "report.json").read_text())
        documents, rows = (
            _read_lines(folder / "documents.jsonl"),
            _read_lines(folder / "continuations.jsonl"),
        )
        examples = _read_lines(folder / "examples.jsonl")
    except (OSError, ValidationError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its report cannot be read ({str(error).splitlines()[0]})."
        ) from None
    perplexity = _with_documents(report.perplexity, documents, "nats")
    classification = _with_examples(report.classification, examples, "")
    sampled, toxicity = report.sampled, dict(report.toxicity)
    if sampled is not None:
        update = {
            "perplexity": _with_documents(sampled.perplexity, documents, "sampled_nats"),
            "classification": _with_examples(sampled.classification, examples, "sampled_"),
        }
        sampled = sampled.model_copy(update=update)
    for spec, summary in toxicity.items():
        toxic = np.array([row["scores"][spec] for row in rows]) >= summary.threshold
        share = toxic.reshape(summary.n_prompts, -1).mean(axis=1)
        toxicity[spec] = summary.model_copy(update={"prompt_share": tuple(share.tolist())})
    return report.model_copy(
        update={
            "perplexity": perplexity,
            "classification": classification,
            "sampled": sampled,
            "toxicity": toxicity,
        }
    )


def _with_documents(
    reports: Mapping[str, PerplexityReport], documents: Sequence[Mapping[str, Any]], key: str
) -> dict[str, PerplexityReport]:
    result = {}
    for name, found in reports.items():
        mine = [d for d in documents if d["set"] == name]
        update = {
            "document_nats": tuple(d[key] for d in mine),
            "document_tokens": tuple(d["tokens"] for d in mine),
        }
        result[name] = found.model_copy(update=update)
    return result


def _with_examples(
    reports: Mapping[str, ClassificationReport], examples: Sequence[Mapping[str, Any]], prefix: str
) -> dict[str, ClassificationReport]:
    result = {}
    for name, found in reports.items():
        mine = [e for e in examples if e["set"] == name]
        update = {
            "example_labels": tuple(e["label"] for e in mine),
            "example_nats": tuple(e[f"{prefix}nats"] for e in mine),
            "example_probabilities": tuple(tuple(e[f"{prefix}probabilities"]) for e in mine),
        }
        result[name] = found.model_copy(update=update)
    return result


def write_report(
    folder: Path,
    report: EvaluateReport,
    prompts: Sequence[str],
    samples: Samples | None,
    scores: Mapping[str, Any],
    *,
    force: bool,
) -> None:
    with replacing(folder, force=force) as unfinished:
        unfinished.mkdir()
        (unfinished / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
        _write_lines(unfinished / "documents.jsonl", _document_rows(report))
        if report.classification:
            _write_lines(unfinished / "examples.jsonl", _example_rows(report))
        if samples is not None:
            rows = _continuation_rows(report, prompts, samples, scores)
            _write_lines(unfinished / "continuations.jsonl", rows)


def _document_rows(report: EvaluateReport) -> Iterator[dict[str, Any]]:
    for name, found in report.perplexity.items():
        averaged = report.sampled.perplexity[name].document_nats if report.sampled else None
        for i, (nats, tokens) in enumerate(
            zip(found.document_nats, found.document_tokens, strict=True)
        ):
            row = {"set": name, "document": i, "nats": nats, "tokens": tokens}
            yield row if averaged is None else row | {"sampled_nats": averaged[i]}


def _example_rows(report: EvaluateReport) -> Iterator[dict[str, Any]]:
    for name, found in report.classification.items():
        averaged = report.sampled.classification[name] if report.sampled else None
        for i, label in enumerate(found.example_labels):
            row = {"set": name, "example": i, "label": label}
            for prefix, one in (("", found), ("sampled_", averaged)):
                if one is not None:
                    row[f"{prefix}nats"] = one.example_nats[i]
                    row[f"{prefix}probabilities"] = one.example_probabilities[i]
            yield row


def _continuation_rows(
    report: EvaluateReport, prompts: Sequence[str], samples: Samples, scores: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    seed = report.settings["seed"]
    for i, (prompt, texts) in enumerate(zip(prompts, samples.texts, strict=True)):
        for j, text in enumerate(texts):
            yield {
                "prompt": prompt,
                "continuation": text,
                "seed": seed,
                "prompt_index": i,
                "continuation_index": j,
                "tokens": samples.tokens[i][j],
                "scores": {spec: float(found[i, j]) for spec, found in scores.items()},
            }


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.open()] if path.exists() else []
