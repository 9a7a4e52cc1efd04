"""Flags beside a recipe of mergekit: what they add to it, and what it leaves them nothing to do."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tests.mergekit_models import ROWS, folder, merge, models, refused, run, tokens

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


def test_a_plan_tells_layers_and_settings(capsys):
    models("a", "b")
    text = """
    merge_method: slerp
    base_model: a
    parameters: {t: [0.25, 0.75]}
    slices:
    - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]
    - sources: [{model: a, layer_range: [2, 3]}, {model: b, layer_range: [0, 1]}]
    """
    Path("recipe.yml").write_text(textwrap.dedent(text))
    plan = " ".join(run("recipe.yml", "-o", "out", "--dry-run").stderr.split())
    assert "slerp of 2 models in 2 slices, by recipe.yml" in plan
    assert "layers 0 to 1 of the output: layers 0 to 1 of 'a' and layers 1 to 2 of 'b'" in plan
    assert "layer 2 of the output: layer 2 of 'a' and layer 0 of 'b'" in plan
    assert "settings of the recipe: t 0.25 to 0.75" in plan
    assert "side-files" not in plan


def test_of_documents_that_all_have_names_the_last_is_the_output():
    found = models("a", "b")
    first = LINEAR + "name: one\n"
    second = LINEAR.replace("model: b", "model: one") + "name: two\n"
    merged = merge(f"{first}---\n{second}")
    name = "model.norm.weight"
    expected = 0.75 * found["a"][name] + 0.25 * found["b"][name]
    assert merged[name] == pytest.approx(expected, abs=1e-6)
    assert "another one needs it" in refused(f"{second}---\n{first}")


def test_settings_of_other_methods_and_seeds_are_told_what_to_do():
    models("a", "b")
    text = LINEAR + "parameters: {int8_mask: true}\n"
    assert "mergekit ignores it there: delete the line" in refused(text)
    assert "the seed is `parameters: {seed: N}`" in refused(LINEAR + "random_seed: 0\n")
    merge(LINEAR + "parameters: {normalize: 1.0}\n")


def test_a_finer_model_and_an_output_without_a_tokenizer_are_told_as_in_every_merge():
    models("a", dtype="BF16")
    models("x", "b")
    for name in "ab":
        tokens(name, "abcdefgh")
    Path("recipe.yml").write_text(LINEAR + "tokenizer_source: base\n")
    told = " ".join(run("recipe.yml", "-o", "out.safetensors", "--dry-run").stderr.split())
    assert "'b' has 12 tensors in a finer dtype than they are written in (BF16" in told
    assert "the output is a file, and the tokenizer of its rows is not written" in told
