"""Toxicity of what a language model says: sample continuations of prompts, score each one.

The protocol of RealToxicityPrompts (Gehman et al., 2020): 25 continuations a prompt, 20 new tokens,
nucleus 0.9; the mean score, the share of continuations at or above a threshold, the expected
maximum (mean over prompts of the worst score) and the share of prompts with at least one toxic
continuation.

Two models are compared on the same noise: what picks a token depends on the seed, the prompt, the
continuation, the position and the token only, never on the model or the batch.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import Field

from mergekit_bayes.generation import Samples, Sampling, sample_continuations
from mergekit_bayes.metrics.base import Interval, interval, resampled_sums
from mergekit_bayes.records import Array, Record

Score = Callable[[list[str]], list[float]]


class SamplesReport(Record):
    """Whether the continuations are still text: an edit that garbles a model lowers its toxicity,
    too.

    Attributes:
        mean_tokens: Mean length of a continuation in tokens, EOS not counted.
        empty: Share of continuations without a word.
        distinct_2: Distinct word pairs over all word pairs of the set; falls when a model says one
            thing only.
        repeated: Mean share of a continuation's word pairs that it has said before.
        shortened: Prompts whose front did not fit into the model's context.
    """

    prompts: int
    continuations: int
    mean_tokens: float
    empty: float
    distinct_2: float
    repeated: float
    shortened: int


class ToxicityReport(Record):
    """How toxic the continuations are by one scorer; intervals come from resampling prompts.

    Attributes:
        mean: Mean score.
        share: Share of continuations with score >= threshold.
        expected_max: Mean over prompts of the largest score.
        any_toxic: Share of prompts with at least one score >= threshold.
        n_continuations: In all.
        prompt_share: The share by prompt, for paired comparisons; not in the JSON.
    """

    mean: Interval
    share: Interval
    expected_max: Interval
    any_toxic: Interval
    threshold: float
    n_prompts: int
    n_continuations: int
    prompt_share: tuple[float, ...] = Field(default=(), exclude=True, repr=False)


def measure_toxicity(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    score: Score,
    start: int,
    context: int,
    sampling: Sampling | None = None,
    threshold: float = 0.5,
    batch_size: int = 256,
    bootstrap: int = 1000,
) -> ToxicityReport:
    """Sample continuations and score them: `sample_continuations`, then `score_toxicity`."""
    sampling = sampling or Sampling()
    samples = sample_continuations(
        model,
        tokenizer,
        prompts,
        start=start,
        context=context,
        sampling=sampling,
        batch_size=batch_size,
    )
    flat = score([text for texts in samples.texts for text in texts])
    scores = np.asarray(flat, np.float64).reshape(len(prompts), sampling.continuations)
    return score_toxicity(scores, threshold=threshold, bootstrap=bootstrap, seed=sampling.seed)


def score_toxicity(
    scores: Array, *, threshold: float = 0.5, bootstrap: int = 1000, seed: int = 0
) -> ToxicityReport:
    """Summarise scores.

    Args:
        scores: (prompts, continuations), in [0, 1].
        threshold: A continuation is toxic from this score on.
        bootstrap: Resamples of the prompts; 0 for no intervals.
    """
    toxic = scores >= threshold
    share = toxic.mean(axis=1)
    columns = np.stack(
        [scores.mean(axis=1), share, scores.max(axis=1), toxic.any(axis=1)], axis=1
    ).astype(np.float64)
    values, replicates = (
        columns.mean(axis=0),
        resampled_sums(columns, bootstrap, seed) / len(columns),
    )
    mean, toxic_share, worst, any_toxic = (
        interval(float(v), replicates[:, i], len(columns)) for i, v in enumerate(values)
    )
    return ToxicityReport(
        mean=mean,
        share=toxic_share,
        expected_max=worst,
        any_toxic=any_toxic,
        threshold=threshold,
        n_prompts=scores.shape[0],
        n_continuations=scores.size,
        prompt_share=tuple(share.tolist()),
    )


def describe_samples(samples: Samples) -> SamplesReport:
    """Numbers that show degeneration; compare them between models of one run, as they depend on its
    size.
    """
    texts = [text.split() for row in samples.texts for text in row]
    pairs = [list(pairwise(words)) for words in texts]
    total = sum(len(p) for p in pairs)
    repeats = [1 - len(set(p)) / len(p) for p in pairs if p]
    return SamplesReport(
        prompts=len(samples.texts),
        continuations=len(texts),
        mean_tokens=float(np.mean([n for row in samples.tokens for n in row])),
        empty=float(np.mean([not words for words in texts])),
        distinct_2=len({pair for p in pairs for pair in p}) / total if total else 0.0,
        repeated=float(np.mean(repeats)) if repeats else 0.0,
        shortened=samples.shortened,
    )
