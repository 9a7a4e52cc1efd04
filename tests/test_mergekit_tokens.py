"""Recipes of mergekit that choose tokens: what is written, against what mergekit 0.1.5 wrote."""

import json

import numpy as np
import pytest

from mergekit_bayes.checkpoint.tokenizer_parts import read_parts
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.merge import MergeConfig
from mergekit_bayes.merge.run import carry_out
from mergekit_bayes.mergekit.document import read_recipe
from mergekit_bayes.mergekit.planning import plan_recipe
from tests import tiny, tokenized
from tests.tokenized import EMBEDDING, HEAD, bpe, word_level

WORDS = ["a", "b", "c"]
MERGES = [("a", "b"), ("c", "d")]


def scaled(folder, tokenizer, scale):
    """A model with `scale` (i + 1 + column / 16) in row i; the head is minus it."""
    tokenized.model(folder, tokenizer)
    count = tokenizer.get_vocab_size()
    rows = scale * (np.arange(1, count + 1)[:, None] + np.arange(8)[None] / 16)
    tensors = {EMBEDDING: rows.astype(np.float32), HEAD: -rows.astype(np.float32)}
    (folder / "model.safetensors").unlink()
    tiny.write(folder / "model.safetensors", tensors | {"model.norm.weight": np.ones(8, "f")})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": count}
    config |= {"num_hidden_layers": 0, "hidden_size": 8, "num_attention_heads": 2}
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def merge(out, **content):
    recipe = read_recipe({"dtype": "float32", **content}, "recipe.yml")
    with plan_recipe(recipe, MergeConfig(models=("recipe.yml",), out=str(out))) as plan:
        return carry_out(plan)


@pytest.fixture
def models(tmp_path):
    return (
        scaled(tmp_path / "base", word_level(WORDS), 1),
        scaled(tmp_path / "a", word_level(WORDS, ["<|im_start|>", "<|im_end|>"]), 100),
        scaled(tmp_path / "b", word_level(WORDS, ["<pad>", "<|im_end|>", "<b>"]), 10000),
    )


def linear(models, weights):
    weighed = zip(models, weights, strict=True)
    return {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in weighed],
        "parameters": {"normalize": False},
    }


def rows_for(choice, a, b):
    """The rows of base, a and b that mergekit gave, first column."""
    if choice == "union":
        return (
            [1, 2, 3, 4, 5, 6, 700, 40400, 70000, 90000],
            [100, 200, 300, 400, 500, 600, 700, 800, 70000, 90000],
            [10000, 20000, 30000, 40000, 50000, 60000, 700, 80000, 70000, 90000],
        )
    if choice == "base":
        return (
            [1, 2, 3, 4, 5, 6],
            [100, 200, 300, 400, 500, 600],
            [10000, 20000, 30000, 40000, 50000, 60000],
        )
    return (
        [1, 2, 3, 4, 5, 6, 700, 40400],
        [100, 200, 300, 400, 500, 600, 700, 800],
        [10000, 20000, 30000, 40000, 50000, 60000, 700, 80000],
    )


@pytest.mark.parametrize("form", ["tokenizer_source", "tokenizer"])
@pytest.mark.parametrize("choice", ["union", "base", "a"])
def test_linear_merges_have_the_rows_that_mergekit_gives(tmp_path, models, choice, form):
    weights = (0.5, 0.25, 0.125)
    source = models[1] if choice == "a" else choice
    tokenizer = source if form == "tokenizer_source" else {"source": source}
    merge(tmp_path / "out", **linear(models, weights), base_model=models[0], **{form: tokenizer})
    written = tiny.read(tmp_path / "out")
    expected = np.array(weights) @ np.array(rows_for(choice, *models[1:]))
    np.testing.assert_allclose(written[EMBEDDING][:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(written[HEAD], -written[EMBEDDING], rtol=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == len(expected)
    assert read_parts(tmp_path / "out").count == len(expected)


def test_tokens_with_rows_of_their_own_and_padding(tmp_path, models):
    base, a, b = models
    tokens = {
        "<|im_start|>": {"source": a},
        "<|im_end|>": {"source": a},
        "<new>": {"source": {"kind": "zero"}},
        "<pad>": {"source": {"kind": "model_token", "model": a, "token": "a"}},
        "<b>": {"source": {"kind": "model_token", "model": b, "token_id": 4}, "force": True},
        "c": {"source": a, "force": True},
        "<n2>": {"source": {"kind": "model_token", "model": b, "token_id": 5}},
    }
    weights = (0.5, 0.25, 0.125)
    tokenizer = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 7}
    merge(tmp_path / "out", **linear(models, weights), base_model=base, tokenizer=tokenizer)
    rows = (
        [1, 2, 3, 4, 5, 600, 700, 800, 400, 50000, 0, 60000, 9376.25, 9376.25],
        [100, 200, 300, 400, 500, 600, 700, 800, 400, 50000, 0, 60000, 9500, 9500],
        [1e4, 2e4, 3e4, 4e4, 5e4, 600, 700, 8e4, 7e4, 5e4, 0, 6e4, 34275, 34275],
    )
    written = tiny.read(tmp_path / "out")
    np.testing.assert_allclose(
        written[EMBEDDING][:, 0], np.array(weights) @ np.array(rows), rtol=1e-6
    )
    numbers = read_parts(tmp_path / "out").numbers
    assert [numbers[token] for token in ("<new>", "<n2>", "<b>")] == [10, 11, 9]


def test_slerp_and_passthrough_with_padding(tmp_path):
    x = scaled(tmp_path / "x", bpe(MERGES), 1)
    z = scaled(tmp_path / "z", bpe(MERGES, ["<im>"]), 10000)
    merge(
        tmp_path / "slerp",
        merge_method="slerp",
        base_model=x,
        models=[{"model": x}, {"model": z}],
        parameters={"t": 0.5},
        tokenizer={"source": "union", "pad_to_multiple_of": 4},
    )
    first, step = 5742.9268, 5742.9268
    found = tiny.read(tmp_path / "slerp")[EMBEDDING]
    assert found.shape == (12, 8)
    np.testing.assert_allclose(found[10:, 0], [37327.875] * 2, rtol=2e-6)
    np.testing.assert_allclose(found[9, 0], 114847.0547, rtol=2e-6)
    np.testing.assert_allclose(found[:9, 0], first + step * np.arange(9), rtol=2e-6)
    merge(
        tmp_path / "pass",
        merge_method="passthrough",
        models=[{"model": z}],
        tokenizer={"source": z, "pad_to_multiple_of": 16},
    )
    found = tiny.read(tmp_path / "pass")[EMBEDDING][:, 0]
    np.testing.assert_array_equal(found, [*np.arange(1, 11) * 1e4, *[55000] * 6])


def test_task_vectors_are_those_of_the_same_tokens(tmp_path):
    x = scaled(tmp_path / "x", bpe(MERGES), 1)
    f = scaled(tmp_path / "f", bpe(MERGES, ["<t>"]), 1)
    z = scaled(tmp_path / "z", bpe(MERGES, ["<im>"]), 10000)
    merge(
        tmp_path / "out",
        merge_method="task_arithmetic",
        base_model=x,
        models=[{"model": m, "parameters": {"weight": 1.0}} for m in (f, z)],
        tokenizer_source="union",
    )
    found = tiny.read(tmp_path / "out")[EMBEDDING][:, 0]
    numbers = read_parts(tmp_path / "out").numbers
    np.testing.assert_allclose(found[:9], np.arange(1, 10) * 1e4, rtol=1e-6)
    np.testing.assert_allclose(found[[numbers["<t>"], numbers["<im>"]]], [10, 100000], rtol=1e-6)


def test_a_token_without_a_source_and_lists_without_tokens_are_refused(tmp_path, models):
    with pytest.raises(ConfigError, match="'a' has no source"):
        merge(
            tmp_path / "out",
            **linear(models, (1, 1, 1)),
            base_model=models[0],
            tokenizer={"tokens": {"a": {"force": True}}},
        )
    with pytest.raises(MismatchError, match=r"another token in .*tokenizer_source: union"):
        merge(tmp_path / "out", **linear(models, (1, 1, 1)), base_model=models[0])
