"""What is made again, kept, removed and recorded: parts, several documents, the recipe."""

import json
from pathlib import Path

import pytest

from tests.mergekit_models import merge, models, refused, run, tokens


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def said(done):
    """What a command told, on one line."""
    return " ".join((done.stderr + done.stdout).split())


def set_config(name, **keys):
    """Change keys of a model's config, and no tensor."""
    file = Path(name) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


STAGES = """
name: first
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
---
merge_method: task_arithmetic
base_model: first
models: [{model: b, parameters: {weight: 0.5}}]
"""
GRADIENT = """
merge_method: task_arithmetic
base_model: base
models: [{model: a, parameters: {weight: [0, 1]}}]
"""
SETTING = """
merge_method: slerp
base_model: base
models: [{model: a}]
parameters: {t: [0, 1]}
"""


@pytest.mark.parametrize("text", [GRADIENT, SETTING], ids=["weight", "setting"])
def test_parts_of_merges_with_other_weights_or_settings_are_not_joined(text):
    models("base", "a", base="base", layers=4)
    Path("recipe.yml").write_text(text)
    assert run("recipe.yml", "-o", "out", "--shard", "1/2").exit_code == 0
    for name in ("base", "a"):  # of which gradients depend, and no tensor
        set_config(name, num_hidden_layers=3)
    joined = run("recipe.yml", "-o", "out")
    assert joined.exit_code == 2, said(joined)
    assert "out.partial" in said(joined)
    assert not Path("out").exists()


TOKENS_OF_A_STAGE = """
name: first
merge_method: linear
parameters: {weight: 1}
tokenizer_source: union
models: [{model: a}, {model: b}]
---
merge_method: linear
parameters: {weight: 1}
tokenizer_source: first
models: [{model: a}, {model: c}]
"""


def test_the_tokens_of_a_stage_are_taken_whether_it_is_merged_or_not():
    models("a", "b", "c")
    for name, words in (("a", "abcdefgh"), ("b", "hgfedcba"), ("c", "abcdefgh")):
        tokens(name, words)
    merge(TOKENS_OF_A_STAGE.replace("source: first", "source: union"), out="alone")
    merge(TOKENS_OF_A_STAGE)
    written = json.loads(Path("out/tokenizer.json").read_text())["model"]["vocab"]
    assert written == json.loads(Path("alone/tokenizer.json").read_text())["model"]["vocab"]


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ("first@main", "'first@main'"),
        ("a+first@main", "'first@main'"),
        ("a+first", "'refused.stages/first'"),
    ],
)
def test_a_name_without_a_revision_is_a_stage_as_a_model_and_as_an_adapter(model, place):
    models("a", "b")
    message = refused(STAGES.replace("model: b, parameters", f"model: {model}, parameters"))
    assert place in message, message
