"""The compiled pass gives the bits of numpy, for every method and dtype, whatever the chunks."""

import importlib
import os
import sys
import time
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest

from mergekit_bayes.checkpoint.codec import decode, encode
from mergekit_bayes.draws import mix, word
from mergekit_bayes.gaussian import DELTA_0, Gaussian, constant, select
from mergekit_bayes.kernels import Chunk, Kind, Numbers, Tally, elementwise, first_pass, row_sums
from mergekit_bayes.kernels.base import keyed_draws, task_key
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.methods import METHODS
from mergekit_bayes.methods.base import Reduction
from mergekit_bayes.methods.histogram import BINS
from tests import tiny
from tests.facts import facts_of

numba = pytest.importorskip("numba", reason="the compiled pass needs numba")
compiled = importlib.import_module("mergekit_bayes.compiled")
fused = importlib.import_module("mergekit_bayes.kernels.fused")
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a pass that fell back to numpy

N, OFFSET = 5000, 12345
# One of the methods that share a rule for entries.
RULES = sorted({m.combine: n for n, m in METHODS.items() if m.tensor is None}.values())
STORED = {"BF16": np.uint16, "F32": np.float32, "F64": np.float64}


def stored(values, dtype):
    return np.frombuffer(encode(values, dtype), STORED[dtype]).reshape(values.shape)


def case(
    name,
    dtype="F32",
    precision="F32",
    rows=None,
    removes=False,
    anchored=False,
    models=None,
    seed=0,
):
    """A kind, a chunk that starts in the middle of a row, and numbers."""
    method = METHODS[name]
    rng = np.random.default_rng(seed)
    models = models or (2 if method.tasks == 2 else 2 + method.needs_base)
    real = np.float64 if dtype == "F64" else np.float32
    tasks = models - method.needs_base
    weighs = method.needs_precision
    means = stored(rng.normal(size=(models, N)), dtype)
    precisions = np.zeros((models, 0), np.float32)
    if weighs:
        precisions = stored(np.exp(rng.normal(size=(models, N))), precision)
    count = 1 if rows is None else N // rows + 2
    facts = random_facts(method, tasks, rng)
    scales = rng.uniform(0.2, 1.0, size=tasks)
    if removes:
        scales[0] = -0.7
    numbers = Numbers(
        scales=tuple(scales),
        facts=facts,
        gains=tuple(rng.uniform(0.5, 2, models)),
        contained=tuple(rng.uniform(0, 0.5, models)),
        base_shares=(0.0, *rng.uniform(0, 0.1, models - 1)),
        floors=tuple(-np.inf if i == 1 else 0.0 for i in range(models)),
        priors=(DELTA_0,) * models,
        anchors=tuple([0.5, -1.0, 0.3][:models]) if anchored else (-1.0,) * models,
        decays=tuple([0.0, 0.0, 0.2][:models]) if anchored else (0.0,) * models,
        keys=tuple(task_key(0, "t", str(i)) for i in range(tasks)),
    ).cast(real)
    chunk = Chunk(
        means,
        precisions,
        rng.uniform(0, 0.1, (models, count)).astype(real),
        (rows or 2 * N) // 2,
        rows or N,
        OFFSET,
        np.zeros(N, STORED[dtype]),
        np.zeros(N if weighs else 0, np.float32),
    )
    return (
        Kind(
            method,
            weighs,
            method.needs_base,
            anchored and weighs,
            removes and weighs,
            pulled=anchored and weighs,
        ),
        chunk,
        numbers,
    )


def random_facts(method, tasks, rng):
    """Facts of the method's own type with numbers in [0.1, 0.9)."""

    def filled(value):
        if value is None:
            return None
        if not isinstance(value, tuple):
            return rng.uniform(0.1, 0.9)
        items = [filled(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)

    return filled(facts_of(method, tasks))


def run(kind, chunk, numbers, *, fused, cut=None):
    """The pass over the whole chunk, or over pieces of `cut` entries."""
    mean, precision = np.zeros_like(chunk.mean), np.zeros_like(chunk.precision)
    tally = Tally(len(chunk.means))
    act = elementwise(kind, fused=fused)
    for a in range(0, N, cut or N):
        b = min(a + (cut or N), N)
        begin = chunk.row - chunk.first + a  # from the start of the first row
        first = min(chunk.row - begin % chunk.row, b - a) if chunk.extras.shape[1] > 1 else b - a
        rows = begin // chunk.row if chunk.extras.shape[1] > 1 else 0
        last = (begin + b - a - 1) // chunk.row + 1 if chunk.extras.shape[1] > 1 else 1
        part = chunk._replace(
            means=np.ascontiguousarray(chunk.means[:, a:b]),
            precisions=np.ascontiguousarray(chunk.precisions[:, a:b]),
            extras=np.ascontiguousarray(chunk.extras[:, rows:last]),
            first=first,
            offset=OFFSET + a,
            mean=mean[a:b],
            precision=precision[a:b],
        )
        act(part, numbers, tally)
    return mean, precision, tally


def check(kind, chunk, numbers, **second):
    plain, fused = run(kind, chunk, numbers, fused=False), run(kind, chunk, numbers, **second)
    for a, b in zip(plain[:2], fused[:2], strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    one, other = plain[2], fused[2]
    for name in ("entries", "bad", "changed", "lost", "guarded"):
        assert getattr(one, name) == getattr(other, name), name
    np.testing.assert_array_equal(one.bad_means, other.bad_means)
    np.testing.assert_array_equal(one.bad_precisions, other.bad_precisions)
    np.testing.assert_allclose(one.stored, other.stored, rtol=1e-5)
    if not one.bad_means.any() and not one.bad_precisions.any():
        np.testing.assert_allclose(one.distances, other.distances, rtol=1e-5)
        np.testing.assert_allclose(one.products, other.products, rtol=1e-5, atol=1e-2)
        assert (one.distances[:, 0] != 0).all() == kind.weighs
        assert (one.products[:, 1] != 0).all() == kind.pulled
    assert other.multiplier == pytest.approx(one.multiplier, rel=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_the_compiled_pass_gives_the_bits_of_numpy(name):
    kind, chunk, numbers = case(name)
    assert np.isfinite(run(kind, chunk, numbers, fused=False)[0]).all()
    check(kind, chunk, numbers, fused=True)


@pytest.mark.parametrize(
    ("settings"),
    [
        {"dtype": "BF16", "precision": "BF16"},
        {"dtype": "F64", "removes": True},
        {"dtype": "BF16", "rows": 77, "removes": True, "anchored": True},
    ],
    ids=str,
)
def test_every_kind_of_numbers_gives_the_same_bits(settings):
    check(*case("gradient_matching", **settings), fused=True)


@pytest.mark.parametrize("name", RULES)
def test_the_bits_do_not_depend_on_the_chunks(name):
    check(*case(name, rows=300), fused=False, cut=1234)


def test_the_compiled_bits_do_not_depend_on_the_chunks():
    check(
        *case("gradient_matching", dtype="BF16", rows=77, removes=True, anchored=True),
        fused=True,
        cut=1234,
    )


def test_a_second_process_finds_the_compiled_pass_in_the_cache():
    """Its key holds what a kernel closes over, pickled: by name, or it would never match."""
    for name, method in METHODS.items():
        if method.tensor is not None:
            continue
        kernels = [fused.make_pass(case(name)[0], type(facts_of(method, 2)))]
        if method.reduction is not None:
            kernels.append(fused.make_reduction(case(name)[0]))
        contents = [c.cell_contents for k in kernels for c in k.py_func.__closure__]
        named = [content for content in contents if isinstance(content, FunctionType | type)]
        assert named, name
        for content in named:
            assert getattr(sys.modules[content.__module__], content.__qualname__) is content


def test_many_models_are_still_one_vectorised_loop():
    kind, chunk, numbers = case("gradient_matching", dtype="BF16", models=9)
    check(kind, chunk, numbers, fused=True)
    seconds = []
    for fused in (False, True):
        act, started = elementwise(kind, fused=fused), time.process_time()
        for _ in range(20):
            act(chunk, numbers, Tally(9))
        seconds.append(time.process_time() - started)
    assert seconds[1] < seconds[0] / 2  # a tenth; without unrolling it is twice as slow as numpy


def test_bad_entries_are_counted_exactly():
    kind, chunk, numbers = case("gradient_matching", removes=True)
    chunk.means[1, [3, 4000]] = np.nan, -np.inf
    chunk.means[0, 17] = np.inf
    chunk.precisions[2, [5, 6, 7, 8]] = -1.0, np.nan, np.inf, -0.0
    check(kind, chunk, numbers, fused=True)
    tally = run(kind, chunk, numbers, fused=True)[2]
    assert tally.bad_means.tolist() == [1, 2, 0]
    assert tally.bad_precisions.tolist() == [0, 0, 3]
    assert tally.bad > 0


def test_a_change_that_rounding_swallows_is_counted():
    kind, chunk, numbers = case("task_arithmetic", dtype="BF16", models=2)
    base = decode(chunk.means[0], "BF16").astype(np.float64)
    moved = stored(base * (1 + 2.0**-7), "BF16")
    chunk.means[1] = np.where(np.arange(N) % 2, moved, chunk.means[0])
    numbers = numbers._replace(scales=(np.float32(0.3),))
    tally = run(kind, chunk, numbers, fused=True)[2]
    expected = stored(base + 0.3 * (decode(chunk.means[1], "BF16") - base), "BF16")
    changed = chunk.means[1] != chunk.means[0]
    assert tally.changed == np.count_nonzero(changed)
    assert tally.lost == np.count_nonzero(changed & (expected == chunk.means[0])) > 0


def test_counts_are_exact_in_a_chunk_of_any_length():
    """A block is counted in 16 bits, and must not be longer than these hold."""
    kind, chunk, numbers = case("task_arithmetic", dtype="BF16", models=2)
    entries = 1 << 17
    means = np.array([[0x3F80], [0x3F81]], np.uint16).repeat(entries, axis=1)  # 1 and the next one
    means[1, 7] = means[0, 7]
    long = chunk._replace(
        means=means, first=entries, row=entries, mean=np.zeros(entries, np.uint16)
    )
    numbers = numbers._replace(scales=(np.float32(0.3),))  # rounds to 1 again
    for fused in (False, True):
        tally = Tally(2)
        elementwise(kind, fused=fused)(long, numbers, tally)
        assert tally.changed == tally.lost == np.count_nonzero(means[1] != means[0])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("rows", [77, None])
@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.reduction is not None))
def test_the_compiled_first_pass_gives_the_bits_of_numpy(name, rows, dtype):
    kind, chunk, numbers = case(name, dtype, rows=rows)
    reduction = METHODS[name].reduction
    count = reduction.count(len(numbers.scales))
    shape, dtype = (
        ((count, BINS), np.int64) if reduction.kind == "histogram" else ((count,), np.float64)
    )
    plain, fused = np.zeros(shape, dtype), np.zeros(shape, dtype)
    first_pass(kind, fused=False)(chunk, numbers, plain)
    first_pass(kind, fused=True)(chunk, numbers, fused)
    np.testing.assert_array_equal(plain, fused)
    assert plain.any()


def test_a_pass_takes_the_constants_of_each_call():
    """They are flattened once for all chunks of a tensor, and kept by identity."""
    kind, chunk, numbers = case("task_arithmetic")
    others = [
        numbers._replace(scales=tuple(np.float32(k * s) for s in numbers.scales))
        for k in range(1, 100)
    ]
    act = elementwise(kind, fused=True)
    for other in [*others, *others[:3]]:
        act(chunk, other, Tally(len(chunk.means)))
        np.testing.assert_array_equal(chunk.mean, run(kind, chunk, other, fused=False)[0])
    wide = case("task_arithmetic", "F64")
    act(wide[1], wide[2], Tally(len(chunk.means)))
    np.testing.assert_array_equal(wide[1].mean, run(*wide, fused=False)[0])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(("rows", "row"), [(1, N), (5, 768), (400, 3), (7, 1)])
def test_sums_of_rows_are_the_same_to_the_bit_and_right(dtype, rows, row):
    values = stored(np.exp(np.random.default_rng(1).normal(size=rows * row)), dtype)
    plain, fused = np.zeros(rows), np.zeros(rows)
    row_sums(values, row, plain, fused=False)
    row_sums(values, row, fused, fused=True)
    np.testing.assert_array_equal(plain, fused)
    expected = decode(values.view(np.uint8), dtype).astype(np.float64).reshape(rows, row).sum(1)
    np.testing.assert_allclose(plain, expected, rtol=1e-13)


def by_count(base, tasks, scales, facts):
    """A rule that breaks the contract: a count in the arithmetic widens float32 when compiled."""
    mean = base.mean
    for i in range(len(tasks)):
        mean = mean + (scales[i] / len(tasks)) * (tasks[i].mean - base.mean)
    return Gaussian(mean, base.precision)


def by_literal(base, tasks, scales, facts):
    """A rule that numba compiles, to float64 in between and other bits than numpy's."""
    return Gaussian(base.mean + (tasks[0].mean - base.mean) * 0.3 / len(tasks), base.precision)


def by_threshold(base, tasks, scales, facts):
    """A rule whose literal leaves no trace in the result's type: 0.1 is no float32."""
    zero = constant(0, base.mean)
    return Gaussian(select(tasks[0].mean > 0.1, base.mean, zero), base.precision)


def by_zip(base, tasks, scales, facts):
    """A rule in Python that numba does not know."""
    moves = [s * (t.mean - base.mean) for s, t in zip(scales, tasks, strict=True)]
    return Gaussian(base.mean + sum(moves), base.precision)


def by_if(base, tasks, scales, facts):
    """A rule that branches without `select`: right when compiled, no rule for arrays."""
    if tasks[0].mean > base.mean:
        return Gaussian(tasks[0].mean, base.precision)
    return Gaussian(base.mean, base.precision)


def by_constant(base, tasks, scales, facts):
    """The contract kept: a number of its own is a constant, a branch a select, a helper plain."""
    mean, count = base.mean, constant(len(tasks), base.mean)
    for i in range(len(tasks)):
        mean = mean + (scales[i] / count) * capped(tasks[i].mean - base.mean)
    return Gaussian(mean, base.precision)


def capped(delta):
    one = constant(1, delta)
    return select(abs(delta) > one, delta / abs(delta), delta)


def with_rule(monkeypatch, combine, **fields):
    fields = {"name": combine.__name__, "combine": combine} | fields
    monkeypatch.setitem(METHODS, fields["name"], METHODS["task_arithmetic"]._replace(**fields))
    return fields["name"]


@pytest.mark.parametrize("rule", [by_count, by_literal, by_threshold, by_zip])
def test_a_rule_that_cannot_be_compiled_merges_in_numpy_and_says_why_once(monkeypatch, rule):
    name = with_rule(monkeypatch, rule)
    with pytest.warns(RuntimeWarning) as caught:
        check(*case(name), fused=True, cut=1234)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert f"'{name}'" in text
    assert "constant(number, like)" in text
    assert "methods/base.py" in text
    assert len(text.splitlines()) == 1
    assert len(text) < 600
    assert "\x1b" not in text


def test_a_rule_that_cannot_run_on_arrays_is_refused_by_name(monkeypatch):
    kind, chunk, numbers = case(with_rule(monkeypatch, by_if))
    with pytest.raises(TypeError, match="'by_if' cannot run on arrays") as error:
        elementwise(kind, fused=False)(chunk, numbers, Tally(len(chunk.means)))
    assert "`select` for branches" in str(error.value)
    assert "methods/base.py" in str(error.value)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_a_rule_that_keeps_the_contract_is_compiled_with_its_helpers(monkeypatch, dtype):
    check(*case(with_rule(monkeypatch, by_constant), dtype=dtype), fused=True)


def test_a_rule_with_a_first_pass_that_cannot_be_compiled_runs_it_in_numpy(monkeypatch):
    halves = Reduction(
        "sum", lambda base, tasks, k: tasks[k].mean * 0.5, lambda tasks: tasks, "model"
    )
    kind, chunk, numbers = case(
        with_rule(monkeypatch, by_constant, name="halves", reduction=halves)
    )
    plain, fused = np.zeros(2), np.zeros(2)
    first_pass(kind, fused=False)(chunk, numbers, plain)
    with pytest.warns(RuntimeWarning, match="'halves'"):
        first_pass(kind, fused=True)(chunk, numbers, fused)
    np.testing.assert_array_equal(plain, fused)


def test_a_strangers_rule_merges_whatever_the_size(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        tiny.write(f"{name}.safetensors", tiny.arrays(i))
    config = MergeConfig(
        models=("a.safetensors", "b.safetensors"),
        base="base.safetensors",
        method=with_rule(monkeypatch, by_count, name="strange"),
        out="plain.safetensors",
    )
    run_merge(config, fused=False)
    with pytest.warns(RuntimeWarning, match="'strange' cannot be compiled"):
        run_merge(config.model_copy(update={"out": "fused.safetensors"}), fused=True, chunk=8)
    assert Path("plain.safetensors").read_bytes() == Path("fused.safetensors").read_bytes()


def test_words_are_those_of_splitmix64():
    assert word(np.zeros(1, np.uint64), np.uint64(1)) == 0xE220A8397B1DCDAF
    words = word(np.uint64(1234567), np.arange(1, 4, dtype=np.uint64))
    assert words.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    seed = word(word(np.full(1, 5, np.uint64), np.uint64(1)) + np.uint64(7), np.uint64(1))
    assert mix(5, 7) == int(seed[0]) >> 1


def test_draws_are_uniform_and_a_matter_of_key_and_entry_alone():
    key = task_key(0, "h.0.weight", "a")
    draws = keyed_draws(key, 0, 200_000)
    assert 0 <= draws.min() < 1e-4
    assert 1 - 1e-4 < draws.max() < 1
    counts, _ = np.histogram(draws, bins=50, range=(0, 1))
    chi_squared = ((counts - 4000) ** 2 / 4000).sum()
    assert chi_squared < 95  # 49 degrees of freedom: p = 1e-4
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01
    np.testing.assert_array_equal(keyed_draws(key, 777, 100), draws[777:877])
    others = [
        task_key(1, "h.0.weight", "a"),
        task_key(0, "h.1.weight", "a"),
        task_key(0, "h.0.weight", "b"),
    ]
    for other in others:
        assert abs(np.corrcoef(draws[:50_000], keyed_draws(other, 0, 50_000))[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("mode", "owner", "is_cached"),
    [
        (0o755, None, True),
        (0o1777, None, True),
        (0o777, None, False),
        (0o755, os.geteuid() + 1000, False),
    ],
)
def test_compiled_code_is_kept_only_where_nobody_else_could_put_code(
    tmp_path, monkeypatch, caplog, mode, owner, is_cached
):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(shared))
    if owner is not None and os.geteuid() == 0:
        os.chown(shared, owner, owner)
    elif owner is not None:  # what this account has made is then of another one
        monkeypatch.setattr(os, "geteuid", lambda: owner)
    function = compiled.compiled()(one)
    assert function() == 1
    assert bool(function.stats.cache_path) == is_cached
    assert ("can be written by other accounts" in caplog.text) != is_cached


def one():
    return 1
