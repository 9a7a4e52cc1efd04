"""Perplexity of a causal language model, by two protocols that are always named.

`rolling` is that of the lm-eval harness: one text is one document, it starts from a start token,
every token is scored once, and windows do not overlap in what they score. `concatenate` is that of
the papers: texts joined by EOS into one stream. A window holds `window` tokens of input and scores
the last `stride` of them (the first window of a document scores all of its tokens), so a smaller
stride means more context and a lower number. Over several draws of the weights the probability of
each token is averaged.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.metrics.base import PRESENT, Draws, Interval, interval, resampled_sums
from mergekit_bayes.records import Array, Progress, Record


class PerplexityReport(Record):
    """How well a model predicts a set of texts. Perplexities of different windows or protocols do
    not compare, token perplexities of different tokenizers neither; bits per byte do.

        token = exp(nats / tokens)   word = exp(nats / words)   byte = exp(nats / bytes)

    Attributes:
        protocol: `rolling` or `concatenate`.
        window: Most tokens of input at a time.
        stride: Tokens that a window after the first scores.
        words: Pieces between white space in the texts, as lm-eval counts them.
        bytes: Of the texts in UTF-8.
        nats: Minus the log-probability of all texts.
        loss: Nats per token.
        document_nats: The same by text, for paired comparisons; not in the JSON.
        document_tokens: Scored tokens by text; not in the JSON.
    """

    protocol: Literal["rolling", "concatenate"]
    window: int
    stride: int
    documents: int
    tokens: int
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
    model: Any,
    tokenizer: Any,
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
    """Score every token of `texts` once; over K draws of the weights

        p(token | before) = 1/K sum_k p_k(token | before)

    Equal to lm-eval's `loglikelihood_rolling` with `add_bos_token=False`, whatever the batch size.

    Args:
        model: A causal language model in eval mode: `model(input_ids, attention_mask).logits`.
        texts: The documents; intervals come from resampling them.
        start: The token that a document (with `concatenate`, the stream) starts from; never scored.
        window: Tokens of input at a time, at most the model's context.
        stride: None: no overlap, `stride = window`.
        batch_size: Full windows in a batch; short ones are packed more to a batch.
        draws: Put other weights into `model` as they are gone through.
        progress: Called with (tokens scored, tokens in all), over all draws.

    Raises:
        ConfigError: A window or stride that makes no sense, or no token to score.
        CheckpointError: The model's log-probabilities are not numbers.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ConfigError(
            f"stride {stride}: expected 1 to {window}, the window; a larger one would skip tokens."
        )
    encoded = [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in texts]
    streams, owners = _join(encoded, tokenizer.eos_token_id) if concatenate else (encoded, None)
    jobs = [job for i, ids in enumerate(streams) for job in _windows(i, ids, start, window, stride)]
    tokens = sum(job.scored for job in jobs)
    if not tokens:
        raise ConfigError(f"{len(texts)} texts hold no token to score.")

    chances = [np.full(len(ids), -np.inf) for ids in streams]  # log of the sum over draws
    done = 0
    for _ in draws:
        for batch in _batches(jobs, window * batch_size):
            for job, found in zip(batch, _score(model, batch), strict=True):
                scored = chances[job.stream][job.at : job.at + job.scored]
                with np.errstate(invalid="ignore"):  # NaN is refused below, by text
                    np.logaddexp(scored, -found, out=scored)
            done += sum(job.scored for job in batch)
            if progress is not None:
                progress(done, tokens * len(draws))
    losses = [np.log(len(draws)) - c for c in chances]

    if owners is None:
        owners = np.repeat(np.arange(len(texts)), [len(ids) for ids in encoded])
    nats = np.bincount(owners, weights=np.concatenate(losses), minlength=len(texts)).astype(
        np.float64
    )
    counts = np.bincount(owners, minlength=len(texts)).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(nats))
    if bad.size:
        raise CheckpointError(
            f"the model's log-probability of text {bad[0] + 1} is {-nats[bad[0]]}. Its weights "
            "hold NaN or infinity, "
            "or are too large for their dtype."
        )
    words = np.array([len(re.split(r"\s+", t)) for t in texts], np.float64)
    size = np.array([len(t.encode()) for t in texts], np.float64)
    numbers = _summarise(nats, counts, words, size, bootstrap, seed)
    return PerplexityReport(
        protocol="concatenate" if concatenate else "rolling",
        window=window,
        stride=stride,
        documents=len(texts),
        tokens=tokens,
        words=int(words.sum()),
        bytes=int(size.sum()),
        nats=float(nats.sum()),
        document_nats=tuple(nats.tolist()),
        document_tokens=tuple(counts.astype(int).tolist()),
        **numbers,
    )


def loss_change(
    before: PerplexityReport, after: PerplexityReport, *, bootstrap: int = 1000, seed: int = 0
) -> Interval:
    """Nats per token of `after` minus those of `before` on the same texts, with documents resampled
    in pairs.
    """
    columns = np.array(
        [before.document_nats, after.document_nats, before.document_tokens], np.float64
    ).T
    total, sums = columns.sum(axis=0), resampled_sums(columns, bootstrap, seed)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample of empty texts only
        replicates = (sums[:, 1] - sums[:, 0]) / sums[:, 2]
    return interval(float((total[1] - total[0]) / total[2]), replicates, len(columns))


class _Window(NamedTuple):
    stream: int
    at: int  # position of the first scored token in its stream
    scored: int
    inputs: list[int]  # the tokens before each scored one, with as much context as fits
    targets: list[int]


def _windows(
    stream: int, ids: list[int], start: int, window: int, stride: int
) -> Iterator[_Window]:
    known = [start, *ids]
    at, size = 0, window
    while at < len(ids):
        end = min(at + size, len(ids))
        yield _Window(stream, at, end - at, known[max(0, end - window) : end], ids[at:end])
        at, size = end, stride


def _join(encoded: list[list[int]], eos: int | None) -> tuple[list[list[int]], NDArray[np.int64]]:
    """One stream, and the text that each of its tokens belongs to; an EOS belongs to the text it
    ends.
    """
    if eos is None:
        raise CheckpointError(
            "the tokenizer has no EOS token to join texts with. Leave out --concatenate."
        )
    stream: list[int] = []
    owners: list[int] = []
    for i, ids in enumerate(encoded):
        joined = [*ids, eos] if i + 1 < len(encoded) else ids
        stream += joined
        owners += [i] * len(joined)
    return [stream], np.array(owners, np.int64)


def _batches(jobs: Sequence[_Window], budget: int) -> Iterator[list[_Window]]:
    """Windows of like length together, at most `budget` tokens with padding."""
    batch: list[_Window] = []
    for job in sorted(jobs, key=lambda j: -len(j.inputs)):
        if batch and len(batch[0].inputs) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


@torch.inference_mode()
def _score(model: Any, batch: list[_Window]) -> list[Array]:
    """Nats of each window's targets. Padding goes right, where a causal model cannot see it."""
    device = next(model.parameters()).device
    width = len(batch[0].inputs)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, job in enumerate(batch):
        ids[i, : len(job.inputs)] = torch.tensor(job.inputs)
        mask[i, : len(job.inputs)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return [
        _nats(logits[i, len(job.inputs) - job.scored : len(job.inputs)], job.targets)
        for i, job in enumerate(batch)
    ]


def _nats(logits: Tensor, targets: list[int]) -> Array:
    chosen = torch.tensor(targets, device=logits.device)
    found = torch.nn.functional.cross_entropy(logits.float(), chosen, reduction="none")
    return found.double().cpu().numpy()


def _summarise(
    nats: Array, tokens: Array, words: Array, size: Array, resamples: int, seed: int
) -> dict[str, Interval]:
    columns = np.stack([nats, tokens, words, size], axis=1)
    total, draws = columns.sum(axis=0), resampled_sums(columns, resamples, seed)

    def ratio(column: int, finish: Callable[[Any], Any]) -> Interval:
        # exp of a ruined model's loss may be infinite; that is its honest perplexity.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            value = float(finish(total[0] / total[column]))
            replicates = finish(draws[:, 0] / draws[:, column])
        return interval(value, replicates, len(nats))

    return {
        "loss": ratio(1, lambda x: x),
        "token": ratio(1, np.exp),
        "word": ratio(2, np.exp),
        "byte": ratio(3, np.exp),
        "bits_per_byte": ratio(3, lambda x: x / np.log(2)),
    }
