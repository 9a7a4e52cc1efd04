"""Truncation to a rank is nearly as good as LAPACK's and pads with zeros beyond the matrix."""

import numpy as np

from mergekit_bayes.lora.truncate import truncate_dense, truncate_product
from tests.reference import lora as twin


def test_large_matrices_are_cut_nearly_as_well_as_by_lapack():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 600)))[0] for n in (700, 650))
    for decay in (0.3, 1.0):  # nearly flat, and steep
        matrix = ((u * np.arange(1, 601) ** -decay) @ v.T).astype(np.float32)
        found = truncate_dense(matrix, 16, seed=3)
        assert found.error <= 1.002 * twin.lost(matrix, 16)
        exact = np.linalg.norm(matrix - found.factors.b @ found.factors.a) / np.linalg.norm(matrix)
        np.testing.assert_allclose(found.error, exact, rtol=1e-4)
        again = truncate_dense(matrix, 16, seed=3)
        np.testing.assert_array_equal(found.factors.a, again.factors.a)
    low = (u[:, :16] @ v[:, :16].T).astype(np.float32)
    assert truncate_dense(low, 16).error < 1e-5


def test_a_rank_beyond_the_matrix_is_padded_with_zeros():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(4, 2)), rng.normal(size=(2, 3))
    for found in (
        truncate_product(left, right, 7),
        truncate_dense((left @ right).astype(np.float32), 7),
    ):
        assert found.factors.a.shape == (7, 3)
        np.testing.assert_allclose(found.factors.b @ found.factors.a, left @ right, atol=1e-6)
    assert truncate_product(0 * left, right, 1).error == 0.0
