"""Open the scorers that rate continuations."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.identity import checkpoint_identity, content_hash
from mergekit_bayes.checkpoint.sources import commit_in
from mergekit_bayes.checkpoint.stamps import refuse_changed
from mergekit_bayes.documents import DocumentError, decode_text, read_bytes
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate.panel_locks import keep, open_pinned
from mergekit_bayes.evaluate.panels import PanelMember, is_panel, read_members, refuse_several
from mergekit_bayes.evaluate.report import ScorerInfo
from mergekit_bayes.heads import head_of
from mergekit_bayes.metrics.base import Score
from mergekit_bayes.metrics.scorers import (
    FORMS,
    READINGS,
    LabelReading,
    Reading,
    checked_scores,
    classifier_scorer,
    count_cut,
    hook_scorer,
    read_label,
    word_scorer,
)
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.ranks import main_first

_LONGEST_TEXT = 512  # tokens that a classifier reads of a text
_WORD_LIST = 1 << 20  # bytes; published lists have some 10 kB, and every word costs time a text


def _none_cut(texts: Sequence[str]) -> int:
    return 0


class Scorer(NamedTuple):
    """A scorer by its name in the config, its function, and what the report says about it.

    Attributes:
        spec: Its name.
        score: Its function.
        info: What the report says.
        folder: Where a classifier was read from; None for other scorers.
        cut: How many of these texts are too long for a classifier, which reads their beginning.
    """

    spec: str
    score: Score
    info: ScorerInfo
    folder: Path | None = None
    cut: Callable[[Sequence[str]], int] = _none_cut

    def threshold(self, default: float) -> float:
        """The score from which on a text is toxic: that of a panel's member, or the default."""
        return default if self.info.threshold is None else self.info.threshold


def open_scorers(
    specs: Sequence[str],
    device: str | None = None,
    *,
    trust_remote_code: bool = False,
    single: bool = False,
) -> list[Scorer]:
    """Open all scorers and try each on one text. A panel is one scorer for each of its members.

    With several processes every one must call this, unless one works alone (`ranks.on_main`).

    Args:
        specs: As `open_scorer` takes them, and `panel:NAME`.
        device: Where classifiers run, by `models.devices.choose_device`.
        trust_remote_code: Run Python code of a classifier's folder, where it needs any.
        single: Whether each name has to be that of one scorer, so that a panel is refused.

    Raises:
        ConfigError: As `open_scorer`, a scorer is named twice, or one fails.
        CheckpointError: As `open_scorer`.
        MismatchError: As `open_scorer`.
    """
    if single:
        for spec in specs:
            refuse_several(spec)
    expanded = [name for spec in specs for name in _expand(spec)]
    for spec, count in Counter(expanded).items():
        if count > 1:
            raise ConfigError(f"a scorer is named twice: {spec}.")
    scorers = [open_scorer(spec, device, trust_remote_code=trust_remote_code) for spec in expanded]
    for scorer in scorers:
        scorer.score(["This is a test."])
    return scorers


def open_scorer(spec: str, device: str | None = None, *, trust_remote_code: bool = False) -> Scorer:
    """Open a scorer.

    Args:
        spec: `words:FILE`, `model:PATH_OR_ID#LABEL`, `panel:NAME/MEMBER` or
            `package.module:function`. A label may end in `=softmax` or `=sigmoid`, which says how
            the classifier's labels are read.
        device: Where a classifier runs.
        trust_remote_code: Run Python code of a classifier's folder, where it needs any.

    Raises:
        ConfigError: It is none of these, a panel of several scorers, an empty list, a label that
            the model lacks, labels that can be read in two ways or not as the panel says, or there
            is no such function.
        CheckpointError: A file or model cannot be read, or a panel's member is not what it was at
            its first use.
        MismatchError: The model is not a text classifier.
    """
    prefix, separator, rest = spec.partition(":")
    if not separator or not prefix or not rest:
        raise ConfigError(f"scorer '{spec}': expected {FORMS}.")
    if prefix == "words":
        return _open_words(spec, Path(os.path.expanduser(rest)))
    if prefix == "model":
        return _open_classifier(spec, rest, device, trust_remote_code=trust_remote_code)
    if is_panel(spec):
        refuse_several(spec)
        (member,) = read_members(spec)
        return _open_member(member, device, trust_remote_code=trust_remote_code)
    return _open_function(spec)


def _expand(spec: str) -> list[str]:
    """The names of the scorers that a name stands for."""
    return [member.spec for member in read_members(spec)] if is_panel(spec) else [spec]


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
    loaded = _load_classifier(spec, ref, trust_remote_code=trust_remote_code)
    label, chosen = _split_reading(label, list(loaded.model.config.id2label.values()))
    reading = read_label(loaded.model, label, name=spec, reading=chosen)
    scorer = _classifier(spec, loaded, label, reading, device)
    update = {"commit": commit_in(ref, loaded.path)}
    return scorer._replace(info=scorer.info.model_copy(update=update))


def _open_member(member: PanelMember, device: str | None, *, trust_remote_code: bool) -> Scorer:
    pinned = main_first(lambda: open_pinned(member))
    path, settings = str(pinned.path), member.settings
    loaded = _load_classifier(member.spec, path, trust_remote_code=trust_remote_code)
    refuse_changed(pinned.stamps)
    try:
        read_label(loaded.model, settings.label, name=member.spec, reading=settings.reading)
        _refuse_other_reading(member, loaded)
    except ConfigError as error:
        raise ConfigError(f"{error} {member.remedy}") from None
    reading = LabelReading(settings.reading, "the panel says so")
    scorer = _classifier(member.spec, loaded, settings.label, reading, device)
    # One process of each machine makes the record of a first use; the others compare with it.
    main_first(lambda: keep(member, pinned.pin))
    more = {"pin": pinned.pin, "threshold": settings.threshold}
    return scorer._replace(info=scorer.info.model_copy(update=more))


def _refuse_other_reading(member: PanelMember, loaded: Loaded) -> None:
    """Refuse a reading that says nothing, or that the `problem_type` in the config contradicts."""
    config, reading = loaded.model.config, member.settings.reading
    if reading == "softmax" and config.num_labels == 1:
        raise ConfigError(
            f"scorer '{member.spec}': the softmax of a single output is always 1, so its reading "
            "is sigmoid."
        )
    head = head_of(config)
    if getattr(config, "problem_type", None) is None or head.likelihood is None:
        return
    if (head.likelihood == "bernoulli") != (reading == "sigmoid"):
        other = "sigmoid" if head.likelihood == "bernoulli" else "softmax"
        raise ConfigError(
            f"scorer '{member.spec}': the panel says {reading}, but {head.reason}, which is read "
            f"by {other}."
        )


def _load_classifier(spec: str, ref: str, *, trust_remote_code: bool) -> Loaded:
    loaded = load_model(ref, trust_remote_code=trust_remote_code)
    if loaded.task != "classification":
        raise MismatchError(f"scorer '{spec}': '{ref}' is no text-classification checkpoint.")
    return loaded


def _classifier(
    spec: str, loaded: Loaded, label: str, reading: LabelReading, device: str | None
) -> Scorer:
    """The scorer that a loaded classifier is, on its device."""
    loaded.move_to(device)
    longest = min(_LONGEST_TEXT, loaded.context)
    score = classifier_scorer(
        loaded.model,
        loaded.tokenizer,
        label,
        name=spec,
        reading=reading.reading,
        max_length=longest,
    )

    def checked(texts: list[str]) -> list[float]:
        return checked_scores(score(texts), len(texts), spec)

    info = ScorerInfo(
        kind="model",
        fingerprint=checkpoint_identity(loaded.path),
        label=label,
        reading=reading.reading,
        reason=reading.reason,
    )
    cut = partial(count_cut, loaded.tokenizer, max_length=longest)
    return Scorer(spec, checked, info, loaded.path, cut)


def _split_reading(label: str, labels: Sequence[str]) -> tuple[str, Reading | None]:
    """The label without its reading; a label of the model that ends like one is left whole."""
    name, _, ending = label.rpartition("=")
    chosen = next((reading for reading in READINGS if reading == ending), None)
    return (label, None) if chosen is None or label in labels else (name, chosen)


def _open_function(spec: str) -> Scorer:
    score, source = hook_scorer(spec)
    fingerprint = content_hash(source) if source else None
    return Scorer(spec, score, ScorerInfo(kind="function", fingerprint=fingerprint))
