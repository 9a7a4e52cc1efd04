"""Merges by precision matrices: equal to a float64 twin row by row, chained, undone, refused."""

import importlib
import re
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mergekit_bayes.errors import CheckpointError, ConfigError, PrecisionError
from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.kernels.base import Tally
from mergekit_bayes.merge import MergeConfig, plan_merge, run_merge
from mergekit_bayes.merge.layer_posteriors import RIDGE
from mergekit_bayes.merge.matrices import merge_matrices, read_layer
from mergekit_bayes.merge.run import plan_hash
from mergekit_bayes.methods import METHODS
from mergekit_bayes.methods.base import Parameter
from mergekit_bayes.methods.gradient_matching import Removal
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.posterior.factors import Matrices
from mergekit_bayes.stream.numbers import numbers_of
from tests import tiny
from tests.reference import methods as twin

SHAPES = {
    "wte.weight": (7, 4),
    "h.0.attn.weight": (5, 6),  # (outputs, inputs)
    "h.0.mlp.c_fc.weight": (4, 3),  # (inputs, outputs)
    "h.0.experts.up": (2, 3, 4),
    "h.0.ln.bias": (4,),
}
RIGHT, LEFT, EXPERTS = "h.0.attn.weight", "h.0.mlp.c_fc.weight", "h.0.experts.up"
MATRICES = (RIGHT, LEFT, EXPERTS)
COUNTS = {"base": 300.0, "a": 100.0, "b": 40.0, "c": 250.0}


def covariance(seed, *shape):
    inputs = np.random.default_rng(seed).normal(size=(*shape[:-1], 2 * shape[-1]))
    return (inputs @ inputs.swapaxes(-1, -2) / shape[-1]).astype(np.float32)


def matrix_precisions(seed, blocks=1):
    found = dict(tiny.precisions(seed, SHAPES))
    size = 6 // blocks
    found[RIGHT] = Matrices(covariance(seed, blocks, size, size))
    found[LEFT] = Matrices(covariance(seed + 50, 1, 4, 4), is_left=True)
    found[EXPERTS] = Matrices(covariance(seed + 70, 2, 1, 4, 4))
    return found


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make()


def make(blocks=1, prior=0.0):
    for file in Path().glob("*.*"):
        file.unlink()
    for i, (name, count) in enumerate(COUNTS.items()):
        precision = {n: with_prior(p, prior) for n, p in matrix_precisions(i, blocks).items()}
        kept = {"observations": count, "estimator": "inputs", "prior": prior}
        tiny.posterior(f"{name}.safetensors", mean_of(i), precision, **kept)


def with_prior(precision, prior):
    """A precision with a prior on every entry."""
    if isinstance(precision, Matrices):
        one = np.eye(precision.blocks.shape[-1], dtype=np.float32)
        return precision._replace(blocks=precision.blocks + np.float32(prior) * one)
    return precision + np.float32(prior)


def mean_of(i):
    return tiny.arrays(i, SHAPES, spread=0.1)


def config(*models, out="out", **settings):
    settings = {"weights": "precision", "counts": "recorded", "base": "base.safetensors"} | settings
    files = [f"{m}.safetensors" for m in models]
    return MergeConfig(models=files, out=f"{out}.safetensors", **settings)


def merge(*models, **settings):
    return run_merge(config(*models, **settings))


def turned(name, weights):
    """A tensor as matrices (experts, outputs, inputs)."""
    weights = np.float64(weights)
    weights = weights.swapaxes(-1, -2) if name == LEFT else weights
    return weights.reshape(-1, *weights.shape[-2:])


def dense(stored):
    """The matrix of each expert, of its blocks."""
    blocks = stored.blocks if isinstance(stored, Matrices) else stored
    blocks = np.float64(blocks[..., 0] if blocks.shape[-1] == 1 else blocks)
    result = []
    for each in blocks.reshape(-1, *blocks.shape[-3:]):
        k, n = each.shape[:2]
        whole = np.zeros((k * n, k * n))
        for j in range(k):
            whole[j * n :, j * n :][:n, :n] = each[j]
        result.append(whole)
    return result


def expected(tensor, names, scales, blocks=1, pulled=True):
    """A tensor merged row by row by dense float64 matrices, and the merged matrices."""
    places = {name: i for i, name in enumerate(COUNTS)}
    means = {n: turned(tensor, mean_of(places[n])[tensor]) for n in COUNTS}
    stored = {n: dense(matrix_precisions(places[n], blocks)[tensor]) for n in COUNTS}
    merged, precisions = np.empty_like(means["base"]), []
    for e, rows in enumerate(merged):
        s0 = stored["base"][e]
        hbar = s0 + sum(s * stored[n][e] for n, s in zip(names, scales, strict=True))
        for r in range(len(rows)):
            m0 = means["base"][e, r]
            moved = sum(
                s * (pulled * s0 + stored[n][e]) @ (means[n][e, r] - m0)
                for n, s in zip(names, scales, strict=True)
            )
            rows[r] = m0 + np.linalg.solve(hbar, moved)
        precisions.append(hbar)
    return merged, precisions


def written(tensor, out="out"):
    """A tensor of an output, and the matrices of its precision."""
    mean = tiny.read(f"{out}.safetensors")[tensor]
    return turned(tensor, mean), dense(tiny.read(f"{out}.posterior")[tensor])


def check(tensor, mean, precisions, out="out", rtol=1e-5):
    found, matrices = written(tensor, out)
    np.testing.assert_allclose(found, mean, rtol=1e-4, atol=3e-6)
    for one, other in zip(matrices, precisions, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * abs(other).max())


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("anchor", ["h0", "none"])
def test_a_merge_by_matrices_is_the_formula_for_every_row(world, blocks, anchor):
    make(blocks)
    merge("a", "b", scale=(1.0, 0.5), anchor=anchor)
    for tensor in MATRICES:
        several = blocks if tensor == RIGHT else 1
        check(tensor, *expected(tensor, "ab", (1.0, 0.5), several, pulled=anchor == "h0"))


def test_tensors_with_numbers_are_merged_as_ever(world):
    merge("a", "b", scale=(1.0, 0.5))
    mixed = {n: tiny.read("out.safetensors")[n] for n in ("wte.weight", "h.0.ln.bias")}
    for i, (name, count) in enumerate(COUNTS.items()):
        Path(f"{name}.posterior").unlink()
        Path(f"{name}.safetensors").unlink()
        tiny.posterior(
            f"{name}.safetensors", mean_of(i), tiny.precisions(i, SHAPES), observations=count
        )
    merge("a", "b", scale=(1.0, 0.5), out="numbers")
    numbers = tiny.read("numbers.safetensors")
    for name, values in mixed.items():
        np.testing.assert_array_equal(values, numbers[name])


def test_without_a_base_it_is_regmean(world):
    merge("a", "b", base=None, scale=(1.0, 0.5))
    for tensor in MATRICES:
        weights = [turned(tensor, mean_of(i)[tensor]) for i in (1, 2)]
        grams = [dense(matrix_precisions(i)[tensor]) for i in (1, 2)]
        for e in range(len(weights[0])):
            total = grams[0][e] + 0.5 * grams[1][e]
            moved = weights[0][e] @ grams[0][e] + 0.5 * weights[1][e] @ grams[1][e]
            mean, _ = written(tensor)
            np.testing.assert_allclose(mean[e], moved @ np.linalg.inv(total), atol=2e-5)


@pytest.mark.parametrize("prior", [0.0, 2.0])
def test_a_merge_merges_again_and_is_undone(world, prior):
    make(prior=prior)
    merge("a", "b", scale=(1.0, 0.7), out="ab")
    merge("ab", "c", scale=(1.0, 0.3), out="chain")
    merge("a", "b", "c", scale=(1.0, 0.7, 0.3), out="once")
    undone = merge("chain", "b", scale=(1.0, -0.7), out="undone")
    merge("a", "c", scale=(1.0, 0.3), out="rest")
    assert undone.guarded_share == 0
    for tensor in MATRICES:
        check(tensor, *written(tensor, "once"), "chain")
        check(tensor, *written(tensor, "rest"), "undone", rtol=1e-4)


def test_a_removal_is_bounded_in_every_direction(world):
    report = merge("a", scale=(-1.0,), guard=0.2)
    assert report.guarded_share > 0
    assert report.largest_multiplier <= 5 + 1e-6
    for tensor in MATRICES:
        s0, h = (dense(matrix_precisions(i)[tensor]) for i in (0, 1))
        means = [turned(tensor, mean_of(i)[tensor]) for i in (0, 1)]
        mean, matrices = written(tensor)
        for e, (zero, likelihood) in enumerate(zip(s0, h, strict=True)):
            zero = zero + RIDGE * np.linalg.norm(zero) * np.eye(len(zero))
            # In the basis where the bound is the identity, max(eigenvalue, guard).
            root = symmetric_root(zero + likelihood)
            values, vectors = np.linalg.eigh(
                np.linalg.inv(root) @ (zero - likelihood) @ np.linalg.inv(root)
            )
            guarded = (root @ vectors * np.maximum(values, 0.2)) @ vectors.T @ root
            moved = -(means[1][e] - means[0][e]) @ (zero + likelihood)
            np.testing.assert_allclose(matrices[e], guarded, rtol=1e-4, atol=1e-4)
            merged = means[0][e] + moved @ np.linalg.inv(guarded)
            np.testing.assert_allclose(mean[e], merged, rtol=1e-4, atol=1e-5)


def symmetric_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


def test_directions_that_no_input_was_seen_in_fall_back_to_task_arithmetic(world):
    blind = np.zeros((1, 6, 6), np.float32)
    blind[0, :3, :3] = np.eye(3)
    for file in Path().glob("*.*"):
        file.unlink()
    for i, name in enumerate(COUNTS):
        precision = matrix_precisions(i) | {RIGHT: Matrices((i + 1) * blind)}
        tiny.posterior(f"{name}.safetensors", mean_of(i), precision, estimator="inputs")
    merge("a", "b", scale=(1.0, 0.5))
    base, a, b = (np.float64(mean_of(i)[RIGHT]) for i in range(3))
    mean, _ = written(RIGHT)
    added = base + (a - base) + 0.5 * (b - base)
    np.testing.assert_allclose(mean[0][:, 3:], added[:, 3:], atol=1e-6)
    assert abs(mean[0][:, :3] - added[:, :3]).max() > 1e-3


@pytest.mark.parametrize("share", [1e-4, 0.0])
def test_what_rounding_leaves_of_the_tasks_does_not_count_beside_a_small_base(world, share):
    # All see the same half of 32 directions; the noise of float32 in the others has either sign.
    shapes, rng = {"h.0.attn.weight": (3, 32), "h.0.ln.bias": (2,)}, np.random.default_rng(0)
    seen = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    means = [tiny.arrays(i, shapes, spread=0.1) for i in range(4)]
    for i, size in enumerate((share, 1.0, 1.0, 1.0)):
        inputs = rng.normal(size=(64, 16)) @ seen[:16]
        matrix = (1e6 * size * inputs.T @ inputs).astype(np.float32)
        precision = {RIGHT: Matrices(matrix[None]), "h.0.ln.bias": np.ones(2, np.float32)}
        tiny.posterior(f"m{i}.safetensors", means[i], precision, estimator="inputs")
    merge("m1", "m2", "m3", base="m0.safetensors")
    written = tiny.read("out.safetensors")[RIGHT]
    base, *tasks = (np.float64(mean[RIGHT]) for mean in means)
    added = base + sum(task - base for task in tasks)
    np.testing.assert_allclose(written @ seen[16:].T, added @ seen[16:].T, atol=2e-3)


def test_a_base_with_one_number_is_that_number_in_every_direction(world):
    merge("a", isotropic={"base.safetensors": 3.0})
    a = dense(matrix_precisions(1)[RIGHT])[0]
    base, task = (np.float64(mean_of(i)[RIGHT]) for i in (0, 1))
    _, (precision,) = written(RIGHT)
    np.testing.assert_allclose(precision, 3 * np.eye(6) + a, rtol=1e-5, atol=1e-4)
    mean, _ = written(RIGHT)
    np.testing.assert_allclose(mean[0], task, atol=1e-6)
    assert abs(base - task).max() > 0.01


def test_a_tensor_that_is_left_alone_keeps_its_matrices(world):
    merge("a", only="wte")
    for tensor in MATRICES:
        mean, matrices = written(tensor)
        np.testing.assert_array_equal(mean, turned(tensor, mean_of(0)[tensor]))
        for one, other in zip(matrices, dense(matrix_precisions(0)[tensor]), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_plan_says_what_the_largest_layer_takes(world):
    settings = {"weights": "precision", "base": "base.safetensors", "out": "out.safetensors"}
    with plan_merge(MergeConfig(models=["a.safetensors", "b.safetensors"], **settings)) as plan:
        # Of three models, 5 x 6 weights and a 6 x 6 matrix.
        (note,) = [n for n in plan.notes if "whole matrices" in n]
    assert note.startswith(f"3 tensors are merged as whole matrices; the largest, '{RIGHT}', takes")
    assert f"{8 * (8 * 30 + 18 * 36) / 1e6:,.3g} MB" in note


@pytest.mark.parametrize("tasks", [1, 3])
def test_what_a_layer_takes_is_what_the_plan_says(world, tasks):
    shapes = {"h.0.attn.weight": (40, 120), "h.0.ln.bias": (2,)}
    for i in range(1 + tasks):
        precision = {RIGHT: Matrices(covariance(i, 1, 120, 120)), "h.0.ln.bias": np.ones(2)}
        tiny.posterior(f"m{i}.safetensors", tiny.arrays(i, shapes), precision, estimator="inputs")
    models = [f"m{i}.safetensors" for i in range(1, 1 + tasks)]
    settings = {"weights": "precision", "base": "m0.safetensors", "out": "out.safetensors"}
    with plan_merge(MergeConfig(models=models, **settings)) as plan:
        said = float(re.search(r"about ([\d.]+) MB", " ".join(plan.notes))[1])
        (step,) = (step for step in plan.steps if step.axis is not None)
        numbers = numbers_of(plan, step, Removal(0.2), np.float64)
        tracemalloc.start()
        merge_matrices(plan, step, read_layer(plan, step), numbers, Tally(1 + tasks))
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    assert 0.5 * said < peak < 1.1 * said


def test_a_folder_lists_its_matrices_in_the_index(world):
    run_merge(
        MergeConfig(
            models=["a.safetensors"], base="base.safetensors", out="folder/", weights="precision"
        )
    )
    with open_posterior("folder") as posterior:
        assert posterior.precision.parts(RIGHT) == (f"right:{RIGHT}",)
        assert posterior.precision.parts(LEFT) == (f"left:{LEFT}",)


@pytest.mark.parametrize("blocks", [1, 2])
def test_regmean_takes_every_layer_by_its_matrices(world, blocks):
    make(blocks)
    merge("a", "b", base=None, scale=(1.0, 0.5), method="regmean", param={"alpha": 0.7})
    merged = tiny.read("out.safetensors")
    means = {t: [turned(t, mean_of(i)[t]) for i in (1, 2)] for t in MATRICES}
    for tensor, weights in means.items():
        grams = [dense(matrix_precisions(i, blocks)[tensor]) for i in (1, 2)]
        mean = turned(tensor, merged[tensor])
        for e in range(len(mean)):
            expected = twin.regmean(
                [{"x": w[e]} for w in weights],
                [{"x": g[e]} for g in grams],
                (1.0, 0.5),
                0.7,
                layers=["x"],
            )
            np.testing.assert_allclose(mean[e], expected["x"], atol=2e-5)
    for name in ("wte.weight", "h.0.ln.bias"):
        expected = (mean_of(1)[name] + 0.5 * np.float64(mean_of(2)[name])) / 1.5
        np.testing.assert_allclose(merged[name], expected, atol=1e-6)
    assert not Path("out.posterior").exists()


def test_regmean_without_matrices_is_refused(world):
    for i, name in enumerate("ab"):
        tiny.posterior(f"{name}{i}.safetensors", mean_of(i), tiny.precisions(i, SHAPES))
    with pytest.raises(PrecisionError, match=r"regmean weighs.*h.0.*--estimator inputs"):
        merge("a0", "b1", base=None, method="regmean")


BAD = {
    "not symmetric": lambda m: m + np.triu(np.ones_like(m), 1) * 5,
    "not finite": lambda m: m * np.nan,
    "a negative diagonal": lambda m: -m,
    "indefinite": lambda m: m + 50 * (np.ones_like(m) - np.eye(m.shape[-1])),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_matrix_that_is_no_precision_is_refused(world, kind):
    file = Path("a.posterior")
    with safe_open(file, "np") as stored:
        tensors = {n: stored.get_tensor(n) for n in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    tensors[f"right:{RIGHT}"] = BAD[kind](tensors[f"right:{RIGHT}"]).astype(np.float32)
    save_file(tensors, file, metadata)
    with pytest.raises(PrecisionError, match=r"h.0.attn.weight.*a.safetensors.*symmetric"):
        merge("a", "b")
    assert not list(Path().glob("out*"))


REFUSED = {
    "another method": ({"method": "fisher", "base": None}, ConfigError, "fisher reads one number"),
    "pooling": ({"pool": "row"}, ConfigError, "--pool row"),
    "shrinkage": ({"shrink": "0.3"}, ConfigError, "--shrink 0.3"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_meaning_for_matrices_is_refused(world, kind):
    settings, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        merge("a", "b", **settings)


BROKEN = {
    "another shape": lambda base, tasks, scales, facts: Gaussian(base.mean[:1], base.precision),
    "no Gaussian": lambda base, tasks, scales, facts: 3.0,
    "a name that is not there": lambda base, tasks, scales, facts: {}["rank"],
    "an error of its own": lambda base, tasks, scales, facts: base.mean @ tasks[5].mean,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_rule_that_breaks_its_contract_is_refused_with_it(world, monkeypatch, kind):
    method = METHODS["gradient_matching"]._replace(name="own", matrix=BROKEN[kind])
    monkeypatch.setitem(METHODS, "own", method)
    with pytest.raises(TypeError, match=r"method 'own' .*The rule: .*base\.py"):
        merge("a", "b", method="own")
    assert not Path("out.safetensors").exists()


class Rank(NamedTuple):
    """Facts of a rule that cuts its task vectors off."""

    rank: int


def test_a_rule_of_ones_own_with_a_whole_number_merges_layers(world, monkeypatch):
    def matrix(base, tasks, scales, facts):
        left, values, right = np.linalg.svd(tasks[0].mean - base.mean, full_matrices=False)
        cut = (left[:, : facts.rank] * values[: facts.rank]) @ right[: facts.rank]
        return Gaussian(base.mean + scales[0] * cut, base.precision)

    method = METHODS["tsv_m"]._replace(
        name="own",
        matrix=matrix,
        parameters=(Parameter("rank", 8, "of a task vector", 1),),
        facts=lambda inputs: Rank(inputs.settings["rank"]),
    )
    monkeypatch.setitem(METHODS, "own", method)
    merge("a", method="own", weights="uniform", counts="equal", param={"rank": 2.0})
    moved = tiny.read("out.safetensors")[RIGHT] - tiny.read("base.safetensors")[RIGHT]
    assert np.linalg.matrix_rank(moved, tol=1e-5) == 2


@pytest.mark.parametrize("part", ["combine", "matrix", "facts"])
def test_a_merge_does_not_go_on_by_a_rule_that_was_changed(world, monkeypatch, part):
    own = METHODS["tsv_m"]._replace(name="own", facts=lambda inputs: None)
    file = Path(f"own_{part}.py")
    file.write_text(f"def {part}(*given):\n    return given[0]\n")
    monkeypatch.syspath_prepend(Path.cwd())
    module = importlib.import_module(file.stem)
    monkeypatch.setitem(METHODS, "own", own._replace(**{part: getattr(module, part)}))
    hashes = []
    for change in (file.read_text, lambda: file.read_text() + "\n"):
        file.write_text(change())
        with plan_merge(config("a", method="own", weights="uniform", counts="equal")) as plan:
            hashes.append(plan_hash(plan))
    assert hashes[0] != hashes[1]
    file.unlink()
    assert METHODS["own"].code


def test_a_rule_for_which_memory_is_short_says_what_takes_less(world, monkeypatch):
    def matrix(base, tasks, scales, facts):
        raise MemoryError

    method = METHODS["gradient_matching"]._replace(name="own", matrix=matrix)
    monkeypatch.setitem(METHODS, "own", method)
    with pytest.raises(CheckpointError, match=r"more memory than there is.*--blocks"):
        merge("a", "b", method="own")


def test_matrices_do_not_mix_with_numbers(world):
    Path("b.posterior").unlink()
    Path("b.safetensors").unlink()
    tiny.posterior("b.safetensors", mean_of(2), tiny.precisions(2, SHAPES), estimator="inputs")
    with pytest.raises(PrecisionError, match=r"1 of 6 x 6.*a\.safetensors.*numbers for .b\."):
        merge("a", "b", base=None)
