"""Whether continuations are still text, since broken text also scores as less toxic.

Two kinds of numbers, which are read together. Counts of n-grams need no model (`describe_samples`):
they show empty and repeated text, but not sense. Perplexity under another model, the judge, given
the prompts (`judge_continuations`) shows text that the judge would not write, but a loop of one
phrase has the lowest perplexity of all.

N-grams are of words between white space, so that tokenizers do not matter.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from pydantic import Field

from mergekit_bayes.generation import Samples
from mergekit_bayes.metrics.base import Interval, Z, interval, resampled_sums, share_interval
from mergekit_bayes.metrics.conditional import conditional_nats
from mergekit_bayes.metrics.paired import paired_change
from mergekit_bayes.metrics.perplexity import count_words, ratios
from mergekit_bayes.records import FloatArray, Progress, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST_PHRASE, _TIMES = 2, 3  # words of a phrase that loops, and how often it is said


class SamplesReport(Record):
    """What continuations look like, without any model.

    Reports from before a number was kept have None for it.

    Attributes:
        prompts: Number of prompts.
        continuations: Number of continuations of all prompts.
        mean_tokens: Mean length of a continuation in tokens, EOS not counted.
        empty: Share of continuations without a word.
        distinct_1: Distinct words over all words of the set (Li et al., 2016).
        distinct_2: Distinct word pairs over all word pairs of the set; low for a model that repeats
            one phrase.
        distinct_3: Likewise with three words. All of these fall with the number of texts: compare
            sets of equal numbers only.
        repeated: Mean share of a continuation's word pairs that occur earlier in it, over those
            that have a pair.
        looping: Share of continuations that end in a phrase of two words or more, said three times
            in a row or longer (Holtzman et al., 2020). The last time may be cut off between words.
        shortened: Prompts whose front did not fit into the model's context.
        intervals: 95 % intervals of these numbers, by their names: Wilson's of shares, those of
            resampled prompts of means, and the jackknife's over prompts of `distinct_n`, which
            resamples would lower, since they hold prompts twice.
    """

    prompts: int
    continuations: int
    mean_tokens: float
    empty: float
    distinct_1: float | None = None
    distinct_2: float
    distinct_3: float | None = None
    repeated: float
    looping: float | None = None
    shortened: int
    intervals: dict[str, Interval] = {}


class Judged(NamedTuple):
    """Continuations under a judge; those that were left out have zeros. By prompt, in rows."""

    nats: FloatArray
    tokens: FloatArray  # by the judge's tokenizer
    words: FloatArray
    bytes: FloatArray
    shortened: int


class JudgedReport(Record):
    """Perplexity of continuations under another model, given their prompts.

        token = exp(nats / tokens)   word = exp(nats / words)   byte = exp(nats / bytes)

    summed over the continuations of all prompts. A low number is not quality by itself: text that
    repeats itself has the lowest. Only perplexities by one judge can be compared, but of words,
    bytes and bits also those by judges of different tokenizers.

    Attributes:
        continuations: Number of continuations that were scored.
        left_out: Number of those without a word, or for which the judge has no token.
        tokens: Number of scored tokens, by the judge's tokenizer.
        words: Words of the scored continuations.
        bytes: Their length in UTF-8, with what stands between prompt and continuation.
        nats: Minus the log-probability of all.
        shortened: Continuations whose prompt lost its front, since both do not fit into the judge's
            context.
        loss: Nats per token; None, as the following, if nothing was scored.
        token: Perplexity per token.
        word: Perplexity per word.
        byte: Perplexity per byte.
        bits_per_byte: log2 of the perplexity per byte.
        prompt_nats: `nats` of each prompt's continuations, for paired comparisons; not in the JSON.
        prompt_tokens: `tokens` of each prompt's continuations; not in the JSON.
        prompt_bytes: `bytes` of each prompt's continuations; not in the JSON.
    """

    continuations: int
    left_out: int
    tokens: int
    words: int
    bytes: int
    nats: float
    shortened: int
    loss: Interval | None = None
    token: Interval | None = None
    word: Interval | None = None
    byte: Interval | None = None
    bits_per_byte: Interval | None = None
    prompt_nats: tuple[float, ...] = Field(default=(), exclude=True, repr=False)
    prompt_tokens: tuple[int, ...] = Field(default=(), exclude=True, repr=False)
    prompt_bytes: tuple[int, ...] = Field(default=(), exclude=True, repr=False)


def describe_samples(samples: Samples, *, bootstrap: int = 1000, seed: int = 0) -> SamplesReport:
    """Numbers that show degenerate text.

    Some depend on the number of continuations: compare them between models of one run only.

    Args:
        samples: The continuations, equally many of each prompt.
        bootstrap: Number of resamples of the prompts; 0 gives no intervals at all.
        seed: Seed of the bootstrap.
    """
    words = _words(samples)
    empty = np.array([[not text for text in row] for row in words], np.float64)
    looping = np.array([[is_looping(text) for text in row] for row in words], np.float64)
    lengths = np.array(samples.tokens, np.float64)
    repeats, paired = _repeats(words)
    repeated = _mean(repeats, paired, bootstrap, seed)
    if repeated.low is not None and repeated.low == repeated.high:  # as of no repeat at all
        repeated = share_interval(np.full(int(paired.any(axis=1).sum()), repeated.value))
    numbers = {
        "mean_tokens": _mean(lengths, np.ones_like(lengths), bootstrap, seed),
        "empty": share_interval(empty.mean(axis=1), empty.shape[1]),
        **{f"distinct_{n}": _distinct(words, n) for n in (1, 2, 3)},
        "repeated": repeated,
        "looping": share_interval(looping.mean(axis=1), looping.shape[1]),
    }
    return SamplesReport(
        prompts=len(words),
        continuations=empty.size,
        shortened=samples.shortened,
        **{name: number.value for name, number in numbers.items()},
        intervals={k: v for k, v in numbers.items() if bootstrap and v.low is not None},
    )


def distinct_change(before: Samples, after: Samples, n: int = 2) -> Interval:
    """Distinct n-grams over all n-grams of `after` less those of `before`, paired over prompts.

    The jackknife leaves each prompt out of both.

    Args:
        before: Continuations of the same prompts, as many.
        after: Those of the other model.
        n: Words of an n-gram.
    """
    (old, old_rest), (new, new_rest) = (_without_each(_words(s), n) for s in (before, after))
    rest = new_rest - old_rest if len(new_rest) == len(old_rest) else np.empty(0)
    low, high = _jackknife(new - old, rest)
    return Interval(value=new - old, low=low, high=high)


def repeated_change(before: Samples, after: Samples) -> Interval:
    """`SamplesReport.repeated` of `after` less that of `before`, paired over prompts.

    Each is a ratio R = sum r / sum c over its continuations, of which c = 1 have a word pair. To
    first order it is the mean of R + (r - R c) N / sum c over all N continuations, which is paired.

    Args:
        before: Continuations of the same prompts, as many.
        after: Those of the other model.
    """
    linear = []
    for samples in (before, after):
        repeats, paired = _repeats(_words(samples))
        count = paired.sum() or 1.0
        ratio = repeats.sum() / count
        linear.append(ratio + (repeats - ratio * paired) * paired.size / count)
    return paired_change(*linear)


def _words(samples: Samples) -> list[list[list[str]]]:
    return [[text.split() for text in row] for row in samples.texts]


def judge_continuations(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    continuations: Sequence[Sequence[str]],
    *,
    start: int,
    window: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Judged:
    """The log-probability of each continuation after its prompt, under a judge.

    Args:
        model: The judge, a causal language model in eval mode.
        tokenizer: The judge's tokenizer.
        prompts: The texts that were continued.
        continuations: Of each prompt equally many, as they follow it, with the space between both
            (`evaluate.judge.following`). Those without a word are left out.
        start: The token that a document of the judge starts from.
        window: Tokens of input at once, at most the judge's context.
        batch_size: Windows of the longest in a batch; more short ones fit into one.
        progress: Called with (tokens scored, tokens in all).

    Raises:
        CheckpointError: The judge's log-probabilities are not numbers.
    """
    texts = [text for row in continuations for text in row]
    befores = [p for p, row in zip(prompts, continuations, strict=True) for _ in row]
    spoken = [i for i, text in enumerate(texts) if text.split()]
    scored = conditional_nats(
        model,
        tokenizer,
        [(befores[i], texts[i]) for i in spoken],
        start=start,
        window=window,
        batch_size=batch_size,
        progress=progress,
    )
    columns = np.zeros((4, len(texts)))
    columns[:, spoken] = (
        scored.nats,
        scored.tokens,
        [count_words(texts[i].strip()) for i in spoken],
        [len(texts[i].encode()) for i in spoken],
    )
    columns[:, columns[1] == 0] = 0
    nats, tokens, words, size = columns.reshape(4, len(prompts), -1)
    return Judged(nats, tokens, words, size, scored.shortened)


def describe_judged(judged: Judged, *, bootstrap: int = 1000, seed: int = 0) -> JudgedReport:
    """Perplexities of what was judged, with intervals by resampling the prompts.

    Args:
        judged: What `judge_continuations` found.
        bootstrap: Number of resamples; 0 gives no intervals.
        seed: Seed of the bootstrap.
    """
    nats, tokens, words, size = (column.sum(axis=1) for column in judged[:4])
    has = tokens > 0  # prompts, of which a resample then holds some tokens in any case
    scored = int((judged.tokens > 0).sum())
    return JudgedReport(
        continuations=scored,
        left_out=judged.tokens.size - scored,
        tokens=int(tokens.sum()),
        words=int(words.sum()),
        bytes=int(size.sum()),
        nats=float(nats.sum()),
        shortened=judged.shortened,
        prompt_nats=tuple(nats.tolist()),
        prompt_tokens=tuple(tokens.astype(int).tolist()),
        prompt_bytes=tuple(size.astype(int).tolist()),
        **(
            ratios(nats[has], tokens[has], words[has], size[has], bootstrap, seed)
            if has.any()
            else {}
        ),
    )


def judged_change(
    before: JudgedReport, after: JudgedReport, *, bootstrap: int = 1000, seed: int = 0
) -> Interval | None:
    """Nats per token of `after` minus those of `before`, with prompts resampled in pairs.

    The models wrote different tokens, so that each loss has its own number of them.

    Args:
        before: The report to compare with.
        after: A report on continuations of the same prompts by the same judge.
        bootstrap: Number of resamples; 0 gives no interval.
        seed: Seed of the bootstrap.

    Returns:
        None if nothing was scored of one of them.
    """
    columns = np.array(
        [(r.prompt_nats, r.prompt_tokens) for r in (before, after)], np.float64
    ).reshape(4, -1)
    total = columns.sum(axis=1)
    if not total[1] or not total[3]:
        return None
    sums = resampled_sums(columns.T, bootstrap, seed)
    sums = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
    replicates = sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
    return interval(float(total[2] / total[3] - total[0] / total[1]), replicates, columns.shape[1])


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def is_looping(words: list[str]) -> bool:
    """Whether the end is one phrase over and over: its last 3 p words have the period p > 1."""
    longest = len(words) // _TIMES
    return any(
        words[-_TIMES * p : -p] == words[-(_TIMES - 1) * p :]
        for p in range(_LEAST_PHRASE, longest + 1)
    )


def _mean(sums: FloatArray, counts: FloatArray, bootstrap: int, seed: int) -> Interval:
    """Mean over the continuations that count, 0 without any, by resampling prompts."""
    columns = np.stack([sums.sum(axis=1), counts.sum(axis=1)], axis=1)
    columns = columns[columns[:, 1] > 0]
    if not len(columns):
        return Interval(value=0.0)
    total, drawn = columns.sum(axis=0), resampled_sums(columns, bootstrap, seed)
    return interval(float(total[0] / total[1]), drawn[:, 0] / drawn[:, 1], len(columns))


def _distinct(words: list[list[list[str]]], n: int) -> Interval:
    """Distinct n-grams over all n-grams, with the jackknife's interval over prompts.

        se^2 = (P - 1) / P  sum_p (d_p - mean d)^2,    d_p without the n-grams of prompt p

    The jackknife's variance is too large rather than too small, in expectation, for every function
    of independent prompts (Efron and Stein, *The jackknife estimate of variance*, 1981).
    """
    value, without = _without_each(words, n)
    low, high = _jackknife(value, without)
    return Interval(
        value=value,
        low=None if low is None else max(low, 0.0),
        high=None if high is None else min(high, 1.0),
    )


def _without_each(words: list[list[list[str]]], n: int) -> tuple[float, FloatArray]:
    """Distinct n-grams over all n-grams; the same without each prompt, empty where one has all."""
    by_prompt = [[gram for text in row for gram in _grams(text, n)] for row in words]
    types = [set(grams) for grams in by_prompt]
    prompts_of = Counter(gram for own in types for gram in own)
    total = sum(map(len, by_prompt))
    value = len(prompts_of) / total if total else 0.0
    rest = total - np.array([len(grams) for grams in by_prompt])
    if len(words) < 2 or not rest.all():
        return value, np.empty(0)
    only = np.array([sum(prompts_of[gram] == 1 for gram in own) for own in types])
    return value, (len(prompts_of) - only) / rest


def _jackknife(value: float, without: FloatArray) -> tuple[float | None, float | None]:
    """The ends of the interval; None where prompts do not tell how much others differ."""
    half = Z * float(np.sqrt(without.var() * (len(without) - 1))) if len(without) else 0.0
    return (value - half, value + half) if half else (None, None)


def _repeats(words: list[list[list[str]]]) -> tuple[FloatArray, FloatArray]:
    """Share of each continuation's word pairs that it said before, and whether it has any pair."""
    pairs = [[_grams(text, 2) for text in row] for row in words]
    repeats = np.array([[1 - len(set(p)) / len(p) if p else 0 for p in row] for row in pairs])
    return repeats, np.array([[bool(p) for p in row] for row in pairs], np.float64)
