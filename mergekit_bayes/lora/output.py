"""Write a merged adapter: its tensors and its config, as PEFT reads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.codec import encode
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.config import CONFIG, PREFIX, WEIGHTS
from mergekit_bayes.lora.inputs import AdapterMerge, Layers, Replacements, Space
from mergekit_bayes.lora.replacements import merge_replacement
from mergekit_bayes.lora.report import MergedLayer
from mergekit_bayes.lora.spaces import merge_layer
from mergekit_bayes.records import Progress

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
    for module, copies in layers.items():
        shapes = copies[0].layer.stored_shapes(rank)
        for side, shape in zip("AB", shapes, strict=True):
            specs[f"{PREFIX}{module}.lora_{side}.weight"] = TensorSpec("F32", shape)
    for name, tensors in replacements.items():
        mean = merge.adapters[tensors[0].owner].posterior.mean
        specs[_stored_name(name, layers)] = mean.specs[tensors[0].disk]
    done: dict[str, MergedLayer] = {}
    with SafetensorsSink(folder / WEIGHTS, specs, {"format": "pt"}) as sink:
        for module, copies in layers.items():
            merged = merge_layer(merge, space, rank, module, copies)
            for side, factor in zip("AB", merged.factors, strict=True):
                data = encode(factor.reshape(-1), "F32")
                sink.write_bytes(f"{PREFIX}{module}.lora_{side}.weight", 0, data)
            done[module] = MergedLayer(norm=merged.norm, error=merged.error, adapters=len(copies))
            if progress:
                progress(len(done), len(layers))
        for name, tensors in replacements.items():
            values = merge_replacement(merge, tensors, outcomes[name])
            stored = _stored_name(name, layers)
            sink.write_bytes(stored, 0, encode(values.reshape(-1), specs[stored].dtype))
    return done


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
    if len({_targets(adapter) for adapter in adapters}) > 1:
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
