"""Tiny mixtures of experts, adapters of them, and what PEFT folds."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.lora import open_adapted, open_adapter
from mergekit_bayes.posterior import PosteriorInfo, identify, save_posterior
from tests.adapters import written
from tests.reference import lora as twin

COMMON = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = "model.layers.0.block_sparse_moe.experts."
STACK = "model.layers.0.mlp.experts."
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(num_local_experts=4, **COMMON),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        num_experts=4, moe_intermediate_size=6, num_experts_per_tok=2, head_dim=4, **COMMON
    ),
    # Stored stacked as (experts, d_in, d_out); PEFT takes A for the columns all the same.
    "llama4": lambda: transformers.Llama4TextConfig(
        num_local_experts=4, intermediate_size_mlp=12, head_dim=4, **COMMON
    ),
    # Stored likewise, and taken by PEFT as transposed; `down_proj` is square.
    "gpt_oss": lambda: transformers.GptOssConfig(
        **{**COMMON, "intermediate_size": 8},
        num_local_experts=4,
        head_dim=4,
        num_experts_per_tok=2,
    ),
    "phi3": lambda: transformers.Phi3Config(**{**COMMON, "num_key_value_heads": 1}),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
    ),
    "llama": lambda: transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 2}),
}
KIND = transformers.AutoModelForCausalLM
DOWN = {"target_parameters": ["mlp.experts.down_proj"]}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def a_base(folder, kind):
    """A random model of one of the MODELS, as transformers writes it."""
    torch.manual_seed(0)
    KIND.from_config(MODELS[kind]()).save_pretrained(folder)
    return folder


def folded(base, adapter, out):
    """The tensors that PEFT's fold in float64 has, under the names on disk."""
    peft = pytest.importorskip("peft")
    model = KIND.from_pretrained(base, dtype=torch.float64)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return {name: t.numpy() for name, t in load_file(out / "model.safetensors").items()}


def equals(base, adapter, expected, *, atol=1e-6):
    """The adapted base has these tensors; returns the names of those that the adapter changes."""
    stored = load_file(base / "model.safetensors")
    changed = []
    with open_adapted(f"{base}+{adapter}") as opened:
        assert set(opened.mean.specs) == set(expected)
        for name, values in expected.items():
            found = read_tensor(opened.mean, name)
            np.testing.assert_allclose(found, values, rtol=1e-6, atol=atol, err_msg=name)
            changed += [name] * (not np.array_equal(found, stored[name].numpy()))
        assert set(changed) == set(opened.mean.adapted)
        return changed


def single_expert_adapter(folder, only="", **config):
    """An adapter of an older transformers, whose experts are modules of their own."""
    shapes = {f"{EXPERTS}{e}.{w}": (12, 8) for e in range(4) for w in ("w1", "w3")}
    shapes |= {f"{EXPERTS}{e}.w2": (8, 12) for e in range(4)}
    shapes |= {"model.layers.0.block_sparse_moe.gate": (4, 8)}
    rng, tensors = np.random.default_rng(0), {}
    for module, (rows, columns) in shapes.items():
        pair = rng.normal(size=(2, columns)), rng.normal(size=(rows, 2))
        for side, values in zip("AB", pair, strict=True):
            if only in module:
                name = f"base_model.model.{module}.lora_{side}.weight"
                tensors[name] = values.astype(np.float32)
    targets = ["w1", "w2", "w3", "gate"]
    return written(folder, tensors, target_modules=targets, task_type="CAUSAL_LM", **config)


def stacked(tensors):
    """The tensors of a Mixtral as memory has them."""
    tensors = {name: np.asarray(t) for name, t in tensors.items()}
    found = {n.replace("block_sparse_moe", "mlp"): t for n, t in tensors.items()}
    found = {name: t for name, t in found.items() if ".experts." not in name}
    gates, ups, downs = (
        [tensors[f"{EXPERTS}{e}.{w}.weight"] for e in range(4)] for w in ("w1", "w3", "w2")
    )
    up = [np.concatenate(pair) for pair in zip(gates, ups, strict=True)]
    return found | {f"{STACK}gate_up_proj": np.stack(up), f"{STACK}down_proj": np.stack(downs)}


def stacked_base(folder, base):
    """The same base with its experts stacked in the file."""
    shutil.copytree(base, folder)
    tensors = stacked(load_file(base / "model.safetensors"))
    made = {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    return folder


def give_precision(folder, seed=0, counted=1.0):
    """Give an adapter of rank 2 a precision; returns the mean and variance of every stack.

    The variance is that of `counted` times the 100 observations on record.
    """
    with open_adapter(str(folder)) as adapter:
        specs = adapter.posterior.mean.specs
        rng = np.random.default_rng(seed)
        precision = {n: np.exp(rng.uniform(0, 4, s.shape)).astype("f4") for n, s in specs.items()}
        counts = {"unit": "token", "observations": 100.0, "ess": 100.0}
        info = PosteriorInfo(estimator="ggn", mean=identify(adapter.posterior.mean), **counts)
        layers = adapter.layers
    save_posterior(folder, precision, info)
    factors = load_file(folder / "adapter_model.safetensors")
    moments = {}
    for name, layer in layers.items():
        a, b = factors[layer.a].double().numpy(), factors[layer.b].double().numpy()
        va, vb = (1 / counted / precision[side].astype("f8") for side in (layer.a, layer.b))
        pairs = [
            (a[2 * e : 2 * e + 2], b[:, e::4], va[2 * e : 2 * e + 2], vb[:, e::4], 1.5)
            for e in range(4)
        ]
        mean = np.stack([1.5 * b @ a for a, b, *_ in pairs])
        moments[name] = mean, np.stack([twin.variance(*pair) for pair in pairs])
    return moments


def stack_factors(count=4, rank=2, module="mlp.experts", rows=8, columns=12, more=()):
    """Factors of one stack (`down_proj` of the tiny Mixtral), and of others by shape."""
    name = f"base_model.model.model.layers.0.{module}"
    tensors = {
        f"{name}.lora_A.weight": np.ones((count * rank, columns), np.float32),
        f"{name}.lora_B.weight": np.ones((rows, count * rank), np.float32),
    }
    for other, (of_b, of_a) in dict(more).items():
        tensors[f"base_model.model.{other}.lora_A.weight"] = np.ones(of_a, np.float32)
        tensors[f"base_model.model.{other}.lora_B.weight"] = np.ones(of_b, np.float32)
    return tensors
