"""Recipes of modules: parts of a model by their names, each made of models or slices of its own."""

import json
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.merge import carry_out
from mergekit_bayes.mergekit.bodies import group_of
from mergekit_bayes.mergekit.document import read_recipes
from mergekit_bayes.mergekit.planning import plan_recipe
from mergekit_bayes.plan import MergeConfig
from tests import tiny

LAYERS = 3
SHAPES = {
    "language_model.model.embed_tokens.weight": (6, 4),
    **{f"language_model.model.layers.{i}.mlp.up_proj.weight": (5, 4) for i in range(LAYERS)},
    "language_model.model.norm.weight": (4,),
    "vision_tower.encoder.layers.0.fc.weight": (3, 3),
    "multi_modal_projector.linear.weight": (4, 3),
}
CONFIG = {"model_type": "llava", "text_config": {"num_hidden_layers": LAYERS, "vocab_size": 6}}
RECIPE = """
merge_method: linear
parameters: {weight: 0.5, normalize: false}
modules:
  text_decoder:
    slices:
    - sources:
      - {model: a, layer_range: [1, 3]}
      - {model: b, layer_range: [0, 2], parameters: {weight: [1, 3]}}
  vision_tower:
    parameters: {weight: 2}
    models: [{model: b}]
  multi_modal_projector:
    models: [{model: b}, {model: a}]
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {name: tiny.arrays(i, SHAPES) for i, name in enumerate("ab")}
    for name, tensors in found.items():
        Path(name).mkdir()
        tiny.write(f"{name}/model.safetensors", tensors)
        Path(name, "config.json").write_text(json.dumps(CONFIG))
    return found


def merged(text):
    Path("recipe.yml").write_text(text)
    (recipe,) = read_recipes(Path("recipe.yml"))
    with plan_recipe(recipe, MergeConfig(models=(), out="out", force=True)) as plan:
        carry_out(plan)
    return tiny.read("out/model.safetensors")


def test_each_module_is_made_of_its_own_models_and_settings(models):
    a, b, found = models["a"], models["b"], merged(RECIPE)
    stem = "language_model.model.layers.{}.mlp.up_proj.weight"
    expected = {
        "language_model.model.embed_tokens.weight": (0.5, 1),  # position 0: the first of [1, 3]
        "language_model.model.norm.weight": (0.5, 1),
        "vision_tower.encoder.layers.0.fc.weight": (0, 2),
        "multi_modal_projector.linear.weight": (0.5, 0.5),
    }
    for name, (of_a, of_b) in expected.items():
        assert found[name] == pytest.approx(of_a * a[name] + of_b * b[name], rel=1e-5, abs=1e-6)
    for layer, weight in enumerate((1, 3)):
        value = 0.5 * a[stem.format(layer + 1)] + weight * b[stem.format(layer)]
        assert found[stem.format(layer)] == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert set(found) == set(SHAPES) - {stem.format(2)}
    config = json.loads(Path("out/config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 2


def test_modules_that_leave_a_part_out_are_refused_with_its_first_tensor(models):
    text = RECIPE[: RECIPE.index("  multi_modal_projector")]
    with pytest.raises(MismatchError, match=r"recipe\.yml: modules: 'multi_modal.* the projector"):
        merged(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foo", r"modules\.foo: unknown module; possible are 'default'"),
        ("visual_part", r"modules\.visual_part: another module makes the same tensors"),
    ],
)
def test_unknown_and_doubled_modules_are_refused_by_name(models, name, message):
    with pytest.raises(ConfigError, match=message):
        merged(RECIPE.replace("multi_modal_projector", name))


def test_a_projector_of_a_vision_tower_is_no_part_of_it():
    assert group_of("vision_model.mm_projector.0.weight") == "projector"
    assert group_of("model.visual.blocks.0.attn.proj.weight") == "vision"
    assert group_of("model.layers.0.self_attn.q_proj.weight") == "text"


def test_the_written_recipe_of_modules_gives_the_same_bytes(models):
    first = merged(RECIPE)
    again = merged(Path("out/merge_recipe.yaml").read_text())
    assert all(np.array_equal(first[name], again[name]) for name in first)
