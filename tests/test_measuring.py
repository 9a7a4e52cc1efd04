"""What rules measure of a whole tensor, piece by piece: cuts, sums, and merges of pieces."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bayes.methods import METHODS, measuring, settings_of
from mergekit_bayes.methods.measuring import Whole, combine_whole, measure, piece_of
from mergekit_bayes.methods.recipe_table import RECIPE_METHODS
from mergekit_bayes.methods.tensors import Order, Sum, TensorRule, Tensors

RULES = {
    f"{kind} {name}": method
    for kind, table in (("recipe", RECIPE_METHODS), ("paper", METHODS))
    for name, method in table.items()
    if method.tensor is not None and (method.tensor.measures or method.tensor.reads == "rows")
    if kind == "recipe" or method is not RECIPE_METHODS.get(name)
}
GIVEN = [
    {},
    {"density": 0.3, "epsilon": 0.2, "gamma": 0.1, "select_topk": 0.4, "rescale": 1},
    {"density": 0.6, "epsilon": 0.1, "gamma": 0.5, "select_topk": 0.9, "rescale": 0},
    {"density": 0.0, "gamma": 0.0, "select_topk": 0.0, "rescale": 1},
    {"density": 1.0, "epsilon": 0.0, "gamma": 1.0, "select_topk": 1.0, "rescale": 1},
]
SHAPES = [(), (1,), (50,), (1, 40), (40, 1), (6, 11), (3, 4, 5)]
NUMBERS = {
    "ties": [0.0, 0.5, 0.5, 1.0],  # nearly all equal
    "signs of zero": [0.0, -0.0, 1e-45, 2e-45],  # and the least numbers of float32
    "near": [1.0, 1 + 2.0**-23, 1 + 2.0**-22, 1 - 2.0**-24],  # apart in the last digit alone
    "far": [3e38, 1e-30, 1.0, 2.0**-126, np.inf],
}


def values_of(kind, n, seed, dtype):
    rng = np.random.default_rng(seed)
    if kind in NUMBERS:
        return rng.choice(NUMBERS[kind], n).astype(dtype)
    values = np.abs(rng.normal(size=n)).astype(np.float32)
    if kind == "bfloat16":
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return values.astype(dtype)


def one_list(name, ranks, **fields):
    return Order(name, lambda t, k: t.tasks[k], ranks, lambda tasks: tasks, **fields)


def measured(rule, lists, windows=7, ordered_map=map, given=None):
    """The results of a rule's measures of lists of numbers, read in small windows."""
    tensors = Tensors(None, tuple(lists), (1.0,) * len(lists), given or {})
    whole = Whole(lists[0].size, 1, lists[0].dtype, len(lists), given or {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "WINDOW", windows)
        return measure(rule, whole, lambda *window: piece_of(rule, tensors, *window), ordered_map)


def largest(values, count):
    """Where the largest are by a stable sort, zeros left out unless all are taken."""
    kept = np.zeros(values.size, bool)
    kept[np.argsort(-values, kind="stable")[: max(count, 0)]] = True
    return kept & ((values > 0) | (count >= values.size))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*NUMBERS, "bfloat16", "plain"]),
    st.integers(1, 60),
    st.integers(0, 9),
    st.sampled_from([np.float32, np.float64]),
    st.integers(1, 30),
    st.lists(st.integers(-1, 65), min_size=1, max_size=4),
)
def test_a_cut_keeps_the_largest_and_the_first_of_equal_ones(kind, n, seed, dtype, windows, ranks):
    lists = [values_of(kind, n, seed + k, dtype) for k in range(2)]
    order = one_list("cut", lambda s, k, size, positive: tuple(count + k for count in ranks))
    found = measured(TensorRule(abs, "entries", measures=(order,)), lists, windows)["cut"]
    for k, values in enumerate(lists):
        for count, cut in zip(ranks, found[k], strict=True):
            kept = np.concatenate([cut.keeps(values[at : at + 13], at) for at in range(0, n, 13)])
            np.testing.assert_array_equal(kept, largest(values, count + k))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [*NUMBERS, "bfloat16", "plain"])
def test_thresholds_are_the_entries_in_order(kind, dtype):
    values = values_of(kind, 50, 3, dtype)
    order = one_list("all", lambda s, k, n, p: tuple(range(n, 0, -1)), only_thresholds=True)
    (found,) = measured(TensorRule(abs, "entries", measures=(order,)), [values])["all"]
    np.testing.assert_array_equal([cut.threshold for cut in found], np.sort(values))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_may_depend_on_how_many_values_are_positive(dtype):
    asked = []

    def ranks(given, k, size, positive):
        asked.append((k, size, positive))
        return (positive // 2,)

    lists = [np.array([0, 2, 0, -0.0, 1, 3, 1e-45], dtype), np.zeros(7, dtype)]
    order = one_list("half", ranks, by_positive=True)
    found = measured(TensorRule(abs, "entries", measures=(order,)), lists, 2)["half"]
    assert asked == [(0, 7, 4), (1, 7, 0)]
    np.testing.assert_array_equal(np.flatnonzero(found[0][0].keeps(lists[0], 0)), [1, 5])
    assert not found[1][0].keeps(lists[1], 0).any()


def test_nothing_is_read_for_what_is_not_needed_or_known_beforehand():
    order = one_list("cut", lambda s, k, size, positive: (0, size, size + 5, -1))
    never = Sum("never", lambda t, k: t.tasks[k], lambda tasks: tasks, lambda given: False)
    rule = TensorRule(abs, "entries", measures=(order, never))
    whole = Whole(10, 1, np.dtype(np.float32), 1, {})
    results = measure(rule, whole, lambda *window: pytest.fail("it was read"))
    assert results.keys() == {"cut"}
    values = np.array([0.0, 1, np.inf])
    kept = [cut.keeps(values, 0).tolist() for cut in results["cut"][0]]
    assert kept == [[False] * 3, [True] * 3, [True] * 3, [False] * 3]


def test_a_tensor_is_read_as_often_as_its_digits_and_once_for_ties():
    def reads(values, **fields):
        order = one_list("cut", lambda s, k, size, positive: (3, size // 2), **fields)
        starts = []

        def piece(start, stop, measured):
            starts.append(start)
            return Tensors(None, (values[start:stop],), (1.0,), {})

        whole = Whole(values.size, 1, values.dtype, 1, {})
        measure(TensorRule(abs, "entries", measures=(order,)), whole, piece)
        return starts.count(0)

    plain, equal = np.arange(1, 51, dtype=np.float32), np.ones(50, np.float32)
    assert [reads(plain), reads(plain.astype(np.float64))] == [2, 4]
    assert reads(plain, by_positive=True) == 2
    assert reads(equal) == 2 + 1 + 2  # and once for each cut the window where it ends
    assert reads(equal, only_thresholds=True) == 2


@pytest.mark.parametrize("at", [1, 2])
def test_values_that_change_between_passes_are_an_error(at):
    values = np.array([5, 5, 5, 1, 1], np.float32)
    reads = iter([values] * at + [np.zeros(5, np.float32)])
    order = one_list("cut", lambda s, k, size, positive: (2,))
    with pytest.raises(ArithmeticError, match="changed while they were measured"):
        measure(
            TensorRule(abs, "entries", measures=(order,)),
            Whole(5, 1, values.dtype, 1, {}),
            lambda *window: Tensors(None, (next(reads),), (1.0,), {}),
        )


def test_threads_and_windows_change_no_cut_and_threads_no_sum():
    lists = [values_of(kind, 4000, 1, np.float32) for kind in ("bfloat16", "plain", "ties")]
    cuts = one_list("cut", lambda s, k, size, positive: (size // 3, size // 2))
    sums = Sum("sum", lambda t, k: t.tasks[k], lambda tasks: tasks)
    rule = TensorRule(abs, "entries", measures=(cuts, sums))
    alone = measured(rule, lists, 64)
    ids = set()

    def on_threads(act, items):
        def acted(item):
            ids.add(threading.get_ident())
            return act(item)

        return pool.map(acted, items)

    with ThreadPoolExecutor(3) as pool:
        together = measured(rule, lists, 64, on_threads)
    assert len(ids) > 1
    assert together["cut"] == alone["cut"] == measured(rule, lists, 1000)["cut"]
    np.testing.assert_array_equal(together["sum"], alone["sum"])
    np.testing.assert_allclose(alone["sum"], [np.sum(v, dtype=np.float64) for v in lists])


def test_a_measure_may_use_those_before_it():
    order = one_list("cut", lambda s, k, size, positive: (2,))
    kept = Sum(
        "kept",
        lambda t, k: t.tasks[k] * t.cuts("cut", k)[0].keeps(t.tasks[k], t.start),
        lambda tasks: tasks,
    )
    lists = [np.array([1.0, 5, 5, 5, 2]), np.array([7.0, 1, 1, 1, 1])]
    rule = TensorRule(lambda t: np.full(5, t.total("kept", 1)), "entries", measures=(order, kept))
    np.testing.assert_array_equal(measured(rule, lists, 2)["kept"], [10, 8])
    tensors = Tensors(None, tuple(lists), (1.0, 1.0), {})
    np.testing.assert_array_equal(combine_whole(rule, tensors), [8] * 5)


def problem(name, shape, seed, share):
    """Tensors of a rule with many equal and unchanged entries, of bfloat16's numbers."""
    method, rng = RULES[name], np.random.default_rng(seed)
    fields = {p.name for p in method.parameters}
    given = GIVEN[seed % (3 if name.startswith("paper della") else 5)]
    base = values_of("bfloat16", int(np.prod(shape)), seed, np.float32).reshape(shape)
    changes = [
        (rng.integers(-4, 5, shape) / 64 * (rng.random(shape) < share)).astype(np.float32)
        for _ in range(method.tasks or 3)
    ]
    draws = [rng.random(shape, np.float32) for _ in changes]
    return Tensors(
        base,
        tuple(np.asarray(base + change) for change in changes),
        (1.0, 0.5, 0.0)[: len(changes)] if method.takes_scales else (1.0,) * len(changes),
        settings_of(method, {k: v for k, v in given.items() if k in fields}),
        draws=draws.__getitem__ if method.random else None,
    )


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.lists(st.integers(1, 65), max_size=3),
    st.integers(1, 30),
)
@pytest.mark.parametrize("name", RULES)
def test_a_merge_of_pieces_is_the_merge_of_the_whole(name, shape, seed, share, at, windows):
    tensors = problem(name, shape, seed, share)
    rule, size = RULES[name].tensor, tensors.base.size
    row = max(1, int(-np.prod(rule.piece_shape(tensors.settings, shape))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "WINDOW", windows)
        whole = combine_whole(rule, tensors)
        results = measure(
            rule,
            Whole(size, row, tensors.base.dtype, len(tensors.tasks), tensors.settings),
            lambda *window: piece_of(rule, tensors, *window),
        )
    ends = sorted({0, size, *(end // row * row for end in at if end < size)})
    pieces = [
        rule.combine(piece_of(rule, tensors, start, stop, results)).reshape(-1)
        for start, stop in itertools.pairwise(ends)
    ]
    assert whole.shape == shape
    np.testing.assert_array_equal(np.concatenate(pieces), whole.reshape(-1))


def test_no_rule_that_adds_task_vectors_reads_whole_tensors():
    names = {name.split()[1] for name in RULES}
    assert names == {"ties", "dare_linear", "dare_ties", "della", "della_linear"} | {
        "breadcrumbs",
        "breadcrumbs_ties",
        "sce",
        "arcee_fusion",
    }
    assert {RULES[name].tensor.reads for name in RULES} == {"entries", "rows"}
