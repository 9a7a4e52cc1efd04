"""Slices of models that differ: tied heads, bases, missing tensors, widths and dtypes."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.mergekit_models import close, folder, merge, models, refused, shapes_of
from tests.tokenized import EMBEDDING, HEAD

TAILS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config():
    return json.loads(Path("out/config.json").read_text())


def tied(name, tensors, *, stored=False, **settings):
    """A model whose head is its embedding, with a copy of it or without."""
    tensors = {n: a for n, a in tensors.items() if n != HEAD}
    if stored:
        tensors[HEAD] = tensors[EMBEDDING]
    return folder(name, 0, tensors=tensors, tie_word_embeddings=True, **settings)


def recipe(method, *rows, **keys):
    """A recipe of slices; each row has the models of one slice of the layers from `first` on."""
    slices = [
        {"sources": [{"model": m, "layer_range": [first, end]} for m in names]}
        for first, end, names in rows
    ]
    return json.dumps({"merge_method": method, "slices": slices} | keys)


def head_of(model):
    """What a model multiplies its last states with."""
    return np.float64(model.get(HEAD, model[EMBEDDING]))


HALF = {"parameters": {"weight": 0.5}}
ENDS = {  # the models of the first slice and those of the last one
    "the tied model comes last": ("passthrough", "x", "ty"),
    "the tied model comes first": ("passthrough", "ty", "x"),
    "a tied one stands between": ("passthrough", "x", "ty x"),
    "only the last slice has a tied one": ("linear", "x y", "x ty"),
    "both slices have the same tied one": ("linear", "x ty", "x ty"),
    "the slices have different tied ones": ("linear", "x tb", "x ty"),
    "the tied one comes first in its slice": ("linear", "tb x", "ty x"),
    "no model of the last slice has a head": ("linear", "x y", "ty tb"),
    "a tied one stores a copy of its head": ("linear", "x tb", "tc ty"),
}


@pytest.mark.parametrize(("method", "first", "last"), ENDS.values(), ids=ENDS)
def test_the_head_is_made_of_the_heads_of_the_last_slice(method, first, last):
    found = models("x", "y", "b")
    found |= {"ty": tied("ty", found["y"]), "tb": tied("tb", found["b"])}
    found["tc"] = tied("tc", tiny.arrays(7, shapes_of()), stored=True)
    if method == "passthrough":
        rows = [(i, i + 1, [m]) for i, m in enumerate([first, *last.split()])]
    else:
        rows = [(0, 1, first.split()), (1, 3, last.split())]
    merged = merge(recipe(method, *rows, **(HALF if method == "linear" else {})))
    firsts, lasts = rows[0][2], rows[-1][2]
    expected = {
        EMBEDDING: np.mean([np.float64(found[m][EMBEDDING]) for m in firsts], 0),
        HEAD: np.mean([head_of(found[m]) for m in lasts], 0),
    }
    close({n: merged[n] for n in expected}, expected)
    assert config()["tie_word_embeddings"] is False


def test_the_head_of_a_task_vector_is_that_of_the_tied_models():
    found = models("base", "x", "y", base="base")
    found |= {n: tied(n, found[m]) for n, m in {"tb": "base", "tx": "x"}.items()}
    rows = [(0, 1, ["base", "y"]), (1, 3, ["base", "tx"])]
    merged = merge(recipe("task_arithmetic", *rows, base_model="base", **HALF))
    base, task = np.float64(found["base"][HEAD]), found["x"][EMBEDDING]
    close({HEAD: merged[HEAD]}, {HEAD: base + 0.5 * (task - base)})


def test_slices_of_tied_models_alone_have_no_head():
    found = models("x", "y")
    found |= {"tx": tied("tx", found["x"]), "ty": tied("ty", found["y"])}
    merged = merge(recipe("passthrough", (0, 2, ["tx"]), (2, 3, ["ty"])))
    assert set(merged) == set(shapes_of()) - {HEAD}
    np.testing.assert_array_equal(merged[EMBEDDING], found["x"][EMBEDDING])
    assert config()["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("method", "first", "last"), [("passthrough", "x", "lost"), ("linear", "tx x", "lost x")]
)
def test_a_head_that_was_lost_is_not_replaced_by_an_embedding(method, first, last):
    found = models("x", "y")
    tied("tx", found["x"])
    folder("lost", 0, tensors={n: a for n, a in found["y"].items() if n != HEAD})
    rows = [(0, 2, first.split()), (2, 3, last.split())]
    said = refused(recipe(method, *rows, **(HALF if method == "linear" else {})))
    assert "'lost'" in said
    assert HEAD in said
    assert "tie_word_embeddings false" in said
