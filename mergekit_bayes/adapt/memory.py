"""The memory of a K-prior: the examples on which an adapted model should stay as it was.

They come from rows of text, from the model itself, or from both. What a model writes stands for
its unknown data, and holds whatever it says, so that texts like the removed ones are left out by a
scorer. A part is held out for checks; of the rest all are used, a random choice, or those with the
largest leverage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np

from mergekit_bayes.adapt.leverage import (
    read_variances,
    refuse_unknown_variance,
    self_influence,
)
from mergekit_bayes.adapt.rows import read_examples
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.errors import BmergeError, ConfigError
from mergekit_bayes.evaluate.scorers import Scorer, open_scorers
from mergekit_bayes.finetune.identity import digest
from mergekit_bayes.generation import write_texts
from mergekit_bayes.models.devices import choose_device
from mergekit_bayes.models.encode import Collate, batches, encode_rows, observations
from mergekit_bayes.models.estimate import random_examples
from mergekit_bayes.models.examples import Encoded
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.modes import evaluating
from mergekit_bayes.models.quiet import bar, with_bar
from mergekit_bayes.ranks import main_first, on_main
from mergekit_bayes.records import Frozen

Examples = list[dict[str, Any]]


class MemoryFacts(Frozen):
    """What a memory is made of, for reports and for the record of the posterior.

    Attributes:
        sources: Files and data sets of its rows, as the user named them.
        rows: Rows that were read.
        self_generated: Texts that the model wrote and that were kept.
        left_out: Texts that the model wrote and that the filter left out.
        filter: The scorer that left them out; None without one.
        select: How the examples were chosen: all, at random or by leverage.
        examples: Examples that are trained on.
        observations: Their observations.
        held_out: Examples that are held out.
        held_out_observations: Their observations.
        sha256: SHA-256 of the encoded examples that are trained on, in order.
    """

    sources: tuple[str, ...]
    rows: int
    self_generated: int
    left_out: int
    filter: str | None
    select: Literal["all", "random", "leverage"]
    examples: int
    observations: int
    held_out: int
    held_out_observations: int
    sha256: str

    def describe(self) -> str:
        """The facts in one line."""
        parts = []
        if self.rows:
            parts.append(f"{self.rows:,} rows of {', '.join(self.sources)}")
        if self.self_generated:
            note = f" ({self.left_out:,} left out by {self.filter})" if self.filter else ""
            parts.append(f"{self.self_generated:,} texts that the model wrote{note}")
        chosen = {"all": "", "random": " chosen at random", "leverage": " chosen by leverage"}
        return (
            f"{' and '.join(parts)}; {self.examples:,} examples{chosen[self.select]}, "
            f"{self.held_out:,} held out"
        )


class Memory(NamedTuple):
    """The encoded memory.

    Attributes:
        examples: What is trained on, as `encode_rows` makes it: `input_ids`, and the `labels` of
            a language model.
        held_out: What is not trained on; empty if no share is held out, or of one example.
        texts: Texts that the model wrote and that were kept, to be stored as rows.
        facts: What it is made of.
    """

    examples: Examples
    held_out: Examples
    texts: list[str]
    facts: MemoryFacts


def refuse_memory(config: AdaptConfig, loaded: Loaded) -> None:
    """Refuse a memory that this model cannot write or choose.

    Raises:
        CheckpointError: The model's posterior cannot be read.
        ConfigError: A classifier cannot write, or a choice by leverage without a posterior.
        PrecisionError: The record of the posterior cannot be read.
    """
    if config.memory_self_generated is not None and loaded.task == "classification":
        raise ConfigError(
            "memory_self_generated: a classifier writes no text. Name rows in `memory`."
        )
    if config.memory_select == "leverage":
        refuse_unknown_variance(config)


def build_memory(config: AdaptConfig, loaded: Loaded) -> Memory | None:
    """Read, write, filter, split and choose the memory.

    Every rank must call this at the same time, outside of `ranks.main_first`. All share the texts
    to write, and leverage is measured by rank 0 alone, on a GPU where there is one; the model is
    afterwards as it was, on its device, with its mode and its gradients. Call it at the weights
    that the memory is to hold, before an adapter is put on them.

    The held-out part is the end of a seeded order, and what is trained on its front, so that
    memories of different `memory_rows` are checked on the same examples, and a smaller random one
    is part of a larger one.

    Written texts go through `encode_rows` like any other, so that a memory read back from
    `Memory.texts` is the same. A text that was cut at `max_length` may thereby end in EOS, which
    has no effect on the KL divergence.

    Args:
        config: The settings.
        loaded: The model of `config.model`.

    Returns:
        None where the settings name no memory.

    Raises:
        CheckpointError: Rows, a scorer or a posterior cannot be read, or the model cannot write.
        ConfigError: A classifier cannot write, the filter leaves nothing, or a choice by leverage
            without a posterior.
        MismatchError: Rows without the named columns or with unknown labels.
        PrecisionError: A posterior with entries that are no precision.
    """
    if not config.has_memory:
        return None
    refuse_memory(config, loaded)  # before any text is written, which may take long
    read = main_first(lambda: _from_rows(config, loaded))
    row_count, examples = read.rows, read.examples
    texts: list[str] = []
    if config.memory_self_generated is not None:
        texts = _written(config, loaded)
        examples += encode_rows(
            {"text": texts},
            loaded,
            max_length=config.max_length,
            pack=config.pack == "joined",
            source="memory_self_generated",
        )
    training, held_out = _split(examples, config)
    chosen = on_main(lambda: _chosen(training, config, loaded))
    select: Literal["all", "random", "leverage"] = config.memory_select
    facts = MemoryFacts(
        sources=() if config.memory is None else config.memory.sources,
        rows=row_count,
        self_generated=len(texts),
        left_out=(config.memory_self_generated or 0) - len(texts),
        filter=config.memory_filter,
        select=select if len(chosen) < len(training) else "all",
        examples=len(chosen),
        observations=observations(chosen, loaded.task),
        held_out=len(held_out),
        held_out_observations=observations(held_out, loaded.task),
        sha256=digest(chosen),
    )
    return Memory(chosen, held_out, texts, facts)


def _from_rows(config: AdaptConfig, loaded: Loaded) -> Encoded:
    """The rows that are named."""
    if config.memory is None:
        return Encoded(0, [])
    # Only the prediction error asks for labels: what holds a model is its own distribution.
    labelled = config.memory_select == "leverage"
    return read_examples(config, loaded, config.memory, labelled=labelled)


def _written(config: AdaptConfig, loaded: Loaded) -> list[str]:
    """Texts that the model writes, without those that the filter leaves out."""
    assert config.memory_self_generated is not None
    # It is tried before any text is written.
    scorer = None
    if (spec := config.memory_filter) is not None:
        scorer = main_first(lambda: _open_filter(config, spec))
    with _at_work(loaded), bar("texts", config.memory_self_generated) as progress:
        texts = write_texts(
            loaded.model,
            loaded.tokenizer,
            config.memory_self_generated,
            start=loaded.start,
            context=loaded.context,
            new_tokens=min(config.max_length, loaded.context) - 1,
            seed=config.seed,
            progress=progress,
        )
    if scorer is None:
        return texts
    scores = scorer.score(texts)
    threshold = scorer.threshold(config.threshold)
    kept = [t for t, score in zip(texts, scores, strict=True) if score < threshold]
    if not kept:
        raise ConfigError(
            f"memory_filter: '{scorer.spec}' scores every text that the model wrote ({len(texts)}) "
            f"{threshold:g} or more, so that none is left for the memory. Name rows in "
            "`memory` instead of `memory_self_generated`, or raise `threshold`."
        )
    return kept


def _open_filter(config: AdaptConfig, spec: str) -> Scorer:
    try:
        remote = config.trust_remote_code
        return open_scorers([spec], trust_remote_code=remote, single=True)[0]
    except BmergeError as error:
        raise type(error)(f"memory_filter: {error}") from None


def _split(examples: Examples, config: AdaptConfig) -> tuple[Examples, Examples]:
    """The front of a seeded order, which is trained on, and the end, which is held out."""
    order = random_examples(examples, len(examples), config.seed)
    count = 0
    if config.memory_held_out > 0 and len(order) > 1:
        count = min(max(1, round(config.memory_held_out * len(order))), len(order) - 1)
    return order[: len(order) - count], order[len(order) - count :]


def _chosen(training: Examples, config: AdaptConfig, loaded: Loaded) -> Examples:
    """The examples that are used, at most `memory_rows` of them."""
    count = len(training) if config.memory_rows is None else config.memory_rows
    if count >= len(training) or config.memory_select == "random":
        return training[:count]
    with _at_work(loaded):
        variances = read_variances(config, loaded)
        singles = batches(training, 1, Collate(loaded.pad), device=loaded.device)
        shown = with_bar(singles, "leverage", len(training))
        scores = self_influence(loaded.model, shown, variances)
    best = np.sort(np.argsort(-scores, kind="stable")[:count])  # in their random order
    return [training[i] for i in best]


@contextmanager
def _at_work(loaded: Loaded) -> Iterator[None]:
    """The model in eval mode on a GPU where there is one; afterwards as and where it was."""
    model, device = loaded.model, loaded.device
    with evaluating(model):
        try:
            model.to(choose_device(None))
            yield
        finally:
            model.to(device)
