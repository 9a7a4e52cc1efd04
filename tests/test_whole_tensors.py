"""Merges by a rule for whole tensors: what it is given, and that pieces change no bit."""

from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.errors import BmergeError, MismatchError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.methods import METHODS
from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.tensors import TensorRule, by_tensor, changes_products
from mergekit_bayes.plan import plan_merge
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


def method(combine, reads, **fields):
    return Method(
        "of_tensors",
        by_tensor,
        needs_base=True,
        needs_precision=False,
        summary="For tests.",
        example="bmerge merge A B --base BASE --method of_tensors",
        tensor=TensorRule(combine, reads),
        **fields,
    )


DRAWN = method(
    kept,
    "products",
    parameters=(Parameter("density", 0.5, "kept", 0, 1), Parameter("seed", 0, "seed", 0, 9)),
    random=True,
)
RANKED = method(ranked, "tensor")


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


@pytest.mark.parametrize("by", [DRAWN, RANKED], ids=["products", "tensor"])
def test_neither_chunks_nor_threads_change_a_bit(world, monkeypatch, by):
    merge(monkeypatch, by, "one.safetensors", threads=1)
    with open("one.safetensors", "rb") as file:
        expected = file.read()
    for chunk, threads in ((1 << 12, 1), (77, 3)):
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


def test_a_dry_run_tells_the_memory_of_whole_tensors(world, monkeypatch):
    monkeypatch.setitem(METHODS, "of_tensors", RANKED)
    config = MergeConfig(
        models=("a.safetensors",), base="base.safetensors", method="of_tensors", out="o.safetensors"
    )
    with plan_merge(config) as plan:
        assert any("'a.weight', takes up to about 14 MB" in note for note in plan.notes)
