"""Merges by precisions of low rank: those of the same matrices in full, which nobody makes."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import CheckpointError, PrecisionError
from mergekit_bayes.inspect.run import run_inspect
from mergekit_bayes.kernels.base import Tally
from mergekit_bayes.merge import MergeConfig, plan_merge, run_merge
from mergekit_bayes.merge.matrices import merge_matrices, read_layer
from mergekit_bayes.methods.gradient_matching import Removal
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.posterior.factors import LowRank, Matrices
from mergekit_bayes.posterior.pooling import write_pooled
from mergekit_bayes.preview.held import Held
from mergekit_bayes.stream.numbers import numbers_of
from tests import tiny

SHAPES = {
    "wte.weight": (7, 4),
    "h.0.attn.weight": (5, 24),  # (outputs, inputs)
    "h.0.mlp.c_fc.weight": (24, 3),  # (inputs, outputs)
    "h.0.experts.up": (2, 3, 24),
    "h.0.ln.bias": (4,),
}
RIGHT, LEFT, EXPERTS = "h.0.attn.weight", "h.0.mlp.c_fc.weight", "h.0.experts.up"
LAYERS = (RIGHT, LEFT, EXPERTS)
COUNTS = {"base": 300.0, "a": 100.0, "b": 40.0, "c": 250.0}
N, RANK = 24, 2


def low_ranks(seed, rank=RANK, prior=0.0, without_data=()):
    """A precision of low rank for every layer, and numbers for all else.

    Models with a seed of `without_data` have the prior alone in the second expert.
    """
    found = {n: p + np.float32(prior) for n, p in tiny.precisions(seed, SHAPES).items()}
    for i, (name, leading) in enumerate(((RIGHT, ()), (LEFT, ()), (EXPERTS, (2,)))):
        rng = np.random.default_rng(1000 * seed + i)
        diagonal = rng.uniform(0.1, 1, size=(*leading, N)).astype(np.float32) + np.float32(prior)
        factor = rng.normal(size=(*leading, rank, N)).astype(np.float32)
        if name == EXPERTS and seed in without_data:
            diagonal[1], factor[1] = prior, 0.0
        found[name] = LowRank(diagonal, factor, is_left=name == LEFT)
    return found


def in_full(precision):
    """The same precision with matrices in full."""
    if not isinstance(precision, LowRank):
        return precision
    diagonal, factor = np.float64(precision.diagonal), np.float64(precision.factor)
    matrix = factor.swapaxes(-1, -2) @ factor + diagonal[..., None] * np.eye(N)
    return Matrices(np.float32(matrix)[..., None, :, :], precision.is_left)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make()


def make(**settings):
    prior = settings.get("prior", 0.0)
    for i, (name, count) in enumerate(COUNTS.items()):
        precision = low_ranks(i, **settings)
        kept = {"observations": count, "estimator": "inputs", "prior": prior}
        mean = tiny.arrays(i, SHAPES, spread=0.1)
        for folder, form in (("low", lambda p: p), ("full", in_full)):
            Path(folder).mkdir(exist_ok=True)
            file = Path(folder) / f"{name}.safetensors"
            for old in Path(folder).glob(f"{name}.*"):
                old.unlink()
            tiny.posterior(file, mean, {n: form(p) for n, p in precision.items()}, **kept)


def merge(folder, *models, out="out", **settings):
    settings = {
        "weights": "precision",
        "counts": "recorded",
        "base": f"{folder}/base.safetensors",
    } | settings
    files = [m if "/" in m else f"{folder}/{m}.safetensors" for m in models]
    return run_merge(MergeConfig(models=files, out=f"{folder}/{out}.safetensors", **settings))


def precisions_in(file):
    """By name: the rank, None for matrices in full, and the matrices, (experts, n, n)."""
    found = {}
    with open_posterior(file) as opened:
        for name in opened.precision.matrices:
            parts = [
                np.float64(read_tensor(opened.precision.in_files, p))
                for p in opened.precision.parts(name)
            ]
            if len(parts) == 2:
                diagonal, factor = parts
                whole = factor.swapaxes(-1, -2) @ factor + diagonal[..., None] * np.eye(N)
                found[name] = factor.shape[-2], whole.reshape(-1, N, N)
            else:
                found[name] = None, parts[0].reshape(-1, N, N)
    return found


def check_same(one, other, rtol=2e-6, ranks=(), atol=4e-6):
    """Two outputs hold the same means and matrices; the first of these ranks."""
    means = [tiny.read(f"{file}.safetensors") for file in (one, other)]
    for name, mean in means[0].items():
        np.testing.assert_allclose(mean, means[1][name], rtol=1e-4, atol=atol)
    found, expected = (precisions_in(f"{file}.safetensors") for file in (one, other))
    assert found.keys() == expected.keys()
    for name, (rank, whole) in found.items():
        assert rank in ranks
        size = abs(expected[name][1]).max()
        np.testing.assert_allclose(whole, expected[name][1], atol=rtol * size)


@pytest.mark.parametrize("prior", [0.0, 2.0])
@pytest.mark.parametrize("anchor", ["h0", "none"])
def test_a_merge_is_that_of_the_matrices_in_full(world, anchor, prior):
    make(prior=prior)
    low, full = (
        merge(folder, "a", "b", scale=(1.0, 0.5), anchor=anchor) for folder in ("low", "full")
    )
    for one, other in zip(low.predicted[1:], full.predicted[1:], strict=True):
        assert one.distance == pytest.approx(other.distance, rel=1e-5)
    assert low.predicted[1].distance > 0
    check_same("low/out", "full/out", ranks=[3 * RANK])


@pytest.mark.parametrize("settings", [{}, {"method": "regmean"}], ids=str)
def test_so_is_an_average(world, settings):
    for folder in ("low", "full"):
        merge(folder, "a", "b", base=None, scale=(1.0, 0.5), **settings)
    if settings:
        means = [tiny.read(f"{folder}/out.safetensors") for folder in ("low", "full")]
        for name, mean in means[0].items():
            np.testing.assert_allclose(mean, means[1][name], atol=1e-6)
    else:
        check_same("low/out", "full/out", ranks=[2 * RANK])


@pytest.mark.parametrize("prior", [0.0, 2.0])
def test_a_merge_merges_again_and_is_undone(world, prior):
    make(rank=1, prior=prior)
    merge("low", "a", "b", scale=(1.0, 0.7), out="ab")
    merge("low", "ab", "c", scale=(1.0, 0.3), out="chain")
    merge("low", "a", "b", "c", scale=(1.0, 0.7, 0.3), out="once")
    merge("low", "ab", "c", scale=(1.5, 0.3), out="more")
    undone = merge("low", "chain", "b", scale=(1.0, -0.7), out="undone")
    merge("low", "a", "c", scale=(1.0, 0.3), out="rest")
    merge("low", "a", "b", "c", scale=(1.5, 1.05, 0.3), out="once more")
    assert undone.guarded_share == 0
    check_same("low/chain", "low/once", ranks=[5])  # the base's is in the merge, too
    check_same("low/more", "low/once more", ranks=[5])
    check_same("low/undone", "low/rest", 1e-4, ranks=[None], atol=3e-5)


# What a chain takes from a merge, its base or a prior, is far more than what it leaves: of a base
# that counts much, in an expert that no text of a task reached, or of a task with a small scale.
ROUNDED = {
    "a base that counts 30 times": ({}, "30x", 1.0),
    "and an expert without data": ({"prior": 0.7, "without_data": (1, 2)}, "30x", 1.0),
    "and no model with data for it": ({"prior": 0.01, "without_data": (0, 1, 2, 3)}, "30x", 1.0),
    "a task at a hundredth": ({}, "1x", 0.01),
}


@pytest.mark.parametrize("kind", ROUNDED)
def test_what_rounding_leaves_of_large_precisions_is_not_negative(tmp_path, monkeypatch, kind):
    of_models, base, scale = ROUNDED[kind]
    monkeypatch.chdir(tmp_path)
    make(rank=1, **of_models)
    counted = {"observations": {"BASE": base}}
    merge("low", "a", scale=(scale,), out="one", **counted)
    merge("low", "one", scale=(0.5,), out="two", **counted)
    merge("low", "two", "c", scale=(1.0, 0.3), out="chain", **counted)
    for folder in ("low", "full"):
        merge(folder, "a", "c", scale=(0.5 * scale, 0.3), out="once", **counted)
    check_same("low/chain", "low/once", ranks=[5], atol=1e-5)  # rank 3, and the base in each link
    check_same("low/once", "full/once", ranks=[3])


def test_a_removal_is_that_of_the_matrices_in_full(world):
    reports = [merge(folder, "a", scale=(-1.0,), guard=0.2) for folder in ("low", "full")]
    assert reports[0].guarded_share == reports[1].guarded_share > 0
    assert reports[0].largest_multiplier == pytest.approx(reports[1].largest_multiplier)
    check_same("low/out", "full/out", ranks=[None])
    assert any("made matrices in full: a task is removed" in note for note in reports[0].notes)


def test_ranks_that_add_up_to_half_of_the_inputs_are_matrices_in_full(world):
    make(rank=4)
    reports = [merge(folder, "a", "b", scale=(1.0, 0.5)) for folder in ("low", "full")]
    check_same("low/out", "full/out", ranks=[None])
    why = "in full: their ranks add up to half of the inputs"
    assert [any(why in note for note in report.notes) for report in reports] == [True, False]
    merge("low", "a", scale=(1.0,), out="one")
    assert precisions_in("low/one.safetensors")[RIGHT][0] == 8


def test_a_model_for_which_the_base_stands_in_adds_no_rank(world):
    merge("low", "a", "b", scale=(0.0, 0.5), out="nothing of a")
    merge("low", "b", scale=(0.5,), out="b alone")
    check_same("low/nothing of a", "low/b alone", ranks=[2 * RANK])


def test_they_go_with_matrices_in_full(world):
    merge("full", "a", "b", scale=(1.0, 0.5))
    mixed = merge("low", "full/a.safetensors", "b", scale=(1.0, 0.5))
    assert any("in full: a model's are in full" in note for note in mixed.notes)
    check_same("low/out", "full/out", ranks=[None])


def test_they_do_not_go_with_other_blocks(world):
    for file in Path("full").glob("b.*"):
        file.unlink()
    halves = np.stack([np.eye(N // 2, dtype=np.float32)] * 2)
    precision = {n: in_full(p) for n, p in low_ranks(2).items()} | {RIGHT: Matrices(halves)}
    mean = tiny.arrays(2, SHAPES, spread=0.1)
    tiny.posterior("full/b.safetensors", mean, precision, estimator="inputs")
    with pytest.raises(PrecisionError, match=r"1 of 24 x 24.*2 of 12 x 12.*--blocks 1 -o OTHER"):
        merge("low", "a", "full/b.safetensors")


def test_one_number_for_the_base_is_that_number_in_every_direction(world):
    for folder in ("low", "full"):
        merge(folder, "a", isotropic={f"{folder}/base.safetensors": 3.0})
    check_same("low/out", "full/out", ranks=[RANK])


def test_a_tensor_that_is_left_alone_keeps_its_factor(world):
    merge("low", "a", only="wte")
    before, after = (precisions_in(f"low/{n}.safetensors") for n in ("base", "out"))
    for name in LAYERS:
        assert after[name][0] == RANK
        np.testing.assert_array_equal(after[name][1], before[name][1])


@pytest.mark.parametrize(("tasks", "removes"), [(1, False), (3, False), (1, True)])
def test_what_a_layer_takes_is_what_the_plan_says(world, tasks, removes):
    n, outputs, rank = (120, 40, 16) if removes else (600, 40, 16)
    shapes = {RIGHT: (outputs, n), "h.0.ln.bias": (2,)}
    for i in range(1 + tasks):
        factor = np.random.default_rng(i).normal(size=(rank, n)).astype(np.float32)
        precision = {RIGHT: LowRank(np.ones(n, np.float32), factor), "h.0.ln.bias": np.ones(2)}
        tiny.posterior(f"m{i}.safetensors", tiny.arrays(i, shapes), precision, estimator="inputs")
    settings = {"weights": "precision", "base": "m0.safetensors", "out": "out.safetensors"}
    settings["scale"] = (-1.0 if removes else 1.0,)
    models = [f"m{i}.safetensors" for i in range(1, 1 + tasks)]
    with plan_merge(MergeConfig(models=models, **settings)) as plan:
        said = float(re.search(r"about ([\d.]+) MB", " ".join(plan.notes))[1])
        (step,) = (step for step in plan.steps if step.axis is not None)
        numbers = numbers_of(plan, step, Removal(0.2), np.float64)
        tracemalloc.start()
        merge_matrices(plan, step, read_layer(plan, step), numbers, Tally(1 + tasks))
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    assert 0.5 * said < peak < 1.1 * said
    assert removes or peak < 8 * (1 + tasks) * n * n / 1e6  # less than the matrices alone


def test_what_a_preview_keeps_at_one_sign_is_merged_in_full_at_the_other(world):
    """A plan of another sign takes what was read for the first one."""
    models, held = ["low/a.safetensors", "low/b.safetensors"], Held()
    settings = {"weights": "precision", "base": "low/base.safetensors", "out": "out.safetensors"}
    for scale in (1.0, -1.0):
        with plan_merge(MergeConfig(models=models, scale=(1.0, scale), **settings)) as plan:
            step = next(step for step in plan.steps if step.name == RIGHT)
            numbers = numbers_of(plan, step, Removal(0.2), np.float64)
            found = [
                merge_matrices(plan, step, layer, numbers, Tally(3))
                for layer in (held.layer(plan, step), read_layer(plan, step))
            ]
        assert bytes(found[0].mean) == bytes(found[1].mean)
        np.testing.assert_array_equal(found[0].precision, found[1].precision)
        assert len(found[0].precision) == (N * N if scale < 0 else N * (1 + 3 * RANK))
    assert held.nbytes < 8 * (3 * 5 * N + 3 * N * (RANK + 1)) + 1


def edited(file, change):
    """Write a file of precisions again, its tensors changed in place."""
    with safe_open(file, "np") as stored:
        tensors = {n: stored.get_tensor(n) for n in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    change(tensors)
    save_file(tensors, file, metadata)


def test_a_matrix_in_full_that_is_too_large_for_its_file_is_refused(world):
    def enlarge(tensors):
        tensors[f"right:{RIGHT}"] *= np.float32(1e20)

    for name in ("base", "a"):
        edited(f"low/{name}.posterior", enlarge)
    merge("low", "a", scale=(0.5,), out="fits")
    with pytest.raises(CheckpointError, match=f"'{RIGHT}': the precision of the merge .* fit F32"):
        merge("low", "a", scale=(-0.5,))
    assert not list(Path("low").glob("out*"))


BAD = {
    "a negative diagonal": ("diagonal", lambda d: -d, "finite symmetric matrix without negative"),
    "no number": ("right", lambda u: u * np.nan, "finite symmetric matrix without negative"),
    "another size": (
        "diagonal",
        lambda d: d[:-1],
        r"h.0.attn.weight.*\[23\] .*expected F32 \[\.\.\., n\]",
    ),
    "no factor": ("right", None, "needs one factor, right: or left:, and has 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_precision_is_refused(world, kind):
    role, change, message = BAD[kind]

    def spoil(tensors):
        found = tensors.pop(f"{role}:{RIGHT}")
        if change is not None:
            tensors[f"{role}:{RIGHT}"] = change(found)

    edited("low/a.posterior", spoil)
    with pytest.raises(PrecisionError, match=message):
        merge("low", "a", "b")
    assert not list(Path("low").glob("out*"))


@pytest.mark.parametrize("shape", [(1 + RANK, N, 1, 1, 1), (1, N, N)])
def test_numbers_with_the_shape_of_matrices_are_neither_merged_nor_counted(world, shape):
    def spoil(tensors):
        del tensors[f"diagonal:{RIGHT}"], tensors[f"right:{RIGHT}"]
        tensors[f"precision:{RIGHT}"] = np.ones(shape, np.float32)

    edited("low/a.posterior", spoil)
    with pytest.raises(PrecisionError, match=rf"'{RIGHT}' in low/a\.posterior is F32 .*expected"):
        merge("low", "a", "b")
    found = run_inspect("low/a.safetensors").precision
    assert found.unknown == (RIGHT,)
    assert (found.matrices, found.covered < 1) == (2, True)


def test_they_are_shown_and_pushed_as_they_are(world):
    report = run_inspect("low/a.safetensors")
    assert (report.precision.matrices, report.precision.covered, report.precision.bad) == (3, 1, 0)
    (layer,) = [layer for layer in report.layers if layer.name == "h.0"]
    diagonals = [
        np.diagonal(m, axis1=1, axis2=2) for _, m in precisions_in("low/a.safetensors").values()
    ]
    largest = max(d.max() for d in diagonals)
    assert layer.precision.quantiles[-1] == pytest.approx(largest, rel=1e-6)
    with open_posterior("low/a.safetensors") as opened:
        Path("pushed").mkdir()
        write_pooled(opened.precision, opened.info, Path("pushed"), "row")
        assert opened.precision.numbers(RIGHT) == N * (RANK + 1)
    after = tiny.read_precision("low/a.safetensors", "pushed")
    before = tiny.read_precision("low/a.safetensors")
    for name in LAYERS:
        np.testing.assert_array_equal(after[name], before[name])
