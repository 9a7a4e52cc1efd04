"""Which tensors of a base an adapter changes or replaces, and how they are laid out."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming, renamed_note
from mergekit_bayes.checkpoint.specs import MERGEABLE, CheckpointSource, TensorSpec
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.config import CONFIG, is_targeted
from mergekit_bayes.lora.layers import Layer
from mergekit_bayes.lora.pieces import Piece, pieces_of
from mergekit_bayes.lora.views import Segment, View, view_base
from mergekit_bayes.lora.writers import FOLD

# The end of a name from the number of its block on.
_NUMBERED = re.compile(r"\.(\d+\..*)$")


class PlacedLayer(NamedTuple):
    """A layer of an adapter and the layout of the base's weight that it changes.

    Attributes:
        layer: The layer, or the first of several.
        transposed: Whether the weight is stored as (d_in, d_out).
        pieces: The products that the weight changes by where it is not one whole product.
    """

    layer: Layer
    transposed: bool
    pieces: tuple[Piece, ...] = ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers that change the weight."""
        return tuple(dict.fromkeys(piece.layer for piece in self.pieces)) or (self.layer,)


class Placement(NamedTuple):
    """What an adapter does to a base.

    Attributes:
        layers: The layers by the base's tensor that they change.
        replaced: The tensors that are replaced, from the base's name to the adapter's name on disk.
        notes: Remarks on what is left out, and on what PEFT would do otherwise.
    """

    layers: dict[str, PlacedLayer]
    replaced: dict[str, str]
    notes: tuple[str, ...]


def place_adapter(base: CheckpointSource, adapter: Adapter) -> Placement:
    """Match an adapter with the tensors of a base.

    Raises:
        ConfigError: The layout of a square weight is ambiguous.
        MismatchError: A layer or tensor of the adapter does not fit the base.
    """
    weights = {layer.tensor: layer for layer in adapter.layers.values()}
    stored = adapter.posterior.mean.specs
    view = view_base(base, weights.values())
    renaming = _find_renaming(view, adapter, weights)
    layers = {renaming(name): layer for name, layer in weights.items()}
    replaced = {renaming(name): disk for name, disk in adapter.replacements.items()}
    _check_whole(view, adapter, replaced)
    specs = {**view.specs, **{name: stored[disk] for name, disk in replaced.items()}}
    layers, notes = _effective(specs, adapter, layers)
    if renaming.names:
        notes.append(renamed_note(adapter.ref, renaming))
    if adapter.unused_note is not None:
        notes.append(adapter.unused_note)
    for name, layer in layers.items():
        _check_layer(view, specs, adapter, name, layer)
    for name in replaced:
        _check_replacement(view, specs, adapter, name, replaced[name], notes)
    transposed = _find_transposed(specs, adapter, layers)
    transposed |= _find_transposed_stacks(view, specs, adapter, layers)
    placed = _place(view, layers, transposed)
    replaced = {view.stored(name): disk for name, disk in replaced.items()}
    return Placement(placed, replaced, tuple(notes))


def _place(
    view: View, layers: Mapping[str, Layer], transposed: Collection[str]
) -> dict[str, PlacedLayer]:
    """The layers by the stored tensor that they change."""
    placed: dict[str, PlacedLayer] = {}
    pieces: dict[str, list[Piece]] = {}
    for name, layer in layers.items():
        stored, is_transposed = view.stored(name), name in transposed
        if name not in view.segments and layer.experts == 1:
            placed[stored] = PlacedLayer(layer, is_transposed)
            continue
        height = (layer.columns if is_transposed else layer.rows) * layer.experts
        segments = view.segments.get(name, (Segment(stored, 0, 0, height),))
        for tensor, found in pieces_of(layer, segments, transposed=is_transposed).items():
            pieces.setdefault(tensor, []).extend(found)
    for tensor, found in pieces.items():
        found.sort(key=lambda piece: piece.at)
        placed[tensor] = PlacedLayer(found[0].layer, found[0].transposed, tuple(found))
    return placed


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
        if not layer.is_parameter and not is_targeted(adapter.config, layer.target or layer.module)
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


def _find_renaming(base: View, adapter: Adapter, weights: Mapping[str, Layer]) -> Renaming:
    """How the adapter's names of weights become the base's.

    Raises:
        MismatchError: A weight may be two or more of the base's.
    """
    stored = adapter.posterior.mean.specs
    shapes = {name: TensorSpec("F32", layer.shape) for name, layer in weights.items()}
    shapes |= {name: stored[disk] for name, disk in adapter.replacements.items()}
    renaming = find_renaming(base.specs, shapes, fits=_may_be_transposed)
    for name in sorted(weights.keys() & renaming.ambiguous.keys()):
        rivals = renaming.ambiguous[name]
        shown = " or ".join(f"'{rival}'" for rival in rivals[:2])
        raise MismatchError(
            f"'{weights[name].a}' of '{adapter.ref}' may adapt {shown} of {base.files[0]}: the "
            "names do not tell which. Fold it into its base with `PeftModel.merge_and_unload()`."
        )
    return renaming


def _may_be_transposed(shape: Sequence[int], stored: Sequence[int]) -> bool:
    return tuple(stored) in _possible_shapes(tuple(shape))


def _possible_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes in which a change of this shape may be stored: its matrices may be transposed."""
    return [shape, (*shape[:-2], *shape[:-3:-1])]


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
    elif not layer.kernel:
        shapes = _possible_shapes(layer.shape)
    if spec.shape not in shapes:
        cause = f"Was it trained on another model ({_named_base(adapter)})?"
        if layer.experts > 1 and len(spec.shape) == 3 and spec.shape[0] != layer.experts:
            cause = (
                f"The factors are those of {layer.experts} experts of rank {layer.rank}, and the "
                f"base has {spec.shape[0]}. {cause}"
            )
        if is_vocabulary(name) and spec.shape[1:] == layer.shape[1:]:
            cause = (
                "The vocabulary was resized before training, and the adapter does not hold the "
                f"rows that were added: name the base of {layer.rows} rows that it was trained on."
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
        f"{list(old)}. Was it trained on another model ({_named_base(adapter)})?"
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
            "names, by another version of transformers or as a piece of a larger model (such as "
            f"the language tower of a vision-language model). {FOLD}"
        )
    return f"Was it trained on another model than this ({_named_base(adapter)})?"


def _find_transposed(
    specs: Mapping[str, TensorSpec], adapter: Adapter, layers: Mapping[str, Layer]
) -> set[str]:
    """The matrices stored as (d_in, d_out), judged by their shapes.

    Square weights are taken to be laid out as the others are, or else as the config says.
    """
    is_transposed: dict[str, bool] = {}
    square: list[str] = []
    for name, layer in layers.items():
        if layer.kernel or layer.is_parameter:
            continue
        if layer.rows == layer.columns:
            square.append(name)
        else:
            is_transposed[name] = specs[name].shape == (layer.columns, layer.rows)
    layouts = set(is_transposed.values())
    if square and len(layouts) > 1:
        raise ConfigError(
            f"'{adapter.ref}' adapts transposed and ordinary layers, and the square '{square[0]}' "
            "may be either. Fold it into its base with `PeftModel.merge_and_unload()`."
        )
    flag = bool(adapter.config.get("fan_in_fan_out"))
    square_transposed = layouts.pop() if len(layouts) == 1 else flag
    return {n for n, yes in is_transposed.items() if yes} | (
        set(square) if square_transposed else set()
    )


def _find_transposed_stacks(
    view: View, specs: Mapping[str, TensorSpec], adapter: Adapter, layers: Mapping[str, Layer]
) -> set[str]:
    """The stacks of experts stored as (experts, d_in, d_out), judged by their shapes.

    Which of its factors PEFT takes for the rows of a square matrix depends on the model's code, so
    that square ones are taken to be laid out as the others are.

    Raises:
        ConfigError: There are only square ones.
    """
    stacks = {name: layer for name, layer in layers.items() if layer.experts > 1}
    square = [name for name, layer in stacks.items() if layer.rows == layer.columns]
    others = [name for name in stacks if name not in square]
    transposed = {name for name in others if specs[name].shape != stacks[name].shape}
    # Experts that files hold one by one are ordinary matrices, and memory has them as they are.
    unknown = [name for name in square if name not in view.segments]
    if unknown and len(transposed) in (0, len(others)) and others:
        return transposed | {name for name in unknown if transposed}
    if unknown:
        raise ConfigError(
            f"'{adapter.ref}' adapts '{unknown[0]}', whose experts are square, and nothing in it "
            f"tells whether {view.files[0]} stores them transposed. {FOLD}"
        )
    return transposed


def _named_base(adapter: Adapter) -> str:
    return f"{CONFIG} names '{adapter.config.get('base_model_name_or_path')}'"


def _some(names: Sequence[str]) -> str:
    first, *others = names
    return f"'{first}'" + (f" and {len(others)} more" if others else "")
