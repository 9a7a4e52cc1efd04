"""Adapters of experts, of parameters themselves and of fused weights are what PEFT folds."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.lora import merge_adapters, open_adapted, open_adapter
from mergekit_bayes.lora.dense import VARIANCE_FLOOR
from tests.adapters import peft_adapter, written
from tests.expert_adapters import (
    BOTH,
    COMMON,
    DOWN,
    EXPERTS,
    STACK,
    a_base,
    equals,
    folded,
    give_precision,
    single_expert_adapter,
    stacked,
    stacked_base,
)
from tests.tiny_models import tiny_mixtral


@pytest.mark.parametrize(
    ("kind", "changed", "config"),
    [
        ("mixtral", 12, {"target_parameters": BOTH}),
        (
            "mixtral",
            14,
            {  # as PEFT converts the configs of older transformers
                "target_modules": ["q_proj"],
                "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
                "rank_pattern": {r".*\.gate_up_proj": 4},
                "alpha_pattern": {r".*\.down_proj": 7},
                "use_rslora": True,
            },
        ),
        ("mixtral", 4, {"target_parameters": BOTH[1:]}),
        ("mixtral", 1, {"target_parameters": ["gate.weight"]}),
        ("qwen3_moe", 8, {"target_parameters": BOTH[:1], "rank_pattern": {"gate_up_proj": 3}}),
        (
            "llama4",
            2,
            {"target_parameters": [n.replace("mlp", "feed_forward") for n in BOTH]},
        ),
        ("gpt_oss", 4, {"target_parameters": [*BOTH, "gate_up_proj_bias", "router.weight"]}),
        ("gpt2", 2, {"target_parameters": ["c_attn.weight", "attn.c_proj.weight"]}),
        ("gpt2", 2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("phi3", 2, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("gpt_neox", 1, {"target_modules": ["query_key_value"]}),
        ("llama", 1, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        (
            "llama",
            1,
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": 1,
                "layers_pattern": "layers",
            },
        ),
        (
            "llama",
            2,
            {"target_modules": r".*\.(q|k)_proj", "exclude_modules": r".*\.1\..*"},
        ),
    ],
)
def test_an_adapted_base_is_what_peft_folds(tmp_path, kind, changed, config):
    base = a_base(tmp_path / "base", kind)
    config = {"target_modules": []} | config
    peft_adapter(tmp_path / "a", base, r=2, lora_alpha=3, **config)
    expected = folded(base, tmp_path / "a", tmp_path / "folded")
    assert len(equals(base, tmp_path / "a", expected)) == changed


@pytest.mark.parametrize(
    ("only", "scaling"), [("", 1.5), ("experts.2.w1", 3 / 2**0.5), ("w2", 1.5), ("gate", 1.5)]
)
def test_adapters_of_single_experts_fit_both_kinds_of_bases(tmp_path, only, scaling):
    base = tiny_mixtral(tmp_path / "base")
    single_expert_adapter(tmp_path / "a", only, use_rslora=scaling != 1.5)
    expected = {n: t.numpy() for n, t in load_file(base / "model.safetensors").items()}
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name in [name for name in factors if "lora_A" in name]:
        product = factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double()
        weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        expected[weight] = expected[weight] + scaling * product.numpy()
    equals(base, tmp_path / "a", expected)
    equals(stacked_base(tmp_path / "stacked", base), tmp_path / "a", stacked(expected))


def test_adapters_of_single_experts_are_what_peft_converts(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    single_expert_adapter(tmp_path / "a")
    expected = folded(base, tmp_path / "a", tmp_path / "folded")
    assert len(equals(base, tmp_path / "a", expected)) == 13


def test_adapters_of_stacks_fit_a_base_that_stores_them(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    config = {"target_modules": [], "target_parameters": [*BOTH, "gate.weight"]}
    peft_adapter(tmp_path / "a", base, r=2, lora_alpha=3, **config)
    expected = stacked(folded(base, tmp_path / "a", tmp_path / "folded"))
    changed = equals(stacked_base(tmp_path / "stacked", base), tmp_path / "a", expected)
    assert len(changed) == 3


@pytest.mark.parametrize("modules", [["q_proj", "up_proj"], ["k_proj"], ["q_proj", "v_proj"]])
def test_adapters_of_a_split_phi3_fit_the_fused_one(tmp_path, modules):
    base = a_base(tmp_path / "base", "phi3")
    rows = {"q_proj": (0, 8), "k_proj": (8, 4), "v_proj": (12, 4), "up_proj": (12, 12)}
    expected = {n: t.numpy() for n, t in load_file(base / "model.safetensors").items()}
    rng, tensors = np.random.default_rng(0), {}
    for module in modules:
        start, size = rows[module]
        block, fused = ("mlp", "gate_up") if module == "up_proj" else ("self_attn", "qkv")
        a, b = rng.normal(size=(2, 8)), rng.normal(size=(size, 2))
        for side, values in (("A", a), ("B", b)):
            name = f"base_model.model.model.layers.0.{block}.{module}.lora_{side}.weight"
            tensors[name] = values.astype(np.float32)
        name = f"model.layers.0.{block}.{fused}_proj.weight"
        expected[name] = expected[name].copy()
        expected[name][start : start + size] += 1.5 * b @ a
    written(tmp_path / "a", tensors, target_modules=modules)
    equals(base, tmp_path / "a", expected)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_entries_of_experts_do_not_depend_on_the_chunk_and_have_their_precision(
    tmp_path, is_stacked
):
    base = tiny_mixtral(tmp_path / "base")
    config = {"target_modules": [], "target_parameters": BOTH}
    peft_adapter(tmp_path / "a", base, r=2, lora_alpha=3, **config)
    moments = give_precision(tmp_path / "a", counted=0.25)
    expected = {name: variance for name, (_, variance) in moments.items()}
    rng = np.random.default_rng(1)
    if is_stacked:
        base = stacked_base(tmp_path / "stacked", base)
    else:
        up, down = expected[f"{STACK}gate_up_proj"], expected[f"{STACK}down_proj"]
        expected = {
            f"{EXPERTS}{e}.{w}.weight": values
            for e in range(4)
            for w, values in (("w1", up[e, :12]), ("w3", up[e, 12:]), ("w2", down[e]))
        }
    with open_adapted(f"{base}+{tmp_path / 'a'}") as opened:
        assert set(opened.precision.specs) == set(expected)
        name = next(iter(expected))
        recorded = read_tensor(opened.precision, name)
        precision = opened.precision.counted(25.0)
        assert (read_tensor(precision, name) < recorded).all()
        for name, variance in expected.items():
            found = read_tensor(precision, name)
            np.testing.assert_allclose(found, 1 / (variance + VARIANCE_FLOOR), rtol=1e-5)
        for source in (opened.mean, precision):
            for name in expected:
                whole = np.empty(source.specs[name].nbytes, np.uint8)
                source.read_bytes(name, 0, whole.data)
                for _ in range(20):
                    start, stop = np.sort(rng.integers(0, whole.size + 1, 2))
                    part = np.empty(stop - start, np.uint8)
                    source.read_bytes(name, int(start), part.data)
                    np.testing.assert_array_equal(part, whole[start:stop])


def test_factors_of_the_other_order_are_told_by_their_shapes(tmp_path):
    """PEFT before 0.19.1 takes A for the rows of an ordinary stack, whose shape says so."""
    base = tiny_mixtral(tmp_path / "base")
    expected = {n: t.double().numpy() for n, t in load_file(base / "model.safetensors").items()}
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype("f4") for shape in ((8, 24), (8, 8)))
    name = "base_model.model.model.layers.0.mlp.experts.lora_"
    tensors = {f"{name}A.weight": a, f"{name}B.weight": b}
    written(tmp_path / "a", tensors, target_parameters=BOTH[:1])
    for e in range(4):
        change = 1.5 * (b[:, e::4].astype("f8") @ a[2 * e : 2 * e + 2]).T
        for word, rows in (("w1", slice(12)), ("w3", slice(12, None))):
            expected[f"{EXPERTS}{e}.{word}.weight"] += change[rows]
    assert len(equals(base, tmp_path / "a", expected)) == 8


@pytest.mark.parametrize("layout", ["grouped_by_expert", "rank_major"])
def test_the_columns_of_b_are_read_as_unsloth_records_them(tmp_path, layout):
    base = tiny_mixtral(tmp_path / "base")
    expected = {n: t.double().numpy() for n, t in load_file(base / "model.safetensors").items()}
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype("f4") for shape in ((8, 12), (8, 8)))
    for e in range(4):
        columns = slice(2 * e, 2 * e + 2) if "grouped" in layout else slice(e, None, 4)
        change = 1.5 * b[:, columns].astype("f8") @ a[2 * e : 2 * e + 2]
        expected[f"{EXPERTS}{e}.w2.weight"] += change
    name = "base_model.model.model.layers.0.mlp.experts.lora_"
    tensors = {f"{name}A.weight": a, f"{name}B.weight": b}
    mapping = {"auto_mapping": {"unsloth_fixed": True}}
    config = {"target_modules": [], "task_type": "CAUSAL_LM", **DOWN, **mapping}
    written(tmp_path / "a", tensors, lora_B_layout=layout, **config)
    equals(base, tmp_path / "a", expected)
    merge_adapters([str(tmp_path / "a")], tmp_path / "m")
    equals(base, tmp_path / "m", expected)
    merged = folded(base, tmp_path / "m", tmp_path / "folded")
    name = f"{EXPERTS}3.w2.weight"
    np.testing.assert_allclose(merged[name], expected[name], atol=1e-6)
    written(tmp_path / "b", tensors, **config)
    with pytest.raises(ConfigError, match="Unsloth changed it in September 2026"):
        open_adapter(str(tmp_path / "b"))


def test_all_linear_modules_are_told_from_the_parameters_beside_them(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    config = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    peft_adapter(tmp_path / "a", base, r=2, lora_alpha=3, **config)
    expected = folded(base, tmp_path / "a", tmp_path / "folded")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    written(tmp_path / "b", tensors, **config | {"target_modules": "all-linear"})
    assert len(equals(base, tmp_path / "b", expected)) == 13


def test_an_adapter_of_repeated_layers_fits_a_base_that_was_written_out_with_them(tmp_path):
    base = a_base(tmp_path / "base", "llama")
    repeated = {"target_modules": ["q_proj", "down_proj"], "layer_replication": [[0, 2], [0, 2]]}
    trained = peft_adapter(tmp_path / "a", base, r=2, lora_alpha=3, **repeated).double()
    with pytest.raises(ConfigError, match=r"passthrough.*take layer_replication out"):
        open_adapter(str(tmp_path / "a"))
    tensors = load_file(base / "model.safetensors")
    again = {n.replace(".0.", ".2.").replace(".1.", ".3."): t.clone() for n, t in tensors.items()}
    longer = tmp_path / "longer"
    shutil.copytree(base, longer)
    save_file(again | tensors, longer / "model.safetensors", {"format": "pt"})
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    written(tmp_path / "b", factors, target_modules=["q_proj", "down_proj"])
    config = transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 4})
    model = transformers.LlamaForCausalLM(config).double()
    with open_adapted(f"{longer}+{tmp_path / 'b'}") as opened:
        found = {n: torch.from_numpy(read_tensor(opened.mean, n)) for n in opened.mean.specs}
    model.load_state_dict(found)
    tokens = torch.arange(6)[None]
    logits, expected = (m.eval()(tokens, use_cache=False).logits for m in (model, trained))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    unfolded = trained.merge_and_unload()(tokens, use_cache=False).logits
    assert not torch.allclose(unfolded, expected, atol=1e-3)  # PEFT's fold is another model
