"""Quantised weights are refused before a merge begins."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergekit_bayes.errors import MismatchError
from tests import model_forms, tiny
from tests.model_forms import merge

here = model_forms.here
QUANTISED = {
    "GPTQ": {"h.0.attn.qweight": np.int32([[1, 2]]), "h.0.attn.scales": np.float16([1])},
    "bitsandbytes": {
        "h.0.attn.weight": np.uint8([[1], [2]]),
        "h.0.attn.weight.absmax": np.float32([1]),
    },
    "int8": {"h.0.attn.weight": np.int8([[1, 2]]), "h.0.attn.SCB": np.float32([1])},
    "MXFP4": {
        "h.0.mlp.experts.up_proj_blocks": np.uint8([[1]]),
        "h.0.mlp.experts.up_proj_scales": np.uint8([[1]]),
    },
    "float 8": {
        "h.0.attn.weight": np.float32([[1, 2]]),
        "h.0.attn.weight_scale_inv": np.float32([1]),
    },
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused(kind):
    for name in ("base", "a"):
        save_file(
            {n: torch.from_numpy(t) for n, t in QUANTISED[kind].items()}, f"{name}.safetensors"
        )
    with pytest.raises(
        MismatchError, match=r"'base\.safetensors' is quantised|of 'base\.safetensors' is quantised"
    ):
        merge("a", weights="uniform")


def test_every_way_out_of_a_quantised_model_fits_its_method():
    save_file({"h.0.weight": torch.zeros(3, 1, dtype=torch.uint8)}, "base.safetensors")
    with pytest.raises(MismatchError, match="unquantised model that it was made from"):
        merge("base", weights="uniform")
    ways = {
        "bitsandbytes": r"model\.dequantize\(\)",
        "mxfp4": r"Mxfp4Config\(dequantize=True\)",
        "fp8": r"FineGrainedFP8Config\(dequantize=True\)",
        "compressed-tensors": r"CompressedTensorsConfig\(dequantize=True\)",
        "gptq": "unquantised model that it was made from",
    }
    Path("q").mkdir()
    shutil.copy("base.safetensors", "q/model.safetensors")
    for method, way_out in ways.items():
        Path("q/config.json").write_text(
            json.dumps({"quantization_config": {"quant_method": method}})
        )
        with pytest.raises(MismatchError, match=way_out):
            merge("base", base="q", weights="uniform")
    save_file({"codes": torch.zeros(3, 2, dtype=torch.int16)}, "q/model.safetensors")
    with pytest.raises(MismatchError, match="has a quantization_config, and 'codes' is I16"):
        merge("q", base="q", weights="uniform", out="x")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"a": 1, "quantization_config": {"quant_method": "gptq"}}, {"a": 1}),
        (
            {"text_config": {"b": 2, "quantization_config": {"quant_method": "fp8"}}},
            {"text_config": {"b": 2}},
        ),
        ({"quantization_config": {"quantization_mode": "online"}}, None),
        ({"quantization_config": {"keep_master_weights": True}}, None),
        ({"quantization_config": {}}, None),
    ],
)
def test_a_claim_beside_plain_numbers_is_dropped_unless_it_is_true_of_them(config, expected):
    for name in ("base", "a"):
        tiny.write(f"{name}/model.safetensors", tiny.arrays(len(name)), "BF16")
    Path("base/config.json").write_text(json.dumps(config))
    report = merge("./a", base="./base", weights="uniform", out="x")
    assert json.loads(Path("x/config.json").read_text()) == (expected or config)
    assert any("left over" in note for note in report.notes) == (expected is not None)


@pytest.mark.parametrize("stale", ["base", "a", "both"])
def test_a_left_over_claim_changes_no_other_key_of_the_written_config(stale):
    claim = {"quantization_config": {"quant_method": "fp8"}}
    texts = {"base": {"eos_token_id": 2, "own": "base's"}, "a": {"eos_token_id": 2, "own": "a's"}}
    for name, text in texts.items():
        tiny.write(f"{name}/model.safetensors", tiny.arrays(len(name)), "BF16")
        nested = text | (claim if stale in (name, "both") else {})
        outer = claim if stale == "both" else {}
        Path(name, "config.json").write_text(json.dumps({"text_config": nested} | outer))
    for models, base in ((["./a"], "./base"), (["./base", "./a"], None)):
        merge(*models, base=base, weights="uniform", out="x")
        assert json.loads(Path("x/config.json").read_text()) == {"text_config": texts["base"]}
        shutil.rmtree("x")


def test_a_claim_that_is_true_of_the_written_model_stays_beside_a_stale_one_of_a_task():
    claims = {"base": {"quantization_mode": "online"}, "a": {"quant_method": "fp8"}}
    for name, claim in claims.items():
        tiny.write(f"{name}/model.safetensors", tiny.arrays(len(name)), "BF16")
        Path(name, "config.json").write_text(json.dumps({"quantization_config": claim}))
    merge("./a", base="./base", weights="uniform", out="x")
    config = json.loads(Path("x/config.json").read_text())
    assert config == {"quantization_config": claims["base"]}


def test_weights_that_zero_3_left_empty_are_refused_with_the_true_cause():
    shapes = {"model.embed_tokens.weight": (0,), "h.0.up.weight": (0,), "h.0.ln.weight": (4,)}
    full = {"model.embed_tokens.weight": (7, 4), "h.0.up.weight": (3, 4), "h.0.ln.weight": (4,)}
    tiny.write("base.safetensors", tiny.arrays(0, full))
    tiny.write("a.safetensors", tiny.arrays(1, shapes))
    for models, base in ((["a"], "base"), (["a", "a"], None), (["base"], "a")):
        with pytest.raises(MismatchError, match=r"a\.safetensors: .*ZeRO-3.*zero_to_fp32\.py"):
            merge(*models, base=base, weights="uniform")
    # One of many weights, in the place of a full one.
    tiny.write("b.safetensors", tiny.arrays(1, full | {"h.0.up.weight": (0,)}))
    with pytest.raises(MismatchError, match=r"'h\.0\.up\.weight'.*ZeRO-3"):
        merge("b", weights="uniform")
    # A model may have an empty tensor of its own.
    for seed, name in enumerate("cd"):
        tiny.write(f"{name}.safetensors", tiny.arrays(seed, full | {"empty": (0,)}))
    merge("c", base="d", weights="uniform")
