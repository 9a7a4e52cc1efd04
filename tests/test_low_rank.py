"""Precisions of low rank beside a diagonal: equal to the same matrices in full."""

import numpy as np
import pytest

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.methods import METHODS
from mergekit_bayes.methods.low_rank import LowRankSum, Term
from mergekit_bayes.methods.matrices import bounded_below, diagonal_of, divided, magnitude, norm
from tests.facts import facts_of

OUTPUTS, N, RANK = 5, 12, 3
BY_PRECISION = sorted(n for n, m in METHODS.items() if m.matrix is not None and m.needs_precision)


def low_rank(seed, rank=RANK, small=0.5):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(rank, N))
    return LowRankSum(rng.uniform(0.1, 1, N) * small, (Term(factor, 1.0),))


def problem(tasks=3):
    rng = np.random.default_rng(9)
    base = Gaussian(rng.normal(size=(OUTPUTS, N)), low_rank(0))
    return base, [
        Gaussian(rng.normal(size=(OUTPUTS, N)), base.precision + low_rank(t + 1))
        for t in range(tasks)
    ]


def in_full(gaussian):
    return Gaussian(gaussian.mean, gaussian.precision.dense())


def same(one, other, rtol=1e-9):
    np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-10)


def test_the_arithmetic_is_that_of_the_matrices():
    one, other = low_rank(1), low_rank(2)
    found = 0.5 * one - 2.0 * other + one
    dense = 1.5 * one.dense() - 2 * other.dense()
    weight = np.random.default_rng(3).normal(size=(OUTPUTS, N))
    same(found.dense(), dense)
    same(weight @ found, weight @ dense)
    same(norm(found), np.linalg.norm(dense))
    same(found.entries(), np.diag(dense))
    same(diagonal_of(found).dense(), np.diag(np.diag(dense)))
    assert len(found.terms) == 2
    assert len((found - 1.5 * one).terms) == 1  # it cancels, and is no term of size zero


@pytest.mark.parametrize("rank", [0, 1, RANK, N, 2 * N])
@pytest.mark.parametrize("small", [1.0, 1e-6])
def test_a_quotient_is_the_solution(rank, small):
    precision = low_rank(4, rank, small)
    weighted = np.random.default_rng(5).normal(size=(OUTPUTS, N))
    expected = np.linalg.solve(precision.dense(), weighted.T).T
    found = divided(weighted, precision)
    np.testing.assert_allclose(found, expected, atol=1e-9 * abs(expected).max())


def test_a_quotient_by_a_difference_is_the_solution_and_by_nothing_is_an_error():
    removed = 0.5 * low_rank(1) + low_rank(2) - 0.3 * low_rank(1)
    weighted = np.random.default_rng(5).normal(size=(OUTPUTS, N))
    same(divided(weighted, removed), np.linalg.solve(removed.dense(), weighted.T).T)
    with pytest.raises(np.linalg.LinAlgError):
        divided(weighted, 0.0 * low_rank(1))


def test_a_factor_holds_all_terms_in_the_rows_that_it_has():
    one, other = low_rank(1), low_rank(2)
    both = 2.0 * one + other
    factor = both.factor(8)
    assert factor.shape == (8, N)
    same(factor.T @ factor + np.diag(both.diagonal), both.dense())
    # Of what cancels up to rounding nothing is left.
    rounded = LowRankSum(
        other.diagonal, (Term(np.float64(np.float32(other.terms[0].factor)), 1.0),)
    )
    left = both + rounded - other
    factor = left.factor(2 * RANK)
    np.testing.assert_allclose(
        factor.T @ factor,
        2 * one.factor(3).T @ one.factor(3) + other.factor(3).T @ other.factor(3),
        atol=1e-5,
    )
    with pytest.raises(ArithmeticError, match="smaller in some direction"):
        (one - other).factor(2 * RANK)


def test_what_is_negative_is_told_and_not_bounded():
    one, other = low_rank(1), low_rank(2)
    assert magnitude(one) is one
    both = one + other
    assert bounded_below(both, both, 0.2) is both
    for negative in (one - other, (-1.0) * one, LowRankSum(np.full(N, -1.0))):
        with pytest.raises(ArithmeticError, match="smaller in some direction"):
            magnitude(negative)
    with pytest.raises(ArithmeticError, match="smaller in some direction"):
        bounded_below(0.1 * one, one, 0.2)


def test_rounding_is_measured_by_what_was_added_up():
    large, little = 1e5 * low_rank(1), low_rank(2)
    both = LowRankSum(
        np.float64(np.float32((large + little).diagonal)),
        (Term(np.float64(np.float32((large + little).factor(2 * RANK))), 1.0),),
    )
    first = both - large
    for gain in (first, 100 * first, first + 1e-3 * little, 0.01 * both - 0.01 * large):
        assert magnitude(gain) is gain
        of_terms = LowRankSum(np.zeros(N), gain.terms).dense()
        assert np.linalg.eigvalsh(of_terms).min() < -1e-6 * norm(gain)
        bound = gain + 2 * gain
        assert bounded_below(bound, bound, 0.2) is bound
        factor = gain.factor(4 * RANK)
        np.testing.assert_allclose(factor.T @ factor, of_terms, atol=1e-6 * gain.size)
        assert diagonal_of(gain).size == gain.size
    less, diagonal = first - 2 * little, diagonal_of(large)
    for negative in (less, 1e-3 * less, diagonal - 1.1 * diagonal):
        with pytest.raises(ArithmeticError, match="smaller in some direction"):
            magnitude(negative)


@pytest.mark.parametrize("name", BY_PRECISION)
@pytest.mark.parametrize("scales", [(1.0,), (0.7, 0.4, 2.0)])
def test_a_merge_is_that_of_the_matrices_in_full(name, scales):
    base, tasks = problem(len(scales))
    method = METHODS[name]
    facts = facts_of(method, len(tasks), guard=0.2)
    numbers = tuple(map(np.float64, scales))
    found, expected = (
        method.matrix(base if method.needs_base else None, tuple(tasks), numbers, facts)
        for base, tasks in ((base, tasks), (in_full(base), list(map(in_full, tasks))))
    )
    same(found.mean, expected.mean)
    assert isinstance(found.precision, LowRankSum)
    same(found.precision.dense(), expected.precision)
    if scales == (1.0,):
        same(found.mean, tasks[0].mean)


def test_zero_scales_give_back_the_base():
    base, tasks = problem()
    method = METHODS["gradient_matching"]
    zeros = (np.float64(0.0),) * 3
    merged = method.matrix(base, tuple(tasks), zeros, facts_of(method, 3, guard=0.2))
    np.testing.assert_array_equal(merged.mean, base.mean)
    assert merged.precision.terms == base.precision.terms
