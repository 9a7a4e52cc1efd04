"""Adapters of experts that do not fit their base, or themselves, are told by their cause."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora import open_adapted, open_adapter
from tests.adapters import written
from tests.expert_adapters import (
    DOWN,
    EXPERTS,
    a_base,
    single_expert_adapter,
    stack_factors,
    stacked_base,
)
from tests.tiny_models import tiny_mixtral

INNER = {"model.layers.0.mlp.experts.base_layer": ((24, 8), (8, 8))}


@pytest.mark.parametrize(
    ("tensors", "config", "kind", "message"),
    [
        (stack_factors(3), DOWN, MismatchError, r"those of 3 experts of rank 2, .* base has 4"),
        (stack_factors(7, 1), DOWN, MismatchError, r"gives it rank 2 \(r\), of each expert"),
        (stack_factors(rows=10), DOWN, MismatchError, r"\[4, 10, 12\], but .* is \[4, 8, 12\]"),
        (stack_factors(more=INNER), DOWN, MismatchError, "factors of 2 parameters .* names 1 "),
        (stack_factors(), {"target_parameters": "down"}, ConfigError, "a list of parameter names"),
        (
            stack_factors(),
            {"target_parameters": ["down_proj", "gate_up_proj"]},
            ConfigError,
            r"factors of 1 of its parameters, and .* names 2",
        ),
        (
            stack_factors(more=INNER),
            {"target_parameters": ["experts.down_proj", "experts.other"]},
            ConfigError,
            "not known for 'other'",
        ),
        (
            {n: t for n, t in stack_factors(more=INNER).items() if "base_layer" in n},
            DOWN,
            MismatchError,
            "and not those of 'model.layers.0.mlp.experts', which PEFT wraps",
        ),
        (stack_factors(module="mlp.mixture"), DOWN, MismatchError, "two files do not belong"),
        (
            stack_factors(module="mlp.mixture"),
            {"target_parameters": ["mixture.down_proj"]},
            MismatchError,
            "a stack of 4 experts, and the base has these neither stacked nor one by one",
        ),
        (
            stack_factors(more={"model.layers.0.self_attn.qkv_proj": ((24, 2), (2, 8))}),
            {**DOWN, "target_modules": ["qkv_proj"]},
            MismatchError,
            r"base has 'model.layers.0.self_attn.[kqv]_proj.weight': it stores fused",
        ),
        (
            stack_factors(
                more={
                    "model.layers.0.attn": ((24, 2), (2, 8)),
                    "model.layers.0.attn.base_layer.out_proj": ((8, 2), (2, 8)),
                }
            ),
            {**DOWN, "target_modules": ["attn"]},
            ConfigError,
            "MultiheadAttention as a whole, of which PEFT adds .* twice",
        ),
        (
            stack_factors(more={"model.layers.0.mlp.base_layer.experts": ((8, 8), (8, 12))}),
            DOWN,
            CheckpointError,
            "are for one weight of the model",
        ),
        (
            stack_factors(module="self_attn.q_proj", count=1, columns=8)
            | {
                "base_model.model.model.layers.0.mlp.experts.modules_to_save.down_proj": np.ones(
                    (4, 8, 12), np.float32
                )
            },
            {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
            ConfigError,
            r"replaces 'model.layers.0.mlp.experts.down_proj'.* stores in pieces",
        ),
        (
            stack_factors(more={"model.layers.0.mlp.experts.down_projs.0": ((8, 2), (2, 12))}),
            {**DOWN, "target_modules": ["down_projs.0"]},
            MismatchError,
            "experts of a gpt-oss that was quantised for training",
        ),
        (stack_factors(), {**DOWN, "layer_replication": [[0, 1]]}, ConfigError, "layer_repl"),
        (stack_factors(), {**DOWN, "init_lora_weights": "olora"}, ConfigError, "no linear layer"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_cause(tmp_path, tensors, config, kind, message):
    base = tiny_mixtral(tmp_path / "base")
    written(tmp_path / "a", tensors, **config)
    with pytest.raises(kind, match=f"(?s){message}"):
        open_adapted(f"{base}+{tmp_path / 'a'}")


def test_experts_that_are_square_alone_are_refused(tmp_path):
    base = a_base(tmp_path / "base", "gpt_oss")
    written(tmp_path / "a", stack_factors(columns=8), **DOWN)
    with pytest.raises(ConfigError, match="whose experts are square, and no other experts"):
        open_adapted(f"{base}+{tmp_path / 'a'}")


@pytest.mark.parametrize("change", ["lacks one", "has another shape"])
def test_a_base_whose_experts_do_not_fit_together_is_refused(tmp_path, change):
    base = tiny_mixtral(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = f"{EXPERTS}2.w2.weight"
    if change == "lacks one":
        del tensors[name]
    else:
        tensors[name] = torch.ones(8, 13)
    save_file(tensors, base / "model.safetensors")
    written(tmp_path / "a", stack_factors(), **DOWN)
    with pytest.raises(MismatchError, match="neither stacked nor one by one"):
        open_adapted(f"{base}+{tmp_path / 'a'}")


def test_split_projections_of_a_model_that_fuses_them_otherwise_are_refused(tmp_path):
    base = a_base(tmp_path / "base", "gpt_neox")
    made = {"gpt_neox.layers.0.attention.query": ((8, 2), (2, 8))}
    tensors = {n: t for n, t in stack_factors(more=made).items() if "query" in n}
    written(tmp_path / "a", tensors, target_modules=["query"])
    with pytest.raises(MismatchError, match=r"base has '[\w.]+query_key_value\.\w+': it stores f"):
        open_adapted(f"{base}+{tmp_path / 'a'}")


def test_dora_of_single_experts_on_a_stacked_base_is_refused(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    single_expert_adapter(tmp_path / "a", "w2")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    magnitudes = {
        n.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(8)
        for n in tensors
        if "lora_A" in n
    }
    stacks = stacked_base(tmp_path / "stacked", base)
    written(tmp_path / "d", tensors | magnitudes, target_modules=["w2"], use_dora=True)
    open_adapted(f"{base}+{tmp_path / 'd'}").close()
    with pytest.raises(ConfigError, match=r"use_dora, which needs .* in one piece"):
        open_adapted(f"{stacks}+{tmp_path / 'd'}")


def test_factors_of_experts_without_their_config_are_told_to_be_factors(tmp_path):
    folder = written(tmp_path / "a", stack_factors(more=INNER))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds factors, whose scale is in the adapter_conf"):
        open_adapter(str(folder))
