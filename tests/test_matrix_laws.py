"""What must be true of every rule for whole matrices, on random layers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.methods import METHODS, ace
from tests import tiny
from tests.facts import facts_of
from tests.reference import methods as twin

OUTPUTS, INPUTS = 7, 9
ALL = sorted(n for n, m in METHODS.items() if m.matrix is not None)
BY_PRECISION = [n for n in ALL if METHODS[n].needs_precision]
WITH_BASE = [n for n in ALL if METHODS[n].needs_base]

# Which laws bind whom.
IDENTITY = ["gradient_matching", "precision_average", "regmean", "tsv_m"]
ROTATED = ["gradient_matching", "iso_c", "precision_average", "tsv_m"]  # inputs and outputs alike
SPECTRAL = [n for n in ALL if not METHODS[n].needs_precision]  # of task vectors, without data


def covariance(rng, size=INPUTS):
    inputs = rng.normal(size=(3 * size, size))
    return inputs.T @ inputs / size


def problem(tasks=3, seed=0, shape=(OUTPUTS, INPUTS)):
    rng = np.random.default_rng(seed)
    base = Gaussian(rng.normal(size=shape), covariance(rng, shape[1]))
    return base, [
        Gaussian(rng.normal(size=shape), base.precision + covariance(rng, shape[1]))
        for _ in range(tasks)
    ]


def merge(name, base, tasks, scales, guard=1e-9, **given):
    method = METHODS[name]
    facts = facts_of(method, len(tasks), guard=guard, **given)
    return method.matrix(
        base if method.needs_base else None, tuple(tasks), tuple(map(np.float64, scales)), facts
    )


def same(one, other, rtol=1e-9):
    np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-10)


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


@pytest.mark.parametrize("name", IDENTITY)
def test_one_task_at_scale_one_gives_back_that_task(name):
    base, (task,) = problem(1)
    same(merge(name, base, [task], [1.0]).mean, task.mean)


@pytest.mark.parametrize("name", WITH_BASE)
def test_zero_scales_give_back_the_base(name):
    base, tasks = problem()
    merged = merge(name, base, tasks, [0.0] * 3)
    np.testing.assert_array_equal(merged.mean, base.mean)
    np.testing.assert_array_equal(merged.precision, base.precision)


@pytest.mark.parametrize("name", ALL)
@given(order=st.permutations(range(3)), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_the_order_of_tasks_does_not_matter(name, order, seed):
    base, tasks = problem(seed=seed)
    scales = [0.5, 1.0, 0.2]
    shuffled = merge(name, base, [tasks[i] for i in order], [scales[i] for i in order])
    same(merge(name, base, tasks, scales).mean, shuffled.mean, rtol=1e-7)


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_a_rotation_of_inputs_and_outputs_commutes_with_the_merge(name, shape):
    base, tasks = problem(shape=shape)
    left, right = rotation(shape[0], 1), rotation(shape[1], 2)
    rotated = [
        Gaussian(left @ g.mean @ right, right.T @ g.precision @ right) for g in (base, *tasks)
    ]
    scales = [1.0, 0.5, 0.25]
    merged = merge(name, rotated[0], rotated[1:], scales).mean
    same(merged, left @ merge(name, base, tasks, scales).mean @ right)


@pytest.mark.parametrize("name", ["gradient_matching", "precision_average"])
def test_numbers_times_the_identity_are_those_numbers_for_every_entry(name):
    base, tasks = problem()
    numbers, scales = [2.0, 3.0, 5.0, 2.5], (1.0, 0.5, 0.25)
    one = np.eye(INPUTS)
    matrices = [Gaussian(g.mean, x * one) for g, x in zip((base, *tasks), numbers, strict=True)]
    entries = [
        Gaussian(g.mean, np.full_like(g.mean, x)) for g, x in zip(matrices, numbers, strict=True)
    ]
    method = METHODS[name]
    expected = method.combine(
        entries[0] if method.needs_base else None,
        tuple(entries[1:]),
        scales,
        facts_of(method, 3, guard=1e-9),
    )
    merged = merge(name, matrices[0], matrices[1:], scales)
    same(merged.mean, expected.mean)
    same(merged.precision, expected.precision[0, 0] * one)


@pytest.mark.parametrize("name", BY_PRECISION)
def test_a_common_factor_on_all_precisions_leaves_the_mean_alone(name):
    base, tasks = problem()
    scaled = [Gaussian(g.mean, 1e3 * g.precision) for g in (base, *tasks)]
    scales = [1.0, 0.4, 0.3]
    after = merge(name, scaled[0], scaled[1:], scales).mean
    same(after, merge(name, base, tasks, scales).mean)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_a_common_factor_on_all_scales_multiplies_the_change(name, factor):
    base, tasks = problem()
    once, more = (merge(name, base, tasks, [f * 1.0, f * 0.5, f * 0.7]) for f in (1.0, factor))
    same(more.mean - base.mean, factor * (once.mean - base.mean), rtol=1e-7)


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_task_of_scale_zero_does_not_count(name):
    base, tasks = problem()
    without = merge(name, base, tasks[:2], [1.0, 0.5])
    np.testing.assert_array_equal(merge(name, base, tasks, [1.0, 0.5, 0.0]).mean, without.mean)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_a_method_for_matrices_is_its_twin(name, shape):
    base, tasks = problem(shape=shape)
    scales = (0.7, -0.4, 2.0)
    expected = getattr(twin, name)(
        {"x": base.mean}, [{"x": t.mean} for t in tasks], scales, layers=["x"]
    )
    same(merge(name, base, tasks, scales).mean, expected["x"], rtol=1e-7)


def uneven(base, tasks):
    """The tasks with changes of sizes 0.2, 1 and 10."""
    changes = [t.mean - base.mean for t in tasks]
    return [
        Gaussian(base.mean + factor * d / np.linalg.norm(d), None)
        for factor, d in zip((0.2, 1.0, 10.0), changes, strict=True)
    ]


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
@pytest.mark.parametrize("settings", [{}, {"epsilon": 1e-3, "threshold": 1.0, "share": 0.5}])
def test_ace_is_its_twin_where_changes_differ_in_size(shape, settings):
    base, tasks = problem(shape=shape)
    tasks, scales = uneven(base, tasks), (0.7, -0.4, 2.0)
    expected, even = (
        twin.ace({"x": base.mean}, [{"x": t.mean} for t in tasks], scales, layers=["x"], **given)
        for given in (settings, settings | {"threshold": 99})
    )
    merged = merge("ace", base, tasks, scales, **settings).mean
    same(merged, expected["x"], rtol=1e-7)
    assert abs(merged - even["x"]).max() > 0.01


def test_ace_brings_changes_to_one_size_from_the_threshold_on():
    base, tasks = problem()
    tasks = uneven(base, tasks)
    logs = np.log([np.sum((t.mean - base.mean) ** 2) for t in tasks])
    gamma = np.var(logs, ddof=1) / np.mean(logs) ** 2
    merged = {
        x: merge("ace", base, tasks, [1.0] * 3, threshold=x).mean
        for x in (0.0, 0.999 * gamma, 1.001 * gamma, 1e9)
    }
    uneven_below, below, above, even = merged.values()
    same(below, uneven_below)
    same(above, even)
    assert abs(below - above).max() > 0.01


def test_ace_with_much_epsilon_is_the_mean_of_the_centred_changes():
    base, tasks = problem()
    merged = merge("ace", base, tasks, [1.0, 0.5, -0.3], epsilon=1e9).mean
    changes = [t.mean - base.mean for t in tasks]
    centred = [d - d.mean(axis=0) for d in changes]
    mean = (centred[0] + 0.5 * centred[1] - 0.3 * centred[2]) / 3
    np.testing.assert_allclose(merged - base.mean, mean, atol=1e-6)


def test_ace_refuses_to_strengthen_beyond_all_changes():
    rng = np.random.default_rng(0)
    base, changes = rng.normal(size=(6, 4)), rng.normal(size=(2, 6, 4))
    tasks = [Gaussian(base + size * d, None) for size, d in zip((0.1, 1e-7), changes, strict=True)]
    with pytest.raises(ArithmeticError, match=r"epsilon=0\.01"):
        ace.ace(Gaussian(base, None), tasks, (0.5, 0.5), ace.Estimate(0.01, 0.3, 0.3))
    merged = ace.ace(Gaussian(base, None), tasks, (0.5, 0.5), ace.Estimate(0.01, 1e9, 0.3))
    assert abs(merged.mean - base).max() < 0.5


def test_ace_counts_no_task_that_leaves_a_layer_as_it_was():
    base, tasks = problem()
    without = merge("ace", base, tasks, [1.0] * 3).mean
    same(merge("ace", base, [*tasks, base], [1.0] * 4).mean, without)
    same(merge("ace", base, [base, base], [1.0, 1.0]).mean, base.mean)
    single, heads = problem(2, shape=(1, INPUTS))  # of one output, whose mean is itself
    same(merge("ace", single, heads, [1.0, 1.0]).mean, (heads[0].mean + heads[1].mean) / 2)


def test_ace_takes_each_direction_of_the_inputs_from_the_task_that_changed_it():
    rng = np.random.default_rng(5)
    base = Gaussian(np.zeros((60, 6)), None)
    tasks = [Gaussian(np.zeros((60, 6)), None) for _ in range(2)]
    for t, task in enumerate(tasks):
        task.mean[:, 3 * t : 3 * t + 3] = rng.normal(size=(60, 3))
        task.mean[:] -= task.mean.mean(axis=0)
    merged = merge("ace", base, tasks, [1.0, 1.0], epsilon=1e-9).mean
    added = tasks[0].mean + tasks[1].mean
    closeness = np.vdot(merged, added) / np.linalg.norm(merged) / np.linalg.norm(added)
    assert closeness > 0.98
    assert np.linalg.norm(merged) / np.linalg.norm(added) > 0.85  # an average has half


@pytest.mark.parametrize("alpha", [0.9, 0.1])
def test_regmean_is_its_twin(alpha):
    base, tasks = problem()
    scales = (0.7, 0.4, 2.0)
    means, grams = ([{"x": g[i]} for g in tasks] for i in range(2))
    expected = twin.regmean(means, grams, scales, alpha, layers=["x"])
    same(merge("regmean", base, tasks, scales, alpha=alpha).mean, expected["x"], rtol=1e-7)


def test_regmean_makes_the_outputs_nearest_to_those_of_all_models():
    rng = np.random.default_rng(3)
    layers, inputs = rng.normal(size=(2, 4, 5)), rng.normal(size=(2, 5, 40))
    tasks = [Gaussian(w, x @ x.T) for w, x in zip(layers, inputs, strict=True)]
    merged = merge("regmean", None, tasks, [1.0, 1.0], alpha=1.0).mean
    wanted = np.hstack([w @ x for w, x in zip(layers, inputs, strict=True)])
    same(merged, np.linalg.lstsq(np.hstack(inputs).T, wanted.T)[0].T)
    same(merged, merge("precision_average", None, tasks, [1.0, 1.0]).mean)
    apart = merge("regmean", None, tasks, [1.0, 1.0], alpha=0.0).mean  # every input by itself
    powers = [np.sum(x**2, axis=1) for x in inputs]
    alone = sum(w * p for w, p in zip(layers, powers, strict=True)) / sum(powers)
    same(apart, alone)


def test_tsv_m_keeps_an_equal_share_of_directions_and_every_singular_value():
    base, tasks = problem()
    change = merge("tsv_m", base, tasks, [1.0] * 3).mean - base.mean
    found = np.linalg.svd(change)[1]
    largest = [np.linalg.svd(t.mean - base.mean)[1][:2] for t in tasks]  # 7 // 3 of each
    same(found[:6], np.sort(np.ravel(largest))[::-1])
    assert found[6] < 1e-12


def test_tsv_m_of_equal_or_of_low_rank_changes_takes_no_direction_at_random():
    base, (task, *_) = problem()
    left, values, right = np.linalg.svd(task.mean - base.mean, full_matrices=False)
    twice = merge("tsv_m", base, [task, task], [1.0, 1.0]).mean
    same(twice - base.mean, (left[:, :3] * values[:3]) @ right[:3])
    flat = Gaussian(base.mean + values[0] * np.outer(left[:, 0], right[0]), task.precision)
    unchanged = merge("tsv_m", base, [flat, base], [1.0, 1.0]).mean
    same(unchanged, flat.mean)


def test_tsv_m_gives_each_of_many_tasks_one_direction_of_a_narrow_layer():
    base, tasks = problem(5, shape=(2, INPUTS))
    change = merge("tsv_m", base, tasks, [1.0] * 5).mean - base.mean
    assert np.linalg.matrix_rank(change) == 2


def test_iso_c_spreads_the_singular_values_of_the_sum_evenly():
    base, tasks = problem()
    added = sum(t.mean - base.mean for t in tasks)
    change = merge("iso_c", base, tasks, [1.0] * 3).mean - base.mean
    values = np.linalg.svd(added)[1]
    same(np.linalg.svd(change)[1], np.full(OUTPUTS, values.mean()))
    assert np.sum(change * added) > 0  # the directions are those of the sum
    one = merge("iso_c", base, tasks[:1], [1.0]).mean
    assert abs(one - tasks[0].mean).max() > 0.1


def test_iso_c_changes_no_direction_that_no_task_changed():
    base, (task, *_) = problem()
    left, values, right = np.linalg.svd(task.mean - base.mean, full_matrices=False)
    flat = Gaussian(base.mean + (left[:, :2] * values[:2]) @ right[:2], task.precision)
    change = merge("iso_c", base, [flat], [1.0]).mean - base.mean
    same(change, values[:2].mean() * left[:, :2] @ right[:2])


# Through the engine

SHAPES = {
    "wte.weight": (8, 6),
    "h.0.attn.weight": (7, 9),
    "h.0.mlp.c_fc.weight": (6, 12),  # (inputs, outputs)
    "h.0.mlp.c_fc.bias": (12,),
    "h.0.ln.bias": (5,),
}
LAYERS = ("h.0.attn.weight", "h.0.mlp.c_fc.weight")


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    for i, name in enumerate(["base", "a", "b", "c"]):
        found[name] = tiny.arrays(i, SHAPES)
        tiny.posterior(f"{name}.safetensors", found[name], tiny.precisions(i, SHAPES))
    return found


def run(*names, **settings):
    files = [f"{n}.safetensors" for n in names]
    run_merge(MergeConfig(models=files, base="base.safetensors", out="out.safetensors", **settings))
    return tiny.read("out.safetensors")


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_merge_by_matrices_is_the_twins_for_every_tensor(models, name):
    scales = (1.0, 0.5, -0.3)
    merged = run("a", "b", "c", method=name, scale=scales)
    base, *tasks = (turned(models[n]) for n in ("base", *"abc"))
    merged = turned(merged)
    expected = getattr(twin, name)(base, tasks, scales, layers=LAYERS)
    for tensor, values in merged.items():
        np.testing.assert_allclose(values, expected[tensor], rtol=2e-5, atol=2e-6)
    elsewhere = getattr(twin, name)(base, tasks, scales)
    assert abs(merged[LAYERS[0]] - elsewhere[LAYERS[0]]).max() > 0.01


def turned(tensors):
    """The weights of all layers as (outputs, inputs)."""
    return {n: v.T if n == "h.0.mlp.c_fc.weight" else v for n, v in tensors.items()}


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_merge_without_a_linear_layer_is_refused(models, name):
    with pytest.raises(ConfigError, match=rf"--method {name} merges.*'h.0.ln.bias'.*task_arith"):
        run("a", "b", method=name, only="wte|bias")
