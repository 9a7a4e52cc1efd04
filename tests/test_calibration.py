"""The squared calibration error: unbiased, and intervals that cover the truth of many worlds."""

import re
from pathlib import Path

import numpy as np
import pytest

import mergekit_bayes
from mergekit_bayes.metrics.base import score_interval, share_change_interval, share_interval
from mergekit_bayes.metrics.calibration import (
    squared_calibration_change,
    squared_calibration_error,
)
from tests.reference.calibration import squared_error

FACTORS = {"calibrated": 1.0, "a little bold": 1.1, "bold": 1.5, "very bold": 3.0, "shy": 0.7}


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def world(rng, n, classes=3, sharpness=2.0):
    """Logits, and labels drawn from their softmax: a factor of 1 on the logits is calibrated."""
    z = rng.normal(size=(n, classes)) * sharpness
    labels = (softmax(z).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return z, np.minimum(labels, classes - 1)


def truth(factor, bins=10, classes=3, sharpness=2.0):
    """The squared error of the bins, by the probabilities that the labels are drawn from."""
    z = np.random.default_rng(99).normal(size=(100_000, classes)) * sharpness
    told, true = softmax(factor * z), softmax(z)
    index = np.minimum((told.max(axis=1) * bins).astype(int), bins - 1)
    gap = true[np.arange(len(z)), told.argmax(axis=1)] - told.max(axis=1)
    sums, sizes = np.bincount(index, gap, bins), np.bincount(index, minlength=bins)
    return (sums**2 / np.maximum(sizes, 1)).sum() / len(z)


def covers(interval, value):
    return interval.low <= value <= interval.high


def coverage(n, worlds, classes=3, sharpness=2.0, bins=10, seed=0):
    """Shares of the worlds whose intervals hold the truth, absolute and of changes."""
    options = {"bins": bins, "classes": classes, "sharpness": sharpness}
    truths = {name: truth(factor, **options) for name, factor in FACTORS.items()}
    rng = np.random.default_rng(seed)
    absolute = dict.fromkeys(FACTORS, 0.0)
    changes = dict.fromkeys(FACTORS, 0.0)
    for _ in range(worlds):
        z, labels = world(rng, n, classes, sharpness)
        p = {name: softmax(factor * z) for name, factor in FACTORS.items()}
        for name in FACTORS:
            found = squared_calibration_error(p[name], labels, bins)
            absolute[name] += covers(found, truths[name]) / worlds
            found = squared_calibration_change(p["a little bold"], p[name], labels, bins)
            changes[name] += covers(found, truths[name] - truths["a little bold"]) / worlds
    return absolute, changes


def test_the_estimate_is_its_twin():
    z, labels = world(np.random.default_rng(0), 300)
    p = softmax(1.5 * z)
    expected = squared_error(p.tolist(), labels.tolist(), 10)
    assert squared_calibration_error(p, labels, 10).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", FACTORS)
def test_the_estimate_has_no_bias_that_the_plain_one_has(name):
    """The mean over worlds of 60 examples, where the expected calibration error is far off."""
    rng, found, worlds = np.random.default_rng(1), [], 500
    for _ in range(worlds):
        z, labels = world(rng, 60)
        found.append(squared_calibration_error(softmax(FACTORS[name] * z), labels, 10).value)
    # A bin of one example shows no squared error: a tenth of a bin's share of 60.
    error = 4 * np.std(found) / worlds**0.5
    assert np.mean(found) == pytest.approx(truth(FACTORS[name]), abs=error + 1e-3)


def test_intervals_hold_the_truth_of_calibrated_bold_and_shy_worlds():
    """Of 120 worlds, 95 % are 114, and fewer than 105 come once in 5,000 times."""
    for n in (40, 400):
        for shares in coverage(n, worlds=120):
            assert min(shares.values()) > 0.87, (n, shares)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "sharpness"), [(2, 1.0), (3, 2.0), (10, 2.5), (3, 6.0)])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_intervals_hold_the_truth_at_every_size(classes, sharpness, bins):
    for n in (30, 100, 500, 3000):
        absolute, changes = coverage(n, 400, classes, sharpness, bins)
        # Three deviations of 400 worlds below 0.92, where the worst of them lie.
        assert min(absolute.values()) > 0.88, (n, absolute)
        assert min(changes.values()) > 0.88, (n, changes)


def test_a_calibrated_model_is_called_calibrated_and_a_bold_one_is_not():
    z, labels = world(np.random.default_rng(4), 3000)
    calm, bold = (squared_calibration_error(softmax(f * z), labels, 10) for f in (1.0, 3.0))
    assert calm.low < 0 < calm.high < 0.002
    assert bold.low > 0.005
    change = squared_calibration_change(softmax(z), softmax(3 * z), labels, 10)
    assert change.low > 0.005
    assert change.value == pytest.approx(bold.value - calm.value, abs=1e-12)


def test_bins_without_an_error_do_not_claim_to_be_wrong():
    """200 right predictions at 99.5 %: one error was to be expected, and none came."""
    p = np.tile([0.995, 0.005], (200, 1))
    found = squared_calibration_error(p, np.zeros(200, np.int64), 10)
    assert found.low < 0 < found.high
    # A true rate of errors of 1.5 % would show none in one of twenty such samples.
    assert found.high > 0.01**2


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 2.0])
@pytest.mark.parametrize("n", [2, 24, 200])
def test_an_interval_holds_its_own_value(n, sharpness):
    """The estimate of a calibrated model is below zero about every other time."""
    rng, below = np.random.default_rng(11), 0
    for _ in range(100):
        z, labels = world(rng, n, 2, sharpness)
        for factor in FACTORS.values():
            found = squared_calibration_error(softmax(factor * z), labels, 10)
            assert covers(found, found.value), found
            below += found.value < 0
        change = squared_calibration_change(softmax(z), softmax(2 * z), labels, 10)
        assert covers(change, change.value), change
    assert below > 20


def test_the_same_prediction_twice_has_no_change():
    z, labels = world(np.random.default_rng(5), 200)
    change = squared_calibration_change(softmax(z), softmax(z), labels, 10)
    assert (change.value, change.low, change.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_many_bins_and_few_examples_are_no_trouble():
    z, labels = world(np.random.default_rng(6), 50)
    found = squared_calibration_change(softmax(z), softmax(2 * z), labels, 1_000_000)
    assert found.low <= found.value <= found.high
    assert squared_calibration_error(softmax(z[:1]), labels[:1], 10).low is None


# Shares.


def clustered(rng, worlds, prompts, size, share, agreement):
    """Mean of each prompt's continuations, whose toxicity correlates by `agreement`."""
    if agreement == 1:
        return rng.binomial(1, share, (worlds, prompts)).astype(float)
    p = share
    if agreement:
        odds = 1 / agreement - 1
        p = rng.beta(share * odds, (1 - share) * odds, (worlds, prompts))
    return rng.binomial(size, p, (worlds, prompts)) / size


@pytest.mark.parametrize("hits", [0, 1, 79, 80])
def test_a_share_of_independent_observations_has_wilsons_interval(hits):
    """Its ends are the shares p with |found - p| = 1.96 sqrt(p (1 - p) / n)."""
    values = np.repeat([1.0, 0.0], [hits, 80 - hits])
    found = share_interval(values)
    for end in (found.low, found.high):
        away = 1.96 * (end * (1 - end) / 80) ** 0.5
        assert abs(found.value - end) == pytest.approx(away, abs=1e-4)
    assert found.high - found.low > 0.04  # 0 of 80 is at most 4.6 %
    assert found.low <= found.value <= found.high


def test_no_hit_in_many_continuations_counts_their_prompts_only():
    """25 continuations of 80 prompts that are all civil do not show that those of others are."""
    assert share_interval(np.zeros(80), 25) == share_interval(np.zeros(80))
    ones = share_interval(np.ones(80), 25)
    assert (ones.value, ones.high) == (1, 1)
    assert ones.low == pytest.approx(1 - share_interval(np.zeros(80)).high)


@pytest.mark.parametrize("share", [0.002, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("agreement", [0, 0.3, 1])
def test_intervals_of_shares_hold_the_truth(share, agreement):
    """Wilson's own interval falls to 0.92 at some shares of some sizes, since counts are whole."""
    rng = np.random.default_rng(7)
    for prompts, size in ((40, 25), (200, 5), (200, 1)):
        if size == 1 and agreement != 1:
            continue
        values = clustered(rng, 300, prompts, size, share, agreement)
        held = [covers(share_interval(row, size), share) for row in values]
        assert np.mean(held) > 0.89, (prompts, size)  # three deviations of 300 worlds below 0.93


def test_intervals_of_mean_and_largest_scores_hold_the_truth():
    rng = np.random.default_rng(8)
    for a, b in ((0.05, 2.0), (0.5, 5.0), (2.0, 2.0)):
        scores = rng.beta(a, b, (300, 60, 5))
        held = [covers(score_interval(w), a / (a + b)) for w in scores]
        assert np.mean(held) > 0.9
        largest = rng.beta(a, b, (100_000, 5)).max(axis=1).mean()
        held = [covers(score_interval(w.max(axis=1, keepdims=True)), largest) for w in scores]
        assert np.mean(held) > 0.9


def scores_of(rng, kind, prompts, size):
    """Scores of continuations, and their mean over all prompts."""
    if kind == "rare":  # a tenth of the prompts is toxic, by a scorer that is never sure
        near = np.where(rng.random((prompts, 1)) < 0.1, 0.9, 0.02)
        return near * rng.uniform(0.8, 1.1, (prompts, size)), 0.95 * (0.1 * 0.9 + 0.9 * 0.02)
    a, b = {"faint": (2.0, 98.0), "skew": (0.25, 4.75), "even": (5.0, 5.0), "high": (98.0, 2.0)}[
        kind
    ]
    return rng.beta(a, b, (prompts, size)), a / (a + b)


@pytest.mark.parametrize("kind", ["faint", "skew", "even", "high", "rare"])
@pytest.mark.parametrize("size", [1, 25])
def test_intervals_of_scores_hold_the_truth_and_are_as_narrow_as_that_allows(kind, size):
    """80 prompts. Scores that are no shares are not feared to be 0 or 1 on the next prompt."""
    rng, worlds = np.random.default_rng(12), 300
    held, widths, means = 0, [], []
    for _ in range(worlds):
        scores, truth = scores_of(rng, kind, 80, size)
        found = score_interval(scores)
        held += covers(found, truth)
        widths.append(found.high - found.low)
        means.append(found.value)
    assert 0.9 < held / worlds < 0.99
    assert np.mean(widths) < 1.25 * 2 * 1.96 * np.std(means)


def test_scores_of_zero_and_one_are_a_share_and_equal_scores_tell_no_spread():
    hits = np.random.default_rng(13).binomial(1, 0.1, (80, 25)).astype(float)
    assert score_interval(hits) == share_interval(hits.mean(axis=1), 25)
    one = np.zeros((80, 25))
    one[3, 4] = 1  # whose prompt's mean of 1/25 is not the most that a prompt can have
    assert score_interval(one) == share_interval(one.mean(axis=1), 25)
    equal = score_interval(np.full((80, 25), 0.03))
    assert equal.low < 0.027 < 0.033 < equal.high


def test_the_normal_quantile_is_written_once():
    package = Path(mergekit_bayes.__file__).parent
    written = [
        f"{path.name}: {line}"
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\b1\.959", line)
    ]
    assert len(written) == 1, written


def test_a_share_is_not_much_less_certain_than_resampling_says():
    values = clustered(np.random.default_rng(9), 1, 400, 25, 0.2, 0.2)[0]
    found = share_interval(values, 25)
    plain = 2 * 1.96 * values.std() / 20
    assert found.high - found.low == pytest.approx(plain, rel=0.08)


def test_a_change_of_accuracy_without_one_pair_that_differs_is_no_certainty():
    same = np.repeat([0.0, 1.0], 40)
    found = share_change_interval(same, same)
    assert found.value == 0
    assert found.low == -found.high < -0.02
    rng, held = np.random.default_rng(10), []
    for _ in range(400):
        state = rng.choice(4, size=100, p=[0.6, 0.3, 0.07, 0.03])  # change: +0.07 - 0.03
        before, after = np.isin(state, (1, 3)), np.isin(state, (1, 2))
        held.append(covers(share_change_interval(before * 1.0, after * 1.0), 0.04))
    assert np.mean(held) > 0.92
