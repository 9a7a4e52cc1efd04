"""What must be true of every merge, over all methods, on random Gaussians."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bayes.gaussian import Gaussian, rebase
from mergekit_bayes.methods import METHODS, choose
from tests.facts import facts_of
from tests.reference import merging
from tests.tiny import gaussians

ALL = sorted(n for n, m in METHODS.items() if m.tensor is None)
IDLE = 1e-9  # a guard that never acts on additions

# Which laws bind whom. Fewer bind a rule that weighs by the whole tensor, by signs or by chance.
# At full density; a change times a weight below one is not the whole change.
# What one task uses is no consensus.
IDENTITY = [n for n in ALL if n not in ("slerp", "fisher_negation", "consensus")]
WITH_BASE = [n for n in ALL if METHODS[n].needs_base]  # nothing added is nothing changed
LINEAR = [
    "gradient_matching",
    "task_arithmetic",
    "fisher_negation",
    "dare_linear",
    "consensus",
    "ace",
    "iso_c",
    "tsv_m",
]  # in natural parameters, in weights, at full density
SYMMETRIC = [
    n for n in ALL if n not in ("fisher", "slerp")
]  # Fisher's floor is the first model's, the arc has a start
CLOSED = [n for n in ALL if METHODS[n].can_be_undone]


def merge(name, base, tasks, scales, guard=IDLE, draws=None):
    method = METHODS[name]
    facts = facts_of(method, len(tasks), guard=guard, density=1.0)
    extra = (draws or (base.mean * 0,) * len(tasks),) if method.random else ()
    return method.combine(
        base if method.needs_base else None, tuple(tasks), tuple(scales), facts, *extra
    )


def problem(tasks=3, seed=0):
    (base,) = gaussians(1, seed=seed)
    return base, gaussians(tasks, seed=seed + 1, above=base)


def same(a, b, name, rtol=1e-10):
    np.testing.assert_allclose(a.mean, b.mean, rtol=rtol, atol=1e-12)
    if METHODS[name].writes_posterior:
        np.testing.assert_allclose(a.precision, b.precision, rtol=rtol)


@pytest.mark.parametrize("name", IDENTITY)
def test_one_task_at_scale_one_gives_back_that_task(name):
    base, (task,) = problem(1)
    same(merge(name, base, [task], [1.0]), task, name)


@pytest.mark.parametrize("name", LINEAR)
@given(seed=st.integers(0, 99), factor=st.floats(0.1, 3))
@settings(max_examples=20, deadline=None)
def test_the_pull_of_a_task_is_in_proportion_to_its_scale(name, seed, factor):
    base, tasks = problem(2, seed=seed)
    once, more = (merge(name, base, tasks, [s * 0.3, s * 0.2]) for s in (1.0, factor))
    weight = [g.precision if name == "gradient_matching" else 1.0 for g in (once, more)]
    pulls = [w * (g.mean - base.mean) for w, g in zip(weight, (once, more), strict=True)]
    np.testing.assert_allclose(pulls[1], factor * pulls[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WITH_BASE)
def test_zero_scales_give_back_the_base(name):
    base, tasks = problem()
    merged = merge(name, base, tasks, [0.0] * 3)
    np.testing.assert_array_equal(merged.mean, base.mean)
    np.testing.assert_array_equal(merged.precision, base.precision)


@pytest.mark.parametrize("name", SYMMETRIC)
@given(order=st.permutations(range(3)), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_order_of_tasks_does_not_matter(name, order, seed):
    base, tasks = problem(seed=seed)
    scales = [0.5, 1.0, 0.2]
    shuffled = merge(name, base, [tasks[i] for i in order], [scales[i] for i in order])
    same(merge(name, base, tasks, scales), shuffled, name)


@pytest.mark.parametrize("name", CLOSED)
def test_removing_what_was_added_gives_back_the_rest(name):
    base, tasks = problem()
    all_three = merge(name, base, tasks, [1.0, 0.7, 0.3])
    rest = merge(name, base, [tasks[0], tasks[2]], [1.0, 0.3])
    same(merge(name, base, [all_three, tasks[1]], [1.0, -0.7]), rest, name)


@pytest.mark.parametrize("name", CLOSED)
def test_adding_one_by_one_equals_adding_together(name):
    base, tasks = problem()
    two = merge(name, base, tasks[:2], [1.0, 0.7])
    same(
        merge(name, base, [two, tasks[2]], [1.0, 0.3]),
        merge(name, base, tasks, [1.0, 0.7, 0.3]),
        name,
    )


@pytest.mark.parametrize("name", ALL)
def test_a_slice_of_the_merge_is_the_merge_of_slices(name):
    base, tasks = problem()
    whole = merge(name, base, tasks, [1.0, 0.5, 0.25])
    part = merge(
        name,
        Gaussian(base.mean[7:20], base.precision[7:20]),
        [Gaussian(t.mean[7:20], t.precision[7:20]) for t in tasks],
        [1.0, 0.5, 0.25],
    )
    np.testing.assert_array_equal(part.mean, whole.mean[7:20])
    np.testing.assert_array_equal(
        np.broadcast_to(part.precision, 13), np.broadcast_to(whole.precision, 50)[7:20]
    )


def test_precisions_equal_to_the_bases_reduce_to_task_arithmetic():
    base, tasks = problem()
    equal = [Gaussian(t.mean, base.precision) for t in tasks]
    scales = [1.0, -0.5, 0.3]
    expected = merge("task_arithmetic", base, tasks, scales)
    same(merge("gradient_matching", base, equal, scales), expected, "task_arithmetic")


@pytest.mark.parametrize(
    ("free", "based"), [("average", "task_arithmetic"), ("precision_average", "gradient_matching")]
)
def test_scales_that_sum_to_one_make_the_base_irrelevant(free, based):
    base, tasks = problem()
    scales = [0.5, 0.3, 0.2]
    same(merge(free, None, tasks, scales), merge(based, base, tasks, scales), based)


@given(seed=st.integers(0, 999), factor=st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_a_common_factor_on_all_precisions_leaves_the_mean_alone(seed, factor):
    base, tasks = problem(seed=seed)
    scaled = [Gaussian(g.mean, g.precision * factor) for g in (base, *tasks)]
    before = merge("gradient_matching", base, tasks, [1.0, 0.4, -0.1])
    after = merge("gradient_matching", scaled[0], scaled[1:], [1.0, 0.4, -0.1])
    np.testing.assert_allclose(after.mean, before.mean, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 999), scales=st.tuples(*[st.floats(0, 3)] * 3))
@settings(max_examples=50, deadline=None)
def test_adding_never_lowers_the_precision(seed, scales):
    base, tasks = problem(seed=seed)
    merged = merge("gradient_matching", base, tasks, scales, guard=0.2)
    assert (merged.precision >= base.precision * (1 - 1e-12)).all()


@given(seed=st.integers(0, 999), scale=st.floats(0.05, 1), guard=st.floats(0.05, 1))
@settings(max_examples=50, deadline=None)
def test_the_guard_bounds_a_removal(seed, scale, guard):
    base, (task,) = problem(1, seed=seed)
    merged = merge("gradient_matching", base, [task], [-scale], guard)
    multiplier = (base.mean - merged.mean) / (task.mean - base.mean)
    assert (merged.precision > 0).all()
    assert (multiplier >= scale * (1 - 1e-9)).all()
    assert (multiplier <= (1 / guard) * (1 + 1e-9)).all()


@given(seed=st.integers(0, 99), scale=st.floats(-2, 2), factor=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_fisher_negation_is_task_arithmetic_with_tasks_trained_without_a_pull(seed, scale, factor):
    base, tasks = problem(2, seed=seed)
    merged = merge("fisher_negation", base, tasks, [scale, 1.0])
    rebased = [rebase(base, t.mean, t.precision - base.precision, 0.0, 0.0) for t in tasks]
    expected = merge("task_arithmetic", base, rebased, [scale, 1.0])
    same(merged, Gaussian(expected.mean, base.precision), "fisher_negation")
    counted = [Gaussian(g.mean, g.precision * factor) for g in (base, *tasks)]
    again = merge("fisher_negation", counted[0], counted[1:], [scale, 1.0])
    np.testing.assert_allclose(again.mean, merged.mean, rtol=1e-9, atol=1e-9)  # a common count


def test_fisher_negation_moves_an_entry_by_the_share_of_curvature_that_is_the_tasks():
    ones, task = np.ones(4), np.full(4, 3.0)
    base = Gaussian(ones, np.array([2.0, 2.0, 2.0, 1e-12]))
    gains = np.array([0.0, 2.0, 6.0, 1.0])
    merged = merge("fisher_negation", base, [Gaussian(task, base.precision + gains)], [-1.0])
    np.testing.assert_allclose(merged.mean, ones - [0.0, 1.0, 1.5, 2.0], atol=1e-11)
    removed = merge("fisher_negation", base, [Gaussian(task, base.precision * 0.5)], [-1.0])
    np.testing.assert_array_equal(removed.mean, ones)  # of a merge that is a removal: no share
    no_precision = merge("fisher_negation", base, [Gaussian(task, 0 * ones - 5)], [-1.0])
    np.testing.assert_array_equal(no_precision.mean, ones)


@pytest.mark.parametrize("name", ["precision_average", "gradient_matching"])
def test_the_delta_form_equals_the_sum_of_natural_parameters(name):
    base, tasks = problem()
    scales = [0.5, 0.3, 0.2]
    mean, precision = merging.natural_sum(base[::-1], [t[::-1] for t in tasks], scales)
    same(merge(name, base, tasks, scales), Gaussian(mean, precision), name)


@pytest.mark.parametrize("name", ALL)
def test_methods_are_plain_arithmetic_and_accept_floats(name):
    base, tasks = problem()
    whole = merge(name, base, tasks, [1.0, 0.5, 0.25])
    one = merge(
        name,
        Gaussian(float(base.mean[3]), float(base.precision[3])),
        [Gaussian(float(t.mean[3]), float(t.precision[3])) for t in tasks],
        [1.0, 0.5, 0.25],
    )
    assert float(one.mean) == pytest.approx(float(whole.mean[3]), rel=1e-14)


def test_a_method_that_can_be_undone_can_be_merged_again_on_a_base():
    assert {n for n in ALL if METHODS[n].is_posterior and METHODS[n].needs_base} == set(CLOSED)
    assert {m.name for m in METHODS.values() if m.unguarded_precision is not None} == {
        "gradient_matching"
    }


def test_two_questions_choose_the_method():
    names = {
        (b, p): choose(with_base=b, by_precision=p).name
        for b in (False, True)
        for p in (False, True)
    }
    assert names == {
        (False, False): "average",
        (False, True): "precision_average",
        (True, False): "task_arithmetic",
        (True, True): "gradient_matching",
    }
