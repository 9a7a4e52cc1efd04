"""Scorers' agreement: as published, and with intervals of prompts drawn anew."""

import numpy as np
import pytest

from mergekit_bayes.metrics.agreement import measure_agreement
from mergekit_bayes.metrics.base import share_interval

HALF = {"a": 0.5, "b": 0.5}


def two(seed=0, prompts=60, size=5, noise=0.15):
    """Scores of two scorers with ties, and with an effect of the prompt."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(size=(prompts, 1)) * rng.uniform(0.5, 1, size=(prompts, size))
    return {n: np.clip(truth + noise * rng.normal(size=truth.shape), 0, 1).round(2) for n in "ab"}


def kappa_of(a, b):
    table = np.array([[np.sum((a == x) & (b == y)) for y in (0, 1)] for x in (0, 1)]) / a.size
    chance = float(table.sum(0) @ table.sum(1))
    return (np.trace(table) - chance) / (1 - chance)


def spearman_of(a, b):
    def ranks(x):
        x = x.ravel()
        return (x[:, None] > x).sum(axis=1) + ((x[:, None] == x).sum(axis=1) + 1) / 2

    return np.corrcoef(ranks(a), ranks(b))[0, 1]


def test_the_numbers_are_those_of_the_definitions():
    scores = two()
    (found,) = measure_agreement(scores, {"a": 0.5, "b": 0.3}, bootstrap=0)
    a, b = scores["a"].ravel() >= 0.5, scores["b"].ravel() >= 0.3
    assert (found.first, found.second, found.texts) == ("a", "b", 300)
    assert found.same.value == pytest.approx(np.mean(a == b))
    assert found.kappa.value == pytest.approx(kappa_of(a, b))
    assert found.spearman.value == pytest.approx(spearman_of(*scores.values()))
    assert {x.low for x in (found.same, found.kappa, found.spearman)} == {None}


def test_a_resample_of_prompts_is_ranked_anew():
    scores = two(1, prompts=20)
    (found,) = measure_agreement(scores, HALF, bootstrap=99, seed=5)
    rng = np.random.default_rng(5)
    kappas, correlations = [], []
    for _ in range(99):
        rows = rng.integers(20, size=20)
        a, b = (scores[n][rows].ravel() for n in "ab")
        correlations.append(spearman_of(a, b))
        kappas.append(kappa_of(a >= 0.5, b >= 0.5))
    for interval, values in ((found.spearman, correlations), (found.kappa, kappas)):
        ends = np.percentile(values, (2.5, 97.5), method="nearest")
        assert (interval.low, interval.high) == pytest.approx(tuple(ends))
    same = (scores["a"] >= 0.5) == (scores["b"] >= 0.5)
    assert found.same == share_interval(same.mean(axis=1), 5)


def test_texts_of_a_prompt_that_repeat_each_other_tell_no_more_than_one():
    scores = {n: s[:, :1] for n, s in two().items()}
    (alone,) = measure_agreement(scores, HALF)
    (repeated,) = measure_agreement({n: np.repeat(s, 9, axis=1) for n, s in scores.items()}, HALF)
    for name in ("same", "kappa"):
        one, many = getattr(alone, name), getattr(repeated, name)
        assert many.low == pytest.approx(one.low)
        assert many.high == pytest.approx(one.high)


def test_every_two_of_several_scorers_are_compared():
    scores = two() | {"c": two(3)["a"]}
    names = [(x.first, x.second) for x in measure_agreement(scores, HALF | {"c": 0.5})]
    assert names == [("a", "b"), ("a", "c"), ("b", "c")]
    assert measure_agreement({"a": scores["a"]}, {"a": 0.5}) == ()


def test_a_number_that_is_not_defined_is_none_and_an_interval_without_reason_is_left_out():
    civil = np.random.default_rng(0).uniform(0, 0.4, (30, 4))
    (found,) = measure_agreement({"a": civil, "b": civil[::-1] * 0}, HALF)
    assert (found.kappa, found.spearman) == (None, None)
    assert found.same.value == 1
    assert 0.8 < found.same.low < 1  # no disagreement of 30 prompts is no certainty
    # One prompt with toxic texts: a third of all resamples lack it.
    toxic = civil.copy()
    toxic[0] = 0.9
    (found,) = measure_agreement({"a": toxic, "b": np.maximum(toxic, civil[::-1])}, HALF)
    assert found.kappa.low is None
    assert found.spearman.low is not None
    # Scorers that are equal: no resample shows anything else.
    (found,) = measure_agreement({"a": two()["a"], "b": two()["a"]}, HALF)
    assert (found.kappa.value, found.kappa.low) == (pytest.approx(1), None)
    assert (found.spearman.value, found.spearman.low) == (pytest.approx(1), None)


@pytest.mark.slow
def test_intervals_hold_the_truth():
    """In worlds with an effect of the prompt; the truth is that of very many prompts."""
    (truth,) = measure_agreement(two(99, prompts=200_000, size=3), HALF, bootstrap=0)
    held = {"same": 0, "kappa": 0, "spearman": 0}
    for seed in range(300):
        (found,) = measure_agreement(two(seed, prompts=80, size=3), HALF, bootstrap=300, seed=seed)
        for name in held:
            interval = getattr(found, name)
            held[name] += interval.low <= getattr(truth, name).value <= interval.high
    assert all(0.9 <= count / 300 <= 0.99 for count in held.values()), held
