"""What changes in a config.json where a merge of slices changes the layers of a model.

The number of layers, and what a config says of single layers: as a list with a value for each
(`layer_types`), as the numbers of layers (`mlp_only_layers`), as a number of first or last layers
(`max_window_layers`, `first_k_dense_replace`), or as a period (`decoder_sparse_step`). A layer
keeps what its own model's config says of it; where a number or a period cannot say that, the merge
is refused.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_bayes.checkpoint.model_config import DEPTH_KEYS, layer_count, text_config
from mergekit_bayes.errors import MismatchError


class LayerOrigin(NamedTuple):
    """The layer of a model that a layer of the output is made of.

    Attributes:
        ref: What the user calls the model.
        config: The model's config.
        number: The number of the layer there.
    """

    ref: str
    config: Mapping[str, Any]
    number: int


_PER_LAYER_INPUTS = "hidden_size_per_layer_input"  # of Gemma 3n
# Lists with a value for each layer: those of its length with such a word in their names.
_PER_LAYER = re.compile(
    "layer|block|pattern|heads|head_dim|intermediate|window|sparsity|attn|attention"
)
# Lists of the numbers of layers.
_NUMBERS = frozenset(
    {"mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs"}
    | {"cross_attention_layers", "hybrid_layer_ids", "global_attn_idx", "dense_layers"}
)
# Numbers of layers of which the first or the last ones are of another kind.
_FIRST = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_LAST = ("num_kv_shared_layers",)
_LAST_INDEX = ("moe_layer_end_index",)  # the number of the last one of the first layers, or -1
_CYCLES = ("block_types", "_block_types")  # kinds of layers, which the layers repeat
# Periods p: layer i is of another kind where (i + shift) mod p = 0; and the list that, where a
# config has it, says the same.
_PERIODS = {
    "sliding_window_pattern": (1, "layer_types"),
    "full_attention_interval": (1, "layer_types"),
    "global_attn_every_n_layers": (0, "layer_types"),
    "no_rope_layer_interval": (1, "no_rope_layers"),
    "decoder_sparse_step": (1, None),
    "interleave_moe_layer_step": (1, "moe_layers"),
    "moe_layer_freq": (0, None),
    "moe_layer_interval": (1, None),
}
# Periods with a key for the shift: layer i is of another kind where i mod p = shift.
_SHIFTED = {
    "attn_layer_period": "attn_layer_offset",
    "expert_layer_period": "expert_layer_offset",
}


def config_changes(config: Mapping[str, Any], layers: Sequence[LayerOrigin]) -> dict[str, object]:
    """The keys of a config that other layers change, with their new values.

    Args:
        config: The config of the output, as its donor has it.
        layers: What each layer of the output is made of, from below.

    Returns:
        The changes, for `change_config`.

    Raises:
        MismatchError: A key cannot say of the new layers what is said of them in their models.
    """
    section = text_config(config)
    depth = layer_count(config)
    changes: dict[str, object] = {}
    if depth is None:
        return changes
    if section.get(_PER_LAYER_INPUTS) and [layer.number for layer in layers] != [*range(depth)]:
        raise MismatchError(
            f"Models with '{_PER_LAYER_INPUTS}' in their config.json have embeddings with columns "
            "for each layer, so that 'slices' must keep all layers in their order. Merge them with "
            "'models'."
        )
    for key, value in section.items():
        changed = _changed(key, value, depth, config, layers)
        if changed != value:
            changes[key] = changed
    for key, (shift, list_key) in _PERIODS.items():
        if isinstance(section.get(key), int) and not isinstance(section.get(list_key or ""), list):
            _check(key, config, layers, _every(key, shift))
    for key, offset in _SHIFTED.items():
        if key in section:
            _check(key, config, layers, _every_shifted(key, offset))
    return changes


def _changed(
    key: str, value: Any, depth: int, config: Mapping[str, Any], layers: Sequence[LayerOrigin]
) -> object:
    """The new value of a key; the old one where it says nothing of layers."""
    if key in DEPTH_KEYS and value == depth and not isinstance(value, bool):
        return len(layers)
    if key in _NUMBERS and isinstance(value, list):
        return [j for j, layer in enumerate(layers) if layer.number in _value(key, layer, config)]
    if key == "attention_types" and isinstance(value, list):  # of GPT-Neo: kinds, repetitions
        return _attention_types(value, config, layers)
    if key in _CYCLES and isinstance(value, list) and value:
        cycle = [_in_cycle(key, layer, config) for layer in layers]
        return value if cycle == [value[j % len(value)] for j in range(len(layers))] else cycle
    if isinstance(value, list) and len(value) == depth and _PER_LAYER.search(key):
        return [_entry(key, layer, config) for layer in layers]
    if key == "hybrid_override_pattern" and isinstance(value, str) and len(value) == depth:
        return "".join(str(_entry(key, layer, config)) for layer in layers)
    if key in _FIRST and _is_count(value):
        return _changed_first(key, value, config, layers)
    if key in _LAST_INDEX and _is_count(value):
        kinds = [layer.number <= _value(key, layer, config) for layer in layers]
        _check_first(key, kinds, layers)
        return sum(kinds) - 1
    if key in _LAST and _is_count(value):
        kinds = [
            layer.number >= (layer_count(layer.config) or depth) - _value(key, layer, config)
            for layer in layers
        ]
        _check_first(key, [not kind for kind in kinds], layers)
        return sum(kinds)
    return value


def _changed_first(
    key: str, value: int, config: Mapping[str, Any], layers: Sequence[LayerOrigin]
) -> int:
    """A number of first layers, where the layers that are meant are still the first ones."""
    kinds = [layer.number < _value(key, layer, config) for layer in layers]
    if key == "max_window_layers":
        section = text_config(config)
        # Only with windows does it say anything, and not where `layer_types` says it.
        if not section.get("use_sliding_window") or isinstance(section.get("layer_types"), list):
            return value
    _check_first(key, kinds, layers)
    # All of the layers may be meant by any larger number.
    return value if all(kinds) and value >= len(layers) else sum(kinds)


def _check_first(key: str, kinds: Sequence[bool], layers: Sequence[LayerOrigin]) -> None:
    """Refuse a layer of the kind of the first ones behind one of the other kind."""
    for j in range(1, len(kinds)):
        if kinds[j] and not kinds[j - 1]:
            raise _cannot_say(key, j, layers[j])


def _cannot_say(key: str, j: int, layer: LayerOrigin) -> MismatchError:
    return MismatchError(
        f"'{key}' in the output's config.json cannot say of layer {j} what the config.json of "
        f"'{layer.ref}' says of its layer {layer.number}, which it is made of. Choose slices in "
        "which layers of the same kind follow each other as in the models."
    )


def _check(
    key: str,
    config: Mapping[str, Any],
    layers: Sequence[LayerOrigin],
    kind: Callable[[Mapping[str, Any], int], bool],
) -> None:
    """Refuse layers of which the output's config would say another kind than their models'."""
    for j, layer in enumerate(layers):
        own = text_config(layer.config)
        source = own if key in own else text_config(config)
        if kind(source, layer.number) != kind(text_config(config), j):
            raise _cannot_say(key, j, layer)


def _every(key: str, shift: int) -> Callable[[Mapping[str, Any], int], bool]:
    def kind(config: Mapping[str, Any], number: int) -> bool:
        period = config.get(key)
        return isinstance(period, int) and period > 0 and (number + shift) % period == 0

    return kind


def _every_shifted(key: str, offset: str) -> Callable[[Mapping[str, Any], int], bool]:
    def kind(config: Mapping[str, Any], number: int) -> bool:
        period = config.get(key)
        if not isinstance(period, int) or period < 1:
            return False
        return bool(number % period == config.get(offset, 0))

    return kind


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _value(key: str, layer: LayerOrigin, config: Mapping[str, Any]) -> Any:
    """A key in the config of a layer's model; where that lacks it, in the output's.

    A config that an older version wrote lacks keys that a newer one adds for the same model.
    """
    own = text_config(layer.config).get(key)
    donors = text_config(config)[key]
    return own if isinstance(own, type(donors)) else donors


def _entry(key: str, layer: LayerOrigin, config: Mapping[str, Any]) -> object:
    """The value for one layer in a list of values."""
    values = _value(key, layer, config)
    layers = layer_count(layer.config)
    if layers is not None and len(values) != layers:
        whose = f"'{layer.ref}'" if values is text_config(layer.config).get(key) else "the output"
        raise MismatchError(
            f"'{key}' in the config.json of {whose} has {len(values)} values, expected one for "
            f"each of the {layers} layers of '{layer.ref}'. Correct that file."
        )
    if layer.number >= len(values):
        raise _cannot_say(key, layer.number, layer)
    return values[layer.number]


def _in_cycle(key: str, layer: LayerOrigin, config: Mapping[str, Any]) -> object:
    """The value for one layer in a list that the layers repeat."""
    values = _value(key, layer, config) or text_config(config)[key]
    return values[layer.number % len(values)]


def _attention_types(
    value: list[Any], config: Mapping[str, Any], layers: Sequence[LayerOrigin]
) -> list[Any]:
    """GPT-Neo's kinds of attention, `[[["global", "local"], 6]]`, for other layers."""
    kinds: list[object] = []
    for layer in layers:
        own = _kinds(_value("attention_types", layer, config))
        if layer.number >= len(own):
            raise _cannot_say("attention_types", len(kinds), layer)
        kinds.append(own[layer.number])
    return value if kinds == _kinds(value) else [[kinds, 1]]


def _kinds(pairs: list[Any]) -> list[object]:
    """The kind of each layer, of groups of kinds and how often each is repeated; empty if none."""
    kinds: list[object] = []
    for pair in pairs:
        match pair:
            case [list(group), int(times)]:
                kinds += group * min(times, 10_000 // max(len(group), 1))
            case _:
                return []
    return kinds
