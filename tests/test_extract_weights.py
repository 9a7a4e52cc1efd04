"""The weighted low-rank approximations of an extraction, beside float64 twins."""

import numpy as np
import pytest

from mergekit_bayes.errors import CheckpointError, PrecisionError
from mergekit_bayes.extract.approximate import Limits, approximate
from mergekit_bayes.extract.precisions import Precisions
from mergekit_bayes.extract.roots import FLOOR, BlockRoot, DiagonalRoot, LowRankRoot
from mergekit_bayes.extract.sweeps import sweep
from mergekit_bayes.extract.weighting import Weighting, by_entry, entry_loss, uniform
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.posterior.factors import Kronecker, LowRank, Matrices, RankOne
from tests import tiny

P, Q = 9, 7
NAME = "h.0.fc.weight"


def limits(rank=None, tolerance=None, sweeps=8, dtype="F32"):
    return Limits(rank, tolerance, sweeps, dtype)


def solve(change, weighting, rank=None, weight_norm=1.0, **more):
    change, allowed = change.astype(np.float32), limits(rank, **more)
    return approximate(change, weighting, allowed, weight_norm=weight_norm)


def positive(seed, n):
    half = np.random.default_rng(seed).normal(size=(n, 2 * n))
    return half @ half.T / n


def correlated(seed, shape=(P, Q)):
    """Precisions that rows and columns explain in part, over three orders of magnitude."""
    rng = np.random.default_rng(seed)
    logs = rng.normal(size=(shape[0], 1)) + rng.normal(size=(1, shape[1]))
    return np.exp(logs + rng.normal(size=shape)).astype(np.float32)


def given(form, seed=0):
    """A weighting, and its two matrices: the loss is `1/2 tr(D' L D R)`."""
    rng = np.random.default_rng(seed)
    rows, columns = np.exp(rng.normal(size=P)), np.exp(rng.normal(size=Q))
    left, right, one = positive(1, P), positive(2, Q), DiagonalRoot
    ones = one(np.ones(P)), one(np.ones(Q))
    factor = rng.normal(size=(3, Q))
    blocks = np.stack([positive(3, Q), positive(4, Q)])
    both = np.zeros((2 * Q, 2 * Q))
    both[:Q, :Q], both[Q:, Q:] = blocks
    return {
        "uniform": (uniform((P, Q)), np.eye(P), np.eye(Q)),
        "rows and columns": (Weighting(one(rows), one(columns)), np.diag(rows), np.diag(columns)),
        "inputs": (Weighting(ones[0], BlockRoot(right[None])), np.eye(P), right),
        "outputs": (Weighting(BlockRoot(left[None]), ones[1]), left, np.eye(Q)),
        "blocks": (Weighting(ones[0], BlockRoot(blocks)), np.eye(P), both),
        "low rank": (
            Weighting(ones[0], LowRankRoot(columns, factor)),
            np.eye(P),
            np.diag(columns) + factor.T @ factor,
        ),
        "kronecker": (Weighting(BlockRoot(left[None]), BlockRoot(right[None])), left, right),
    }[form]


FORMS = ("uniform", "rows and columns", "inputs", "outputs", "blocks", "low rank", "kronecker")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3])
def test_closed_forms_have_the_loss_of_the_optimum(form, rank):
    """The twin takes roots by Cholesky, which are others, and needs no factors at all."""
    weighting, left, right = given(form)
    change = np.random.default_rng(5).normal(size=(len(left), len(right)))
    found = solve(change, weighting, rank)
    roots = np.linalg.cholesky(left), np.linalg.cholesky(right)
    sigma = np.linalg.svd(roots[0].T @ change @ roots[1], compute_uv=False)
    assert found.lost == pytest.approx(0.5 * np.sum(sigma[rank:] ** 2), rel=1e-4)
    assert found.change == pytest.approx(0.5 * np.sum(sigma**2), rel=1e-5)
    rest = change - found.left.astype(np.float64) @ found.right
    assert found.lost == pytest.approx(0.5 * np.trace(rest.T @ left @ rest @ right), rel=1e-4)
    # The gradient of the loss by either factor vanishes.
    gradient = left @ rest @ right
    size = np.linalg.norm(left @ change @ right)
    assert np.linalg.norm(gradient @ found.right.T) < 1e-4 * size * np.linalg.norm(found.right)
    assert np.linalg.norm(found.left.T @ gradient) < 1e-4 * size * np.linalg.norm(found.left)


@pytest.mark.parametrize("form", FORMS)
def test_a_root_is_taken_back(form):
    weighting, left, right = given(form)
    change = np.random.default_rng(6).normal(size=(len(left), len(right)))
    moved = weighting.transform(change)
    np.testing.assert_allclose(weighting.right.over(weighting.left.over(moved.T).T), change)
    u, v = weighting.restore(moved, np.eye(len(right)))
    np.testing.assert_allclose(u @ v, change, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_sweeps_lower_the_loss_of_entrywise_precisions(seed, zeros):
    rng = np.random.default_rng(seed)
    precision = correlated(seed, (24, 18))
    precision[rng.random(precision.shape) < zeros] = 0
    if zeros:
        precision[3], precision[:, 2] = 0, 0
    change = rng.normal(size=precision.shape)
    weighting = by_entry(precision)
    losses = [solve(change, weighting, 3, sweeps=most).lost for most in (0, 1, 2, 20)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    plain = solve(change, uniform(precision.shape), 3)
    rest = (change - plain.left @ plain.right).astype(np.float32)
    assert losses[-1] < entry_loss(precision, rest)


def test_sweeps_never_raise_the_loss_where_the_start_is_the_optimum():
    rows, columns = np.exp(np.random.default_rng(0).normal(size=(2, 12)))
    precision = np.outer(rows, columns).astype(np.float32)
    change = np.random.default_rng(1).normal(size=(12, 12)).astype(np.float32)
    start = solve(change, by_entry(precision), 2, sweeps=0)
    swept = sweep(change, precision, start.left, start.right, 20)
    assert swept.loss <= start.lost
    assert swept.loss == pytest.approx(start.lost, rel=1e-4)


def test_a_sweep_in_blocks_is_the_same(monkeypatch):
    precision, rng = correlated(3, (40, 30)), np.random.default_rng(3)
    change = rng.normal(size=precision.shape).astype(np.float32)
    whole = solve(change, by_entry(precision), 4)
    monkeypatch.setattr("mergekit_bayes.extract.sweeps._NUMBERS", 64)
    monkeypatch.setattr("mergekit_bayes.extract.weighting._BLOCK", 64)
    assert solve(change, by_entry(precision), 4).lost == pytest.approx(whole.lost, rel=1e-4)


@pytest.mark.parametrize("kind", ["uniform", "rows and columns", "kronecker", "entry"])
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01])
def test_a_tolerance_is_met_by_the_smallest_rank(kind, tolerance):
    weighting = by_entry(correlated(7)) if kind == "entry" else given(kind)[0]
    change = np.random.default_rng(8).normal(size=(P, Q)) * np.exp(-np.arange(Q))
    found = solve(change, weighting, tolerance=tolerance)
    assert found.lost <= tolerance * found.change
    if found.rank > 1:
        fewer = solve(change, weighting, found.rank - 1)
        assert fewer.lost > tolerance * fewer.change
    capped = solve(change, weighting, 1, tolerance=tolerance)
    assert capped.rank == 1


def test_layers_get_the_rank_that_they_need_and_no_rounding():
    rng = np.random.default_rng(0)
    change = (rng.normal(size=(40, 3)) @ rng.normal(size=(3, 30))).astype(np.float32)
    weight = rng.normal(size=change.shape).astype(np.float32)
    rounded = (weight + change) - weight
    norm = float(np.linalg.norm(weight + change))
    for weighting in (uniform(change.shape), by_entry(correlated(1, change.shape))):
        found = approximate(rounded, weighting, limits(16), weight_norm=norm)
        assert found.rank == 3
        assert found.lost_norm < 1e-5 * found.norm
    nothing = approximate(rounded * 1e-9, uniform(change.shape), limits(16), weight_norm=norm)
    assert nothing.rank == 0


def test_a_large_matrix_is_cut_as_a_small_one_is(monkeypatch):
    rng = np.random.default_rng(0)
    change = rng.normal(size=(90, 80)) * np.exp(-np.arange(80) / 8)
    small = solve(change, uniform(change.shape), 4)
    exact = solve(change, uniform(change.shape), tolerance=0.02)
    monkeypatch.setattr("mergekit_bayes.lora.truncate._DENSE", 8)
    monkeypatch.setattr("mergekit_bayes.extract.approximate._FIRST", 2)
    assert solve(change, uniform(change.shape), 4).lost == pytest.approx(small.lost, rel=1e-3)
    assert solve(change, uniform(change.shape), tolerance=0.02).rank == exact.rank


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_factors_are_measured_as_they_are_stored(dtype):
    change = np.random.default_rng(0).normal(size=(P, 2)) @ np.ones((2, Q)) + np.eye(P, Q)
    found = solve(change, uniform((P, Q)), Q, dtype=dtype)
    step = 2**-8 if dtype == "BF16" else 2**-11
    assert 0 < found.lost_norm < 3 * step * found.norm
    bits = found.left.view(np.uint32)
    assert not (bits & (0xFFFF if dtype == "BF16" else 0x1FFF)).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("of", ["change", "precision"])
@pytest.mark.parametrize("is_large", [False, True])
def test_no_scale_overflows_or_vanishes(monkeypatch, scale, of, is_large):
    """The factors scale with the change, and do not depend on the scale of the precision."""
    if is_large:
        monkeypatch.setattr("mergekit_bayes.lora.truncate._DENSE", 2)
    precision, rng = correlated(2, (60, 50)), np.random.default_rng(2)
    change = rng.normal(size=precision.shape)
    plain = solve(change, by_entry(precision), 2)
    by_change = scale if of == "change" else 1.0
    by_precision = np.float32(scale if of == "precision" else 1.0)
    weighting = by_entry(precision * by_precision)
    found = solve(by_change * change, weighting, 2, weight_norm=by_change)
    product = (found.left.astype(np.float64) / by_change) @ found.right
    np.testing.assert_allclose(product, plain.left @ plain.right, atol=0.02)
    share = found.lost / found.change
    assert share == pytest.approx(plain.lost / plain.change, rel=1e-3)


def test_a_change_beyond_the_format_is_refused():
    with pytest.raises(CheckpointError, match="beyond F16"):
        solve(np.full((P, Q), 1e12), uniform((P, Q)), 1, dtype="F16")


def stored(tmp_path, precision, **more):
    mean = tiny.arrays(0, {NAME: (P, Q)})
    path = tiny.posterior(tmp_path / "m.safetensors", mean, {NAME: precision}, **more)
    return open_posterior(str(path))


def dense(precision):
    """The full matrix of a precision, for the rows of the weight one after the other."""
    if isinstance(precision, RankOne):
        return np.diag((precision.rows * precision.columns).reshape(-1).astype(np.float64))
    if isinstance(precision, Kronecker):
        pairs = zip(precision.left, precision.right, strict=True)
        return sum(np.kron(left.astype(np.float64), right) for left, right in pairs)
    if isinstance(precision, LowRank):
        one = np.diag(precision.diagonal) + precision.factor.T @ precision.factor
        return np.kron(np.eye(P), one)
    if isinstance(precision, Matrices):
        one = precision.blocks[0].astype(np.float64)
        return np.kron(one, np.eye(Q)) if precision.is_left else np.kron(np.eye(P), one)
    return np.diag(np.broadcast_to(precision, (P, Q)).reshape(-1).astype(np.float64))


def f32(*arrays):
    return [np.asarray(a, np.float32) for a in arrays]


RNG = np.random.default_rng(9)
STORED = {
    "entry": np.asarray(np.exp(RNG.normal(size=(P, Q))), np.float32),
    "row": np.asarray(np.exp(RNG.normal(size=(P, 1))), np.float32),
    "tensor": np.asarray([[3.0]], np.float32),
    "rank one": RankOne(*f32(np.exp(RNG.normal(size=(P, 1))), np.exp(RNG.normal(size=(1, Q))))),
    "inputs": Matrices(*f32(positive(5, Q)[None])),
    "outputs": Matrices(*f32(positive(6, P)[None]), is_left=True),
    "low rank": LowRank(*f32(np.exp(RNG.normal(size=Q)), RNG.normal(size=(2, Q)))),
    "kronecker": Kronecker(*f32(positive(7, P)[None], positive(8, Q)[None])),
    "two products": Kronecker(
        *f32(np.stack([positive(i, P) for i in (1, 2)]), np.stack([positive(i, Q) for i in (3, 4)]))
    ),
}


@pytest.mark.parametrize("form", STORED)
def test_the_loss_is_that_of_the_stored_precision_for_its_observations(tmp_path, form):
    """Every form, against the full matrix; the record counts 100 observations by an ess of 50."""
    with stored(tmp_path, STORED[form], observations=100.0, ess=50.0) as model:
        weighting = Precisions(model, None).weighting(NAME)
        change = np.random.default_rng(1).normal(size=(P, Q)).astype(np.float32)
        flat = change.reshape(-1).astype(np.float64)
        expected = 0.5 * 2 * flat @ dense(STORED[form]) @ flat
        assert weighting.loss(change) == pytest.approx(expected, rel=1e-4)
        found = solve(change, weighting, 2)
        assert 0 < found.lost < found.change
        assert found.change == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", ["entry", "row", "rank one"])
def test_zero_precisions_give_finite_factors(tmp_path, form):
    precision = STORED[form]
    if form == "rank one":
        precision = RankOne(precision.rows.copy(), precision.columns.copy())
        precision.rows[2], precision.columns[0, 3] = 0, 0
    else:
        precision = precision.copy()
        precision[2] = 0
    with stored(tmp_path, precision) as model:
        weighting = Precisions(model, None).weighting(NAME)
        found = solve(np.random.default_rng(1).normal(size=(P, Q)), weighting, 3)
    assert np.isfinite(found.left).all()
    assert np.isfinite(found.right).all()
    assert found.lost_norm < found.norm
    assert 0 < FLOOR < 0.1


def test_a_precision_of_inputs_weighs_where_it_is_asked_for(tmp_path):
    with stored(tmp_path, STORED["inputs"], estimator="inputs") as model:
        left_out, asked = Precisions(model, None), Precisions(model, "precision")
        assert (left_out.weighs, left_out.unit) == (False, "half the squared change")
        assert left_out.is_left_out
        assert left_out.weighting(NAME) is None
        assert (asked.weighs, asked.unit) == (True, "half the squared outputs")
        assert asked.weighting(NAME) is not None
        assert not asked.is_left_out


def test_a_precision_of_nothing_but_zeros_is_none(tmp_path):
    with stored(tmp_path, np.zeros((P, Q), np.float32)) as model:
        precisions = Precisions(model, "precision")
        assert precisions.weighting(NAME) is None
        assert precisions.lacking == [NAME]


@pytest.mark.parametrize("form", ["entry", "row", "rank one", "inputs", "kronecker"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_no_precision_are_refused_by_tensor(tmp_path, form, number):
    stored(tmp_path, STORED[form]).close()
    with open(tmp_path / "m.posterior", "r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(number).tobytes())
    with (
        open_posterior(str(tmp_path / "m.safetensors")) as model,
        pytest.raises(PrecisionError, match=r"m\.posterior.*h\.0\.fc\.weight.*1 numbers"),
    ):
        Precisions(model, None).weighting(NAME)
