"""Which tensors of a base an adapter changes or replaces, and how they are laid out."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming, renamed_note
from mergekit_bayes.checkpoint.specs import MERGEABLE, CheckpointSource, TensorSpec
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.config import is_targeted
from mergekit_bayes.lora.layers import Layer
from mergekit_bayes.lora.layouts import (
    PlacedLayer,
    find_transposed,
    place_layers,
    possible_shapes,
)
from mergekit_bayes.lora.misplaced import (
    named_base,
    refuse_misplaced_biases,
    refuse_misplaced_rows,
    without_zeros,
)
from mergekit_bayes.lora.tokens import TrainedRows
from mergekit_bayes.lora.variants import initial_move, variant_notes
from mergekit_bayes.lora.views import View, explain_fused, view_base
from mergekit_bayes.lora.writers import FOLD

# The end of a name from the number of its block on.
_NUMBERED = re.compile(r"\.(\d+\..*)$")


class Placement(NamedTuple):
    """What an adapter does to a base.

    Attributes:
        layers: The layers by the base's tensor that they change.
        biases: The layers by the base's bias that theirs is added to (`lora_bias`).
        rows: The rows that are replaced, by the base's tensor.
        replaced: The tensors that are replaced, from the base's name to the adapter's name on disk.
        notes: Remarks on what is left out, and on what PEFT would do otherwise.
    """

    layers: dict[str, PlacedLayer]
    biases: dict[str, Layer]
    rows: dict[str, TrainedRows]
    replaced: dict[str, str]
    notes: tuple[str, ...]


def place_adapter(
    base: CheckpointSource, adapter: Adapter, heads: Mapping[str, str] | None = None
) -> Placement:
    """Match an adapter with the tensors of a base.

    Args:
        base: The base's tensors.
        adapter: The adapter.
        heads: Heads that the base does not store, each with the embedding of the base that it is.

    Raises:
        ConfigError: The layout of a square weight is ambiguous.
        MismatchError: A layer or tensor of the adapter does not fit the base.
    """
    weights = {layer.tensor: layer for layer in adapter.layers.values()}
    stored = adapter.posterior.mean.specs
    view = view_base(base, weights.values(), adapter.replacements)
    stored_specs = {**view.specs, **{h: base.specs[e] for h, e in (heads or {}).items()}}
    renaming = _find_renaming(view, stored_specs, adapter, weights)
    layers = {renaming(name): layer for name, layer in weights.items()}
    replaced = {renaming(name): disk for name, disk in adapter.replacements.items()}
    _check_whole(view, adapter, replaced)
    specs = {**stored_specs, **{name: stored[disk] for name, disk in replaced.items()}}
    layers, notes = _effective(specs, adapter, layers)
    if renaming.names:
        notes.append(renamed_note(adapter.ref, renaming))
    if adapter.unused_note is not None:
        notes.append(adapter.unused_note)
    notes += _notes_on_variants(adapter)
    for name, layer in layers.items():
        _check_layer(view, specs, adapter, name, layer)
    for name in replaced:
        _check_replacement(view, specs, adapter, name, replaced[name], notes)
    placed = place_layers(view, adapter, layers, find_transposed(specs, adapter, layers))
    biases = {renaming(f"{x.module}.bias"): x for x in layers.values() if x.bias is not None}
    biases = without_zeros(specs, adapter, biases)
    rows = {renaming(name): trained for name, trained in adapter.rows.items()}
    refuse_misplaced_biases(view, specs, adapter, biases)
    refuse_misplaced_rows(view, specs, adapter, rows, layers)
    return Placement(
        placed,
        {view.stored(name): layer for name, layer in biases.items()},
        {view.stored(name): trained for name, trained in rows.items()},
        {view.stored(name): disk for name, disk in replaced.items()},
        tuple(notes),
    )


def _notes_on_variants(adapter: Adapter) -> list[str]:
    """What of the config a report tells, and tensors that get no precision."""
    notes = list(variant_notes(adapter.config, adapter.ref))
    move = initial_move(adapter.config)
    if move is not None:
        notes.append(
            f"'{adapter.ref}' began with {move}, which takes its first factors out of the base: "
            "the base is moved likewise, as PEFT does when it loads such an adapter"
        )
    if adapter.posterior.has_precision and (adapter.config.get("use_dora") or adapter.rows):
        notes.append(
            f"'{adapter.ref}' has a precision, and what it says of weights with magnitudes (DoRA) "
            "and of tables with trained rows is not known: those have none"
        )
    return notes


def _effective(
    specs: Mapping[str, TensorSpec], adapter: Adapter, layers: Mapping[str, Layer]
) -> tuple[dict[str, Layer], list[str]]:
    """The layers that change the base, and notes on those whose modules the config leaves out.

    PEFT ignores factors of modules that its config does not target. Where the base has the module
    they are applied all the same, since they were trained; where it has none, nothing can be.
    """
    untargeted = [
        name
        for name, layer in layers.items()
        if not layer.is_parameter and not is_targeted(adapter.config, layer.module)
    ]
    ignored = [name for name in untargeted if name not in specs]
    applied = [name for name in untargeted if name in specs]
    if len(ignored) == len(layers):
        return dict(layers), []
    notes = []
    if ignored:
        notes.append(
            f"'{adapter.ref}' has factors of {_some(ignored)}, which neither its target_modules "
            "name nor the base has: left out, as in PEFT"
        )
    if applied:
        notes.append(
            f"'{adapter.ref}' has factors of {_some(applied)}, which its target_modules do not "
            "name: applied here, while PEFT ignores them"
        )
    return {name: layer for name, layer in layers.items() if name not in ignored}, notes


def _find_renaming(
    base: View,
    specs: Mapping[str, TensorSpec],
    adapter: Adapter,
    weights: Mapping[str, Layer],
) -> Renaming:
    """How the adapter's names of weights become the base's.

    Raises:
        MismatchError: A weight may be two or more of the base's.
    """
    stored = adapter.posterior.mean.specs
    shapes = {name: TensorSpec("F32", layer.shape) for name, layer in weights.items()}
    shapes |= {name: stored[disk] for name, disk in adapter.replacements.items()}
    shapes |= {name: stored[trained.disk] for name, trained in adapter.rows.items()}
    shapes |= {
        f"{layer.module}.bias": TensorSpec("F32", (layer.rows,))
        for layer in weights.values()
        if layer.bias is not None
    }
    renaming = find_renaming(specs, shapes, fits=_may_be_transposed)
    for name in sorted(weights.keys() & renaming.ambiguous.keys()):
        rivals = renaming.ambiguous[name]
        shown = " or ".join(f"'{rival}'" for rival in rivals[:2])
        raise MismatchError(
            f"'{weights[name].a}' of '{adapter.ref}' may adapt {shown} of {base.files[0]}: the "
            "names do not tell which. Fold it into its base with `PeftModel.merge_and_unload()`."
        )
    return renaming


def _may_be_transposed(shape: Sequence[int], stored: Sequence[int]) -> bool:
    return tuple(stored) in possible_shapes(tuple(shape))


def _check_whole(view: View, adapter: Adapter, replaced: Mapping[str, str]) -> None:
    """Refuse a whole tensor that the base stores in pieces.

    Raises:
        ConfigError: There is one.
    """
    for name, disk in replaced.items():
        if name in view.segments:
            raise ConfigError(
                f"'{adapter.ref}' replaces '{name}' ('{disk}'), which {view.where(name)} stores in "
                f"pieces ('{view.stored(name)}' is one), and whole tensors are not split. {FOLD}"
            )


def _check_layer(
    base: View,
    specs: Mapping[str, TensorSpec],
    adapter: Adapter,
    name: str,
    layer: Layer,
) -> None:
    spec = specs.get(name)
    if spec is None:
        raise MismatchError(
            f"'{layer.a}' of '{adapter.ref}' adapts '{name}', which {base.files[0]} does not "
            f"hold. {_explain_absent(base, adapter, name, layer)}"
        )
    where = base.where(name) if name in base.specs else adapter.posterior.mean.where(layer.a)
    shapes = [layer.shape]
    if layer.is_parameter and layer.experts == 1:
        shapes.append((1, *layer.shape))
    elif not layer.kernel and not layer.is_embedding:
        shapes = possible_shapes(layer.shape)
    if spec.shape not in shapes:
        cause = f"Was it trained on another model ({named_base(adapter)})?"
        if layer.experts > 1 and len(spec.shape) == 3 and spec.shape[0] != layer.experts:
            cause = (
                f"The factors are those of {layer.experts} experts of rank {layer.rank}, and the "
                f"base has {spec.shape[0]}. {cause}"
            )
        if is_vocabulary(name) and spec.shape[1:] == layer.shape[1:]:
            cause = (
                "The vocabulary was resized before training, and the adapter does not hold the "
                f"rows that were added: name the base of {layer.shape[0]} rows that it was "
                "trained on."
            )
        raise MismatchError(
            f"'{layer.a}' of '{adapter.ref}' changes a weight of {list(layer.shape)}, but '{name}' "
            f"in {where} is {list(spec.shape)}. {cause}"
        )
    if spec.dtype not in MERGEABLE:
        raise MismatchError(
            f"'{name}' in {where} is {spec.dtype}; adapters are applied to "
            f"{', '.join(MERGEABLE)}. Cast that model to BF16 first."
        )


def _check_replacement(
    base: View,
    specs: Mapping[str, TensorSpec],
    adapter: Adapter,
    name: str,
    disk: str,
    notes: list[str],
) -> None:
    """Refuse a whole tensor of another shape than the base's, other rows of a vocabulary excepted.

    An adapter that was trained after `resize_token_embeddings` holds its own embedding and head.
    """
    if name not in base.specs or base.specs[name].shape == specs[name].shape:
        return
    old, new = base.specs[name].shape, specs[name].shape
    if is_vocabulary(name) and old and new and old[1:] == new[1:]:
        has_tokenizer = (adapter.posterior.path / "tokenizer_config.json").exists()
        notes.append(
            f"'{name}' is the adapter's and has {new[0]} rows, the base's {old[0]}: the vocabulary "
            "was resized in training"
            + (f"; its tokenizer is in '{adapter.ref}', and is not copied" if has_tokenizer else "")
        )
        return
    raise MismatchError(
        f"'{disk}' of '{adapter.ref}' is {list(new)}, but '{name}' in {base.where(name)} is "
        f"{list(old)}. Was it trained on another model ({named_base(adapter)})?"
    )


def _explain_absent(base: View, adapter: Adapter, name: str, layer: Layer) -> str:
    """Why the base lacks a tensor that the adapter changes, and what to do."""
    if is_vocabulary(name):
        return (
            "If the base ties its head to the embedding, the adapter changes the head alone: save "
            "the base with a head of its own first (tie_word_embeddings: false)."
        )
    numbered = _NUMBERED.search(name)
    shapes = (layer.shape, layer.shape[::-1])
    other = next(
        (
            other
            for other, spec in base.specs.items()
            if numbered and other.endswith(f".{numbered[1]}") and spec.shape in shapes
        ),
        None,
    )
    if other is not None:
        return (
            f"The base has '{other}' of that shape: the adapter was saved under other module "
            "names, by another version of transformers or as a part of a larger model (such as "
            f"the language tower of a vision-language model). {FOLD}"
        )
    if layer.experts > 1:
        return (
            f"It is a stack of {layer.experts} experts, and the base has these neither stacked nor "
            f"one by one under names that are known. {FOLD}"
        )
    return explain_fused(base, name) or (
        f"Was it trained on another model than this ({named_base(adapter)})?"
    )


def _some(names: Sequence[str]) -> str:
    first, *others = names
    return f"'{first}'" + (f" and {len(others)} more" if others else "")
