"""Merges by mergekit's recipes, from the YAML to the files, against restatements in float64."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests import tiny
from tests.mergekit_models import close, folder, merge, models, refused, run, shapes_of

LAYERS = 3


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def position(name):
    """Where gradients are evaluated: i / (L - 1) in layer i of L, 0 outside of layers."""
    parts = name.split(".")
    return int(parts[2]) / (LAYERS - 1) if parts[1] == "layers" else 0.0


def on(name, values):
    """A gradient at a tensor."""
    return np.interp(position(name) * (len(values) - 1), range(len(values)), values)


def report():
    return json.loads(Path("out/merge_report.json").read_text())


def test_gradients_and_filters_weigh_each_tensor():
    found = models("base", "a", "b", base="base")
    merged = merge(
        """
        merge_method: task_arithmetic
        base_model: base
        models:
          - model: a
            parameters:
              weight: [0, 1, 0.5]
          - model: b
            parameters:
              weight:
                - {filter: mlp, value: [0.2, 0.8]}
                - {filter: layers.1., value: 3}
                - value: -0.5
        """
    )
    expected = {}
    for name, base in found["base"].items():
        weight = on(name, (0.2, 0.8)) if "mlp" in name else 3 if "layers.1." in name else -0.5
        weights = {"a": on(name, (0, 1, 0.5)), "b": weight}
        base = np.float64(base)
        expected[name] = base + sum(w * (found[m][name] - base) for m, w in weights.items())
    close(merged, expected)


def test_where_no_filter_matches_the_tensor_stays_the_bases():
    found = models("base", "a", base="base")
    merged = merge(
        """
        merge_method: slerp
        base_model: base
        models: [{model: a}]
        parameters:
          t: [{filter: mlp, value: 1}]
        """
    )
    for name, tensor in merged.items():
        wanted = found["a" if "mlp" in name else "base"][name]
        np.testing.assert_allclose(tensor, wanted, rtol=1e-6, err_msg=name)
    assert any("no filter matches" in reason for reason in report()["copied"].values())


def test_settings_of_all_models_see_the_names_of_the_output():
    found = models("a", "b")
    merged = merge(
        """
        merge_method: linear
        slices:
          - sources:
              - model: a
                layer_range: [1, 3]
                parameters: {weight: [{filter: layers.2., value: 2}, {value: 1}]}
              - model: b
                layer_range: [0, 2]
                parameters: {weight: [{filter: layers.0., value: 5}, {value: 1}]}
            parameters:
              normalize: [{filter: layers.1., value: false}, {value: true}]
        """
    )
    a, b = found["a"], found["b"]
    for tail in ("mlp.up_proj.weight", "input_layernorm.weight"):
        first = (a[f"model.layers.1.{tail}"] + 5.0 * b[f"model.layers.0.{tail}"]) / 6
        second = 2.0 * a[f"model.layers.2.{tail}"] + b[f"model.layers.1.{tail}"]
        np.testing.assert_allclose(merged[f"model.layers.0.{tail}"], first, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(merged[f"model.layers.1.{tail}"], second, rtol=1e-5, atol=1e-6)
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 2


def test_slices_of_two_sources_merge_layers_with_layers():
    found = models("base", "a", "b", base="base")
    merged = merge(
        """
        merge_method: task_arithmetic
        base_model: base
        slices:
          - sources:
              - {model: base, layer_range: [0, 1]}
              - {model: a, layer_range: [2, 3], parameters: {weight: 0.5}}
          - sources:
              - {model: b, layer_range: [1, 3], parameters: {weight: [1, 2]}}
              - {model: base, layer_range: [1, 3]}
        """
    )
    base = {name: np.float64(tensor) for name, tensor in found["base"].items()}

    def moved(name, model, weight, layer=None):
        own = name if layer is None else name.replace(f"layers.{name.split('.')[2]}.", layer)
        return base[name] + weight * (found[model][own] - base[name])

    expected = {}
    for name in base:
        number = name.split(".")[2] if "layers" in name else None
        if name == "model.embed_tokens.weight":
            expected[name] = moved(name, "a", 0.5)
        elif number is None:
            expected[name] = moved(name, "b", 1)
        elif number == "0":
            expected[name] = moved(name, "a", 0.5, "layers.2.")
        else:
            expected[name] = moved(name, "b", 1 if number == "1" else 2)
    close(merged, expected)


def test_a_passthrough_stack_has_the_layers_and_the_config_of_its_parts():
    kinds = {"a": ["full", "near", "full"], "b": ["near", "near", "full"]}
    found = {m: folder(m, i, layer_types=k) for i, (m, k) in enumerate(kinds.items())}
    merged = merge(
        """
        merge_method: passthrough
        slices:
          - sources: [{model: a, layer_range: [0, 2]}]
          - sources:
              - model: b
                layer_range: [1, 3]
                parameters: {scale: [{filter: up_proj, value: 0}, {value: 1}]}
          - sources: [{model: a, layer_range: [1, 2]}]
        """
    )
    origins = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 1)]
    expected = {n: found["a"][n] for n in shapes_of(0)}
    for i, (model, layer) in enumerate(origins):
        for name in shapes_of(1):
            if "layers" in name:
                tensor = found[model][name.replace("layers.0.", f"layers.{layer}.")]
                zero = model == "b" and "up_proj" in name
                expected[name.replace("layers.0.", f"layers.{i}.")] = tensor * (not zero)
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(merged[name], tensor, err_msg=name)
    config = json.loads(Path("out/config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == ["full", "near", "near", "full", "near"]
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_base_among_the_models_is_no_task():
    models("base", "a", base="base")
    listed = "- {model: base, parameters: {weight: 7, density: 0.1}}"
    text = """
        merge_method: ties
        base_model: base
        models:
          - {{model: a, parameters: {{weight: 0.5}}}}
          {}
        """
    once = merge(text.format(""), out="once")
    twice = merge(text.format(listed), out="twice")
    for name, tensor in once.items():
        np.testing.assert_array_equal(tensor, twice[name])


def test_a_model_that_is_listed_twice_counts_twice():
    found = models("a", "b")
    merged = merge(
        """
        merge_method: linear
        models:
          - {model: a, parameters: {weight: 1}}
          - {model: b, parameters: {weight: 1}}
          - {model: a, parameters: {weight: [{filter: mlp, value: 6}, {value: 2}]}}
        """
    )
    a, b = found["a"], found["b"]
    weights = {name: 7 if "mlp" in name else 3 for name in a}
    close(merged, {n: (w * np.float64(a[n]) + b[n]) / (w + 1) for n, w in weights.items()})


def test_a_weight_of_zero_takes_a_model_out():
    found = models("base", "a", "b", base="base")
    text = """
        merge_method: {}
        base_model: base
        models:
          - {{model: a, parameters: {{weight: 1}}}}
          - {{model: b, parameters: {{weight: 0}}}}
        """
    for method in ("task_arithmetic", "ties"):
        close(merge(text.format(method)), found["a"])
    close(merge(text.format("ties").replace("weight: 1", "weight: 0")), found["base"])
    for name, tensor in tiny.read("out").items():
        np.testing.assert_array_equal(tensor, found["base"][name])


def test_an_adapter_on_a_base_is_one_model():
    found = models("base", "a", base="base")
    rng = np.random.default_rng(5)
    factors, target = {}, "model.layers.1.mlp.up_proj"
    shapes = {"lora_A": (2, 4), "lora_B": (6, 2)}
    for factor, shape in shapes.items():
        factors[f"base_model.model.{target}.{factor}.weight"] = rng.normal(size=shape).astype("f")
    tiny.write(Path("adapter/adapter_model.safetensors"), factors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    merged = merge(
        """
        merge_method: task_arithmetic
        base_model: base
        models:
          - {model: base+adapter, parameters: {weight: 0.5}}
          - {model: a, parameters: {weight: 1}}
        """
    )
    a, b = (np.float64(factors[f"base_model.model.{target}.{f}.weight"]) for f in shapes)
    expected = {name: np.float64(tensor) for name, tensor in found["a"].items()}
    expected[f"{target}.weight"] = expected[f"{target}.weight"] + 0.5 * 2.0 * b @ a
    close(merged, expected)


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "BF16"),
        ({"dtype": "float16"}, "F16"),
        ({"out_dtype": "float32"}, "F32"),
        ({}, "BF16"),
    ],
)
def test_the_output_has_the_dtype_that_the_recipe_says(keys, dtype):
    models("a", "b", dtype="BF16")
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    merged = merge(text + (yaml.safe_dump(keys) if keys else ""))
    report_of = json.loads(Path("out/config.json").read_text())
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    if keys:
        assert report_of.get("dtype", report_of.get("torch_dtype", names[dtype])) == names[dtype]
    a, b = tiny.read("a"), tiny.read("b")
    digits = {"BF16": 2**-8, "F16": 2**-11, "F32": 2**-23}[dtype]
    for name, tensor in merged.items():
        wanted = (np.float64(a[name]) + b[name]) / 2
        bound = digits * np.abs(wanted) + 1e-7
        assert np.all(np.abs(tensor - wanted) <= bound), name
        if dtype == "F32":
            continue
        np.testing.assert_array_equal(tensor, tensor.astype(np.float32))
    size = Path("out/model.safetensors").stat().st_size
    entries = sum(tensor.size for tensor in merged.values())
    width = 4 if dtype == "F32" else 2
    assert entries * width <= size < entries * width + 3000


STAGES = """
name: first
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
---
merge_method: task_arithmetic
base_model: first
models: [{model: c, parameters: {weight: 0.5}}]
"""


def test_documents_are_stages_and_what_only_they_need_is_removed():
    found = models("a", "b", "c")
    merged = merge(STAGES)
    expected = {}
    for name in merged:
        first = (np.float64(found["a"][name]) + found["b"][name]) / 2
        expected[name] = first + 0.5 * (found["c"][name] - first)
    close(merged, expected)
    assert not Path("out.stages").exists()


def test_a_stage_that_was_made_is_not_made_again(monkeypatch):
    models("a", "b", "c")
    Path("recipe.yml").write_text(STAGES)
    shutil.move("c/model.safetensors", "c.safetensors")
    stopped = run("recipe.yml", "-o", "out")
    assert stopped.exit_code == 2, stopped.stderr
    assert Path("out.stages/first/model.safetensors").exists()
    shutil.move("c.safetensors", "c/model.safetensors")
    done = run("recipe.yml", "-o", "out")
    assert done.exit_code == 0, done.stderr
    assert "first' is there already" in " ".join(done.stderr.split())
    assert not Path("out.stages").exists()
    again = merge(STAGES, out="again")
    for name, tensor in tiny.read("out").items():
        np.testing.assert_array_equal(tensor, again[name])


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_the_recipe_that_is_written_repeats_the_bytes(method):
    models("base", "a", "b", base="base")
    text = f"""
        merge_method: {method}
        base_model: base
        models:
          - {{model: a, parameters: {{weight: [0.2, 1], density: 0.7}}}}
          - {{model: b, parameters: {{weight: [{{filter: mlp, value: 0.1}}, {{value: 0.5}}]}}}}
        parameters: {{normalize: true, lambda: 0.9, density: 0.5}}
        dtype: float32
        """
    merge(text, "--param", "seed=3") if method == "dare_ties" else merge(text)
    assert run("out/merge_recipe.yaml", "-o", "again").exit_code == 0
    for file in ("model.safetensors", "merge_recipe.yaml", "config.json"):
        assert (Path("out") / file).read_bytes() == (Path("again") / file).read_bytes(), file


def test_report_and_card_tell_the_method_and_the_models():
    models("base", "a", "b", base="base")
    merge(
        """
        merge_method: ties
        base_model: base
        models:
          - {model: a, parameters: {weight: [0.2, 1]}}
          - {model: b, parameters: {weight: 0.5}}
        parameters: {density: 0.5}
        """
    )
    told = report()
    assert told["method"] == "ties"
    assert [model["ref"] for model in told["models"]] == ["base", "a", "b"]
    assert any("weight of 'a' differs between tensors" in note for note in told["notes"])
    from typer.testing import CliRunner

    from bmerge_cli.main import app

    card = CliRunner().invoke(app, ["push", "out", "org/out", "--dry-run"])
    assert card.exit_code == 0, card.stderr
    shown = card.stdout + card.stderr
    for word in ("ties", "merge_recipe.yaml", "density"):
        assert word in shown


def test_a_dry_run_writes_nothing_and_tells_weights_and_memory():
    models("base", "a", "b", base="base")
    Path("recipe.yml").write_text(
        "merge_method: ties\nbase_model: base\n"
        "models: [{model: a, parameters: {weight: [0, 1]}}, {model: b, parameters: {weight: 1}}]\n"
    )
    done = run("recipe.yml", "-o", "out", "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert any("from 0 to 1" in note for note in plan["notes"])
    assert not any("merges whole tensors" in note for note in plan["notes"])
    Path("recipe.yml").write_text(
        "merge_method: nuslerp\nparameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n"
        "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    )
    done = run("recipe.yml", "-o", "out", "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    assert any("merges whole tensors" in note for note in json.loads(done.stdout)["notes"])
    assert not Path("out").exists()


BAD = [
    ("merge_method: linear\nmodels: [{model: a}]", "models[0].parameters.weight"),
    ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]", "parameters.t"),
    ("merge_method: ties\nmodels: [{model: a}]", "base_model: 'ties' needs one"),
    ("merge_metod: linear\nmodels: [{model: a}]", "did you mean 'merge_method'?"),
    ("slices: []\nmodels: [{model: a}]", "merge_method"),
    (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\n"
        "tokenizer: {tokens: {x: {source: b}}}",
        "recipe.yml: tokenizer: ",
    ),
    ("merge_method: liner\nmodels: [{model: a}]", "did you mean 'linear'?"),
    (
        "merge_method: linear\nmodels: [{model: nowhere}]\nparameters: {weight: 1}",
        "models[0].model: 'nowhere': no such",
    ),
    (
        "merge_method: slerp\nbase_model: no/where\nmodels: [{model: a}]\nparameters: {t: 1}",
        "base_model: ",
    ),
    (
        "merge_method: linear\nmodels: [{model: a, weight: 1}]",
        "models[0]",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {wieght: 1}",
        "parameters.wieght: unknown setting",
    ),
    (
        "merge_method: linear\nmodels: [{model: a, parameters: {normalize: 1, weight: 1}}]",
        "'normalize' is a setting of all models together",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}]\n"
        "parameters: {weight: [{filter: mlp, value: 1}]}",
        "there is no base to keep",
    ),
    (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 5]}]}]",
        "slices[0].sources[0].layer_range: expected an end of at most 3",
    ),
    (
        "merge_method: ties\nbase_model: a\nslices:\n"
        "- sources: [{model: b, layer_range: [0, 2], parameters: {weight: 1}}]",
        "slices[0].sources: expected the layers of the base_model 'a'",
    ),
    (
        "merge_method: ties\nbase_model: a\nmodels: [{model: b}]\n"
        "parameters: {weight: 1, density: 1.5}",
        "density: expected a number from 0 to 1",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0}",
        "weights of its models sum to zero",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_is_wrong_is_one_message_with_file_and_key(text, message):
    models("a", "b")
    said = refused(text)
    assert message in said
    assert "recipe.yml" in said or "zero" in message
