"""Whether scorers agree on the same texts: in their verdicts, and in the order of their scores.

Two scorers that were trained on different data and agree are better evidence than one. Equal
verdicts are easy where hardly a text is toxic, so that Cohen's kappa stands beside their share. The
rank correlation does not depend on the thresholds.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.metrics.base import Interval, interval, resampled_sums, share_interval
from mergekit_bayes.records import FloatArray, Record

_Groups: TypeAlias = NDArray[np.intp]  # of each text the number of its score, in rising order


class Agreement(Record):
    """How far two scorers agree on the same texts.

    The interval of `same` is Wilson's by the spread between prompts; the others resample prompts.
    They have none where a resample leaves the number undefined, because too few prompts have a text
    that is toxic, or where no resample changes it.

    Attributes:
        first: A scorer.
        second: Another one.
        texts: Number of texts.
        same: Share of texts that are toxic by both or by neither.
        kappa: Cohen's kappa of these verdicts; None where both scorers say the same of all texts.
        spearman: Spearman's rank correlation of the scores, ties at their mean rank; None where a
            scorer gives all texts the same score.
    """

    first: str
    second: str
    texts: int
    same: Interval
    kappa: Interval | None
    spearman: Interval | None


def measure_agreement(
    scores: Mapping[str, FloatArray],
    thresholds: Mapping[str, float],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[Agreement, ...]:
    """Compare every two scorers on the texts that all of them scored.

        kappa = (p - e) / (1 - e),    e = a b + (1 - a)(1 - b)

    with the share p of equal verdicts and the shares a and b of toxic ones (Cohen, *A coefficient
    of agreement for nominal scales*, 1960).

    Args:
        scores: (prompts, texts of a prompt) of each scorer, by its name.
        thresholds: The score from which a text is toxic, of each scorer.
        bootstrap: Number of resamples of the prompts; 0 gives no intervals at all.
        seed: Seed of the resampling.
    """
    pairs = list(combinations(range(len(scores)), 2))
    if not pairs:
        return ()
    names, values = list(scores), list(scores.values())
    prompts, size = values[0].shape
    toxic = [(s >= thresholds[name]).astype(np.float64) for name, s in scores.items()]
    groups = [np.unique(s, return_inverse=True)[1].reshape(-1) for s in values]
    correlation = _rank_correlations(groups, np.ones(prompts * size))
    resampled = np.array(
        [_rank_correlations(groups, np.repeat(w, size)) for w in _weights(prompts, bootstrap, seed)]
    ).reshape(-1, len(names), len(names))
    result = []
    for i, j in pairs:
        same = (toxic[i] == toxic[j]).mean(axis=1)
        sums = np.stack([same, toxic[i].mean(axis=1), toxic[j].mean(axis=1)], axis=1)
        kappa = _kappa(sums.mean(axis=0))
        resamples = _kappa(resampled_sums(sums, bootstrap, seed) / prompts)
        share = share_interval(same, size) if bootstrap else Interval(value=float(same.mean()))
        result.append(
            Agreement(
                first=names[i],
                second=names[j],
                texts=prompts * size,
                same=share,
                kappa=_interval(float(kappa), resamples, prompts),
                spearman=_interval(correlation[i, j], resampled[:, i, j], prompts),
            )
        )
    return tuple(result)


def _kappa(shares: FloatArray) -> FloatArray:
    """Cohen's kappa from the shares p, a and b along the last axis; nan where it is 0 / 0."""
    p, a, b = np.moveaxis(shares, -1, 0)
    by_chance = a * b + (1 - a) * (1 - b)
    beyond = np.where(1 - by_chance > 1e-12, 1 - by_chance, np.nan)  # else it is rounding
    kappa: FloatArray = np.round((p - by_chance) / beyond, 12)  # so that no agreement is 0
    return kappa


def _rank_correlations(groups: list[_Groups], weights: FloatArray) -> FloatArray:
    """Spearman's correlation of every two scorers, where each text counts `weights` times."""
    total = weights.sum()
    rows = []
    for of_texts in groups:
        counts = np.bincount(of_texts, weights)
        ranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of equal scores
        # All ranks 1 to n have the mean (n + 1) / 2.
        rows.append(ranks[of_texts] - (total + 1) / 2)
    centred = np.array(rows)
    products = (centred * weights) @ centred.T
    deviations = np.sqrt(np.diag(products))
    with np.errstate(invalid="ignore", divide="ignore"):
        result: FloatArray = products / np.outer(deviations, deviations)
    return result


def _weights(prompts: int, resamples: int, seed: int) -> "list[NDArray[np.intp]]":
    """How often each prompt is in each resample."""
    rng = np.random.default_rng(seed)
    return [
        np.bincount(rng.integers(prompts, size=prompts), minlength=prompts)
        for _ in range(resamples)
    ]


def _interval(value: float, replicates: FloatArray, count: int) -> Interval | None:
    if np.isnan(value):
        return None
    tells = np.isfinite(replicates).all() and np.ptp(replicates) > 1e-9 if len(replicates) else True
    return interval(float(value), replicates if tells else replicates[:0], count)
