"""Open the scorer that rates continuations."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from mergekit_bayes.checkpoint.identity import checkpoint_identity
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate.report import ScorerInfo
from mergekit_bayes.metrics.scorers import (
    Score,
    checked_scores,
    classifier_scorer,
    hook_scorer,
    word_scorer,
)
from mergekit_bayes.models.load import load_model


class Scorer(NamedTuple):
    spec: str
    score: Score
    info: ScorerInfo


def open_scorer(spec: str) -> Scorer:
    """A scorer from `words:FILE`, `model:PATH_OR_ID#LABEL` or `package.module:function`.

    Raises:
        ConfigError: None of the three, an empty list, a label that the model lacks, no such
            function.
        CheckpointError: A file or model that cannot be read.
    """
    kind, separator, rest = spec.partition(":")
    if not separator or not kind or not rest:
        raise ConfigError(
            f"--scorer '{spec}': expected words:FILE, model:PATH_OR_ID#LABEL or "
            "package.module:function."
        )
    if kind == "words":
        return _open_words(spec, Path(rest).expanduser())
    if kind == "model":
        return _open_classifier(spec, rest)
    score, source = hook_scorer(spec)
    fingerprint = hashlib.sha256(source.read_bytes()).hexdigest() if source else None
    return Scorer(spec, score, ScorerInfo(kind="function", fingerprint=fingerprint))


def _open_words(spec: str, path: Path) -> Scorer:
    try:
        content = path.read_bytes()
        lines = content.decode().splitlines()
    except OSError as error:
        raise CheckpointError(
            f"--scorer '{spec}': {path} cannot be read ({error.strerror})."
        ) from None
    except UnicodeDecodeError:
        raise CheckpointError(f"--scorer '{spec}': {path} is not UTF-8 text.") from None
    try:
        score = word_scorer(lines)
    except ConfigError as error:
        raise ConfigError(f"--scorer '{spec}': {error}") from None
    return Scorer(
        spec, score, ScorerInfo(kind="words", fingerprint=hashlib.sha256(content).hexdigest())
    )


def _open_classifier(spec: str, rest: str) -> Scorer:
    ref, _, label = rest.rpartition("#") if "#" in rest else (rest, "", "")
    loaded = load_model(ref)
    if loaded.task != "classification":
        raise MismatchError(f"--scorer '{spec}': '{ref}' is no text-classification checkpoint.")
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    score = classifier_scorer(loaded.model, loaded.tokenizer, label, name=spec)

    def checked(texts: list[str]) -> list[float]:
        return checked_scores(score(texts), len(texts), spec)

    return Scorer(
        spec,
        checked,
        ScorerInfo(kind="model", fingerprint=checkpoint_identity(loaded.path), label=label),
    )
