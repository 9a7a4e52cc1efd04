"""Exact numbers of quadratic problems: merging is joint training, removal is retraining."""

import numpy as np
import pytest

from mergekit_bayes.gaussian import DELTA_0, Gaussian, from_natural, rebase, to_natural
from mergekit_bayes.methods import METHODS
from mergekit_bayes.methods.gradient_matching import Removal
from tests.reference import merging

ugm = METHODS["gradient_matching"].combine
ta = METHODS["task_arithmetic"].combine
IDLE = Removal(1e-9)  # a guard that never acts


def fine_tune(base, k, c):
    """Exact posterior after data with loss 0.5 k (theta - c)^2, and the base as prior."""
    return Gaussian((base.precision * base.mean + k * c) / (base.precision + k), base.precision + k)


BASE = Gaussian(1.0, 2.0)
ONE, TWO = fine_tune(BASE, 4, 3), fine_tune(BASE, 6, -2)


def test_natural_parameters_round_trip():
    g = Gaussian(np.array([1.5, -2.0]), np.array([0.5, 4.0]))
    np.testing.assert_allclose(from_natural(to_natural(g)), g)


def test_the_merge_of_anchored_fine_tunes_is_the_joint_minimiser():
    assert pytest.approx((7 / 3, -5 / 4)) == (ONE.mean, TWO.mean)
    assert ugm(BASE, (ONE, TWO), (1, 1), IDLE) == pytest.approx((1 / 6, 12))
    assert ugm(BASE, (ONE, TWO), (0.5, 2), IDLE) == pytest.approx((-1, 16))
    assert ta(BASE, (ONE, TWO), (1, 1), IDLE).mean == pytest.approx(0.083333, abs=1e-6)
    assert METHODS["average"].combine(None, (ONE, TWO), (1, 1), IDLE).mean == pytest.approx(
        0.541667, abs=1e-6
    )
    fishers = (Gaussian(ONE.mean, 4.0), Gaussian(TWO.mean, 6.0))
    assert METHODS["precision_average"].combine(None, fishers, (1, 1), IDLE).mean == pytest.approx(
        0.183333, abs=1e-6
    )


@pytest.mark.parametrize(
    ("scale", "matched", "arithmetic"),
    [
        (0.25, 0.4444, 0.7708),
        (0.5, 0.2857, 0.5417),
        (1, 0.1667, 0.0833),
        (2, 0.0909, -0.8333),
        (4, 0.0476, -2.6667),
    ],
)
def test_a_large_scale_is_bounded_where_task_arithmetic_diverges(scale, matched, arithmetic):
    assert ugm(BASE, (ONE, TWO), (scale, scale), IDLE).mean == pytest.approx(matched, abs=5e-5)
    assert ta(BASE, (ONE, TWO), (scale, scale), IDLE).mean == pytest.approx(arithmetic, abs=5e-5)


def test_the_anchor_says_how_each_task_was_trained():
    def merged(means, anchor, decay):
        tasks = tuple(rebase(BASE, m, h, anchor, decay) for m, h in zip(means, (4, 6), strict=True))
        return ugm(BASE, tasks, (1, 1), IDLE).mean

    assert merged((3.0, -2.0), 0.0, 0.0) == pytest.approx(1 / 6)  # trained without a pull
    assert merged((3.0, -2.0), 2.0, 0.0) == pytest.approx(
        0.0, abs=1e-12
    )  # the published form, wrong here
    assert merged((ONE.mean, TWO.mean), 0.0, 0.0) == pytest.approx(
        0.319444, abs=1e-6
    )  # the wrong anchor
    decayed = (4 * 3 / 4.5, 6 * -2 / 6.5)
    assert decayed == pytest.approx((2.666667, -1.846154), abs=1e-6)
    assert merged(decayed, 0.0, 0.5) == pytest.approx(1 / 6)  # pulled to zero


def test_the_published_anchor_leaves_a_task_where_it_is():
    assert rebase(BASE, 2.5, 4.0, BASE.precision, 0.0) == pytest.approx((2.5, 6.0))


def test_full_matrices_agree_with_joint_training_and_the_diagonal_comes_close():
    h0, m0 = [[2, 0.5], [0.5, 1]], np.array([1.0, -1.0])
    hs, cs = ([[3, 1], [1, 2]], [[1, -0.5], [-0.5, 4]]), ((2, 0), (-1, 1))
    tuned = [merging.minimiser((h0, h), (m0, c)) for h, c in zip(hs, cs, strict=True)]
    np.testing.assert_allclose(tuned[0], (1.588235294118, -0.294117647059))
    matched, _ = merging.gradient_matching(h0, m0, list(zip(hs, tuned, strict=True)), (1, 1))
    np.testing.assert_allclose(matched, merging.minimiser((h0, *hs), (m0, *cs)))
    np.testing.assert_allclose(matched, (0.878048780488, 0.731707317073))
    base = Gaussian(m0, np.diag(h0).astype(float))
    tasks = tuple(Gaussian(t, base.precision + np.diag(h)) for t, h in zip(tuned, hs, strict=True))
    np.testing.assert_allclose(
        ugm(base, tasks, (1, 1), IDLE).mean, (0.990196078431, 0.588235294118)
    )
    np.testing.assert_allclose(ta(base, tasks, (1, 1), IDLE).mean, (0.588235294118, 1.505882352941))


def test_removal_is_retraining_without_the_data():
    base = Gaussian(-0.25, 8.0)
    task = fine_tune(base, 3, -4)
    assert task == pytest.approx((-14 / 11, 11))
    assert ugm(base, (task,), (-1,), IDLE) == pytest.approx((2, 5))
    assert ugm(base, (task,), (-0.5,), IDLE) == pytest.approx((0.615384615385, 6.5))
    assert ta(base, (task,), (-1,), IDLE).mean == pytest.approx(0.772727272727)
    unanchored = rebase(base, -4.0, 3.0, 0.0, 0.0)
    assert ugm(base, (unanchored,), (-1,), IDLE).mean == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("ratio", "guarded"), [(0, 1), (0.25, 1.666667), (0.5, 3), (0.9, 5), (1, 5), (4, 5)]
)
def test_the_guard_caps_the_multiplier_of_a_removal(ratio, guarded):
    base, task = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0 + ratio)
    assert -ugm(base, (task,), (-1,), Removal(0.2)).mean == pytest.approx(guarded, abs=1e-6)
    assert -ugm(base, (task,), (-1,), Removal(1.0)).mean == pytest.approx(1.0)


def test_without_a_guard_a_removal_flips_its_sign():
    base, task = Gaussian(0.0, 1.0), Gaussian(1.0, 5.0)
    raw = (base.precision + 4) * 1.0 / (base.precision - 4)
    assert raw == pytest.approx(-1.666667, abs=1e-6)
    assert ugm(base, (task,), (-1,), Removal(0.2)).mean == pytest.approx(-5.0)


def test_chains_equal_one_merge_and_can_be_undone():
    base = Gaussian(np.array([1.0, 0.0]), np.array([2.0, 0.5]))
    data = (((4, 1), (3, -2)), ((6, 0.1), (-1, 5)), ((0.5, 9), (0, 1)))
    tasks = tuple(fine_tune(base, np.array(k, float), np.array(c, float)) for k, c in data)
    at_once = ugm(base, tasks, (1, 0.7, 0.3), IDLE)
    np.testing.assert_allclose(at_once.mean, (0.946859903382, 0.245901639344))
    np.testing.assert_allclose(at_once.precision, (10.35, 4.27))
    two = ugm(base, tasks[:2], (1, 0.7), IDLE)
    chained = ugm(base, (two, tasks[2]), (1, 0.3), IDLE)
    np.testing.assert_allclose(chained.mean, at_once.mean, atol=1e-15)
    undone = ugm(base, (at_once, tasks[1]), (1, -0.7), IDLE)
    np.testing.assert_allclose(undone.mean, (2.276422764228, 0.166666666667))
    np.testing.assert_allclose(undone.precision, (6.15, 4.2))


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_zero_curvature_falls_back_to_task_arithmetic(dtype, rtol):
    tiny = np.asarray([DELTA_0], dtype)
    base, one, two = (Gaussian(np.asarray([m], dtype), tiny) for m in (0.5, 0.7, 0.4))
    merged = ugm(base, (one, two), (1.0, 1.0), Removal(0.2))
    assert merged.mean.dtype == dtype
    np.testing.assert_allclose(merged.mean, 0.6, rtol=rtol)
    assert np.float16(DELTA_0) == 0  # why precisions are never float16


def test_the_posterior_of_one_task_as_prior_of_the_next_is_joint_training():
    start = Gaussian(0.0, 0.5)
    first = fine_tune(start, 4, 3)
    assert first == pytest.approx((2.666666666667, 4.5))
    both = fine_tune(first, 6, -1)
    assert both == pytest.approx((0.571428571429, 10.5))
    parallel = ugm(start, (first, fine_tune(start, 6, -1)), (1, 1), IDLE)
    assert parallel == pytest.approx(both)
