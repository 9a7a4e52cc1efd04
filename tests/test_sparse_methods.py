"""Rules that make task vectors sparse: laws, twins in float64, and numbers of mergekit's."""

from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.kernels.base import keyed_draws, task_key
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.methods import METHODS, arcee_fusion, settings_of, sparsifying
from mergekit_bayes.methods.base import FactInputs
from mergekit_bayes.methods.measuring import combine_whole
from mergekit_bayes.methods.recipe_table import RECIPE_METHODS
from mergekit_bayes.methods.tensors import Tensors
from mergekit_bayes.posterior import open_posterior
from tests import tiny
from tests.reference import sparse_methods as twin
from tests.reference.tensor_methods import TENSOR_TWINS

RULES = {f"recipe {name}": RECIPE_METHODS[name] for name in twin.RECIPES} | {
    f"paper {name}": METHODS[name] for name in twin.PAPERS
}
TWINS = {f"recipe {n}": t for n, t in twin.RECIPES.items()} | {
    f"paper {n}": t for n, t in twin.PAPERS.items()
}
SHAPES = [(6, 9), (40,), (), (1,), (5, 1), (1, 7), (2, 3, 4)]

# At full density without an election, what is added is what all tasks changed, by weights.
LINEAR = [n for n in RULES if n.endswith(("task_arithmetic", "breadcrumbs", "_linear"))]
MANY = [n for n in RULES if "fusion" not in n]  # merge any number of tasks
ELECTED = [n for n in MANY if n not in LINEAR]
PLAIN = [n for n in MANY if not RULES[n].random]
RANDOM = [n for n in MANY if RULES[n].random]
WITH_WEIGHTS = [n for n in MANY if n.startswith("recipe") and not n.endswith("sce")]
FULL = {"density": 1.0, "epsilon": 0.0, "select_topk": 1.0}


def test_every_rule_for_tensors_has_a_twin_and_every_method_of_a_recipe():
    assert twin.RECIPES.keys() | TENSOR_TWINS.keys() == RECIPE_METHODS.keys()
    own = {n for n, m in METHODS.items() if m.tensor is not None and RECIPE_METHODS.get(n) is not m}
    assert own <= set(twin.PAPERS)


def dyadic(shape, seed, share=0.8, fine=64):
    """Numbers that float32 adds without rounding, many of them equal or zero."""
    rng = np.random.default_rng(seed)
    return np.round(rng.normal(size=shape) * fine / 8) / fine * (rng.random(shape) < share)


def problem(shape=(6, 9), tasks=3, seed=0, dtype=np.float64):
    base, *changes = (dyadic(shape, seed + k) for k in range(tasks + 1))
    return base.astype(dtype), [(base + change).astype(dtype) for change in changes]


def draws_of(shape, tasks, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.random(shape, np.float32) for _ in range(tasks)]


def combine(name, base, tasks, weights, given=None, draws=None):
    """The rule at its defaults, but for the settings given that it has."""
    method = RULES[name]
    names = {p.name: p.default for p in method.parameters}
    settings = names | {k: v for k, v in (given or {}).items() if k in names}
    draws = draws or draws_of(np.shape(base), len(tasks))
    chosen = draws.__getitem__ if method.random else None
    tensors = Tensors(base, tuple(tasks), tuple(weights), settings, None, chosen)
    return combine_whole(method.tensor, tensors)


def expected(name, base, tasks, weights, given=None, draws=None):
    names = {p.name: p.default for p in RULES[name].parameters}
    settings = names | {k: v for k, v in (given or {}).items() if k in names}
    draws = draws or draws_of(np.shape(base), len(tasks))
    return twin.merged(TWINS[name], twin.Problem(base, tasks, weights, settings, draws))


def taken(name, items):
    """As many of them as the rule takes tasks."""
    return list(items)[: RULES[name].tasks]


SPARSE = {
    "density": 0.5,
    "epsilon": 0.25,
    "gamma": 0.125,
    "select_topk": 0.4,
}
OTHER = {
    "density": 0.7,
    "epsilon": 0.2,
    "gamma": 0.5,
    "select_topk": 0.8,
    "normalize": 1,
    "rescale": 1,
    "lambda": 0.75,
}
APART = {
    "density": (0.25, 0.5, 0.9),
    "epsilon": (0.2, 0.1, 0.05),
    "gamma": (0.0, 0.3, 0.2),
    "normalize": 0,
    "rescale": 0,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_rule_is_its_twin_in_every_shape(name, dtype):
    cases = [({}, (1, 1, 1)), (SPARSE, (1, 0.5, -0.25)), (OTHER, (2, 0.5, 0.25))]
    if name.startswith("recipe"):
        cases += [(APART, (1, -1, 0.5)), (SPARSE, (0, 0, 0)), (OTHER, (1, 0, -1))]
    moved = 0
    for seed, shape in enumerate(SHAPES):
        base, tasks = problem(shape, seed=seed, dtype=dtype)
        for given, weights in cases:
            arguments = (name, base, taken(name, tasks), taken(name, weights), given)
            found = combine(*arguments)
            assert (found.dtype, found.shape) == (dtype, base.shape)
            rounding = {np.float64: 1e-12, np.float32: 1e-5}[dtype]
            np.testing.assert_allclose(found, expected(*arguments), rtol=rounding, atol=rounding)
            moved += np.count_nonzero(found != base)
    assert moved > 50


# What mergekit 0.1.5 made of these tensors, in float32. Of random rules with what they drew.
MERGEKIT = [
    (
        "task_arithmetic",
        {"normalize": 1, "lambda": 0.6},
        None,
        "-0.020899 0.870435 0.940315 0.037569 -0.615788 -1.056953 -0.356105 0.854445 0.929287 "
        "0.345094 -0.359120 -1.012479",
    ),
    (
        "ties",
        {},
        None,
        "0.090930 0.932401 0.800493 0.240181 -0.135763 -1.067729 -0.203160 1.646048 1.042266 "
        "0.412118 0.461292 -0.909811",
    ),
    (
        "ties",
        {"normalize": 0, "rescale": 1, "lambda": 0.6},
        None,
        "0.047617 0.755820 0.850989 0.093590 -0.644543 -1.042754 -0.316004 0.828123 0.963972 "
        "0.412118 -0.359367 -0.940111",
    ),
    (
        "dare_linear",
        {},
        ("010011101000", "010001010000", "110111011110"),
        "-0.096393 0.802927 0.909297 0.036107 -0.458516 -1.249667 -0.398013 0.864892 0.869637 "
        "0.380701 -0.446862 -0.999990",
    ),
    (
        "dare_ties",
        {"normalize": 1},
        ("010011101000", "010001010000", "110111011110"),
        "0.128524 0.303184 0.909297 0.281137 0.436342 -1.153378 -0.398013 0.377681 0.510471 "
        "0.454009 -0.673566 -0.999990",
    ),
    (
        "della",
        {},
        ("010011101000", "010001010000", "111101011110"),
        "0.122331 0.303184 0.762920 0.274390 -0.538127 -1.153378 -0.398013 0.391141 0.521283 "
        "0.451990 -0.667324 -0.999990",
    ),
    (
        "della_linear",
        {},
        ("010011101000", "010001010000", "111101011110"),
        "-0.091748 0.801500 1.019081 0.041168 -0.538127 -1.249712 -0.398013 0.854797 0.872339 "
        "0.382215 -0.451544 -0.999990",
    ),
    (
        "breadcrumbs",
        {},
        None,
        "-0.026124 0.953357 0.866467 0.113919 -0.601543 -1.067065 -0.336607 0.756047 0.949677 "
        "0.314792 -0.475282 -1.067624",
    ),
    (
        "breadcrumbs_ties",
        {"normalize": 1, "rescale": 1},
        None,
        "0.265245 1.547349 0.793072 -0.030364 0.246851 -1.126020 -0.145419 0.809119 1.082329 "
        "-0.205446 -0.705072 -0.841528",
    ),
    (
        "sce",
        {},
        None,
        "0.088559 0.770389 0.815966 0.240181 -0.679498 -1.005212 -0.219337 0.528144 1.042266 "
        "0.337020 -0.361432 -0.904345",
    ),
    (
        "sce",
        {"select_topk": 0.4},
        None,
        "0.000000 0.773476 0.816643 0.141120 -0.756802 -0.958924 -0.279415 0.523222 0.989358 "
        "0.412118 -0.361432 -0.999990",
    ),
]


def sines():
    i = np.arange(12.0)
    base = np.sin(i).astype("f4").reshape(3, 4)
    changes = [np.sin((t + 2) * i + t) / 10 * (1 + (i % 5 == t)) for t in range(3)]
    return base, [(base + change.reshape(3, 4)).astype("f4") for change in changes]


@pytest.mark.parametrize(("name", "given", "masks", "merged"), MERGEKIT)
def test_the_numbers_are_mergekits(name, given, masks, merged):
    base, tasks = sines()
    each = {"density": (0.5, 0.25, 0.8), "epsilon": (0.2, 0.1, 0.15), "gamma": (0.1, 0.2, 0.3)}
    draws = [np.array([c == "0" for c in m], "f4").reshape(3, 4) * 0.999 for m in masks or ()]
    weights = (1, 1, 1) if name == "sce" else (1.0, 0.5, -0.75)
    found = combine(f"recipe {name}", base, tasks, weights, each | given, draws)
    np.testing.assert_allclose(found, np.array(merged.split(), float).reshape(3, 4), atol=2e-6)


def test_fusion_takes_the_entries_that_mergekit_takes():
    base, tasks = sines()
    other = base + 300 * (tasks[0] - base) ** 3
    found = combine("recipe arcee_fusion", base, [other], [1])
    merged = (
        "0.000000 0.841471 0.909297 0.141120 -0.756802 -0.958924 -0.279415 0.656987 0.989358 "
        "0.285056 1.282167 -0.999990"
    )
    np.testing.assert_allclose(found, np.array(merged.split(), float).reshape(3, 4), atol=2e-6)
    np.testing.assert_array_equal(np.flatnonzero(found != base), [9, 10])


def test_the_settings_are_those_of_mergekit():
    shared = {"lambda": 1.0, "normalize": 0, "rescale": 0, "int8_mask": 0, "density": 1.0}
    defaults = {n: {p.name: p.default for p in RECIPE_METHODS[n].parameters} for n in twin.RECIPES}
    assert defaults == {
        "task_arithmetic": shared,
        "ties": shared | {"normalize": 1},
        "dare_linear": shared | {"rescale": 1, "seed": 0},
        "dare_ties": shared | {"rescale": 1, "seed": 0},
        "della": shared | {"normalize": 1, "rescale": 1, "epsilon": 0.15, "seed": 0},
        "della_linear": shared | {"rescale": 1, "epsilon": 0.15, "seed": 0},
        "breadcrumbs": shared | {"gamma": 0.01},
        "breadcrumbs_ties": shared | {"gamma": 0.01},
        "sce": {"select_topk": 1.0, "int8_mask": 0},
        "arcee_fusion": {},
    }
    for name, method in RULES.items():
        assert name.split()[1] == method.name
        assert method.needs_base
        assert method.random == any(p.name == "seed" for p in method.parameters)
        assert settings_of(method, {}).keys() == {
            p.name for p in method.parameters
        }  # every default is within its bounds


# Laws.


@pytest.mark.parametrize("name", LINEAR)
def test_at_full_density_the_weighed_task_vectors_are_added(name):
    base, tasks = problem()
    weights = (1, 0.5, -2)
    changes = [t - base for t in tasks]
    whole = base + sum(w * d for w, d in zip(weights, changes, strict=True))
    np.testing.assert_allclose(combine(name, base, tasks, weights, FULL), whole, atol=1e-14)


@pytest.mark.parametrize("name", MANY)
def test_one_task_at_full_density_is_that_task(name):
    base, (task,) = problem(tasks=1)
    np.testing.assert_array_equal(combine(name, base, [task], [1], FULL), task)


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (0, 2, 1)])
def test_the_order_of_tasks_does_not_matter(name, order):
    base, tasks = problem()
    weights, draws = (1, 0.5, -0.25), draws_of(base.shape, 3)
    given = APART if name.startswith("recipe") else SPARSE

    def turned(items):
        return type(items)(items[i] for i in order)

    each = {k: turned(v) if isinstance(v, tuple) else v for k, v in given.items()}
    first = combine(name, base, tasks, weights, given, draws)
    second = combine(name, base, turned(tasks), turned(weights), each, turned(draws))
    np.testing.assert_allclose(first, second, atol=1e-14)
    assert (first != base).any()


@pytest.mark.parametrize("name", MANY)
def test_tasks_that_agree_count_as_one(name):
    base, (task,) = problem(tasks=1)
    draws = draws_of(base.shape, 1) * 2
    settings = SPARSE | {"select_topk": 1.0}
    alone = combine(name, base, [task], [1], settings, draws)
    # Means of those that agree are taken by weight, by number, or not at all.
    divides = name in ("recipe ties", "recipe della") or name.endswith("sce")
    is_mean = divides or (name in ELECTED and name.startswith("paper"))
    weights = [1, 1] if is_mean else [0.5, 0.5]
    np.testing.assert_allclose(
        combine(name, base, [task, task], weights, settings, draws), alone, atol=1e-14
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(6, 9), ()])
def test_what_no_task_changed_is_the_base_bit_by_bit(name, shape):
    base = np.float32(np.pi) * problem(shape, dtype=np.float32)[0]
    tasks = taken(name, [base.copy()] * 3)
    for given in (FULL, SPARSE, OTHER):
        found = combine(name, base, tasks, [1] * len(tasks), given)
        np.testing.assert_array_equal(found, base)


@pytest.mark.parametrize("name", RULES)
def test_zero_weights_give_back_the_base(name):
    base, tasks = problem()
    for given in (FULL, SPARSE, OTHER):
        found = combine(name, base, taken(name, tasks), taken(name, [0.0] * 3), given)
        np.testing.assert_array_equal(found, base)


@pytest.mark.parametrize("name", MANY)
def test_a_task_of_weight_zero_takes_no_part(name):
    base, tasks = problem()
    draws = draws_of(base.shape, 3)
    for given in (FULL, SPARSE, OTHER):
        with_it = combine(name, base, tasks, [1, 0, -0.5], given, draws)
        without = combine(name, base, tasks[::2], [1, -0.5], given, draws[::2])
        np.testing.assert_array_equal(with_it, without)


@pytest.mark.parametrize("name", ELECTED)
def test_where_signs_differ_the_majority_is_taken_alone(name):
    base = np.array([10.0, 20, 30, 40])
    tasks = base + np.array([[4, 4, -4, 0], [4, -1, 1, 2], [4, 0, -4, 0]])
    given = FULL | {"normalize": 1}
    found = combine(name, base, tasks, [1, 1, 1], given)
    if name.endswith("sce"):  # weights 48, 22, 32
        np.testing.assert_allclose(found - base, [4, 4, -4, 2])
    else:
        np.testing.assert_array_equal(found - base, [4, 4, -4, 2])


@pytest.mark.parametrize("name", ELECTED)
def test_what_cancels_counts_as_positive_by_recipe_and_not_at_all_as_published(name):
    base = np.array([10.0, 20])
    found = combine(name, base, base + np.array([[3, -3], [-3, 3]]), [1, 1], FULL)
    is_published = name.startswith("paper") and not name.endswith("sce")
    np.testing.assert_array_equal(found, base + (0 if is_published else 3))


def test_signs_are_elected_with_weights_by_recipe_and_without_as_published():
    base, tasks = np.zeros(1), [np.array([3.0]), np.array([-2.0])]
    given = FULL | {"normalize": 0}
    assert combine("recipe breadcrumbs_ties", base, tasks, [0.5, 1], given) == -2
    assert combine("paper breadcrumbs_ties", base, tasks, [0.5, 1], FULL) == 1.5


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_normalising_makes_a_common_factor_of_weights_irrelevant(name):
    base, tasks = problem()
    given = SPARSE | {"normalize": 1}
    once = combine(name, base, tasks, [1, 0.5, 2], given)
    np.testing.assert_allclose(combine(name, base, tasks, [4, 2, 8], given), once, atol=1e-14)
    without = SPARSE | {"normalize": 0}
    one = combine(name, base, tasks, [1, 0.5, 2], without)
    more = combine(name, base, tasks, [4, 2, 8], without)
    np.testing.assert_allclose(more - base, 4 * (one - base), atol=1e-12)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_that_sum_to_zero_are_not_divided_by_it(name):
    base, (first,) = problem(tasks=1, dtype=np.float32)
    given = FULL | {"normalize": 1}
    tasks = [first, base - (first - base)]  # opposite changes, and opposite weights: they agree
    for weights in ([1, -1], [0.1, -0.1 + 1e-9]):
        found = combine(name, base, tasks, weights, given)
        np.testing.assert_allclose(
            found - base, 2 * weights[0] * (first - base), rtol=1e-5, atol=1e-6
        )
    # 0.1 - 0.3 + 0.2 is not zero in float32, nor in float64.
    found = combine(name, base, [first, tasks[1], first], [0.1, -0.3, 0.2], given)
    np.testing.assert_allclose(found - base, 0.6 * (first - base), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in WITH_WEIGHTS if n in ELECTED])
def test_small_weights_are_normalised_like_large_ones(name):
    base, (task,) = problem(tasks=1)
    found = combine(name, base, [task], [1e-9], FULL | {"normalize": 1})
    np.testing.assert_allclose(found, task, rtol=1e-12)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_lambda_scales_what_is_added(name):
    base, tasks = problem()
    once = combine(name, base, tasks, [1, 0.5, -2], SPARSE) - base
    scaled = combine(name, base, tasks, [1, 0.5, -2], SPARSE | {"lambda": -0.3}) - base
    np.testing.assert_allclose(scaled, -0.3 * once, atol=1e-14)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_rescaling_keeps_the_size_of_a_task_vector(name):
    base, (task,) = problem((30, 40), tasks=1)
    for density in (0.3, 0.8):
        given = {"density": density, "epsilon": 0.1, "gamma": 0.1, "rescale": 1}
        found = combine(name, base, [task], [1], given)
        assert np.abs(found - base).sum() == pytest.approx(np.abs(task - base).sum())
    if name != "recipe task_arithmetic":
        nothing = combine(name, base, [task], [1], FULL | {"density": 0, "rescale": 1})
        np.testing.assert_array_equal(nothing, base)


# Ways of dropping.


@pytest.mark.parametrize("n", [1, 2, 7, 100, 2000])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.29, 0.5, 0.999, 1.0])
def test_exactly_the_stated_number_of_entries_stays(n, density):
    change = np.random.default_rng(n).permutation(np.arange(1.0, n + 1)) * (-1) ** np.arange(n)
    base, given = np.zeros(n), {"density": density, "gamma": 0.1}
    trimmed = combine("recipe ties", base, [change], [1], given)
    count = min(n, max(int(density * n), density > 0))
    assert sorted(abs(trimmed[trimmed != 0])) == list(range(n - count + 1, n + 1))
    for name in ("recipe breadcrumbs", "paper breadcrumbs"):
        left = combine(name, base, [change], [1], given)
        count = int(density * n)
        last = n - min(int(0.1 * n), n - count)
        assert sorted(abs(left[left != 0])) == list(range(last - count + 1, last + 1))
    chosen = combine("recipe sce", base, [change, 3 * change], [1, 1], {"select_topk": density})
    assert np.count_nonzero(chosen) == int(np.float32(density) * np.float32(n))


def test_of_equal_entries_the_first_stay():
    base, change = np.zeros(10), np.array([1.0, -1, 1, 2, -1, 1, 1, -1, 1, 3])
    found = combine("recipe ties", base, [change], [1], {"density": 0.4})
    np.testing.assert_array_equal(np.flatnonzero(found), [0, 1, 3, 9])
    given = {"density": 0.4, "gamma": 0.3}  # the first of the ones goes with the largest
    found = combine("recipe breadcrumbs", base, [change], [1], given)
    np.testing.assert_array_equal(np.flatnonzero(found), [1, 2, 4, 5])
    found = combine("recipe sce", base, [change, -change], [1, 1], {"select_topk": 0.4})
    np.testing.assert_array_equal(np.flatnonzero(found), [0, 1, 3, 9])
    ranks = sparsifying.rank_probabilities(np.array([[1.0, -1, 0, 1]]), 0, 1)
    np.testing.assert_array_equal(ranks, [[1, 2, 0, 3]])


def test_what_all_tasks_changed_alike_is_not_selected_by_variance():
    base, (task, other) = problem(tasks=2)
    for tasks in ([task], [task, task], [task, task, task]):
        found = combine("recipe sce", base, tasks, [1] * len(tasks), {"select_topk": 0.9})
        np.testing.assert_array_equal(found, base)
    part = np.where(np.arange(base.size).reshape(base.shape) % 2, task, other)
    found = combine("recipe sce", base, [task, part], [1, 1], {"select_topk": 0.99})
    assert (found[task == part] == base[task == part]).all()
    assert (found != base).any()


def frequencies(name, change, given, times=4000):
    """How often each entry is kept, its mean and variance, over many draws."""
    base = np.zeros_like(change)
    rng, found = np.random.default_rng(3), []
    for _ in range(times):
        draws = [rng.random(change.shape, np.float32)]
        found.append(combine(name, base, [change], [1], given, draws))
    found = np.array(found)
    return (found != 0).mean(axis=0), found.mean(axis=0), found.var(axis=0)


@pytest.mark.parametrize("name", RANDOM)
def test_entries_are_kept_as_often_as_stated_by_their_rank_in_the_row(name):
    row = np.array([3.0, -1, 2, 5, -4])
    change = np.array([row, 100 * row[::-1], -0.01 * np.roll(row, 2)])
    given = {"density": 0.5, "epsilon": 0.3, "rescale": 0}
    kept, mean, variance = frequencies(name, change, given)
    ranks = np.array([np.argsort(np.argsort(np.abs(r))) for r in change])
    keep = np.full(change.shape, 0.5)
    if "della" in name:
        keep = (
            0.2 + 0.6 * ranks / 4 if name.startswith("recipe") else 0.35 + 0.3 * (ranks + 0.5) / 5
        )
    sigma = np.sqrt(keep * (1 - keep) / 4000)
    assert (np.abs(kept - keep) < 4.5 * sigma).all()
    if name.startswith(
        "paper"
    ):  # right on average, with the variance of a draw divided by its odds
        spread = np.abs(change) * np.sqrt((1 - keep) / keep)
        assert (np.abs(mean - change) < 4.5 * spread / np.sqrt(4000)).all()
        np.testing.assert_allclose(variance, spread**2, rtol=0.15)


def test_dare_at_its_size_is_right_on_average_in_a_large_tensor():
    change = np.random.default_rng(0).normal(size=(50, 40))
    total = 0
    for seed in range(200):
        draws = draws_of(change.shape, 1, seed)
        given = {"density": 0.25}
        total += combine("recipe dare_linear", 0 * change, [change], [1], given, draws)
    error = (total / 200 - change) / (np.abs(change) * np.sqrt(3 / 200))
    assert abs(error.mean()) < 0.1
    assert error.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", [n for n in RANDOM if "della" in n])
def test_rows_are_ranked_alone(name):
    base, tasks = problem((4, 8), tasks=2)
    draws = draws_of(base.shape, 2)
    given = {"density": 0.5, "epsilon": 0.4, "rescale": 0}
    whole = combine(name, base, tasks, [1, 0.5], given, draws)
    for row in range(4):
        alone = combine(
            name, base[row], [t[row] for t in tasks], [1, 0.5], given, [d[row] for d in draws]
        )
        np.testing.assert_array_equal(alone, whole[row])
    deep = [x.reshape(2, 2, 8) for x in (base, *tasks)]
    found = combine(name, deep[0], deep[1:], [1, 0.5], given, [d.reshape(2, 2, 8) for d in draws])
    np.testing.assert_array_equal(found.reshape(4, 8), whole)


def test_ranks_and_divergences_do_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch):
    base, (task,) = problem((7, 5), tasks=1, dtype=np.float32)
    names = ("recipe della", "paper della_linear", "recipe arcee_fusion")
    given = {"density": 0.5, "epsilon": 0.2}
    whole = [combine(n, base, [task], [1], given) for n in names]
    monkeypatch.setattr(sparsifying, "_BLOCK", 11)
    monkeypatch.setattr(arcee_fusion, "_BLOCK", 11)
    for name, before in zip(names, whole, strict=True):
        np.testing.assert_array_equal(combine(name, base, [task], [1], given), before)


@pytest.mark.parametrize("name", [n for n in RANDOM if "della" in n])
@pytest.mark.parametrize(("density", "epsilon"), [(0.05, 0.2), (0.95, 0.2), (0.4, 0.9)])
def test_probabilities_out_of_range_are_refused(name, density, epsilon):
    base, tasks = problem()
    given = {"density": density, "epsilon": epsilon}
    with pytest.raises(ArithmeticError, match=r"expected density - epsilon.*Take a smaller"):
        combine(name, base, tasks, [1, 1, 1], given)
    method = RULES[name]
    if method.facts is not None:
        inputs = FactInputs(settings_of(method, given), 0.2, (1.0,), np.zeros(0))
        with pytest.raises(ConfigError, match=f"--param epsilon={epsilon}: .* Take a smaller"):
            method.facts(inputs)


# Arcee Fusion.


def test_fusion_takes_what_stands_out_in_rows_that_changed():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(10, 100))
    other = base + 0.01 * rng.normal(size=base.shape)
    other[3, :5] += 1.0
    other[7] = base[7] + 0.5  # the same for the whole row: its softmax stays
    found = combine("recipe arcee_fusion", base, [other], [1])
    taken_from_other = found != base
    assert taken_from_other[3, :5].all()
    assert not taken_from_other[7].any()
    np.testing.assert_allclose(found[taken_from_other], other[taken_from_other], atol=1e-15)
    np.testing.assert_array_equal(
        combine("recipe arcee_fusion", base, [other], [0.5]) != base, taken_from_other
    )


@pytest.mark.parametrize("shape", [(), (1,), (5, 1)])
def test_fusion_of_rows_of_one_entry_takes_the_other_model(shape):
    base, (task,) = problem(shape, tasks=1, seed=3)
    np.testing.assert_array_equal(combine("recipe arcee_fusion", base, [task], [1]), task)


def test_fusion_measures_small_changes_without_rounding():
    rng = np.random.default_rng(0)
    base = (0.02 * rng.normal(size=(64, 64))).astype("f4")
    other = (base + 1e-4 * rng.normal(size=base.shape)).astype("f4")
    found = combine("recipe arcee_fusion", base, [other], [1])
    exact = expected("recipe arcee_fusion", np.float64(base), [np.float64(other)], [1])
    assert np.count_nonzero((found != base) != (exact != base)) <= 2


# Through the engine.


@pytest.mark.parametrize("name", twin.PAPERS)
def test_a_merge_by_name_is_the_rule(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = {"a.weight": (30, 20), "a.bias": (20,), "a.scalar": ()}
    base = {n: dyadic(s, 1).astype("f4") for n, s in shapes.items()}
    models = {"base": base} | {
        m: {n: base[n] + dyadic(s, seed).astype("f4") for n, s in shapes.items()}
        for seed, m in enumerate("xy", 2)
    }
    for model, tensors in models.items():
        tiny.write(f"{model}.safetensors", tensors)
    method = METHODS[name]
    used = taken(f"paper {name}", "xy")
    given = {p.name: SPARSE[p.name] for p in method.parameters if p.name in SPARSE}
    given |= {"seed": 5} if method.random else {}
    files = tuple(f"{m}.safetensors" for m in used)
    run_merge(MergeConfig(models=files, base="base.safetensors", out="o", method=name, param=given))
    (out,) = Path("o").glob("*.safetensors") if Path("o").is_dir() else [Path("o")]
    merged = tiny.read(out)
    for tensor, shape in shapes.items():
        keys = [task_key(5, tensor, open_posterior(file).identity) for file in files]
        draws = [keyed_draws(key, 0, int(np.prod(shape))).reshape(shape) for key in keys]
        tasks = [models[m][tensor] for m in used]
        rule = expected(f"paper {name}", base[tensor], tasks, [1] * len(used), given, draws)
        np.testing.assert_allclose(merged[tensor], rule, rtol=1e-5, atol=1e-6)
