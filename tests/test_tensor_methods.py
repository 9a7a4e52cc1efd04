"""Rules that merge whole tensors by their products: twins, laws, and numbers of mergekit's."""

import itertools
import math

import numpy as np
import pytest

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.methods import METHODS
from mergekit_bayes.methods.measuring import piece_of
from mergekit_bayes.methods.recipe_table import RECIPE_METHODS
from mergekit_bayes.methods.sphere import changes_of
from mergekit_bayes.methods.tensors import Tensors
from mergekit_bayes.plan import plan_merge
from tests import tiny
from tests.reference.tensor_methods import TENSOR_TWINS

WEIGHTS = (0.7, 0.4, 1.3)
SHAPES = [(), (1,), (7,), (4, 6), (2, 3, 4)]
ROWS = {"nuslerp_flatten": 0}
# Every rule as it is used: its name, whether it is given a base, and its settings.
CASES = [
    ("linear", False, {}),
    ("linear", False, {"normalize": 0}),
    ("slerp", True, {"t": 0.3}),
    ("nuslerp", False, {}),
    ("nuslerp", True, {}),
    ("nuslerp", False, ROWS),
    ("nuslerp", True, {**ROWS, "nuslerp_row_wise": 1}),
    ("multislerp", False, {}),
    ("multislerp", False, {"eps": 0.05}),
    ("multislerp", True, {"normalize_weights": 0}),
    ("karcher", False, {}),
    ("karcher", False, {"max_iter": 40, "tol": 1e-9}),
    ("model_stock", True, {}),
    ("model_stock", True, {"filter_wise": 1}),
    ("nearswap", True, {"t": 0.2}),
    ("passthrough", False, {"scale": 0.3}),
]
by_case = pytest.mark.parametrize(("name", "with_base", "given"), CASES)
by_weights = pytest.mark.parametrize(
    ("name", "with_base", "given"),
    [case for case in CASES if case[0] not in ("slerp", "nearswap", "passthrough")],
)


def products_of(models):
    wide = [np.float64(m).reshape(-1) for m in models]
    return np.array([[math.fsum(one * other) for other in wide] for one in wide])


def settings_of(name, given):
    return {p.name: p.default for p in RECIPE_METHODS[name].parameters} | given


def tensors_of(name, base, tasks, weights=None, given=None):
    """What the engine gives the rule: products where it reads them."""
    settings = settings_of(name, given or {})
    models = [*([] if base is None else [base]), *tasks]
    reads = RECIPE_METHODS[name].tensor.needs(settings)
    products = products_of(models) if reads == "products" else None
    return Tensors(base, tuple(tasks), weights or (1.0,) * len(tasks), settings, products)


def merged(name, base, tasks, weights=None, **given):
    """A merge in which nothing divides by zero or is not a number."""
    tensors = tensors_of(name, base, tasks, weights, given)
    with np.errstate(all="raise", under="ignore"):
        return RECIPE_METHODS[name].tensor.combine(tensors)


def problem(name, with_base, shape, *, seed=0, near=None, dtype=np.float64):
    """A base or None, tasks, and weights; models that differ by `near`, or share nothing."""
    rng = np.random.default_rng(seed)
    count = RECIPE_METHODS[name].tasks or 3
    common = rng.normal(size=shape)

    def model():
        noise = rng.normal(size=shape)
        return np.asarray(noise if near is None else common + near * noise, dtype)

    base = model() if with_base else None
    return base, [model() for _ in range(count)], WEIGHTS[:count]


def same(one, other, rtol=1e-9):
    """Equal within rounding of the largest entry."""
    expected = np.reshape(np.float64(other), np.shape(one))
    scale = max(np.max(np.abs(expected), initial=0), 1e-300)
    np.testing.assert_allclose(np.float64(one) / scale, expected / scale, rtol=0, atol=rtol)


def test_every_rule_has_a_twin():
    streaming = {n for n, m in RECIPE_METHODS.items() if m.tensor.reads == "products"}
    assert streaming < TENSOR_TWINS.keys() < RECIPE_METHODS.keys()
    assert {name for name, _, _ in CASES} == TENSOR_TWINS.keys()
    for name in streaming & METHODS.keys() - {"slerp"}:  # of which the published one differs
        assert METHODS[name] is RECIPE_METHODS[name]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("near", [None, 0.1])
@by_case
def test_it_is_its_twin_in_float64_and_as_near_as_float32_goes(name, with_base, given, near, shape):
    for dtype, rtol in ((np.float64, 1e-9), (np.float32, 3e-5)):
        base, tasks, weights = problem(name, with_base, shape, near=near, seed=3, dtype=dtype)
        found = merged(name, base, tasks, weights, **given)
        assert (found.dtype, found.shape) == (dtype, shape)
        wide = [None if m is None else np.float64(m) for m in (base, *tasks)]
        same(found, TENSOR_TWINS[name](wide[0], wide[1:], weights, settings_of(name, given)), rtol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@by_case
def test_equal_models_give_that_model(name, with_base, given, shape):
    if name in ("linear", "passthrough") and given:
        given = {}  # factors that do not sum to 1
    base, (task, *_), weights = problem(name, with_base, shape, dtype=np.float32, seed=5)
    if name != "multislerp" or not with_base:  # which scales a change by the sum of its weights
        tasks = [task] * len(weights)
        found = merged(
            name, task if name in ("slerp", "nearswap") else base, tasks, weights, **given
        )
        same(found, task, 3e-7)
    base = None if base is None else task
    found = merged(name, base, [task] * len(weights), weights, **given)
    if given.get("nuslerp_flatten") != 0:  # whose coefficients differ from entry to entry
        np.testing.assert_array_equal(found, task)
    same(found, task, 3e-7)


@by_weights
def test_the_order_of_tasks_does_not_matter(name, with_base, given):
    for near in (None, 0.1):
        base, tasks, weights = problem(name, with_base, (5, 6), near=near, seed=1)
        expected = merged(name, base, tasks, weights, **given)
        for order in itertools.permutations(range(len(tasks))):
            shuffled = [tasks[i] for i in order], tuple(weights[i] for i in order)
            same(merged(name, base, *shuffled, **given), expected)


@pytest.mark.parametrize("factor", [1e-9, -1e-9, 1e9])
@by_case
def test_the_unit_of_the_weights_does_not_matter(name, with_base, given, factor):
    base, tasks, weights = problem(name, with_base, (5, 6), near=0.3, seed=2)
    expected = merged(name, base, tasks, weights, **given)
    scaled = dict(given)
    if name == "nearswap":
        scaled["t"] = given["t"] * abs(factor)
    if name == "multislerp":
        scaled["eps"] = 0.0
        expected = merged(name, base, tasks, weights, **{**given, "eps": 0.0})
    base = None if base is None else base * factor
    found = merged(name, base, [task * factor for task in tasks], weights, **scaled)
    same(found / factor, expected)


@by_weights
def test_only_the_proportion_of_weights_matters(name, with_base, given):
    if "normalize" in given or "normalize_weights" in given:
        given = {}
    base, tasks, weights = problem(name, with_base, (5, 6), near=0.3, seed=2)
    tripled = tuple(3 * w for w in weights)
    same(merged(name, base, tasks, tripled, **given), merged(name, base, tasks, weights, **given))


@by_case
def test_pieces_of_a_merge_are_the_merge_of_pieces(name, with_base, given):
    base, tasks, weights = problem(name, with_base, (5, 6), dtype=np.float32, seed=4)
    whole = tensors_of(name, base, tasks, weights, given)
    rule = RECIPE_METHODS[name].tensor
    needs = rule.needs(whole.settings)
    if needs == "tensor":
        assert whole.products is None
        return
    expected = rule.combine(whole).reshape(-1)
    for start, stop in ((0, 12), (12, 18), (18, 30)) if needs == "rows" else ((0, 11), (11, 30)):
        found = rule.combine(piece_of(rule, whole, start, stop, {}))
        np.testing.assert_array_equal(found.reshape(-1), expected[start:stop])


@by_case
def test_zeros_and_unchanged_models_merge_to_numbers(name, with_base, given):
    for shape, near in itertools.product(SHAPES, (None, 0.2)):
        base, tasks, weights = problem(name, with_base, shape, near=near, dtype=np.float32, seed=6)
        zeros = np.zeros(shape, np.float32)
        nothing = zeros if base is None else base
        for place in range(len(tasks)):  # one that is zero, or did not change
            some = [nothing if i == place else task for i, task in enumerate(tasks)]
            expected = TENSOR_TWINS[name](base, some, weights, settings_of(name, given))
            same(merged(name, base, some, weights, **given), expected, 3e-5)
        everything = [nothing] * len(tasks)
        np.testing.assert_array_equal(merged(name, base, everything, weights, **given), nothing)
        if base is not None:
            assert np.isfinite(merged(name, zeros, tasks, weights, **given)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_both_ends_are_the_models_to_the_bit(dtype):
    base, (one, other), _ = problem("nuslerp", True, (5, 6), dtype=dtype)
    for start, end in itertools.permutations((base, one, other), 2):
        np.testing.assert_array_equal(merged("slerp", start, [end], t=0.0), start)
        np.testing.assert_array_equal(merged("slerp", start, [end], t=1.0), end)
    for weights, end in (((2.0, 0.0), one), ((0.0, 0.3), other)):
        np.testing.assert_array_equal(merged("nuslerp", None, [one, other], weights), end)
        np.testing.assert_array_equal(merged("nuslerp", base, [one, other], weights), end)
        same(merged("nuslerp", base, [one, other], weights, **ROWS), end, 1e-6)
        np.testing.assert_array_equal(merged("linear", None, [one, other], weights), end)
    np.testing.assert_array_equal(merged("nearswap", base, [one], t=0.0), base)
    np.testing.assert_array_equal(merged("nearswap", base, [one], t=-1.0), base)
    np.testing.assert_array_equal(merged("nearswap", base, [one], t=100.0), one)
    for name in ("karcher", "multislerp"):
        np.testing.assert_array_equal(merged(name, None, [one], (0.3,)), one)
    np.testing.assert_array_equal(merged("passthrough", None, [one]), one)


def test_slerp_back_is_slerp_from_the_other_end():
    base, (task,), _ = problem("slerp", True, (5, 6))
    for t in (-0.2, 0.1, 0.5, 1.4):
        there = merged("slerp", base, [task], t=t)
        same(there, merged("slerp", task, [base], t=1 - t))
        same(there, merged("nuslerp", None, [base, task], (1 - t, t)))


def test_lengths_are_the_mean_lengths():
    _, tasks, weights = problem("karcher", False, (5, 6))
    share = np.array(weights) / sum(weights)
    length = share @ [np.linalg.norm(task) for task in tasks]
    for name in ("karcher", "multislerp"):
        assert np.linalg.norm(merged(name, None, tasks, weights)) == pytest.approx(length)
    unit = [task / np.linalg.norm(task) for task in tasks]
    for t in (0.2, 0.7):
        assert np.linalg.norm(merged("slerp", unit[0], [unit[1]], t=t)) == pytest.approx(1)


def test_a_karcher_mean_is_nearest_to_all_models_by_angle():
    _, tasks, weights = problem("karcher", False, (5, 6), seed=8)
    units = [task / np.linalg.norm(task) for task in tasks]

    def cost(point):
        cosines = [np.vdot(point, unit) / np.linalg.norm(point) for unit in units]
        return sum(w * math.acos(c) ** 2 for w, c in zip(weights, cosines, strict=True))

    mean = merged("karcher", None, tasks, weights, max_iter=100, tol=1e-12)
    rng = np.random.default_rng(0)
    for size in (1e-4, 1e-2, 1):
        for _ in range(20):
            assert cost(mean) < cost(mean + size * rng.normal(size=mean.shape))
    first_steps = [cost(merged("karcher", None, tasks, weights, max_iter=n)) for n in range(4)]
    assert sorted(first_steps, reverse=True) == first_steps
    coarse = merged("karcher", None, tasks, weights, tol=1.0)
    np.testing.assert_array_equal(
        coarse, merged("karcher", None, tasks, weights, tol=1, max_iter=9)
    )
    same(merged("karcher", None, tasks[:2]), _halfway(*tasks[:2]))


def _halfway(one, other):
    lengths = [np.linalg.norm(one), np.linalg.norm(other)]
    middle = merged("slerp", one / lengths[0], [other / lengths[1]], t=0.5)
    return middle * np.mean(lengths)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_model_stock_is_nearest_to_the_centre_in_the_geometry_of_the_paper(tasks):
    """Models at right angles around a centre: the merge is its foot in the plane of all."""
    rng = np.random.default_rng(tasks)
    axes = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    centre = rng.normal(size=12)
    models = [centre + 0.7 * axes[t] for t in range(tasks)]
    base = centre + 1.9 * axes[tasks]
    directions = np.array([model - base for model in models]).T
    foot = base + directions @ np.linalg.lstsq(directions, centre - base, rcond=None)[0]
    same(merged("model_stock", base, models), foot)


def test_model_stock_goes_as_far_as_tasks_agree():
    base, one, other = np.zeros(4), np.array([1.0, 0, 0, 0]), np.array([0, 3.0, 0, 0])
    np.testing.assert_array_equal(merged("model_stock", base, [one, 3 * one]), 2 * one)
    np.testing.assert_array_equal(merged("model_stock", base, [one, other]), base)
    np.testing.assert_array_equal(merged("model_stock", base, [one, -2 * one]), base)
    small = [1e-7 * (one + base), 1e-7 * (one + other)]
    ratio = merged("model_stock", base, small) / np.mean(small, axis=0).clip(1e-300)
    assert ratio[0] == pytest.approx(2 * math.sqrt(0.1) / (1 + math.sqrt(0.1)))


def test_opposite_models_are_merged_or_refused_as_mergekit_does():
    base, (one, _), _ = problem("nuslerp", True, (5, 6), dtype=np.float32)
    for other in (-one, -3 * one):
        same(merged("slerp", one, [other], t=0.3), 0.7 * one + 0.3 * other, 1e-6)
        same(merged("nuslerp", None, [one, other], (0.7, 0.3)), 0.7 * one + 0.3 * other, 1e-6)
        same(merged("multislerp", None, [one, other], (1.0, 1.0)), (one + other) / 2, 1e-6)
        same(merged("karcher", None, [one, other]), (one - other) / 2, 1e-6)
    same(merged("multislerp", base, [base + one, base - one]), base, 1e-5)

    with pytest.raises(ArithmeticError, match="cancel out"):
        merged("multislerp", None, [one, -one, 0 * one])


def test_a_model_opposite_to_the_mean_makes_no_step():
    one = np.arange(1.0, 7.0)
    np.testing.assert_allclose(merged("karcher", None, [one, one, -one]), one, rtol=1e-12)
    other = np.roll(one, 1)
    for tol in (0.0, 1e-5):  # from the first that has a weight, where there is no mean direction
        found = merged("karcher", None, [other, one, -one], (0.0, 1.0, 1.0), tol=tol)
        np.testing.assert_allclose(found, one, rtol=1e-12)


def test_nearswap_moves_no_entry_farther_than_t():
    base, (task,), _ = problem("nearswap", True, (50,), near=0.1)
    found = merged("nearswap", base, [task], t=0.05)
    near = abs(task - base) <= 0.05
    assert 5 < near.sum() < 45
    np.testing.assert_array_equal(found[near], task[near])
    np.testing.assert_allclose(found[~near], (base + 0.05 * np.sign(task - base))[~near])


def test_a_change_that_is_rounding_of_the_products_counts_as_none():
    base, tasks, _ = problem("model_stock", True, (400,), near=0.01, dtype=np.float32)
    models = [base, base, *tasks]
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(5, 5))
    products = products_of(models) * (1 + 2e-16 * (noise + noise.T))
    changes = changes_of(products)
    assert not changes[0].any()
    assert not changes[:, 0].any()
    exact = products_of([np.float64(task) - base for task in tasks])
    np.testing.assert_allclose(changes[1:, 1:], exact, rtol=1e-9, atol=1e-9 * exact.max())


def test_weights_that_say_nothing_are_told():
    _, tasks, _ = problem("linear", False, (5, 6))
    for name in ("linear", "multislerp"):
        with pytest.raises(ArithmeticError, match=r"sum to zero.*normalize"):
            merged(name, None, tasks, (1.0, -0.5, -0.5))
    for weights in ((1.0, -0.5, 1.0), (0.0, 0.0, 0.0)):
        with pytest.raises(ArithmeticError, match="one above zero"):
            merged("karcher", None, tasks, weights)
    with pytest.raises(ArithmeticError, match="two models or more"):
        merged("model_stock", tasks[0], tasks[1:2])
    middle = merged("nuslerp", None, tasks[:2], (1.0, 1.0))
    np.testing.assert_array_equal(merged("nuslerp", None, tasks[:2], (1.0, -1.0)), middle)
    same(merged("karcher", None, tasks, (1, 1, 0.0)), merged("karcher", None, tasks[:2], (1, 1)))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4)], ids=str)
def test_vectors_that_have_angles_of_their_own_are_merged_alone(shape):
    base, (one, other), weights = problem("nuslerp", True, shape, seed=9)
    for by_columns, axis in ((0, -1), (1, 0)):
        given = {**ROWS, "nuslerp_row_wise": by_columns}
        for anchor in (None, base):
            found = merged("nuslerp", anchor, [one, other], weights, **given)
            moved = [
                np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
                for x in (found, one, other, base)
            ]
            for row, x, y, z in zip(*moved, strict=True):
                same(row, merged("nuslerp", None if anchor is None else z, [x, y], weights))
    found = merged("model_stock", base, [one, other], filter_wise=1)
    for index in np.ndindex(shape[:-1]):
        same(found[index], merged("model_stock", base[index], [one[index], other[index]]))


# What mergekit 0.1.5 made of these tensors in float64, on 2026-11-29: 0 is the base's number.
GRID = np.arange(6).reshape(2, 3)
INPUTS = [np.sin(1.0 + 2 * k + (k + 1.5) * GRID) for k in range(4)]
MEASURED = [
    ("linear", (1, 2), (0.3, 0.9), {}, "-.683913 .422480 -.155090 -.065073 .217450 -.313764"),
    (
        "linear",
        (1, 2, 3),
        (1, 0.5, -0.25),
        {"normalize": 0},
        "-.502589 -.087434 .793048 -1.025669 .528194 .198138",
    ),
    ("slerp", (0, 1), (1,), {"t": 0.3}, ".812819 .212929 -.225235 -1.026503 .775074 .804175"),
    ("slerp", (0, 1), (1,), {"t": 1.2}, "-.125117 -.856434 1.175535 -.620132 .197507 -.049632"),
    ("nuslerp", (1, 2), (0.3, 0.9), {}, "-1.125773 .535361 -.007464 -.338314 .478320 -.479792"),
    ("nuslerp", (0, 1, 2), (0.6, 0.2), {}, "-.319330 -.434804 .781815 -.562400 .296760 -.107736"),
    ("nuslerp", (1, 2), (0.3, 0.9), ROWS, "-1.268735 .562178 .055326 -.231977 .380977 -.422558"),
    (
        "nuslerp",
        (0, 1, 2),
        (0.3, 0.9),
        {**ROWS, "nuslerp_row_wise": 1},
        "-.751015 .227939 -.049148 -.042213 .052284 -.434918",
    ),
    (
        "multislerp",
        (1, 2, 3),
        (0.2, 0.3, 0.9),
        {},
        ".316675 -.760224 -.268163 .896740 .035370 -1.133570",
    ),
    (
        "multislerp",
        (0, 1, 2, 3),
        (0.2, 0.3, 0.9),
        {},
        ".078542 -.609591 -.037684 .685454 -.072442 -.869308",
    ),
    (
        "multislerp",
        (1, 2, 3),
        (1, 0.5, -0.25),
        {"normalize_weights": 0},
        "-.662881 -.104364 .973239 -1.259690 .675157 .194124",
    ),
    ("karcher", (1, 2, 3), (1, 1, 1), {}, "-.454261 -.638801 .240108 .125586 .579115 -1.250775"),
    (
        "karcher",
        (0, 1, 2, 3),
        (1, 1, 1, 1),
        {"max_iter": 2, "tol": 1e-9},
        ".425250 -.136026 -.587209 -.437996 1.259221 -.643740",
    ),
    (
        "karcher",
        (0, 1, 2, 3),
        (1, 1, 1, 1),
        {"max_iter": 100, "tol": 1e-12},
        ".379523 -.152298 -.558832 -.435251 1.264537 -.684114",
    ),
    ("model_stock", (0, 1, 2), (1, 1), {}, ".181013 .306902 -.237470 -.510670 .460512 .302584"),
    (
        "model_stock",
        (0, 1, 2, 3),
        (1, 1, 1),
        {},
        ".175455 -.040928 -.152779 -.100294 .276691 -.098685",
    ),
    (
        "model_stock",
        (0, 1, 2, 3),
        (1, 1, 1),
        {"filter_wise": 1},
        ".248687 .029377 -.219195 .018985 .201745 -.275495",
    ),
    ("nearswap", (0, 1), (1,), {"t": 0.25}, ".591471 .348472 -.506802 -.879696 .420167 .548487"),
    (
        "passthrough",
        (0,),
        (1,),
        {"scale": -0.5},
        "-.420735 -.299236 .378401 .352770 -.328493 -.399244",
    ),
]


@pytest.mark.parametrize(("name", "inputs", "weights", "given", "numbers"), MEASURED)
def test_it_makes_the_numbers_of_mergekit(name, inputs, weights, given, numbers):
    arrays = [INPUTS[k] for k in inputs]
    base = arrays.pop(0) if len(arrays) > len(weights) else None
    expected = np.array([float(n) for n in numbers.split()]).reshape(2, 3)
    for dtype, atol in ((np.float64, 6e-7), (np.float32, 2e-6)):
        tasks = [array.astype(dtype) for array in arrays]
        found = merged(name, None if base is None else base.astype(dtype), tasks, weights, **given)
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    assert {row[0] for row in MEASURED} == TENSOR_TWINS.keys()


@pytest.mark.parametrize(
    ("cosine", "slerp", "nuslerp"),
    [
        (0.9994, (1.299821, 0.020785), (1.299821, 0.020785)),
        (0.9996, (1.299760, 0.016969), (1.299880, 0.016971)),
        (0.99999, (1.299994, 0.002683), (1.299997, 0.002683)),
        (-0.9994, (-22.570114, 1.605729), (-22.570114, 1.605729)),
        (-0.9996, (0.100240, 0.016969), (-27.822544, 1.608001)),
        (-1.0, (0.1, 0.0), (0.1, 0.0)),
    ],
)
def test_an_arc_is_a_line_where_it_is_one_in_mergekit(cosine, slerp, nuslerp):
    """Of a vector of length 1 and one of length 2, at t = 0.3; as measured of mergekit 0.1.5."""
    one, other = np.array([1.0, 0.0]), 2 * np.array([cosine, math.sqrt(1 - cosine**2)])
    np.testing.assert_allclose(merged("slerp", one, [other], t=0.3), slerp, atol=6e-7, rtol=0)
    found = merged("nuslerp", None, [one, other], (0.7, 0.3))
    np.testing.assert_allclose(found, nuslerp, atol=6e-7, rtol=0)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Three models in files, and their tensors, of which some are the base's."""
    monkeypatch.chdir(tmp_path)
    shapes = {"a.weight": (40, 30), "a.bias": (7,), "scalar": ()}
    models = [tiny.arrays(seed, shapes) for seed in range(3)]
    models[1] |= {"a.bias": models[0]["a.bias"], "scalar": models[0]["scalar"]}
    models[2]["a.bias"] = models[0]["a.bias"]
    for name, model in zip(("base", "a", "b"), models, strict=True):
        tiny.write(f"{name}.safetensors", model)
    return models


def config(**settings):
    models = settings.pop("models", ("a.safetensors", "b.safetensors"))
    return MergeConfig(models=models, out="m.safetensors", force=True, **settings)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"method": "nuslerp"}, (0.9, 0.3)),
        ({"method": "nuslerp", "base": "base.safetensors", "param": ROWS}, (0.9, 0.3)),
        ({"method": "multislerp", "base": "base.safetensors"}, (0.9, 0.3)),
        ({"method": "karcher"}, (0.9, 0.3)),
        ({"method": "model_stock", "base": "base.safetensors"}, ()),
        (
            {
                "method": "model_stock",
                "base": "base.safetensors",
                "param": {"filter_wise": 1},
            },
            (),
        ),
        ({"method": "nearswap", "base": "base.safetensors", "models": ("b.safetensors",)}, ()),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else "",
)
def test_a_merge_of_files_is_the_rule_on_each_tensor(world, settings, scales):
    run_merge(config(**settings, scale=scales))
    found = tiny.read("m.safetensors")
    base, *tasks = world
    if "models" in settings:
        tasks = tasks[1:]
    for name, value in found.items():
        expected = merged(
            settings["method"],
            base[name] if "base" in settings else None,
            [task[name] for task in tasks],
            scales or None,
            **settings.get("param", {}),
        )
        same(value, expected, 1e-6)
    np.testing.assert_array_equal(found["a.bias"], base["a.bias"])


def test_only_settings_that_need_it_hold_a_tensor_in_memory(world):
    for given in ({}, {"nuslerp_flatten": 0}, {"nuslerp_flatten": 0, "nuslerp_row_wise": 1}):
        with plan_merge(config(method="nuslerp", param=given)) as plan:
            is_whole = "nuslerp_row_wise" in given
            assert any("merges whole tensors" in note for note in plan.notes) == is_whole


def test_a_method_without_scales_refuses_them(world):
    with pytest.raises(ConfigError, match="takes no --scale"):
        plan_merge(config(method="model_stock", base="base.safetensors", scale=(0.5,)))
    with pytest.raises(ConfigError, match="takes no base"):
        plan_merge(config(method="karcher", base="base.safetensors"))
