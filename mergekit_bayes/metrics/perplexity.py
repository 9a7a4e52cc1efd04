"""Perplexity of a causal language model, by two protocols that the report names.

`rolling` is that of the lm-eval harness with `add_bos_token=False`: each text is one document, it
starts from a start token, which is not scored, every token of the text is scored once, and windows
do not overlap in what they score. By default lm-eval also scores the special tokens that a
tokenizer adds by itself: where that is BOS (Llama's and Gemma's do so) the model sees it twice and
has to predict it once, and lm-eval's numbers are others. `concatenate` is that of
the papers: texts joined by EOS into one stream. A window holds `window` tokens of input and scores
the last `stride` of them (the first window of a document scores all of its tokens), so a smaller
stride means more context and a lower number. Over several draws of the weights the probability of
each token is averaged.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.libraries import embedding_rows, outputs_of, token_ids
from mergekit_bayes.metrics.base import PRESENT, Draws, Interval, interval, resampled_sums
from mergekit_bayes.ranks import spread, world
from mergekit_bayes.records import FloatArray, Progress, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGITS = 1 << 23  # of a batch on a CPU: allocators give larger blocks back and fetch them anew


class PerplexityReport(Record):
    """How well a model predicts a set of texts.

        token = exp(nats / tokens)   word = exp(nats / words)   byte = exp(nats / bytes)

    Do not compare perplexities of different windows or protocols, nor token perplexities of
    different tokenizers. Bits per byte can be compared between tokenizers.

    Attributes:
        protocol: `rolling` or `concatenate`.
        window: Largest number of tokens read at once.
        stride: Tokens that each window after the first one scores.
        documents: Number of texts.
        tokens: Number of scored tokens.
        special_tokens: Special tokens that the tokenizer would add to a text by itself, such as
            BOS. They are not scored; lm-eval scores them unless its `add_bos_token` is False.
        words: Pieces between white space in the texts, as lm-eval counts them.
        bytes: Length of the texts in UTF-8.
        nats: Minus the log-probability of all texts.
        loss: Nats per token.
        token: Perplexity per token.
        word: Perplexity per word.
        byte: Perplexity per byte.
        bits_per_byte: log2 of the perplexity per byte.
        document_nats: `nats` of each text, for paired comparisons; not in the JSON.
        document_tokens: `tokens` of each text; not in the JSON.
    """

    protocol: Literal["rolling", "concatenate"]
    window: int
    stride: int
    documents: int
    tokens: int
    special_tokens: int = 0
    words: int
    bytes: int
    nats: float
    loss: Interval
    token: Interval
    word: Interval
    byte: Interval
    bits_per_byte: Interval
    document_nats: tuple[float, ...] = Field(default=(), exclude=True, repr=False)
    document_tokens: tuple[int, ...] = Field(default=(), exclude=True, repr=False)


def measure_perplexity(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    *,
    start: int,
    window: int,
    stride: int | None = None,
    concatenate: bool = False,
    batch_size: int = 8,
    bootstrap: int = 1000,
    seed: int = 0,
    draws: Draws = PRESENT,
    progress: Progress | None = None,
) -> PerplexityReport:
    """Score every token of `texts` once.

        p(token | before) = 1/K sum_k p_k(token | before)    over K draws of the weights

    Equal to lm-eval's `loglikelihood_rolling` with `add_bos_token=False` and a `max_length` of
    `window`, for every batch size. The default of lm-eval differs for a tokenizer that adds special
    tokens by itself (see the report's `special_tokens`).

    Args:
        model: A causal language model in eval mode: `model(input_ids, attention_mask).logits`.
        tokenizer: Its tokenizer.
        texts: The documents; intervals come from resampling them.
        start: The token that a document (with `concatenate`, the stream) starts from; it is not
            scored.
        window: Tokens of input at once, at most the model's context.
        stride: Tokens that a window scores; None scores the whole window, without overlap.
        concatenate: Join the texts by EOS into one stream.
        batch_size: Full windows in a batch at most; more short ones fit into one. On a CPU a batch
            of a large vocabulary holds fewer.
        bootstrap: Number of resamples of the documents; 0 gives no intervals.
        seed: Seed of the bootstrap.
        draws: Weights to average over; iterating puts them into `model`.
        progress: Called with (tokens scored, tokens in all), over all draws.

    Raises:
        ConfigError: The stride does not fit the window, or there is no token to score.
        CheckpointError: The model's log-probabilities are not numbers, or `concatenate` has no EOS.
    """
    stride = fitting_stride(stride, window)
    options = {"add_special_tokens": False, "verbose": False}
    encoded = token_ids(model, lambda: [tokenizer(t, **options)["input_ids"] for t in texts])
    streams = _joined(encoded, tokenizer.eos_token_id) if concatenate else separate(encoded)
    windows = [
        w for i, ids in enumerate(streams.ids) for w in cut_windows(i, ids, start, window, stride)
    ]
    if not windows:
        raise ConfigError(f"{len(texts)} texts hold no token to score.")

    nats = nats_of_streams(model, streams, windows, window * batch_size, draws, progress)
    by_text = np.bincount(streams.owners, weights=nats, minlength=len(texts)).astype(np.float64)
    tokens = np.bincount(streams.owners, minlength=len(texts)).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(by_text))
    if bad.size:
        raise CheckpointError(
            f"the model's log-probability of text {bad[0] + 1} is {-by_text[bad[0]]}. Its weights "
            "hold NaN or infinity, or are too large for their dtype."
        )
    words = np.array([count_words(t) for t in texts], np.float64)
    size = np.array([len(t.encode()) for t in texts], np.float64)
    return PerplexityReport(
        protocol="concatenate" if concatenate else "rolling",
        window=window,
        stride=stride,
        documents=len(texts),
        tokens=int(tokens.sum()),
        special_tokens=tokenizer.num_special_tokens_to_add(),
        words=int(words.sum()),
        bytes=int(size.sum()),
        nats=float(by_text.sum()),
        document_nats=tuple(by_text.tolist()),
        document_tokens=tuple(tokens.astype(int).tolist()),
        **ratios(by_text, tokens, words, size, bootstrap, seed),
    )


def fitting_stride(stride: int | None, window: int) -> int:
    """The stride, by default the window.

    Raises:
        ConfigError: It does not fit the window.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ConfigError(
            f"stride {stride}: expected 1 to {window}, the window; a larger one would skip tokens."
        )
    return stride


def loss_change(
    before: PerplexityReport, after: PerplexityReport, *, bootstrap: int = 1000, seed: int = 0
) -> Interval:
    """Nats per token of `after` minus those of `before`, with documents resampled in pairs.

    Args:
        before: The report to compare with.
        after: A report on the same texts.
        bootstrap: Number of resamples; 0 gives no interval.
        seed: Seed of the bootstrap.
    """
    columns = np.array(
        [before.document_nats, after.document_nats, before.document_tokens], np.float64
    ).T
    total, sums = columns.sum(axis=0), resampled_sums(columns, bootstrap, seed)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample of empty texts only
        replicates = (sums[:, 1] - sums[:, 0]) / sums[:, 2]
    return interval(float((total[1] - total[0]) / total[2]), replicates, len(columns))


def count_words(text: str) -> int:
    """Pieces between white space, as lm-eval counts them: at least one."""
    return len(re.split(r"\s+", text))


class _Streams(NamedTuple):
    ids: list[list[int]]
    owners: NDArray[np.int64]  # (tokens of all streams,), the text that each token belongs to


def separate(encoded: list[list[int]]) -> _Streams:
    """One stream for each text.

    Args:
        encoded: The tokens of each text.
    """
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    return _Streams(encoded, np.repeat(np.arange(len(encoded)), lengths))


def _joined(encoded: list[list[int]], eos: int | None) -> _Streams:
    """One stream of all texts; an EOS belongs to the text that it ends."""
    if eos is None:
        raise CheckpointError(
            "the tokenizer has no EOS token to join texts with. Leave out --concatenate."
        )
    stream: list[int] = []
    owners: list[int] = []
    for i, ids in enumerate(encoded):
        ended = [*ids, eos] if i + 1 < len(encoded) else ids
        stream += ended
        owners += [i] * len(ended)
    return _Streams([stream], np.array(owners, np.int64))


class _Window(NamedTuple):
    stream: int
    at: int  # position of the first scored token in its stream
    scored: int
    inputs: list[int]  # the tokens before each scored one, with as much context as fits
    targets: list[int]


def cut_windows(
    stream: int, ids: list[int], start: int, window: int, stride: int, first: int = 0
) -> Iterator[_Window]:
    """Cut a stream so that each token is scored once: `window` tokens first, then `stride` each.

    Args:
        stream: Its number.
        ids: Its tokens.
        start: The token that it starts from.
        window: Tokens of input at once.
        stride: Tokens that each window after the first one scores.
        first: Position of the first token to score; those before are context.
    """
    inputs = [start, *ids]
    at, size = first, window
    while at < len(ids):
        end = min(at + size, len(ids))
        yield _Window(stream, at, end - at, inputs[max(0, end - window) : end], ids[at:end])
        at, size = end, stride


def _fitting_budget(model: torch.nn.Module, windows: Sequence[_Window], budget: int) -> int:
    """Tokens of a batch with padding. On a CPU logits of more than 32 MiB make it slower."""
    rows = embedding_rows(model)
    if rows is None or next(model.parameters()).device.type != "cpu":
        return budget
    longest = max(len(w.inputs) for w in windows)
    return min(budget, max(longest, LOGITS // rows))


def nats_of_streams(
    model: torch.nn.Module,
    streams: _Streams,
    windows: Sequence[_Window],
    budget: int,
    draws: Draws,
    progress: Progress | None,
) -> FloatArray:
    """Minus the log of each token's mean probability, all streams after each other.

    Args:
        model: A causal language model in eval mode.
        streams: The tokens.
        windows: Those of all streams; tokens of none have infinity.
        budget: Tokens of input in a batch, with padding.
        draws: Weights to average over.
        progress: Called with (tokens scored, tokens in all).
    """
    log_sums = [np.full(len(ids), -np.inf) for ids in streams.ids]  # over draws
    tokens, done = sum(w.scored for w in windows), 0
    batches = list(_batches(windows, _fitting_budget(model, windows, budget)))

    def score(batch: list[_Window]) -> list[FloatArray]:
        nonlocal done
        nats = _score(model, batch)
        done += sum(w.scored for w in batch)
        if progress is not None:
            progress(min(done * world(), tokens * len(draws)), tokens * len(draws))
        return nats

    for _ in draws:
        for batch, scores in zip(batches, spread(batches, score), strict=True):
            for window, nats in zip(batch, scores, strict=True):
                scored = log_sums[window.stream][window.at : window.at + window.scored]
                with np.errstate(invalid="ignore"):  # the caller refuses NaN and names the text
                    np.logaddexp(scored, -nats, out=scored)
    return np.concatenate([np.log(len(draws)) - log_sum for log_sum in log_sums])


def _batches(windows: Sequence[_Window], budget: int) -> Iterator[list[_Window]]:
    """Windows of similar length together, at most `budget` tokens with padding."""
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda w: -len(w.inputs)):
        if batch and len(batch[0].inputs) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def _score(model: torch.nn.Module, batch: list[_Window]) -> list[FloatArray]:
    """Nats of each window's targets. Padding goes right, where a causal model cannot see it.

    It needs no mask there, and attention without one is quicker.
    """
    ids = torch.zeros((len(batch), len(batch[0].inputs)), dtype=torch.long)
    for i, window in enumerate(batch):
        ids[i, : len(window.inputs)] = torch.tensor(window.inputs)
    ids = ids.to(next(model.parameters()).device)
    logits = outputs_of(
        model, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).logits
    return [
        _nats(logits[i, len(w.inputs) - w.scored : len(w.inputs)], w.targets)
        for i, w in enumerate(batch)
    ]


def _nats(logits: Tensor, targets: list[int]) -> FloatArray:
    labels = torch.tensor(targets, device=logits.device)
    nats = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return nats.double().cpu().numpy()


def ratios(
    nats: FloatArray,
    tokens: FloatArray,
    words: FloatArray,
    size: FloatArray,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Nats of all texts over their tokens, words and bytes, as the report gives them.

    Args:
        nats: (n,), of each text.
        tokens: (n,), of each text.
        words: (n,), of each text.
        size: (n,), bytes of each text.
        resamples: Number of resamples of the texts; 0 gives no intervals.
        seed: Seed of the bootstrap.
    """
    columns = np.stack([nats, tokens, words, size], axis=1)
    total, sums = columns.sum(axis=0), resampled_sums(columns, resamples, seed)

    def ratio(column: int, finish: Callable[[FloatArray], FloatArray]) -> Interval:
        # exp of a ruined model's loss may be infinite, and its perplexity is then infinite.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            value = float(finish(total[0] / total[column]))
            replicates = finish(sums[:, 0] / sums[:, column])
        return interval(value, replicates, len(nats))

    return {
        "loss": ratio(1, lambda x: x),
        "token": ratio(1, np.exp),
        "word": ratio(2, np.exp),
        "byte": ratio(3, np.exp),
        "bits_per_byte": ratio(3, lambda x: x / np.log(2)),
    }
