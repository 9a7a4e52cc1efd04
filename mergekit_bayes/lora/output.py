"""Write a merged adapter: its tensors and its config, as PEFT reads them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.codec import encode
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.config import CONFIG, PREFIX, WEIGHTS
from mergekit_bayes.lora.experts import group_experts, join_experts
from mergekit_bayes.lora.inputs import AdapterMerge, Layers, Replacements, Space
from mergekit_bayes.lora.parameters import WEIGHT, wrapped_names
from mergekit_bayes.lora.replacements import merge_replacement
from mergekit_bayes.lora.report import MergedLayer
from mergekit_bayes.lora.shifts import have_shifts, merge_shifts
from mergekit_bayes.lora.spaces import merge_layer
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
    stacks, names = group_experts(layers), _stored_factors(layers)
    for module, experts in stacks.items():
        layer = layers[experts[0]][0].layer
        for name, shape in zip(names[module], layer.stored_shapes(rank), strict=True):
            specs[PREFIX + name] = TensorSpec("F32", shape)
        if with_shifts:
            specs[_bias_name(module)] = TensorSpec("F32", (layer.rows,))
    for name, tensors in replacements.items():
        mean = merge.adapters[tensors[0].owner].posterior.mean
        specs[_stored_name(name, layers)] = mean.specs[tensors[0].disk]
    done: dict[str, MergedLayer] = {}
    with SafetensorsSink(folder / WEIGHTS, specs, {"format": "pt"}) as sink:
        for module, experts in stacks.items():
            merged = [merge_layer(merge, space, rank, name, layers[name]) for name in experts]
            factors, copies = join_experts([m.factors for m in merged]), layers[experts[0]]
            for name, factor in zip(names[module], factors, strict=True):
                sink.write_bytes(PREFIX + name, 0, encode(factor.reshape(-1), "F32"))
            if with_shifts:
                data = encode(merge_shifts(merge, copies), "F32")
                sink.write_bytes(_bias_name(module), 0, data)
            norm = math.hypot(*(m.norm for m in merged))
            error = math.hypot(*(m.norm * m.error for m in merged)) / (norm or 1.0)
            done[module] = MergedLayer(norm=norm, error=error, adapters=len(copies))
            if progress:
                progress(len(done), len(stacks))
        for name, tensors in replacements.items():
            values = merge_replacement(merge, tensors, outcomes[name])
            stored = _stored_name(name, layers)
            sink.write_bytes(stored, 0, encode(values.reshape(-1), specs[stored].dtype))
    return done


def _stored_factors(layers: Layers) -> dict[str, tuple[str, str]]:
    """The names under which PEFT stores the factors of each layer, or stack, after its prefix."""
    first = {name: layers[experts[0]][0].layer for name, experts in group_experts(layers).items()}
    # By the first adapter's names, in which a key is a tensor's name, without `.weight`.
    owners = {
        name: name if layer.parameter == WEIGHT else name.removesuffix(f".{layer.parameter}")
        for name, layer in first.items()
    }
    parameters: dict[str, list[str]] = {}
    for name, layer in first.items():
        if layer.is_parameter:
            parameters.setdefault(owners[name], []).append(layer.parameter)
    wrappers = {owner: wrapped_names(owner, found) for owner, found in parameters.items()}
    return {
        name: layer._replace(
            module=owners[name],
            wrapper=wrappers[owners[name]][layer.parameter] if layer.is_parameter else "",
        ).stored_names
        for name, layer in first.items()
    }


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
        config |= _all_targets(layers) | dict.fromkeys(_SELECTIONS)
    if config.get("lora_B_layout"):
        config["lora_B_layout"] = "rank_major"  # PEFT's, in which experts are written
    if config.get("target_parameters"):
        config["lora_dropout"] = 0.0  # PEFT loads no other, although it counts in training only
    saved = {module for a in adapters for module in a.config.get("modules_to_save") or ()}
    config["modules_to_save"] = sorted(saved) or None
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _all_targets(layers: Layers) -> dict[str, object]:
    """What the config of an adapter targets that has all of these layers, one by one."""
    first = {name: layers[experts[0]][0].layer for name, experts in group_experts(layers).items()}
    parameters = [
        f"{name}.{WEIGHT}" if layer.parameter == WEIGHT else name
        for name, layer in first.items()
        if layer.is_parameter
    ]
    return {
        "target_modules": sorted(name for name, layer in first.items() if not layer.is_parameter),
        "target_parameters": sorted(parameters) or None,
    }


def _targets(adapter: Adapter) -> str:
    """What an adapter says of the modules that it targets, in a form that can be compared."""
    config: Mapping[str, object] = adapter.config
    targets = config.get("target_modules")
    if isinstance(targets, list):
        targets = sorted(targets)
    parameters = sorted(adapter.config.get("target_parameters") or ())
    return json.dumps([targets, parameters, *(config.get(key) for key in _SELECTIONS)])
