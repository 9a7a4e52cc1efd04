"""Flags beside a recipe of mergekit: what they add to it, and what it leaves them nothing to do."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.mergekit_models import ROWS, folder, merge, models, refused, tokens

LINEAR = """
merge_method: linear
models:
- {model: a, parameters: {weight: 0.5}}
- {model: b, parameters: {weight: 0.5}}
"""
TIES = """
merge_method: ties
base_model: a
models: [{model: b, parameters: {weight: 1, density: 0.5}}]
"""
SLICES = """
merge_method: linear
base_model: x
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_union_by_the_flag_is_that_of_the_recipe():
    found = models("a", "b")
    words = "abcdefgh"
    tokens("a", words)
    tokens("b", words[::-1])
    assert "tokenizer_source: union" in refused(LINEAR)
    by_flag = merge(LINEAR, "--vocab", "union")
    by_key = merge(LINEAR + "tokenizer_source: union\n")
    name = "model.embed_tokens.weight"
    expected = (found["a"][name] + found["b"][name][::-1]) / 2
    assert by_flag[name] == pytest.approx(expected, abs=1e-6)
    assert all(np.array_equal(by_flag[n], by_key[n]) for n in by_key)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (LINEAR + "tokenizer_source: union\n", ["--vocab", "base"], "--vocab base: recipe.yml"),
        (LINEAR + "tokenizer: {source: a}\n", ["--side-files", "b"], "--side-files b: recipe.yml"),
        (LINEAR, ["--param", "seed=3"], "'linear' of recipe.yml draws nothing"),
        (LINEAR, ["--on-bad", "base"], "--on-bad base takes the base's values"),
        (LINEAR, ["--on-missing", "base"], "--on-missing base takes the base's values"),
        (TIES, ["--param", "seed=3"], "'ties' of recipe.yml draws nothing"),
        (
            TIES.replace("ties", "dare_ties"),
            ["--param", "seed=-1"],
            "--param seed=-1: expected a whole number from 0 to 9007199254740992",
        ),
        (LINEAR, ["--weights", "precision"], "--weights: 'recipe.yml' is a recipe of mergekit"),
        (LINEAR + "dtype: float32\n", ["--dtype", "BF16"], "--dtype: 'recipe.yml' says it itself"),
        (SLICES, [], "base_model: nothing is made of 'x', which is in none"),
        (
            TIES.replace("0.5", "[0.5, 1.5]"),
            [],
            "models[0].parameters.density: expected a number from 0 to 1",
        ),
        (
            "merge_method: karcher\nparameters: {max_iter: [1, 2]}\n"
            "models: [{model: a}, {model: b}]\n",
            [],
            "recipe.yml: parameters.max_iter: 'max_iter' in 'model.layers.1.",
        ),
        (LINEAR + "chat_template: llama3\n", [], "chat_template: expected the text of a template"),
    ],
)
def test_what_cannot_be_is_one_message_with_the_flag_or_key(text, flags, message):
    models("a", "b")
    assert message in refused(text, *flags)


def test_rows_in_common_are_merged_by_rules_of_entries_and_refused_by_rules_of_whole_tensors():
    a, b = models("a", "b").values()
    longer = {n: np.vstack([t, t[:2]]) if t.shape[0] == ROWS else t for n, t in b.items()}
    folder("longer", 0, tensors=longer, vocab_size=ROWS + 2)
    text = LINEAR.replace("model: b", "model: longer")
    found = merge(text, "--vocab", "common")
    name = "lm_head.weight"
    assert found[name][:ROWS] == pytest.approx((a[name] + longer[name][:ROWS]) / 2, abs=1e-6)
    assert np.array_equal(found[name][ROWS:], longer[name][ROWS:])  # which only one model has
    columns = "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n"
    message = refused(text.replace("linear", "nuslerp") + columns, "--vocab", "common")
    assert "has other rows in one of the models, and nuslerp merges whole tensors" in message


def test_the_base_model_of_an_average_gives_config_and_side_files():
    models("a")
    folder("b", 1, rope_theta=5.0)
    Path("b", "generation_config.json").write_text('{"top_k": 3}')
    Path("a", "generation_config.json").write_text('{"top_k": 7}')
    merge(LINEAR + "base_model: b\n")
    assert json.loads(Path("out/config.json").read_text())["rope_theta"] == 5.0
    assert json.loads(Path("out/generation_config.json").read_text())["top_k"] == 3
