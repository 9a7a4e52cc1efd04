"""Write a merged adapter: its tensors and its config, as PEFT reads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.codec import encode
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.config import CONFIG, PREFIX, WEIGHTS
from mergekit_bayes.lora.factors import merge_factors
from mergekit_bayes.lora.inputs import AdapterMerge, Layers, Replacements, Space
from mergekit_bayes.lora.products import merge_products
from mergekit_bayes.lora.replacements import merge_replacement
from mergekit_bayes.lora.report import MergedLayer
from mergekit_bayes.lora.shifts import have_shifts, merge_shifts
from mergekit_bayes.records import Progress

# Settings of initialisations and of training, which a merged adapter has behind it.
_OF_TRAINING = ("eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config")
# What selects a subset of `target_modules`.
_SELECTIONS = ("exclude_modules", "layers_to_transform", "layers_pattern")


def write_tensors(
    merge: AdapterMerge,
    space: Space,
    rank: int,
    layers: Layers,
    replacements: Replacements,
    outcomes: Mapping[str, str],
    folder: Path,
    progress: Progress | None,
) -> dict[str, MergedLayer]:
    """Merge layer by layer into `adapter_model.safetensors`.

    Args:
        merge: The adapters.
        space: The space in which changes are added.
        rank: Rank of every layer of the result.
        layers: The layers, with who holds them.
        replacements: The tensors of `modules_to_save`, with who holds them.
        outcomes: What becomes of each of those, from `decide_replacements`.
        folder: Where to write.
        progress: Called with (layers done, layers in all).

    Returns:
        What to report of each layer, by module.
    """
    specs = {}
    with_shifts = have_shifts(layers)
    for module, copies in layers.items():
        layer = copies[0].layer._replace(module=module)
        for name, shape in zip(layer.stored_names, layer.stored_shapes(rank), strict=True):
            specs[PREFIX + name] = TensorSpec("F32", shape)
        if with_shifts:
            specs[_bias_name(module)] = TensorSpec("F32", (layer.rows,))
    for name, tensors in replacements.items():
        mean = merge.adapters[tensors[0].owner].posterior.mean
        specs[_stored_name(name, layers)] = mean.specs[tensors[0].disk]
    done: dict[str, MergedLayer] = {}
    with SafetensorsSink(folder / WEIGHTS, specs, {"format": "pt"}) as sink:
        for module, copies in layers.items():
            if space == "factor":
                merged = merge_factors(merge, rank, copies)
            else:
                merged = merge_products(merge, space, rank, module, copies)
            names = copies[0].layer._replace(module=module).stored_names
            for name, factor in zip(names, merged.factors, strict=True):
                sink.write_bytes(PREFIX + name, 0, encode(factor.reshape(-1), "F32"))
            if with_shifts:
                data = encode(merge_shifts(merge, copies), "F32")
                sink.write_bytes(_bias_name(module), 0, data)
            done[module] = MergedLayer(norm=merged.norm, error=merged.error, adapters=len(copies))
            if progress:
                progress(len(done), len(layers))
        for name, tensors in replacements.items():
            values = merge_replacement(merge, tensors, outcomes[name])
            stored = _stored_name(name, layers)
            sink.write_bytes(stored, 0, encode(values.reshape(-1), specs[stored].dtype))
    return done


def _bias_name(module: str) -> str:
    return f"{PREFIX}{module}.lora_B.bias"


def _stored_name(name: str, layers: Layers) -> str:
    """The name of a whole tensor on disk; PEFT calls a weight below factors `base_layer`."""
    module, _, tensor = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{tensor}" if module in layers else PREFIX + name


def write_config(
    adapters: Sequence[Adapter], layers: Layers, replacements: Replacements, rank: int, folder: Path
) -> None:
    """Write `adapter_config.json`: the first adapter's, with the scaling in the factors.

    The result has alpha = r, so that s = 1.
    """
    config: dict[str, object] = {**adapters[0].config}
    config |= {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    config |= dict.fromkeys(key for key in _OF_TRAINING if config.get(key))
    if have_shifts(layers):
        config["lora_bias"] = True
    has_ties = any(adapter.config.get("ensure_weight_tying") for adapter in adapters)
    if has_ties and any(copies[0].layer.is_embedding for copies in layers.values()):
        # PEFT would tie the factors of the head to those of the embedding, which are other ones of
        # the same product here; unless told, it adapts what is tied to a target without naming it.
        config["ensure_weight_tying"] = False
    else:
        has_ties = False
    if has_ties or len({_targets(adapter) for adapter in adapters}) > 1:
        config |= {"target_modules": sorted(layers)} | dict.fromkeys(_SELECTIONS)
    saved = {module for a in adapters for module in a.config.get("modules_to_save") or ()}
    config["modules_to_save"] = sorted(saved) or None
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _targets(adapter: Adapter) -> str:
    """What an adapter says of the modules that it targets, in a form that can be compared."""
    config: Mapping[str, object] = adapter.config
    targets = config.get("target_modules")
    if isinstance(targets, list):
        targets = sorted(targets)
    return json.dumps([targets, *(config.get(key) for key in _SELECTIONS)])
