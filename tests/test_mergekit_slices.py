"""Slices of models that differ: tied heads, bases, missing tensors, widths and dtypes."""

import json
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from tests import tiny, tokenized
from tests.mergekit_models import close, folder, merge, models, refused, shapes_of
from tests.tokenized import EMBEDDING, HEAD, word_level

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


def changed(change, seed):
    """The tensors of a model, changed: (name, array) -> (name, array), or None to drop it."""
    pairs = [change(n, a) for n, a in tiny.arrays(seed, shapes_of()).items()]
    return dict(pair for pair in pairs if pair)


def widened(name, array):
    return name, np.tile(array, (2,) * array.ndim)


def as_experts(name, array):
    return name.replace("mlp.up_proj", "block_sparse_moe.experts.0.w1"), array


def without_norms(name, array):
    return None if "input_layernorm" in name else (name, array)


MISFITS = {
    "other widths": (widened, {"hidden_size": 8}, "input_layernorm.weight"),
    "longer rows": (lambda n, a: (n, a if "mlp" not in n else np.tile(a, (2, 1))), {}, "[12, 4]"),
    "tensors of another architecture": (as_experts, {}, "block_sparse_moe.experts.0.w1.weight"),
    "fewer tensors": (without_norms, {}, "input_layernorm.weight"),
}


@pytest.mark.parametrize(("change", "settings", "told"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_slices_of_layers_that_do_not_follow_each_other_are_refused(method, change, settings, told):
    models("x")
    folder("o", 5, tensors=changed(change, 5), **settings)
    rows = [(0, 2, ["x"]), (1, 3, ["o", "o"] if method == "linear" else ["o"])]
    said = refused(recipe(method, *rows, **(HALF if method == "linear" else {})))
    assert "recipe.yml: slices[1].sources[0].model: layer 1 of 'o'" in said
    assert told in said
    assert "'x'" in said


def test_layers_of_kinds_that_the_first_model_has_may_be_stacked():
    """Dense layers and layers of experts in one model, and constants that a model stores."""

    def mixed(name, array):
        return as_experts(name, array) if "layers.2." in name else (name, array)

    def behind(name, array):
        return as_experts(name, array) if "layers.0." not in name else (name, array)

    first, found = changed(mixed, 5), changed(behind, 6)
    folder("m", 5, tensors=first)
    constant = "model.layers.1.self_attn.rotary_emb.inv_freq"
    folder("o", 6, tensors=found | {constant: np.ones(2, np.float32)})
    merged = merge(recipe("passthrough", (0, 3, ["m"]), (0, 2, ["o"])))
    tails = {n.split(".", 3)[3] for n in merged if "layers.4." in n}
    assert "block_sparse_moe.experts.0.w1.weight" in tails
    np.testing.assert_array_equal(
        merged["model.layers.3.mlp.up_proj.weight"], found["model.layers.0.mlp.up_proj.weight"]
    )
    assert "model.layers.2.block_sparse_moe.experts.0.w1.weight" in first


def test_a_quantised_model_is_told_as_such_in_any_slice():
    found = models("x", "y")
    claim = {"quantization_config": {"quant_method": "fp8"}}
    folder("o", 5, tensors=found["y"], dtype="F8_E4M3", **claim)
    said = refused(recipe("passthrough", (0, 2, ["x"]), (2, 3, ["o"])))
    assert "'o' is quantised" in said


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
@pytest.mark.parametrize("with_base", [0, 1])
def test_a_base_of_some_slices_only_is_refused(method, with_base):
    models("base", "x", "y", base="base")
    content = json.loads(recipe(method, (0, 2, ["x", "y"]), (2, 3, ["x", "y"]), **HALF))
    piece = content["slices"][with_base]
    piece["sources"].append({"model": "base", "layer_range": [2 * with_base, 2 + with_base]})
    piece["base_model"] = "base"
    said = refused(json.dumps(content))
    assert f"recipe.yml: slices[{with_base}].base_model: " in said
    assert f"none in slices[{1 - with_base}]" in said


def test_slices_may_have_bases_of_their_own():
    found = models("base", "x", "y", base="base")
    content = json.loads(recipe("task_arithmetic", (0, 2, ["base", "x"]), (2, 3, ["y", "x"])))
    for piece, base in zip(content["slices"], ("base", "y"), strict=True):
        piece["base_model"] = base
    merged = merge(json.dumps(content | HALF))
    for layer, base in ((1, "base"), (2, "y")):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        wanted = (np.float64(found[base][name]) + found["x"][name]) / 2
        close({name: merged[name]}, {name: wanted})


def test_what_a_model_of_a_slice_lacks_counts_as_unchanged_by_on_missing_base():
    found = models("base", "x", "y", base="base")
    for layer, kept in ((1, "mlp"), (2, "input_layernorm")):
        own = {n: a for n, a in found["y"].items() if f"layers.{layer}.{kept}" not in n}
        folder(f"miss{layer}", 3, tensors=own)
    rows = [(0, 2, ["base", "x", "miss1"]), (1, 3, ["x", "miss2", "base"])]
    text = recipe("task_arithmetic", *rows, base_model="base", **HALF)
    merged = merge(text, "--on-missing", "base")
    assert "is in 'base' but not in" in refused(text)
    lacking = {1: "mlp.up_proj.weight", 3: "input_layernorm.weight"}
    for layer, number in enumerate((0, 1, 1, 2)):
        for tail in TAILS:
            name = f"model.layers.{number}.{tail}"
            models_of = ["x"] if lacking.get(layer) == tail else ["x", "y"]
            base = np.float64(found["base"][name])
            wanted = base + 0.5 * sum(found[m][name] - base for m in models_of)
            new = f"model.layers.{layer}.{tail}"
            close({new: merged[new]}, {new: wanted})


def tokens(name, seed, words, dtype):
    """A model with a tokenizer of its own."""
    tokenizer = word_level(words)
    tokenized.save(Path(name), tokenizer)
    rows = tokenizer.get_vocab_size()
    tensors = tiny.arrays(seed, shapes_of(3, rows))
    return folder(name, seed, tensors=tensors, dtype=dtype, vocab_size=rows)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("out", [None, "float32"])
def test_rows_of_a_mean_and_of_padding_do_not_change_the_dtype_of_slices(dtype, out):
    for seed, (name, words) in enumerate({"p": "a b", "q": "a b c", "r": "a c"}.items()):
        tokens(name, seed, words.split(), dtype)
    rows = [(0, 2, ["p", "q", "r"]), (1, 3, ["r", "p", "q"])]
    keys = {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}} | HALF
    merge(recipe("linear", *rows, **keys, **({} if out is None else {"out_dtype": out})))
    with SafetensorsSource([Path("out/model.safetensors")]) as source:
        dtypes = {name: spec.dtype for name, spec in source.specs.items()}
        assert source.specs[EMBEDDING].shape[0] == source.specs[HEAD].shape[0] == 16
    assert set(dtypes.values()) == {"F32" if out else dtype}, dtypes
