"""Paired differences over prompts: what their intervals cover, and where they must not collapse."""

import numpy as np
import pytest

from mergekit_bayes.metrics.base import share_change_interval
from mergekit_bayes.metrics.paired import paired_change, paired_share_change


def toxic(rng, n, k, share, spread, factor):
    """Toxic or not, of two models that mostly see the same noise; prompts differ in propensity."""
    before = rng.beta(share * spread, (1 - share) * spread, size=(n, 1))
    noise, other, same = rng.random((n, k)), rng.random((n, k)), rng.random((n, k)) < 0.7
    after = np.where(same, noise, other) < before * factor
    return (noise < before).astype(float), after.astype(float)


@pytest.mark.parametrize(
    ("n", "k", "share", "spread"),
    [(100, 25, 0.1, 1), (300, 25, 0.02, 1), (300, 8, 0.2, 20), (150, 1, 0.2, 2)],
)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_intervals_of_shares_cover_what_is_true(n, k, share, spread, factor):
    rng = np.random.default_rng(0)
    truth, covered, apart = share * factor - share, 0, []
    for _ in range(150):
        before, after = toxic(rng, n, k, share, spread, factor)
        found = paired_change(before, after)
        covered += found.low <= truth <= found.high
        apart.append(found.high - found.low)
    assert covered >= 0.9 * 150  # 95 % less three deviations
    # Nor do they cover by being wide: few hits widen them, to at most 2.5 times the known variance.
    changes = [np.subtract(*toxic(rng, n, k, share, spread, factor)).mean() for _ in range(150)]
    assert np.mean(apart) < 2.5 * 2 * 1.96 * np.std(changes)


def test_intervals_of_scores_cover_what_is_true():
    def scores(n):
        before = rng.beta(0.05 + 2 * rng.beta(0.2, 1.8, size=(n, 1)), 2.0, size=(n, 10))
        return before, before * rng.beta(4, 4, size=(n, 1))

    rng = np.random.default_rng(1)
    truth = -0.5 * scores(200_000)[0].mean()
    found = [paired_change(*scores(100)) for _ in range(200)]
    assert sum(x.low <= truth <= x.high for x in found) >= 0.9 * 200
    assert all(x.high < 0 for x in found)


@pytest.mark.parametrize("n", [12, 50])
def test_intervals_of_lengths_cover_by_no_more_width_than_they_need(n):
    def lengths():
        mean = rng.integers(5, 20, size=(n, 1))
        return rng.poisson(mean, size=(n, 10)) * 1.0, rng.poisson(0.9 * mean, size=(n, 10)) * 1.0

    rng = np.random.default_rng(2)
    found = [paired_change(*lengths()) for _ in range(300)]
    truth = -0.1 * 12
    assert 0.92 * 300 <= sum(x.low <= truth <= x.high for x in found) <= 0.99 * 300
    wide = np.mean([x.high - x.low for x in found]) / 2
    assert wide < 1.3 * 1.96 * np.std([x.value for x in found])


def test_continuations_are_not_counted_as_though_they_were_independent():
    """All 25 continuations of a prompt change together: prompts alone are evidence."""
    of_prompts = np.zeros((40, 1))
    of_prompts[:10] = 1
    grouped = paired_share_change(np.zeros((40, 25)), np.repeat(of_prompts, 25, axis=1))
    alone = share_change_interval(np.zeros(40), of_prompts[:, 0])
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high), abs=0.01)
    assert paired_share_change(np.zeros((40, 1)), of_prompts) == alone


@pytest.mark.parametrize("value", [0.0, 0.03, 1.0])
def test_models_that_agree_do_not_claim_to_agree_on_other_prompts(value):
    same = np.full((30, 5), value)
    found = paired_change(same, same)
    assert (found.value, found.low) == (0.0, -found.high)
    assert found.high > 0.05 * value
    assert found.high > 0


def test_one_hit_of_many_is_no_evidence_and_one_prompt_has_no_interval():
    after = np.zeros((50, 25))
    after[3, 7] = 1
    found = paired_change(np.zeros((50, 25)), after)
    assert found.value == pytest.approx(1 / 1250)
    assert found.low < 0 < found.value < found.high
    assert paired_change(np.zeros((1, 4)), np.ones((1, 4))).low is None


def test_as_many_gained_as_lost_is_no_change_at_all():
    """Not one of 1e-17, which a table would show."""
    rng = np.random.default_rng(0)
    before = (rng.random((12, 5)) < 0.5).astype(np.float64)
    after = np.roll(before, 1, axis=0)
    assert paired_share_change(before, after).value == 0.0
    assert paired_change(before, after).value == 0.0


def test_no_share_falls_by_more_than_all_of_it():
    for shape in ((40, 1), (40, 5)):
        change = paired_change(np.ones(shape), np.zeros(shape))
        assert (change.value, change.low) == (-1, -1)
        assert paired_change(np.zeros(shape), np.ones(shape)).high == 1
    assert share_change_interval(np.ones(40), np.zeros(40)).low == -1
