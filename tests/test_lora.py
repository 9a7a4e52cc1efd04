"""Adapters: what `W + s B A` is against PEFT, its precision against the moments, and merges of adapters."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.finetune import FinetuneConfig, run_finetune
from mergekit_bayes.lora import (
    INITIAL_A,
    initial_identity,
    is_adapter,
    merge_adapters,
    merging,
    open_adapted,
    open_adapter,
    open_model,
    split_ref,
)
from mergekit_bayes.lora.adapter import Factors
from mergekit_bayes.lora.dense import change, variance
from mergekit_bayes.lora.truncate import truncate_dense, truncate_product
from mergekit_bayes.models import load_model
from mergekit_bayes.posterior import PosteriorInfo, Prior, checkpoint_files, identify, save_posterior
from mergekit_bayes.tensors import SafetensorsSource, TensorSpec, identity, read_tensor
from tests import tiny
from tests.reference import lora as twin
from tests.tiny_models import tiny_bert, tiny_gpt2

# Weights of a base: ordinary, square and transposed ones, and one that no adapter touches.
BASE = {"m.q.weight": (6, 4), "m.k.weight": (4, 4), "m.out.bias": (5,), "m.wide.weight": (3, 70)}
LAYERS = {"m.q": (6, 4), "m.k": (4, 4), "m.wide": (3, 70)}


def base(folder, dtype="F32"):
    tiny.write(folder / "model.safetensors", tiny.arrays(99, BASE), dtype)
    return folder


def factors(seed, rank=2, layers=LAYERS, same_a=None):
    found = {}
    for i, (module, (rows, columns)) in enumerate(layers.items()):
        rng = np.random.default_rng([seed, i])
        a, b = rng.normal(size=(rank, columns)), rng.normal(size=(rows, rank))
        found[module] = Factors(*(np.asarray(x, np.float32) for x in (a if same_a is None else same_a[module].a, b)))
    return found


def adapter(folder, made, alpha=3, whole=None, precision=None, info=None, **config):
    """An adapter folder of these factors by our own sink; `precision` by module, `info` beside it."""
    tensors = {}
    for module, pair in made.items():
        for side, values in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = values
    tensors |= {f"base_model.model.{name}": values for name, values in (whole or {}).items()}
    tiny.write(folder / "adapter_model.safetensors", tensors)
    rank = len(next(iter(made.values())).a)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [m[2:] for m in made],
                "base_model_name_or_path": "base"} | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if precision is not None:
        source = SafetensorsSource(checkpoint_files(folder))
        stored = {}
        for module, pair in precision.items():
            for side, values in zip("AB", pair, strict=True):
                if values is not None:
                    stored[f"base_model.model.{module}.lora_{side}.weight"] = values
        known = {"estimator": "ggn", "unit": "token", "observations": 100.0, "ess": 100.0} | (info or {})
        save_posterior(folder, stored, PosteriorInfo(mean=identify(source), **known))
        source.close()
    return folder


def precise(made, seed):
    """Random precisions of factors, from 1 to 100."""
    rng = np.random.default_rng(seed + 500)
    return {m: Factors(*(np.asarray(np.exp(rng.uniform(0, 4.6, x.shape)), np.float32) for x in f))
            for m, f in made.items()}  # fmt: skip


def product(folder, module):
    """The change that an adapter folder makes to one layer, in float64."""
    found = open_adapter(str(folder), with_precision=False)
    layer = found.layers[module]
    result = twin.change(*found.factors(layer), layer.scaling)
    found.close()
    return result


def peft_adapter(folder, base_folder, seed=0, kind=transformers.AutoModelForCausalLM, **config):
    """An adapter that PEFT makes and saves, with random factors and heads; returns the model it was made on."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(kind.from_pretrained(base_folder), peft.LoraConfig(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def equals_merged(model, opened):
    """Every tensor of an adapted base is that of the model with the adapter merged in."""
    merged = {n: t.detach().numpy() for n, t in model.merge_and_unload().state_dict().items()}
    assert set(opened.mean.specs) <= set(merged)
    for name in opened.mean.specs:
        np.testing.assert_allclose(read_tensor(opened.mean, name), merged[name], rtol=2e-6, atol=2e-6, err_msg=name)


def test_the_variance_of_a_product_is_that_of_the_worked_example():
    pair = Factors(np.float32([[3, 0.5]]), np.float32([[1], [-2]]))
    spread = Factors(np.float32([[0.05, 0.4]]), np.float32([[0.1], [0.2]]))
    np.testing.assert_array_equal(change(pair, 2.0).entries(0, 4), [6, 1, -12, -2])
    found = variance(pair, spread, 2.0).entries(0, 4)
    np.testing.assert_allclose(found, [3.82, 1.86, 8.04, 6.92], rtol=1e-6)
    transposed = variance(pair, spread, 2.0, transposed=True).entries(0, 4)
    np.testing.assert_array_equal(transposed.reshape(2, 2), found.reshape(2, 2).T)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_proj"], "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2},
         "alpha_pattern": {r"h.1.attn.c_attn": 5}, "fan_in_fan_out": True},
    ],
)  # fmt: skip
def test_an_adapted_gpt2_is_what_peft_merges(tmp_path, config):
    folder = tiny_gpt2(tmp_path / "base")
    model = peft_adapter(tmp_path / "a", folder, task_type="CAUSAL_LM", **config)
    opened = open_adapted(f"{folder}+{tmp_path / 'a'}")
    assert opened.precision is None
    assert {s.dtype for s in opened.mean.specs.values()} == {"F32"}
    equals_merged(model, opened)
    opened.close()


def test_an_adapted_classifier_is_what_peft_merges_and_has_its_head(tmp_path):
    folder = tiny_bert(tmp_path / "base")
    kind = transformers.AutoModelForSequenceClassification
    model = peft_adapter(
        tmp_path / "a", folder, kind=kind, r=2, lora_alpha=3, target_modules=["query", "dense"], task_type="SEQ_CLS"
    )
    opened = open_adapted(f"{folder}+{tmp_path / 'a'}")
    head = read_tensor(opened.mean, "classifier.weight")
    assert not np.array_equal(head, tiny.read(folder)["classifier.weight"])
    equals_merged(model, opened)
    opened.close()


def test_names_may_differ_by_a_prefix(tmp_path):
    folder = tiny_gpt2(tmp_path / "base")
    model = peft_adapter(tmp_path / "a", folder, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    bare = {n.removeprefix("transformer."): t for n, t in tiny.read(folder).items()}
    tiny.write(tmp_path / "hub" / "model.safetensors", bare)
    opened = open_adapted(f"{tmp_path / 'hub'}+{tmp_path / 'a'}")
    merged = model.merge_and_unload().state_dict()
    name = "h.1.attn.c_attn.weight"
    np.testing.assert_allclose(read_tensor(opened.mean, name), merged[f"transformer.{name}"].numpy(), atol=2e-6)
    opened.close()


@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16"])
def test_an_entry_has_the_same_bits_whatever_the_chunk(tmp_path, dtype):
    made = factors(0, rank=5)
    adapter(tmp_path / "a", made, alpha=7, precision=precise(made, 0))
    opened = open_adapted(f"{base(tmp_path / 'base', dtype)}+{tmp_path / 'a'}")
    rng = np.random.default_rng(1)
    for source in (opened.mean, opened.precision):
        for name, spec in source.specs.items():
            whole = np.empty(spec.nbytes, np.uint8)
            source.read_bytes(name, 0, whole.data)
            for _ in range(40):
                start, stop = np.sort(rng.integers(0, spec.nbytes + 1, 2))
                part = np.empty(stop - start, np.uint8)
                source.read_bytes(name, int(start), part.data)
                np.testing.assert_array_equal(part, whole[start:stop])
    opened.close()


def test_wide_rows_and_many_rows_have_the_bits_of_single_entries():
    for rows, columns in ((3, 70_001), (70_001, 3)):
        rng = np.random.default_rng(0)
        pair = Factors(rng.normal(size=(3, columns)).astype("f4"), rng.normal(size=(rows, 3)).astype("f4"))
        made = change(pair, 0.7)
        whole = made.entries(0, rows * columns)
        for at in (*rng.integers(0, rows * columns, 50), rows * columns - 1):
            assert made.entries(at, at + 1) == whole[at]
        expected = twin.change(*pair, 0.7).reshape(-1)
        np.testing.assert_allclose(whole, expected, atol=1e-5)


def test_threads_read_the_same_bits(tmp_path):
    adapter(tmp_path / "a", factors(0, rank=5))
    opened = open_adapted(f"{base(tmp_path / 'base')}+{tmp_path / 'a'}")
    expected = identity(opened.mean, full=True)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: identity(opened.mean, full=True), range(12))) == {expected}
    opened.close()


def test_tensors_that_the_adapter_leaves_alone_keep_their_bytes_and_type(tmp_path):
    adapter(tmp_path / "a", factors(0, layers={"m.q": (6, 4)}))
    folder = base(tmp_path / "base", "BF16")
    opened = open_adapted(f"{folder}+{tmp_path / 'a'}")
    plain = SafetensorsSource(checkpoint_files(folder))
    for name, spec in plain.specs.items():
        assert opened.mean.specs[name] == (TensorSpec("F32", spec.shape) if name == "m.q.weight" else spec)
        assert opened.mean.file_of(name) == 0
        if name != "m.q.weight":
            mine, theirs = np.empty(spec.nbytes, np.uint8), np.empty(spec.nbytes, np.uint8)
            opened.mean.read_bytes(name, 0, mine.data)
            plain.read_bytes(name, 0, theirs.data)
            np.testing.assert_array_equal(mine, theirs)
    assert opened.mean.files == plain.files
    plain.close()
    opened.close()


def test_the_precision_of_an_adapted_base_follows_from_the_moments_of_its_factors(tmp_path):
    made = factors(0)
    stored = precise(made, 0)
    stored["m.wide"] = Factors(None, stored["m.wide"].b)  # A was frozen
    adapter(tmp_path / "a", made, alpha=3, precision=stored)
    opened = open_adapted(f"{base(tmp_path / 'base')}+{tmp_path / 'a'}")
    assert opened.info is None
    assert set(opened.precision.specs) == {f"{m}.weight" for m in LAYERS}
    for module, pair in made.items():
        a, b = stored[module]
        expected = 1 / twin.variance(*pair, np.zeros_like(pair.a) if a is None else 1 / a, 1 / b, 1.5)
        np.testing.assert_allclose(read_tensor(opened.precision, f"{module}.weight"), expected, rtol=1e-5)
    opened.close()
    uniform = open_adapted(opened.ref, with_precision=False)
    assert not uniform.has_precision
    uniform.close()


def test_a_transposed_layer_has_the_transposed_precision(tmp_path):
    made = {"m.q": Factors(*(f for f in factors(0, layers={"m.q": (4, 6)})["m.q"]))}
    stored = precise(made, 0)
    adapter(tmp_path / "a", made, precision=stored)
    opened = open_adapted(f"{base(tmp_path / 'base')}+{tmp_path / 'a'}")
    expected = 1 / twin.variance(*made["m.q"], *(1 / s for s in stored["m.q"]), 1.5).T
    np.testing.assert_allclose(read_tensor(opened.precision, "m.q.weight"), expected, rtol=1e-5)
    opened.close()


def test_square_layers_are_laid_out_as_the_others_and_else_as_the_config_says(tmp_path):
    folder = base(tmp_path / "base")
    plain = tiny.arrays(99, BASE)["m.k.weight"]
    for name, layers, flag, transposed in (
        ("flag", {"m.k": (4, 4)}, True, True), ("noflag", {"m.k": (4, 4)}, False, False),
        ("neighbour", {"m.k": (4, 4), "m.q": (4, 6)}, False, True),
    ):  # fmt: skip
        made = factors(0, layers=layers)
        adapter(tmp_path / name, made, fan_in_fan_out=flag)
        opened = open_adapted(f"{folder}+{tmp_path / name}")
        moved = twin.change(*made["m.k"], 1.5)
        np.testing.assert_allclose(
            read_tensor(opened.mean, "m.k.weight"), plain + (moved.T if transposed else moved), atol=1e-5
        )
        opened.close()
    adapter(tmp_path / "both", factors(0, layers={"m.k": (4, 4), "m.q": (4, 6), "m.wide": (3, 70)}))
    with pytest.raises(ConfigError, match=r"the square 'm\.k\.weight' may be either"):
        open_adapted(f"{folder}+{tmp_path / 'both'}")


def test_precisions_are_taken_for_the_recorded_observations_or_any_other_number(tmp_path):
    made = factors(0)
    stored = {m: Factors(*(4 * s + 8 for s in p)) for m, p in precise(made, 0).items()}
    adapter(
        tmp_path / "a", made, precision=stored,
        info={"observations": 100.0, "ess": 400.0, "prior": Prior(kind="isotropic", precision=8.0)},
    )  # fmt: skip
    opened = open_adapter(str(tmp_path / "a"))
    for count in (None, 300.0):
        for found, s in zip(opened.precisions(opened.layers["m.q"], count), stored["m.q"], strict=True):
            np.testing.assert_allclose(found, (count or 100) / 400 * (s - 8) + 2, rtol=1e-6)
    opened.close()


def test_entries_of_no_curvature_have_a_tiny_finite_precision(tmp_path):
    made = factors(0, layers={"m.q": (6, 4)})
    adapter(tmp_path / "a", made, precision={"m.q": Factors(*(np.zeros_like(f) for f in made["m.q"]))})
    opened = open_adapted(f"{base(tmp_path / 'base')}+{tmp_path / 'a'}")
    found = read_tensor(opened.precision, "m.q.weight")
    assert np.isfinite(found).all()
    assert (found > 0).all()
    assert found.max() < 1e-20
    opened.close()


def test_a_plus_in_an_existing_path_is_no_adapter(tmp_path):
    tiny.write(tmp_path / "a+b" / "model.safetensors", tiny.arrays(0))
    assert split_ref(str(tmp_path / "a+b")) is None
    opened = open_model(str(tmp_path / "a+b"))
    assert isinstance(opened.mean, SafetensorsSource)
    opened.close()
    assert split_ref("org/base@main+org/adapter") == ("org/base@main", "org/adapter")
    (tmp_path / "x").mkdir()
    assert split_ref(f"{tmp_path}/a+b+{tmp_path}/x") == (f"{tmp_path}/a+b", f"{tmp_path}/x")
    with pytest.raises(CheckpointError, match=r"not BASE\+ADAPTER either: .*nowhere"):
        split_ref(f"{tmp_path}/x+{tmp_path}/nowhere")


def test_what_tells_an_adapter_from_a_model(tmp_path):
    adapter(tmp_path / "a", factors(0))
    assert is_adapter(tmp_path / "a")
    assert not is_adapter(base(tmp_path / "base"))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias=all"),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_adapters_that_are_more_than_a_product_are_refused(tmp_path, config, match):
    adapter(tmp_path / "a", factors(0), **config)
    with pytest.raises(ConfigError, match=match):
        open_adapter(str(tmp_path / "a"))
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=match):
        open_adapter(str(tmp_path / "a"))


def test_adapters_of_embeddings_are_refused(tmp_path):
    folder = tiny_gpt2(tmp_path / "base")
    peft_adapter(tmp_path / "a", folder, r=2, target_modules=["wte"])
    with pytest.raises(ConfigError, match=r"Adapters of\s+embeddings"):
        open_adapter(str(tmp_path / "a"))


def test_an_adapter_that_does_not_fit_its_base_or_itself_is_refused(tmp_path):
    folder = base(tmp_path / "base")
    adapter(tmp_path / "shape", factors(0, layers={"m.q": (6, 5)}))
    with pytest.raises(MismatchError, match=r"changes a weight of \[6, 5\], but 'm\.q\.weight'"):
        open_adapted(f"{folder}+{tmp_path / 'shape'}")
    adapter(tmp_path / "name", factors(0, layers={"m.other": (6, 4)}))
    with pytest.raises(MismatchError, match=r"'m\.other\.weight', which .* does not hold"):
        open_adapted(f"{folder}+{tmp_path / 'name'}")
    adapter(tmp_path / "rank", factors(0), rank_pattern={"q": 3})
    with pytest.raises(MismatchError, match=r"gives it rank 3"):
        open_adapter(str(tmp_path / "rank"))
    with pytest.raises(CheckpointError, match=r"is not an adapter: it has no adapter_config\.json"):
        open_adapted(f"{folder}+{folder}")
    made = factors(0)
    made["m.q"].b[0, 0] = np.nan
    adapter(tmp_path / "nan", made)
    opened = open_adapted(f"{folder}+{tmp_path / 'nan'}")
    with pytest.raises(CheckpointError, match=r"m\.q\.lora_B\.weight' has entries that are not finite"):
        read_tensor(opened.mean, "m.q.weight")
    opened.close()


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"peft_type": "LORA"}', '{"r": 0, "lora_alpha": 1}', '{"r": 1, "lora_alpha": "x"}']
)
def test_a_broken_config_is_named(tmp_path, text):
    adapter(tmp_path / "a", factors(0))
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: cannot be read as a LoRA config"):
        open_adapter(str(tmp_path / "a"))


def test_a_precision_of_other_factors_is_refused(tmp_path):
    made = factors(0)
    adapter(tmp_path / "a", made, precision=precise(made, 0))
    adapter(tmp_path / "b", factors(1))
    (tmp_path / "a" / "posterior").rename(tmp_path / "b" / "posterior")
    with pytest.raises(PrecisionError, match="taken at other weights"):
        open_adapter(str(tmp_path / "b"))


def test_another_base_than_the_recorded_one_is_told(tmp_path):
    made = factors(0)
    folder = base(tmp_path / "base")
    source = SafetensorsSource(checkpoint_files(folder))
    adapter(tmp_path / "a", made, precision=precise(made, 0), info={"base": identify(source)})
    source.close()
    opened = open_adapted(f"{folder}+{tmp_path / 'a'}")
    assert opened.mean.notes == ()
    opened.close()
    other = open_adapted(f"{base(tmp_path / 'half', 'BF16')}+{tmp_path / 'a'}")
    assert "trained on other weights" in other.mean.notes[0]
    other.close()


def two(tmp_path, **config):
    """Two adapters with precisions; the second holds no `m.k` and has another rank and scaling."""
    one, other = factors(1), factors(2, rank=3, layers={"m.q": (6, 4), "m.wide": (3, 70)})
    adapter(tmp_path / "a", one, precision=precise(one, 1), **config)
    adapter(tmp_path / "b", other, alpha=5, use_rslora=True, precision=precise(other, 2), **config)
    return [str(tmp_path / n) for n in "ab"]


def test_concatenation_is_the_task_arithmetic_of_the_products(tmp_path):
    refs = two(tmp_path)
    report = merge_adapters(refs, tmp_path / "out", scales=(0.8, -0.5), space="concat")
    assert report.rank == 5
    assert report.largest_error < 1e-6
    for module in LAYERS:
        expected = 0.8 * product(refs[0], module) - (0.5 * product(refs[1], module) if module != "m.k" else 0)
        np.testing.assert_allclose(product(tmp_path / "out", module), expected, atol=1e-5)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["layers"]["m.k"]["adapters"] == 1


def test_adapters_whose_names_differ_by_a_prefix_are_matched_and_their_bases_compared(tmp_path):
    made = factors(1)
    adapter(tmp_path / "a", made)
    adapter(tmp_path / "b", {f"model.{m}": f for m, f in factors(2).items()}, base_model_name_or_path="other")
    refs = [str(tmp_path / n) for n in "ab"]
    report = merge_adapters(refs, tmp_path / "out", rank=4)
    assert set(report.layers) == set(LAYERS)
    assert report.notes == (f"'{refs[0]}' names the base 'base', '{refs[1]}' 'other': taken to be the same",)
    expected = product(refs[0], "m.q") + product(refs[1], "model.m.q")
    np.testing.assert_allclose(product(tmp_path / "out", "m.q"), expected, atol=1e-5)
    for i, name in enumerate("cd"):
        source = SafetensorsSource([tiny.write(tmp_path / f"base{i}" / "model.safetensors", tiny.arrays(i))])
        adapter(tmp_path / name, made, precision=precise(made, 0), info={"base": identify(source)})
        source.close()
    with pytest.raises(MismatchError, match="trained on different weights"):
        merge_adapters([str(tmp_path / n) for n in "cd"], tmp_path / "no", weights="precision")


def test_product_space_at_full_rank_is_concatenation_and_below_it_the_best_of_its_rank(tmp_path):
    refs = two(tmp_path)
    merge_adapters(refs, tmp_path / "concat", scales=(0.8, -0.5), space="concat")
    for rank in (5, 2):
        report = merge_adapters(refs, tmp_path / f"svd{rank}", scales=(0.8, -0.5), rank=rank)
        for module in LAYERS:
            exact, found = product(tmp_path / "concat", module), product(tmp_path / f"svd{rank}", module)
            error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
            np.testing.assert_allclose(error, twin.lost(exact, rank), atol=1e-6)
            np.testing.assert_allclose(report.layers[module].error, error, atol=1e-6)
            np.testing.assert_allclose(report.layers[module].norm, np.linalg.norm(exact), rtol=1e-5)
    assert merge_adapters(refs, tmp_path / "usual").rank == 3


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_precision_weights_are_those_of_the_products(tmp_path, monkeypatch, block):
    monkeypatch.setattr(merging, "_BLOCK", block)
    refs = two(tmp_path)
    report = merge_adapters(refs, tmp_path / "out", weights="precision", scales=(1.0, 2.0), rank=4)
    pairs = [factors(1), factors(2, rank=3, layers={"m.q": (6, 4), "m.wide": (3, 70)})]
    spreads = [precise(pairs[0], 1), precise(pairs[1], 2)]
    strengths = [1 / twin.variance(*p["m.q"], *(1 / s for s in v["m.q"]), c)
                 for p, v, c in zip(pairs, spreads, (1.5, 5 / np.sqrt(3)), strict=True)]  # fmt: skip
    expected = twin.weighted([product(r, "m.q") for r in refs], strengths, (1.0, 2.0))
    np.testing.assert_allclose(product(tmp_path / "out", "m.q"), expected, atol=2e-5)
    assert report.layers["m.q"].error < 1e-6  # rank 4 is all of a 6 x 4 matrix
    np.testing.assert_allclose(product(tmp_path / "out", "m.k"), product(refs[0], "m.k"), atol=2e-5)


def test_equal_counts_take_every_precision_for_the_smallest_number_of_observations(tmp_path):
    made = factors(1)
    stored = precise(made, 1)
    adapter(tmp_path / "a", made, precision=stored)
    tenfold = {m: Factors(*(10 * s for s in p)) for m, p in stored.items()}
    adapter(tmp_path / "b", factors(2), precision=tenfold, info={"observations": 1000.0, "ess": 1000.0})
    adapter(tmp_path / "c", factors(2), precision=stored)
    refs = [str(tmp_path / n) for n in "abc"]
    many = merge_adapters(refs[:2], tmp_path / "ab", weights="precision", rank=4)
    assert many.counts == (100.0, 100.0)
    merge_adapters([refs[0], refs[2]], tmp_path / "ac", weights="precision", rank=4)
    recorded = merge_adapters(refs[:2], tmp_path / "own", weights="precision", counts="recorded", rank=4)
    assert recorded.counts == (100.0, 1000.0)
    np.testing.assert_allclose(product(tmp_path / "ab", "m.q"), product(tmp_path / "ac", "m.q"), atol=1e-5)
    apart = [np.linalg.norm(product(tmp_path / out, "m.q") - product(refs[1], "m.q")) for out in ("own", "ab")]
    assert apart[0] < apart[1]


def test_a_merged_adapter_loads_in_peft_and_does_what_the_products_do(tmp_path):
    peft = pytest.importorskip("peft")
    folder = tiny_gpt2(tmp_path / "base")
    common = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, "base_model_name_or_path": str(folder)}
    peft_adapter(tmp_path / "a", folder, 1, r=2, lora_alpha=4, target_modules=["c_attn"], **common)
    peft_adapter(tmp_path / "b", folder, 2, r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], **common)
    refs = [str(tmp_path / n) for n in "ab"]
    tokens = torch.arange(12)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module = name.removesuffix(".weight")
            for ref in refs:
                if name.endswith((".c_attn.weight", ".c_proj.weight")) and not (ref == refs[0] and "c_proj" in name):
                    weight += torch.from_numpy(0.5 * product(ref, module).T).float()
        expected = model(tokens).logits
        for space, rank in (("product", 5), ("concat", None)):
            merge_adapters(refs, tmp_path / space, scales=(0.5,), space=space, rank=rank)
            bare = transformers.AutoModelForCausalLM.from_pretrained(folder)
            loaded = peft.PeftModel.from_pretrained(bare, tmp_path / space)
            torch.testing.assert_close(loaded(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_fine_tuned_adapters_open_and_merge_with_the_posteriors_that_training_left(tmp_path):
    folder = tiny_gpt2(tmp_path / "base")
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "the {w} sat on the mat"}}\n' for w in ("cat", "dog") * 8))
    for i, name in enumerate("ab"):
        run_finetune(
            FinetuneConfig(model=str(folder), output=str(tmp_path / name), data=str(tmp_path / "t.jsonl"), batch_size=4,
                           flush_batches=2, seed=i, lora={"r": 2, "target_modules": ["c_attn"]}),
            quiet=True,
        )  # fmt: skip
    opened = open_adapted(f"{folder}+{tmp_path / 'a'}")
    assert opened.mean.notes == ()
    assert set(opened.precision.specs) == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}
    for name in opened.precision.specs:
        found = read_tensor(opened.precision, name)
        assert np.isfinite(found).all()
        assert (found > 0).all()
    opened.close()
    report = merge_adapters([str(tmp_path / n) for n in "ab"], tmp_path / "ab", weights="precision")
    assert report.notes == ()
    assert report.counts[0] == report.counts[1] > 0
    assert load_model(str(tmp_path / "ab")).task == "causal-lm"
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ab")


def test_large_matrices_are_cut_nearly_as_well_as_by_lapack():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 600)))[0] for n in (700, 650))
    for decay in (0.3, 1.0):  # nearly flat, and steep
        matrix = ((u * np.arange(1, 601) ** -decay) @ v.T).astype(np.float32)
        found = truncate_dense(matrix, 16, seed=3)
        assert found.error <= 1.002 * twin.lost(matrix, 16)
        exact = np.linalg.norm(matrix - found.factors.b @ found.factors.a) / np.linalg.norm(matrix)
        np.testing.assert_allclose(found.error, exact, rtol=1e-4)
        again = truncate_dense(matrix, 16, seed=3)
        np.testing.assert_array_equal(found.factors.a, again.factors.a)
    low = (u[:, :16] @ v[:, :16].T).astype(np.float32)
    assert truncate_dense(low, 16).error < 1e-5


def test_a_rank_beyond_the_matrix_is_padded_with_zeros():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(4, 2)), rng.normal(size=(2, 3))
    for found in (truncate_product(left, right, 7), truncate_dense((left @ right).astype(np.float32), 7)):
        assert found.factors.a.shape == (7, 3)
        np.testing.assert_allclose(found.factors.b @ found.factors.a, left @ right, atol=1e-6)
    assert truncate_product(0 * left, right, 1).error == 0.0


def test_factors_that_share_one_are_merged_exactly(tmp_path):
    shared = factors(0)
    for name, seed in (("a", 1), ("b", 2)):
        made = factors(seed, same_a=shared)
        adapter(tmp_path / name, made, alpha=seed + 1, precision=precise(made, seed))
    refs = [str(tmp_path / n) for n in "ab"]
    report = merge_adapters(refs, tmp_path / "out", scales=(0.8, -0.5), space="factor")
    assert report.rank == 2
    assert "linear" in report.notes[0]
    for module in LAYERS:
        expected = 0.8 * product(refs[0], module) - 0.5 * product(refs[1], module)
        np.testing.assert_allclose(product(tmp_path / "out", module), expected, atol=1e-5)
    merge_adapters(refs, tmp_path / "weighted", weights="precision", space="factor")
    pairs = [factors(s, same_a=shared)["m.q"] for s in (1, 2)]
    spreads = [precise(factors(s, same_a=shared), s)["m.q"].b for s in (1, 2)]
    scalings = (1.0, 1.5)
    b = twin.weighted([c * p.b for p, c in zip(pairs, scalings, strict=True)],
                      [s / c**2 for s, c in zip(spreads, scalings, strict=True)], (1.0, 1.0))  # fmt: skip
    np.testing.assert_allclose(product(tmp_path / "weighted", "m.q"), b @ pairs[0].a, atol=1e-5)


def test_factors_of_different_starts_are_refused_with_the_numbers(tmp_path):
    made = [factors(s) for s in (1, 2)]
    for name, pair in zip("ab", made, strict=True):
        adapter(tmp_path / name, pair)
    with pytest.raises(MismatchError) as caught:
        merge_adapters([str(tmp_path / n) for n in "ab"], tmp_path / "out", space="factor")
    assert not (tmp_path / "out").exists()
    apart = max(np.linalg.norm(made[0][m].a - made[1][m].a) / np.linalg.norm(made[0][m].a) for m in LAYERS)
    errors = []
    for m in LAYERS:
        average = sum(f[m].b for f in made) @ sum(f[m].a for f in made) / 4
        exact = sum(f[m].b @ f[m].a for f in made) / 2
        errors.append(np.linalg.norm(average - exact) / np.linalg.norm(exact))
    assert f"{apart:.2f} of their norm" in str(caught.value)
    assert f"up to {max(errors):.0%}" in str(caught.value)
    assert "no record says so" in str(caught.value)


def test_factors_of_one_recorded_start_are_averaged_and_their_cross_terms_reported(tmp_path):
    start = {m: f.a for m, f in factors(0).items()}
    for name, seed in (("a", 1), ("b", 2)):
        made = {m: Factors(start[m] + np.float32(0.1) * f.a, f.b) for m, f in factors(seed).items()}
        adapter(
            tmp_path / name,
            made,
            precision=precise(made, seed),
            info={"training": {INITIAL_A: initial_identity(start)}},
        )
    refs = [str(tmp_path / n) for n in "ab"]
    report = merge_adapters(refs, tmp_path / "out", space="factor")
    for module in LAYERS:
        exact = (product(refs[0], module) + product(refs[1], module)) / 2
        found = product(tmp_path / "out", module)
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        np.testing.assert_allclose(report.layers[module].error, error, rtol=1e-4)
        assert 0 < error < 0.3
    assert initial_identity(start) != initial_identity({**start, "m.q": start["m.q"] + 1})
    with pytest.raises(ConfigError, match="none below zero"):
        merge_adapters(refs, tmp_path / "no", space="factor", scales=(1, -1))


def test_tensors_held_whole_are_kept_if_equal_averaged_by_precision_and_else_refused(tmp_path):
    made, heads = factors(1), [np.float32([[1, 2]]), np.float32([[3, 6]])]
    for name, head in (("a", heads[0]), ("b", heads[0]), ("c", heads[1])):
        adapter(tmp_path / name, made, whole={"head.weight": head}, modules_to_save=["head"])
    a, b, c = (str(tmp_path / n) for n in "abc")
    report = merge_adapters([a, b], tmp_path / "same")
    assert report.whole == {"head.weight": "the same in all adapters"}
    np.testing.assert_array_equal(tiny.read(tmp_path / "same")["base_model.model.head.weight"], heads[0])
    with pytest.raises(MismatchError, match=r"'head\.weight' differs between the adapters"):
        merge_adapters([a, c], tmp_path / "no")
    for name, amount in (("a", 1.0), ("c", 3.0)):
        source = SafetensorsSource(checkpoint_files(tmp_path / name))
        stored = {n: np.full(s.shape, amount, np.float32) for n, s in source.specs.items()}
        save_posterior(tmp_path / name, stored, PosteriorInfo(estimator="ggn", unit="token", mean=identify(source)))
        source.close()
    merge_adapters([a, c], tmp_path / "weighted", weights="precision")
    merged = tiny.read(tmp_path / "weighted")["base_model.model.head.weight"]
    np.testing.assert_allclose(merged, heads[0] / 4 + 0.75 * heads[1], rtol=1e-6)


def test_side_files_travel_and_an_output_is_whole_or_absent(tmp_path):
    refs = two(tmp_path)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    merge_adapters(refs, tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "merge_recipe.yaml", "merge_report.json",
        "tokenizer.json",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="exists"):
        merge_adapters(refs, tmp_path / "out")
    merge_adapters(refs, tmp_path / "out", scales=(2.0,), force=True)
    with pytest.raises(CheckpointError, match="would overwrite an adapter"):
        merge_adapters(refs, tmp_path / "a", force=True)
    made = factors(3, layers={"m.q": (6, 5)})
    adapter(tmp_path / "odd", made)
    with pytest.raises(MismatchError, match=r"\[6, 5\] in .* but of \[6, 4\]"):
        merge_adapters([refs[0], str(tmp_path / "odd")], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_options_that_contradict_each_other_are_named(tmp_path):
    refs = two(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="none below zero"):
        merge_adapters(refs, out, weights="precision", scales=(1, -1))
    with pytest.raises(ConfigError, match="weighs no entries"):
        merge_adapters(refs, out, weights="precision", space="concat")
    with pytest.raises(ConfigError, match="--rank is for"):
        merge_adapters(refs, out, space="concat", rank=4)
    with pytest.raises(ConfigError, match="3 given for 2"):
        merge_adapters(refs, out, scales=(1, 2, 3))
    adapter(tmp_path / "c", factors(3))
    with pytest.raises(PrecisionError, match="no precision for"):
        merge_adapters([refs[0], str(tmp_path / "c")], out, weights="precision")
    adapter(tmp_path / "e", factors(3), precision=precise(factors(3), 0), info={"estimator": "ivon"})
    with pytest.raises(PrecisionError, match="different kinds"):
        merge_adapters([refs[0], str(tmp_path / "e")], out, weights="precision")
    adapter(tmp_path / "d", factors(3), fan_in_fan_out=True)
    with pytest.raises(MismatchError, match="fan_in_fan_out"):
        merge_adapters([refs[0], str(tmp_path / "d")], out)


def test_a_recipe_of_adapters_gives_the_same_bytes_and_notices_a_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two(tmp_path)
    runner = CliRunner()
    line = ["merge", "a", "b", "--weights", "precision", "--scale", "0.25", "--scale", "0.75", "--rank", "3"]
    done = runner.invoke(app, [*line, "-o", "one"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert runner.invoke(app, ["merge", "one/merge_recipe.yaml", "-o", "two"], catch_exceptions=False).exit_code == 0
    for file in ("adapter_model.safetensors", "merge_recipe.yaml"):
        assert Path("one", file).read_bytes() == Path("two", file).read_bytes()
    changed = runner.invoke(app, ["merge", "one/merge_recipe.yaml", "--rank", "1", "-o", "three"])
    assert changed.exit_code == 0
    assert Path("three/adapter_model.safetensors").read_bytes() != Path("one/adapter_model.safetensors").read_bytes()
    shutil.rmtree("a")
    adapter(tmp_path / "a", factors(7))
    broken = runner.invoke(app, ["merge", "one/merge_recipe.yaml", "-o", "four"])
    assert broken.exit_code == 2
    assert "not what the recipe was made with" in " ".join(broken.output.split())


def test_forcing_never_takes_away_what_is_no_output(tmp_path):
    refs = two(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="folder without a model"):
        merge_adapters(refs, tmp_path / "docs", force=True)
    with pytest.raises(CheckpointError, match=r"without a model|would overwrite"):
        merge_adapters(refs, tmp_path, force=True)
    with pytest.raises(ConfigError, match="an adapter is a folder"):
        merge_adapters(refs, tmp_path / "x.safetensors")
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_adapters_load_no_heavy_library():
    code = "import mergekit_bayes.lora, sys; print(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parent.parent)  # fmt: skip
    assert not {"torch", "transformers", "peft", "safetensors", "scipy", "numba"} & set(done.stdout.split())
