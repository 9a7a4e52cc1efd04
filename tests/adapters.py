"""Adapters as files, written by the package's sink or by PEFT, and what they change."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.lora import open_adapter
from mergekit_bayes.lora.layers import Factors
from mergekit_bayes.posterior import PosteriorInfo, identify, save_posterior
from tests import tiny
from tests.reference import lora as twin

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
        found[module] = Factors(
            *(np.asarray(x, np.float32) for x in (a if same_a is None else same_a[module].a, b))
        )
    return found


def adapter(folder, made, alpha=3, whole=None, precision=None, info=None, **config):
    """An adapter folder of these factors by our own sink, with `precision` by module and `info`."""
    tensors = {}
    for module, pair in made.items():
        for side, values in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = values
    tensors |= {f"base_model.model.{name}": values for name, values in (whole or {}).items()}
    tiny.write(folder / "adapter_model.safetensors", tensors)
    rank = len(next(iter(made.values())).a)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [m[2:] for m in made],
        "base_model_name_or_path": "base",
    } | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if precision is not None:
        source = SafetensorsSource(checkpoint_files(folder))
        stored = {}
        for module, pair in precision.items():
            for side, values in zip("AB", pair, strict=True):
                if values is not None:
                    stored[f"base_model.model.{module}.lora_{side}.weight"] = values
        known = {"estimator": "ggn", "unit": "token", "observations": 100.0, "ess": 100.0} | (
            info or {}
        )
        save_posterior(folder, stored, PosteriorInfo(mean=identify(source), **known))
        source.close()
    return folder


def precise(made, seed):
    """Random precisions of factors, from 1 to 100."""
    rng = np.random.default_rng(seed + 500)
    return {
        m: Factors(*(np.asarray(np.exp(rng.uniform(0, 4.6, x.shape)), np.float32) for x in f))
        for m, f in made.items()
    }


def product(folder, module):
    """The change that an adapter folder makes to one layer, in float64."""
    found = open_adapter(str(folder), with_precision=False)
    layer = found.layers[module]
    result = twin.change(*found.factors(layer), layer.scaling)
    found.close()
    return result


def peft_adapter(folder, base_folder, seed=0, kind=transformers.AutoModelForCausalLM, **config):
    """An adapter that PEFT makes and saves, with random factors and heads; returns PEFT's model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(kind.from_pretrained(base_folder), peft.LoraConfig(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def tensors_of(made):
    """Factors under the names that PEFT gives them on disk."""
    return {
        f"base_model.model.{module}.lora_{side}.weight": values
        for module, pair in made.items()
        for side, values in zip("AB", pair, strict=True)
    }


def written(folder, tensors, **config):
    """An adapter folder of tensors under any names."""
    folder.mkdir()
    stored = {name: torch.as_tensor(np.ascontiguousarray(t)) for name, t in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
