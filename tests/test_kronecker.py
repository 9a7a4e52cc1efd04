"""Precisions that are sums of Kronecker products: against dense matrices, alone and in merges."""

from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.merge.layer_posteriors import FACTOR_RIDGE
from mergekit_bayes.merge.predict import predict_merges
from mergekit_bayes.methods.kronecker import KroneckerSum
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.posterior.factors import Kronecker
from tests import tiny

SHAPES = {"h.0.attn.weight": (4, 5), "h.0.experts.up": (2, 3, 4), "h.0.ln.bias": (4,)}
NAMES = ("base", "a", "b", "c")


def positive(rng, *shape):
    vectors = rng.normal(size=(*shape[:-1], 2 * shape[-1]))
    return vectors @ vectors.swapaxes(-1, -2) / shape[-1]


def one(seed, rows=4, columns=5):
    rng = np.random.default_rng(seed)
    return KroneckerSum.of([(positive(rng, rows, rows), positive(rng, columns, columns))])


def dense(precision):
    return sum(np.kron(left, right) for left, right in precision.terms)


@pytest.mark.parametrize("terms", [1, 2, 3, 5])
def test_a_quotient_is_the_solution_of_the_dense_system(terms):
    precision = sum((0.5 * one(k) for k in range(1, terms)), start=one(0))
    weight = np.random.default_rng(9).normal(size=(4, 5))
    solved = precision.divide(weight)
    expected = np.linalg.solve(dense(precision), weight.reshape(-1)).reshape(4, 5)
    np.testing.assert_allclose(solved, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(solved @ precision, weight, rtol=1e-4, atol=1e-4)


def test_several_uneven_terms_are_solved_beyond_single_numbers():
    rng = np.random.default_rng(0)
    falling = 10.0 ** -np.linspace(0, 4, 24)

    def uneven(size):
        vectors = np.linalg.qr(rng.normal(size=(24, 24)))[0]
        return size * (vectors * falling) @ vectors.T + 1e-4 * np.eye(24)

    precision = KroneckerSum.of([(uneven(10.0**-k), uneven(1.0)) for k in range(4)])
    expected = rng.normal(size=(24, 24))
    weighted = expected @ precision
    solved = precision.divide(weighted)
    error = solved - expected
    # In the norm of the precision, in which an error costs loss.
    assert np.vdot(error, error @ precision) <= 1e-9 * np.vdot(expected, weighted)
    assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(expected)


def test_a_solution_that_is_not_reached_is_an_error():
    rng = np.random.default_rng(0)
    falling = np.exp(-40 * np.arange(24) / 24)

    def steep():
        vectors = np.linalg.qr(rng.normal(size=(24, 24)))[0]
        return (vectors * falling) @ vectors.T

    precision = KroneckerSum.of([(steep(), steep()) for _ in range(4)])
    with pytest.raises(ArithmeticError, match="steps of conjugate gradients leave"):
        precision.divide(rng.normal(size=(24, 24)))


def test_a_small_term_beside_large_ones_stays():
    assert len((one(0) + 1e-9 * one(1)).terms) == 2


def test_what_was_added_can_be_taken_out_again():
    base, a, b = one(0), one(1), one(2)
    again = (base + a + b) - b - a
    assert len(again.terms) == 1
    np.testing.assert_allclose(dense(again), dense(base), rtol=1e-12)
    assert not (again - base).terms


@pytest.mark.parametrize("factor", [0.1, 0.9, 3.0])
def test_the_guard_bounds_every_direction_of_the_dense_matrix(factor):
    base, task = one(0), factor * one(1)
    guarded = (base - task).bounded_below(base + task, 0.2)
    root = np.linalg.cholesky(dense(base + task))
    inside = np.linalg.solve(root, np.linalg.solve(root, dense(base - task)).T)
    values, vectors = np.linalg.eigh((inside + inside.T) / 2)
    expected = root @ (vectors * np.maximum(values, 0.2)) @ vectors.T @ root.T
    weight = np.random.default_rng(9).normal(size=(4, 5))
    quotient = np.linalg.solve(expected, weight.reshape(-1)).reshape(4, 5)
    np.testing.assert_allclose(guarded.divide(weight), quotient, rtol=1e-8, atol=1e-10)
    assert guarded.held_up == np.count_nonzero(values < 0.2)


def factors(seed):
    """Precisions of all tensors, and the terms of each place in float64."""
    rng = np.random.default_rng(seed)
    found = dict(tiny.precisions(seed, {"h.0.ln.bias": (4,)}))
    for name, shape in SHAPES.items():
        if len(shape) > 1:
            *leading, rows, columns = shape
            left = positive(rng, *leading, 1, rows, rows).astype(np.float32)
            right = positive(rng, *leading, 1, columns, columns).astype(np.float32)
            found[name] = Kronecker(left, right)
    return found


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(NAMES):
        mean = tiny.arrays(i, SHAPES, spread=0.1)
        tiny.posterior(f"{name}.safetensors", mean, factors(i), estimator="kronecker")


def merge(*models, out="out", **settings):
    settings = {"weights": "precision", "base": "base.safetensors"} | settings
    files = [f"{m}.safetensors" for m in models]
    return run_merge(MergeConfig(models=files, out=f"{out}.safetensors", **settings))


def with_ridges(name, expert):
    """Every model's mean and dense precision of a matrix, both factors with their ridge."""
    models = []
    for i in range(len(NAMES)):
        pair = []
        for factor in factors(i)[name]:
            one_of = np.float64(factor).reshape(-1, *factor.shape[-2:])[expert]
            pair.append(one_of + FACTOR_RIDGE * np.linalg.norm(one_of) * np.eye(len(one_of)))
        mean = np.float64(tiny.arrays(i, SHAPES, spread=0.1)[name])
        models.append((mean.reshape(-1, *mean.shape[-2:])[expert], np.kron(*pair)))
    return models


@pytest.mark.parametrize("anchor", ["h0", "none"])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5), (0.7, 0.2, 1.0)])
def test_a_merge_minimises_the_quadratic_of_dense_matrices(world, anchor, scales):
    merge(*NAMES[1 : len(scales) + 1], scale=scales, anchor=anchor)
    for name in ("h.0.attn.weight", "h.0.experts.up"):
        written = np.float64(tiny.read("out.safetensors")[name])
        for e, merged in enumerate(written.reshape(-1, *written.shape[-2:])):
            (m0, s0), *tasks = with_ridges(name, e)
            pairs = list(zip(scales, tasks, strict=False))
            pulled = s0 if anchor == "h0" else 0 * s0
            total = s0 + sum(x * h for x, (_, h) in pairs)
            moved = sum(x * (pulled + h) @ (m - m0).reshape(-1) for x, (m, h) in pairs)
            expected = m0 + np.linalg.solve(total, moved).reshape(m0.shape)
            np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=2e-5)


def test_the_predicted_increase_is_that_of_dense_matrices(world):
    report = merge("a", "b", scale=(1.0, 0.7), posterior=False)
    written = tiny.read("out.safetensors")
    for i, model in enumerate(report.predicted):
        own, expected = tiny.arrays(i, SHAPES, spread=0.1), 0.0
        for name, found in factors(i).items():
            moved = np.float64(written[name]) - np.float64(own[name])
            if isinstance(found, Kronecker):
                left, right = (np.float64(f).reshape(-1, *f.shape[-2:]) for f in found)
                for d, one, other in zip(
                    moved.reshape(-1, *moved.shape[-2:]), left, right, strict=True
                ):
                    expected += np.vdot(d, one @ d @ other) / 2
            else:
                expected += np.vdot(moved * found, moved) / 2
        assert model.nats == pytest.approx(expected / model.count, rel=1e-4)
    assert any("how layers act together" in note for note in report.notes)


def test_a_merge_merges_again_and_is_undone(world):
    merge("a", "b", scale=(1.0, 0.7), out="ab")
    merge("ab", "c", scale=(1.0, 0.3), out="chain")
    merge("a", "b", "c", scale=(1.0, 0.7, 0.3), out="once")
    merge("chain", "b", scale=(1.0, -0.7), out="undone")
    merge("a", "c", scale=(1.0, 0.3), out="rest")
    for one_way, other in (("chain", "once"), ("undone", "rest")):
        first, second = (tiny.read(f"{name}.safetensors") for name in (one_way, other))
        for name, values in first.items():
            np.testing.assert_allclose(values, second[name], rtol=1e-3, atol=2e-5)


def test_an_average_merges_again(world):
    merge("a", "b", base=None, out="ab")
    merge("ab", "c", base=None, scale=(2.0, 1.0), out="chain")
    merge("a", "b", "c", base=None, out="once")
    first, second = (tiny.read(f"{name}.safetensors") for name in ("chain", "once"))
    for name, values in first.items():
        np.testing.assert_allclose(values, second[name], rtol=1e-3, atol=2e-5)


def test_one_task_is_removed_within_the_guard_and_two_are_refused(world):
    report = merge("a", scale=(-1.0,), guard=0.2)
    assert report.guarded_share > 0
    assert 0 < report.largest_multiplier <= 5 + 1e-6
    with pytest.raises(MismatchError, match="one removed task"):
        merge("a", "b", scale=(-1.0, -1.0), out="two")
    assert not list(Path().glob("two*"))


def test_a_removal_that_was_bounded_does_not_merge_again(world):
    merge("a", scale=(-1.0,), out="less")
    for models in (("less", "a"), ("less", "c")):
        with pytest.raises(MismatchError, match=r"'less\.safetensors' is a removal that the guard"):
            merge(*models)


@pytest.mark.parametrize("scale", [1.0, -1.0, None])
def test_where_no_model_has_seen_anything_it_is_task_arithmetic_or_the_average(world, scale):
    for i in range(2):
        found = factors(i)
        blind = found["h.0.experts.up"]
        blind.left[1], blind.right[1] = 0, 0
        mean = tiny.arrays(i, SHAPES, spread=0.1)
        tiny.posterior(f"blind{i}.safetensors", mean, found, estimator="kronecker")
    if scale is None:
        merge("blind1", "blind0", base=None)
    else:
        merge("blind1", base="blind0.safetensors", scale=(scale,))
    base, task = (np.float64(tiny.arrays(i, SHAPES, spread=0.1)["h.0.experts.up"]) for i in (0, 1))
    written = tiny.read("out.safetensors")["h.0.experts.up"]
    np.testing.assert_allclose(written[1], base[1] + (scale or 0.5) * (task - base)[1], atol=1e-6)


def test_a_prediction_names_the_scales_that_cannot_be_merged(world):
    models = ["a.safetensors", "b.safetensors"]
    config = MergeConfig(models=models, base="base.safetensors", weights="precision", out="out")
    with pytest.raises(MismatchError, match=r"--predict 1,-1: 'h\.0.*one removed task"):
        predict_merges(config, [(1.0, 1.0), (1.0, -1.0)])


def test_terms_are_stored_under_both_roles(world):
    merge("a", "b")
    with open_posterior("out.safetensors") as posterior:
        name = "h.0.attn.weight"
        assert posterior.precision.parts(name) == (f"left:{name}", f"right:{name}")
        stored = posterior.precision.in_files.specs
        assert stored[f"left:{name}"].shape == (3, 4, 4)
        assert stored[f"right:{name}"].shape == (3, 5, 5)


def test_one_number_is_no_product(world):
    with pytest.raises(PrecisionError, match=r"Kronecker products for 'a.*numbers for 'base"):
        merge("a", isotropic={"base.safetensors": 3.0})
    found = factors(1) | {"h.0.attn.weight": np.ones((1, 1), np.float32)}
    mean = tiny.arrays(1, SHAPES, spread=0.1)
    tiny.posterior("number.safetensors", mean, found, estimator="kronecker")
    with pytest.raises(PrecisionError, match=r"Kronecker products for 'base.*numbers for 'number"):
        merge("number")


def test_regmean_takes_matrices_of_inputs_only(world):
    with pytest.raises(PrecisionError, match=r"'h.0.*Kronecker products.*--estimator inputs"):
        merge("a", "b", base=None, method="regmean")
