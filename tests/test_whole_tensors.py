"""Merges by a rule for whole tensors: what it is given, and that pieces change no bit."""

from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.errors import BmergeError, MismatchError
from mergekit_bayes.kernels.base import keyed_draws, task_key
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.methods import METHODS, settings_of
from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.measuring import combine_whole
from mergekit_bayes.methods.tensors import (
    Order,
    Sum,
    TensorRule,
    Tensors,
    by_tensor,
    changes_products,
)
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.stream import units
from tests import tiny

SHAPES = {"a.weight": (700, 500), "a.bias": (7,), "b.weight": (3, 4, 5), "scalar": ()}


def kept(tensors):
    """The base plus weighed random halves of the changes, over the norm of the first change."""
    products = changes_products(tensors.products)
    norm = np.sqrt(products[0, 0]).astype(tensors.base.dtype)
    total = tensors.base.copy()
    for t, change in enumerate(tensors.changes):
        keep = tensors.draws(t) < tensors.number("density", t)
        total += np.float32(tensors.weights[t]) * np.where(keep, change, 0) / norm
    return total


def ranked(tensors):
    """The first task's entries in order, minus the base's least one."""
    if not tensors.tasks[0].any():
        raise ArithmeticError("there is nothing to rank")
    ranks = np.argsort(np.argsort(tensors.tasks[0].reshape(-1), kind="stable"))
    return (ranks.reshape(tensors.base.shape) - tensors.base.min()).astype(tensors.base.dtype)


def shrunk(tensors):
    """The largest changes of the first task, in the place of the base, by how large all are."""
    (cut,) = tensors.cuts("largest", 0)
    kept = cut.keeps(_size(tensors, 0), tensors.start)
    factor = np.float32(tensors.total("kept", 0) / tensors.size)
    return np.where(kept, factor * tensors.changes[0], tensors.base)


def _size(tensors, task):
    if tensors.number("limit") < np.abs(tensors.tasks[task]).max():
        raise ArithmeticError("an entry is too large")
    return np.floor(np.abs(tensors.changes[task]) * 64) / 64  # many of them equal


def _kept(tensors, task):
    (cut,) = tensors.cuts("largest", task)
    return np.where(cut.keeps(_size(tensors, task), tensors.start), _size(tensors, task), 0)


def centred(tensors):
    """The last axis less its maximum, and less a drawn entry's mean of the whole tensor."""
    rows = tensors.tasks[0] - tensors.tasks[0].max(axis=-1, keepdims=True)
    return rows + np.float32(tensors.total("drawn", 0) / tensors.size)


def _drawn(tensors, task):
    return (tensors.draws(task) < 0.5) * tensors.tasks[task].argmax(axis=-1, keepdims=True)


def method(combine, reads, measures=(), **fields):
    return Method(
        "of_tensors",
        by_tensor,
        needs_base=True,
        needs_precision=False,
        summary="For tests.",
        example="bmerge merge A B --base BASE --method of_tensors",
        tensor=TensorRule(combine, reads, measures=measures),
        **fields,
    )


DRAWN = method(
    kept,
    "products",
    parameters=(Parameter("density", 0.5, "kept", 0, 1), Parameter("seed", 0, "seed", 0, 9)),
    random=True,
)
RANKED = method(ranked, "tensor")
MEASURED = method(
    shrunk,
    "entries",
    (
        Order("largest", _size, lambda s, k, size, _: (int(0.3 * size),), lambda tasks: tasks),
        Sum("kept", _kept, lambda tasks: tasks),
    ),
    parameters=(Parameter("limit", 1e9, "of what can be merged", 0, 1e9),),
)
BY_ROWS = method(
    centred,
    "rows",
    (Sum("drawn", _drawn, lambda tasks: tasks),),
    parameters=(Parameter("seed", 0, "seed", 0, 9),),
    random=True,
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny.arrays(0, SHAPES)
    models = {"base": base}
    for i, name in enumerate("ab"):
        change = tiny.arrays(i + 1, SHAPES)
        models[name] = {n: base[n] + np.float32(0.1) * change[n] for n in SHAPES}
    for name, tensors in models.items():
        tiny.write(f"{name}.safetensors", tensors)
    return models


def merge(monkeypatch, by, out, *, chunk=None, threads=None, models=("a", "b"), **settings):
    monkeypatch.setitem(METHODS, "of_tensors", by)
    files = tuple(f"{m}.safetensors" for m in models)
    config = MergeConfig(
        models=files, base="base.safetensors", method="of_tensors", out=out, **settings
    )
    report = run_merge(config, chunk=chunk, threads=threads)
    return report, tiny.read(out)


@pytest.mark.parametrize(
    "by", [DRAWN, RANKED, MEASURED, BY_ROWS], ids=["products", "tensor", "measures", "rows"]
)
def test_neither_chunks_nor_threads_nor_units_change_a_bit(world, monkeypatch, by):
    merge(monkeypatch, by, "one.safetensors", threads=1)
    with open("one.safetensors", "rb") as file:
        expected = file.read()
    for chunk, threads, unit in ((1 << 12, 1, 1 << 22), (77, 3, 70_001)):
        monkeypatch.setattr(units, "UNIT", unit)
        merge(monkeypatch, by, "other.safetensors", chunk=chunk, threads=threads, force=True)
        with open("other.safetensors", "rb") as file:
            assert file.read() == expected


def test_a_rule_is_given_products_draws_weights_and_settings(world, monkeypatch):
    report, found = merge(
        monkeypatch, DRAWN, "o.safetensors", scale=(2.0, 0.5), param={"density": 0.25}
    )
    for name in SHAPES:
        base, a, b = (np.float64(world[m][name]) for m in ("base", "a", "b"))
        norm = np.sqrt(((a - base) ** 2).sum())
        steps = (found[name] - base) * norm
        if name == "a.weight":
            # Each task's half is kept or not: four values of a linear combination.
            near = [
                abs(steps - (i * 2 * (a - base) + j * (b - base) / 2))
                for i in (0, 1)
                for j in (0, 1)
            ]
            assert np.min(near, axis=0).max() < 1e-4
            shares = [np.mean(np.argmin(near, axis=0) == k) for k in range(4)]
            assert shares == pytest.approx([9 / 16, 3 / 16, 3 / 16, 1 / 16], abs=0.01)
    assert report.settings["param"] == {"density": 0.25, "seed": 0}
    assert report.changed_share == 1.0


def test_a_tensor_keeps_its_shape_and_is_written_in_its_dtype(world, monkeypatch):
    _, found = merge(monkeypatch, RANKED, "o.safetensors", dtype="F64")
    for name, shape in SHAPES.items():
        assert found[name].shape == shape
        assert found[name].dtype == np.float64
        first = world["a"][name].reshape(-1)
        ranks = np.argsort(np.argsort(first, kind="stable")).reshape(shape)
        assert found[name] == pytest.approx(ranks - world["base"][name].min())


def test_what_a_rule_cannot_merge_is_an_error_with_the_tensors_name(world, monkeypatch):
    Path("a.safetensors").unlink()
    tiny.write("a.safetensors", world["a"] | {"a.bias": np.zeros(7, np.float32)})
    with pytest.raises(MismatchError, match=r"'a\.bias': there is nothing to rank"):
        merge(monkeypatch, RANKED, "o.safetensors")


def test_bad_entries_are_refused_or_take_the_bases_value(world, monkeypatch):
    bad = world["a"]["a.weight"].copy()
    bad[3, 4] = np.nan
    Path("a.safetensors").unlink()
    tiny.write("a.safetensors", world["a"] | {"a.weight": bad})
    with pytest.raises(BmergeError, match=r"'a\.weight' is nan at flat index 1504"):
        merge(monkeypatch, DRAWN, "o.safetensors")
    report, found = merge(monkeypatch, DRAWN, "o.safetensors", on_bad="base")
    assert [model.mended for model in report.models] == [0, 1, 0]
    assert np.isfinite(found["a.weight"]).all()


@pytest.mark.parametrize("by", [MEASURED, BY_ROWS], ids=["measures", "rows"])
def test_a_merge_of_files_is_the_rule_on_tensors_in_memory(world, monkeypatch, by):
    _, found = merge(monkeypatch, by, "o.safetensors", chunk=999)
    files = [open_posterior(f"{m}.safetensors") for m in "ab"]
    for name, shape in SHAPES.items():
        keys = [task_key(0, name, file.identity) for file in files]
        drawn = [keyed_draws(key, 0, int(np.prod(shape))).reshape(shape) for key in keys]
        tensors = Tensors(
            world["base"][name],
            tuple(world[m][name] for m in "ab"),
            (1.0, 1.0),
            settings_of(by, {}),
            draws=drawn.__getitem__,
        )
        np.testing.assert_array_equal(found[name], combine_whole(by.tensor, tensors))


def test_a_rule_is_given_whole_rows_and_no_more_of_them_than_a_chunk_has_room_for(
    world, monkeypatch
):
    shapes = []

    def seen(tensors):
        shapes.append(tensors.base.shape)
        return tensors.base

    merge(monkeypatch, method(seen, "rows"), "o.safetensors", chunk=150 * 500)
    assert sorted(set(shapes)) == [(1, 1), (1, 7), (12, 5), (100, 500), (150, 500)]


def test_what_cannot_be_measured_is_an_error_with_the_tensors_name(world, monkeypatch):
    for threads in (1, 3):
        with pytest.raises(MismatchError, match=r"'a\.weight': an entry is too large"):
            merge(monkeypatch, MEASURED, "o.safetensors", threads=threads, param={"limit": 4})


def test_numbers_that_are_none_are_measured_without_a_warning(world, monkeypatch, recwarn):
    nothing = Sum("log", lambda t, k: np.log(0 * t.tasks[k]), lambda tasks: tasks)
    by = method(lambda t: t.base + np.float32(1 / t.total("log", 0)), "entries", (nothing,))
    _, found = merge(monkeypatch, by, "o.safetensors", threads=3)
    np.testing.assert_array_equal(found["a.bias"], world["base"]["a.bias"])
    assert not recwarn.list


def test_bad_entries_are_replaced_before_they_are_measured(world, monkeypatch):
    for value in (np.nan, world["base"]["a.weight"][3, 4]):
        changed = world["a"]["a.weight"].copy()
        changed[3, 4] = value
        Path("a.safetensors").unlink()
        tiny.write("a.safetensors", world["a"] | {"a.weight": changed})
        out = f"{np.isnan(value)}.safetensors"
        merge(monkeypatch, MEASURED, out, on_bad="base")
        if np.isnan(value):
            with pytest.raises(BmergeError, match=r"'a\.weight' is nan at flat index 1504"):
                merge(monkeypatch, MEASURED, "o.safetensors")
    np.testing.assert_array_equal(
        tiny.read("True.safetensors")["a.weight"], tiny.read("False.safetensors")["a.weight"]
    )


@pytest.mark.parametrize("by", [MEASURED, BY_ROWS], ids=["measures", "rows"])
def test_rows_that_all_models_have_are_measured_and_merged(world, monkeypatch, by):
    rng = np.random.default_rng(0)
    for model, rows in (("base", 9), ("a", 11)):
        Path(f"{model}.safetensors").unlink()
        shapes = {"wte.weight": (rows, 4), "lm_head.weight": (rows, 4), "lm_head.bias": (rows,)}
        world[model] = {n: rng.normal(size=s).astype("f4") for n, s in shapes.items()}
        tiny.write(f"{model}.safetensors", world[model])
    _, found = merge(monkeypatch, by, "o.safetensors", models=("a",), vocab="common", chunk=7)
    for name, base in world["base"].items():
        key = task_key(0, name, open_posterior("a.safetensors").identity)
        draws = keyed_draws(key, 0, base.size).reshape(base.shape)
        task = world["a"][name]
        tensors = Tensors(base, (task[:9],), (1.0,), settings_of(by, {}), draws=[draws].__getitem__)
        np.testing.assert_array_equal(found[name][:9], combine_whole(by.tensor, tensors))
        np.testing.assert_array_equal(found[name][9:], task[9:])


def test_a_dry_run_tells_the_memory_of_whole_tensors(world, monkeypatch):
    monkeypatch.setitem(METHODS, "of_tensors", RANKED)
    config = MergeConfig(
        models=("a.safetensors",), base="base.safetensors", method="of_tensors", out="o.safetensors"
    )
    with plan_merge(config) as plan:
        assert any("'a.weight', takes up to about 14 MB" in note for note in plan.notes)
    for by in (MEASURED, BY_ROWS):
        monkeypatch.setitem(METHODS, "of_tensors", by)
        with plan_merge(config) as plan:
            assert not any("takes up to about" in note for note in plan.notes)
