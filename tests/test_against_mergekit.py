"""The comparison with mergekit reads recipes, recovers draws, and judges distances."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

BENCH = Path(__file__).parent.parent / "scripts" / "bench"
NAMES = ("compare", "expected", "models", "random", "recipes", "rules")
SHAPES = {
    "model.embed_tokens.weight": (6, 4),
    "model.layers.0.self_attn.q_proj.weight": (8, 4),
    "model.layers.1.self_attn.q_proj.weight": (8, 4),
    "model.layers.2.self_attn.q_proj.weight": (8, 4),
    "lm_head.weight": (6, 4),
}


@pytest.fixture(scope="module")
def bench():
    """The modules of the comparison by the last part of their names."""
    sys.path.insert(0, str(BENCH))
    yield {name: importlib.import_module(f"mergekit_{name}") for name in NAMES}
    sys.path.remove(str(BENCH))
    for name in NAMES:
        del sys.modules[f"mergekit_{name}"]


def write(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def models(tmp_path):
    """Three models `base`, `a` and `b`, whose tensors all differ."""
    folder = tmp_path / "models"
    rng = np.random.default_rng(0)
    base = {n: rng.standard_normal(s, np.float32) for n, s in SHAPES.items()}
    for name in ("base", "a", "b"):
        changes = {n: 0.1 * (name != "base") * rng.standard_normal(s) for n, s in SHAPES.items()}
        tensors = {n: torch.from_numpy((base[n] + changes[n]).astype(np.float32)) for n in SHAPES}
        write(folder / name, tensors)
    return folder


def recipe_of(bench, tmp_path, text):
    file = tmp_path / "recipe.yml"
    file.write_text(text)
    return bench["recipes"].Recipe("recipe", file, "models")


def restated(bench, recipe, models):
    found = bench["expected"].expected(recipe.file, models, list)
    return {name: tensor.merged()[0] for name, tensor in found}


def test_every_method_family_and_form_has_a_recipe(bench):
    recipes = bench["recipes"].recipes()
    assert len(recipes) >= 30
    documents = [d for r in recipes for d in bench["expected"].documents(r.file)]
    assert {d["merge_method"] for d in documents} == set(bench["rules"].RULES)
    folders = {r.models for r in recipes}
    known = {*bench["models"].FAMILY_FOLDERS, *bench["models"].OTHERS}
    assert folders <= known
    assert {f.partition("-")[0] for f in folders} >= set(bench["models"].FAMILIES)
    keys = {key for d in documents for key in d}
    assert keys >= {"slices", "models", "modules", "tokenizer", "tokenizer_source", "chat_template"}


def test_a_setting_goes_by_slice_layer_and_the_first_filter_that_matches(bench, models, tmp_path):
    text = """
models:
  - model: a
    parameters:
      weight:
        - filter: layers.1
          value: 7
        - filter: q_proj
          value: [1, 3]
  - model: b
    parameters: {weight: 0}
merge_method: linear
parameters: {normalize: false, weight: 5}
dtype: float32
"""
    merged = restated(bench, recipe_of(bench, tmp_path, text), models)
    stored = bench["expected"].load(models / "a")
    factors = {n: float(np.mean(t / stored[n].double().numpy())) for n, t in merged.items()}
    expected = [5, 1, 7, 3, 5]
    assert [factors[n] for n in SHAPES] == pytest.approx(expected)


def test_stacked_slices_renumber_layers_and_take_the_ends_from_the_ends(bench, models, tmp_path):
    text = """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3]}]
merge_method: passthrough
dtype: float32
"""
    merged = restated(bench, recipe_of(bench, tmp_path, text), models)
    a, b = (bench["expected"].load(models / name) for name in "ab")
    layer = "model.layers.{}.self_attn.q_proj.weight".format
    sources = {layer(0): a[layer(0)], layer(1): a[layer(1)], layer(2): b[layer(1)]}
    sources |= {layer(3): b[layer(2)], "lm_head.weight": b["lm_head.weight"]}
    sources["model.embed_tokens.weight"] = a["model.embed_tokens.weight"]
    assert set(merged) == set(sources)
    assert all(np.array_equal(merged[n], sources[n].double().numpy()) for n in sources)


LINEAR = """
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: b, parameters: {weight: 0.9}}
merge_method: linear
dtype: DTYPE
"""


@pytest.mark.parametrize(
    ("dtype", "change", "lacks", "word"),
    [
        ("float32", 0, (), "as restated"),
        ("float32", 1e-5, (), "differs"),
        ("bfloat16", 0, (), "as restated"),
        ("bfloat16", 0.1, (), "differs"),
        ("float32", 0, ("lm_head.weight",), "differs: ours lacks 1 tensors"),
        ("float32", 0, ("extra",), "differs: ours has 1 more tensors"),
    ],
)
def test_an_output_is_judged_by_its_distance(bench, models, tmp_path, dtype, change, lacks, word):
    recipe = recipe_of(bench, tmp_path, LINEAR.replace("DTYPE", dtype))
    tensors = restated(bench, recipe, models)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][2, 1] += change
    written = {n: torch.from_numpy(t).to(getattr(torch, dtype)) for n, t in tensors.items()}
    for name in lacks:
        written = {n: t for n, t in written.items() if n != name} | (
            {name: torch.zeros(2)} if name not in written else {}
        )
    ours = write(tmp_path / "ours", written)
    record = bench["compare"].compare(recipe, models, ours, None)
    assert word in bench["compare"].verdict(record)


def test_the_closer_of_two_outputs_is_named(bench, models, tmp_path):
    recipe = recipe_of(bench, tmp_path, LINEAR.replace("DTYPE", "bfloat16"))
    tensors = {n: torch.from_numpy(t) for n, t in restated(bench, recipe, models).items()}
    ours = write(tmp_path / "ours", {n: t.bfloat16() for n, t in tensors.items()})
    off = {n: (t * (1 + 2.0**-8)).bfloat16() for n, t in tensors.items()}
    record = bench["compare"].compare(recipe, models, ours, write(tmp_path / "theirs", off))
    assert bench["compare"].verdict(record) == "same, bmerge closer to float64"
    record = bench["compare"].compare(recipe, models, tmp_path / "theirs", ours)
    assert bench["compare"].verdict(record) == "same, mergekit closer to float64"
    far = {n: (t * (1 + 2.0**-5)).bfloat16() for n, t in tensors.items()}
    record = bench["compare"].compare(recipe, models, ours, write(tmp_path / "far", far))
    assert bench["compare"].verdict(record) == "mergekit is off, bmerge closer to float64"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della_linear", "della"])
def test_the_draws_behind_an_output_are_recovered(bench, method):
    rng = np.random.default_rng(1)
    base = rng.standard_normal((30, 20))
    models = [
        base + 0.1 * rng.standard_normal((30, 20)) * (rng.random((30, 20)) > 0.3) for _ in "ab"
    ]
    settings = {"weight": [0.6, 0.5], "density": [0.5, 0.7], "epsilon": [0.1, 0.2]}
    inputs = bench["rules"].Inputs(base, models, settings)
    tensor = bench["expected"].Tensor(method, inputs)
    kept = [rng.random((30, 20)) < p for p in bench["random"].chances(tensor)]
    output = tensor.merged(kept)[0].astype(np.float32).astype(np.float64)
    found = bench["random"].explain(tensor, output)
    assert np.abs(found.value - output).max() < 1e-6
    for truth, mine, seen, change in zip(kept, found.kept, found.seen, inputs.changes, strict=True):
        assert np.array_equal(truth[seen], mine[seen])
        assert seen.sum() > 0.4 * (change != 0).sum()
    share = bench["random"].Share().add(found)
    assert abs(share.deviations) < 4
    assert bench["random"].explain(tensor, output + 1e-3 * rng.random((30, 20))) is not None
    off = bench["random"].explain(tensor, output * (1 + 1e-3))
    assert np.abs(off.value - output).max() > 1e-4


@pytest.mark.slow
def test_the_script_judges_bmerge_alone(tmp_path):
    out = tmp_path / "table.json"
    command = [sys.executable, str(BENCH / "against_mergekit.py"), "-o", str(tmp_path / "work")]
    command += ["--only", "linear,ties_gradients", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    records = json.loads(out.read_text())["recipes"]
    assert [r["recipe"] for r in records] == ["linear", "ties_gradients"], done.stderr
    assert done.returncode == 0, done.stdout
    assert "mergekit was not run" in done.stderr
    assert "ours as restated" in done.stdout
