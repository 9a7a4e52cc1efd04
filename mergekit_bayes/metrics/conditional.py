"""Log-probability of continuations given what comes before them, under a causal language model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.libraries import token_ids
from mergekit_bayes.metrics.base import PRESENT
from mergekit_bayes.metrics.perplexity import cut_windows, nats_of_streams, separate
from mergekit_bayes.records import FloatArray, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conditional(NamedTuple):
    """Continuations given what comes before them."""

    nats: FloatArray  # (n,), minus the log-probability of each
    tokens: FloatArray  # (n,), the number of tokens that were scored
    shortened: int  # continuations that lost the front of what comes before them


def conditional_nats(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[tuple[str, str]],
    *,
    start: int,
    window: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Conditional:
    """Score continuations as the end of a text: -log p(continuation | start, before).

    The text `before + continuation` is cut into tokens as a whole, and what is scored are its
    tokens after the longest common beginning with the tokens of `before`. Where one token spans the
    boundary (`ca` + `t sat` may be `cat`, ` sat`), it is scored whole, with the letters of `before`
    that it holds: a text cut there would be one that the tokenizer never makes, and whose
    probability the model never learnt.

    Several ranks (`ranks.spread`) share the batches, and each gets all numbers.

    Args:
        model: A causal language model in eval mode: `model(input_ids, attention_mask).logits`.
        tokenizer: Its tokenizer.
        pairs: What comes before, and its continuation.
        start: The token that a text starts from; it is not scored.
        window: Tokens of input at once, at most the model's context. A text that is longer loses
            its front; only a continuation that is longer by itself is scored in several windows.
        batch_size: Windows as long as the longest one in a batch; more short ones fit into one.
        progress: Called with (tokens scored, tokens in all).

    Raises:
        CheckpointError: The model's log-probabilities are not numbers.
    """
    options = {"add_special_tokens": False, "verbose": False}
    befores = list(dict.fromkeys(before for before, _ in pairs))
    encoded = token_ids(
        model,
        lambda: [tokenizer(t, **options)["input_ids"] for t in (*befores, *map("".join, pairs))],
    )
    before_ids = dict(zip(befores, encoded, strict=False))
    streams = separate(encoded[len(befores) :])
    firsts = [
        _common(before_ids[before], ids)
        for (before, _), ids in zip(pairs, streams.ids, strict=True)
    ]
    windows = [
        w
        for i, (ids, at) in enumerate(zip(streams.ids, firsts, strict=True))
        for w in cut_windows(i, ids, start, window, window, at)
    ]
    if not windows:
        return Conditional(np.zeros(len(pairs)), np.zeros(len(pairs)), 0)
    budget = batch_size * max(len(w.inputs) for w in windows)
    nats = nats_of_streams(model, streams, windows, budget, PRESENT, progress)
    ends = np.cumsum([len(ids) for ids in streams.ids])
    tokens = [len(ids) - at for ids, at in zip(streams.ids, firsts, strict=True)]
    sums = [nats[end - count : end].sum() for end, count in zip(ends, tokens, strict=True)]
    bad = np.flatnonzero(~np.isfinite(sums))
    if bad.size:
        raise CheckpointError(
            f"the model's log-probability of text {bad[0] + 1} is {-sums[bad[0]]}. Its weights "
            "hold NaN or infinity, or are too large for their dtype."
        )
    shortened = sum(len(ids) > window for ids in streams.ids)
    return Conditional(np.array(sums), np.array(tokens, np.float64), shortened)


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
