"""Evaluate a model in one JSON report: perplexity, toxicity of continuations, accuracy and calibration of a classifier.

Protocols are in `metrics/`. Several scorers score the same continuations, and everything needed to score them again
(prompts, continuations, seed, scorers) is kept. With `samples`, perplexity and classification are measured twice: at
the mean, and with probabilities averaged over weights drawn from the stored posterior.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationError

from mergekit_bayes import __version__
from mergekit_bayes.configs import Config
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.metrics.base import PRESENT, Draws, Interval
from mergekit_bayes.metrics.classification import (
    ClassificationChange,
    ClassificationReport,
    classification_change,
    measure_classification,
)
from mergekit_bayes.metrics.perplexity import PerplexityReport, loss_change, measure_perplexity
from mergekit_bayes.metrics.scorers import Score, checked_scores, classifier_scorer, hook_scorer, word_scorer
from mergekit_bayes.metrics.toxicity import (
    Samples,
    SamplesReport,
    Sampling,
    ToxicityReport,
    describe_samples,
    sample_continuations,
    score_toxicity,
)
from mergekit_bayes.models import (
    Loaded,
    context_length,
    hushed,
    label_ids,
    load_model,
    load_rows,
    other_head,
    start_token,
)
from mergekit_bayes.posterior import Posterior, checkpoint_files, replacing
from mergekit_bayes.sampling import PosteriorDraws, SamplingReport, open_samplable
from mergekit_bayes.tensors import SafetensorsSource, identity

Progress = Callable[[str, int, int], None]  # (step, done, of)


class EvaluateConfig(Config):
    """What to measure, and how. The fields are the flags of `bmerge evaluate`.

    Attributes:
        model: A local folder or `org/name[@revision]`.
        perplexity: Name to texts (JSONL, CSV, Parquet, text, a folder, a Hub data set).
        classify: Name to labelled texts, for a classifier.
        label_column: Where the labels are in them: numbers, or the model's names.
        bins: Of confidence, for the calibration error.
        samples: Also average probabilities over so many weights drawn from the model's posterior; toxicity stays at
            the mean.
        prior: Prior precision of the posterior in place of the stored one, 1/weight^2.
        posterior_temperature: Multiplies the variance of the posterior.
        precision: Another place for the model's precision.
        where: Keeps text rows with these values, `{"label": 0}`; or one such mapping for some of the names.
        max_rows: At most so many texts of each set, from the front.
        window: Tokens of input at a time; None: the model's context.
        stride: Tokens that a window scores; None: the window, so no overlap.
        concatenate: Join the rows by EOS, as the papers do, instead of scoring each as a document.
        toxicity: File of prompts.
        prompt_column: Where the prompts are in it.
        prompts: At most so many, from the front.
        prompts_where: Keeps prompts with these values.
        scorer: `words:FILE`, `model:PATH_OR_ID#LABEL` or `package.module:function`; one or more.
        threshold: A continuation is toxic from this score on.
        continuations, new_tokens, top_p, temperature, seed: See `Sampling`; the seed is that of the bootstrap and of
            the posterior's samples, too.
        batch_size: Full windows, or texts to classify, in a batch.
        sampling_batch: Continuations drawn together.
        bootstrap: Resamples behind each interval; 0 for none.
        output: Folder for report.json, documents.jsonl, examples.jsonl and continuations.jsonl.
    """

    model: str
    perplexity: dict[str, str] = {}
    classify: dict[str, str] = {}
    label_column: str = "label"
    bins: int = Field(default=10, ge=1)
    samples: int | None = Field(default=None, ge=1)
    prior: float | None = Field(default=None, gt=0)
    posterior_temperature: float = Field(default=1.0, gt=0)
    precision: str | None = None
    text_column: str = "text"
    where: dict[str, Any] = {}
    max_rows: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)
    concatenate: bool = False
    toxicity: str | None = None
    prompt_column: str = "text"
    prompts: int | None = Field(default=None, ge=1)
    prompts_where: dict[str, Any] = {}
    scorer: tuple[str, ...] = ()
    threshold: float = Field(default=0.5, ge=0, le=1)
    continuations: int = Field(default=25, ge=1)
    new_tokens: int = Field(default=20, ge=1)
    top_p: float = Field(default=0.9, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    batch_size: int = Field(default=8, ge=1)
    sampling_batch: int = Field(default=256, ge=1)
    bootstrap: int = Field(default=1000, ge=0)
    dtype: str = "float32"
    output: str | None = None
    force: bool = False

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})


class ScorerInfo(Config):
    """Which scorer it was: `fingerprint` is a SHA-256 of the word list, of the classifier's tensors (identity by
    sampled blocks) or of the file that holds the function, not of what that file imports."""

    kind: Literal["words", "model", "function"]
    fingerprint: str | None
    label: str | None = None


class SampledReport(Config):
    """The same measured with probabilities averaged over weights drawn from the posterior.

    Attributes:
        draws: What was drawn.
        perplexity, classification: By the names of the texts.
        loss_change: Nats per token minus those at the mean, documents resampled in pairs.
        classification_change: Scores minus those at the mean, examples resampled in pairs.
    """

    draws: SamplingReport
    perplexity: dict[str, PerplexityReport] = {}
    classification: dict[str, ClassificationReport] = {}
    loss_change: dict[str, Interval] = {}
    classification_change: dict[str, ClassificationChange] = {}


class EvaluateReport(Config):
    """What a model scored.

    Attributes:
        model_identity: SHA-256 by sampled blocks of the weights, `posterior.Identity.blocks`.
        settings: The whole config.
        perplexity, classification: By the names of the texts, at the mean.
        sampled: The same over the posterior's samples, where they were asked for.
        toxicity: By scorer, as it was given. Only the continuation is scored, not the prompt.
        samples: What the continuations look like, whoever scores them.
        path: The folder written, if any.
    """

    version: str = __version__
    model: str
    model_identity: str
    settings: dict[str, Any]
    perplexity: dict[str, PerplexityReport] = {}
    classification: dict[str, ClassificationReport] = {}
    sampled: SampledReport | None = None
    toxicity: dict[str, ToxicityReport] = {}
    scored: Literal["continuation"] = "continuation"
    sampling: Sampling | None = None
    samples: SamplesReport | None = None
    scorers: dict[str, ScorerInfo] = {}
    path: str | None = None


class Scorer(NamedTuple):
    spec: str
    score: Score
    info: ScorerInfo


def run_evaluate(config: EvaluateConfig, *, quiet: bool = False, progress: Progress | None = None) -> EvaluateReport:
    """Measure what the config asks for.

    Data and scorers are read and tried before the model runs; the output appears under its name only when complete.

    Args:
        quiet: Show no progress.
        progress: Called with (step, done, of).

    Raises:
        ConfigError: Nothing to do, toxicity without a scorer, or a scorer that fails.
        CheckpointError: A model or file that cannot be read, an output that exists without `force`.
        MismatchError: A column that is not there, a classifier where a language model is needed, or the reverse.
        PrecisionError: Samples of a posterior that cannot be drawn from.
    """
    _check(config)
    tell = progress if progress is not None and not quiet else _silent
    with ExitStack() as stack:
        posterior = None
        if config.samples is not None:
            posterior = open_samplable(config.model, precision=config.precision, prior=config.prior)
            stack.callback(posterior.close)
        return _evaluate(config, posterior, tell)


def _evaluate(config: EvaluateConfig, posterior: Posterior | None, tell: Progress) -> EvaluateReport:
    with hushed(True):  # their bars would show for a second and stay on the screen
        texts = {name: _texts(config, name) for name in config.perplexity}
        labelled = {name: _labelled(config, name) for name in config.classify}
        prompts = _prompts(config)
        scorers = [open_scorer(spec) for spec in config.scorer]
        for scorer in scorers:
            scorer.score(["This is a test."])
        loaded = load_model(config.model, "auto", dtype=config.dtype)
    _check_task(config, loaded)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    _check_window(config, loaded)
    sets = _Sets(texts, {name: _with_classes(config, loaded, name, rows) for name, rows in labelled.items()})
    draws = _draws(config, loaded, posterior)

    perplexity, classification = _predict(config, loaded, sets, PRESENT, tell, "")
    sampled = None
    if draws is not None:
        with draws:
            found = _predict(config, loaded, sets, draws, tell, f", {len(draws)} samples")
        sampled = _sampled(config, draws.report, perplexity, classification, *found)
    samples, scores = None, {}
    if prompts:
        samples = sample_continuations(
            loaded.model,
            loaded.tokenizer,
            prompts,
            start=start_token(loaded.tokenizer),
            context=context_length(loaded),
            sampling=config.sampling,
            batch_size=config.sampling_batch,
            progress=lambda done, of: tell("continuations", done, of),
        )
        flat = [text for row in samples.texts for text in row]
        for i, scorer in enumerate(scorers):
            tell("scoring", i, len(scorers))
            scores[scorer.spec] = np.reshape(scorer.score(flat), (len(prompts), config.continuations))
    report = EvaluateReport(
        model=config.model,
        model_identity=_identity(loaded.path),
        settings=config.model_dump(mode="json"),
        perplexity=perplexity,
        classification=classification,
        sampled=sampled,
        toxicity={spec: _summary(config, s) for spec, s in scores.items()},
        sampling=config.sampling if samples else None,
        samples=describe_samples(samples) if samples else None,
        scorers={s.spec: s.info for s in scorers},
        path=config.output,
    )
    if config.output is not None:
        _write(Path(config.output), report, prompts, samples, scores, force=config.force)
    return report


def open_scorer(spec: str) -> Scorer:
    """A scorer from `words:FILE`, `model:PATH_OR_ID#LABEL` or `package.module:function`.

    Raises:
        ConfigError: None of the three, an empty list, a label that the model lacks, no such function.
        CheckpointError: A file or model that cannot be read.
    """
    kind, separator, rest = spec.partition(":")
    if not separator or not kind or not rest:
        raise ConfigError(f"--scorer '{spec}': expected words:FILE, model:PATH_OR_ID#LABEL or package.module:function.")
    if kind == "words":
        return _open_words(spec, Path(rest).expanduser())
    if kind == "model":
        return _open_classifier(spec, rest)
    score, source = hook_scorer(spec)
    fingerprint = hashlib.sha256(source.read_bytes()).hexdigest() if source else None
    return Scorer(spec, score, ScorerInfo(kind="function", fingerprint=fingerprint))


def read_report(folder: str | Path) -> EvaluateReport:
    """A report as `run_evaluate` returned it, with the numbers by text and by prompt that its JSON leaves out."""
    folder = Path(folder)
    try:
        report = EvaluateReport.model_validate_json((folder / "report.json").read_text())
        documents, rows = _read_lines(folder / "documents.jsonl"), _read_lines(folder / "continuations.jsonl")
        examples = _read_lines(folder / "examples.jsonl")
    except (OSError, ValidationError, ValueError) as error:
        raise CheckpointError(f"{folder}: its report cannot be read ({str(error).splitlines()[0]}).") from None
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
        update={"perplexity": perplexity, "classification": classification, "sampled": sampled, "toxicity": toxicity}
    )


def _with_documents(
    reports: Mapping[str, PerplexityReport], documents: Sequence[Mapping[str, Any]], key: str
) -> dict[str, PerplexityReport]:
    result = {}
    for name, found in reports.items():
        mine = [d for d in documents if d["set"] == name]
        update = {"document_nats": tuple(d[key] for d in mine), "document_tokens": tuple(d["tokens"] for d in mine)}
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


def _silent(step: str, done: int, of: int) -> None:
    pass


def _check(config: EvaluateConfig) -> None:
    if not config.perplexity and config.toxicity is None and not config.classify:
        raise ConfigError(
            "nothing to measure. Name texts (--perplexity), prompts (--toxicity with --scorer) or labelled texts "
            "(--classify)."
        )
    if config.toxicity is not None and not config.scorer:
        raise ConfigError(
            "toxicity needs a scorer: --scorer words:FILE, model:PATH_OR_ID#LABEL or package.module:function."
        )
    if config.scorer and config.toxicity is None:
        raise ConfigError("a scorer needs prompts to continue: --toxicity FILE.")
    if len(set(config.scorer)) < len(config.scorer):
        raise ConfigError(f"a scorer is named twice: {', '.join(config.scorer)}.")
    if config.samples is not None and not config.perplexity and not config.classify:
        raise ConfigError(
            "samples average probabilities: name texts (--perplexity) or labelled texts (--classify). Toxicity is "
            "measured at the mean."
        )
    if config.samples is None and (config.prior, config.posterior_temperature, config.precision) != (None, 1.0, None):
        raise ConfigError("--prior, --posterior-temperature and --precision are about --samples, which is not given.")
    named = {**config.perplexity, **config.classify}
    for name in config.where if _by_name(config.where) else ():
        if name not in named:
            raise ConfigError(f"where: no texts are called '{name}'; there are {', '.join(named)}.")
    if config.output is not None and Path(config.output).exists() and not config.force:
        raise CheckpointError(f"'{config.output}' exists. Choose another -o, or pass --force to replace it.")


def _by_name(where: Mapping[str, Any]) -> bool:
    return bool(where) and all(isinstance(v, Mapping) for v in where.values())


class _Sets(NamedTuple):
    """What predictions are measured on, by name."""

    texts: Mapping[str, list[str]]
    labelled: Mapping[str, tuple[list[str], list[int]]]


def _where(config: EvaluateConfig, name: str) -> dict[str, Any] | None:
    return (config.where.get(name) if _by_name(config.where) else config.where) or None


def _texts(config: EvaluateConfig, name: str) -> list[str]:
    column = config.text_column
    rows = load_rows(config.perplexity[name], where=_where(config, name), max_rows=config.max_rows, columns=(column,))
    return _strings(rows[column], config.perplexity[name], column)


def _labelled(config: EvaluateConfig, name: str) -> tuple[list[str], list[Any]]:
    """Texts and their labels as the file has them."""
    columns, file = (config.text_column, config.label_column), config.classify[name]
    rows = load_rows(file, where=_where(config, name), max_rows=config.max_rows, columns=tuple(dict.fromkeys(columns)))
    return _strings(rows[config.text_column], file, config.text_column), list(rows[config.label_column])


def _with_classes(
    config: EvaluateConfig, loaded: Loaded, name: str, rows: tuple[list[str], list[Any]]
) -> tuple[list[str], list[int]]:
    try:
        return rows[0], label_ids(rows[1], loaded.model, config.label_column)
    except MismatchError as error:
        raise MismatchError(f"'{config.classify[name]}': {error}") from None


def _prompts(config: EvaluateConfig) -> list[str]:
    if config.toxicity is None:
        return []
    column = config.prompt_column
    rows = load_rows(config.toxicity, where=config.prompts_where or None, max_rows=config.prompts, columns=(column,))
    return _strings(rows[column], config.toxicity, column)


def _strings(values: Sequence[Any], source: str, column: str) -> list[str]:
    result = list(values)
    for i, value in enumerate(result):
        if not isinstance(value, str):
            raise MismatchError(f"'{source}', row {i + 1}: '{column}' is {type(value).__name__}, expected text.")
    return result


def _check_task(config: EvaluateConfig, loaded: Loaded) -> None:
    if loaded.task != "causal-lm" and (config.perplexity or config.toxicity is not None):
        raise MismatchError(f"'{config.model}' is a classifier; perplexity and toxicity need a language model.")
    if loaded.task != "classification" and config.classify:
        raise MismatchError(f"'{config.model}' is a language model; --classify needs a classifier.")
    if config.classify and (other := other_head(loaded)):
        raise MismatchError(
            f"'{config.model}' is a classifier with {other}; --classify needs one with a single label of two classes "
            "or more."
        )


def _check_window(config: EvaluateConfig, loaded: Loaded) -> None:
    context = context_length(loaded)
    if config.window is not None and config.window > context:
        raise ConfigError(f"window {config.window}: '{config.model}' sees at most {context} tokens.")


def _draws(config: EvaluateConfig, loaded: Loaded, posterior: Posterior | None) -> PosteriorDraws | None:
    if posterior is None or config.samples is None:
        return None
    return PosteriorDraws(
        loaded.model,
        posterior,
        config.samples,
        prior=config.prior,
        temperature=config.posterior_temperature,
        seed=config.seed,
    )


def _predict(
    config: EvaluateConfig, loaded: Loaded, sets: _Sets, draws: Draws, tell: Progress, how: str
) -> tuple[dict[str, PerplexityReport], dict[str, ClassificationReport]]:
    perplexity = {
        name: measure_perplexity(
            loaded.model,
            loaded.tokenizer,
            texts,
            start=start_token(loaded.tokenizer),
            window=config.window or context_length(loaded),
            stride=config.stride,
            concatenate=config.concatenate,
            batch_size=config.batch_size,
            bootstrap=config.bootstrap,
            seed=config.seed,
            draws=draws,
            progress=partial(tell, f"perplexity of {name}{how}"),
        )
        for name, texts in sets.texts.items()
    }
    classification = {
        name: measure_classification(
            loaded.model,
            loaded.tokenizer,
            texts,
            labels,
            max_length=context_length(loaded),
            batch_size=config.batch_size,
            bins=config.bins,
            bootstrap=config.bootstrap,
            seed=config.seed,
            draws=draws,
            progress=partial(tell, f"classification of {name}{how}"),
        )
        for name, (texts, labels) in sets.labelled.items()
    }
    return perplexity, classification


def _sampled(
    config: EvaluateConfig,
    draws: SamplingReport,
    mean_perplexity: Mapping[str, PerplexityReport],
    mean_classification: Mapping[str, ClassificationReport],
    perplexity: dict[str, PerplexityReport],
    classification: dict[str, ClassificationReport],
) -> SampledReport:
    resampling = {"bootstrap": config.bootstrap, "seed": config.seed}
    return SampledReport(
        draws=draws,
        perplexity=perplexity,
        classification=classification,
        loss_change={n: loss_change(mean_perplexity[n], found, **resampling) for n, found in perplexity.items()},
        classification_change={
            n: classification_change(mean_classification[n], found, **resampling) for n, found in classification.items()
        },
    )


def _summary(config: EvaluateConfig, scores: Any) -> ToxicityReport:
    return score_toxicity(scores, threshold=config.threshold, bootstrap=config.bootstrap, seed=config.seed)


def _open_words(spec: str, path: Path) -> Scorer:
    try:
        content = path.read_bytes()
        lines = content.decode().splitlines()
    except OSError as error:
        raise CheckpointError(f"--scorer '{spec}': {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"--scorer '{spec}': {path} is not UTF-8 text.") from None
    try:
        score = word_scorer(lines)
    except ConfigError as error:
        raise ConfigError(f"--scorer '{spec}': {error}") from None
    return Scorer(spec, score, ScorerInfo(kind="words", fingerprint=hashlib.sha256(content).hexdigest()))


def _open_classifier(spec: str, rest: str) -> Scorer:
    ref, _, label = rest.rpartition("#") if "#" in rest else (rest, "", "")
    loaded = load_model(ref)
    if loaded.task != "classification":
        raise MismatchError(f"--scorer '{spec}': '{ref}' is no text-classification checkpoint.")
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    score = classifier_scorer(loaded.model, loaded.tokenizer, label, name=spec)

    def checked(texts: list[str]) -> list[float]:
        return checked_scores(score(texts), len(texts), spec)

    return Scorer(spec, checked, ScorerInfo(kind="model", fingerprint=_identity(loaded.path), label=label))


def _identity(path: Path) -> str:
    source = SafetensorsSource(checkpoint_files(path))
    try:
        return identity(source)
    finally:
        source.close()


def _write(
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
        for i, (nats, tokens) in enumerate(zip(found.document_nats, found.document_tokens, strict=True)):
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
