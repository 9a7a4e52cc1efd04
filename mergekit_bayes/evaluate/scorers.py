"""Open the scorers that rate continuations."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.identity import checkpoint_identity, content_hash
from mergekit_bayes.documents import DocumentError, decode_text, read_bytes
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate.report import ScorerInfo
from mergekit_bayes.metrics.scorers import (
    READINGS,
    Reading,
    Score,
    checked_scores,
    classifier_scorer,
    hook_scorer,
    read_label,
    word_scorer,
)
from mergekit_bayes.models.load import load_model

_LONGEST_TEXT = 512  # tokens that a classifier reads of a text
_WORD_LIST = 1 << 20  # bytes; published lists have some 10 kB, and every word costs time a text


class Scorer(NamedTuple):
    """A scorer by its name in the config, its function, and what the report says about it.

    Attributes:
        spec: Its name.
        score: Its function.
        info: What the report says.
        folder: Where a classifier was read from; None for other scorers.
    """

    spec: str
    score: Score
    info: ScorerInfo
    folder: Path | None = None


def open_scorers(
    specs: Sequence[str], device: str | None = None, *, trust_remote_code: bool = False
) -> list[Scorer]:
    """Open all scorers and try each on one text.

    Args:
        specs: As `open_scorer` takes them.
        device: Where classifiers run, by `models.load.choose_device`.
        trust_remote_code: Run Python code of a classifier's folder, where it needs any.

    Raises:
        ConfigError: As `open_scorer`, or a scorer fails.
        CheckpointError: As `open_scorer`.
        MismatchError: As `open_scorer`.
    """
    scorers = [open_scorer(spec, device, trust_remote_code=trust_remote_code) for spec in specs]
    for scorer in scorers:
        scorer.score(["This is a test."])
    return scorers


def open_scorer(spec: str, device: str | None = None, *, trust_remote_code: bool = False) -> Scorer:
    """Open a scorer.

    Args:
        spec: `words:FILE`, `model:PATH_OR_ID#LABEL` or `package.module:function`. A label may end
            in `=softmax` or `=sigmoid`, which says how the classifier's labels are read.
        device: Where a classifier runs.
        trust_remote_code: Run Python code of a classifier's folder, where it needs any.

    Raises:
        ConfigError: It is none of the three, an empty list, a label that the model lacks, labels
            that can be read in two ways, or there is no such function.
        CheckpointError: A file or model cannot be read.
        MismatchError: The model is not a text classifier.
    """
    prefix, separator, rest = spec.partition(":")
    if not separator or not prefix or not rest:
        raise ConfigError(
            f"scorer '{spec}': expected words:FILE, model:PATH_OR_ID#LABEL or "
            "package.module:function."
        )
    if prefix == "words":
        return _open_words(spec, Path(os.path.expanduser(rest)))
    if prefix == "model":
        return _open_classifier(spec, rest, device, trust_remote_code=trust_remote_code)
    return _open_function(spec)


def _open_words(spec: str, path: Path) -> Scorer:
    try:
        content = read_bytes(path, _WORD_LIST)
        lines = decode_text(content).splitlines()
    except OSError as error:
        raise CheckpointError(
            f"scorer '{spec}': {path} cannot be read ({error.strerror})."
        ) from None
    except DocumentError as error:
        raise CheckpointError(f"scorer '{spec}': {path} is no list of words ({error}).") from None
    try:
        score = word_scorer(lines)
    except ConfigError as error:
        raise ConfigError(f"scorer '{spec}': {error}") from None
    fingerprint = hashlib.sha256(content).hexdigest()
    return Scorer(spec, score, ScorerInfo(kind="words", fingerprint=fingerprint))


def _open_classifier(
    spec: str, target: str, device: str | None, *, trust_remote_code: bool
) -> Scorer:
    ref, _, label = target.rpartition("#") if "#" in target else (target, "", "")
    loaded = load_model(ref, trust_remote_code=trust_remote_code)
    if loaded.task != "classification":
        raise MismatchError(f"scorer '{spec}': '{ref}' is no text-classification checkpoint.")
    label, chosen = _split_reading(label, list(loaded.model.config.id2label.values()))
    reading = read_label(loaded.model, label, name=spec, reading=chosen)
    loaded.move_to(device)
    score = classifier_scorer(
        loaded.model,
        loaded.tokenizer,
        label,
        name=spec,
        reading=reading.reading,
        max_length=min(_LONGEST_TEXT, loaded.context),
    )

    def checked(texts: list[str]) -> list[float]:
        return checked_scores(score(texts), len(texts), spec)

    fingerprint = checkpoint_identity(loaded.path)
    info = ScorerInfo(
        kind="model",
        fingerprint=fingerprint,
        label=label,
        reading=reading.reading,
        reason=reading.reason,
    )
    return Scorer(spec, checked, info, loaded.path)


def _split_reading(label: str, labels: Sequence[str]) -> tuple[str, Reading | None]:
    """The label without its reading; a label of the model that ends like one is left whole."""
    name, _, ending = label.rpartition("=")
    chosen = next((reading for reading in READINGS if reading == ending), None)
    return (label, None) if chosen is None or label in labels else (name, chosen)


def _open_function(spec: str) -> Scorer:
    score, source = hook_scorer(spec)
    fingerprint = content_hash(source) if source else None
    return Scorer(spec, score, ScorerInfo(kind="function", fingerprint=fingerprint))
