"""Sketches of the inputs' covariance: a diagonal and a factor, beside the sums in full."""

import numpy as np
import pytest
import torch

from mergekit_bayes.curvature import Keeping, sums
from mergekit_bayes.curvature.inputs import input_covariance
from mergekit_bayes.curvature.sketches import add_rows, add_sketch, diagonal_and_factor
from mergekit_bayes.curvature.sums import Sums
from tests.test_inputs import batched, close, model_of, rows_of

N = 60


def rows_with(spectrum, count=700, seed=0):
    """Rows of N numbers whose covariance has about these eigenvalues, and another basis."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(N, N)))[0]
    return torch.tensor(rng.normal(size=(count, N)) * np.sqrt(spectrum) @ basis.T).float()


def sketch_of(rows, rank, at_once=50):
    sketch = torch.zeros(1 + rank, N)
    for some in rows.split(at_once):
        add_rows(sketch, some)
    return sketch


def dense(sketch):
    diagonal, factor = diagonal_and_factor(sketch)
    return (factor.mT.double() @ factor.double() + torch.diag_embed(diagonal.double())).numpy()


@pytest.mark.parametrize("at_once", [7, 50, 700])
def test_rows_of_few_directions_are_kept_in_full(at_once):
    spectrum = np.zeros(N)
    spectrum[:5] = (100, 20, 3, 1, 0.5)
    rows = rows_with(spectrum)
    close(dense(sketch_of(rows, 5, at_once)), (rows.T.double() @ rows.double()).numpy())


@pytest.mark.parametrize("rank", [1, 8, 100])
def test_the_diagonal_is_exact_and_the_factor_never_more_than_the_sum(rank):
    rows = rows_with(1 / np.arange(1, N + 1) ** 2)
    sketch, exact = sketch_of(rows, rank), (rows.T.double() @ rows.double()).numpy()
    diagonal, factor = (part.double().numpy() for part in diagonal_and_factor(sketch))
    close(np.diag(dense(sketch)), np.diag(exact))
    assert (diagonal >= 0).all()
    assert np.linalg.eigvalsh(exact - factor.T @ factor)[0] > -1e-5 * np.linalg.norm(exact)
    if rank >= N:
        close(dense(sketch), exact)


def test_the_largest_directions_are_nearly_those_of_the_sum():
    rows = rows_with(1 / np.arange(1, N + 1) ** 2)
    exact = (rows.T.double() @ rows.double()).numpy()
    values, vectors = np.linalg.eigh(exact)
    best = (vectors[:, -8:] * values[-8:]) @ vectors[:, -8:].T
    best += np.diag(np.diag(exact - best))
    errors = [
        np.linalg.norm(exact - m)
        for m in (dense(sketch_of(rows, 8)), best, np.diag(np.diag(exact)))
    ]
    assert errors[0] < 1.1 * errors[1] < 0.05 * errors[2]


def test_a_sketch_of_other_rows_is_added():
    rows = rows_with(1 / np.arange(1, N + 1) ** 2)
    one, other = sketch_of(rows[:300], 8), sketch_of(rows[300:], 8)
    add_sketch(one, other)
    np.testing.assert_allclose(np.diag(dense(one)), np.diag(dense(sketch_of(rows, 8))), rtol=1e-5)
    apart = np.linalg.norm(dense(one) - dense(sketch_of(rows, 8)))
    assert apart < 0.02 * np.linalg.norm(dense(one))


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mixtral", "Bert classifier"])
def test_wide_layers_have_sketches_and_narrow_ones_their_sums(kind):
    model, rows = model_of(kind), rows_of(kind)
    full = input_covariance(model, batched(rows, 1))
    found = input_covariance(model, batched(rows, 1), keep=Keeping(rank=4))
    assert len(full.parts) == 4
    assert found.matrices == full.matrices
    wide = {n for n, t in full.total.items() if n in full.matrices and t.shape[-1] > 8}
    assert found.sketches == wide
    assert wide
    for name in full.total:
        if name not in wide:
            assert torch.equal(found.total[name], full.total[name])
            continue
        exact = full.total[name].squeeze(-3).double().numpy()
        assert found.total[name].shape == (*exact.shape[:-2], 5, exact.shape[-1])
        kept = dense(found.total[name])
        diagonals = (np.diagonal(m, axis1=-2, axis2=-1) for m in (kept, exact))
        close(*diagonals)
        off = exact * (1 - np.eye(exact.shape[-1]))
        assert np.linalg.norm(kept - exact) < 0.5 * np.linalg.norm(off)
    for one, other in zip(found.parts, full.parts, strict=True):  # the stability is the same
        for name, values in other.rows.items():
            close(one.rows[name], values)


def test_layers_that_see_the_same_rows_have_the_same_sketch_by_one_decomposition(monkeypatch):
    model, rows = model_of("Llama"), rows_of("Llama")
    calls = []
    monkeypatch.setattr(sums, "add_rows", lambda *given: calls.append(0) or add_rows(*given))
    total = input_covariance(model, batched(rows, 2), keep=Keeping(rank=2)).total
    q, k, v = (total[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    seen = 4 * 2 + 1  # what attention, its output, and both parts of an MLP see, and the head
    assert len(calls) == 3 * seen


def test_the_sums_of_several_processes_are_one(monkeypatch):
    rows, parameters = rows_with(1 / np.arange(1, N + 1) ** 2), {"w": torch.zeros(3, N)}
    keep = Keeping(sketches={"w": (9, N)})
    parts = []
    for some in (rows[:300], rows[300:]):
        parts.append(Sums(parameters, keep))
        parts[-1].add_products("w", parts[-1].products("w", some))
    monkeypatch.setattr(
        sums, "gather", lambda own: [part.totals["w"][None].clone() for part in parts]
    )
    expected = parts[0].totals["w"].clone()
    add_sketch(expected, parts[1].totals["w"])
    parts[1].add_over_ranks()
    assert torch.equal(parts[1].totals["w"], expected)
